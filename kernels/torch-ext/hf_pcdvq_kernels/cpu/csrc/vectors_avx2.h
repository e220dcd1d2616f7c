// Vectors of 32 bytes: AVX2 with FMA and F16C (Haswell, Zen and later).
#pragma once
#include "vector_types.h"
#include "sign_table.h"

INLINE Float32 multiply_add(Float32 a, Float32 b, Float32 sum) { return (Float32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum); }

// -------------------------------------------------------------------------------------------------- products

// `first` plus, for every two elements, the sum of their products.
INLINE Int32 products(Int16 a, Int16 b) { return (Int32)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
INLINE Int32 add_products(Int32 first, Int16 a, Int16 b) { return first + products(a, b); }

// The first four and the last four of each of a step's vectors of eight bytes; lanes as in `vector_in`.
INLINE Int8 first_fours(Int8 a, Int8 b) {
    return (Int8)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
}
INLINE Int8 last_fours(Int8 a, Int8 b) {
    return (Int8)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xDD);
}

// For every element the sum of its four signed bytes.
INLINE Int32 sum_of_bytes(Int32 bytes) {
    return (Int32)_mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), (__m256i)bytes), _mm256_set1_epi16(1));
}

// Elements of two vectors as 16 bits: in every 16 bytes four of the first, then four of the second.
INLINE Int16 narrow(Int32 first, Int32 second) { return (Int16)_mm256_packs_epi32((__m256i)first, (__m256i)second); }

// The low 32 bits of (high:low) >> shift.
INLINE Int32 funnel(Int32 high, Int32 low, int shift) {
    return (Int32)_mm256_or_si256(_mm256_srlv_epi32((__m256i)low, _mm256_set1_epi32(shift)),
                                  _mm256_sllv_epi32((__m256i)high, _mm256_set1_epi32(32 - shift)));
}
template <int SHIFT>
INLINE Int32 funnel(Int32 high, Int32 low) {
    return (Int32)((UInt32)low >> SHIFT | (UInt32)high << (32 - SHIFT));
}

INLINE float sum(Float32 x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// 16 bytes, in both halves of the register.
INLINE __m256i twice(const uint8_t* from) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)from)); }

// ------------------------------------------------------------------------------------------------------- pcdvq

// Entries of a table of eight bytes each.
INLINE UInt8 lookup(const void* table, const uint32_t* index) {
    return (UInt8)_mm256_set_epi64x(number_at<uint64_t>(table, index[3]), number_at<uint64_t>(table, index[2]), number_at<uint64_t>(table, index[1]), number_at<uint64_t>(table, index[0]));
}

// Give the weights of a step the signs that the seven sign bits of each of its words say; that of the eighth weight is their parity.
INLINE void give_signs(const uint8_t* words, Int8& a, Int8& b) {
    const uint32_t of_a[4] = {words[0] & 127u, words[2] & 127u, words[4] & 127u, words[6] & 127u};
    a = (Int8)_mm256_sign_epi8((__m256i)a, (__m256i)lookup(SIGN_TABLE.entries, of_a));
    const uint32_t of_b[4] = {words[8] & 127u, words[10] & 127u, words[12] & 127u, words[14] & 127u};
    b = (Int8)_mm256_sign_epi8((__m256i)b, (__m256i)lookup(SIGN_TABLE.entries, of_b));
}

// Levels of a step's vectors: of two bits for each, lowest first; of the two highest bits of words.
INLINE Float32 choose(const float* levels, __m256i index) {
    return (Float32)_mm256_permutevar8x32_ps(_mm256_broadcast_ps((const __m128*)levels), index);  // by the lowest bits
}
INLINE Float32 levels_of(const float* levels, const uint8_t* bits) {
    const __m256i shifts = _mm256_set_epi32(14, 12, 6, 4, 10, 8, 2, 0);
    return choose(levels, _mm256_srlv_epi32(_mm256_set1_epi32(number_at<uint16_t>(bits, 0)), shifts));
}
INLINE Float32 levels_in_words(const float* levels, const uint8_t* words) {
    // Each word to the upper half of its lane.
    const __m256i places = _mm256_set_epi32(0x0F0E0000, 0x0D0C0000, 0x07060000, 0x05040000, 0x0B0A0000, 0x09080000, 0x03020000, 0x01000000);
    return choose(levels, _mm256_srli_epi32(_mm256_shuffle_epi8(twice(words), places), 30));
}

