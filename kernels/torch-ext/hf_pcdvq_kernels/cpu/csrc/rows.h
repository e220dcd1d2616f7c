// Products with formats whose rows are stored one after another: PCDVQ, the published CCQ layouts, int8.
//
// A format is a class with
//   Row              where a row's packed tensors are
//   row(n)
//   integers(row, step, a, b)
//                    a step's weights in their order, without factors
//   FACTORS, factor(row, step)
//                    whether there are factors other than 1; for each lane of a step what to multiply the integers with
//   DECODES_AHEAD    whether decoding leaves enough registers for the weights of another step
//   factors(row, step, scale, factor)
//                    the same for each vector of eight in its order, and with the row's scale, computed as the reference does
//   prefetch(row, rows, block)
//                    fetch what a block of inputs needs, so many rows further on, into the second cache
//   copy(row, step, storage)
//                    the row's last step, if it has fewer than STEP inputs, padded with zeros in `storage`
//   Storage
#pragma once

constexpr int STEPS = BLOCK / STEP;

// Of a step's weights, in lanes: elements 0 and 2 of each vector, then 1 and 3, 4 and 6, 5 and 7.
INLINE void widen(Int8 a, Int8 b, Int16 (&pairs)[4]) {
    const Int16 first = (Int16)first_fours(a, b), last = (Int16)last_fours(a, b);
    pairs[0] = first << 8 >> 8;
    pairs[1] = first >> 8;
    pairs[2] = last << 8 >> 8;
    pairs[3] = last >> 8;
}

// The weights of one step of a row.
struct Step {
    Int16 weights[4];
    Float32 factor;
};

template <class Format>
INLINE Step decode_whole(const Format& format, const typename Format::Row& row, int64_t step) {
    Step result;
    Int8 a, b;
    format.integers(row, step, a, b);
    widen(a, b, result.weights);
    if constexpr (Format::FACTORS) result.factor = format.factor(row, step);
    return result;
}

template <class Format>
INLINE Step decoded(const Format& format, const typename Format::Row& row, int64_t step) {
    if (__builtin_expect((step + 1) * STEP <= format.columns, 1)) return decode_whole(format, row, step);
    typename Format::Storage storage;
    return decode_whole(format, format.copy(row, step, storage), 0);
}

// Add to `sums` the products of a step with `activations` of the first token.
template <class Format, int TOKENS, class Sum>
INLINE void add_step(const Step& step, const int16_t* activations, Sum (&sums)[TOKENS]) {
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; t++) {
        Int16 values[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) values[i] = load<Int16>(activations + t * BLOCK + i * (BYTES / 2));
        Int32 sum;
        if constexpr (Format::FACTORS)
            sum = products(step.weights[0], values[0]);
        else
            sum = add_products(sums[t], step.weights[0], values[0]);
#pragma GCC unroll 4
        for (int i = 1; i < 4; i++) sum = add_products(sum, step.weights[i], values[i]);
        if constexpr (Format::FACTORS)
            sums[t] = multiply_add(to_float(sum), step.factor, sums[t]);
        else
            sums[t] = sum;
    }
}

INLINE Float32 as_float(Float32 x) { return x; }
INLINE Float32 as_float(Int32 x) { return to_float(x); }

template <class Format>
struct Rows {
    static constexpr int64_t UNITS = 1, ROWS = 1;
    static constexpr int TILE_ROWS = 8;

    // Some rows are multiplied with a tile of all tokens' activations before the next tile, so that these stay in the nearest cache.
    template <int TOKENS>
    static void multiply(const HfpWeight& weight, int64_t start, int64_t stop, const Quantized<TOKENS>& x, const Output& y, int64_t token) {
        constexpr int TILE_BLOCKS = 32 / TOKENS;
        constexpr int COUNT = ROW_TOKENS >= 2 * TOKENS ? 2 : 1;  // rows that share what is loaded of tokens
        static_assert(TILE_ROWS % COUNT == 0, "");
        const Format format(weight);
        const int64_t blocks = blocks_of(format.columns);
        for (int64_t row = start; row < stop; row += TILE_ROWS) {
            const int64_t count = stop - row < TILE_ROWS ? stop - row : TILE_ROWS;
            Float32 total[TILE_ROWS / COUNT][COUNT][TOKENS] = {};
            for (int64_t first = 0; first < blocks; first += TILE_BLOCKS) {
                const int64_t last = first + TILE_BLOCKS < blocks ? first + TILE_BLOCKS : blocks;
                for (int64_t r = 0; r < count; r += COUNT)
                    multiply_tile(format, row + r, count - r, first, last, x, total[r / COUNT]);
            }
            for (int64_t r = 0; r < count; r++) y.put(token, row + r, weight.scale[row + r], total[r / COUNT][r % COUNT]);
        }
    }

