// What is compiled once for every instruction set, as a table of functions.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <utility>

#include "interface.h"

constexpr int GROUP = 64;   // inputs that are decoded together
constexpr int BLOCK = 256;  // activations with one scale

// Room for the values of a token, and words of int32 for its prepared form: int16 values, then a float32 scale for every block.
inline int64_t padded(int64_t columns) { return (columns + GROUP - 1) / GROUP * GROUP; }
inline int64_t prepared_words(int64_t columns) { return padded(columns) / 2 + (columns + BLOCK - 1) / BLOCK; }

// A unit is what is decoded at once: a row of the weight or, in `stream`, a row of words.
struct FormatKernels {
    int64_t units, rows;  // so many units decode to so many rows

    // The products of units `start` to `stop` with prepared tokens, to [T, N].
    void (*multiply)(const HfpWeight&, int64_t start, int64_t stop, const int32_t* prepared, int64_t tokens, void* y, int32_t dtype);
    // Units `first` to `last`, as far as they belong to rows `start` to `stop`, to [stop - start, K].
    void (*decode)(const HfpWeight&, int64_t first, int64_t last, int64_t start, int64_t stop, void* out, int32_t dtype);
};

// `scratch` has room for the token's values rounded up to a multiple of 64.
struct Kernels {
    FormatKernels formats[HFP_FORMATS];
    void (*prepare_token)(int32_t format, const void* x, int32_t dtype, int64_t columns, const float* signs, int64_t block,
                          int32_t* prepared, float* scratch);
    void (*rotate_row)(const void* x, int32_t dtype, int64_t columns, const float* signs, int64_t block, bool inverse, void* y,
                       float* scratch);
};

// Null if the CPU lacks the instructions, or the library was compiled for another kind of CPU.
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();
