// CCQ's `stream` layout. It is documented in `hf_pcdvq/codecs/stream.py`. A row of words holds, for every input, the bits of
// some consecutive output channels, which are decoded together.
#pragma once

constexpr int RING = 256;  // output channels whose bits form a ring
constexpr uint32_t MULTIPLIER = 0x8A7050F1;

// How windows lie in the words: `STRIDES` are the new bits of each channel, repeated.
template <int... STRIDES>
struct StreamLayout {
    static constexpr int strides[] = {STRIDES...};
    static constexpr int COUNT = sizeof...(STRIDES), SUM = (STRIDES + ...);

    static constexpr int multiple_of_32() {
        int bits = SUM;
        while (bits % 32) bits += SUM;
        return bits;
    }
    // Channels, and words per input, after which everything repeats.
    static constexpr int PERIOD = multiple_of_32() / SUM * COUNT, WORDS = multiple_of_32() / 32;
    static constexpr int RING_WORDS = RING / PERIOD * WORDS;

    struct Channels {
        int first[WORDS + 1] = {}, shift[PERIOD] = {};  // first channel whose window ends in a word; bits below the window

        constexpr Channels() {
            int end = 0;
            for (int channel = 0; channel < PERIOD; channel++) {
                end += strides[channel % COUNT];
                shift[channel] = (32 - end % 32) % 32;
                first[(end - 1) / 32 + 1] = channel + 1;
            }
        }
    };
    static constexpr Channels channels{};

    static constexpr int most_channels() {
        int most = 0;
        for (int word = 0; word < WORDS; word++) {
            const int count = channels.first[word + 1] - channels.first[word];
            most = most > count ? most : count;
        }
        return most;
    }
    static constexpr int MOST_CHANNELS = most_channels();  // that end in one word

    static int64_t words(int64_t rows) { return (rows + PERIOD - 1) / PERIOD * WORDS; }

    // The row of words before `row` in its ring.
    static int64_t before(int64_t row, int64_t rows) {
        const int64_t first = row / RING_WORDS * RING_WORDS;
        const int64_t count = rows - first < RING_WORDS ? rows - first : RING_WORDS;
        return first + (row - first + count - 1) % count;
    }
};

// A row of words and the one before it.
struct Words {
    const int32_t *words, *before;
    int64_t columns;
    Int32 mask;  // of a window's bits

    template <class Layout>
    static INLINE Words of(const HfpWeight& weight, int64_t row, Layout) {
        const int32_t* start = (const int32_t*)weight.weight;
        const int64_t before = Layout::before(row, Layout::words(weight.rows));
        return {start + row * weight.columns, start + before * weight.columns, weight.columns,
                Int32{} + ((1 << weight.window_bits) - 1)};
    }

    // The words of inputs from k on; zeros beyond the last.
    INLINE void at(int64_t k, Int32& word, Int32& previous) const {
        if (__builtin_expect(k + LANES <= columns, 1)) {
            word = load<Int32>(words + k);
            previous = load<Int32>(before + k);
        } else {
            word = previous = Int32{};
            if (k >= columns) return;
            __builtin_memcpy(&word, words + k, (columns - k) * 4);
            __builtin_memcpy(&previous, before + k, (columns - k) * 4);
        }
    }
};

// The integer weights of the channel with `shift` bits below its window.
template <bool CROSSING>
INLINE Int32 decoded(Int32 word, Int32 previous, Int32 mask, int shift) {
    const Int32 window = CROSSING ? funnel(previous, word, shift) : (Int32)((UInt32)word >> (UInt32{} + (uint32_t)shift));
    return sum_of_bytes((Int32)((UInt32)(window & mask) * MULTIPLIER));
}

