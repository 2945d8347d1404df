// Copies of query, key and value blocks in float32, in the order in which the tiles read them.
#ifndef HEADSCOPE_KERNEL_PACK_H
#define HEADSCOPE_KERNEL_PACK_H

#include "convert.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

HEADSCOPE_INLINE int64_t round_up(int64_t size, int64_t multiple) {
    return (size + multiple - 1) / multiple * multiple;
}
HEADSCOPE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
HEADSCOPE_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Keys in the panel that starts at `first`: the last one may be a single vector wide.
HEADSCOPE_INLINE int64_t panel_keys(int64_t first, int64_t count) {
    return count - first <= LANES ? LANES : PANEL_KEYS;
}

// Vectors in the value panel that starts at vector `first` of `count`: as wide as the registers allow, but 4 = 2 + 2.
HEADSCOPE_INLINE int value_vectors(int64_t first, int64_t count) {
    const int64_t left = count - first;
    if (left == 4 && MAX_VALUE_VECTORS == 3) return 2;
    return static_cast<int>(smaller(left, MAX_VALUE_VECTORS));
}

// Rows first..first + count - 1 of a head's queries -> [count rounded up to TILE_ROWS][dim], scaled; the rest are 0.
inline void pack_queries(const headscope_attention& call, int64_t sample, int64_t head, int64_t first, int64_t count,
                         float* packed) {
    // an empty tensor has no address to count from
    if (call.dim == 0) return;
    with_element(call.query.dtype, [&](auto element) {
        using Element = decltype(element);
        const int64_t* strides = call.query.strides;
        const Element* source = at<Element>(call.query, sample, head, first);
        const float scale = static_cast<float>(call.scale);
        for (int64_t row = 0; row < count; ++row) {
            const Element* from = source + row * strides[2];
            float* to = packed + row * call.dim;
            if (strides[3] == 1) {
                for (int64_t d = 0; d < call.dim; ++d) to[d] = scale * to_float(from[d]);
            } else {
                for (int64_t d = 0; d < call.dim; ++d) to[d] = scale * to_float(from[d * strides[3]]);
            }
        }
        const int64_t padding = round_up(count, TILE_ROWS) - count;
        memset(packed + count * call.dim, 0, static_cast<size_t>(padding * call.dim) * sizeof(float));
    });
}

// Keys first..first + count - 1 of a key head -> [panels][dim][panel_keys]; keys past the last are 0.
inline void pack_keys(const headscope_attention& call, int64_t sample, int64_t kv_head, int64_t first, int64_t count,
                      float* packed) {
    if (call.dim == 0 || count <= 0) return;
    with_element(call.key.dtype, [&](auto element) {
        using Element = decltype(element);
        const int64_t* strides = call.key.strides;
        const Element* source = at<Element>(call.key, sample, kv_head, first);
        for (int64_t key = 0; key < count; key += PANEL_KEYS) {
            const int64_t width = panel_keys(key, count);
            const int64_t rows = smaller(width, count - key);
            float* panel = packed + key * call.dim;
            for (int64_t row = 0; row < rows; ++row) {
                const Element* from = source + (key + row) * strides[2];
                for (int64_t d = 0; d < call.dim; ++d) panel[d * width + row] = to_float(from[d * strides[3]]);
            }
            for (int64_t row = rows; row < width; ++row) {
                for (int64_t d = 0; d < call.dim; ++d) panel[d * width + row] = 0.0f;
            }
        }
    });
}

// Values first..first + count - 1 of a key head -> [panels][count][vectors * LANES], channels past dim_v are 0.
// Returns whether all of them are finite.
inline bool pack_values(const headscope_attention& call, int64_t sample, int64_t kv_head, int64_t first, int64_t count,
                        float* packed) {
    if (call.dim_v == 0 || count <= 0) return true;
    constexpr uint32_t EXPONENT = 0x7f800000u;
    uint32_t not_finite = 0;
    with_element(call.value.dtype, [&](auto element) {
        using Element = decltype(element);
        const int64_t* strides = call.value.strides;
        const Element* source = at<Element>(call.value, sample, kv_head, first);
        const int64_t vectors = round_up(call.dim_v, LANES) / LANES;
        for (int64_t vector = 0; vector < vectors;) {
            const int panel = value_vectors(vector, vectors);
            const int64_t width = panel * LANES;
            const int64_t channel = vector * LANES;
            const int64_t channels = smaller(width, call.dim_v - channel);
            for (int64_t key = 0; key < count; ++key, packed += width) {
                const Element* from = source + key * strides[2] + channel * strides[3];
                for (int64_t c = 0; c < channels; ++c) {
                    packed[c] = to_float(from[c * strides[3]]);
                    not_finite |= (bit_cast<uint32_t>(packed[c]) & EXPONENT) == EXPONENT;
                }
                for (int64_t c = channels; c < width; ++c) packed[c] = 0.0f;
            }
            vector += panel;
        }
    });
    return not_finite == 0;
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
