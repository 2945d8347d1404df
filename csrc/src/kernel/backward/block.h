// p and ds of a block of rows and keys of one head: what every gradient is made of.
#ifndef HEADSCOPE_KERNEL_BACKWARD_BLOCK_H
#define HEADSCOPE_KERNEL_BACKWARD_BLOCK_H

#include "../output.h"
#include "rows.h"
#include "workspace.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

class HeadBlock {
protected:
    HeadBlock(const headscope_attention& call, const headscope_gradients& gradients, const BackwardPlan& plan,
              void* memory)
        : call_(call),
          gradients_(gradients),
          plan_(plan),
          wanted_(call, gradients),
          channels_(padded_channels(call.dim)),
          value_channels_(padded_channels(call.dim_v)),
          in_keys_(scales_keys(call, key_block_of(call))) {
        lay_out_backward(call, gradients, {plan.key_block, plan.row_block}, static_cast<char*>(memory), &space_);
    }

    // First the keys of a key head,
    void take_keys(int64_t sample, int64_t kv_head, int64_t first, int64_t count) {
        sample_ = sample;
        kv_head_ = kv_head;
        space_.keys.first = first_ = first;
        space_.keys.count = count_ = count;
        // keys that no row looks at may have no address
        if (call_.heads * call_.queries == 0) return;
        // the first of the heads that share the keys: where they are scaled, all have one scale
        const double scale = scale_of(kv_head * (call_.heads / call_.kv_heads));
        pack_keys(call_.key, call_.dim, sample, kv_head, first, count, in_keys_ ? static_cast<float>(scale) : 1.0f,
                  space_.key_columns);
        if (!wanted_.output || !wanted_.products) return;
        pack_keys(call_.value, call_.dim_v, sample, kv_head, first, count, 1.0f, space_.value_columns);
    }

    // then a head that looks at them,
    void take_head(int64_t head) {
        head_ = head;
        gate_ = head_edit(call_.gate, sample_, head);
        scale_ = scale_of(head);
        // what a removed head gives says nothing about it, whatever it is
        has_output_ = wanted_.output && gate_ != 0.0f;
        silent_ = !has_output_ && !wanted_.row_terms;
        if (space_.keys.bias) copy_edit(call_.key_bias, sample_, head, first_, count_, space_.keys.bias);
        if (space_.keys.scale) copy_edit(call_.key_scale, sample_, head, first_, count_, space_.keys.scale);
        find_groups(gradients_, sample_, head, space_.keys);
    }

    // then rows of it.
    void take_rows(int64_t row, int64_t rows) {
        row_ = row;
        rows_ = rows;
        tiles_ = (rows + TILE_ROWS - 1) / TILE_ROWS;
        const float* maxima = call_.row_max + flat_row(0);
        const float* sums = call_.log2_sum + flat_row(0);
        for (int64_t r = 0; r < SCORE_ROWS; ++r) {
            // rows behind the last one have no valid key
            space_.maxima[r] = r < rows ? maxima[r] : 0.0f;
            space_.sums[r] = r < rows ? sums[r] : INFINITE;
        }
    }

    double scale_of(int64_t head) const {
        return call_.scale / static_cast<double>(head_edit(call_.temperature, sample_, head));
    }

    // Of [cotangents, batch, heads, queries], the first of the rows at hand.
    int64_t flat_row(int64_t k) const {
        return ((k * call_.batch + sample_) * call_.heads + head_) * call_.queries + row_;
    }

    // No key of the block is seen by a row.
    bool unseen() const { return call_.is_causal && first_ > row_ + rows_ - 1; }

    float* deltas(int64_t k) const { return space_.deltas + k * SCORE_ROWS; }

    // -g * d output . attention - row_constant of each row. head_sum, if given: adds d output . (attention - fill).
    void find_deltas(int64_t k, double* head_sum) const {
        float* found = deltas(k);
        for (int64_t r = 0; r < SCORE_ROWS; ++r) found[r] = 0.0f;
        if (has_output_ || head_sum) {
            const HeadRows output = rows_of(tensor_of(gradients_.output, k), sample_, head_, row_);
            float along[SCORE_ROWS];
            sum_products(output, rows_of(call_.attention, sample_, head_, row_), rows_, call_.dim_v, along);
            for (int64_t r = 0; r < rows_; ++r) {
                if (has_output_) found[r] = -gate_ * along[r];
                if (head_sum) *head_sum += static_cast<double>(along[r]);
            }
            if (head_sum && call_.fill.data) {
                sum_products(output, rows_of(call_.fill, sample_, head_, row_), rows_, call_.dim_v, along);
                for (int64_t r = 0; r < rows_; ++r) *head_sum -= static_cast<double>(along[r]);
            }
        }
        if (!gradients_.row_constants) return;
        const float* constants = gradients_.row_constants + flat_row(k);
        for (int64_t r = 0; r < rows_; ++r) found[r] -= constants[r];
    }

