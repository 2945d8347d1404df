// outputs = rescale * outputs + probabilities . packed values, one register tile at a time.
#ifndef HEADSCOPE_KERNEL_VALUES_H
#define HEADSCOPE_KERNEL_VALUES_H

#include "logits.h"
#include "softmax.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

// Keys whose values are summed apart before they are added to the outputs: short sums round less.
constexpr int64_t MAX_TERMS = 128;

// What becomes of the outputs that are there: nothing yet, times the row's factor, or kept.
enum class Before { NOTHING, RESCALED, KEPT };

// Where the outputs of a block of rows go.
struct Target {
    float* sums;  // [rows][stride], what was summed so far and will be
    int64_t stride;
    // The rows themselves, which the last sums go to, times a factor for each; null while keys are to come, or where
    // output.h has to see the sums first.
    float* rows;
    int64_t row_stride;
    const float* factors;

    HEADSCOPE_INLINE Target at(int64_t row, int64_t channel) const {
        if (!rows) return {sums + row * stride + channel, stride, nullptr, 0, nullptr};
        return {sums + row * stride + channel, stride, rows + row * row_stride + channel, row_stride, factors + row};
    }
};

// powers [TILE_ROWS][count units], stride LOGIT_STRIDE . values [count][width], added to the target [TILE_ROWS][width];
// width is VECTORS vectors and HALF of one. `last`: the sums are complete.
template <int VECTORS, int HALF, Before BEFORE>
HEADSCOPE_INLINE void values_piece(const Unit* powers, const Unit* values, int64_t count, const RowState* rows,
                                   const Target& target, bool last) {
    constexpr int64_t WIDTH = VECTORS * LANES + HALF * HALF_LANES;
    Floats sums[TILE_ROWS][VECTORS + 1];
    HalfFloats halves[TILE_ROWS];
    HEADSCOPE_UNROLL
    for (int row = 0; row < TILE_ROWS; ++row) {
        HEADSCOPE_UNROLL
        for (int v = 0; v < VECTORS; ++v) sums[row][v] = broadcast(0.0f);
        if (HALF) halves[row] = half_zero();
    }
    for (int64_t key = 0; key < count; ++key) {
        const Unit* from = values + key * WIDTH;
        Units value[VECTORS + 1];
        HalfUnits half = {};
        HEADSCOPE_UNROLL
        for (int v = 0; v < VECTORS; ++v) value[v] = load_units(from + v * LANES);
        if (HALF) half = half_load_units(from + VECTORS * LANES);
        HEADSCOPE_UNROLL
        for (int row = 0; row < TILE_ROWS; ++row) {
            const Units power = broadcast_unit(powers[row * LOGIT_STRIDE + key]);
            HEADSCOPE_UNROLL
            for (int v = 0; v < VECTORS; ++v) sums[row][v] = dot(power, value[v], sums[row][v]);
            if (HALF) halves[row] = half_dot(power, half, halves[row]);
        }
    }
    const bool stored = last && target.rows;
    HEADSCOPE_UNROLL
    for (int row = 0; row < TILE_ROWS; ++row) {
        const float rescale = rows[row].rescale;
        const float factor = stored ? target.factors[row] : 1.0f;
        const float* from = target.sums + row * target.stride;
        float* to = stored ? target.rows + row * target.row_stride : target.sums + row * target.stride;
        HEADSCOPE_UNROLL
        for (int v = 0; v < VECTORS; ++v, from += LANES, to += LANES) {
            Floats sum = sums[row][v];
            if (BEFORE == Before::RESCALED) sum = multiply_add(broadcast(rescale), load(from), sum);
            if (BEFORE == Before::KEPT) sum = add(load(from), sum);
            store(to, multiply(sum, broadcast(factor)));
        }
        if (HALF) {
            HalfFloats sum = halves[row];
            if (BEFORE == Before::RESCALED) sum = half_multiply_add(rescale, half_load(from), sum);
            if (BEFORE == Before::KEPT) sum = half_add(half_load(from), sum);
            half_store(to, half_multiply(factor, sum));
        }
    }
}

template <int VECTORS, int HALF>
HEADSCOPE_INLINE void values_tile(const Unit* powers, const Unit* values, int64_t count, const RowState* rows,
                                  const Target& target, bool first) {
    constexpr int64_t WIDTH = VECTORS * LANES + HALF * HALF_LANES;
    constexpr int64_t MAX_UNITS = MAX_TERMS / TERMS;
    const int64_t length = smaller(MAX_UNITS, count);
    if (first) {
        values_piece<VECTORS, HALF, Before::NOTHING>(powers, values, length, rows, target, length == count);
    } else {
        values_piece<VECTORS, HALF, Before::RESCALED>(powers, values, length, rows, target, length == count);
    }
    for (int64_t key = MAX_UNITS; key < count; key += MAX_UNITS) {
        values_piece<VECTORS, HALF, Before::KEPT>(powers + key, values + key * WIDTH, smaller(MAX_UNITS, count - key),
                                                  rows, target, key + MAX_UNITS >= count);
    }
}

// powers [tiles * TILE_ROWS][count] . values [panels][count][panel's width], added to the target [tiles * TILE_ROWS]
// [width], width = padded_channels(). Keys are counted in units. The first step writes the sums, the others rescale
// them. A panel of values stays in cache while all tiles pass over it.
inline void add_values(const Unit* powers, int64_t tiles, const Unit* values, int64_t count, const RowState* rows,
                       const Target& target, int64_t width, bool first) {
    for (int64_t channel = 0; channel < width;) {
        const Panel panel = first_panel(width - channel);
        with_panel(panel, [&](auto vectors, auto half) {
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t row = tile * TILE_ROWS;
                values_tile<decltype(vectors)::value, decltype(half)::value>(
                    powers + row * LOGIT_STRIDE, values, count, rows + row, target.at(row, channel), first);
            }
        });
        values += panel.width() * count;
        channel += panel.width();
    }
}

// The same for one row, where a value is infinite or NaN and a mask hides some keys: 0 * NaN would let a key through
// that the row doesn't see. `sees(key)` tells, key counting from the block's first. Slow, and rare.
template <typename Sees>
void add_seen_values(const Unit* powers, const Unit* values, int64_t count, const RowState& row, float* outputs,
                     int64_t output_stride, bool first, const Sees& sees) {
    for (int64_t c = 0; c < output_stride; ++c) outputs[c] = first ? 0.0f : outputs[c] * row.rescale;
    for (int64_t channel = 0; channel < output_stride;) {
        const int64_t width = first_panel(output_stride - channel).width();
        for (int64_t key = 0; key < count; ++key) {
            if (!sees(key)) continue;
            const float power = packed_power(powers, key);
            for (int64_t c = 0; c < width; ++c) outputs[channel + c] += power * packed_value(values, width, key, c);
        }
        values += width * units_of(count);
        channel += width;
    }
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
