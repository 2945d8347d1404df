// The kernel for any machine, and the only one outside x86.
#define HEADSCOPE_TARGET baseline
#include "kernel/backward/item.h"
#include "kernel/backward/mask_gradient.h"
#include "kernel/key_mass_pass.h"

namespace headscope {

extern const Kernel kernel_baseline;
const Kernel kernel_baseline = {"baseline",
                                baseline::plan,
                                baseline::run,
                                baseline::run_key_mass,
                                baseline::plan_backward,
                                baseline::run_backward,
                                baseline::run_mask_gradient,
                                baseline::exp2_array};

}  // namespace headscope