    void find_probabilities() {
        const float scale = static_cast<float>(scale_);
        pack_queries(call_.query, call_.dim, sample_, head_, row_, rows_, in_keys_ ? 1.0f : scale, space_.query_rows);
        const int64_t units = units_of(call_.dim);
        const auto multiply_with = [&](const auto& finish) {
            multiply_channels(space_.query_rows, units, tiles_, space_.key_columns, count_, units, finish);
        };
        const ScoreBlock& block = space_.block;
        if (!wanted_.edited) {
            if (wanted_.entropy) {
                multiply_with(Probabilities<true>{block, scale, space_.maxima, space_.sums});
            } else {
                multiply_with(Probabilities<false>{block, scale, space_.maxima, space_.sums});
            }
            return clear_padding();
        }
        multiply_with(Products{block.powers, TERMS > 1 ? scale : 1.0f});
        for (int64_t r = 0; r < rows_; ++r) {
            edited_probabilities(call_, sample_, head_, row_ + r, space_.keys, space_.maxima[r], space_.sums[r],
                                 block.powers + r * SCORE_STRIDE, block.exponents + r * SCORE_STRIDE);
        }
        if (space_.keys.scale) {
            scale_rows(block.powers, rows_, space_.keys, block.weights);
        } else if (TERMS > 1) {
            pair_rows(block.powers, rows_, round_up(count_, LANES), block.weights);
        }
    }

    void find_logit_gradients(int64_t k) {
        const ScoreBlock& block = space_.block;
        const int64_t units = has_output_ ? units_of(call_.dim_v) : 0;
        if (has_output_) {
            const headscope_tensor output = tensor_of(gradients_.output, k);
            pack_queries(output, call_.dim_v, sample_, head_, row_, rows_, 1.0f, space_.output_rows);
        }
        const auto multiply_with = [&](const auto& finish) {
            multiply_channels(space_.output_rows, units, tiles_, space_.value_columns, count_, units, finish);
        };
        float entropies[SCORE_ROWS] = {};
        for (int64_t r = 0; wanted_.entropy && r < rows_; ++r) {
            entropies[r] = static_cast<float>(-LN_2 * static_cast<double>(gradients_.entropy[flat_row(k) + r]));
        }
        if (!wanted_.edited) {
            if (wanted_.entropy) return multiply_with(LogitGradients<true>{block, gate_, deltas(k), entropies});
            return multiply_with(LogitGradients<false>{block, gate_, deltas(k), entropies});
        }
        multiply_with(Products{block.gradients, gate_});
        clear_parts();
        KeyTerms keys = space_.keys;
        // an infinite scale of nothing is nothing
        if (!has_output_) keys.scale = nullptr;
        for (int64_t r = 0; r < rows_; ++r) {
            const int64_t place = r * SCORE_STRIDE;
            edited_gradients(gradients_, keys, {deltas(k)[r], entropies[r], wanted_.entropy}, flat_row(k) + r,
                             block.powers + place, block.exponents + place, block.gradients + place, space_.bias_part,
                             space_.scale_part);
        }
        if (TERMS == 1) return;
        pair_keys(block.gradients, rows_, round_up(count_, LANES), block.by_key);
        pair_rows(block.gradients, rows_, round_up(count_, LANES), block.by_row);
    }

private:
    // Keys behind the last one have weights of 0.
    void clear_padding() const {
        const ScoreBlock& block = space_.block;
        for (int64_t j = count_; j < round_up(count_, LANES); ++j) {
            for (int64_t r = 0; r < tiles_ * TILE_ROWS; ++r) {
                block.powers[r * SCORE_STRIDE + j] = 0.0f;
                if (wanted_.entropy) block.exponents[r * SCORE_STRIDE + j] = 0.0f;
            }
            for (int64_t r = 0; TERMS > 1 && r < tiles_ * TILE_ROWS / TERMS; ++r) {
                block.weights[r * SCORE_STRIDE + j] = Unit{};
            }
        }
    }

    void clear_parts() const {
        if (space_.bias_part) memset(space_.bias_part, 0, MAX_SCORES * sizeof(float));
        if (space_.scale_part) memset(space_.scale_part, 0, MAX_SCORES * sizeof(float));
    }

protected:
    const headscope_attention& call_;
    const headscope_gradients& gradients_;
    const BackwardPlan& plan_;
    const Wanted wanted_;
    const int64_t channels_, value_channels_;
    // the scale is in the keys, as the forward had it
    const bool in_keys_;
    // of the keys at hand
    int64_t sample_ = 0, kv_head_ = 0, first_ = 0, count_ = 0;
    // of the head at hand; silent: nothing is asked of it
    int64_t head_ = 0;
    float gate_ = 1.0f;
    double scale_ = 1.0;
    bool has_output_ = false, silent_ = false;
    // of the rows at hand
    int64_t row_ = 0, rows_ = 0, tiles_ = 0;
    BackwardSpace space_;
};

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
