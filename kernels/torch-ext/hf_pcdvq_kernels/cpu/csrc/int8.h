// Eight bits. The format is documented in `hf_pcdvq/codecs/scalar.py`.
#pragma once

struct Bytes {
    typedef const int8_t* Row;
    struct Storage {
        int8_t bytes[STEP];
    };
    static constexpr bool FACTORS = false, DECODES_AHEAD = true;

    int64_t columns;
    const int8_t* bytes;

    explicit Bytes(const HfpWeight& weight) : columns(weight.columns), bytes((const int8_t*)weight.weight) {}

    INLINE Row row(int64_t n) const { return bytes + n * columns; }

    INLINE void prefetch(Row row, int64_t rows, int64_t block) const { fetch(row + rows * columns + block * BLOCK, BLOCK); }

    INLINE Row copy(Row row, int64_t step, Storage& storage) const {
        storage = {};
        __builtin_memcpy(storage.bytes, row + step * STEP, columns - step * STEP);
        return storage.bytes;
    }

    INLINE void integers(Row row, int64_t step, Int8& a, Int8& b) const {
        a = load<Int8>(row + step * STEP);
        b = load<Int8>(row + step * STEP + BYTES);
    }

    INLINE void factors(Row, int64_t, float scale, float factor[LANES]) const {
        for (int v = 0; v < LANES; v++) factor[v] = scale;
    }
};
