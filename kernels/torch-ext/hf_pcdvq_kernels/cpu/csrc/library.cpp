// The functions of the C interface: choice of the instruction set, threads, memory.
#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "table.h"

namespace {

struct Instructions {
    const char* name;
    const Kernels* (*kernels)();
};
const Instructions INSTRUCTIONS[] = {
    {"avx512", avx512_kernels}, {"avx2", avx2_kernels}, {"portable", portable_kernels}};

const Kernels* best_kernels() {
    for (const Instructions& entry : INSTRUCTIONS)
        if (const Kernels* found = entry.kernels()) return found;
    return nullptr;
}

// Chosen when the library is loaded, then only changed on request.
const Kernels* chosen = best_kernels();
HfpFork fork_function = nullptr;

// A buffer that may be too large for the stack.
struct Memory {
    void* start;
    explicit Memory(int64_t bytes) : start(malloc(bytes ? bytes : 1)) {}
    Memory(const Memory&) = delete;
    ~Memory() { free(start); }
};

// `work(start, stop)` for all items, in chunks that threads take as they come. No result depends on which thread does what.
template <class Work>
struct Parallel {
    const Work& work;
    int64_t items, chunk;
    std::atomic<int64_t> next{0};

    static void body(void* data) {
        Parallel& self = *(Parallel*)data;
        for (;;) {
            const int64_t start = self.next.fetch_add(self.chunk);
            if (start >= self.items) return;
            self.work(start, start + self.chunk < self.items ? start + self.chunk : self.items);
        }
    }
};

// `cost`: of one item, in weights decoded; little work is not worth waking threads for.
template <class Work>
void parallel(int64_t items, int64_t cost, int32_t threads, const Work& work) {
    constexpr int64_t WORTH = 1 << 16;
    const int64_t useful = items * cost / WORTH;
    if (useful < threads) threads = (int32_t)useful;
    if (!fork_function || threads <= 1 || items <= 1) return work(0, items);
    // Several chunks a thread, because cores are not equally fast or free; even, for rows that are multiplied in pairs.
    int64_t chunk = (items / (threads * 4) + 1) / 2 * 2;
    if (chunk < 1) chunk = 1;
    Parallel<Work> shared{work, items, chunk};
    fork_function(Parallel<Work>::body, &shared, (unsigned)threads, 0);
}

int64_t units_of(const HfpWeight& weight, int64_t rows) {
    const FormatKernels& kernels = chosen->formats[weight.format];
    return (rows + kernels.rows - 1) / kernels.rows * kernels.units;
}

int64_t size_of(int32_t dtype) { return dtype == HFP_FLOAT32 ? 4 : 2; }

// Room for prepared activations, at a multiple of 64 bytes: vectors that cross such a line are read more slowly.
struct PreparedMemory {
    Memory memory;
    int32_t* start;
    explicit PreparedMemory(int64_t words)
        : memory(4 * words + 64), start(memory.start ? (int32_t*)(((uintptr_t)memory.start + 63) / 64 * 64) : nullptr) {}
};

// `groups` times so many tokens.
bool prepare(int32_t format, const void* x, int32_t dtype, int64_t groups, int64_t tokens, int64_t columns, const float* signs,
             int64_t block, int32_t* prepared, int32_t threads) {
    const int64_t words = hfp_prepared_words(tokens, columns), size = size_of(dtype);
    memset(prepared, 0, groups * words * 4);  // padding
    std::atomic<bool> enough{true};
    parallel(groups * tokens, columns, threads, [&](int64_t start, int64_t stop) {
        Memory scratch(padded(columns) * 4);
        if (!scratch.start) return enough.store(false);
        for (int64_t i = start; i < stop; i++)
            chosen->prepare_token(format, (const char*)x + i * columns * size, dtype, columns, signs, block, i % tokens, tokens,
                                  prepared + i / tokens * words, (float*)scratch.start);
    });
    return enough;
}

// `pointer` moved by `index` times so many elements, unless it is null.
template <class T>
void advance(const T*& pointer, int64_t index, int64_t elements) {
    if (pointer) pointer += index * elements;
}

HfpWeight one_of(const HfpWeight& stack, int64_t index) {
    HfpWeight weight = stack;
    weight.weight = (const char*)stack.weight + index * stack.weight_stride;
    advance(weight.magnitude, index, stack.magnitude_stride);
    advance(weight.local_scale, index, stack.local_scale_stride);
    advance(weight.scale, index, stack.rows);
    advance(weight.code_scale, index, stack.rows);
    advance(weight.code_zero, index, stack.rows);
    return weight;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int32_t hfp_interface_version(void) { return HFP_INTERFACE_VERSION; }

void hfp_set_fork(HfpFork function) { fork_function = function; }

const char* hfp_instructions(void) {
    static char names[64];
    names[0] = 0;
    for (const Instructions& entry : INSTRUCTIONS)
        if (entry.kernels()) strcat(strcat(names, names[0] ? " " : ""), entry.name);
    return names;
}

int32_t hfp_set_instructions(const char* name) {
    for (const Instructions& entry : INSTRUCTIONS)
        if (!strcmp(entry.name, name) && entry.kernels()) {
            chosen = entry.kernels();
            return 1;
        }
    return 0;
}

int64_t hfp_prepared_words(int64_t tokens, int64_t columns) { return padded_tokens(tokens) * prepared_words(columns); }

int32_t hfp_prepare(int32_t format, const void* x, int32_t dtype, int64_t tokens, int64_t columns, const float* signs, int64_t block,
                    int32_t* prepared, int32_t threads) {
    return prepare(format, x, dtype, 1, tokens, columns, signs, block, prepared, threads);
}

void hfp_matmul(const HfpWeight* weight, const int32_t* prepared, int64_t tokens, void* y, int32_t dtype, int32_t threads) {
    const FormatKernels& kernels = chosen->formats[weight->format];
    const int64_t cost = weight->columns * tokens * kernels.rows / kernels.units;
    parallel(units_of(*weight, weight->rows), cost, threads, [&](int64_t start, int64_t stop) {
        kernels.multiply(*weight, start, stop, prepared, tokens, y, dtype);
    });
}

int32_t hfp_linear(const HfpWeight* weight, const void* x, int32_t dtype, int64_t tokens, const float* signs, int64_t block, void* y,
                   int32_t threads) {
    const PreparedMemory prepared(hfp_prepared_words(tokens, weight->columns));
    if (!prepared.start) return 0;
    if (!prepare(weight->format, x, dtype, 1, tokens, weight->columns, signs, block, prepared.start, threads)) return 0;
    hfp_matmul(weight, prepared.start, tokens, y, dtype, threads);
    return 1;
}

int32_t hfp_grouped_linear(const HfpWeight* stack, const int32_t* experts, int64_t groups, const void* x, int32_t dtype, int64_t tokens,
                           const float* signs, int64_t block, void* y, int32_t threads) {
    const int64_t words = hfp_prepared_words(tokens, stack->columns), result = tokens * stack->rows * size_of(dtype);
    const PreparedMemory prepared(groups * words);
    if (!prepared.start) return 0;
    if (!prepare(stack->format, x, dtype, groups, tokens, stack->columns, signs, block, prepared.start, threads)) return 0;

    const FormatKernels& kernels = chosen->formats[stack->format];
    const int64_t units = units_of(*stack, stack->rows), cost = stack->columns * tokens * kernels.rows / kernels.units;
    parallel(groups * units, cost, threads, [&](int64_t start, int64_t stop) {
        for (int64_t group = start / units; group * units < stop; group++) {
            char* out = (char*)y + group * result;
            const int64_t first = start > group * units ? start - group * units : 0;
            const int64_t last = stop < (group + 1) * units ? stop - group * units : units;
            if (experts[group] >= 0)
                kernels.multiply(one_of(*stack, experts[group]), first, last, prepared.start + group * words, tokens, out, dtype);
            else if (first == 0)
                memset(out, 0, result);
        }
    });
    return 1;
}

void hfp_dequantize(const HfpWeight* weight, int64_t start, int64_t stop, void* out, int32_t dtype, int32_t threads) {
    const FormatKernels& kernels = chosen->formats[weight->format];
    const int64_t first = start / kernels.rows * kernels.units, last = units_of(*weight, stop);
    parallel(last - first, weight->columns * kernels.rows / kernels.units, threads, [&](int64_t begin, int64_t end) {
        kernels.decode(*weight, first + begin, first + end, start, stop, out, dtype);
    });
}

int32_t hfp_hadamard(const void* x, int32_t dtype, int64_t rows, int64_t columns, const float* signs, int64_t block, int32_t inverse,
                     void* y, int32_t threads) {
    const int64_t size = size_of(dtype);
    std::atomic<bool> enough{true};
    parallel(rows, columns, threads, [&](int64_t start, int64_t stop) {
        Memory scratch(padded(columns) * 4);
        if (!scratch.start) return enough.store(false);
        for (int64_t row = start; row < stop; row++) {
            const int64_t offset = row * columns * size;
            chosen->rotate_row((const char*)x + offset, dtype, columns, signs, block, inverse, (char*)y + offset, (float*)scratch.start);
        }
    });
    return enough;
}

}  // extern "C"
#pragma GCC visibility pop
