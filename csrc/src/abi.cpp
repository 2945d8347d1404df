// The C ABI: checks a call, finds the kernel, allocates, and spreads the work items over threads.
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "checks.h"
#include "headscope_cpu.h"
#include "instruction_sets.h"
#include "threads.h"
#include "turns.h"

namespace {

using headscope::Kernel;
using headscope::Plan;
using headscope::spread;

// bounds the sums of one row
constexpr int64_t MAX_GROUPS = 65536;
// what a thread may work in before the groups' sums are left to further passes; 16 MiB are promised
constexpr size_t MANY_BYTES = size_t{12} << 20;

bool is_grouped(const headscope_statistic& statistic) {
    return statistic.kind == HEADSCOPE_GROUP_MASS || statistic.kind == HEADSCOPE_GROUP_ENTROPY;
}

int check(const headscope_attention& call, const headscope_statistic& statistic) {
    const int64_t kind = statistic.kind;
    if (kind < HEADSCOPE_ENTROPY || kind > HEADSCOPE_KEY_MASS) return HEADSCOPE_BAD_STATISTIC;
    const bool grouped = is_grouped(statistic);
    const int64_t per_head = kind == HEADSCOPE_KEY_MASS ? call.keys : call.queries;
    const int64_t results = call.batch * call.heads * per_head * (grouped ? statistic.sizes[0] : 1);
    if (results > 0 && !statistic.output) return HEADSCOPE_NULL_POINTER;
    if (kind == HEADSCOPE_DISTANCE) {
        for (const int64_t size : statistic.sizes) {
            if (size < 1) return HEADSCOPE_BAD_STATISTIC;
        }
    }
    if (grouped && (statistic.sizes[0] < 0 || statistic.sizes[0] > MAX_GROUPS || statistic.sizes[1] < 0)) {
        return HEADSCOPE_BAD_STATISTIC;
    }
    if (grouped && results > 0 && call.keys > 0 && !statistic.groups) return HEADSCOPE_NULL_POINTER;
    return HEADSCOPE_OK;
}

// Of what only a forward has.
int check_results(const headscope_attention& call) {
    if (call.output.dtype != call.query.dtype) return HEADSCOPE_BAD_DTYPE;
    if (call.statistic_count < 0 || call.statistic_count > HEADSCOPE_MAX_STATISTICS) return HEADSCOPE_BAD_STATISTIC;
    for (int64_t i = 0; i < call.statistic_count; ++i) {
        const int status = check(call, call.statistics[i]);
        if (status != HEADSCOPE_OK) return status;
    }
    return call.batch && call.heads && call.queries && call.dim_v && !call.output.data ? HEADSCOPE_NULL_POINTER
                                                                                       : HEADSCOPE_OK;
}

// The whole call, in one pass over the keys, or two for key_mass. False: out of memory.
bool run(const Kernel& kernel, const headscope_attention& call, const Plan& plan) {
    if (call.keys > 0 && headscope::wants_key_mass(call)) return headscope::run_with_key_mass(kernel, call, plan);
    return spread(0, plan.items, call.threads, plan.bytes_per_thread,
                  [&](int64_t i, void* memory) { kernel.run(call, plan, i, memory); });
}

// The call with as many group statistics at a time as a thread has memory for; the output and all other statistics
// come from the first pass. Rare: eight groups of a row take 64 bytes, 65,536 take half a megabyte.
bool run_groups_in_turn(const Kernel& kernel, const headscope_attention& call) {
    headscope_attention part;
    // the caller's statistics end where their count says
    memcpy(&part, &call, offsetof(headscope_attention, statistics));
    part.statistic_count = 0;
    for (int64_t i = 0; i < call.statistic_count; ++i) {
        if (!is_grouped(call.statistics[i])) part.statistics[part.statistic_count++] = call.statistics[i];
    }
    int64_t next = 0;
    do {
        Plan plan = kernel.plan(part);
        for (int64_t taken = 0; next < call.statistic_count; ++next) {
            if (!is_grouped(call.statistics[next])) continue;
            part.statistics[part.statistic_count++] = call.statistics[next];
            const Plan with_it = kernel.plan(part);
            if (taken > 0 && with_it.bytes_per_thread > MANY_BYTES) {
                --part.statistic_count;
                break;
            }
            ++taken;
            plan = with_it;
        }
        if (!run(kernel, part, plan)) return false;
        part.statistic_count = 0;
        // The output is written, and what a backward needs: a pass without values may take other blocks of keys, whose
        // logits aren't bit for bit those of the output.
        part.dim_v = 0;
        part.row_max = part.log2_sum = nullptr;
        part.attention.data = nullptr;
    } while (next < call.statistic_count);
    return true;
}

}  // namespace

int headscope_abi_version(void) { return HEADSCOPE_ABI_VERSION; }

int headscope_attention_forward(const headscope_attention* call) {
    if (!call) return HEADSCOPE_NULL_POINTER;
    int status = headscope::check_inputs(*call);
    if (status == HEADSCOPE_OK) status = check_results(*call);
    if (status != HEADSCOPE_OK) return status;
    const Kernel* kernel = headscope::find_kernel(call->instruction_set);
    if (!kernel) return HEADSCOPE_BAD_INSTRUCTION_SET;
    kernel = headscope::kernel_for(kernel, call->query.dtype);
    const Plan plan = kernel->plan(*call);
    if (plan.items == 0) {
        headscope::clear_key_mass(*call);
        return HEADSCOPE_OK;
    }
    const bool done =
        plan.bytes_per_thread > MANY_BYTES ? run_groups_in_turn(*kernel, *call) : run(*kernel, *call, plan);
    return done ? HEADSCOPE_OK : HEADSCOPE_NO_MEMORY;
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
        case HEADSCOPE_BAD_STATISTIC:
            return "a statistic is unknown, has a grid without a side or more than 65536 groups, or there are more "
                   "than 32";
        case HEADSCOPE_BAD_GRADIENT:
            return "there is no cotangent, there are more than 32 of groups, a gradient's mask sizes are neither 1 nor "
                   "whole, or a gradient is wanted of something that isn't there, or of the temperature without the "
                   "query's";
        default:
            return "unknown status";
    }
}

const char* headscope_instruction_set_name(int requested) {
    const Kernel* kernel = headscope::find_kernel(requested);
    return kernel ? kernel->name : nullptr;
}

const char* headscope_threading(void) { return headscope::THREADING; }

int headscope_exp2(const float* input, float* output, int64_t count, int instruction_set) {
    if (!input || !output) return HEADSCOPE_NULL_POINTER;
    const Kernel* kernel = headscope::find_kernel(instruction_set);
    if (!kernel) return HEADSCOPE_BAD_INSTRUCTION_SET;
    kernel->exp2(input, output, count);
    return HEADSCOPE_OK;
}
