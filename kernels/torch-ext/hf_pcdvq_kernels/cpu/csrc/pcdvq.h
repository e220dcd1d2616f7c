// PCDVQ. The format is documented in `hf_pcdvq/codecs/polar.py`.
#pragma once

template <int PATTERN_BITS>  // 7: the words hold the magnitudes too; 9: these are bytes of their own
struct Pcdvq {
    static constexpr bool OWN_MAGNITUDES = PATTERN_BITS == 9;
    static constexpr int VECTORS = GROUP / 8, PER_PART = BYTES / 8;

    struct Row {
        const uint8_t *words, *magnitude;
    };
    struct Storage {
        uint8_t words[2 * VECTORS];
        uint8_t magnitude[VECTORS / 4];
    };

    int64_t columns;
    const uint8_t *words, *magnitude;
    const int8_t* patterns;
    const float* levels;

    explicit Pcdvq(const HfpWeight& weight)
        : columns(weight.columns),
          words((const uint8_t*)weight.weight),
          magnitude(weight.magnitude),
          patterns(weight.patterns),
          levels(weight.levels) {}

    INLINE Row row(int64_t n) const {
        return {words + n * (columns / 4), OWN_MAGNITUDES ? magnitude + n * (columns / 32) : nullptr};
    }

    INLINE Row copy(const Row& row, int64_t group, Storage& storage) const {
        storage = {};
        const int64_t left = columns / 8 - group * VECTORS;
        __builtin_memcpy(storage.words, row.words + 2 * group * VECTORS, left * 2);
        if (OWN_MAGNITUDES) __builtin_memcpy(storage.magnitude, row.magnitude + group * VECTORS / 4, left / 4);
        return {storage.words, storage.magnitude};
    }

    INLINE void decode(const Row& row, int64_t group, int part, Int8& weight, Float32& factor) const {
        const uint8_t* words_of_part = row.words + 2 * (group * VECTORS + part * PER_PART);
        uint16_t vectors[PER_PART];
        __builtin_memcpy(vectors, words_of_part, sizeof vectors);
        uint32_t index[PER_PART], level = 0;
#pragma GCC unroll 8
        for (int v = 0; v < PER_PART; v++) index[v] = (vectors[v] >> 7) & ((1 << PATTERN_BITS) - 1);
        if (OWN_MAGNITUDES) {
            level = number_at<uint16_t>(row.magnitude, group) >> (2 * part * PER_PART);
        } else {
#pragma GCC unroll 8
            for (int v = 0; v < PER_PART; v++) level |= (uint32_t)(vectors[v] >> 14) << (2 * v);
        }
        weight = with_signs(lookup(patterns, index), words_of_part);
        factor = levels_of(levels, level);
    }

    // What the weights of each vector of a group are multiplied with, computed as the reference does.
    INLINE void factors(const Row& row, int64_t group, float scale, float factor[GROUP / 8]) const {
        for (int v = 0; v < VECTORS; v++) {
            const int64_t vector = group * VECTORS + v;
            factor[v] = scale * levels[OWN_MAGNITUDES ? row.magnitude[vector / 4] >> (2 * (v % 4)) & 3 : number_at<uint16_t>(row.words, vector) >> 14];
        }
    }
};
