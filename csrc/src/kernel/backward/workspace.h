// How a backward is cut up, and the memory that one item works in.
#ifndef HEADSCOPE_KERNEL_BACKWARD_WORKSPACE_H
#define HEADSCOPE_KERNEL_BACKWARD_WORKSPACE_H

#include "edited.h"
#include "instruction_sets.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

// The most rows of a block: their scores stay in the second-level cache beside the keys.
constexpr int64_t SCORE_ROWS = 12 * TILE_ROWS;
// What one item may spend on a block of keys, packed, with the sums of their gradients; and on a block of rows, packed.
// Both have a least size, which takes more where channels are thousands.
constexpr int64_t BACKWARD_KEY_BYTES = int64_t{1} << 20;
constexpr int64_t BACKWARD_ROW_BYTES = int64_t{256} << 10;

// What a call asks of an item.
struct Wanted {
    bool output;     // there is a cotangent of the output
    bool entropy;    // and of the entropy
    bool row_terms;  // any cotangent of a statistic
    bool query, key, value, key_bias, key_scale;
    bool products;  // anything that the cotangents . values are needed for
    bool edited;    // rows are passed over once more: see edited.h

    Wanted(const headscope_attention& call, const headscope_gradients& gradients) {
        output = gradients.output.data;
        entropy = gradients.entropy;
        row_terms = entropy || gradients.row_constants || gradients.group_count > 0;
        query = gradients.query.data;
        key = gradients.key.data;
        value = gradients.value.data && output;
        key_bias = gradients.key_bias;
        key_scale = gradients.key_scale && output;
        products = query || key || key_bias || key_scale || gradients.mask;
        edited = call.mask.data || call.is_causal || call.key_bias.data || call.key_scale.data ||
                 gradients.group_count > 0 || key_bias || key_scale;
    }
};

// The working memory of one item. Sums and terms are there for each cotangent.
struct BackwardSpace {
    Unit *key_columns, *key_rows, *value_columns;  // the item's keys
    Unit *query_rows, *query_columns, *output_rows,
        *output_columns;  // a block's rows: queries, the output's cotangents
    ScoreBlock block;
    float *key_sums, *value_sums;  // [cotangents][keys][padded channels]
    float* query_sums;             // [cotangents][rows][padded channels], where keys are one block
    float *maxima, *sums;          // [SCORE_ROWS], of a block's rows
    float* deltas;                 // [cotangents][SCORE_ROWS], with a minus
    KeyTerms keys;
    float *bias_part, *scale_part;         // [MAX_SCORES], sums over a block's rows; null: not wanted
    double *bias_sums, *scale_sums;        // [cotangents][MAX_SCORES], of a head
    double *gate_sums, *temperature_sums;  // [cotangents], of a head
    double* mask_sums;                     // [cotangents][rows][MAX_SCORES]
};

// Whether the sums of queries can stay where their gradient goes.
inline bool sums_in_place(const headscope_attention& call, const headscope_gradients& gradients) {
    return call.query.dtype == HEADSCOPE_FLOAT32 && gradients.query.strides[4] == 1 &&
           padded_channels(call.dim) == call.dim;
}

inline int64_t padded_keys(int64_t key_block) { return round_up(key_block, TILE_ROWS); }

// A backward's blocks.
struct Blocks {
    int64_t keys, rows;
};

inline Blocks blocks_of(const headscope_attention& call, const headscope_gradients& gradients) {
    const int64_t channels = padded_channels(call.dim), value_channels = padded_channels(call.dim_v);
    const int64_t units = units_of(call.dim) + units_of(call.dim_v);
    const int64_t row_bytes = 4 * (units + (channels + value_channels) / TERMS);
    const int64_t key_bytes = row_bytes + 4 * gradients.cotangents * (channels + value_channels);
    Blocks blocks = {MAX_SCORES, SCORE_ROWS};
    while (blocks.keys > 2 * LANES && blocks.keys * key_bytes > BACKWARD_KEY_BYTES) blocks.keys /= 2;
    blocks.keys = larger(LANES, smaller(blocks.keys, round_up(call.keys, LANES)));
    while (blocks.rows > 3 * TILE_ROWS && blocks.rows * row_bytes > BACKWARD_ROW_BYTES) blocks.rows /= 2;
    return blocks;
}

