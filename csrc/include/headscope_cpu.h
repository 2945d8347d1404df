// The C ABI of headscope's CPU kernel: fused attention, head edits, row statistics, and the gradients of all of them.
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
#define HEADSCOPE_ABI_VERSION 3

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
    HEADSCOPE_AVX512_BF16 = 4,  // with dot products of bfloat16 pairs
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
    HEADSCOPE_BAD_STATISTIC = 8,
    HEADSCOPE_BAD_GRADIENT = 9,
};

// What a statistic says about a row's probabilities p, before gate, fill and key_scale. All results are float32 and
// contiguous. A row without a valid key gives 0, and -inf for logsumexp and max_logit; NaN gives NaN.
enum headscope_statistic_kind {
    HEADSCOPE_ENTROPY = 0,            // -sum p ln p, nats [batch, heads, queries]
    HEADSCOPE_LOGSUMEXP = 1,          // ln sum exp(logit) [batch, heads, queries]
    HEADSCOPE_MAX_LOGIT = 2,          // [batch, heads, queries]
    HEADSCOPE_MAX_PROB = 3,           // [batch, heads, queries]
    HEADSCOPE_COLLISION_ENTROPY = 4,  // -ln sum p^2, nats [batch, heads, queries]
    HEADSCOPE_DISTANCE = 5,       // sum p * Euclidean distance of row and key on their grids [batch, heads, queries]
    HEADSCOPE_GROUP_MASS = 6,     // sum of p over each group's keys [batch, heads, queries, count]
    HEADSCOPE_GROUP_ENTROPY = 7,  // entropy of p renormalised within each group [batch, heads, queries, count]
    HEADSCOPE_KEY_MASS = 8,       // sum of p over the queries [batch, heads, keys]; beyond 512 keys, fewer where
                                  // dims are large, a second pass
};

// The most statistics of one call.
#define HEADSCOPE_MAX_STATISTICS 32

// The largest dim and dim_v; they bound the memory a thread works in.
#define HEADSCOPE_MAX_DIM 8192

// A four-dimensional tensor. Strides count elements and may be 0 (broadcast) or negative.
typedef struct headscope_tensor {
    void* data;
    int64_t strides[4];
    int64_t dtype;
} headscope_tensor;

// A float32 tensor of an edit: [batch, heads], or [batch, heads, keys]. data NULL: no such edit.
typedef struct headscope_edit {
    const float* data;
    int64_t strides[3];
} headscope_edit;

typedef struct headscope_statistic {
    int64_t kind;  // enum headscope_statistic_kind
    float* output;
    // distance: height, width, key_height, key_width (row i is at (i / width, i % width)); groups: count, first (the
    // number of groups, and the id of the first one)
    int64_t sizes[4];
    const int32_t*
        groups;  // [batch, heads, keys]: the group of each key; other ids than first..first + count - 1: none
    int64_t group_strides[3];
} headscope_statistic;

// logits = scale / temperature * query . key + key_bias + mask;  p = softmax(logits)
// output = gate * sum_j p_j * key_scale_j * value_j + (1 - gate) * fill
typedef struct headscope_attention {
    int64_t batch, heads, kv_heads, queries, keys, dim, dim_v;
    headscope_tensor query;      // [batch, heads, queries, dim]: float32, bfloat16 or float16
    headscope_tensor key;        // [batch, kv_heads, keys, dim], query's dtype
    headscope_tensor value;      // [batch, kv_heads, keys, dim_v], query's dtype
    headscope_tensor output;     // [batch, heads, queries, dim_v], query's dtype; every element is written
    headscope_tensor mask;       // [batch, heads, queries, keys], bool or added to the logits; data NULL: none
    headscope_tensor fill;       // [batch, heads, queries, dim_v]; data NULL: zeros
    headscope_edit gate;         // [batch, heads]; exactly 0 or 1 selects and doesn't multiply
    headscope_edit temperature;  // [batch, heads]
    headscope_edit key_bias;     // [batch, heads, keys], added to the logits; -inf mutes a key
    headscope_edit key_scale;    // [batch, heads, keys], multiplies p after the softmax
    // What the backward needs, all or nothing; data NULL: not wanted. The output before gate and fill, in query's dtype
    // (no need of it without a gate); and, contiguous [batch, heads, queries], each row's largest logit m and
    // s = log2 sum_j 2^((logit_j - m) * log2(e)), so that p_j = 2^((logit_j - m) * log2(e) - s). A row without a valid
    // key has m = 0 and s = inf, a NaN row a NaN s.
    headscope_tensor attention;
    float *row_max, *log2_sum;
    double scale;
    int64_t is_causal;        // key j is seen by query i where j <= i
    int64_t threads;          // 1 enters no parallel region
    int64_t instruction_set;  // enum headscope_instruction_set
    int64_t statistic_count;
    headscope_statistic statistics[HEADSCOPE_MAX_STATISTICS];  // only the first statistic_count are read
} headscope_attention;

