// The kernel for any machine, and the only one outside x86.
#define HEADSCOPE_TARGET baseline
#include "kernel/attention.h"

namespace headscope {

extern const Kernel kernel_baseline;
const Kernel kernel_baseline = {"baseline", baseline::plan, baseline::run, baseline::exp2_array};

}  // namespace headscope
