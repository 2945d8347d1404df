// One work item: some rows of one head, or of the heads that share its keys, against all keys.
//
//     for each block of keys:               packed once per item
//         for each block of rows:           packed when first met, or read where it is
//             logits                        logits.h, mask.h
//             running maximum, 2^x, sums    softmax.h, statistics.h, key_mass.h
//             outputs                       values.h
//             after its last keys: store    output.h, or values.h
//
// A row meets the same blocks of keys in the same order however rows are dealt to items, so the number of threads
// doesn't change a bit of the result.
#ifndef HEADSCOPE_KERNEL_ATTENTION_H
#define HEADSCOPE_KERNEL_ATTENTION_H

#include "instruction_sets.h"
#include "key_mass.h"
#include "output.h"
#include "values.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

// rows whose logits are alive at a time: 8 tiles by 512 keys by 4 bytes stay in the second-level cache
constexpr int64_t BLOCK_TILES = 8;
constexpr int64_t BLOCK_ROWS = BLOCK_TILES * TILE_ROWS;
static_assert(BLOCK_ROWS <= MAX_BLOCK_ROWS, "statistics are written a block at a time");
// what one item may spend on packed queries, outputs and sums
constexpr int64_t ROW_BYTES = int64_t{4} << 20;
// Rows that an item has if it can: below the first packing the keys shows, above the second they leave the cache and
// threads are dealt too much at a time.
constexpr int64_t FEW_ROWS = 256;
constexpr int64_t MANY_ROWS = 1024;
// heads that share keys and an item: more gain nothing, and a turn of key_mass has room for their blocks of rows
constexpr int64_t MANY_HEADS = 128;

// The working memory of one item.
struct Workspace {
    Unit *keys, *values, *queries;
    float *logits, *outputs, *bias, *key_scale;
    float* powers;  // of GROUP_ROWS rows, for key_mass
    RowState* rows;
};

// Lays the memory out from `memory` on, or only counts where that is null. Returns the bytes.
inline int64_t lay_out(const headscope_attention& call, int64_t key_block, int64_t rows, char* memory,
                       Workspace* workspace, Statistics* statistics) {
    int64_t end = 0;
    const auto take = [&](int64_t bytes) -> void* {
        char* start = memory ? memory + end : nullptr;
        end += round_up(bytes, 64);
        return start;
    };
    const auto units = [&](int64_t count) { return static_cast<Unit*>(take(count * 4)); };
    const auto floats = [&](int64_t count) { return static_cast<float*>(take(count * 4)); };
    const int64_t channels = padded_channels(call.dim_v);
    workspace->keys = units(key_block * units_of(call.dim));
    workspace->values = units(units_of(key_block) * channels);
    workspace->queries = units(rows * units_of(call.dim));
    workspace->logits = floats(BLOCK_ROWS * LOGIT_STRIDE);
    workspace->outputs = floats(rows * channels);
    workspace->bias = floats(key_block);
    workspace->key_scale = floats(key_block);
    workspace->rows = static_cast<RowState*>(take(rows * static_cast<int64_t>(sizeof(RowState))));
    workspace->powers = statistics->key_mass && call.keys <= key_block ? floats(GROUP_ROWS * LOGIT_STRIDE) : nullptr;
    lay_out_statistics(statistics, rows, key_block, take);
    return end;
}

