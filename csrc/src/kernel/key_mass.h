// key_mass: what each key receives from all rows, sum_i p_ij.
//
// Where all keys are in one block, a row's maximum and sum are final right after its softmax. Its p are then added to
// the sums of its block of rows, before the values are:
//     mass_bj = sum_i 2^x_ij / sum_i        over rows i of block b
// and the blocks' sums are added up in order, in double, when all rows have run (turns.cpp). Blocks are the same
// whatever the items are, so that nothing depends on the number of threads.
//
// Beyond one block of keys a row's first p are only known after its last logit. A second pass (key_mass_pass.h) works
// the logits out again.
#ifndef HEADSCOPE_KERNEL_KEY_MASS_H
#define HEADSCOPE_KERNEL_KEY_MASS_H

#include "softmax.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

// Adds the p of `rows` rows, at most GROUP_ROWS, to masses [count]. powers: 2^x, rows LOGIT_STRIDE apart.
inline void add_masses(const float* powers, int64_t rows, int64_t count, const RowState* states, float* masses) {
    Floats shares[GROUP_ROWS];
    for (int64_t r = 0; r < rows; ++r) shares[r] = broadcast(normaliser(states[r]));
    if (rows == GROUP_ROWS) {
        for (int64_t j = 0; j < count; j += LANES) {
            Floats mass = load(masses + j);
            HEADSCOPE_UNROLL
            for (int r = 0; r < GROUP_ROWS; ++r) {
                mass = multiply_add(load(powers + r * LOGIT_STRIDE + j), shares[r], mass);
            }
            store(masses + j, mass);
        }
        return;
    }
    for (int64_t j = 0; j < count; j += LANES) {
        Floats mass = load(masses + j);
        for (int64_t r = 0; r < rows; ++r) {
            mass = multiply_add(load(powers + r * LOGIT_STRIDE + j), shares[r], mass);
        }
        store(masses + j, mass);
    }
}

// The masses of keys that lie behind what `rows` rows see: 0, or NaN where a row is.
inline float unseen_mass(const RowState* states, int64_t rows) {
    float mass = 0.0f;
    for (int64_t r = 0; r < rows; ++r) mass += 0.0f * normaliser(states[r]);
    return mass;
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
