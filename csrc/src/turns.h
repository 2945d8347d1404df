// Calls with key_mass: what they save on the way is bounded, so that long ones run in turns.
#ifndef HEADSCOPE_TURNS_H
#define HEADSCOPE_TURNS_H

#include "instruction_sets.h"

namespace headscope {

bool wants_key_mass(const headscope_attention& call);

// The key_mass of a call without rows.
void clear_key_mass(const headscope_attention& call);

// The whole call, of at least one row and one key, key_mass among its results. False: out of memory.
bool run_with_key_mass(const Kernel& kernel, const headscope_attention& call, const Plan& plan);

}  // namespace headscope

#endif