// A tensor for each of several cotangents: the first stride is between them.
typedef struct headscope_stack {
    void* data;
    int64_t strides[5];
    int64_t dtype;
} headscope_stack;

// The cotangent of a group_mass.
typedef struct headscope_group_cotangent {
    const float* data;      // contiguous [cotangents, batch, heads, queries, count]
    int64_t count, first;   // as sizes of headscope_statistic
    const int32_t* groups;  // [batch, heads, keys], as there
    int64_t group_strides[3];
} headscope_group_cotangent;

// Cotangents of a call's results, and where its gradients go. Where there are several, p is worked out once for all of
// them. Everything is float32 and contiguous unless it has strides; data NULL is a cotangent of 0, or a gradient that
// isn't wanted. Edits that repeat along a dimension have gradients here for each of batch and heads, to be summed.
typedef struct headscope_gradients {
    int64_t cotangents;      // how many
    headscope_stack output;  // [cotangents, batch, heads, queries, dim_v], query's dtype
    // [cotangents, batch, heads, queries]: what logsumexp's cotangent, and sum_j p_j dp_j of all statistics' cotangents
    // dp, come to: subtracted from the gradient of p in every row
    const float* row_constants;
    const float* entropy;               // the entropy's cotangent, [cotangents, batch, heads, queries]
    headscope_stack query, key, value;  // in query's dtype; every element is written
    float *gate, *temperature;          // [cotangents, batch, heads]; the temperature's needs the query's beside it
    float *key_bias, *key_scale;        // [cotangents, batch, heads, keys]
    float* mask;                        // of an additive mask: [cotangents, mask_sizes]
    int64_t mask_sizes[4];              // of [batch, heads, queries, keys], each 1 (summed) or whole
    int64_t group_count;
    headscope_group_cotangent groups[HEADSCOPE_MAX_STATISTICS];  // only the first group_count are read
} headscope_gradients;

HEADSCOPE_EXPORT int headscope_abi_version(void);

// With HEADSCOPE_AVX512_BF16, bfloat16 products count subnormal inputs as 0, as the instructions do.
//
// A thread works in less than 16 MiB: group statistics that would take more together come in several passes.
//
// Runs the call. Returns enum headscope_status; anything but HEADSCOPE_OK and
// HEADSCOPE_NO_MEMORY has written nothing.
HEADSCOPE_EXPORT int headscope_attention_forward(const headscope_attention* call);

// The gradients of a call. `call` is the forward's with attention (its output where it has no gate), row_max and
// log2_sum as the forward wrote them; its output and statistics aren't looked at. The bits don't depend on the number
// of threads.
//
// With p = softmax(logits), dp the gradient of p and ds that of the logits,
//     dp_j = key_scale_j * (gate * d output . value_j) - ln(p_j) * d entropy + sum of d group_mass of j's groups
//     ds_j = p_j * (dp_j - gate * d output . attention - row_constant)
// A row without a valid key has gradients of 0. A thread works in less than 16 MiB: cotangents that would take more
// together come in several passes. Beside that, the queries' gradients of two key heads for each thread are kept in
// float32 where their own tensor can't hold their sums. Returns as headscope_attention_forward does; out of memory,
// some gradients may be written.
HEADSCOPE_EXPORT int headscope_attention_backward(const headscope_attention* call,
                                                  const headscope_gradients* gradients);

// The meaning of a status, in English. Never NULL.
HEADSCOPE_EXPORT const char* headscope_status_message(int status);

// The name of the instruction set that `requested` resolves to on this machine, or NULL if it can't run here.
HEADSCOPE_EXPORT const char* headscope_instruction_set_name(int requested);

// "OpenMP" or "none".
HEADSCOPE_EXPORT const char* headscope_threading(void);

// The kernel's own 2^x on `count` floats at most 0, for tests. Relative error below 2^-23; below -126 it gives 0.
HEADSCOPE_EXPORT int headscope_exp2(const float* input, float* output, int64_t count, int instruction_set);

#ifdef __cplusplus
}
#endif

#endif
