// The kernels for AVX2.
#include "table.h"

#if defined(__x86_64__)
#include <immintrin.h>

// What follows must not be shared with code for other CPUs, so that it stays in this file.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace {
#define INLINE inline __attribute__((always_inline))
constexpr int BYTES = 32;
constexpr int ROW_TOKENS = 4;  // sums of the other formats that are kept in registers, where that leaves more than one row
constexpr bool DECODES_AHEAD = false;  // whether weights are decoded one step before they are multiplied
constexpr int CHANNEL_TOKENS = 8;  // sums of `stream` that are kept in registers
#include "vectors_avx2.h"
#include "kernels.h"
}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels* avx2_kernels() {
    // Every CPU with AVX2 and FMA converts float16.
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &KERNELS : nullptr;
}

#else
const Kernels* avx2_kernels() { return nullptr; }
#endif
