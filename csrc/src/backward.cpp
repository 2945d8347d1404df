// The C ABI's backward: checks, allocates what its items share, and spreads them over threads.
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>
#include <new>

#include "checks.h"
#include "headscope_cpu.h"
#include "instruction_sets.h"
#include "threads.h"

namespace {

using headscope::BackwardPlan;
using headscope::Kernel;
using headscope::spread;

// what a thread may work in before cotangents are left to further passes; 16 MiB are promised
constexpr size_t MANY_BYTES = size_t{12} << 20;

// The caller's groups end where their count says.
headscope_gradients copy_of(const headscope_gradients& gradients) {
    headscope_gradients copy;
    const size_t groups = static_cast<size_t>(gradients.group_count) * sizeof(headscope_group_cotangent);
    memcpy(&copy, &gradients, offsetof(headscope_gradients, groups) + groups);
    return copy;
}

bool has_dtype(const headscope_stack& stack, int64_t dtype) { return !stack.data || stack.dtype == dtype; }

int check(const headscope_attention& call, const headscope_gradients& gradients) {
    const int64_t dtype = call.query.dtype;
    if (!has_dtype(gradients.output, dtype) || !has_dtype(gradients.query, dtype) || !has_dtype(gradients.key, dtype) ||
        !has_dtype(gradients.value, dtype)) {
        return HEADSCOPE_BAD_DTYPE;
    }
    const bool has_rows = call.batch && call.heads && call.queries;
    if (has_rows && (!call.row_max || (gradients.output.data && call.dim_v && !call.attention.data))) {
        return HEADSCOPE_NULL_POINTER;
    }
    if (gradients.cotangents < 1 || gradients.group_count < 0 || gradients.group_count > HEADSCOPE_MAX_STATISTICS) {
        return HEADSCOPE_BAD_GRADIENT;
    }
    for (int64_t i = 0; i < gradients.group_count; ++i) {
        const headscope_group_cotangent& group = gradients.groups[i];
        if (group.count < 0 || group.first < 0) return HEADSCOPE_BAD_STATISTIC;
        if (has_rows && call.keys && group.count && (!group.data || !group.groups)) return HEADSCOPE_NULL_POINTER;
    }
    // the temperature's gradient is found along the queries'
    if ((gradients.temperature && !(call.temperature.data && (gradients.query.data || !has_rows || !call.dim))) ||
        (gradients.gate && !call.gate.data) || (gradients.key_bias && !call.key_bias.data) ||
        (gradients.key_scale && !call.key_scale.data)) {
        return HEADSCOPE_BAD_GRADIENT;
    }
    if (!gradients.mask) return HEADSCOPE_OK;
    // a mask without elements has no address
    const bool has_mask = call.mask.data || !has_rows || !call.keys;
    if (!has_mask || call.mask.dtype == HEADSCOPE_BOOL) return HEADSCOPE_BAD_GRADIENT;
    const int64_t whole[] = {call.batch, call.heads, call.queries, call.keys};
    for (int d = 0; d < 4; ++d) {
        if (gradients.mask_sizes[d] != 1 && gradients.mask_sizes[d] != whole[d]) return HEADSCOPE_BAD_GRADIENT;
    }
    return HEADSCOPE_OK;
}

// What the items of a head share, freed at the end.
struct Shared {
    float* numbers = nullptr;
    std::atomic<int64_t>* progress = nullptr;

