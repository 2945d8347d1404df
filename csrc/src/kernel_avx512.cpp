// The kernel for x86 with AVX-512 (F, BW, DQ, VL).
#define HEADSCOPE_TARGET avx512
#include "kernel/key_mass.h"

namespace headscope {

extern const Kernel kernel_avx512;
const Kernel kernel_avx512 = {"avx512", avx512::plan, avx512::run, avx512::run_key_mass, avx512::exp2_array};

}  // namespace headscope
