// Activations: rotated in blocks, then quantized to 15 bits in blocks of BLOCK, each with a scale.
//
// What is prepared for one token: int16 [padded], then float32 scales [blocks]. The values are in the order in which the kernels
// multiply them, which depends on the instruction set, see `place`.
#pragma once

constexpr int LARGEST = 127 * 128;  // sums of products with any block of weights fit in 32 bits

struct Quantized {
    const int16_t* values;
    const float* scale;
};

INLINE Quantized view(const int32_t* prepared, int64_t token, int64_t columns) {
    const int32_t* start = prepared + token * prepared_words(columns);
    return {(const int16_t*)start, (const float*)(start + padded(columns) / 2)};
}

INLINE bool is_stream(int32_t format) { return format >= HFP_STREAM_2_0 && format <= HFP_STREAM_4_0; }

// Where the value of input `i` of a group is. Formats stored by rows: in every BYTES inputs, the first four of every eight come
// before all others, see `widen`. `stream`: in every 2 * LANES, four of the first half and four of the second alternate, see `narrow`.
INLINE int place(bool stream, int i) {
    const int run = stream ? 2 * LANES : BYTES, j = i % run;
    return i - j + (stream ? j % LANES / 4 * 8 + j / LANES * 4 + j % 4 : j / 8 * 4 + j % 4 + (j % 8 < 4 ? 0 : BYTES / 2));
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

// Quantize `BLOCK` values, or what is left of them, with padding of zeros up to a multiple of GROUP.
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

// Quantize a token's activations, padded with zeros to `padded(columns)`.
template <bool STREAM>
INLINE void quantize(const float* x, int64_t columns, int32_t* prepared) {
    const Quantized out = view(prepared, 0, columns);
    int16_t* values = (int16_t*)out.values;
    int32_t integers[BLOCK];
    for (int64_t start = 0; start < padded(columns); start += BLOCK) {
        const int64_t count = padded(columns) - start < BLOCK ? padded(columns) - start : BLOCK;
        ((float*)out.scale)[start / BLOCK] = quantize_block(x + start, count, integers);
        for (int64_t group = 0; group < count; group += GROUP)
#pragma GCC unroll 64
            for (int i = 0; i < GROUP; i++) values[start + group + place(STREAM, i)] = (int16_t)integers[group + i];
    }
}

void prepare_token(int32_t format, const void* x, int32_t dtype, int64_t columns, const float* signs, int64_t block, int32_t* prepared,
                   float* scratch) {
    for (int64_t k = 0; k < columns; k += LANES) store(scratch + k, read(x, dtype, k, columns - k));
    if (signs) rotate(scratch, columns, signs, block, false);
    for (int64_t k = (columns + LANES - 1) / LANES * LANES; k < padded(columns); k++) scratch[k] = 0;
    if (is_stream(format))
        quantize<true>(scratch, columns, prepared);
    else
        quantize<false>(scratch, columns, prepared);
}
