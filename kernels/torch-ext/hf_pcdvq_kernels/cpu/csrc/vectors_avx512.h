// Vectors of 64 bytes: AVX-512 with VNNI, VBMI, VBMI2 and BITALG (Ice Lake, Zen 4 and later).
#pragma once
#include "vector_types.h"

INLINE Float32 multiply_add(Float32 a, Float32 b, Float32 sum) { return (Float32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum); }

// -------------------------------------------------------------------------------------------------- products

// `first` plus, for every two elements, the sum of their products.
INLINE Int32 add_products(Int32 first, Int16 a, Int16 b) { return (Int32)_mm512_dpwssd_epi32((__m512i)first, (__m512i)a, (__m512i)b); }
INLINE Int32 products(Int16 a, Int16 b) { return (Int32)_mm512_madd_epi16((__m512i)a, (__m512i)b); }

// The first four and the last four of each of a step's vectors of eight bytes; lanes as in `vector_in`.
INLINE Int8 first_fours(Int8 a, Int8 b) {
    return (Int8)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88);
}
INLINE Int8 last_fours(Int8 a, Int8 b) {
    return (Int8)_mm512_shuffle_ps((__m512)a, (__m512)b, 0xDD);
}

// For every element the sum of its four signed bytes.
INLINE Int32 sum_of_bytes(Int32 bytes) {
    return (Int32)_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), (__m512i)bytes);
}

// Elements of two vectors as 16 bits: in every 16 bytes four of the first, then four of the second.
INLINE Int16 narrow(Int32 first, Int32 second) { return (Int16)_mm512_packs_epi32((__m512i)first, (__m512i)second); }

// The low 32 bits of (high:low) >> shift.
INLINE Int32 funnel(Int32 high, Int32 low, int shift) {
    return (Int32)_mm512_shrdv_epi32((__m512i)low, (__m512i)high, _mm512_set1_epi32(shift));
}
template <int SHIFT>
INLINE Int32 funnel(Int32 high, Int32 low) {
    return (Int32)_mm512_shrdi_epi32((__m512i)low, (__m512i)high, SHIFT);
}

INLINE float sum(Float32 x) { return _mm512_reduce_add_ps((__m512)x); }

// ------------------------------------------------------------------------------------------------------- pcdvq

// Entries of a table of eight bytes each.
INLINE UInt8 lookup(const void* table, const uint32_t* index) {
    __m256i low = _mm256_set_epi64x(number_at<uint64_t>(table, index[3]), number_at<uint64_t>(table, index[2]), number_at<uint64_t>(table, index[1]), number_at<uint64_t>(table, index[0]));
    __m256i high = _mm256_set_epi64x(number_at<uint64_t>(table, index[7]), number_at<uint64_t>(table, index[6]), number_at<uint64_t>(table, index[5]), number_at<uint64_t>(table, index[4]));
    return (UInt8)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Give the weights of a step the signs that the seven sign bits of each of its words say; that of the eighth weight is their parity.
INLINE void give_signs(const uint8_t* words, Int8& a, Int8& b) {
    const __m256i seven = _mm256_and_si256(_mm256_loadu_si256((const __m256i*)words), _mm256_set1_epi16(127));
    const __m128i eight = _mm256_cvtepi16_epi8(_mm256_or_si256(seven, _mm256_slli_epi16(_mm256_popcnt_epi16(seven), 7)));
    const __mmask64 of_a = (__mmask64)_mm_cvtsi128_si64(eight), of_b = (__mmask64)_mm_extract_epi64(eight, 1);
    a = (Int8)_mm512_mask_sub_epi8((__m512i)a, of_a, _mm512_setzero_si512(), (__m512i)a);
    b = (Int8)_mm512_mask_sub_epi8((__m512i)b, of_b, _mm512_setzero_si512(), (__m512i)b);
}

// Levels of a step's vectors: of two bits for each, lowest first; of the two highest bits of words.
INLINE Float32 choose(const float* levels, __m512i index) {
    return (Float32)_mm512_permutexvar_ps(index, _mm512_broadcast_f32x4(_mm_loadu_ps(levels)));  // by the lowest bits
}
INLINE Float32 levels_of(const float* levels, const uint8_t* bits) {
    const __m512i shifts = _mm512_set_epi32(30, 28, 14, 12, 26, 24, 10, 8, 22, 20, 6, 4, 18, 16, 2, 0);
    return choose(levels, _mm512_srlv_epi32(_mm512_set1_epi32(number_at<int32_t>(bits, 0)), shifts));
}
INLINE Float32 levels_in_words(const float* levels, const uint8_t* words) {
    // Each word to the upper half of its lane.
    const __m512i places = _mm512_slli_epi32(_mm512_set_epi32(15, 14, 7, 6, 13, 12, 5, 4, 11, 10, 3, 2, 9, 8, 1, 0), 16);
    const __m512i upper = _mm512_permutexvar_epi16(places, _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)words)));
    return choose(levels, _mm512_srli_epi32(upper, 30));
}

