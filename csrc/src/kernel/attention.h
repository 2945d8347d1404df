// One work item: some rows of one head, against all keys.
//
//     for each block of keys:               packed once per item
//         for each block of rows:           packed when first met
//             logits                        logits.h, mask.h
//             running maximum, 2^x, sums    softmax.h
//             outputs                       values.h
//             after its last keys: store    output.h
//
// A row meets the same blocks of keys in the same order however rows are dealt to items, so the number of threads
// doesn't change a bit of the result.
#ifndef HEADSCOPE_KERNEL_ATTENTION_H
#define HEADSCOPE_KERNEL_ATTENTION_H

#include "instruction_sets.h"
#include "output.h"
#include "values.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

// rows whose logits are alive at a time: 8 tiles by 512 keys by 4 bytes stay in the second-level cache
constexpr int64_t BLOCK_TILES = 8;
constexpr int64_t BLOCK_ROWS = BLOCK_TILES * TILE_ROWS;
// what one item may spend on packed keys and values, and on packed queries and outputs
constexpr int64_t KEY_BYTES = int64_t{1} << 20;
constexpr int64_t ROW_BYTES = int64_t{4} << 20;

// Offsets in bytes of a workspace's parts; all are multiples of 64.
struct Layout {
    int64_t keys, values, logits, queries, outputs, rows, total;
};

inline Layout layout_of(const headscope_attention& call, int64_t key_block, int64_t rows) {
    const int64_t channels = round_up(call.dim_v, LANES);
    Layout layout;
    int64_t end = 0;
    const auto take = [&end](int64_t bytes) {
        const int64_t start = end;
        end += round_up(bytes, 64);
        return start;
    };
    layout.keys = take(key_block * call.dim * 4);
    layout.values = take(key_block * channels * 4);
    layout.logits = take(BLOCK_ROWS * LOGIT_STRIDE * 4);
    layout.queries = take(rows * call.dim * 4);
    layout.outputs = take(rows * channels * 4);
    layout.rows = take(rows * static_cast<int64_t>(sizeof(RowState)));
    layout.total = end;
    return layout;
}

inline Plan plan(const headscope_attention& call) {
    const int64_t row_bytes = 4 * (call.dim + round_up(call.dim_v, LANES)) + static_cast<int64_t>(sizeof(RowState));
    Plan plan;
    plan.key_block = MAX_KEY_BLOCK;
    while (plan.key_block > PANEL_KEYS && plan.key_block * row_bytes > KEY_BYTES) plan.key_block /= 2;
    plan.key_block = larger(PANEL_KEYS, smaller(plan.key_block, round_up(call.keys, PANEL_KEYS)));
    // all rows of a head at once, so that its keys are packed once, unless that is too much memory or too few items
    const int64_t heads = call.batch * call.heads;
    const int64_t wanted_items = call.threads > 1 ? 4 * call.threads : 1;
    const int64_t pieces = heads ? larger(1, (wanted_items + heads - 1) / heads) : 1;
    const int64_t affordable = larger(1, ROW_BYTES / row_bytes / BLOCK_ROWS) * BLOCK_ROWS;
    const int64_t even = round_up(larger(1, (call.queries + pieces - 1) / pieces), BLOCK_ROWS);
    plan.rows_per_item = smaller(affordable, even);
    plan.items_per_head = (call.queries + plan.rows_per_item - 1) / plan.rows_per_item;
    plan.items = heads * plan.items_per_head;
    plan.bytes_per_thread = static_cast<size_t>(layout_of(call, plan.key_block, plan.rows_per_item).total);
    return plan;
}

class Item {
public:
    Item(const headscope_attention& call, const Plan& plan, int64_t item, void* workspace)
        : call_(call), plan_(plan), output_stride_(round_up(call.dim_v, LANES)) {
        const int64_t head_index = item / plan.items_per_head;
        sample_ = head_index / call.heads;
        head_ = head_index % call.heads;
        kv_head_ = head_ / (call.heads / call.kv_heads);
        first_row_ = item % plan.items_per_head * plan.rows_per_item;
        end_row_ = smaller(first_row_ + plan.rows_per_item, call.queries);
        gate_ = gate_of(call, sample_, head_);
        wants_statistics_ = call.entropy || call.logsumexp || call.max_logit || call.max_prob;
        char* memory = static_cast<char*>(workspace);
        const Layout layout = layout_of(call, plan.key_block, plan.rows_per_item);
        keys_ = reinterpret_cast<float*>(memory + layout.keys);
        values_ = reinterpret_cast<float*>(memory + layout.values);
        logits_ = reinterpret_cast<float*>(memory + layout.logits);
        queries_ = reinterpret_cast<float*>(memory + layout.queries);
        outputs_ = reinterpret_cast<float*>(memory + layout.outputs);
        rows_ = reinterpret_cast<RowState*>(memory + layout.rows);
    }

