// What is compiled once for every instruction set, as a table of functions.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <type_traits>
#include <utility>

#include "interface.h"

constexpr int BLOCK = 256;    // activations with one scale
constexpr int PADDING = 128;  // the most inputs that any instruction set decodes together

constexpr int TOKENS_AT_ONCE = 8;

inline int64_t rounded_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }
inline int64_t blocks_of(int64_t columns) { return (columns + BLOCK - 1) / BLOCK; }
// Room for the values of a token; words of int32 for its prepared form, a multiple of 64 bytes: int16 values and a float32 scale
// for every block.
inline int64_t padded(int64_t columns) { return rounded_up(columns, PADDING); }
inline int64_t prepared_words(int64_t columns) { return blocks_of(columns) * (BLOCK / 2) + rounded_up(blocks_of(columns), 16); }

// Tokens are multiplied in groups of a power of two, up to a quarter of which may be padding: how many of those left are next.
inline int64_t group_size(int64_t left) {
    int64_t size = TOKENS_AT_ONCE;
    while (4 * left < 3 * size) size /= 2;
    return size;
}
inline int64_t padded_tokens(int64_t tokens) {
    int64_t padded = 0;
    while (padded < tokens) padded += group_size(tokens - padded);
    return padded;
}

// A unit is what is decoded at once: a row of the weight or, in `stream`, a row of words.
struct FormatKernels {
    int64_t units, rows;  // so many units decode to so many rows

    // The products of units `start` to `stop` with prepared tokens, to [T, N].
    void (*multiply)(const HfpWeight&, int64_t start, int64_t stop, const int32_t* prepared, int64_t tokens, void* y, int32_t dtype);
    // Units `first` to `last`, as far as they belong to rows `start` to `stop`, to [stop - start, K].
    void (*decode)(const HfpWeight&, int64_t first, int64_t last, int64_t start, int64_t stop, void* out, int32_t dtype);
};

// `scratch` has room for a token's values rounded up to a multiple of PADDING.
struct Kernels {
    FormatKernels formats[HFP_FORMATS];
    // One of some tokens, `x`, to its place among all that are prepared.
    void (*prepare_token)(int32_t format, const void* x, int32_t dtype, int64_t columns, const float* signs, int64_t block,
                          int64_t token, int64_t tokens, int32_t* prepared, float* scratch);
    void (*rotate_row)(const void* x, int32_t dtype, int64_t columns, const float* signs, int64_t block, bool inverse, void* y,
                       float* scratch);
};

// Null if the CPU lacks the instructions, or the library was compiled for another kind of CPU.
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();
