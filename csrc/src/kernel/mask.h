// Masks and key biases: applied to a row of logits, or asked about a single key.
#ifndef HEADSCOPE_KERNEL_MASK_H
#define HEADSCOPE_KERNEL_MASK_H

#include "pack.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

constexpr float INFINITE = INFINITY;

// Element (sample, head, 0) of an edit of keys.
HEADSCOPE_INLINE const float* edit_of(const headscope_edit& edit, int64_t sample, int64_t head) {
    return edit.data + sample * edit.strides[0] + head * edit.strides[1];
}

// Numbers first..first + count - 1 of an edit, then zeros up to the next multiple of LANES.
inline void copy_edit(const headscope_edit& edit, int64_t sample, int64_t head, int64_t first, int64_t count,
                      float* copy) {
    const float* from = edit_of(edit, sample, head) + first * edit.strides[2];
    for (int64_t j = 0; j < count; ++j) copy[j] = from[j * edit.strides[2]];
    for (int64_t j = count; j < round_up(count, LANES); ++j) copy[j] = 0.0f;
}

// logits[j] of a query row and keys first..first + count - 1: -inf where a mask or a bias hides the key, whatever the
// logit was (a NaN too), else the logit plus what they add; and -inf up to the next multiple of LANES: those keys are
// zeros, whose logits of 0 may lie far above the row's maximum. bias: this block's, or null.
inline void apply_mask(const headscope_attention& call, int64_t sample, int64_t head, int64_t row, int64_t first,
                       int64_t count, const float* bias, float* logits) {
    if (bias) {
        for (int64_t j = 0; j < count; j += LANES) store(logits + j, mute(load(logits + j), load(bias + j)));
    }
    if (call.is_causal) {
        for (int64_t j = larger(0, row + 1 - first); j < count; ++j) logits[j] = -INFINITE;
    }
    const int64_t stride = call.mask.strides[3];
    if (call.mask.data && call.mask.dtype == HEADSCOPE_BOOL) {
        const uint8_t* mask = at<uint8_t>(call.mask, sample, head, row) + first * stride;
        if (stride == 1) {
            for (int64_t j = 0; j < count; ++j) logits[j] = mask[j] ? logits[j] : -INFINITE;
        } else {
            for (int64_t j = 0; j < count; ++j) logits[j] = mask[j * stride] ? logits[j] : -INFINITE;
        }
    } else if (call.mask.data) {
        with_element(call.mask.dtype, [&](auto element) {
            using Element = decltype(element);
            const Element* mask = at<Element>(call.mask, sample, head, row) + first * stride;
            for (int64_t j = 0; j < count; j += LANES) {
                const Floats added = gather_as_floats(mask + j * stride, stride, smaller(LANES, count - j));
                store(logits + j, mute(load(logits + j), added));
            }
        });
    }
    for (int64_t j = count; j < round_up(count, LANES); ++j) logits[j] = -INFINITE;
}

// Whether a query row sees a key.
inline bool attends(const headscope_attention& call, int64_t sample, int64_t head, int64_t row, int64_t key) {
    if (call.is_causal && key > row) return false;
    if (call.key_bias.data && edit_of(call.key_bias, sample, head)[key * call.key_bias.strides[2]] == -INFINITE) {
        return false;
    }
    if (!call.mask.data) return true;
    const int64_t offset = key * call.mask.strides[3];
    if (call.mask.dtype == HEADSCOPE_BOOL) return at<uint8_t>(call.mask, sample, head, row)[offset] != 0;
    bool seen = true;
    with_element(call.mask.dtype, [&](auto element) {
        seen = to_float(at<decltype(element)>(call.mask, sample, head, row)[offset]) != -INFINITE;
    });
    return seen;
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
