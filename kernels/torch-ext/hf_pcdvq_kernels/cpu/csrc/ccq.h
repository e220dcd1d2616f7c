// The published CCQ layouts. They are documented in `hf_pcdvq/codecs/convolutional.py`. Windows come from the vectors'
// header; a group of 64 inputs has an integer scale.
#pragma once

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
    struct Storage {};

    int64_t columns;
    const uint8_t* words;

    explicit Ccq(const HfpWeight& weight) : columns(weight.columns), words((const uint8_t*)weight.weight) {}

    INLINE Row row(int64_t n) const { return words + n * (columns / GROUP) * Layout::GROUP_BYTES; }
    INLINE Row copy(Row row, int64_t, Storage&) const { return row; }  // groups are always whole

    INLINE void decode(Row row, int64_t group, int part, Int8& weight, Float32& factor) const {
        const uint8_t* start = row + group * Layout::GROUP_BYTES;
        weight = (Int8)Layout::windows(start, part) - Layout::OFFSET;
        factor = broadcast((float)Layout::scale(start));
    }

    INLINE void factors(Row row, int64_t group, float scale, float factor[GROUP / 8]) const {
        const float product = (float)Layout::scale(row + group * Layout::GROUP_BYTES) * scale;
        for (int v = 0; v < GROUP / 8; v++) factor[v] = product;
    }
};

struct Clustered {  // 2.0625
    static constexpr int OFFSET = 32, GROUP_BYTES = 16;

    struct Row {
        const uint8_t *words, *scales;
        float code_scale, code_zero;
    };
    struct Storage {};

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
    INLINE Row copy(const Row& row, int64_t, Storage&) const { return row; }  // groups are always whole

    static INLINE int scale(const Row& row, int64_t group) {
        return group % 2 ? row.scales[group / 2] & 15 : row.scales[group / 2] >> 4;
    }

    INLINE void decode(const Row& row, int64_t group, int part, Int8& weight, Float32& factor) const {
        weight = (Int8)windows_2_0625(row.words + group * GROUP_BYTES, part, row.code_scale, row.code_zero) - OFFSET;
        factor = broadcast((float)scale(row, group));
    }

    INLINE void factors(const Row& row, int64_t group, float scale_of_row, float factor[GROUP / 8]) const {
        const float product = (float)scale(row, group) * scale_of_row;
        for (int v = 0; v < GROUP / 8; v++) factor[v] = product;
    }
};
