// The second pass that key_mass takes where keys come in several blocks (key_mass.h): some keys of one head against its
// rows, whose maxima and sums the first pass saved.
//
//     mass_j = sum_i 2^((logit_ij - max_i) * log2(e)) / sum_i
//
// An item meets all rows in order and owns its keys, so nothing depends on the number of threads.
#ifndef HEADSCOPE_KERNEL_KEY_MASS_PASS_H
#define HEADSCOPE_KERNEL_KEY_MASS_PASS_H

#include "attention.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

// Keys first..first + key_block - 1 of the item's head, rows first_row..end_row - 1, added to what earlier rows gave.
inline void run_key_mass(const headscope_attention& call, const Plan& plan, int64_t head_index, int64_t first,
                         int64_t first_row, int64_t end_row, void* memory) {
    const int64_t sample = head_index / call.heads, head = head_index % call.heads;
    const int64_t count = smaller(plan.key_block, call.keys - first);
    const int64_t padded = round_up(count, LANES), units = units_of(call.dim);
    Statistics statistics;
    Workspace space;
    lay_out(call, plan.key_block, BLOCK_ROWS, static_cast<char*>(memory), &space, &statistics);
    double* carried = plan.carried ? plan.carried + first : nullptr;
    double sums[MAX_KEY_BLOCK];
    for (int64_t j = 0; j < count; ++j) sums[j] = first_row > 0 ? carried[j] : 0.0;
    // the logits of the first pass: with several blocks of keys the queries are scaled
    const float scale = static_cast<float>(call.scale / static_cast<double>(head_edit(call.temperature, sample, head)));
    pack_keys(call.key, call.dim, sample, head / (call.heads / call.kv_heads), first, count, 1.0f, space.keys);
    if (call.key_bias.data) copy_edit(call.key_bias, sample, head, first, count, space.bias);
    const int64_t start = call.is_causal ? larger(first_row, first / BLOCK_ROWS * BLOCK_ROWS) : first_row;
    for (int64_t row = start; row < end_row; row += BLOCK_ROWS) {
        const int64_t rows = smaller(BLOCK_ROWS, end_row - row);
        pack_queries(call.query, call.dim, sample, head, row, rows, scale, space.queries);
        compute_logits(space.queries, units, (rows + TILE_ROWS - 1) / TILE_ROWS, space.keys, count, units, scale,
                       space.logits);
        float* block = space.key_scale;
        for (int64_t j = 0; j < padded; ++j) block[j] = 0.0f;
        for (int64_t r = 0; r < rows; ++r) {
            float* logits = space.logits + r * LOGIT_STRIDE;
            apply_mask(call, sample, head, row + r, first, count, call.key_bias.data ? space.bias : nullptr, logits);
            const int64_t saved = head_index * call.queries + row + r - plan.first_saved_row;
            const float row_max = plan.row_max[saved];
            const Floats shift = broadcast(row_max == -INFINITE ? 0.0f : row_max);
            const Floats share = broadcast(plan.row_share[saved]);
            for (int64_t j = 0; j < padded; j += LANES) {
                Floats bounded;
                const Floats exponent = multiply(subtract(load(logits + j), shift), broadcast(LOG2_E));
                store(block + j, multiply_add(exp2_of(exponent, &bounded), share, load(block + j)));
            }
        }
        for (int64_t j = 0; j < count; ++j) sums[j] += static_cast<double>(block[j]);
    }
    float* to = plan.masses + head_index * call.keys + first;
    for (int64_t j = 0; j < count; ++j) {
        if (carried) carried[j] = sums[j];
        to[j] = static_cast<float>(sums[j]);
    }
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
