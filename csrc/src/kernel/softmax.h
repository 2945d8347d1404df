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

// Rows that go through the softmax as a group: what a row needs once (its maximum, its sums) is as much work as a few
// vectors of keys, unless several rows share it. And how many of them side by side: one alone waits for its own sums.
#if defined(__AVX512F__)
constexpr int GROUP_ROWS = LANES / 2;
constexpr int SIDE_BY_SIDE = 2;
#else
constexpr int GROUP_ROWS = 1;
constexpr int SIDE_BY_SIDE = 1;
#endif
static_assert(TILE_ROWS % SIDE_BY_SIDE == 0, "the row beside the last one is in memory too");

// Moves a row to the maximum of a block of logits, its own among them. Returns what to subtract from the logits.
HEADSCOPE_INLINE float meet_maximum(const float* logits, int64_t count, float new_max, RowState* state) {
    // inf - inf hides a NaN, so it is looked for before
    if (new_max == INFINITE) state->saw_nan |= any_nan(logits, count);
    move_maximum(state, new_max);
    // while no key is valid, subtract 0: -inf stays -inf
    return new_max == -INFINITE ? 0.0f : new_max;
}

// 2^x of LANES logits. `exponent` is x, bounded as exp2_of does.
HEADSCOPE_INLINE Floats power_of(const float* logits, Floats shift, Floats* exponent) {
    return exp2_of(multiply(subtract(load(logits), shift), broadcast(LOG2_E)), exponent);
}

HEADSCOPE_INLINE void add_sums(RowState* state, float sum, float weighted) {
    state->sum += static_cast<double>(sum);
    state->weighted += static_cast<double>(weighted);
    if (state->running_max != INFINITE) state->saw_nan |= state->sum != state->sum;
}

// Takes a block of logits (count a multiple of LANES, padding -inf) of `rows` rows, at most GROUP_ROWS, into their
// states and turns it, in place, into what the values are multiplied with: 2^x. Where that is rounded, 2^x itself goes
// to `powers`, unless null. Where rows isn't a multiple of SIDE_BY_SIDE, the row behind the last one is overwritten,
// and its state only read.
template <bool ENTROPY>
void softmax_rows(float* logits, int64_t rows, int64_t count, RowState* states, float* powers) {
    Floats greatest[GROUP_ROWS], sums[2 * GROUP_ROWS];
    float shift[GROUP_ROWS], totals[2 * GROUP_ROWS];
    for (Floats& row : greatest) row = broadcast(-INFINITE);
    for (Floats& row : sums) row = broadcast(0.0f);
    for (int64_t first = 0; first < rows; first += SIDE_BY_SIDE) {
        Floats found[SIDE_BY_SIDE];
        HEADSCOPE_UNROLL
        for (int r = 0; r < SIDE_BY_SIDE; ++r) found[r] = broadcast(states[first + r].running_max);
        for (int64_t j = 0; j < count; j += LANES) {
            // logits first: a NaN is passed over here, and found in the sum
            HEADSCOPE_UNROLL
            for (int r = 0; r < SIDE_BY_SIDE; ++r) {
                found[r] = max_of(load(logits + (first + r) * LOGIT_STRIDE + j), found[r]);
            }
        }
        HEADSCOPE_UNROLL
        for (int r = 0; r < SIDE_BY_SIDE; ++r) greatest[first + r] = found[r];
    }
    max_of_each(greatest, shift);
    for (int64_t r = 0; r < rows; ++r) shift[r] = meet_maximum(logits + r * LOGIT_STRIDE, count, shift[r], states + r);
    for (int64_t first = 0; first < rows; first += SIDE_BY_SIDE) {
        Floats sum[SIDE_BY_SIDE], weighted[SIDE_BY_SIDE];
        HEADSCOPE_UNROLL
        for (int r = 0; r < SIDE_BY_SIDE; ++r) sum[r] = weighted[r] = broadcast(0.0f);
        for (int64_t j = 0; j < count; j += LANES) {
            HEADSCOPE_UNROLL
            for (int r = 0; r < SIDE_BY_SIDE; ++r) {
                float* row = logits + (first + r) * LOGIT_STRIDE;
                Floats exponent;
                const Floats power = power_of(row + j, broadcast(shift[first + r]), &exponent);
                store_powers(reinterpret_cast<Unit*>(row), j, power);
                if (TERMS > 1 && powers) store(powers + (first + r) * LOGIT_STRIDE + j, power);
                sum[r] = add(sum[r], power);
                if (ENTROPY) weighted[r] = multiply_add(power, exponent, weighted[r]);
            }
        }
        HEADSCOPE_UNROLL
        for (int r = 0; r < SIDE_BY_SIDE; ++r) {
            sums[first + r] = sum[r];
            sums[GROUP_ROWS + first + r] = weighted[r];
        }
    }
    sum_of_each(sums, totals);
    for (int64_t r = 0; r < rows; ++r) add_sums(states + r, totals[r], totals[GROUP_ROWS + r]);
}

// The same for one row with every other statistic, and with the keys' scales (or null) in what the values are
// multiplied with; 2^x itself goes to `powers`, unless null. row counts from the item's first.
inline void softmax_with_statistics(float* logits, int64_t count, RowState* state, Statistics* statistics,
                                    const float* key_scale, float* powers, int64_t row, int64_t absolute_row) {
    Floats greatest = broadcast(state->running_max);
    for (int64_t j = 0; j < count; j += LANES) greatest = max_of(load(logits + j), greatest);
    const Floats shift = broadcast(meet_maximum(logits, count, max_of_lanes(greatest), state));
    Floats sum = broadcast(0.0f), weighted = sum, squares = sum;
    RowStatistics extra(statistics, absolute_row);
    for (int64_t j = 0; j < count; j += LANES) {
        Floats exponent;
        const Floats power = power_of(logits + j, shift, &exponent);
        store_powers(reinterpret_cast<Unit*>(logits), j, key_scale ? multiply(power, load(key_scale + j)) : power);
        if (powers) store(powers + j, power);
        sum = add(sum, power);
        weighted = multiply_add(power, exponent, weighted);
        squares = multiply_add(power, power, squares);
        extra.add_keys(j, power, multiply(power, exponent));
    }
    state->squares += static_cast<double>(sum_of_lanes(squares));
    extra.finish(*state, row);
    add_sums(state, sum_of_lanes(sum), sum_of_lanes(weighted));
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
