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

    // Bits below the window of a channel of a word; beyond its last channel, those of this one.
    static constexpr int shift(int word, int channel) {
        const int number = channels.first[word] + channel, last = channels.first[word + 1] - 1;
        return channels.shift[number < last ? number : last];
    }

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

    // Fetch the words of 2 * LANES inputs some time before they are needed, into the second cache.
    INLINE void prefetch(int64_t k) const {
        constexpr int64_t AHEAD = 2048;
        fetch(words + k + AHEAD, 2 * LANES * 4);
    }

    // The words of inputs from k on; zeros beyond the last.
    INLINE void at(int64_t k, Int32& word, Int32& previous) const {
        if (__builtin_expect(k + LANES <= columns, 1)) {
            word = load<Int32>(words + k);
            previous = load<Int32>(before + k);
        } else {
            word = last(words, k);
            previous = last(before, k);
        }
    }

    // In memory of its own: a vector whose address is taken would be stored there, and read again, for every step.
    INLINE Int32 last(const int32_t* row, int64_t k) const {
        int32_t all[LANES] = {};
        if (k < columns) __builtin_memcpy(all, row + k, (columns - k) * 4);
        return load<Int32>(all);
    }
};

// How windows of some channels, which end in the same word, are taken from it and from the word before: `shift` bits are below them.
// CROSSING: whether some of the windows begin in the word before.
template <int COUNT, bool CROSSING>
struct Shifts {
    int shift[COUNT];

    template <class Layout>
    Shifts(Layout, int word, int first) {
        for (int i = 0; i < COUNT; i++) shift[i] = Layout::shift(word, first + i);
    }

    template <int CHANNEL>
    INLINE Int32 window(Int32 word, Int32 previous) const {
        if constexpr (CROSSING) return funnel(previous, word, shift[CHANNEL]);
        return (Int32)((UInt32)word >> (UInt32{} + (uint32_t)shift[CHANNEL]));
    }
};

// The same, compiled for the channels of a word from the FIRST on; beyond the last, this one again. Windows have up to 16 bits.
template <class Layout, int WORD, int FIRST>
struct FixedShifts {
    template <int CHANNEL>
    INLINE Int32 window(Int32 word, Int32 previous) const {
        constexpr int SHIFT = Layout::shift(WORD, FIRST + CHANNEL);
        if constexpr (SHIFT > 16) return funnel<SHIFT>(previous, word);
        return (Int32)((UInt32)word >> (SHIFT > 16 ? 0 : SHIFT));
    }
};

INLINE Int32 decoded(Int32 window, Int32 mask) { return sum_of_bytes((Int32)((UInt32)(window & mask) * MULTIPLIER)); }

template <int TOKENS>
INLINE void add_channel(Int16 weights, const int16_t* activations, Int32 (&sums)[TOKENS]) {
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) sums[t] = add_products(sums[t], weights, load<Int16>(activations + t * BLOCK));
}

// Add the products of consecutive channels with a block of activations.
template <class Shifts, int COUNT, int TOKENS, size_t... CHANNEL>
INLINE void add_channels(const Words& row, const Shifts& shifts, int64_t block, const Quantized<TOKENS>& x,
                         Float32 (&total)[COUNT][TOKENS], std::index_sequence<CHANNEL...>) {
    Int32 sums[COUNT][TOKENS] = {};
    const int64_t start = block * BLOCK, count = row.columns - start < BLOCK ? row.columns - start : BLOCK;
    const int16_t* activations = x.of(block, 0);
    for (int64_t k = 0; k < count; k += 2 * LANES) {
        Int32 word[2], previous[2];
        row.at(start + k, word[0], previous[0]);
        row.at(start + k + LANES, word[1], previous[1]);
        row.prefetch(start + k);
        (add_channel(narrow(decoded(shifts.template window<CHANNEL>(word[0], previous[0]), row.mask),
                            decoded(shifts.template window<CHANNEL>(word[1], previous[1]), row.mask)),
                     activations + k, sums[CHANNEL]),
         ...);
    }
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++) total[i][t] = multiply_add(to_float(sums[i][t]), x.scale(block, t), total[i][t]);
}