    void run() {
        if (gate_ == 0.0f && !wants_statistics_) {
            for (int64_t row = first_row_; row < end_row_; ++row) {
                write_output(call_, sample_, head_, row, nullptr, 0.0f, gate_);
            }
            return;
        }
        // one step even without keys: every row is started and finished
        const int64_t keys = visible_keys(end_row_);
        for (int64_t key = 0; key == 0 || key < keys; key += plan_.key_block) {
            const int64_t count = smaller(plan_.key_block, keys - key);
            pack_keys(call_, sample_, kv_head_, key, count, keys_);
            if (gate_ != 0.0f) values_finite_ = pack_values(call_, sample_, kv_head_, key, count, values_);
            for (int64_t row = first_row_; row < end_row_; row += BLOCK_ROWS) {
                const int64_t visible = visible_keys(smaller(row + BLOCK_ROWS, end_row_));
                if (key > 0 && key >= visible) continue;
                if (key == 0) start_rows(row);
                step(row, key, count);
                if (key + count >= visible) finish_rows(row);
            }
        }
    }

private:
    // keys that some row before end_row sees, causality considered
    int64_t visible_keys(int64_t end_row) const { return call_.is_causal ? smaller(call_.keys, end_row) : call_.keys; }

    float* outputs_of(int64_t row) { return outputs_ + (row - first_row_) * output_stride_; }
    RowState* state_of(int64_t row) { return rows_ + (row - first_row_); }
    int64_t block_rows(int64_t row) const { return smaller(BLOCK_ROWS, end_row_ - row); }

    void start_rows(int64_t row) {
        const int64_t rows = round_up(block_rows(row), TILE_ROWS);
        pack_queries(call_, sample_, head_, row, block_rows(row), queries_ + (row - first_row_) * call_.dim);
        memset(outputs_of(row), 0, static_cast<size_t>(rows * output_stride_) * sizeof(float));
        for (int64_t r = 0; r < rows; ++r) start_row(state_of(row) + r);
    }

    // The rows of the block that starts at `row` against the keys of the block that starts at `key`.
    void step(int64_t row, int64_t key, int64_t count) {
        const int64_t rows = block_rows(row);
        const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
        const int64_t padded = round_up(count, LANES);
        compute_logits(queries_ + (row - first_row_) * call_.dim, tiles, keys_, count, call_.dim, logits_);
        for (int64_t r = 0; r < tiles * TILE_ROWS; ++r) {
            float* logits = logits_ + r * LOGIT_STRIDE;
            if (r < rows) apply_mask(call_, sample_, head_, row + r, key, count, logits);
            for (int64_t j = count; j < padded; ++j) logits[j] = -INFINITE;
            if (call_.entropy) {
                softmax_block<true>(logits, padded, state_of(row) + r);
            } else {
                softmax_block<false>(logits, padded, state_of(row) + r);
            }
        }
        if (gate_ == 0.0f) return;
        if (values_finite_ || (!call_.is_causal && !call_.mask.data)) {
            add_values(logits_, tiles, values_, count, state_of(row), outputs_of(row), output_stride_);
            return;
        }
        for (int64_t r = 0; r < rows; ++r) {
            add_seen_values(logits_ + r * LOGIT_STRIDE, values_, count, state_of(row)[r], outputs_of(row + r),
                            output_stride_,
                            [&](int64_t j) { return attends(call_, sample_, head_, row + r, key + j); });
        }
    }

    void finish_rows(int64_t row) {
        const int64_t first = (sample_ * call_.heads + head_) * call_.queries + row;
        for (int64_t r = 0; r < block_rows(row); ++r) {
            const RowState& state = state_of(row)[r];
            if (wants_statistics_) write_statistics(call_, state, first + r);
            write_output(call_, sample_, head_, row + r, outputs_of(row + r), normaliser(state), gate_);
        }
    }

    const headscope_attention& call_;
    const Plan& plan_;
    const int64_t output_stride_;
    int64_t sample_, head_, kv_head_, first_row_, end_row_;
    float gate_;
    bool wants_statistics_;
    bool values_finite_ = true;
    float *keys_, *values_, *logits_, *queries_, *outputs_;
    RowState* rows_;
};

inline void run(const headscope_attention& call, const Plan& plan, int64_t item, void* workspace) {
    Item(call, plan, item, workspace).run();
}

inline void exp2_array(const float* input, float* output, int64_t count) {
    for (int64_t start = 0; start < count; start += LANES) {
        float lanes[LANES] = {};
        const size_t bytes = static_cast<size_t>(smaller(LANES, count - start)) * sizeof(float);
        memcpy(lanes, input + start, bytes);
        Floats bounded;
        store(lanes, exp2_of(load(lanes), &bounded));
        memcpy(output + start, lanes, bytes);
    }
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
