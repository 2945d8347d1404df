// What every call has to be.
#ifndef HEADSCOPE_CHECKS_H
#define HEADSCOPE_CHECKS_H

#include "headscope_cpu.h"

namespace headscope {

// enum headscope_status of what a forward and a backward have in common.
int check_inputs(const headscope_attention& call);

}  // namespace headscope

#endif
