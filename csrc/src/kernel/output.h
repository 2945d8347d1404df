// The end of a row: normalise, gate, fill, and store in the output's own type.
#ifndef HEADSCOPE_KERNEL_OUTPUT_H
#define HEADSCOPE_KERNEL_OUTPUT_H

#include "pack.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

// Element (sample, head) of an edit of heads, 1 without one.
HEADSCOPE_INLINE float head_edit(const headscope_edit& edit, int64_t sample, int64_t head) {
    return edit.data ? edit.data[sample * edit.strides[0] + head * edit.strides[1]] : 1.0f;
}

// output = gate * normaliser * sums + (1 - gate) * fill for one row of `to`, the output or the attention. A gate of
// exactly 1 or 0 selects, so that a NaN in what isn't selected stays out; sums aren't read at gate 0, nor at a
// normaliser of 0 (a row without a valid key). sums reach to the next padded width.
inline void write_output(const headscope_attention& call, const headscope_tensor& to, int64_t sample, int64_t head,
                         int64_t row, const float* sums, float normaliser, float gate) {
    if (call.dim_v == 0) return;
    const bool dead = normaliser == 0.0f;
    with_element(to.dtype, [&](auto element) {
        using Element = decltype(element);
        Element* output = at<Element>(to, sample, head, row);
        const int64_t stride = to.strides[3];
        const auto each = [&](const auto& result) {
            for (int64_t c = 0; c < call.dim_v; c += LANES) {
                const int64_t count = smaller(LANES, call.dim_v - c);
                scatter_as(output + c * stride, stride, result(c, count), count);
            }
        };
        const auto attention = [&](int64_t c, int64_t count) {
            if (dead) return broadcast(0.0f);
            return multiply(count == LANES ? load(sums + c) : load_some(sums + c, count), broadcast(normaliser));
        };
        if (gate == 1.0f) return each(attention);
        if (!call.fill.data) {
            each([&](int64_t c, int64_t count) {
                return gate == 0.0f ? broadcast(0.0f) : multiply(broadcast(gate), attention(c, count));
            });
            return;
        }
        with_element(call.fill.dtype, [&](auto fill_element) {
            const auto* fill = at<decltype(fill_element)>(call.fill, sample, head, row);
            const int64_t fill_stride = call.fill.strides[3];
            each([&](int64_t c, int64_t count) {
                const Floats filled = gather_as_floats(fill + c * fill_stride, fill_stride, count);
                if (gate == 0.0f) return filled;
                const Floats kept = multiply(broadcast(gate), attention(c, count));
                return multiply_add(broadcast(1.0f - gate), filled, kept);
            });
        });
    });
}

// Copies a row of the output, which isn't gated or filled, to the attention.
inline void copy_output(const headscope_attention& call, int64_t sample, int64_t head, int64_t row) {
    const int64_t stride = call.output.strides[3], to_stride = call.attention.strides[3];
    const auto copy = [&](auto element) {
        using Element = decltype(element);
        const Element* from = at<Element>(call.output, sample, head, row);
        Element* to = at<Element>(call.attention, sample, head, row);
        if (stride == 1 && to_stride == 1) {
            memcpy(to, from, static_cast<size_t>(call.dim_v) * sizeof(Element));
        } else {
            for (int64_t c = 0; c < call.dim_v; ++c) to[c * to_stride] = from[c * stride];
        }
    };
    call.output.dtype == HEADSCOPE_FLOAT32 ? copy(float{}) : copy(BFloat16{});
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
