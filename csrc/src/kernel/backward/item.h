// One item of a backward: a block of keys of one key head, against all rows of the query heads that share it.
//
//     for each query head, for each block of rows:
//         queries . keys -> p                                     block.h
//         for each cotangent:
//             values' sums += p^T . cotangents                    products.h
//             cotangents . values -> ds                           block.h
//             keys' sums += ds^T . queries, queries' sums += ds . keys
//     store the keys' and values' sums
//
// The queries' sums of a block of rows are added to in the order of the blocks of keys: an item waits until the one
// with the keys before its own has passed. So no bit depends on the number of threads.
#ifndef HEADSCOPE_KERNEL_BACKWARD_ITEM_H
#define HEADSCOPE_KERNEL_BACKWARD_ITEM_H

#include "block.h"
#include "threads.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

class BackwardItem : HeadBlock {
public:
    BackwardItem(const headscope_attention& call, const headscope_gradients& gradients, const BackwardPlan& plan,
                 int64_t kv_head_index, int64_t key_block, void* memory)
        : HeadBlock(call, gradients, plan, memory),
          is_first_(key_block == 0),
          is_last_(key_block + 1 == plan.key_blocks),
          in_place_(sums_in_place(call, gradients)),
          // what hides keys may hide anything; elsewhere 0 times NaN is as good as what NaN does anyway
          hides_(call.mask.data || call.is_causal || call.key_bias.data),
          progress_(plan.progress ? plan.progress + kv_head_index * plan.key_blocks + key_block : nullptr) {
        const int64_t first = key_block * plan.key_block;
        take_keys(kv_head_index / call.kv_heads, kv_head_index % call.kv_heads, first,
                  smaller(plan.key_block, call.keys - first));
        if (wanted_.query && call.heads * call.queries > 0 &&
            !pack_values(call.key, call.dim, sample_, kv_head_, first_, count_, space_.key_rows)) {
            // a key that isn't finite makes NaN of every row that sees it, and of no other
            drop_not_finite(space_.key_rows, units_of(count_) * channels_);
        }
    }

    void run() {
        const int64_t shared = call_.heads / call_.kv_heads;
        int64_t position = 0;
        for (int64_t member = 0; member < shared; ++member) {
            take_head(kv_head_ * shared + member);
            start_sums();
            for (int64_t row = 0; row < call_.queries; row += plan_.row_block, ++position) {
                if (!is_first_) wait_until_above(progress_ - 1, position);
                take_rows(row, smaller(plan_.row_block, call_.queries - row));
                block_of_rows();
                if (!is_last_) publish(progress_, position + 1);
            }
            store_sums();
        }
        for (int64_t k = 0; k < gradients_.cotangents; ++k) {
            store_keys(gradients_.key, k, call_.dim, has_key_sums_ ? key_sums(k) : nullptr, channels_);
            store_keys(gradients_.value, k, call_.dim_v, has_value_sums_ ? value_sums(k) : nullptr, value_channels_);
        }
    }

private:
    void block_of_rows() {
        const int64_t bytes = rows_ * static_cast<int64_t>(sizeof(float));
        for (int64_t k = 0; k < gradients_.cotangents; ++k) {
            if (is_first_) {
                find_deltas(k, gradients_.gate && wanted_.output ? space_.gate_sums + k : nullptr);
                if (!is_last_) memcpy(plan_.deltas + flat_row(k), deltas(k), static_cast<size_t>(bytes));
            } else {
                memcpy(deltas(k), plan_.deltas + flat_row(k), static_cast<size_t>(bytes));
            }
        }
        if (!silent_ && !unseen() && (wanted_.products || (wanted_.value && has_output_))) {
            find_probabilities();
            if (wanted_.key &&
                !pack_values(call_.query, call_.dim, sample_, head_, row_, rows_, space_.query_columns)) {
                drop_not_finite(space_.query_columns, units_of(rows_) * channels_);
            }
            for (int64_t k = 0; k < gradients_.cotangents; ++k) one_cotangent(k);
            has_value_sums_ |= wanted_.value && has_output_;
            has_key_sums_ |= wanted_.key;
        }
        if (wanted_.query && is_last_) finish_queries();
    }

    void one_cotangent(int64_t k) {
        const ScoreBlock& block = space_.block;
        const int64_t key_tiles = (count_ + TILE_ROWS - 1) / TILE_ROWS;
        if (wanted_.value && has_output_) add_to_values(k, key_tiles);
        if (!wanted_.products) return;
        find_logit_gradients(k);
        add_parts(k);
        const float scale = static_cast<float>(scale_);
        if (wanted_.key) {
            const ChannelSums target = {key_sums(k), channels_, scale, has_key_sums_, padded_keys(count_)};
            multiply_scores<ScoreColumns>(block.by_row, TILE_ROWS, key_tiles, space_.query_columns, units_of(rows_),
                                          channels_, target);
        }
        if (wanted_.query) {
            multiply_scores<ScoreRows>(block.by_key, TILE_ROWS * SCORE_STRIDE, tiles_, space_.key_rows,
                                       units_of(count_), channels_, query_target(k, scale));
        }
    }

    void add_to_values(int64_t k, int64_t key_tiles) {
        const headscope_tensor output = tensor_of(gradients_.output, k);
        const int64_t units = units_of(rows_);
        const bool finite = pack_values(output, call_.dim_v, sample_, head_, row_, rows_, space_.output_columns);
        if (!finite && hides_) drop_not_finite(space_.output_columns, units * value_channels_);
        const ChannelSums target = {value_sums(k), value_channels_, gate_, has_value_sums_, padded_keys(count_)};
        multiply_scores<ScoreColumns>(space_.block.weights, TILE_ROWS, key_tiles, space_.output_columns, units,
                                      value_channels_, target);
        if (!finite && hides_) add_not_finite(output, value_sums(k));
    }

