// What a backward refuses, with its status.
#include "problem.h"

namespace {

// A call that is fine, and what it is to be given.
struct Pair {
    headscope_attention call;
    headscope_gradients gradients;
};

struct Refusal {
    const char* what;
    int status;
    void (*change)(Pair*);
};

const Refusal REFUSALS[] = {
    {"a negative size", HEADSCOPE_BAD_SIZE, [](Pair* pair) { pair->call.keys = -1; }},
    {"heads that no key heads fit", HEADSCOPE_BAD_HEADS, [](Pair* pair) { pair->call.kv_heads = 3; }},
    {"a dim above 8192", HEADSCOPE_DIM_TOO_LARGE, [](Pair* pair) { pair->call.dim = 8193; }},
    {"an unknown instruction set", HEADSCOPE_BAD_INSTRUCTION_SET, [](Pair* pair) { pair->call.instruction_set = 9; }},
    {"no row_max", HEADSCOPE_NULL_POINTER, [](Pair* pair) { pair->call.row_max = nullptr; }},
    {"no log2_sum", HEADSCOPE_NULL_POINTER, [](Pair* pair) { pair->call.log2_sum = nullptr; }},
    {"neither", HEADSCOPE_NULL_POINTER, [](Pair* pair) { pair->call.row_max = pair->call.log2_sum = nullptr; }},
    {"no attention", HEADSCOPE_NULL_POINTER, [](Pair* pair) { pair->call.attention.data = nullptr; }},
    {"attention of another dtype", HEADSCOPE_BAD_DTYPE,
     [](Pair* pair) { pair->call.attention.dtype = HEADSCOPE_BFLOAT16; }},
    {"no key", HEADSCOPE_NULL_POINTER, [](Pair* pair) { pair->call.key.data = nullptr; }},
    {"no cotangent", HEADSCOPE_BAD_GRADIENT, [](Pair* pair) { pair->gradients.cotangents = 0; }},
    {"a negative number of cotangents", HEADSCOPE_BAD_GRADIENT, [](Pair* pair) { pair->gradients.cotangents = -2; }},
    {"a cotangent of another dtype", HEADSCOPE_BAD_DTYPE,
     [](Pair* pair) { pair->gradients.output.dtype = HEADSCOPE_FLOAT16; }},
    {"a gradient of another dtype", HEADSCOPE_BAD_DTYPE,
     [](Pair* pair) { pair->gradients.key.dtype = HEADSCOPE_FLOAT16; }},
    {"a mask size that is neither 1 nor whole", HEADSCOPE_BAD_GRADIENT,
     [](Pair* pair) { pair->gradients.mask_sizes[3] = 2; }},
    {"a bool mask's gradient", HEADSCOPE_BAD_GRADIENT, [](Pair* pair) { pair->call.mask.dtype = HEADSCOPE_BOOL; }},
    {"no mask's gradient", HEADSCOPE_BAD_GRADIENT, [](Pair* pair) { pair->call.mask.data = nullptr; }},
    {"no gate's gradient", HEADSCOPE_BAD_GRADIENT, [](Pair* pair) { pair->call.gate.data = nullptr; }},
    {"no temperature's gradient", HEADSCOPE_BAD_GRADIENT, [](Pair* pair) { pair->call.temperature.data = nullptr; }},
    {"a temperature's gradient without the query's", HEADSCOPE_BAD_GRADIENT,
     [](Pair* pair) { pair->gradients.query.data = nullptr; }},
    {"no key_bias's gradient", HEADSCOPE_BAD_GRADIENT, [](Pair* pair) { pair->call.key_bias.data = nullptr; }},
    {"no key_scale's gradient", HEADSCOPE_BAD_GRADIENT, [](Pair* pair) { pair->call.key_scale.data = nullptr; }},
    {"more groups than there are places", HEADSCOPE_BAD_GRADIENT,
     [](Pair* pair) { pair->gradients.group_count = HEADSCOPE_MAX_STATISTICS + 1; }},
    {"a negative number of group cotangents", HEADSCOPE_BAD_GRADIENT,
     [](Pair* pair) { pair->gradients.group_count = -1; }},
    {"a negative number of groups", HEADSCOPE_BAD_STATISTIC, [](Pair* pair) { pair->gradients.groups[0].count = -1; }},
    {"a negative first group", HEADSCOPE_BAD_STATISTIC, [](Pair* pair) { pair->gradients.groups[0].first = -1; }},
    {"no groups", HEADSCOPE_NULL_POINTER, [](Pair* pair) { pair->gradients.groups[0].groups = nullptr; }},
    {"no cotangent of groups", HEADSCOPE_NULL_POINTER, [](Pair* pair) { pair->gradients.groups[0].data = nullptr; }},
};

// What is fine as well: where nothing is looked at there need be no address.
struct Acceptance {
    const char* what;
    void (*change)(Pair*);
};

void remove_ids(Pair* pair) { pair->gradients.groups[0].data = nullptr, pair->gradients.groups[0].groups = nullptr; }

// No addresses of queries, keys and values, nor of what goes with each key.
void remove_inputs(Pair* pair) {
    pair->gradients.mask = nullptr;
    pair->call.query.data = pair->call.key.data = pair->call.value.data = nullptr;
    remove_ids(pair);
}

const Acceptance ACCEPTANCES[] = {
    {"no groups of none",
     [](Pair* pair) {
         pair->gradients.groups[0].count = 0;
         remove_ids(pair);
     }},
    {"no keys and no groups for rows that aren't there",
     [](Pair* pair) {
         pair->call.queries = 0;
         remove_inputs(pair);
     }},
    {"no keys for heads that aren't there",
     [](Pair* pair) {
         pair->call.heads = 0;
         remove_inputs(pair);
     }},
};

}  // namespace

