// The same kernel, compiled once per instruction set; which one runs is decided when it is called.
#ifndef HEADSCOPE_INSTRUCTION_SETS_H
#define HEADSCOPE_INSTRUCTION_SETS_H

#include <stddef.h>

#include "headscope_cpu.h"

namespace headscope {

// How a call is cut up. Nothing here changes a result: rows are independent, and the key blocks are the same for all.
struct Plan {
    int64_t key_block;        // keys per step, a multiple of the panel width
    int64_t rows_per_item;    // query rows per work item
    int64_t items_per_head;   // work items per (sample, head)
    int64_t items;            // work items in all
    size_t bytes_per_thread;  // working memory of one thread
};

struct Kernel {
    const char* name;
    Plan (*plan)(const headscope_attention& call);
    // workspace: plan.bytes_per_thread bytes, 64-byte aligned, contents arbitrary
    void (*run)(const headscope_attention& call, const Plan& plan, int64_t item, void* workspace);
    void (*exp2)(const float* input, float* output, int64_t count);
};

extern const Kernel kernel_baseline;
extern const Kernel kernel_avx2;
extern const Kernel kernel_avx512;

// The kernel for an enum headscope_instruction_set, or nullptr if this machine or build lacks it.
const Kernel* find_kernel(int64_t requested);

}  // namespace headscope

#endif
