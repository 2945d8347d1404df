// The gradient of an additive mask: ds, summed over what the mask repeats for. A pass of its own, which works p out
// again.
//
// An item owns a piece of the gradient, at most a block of rows and keys of it, and meets every head, row and key that
// the piece stands for in order, so nothing depends on the number of threads.
#ifndef HEADSCOPE_KERNEL_BACKWARD_MASK_GRADIENT_H
#define HEADSCOPE_KERNEL_BACKWARD_MASK_GRADIENT_H

#include "block.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

// From `first` up to `end`, without it.
struct Stretch {
    int64_t first, end;
};

// What piece `index` of a size of the mask stands for: all of it where the mask repeats, else a block.
HEADSCOPE_INLINE Stretch stretch_of(int64_t mask_size, int64_t whole, int64_t index, int64_t block) {
    if (mask_size != whole) return {0, whole};
    return {index * block, smaller(whole, (index + 1) * block)};
}

class MaskItem : HeadBlock {
public:
    MaskItem(const headscope_attention& call, const headscope_gradients& gradients, const BackwardPlan& plan,
             int64_t item, void* memory)
        : HeadBlock(call, gradients, plan, memory) {
        const int64_t* sizes = gradients.mask_sizes;
        const int64_t key_piece = item % plan.mask_key_pieces;
        const int64_t row_piece = item / plan.mask_key_pieces % plan.mask_row_pieces;
        const int64_t head = item / plan.mask_key_pieces / plan.mask_row_pieces % sizes[1];
        const int64_t sample = item / plan.mask_key_pieces / plan.mask_row_pieces / sizes[1];
        samples_ = stretch_of(sizes[0], call.batch, sample, 1);
        heads_ = stretch_of(sizes[1], call.heads, head, 1);
        row_stretch_ = stretch_of(sizes[2], call.queries, row_piece, plan_.row_block);
        key_stretch_ = stretch_of(sizes[3], call.keys, key_piece, plan.key_block);
        by_row_ = sizes[2] == call.queries;
        by_key_ = sizes[3] == call.keys;
        first_number_ = ((sample * sizes[1] + head) * sizes[2] + (by_row_ ? row_stretch_.first : 0)) * sizes[3] +
                        (by_key_ ? key_stretch_.first : 0);
    }

    void run() {
        const int64_t* sizes = gradients_.mask_sizes;
        const int64_t mask_rows = by_row_ ? row_stretch_.end - row_stretch_.first : 1;
        const int64_t mask_keys = by_key_ ? key_stretch_.end - key_stretch_.first : 1;
        const int64_t numbers = sizes[0] * sizes[1] * sizes[2] * sizes[3];
        const int64_t count = gradients_.cotangents * plan_.row_block * MAX_SCORES;
        for (int64_t i = 0; i < count; ++i) space_.mask_sums[i] = 0.0;
        const int64_t shared = call_.heads / call_.kv_heads;
        for (int64_t sample = samples_.first; sample < samples_.end; ++sample) {
            for (int64_t head = heads_.first; head < heads_.end; ++head) {
                for (int64_t key = key_stretch_.first; key < key_stretch_.end; key += plan_.key_block) {
                    take_keys(sample, head / shared, key, smaller(plan_.key_block, call_.keys - key));
                    take_head(head);
                    if (!silent_) add_rows();
                }
            }
        }
        for (int64_t k = 0; k < gradients_.cotangents; ++k) {
            for (int64_t r = 0; r < mask_rows; ++r) {
                const double* sums = space_.mask_sums + (k * plan_.row_block + r) * MAX_SCORES;
                float* to = gradients_.mask + k * numbers + first_number_ + r * sizes[3];
                for (int64_t j = 0; j < mask_keys; ++j) to[j] = static_cast<float>(sums[j]);
            }
        }
    }

private:
    // All rows of the piece against the keys at hand.
    void add_rows() {
        for (int64_t row = row_stretch_.first; row < row_stretch_.end; row += plan_.row_block) {
            take_rows(row, smaller(plan_.row_block, row_stretch_.end - row));
            if (unseen()) continue;
            find_probabilities();
            for (int64_t k = 0; k < gradients_.cotangents; ++k) {
                find_deltas(k, nullptr);
                find_logit_gradients(k);
                for (int64_t r = 0; r < rows_; ++r) add_row(k, r);
            }
        }
    }

    void add_row(int64_t k, int64_t r) const {
        const float* found = space_.block.gradients + r * SCORE_STRIDE;
        double* sums = space_.mask_sums + (k * plan_.row_block + (by_row_ ? r : 0)) * MAX_SCORES;
        if (by_key_) {
            for (int64_t j = 0; j < count_; ++j) sums[j] += static_cast<double>(found[j]);
            return;
        }
        for (int64_t j = 0; j < count_; ++j) sums[0] += static_cast<double>(found[j]);
    }

    int64_t first_number_;
    Stretch samples_, heads_, row_stretch_, key_stretch_;
    // the mask has a number for every row, and for every key
    bool by_row_, by_key_;
};

inline void run_mask_gradient(const headscope_attention& call, const headscope_gradients& gradients,
                              const BackwardPlan& plan, int64_t item, void* memory) {
    MaskItem(call, gradients, plan, item, memory).run();
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
