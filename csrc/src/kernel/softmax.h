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

#include "logits.h"
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

// Rows that go through the softmax side by side: one alone waits for its maximum and its sums where it is short.
#if defined(__AVX512F__)
constexpr int SIDE_BY_SIDE = 2;
#else
constexpr int SIDE_BY_SIDE = 1;
#endif

// Moves ROWS rows to the maxima of a block of logits (stride LOGIT_STRIDE). shift: what to subtract from each row.
template <int ROWS>
HEADSCOPE_INLINE void find_maxima(const float* logits, int64_t count, RowState* states, Floats shift[ROWS]) {
    Floats greatest[ROWS];
    HEADSCOPE_UNROLL
    for (int r = 0; r < ROWS; ++r) greatest[r] = broadcast(states[r].running_max);
    for (int64_t j = 0; j < count; j += LANES) {
        // logits first: a NaN is passed over here, and found in the sum
        HEADSCOPE_UNROLL
        for (int r = 0; r < ROWS; ++r) greatest[r] = max_of(load(logits + r * LOGIT_STRIDE + j), greatest[r]);
    }
    HEADSCOPE_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        const float new_max = max_of_lanes(greatest[r]);
        // inf - inf hides a NaN, so it is looked for before
        if (new_max == INFINITE) states[r].saw_nan |= any_nan(logits + r * LOGIT_STRIDE, count);
        move_maximum(states + r, new_max);
        // while no key is valid, subtract 0: -inf stays -inf
        shift[r] = broadcast(new_max == -INFINITE ? 0.0f : new_max);
    }
}

// 2^x of LANES logits. `exponent` is x, bounded as exp2_of does.
HEADSCOPE_INLINE Floats power_of(const float* logits, Floats shift, Floats* exponent) {
    return exp2_of(multiply(subtract(load(logits), shift), broadcast(LOG2_E)), exponent);
}

HEADSCOPE_INLINE void add_sums(RowState* state, Floats sum, Floats weighted) {
    state->sum += static_cast<double>(sum_of_lanes(sum));
    state->weighted += static_cast<double>(sum_of_lanes(weighted));
    if (state->running_max != INFINITE) state->saw_nan |= state->sum != state->sum;
}

// Takes a block of logits (count a multiple of LANES, padding -inf) of ROWS rows into their states and turns it, in
// place, into what the values are multiplied with: 2^x.
template <bool ENTROPY, int ROWS>
void softmax_rows(float* logits, int64_t count, RowState* states) {
    Floats shift[ROWS], sum[ROWS], weighted[ROWS];
    find_maxima<ROWS>(logits, count, states, shift);
    HEADSCOPE_UNROLL
    for (int r = 0; r < ROWS; ++r) sum[r] = weighted[r] = broadcast(0.0f);
    for (int64_t j = 0; j < count; j += LANES) {
        HEADSCOPE_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            float* row = logits + r * LOGIT_STRIDE;
            Floats exponent;
            const Floats power = power_of(row + j, shift[r], &exponent);
            store_powers(reinterpret_cast<Unit*>(row), j, power);
            sum[r] = add(sum[r], power);
            if (ENTROPY) weighted[r] = multiply_add(power, exponent, weighted[r]);
        }
    }
    HEADSCOPE_UNROLL
    for (int r = 0; r < ROWS; ++r) add_sums(states + r, sum[r], weighted[r]);
}

// The same for one row with every other statistic, and with the keys' scales (or null) in what the values are
// multiplied with. row counts from the item's first.
inline void softmax_with_statistics(float* logits, int64_t count, RowState* state, Statistics* statistics,
                                    const float* key_scale, int64_t row, int64_t absolute_row) {
    Floats shift[1];
    find_maxima<1>(logits, count, state, shift);
    Floats sum = broadcast(0.0f), weighted = sum, squares = sum;
    RowStatistics extra(statistics, absolute_row);
    for (int64_t j = 0; j < count; j += LANES) {
        Floats exponent;
        const Floats power = power_of(logits + j, shift[0], &exponent);
        store_powers(reinterpret_cast<Unit*>(logits), j, key_scale ? multiply(power, load(key_scale + j)) : power);
        sum = add(sum, power);
        weighted = multiply_add(power, exponent, weighted);
        squares = multiply_add(power, power, squares);
        extra.add_keys(j, power, multiply(power, exponent));
    }
    state->squares += static_cast<double>(sum_of_lanes(squares));
    extra.finish(*state, row);
    add_sums(state, sum, weighted);
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