// --------------------------------------------------------------------------------------------------------- ccq

// Every eight windows of a group lie within 64 bits: bring these together, then take each window from its bit on.

// Windows of four bits; three per byte, at bits 4, 2 and 0.
INLINE UInt8 windows_2_75(const uint8_t* group, int) {
    alignas(64) static constexpr struct Tables {
        uint8_t place[64], bit[64];
        constexpr Tables() : place(), bit() {
            for (int lane = 0; lane < 8; lane++) {
                int first = lane * 8 / 3;  // byte of the lane's first window
                for (int i = 0; i < 8; i++) {
                    int byte = first + i, window = lane * 8 + i;
                    place[lane * 8 + i] = byte < 16 ? byte : byte < 22 ? byte + 10 : 0;
                    bit[lane * 8 + i] = (window / 3 - first) * 8 + 4 - 2 * (window % 3);
                }
            }
        }
    } tables;
    // Bytes 0 to 15 and, so that nothing beyond the group is read, 6 to 21.
    __m256i bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)group)),
                                            _mm_loadu_si128((const __m128i*)(group + 6)), 1);
    __m512i lanes = _mm512_permutexvar_epi8(_mm512_load_si512(tables.place), _mm512_castsi256_si512(bytes));
    return (UInt8)_mm512_multishift_epi64_epi8(_mm512_load_si512(tables.bit), lanes) & 15;
}

// Windows of three bits; seven per word, at bits 13, 11, 9, 6, 4, 2 and 0.
INLINE UInt8 windows_2_5(const uint8_t* group, int) {
    alignas(64) static constexpr struct Tables {
        uint8_t place[64], bit[64];
        constexpr Tables() : place(), bit() {
            const int shifts[7] = {13, 11, 9, 6, 4, 2, 0};
            for (int lane = 0; lane < 8; lane++) {
                int first = lane * 8 / 7;
                for (int i = 0; i < 8; i++) {
                    int byte = first * 2 + i, window = lane * 8 + i;
                    place[lane * 8 + i] = byte < 16 ? byte : byte < 20 ? byte + 12 : 0;
                    bit[lane * 8 + i] = (window / 7 - first) * 16 + shifts[window % 7];
                }
            }
        }
    } tables;
    // Bytes 0 to 15 and 4 to 19.
    __m256i bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)group)),
                                            _mm_loadu_si128((const __m128i*)(group + 4)), 1);
    __m512i lanes = _mm512_permutexvar_epi8(_mm512_load_si512(tables.place), _mm512_castsi256_si512(bytes));
    return (UInt8)_mm512_multishift_epi64_epi8(_mm512_load_si512(tables.bit), lanes) & 7;
}

// Windows of six bits; four per code word, at bits 9, 6, 3 and 0. A byte is mapped to its code word.
INLINE UInt8 windows_2_0625(const uint8_t* group, int, float code_scale, float code_zero) {
    const __m512i bits = _mm512_set1_epi64(0x2023262900030609);
    __m512 bytes = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)group)));
    __m512 code = _mm512_add_ps(_mm512_mul_ps(bytes, _mm512_set1_ps(code_scale)), _mm512_set1_ps(code_zero));
    code = _mm512_roundscale_ps(_mm512_add_ps(code, _mm512_set1_ps(0.5f)), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    return (UInt8)_mm512_multishift_epi64_epi8(bits, _mm512_cvttps_epi32(code)) & 63;
}

// ------------------------------------------------------------------------------------------------------ float16

INLINE Float32 from_half(const uint16_t* x) { return (Float32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x)); }
INLINE void to_half(uint16_t* y, Float32 x) { _mm256_storeu_si256((__m256i*)y, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT)); }
