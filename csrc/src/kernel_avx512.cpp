// The kernel for x86 with AVX-512 (F, BW, DQ, VL).
#define HEADSCOPE_TARGET avx512
#include "kernel/backward/item.h"
#include "kernel/backward/mask_gradient.h"
#include "kernel/key_mass_pass.h"

namespace headscope {

extern const Kernel kernel_avx512;
const Kernel kernel_avx512 = {"avx512",
                              avx512::plan,
                              avx512::run,
                              avx512::run_key_mass,
                              avx512::plan_backward,
                              avx512::run_backward,
                              avx512::run_mask_gradient,
                              avx512::exp2_array};

}  // namespace headscope