inline Plan plan(const headscope_attention& call) {
    Statistics statistics;
    find_statistics(call, &statistics);
    const int64_t row_bytes = 4 * (units_of(call.dim) + padded_channels(call.dim_v)) +
                              static_cast<int64_t>(sizeof(RowState)) + statistic_row_bytes(statistics);
    Plan plan;
    plan.key_block = key_block_of(call);
    const int64_t heads = call.batch * call.heads;
    const int64_t shared = call.kv_heads ? call.heads / call.kv_heads : 1;
    const int64_t wanted_items = call.threads > 1 ? 4 * call.threads : 1;
    const int64_t rows = ROW_BYTES / row_bytes;
    const int64_t step = rows < BLOCK_ROWS ? TILE_ROWS : BLOCK_ROWS;
    const int64_t affordable = larger(TILE_ROWS, rows / step * step);
    const int64_t head_rows = round_up(call.queries, TILE_ROWS);
    plan.heads_per_item = 1;
    if (call.queries > 0 && call.queries <= FEW_ROWS) {
        // heads that share keys, as many as leave enough items
        for (int64_t n = smaller(shared, MANY_HEADS); n > 1; --n) {
            if (shared % n || n * head_rows > affordable || heads / n < wanted_items) continue;
            plan.heads_per_item = n;
            break;
        }
    }
    if (plan.heads_per_item > 1) {
        plan.rows_per_item = head_rows;
    } else {
        const int64_t pieces = heads ? larger(1, (wanted_items + heads - 1) / heads) : 1;
        const int64_t even = round_up(larger(1, (call.queries + pieces - 1) / pieces), BLOCK_ROWS);
        plan.rows_per_item = smaller(affordable, smaller(even, round_up(MANY_ROWS, BLOCK_ROWS)));
    }
    plan.block_rows = smaller(BLOCK_ROWS, plan.rows_per_item);
    plan.one_pass = statistics.key_mass && call.keys <= plan.key_block;
    plan.items_per_head = (call.queries + plan.rows_per_item - 1) / plan.rows_per_item;
    plan.items = heads / plan.heads_per_item * plan.items_per_head;
    Workspace workspace;
    Statistics none;
    // the second pass works on one block of rows at a time, which may be more than an item has
    const int64_t second = statistics.key_mass && !plan.one_pass
                               ? lay_out(call, plan.key_block, BLOCK_ROWS, nullptr, &workspace, &none)
                               : 0;
    const int64_t first =
        lay_out(call, plan.key_block, plan.heads_per_item * plan.rows_per_item, nullptr, &workspace, &statistics);
    plan.bytes_per_thread = static_cast<size_t>(larger(first, second));
    return plan;
}

class Item {
public:
    Item(const headscope_attention& call, const Plan& plan, int64_t item, void* memory)
        : call_(call), plan_(plan), output_stride_(padded_channels(call.dim_v)), units_(units_of(call.dim)) {
        const int64_t first_head = item / plan.items_per_head * plan.heads_per_item;
        sample_ = first_head / call.heads;
        first_head_ = first_head % call.heads;
        kv_head_ = first_head_ / (call.heads / call.kv_heads);
        first_row_ = item % plan.items_per_head * plan.rows_per_item;
        end_row_ = smaller(first_row_ + plan.rows_per_item, call.queries);
        find_statistics(call, &statistics_);
        lay_out(call, plan.key_block, plan.heads_per_item * plan.rows_per_item, static_cast<char*>(memory), &space_,
                &statistics_);
        reads_queries_ = scales_keys(call, plan.key_block);
        writes_output_ =
            call.output.dtype == HEADSCOPE_FLOAT32 && call.output.strides[3] == 1 && output_stride_ == call.dim_v;
    }

    void run() {
        bool wants_keys = false;
        for (int64_t head = first_head_; head < first_head_ + plan_.heads_per_item; ++head) {
            if (!skipped(head)) {
                wants_keys = true;
                continue;
            }
            for (int64_t row = first_row_; row < end_row_; ++row) {
                write_output(call_, call_.output, sample_, head, row, nullptr, 0.0f, 0.0f);
            }
        }
        if (!wants_keys) return;
        start_groups(&statistics_);
        // one step even without keys: every row is started and finished
        const int64_t keys = visible_keys(end_row_);
        for (int64_t key = 0; key == 0 || key < keys; key += plan_.key_block) {
            const int64_t count = smaller(plan_.key_block, keys - key);
            pack_keys(call_.key, call_.dim, sample_, kv_head_, key, count, reads_queries_ ? scale(first_head_) : 1.0f,
                      space_.keys);
            values_packed_ = false;
            for (int64_t head = first_head_; head < first_head_ + plan_.heads_per_item; ++head) {
                if (!skipped(head)) head_step(head, key, count);
            }
        }
    }

private:
    float gate(int64_t head) const { return head_edit(call_.gate, sample_, head); }

