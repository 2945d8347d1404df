// logits = packed queries . packed keys, one register tile at a time.
#ifndef HEADSCOPE_KERNEL_LOGITS_H
#define HEADSCOPE_KERNEL_LOGITS_H

#include "pack.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

// The most keys a step takes, and the stride between rows of logits. The stride is a constant, so that the rows of a
// tile are one base register apart; it isn't a power of two, so that they don't share cache sets.
constexpr int64_t MAX_KEY_BLOCK = 512;
constexpr int64_t LOGIT_STRIDE = MAX_KEY_BLOCK + 16;

// A dot product is summed in pieces of at most this many terms. One float32 sum of 160 terms errs by eight units in the
// last place of a large logit; the contract allows four.
constexpr int64_t MAX_PIECE = 24;

// queries [TILE_ROWS][length], stride dim . keys [length][VECTORS * LANES] -> logits [TILE_ROWS][VECTORS * LANES],
// or added to them
template <int VECTORS, bool ADD>
HEADSCOPE_INLINE void logits_piece(const float* queries, int64_t dim, const float* keys, int64_t length,
                                   float* logits) {
    const float* rows[TILE_ROWS];
    HEADSCOPE_UNROLL
    for (int row = 0; row < TILE_ROWS; ++row) rows[row] = queries + row * dim;
    Floats sums[TILE_ROWS][VECTORS];
    HEADSCOPE_UNROLL
    for (int row = 0; row < TILE_ROWS; ++row) {
        HEADSCOPE_UNROLL
        for (int v = 0; v < VECTORS; ++v) sums[row][v] = broadcast(0.0f);
    }
    for (int64_t d = 0; d < length; ++d) {
        Floats key[VECTORS];
        HEADSCOPE_UNROLL
        for (int v = 0; v < VECTORS; ++v) key[v] = load(keys + (d * VECTORS + v) * LANES);
        HEADSCOPE_UNROLL
        for (int row = 0; row < TILE_ROWS; ++row) {
            const Floats query = broadcast(rows[row][d]);
            HEADSCOPE_UNROLL
            for (int v = 0; v < VECTORS; ++v) sums[row][v] = multiply_add(query, key[v], sums[row][v]);
        }
    }
    HEADSCOPE_UNROLL
    for (int row = 0; row < TILE_ROWS; ++row) {
        HEADSCOPE_UNROLL
        for (int v = 0; v < VECTORS; ++v) {
            float* to = logits + row * LOGIT_STRIDE + v * LANES;
            store(to, ADD ? add(load(to), sums[row][v]) : sums[row][v]);
        }
    }
}

template <int VECTORS>
HEADSCOPE_INLINE void logits_tile(const float* queries, const float* keys, int64_t dim, float* logits) {
    const int64_t pieces = (dim + MAX_PIECE - 1) / MAX_PIECE;
    const int64_t length = pieces ? (dim + pieces - 1) / pieces : 0;
    logits_piece<VECTORS, false>(queries, dim, keys, smaller(length, dim), logits);
    for (int64_t d = length; d < dim; d += length) {
        logits_piece<VECTORS, true>(queries + d, dim, keys + d * VECTORS * LANES, smaller(length, dim - d), logits);
    }
}

// queries [tiles * TILE_ROWS][dim] . keys [panels][dim][panel_keys] -> logits [tiles * TILE_ROWS][count], stride
// LOGIT_STRIDE. A panel of keys stays in the first cache while all tiles pass over it.
inline void compute_logits(const float* queries, int64_t tiles, const float* keys, int64_t count, int64_t dim,
                           float* logits) {
    for (int64_t key = 0; key < count; key += PANEL_KEYS) {
        const bool whole = panel_keys(key, count) == PANEL_KEYS;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const float* tile_queries = queries + tile * TILE_ROWS * dim;
            float* tile_logits = logits + tile * TILE_ROWS * LOGIT_STRIDE + key;
            if (whole) {
                logits_tile<2>(tile_queries, keys + key * dim, dim, tile_logits);
            } else {
                logits_tile<1>(tile_queries, keys + key * dim, dim, tile_logits);
            }
        }
    }
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
