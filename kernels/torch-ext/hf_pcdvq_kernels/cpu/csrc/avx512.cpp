// The kernels for AVX-512.
#include "table.h"

#if defined(__x86_64__)
#include <immintrin.h>

// What follows must not be shared with code for other CPUs, so that it stays in this file.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx512bitalg,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx512bitalg,avx2,fma,f16c")
#endif

namespace {
#define INLINE inline __attribute__((always_inline))
constexpr int BYTES = 64;
constexpr int ROW_TOKENS = 4;  // sums of the other formats that are kept in registers, where that leaves more than one row
constexpr bool DECODES_AHEAD = true;  // whether weights are decoded one step before they are multiplied
constexpr int CHANNEL_TOKENS = 16;  // sums of `stream` that are kept in registers
#include "vectors_avx512.h"
#include "kernels.h"
}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels* avx512_kernels() {
    const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                      __builtin_cpu_supports("avx512bitalg");
    return runs ? &KERNELS : nullptr;
}

#else
const Kernels* avx512_kernels() { return nullptr; }
#endif