template <class Layout>
struct Stream {
    static constexpr int64_t UNITS = Layout::WORDS, ROWS = Layout::PERIOD;

    // Channels are multiplied in equal parts of as many as registers hold; the last may compute some in vain.
    template <int TOKENS>
    struct Parts {
        static constexpr int MOST = TOKENS == 1 ? 8 : CHANNEL_TOKENS / TOKENS, NUMBER = (Layout::MOST_CHANNELS + MOST - 1) / MOST;
        static constexpr int COUNT = (Layout::MOST_CHANNELS + NUMBER - 1) / NUMBER;
    };

    // As in `Rows`, all channels are multiplied with a tile of activations before the next tile.
    template <int TOKENS>
    static void multiply(const HfpWeight& weight, int64_t start, int64_t stop, const Quantized<TOKENS>& x, const Output& y, int64_t token) {
        constexpr int PARTS = Parts<TOKENS>::NUMBER, COUNT = Parts<TOKENS>::COUNT, TILE_BLOCKS = TOKENS > 4 ? 32 / TOKENS : 8;
        const int64_t blocks = blocks_of(weight.columns);
        for (int64_t row = start; row < stop; row++) {
            const Words words = Words::of(weight, row, Layout());
            const int word = row % Layout::WORDS, begin = Layout::channels.first[word], end = Layout::channels.first[word + 1];
            Float32 total[PARTS][COUNT][TOKENS] = {};
            for (int64_t first = 0; first < blocks; first += TILE_BLOCKS) {
                const int64_t last = first + TILE_BLOCKS < blocks ? first + TILE_BLOCKS : blocks;
                for (int part = 0; part < PARTS; part++) multiply_tile(words, word, part, first, last, x, total[part]);
            }
            const int64_t n = row / Layout::WORDS * Layout::PERIOD;
            for (int channel = begin; channel < end && n + channel < weight.rows; channel++)  // there may be padding
                y.put(token, n + channel, weight.scale[n + channel], total[(channel - begin) / COUNT][(channel - begin) % COUNT]);
        }
    }

    template <int COUNT, int TOKENS>
    static INLINE void multiply_tile(const Words& words, int word, int part, int64_t first, int64_t last, const Quantized<TOKENS>& x,
                                     Float32 (&total)[COUNT][TOKENS]) {
        const auto with = [&](const auto& shifts) __attribute__((always_inline)) {
            for (int64_t block = first; block < last; block++)
                add_channels(words, shifts, block, x, total, std::make_index_sequence<COUNT>());
        };
        if constexpr (TOKENS == 1) {  // most time goes into taking windows, which is worth code for every word of the layout
            constexpr int PARTS = Parts<TOKENS>::NUMBER;
            with_fixed<COUNT, PARTS>(word * PARTS + part, with, std::make_index_sequence<Layout::WORDS * PARTS>());
        } else if (Layout::shift(word, part * COUNT) > 16) {
            with(Shifts<COUNT, true>(Layout(), word, part * COUNT));
        } else {  // the first of these channels has most bits below its window: if that lies within the word, so do all
            with(Shifts<COUNT, false>(Layout(), word, part * COUNT));
        }
    }

    // `work` with the shifts of the part with a number, counted through all words.
    template <int COUNT, int PARTS, class Work, size_t... PART>
    static INLINE void with_fixed(int number, const Work& work, std::index_sequence<PART...>) {
        ((number == PART ? work(FixedShifts<Layout, PART / PARTS, PART % PARTS * COUNT>()) : void()), ...);
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
            const Int32 value = decoded(funnel(previous, word, shift), words.mask);
            write(out, dtype, index + k, to_float(value) * scale, words.columns - k);
        }
    }
};
