// The five products of a backward, one register tile at a time.
//
// Two of them give a score for each row and key (queries . keys, cotangents . values); three give channels (of values
// and keys, summed over rows; of queries, summed over keys). All are the same tile, sums[row] += left[row][k] *
// right[k]: left is read one unit at a time, right a panel's width.
#ifndef HEADSCOPE_KERNEL_BACKWARD_PRODUCTS_H
#define HEADSCOPE_KERNEL_BACKWARD_PRODUCTS_H

#include "../logits.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

// The most keys of a block, and the stride between its rows of scores: a constant, so that the rows of a tile are one
// base register apart, and an odd number of cache lines.
constexpr int64_t MAX_SCORES = 256;
constexpr int64_t SCORE_STRIDE = MAX_SCORES + 16;

// Left operand with rows of channels: row r of the tile starts at starts[r].
struct ChannelRows {
    const Unit* starts[TILE_ROWS];

    HEADSCOPE_INLINE ChannelRows(const Unit* first, int64_t stride) {
        HEADSCOPE_UNROLL
        for (int row = 0; row < TILE_ROWS; ++row) starts[row] = first + row * stride;
    }
    HEADSCOPE_INLINE Unit at(int row, int64_t k) const { return starts[row][k]; }
};

// Left operand out of a block of scores, its rows summed over keys.
struct ScoreRows {
    const Unit* start;
    HEADSCOPE_INLINE Unit at(int row, int64_t k) const { return start[row * SCORE_STRIDE + k]; }
};

// Left operand out of a block of scores, its columns summed over rows.
struct ScoreColumns {
    const Unit* start;
    HEADSCOPE_INLINE Unit at(int row, int64_t k) const { return start[k * SCORE_STRIDE + row]; }
};

// The sums of a tile: VECTORS vectors and HALF of one.
template <int VECTORS, int HALF>
struct Sums {
    Floats whole[TILE_ROWS][VECTORS + 1];
    HalfFloats half[TILE_ROWS];
};

template <int VECTORS, int HALF, typename Left>
HEADSCOPE_INLINE void multiply_tile(const Left& left, const Unit* right, int64_t first, int64_t end,
                                    Sums<VECTORS, HALF>* sums) {
    constexpr int64_t WIDTH = VECTORS * LANES + HALF * HALF_LANES;
    HEADSCOPE_UNROLL
    for (int row = 0; row < TILE_ROWS; ++row) {
        HEADSCOPE_UNROLL
        for (int v = 0; v < VECTORS; ++v) sums->whole[row][v] = broadcast(0.0f);
        if (HALF) sums->half[row] = half_zero();
    }
    right += first * WIDTH;
    for (int64_t k = first; k < end; ++k, right += WIDTH) {
        Units whole[VECTORS + 1];
        HalfUnits half = {};
        HEADSCOPE_UNROLL
        for (int v = 0; v < VECTORS; ++v) whole[v] = load_units(right + v * LANES);
        if (HALF) half = half_load_units(right + VECTORS * LANES);
        HEADSCOPE_UNROLL
        for (int row = 0; row < TILE_ROWS; ++row) {
            const Units factor = broadcast_unit(left.at(row, k));
            HEADSCOPE_UNROLL
            for (int v = 0; v < VECTORS; ++v) sums->whole[row][v] = dot(factor, whole[v], sums->whole[row][v]);
            if (HALF) sums->half[row] = half_dot(factor, half, sums->half[row]);
        }
    }
}

