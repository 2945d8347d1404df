// The kernel for x86 with AVX-512 and its dot products of bfloat16 pairs (AVX512_BF16), for bfloat16 inputs only.
#define HEADSCOPE_TARGET avx512_bf16
#define HEADSCOPE_DOTS
#include "kernel/backward/item.h"
#include "kernel/backward/mask_gradient.h"
#include "kernel/key_mass_pass.h"

namespace headscope {

extern const Kernel kernel_avx512_bf16;
const Kernel kernel_avx512_bf16 = {"avx512_bf16",
                                   avx512_bf16::plan,
                                   avx512_bf16::run,
                                   avx512_bf16::run_key_mass,
                                   avx512_bf16::plan_backward,
                                   avx512_bf16::run_backward,
                                   avx512_bf16::run_mask_gradient,
                                   avx512_bf16::exp2_array};

}  // namespace headscope
