// outputs = rescale * outputs + probabilities . packed values, one register tile at a time.
#ifndef HEADSCOPE_KERNEL_VALUES_H
#define HEADSCOPE_KERNEL_VALUES_H

#include "logits.h"
#include "softmax.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

// Keys whose values are summed apart before they are added to the outputs: short sums round less.
constexpr int64_t MAX_TERMS = 128;

// powers [TILE_ROWS][count], stride LOGIT_STRIDE . values [count][VECTORS * LANES], added to outputs
// [TILE_ROWS][VECTORS * LANES], stride output_stride
template <int VECTORS, bool RESCALE>
HEADSCOPE_INLINE void values_piece(const float* powers, const float* values, int64_t count, const RowState* rows,
                                   float* outputs, int64_t output_stride) {
    Floats sums[TILE_ROWS][VECTORS];
    HEADSCOPE_UNROLL
    for (int row = 0; row < TILE_ROWS; ++row) {
        HEADSCOPE_UNROLL
        for (int v = 0; v < VECTORS; ++v) sums[row][v] = broadcast(0.0f);
    }
    for (int64_t key = 0; key < count; ++key) {
        Floats value[VECTORS];
        HEADSCOPE_UNROLL
        for (int v = 0; v < VECTORS; ++v) value[v] = load(values + (key * VECTORS + v) * LANES);
        HEADSCOPE_UNROLL
        for (int row = 0; row < TILE_ROWS; ++row) {
            const Floats power = broadcast(powers[row * LOGIT_STRIDE + key]);
            HEADSCOPE_UNROLL
            for (int v = 0; v < VECTORS; ++v) sums[row][v] = multiply_add(power, value[v], sums[row][v]);
        }
    }
    HEADSCOPE_UNROLL
    for (int row = 0; row < TILE_ROWS; ++row) {
        const Floats rescale = broadcast(rows[row].rescale);
        HEADSCOPE_UNROLL
        for (int v = 0; v < VECTORS; ++v) {
            float* to = outputs + row * output_stride + v * LANES;
            store(to, RESCALE ? multiply_add(rescale, load(to), sums[row][v]) : add(load(to), sums[row][v]));
        }
    }
}

template <int VECTORS>
HEADSCOPE_INLINE void values_tile(const float* powers, const float* values, int64_t count, const RowState* rows,
                                  float* outputs, int64_t output_stride) {
    values_piece<VECTORS, true>(powers, values, smaller(MAX_TERMS, count), rows, outputs, output_stride);
    for (int64_t key = MAX_TERMS; key < count; key += MAX_TERMS) {
        values_piece<VECTORS, false>(powers + key, values + key * VECTORS * LANES, smaller(MAX_TERMS, count - key),
                                     rows, outputs, output_stride);
    }
}

// powers [tiles * TILE_ROWS][count] . values [panels][count][vectors * LANES], added to outputs
// [tiles * TILE_ROWS][output_stride], output_stride a multiple of LANES. A panel of values stays in cache while all
// tiles pass over it.
inline void add_values(const float* powers, int64_t tiles, const float* values, int64_t count, const RowState* rows,
                       float* outputs, int64_t output_stride) {
    const int64_t vectors = output_stride / LANES;
    for (int64_t vector = 0; vector < vectors;) {
        const int panel = value_vectors(vector, vectors);
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t row = tile * TILE_ROWS;
            float* to = outputs + row * output_stride + vector * LANES;
            const float* from = powers + row * LOGIT_STRIDE;
            if (panel == 1) values_tile<1>(from, values, count, rows + row, to, output_stride);
            if (panel == 2) values_tile<2>(from, values, count, rows + row, to, output_stride);
            if (panel == 3) values_tile<MAX_VALUE_VECTORS>(from, values, count, rows + row, to, output_stride);
        }
        values += panel * LANES * count;
        vector += panel;
    }
}

// The same for one row, where a value is infinite or NaN and a mask hides some keys: 0 * NaN would let a key through
// that the row doesn't see. `sees(key)` tells, key counting from the block's first. Slow, and rare.
template <typename Sees>
void add_seen_values(const float* powers, const float* values, int64_t count, const RowState& row, float* outputs,
                     int64_t output_stride, const Sees& sees) {
    const int64_t vectors = output_stride / LANES;
    for (int64_t c = 0; c < output_stride; ++c) outputs[c] *= row.rescale;
    for (int64_t vector = 0; vector < vectors;) {
        const int panel = value_vectors(vector, vectors);
        const int64_t width = panel * LANES;
        for (int64_t key = 0; key < count; ++key) {
            if (!sees(key)) continue;
            for (int64_t c = 0; c < width; ++c) outputs[vector * LANES + c] += powers[key] * values[key * width + c];
        }
        values += width * count;
        vector += panel;
    }
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
