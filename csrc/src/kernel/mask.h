// Masks: applied to a row of logits, or asked about a single key.
#ifndef HEADSCOPE_KERNEL_MASK_H
#define HEADSCOPE_KERNEL_MASK_H

#include <math.h>

#include "convert.h"
#include "pack.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

constexpr float INFINITE = INFINITY;

// logits[j] of a query row and keys first..first + count - 1: -inf where the mask hides the key, whatever the logit
// was (a NaN too), else the logit plus an additive mask's value.
inline void apply_mask(const headscope_attention& call, int64_t sample, int64_t head, int64_t row, int64_t first,
                       int64_t count, float* logits) {
    if (call.is_causal) {
        for (int64_t j = larger(0, row + 1 - first); j < count; ++j) logits[j] = -INFINITE;
    }
    if (!call.mask.data) return;
    const int64_t stride = call.mask.strides[3];
    if (call.mask.dtype == HEADSCOPE_BOOL) {
        const uint8_t* mask = at<uint8_t>(call.mask, sample, head, row) + first * stride;
        if (stride == 1) {
            for (int64_t j = 0; j < count; ++j) logits[j] = mask[j] ? logits[j] : -INFINITE;
        } else {
            for (int64_t j = 0; j < count; ++j) logits[j] = mask[j * stride] ? logits[j] : -INFINITE;
        }
        return;
    }
    with_element(call.mask.dtype, [&](auto element) {
        using Element = decltype(element);
        const Element* mask = at<Element>(call.mask, sample, head, row) + first * stride;
        for (int64_t j = 0; j < count; ++j) {
            const float bias = to_float(mask[j * stride]);
            logits[j] = bias == -INFINITE ? -INFINITE : logits[j] + bias;
        }
    });
}

// Whether a query row sees a key.
inline bool attends(const headscope_attention& call, int64_t sample, int64_t head, int64_t row, int64_t key) {
    if (call.is_causal && key > row) return false;
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
