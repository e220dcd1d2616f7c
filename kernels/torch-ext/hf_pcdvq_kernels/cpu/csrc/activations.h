// Activations: rotated in blocks, then quantized to 15 bits in blocks of BLOCK, each with a scale.
//
// Tokens are prepared in groups, which are multiplied together: for every block the int16 values of all tokens of the group, one
// token after the other, and behind the last block the float32 scales in the same order. The values of a block are in the order in
// which the kernels multiply them, which depends on the instruction set, see `place`.
#pragma once

constexpr int LARGEST = 127 * 128;  // sums of products with any block of weights fit in 32 bits

template <int TOKENS>
struct Quantized {
    const int16_t* values;
    const float* scales;

    Quantized(const int32_t* prepared, int64_t first, int64_t columns)
        : values((const int16_t*)(prepared + first * prepared_words(columns))),
          scales((const float*)(values + blocks_of(columns) * TOKENS * BLOCK)) {}

    INLINE const int16_t* of(int64_t block, int token) const { return values + (block * TOKENS + token) * BLOCK; }
    INLINE Float32 scale(int64_t block, int token) const { return broadcast(scales[block * TOKENS + token]); }
};

INLINE bool is_stream(int32_t format) { return format >= HFP_STREAM_2_0 && format <= HFP_STREAM_4_0; }

// Where the value of input `i` of a step is. Formats stored by rows: in the order of `widen`. `stream`: in every 2 * LANES, four of
// the first half and four of the second alternate, see `narrow`.
INLINE int place(bool stream, int i) {
    if (!stream) return ((i % 8 / 4 * 2 + i % 2) * LANES + lane_of(i / 8)) * 2 + i % 4 / 2;
    const int j = i % (2 * LANES);
    return i - j + j % LANES / 4 * 8 + j / LANES * 4 + j % 4;
}

// ------------------------------------------------------------------------------------------------------ rotation

template <int DISTANCE, size_t... I>
INLINE Float32 exchange(Float32 x, std::index_sequence<I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(x, x, (I ^ DISTANCE)...);
#else
    return __builtin_shuffle(x, Int32{(I ^ DISTANCE)...});
#endif
}

template <int DISTANCE, size_t... I>
INLINE Float32 alternating(std::index_sequence<I...>) {
    return Float32{(I & DISTANCE ? -1.0f : 1.0f)...};
}

// Sums and differences of the elements of a vector at DISTANCE from each other, as far as blocks reach.
template <int DISTANCE>
INLINE Float32 butterfly(Float32 x, int64_t block) {
    if constexpr (DISTANCE < LANES) {
        typedef std::make_index_sequence<LANES> Lanes;
        if (DISTANCE < block) x = multiply_add(x, alternating<DISTANCE>(Lanes()), exchange<DISTANCE>(x, Lanes()));
        return butterfly<2 * DISTANCE>(x, block);
    } else {
        return x;
    }
}

// The Walsh-Hadamard transform, in Sylvester's order and not normalized, of blocks of a power of two; `count` values, padded
// to a multiple of LANES.
void transform(float* x, int64_t count, int64_t block) {
    for (int64_t i = 0; i < count; i += LANES) store(x + i, butterfly<1>(load<Float32>(x + i), block));
    for (int64_t distance = LANES; distance < block; distance *= 2)
        for (int64_t start = 0; start < count; start += 2 * distance)
            for (int64_t i = start; i < start + distance; i += LANES) {
                const Float32 a = load<Float32>(x + i), b = load<Float32>(x + i + distance);
                store(x + i, a + b);
                store(x + i + distance, a - b);
            }
}

// Multiply by the signs, repeated, and a factor.
INLINE void scale_by_signs(float* x, int64_t count, const float* signs, int64_t block, float factor) {
    if (block >= LANES)
        for (int64_t i = 0; i < count; i += LANES)
            store(x + i, load<Float32>(x + i) * load<Float32>(signs + i % block) * factor);
    else
        for (int64_t i = 0; i < count; i++) x[i] *= signs[i % block] * factor;
}

