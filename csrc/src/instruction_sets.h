// The same kernel, compiled once per instruction set; which one runs is decided when it is called.
#ifndef HEADSCOPE_INSTRUCTION_SETS_H
#define HEADSCOPE_INSTRUCTION_SETS_H

#include <stddef.h>

#include <atomic>

#include "headscope_cpu.h"

namespace headscope {

// How a call is cut up. Nothing here changes a result: rows are independent, and the key blocks are the same for all.
struct Plan {
    int64_t key_block;        // keys per step, a multiple of a vector
    int64_t block_rows;       // query rows per step; blocks of rows start at multiples of it, however items are cut
    int64_t heads_per_item;   // heads that share keys and are worked on together
    int64_t rows_per_item;    // query rows of each per work item
    int64_t items_per_head;   // work items per group of heads
    int64_t items;            // work items in all
    size_t bytes_per_thread;  // working memory of one thread
    // Whether key_mass comes with the output: a row meets all keys in one step.
    bool one_pass;
    // The rest is set where key_mass is wanted: by turns.cpp, before each turn. kernel/key_mass.h tells the story.
    float* masses = nullptr;  // the result, [batch, heads, keys]
    // What the keys of a head received from its earlier rows, where a head takes several turns.
    double* carried = nullptr;
    // One pass: what each key receives from each block of rows, [blocks][key_block], from block first_block of [batch,
    // heads, blocks_per_head] on.
    float* block_masses = nullptr;
    int64_t first_block = 0;
    // Two passes: the largest logit, and one over the sum, of rows first_saved_row.. of [batch, heads, queries].
    float* row_max = nullptr;
    float* row_share = nullptr;
    int64_t first_saved_row = 0;

    int64_t blocks_per_head(int64_t queries) const { return (queries + block_rows - 1) / block_rows; }
};

// How a backward is cut up: an item is a block of keys of one key head. Nothing here but key_block has a say in a
// result.
struct BackwardPlan {
    int64_t key_block;   // keys of an item, a multiple of a vector
    int64_t row_block;   // rows that it meets at a time, a multiple of a tile
    int64_t key_blocks;  // items of a key head, at least 1
    int64_t channels;    // of a query, padded
    bool sums_queries;   // the queries' sums need memory of their own while items follow one another
    int64_t mask_row_pieces, mask_key_pieces, mask_items;  // how the mask's gradient is cut up
    size_t bytes_per_thread;                               // working memory of one thread
    // shared by the items of a head: [cotangents][batch * heads][queries], for each block of keys but the first
    float* deltas = nullptr;
    // [cotangents][turn_heads][queries][channels], of query heads first_head..
    float* query_sums = nullptr;
    int64_t first_head = 0, turn_heads = 0;
    std::atomic<int64_t>* progress = nullptr;  // [batch * kv_heads][key_blocks], blocks of rows that an item has passed
};

struct Kernel {
    const char* name;
    Plan (*plan)(const headscope_attention& call);
    // workspace: plan.bytes_per_thread bytes, 64-byte aligned, contents arbitrary
    void (*run)(const headscope_attention& call, const Plan& plan, int64_t item, void* workspace);
    // the second pass of key_mass: keys first.. of a head, from its rows first_row..end_row - 1
    void (*run_key_mass)(const headscope_attention& call, const Plan& plan, int64_t head_index, int64_t first,
                         int64_t first_row, int64_t end_row, void* workspace);
    BackwardPlan (*plan_backward)(const headscope_attention& call, const headscope_gradients& gradients);
    // a block of keys of a head of [batch * kv_heads]; items of a head may only run in the order of their keys, or
    // beside one another
    void (*run_backward)(const headscope_attention& call, const headscope_gradients& gradients,
                         const BackwardPlan& plan, int64_t kv_head_index, int64_t key_block, void* workspace);
    // a piece of the mask's gradient
    void (*run_mask_gradient)(const headscope_attention& call, const headscope_gradients& gradients,
                              const BackwardPlan& plan, int64_t item, void* workspace);
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
