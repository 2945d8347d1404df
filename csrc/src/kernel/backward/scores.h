// From products to p and to the gradient of the logits, for a block of rows and keys.
//
//     p_j = 2^(log2 p_j)        log2 p_j = (logit_j - m) * log2(e) - s        m and s as the forward saved them
//     ds_j = p_j * (g * d output . value_j - ln(2) * d entropy * log2 p_j - delta)
//
// Without anything added to the logits or asked of single keys, both happen in registers, at the end of a product's
// tile. Otherwise the products are stored and rows are passed over once more: EditedRows.
#ifndef HEADSCOPE_KERNEL_BACKWARD_SCORES_H
#define HEADSCOPE_KERNEL_BACKWARD_SCORES_H

#include "../exponential.h"
#include "../mask.h"
#include "products.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

// A block of scores in the forms that the products read; where units are float32 they are one and the same.
struct ScoreBlock {
    float* powers;     // [rows][SCORE_STRIDE], p
    float* exponents;  // likewise, log2 p
    float* gradients;  // likewise, ds
    Unit* weights;     // [units of rows][SCORE_STRIDE], what the cotangents are weighted with
    Unit* by_key;      // [rows][SCORE_STRIDE], ds in units of keys
    Unit* by_row;      // [units of rows][SCORE_STRIDE], ds in units of rows
};

// Stores the vectors of two rows, `row` an even one and the one after it, in units of rows.
HEADSCOPE_INLINE void store_two_rows(Unit* block, int64_t row, int64_t key, Floats first, Floats second) {
#if defined(HEADSCOPE_DOTS)
    store_pairs(block + row / 2 * SCORE_STRIDE + key, first, second);
#else
    store(block + row * SCORE_STRIDE + key, first);
    store(block + (row + 1) * SCORE_STRIDE + key, second);
#endif
}

// p of logits that are the forward's own, bit for bit: what they err by is in m and s as well, and p sums to 1.
// exponent: log2 p. minus_s: -s.
HEADSCOPE_INLINE Floats power_at(Floats logit, Floats m, Floats minus_s, Floats* exponent) {
    return exp2_of(multiply_add(subtract(logit, m), broadcast(LOG2_E), minus_s), exponent);
}

// The end of a tile of queries . keys: p.
template <bool ENTROPY>
struct Probabilities {
    const ScoreBlock& block;
    float factor;                // of the products
    const float *maxima, *sums;  // [rows]: m and s

    template <int VECTORS>
    HEADSCOPE_INLINE void operator()(int64_t first, int64_t key, const Sums<VECTORS, 0>& products) const {
        Floats before[VECTORS];
        HEADSCOPE_UNROLL
        for (int row = 0; row < TILE_ROWS; ++row) {
            const Floats maximum = broadcast(maxima[first + row]), sum = broadcast(-sums[first + row]);
            const int64_t place = (first + row) * SCORE_STRIDE + key;
            HEADSCOPE_UNROLL
            for (int v = 0; v < VECTORS; ++v) {
                Floats exponent;
                Floats logit = products.whole[row][v];
                if (TERMS > 1) logit = multiply(logit, broadcast(factor));
                const Floats power = power_at(logit, maximum, sum, &exponent);
                store(block.powers + place + v * LANES, power);
                if (ENTROPY) store(block.exponents + place + v * LANES, exponent);
                if (TERMS > 1) {
                    if (row % 2) store_two_rows(block.weights, first + row - 1, key + v * LANES, before[v], power);
                    before[v] = power;
                }
            }
        }
    }
};

// The end of a tile of cotangents . values: ds.
template <bool ENTROPY>
struct LogitGradients {
    const ScoreBlock& block;
    float factor;            // the gate
    const float* deltas;     // [rows], with a minus
    const float* entropies;  // [rows], -ln(2) times the entropy's cotangent

    template <int VECTORS>
    HEADSCOPE_INLINE void operator()(int64_t first, int64_t key, const Sums<VECTORS, 0>& products) const {
        Floats before[VECTORS];
        HEADSCOPE_UNROLL
        for (int row = 0; row < TILE_ROWS; ++row) {
            const Floats delta = broadcast(deltas[first + row]);
            const int64_t place = (first + row) * SCORE_STRIDE + key;
            HEADSCOPE_UNROLL
            for (int v = 0; v < VECTORS; ++v) {
                Floats sum = multiply_add(products.whole[row][v], broadcast(factor), delta);
                if (ENTROPY) {
                    const Floats exponent = load(block.exponents + place + v * LANES);
                    sum = multiply_add(exponent, broadcast(entropies[first + row]), sum);
                }
                const Floats gradient = multiply(load(block.powers + place + v * LANES), sum);
                if (TERMS > 1) {
                    store_powers(block.by_key + (first + row) * SCORE_STRIDE, key + v * LANES, gradient);
                    if (row % 2) store_two_rows(block.by_row, first + row - 1, key + v * LANES, before[v], gradient);
                    before[v] = gradient;
                } else {
                    store(block.gradients + place + v * LANES, gradient);
                }
            }
        }
    }
};

// The end of a tile whose products are looked at again.
struct Products {
    float* to;
    float factor;

    template <int VECTORS>
    HEADSCOPE_INLINE void operator()(int64_t first, int64_t key, const Sums<VECTORS, 0>& products) const {
        HEADSCOPE_UNROLL
        for (int row = 0; row < TILE_ROWS; ++row) {
            HEADSCOPE_UNROLL
            for (int v = 0; v < VECTORS; ++v) {
                store(to + (first + row) * SCORE_STRIDE + key + v * LANES,
                      multiply(products.whole[row][v], broadcast(factor)));
            }
        }
    }
};

// Rows of floats in units of keys.
inline void pair_keys(const float* from, int64_t rows, int64_t padded, Unit* to) {
    for (int64_t row = 0; row < rows; ++row, from += SCORE_STRIDE, to += SCORE_STRIDE) {
        for (int64_t j = 0; j < padded; j += LANES) store_powers(to, j, load(from + j));
    }
}

// Rows of floats in units of rows; what is missing of the last unit is 0.
inline void pair_rows(const float* from, int64_t rows, int64_t padded, Unit* to) {
    for (int64_t row = 0; row < rows; row += 2, from += 2 * SCORE_STRIDE) {
        for (int64_t j = 0; j < padded; j += LANES) {
            store_two_rows(to, row, j, load(from + j),
                           row + 1 < rows ? load(from + SCORE_STRIDE + j) : broadcast(0.0f));
        }
    }
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
