// The kernels for every other CPU, 64-bit ARM among them.
#include "table.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {
#define INLINE inline __attribute__((always_inline))
constexpr int BYTES = 16;
constexpr int ROWS_AT_ONCE = 2;
constexpr int TOKENS_AT_ONCE = 4;
constexpr int CHANNEL_TOKENS = 8;  // sums of `stream` that are kept in registers
#include "vectors_portable.h"
#include "kernels.h"
}  // namespace

const Kernels* portable_kernels() { return &KERNELS; }
