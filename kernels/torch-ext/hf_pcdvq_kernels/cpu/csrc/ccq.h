// The published CCQ layouts. They are documented in `hf_pcdvq/codecs/convolutional.py`. Windows come from the vectors'
// header; a group of 64 inputs has an integer scale. Groups are always whole, but a step may have two of them.
#pragma once

constexpr int GROUP = 64, PARTS = GROUP / BYTES;  // parts of a group

// What the lanes of a step are multiplied with, of groups with such scales.
template <class ScaleOfGroup>
INLINE Float32 group_factor(int64_t step, ScaleOfGroup scale) {
    const Float32 first = broadcast((float)scale(step * STEP / GROUP));
    if constexpr (STEP <= GROUP) return first;
    Int32 in_second;
    for (int lane = 0; lane < LANES; lane++) in_second[lane] = vector_in(lane) < LANES / 2 ? 0 : -1;
    return in_second ? broadcast((float)scale(step * STEP / GROUP + 1)) : first;
}

// The same for each vector of eight, with the row's scale.
template <class ScaleOfGroup>
INLINE void group_factors(int64_t step, ScaleOfGroup scale, float scale_of_row, float factor[LANES]) {
    for (int v = 0; v < LANES; v++) factor[v] = (float)scale((step * STEP + v * 8) / GROUP) * scale_of_row;
}

struct Layout_2_75 {
    static constexpr int OFFSET = 8, GROUP_BYTES = 22;
    static INLINE UInt8 windows(const uint8_t* group, int part) { return windows_2_75(group, part); }
    static INLINE int scale(const uint8_t* group) { return group[21] & 15; }
};

struct Layout_2_5 {
    static constexpr int OFFSET = 4, GROUP_BYTES = 20;
    static INLINE UInt8 windows(const uint8_t* group, int part) { return windows_2_5(group, part); }
    static INLINE int scale(const uint8_t* group) { return group[18] | (group[19] & 31) << 8; }
};

template <class Layout>
struct Ccq {
    typedef const uint8_t* Row;
    struct Storage {
        uint8_t words[2 * Layout::GROUP_BYTES];
    };
    static constexpr bool FACTORS = true, DECODES_AHEAD = true;

    int64_t columns;
    const uint8_t* words;

    explicit Ccq(const HfpWeight& weight) : columns(weight.columns), words((const uint8_t*)weight.weight) {}

    INLINE Row row(int64_t n) const { return words + n * (columns / GROUP) * Layout::GROUP_BYTES; }

    INLINE void prefetch(Row row, int64_t rows, int64_t block) const {
        constexpr int GROUPS = BLOCK / GROUP;
        fetch(row + (rows * (columns / GROUP) + block * GROUPS) * Layout::GROUP_BYTES, GROUPS * Layout::GROUP_BYTES);
    }

    INLINE Row copy(Row row, int64_t step, Storage& storage) const {
        storage = {};
        __builtin_memcpy(storage.words, row + step * sizeof storage.words, Layout::GROUP_BYTES);
        return storage.words;
    }

    INLINE void integers(Row row, int64_t step, Int8& a, Int8& b) const {
        a = part(row, 2 * step);
        b = part(row, 2 * step + 1);
    }

    static INLINE Int8 part(Row row, int64_t number) {
        return (Int8)Layout::windows(row + number / PARTS * Layout::GROUP_BYTES, number % PARTS) - Layout::OFFSET;
    }

    INLINE Float32 factor(Row row, int64_t step) const {
        return group_factor(step, [&](int64_t group) { return Layout::scale(row + group * Layout::GROUP_BYTES); });
    }

    INLINE void factors(Row row, int64_t step, float scale, float factor[LANES]) const {
        group_factors(step, [&](int64_t group) { return Layout::scale(row + group * Layout::GROUP_BYTES); }, scale, factor);
    }
};

struct Clustered {  // 2.0625
    static constexpr int OFFSET = 32, GROUP_BYTES = 16;
    static constexpr bool FACTORS = true, DECODES_AHEAD = false;

    struct Row {
        const uint8_t *words, *scales;
        float code_scale, code_zero;
    };
    struct Storage {
        uint8_t words[2 * GROUP_BYTES], scales;
    };

    int64_t columns;
    const uint8_t *words, *scales;
    const float *code_scale, *code_zero;

    explicit Clustered(const HfpWeight& weight)
        : columns(weight.columns),
          words((const uint8_t*)weight.weight),
          scales(weight.local_scale),
          code_scale(weight.code_scale),
          code_zero(weight.code_zero) {}

    INLINE Row row(int64_t n) const {
        const int64_t groups = columns / GROUP;
        return {words + n * groups * GROUP_BYTES, scales + n * ((groups + 1) / 2), code_scale[n], code_zero[n]};
    }

    INLINE void prefetch(const Row& row, int64_t rows, int64_t block) const {
        constexpr int GROUPS = BLOCK / GROUP;
        fetch(row.words + (rows * (columns / GROUP) + block * GROUPS) * GROUP_BYTES, GROUPS * GROUP_BYTES);
    }

    INLINE Row copy(const Row& row, int64_t step, Storage& storage) const {
        storage = {};
        __builtin_memcpy(storage.words, row.words + step * sizeof storage.words, GROUP_BYTES);
        storage.scales = row.scales[step];
        return {storage.words, &storage.scales, row.code_scale, row.code_zero};
    }

    static INLINE int scale(const Row& row, int64_t group) {
        return group % 2 ? row.scales[group / 2] & 15 : row.scales[group / 2] >> 4;
    }

    INLINE void integers(const Row& row, int64_t step, Int8& a, Int8& b) const {
        a = part(row, 2 * step);
        b = part(row, 2 * step + 1);
    }

    static INLINE Int8 part(const Row& row, int64_t number) {
        const uint8_t* group = row.words + number / PARTS * GROUP_BYTES;
        return (Int8)windows_2_0625(group, number % PARTS, row.code_scale, row.code_zero) - OFFSET;
    }

    INLINE Float32 factor(const Row& row, int64_t step) const {
        return group_factor(step, [&](int64_t group) { return scale(row, group); });
    }

    INLINE void factors(const Row& row, int64_t step, float scale_of_row, float factor[LANES]) const {
        group_factors(step, [&](int64_t group) { return scale(row, group); }, scale_of_row, factor);
    }
};