    // Rows from `row` on, of which there are `count`: instead of those beyond, one is multiplied again.
    template <int COUNT, int TOKENS>
    static INLINE void multiply_tile(const Format& format, int64_t row, int64_t count, int64_t first, int64_t last,
                                     const Quantized<TOKENS>& x, Float32 (&total)[COUNT][TOKENS]) {
        typename Format::Row rows[COUNT];
        for (int r = 0; r < COUNT; r++) rows[r] = format.row(r < count ? row + r : row);
        constexpr bool AHEAD = DECODES_AHEAD && Format::DECODES_AHEAD;
        Float32 all[COUNT][TOKENS];  // in registers
        __builtin_memcpy(all, total, sizeof all);
        const int64_t steps = (format.columns + STEP - 1) / STEP, stop = last * STEPS < steps ? last * STEPS : steps;
        int64_t step = first * STEPS;
        Step next[COUNT];
#pragma GCC unroll 2
        for (int r = 0; AHEAD && r < COUNT; r++) next[r] = decoded(format, rows[r], step);
        for (int64_t block = first; block < last; block++) {
            for (int r = 0; r < COUNT; r++) format.prefetch(rows[r], TILE_ROWS, block);
            std::conditional_t<Format::FACTORS, Float32, Int32> sums[COUNT][TOKENS] = {};
            for (const int16_t* activations = x.of(block, 0); step < stop && activations < x.of(block, 1); activations += STEP) {
                step++;
#pragma GCC unroll 2
                for (int r = 0; r < COUNT; r++) {
                    const Step current = AHEAD ? next[r] : decoded(format, rows[r], step - 1);
                    if (AHEAD && step < stop) next[r] = decoded(format, rows[r], step);
                    add_step<Format>(current, activations, sums[r]);
                }
            }
#pragma GCC unroll 2
            for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 16
                for (int t = 0; t < TOKENS; t++) all[r][t] = multiply_add(as_float(sums[r][t]), x.scale(block, t), all[r][t]);
        }
        __builtin_memcpy(total, all, sizeof all);
    }

    static void decode(const HfpWeight& weight, int64_t first, int64_t last, int64_t start, int64_t, void* out, int32_t dtype) {
        const Format format(weight);
        for (int64_t n = first; n < last; n++) {
            const typename Format::Row row = format.row(n);
            const int64_t index = (n - start) * format.columns, whole = format.columns / STEP;
            for (int64_t step = 0; step < whole; step++)
                decode_step(format, row, step, weight.scale[n], out, dtype, index + step * STEP, STEP);
            if (const int64_t left = format.columns % STEP) {
                typename Format::Storage storage;
                decode_step(format, format.copy(row, whole, storage), 0, weight.scale[n], out, dtype, index + whole * STEP, left);
            }
        }
    }

    // The weights of a step, computed as the reference does: integers times a factor for every eight of them.
    static INLINE void decode_step(const Format& format, const typename Format::Row& row, int64_t step, float scale, void* out,
                                   int32_t dtype, int64_t index, int64_t count) {
        typedef int8_t LaneBytes __attribute__((vector_size(LANES)));
        Int8 halves[2];
        format.integers(row, step, halves[0], halves[1]);
        const int8_t* integers = (const int8_t*)halves;
        float factor[STEP / 8];
        format.factors(row, step, scale, factor);
#pragma GCC unroll 16
        for (int i = 0; i < STEP; i += LANES) {
            if (i >= count) break;
            const Float32 value = to_float(__builtin_convertvector(load<LaneBytes>(integers + i), Int32)) * every_eight(factor, i);
            write(out, dtype, index + i, value, count - i);
        }
    }
};
