// Eight bits. The format is documented in `hf_pcdvq/codecs/scalar.py`.
#pragma once

struct Bytes {
    typedef const int8_t* Row;
    struct Storage {
        int8_t bytes[GROUP];
    };

    int64_t columns;
    const int8_t* bytes;

    explicit Bytes(const HfpWeight& weight) : columns(weight.columns), bytes((const int8_t*)weight.weight) {}

    INLINE Row row(int64_t n) const { return bytes + n * columns; }

    INLINE Row copy(Row row, int64_t group, Storage& storage) const {
        storage = {};
        __builtin_memcpy(storage.bytes, row + group * GROUP, columns - group * GROUP);
        return storage.bytes;
    }

    INLINE void decode(Row row, int64_t group, int part, Int8& weight, Float32& factor) const {
        weight = load<Int8>(row + group * GROUP + part * BYTES);
        factor = broadcast(1.0f);
    }

    INLINE void factors(Row, int64_t, float scale, float factor[GROUP / 8]) const {
        for (int v = 0; v < GROUP / 8; v++) factor[v] = scale;
    }
};