    // p^T . cotangents of the elements that aren't finite, for the keys that their rows see. Slow, and rare.
    void add_not_finite(const headscope_tensor& output, float* sums) const {
        const float* scale = space_.keys.scale;
        with_input_element(output.dtype, [&](auto element) {
            using Element = decltype(element);
            for (int64_t r = 0; r < rows_; ++r) {
                const Element* from = at<Element>(output, sample_, head_, row_ + r);
                for (int64_t c = 0; c < call_.dim_v; ++c) {
                    const float x = to_float(from[c * output.strides[3]]);
                    if (x * 0.0f == 0.0f) continue;
                    for (int64_t j = 0; j < count_; ++j) {
                        const float power = space_.block.powers[r * SCORE_STRIDE + j] * (scale ? scale[j] : 1.0f);
                        if (power != 0.0f) sums[j * value_channels_ + c] += gate_ * power * x;
                    }
                }
            }
        });
    }

    // With the last keys: the rows' gradients, and their part of the temperature's.
    void finish_queries() const {
        for (int64_t k = 0; k < gradients_.cotangents; ++k) {
            const HeadRows rows = rows_of(tensor_of(gradients_.query, k), sample_, head_, row_);
            const ChannelSums sums = query_target(k, 1.0f);
            if (silent_ || !in_place_) store_rows(rows, rows_, call_.dim, silent_ ? nullptr : sums.to, sums.stride);
            if (silent_ || !gradients_.temperature) continue;
            float along[SCORE_ROWS];
            sum_products(rows_of(call_.query, sample_, head_, row_),
                         {reinterpret_cast<char*>(sums.to), sums.stride, 1, HEADSCOPE_FLOAT32}, rows_, call_.dim,
                         along);
            for (int64_t r = 0; r < rows_; ++r) space_.temperature_sums[k] += static_cast<double>(along[r]);
        }
    }

    // Where the queries' sums of the rows at hand are.
    ChannelSums query_target(int64_t k, float factor) const {
        if (in_place_) {
            const headscope_tensor query = tensor_of(gradients_.query, k);
            return {at<float>(query, sample_, head_, row_), query.strides[2], factor, !is_first_, rows_};
        }
        float* sums = space_.query_sums + k * plan_.row_block * channels_;
        if (plan_.key_blocks > 1) {
            const int64_t turn_head = sample_ * call_.heads + head_ - plan_.first_head;
            sums = plan_.query_sums + ((k * plan_.turn_heads + turn_head) * call_.queries + row_) * channels_;
        }
        return {sums, channels_, factor, !is_first_, rows_};
    }

    float* key_sums(int64_t k) const { return space_.key_sums + k * padded_keys(plan_.key_block) * channels_; }
    float* value_sums(int64_t k) const {
        return space_.value_sums + k * padded_keys(plan_.key_block) * value_channels_;
    }

    // The sums of a head: its own, and those of its keys at hand.
    void start_sums() const {
        const int64_t cotangents = gradients_.cotangents;
        for (int64_t k = 0; k < cotangents; ++k) space_.gate_sums[k] = space_.temperature_sums[k] = 0.0;
        for (int64_t j = 0; wanted_.key_bias && j < cotangents * MAX_SCORES; ++j) space_.bias_sums[j] = 0.0;
        for (int64_t j = 0; wanted_.key_scale && j < cotangents * MAX_SCORES; ++j) space_.scale_sums[j] = 0.0;
    }

    void add_parts(int64_t k) const {
        for (int64_t j = 0; wanted_.key_bias && j < count_; ++j) {
            space_.bias_sums[k * MAX_SCORES + j] += static_cast<double>(space_.bias_part[j]);
        }
        for (int64_t j = 0; wanted_.key_scale && j < count_; ++j) {
            space_.scale_sums[k * MAX_SCORES + j] += static_cast<double>(space_.scale_part[j]);
        }
    }

    void store_sums() const {
        for (int64_t k = 0; k < gradients_.cotangents; ++k) {
            const int64_t place = (k * call_.batch + sample_) * call_.heads + head_;
            if (is_first_ && gradients_.gate) gradients_.gate[place] = static_cast<float>(space_.gate_sums[k]);
            if (is_last_ && gradients_.temperature) {
                const double temperature = static_cast<double>(head_edit(call_.temperature, sample_, head_));
                gradients_.temperature[place] = static_cast<float>(-space_.temperature_sums[k] / temperature);
            }
            for (int64_t j = 0; j < count_; ++j) {
                const int64_t key = place * call_.keys + first_ + j, sum = k * MAX_SCORES + j;
                if (wanted_.key_bias) gradients_.key_bias[key] = static_cast<float>(space_.bias_sums[sum]);
                if (!gradients_.key_scale) continue;
                gradients_.key_scale[key] = wanted_.key_scale ? static_cast<float>(space_.scale_sums[sum]) : 0.0f;
            }
        }
    }

    void store_keys(const headscope_stack& stack, int64_t k, int64_t dim, const float* sums, int64_t stride) const {
        if (!stack.data) return;
        store_rows(rows_of(tensor_of(stack, k), sample_, kv_head_, first_), count_, dim, sums, stride);
    }

    const bool is_first_, is_last_, in_place_, hides_;
    std::atomic<int64_t>* progress_;
    // something was added to the keys' and the values' sums
    bool has_key_sums_ = false, has_value_sums_ = false;
};

inline void run_backward(const headscope_attention& call, const headscope_gradients& gradients,
                         const BackwardPlan& plan, int64_t kv_head_index, int64_t key_block, void* memory) {
    BackwardItem(call, gradients, plan, kv_head_index, key_block, memory).run();
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