// --------------------------------------------------------------------------------------------------------- ccq

// Windows of four bits; three per byte, at bits 4, 2 and 0.
INLINE UInt8 windows_2_75(const uint8_t* group, int part) {
    alignas(32) static constexpr struct Tables {
        uint8_t place[2][32], mask[2][3][32];
        constexpr Tables() : place(), mask() {
            for (int i = 0; i < 64; i++) {
                place[i / 32][i % 32] = i / 3 - (i < 32 ? 0 : 6);  // the second half reads bytes 6 to 21
                mask[i / 32][i % 3][i % 32] = 15;
            }
        }
    } tables;
    __m256i bytes = _mm256_shuffle_epi8(twice(group + 6 * part), _mm256_load_si256((const __m256i*)tables.place[part]));
    const __m256i* mask = (const __m256i*)tables.mask[part];
    __m256i first = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask[0]);
    __m256i second = _mm256_and_si256(_mm256_srli_epi16(bytes, 2), mask[1]);
    return (UInt8)_mm256_or_si256(_mm256_or_si256(first, second), _mm256_and_si256(bytes, mask[2]));
}

// Windows of three bits; seven per word, at bits 13, 11, 9, 6, 4, 2 and 0.
INLINE UInt8 windows_2_5(const uint8_t* group, int part) {
    alignas(32) static constexpr struct Tables {
        uint8_t place[2][2][32];
        uint16_t factor[2][2][16];
        constexpr Tables() : place(), factor() {
            const int shifts[7] = {13, 11, 9, 6, 4, 2, 0};
            for (int i = 0; i < 64; i++) {
                // Packing two vectors interleaves runs of eight.
                const int part = i / 32, vector = i / 8 % 2, lane = i % 32 / 16 * 8 + i % 8;
                const int byte = i / 7 * 2 - 4 * part;  // the second half reads bytes 4 to 19
                place[part][vector][2 * lane] = byte;
                place[part][vector][2 * lane + 1] = byte + 1;
                factor[part][vector][lane] = 1 << (13 - shifts[i % 7]);  // shifts the window to the top
            }
        }
    } tables;
    const __m256i bytes = twice(group + 4 * part);
    __m256i windows[2];
    for (int v = 0; v < 2; v++) {
        __m256i words = _mm256_shuffle_epi8(bytes, _mm256_load_si256((const __m256i*)tables.place[part][v]));
        words = _mm256_mullo_epi16(words, _mm256_load_si256((const __m256i*)tables.factor[part][v]));
        windows[v] = _mm256_srli_epi16(words, 13);
    }
    return (UInt8)_mm256_packus_epi16(windows[0], windows[1]);
}

// Windows of six bits; four per code word, at bits 9, 6, 3 and 0. A byte is mapped to its code word.
INLINE UInt8 windows_2_0625(const uint8_t* group, int part, float code_scale, float code_zero) {
    __m256 bytes = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(group + 8 * part))));
    __m256 code = _mm256_add_ps(_mm256_mul_ps(bytes, _mm256_set1_ps(code_scale)), _mm256_set1_ps(code_zero));
    code = _mm256_floor_ps(_mm256_add_ps(code, _mm256_set1_ps(0.5f)));
    const UInt32 word = (UInt32)_mm256_cvttps_epi32(code);
    return (UInt8)((word >> 9 & 0x3F) | (word << 2 & 0x3F00) | (word << 13 & 0x3F0000) | (word << 24 & 0x3F000000));
}

// ------------------------------------------------------------------------------------------------------ float16

INLINE Float32 from_half(const uint16_t* x) { return (Float32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x)); }
INLINE void to_half(uint16_t* y, Float32 x) { _mm_storeu_si128((__m128i*)y, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT)); }
