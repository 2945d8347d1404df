// The same kernel, compiled once per instruction set; which one runs is decided when it is called.
#ifndef HEADSCOPE_INSTRUCTION_SETS_H
#define HEADSCOPE_INSTRUCTION_SETS_H

#include <stddef.h>

#include "headscope_cpu.h"

namespace headscope {

// How a call is cut up. Nothing here changes a result: rows are independent, and the key blocks are the same for all.
struct Plan {
    int64_t key_block;        // keys per step, a multiple of a vector
    int64_t heads_per_item;   // heads that share keys and are worked on together
    int64_t rows_per_item;    // query rows of each per work item
    int64_t items_per_head;   // work items per group of heads
    int64_t items;            // work items in all
    size_t bytes_per_thread;  // working memory of one thread
    // for the second pass: the largest logit and one over the sum of rows first_saved_row.. of [batch, heads, queries]
    float* row_max = nullptr;
    float* row_share = nullptr;
    int64_t first_saved_row = 0;
};

struct Kernel {
    const char* name;
    Plan (*plan)(const headscope_attention& call);
    // workspace: plan.bytes_per_thread bytes, 64-byte aligned, contents arbitrary
    void (*run)(const headscope_attention& call, const Plan& plan, int64_t item, void* workspace);
    // the masses of keys first.. of a head, from its rows first_row..end_row - 1
    void (*run_key_mass)(const headscope_attention& call, const Plan& plan, int64_t head_index, int64_t first,
                         int64_t first_row, int64_t end_row, void* workspace);
    void (*exp2)(const float* input, float* output, int64_t count);
};

extern const Kernel kernel_baseline;
extern const Kernel kernel_avx2;
extern const Kernel kernel_avx512;
extern const Kernel kernel_avx512_bf16;

// The kernel for an enum headscope_instruction_set, or nullptr if this machine or build lacks it.
const Kernel* find_kernel(int64_t requested);

// What the kernel for a set of instructions uses for a dtype: only bfloat16 has dot products of its own.
const Kernel* kernel_for(const Kernel* kernel, int64_t dtype);

}  // namespace headscope

#endif
