// The kernels for every other CPU, 64-bit ARM among them.
#include "table.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {
#define INLINE inline __attribute__((always_inline))
constexpr int BYTES = 16;
constexpr int ROW_TOKENS = 4;  // sums of the other formats that are kept in registers, where that leaves more than one row
constexpr bool DECODES_AHEAD = false;  // whether weights are decoded one step before they are multiplied
constexpr int CHANNEL_TOKENS = 8;  // sums of `stream` that are kept in registers
#include "vectors_portable.h"
#include "kernels.h"
}  // namespace

const Kernels* portable_kernels() { return &KERNELS; }
