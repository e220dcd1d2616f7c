// Everything that is compiled for each instruction set: included after the header of its vectors.
#pragma once
#include "floats.h"
#include "activations.h"

// Results [T, N] of products.
struct Output {
    void* y;
    int32_t dtype;
    int64_t rows;  // N

    INLINE void put(int64_t token, int64_t n, float value) const { write(y, dtype, token * rows + n, broadcast(value), 1); }
};

#include "rows.h"
#include "pcdvq.h"
#include "ccq.h"
#include "int8.h"
#include "stream.h"

template <class Product, int TOKENS>
INLINE void multiply_tokens(const HfpWeight& weight, int64_t start, int64_t stop, const int32_t* prepared, int64_t token, const Output& y) {
    Quantized x[TOKENS];
    for (int t = 0; t < TOKENS; t++) x[t] = view(prepared, token + t, weight.columns);
    Product::template multiply<TOKENS>(weight, start, stop, x, y, token);
}

// Products with tokens, as many at a time as registers hold.
template <class Product>
void multiply(const HfpWeight& weight, int64_t start, int64_t stop, const int32_t* prepared, int64_t tokens, void* y, int32_t dtype) {
    const Output out = {y, dtype, weight.rows};
    int64_t token = 0;
    if constexpr (TOKENS_AT_ONCE >= 8)
        for (; token + 8 <= tokens; token += 8) multiply_tokens<Product, 8>(weight, start, stop, prepared, token, out);
    if constexpr (TOKENS_AT_ONCE >= 4)
        for (; token + 4 <= tokens; token += 4) multiply_tokens<Product, 4>(weight, start, stop, prepared, token, out);
    if constexpr (TOKENS_AT_ONCE >= 2)
        for (; token + 2 <= tokens; token += 2) multiply_tokens<Product, 2>(weight, start, stop, prepared, token, out);
    for (; token < tokens; token++) multiply_tokens<Product, 1>(weight, start, stop, prepared, token, out);
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
