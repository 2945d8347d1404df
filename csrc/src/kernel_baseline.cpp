// The kernel for any machine, and the only one outside x86.
#define HEADSCOPE_TARGET baseline
#include "kernel/key_mass.h"

namespace headscope {

extern const Kernel kernel_baseline;
const Kernel kernel_baseline = {"baseline", baseline::plan, baseline::run, baseline::run_key_mass,
                                baseline::exp2_array};

}  // namespace headscope
