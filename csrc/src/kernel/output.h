// The end of a row: normalise, gate, fill, and store in the output's own type.
#ifndef HEADSCOPE_KERNEL_OUTPUT_H
#define HEADSCOPE_KERNEL_OUTPUT_H

#include "convert.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

HEADSCOPE_INLINE float gate_of(const headscope_attention& call, int64_t sample, int64_t head) {
    return call.gate ? call.gate[sample * call.gate_strides[0] + head * call.gate_strides[1]] : 1.0f;
}

// fill(channel) is called with the fill's value at each channel of a row; zeros without a fill.
template <typename Function>
void for_each_fill(const headscope_attention& call, int64_t sample, int64_t head, int64_t row,
                   const Function& function) {
    if (!call.fill.data) {
        for (int64_t c = 0; c < call.dim_v; ++c) function(c, 0.0f);
        return;
    }
    with_element(call.fill.dtype, [&](auto element) {
        const auto* fill = at<decltype(element)>(call.fill, sample, head, row);
        for (int64_t c = 0; c < call.dim_v; ++c) function(c, to_float(fill[c * call.fill.strides[3]]));
    });
}

// output = gate * normaliser * sums + (1 - gate) * fill for one row. A gate of exactly 1 or 0 selects, so that a NaN
// in what isn't selected stays out; sums aren't read at gate 0, nor at a normaliser of 0 (a row without a valid key).
inline void write_output(const headscope_attention& call, int64_t sample, int64_t head, int64_t row, const float* sums,
                         float normaliser, float gate) {
    if (call.dim_v == 0) return;
    with_element(call.output.dtype, [&](auto element) {
        using Element = decltype(element);
        Element* output = at<Element>(call.output, sample, head, row);
        const int64_t stride = call.output.strides[3];
        const auto attention = [&](int64_t c) { return normaliser == 0.0f ? 0.0f : sums[c] * normaliser; };
        if (gate == 1.0f && stride == 1) {
            for (int64_t c = 0; c < call.dim_v; ++c) output[c] = from_float<Element>(attention(c));
        } else if (gate == 1.0f) {
            for (int64_t c = 0; c < call.dim_v; ++c) output[c * stride] = from_float<Element>(attention(c));
        } else if (gate == 0.0f) {
            for_each_fill(call, sample, head, row,
                          [&](int64_t c, float fill) { output[c * stride] = from_float<Element>(fill); });
        } else {
            for_each_fill(call, sample, head, row, [&](int64_t c, float fill) {
                output[c * stride] = from_float<Element>(gate * attention(c) + (1.0f - gate) * fill);
            });
        }
    });
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