// `x` has room for `columns` rounded up to a multiple of LANES.
void rotate(float* x, int64_t columns, const float* signs, int64_t block, bool inverse) {
    const float factor = 1.0f / __builtin_sqrtf((float)block);
    if (!inverse) scale_by_signs(x, columns, signs, block, factor);
    transform(x, columns, block);
    if (inverse) scale_by_signs(x, columns, signs, block, factor);
}

void rotate_row(const void* x, int32_t dtype, int64_t columns, const float* signs, int64_t block, bool inverse, void* y, float* scratch) {
    for (int64_t k = 0; k < columns; k += LANES) store(scratch + k, read(x, dtype, k, columns - k));
    rotate(scratch, columns, signs, block, inverse);
    for (int64_t k = 0; k < columns; k += LANES) write(y, dtype, k, load<Float32>(scratch + k), columns - k);
}

// ---------------------------------------------------------------------------------------------------- quantizing

// Quantize `BLOCK` values, or what is left of them, with padding of zeros up to a multiple of PADDING.
// Returns the scale. Values that are not finite make it NaN, and with it every product.
INLINE float quantize_block(const float* x, int64_t count, int32_t* out) {
    Int32 bits = {};
    for (int64_t k = 0; k < count; k += LANES) {
        const Int32 magnitude = (Int32)load<UInt32>(x + k) & 0x7FFFFFFF;
        bits = bits > magnitude ? bits : magnitude;
    }
    int32_t largest_bits = 0;
    for (int i = 0; i < LANES; i++) largest_bits = largest_bits > bits[i] ? largest_bits : bits[i];
    float largest;
    __builtin_memcpy(&largest, &largest_bits, 4);
    const bool finite = largest <= 3.4028234e38f;
    // The smallest values have no reciprocal in float32.
    const float factor = finite && largest > 1e-34f ? LARGEST / largest : 0;
    const float magic = 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer, which its low bits hold
    for (int64_t k = 0; k < count; k += LANES) {
        const Float32 sum = finite ? load<Float32>(x + k) * factor + magic : broadcast(magic);
        store(out + k, (Int32)sum - 0x4B400000);
    }
    return finite ? factor ? largest / LARGEST : 0 : __builtin_nanf("");
}

// Where a token's blocks go: to `values`, one every `tokens` blocks, and scales likewise.
struct Place {
    int16_t* values;
    float* scales;
    int64_t tokens;

    Place(int64_t token, int64_t tokens_of_all, int64_t columns, int32_t* prepared) {
        int64_t first = token / TOKENS_AT_ONCE * TOKENS_AT_ONCE;  // groups before the last eight tokens or fewer are whole
        while (tokens = group_size(tokens_of_all - first), first + tokens <= token) first += tokens;
        int16_t* start = (int16_t*)(prepared + first * prepared_words(columns));
        values = start + (token - first) * BLOCK;
        scales = (float*)(start + blocks_of(columns) * tokens * BLOCK) + (token - first);
    }
};

// Quantize a token's activations, padded with zeros to `padded(columns)`.
template <bool STREAM>
INLINE void quantize(const float* x, int64_t columns, const Place& out) {
    int32_t integers[BLOCK];
    for (int64_t block = 0; block < blocks_of(columns); block++) {
        const int64_t start = block * BLOCK, count = padded(columns) - start < BLOCK ? padded(columns) - start : BLOCK;
        out.scales[block * out.tokens] = quantize_block(x + start, count, integers);
        int16_t* values = out.values + block * out.tokens * BLOCK;
        for (int64_t step = 0; step < count; step += STEP)
#pragma GCC unroll 128
            for (int i = 0; i < STEP; i++) values[step + place(STREAM, i)] = (int16_t)integers[step + i];
    }
}

void prepare_token(int32_t format, const void* x, int32_t dtype, int64_t columns, const float* signs, int64_t block, int64_t token,
                   int64_t tokens, int32_t* prepared, float* scratch) {
    for (int64_t k = 0; k < columns; k += LANES) store(scratch + k, read(x, dtype, k, columns - k));
    if (signs) rotate(scratch, columns, signs, block, false);
    for (int64_t k = (columns + LANES - 1) / LANES * LANES; k < padded(columns); k++) scratch[k] = 0;
    const Place out(token, tokens, columns, prepared);
    if (is_stream(format))
        quantize<true>(scratch, columns, out);
    else
        quantize<false>(scratch, columns, out);
}
