// The kernel for x86 with AVX2, FMA and F16C.
#define HEADSCOPE_TARGET avx2
#include "kernel/backward/item.h"
#include "kernel/backward/mask_gradient.h"
#include "kernel/key_mass_pass.h"

namespace headscope {

extern const Kernel kernel_avx2;
const Kernel kernel_avx2 = {"avx2",
                            avx2::plan,
                            avx2::run,
                            avx2::run_key_mass,
                            avx2::plan_backward,
                            avx2::run_backward,
                            avx2::run_mask_gradient,
                            avx2::exp2_array};

}  // namespace headscope
