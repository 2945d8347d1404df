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
// bounds the sums of one row
constexpr int64_t MAX_GROUPS = 65536;
// rows whose sums wait for the second pass at a time: 2 MiB
constexpr int64_t SAVED_ROWS = 262144;

bool is_input_dtype(int64_t dtype) {
    return dtype == HEADSCOPE_FLOAT32 || dtype == HEADSCOPE_BFLOAT16 || dtype == HEADSCOPE_FLOAT16;
}

bool is_floating(int64_t dtype) { return is_input_dtype(dtype) || dtype == HEADSCOPE_FLOAT64; }

int check(const headscope_attention& call, const headscope_statistic& statistic) {
    const int64_t kind = statistic.kind;
    if (kind < HEADSCOPE_ENTROPY || kind > HEADSCOPE_KEY_MASS) return HEADSCOPE_BAD_STATISTIC;
    const bool grouped = kind == HEADSCOPE_GROUP_MASS || kind == HEADSCOPE_GROUP_ENTROPY;
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

// function(i, thread) for each i of first..end - 1, on several threads.
template <typename Function>
void spread(int64_t first, int64_t end, int threads, const Function& function) {
#ifdef _OPENMP
    if (threads > 1 && end - first > 1) {
        // dynamic: causal masks and removed heads make items uneven; a few at a time where they are many and small
        const int64_t chunk = 1 + (end - first) / (64 * threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk)
        for (int64_t i = first; i < end; ++i) function(i, omp_get_thread_num());
        return;
    }
#else
    (void)threads;
#endif
    for (int64_t i = first; i < end; ++i) function(i, 0);
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

// Both passes, as many rows at a time as may be saved.
void run_with_key_mass(const Kernel& kernel, const headscope_attention& call, Plan& plan, const Workspaces& workspaces,
                       int threads) {
    const int64_t heads = call.batch * call.heads;
    const int64_t head_groups_at_once = SAVED_ROWS / (call.queries * plan.heads_per_item);
    const int64_t key_blocks = (call.keys + plan.key_block - 1) / plan.key_block;
    const auto second = [&](int64_t first_head, int64_t end_head, int64_t first_row, int64_t end_row) {
        spread(first_head * key_blocks, end_head * key_blocks, threads, [&](int64_t i, int thread) {
            kernel.run_key_mass(call, plan, i / key_blocks, i % key_blocks * plan.key_block, first_row, end_row,
                                workspaces.of_thread(thread));
        });
    };
    const auto first = [&](int64_t first_item, int64_t end_item) {
        spread(first_item, end_item, threads,
               [&](int64_t i, int thread) { kernel.run(call, plan, i, workspaces.of_thread(thread)); });
    };
    if (head_groups_at_once > 0) {
        const int64_t head_groups = heads / plan.heads_per_item;
        for (int64_t group = 0; group < head_groups; group += head_groups_at_once) {
            const int64_t end = group + head_groups_at_once < head_groups ? group + head_groups_at_once : head_groups;
            plan.first_saved_row = group * plan.heads_per_item * call.queries;
            first(group * plan.items_per_head, end * plan.items_per_head);
            second(group * plan.heads_per_item, end * plan.heads_per_item, 0, call.queries);
        }
        return;
    }
    // heads so long that each takes several turns; they are items of their own
    const int64_t items_at_once = SAVED_ROWS / plan.rows_per_item;
    for (int64_t head = 0; head < heads; ++head) {
        for (int64_t item = 0; item < plan.items_per_head; item += items_at_once) {
            const int64_t end = item + items_at_once < plan.items_per_head ? item + items_at_once : plan.items_per_head;
            const int64_t first_row = item * plan.rows_per_item;
            const int64_t end_row = end * plan.rows_per_item < call.queries ? end * plan.rows_per_item : call.queries;
            plan.first_saved_row = head * call.queries + first_row;
            first(head * plan.items_per_head + item, head * plan.items_per_head + end);
            second(head, head + 1, first_row, end_row);
        }
    }
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
    Plan plan = kernel->plan(*call);
    const bool key_mass = wants_key_mass(*call);
    if (plan.items == 0) {
        if (key_mass) clear_key_mass(*call);
        return HEADSCOPE_OK;
    }
    int64_t threads = call->threads;
    const int64_t most = key_mass ? call->batch * call->heads * (plan.items_per_head + call->keys / plan.key_block + 1)
                                  : plan.items;
    if (threads > most) threads = most;
#ifndef _OPENMP
    threads = 1;
#endif
    if (threads < 1) threads = 1;
    const Workspaces workspaces(plan.bytes_per_thread, threads);
    if (!workspaces.valid()) return HEADSCOPE_NO_MEMORY;
    if (!key_mass) {
        spread(0, plan.items, static_cast<int>(threads),
               [&](int64_t i, int thread) { kernel->run(*call, plan, i, workspaces.of_thread(thread)); });
        return HEADSCOPE_OK;
    }
    const int64_t rows = call->batch * call->heads * call->queries;
    const Workspaces saved(2 * sizeof(float) * static_cast<size_t>(rows < SAVED_ROWS ? rows : SAVED_ROWS), 1);
    if (!saved.valid()) return HEADSCOPE_NO_MEMORY;
    plan.row_max = static_cast<float*>(saved.of_thread(0));
    plan.row_share = plan.row_max + (rows < SAVED_ROWS ? rows : SAVED_ROWS);
    run_with_key_mass(*kernel, *call, plan, workspaces, static_cast<int>(threads));
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
        case HEADSCOPE_BAD_STATISTIC:
            return "a statistic is unknown, has a grid without a side or more than 65536 groups, or there are more than 32";
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
