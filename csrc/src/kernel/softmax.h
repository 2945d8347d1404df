// The online softmax of one row, and what its running sums say at the end.
//
// With x_j = (logit_j - running_max) * log2(e), the sums are
//     sum = sum_j 2^x_j        weighted = sum_j 2^x_j * x_j
// and when the maximum moves by d = (old - new) * log2(e) <= 0,
//     weighted <- 2^d * (weighted + d * sum)        sum <- 2^d * sum
// so that logsumexp = max + ln(sum), entropy = ln(sum) - ln(2) * weighted / sum, max_prob = 1 / sum. Both terms of the
// entropy are at least 0: nothing large cancels. The maximum is subtracted before the conversion to powers of two,
// which would overflow for a row of finfo.min.
#ifndef HEADSCOPE_KERNEL_SOFTMAX_H
#define HEADSCOPE_KERNEL_SOFTMAX_H

#include <math.h>

#include "exponential.h"
#include "mask.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

struct RowState {
    double sum;
    double weighted;
    float running_max;  // NaN aside; -inf until a key is valid
    float rescale;      // what this step multiplies the row's output by
    bool saw_nan;       // a logit was NaN
};

HEADSCOPE_INLINE void start_row(RowState* row) {
    row->sum = 0.0;
    row->weighted = 0.0;
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
        return;
    }
    if (row->running_max == -INFINITE) {
        // the sums are 0, or NaN and stay so
        row->rescale = 0.0f;
        row->running_max = new_max;
        return;
    }
    const double moved = (static_cast<double>(row->running_max) - static_cast<double>(new_max)) * 1.4426950408889634;
    row->rescale = static_cast<float>(exp2(moved));
    // at a factor of 0 the distance may be infinite; a NaN sum stays NaN
    row->weighted = row->rescale == 0.0f ? 0.0 : static_cast<double>(row->rescale) * (row->weighted + row->sum * moved);
    row->sum *= static_cast<double>(row->rescale);
    row->running_max = new_max;
}

// Takes a block of logits (count a multiple of LANES, padding -inf) into the row and turns it into 2^x, in place.
template <bool ENTROPY>
void softmax_block(float* logits, int64_t count, RowState* row) {
    // logits first: a NaN is passed over here, and found in the sum
    Floats greatest = broadcast(row->running_max);
    for (int64_t j = 0; j < count; j += LANES) greatest = max_of(load(logits + j), greatest);
    const float new_max = max_of_lanes(greatest);
    // inf - inf hides a NaN, so it is looked for before
    if (new_max == INFINITE) row->saw_nan |= any_nan(logits, count);
    move_maximum(row, new_max);
    // while no key is valid, subtract 0: -inf stays -inf
    const Floats shift = broadcast(new_max == -INFINITE ? 0.0f : new_max);
    Floats sum = broadcast(0.0f);
    Floats weighted = broadcast(0.0f);
    for (int64_t j = 0; j < count; j += LANES) {
        Floats exponent;
        const Floats power = exp2_of(multiply(subtract(load(logits + j), shift), broadcast(LOG2_E)), &exponent);
        store(logits + j, power);
        sum = add(sum, power);
        if (ENTROPY) weighted = multiply_add(power, exponent, weighted);
    }
    row->sum += static_cast<double>(sum_of_lanes(sum));
    if (ENTROPY) row->weighted += static_cast<double>(sum_of_lanes(weighted));
    if (new_max != INFINITE) row->saw_nan |= row->sum != row->sum;
}

// What the row's output is multiplied by at the end: 0 where no key was valid, NaN where one was NaN or infinite.
HEADSCOPE_INLINE float normaliser(const RowState& row) {
    return row.sum == 0.0 ? 0.0f : static_cast<float>(1.0 / row.sum);
}

// Writes the requested statistics of the row at `index`.
inline void write_statistics(const headscope_attention& call, const RowState& row, int64_t index) {
    constexpr double LN_2 = 0.6931471805599453;
    constexpr double missing = NAN;
    double maximum = static_cast<double>(row.running_max);
    double logsumexp = maximum;
    double entropy = 0.0;
    double max_prob = 0.0;
    if (row.sum != row.sum) {
        entropy = max_prob = missing;
        // without a NaN, a logit was +inf: the maximum and logsumexp are known
        if (row.saw_nan) maximum = logsumexp = missing;
    } else if (row.sum != 0.0) {
        const double log_sum = log(row.sum);
        max_prob = 1.0 / row.sum;
        logsumexp = maximum + log_sum;
        entropy = log_sum - LN_2 * row.weighted * max_prob;
    }
    if (call.entropy) call.entropy[index] = static_cast<float>(entropy);
    if (call.logsumexp) call.logsumexp[index] = static_cast<float>(logsumexp);
    if (call.max_logit) call.max_logit[index] = static_cast<float>(maximum);
    if (call.max_prob) call.max_prob[index] = static_cast<float>(max_prob);
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