// The same in pieces that are summed apart, in the order in which logits.h adds them.
template <int VECTORS>
HEADSCOPE_INLINE void multiply_in_pieces(const ChannelRows& left, const Unit* right, int64_t length, int64_t piece,
                                         Sums<VECTORS, 0>* sums) {
    multiply_tile(left, right, 0, smaller(length, piece), sums);
    for (int64_t first = piece; first < length; first += piece) {
        float before[TILE_ROWS][VECTORS][LANES];
        HEADSCOPE_UNROLL
        for (int row = 0; row < TILE_ROWS; ++row) {
            HEADSCOPE_UNROLL
            for (int v = 0; v < VECTORS; ++v) store(before[row][v], sums->whole[row][v]);
        }
        multiply_tile(left, right, first, smaller(length, first + piece), sums);
        HEADSCOPE_UNROLL
        for (int row = 0; row < TILE_ROWS; ++row) {
            HEADSCOPE_UNROLL
            for (int v = 0; v < VECTORS; ++v) sums->whole[row][v] = add(load(before[row][v]), sums->whole[row][v]);
        }
    }
}

// Scores of rows [tiles * TILE_ROWS][units], `stride` units apart, and columns of keys [panels][units][panel's width]:
// finish(row, key, sums) takes each tile. A panel stays in the first cache while all rows pass over it.
template <typename Finish>
void multiply_channels(const Unit* rows, int64_t stride, int64_t tiles, const Unit* columns, int64_t keys,
                       int64_t units, const Finish& finish) {
    const int64_t padded = round_up(keys, LANES);
    const int64_t piece = larger(1, piece_of(units));
    for (int64_t key = 0; key < padded;) {
        const Panel panel = first_key_panel(padded - key);
        with_vectors(panel.vectors, [&](auto vectors) {
            constexpr int VECTORS = decltype(vectors)::value;
            for (int64_t row = 0; row < tiles * TILE_ROWS; row += TILE_ROWS) {
                Sums<VECTORS, 0> sums;
                multiply_in_pieces(ChannelRows(rows + row * stride, stride), columns, units, piece, &sums);
                finish(row, key, sums);
            }
        });
        columns += panel.width() * units;
        key += panel.width();
    }
}

// Where sums of channels go: to[row][channel] = factor * sums, or that and what is there. Rows from `limit` on are
// left.
struct ChannelSums {
    float* to;
    int64_t stride;
    float factor;
    bool add;
    int64_t limit;

    template <int VECTORS, int HALF>
    HEADSCOPE_INLINE void operator()(int64_t row, int64_t channel, const Sums<VECTORS, HALF>& sums) const {
        const Floats scale = broadcast(factor);
        float* place = to + row * stride + channel;
        HEADSCOPE_UNROLL
        for (int r = 0; r < TILE_ROWS; ++r, place += stride) {
            if (row + r >= limit) return;
            HEADSCOPE_UNROLL
            for (int v = 0; v < VECTORS; ++v) {
                const Floats before = add ? load(place + v * LANES) : broadcast(0.0f);
                store(place + v * LANES, multiply_add(sums.whole[r][v], scale, before));
            }
            if (HALF) {
                float* end = place + VECTORS * LANES;
                const HalfFloats before = add ? half_load(end) : half_zero();
                half_store(end, half_multiply_add(factor, sums.half[r], before));
            }
        }
    }
};

// Sums of panels [panels][length][panel's width] of channels, weighted by rows or columns of scores: Left is ScoreRows
// or ScoreColumns, and a tile's operands start `tile_step` units after those of the one before.
template <typename Left>
void multiply_scores(const Unit* scores, int64_t tile_step, int64_t tiles, const Unit* panels, int64_t length,
                     int64_t width, const ChannelSums& target) {
    for (int64_t channel = 0; channel < width;) {
        const Panel panel = first_panel(width - channel);
        with_panel(panel, [&](auto vectors, auto half) {
            for (int64_t tile = 0; tile < tiles; ++tile) {
                Sums<decltype(vectors)::value, decltype(half)::value> sums;
                multiply_tile(Left{scores + tile * tile_step}, panels, 0, length, &sums);
                target(tile * TILE_ROWS, channel, sums);
            }
        });
        panels += panel.width() * length;
        channel += panel.width();
    }
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
