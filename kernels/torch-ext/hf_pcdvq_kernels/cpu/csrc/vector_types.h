// Vectors of BYTES bytes as the compilers' own vector types, whose arithmetic it knows on every CPU.
#pragma once

typedef int8_t Int8 __attribute__((vector_size(BYTES)));
typedef uint8_t UInt8 __attribute__((vector_size(BYTES)));
typedef int16_t Int16 __attribute__((vector_size(BYTES)));
typedef int32_t Int32 __attribute__((vector_size(BYTES)));
typedef uint32_t UInt32 __attribute__((vector_size(BYTES)));
typedef float Float32 __attribute__((vector_size(BYTES)));

constexpr int LANES = BYTES / 4;  // of four bytes
constexpr int STEP = 2 * BYTES;   // inputs that are decoded together: LANES vectors of eight

template <class Vector>
INLINE Vector load(const void* from) {
    Vector vector;
    __builtin_memcpy(&vector, from, sizeof vector);
    return vector;
}

// A number at any address.
template <class Number>
INLINE Number number_at(const void* from, int64_t index) {
    Number number;
    __builtin_memcpy(&number, (const char*)from + index * (int64_t)sizeof number, sizeof number);
    return number;
}

template <class To, class From>
INLINE To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    return number_at<To>(&from, 0);
}

template <class Vector>
INLINE void store(void* to, Vector vector) {
    __builtin_memcpy(to, &vector, sizeof vector);
}

INLINE Float32 broadcast(float value) { return value - Float32{}; }

// --------------------------------------------------------------------------------------------------- vectors of eight

// Which of a step's vectors of eight weights is in a lane, and the reverse: an order that shuffles within 16 bytes can make.
constexpr int vector_in(int lane) { return lane % 4 / 2 * (LANES / 2) + lane / 4 * 2 + lane % 2; }
constexpr int lane_of(int vector) {
    const int within = vector % (LANES / 2);
    return within / 2 * 4 + vector / (LANES / 2) * 2 + within % 2;
}

template <int HALF, size_t... LANE>
INLINE Int8 half_of_each(Int8 first, Int8 second, std::index_sequence<LANE...>) {
#if defined(__clang__)
    return (Int8)__builtin_shufflevector((Int32)first, (Int32)second, (2 * vector_in(LANE) + HALF)...);
#else
    return (Int8)__builtin_shuffle((Int32)first, (Int32)second, Int32{(2 * vector_in(LANE) + HALF)...});
#endif
}

// Of a step's weights, in lanes: elements 0 and 2 of each vector, then 1 and 3, 4 and 6, 5 and 7.
INLINE void widen(Int8 first, Int8 second, Int16 (&pairs)[4]) {
    typedef std::make_index_sequence<LANES> Lanes;
    const Int16 low = (Int16)half_of_each<0>(first, second, Lanes()), high = (Int16)half_of_each<1>(first, second, Lanes());
    pairs[0] = low << 8 >> 8;
    pairs[1] = low >> 8;
    pairs[2] = high << 8 >> 8;
    pairs[3] = high >> 8;
}

// The factors of the elements from `i` on, of which every eight share one.
INLINE Float32 every_eight(const float* factor, int i) {
    if constexpr (LANES == 16) {
        Int32 second;
        for (int lane = 0; lane < LANES; lane++) second[lane] = lane < 8 ? 0 : -1;
        return second ? broadcast(factor[i / 8 + 1]) : broadcast(factor[i / 8]);
    } else {
        return broadcast(factor[i / 8]);
    }
}

INLINE Float32 to_float(Int32 x) { return __builtin_convertvector(x, Float32); }
