// PCDVQ. The format is documented in `hf_pcdvq/codecs/polar.py`.
#pragma once

template <int PATTERN_BITS>  // 7: the words hold the magnitudes too; 9: these are bytes of their own
struct Pcdvq {
    static constexpr bool FACTORS = true, DECODES_AHEAD = true, OWN_MAGNITUDES = PATTERN_BITS == 9;

    struct Row {
        const uint8_t *words, *magnitude;
    };
    struct Storage {
        uint8_t words[2 * LANES];
        uint8_t magnitude[LANES / 4];
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

    INLINE void prefetch(const Row& row, int64_t rows, int64_t block) const {
        fetch(row.words + rows * (columns / 4) + block * (BLOCK / 4), BLOCK / 4);
        if (OWN_MAGNITUDES) fetch(row.magnitude + rows * (columns / 32) + block * (BLOCK / 32), BLOCK / 32);
    }

    INLINE Row copy(const Row& row, int64_t step, Storage& storage) const {
        storage = {};
        const int64_t left = columns / 8 - step * LANES;
        __builtin_memcpy(storage.words, row.words + step * sizeof storage.words, left * 2);
        if (OWN_MAGNITUDES) __builtin_memcpy(storage.magnitude, row.magnitude + step * sizeof storage.magnitude, left / 4);
        return {storage.words, storage.magnitude};
    }

    INLINE void integers(const Row& row, int64_t step, Int8& a, Int8& b) const {
        const uint8_t* words_of_step = row.words + step * (LANES * 2);
        a = magnitudes(words_of_step);
        b = magnitudes(words_of_step + LANES);
        give_signs(words_of_step, a, b);
    }

    INLINE Int8 magnitudes(const uint8_t* words_of_half) const {
        uint16_t vectors[LANES / 2];
        __builtin_memcpy(vectors, words_of_half, sizeof vectors);
        uint32_t index[LANES / 2];
#pragma GCC unroll 8
        for (int v = 0; v < LANES / 2; v++) index[v] = (vectors[v] >> 7) & ((1 << PATTERN_BITS) - 1);
        return (Int8)lookup(patterns, index);
    }

    INLINE Float32 factor(const Row& row, int64_t step) const {
        if constexpr (OWN_MAGNITUDES)
            return levels_of(levels, row.magnitude + step * (LANES / 4));
        else
            return levels_in_words(levels, row.words + step * (LANES * 2));
    }

    INLINE void factors(const Row& row, int64_t step, float scale, float factor[LANES]) const {
        for (int v = 0; v < LANES; v++) {
            const int64_t vector = step * LANES + v;
            factor[v] = scale * levels[OWN_MAGNITUDES ? row.magnitude[vector / 4] >> (2 * (v % 4)) & 3 : number_at<uint16_t>(row.words, vector) >> 14];
        }
    }
};