// Lays the memory out from `memory` on, or only counts where that is null. Returns the bytes.
inline int64_t lay_out_backward(const headscope_attention& call, const headscope_gradients& gradients,
                                const Blocks& blocks, char* memory, BackwardSpace* space) {
    int64_t end = 0;
    const auto take = [&](int64_t bytes) -> void* {
        char* start = memory ? memory + end : nullptr;
        end += round_up(bytes, 64);
        return start;
    };
    const auto floats = [&](int64_t count) { return static_cast<float*>(take(count * 4)); };
    const auto units = [&](int64_t count) { return static_cast<Unit*>(take(count * 4)); };
    const auto doubles = [&](int64_t count) { return static_cast<double*>(take(count * 8)); };
    const Wanted wanted(call, gradients);
    const int64_t channels = padded_channels(call.dim), value_channels = padded_channels(call.dim_v);
    const int64_t cotangents = gradients.cotangents, scores = blocks.rows * SCORE_STRIDE;
    const int64_t key_block = blocks.keys, rows = blocks.rows;
    space->key_columns = units(key_block * units_of(call.dim));
    space->key_rows = units(units_of(key_block) * channels);
    space->value_columns = units(key_block * units_of(call.dim_v));
    space->query_rows = units(rows * units_of(call.dim));
    space->query_columns = units(units_of(rows) * channels);
    space->output_rows = units(rows * units_of(call.dim_v));
    space->output_columns = units(units_of(rows) * value_channels);
    ScoreBlock& block = space->block;
    block.powers = floats(scores);
    block.exponents = wanted.entropy || wanted.edited ? floats(scores) : nullptr;
    block.gradients = TERMS == 1 || wanted.edited ? floats(scores) : nullptr;
    block.weights = TERMS > 1 || call.key_scale.data ? units(scores) : reinterpret_cast<Unit*>(block.powers);
    block.by_key = TERMS > 1 ? units(scores) : reinterpret_cast<Unit*>(block.gradients);
    block.by_row = TERMS > 1 ? units(scores) : reinterpret_cast<Unit*>(block.gradients);
    space->key_sums = floats(cotangents * padded_keys(key_block) * channels);
    space->value_sums = floats(cotangents * padded_keys(key_block) * value_channels);
    space->query_sums = floats(cotangents * rows * channels);
    space->maxima = floats(SCORE_ROWS);
    space->sums = floats(SCORE_ROWS);
    space->deltas = floats(cotangents * SCORE_ROWS);
    space->keys.bias = call.key_bias.data ? floats(MAX_SCORES) : nullptr;
    space->keys.scale = call.key_scale.data ? floats(MAX_SCORES) : nullptr;
    space->keys.groups = static_cast<int32_t*>(take(gradients.group_count * MAX_SCORES * 4));
    space->bias_part = wanted.key_bias ? floats(MAX_SCORES) : nullptr;
    space->scale_part = wanted.key_scale ? floats(MAX_SCORES) : nullptr;
    space->bias_sums = doubles(wanted.key_bias ? cotangents * MAX_SCORES : 0);
    space->scale_sums = doubles(wanted.key_scale ? cotangents * MAX_SCORES : 0);
    space->gate_sums = doubles(cotangents);
    space->temperature_sums = doubles(cotangents);
    space->mask_sums = doubles(gradients.mask ? cotangents * rows * MAX_SCORES : 0);
    return end;
}

inline BackwardPlan plan_backward(const headscope_attention& call, const headscope_gradients& gradients) {
    const Blocks blocks = blocks_of(call, gradients);
    BackwardPlan plan;
    plan.key_block = blocks.keys;
    plan.row_block = blocks.rows;
    // one without keys: every row is met once
    plan.key_blocks = larger(1, (call.keys + blocks.keys - 1) / blocks.keys);
    plan.channels = padded_channels(call.dim);
    plan.sums_queries = gradients.query.data && plan.key_blocks > 1 && !sums_in_place(call, gradients);
    const int64_t* sizes = gradients.mask_sizes;
    plan.mask_row_pieces = sizes[2] == call.queries ? (call.queries + blocks.rows - 1) / blocks.rows : 1;
    plan.mask_key_pieces = sizes[3] == call.keys ? (call.keys + blocks.keys - 1) / blocks.keys : 1;
    plan.mask_items = gradients.mask ? sizes[0] * sizes[1] * plan.mask_row_pieces * plan.mask_key_pieces : 0;
    BackwardSpace space;
    plan.bytes_per_thread = static_cast<size_t>(lay_out_backward(call, gradients, blocks, nullptr, &space));
    return plan;
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