    // in double: the temperature costs no rounding of its own
    float scale(int64_t head) const {
        return static_cast<float>(call_.scale / static_cast<double>(head_edit(call_.temperature, sample_, head)));
    }

    // A removed head of which nothing is asked.
    bool skipped(int64_t head) const { return gate(head) == 0.0f && !statistics_.any && !call_.row_max; }

    // Whether the attention of the head at hand is looked at.
    bool wants_values() const { return gate_ != 0.0f || call_.attention.data; }

    // keys that some row before end_row sees, causality considered
    int64_t visible_keys(int64_t end_row) const { return call_.is_causal ? smaller(call_.keys, end_row) : call_.keys; }

    int64_t block_rows(int64_t row) const { return smaller(BLOCK_ROWS, end_row_ - row); }

    // All rows of a head against the keys of the block that starts at `key`.
    void head_step(int64_t head, int64_t key, int64_t count) {
        head_ = head;
        gate_ = gate(head);
        scale_ = scale(head);
        first_local_ = (head - first_head_) * plan_.rows_per_item;
        if (wants_values() && !values_packed_) {
            values_finite_ = pack_values(call_.value, call_.dim_v, sample_, kv_head_, key, count, space_.values);
            values_packed_ = true;
        }
        if (call_.key_bias.data) copy_edit(call_.key_bias, sample_, head, key, count, space_.bias);
        scales_finite_ = true;
        if (call_.key_scale.data) {
            copy_edit(call_.key_scale, sample_, head, key, count, space_.key_scale);
            for (int64_t j = 0; j < count; ++j) scales_finite_ &= space_.key_scale[j] * 0.0f == 0.0f;
        }
        start_keys(&statistics_, sample_, head, key, count);
        for (int64_t row = first_row_; row < end_row_; row += BLOCK_ROWS) {
            const int64_t visible = visible_keys(smaller(row + BLOCK_ROWS, end_row_));
            if (key > 0 && key >= visible) continue;
            if (key == 0) start_rows(row);
            step(row, key, count);
            if (key + count >= visible) finish_rows(row);
        }
    }

    int64_t local(int64_t row) const { return first_local_ + row - first_row_; }
    // Whole tiles only: a read or a write of one must not go past the last row.
    bool reads_queries(int64_t row) const { return reads_queries_ && block_rows(row) % TILE_ROWS == 0; }
    float* outputs_of(int64_t row) { return space_.outputs + local(row) * output_stride_; }
    // The masses of the block that a row is in.
    float* masses_of(int64_t row) const {
        const int64_t head_index = sample_ * call_.heads + head_;
        const int64_t block = head_index * plan_.blocks_per_head(call_.queries) + row / plan_.block_rows;
        return plan_.block_masses + (block - plan_.first_block) * plan_.key_block;
    }
    RowState* state_of(int64_t row) { return space_.rows + local(row); }

    void start_rows(int64_t row) {
        const int64_t rows = round_up(block_rows(row), TILE_ROWS);
        if (!reads_queries(row)) {
            pack_queries(call_.query, call_.dim, sample_, head_, row, block_rows(row), reads_queries_ ? 1.0f : scale_,
                         space_.queries + local(row) * units_);
        }
        for (int64_t r = 0; r < rows; ++r) start_row(state_of(row) + r);
        if (!statistics_.general) return;
        for (int64_t r = 0; r < block_rows(row); ++r) start_row_statistics(&statistics_, local(row) + r);
    }

