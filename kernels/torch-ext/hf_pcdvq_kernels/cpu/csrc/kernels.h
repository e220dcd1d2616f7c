// Everything that is compiled for each instruction set: included after the header of its vectors.
#pragma once
#include "floats.h"
#include "activations.h"

// Results [T, N] of products.
struct Output {
    void* y;
    int32_t dtype;
    int64_t tokens, rows;  // T, N

    // The products of a row with some tokens, of which those beyond the last are padding.
    template <int TOKENS>
    INLINE void put(int64_t token, int64_t n, float scale, const Float32 (&products)[TOKENS]) const {
        for (int t = 0; t < TOKENS && token + t < tokens; t++)
            write(y, dtype, (token + t) * rows + n, broadcast(scale * sum(products[t])), 1);
    }
};

#include "rows.h"
#include "pcdvq.h"
#include "ccq.h"
#include "int8.h"
#include "stream.h"

// Products with the first group of tokens that are left, of `SIZE` or fewer. Returns the size of the group.
template <class Product, int SIZE>
INLINE int64_t multiply_group(const HfpWeight& weight, int64_t start, int64_t stop, const int32_t* prepared, const Output& y, int64_t token) {
    if constexpr (SIZE > 1)
        if (group_size(y.tokens - token) < SIZE)
            return multiply_group<Product, SIZE / 2>(weight, start, stop, prepared, y, token);
    Product::template multiply<SIZE>(weight, start, stop, Quantized<SIZE>(prepared, token, weight.columns), y, token);
    return SIZE;
}

template <class Product>
void multiply(const HfpWeight& weight, int64_t start, int64_t stop, const int32_t* prepared, int64_t tokens, void* y, int32_t dtype) {
    const Output out = {y, dtype, tokens, weight.rows};
    for (int64_t token = 0; token < tokens;)
        token += multiply_group<Product, TOKENS_AT_ONCE>(weight, start, stop, prepared, out, token);
}

template <class Product>
constexpr FormatKernels kernels_of() {
    return {Product::UNITS, Product::ROWS, multiply<Product>, Product::decode};
}

// In the order of HfpFormat.
constexpr Kernels KERNELS = {
    {
        kernels_of<Rows<Pcdvq<7>>>(),
        kernels_of<Rows<Pcdvq<9>>>(),
        kernels_of<Rows<Ccq<Layout_2_75>>>(),
        kernels_of<Rows<Ccq<Layout_2_5>>>(),
        kernels_of<Rows<Clustered>>(),
        kernels_of<Stream<StreamLayout<2>>>(),
        kernels_of<Stream<StreamLayout<2, 2, 2, 3>>>(),
        kernels_of<Stream<StreamLayout<2, 3>>>(),
        kernels_of<Stream<StreamLayout<3>>>(),
        kernels_of<Stream<StreamLayout<4>>>(),
        kernels_of<Rows<Bytes>>(),
    },
    prepare_token,
    rotate_row,
};
