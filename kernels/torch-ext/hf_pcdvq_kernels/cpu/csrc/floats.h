// Reading and writing activations and weights in the dtypes of PyTorch. Arithmetic is float32; results are rounded to nearest,
// ties to even.
#pragma once

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

INLINE Float32 read_vector(const float* x) { return load<Float32>(x); }
INLINE Float32 read_vector(const BFloat16* x) {
    typedef uint16_t Halves __attribute__((vector_size(BYTES / 2)));
    return (Float32)(__builtin_convertvector(load<Halves>(x), UInt32) << 16);
}
INLINE Float32 read_vector(const Float16* x) { return from_half(&x->bits); }

INLINE void write_vector(float* y, Float32 x) { store(y, x); }
INLINE void write_vector(BFloat16* y, Float32 x) {
    typedef uint16_t Halves __attribute__((vector_size(BYTES / 2)));
    const UInt32 bits = (UInt32)x, rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const UInt32 is_nan = (UInt32)(x != x);
    store(y, __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7FC0), Halves));
}
INLINE void write_vector(Float16* y, Float32 x) { to_half(&y->bits, x); }

// The `count` first elements from an index on, of memory with a dtype of the interface; zeros instead of others.
template <class Float>
INLINE Float32 read_some(const Float* x, int64_t count) {
    if (__builtin_expect(count >= LANES, 1)) return read_vector(x);
    Float all[LANES] = {};
    __builtin_memcpy(all, x, count * sizeof(Float));
    return read_vector(all);
}
template <class Float>
INLINE void write_some(Float* y, Float32 x, int64_t count) {
    if (__builtin_expect(count >= LANES, 1)) return write_vector(y, x);
    Float all[LANES];
    write_vector(all, x);
    __builtin_memcpy(y, all, count * sizeof(Float));
}

INLINE Float32 read(const void* x, int32_t dtype, int64_t index, int64_t count) {
    if (dtype == HFP_FLOAT32) return read_some((const float*)x + index, count);
    if (dtype == HFP_BFLOAT16) return read_some((const BFloat16*)x + index, count);
    return read_some((const Float16*)x + index, count);
}
INLINE void write(void* y, int32_t dtype, int64_t index, Float32 x, int64_t count) {
    if (dtype == HFP_FLOAT32)
        write_some((float*)y + index, x, count);
    else if (dtype == HFP_BFLOAT16)
        write_some((BFloat16*)y + index, x, count);
    else
        write_some((Float16*)y + index, x, count);
}