    Shared() = default;
    Shared(const Shared&) = delete;
    Shared& operator=(const Shared&) = delete;
    ~Shared() {
        free(numbers);
        delete[] progress;
    }
};

// The gradient of everything but the mask: as many heads at a time as keep the threads busy where the queries' sums
// need memory. False: out of memory.
bool run_heads(const Kernel& kernel, const headscope_attention& call, const headscope_gradients& gradients,
               BackwardPlan plan) {
    const int64_t kv_heads = call.batch * call.kv_heads;
    const int64_t shared_heads = call.heads / call.kv_heads;
    const int64_t wanted = plan.sums_queries ? 2 * call.threads : kv_heads;
    const int64_t turn = wanted < 1 ? 1 : wanted < kv_heads ? wanted : kv_heads;
    Shared shared;
    if (plan.key_blocks > 1) {
        const int64_t rows = gradients.cotangents * call.queries;
        const int64_t deltas = rows * kv_heads * shared_heads;
        const int64_t sums = plan.sums_queries ? rows * turn * shared_heads * plan.channels : 0;
        shared.numbers = static_cast<float*>(malloc(sizeof(float) * static_cast<size_t>(deltas + sums)));
        shared.progress = new (std::nothrow) std::atomic<int64_t>[static_cast<size_t>(kv_heads * plan.key_blocks)]();
        if (!shared.numbers || !shared.progress) return false;
        plan.deltas = shared.numbers;
        plan.query_sums = shared.numbers + deltas;
        plan.progress = shared.progress;
    }
    for (int64_t first = 0; first < kv_heads; first += turn) {
        const int64_t heads = first + turn < kv_heads ? turn : kv_heads - first;
        plan.first_head = first * shared_heads;
        plan.turn_heads = heads * shared_heads;
        // the heads' first keys come first, so that threads seldom wait for one another
        const bool done =
            spread(0, heads * plan.key_blocks, call.threads, plan.bytes_per_thread, [&](int64_t i, void* memory) {
                kernel.run_backward(call, gradients, plan, first + i % heads, i / heads, memory);
            });
        if (!done) return false;
    }
    return true;
}

// All gradients for the cotangents at hand. False: out of memory.
bool run(const Kernel& kernel, const headscope_attention& call, const headscope_gradients& gradients) {
    headscope_gradients part = copy_of(gradients);
    part.mask = nullptr;
    const bool heads = part.query.data || part.key.data || part.value.data || part.gate || part.temperature ||
                       part.key_bias || part.key_scale;
    if (heads && !run_heads(kernel, call, part, kernel.plan_backward(call, part))) return false;
    if (!gradients.mask) return true;
    part.mask = gradients.mask;
    part.query.data = part.key.data = part.value.data = nullptr;
    part.gate = part.temperature = part.key_bias = part.key_scale = nullptr;
    const BackwardPlan plan = kernel.plan_backward(call, part);
    return spread(0, plan.mask_items, call.threads, plan.bytes_per_thread,
                  [&](int64_t i, void* memory) { kernel.run_mask_gradient(call, part, plan, i, memory); });
}

void move(headscope_stack* stack, int64_t count) {
    const int64_t size = stack->dtype == HEADSCOPE_FLOAT32 ? 4 : 2;
    if (stack->data) stack->data = static_cast<char*>(stack->data) + count * stack->strides[0] * size;
}

template <typename Number>
void move(Number** numbers, int64_t count) {
    if (*numbers) *numbers += count;
}

// Moves to the cotangents after the first `count`.
void drop(const headscope_attention& call, int64_t count, headscope_gradients* gradients) {
    const int64_t heads = count * call.batch * call.heads, rows = heads * call.queries, keys = heads * call.keys;
    const int64_t* sizes = gradients->mask_sizes;
    for (headscope_stack* stack : {&gradients->output, &gradients->query, &gradients->key, &gradients->value}) {
        move(stack, count);
    }
    move(&gradients->row_constants, rows);
    move(&gradients->entropy, rows);
    for (float** numbers : {&gradients->gate, &gradients->temperature}) move(numbers, heads);
    for (float** numbers : {&gradients->key_bias, &gradients->key_scale}) move(numbers, keys);
    move(&gradients->mask, count * sizes[0] * sizes[1] * sizes[2] * sizes[3]);
    for (int64_t i = 0; i < gradients->group_count; ++i) {
        move(&gradients->groups[i].data, rows * gradients->groups[i].count);
    }
    gradients->cotangents -= count;
}

// As many cotangents at a time as a thread has memory for.
bool run_in_turn(const Kernel& kernel, const headscope_attention& call, const headscope_gradients& gradients) {
    headscope_gradients rest = copy_of(gradients);
    while (rest.cotangents > 0) {
        headscope_gradients part = copy_of(rest);
        while (part.cotangents > 1 && kernel.plan_backward(call, part).bytes_per_thread > MANY_BYTES) {
            part.cotangents = (part.cotangents + 1) / 2;
        }
        if (!run(kernel, call, part)) return false;
        drop(call, part.cotangents, &rest);
    }
    return true;
}

}  // namespace

int headscope_attention_backward(const headscope_attention* call, const headscope_gradients* gradients) {
    if (!call || !gradients) return HEADSCOPE_NULL_POINTER;
    int status = headscope::check_inputs(*call);
    if (status == HEADSCOPE_OK) status = check(*call, *gradients);
    if (status != HEADSCOPE_OK) return status;
    const Kernel* kernel = headscope::find_kernel(call->instruction_set);
    if (!kernel) return HEADSCOPE_BAD_INSTRUCTION_SET;
    kernel = headscope::kernel_for(kernel, call->query.dtype);
    if (call->batch * call->kv_heads == 0) {
        // only a mask that repeats has a gradient then
        const int64_t* sizes = gradients->mask_sizes;
        const int64_t numbers = gradients->cotangents * sizes[0] * sizes[1] * sizes[2] * sizes[3];
        for (int64_t i = 0; gradients->mask && i < numbers; ++i) gradients->mask[i] = 0.0f;
        return HEADSCOPE_OK;
    }
    return run_in_turn(*kernel, *call, *gradients) ? HEADSCOPE_OK : HEADSCOPE_NO_MEMORY;
}
