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

// Fetch memory into the second cache.
INLINE void fetch(const void* from, int64_t bytes) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)from + i, 0, 2);
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
