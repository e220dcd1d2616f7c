// The C interface of the library, which `library.py` mirrors in ctypes: raw pointers and sizes, nothing of PyTorch or
// Python. All tensors are contiguous. N: output features, K: input features, T: tokens.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Changes with every change of what is below.
#define HFP_INTERFACE_VERSION 1

enum HfpFormat {
    HFP_PCDVQ_2_0,
    HFP_PCDVQ_2_25,
    HFP_CCQ_2_75,
    HFP_CCQ_2_5,
    HFP_CCQ_2_0625,
    HFP_STREAM_2_0,
    HFP_STREAM_2_25,
    HFP_STREAM_2_5,
    HFP_STREAM_3_0,
    HFP_STREAM_4_0,
    HFP_INT8,
    HFP_FORMATS
};

enum HfpDtype { HFP_FLOAT32, HFP_BFLOAT16, HFP_FLOAT16 };

// One packed weight [N, K], or a stack of them. Tensors, by the names of the ops' arguments; null if the format lacks them.
struct HfpWeight {
    const void* weight;
    const uint8_t* magnitude;
    const uint8_t* local_scale;
    const float* scale;
    const float* code_scale;
    const float* code_zero;
    const int8_t* patterns;
    const float* levels;
    int64_t window_bits;
    int64_t format;  // HfpFormat
    int64_t rows;    // N
    int64_t columns; // K
    // In a stack, bytes from one weight to the next; scales have one float per row.
    int64_t weight_stride;
    int64_t magnitude_stride;
    int64_t local_scale_stride;
};

// `fork(body, data, threads, 0)` runs `body(data)` in `threads` threads: GOMP_parallel of the OpenMP runtime that
// PyTorch has loaded, so that the two share one team. Without one, everything runs in the calling thread.
typedef void (*HfpFork)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

int32_t hfp_interface_version(void);
void hfp_set_fork(HfpFork fork);

// Names of the instruction sets that this library has and this CPU runs, best first, separated by spaces; the choice
// among them. `hfp_set_instructions` returns 0 where there is no such name.
const char* hfp_instructions(void);
int32_t hfp_set_instructions(const char* name);

// Number of int32 words in which activations [T, K] are prepared.
int64_t hfp_prepared_words(int64_t tokens, int64_t columns);

// Rotate activations in blocks (`signs` null: do not) and quantize them for products with weights of a format.
// This and the functions below that return an integer return 0 if memory is lacking, 1 otherwise.
int32_t hfp_prepare(int32_t format, const void* x, int32_t dtype, int64_t tokens, int64_t columns, const float* signs,
                    int64_t block, int32_t* prepared, int32_t threads);

// y [T, N] = x @ W.T, from prepared activations.
void hfp_matmul(const struct HfpWeight* weight, const int32_t* prepared, int64_t tokens, void* y, int32_t dtype,
                int32_t threads);

// Both in one call.
int32_t hfp_linear(const struct HfpWeight* weight, const void* x, int32_t dtype, int64_t tokens, const float* signs,
                   int64_t block, void* y, int32_t threads);

// y [G, T, N] = x [G, T, K] @ W[experts[g]].T for a stack of weights; zero if the index is negative. The caller checks that
// the indices are less than the number of weights.
int32_t hfp_grouped_linear(const struct HfpWeight* stack, const int32_t* experts, int64_t groups, const void* x, int32_t dtype,
                           int64_t tokens, const float* signs, int64_t block, void* y, int32_t threads);

// Rows `start` to `stop` (exclusive) of the weight, [stop - start, K]. `start` is a multiple of the format's row multiple.
void hfp_dequantize(const struct HfpWeight* weight, int64_t start, int64_t stop, void* out, int32_t dtype,
                    int32_t threads);

// Rotate `rows` rows of `columns` values in blocks of a power of two that divides `columns`.
int32_t hfp_hadamard(const void* x, int32_t dtype, int64_t rows, int64_t columns, const float* signs, int64_t block,
                     int32_t inverse, void* y, int32_t threads);

#ifdef __cplusplus
}
#endif
