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

// [rows, dim] -> [rows / width][dim][width], multiplied by `scale`; rows past the last are 0.
// The width is TILE_ROWS for queries, and that of the panel for keys.
template <typename Element>
void pack_panel(const Element* source, int64_t row_stride, int64_t dim_stride, int64_t rows, int64_t width, int64_t dim,
                float scale, float* packed) {
    for (int64_t row = 0; row < rows; ++row) {
        const Element* from = source + row * row_stride;
        for (int64_t d = 0; d < dim; ++d) packed[d * width + row] = scale * to_float(from[d * dim_stride]);
    }
    for (int64_t row = rows; row < width; ++row) {
        for (int64_t d = 0; d < dim; ++d) packed[d * width + row] = 0.0f;
    }
}

// Rows first..first + count - 1 of a head's queries -> [tiles][dim][TILE_ROWS], scaled.
inline void pack_queries(const headscope_attention& call, int64_t sample, int64_t head, int64_t first, int64_t count,
                         float* packed) {
    // an empty tensor has no address to count from
    if (call.dim == 0) return;
    with_element(call.query.dtype, [&](auto element) {
        using Element = decltype(element);
        const int64_t* strides = call.query.strides;
        const Element* source = at<Element>(call.query, sample, head, first);
        const float scale = static_cast<float>(call.scale);
        for (int64_t row = 0; row < count; row += TILE_ROWS) {
            pack_panel(source + row * strides[2], strides[2], strides[3], smaller(TILE_ROWS, count - row), TILE_ROWS,
                       call.dim, scale, packed + row * call.dim);
        }
    });
}

// Keys first..first + count - 1 of a key head -> [panels][dim][panel_keys].
inline void pack_keys(const headscope_attention& call, int64_t sample, int64_t kv_head, int64_t first, int64_t count,
                      float* packed) {
    if (call.dim == 0 || count <= 0) return;
    with_element(call.key.dtype, [&](auto element) {
        using Element = decltype(element);
        const int64_t* strides = call.key.strides;
        const Element* source = at<Element>(call.key, sample, kv_head, first);
        for (int64_t key = 0; key < count; key += PANEL_KEYS) {
            const int64_t width = panel_keys(key, count);
            pack_panel(source + key * strides[2], strides[2], strides[3], smaller(width, count - key), width, call.dim,
                       1.0f, packed + key * call.dim);
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
