// The C ABI: checks a call, finds the kernel, allocates, and spreads the work items over threads.
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "headscope_cpu.h"
#include "instruction_sets.h"
#include "threads.h"

namespace {

using headscope::Kernel;
using headscope::Plan;
using headscope::spread;

// bounds the sums of one row
constexpr int64_t MAX_GROUPS = 65536;
// what a thread may work in before the groups' sums are left to further passes; 16 MiB are promised
constexpr size_t MANY_BYTES = size_t{12} << 20;
// rows whose sums wait for the second pass at a time: 2 MiB
constexpr int64_t SAVED_ROWS = 262144;

bool is_input_dtype(int64_t dtype) {
    return dtype == HEADSCOPE_FLOAT32 || dtype == HEADSCOPE_BFLOAT16 || dtype == HEADSCOPE_FLOAT16;
}

bool is_floating(int64_t dtype) { return is_input_dtype(dtype) || dtype == HEADSCOPE_FLOAT64; }

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
    if (call.statistic_count < 0 || call.statistic_count > HEADSCOPE_MAX_STATISTICS) return HEADSCOPE_BAD_STATISTIC;
    for (int64_t i = 0; i < call.statistic_count; ++i) {
        const int status = check(call, call.statistics[i]);
        if (status != HEADSCOPE_OK) return status;
    }
    // an empty tensor may well have no storage
    const bool has_rows = call.batch && call.heads && call.queries;
    const bool has_keys = has_rows && call.keys;
    if ((has_rows && call.dim && !call.query.data) || (has_rows && call.dim_v && !call.output.data) ||
        (has_keys && call.dim && !call.key.data) || (has_keys && call.dim_v && !call.value.data)) {
        return HEADSCOPE_NULL_POINTER;
    }
    return HEADSCOPE_OK;
}

bool wants_key_mass(const headscope_attention& call) {
    for (int64_t i = 0; i < call.statistic_count; ++i) {
        if (call.statistics[i].kind == HEADSCOPE_KEY_MASS) return true;
    }
    return false;
}

// Without a row there is no mass.
void clear_key_mass(const headscope_attention& call) {
    for (int64_t i = 0; i < call.statistic_count; ++i) {
        if (call.statistics[i].kind != HEADSCOPE_KEY_MASS) continue;
        for (int64_t j = 0; j < call.batch * call.heads * call.keys; ++j) call.statistics[i].output[j] = 0.0f;
    }
}

// Both passes, as many rows at a time as may be saved. False: out of memory.
bool run_with_key_mass(const Kernel& kernel, const headscope_attention& call, Plan plan) {
    const int64_t heads = call.batch * call.heads;
    const int64_t key_blocks = (call.keys + plan.key_block - 1) / plan.key_block;
    const auto both = [&](int64_t first_item, int64_t end_item, int64_t first_head, int64_t end_head, int64_t first_row,
                          int64_t end_row) {
        plan.first_saved_row = first_head * call.queries + first_row;
        return spread(first_item, end_item, call.threads, plan.bytes_per_thread,
                      [&](int64_t i, void* memory) { kernel.run(call, plan, i, memory); }) &&
               spread(first_head * key_blocks, end_head * key_blocks, call.threads, plan.bytes_per_thread,
                      [&](int64_t i, void* memory) {
                          kernel.run_key_mass(call, plan, i / key_blocks, i % key_blocks * plan.key_block, first_row,
                                              end_row, memory);
                      });
    };
    const int64_t rows = heads * call.queries < SAVED_ROWS ? heads * call.queries : SAVED_ROWS;
    float* saved = static_cast<float*>(malloc(2 * sizeof(float) * static_cast<size_t>(rows)));
    if (!saved) return false;
    plan.row_max = saved;
    plan.row_share = saved + rows;
    bool done = true;
    const int64_t groups_at_once = SAVED_ROWS / (call.queries * plan.heads_per_item);
    if (groups_at_once > 0) {
        const int64_t groups = heads / plan.heads_per_item;
        for (int64_t group = 0; done && group < groups; group += groups_at_once) {
            const int64_t end = group + groups_at_once < groups ? group + groups_at_once : groups;
            done = both(group * plan.items_per_head, end * plan.items_per_head, group * plan.heads_per_item,
                        end * plan.heads_per_item, 0, call.queries);
        }
    } else {
        // heads so long that each takes several turns; they are items of their own
        const int64_t at_once = SAVED_ROWS / plan.rows_per_item;
        for (int64_t turn = 0; done && turn < heads * plan.items_per_head;) {
            const int64_t head = turn / plan.items_per_head, item = turn % plan.items_per_head;
            const int64_t left = plan.items_per_head - item;
            const int64_t end = turn + (left < at_once ? left : at_once);
            const int64_t first_row = item * plan.rows_per_item;
            const int64_t end_row = first_row + (end - turn) * plan.rows_per_item;
            done = both(turn, end, head, head + 1, first_row, end_row < call.queries ? end_row : call.queries);
            turn = end;
        }
    }
    free(saved);
    return done;
}

// The whole call, in one pass over the keys (two for key_mass). False: out of memory.
bool run(const Kernel& kernel, const headscope_attention& call, const Plan& plan) {
    if (wants_key_mass(call)) return run_with_key_mass(kernel, call, plan);
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
        // the output is written
        part.dim_v = 0;
    } while (next < call.statistic_count);
    return true;
}

}  // namespace

int headscope_abi_version(void) { return HEADSCOPE_ABI_VERSION; }

int headscope_attention_forward(const headscope_attention* call) {
    if (!call) return HEADSCOPE_NULL_POINTER;
    const int status = check(*call);
    if (status != HEADSCOPE_OK) return status;
    const Kernel* kernel = headscope::find_kernel(call->instruction_set);
    if (!kernel) return HEADSCOPE_BAD_INSTRUCTION_SET;
    kernel = headscope::kernel_for(kernel, call->query.dtype);
    const Plan plan = kernel->plan(*call);
    if (plan.items == 0) {
        clear_key_mass(*call);
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