void check_refusals() {
    const Inputs inputs({1, 2, 2, 3, 4, 5, 6, false, false, true, true, true, true, 1}, HEADSCOPE_FLOAT32);
    const Array output({1, 1, 2, 3, 6}, HEADSCOPE_FLOAT32), rows({1, 1, 2, 3, 1}, HEADSCOPE_FLOAT32);
    const Array per_group({1, 1, 2, 3, 2}, HEADSCOPE_FLOAT32);
    const int32_t groups[] = {0, 1, -1, 0};
    Array query({1, 1, 2, 3, 5}, HEADSCOPE_FLOAT32), key({1, 1, 2, 4, 5}, HEADSCOPE_FLOAT32);
    Array value({1, 1, 2, 4, 6}, HEADSCOPE_FLOAT32), mask({1, 1, 2, 3, 4}, HEADSCOPE_FLOAT32);
    Array gate({1, 1, 2, 1, 1}, HEADSCOPE_FLOAT32), temperature({1, 1, 2, 1, 1}, HEADSCOPE_FLOAT32);
    Array key_bias({1, 1, 2, 4, 1}, HEADSCOPE_FLOAT32), key_scale({1, 1, 2, 4, 1}, HEADSCOPE_FLOAT32);
    Array* const results[] = {&query, &key, &value, &mask, &gate, &temperature, &key_bias, &key_scale};
    const auto floats = [](const Array& array) { return static_cast<float*>(array.stack().data); };
    Pair fine = {inputs.call(HEADSCOPE_BASELINE), {}};
    fine.call.output = fine.call.attention = output.tensor();
    fine.call.row_max = fine.call.log2_sum = floats(rows);
    fine.gradients.cotangents = 1;
    fine.gradients.output = output.stack();
    fine.gradients.query = query.stack(), fine.gradients.key = key.stack(), fine.gradients.value = value.stack();
    fine.gradients.gate = floats(gate), fine.gradients.temperature = floats(temperature);
    fine.gradients.key_bias = floats(key_bias), fine.gradients.key_scale = floats(key_scale);
    fine.gradients.mask = floats(mask);
    const int64_t sizes[] = {1, 2, 3, 4};
    for (int i = 0; i < 4; ++i) fine.gradients.mask_sizes[i] = sizes[i];
    fine.gradients.group_count = 1;
    fine.gradients.groups[0] = {floats(per_group), 2, 0, groups, {0, 0, 1}};
    const auto run = [&](const headscope_attention* call, const headscope_gradients* gradients) {
        for (Array* result : results) result->fill(0.5);
        const int status = headscope_attention_backward(call, gradients);
        bool written = false;
        for (const Array* result : results) {
            for (const double x : result->values()) written |= x != 0.5;
        }
        if (written != (status == HEADSCOPE_OK)) fail("a backward that is refused has written something");
        return status;
    };
    if (run(&fine.call, &fine.gradients) != HEADSCOPE_OK) fail("a backward that is fine is refused");
    if (run(nullptr, &fine.gradients) != HEADSCOPE_NULL_POINTER) fail("a backward of no call");
    if (run(&fine.call, nullptr) != HEADSCOPE_NULL_POINTER) fail("a backward without gradients");
    for (const Acceptance& acceptance : ACCEPTANCES) {
        Pair pair = fine;
        acceptance.change(&pair);
        if (run(&pair.call, &pair.gradients) != HEADSCOPE_OK) fail(acceptance.what);
    }
    for (const Refusal& refusal : REFUSALS) {
        Pair pair = fine;
        refusal.change(&pair);
        if (run(&pair.call, &pair.gradients) != refusal.status) fail(refusal.what);
    }
}