// Consecutive channels whose windows end in the same word, with `shift` bits below them, times tokens; before scaling.
// CROSSING: whether some of the windows begin in the word before.
template <int COUNT, int TOKENS, bool CROSSING>
INLINE void multiply_channels(const Words& row, const int* shift, const Quantized* x, float (&out)[COUNT][TOKENS]) {
    Float32 total[COUNT][TOKENS] = {};
    for (int64_t start = 0, block = 0; start < row.columns; start += BLOCK, block++) {
        Int32 sums[COUNT][TOKENS] = {};
        const int64_t stop = start + BLOCK < row.columns ? start + BLOCK : row.columns;
        for (int64_t k = start; k < stop; k += 2 * LANES) {
            Int32 word[2], previous[2];
            row.at(k, word[0], previous[0]);
            row.at(k + LANES, word[1], previous[1]);
            Int16 activations[TOKENS];
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; t++) activations[t] = load<Int16>(x[t].values + k);
#pragma GCC unroll 16
            for (int i = 0; i < COUNT; i++) {
                const Int16 weights = narrow(decoded<CROSSING>(word[0], previous[0], row.mask, shift[i]),
                                             decoded<CROSSING>(word[1], previous[1], row.mask, shift[i]));
#pragma GCC unroll 8
                for (int t = 0; t < TOKENS; t++) sums[i][t] = add_products(sums[i][t], weights, activations[t]);
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; t++)
                total[i][t] = multiply_add(to_float(sums[i][t]), broadcast(x[t].scale[block]), total[i][t]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++) out[i][t] = sum(total[i][t]);
}

template <class Layout>
struct Stream {
    static constexpr int64_t UNITS = Layout::WORDS, ROWS = Layout::PERIOD;

    // All channels of a row of words, in equal parts of as many as registers hold; the last may compute some in vain.
    template <int TOKENS>
    static void multiply(const HfpWeight& weight, int64_t start, int64_t stop, const Quantized* x, const Output& y, int64_t token) {
        constexpr int MOST = CHANNEL_TOKENS / TOKENS, PASSES = (Layout::MOST_CHANNELS + MOST - 1) / MOST;
        constexpr int COUNT = (Layout::MOST_CHANNELS + PASSES - 1) / PASSES;
        for (int64_t row = start; row < stop; row++) {
            const Words words = Words::of(weight, row, Layout());
            const int word = row % Layout::WORDS, last = Layout::channels.first[word + 1];
            for (int first = Layout::channels.first[word]; first < last; first += COUNT) {
                int shift[COUNT];
                for (int i = 0; i < COUNT; i++) shift[i] = Layout::channels.shift[first + i < last ? first + i : last - 1];
                float out[COUNT][TOKENS];
                // Windows have up to 16 bits, and the first of these channels has most bits below its own: if that window lies
                // within the word, so do all.
                if (shift[0] > 16)
                    multiply_channels<COUNT, TOKENS, true>(words, shift, x, out);
                else
                    multiply_channels<COUNT, TOKENS, false>(words, shift, x, out);
                for (int i = 0; i < COUNT && first + i < last; i++) {
                    const int64_t n = row / Layout::WORDS * Layout::PERIOD + first + i;
                    if (n >= weight.rows) break;  // padding
                    for (int t = 0; t < TOKENS; t++) y.put(token + t, n, weight.scale[n] * out[i][t]);
                }
            }
        }
    }

    static void decode(const HfpWeight& weight, int64_t first, int64_t last, int64_t start, int64_t stop, void* out, int32_t dtype) {
        for (int64_t row = first; row < last; row++) {
            const Words words = Words::of(weight, row, Layout());
            const int word = row % Layout::WORDS;
            for (int channel = Layout::channels.first[word]; channel < Layout::channels.first[word + 1]; channel++) {
                const int64_t n = row / Layout::WORDS * Layout::PERIOD + channel;
                if (n >= start && n < stop)
                    decode_channel(words, Layout::channels.shift[channel], weight.scale[n], out, dtype, (n - start) * words.columns);
            }
        }
    }

    static INLINE void decode_channel(const Words& words, int shift, float scale, void* out, int32_t dtype, int64_t index) {
        for (int64_t k = 0; k < words.columns; k += LANES) {
            Int32 word, previous;
            words.at(k, word, previous);
            const Int32 value = decoded<true>(word, previous, words.mask, shift);
            write(out, dtype, index + k, to_float(value) * scale, words.columns - k);
        }
    }
};
