// The C ABI: checks a call, finds the kernel, allocates, and spreads the work items over threads.
#include <stdlib.h>

#include "headscope_cpu.h"
#include "instruction_sets.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

using headscope::Kernel;
using headscope::Plan;

constexpr size_t ALIGNMENT = 64;

bool is_input_dtype(int64_t dtype) {
    return dtype == HEADSCOPE_FLOAT32 || dtype == HEADSCOPE_BFLOAT16 || dtype == HEADSCOPE_FLOAT16;
}

bool is_floating(int64_t dtype) { return is_input_dtype(dtype) || dtype == HEADSCOPE_FLOAT64; }

int check(const headscope_attention& call) {
    const int64_t sizes[] = {call.batch, call.heads, call.kv_heads, call.queries, call.keys, call.dim, call.dim_v};
    for (const int64_t size : sizes) {
        if (size < 0) return HEADSCOPE_BAD_SIZE;
    }
    if (call.heads > 0 && (call.kv_heads == 0 || call.heads % call.kv_heads != 0)) return HEADSCOPE_BAD_HEADS;
    if (call.dim > HEADSCOPE_MAX_DIM || call.dim_v > HEADSCOPE_MAX_DIM) return HEADSCOPE_DIM_TOO_LARGE;
    const int64_t dtype = call.query.dtype;
    if (!is_input_dtype(dtype) || call.key.dtype != dtype || call.value.dtype != dtype || call.output.dtype != dtype) {
        return HEADSCOPE_BAD_DTYPE;
    }
    if (call.mask.data && call.mask.dtype != HEADSCOPE_BOOL && !is_floating(call.mask.dtype))
        return HEADSCOPE_BAD_DTYPE;
    if (call.fill.data && !is_floating(call.fill.dtype)) return HEADSCOPE_BAD_DTYPE;
    // an empty tensor may well have no storage
    const bool has_rows = call.batch && call.heads && call.queries;
    const bool has_keys = has_rows && call.keys;
    if ((has_rows && call.dim && !call.query.data) || (has_rows && call.dim_v && !call.output.data) ||
        (has_keys && call.dim && !call.key.data) || (has_keys && call.dim_v && !call.value.data)) {
        return HEADSCOPE_NULL_POINTER;
    }
    return HEADSCOPE_OK;
}

// Workspaces of all threads, one after the other, each aligned; freed on every way out.
class Workspaces {
public:
    Workspaces(size_t bytes_per_thread, int64_t threads)
        : stride_((bytes_per_thread + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT),
          memory_(static_cast<char*>(malloc(stride_ * static_cast<size_t>(threads) + ALIGNMENT))) {}
    ~Workspaces() { free(memory_); }
    Workspaces(const Workspaces&) = delete;
    Workspaces& operator=(const Workspaces&) = delete;

    bool valid() const { return memory_ != nullptr; }

    void* of_thread(int thread) const {
        const uintptr_t first = (reinterpret_cast<uintptr_t>(memory_) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        return reinterpret_cast<void*>(first + stride_ * static_cast<size_t>(thread));
    }

private:
    size_t stride_;
    char* memory_;
};

void run_all(const Kernel& kernel, const headscope_attention& call, const Plan& plan, const Workspaces& workspaces,
             int threads) {
#ifdef _OPENMP
    if (threads > 1) {
        // dynamic: causal masks and removed heads make items uneven
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (int64_t item = 0; item < plan.items; ++item) {
            kernel.run(call, plan, item, workspaces.of_thread(omp_get_thread_num()));
        }
        return;
    }
#else
    (void)threads;
#endif
    for (int64_t item = 0; item < plan.items; ++item) kernel.run(call, plan, item, workspaces.of_thread(0));
}

}  // namespace

int headscope_abi_version(void) { return HEADSCOPE_ABI_VERSION; }

int headscope_attention_forward(const headscope_attention* call) {
    if (!call) return HEADSCOPE_NULL_POINTER;
    const int status = check(*call);
    if (status != HEADSCOPE_OK) return status;
    const Kernel* kernel = headscope::find_kernel(call->instruction_set);
    if (!kernel) return HEADSCOPE_BAD_INSTRUCTION_SET;
    const Plan plan = kernel->plan(*call);
    if (plan.items == 0) return HEADSCOPE_OK;
    int64_t threads = call->threads < plan.items ? call->threads : plan.items;
#ifndef _OPENMP
    threads = 1;
#endif
    if (threads < 1) threads = 1;
    const Workspaces workspaces(plan.bytes_per_thread, threads);
    if (!workspaces.valid()) return HEADSCOPE_NO_MEMORY;
    run_all(*kernel, *call, plan, workspaces, static_cast<int>(threads));
    return HEADSCOPE_OK;
}

const char* headscope_status_message(int status) {
    switch (status) {
        case HEADSCOPE_OK:
            return "no error";
        case HEADSCOPE_NULL_POINTER:
            return "a required pointer is null";
        case HEADSCOPE_BAD_SIZE:
            return "a size is negative";
        case HEADSCOPE_BAD_HEADS:
            return "the number of heads is not a multiple of the number of key heads";
        case HEADSCOPE_BAD_DTYPE:
            return "query, key, value and output need one dtype of float32, bfloat16 or float16; masks are bool or "
                   "floating, fills are floating";
        case HEADSCOPE_DIM_TOO_LARGE:
            return "a head dimension is above 8192";
        case HEADSCOPE_NO_MEMORY:
            return "out of memory for the kernel's working buffers";
        case HEADSCOPE_BAD_INSTRUCTION_SET:
            return "this machine or build lacks the requested instruction set";
        default:
            return "unknown status";
    }
}

const char* headscope_instruction_set_name(int requested) {
    const Kernel* kernel = headscope::find_kernel(requested);
    return kernel ? kernel->name : nullptr;
}

const char* headscope_threading(void) {
#ifdef _OPENMP
    return "OpenMP";
#else
    return "none";
#endif
}

int headscope_exp2(const float* input, float* output, int64_t count, int instruction_set) {
    if (!input || !output) return HEADSCOPE_NULL_POINTER;
    const Kernel* kernel = headscope::find_kernel(instruction_set);
    if (!kernel) return HEADSCOPE_BAD_INSTRUCTION_SET;
    kernel->exp2(input, output, count);
    return HEADSCOPE_OK;
}
