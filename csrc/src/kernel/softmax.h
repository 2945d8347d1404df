// The online softmax of one row.
//
// With x_j = (logit_j - running_max) * log2(e), the sums are
//     sum = sum_j 2^x_j        weighted = sum_j 2^x_j * x_j        squares = sum_j 2^(2 x_j)
// and when the maximum moves by d = (old - new) * log2(e) <= 0,
//     weighted <- 2^d * (weighted + d * sum)        sum <- 2^d * sum        squares <- 2^2d * squares
// so that logsumexp = max + ln(sum), entropy = ln(sum) - ln(2) * weighted / sum, max_prob = 1 / sum. Both terms of the
// entropy are at least 0: nothing large cancels. The maximum is subtracted before the conversion to powers of two,
// which would overflow for a row of finfo.min.
#ifndef HEADSCOPE_KERNEL_SOFTMAX_H
#define HEADSCOPE_KERNEL_SOFTMAX_H

#include "statistics.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

HEADSCOPE_INLINE void start_row(RowState* row) {
    row->sum = 0.0;
    row->weighted = 0.0;
    row->squares = 0.0;
    row->moved = 0.0;
    row->running_max = -INFINITE;
    row->rescale = 1.0f;
    row->saw_nan = false;
}

inline bool any_nan(const float* logits, int64_t count) {
    bool found = false;
    for (int64_t j = 0; j < count; ++j) found |= logits[j] != logits[j];
    return found;
}

// Moves a row's sums to a new maximum.
inline void move_maximum(RowState* row, float new_max) {
    if (new_max == row->running_max) {
        row->rescale = 1.0f;
        row->moved = 0.0;
        return;
    }
    if (row->running_max == -INFINITE) {
        // the sums are 0, or NaN and stay so
        row->rescale = 0.0f;
        row->running_max = new_max;
        return;
    }
    row->moved = (static_cast<double>(row->running_max) - static_cast<double>(new_max)) * 1.4426950408889634;
    row->rescale = static_cast<float>(exp2(row->moved));
    const double rescale = static_cast<double>(row->rescale);
    // at a factor of 0 the distance may be infinite; a NaN sum stays NaN
    row->weighted = row->rescale == 0.0f ? 0.0 : rescale * (row->weighted + row->sum * row->moved);
    row->sum *= rescale;
    row->squares *= rescale * rescale;
    row->running_max = new_max;
}

// How much a step computes beside the sum.
enum class Sweep { SUM, ENTROPY, EVERYTHING };

// Takes a block of logits (count a multiple of LANES, padding -inf) into the row and turns it into the weights that the
// values are multiplied with, in place: 2^x, times the key's scale (key_scale, EVERYTHING only, or null). row counts
// from the item's first.
template <Sweep SWEEP>
void softmax_block(float* logits, int64_t count, RowState* state, Statistics* statistics, const float* key_scale,
                   int64_t row, int64_t absolute_row) {
    // logits first: a NaN is passed over here, and found in the sum
    Floats greatest = broadcast(state->running_max);
    for (int64_t j = 0; j < count; j += LANES) greatest = max_of(load(logits + j), greatest);
    const float new_max = max_of_lanes(greatest);
    // inf - inf hides a NaN, so it is looked for before
    if (new_max == INFINITE) state->saw_nan |= any_nan(logits, count);
    move_maximum(state, new_max);
    // while no key is valid, subtract 0: -inf stays -inf
    const Floats shift = broadcast(new_max == -INFINITE ? 0.0f : new_max);
    Unit* powers = reinterpret_cast<Unit*>(logits);
    Floats sum = broadcast(0.0f);
    Floats weighted = broadcast(0.0f);
    const auto power_of = [&](int64_t j, Floats* exponent) {
        return exp2_of(multiply(subtract(load(logits + j), shift), broadcast(LOG2_E)), exponent);
    };
    if (SWEEP != Sweep::EVERYTHING) {
        for (int64_t j = 0; j < count; j += LANES) {
            Floats exponent;
            const Floats power = power_of(j, &exponent);
            store_powers(powers, j, power);
            sum = add(sum, power);
            if (SWEEP == Sweep::ENTROPY) weighted = multiply_add(power, exponent, weighted);
        }
    } else {
        RowStatistics extra(statistics, absolute_row);
        Floats squares = broadcast(0.0f);
        for (int64_t j = 0; j < count; j += LANES) {
            Floats exponent;
            const Floats power = power_of(j, &exponent);
            store_powers(powers, j, key_scale ? multiply(power, load(key_scale + j)) : power);
            sum = add(sum, power);
            weighted = multiply_add(power, exponent, weighted);
            squares = multiply_add(power, power, squares);
            extra.add_keys(j, power, multiply(power, exponent));
        }
        state->squares += static_cast<double>(sum_of_lanes(squares));
        extra.finish(*state, row);
    }
    state->sum += static_cast<double>(sum_of_lanes(sum));
    if (SWEEP != Sweep::SUM) state->weighted += static_cast<double>(sum_of_lanes(weighted));
    if (new_max != INFINITE) state->saw_nan |= state->sum != state->sum;
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
