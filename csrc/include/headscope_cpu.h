// The C ABI of headscope's CPU kernel: fused attention, head edits and row statistics.
//
// No torch and no Python types cross it, so it can be called from anything that can call C.
#ifndef HEADSCOPE_CPU_H
#define HEADSCOPE_CPU_H

#include <stdint.h>

#if defined(_WIN32)
#define HEADSCOPE_EXPORT __declspec(dllexport)
#else
#define HEADSCOPE_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Changes whenever a struct or the meaning of a function below does.
#define HEADSCOPE_ABI_VERSION 1

enum headscope_dtype {
    HEADSCOPE_FLOAT32 = 0,
    HEADSCOPE_BFLOAT16 = 1,
    HEADSCOPE_FLOAT16 = 2,
    HEADSCOPE_FLOAT64 = 3,  // masks and fills only
    HEADSCOPE_BOOL = 4,     // masks only: one byte, non-zero attends
};

enum headscope_instruction_set {
    HEADSCOPE_BEST = 0,
    HEADSCOPE_BASELINE = 1,
    HEADSCOPE_AVX2 = 2,
    HEADSCOPE_AVX512 = 3,
};

enum headscope_status {
    HEADSCOPE_OK = 0,
    HEADSCOPE_NULL_POINTER = 1,
    HEADSCOPE_BAD_SIZE = 2,
    HEADSCOPE_BAD_HEADS = 3,
    HEADSCOPE_BAD_DTYPE = 4,
    HEADSCOPE_DIM_TOO_LARGE = 5,
    HEADSCOPE_NO_MEMORY = 6,
    HEADSCOPE_BAD_INSTRUCTION_SET = 7,
};

// The largest dim and dim_v; they bound the memory a thread works in.
#define HEADSCOPE_MAX_DIM 8192

// A four-dimensional tensor. Strides count elements and may be 0 (broadcast) or negative.
typedef struct headscope_tensor {
    void* data;
    int64_t strides[4];
    int64_t dtype;
} headscope_tensor;

// output = gate * softmax(scale * query . key + mask) . value + (1 - gate) * fill
typedef struct headscope_attention {
    int64_t batch, heads, kv_heads, queries, keys, dim, dim_v;
    headscope_tensor query;   // [batch, heads, queries, dim]: float32, bfloat16 or float16
    headscope_tensor key;     // [batch, kv_heads, keys, dim], query's dtype
    headscope_tensor value;   // [batch, kv_heads, keys, dim_v], query's dtype
    headscope_tensor output;  // [batch, heads, queries, dim_v], query's dtype; every element is written
    headscope_tensor mask;    // [batch, heads, queries, keys], bool or added to the logits; data NULL: none
    headscope_tensor fill;    // [batch, heads, queries, dim_v]; data NULL: zeros
    const float* gate;        // [batch, heads]; NULL: every head is kept
    int64_t gate_strides[2];
    double scale;
    int64_t is_causal;  // key j is seen by query i where j <= i
    // [batch, heads, queries], contiguous, or NULL; they describe the probabilities before gate and fill
    float* entropy;  // nats
    float* logsumexp;
    float* max_logit;
    float* max_prob;
    int64_t threads;          // 1 enters no parallel region
    int64_t instruction_set;  // enum headscope_instruction_set
} headscope_attention;

HEADSCOPE_EXPORT int headscope_abi_version(void);

// Runs the call. Returns enum headscope_status; anything but HEADSCOPE_OK has written nothing.
HEADSCOPE_EXPORT int headscope_attention_forward(const headscope_attention* call);

// The meaning of a status, in English. Never NULL.
HEADSCOPE_EXPORT const char* headscope_status_message(int status);

// The name of the instruction set that `requested` resolves to on this machine, or NULL if it can't run here.
HEADSCOPE_EXPORT const char* headscope_instruction_set_name(int requested);

// "OpenMP" or "none".
HEADSCOPE_EXPORT const char* headscope_threading(void);

// The kernel's own 2^x on `count` floats at most 0, for tests. Relative error below 2^-23; below 2^-126 it gives 0.
HEADSCOPE_EXPORT int headscope_exp2(const float* input, float* output, int64_t count, int instruction_set);

#ifdef __cplusplus
}
#endif

#endif
