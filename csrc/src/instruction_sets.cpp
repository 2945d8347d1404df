#include "instruction_sets.h"

namespace headscope {

namespace {

#if defined(HEADSCOPE_X86)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

}  // namespace

const Kernel* find_kernel(int64_t requested) {
#if defined(HEADSCOPE_X86)
    if ((requested == HEADSCOPE_BEST || requested == HEADSCOPE_AVX512_BF16) && has_avx512_bf16()) {
        return &kernel_avx512_bf16;
    }
    if ((requested == HEADSCOPE_BEST || requested == HEADSCOPE_AVX512) && has_avx512()) return &kernel_avx512;
    if ((requested == HEADSCOPE_BEST || requested == HEADSCOPE_AVX2) && has_avx2()) return &kernel_avx2;
#endif
    return requested == HEADSCOPE_BEST || requested == HEADSCOPE_BASELINE ? &kernel_baseline : nullptr;
}

const Kernel* kernel_for(const Kernel* kernel, int64_t dtype) {
#if defined(HEADSCOPE_X86)
    if (kernel == &kernel_avx512_bf16 && dtype != HEADSCOPE_BFLOAT16) return &kernel_avx512;
#else
    (void)dtype;
#endif
    return kernel;
}

}  // namespace headscope
