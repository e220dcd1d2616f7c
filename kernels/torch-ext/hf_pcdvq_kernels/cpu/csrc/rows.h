// Products with formats whose rows are stored one after another: PCDVQ, the published CCQ layouts, int8.
//
// A format is a class with
//   Row              where a row's packed tensors are
//   row(n)
//   decode(row, group, part, weight, factor)
//                    one vector of a group of 64 inputs: integers, and for every four of them what to multiply them with
//   factors(row, group, scale, factor)
//                    what to multiply the integers with, for every eight of them, as the reference computes it
//   copy(row, group, storage)
//                    the row's last group, if it has fewer than 64 inputs, padded with zeros in `storage`
//   Storage
#pragma once

constexpr int PARTS = GROUP / BYTES;

// Add to `sums` the products of one group of some rows, at `place` in these, with the activations of `group`.
template <class Format, int ROWS, int TOKENS>
INLINE void add_group(const Format& format, const typename Format::Row (&rows)[ROWS], int64_t place, int64_t group, const Quantized* x,
                      Float32 (&sums)[ROWS][TOKENS]) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 2
        for (int part = 0; part < PARTS; part++) {
            Int8 weight;
            Float32 factor;
            format.decode(rows[r], place, part, weight, factor);
            Int16 first, second;
            widen(weight, first, second);
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; t++) {
                const int16_t* activations = x[t].values + group * GROUP + part * BYTES;
                const Int32 half = products(first, load<Int16>(activations));
                const Int32 both = add_products(half, second, load<Int16>(activations + BYTES / 2));
                sums[r][t] = multiply_add(to_float(both), factor, sums[r][t]);
            }
        }
    }
}

// out [ROWS][TOKENS] = products of rows from `row` on with tokens, before scaling.
template <class Format, int ROWS, int TOKENS>
INLINE void multiply_rows(const Format& format, int64_t row, const Quantized* x, float out[ROWS][TOKENS]) {
    typename Format::Row rows[ROWS];
    for (int r = 0; r < ROWS; r++) rows[r] = format.row(row + r);

    Float32 total[ROWS][TOKENS] = {};
    const int64_t whole = format.columns / GROUP, groups = (format.columns + GROUP - 1) / GROUP;
    for (int64_t start = 0, block = 0; start < groups; start += BLOCK / GROUP, block++) {
        Float32 sums[ROWS][TOKENS] = {};
        const int64_t stop = start + BLOCK / GROUP < whole ? start + BLOCK / GROUP : whole;
        for (int64_t group = start; group < stop; group++) add_group(format, rows, group, group, x, sums);
        if (groups > whole && groups <= start + BLOCK / GROUP) {  // the last block, with a partial group
            typename Format::Storage storage[ROWS];
            typename Format::Row copies[ROWS];
            for (int r = 0; r < ROWS; r++) copies[r] = format.copy(rows[r], whole, storage[r]);
            add_group(format, copies, 0, whole, x, sums);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; t++) total[r][t] = multiply_add(sums[r][t], broadcast(x[t].scale[block]), total[r][t]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++) out[r][t] = sum(total[r][t]);
}

template <class Format>
struct Rows {
    static constexpr int64_t UNITS = 1, ROWS = 1;

    template <int COUNT, int TOKENS>
    static INLINE void multiply_and_write(const HfpWeight& weight, const Format& format, int64_t row, const Quantized* x,
                                          const Output& y, int64_t token) {
        float out[COUNT][TOKENS];
        multiply_rows<Format, COUNT, TOKENS>(format, row, x, out);
        for (int r = 0; r < COUNT; r++)
            for (int t = 0; t < TOKENS; t++) y.put(token + t, row + r, weight.scale[row + r] * out[r][t]);
    }

    template <int TOKENS>
    static void multiply(const HfpWeight& weight, int64_t start, int64_t stop, const Quantized* x, const Output& y, int64_t token) {
        constexpr int COUNT = TOKENS == 1 ? ROWS_AT_ONCE : 1;  // rows that share what is loaded of one token
        const Format format(weight);
        int64_t row = start;
        for (; row + COUNT <= stop; row += COUNT) multiply_and_write<COUNT, TOKENS>(weight, format, row, x, y, token);
        for (; row < stop; row++) multiply_and_write<1, TOKENS>(weight, format, row, x, y, token);
    }

    static void decode(const HfpWeight& weight, int64_t first, int64_t last, int64_t start, int64_t, void* out, int32_t dtype) {
        const Format format(weight);
        for (int64_t n = first; n < last; n++) {
            const typename Format::Row row = format.row(n);
            const int64_t index = (n - start) * format.columns, whole = format.columns / GROUP;
            for (int64_t group = 0; group < whole; group++)
                decode_group(format, row, group, weight.scale[n], out, dtype, index + group * GROUP, GROUP);
            if (const int64_t left = format.columns % GROUP) {
                typename Format::Storage storage;
                decode_group(format, format.copy(row, whole, storage), 0, weight.scale[n], out, dtype, index + whole * GROUP, left);
            }
        }
    }

    // The weights of a group, computed as the reference does: integers times a factor for every eight of them.
    static INLINE void decode_group(const Format& format, const typename Format::Row& row, int64_t group, float scale, void* out,
                                    int32_t dtype, int64_t index, int64_t count) {
        typedef int8_t LaneBytes __attribute__((vector_size(LANES)));
        int8_t integers[GROUP];
        for (int part = 0; part < PARTS; part++) {
            Int8 weight;
            Float32 unused;
            format.decode(row, group, part, weight, unused);
            store(integers + part * BYTES, weight);
        }
        float factor[GROUP / 8];
        format.factors(row, group, scale, factor);
#pragma GCC unroll 16
        for (int i = 0; i < GROUP; i += LANES) {
            if (i >= count) break;
            const Float32 value = to_float(__builtin_convertvector(load<LaneBytes>(integers + i), Int32)) * every_eight(factor, i);
            write(out, dtype, index + i, value, count - i);
        }
    }
};
