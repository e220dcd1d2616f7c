// Vectors of 16 bytes in plain C++, for every CPU; on 64-bit ARM its instructions are NEON's.
#pragma once
#include "vector_types.h"
#include "sign_table.h"

INLINE Float32 multiply_add(Float32 a, Float32 b, Float32 sum) { return a * b + sum; }

// -------------------------------------------------------------------------------------------------- products

// For every two elements, the sum of their products.
#if defined(__aarch64__)
INLINE Int32 products(Int16 a, Int16 b) {
    const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
    return (Int32)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
}
#else
INLINE Int32 products(Int16 a, Int16 b) {
    const Int32 x = (Int32)a, y = (Int32)b;
    return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
}
#endif
INLINE Int32 add_products(Int32 first, Int16 a, Int16 b) { return first + products(a, b); }

// The first four and the last four of each of a step's vectors of eight bytes; lanes as in `vector_in`.
INLINE Int8 first_fours(Int8 a, Int8 b) {
    return (Int8)Int32{((Int32)a)[0], ((Int32)a)[2], ((Int32)b)[0], ((Int32)b)[2]};
}
INLINE Int8 last_fours(Int8 a, Int8 b) {
    return (Int8)Int32{((Int32)a)[1], ((Int32)a)[3], ((Int32)b)[1], ((Int32)b)[3]};
}

// For every element the sum of its four signed bytes.
INLINE Int32 sum_of_bytes(Int32 bytes) { return (bytes << 24 >> 24) + (bytes << 16 >> 24) + (bytes << 8 >> 24) + (bytes >> 24); }

// Elements of two vectors as 16 bits: in every 16 bytes four of the first, then four of the second.
INLINE Int16 narrow(Int32 first, Int32 second) {
    typedef int16_t Half __attribute__((vector_size(BYTES / 2)));
    struct {
        Half first, second;
    } both = {__builtin_convertvector(first, Half), __builtin_convertvector(second, Half)};
    return same_bits<Int16>(both);
}

// The low 32 bits of (high:low) >> shift.
INLINE Int32 funnel(Int32 high, Int32 low, int shift) {
    return (Int32)((UInt32)low >> (UInt32{} + (uint32_t)shift) | (UInt32)high << 1 << (UInt32{} + (uint32_t)(31 - shift)));
}
template <int SHIFT>
INLINE Int32 funnel(Int32 high, Int32 low) {
    return (Int32)((UInt32)low >> SHIFT | (UInt32)high << (32 - SHIFT));
}

INLINE float sum(Float32 x) { return (x[0] + x[1]) + (x[2] + x[3]); }

// ------------------------------------------------------------------------------------------------------- pcdvq

// Entries of a table of eight bytes each.
INLINE UInt8 lookup(const void* table, const uint32_t* index) {
    const uint64_t entries[2] = {number_at<uint64_t>(table, index[0]), number_at<uint64_t>(table, index[1])};
    return load<UInt8>(entries);
}

// Give the weights of a step the signs that the seven sign bits of each of its words say; that of the eighth weight is their parity.
INLINE void give_signs(const uint8_t* words, Int8& a, Int8& b) {
    const uint32_t seven[4] = {words[0] & 127u, words[2] & 127u, words[4] & 127u, words[6] & 127u};
    a *= (Int8)lookup(SIGN_TABLE.entries, seven);
    b *= (Int8)lookup(SIGN_TABLE.entries, seven + 2);
}

// Levels of a step's vectors: of two bits for each, lowest first; of the two highest bits of words.
INLINE Float32 levels_of(const float* levels, const uint8_t* bits) {
    return Float32{levels[*bits & 3], levels[*bits >> 2 & 3], levels[*bits >> 4 & 3], levels[*bits >> 6]};
}
INLINE Float32 levels_in_words(const float* levels, const uint8_t* words) {
    return Float32{levels[words[1] >> 6], levels[words[3] >> 6], levels[words[5] >> 6], levels[words[7] >> 6]};
}

// --------------------------------------------------------------------------------------------------------- ccq

// Windows of four bits; three per byte, at bits 4, 2 and 0.
INLINE UInt8 windows_2_75(const uint8_t* group, int part) {
    uint8_t windows[BYTES];
    for (int i = 0; i < BYTES; i++) {
        const int window = part * BYTES + i;
        windows[i] = group[window / 3] >> (4 - 2 * (window % 3)) & 15;
    }
    return load<UInt8>(windows);
}

// Windows of three bits; seven per word, at bits 13, 11, 9, 6, 4, 2 and 0.
INLINE UInt8 windows_2_5(const uint8_t* group, int part) {
    static constexpr int shifts[7] = {13, 11, 9, 6, 4, 2, 0};
    uint8_t windows[BYTES];
    for (int i = 0; i < BYTES; i++) {
        const int window = part * BYTES + i, word = window / 7;
        windows[i] = (group[2 * word] | group[2 * word + 1] << 8) >> shifts[window % 7] & 7;
    }
    return load<UInt8>(windows);
}

// As x86 converts: values out of range become the lowest integer.
INLINE int32_t to_int(float x) { return x >= -2147483648.0f && x < 2147483648.0f ? (int32_t)x : INT32_MIN; }

// Windows of six bits; four per code word, at bits 9, 6, 3 and 0. A byte is mapped to its code word.
INLINE UInt8 windows_2_0625(const uint8_t* group, int part, float code_scale, float code_zero) {
    UInt32 word;
    for (int i = 0; i < LANES; i++) {
        const float code = (float)group[LANES * part + i] * code_scale + code_zero;
        word[i] = (uint32_t)to_int(__builtin_floorf(code + 0.5f));
    }
    return (UInt8)((word >> 9 & 0x3F) | (word << 2 & 0x3F00) | (word << 13 & 0x3F0000) | (word << 24 & 0x3F000000));
}

// ------------------------------------------------------------------------------------------------------ float16

// In integers, because many compilers lack a type for it.

INLINE float half_to_float(uint16_t half) {
    const uint32_t magnitude = half & 0x7FFF, sign = (uint32_t)(half & 0x8000) << 16;
    // As the bits of a float it is too small by 2^112, subnormal or not.
    const float scaled = same_bits<float>(magnitude << 13) * 0x1p112f;
    const uint32_t bits = magnitude < 0x7C00 ? same_bits<uint32_t>(scaled) : 0x7F800000 | magnitude << 13;
    return same_bits<float>(bits | sign);
}

INLINE uint16_t float_to_half(float x) {
    const uint32_t bits = same_bits<uint32_t>(x), magnitude = bits & 0x7FFFFFFF;
    uint32_t half;
    if (magnitude > 0x7F800000) {
        half = 0x7E00;  // NaN
    } else if (magnitude >= 0x477FF000) {
        half = 0x7C00;  // rounds to infinity
    } else if (magnitude < 0x38800000) {
        // Subnormal: adding 0.5 leaves the bits of the result, rounded, at the end of the sum.
        const float sum = same_bits<float>(magnitude) + 0.5f;
        half = same_bits<uint32_t>(sum) - 0x3F000000;
    } else {
        half = (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    }
    return (uint16_t)(half | (bits >> 16 & 0x8000));
}

INLINE Float32 from_half(const uint16_t* x) {
    Float32 result;
    for (int i = 0; i < LANES; i++) result[i] = half_to_float(x[i]);
    return result;
}

INLINE void to_half(uint16_t* y, Float32 x) {
    for (int i = 0; i < LANES; i++) y[i] = float_to_half(x[i]);
}