    // The rows of the block that starts at `row` against the keys of the block that starts at `key`.
    void step(int64_t row, int64_t key, int64_t count) {
        const int64_t rows = block_rows(row);
        const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
        const int64_t padded = round_up(count, LANES);
        const float* bias = call_.key_bias.data ? space_.bias : nullptr;
        const float* key_scale = call_.key_scale.data ? space_.key_scale : nullptr;
        const bool in_place = reads_queries(row);
        const Unit* queries = in_place ? reinterpret_cast<const Unit*>(at<float>(call_.query, sample_, head_, row))
                                       : space_.queries + local(row) * units_;
        compute_logits(queries, in_place ? call_.query.strides[2] : units_, tiles, space_.keys, count, units_, scale_,
                       space_.logits);
        const bool last = key + count >= visible_keys(smaller(row + BLOCK_ROWS, end_row_));
        if (plan_.block_masses) memset(masses_of(row), 0, static_cast<size_t>(padded) * sizeof(float));
        for (int64_t r = 0; r < rows; ++r) {
            float* logits = space_.logits + r * LOGIT_STRIDE;
            if (key == 0) prefetch_next(row, r);
            if (last && wants_values()) {
                prefetch_written(call_.output, row + r);
                if (call_.attention.data) prefetch_written(call_.attention, row + r);
            }
            apply_mask(call_, sample_, head_, row + r, key, count, bias, logits);
            const int64_t ready = r % GROUP_ROWS + 1;
            if (ready < GROUP_ROWS && r + 1 < rows) continue;
            softmax(logits - (ready - 1) * LOGIT_STRIDE, ready, padded, row + r + 1 - ready, key_scale);
        }
        if (plan_.block_masses) {
            const float unseen = unseen_mass(state_of(row), rows);
            for (int64_t j = padded; j < plan_.key_block; ++j) masses_of(row)[j] = unseen;
        }
        stored_ = false;
        if (!wants_values()) return;
        const Unit* powers = reinterpret_cast<const Unit*>(space_.logits);
        const bool hides = call_.is_causal || call_.mask.data || call_.key_bias.data;
        if ((values_finite_ && scales_finite_) || !hides) {
            Target target = {outputs_of(row), output_stride_, nullptr, 0, nullptr};
            float shares[BLOCK_ROWS];
            stored_ = last && writes_output_ && gate_ == 1.0f && rows % TILE_ROWS == 0;
            if (stored_) {
                for (int64_t r = 0; r < rows; ++r) shares[r] = normaliser(state_of(row)[r]);
                target = {outputs_of(row), output_stride_, at<float>(call_.output, sample_, head_, row),
                          call_.output.strides[2], shares};
            }
            add_values(powers, tiles, space_.values, units_of(count), state_of(row), target, output_stride_, key == 0);
            return;
        }
        for (int64_t r = 0; r < rows; ++r) {
            add_seen_values(powers + r * LOGIT_STRIDE, space_.values, count, state_of(row)[r], outputs_of(row + r),
                            output_stride_, key == 0,
                            [&](int64_t j) { return attends(call_, sample_, head_, row + r, key + j); });
        }
    }

    void softmax(float* logits, int64_t rows, int64_t padded, int64_t row, const float* key_scale) {
        RowState* states = state_of(row);
        // what the values are multiplied with will do for key_mass, unless it is rounded or scaled
        float* powers = plan_.block_masses && (TERMS > 1 || key_scale) ? space_.powers : nullptr;
        if (statistics_.general || key_scale) {
            for (int64_t r = 0; r < rows; ++r) {
                softmax_with_statistics(logits + r * LOGIT_STRIDE, padded, states + r, &statistics_, key_scale,
                                        powers ? powers + r * LOGIT_STRIDE : nullptr, local(row) + r, row + r);
            }
        } else if (statistics_.entropy) {
            softmax_rows<true>(logits, rows, padded, states, powers);
        } else {
            softmax_rows<false>(logits, rows, padded, states, powers);
        }
        if (plan_.block_masses) add_masses(powers ? powers : logits, rows, padded, states, masses_of(row));
    }

