#include "turns.h"

#include <stdlib.h>

#include "threads.h"

namespace headscope {

namespace {

// What is saved of a turn's rows, be it two floats of each row or, of each block of rows, one of each key: 2 MiB.
constexpr int64_t SAVED_FLOATS = 524288;

const headscope_statistic* key_mass_of(const headscope_attention& call) {
    for (int64_t i = 0; i < call.statistic_count; ++i) {
        if (call.statistics[i].kind == HEADSCOPE_KEY_MASS) return call.statistics + i;
    }
    return nullptr;
}

// Whole items: all rows of some heads, or some rows of one.
struct Turn {
    int64_t first_item, end_item;
    int64_t first_head, end_head;
    int64_t first_row, end_row;
};

// Calls run(turn) for turns of at most `blocks` blocks of rows, in order. False as soon as it returns false.
template <typename Run>
bool in_turns(const headscope_attention& call, const Plan& plan, int64_t blocks, const Run& run) {
    const int64_t groups = call.batch * call.heads / plan.heads_per_item;
    const int64_t groups_at_once = blocks / (plan.blocks_per_head(call.queries) * plan.heads_per_item);
    if (groups_at_once > 0) {
        for (int64_t group = 0; group < groups; group += groups_at_once) {
            const int64_t end = group + groups_at_once < groups ? group + groups_at_once : groups;
            if (!run(Turn{group * plan.items_per_head, end * plan.items_per_head, group * plan.heads_per_item,
                          end * plan.heads_per_item, 0, call.queries})) {
                return false;
            }
        }
        return true;
    }
    // heads so long that each takes several turns; they are items of their own
    const int64_t items_at_once = blocks / (plan.rows_per_item / plan.block_rows);
    for (int64_t head = 0; head < groups; ++head) {
        for (int64_t item = 0; item < plan.items_per_head; item += items_at_once) {
            const int64_t left = plan.items_per_head - item;
            const int64_t end = item + (left < items_at_once ? left : items_at_once);
            const int64_t end_row = end * plan.rows_per_item;
            if (!run(Turn{head * plan.items_per_head + item, head * plan.items_per_head + end, head, head + 1,
                          item * plan.rows_per_item, end_row < call.queries ? end_row : call.queries})) {
                return false;
            }
        }
    }
    return true;
}

// The masses of one head: the sums of its blocks, in order.
void add_blocks(const headscope_attention& call, const Plan& plan, const Turn& turn, int64_t head, void* memory) {
    double* sums = static_cast<double*>(memory);
    for (int64_t j = 0; j < call.keys; ++j) sums[j] = turn.first_row > 0 ? plan.carried[j] : 0.0;
    const int64_t blocks = plan.blocks_per_head(turn.end_row - turn.first_row);
    const float* block = plan.block_masses + (head - turn.first_head) * blocks * plan.key_block;
    for (int64_t b = 0; b < blocks; ++b, block += plan.key_block) {
        for (int64_t j = 0; j < call.keys; ++j) sums[j] += static_cast<double>(block[j]);
    }
    float* masses = plan.masses + head * call.keys;
    for (int64_t j = 0; j < call.keys; ++j) {
        if (plan.carried) plan.carried[j] = sums[j];
        masses[j] = static_cast<float>(sums[j]);
    }
}

}  // namespace

bool wants_key_mass(const headscope_attention& call) { return key_mass_of(call) != nullptr; }

void clear_key_mass(const headscope_attention& call) {
    const headscope_statistic* statistic = key_mass_of(call);
    for (int64_t j = 0; statistic && j < call.batch * call.heads * call.keys; ++j) statistic->output[j] = 0.0f;
}

bool run_with_key_mass(const Kernel& kernel, const headscope_attention& call, const Plan& whole) {
    Plan plan = whole;
    plan.masses = key_mass_of(call)->output;
    const int64_t key_blocks = (call.keys + plan.key_block - 1) / plan.key_block;
    const int64_t blocks_per_head = plan.blocks_per_head(call.queries);
    const int64_t floats_per_block = plan.one_pass ? plan.key_block : 2 * plan.block_rows;
    const int64_t most = SAVED_FLOATS / floats_per_block;
    const int64_t all = call.batch * call.heads * blocks_per_head;
    const int64_t blocks = all < most ? all : most;
    const size_t saved_bytes = static_cast<size_t>(blocks * floats_per_block) * sizeof(float);
    const size_t carried_bytes = blocks_per_head > most ? static_cast<size_t>(call.keys) * sizeof(double) : 0;
    char* saved = static_cast<char*>(malloc(carried_bytes + saved_bytes));
    if (!saved) return false;
    if (carried_bytes) plan.carried = reinterpret_cast<double*>(saved);
    float* floats = reinterpret_cast<float*>(saved + carried_bytes);
    const bool done = in_turns(call, plan, blocks, [&](const Turn& turn) {
        if (plan.one_pass) {
            plan.block_masses = floats;
            plan.first_block = turn.first_head * blocks_per_head + turn.first_row / plan.block_rows;
        } else {
            plan.row_max = floats;
            plan.row_share = floats + blocks * plan.block_rows;
            plan.first_saved_row = turn.first_head * call.queries + turn.first_row;
        }
        const auto over = [&](int64_t first, int64_t end, const auto& function) {
            return spread(first, end, call.threads, plan.bytes_per_thread, function);
        };
        if (!over(turn.first_item, turn.end_item,
                  [&](int64_t i, void* memory) { kernel.run(call, plan, i, memory); })) {
            return false;
        }
        if (plan.one_pass) {
            return over(turn.first_head, turn.end_head,
                        [&](int64_t head, void* memory) { add_blocks(call, plan, turn, head, memory); });
        }
        return over(turn.first_head * key_blocks, turn.end_head * key_blocks, [&](int64_t i, void* memory) {
            kernel.run_key_mass(call, plan, i / key_blocks, i % key_blocks * plan.key_block, turn.first_row,
                                turn.end_row, memory);
        });
    });
    free(saved);
    return done;
}

}  // namespace headscope
