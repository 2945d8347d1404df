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
// last place of a large logit, pieces by four.
constexpr int64_t MAX_PIECE = 24;

// queries [TILE_ROWS][length units], `stride` units apart . keys [length][VECTORS * LANES] -> logits
// [TILE_ROWS][VECTORS * LANES], or added to them, and at last scaled where the queries aren't
template <int VECTORS, bool ADD>
HEADSCOPE_INLINE void logits_piece(const Unit* queries, int64_t stride, const Unit* keys, int64_t length, bool last,
                                   float scale, float* logits) {
    Floats sums[TILE_ROWS][VECTORS];
    HEADSCOPE_UNROLL
    for (int row = 0; row < TILE_ROWS; ++row) {
        HEADSCOPE_UNROLL
        for (int v = 0; v < VECTORS; ++v) sums[row][v] = broadcast(0.0f);
    }
    const Unit* rows[TILE_ROWS];
    HEADSCOPE_UNROLL
    for (int row = 0; row < TILE_ROWS; ++row) rows[row] = queries + row * stride;
    for (int64_t d = 0; d < length; ++d) {
        Units key[VECTORS];
        HEADSCOPE_UNROLL
        for (int v = 0; v < VECTORS; ++v) key[v] = load_units(keys + (d * VECTORS + v) * LANES);
        HEADSCOPE_UNROLL
        for (int row = 0; row < TILE_ROWS; ++row) {
            const Units query = broadcast_unit(rows[row][d]);
            HEADSCOPE_UNROLL
            for (int v = 0; v < VECTORS; ++v) sums[row][v] = dot(query, key[v], sums[row][v]);
        }
    }
    const Floats factor = broadcast(last ? scale : 1.0f);
    HEADSCOPE_UNROLL
    for (int row = 0; row < TILE_ROWS; ++row) {
        HEADSCOPE_UNROLL
        for (int v = 0; v < VECTORS; ++v) {
            float* to = logits + row * LOGIT_STRIDE + v * LANES;
            Floats sum = ADD ? add(load(to), sums[row][v]) : sums[row][v];
            if (TERMS > 1) sum = multiply(sum, factor);
            store(to, sum);
        }
    }
}

// The units of each piece, the last of which may be shorter.
HEADSCOPE_INLINE int64_t piece_of(int64_t units) {
    constexpr int64_t MAX_UNITS = MAX_PIECE / TERMS;
    const int64_t pieces = (units + MAX_UNITS - 1) / MAX_UNITS;
    return units <= MAX_UNITS ? units : (units + pieces - 1) / pieces;
}

template <int VECTORS>
HEADSCOPE_INLINE void logits_tile(const Unit* queries, int64_t stride, const Unit* keys, int64_t units, float scale,
                                  float* logits) {
    const int64_t length = piece_of(units);
    logits_piece<VECTORS, false>(queries, stride, keys, length, length == units, scale, logits);
    for (int64_t d = length; d < units; d += length) {
        logits_piece<VECTORS, true>(queries + d, stride, keys + d * VECTORS * LANES, smaller(length, units - d),
                                    d + length >= units, scale, logits);
    }
}

// queries [tiles * TILE_ROWS][units], rows `stride` apart . keys [panels][units][panel's width] -> logits
// [tiles * TILE_ROWS][count], stride LOGIT_STRIDE. A panel of keys stays in the first cache while all tiles pass over
// it.
inline void compute_logits(const Unit* queries, int64_t stride, int64_t tiles, const Unit* keys, int64_t count,
                           int64_t units, float scale, float* logits) {
    const int64_t padded = round_up(count, LANES);
    for (int64_t key = 0; key < padded;) {
        const Panel panel = first_key_panel(padded - key);
        with_vectors(panel.vectors, [&](auto vectors) {
            for (int64_t tile = 0; tile < tiles; ++tile) {
                logits_tile<decltype(vectors)::value>(queries + tile * TILE_ROWS * stride, stride, keys, units, scale,
                                                      logits + tile * TILE_ROWS * LOGIT_STRIDE + key);
            }
        });
        keys += panel.width() * units;
        key += panel.width();
    }
}

// what one item may spend on packed keys and values
constexpr int64_t KEY_BYTES = int64_t{1} << 20;

// The keys of a forward's step.
inline int64_t key_block_of(const headscope_attention& call) {
    const int64_t key_bytes = 4 * (units_of(call.dim) + padded_channels(call.dim_v));
    constexpr int64_t LEAST = MAX_VECTORS * LANES;
    int64_t block = MAX_KEY_BLOCK;
    while (block / 2 > LEAST && block * key_bytes > KEY_BYTES) block /= 2;
    return larger(LANES, smaller(block, round_up(call.keys, LANES)));
}

// Whether the keys are scaled instead of the queries, which can then be read where they are: worth it where queries
// meet all keys at once. Threads and statistics have no say in it, so that they don't change a bit of the result. Heads
// that share keys have to share their scale.
inline bool scales_keys(const headscope_attention& call, int64_t key_block) {
    return TERMS == 1 && call.query.dtype == HEADSCOPE_FLOAT32 && call.query.strides[3] == 1 && call.dim > 0 &&
           call.keys <= key_block && (call.heads == call.kv_heads || !call.temperature.data);
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