    // What the block of rows after the one at `row` will read, row r of it: queries of this head, or, behind its last
    // row, everything of the head that this thread probably takes next.
    void prefetch_next(int64_t row, int64_t r) const {
        if (row + BLOCK_ROWS + r < end_row_) return prefetch_row_of(call_.query, sample_, head_, row + BLOCK_ROWS + r);
        const int64_t sample = head_ + 1 < call_.heads ? sample_ : sample_ + 1;
        const int64_t head = head_ + 1 < call_.heads ? head_ + 1 : 0;
        const int64_t kv_head = head / (call_.heads / call_.kv_heads);
        if (row + BLOCK_ROWS < end_row_ || end_row_ < call_.queries || sample == call_.batch) return;
        if (r < call_.queries) prefetch_row_of(call_.query, sample, head, r);
        if (r >= call_.keys || (sample == sample_ && kv_head == kv_head_)) return;
        prefetch_row_of(call_.key, sample, kv_head, r);
        prefetch_row_of(call_.value, sample, kv_head, r);
    }

    // The first bytes of a row; where channels aren't side by side, only one of them.
    void prefetch_row_of(const headscope_tensor& tensor, int64_t a, int64_t b, int64_t c) const {
        const int64_t size = tensor.dtype == HEADSCOPE_FLOAT32 ? 4 : 2;
        const int64_t* strides = tensor.strides;
        const char* start =
            static_cast<const char*>(tensor.data) + (a * strides[0] + b * strides[1] + c * strides[2]) * size;
        prefetch_row(start, strides[3] == 1 ? smaller(512, call_.dim * size) : 1);
    }

    // A row of the output, or of the attention, before it is written.
    void prefetch_written(const headscope_tensor& tensor, int64_t row) const {
        const int64_t size = tensor.dtype == HEADSCOPE_FLOAT32 ? 4 : 2;
        const int64_t* strides = tensor.strides;
        const int64_t offset = (sample_ * strides[0] + head_ * strides[1] + row * strides[2]) * size;
        for (int64_t b = 0; strides[3] == 1 && b < call_.dim_v * size; b += 64) {
            HEADSCOPE_PREFETCH_WRITE(static_cast<const char*>(tensor.data) + offset + b);
        }
    }

    void finish_rows(int64_t row) {
        const int64_t first = (sample_ * call_.heads + head_) * call_.queries + row;
        if (statistics_.any) {
            write_statistics(call_, statistics_, state_of(row), block_rows(row), local(row), first);
        }
        if (call_.row_max) save_rows(state_of(row), block_rows(row), call_.row_max + first, call_.log2_sum + first);
        for (int64_t r = 0; r < block_rows(row); ++r) {
            const RowState& state = state_of(row)[r];
            const float share = normaliser(state);
            if (plan_.row_max) {
                plan_.row_max[first + r - plan_.first_saved_row] = state.running_max;
                plan_.row_share[first + r - plan_.first_saved_row] = share;
            }
            const float* sums = outputs_of(row + r);
            if (!stored_) write_output(call_, call_.output, sample_, head_, row + r, sums, share, gate_);
            if (!call_.attention.data) continue;
            if (gate_ == 1.0f) {
                copy_output(call_, sample_, head_, row + r);
            } else {
                write_output(call_, call_.attention, sample_, head_, row + r, sums, share, 1.0f);
            }
        }
    }

    const headscope_attention& call_;
    const Plan& plan_;
    const int64_t output_stride_, units_;
    int64_t sample_, first_head_, kv_head_, first_row_, end_row_;
    // of the head at hand
    int64_t head_ = 0, first_local_ = 0;
    float gate_ = 1.0f, scale_ = 1.0f;
    bool values_packed_ = false, values_finite_ = true, scales_finite_ = true;
    // queries are read where they are
    bool reads_queries_;
    // rows may be written by values.h, and those of the last step were
    bool writes_output_, stored_ = false;
    Workspace space_;
    Statistics statistics_;
};

inline void run(const headscope_attention& call, const Plan& plan, int64_t item, void* workspace) {
    Item(call, plan, item, workspace).run();
}

inline void exp2_array(const float* input, float* output, int64_t count) {
    for (int64_t start = 0; start < count; start += LANES) {
        const int64_t lanes = smaller(LANES, count - start);
        Floats bounded;
        store_some(output + start, exp2_of(load_some(input + start, lanes), &bounded), lanes);
    }
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
