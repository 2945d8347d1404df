// Rows of a block whose logits have something added, or whose keys are asked about one by one: masks, key_bias,
// key_scale, groups of keys, sums over rows. A pass over the products in memory, a row at a time.
#ifndef HEADSCOPE_KERNEL_BACKWARD_EDITED_H
#define HEADSCOPE_KERNEL_BACKWARD_EDITED_H

#include "scores.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

// A block of keys as one head sees them.
struct KeyTerms {
    int64_t first, count;
    float* bias;      // [MAX_SCORES], null: none
    float* scale;     // likewise
    int32_t* groups;  // [group cotangents][MAX_SCORES]: a key's group, or -1
};

// Logits of a row, scaled -> p, and log2 p. m, s: what the forward saved of the row.
inline void edited_probabilities(const headscope_attention& call, int64_t sample, int64_t head, int64_t row,
                                 const KeyTerms& keys, float m, float s, float* logits, float* exponents) {
    apply_mask(call, sample, head, row, keys.first, keys.count, keys.bias, logits);
    if (m != m || s != s) {
        // a NaN of the row's own, which it doesn't give to keys that it doesn't see
        for (int64_t j = 0; j < round_up(keys.count, LANES); ++j) {
            logits[j] = exponents[j] = logits[j] == -INFINITE ? 0.0f : NAN;
        }
        return;
    }
    for (int64_t j = 0; j < keys.count; j += LANES) {
        Floats exponent;
        store(logits + j, power_at(load(logits + j), broadcast(m), broadcast(-s), &exponent));
        store(exponents + j, exponent);
    }
}

// What one row's gradients are made of, for one cotangent.
struct RowTerms {
    float delta;    // with a minus
    float entropy;  // -ln(2) times the entropy's cotangent
    bool has_entropy;
};

// g * d output . value of a row -> ds. 0 where p is: a key that the row doesn't see says nothing, whatever it holds.
// key_sums, scale_sums [count]: sums over rows of ds, and of p * g * d output . value; null: not wanted.
inline void edited_gradients(const headscope_gradients& wanted, const KeyTerms& keys, const RowTerms& terms,
                             int64_t flat_row, const float* powers, const float* exponents, float* products,
                             float* key_sums, float* scale_sums) {
    for (int64_t j = 0; j < keys.count; j += LANES) {
        const Floats power = load(powers + j);
        Floats sum = load(products + j);
        if (scale_sums) store(scale_sums + j, add(load(scale_sums + j), zero_where_zero(power, multiply(power, sum))));
        if (keys.scale) sum = multiply(sum, load(keys.scale + j));
        sum = add(sum, broadcast(terms.delta));
        if (terms.has_entropy) sum = multiply_add(load(exponents + j), broadcast(terms.entropy), sum);
        for (int64_t g = 0; g < wanted.group_count; ++g) {
            const headscope_group_cotangent& group = wanted.groups[g];
            sum = add(sum, gather_or_zero(group.data + flat_row * group.count, keys.groups + g * MAX_SCORES + j));
        }
        const Floats gradient = zero_where_zero(power, multiply(power, sum));
        store(products + j, gradient);
        if (key_sums) store(key_sums + j, add(load(key_sums + j), gradient));
    }
}

// Rows of p times the keys' scales, in units of rows. A key that a row doesn't see has 0, whatever its scale.
inline void scale_rows(const float* powers, int64_t rows, const KeyTerms& keys, Unit* to) {
    for (int64_t row = 0; row < rows; row += 2, powers += 2 * SCORE_STRIDE) {
        for (int64_t j = 0; j < keys.count; j += LANES) {
            const Floats scale = load(keys.scale + j), first = load(powers + j);
            const Floats second = row + 1 < rows ? load(powers + SCORE_STRIDE + j) : broadcast(0.0f);
            store_two_rows(to, row, j, zero_where_zero(first, multiply(first, scale)),
                           zero_where_zero(second, multiply(second, scale)));
        }
    }
}

// The group of each key of a block, counted from the cotangent's first one; -1: none of them, or no key.
inline void find_groups(const headscope_gradients& wanted, int64_t sample, int64_t head, const KeyTerms& keys) {
    for (int64_t g = 0; g < wanted.group_count; ++g) {
        const headscope_group_cotangent& group = wanted.groups[g];
        int32_t* found = keys.groups + g * MAX_SCORES;
        const int64_t* strides = group.group_strides;
        for (int64_t j = 0; j < round_up(keys.count, LANES); ++j) {
            found[j] = -1;
            // without groups, or rows, there need be no ids
            if (j >= keys.count || !group.groups) continue;
            const int64_t id = group.groups[sample * strides[0] + head * strides[1] + (keys.first + j) * strides[2]];
            if (id >= group.first && id - group.first < group.count) found[j] = static_cast<int32_t>(id - group.first);
        }
    }
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
