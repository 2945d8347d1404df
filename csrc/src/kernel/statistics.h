// Statistics that need more than one number of each row: distances on a grid, masses and entropies of groups of keys.
//
// A group's sums run like a row's, relative to the row's maximum:
//     mass = sum_j 2^x_j        weighted = sum_j 2^x_j * x_j        over the group's keys
// so that its share of the row is mass / sum and its own entropy is ln(mass) - ln(2) * weighted / mass. Keys of a group
// tend to lie side by side, so a vector of keys meets few groups: for each, one masked addition.
#ifndef HEADSCOPE_KERNEL_STATISTICS_H
#define HEADSCOPE_KERNEL_STATISTICS_H

#include "exponential.h"
#include "mask.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

// The smallest normal float. A group's mass below it is 0: what is left of its digits would give a wrong entropy.
constexpr float LEAST_MASS = 1.17549435e-38f;

// What the sums of one row say, and what the last step did to them.
struct RowState {
    double sum;
    double weighted;
    double squares;
    double moved;       // by how much this step moved the maximum, in powers of two, at most 0
    float running_max;  // NaN aside; -inf until a key is valid
    float rescale;      // what this step multiplies the row's output by, 2^moved
    bool saw_nan;       // a logit was NaN
};

struct Distance {
    const headscope_statistic* statistic;
    float *key_y, *key_x;  // [key block]
    double* sums;          // [rows of the item]
};

// Some keys of a vector that are of one group.
struct GroupPart {
    int32_t slot;  // its number among the groups of this block of keys
    uint32_t lanes;
};

// Statistics that share their groups.
struct Groups {
    const headscope_statistic* statistic;
    bool entropy;
    int64_t count;
    float *masses, *weighted;            // [rows of the item][count]
    int32_t* slot_of;                    // [count], -1: not in this block
    int32_t* group_of;                   // [slots]
    GroupPart* parts;                    // by vector of keys
    int32_t* part_start;                 // [vectors + 1]
    float *lane_masses, *lane_weighted;  // [slots][LANES], of one row
    int64_t slots;
};

// What all statistics of a call need, found once per item.
struct Statistics {
    bool any = false;      // of rows: they want logits even where the output doesn't
    bool entropy = false;  // the weighted sum
    bool general = false;  // more than that
    bool key_mass = false;
    int distances = 0, groups = 0;
    Distance distance[HEADSCOPE_MAX_STATISTICS];
    Groups group[HEADSCOPE_MAX_STATISTICS];
};

HEADSCOPE_INLINE bool same_groups(const headscope_statistic& a, const headscope_statistic& b) {
    return a.groups == b.groups && a.sizes[0] == b.sizes[0] && a.sizes[1] == b.sizes[1] &&
           a.group_strides[0] == b.group_strides[0] && a.group_strides[1] == b.group_strides[1] &&
           a.group_strides[2] == b.group_strides[2];
}

inline void find_statistics(const headscope_attention& call, Statistics* found) {
    for (int64_t i = 0; i < call.statistic_count; ++i) {
        const headscope_statistic& statistic = call.statistics[i];
        found->any = true;
        switch (statistic.kind) {
            case HEADSCOPE_ENTROPY:
                found->entropy = true;
                break;
            case HEADSCOPE_COLLISION_ENTROPY:
                found->general = true;
                break;
            case HEADSCOPE_DISTANCE:
                found->general = true;
                found->distance[found->distances++].statistic = &statistic;
                break;
            case HEADSCOPE_GROUP_MASS:
            case HEADSCOPE_GROUP_ENTROPY: {
                found->general = true;
                int g = 0;
                while (g < found->groups && !same_groups(*found->group[g].statistic, statistic)) ++g;
                Groups& groups = found->group[g];
                if (g == found->groups) {
                    ++found->groups;
                    groups.statistic = &statistic;
                    groups.entropy = false;
                    groups.count = statistic.sizes[0];
                }
                groups.entropy |= statistic.kind == HEADSCOPE_GROUP_ENTROPY;
                break;
            }
            case HEADSCOPE_KEY_MASS:
                found->key_mass = true;
                break;
            default:
                break;
        }
    }
}

// Bytes per row, and per item, of working memory; take(bytes) hands out memory in order, and may only count.
template <typename Take>
void lay_out_statistics(Statistics* statistics, int64_t rows, int64_t key_block, const Take& take) {
    const auto floats = [&take](int64_t count) { return static_cast<float*>(take(count * 4)); };
    const auto integers = [&take](int64_t count) { return static_cast<int32_t*>(take(count * 4)); };
    for (int d = 0; d < statistics->distances; ++d) {
        Distance& distance = statistics->distance[d];
        distance.key_y = floats(key_block);
        distance.key_x = floats(key_block);
        distance.sums = static_cast<double*>(take(rows * 8));
    }
    for (int g = 0; g < statistics->groups; ++g) {
        Groups& groups = statistics->group[g];
        const int64_t slots = smaller(groups.count, key_block);
        groups.masses = floats(rows * groups.count);
        groups.weighted = groups.entropy ? floats(rows * groups.count) : nullptr;
        groups.slot_of = integers(groups.count);
        groups.group_of = integers(slots);
        groups.parts = static_cast<GroupPart*>(take(key_block * static_cast<int64_t>(sizeof(GroupPart))));
        groups.part_start = integers(key_block / LANES + 1);
        groups.lane_masses = floats(slots * LANES);
        groups.lane_weighted = groups.entropy ? floats(slots * LANES) : nullptr;
    }
}

// Bytes that a row needs beyond RowState.
inline int64_t statistic_row_bytes(const Statistics& statistics) {
    int64_t bytes = statistics.distances * 8;
    for (int g = 0; g < statistics.groups; ++g) {
        bytes += statistics.group[g].count * (statistics.group[g].entropy ? 8 : 4);
    }
    return bytes;
}

// Before an item's first block of keys.
inline void start_groups(Statistics* statistics) {
    for (int g = 0; g < statistics->groups; ++g) {
        Groups& groups = statistics->group[g];
        groups.slots = 0;
        for (int64_t i = 0; i < groups.count; ++i) groups.slot_of[i] = -1;
    }
}

// Where this block's keys are, and which groups they belong to.
inline void start_keys(Statistics* statistics, int64_t sample, int64_t head, int64_t first, int64_t count) {
    for (int d = 0; d < statistics->distances; ++d) {
        const Distance& distance = statistics->distance[d];
        const int64_t width = distance.statistic->sizes[3];
        for (int64_t j = 0; j < round_up(count, LANES); ++j) {
            distance.key_y[j] = static_cast<float>((first + j) / width);
            distance.key_x[j] = static_cast<float>((first + j) % width);
        }
    }
    for (int g = 0; g < statistics->groups; ++g) {
        Groups& groups = statistics->group[g];
        const headscope_statistic& statistic = *groups.statistic;
        const int32_t* ids = statistic.groups + sample * statistic.group_strides[0] +
                             head * statistic.group_strides[1] + first * statistic.group_strides[2];
        for (int64_t s = 0; s < groups.slots; ++s) groups.slot_of[groups.group_of[s]] = -1;
        groups.slots = 0;
        int32_t parts = 0;
        for (int64_t vector = 0; vector * LANES < count; ++vector) {
            groups.part_start[vector] = parts;
            for (int64_t j = vector * LANES; j < smaller(count, (vector + 1) * LANES); ++j) {
                const int64_t group = ids[j * statistic.group_strides[2]] - statistic.sizes[1];
                if (group < 0 || group >= groups.count) continue;
                if (groups.slot_of[group] < 0) {
                    groups.group_of[groups.slots] = static_cast<int32_t>(group);
                    groups.slot_of[group] = static_cast<int32_t>(groups.slots++);
                }
                const int32_t slot = groups.slot_of[group];
                int32_t part = groups.part_start[vector];
                while (part < parts && groups.parts[part].slot != slot) ++part;
                if (part == parts) groups.parts[parts++] = {slot, 0};
                groups.parts[part].lanes |= 1u << (j % LANES);
            }
        }
        groups.part_start[(count + LANES - 1) / LANES] = parts;
    }
}

// Before a row's first step. row counts from the item's first.
inline void start_row_statistics(Statistics* statistics, int64_t row) {
    for (int d = 0; d < statistics->distances; ++d) statistics->distance[d].sums[row] = 0.0;
    for (int g = 0; g < statistics->groups; ++g) {
        const Groups& groups = statistics->group[g];
        const size_t bytes = static_cast<size_t>(groups.count) * sizeof(float);
        memset(groups.masses + row * groups.count, 0, bytes);
        if (groups.entropy) memset(groups.weighted + row * groups.count, 0, bytes);
    }
}

// One row's step: open(), then add() for each vector of keys, then close().
class RowStatistics {
public:
    HEADSCOPE_INLINE RowStatistics(Statistics* statistics, int64_t absolute_row) : statistics_(*statistics) {
        for (int d = 0; d < statistics_.distances; ++d) {
            const int64_t width = statistics_.distance[d].statistic->sizes[1];
            y_[d] = static_cast<float>(absolute_row / width);
            x_[d] = static_cast<float>(absolute_row % width);
            sums_[d] = broadcast(0.0f);
        }
        for (int g = 0; g < statistics_.groups; ++g) {
            const Groups& groups = statistics_.group[g];
            const size_t bytes = static_cast<size_t>(groups.slots * LANES) * sizeof(float);
            memset(groups.lane_masses, 0, bytes);
            if (groups.entropy) memset(groups.lane_weighted, 0, bytes);
        }
    }

    // The vector of keys that starts at j: their powers 2^x, and the exponents x times them.
    HEADSCOPE_INLINE void add_keys(int64_t j, Floats power, Floats product) {
        for (int d = 0; d < statistics_.distances; ++d) {
            const Distance& distance = statistics_.distance[d];
            const Floats y = subtract(load(distance.key_y + j), broadcast(y_[d]));
            const Floats x = subtract(load(distance.key_x + j), broadcast(x_[d]));
            sums_[d] = multiply_add(power, square_root(multiply_add(y, y, multiply(x, x))), sums_[d]);
        }
        for (int g = 0; g < statistics_.groups; ++g) {
            const Groups& groups = statistics_.group[g];
            const int64_t vector = j / LANES;
            for (int32_t p = groups.part_start[vector]; p < groups.part_start[vector + 1]; ++p) {
                const LaneMask lanes = mask_of(groups.parts[p].lanes);
                float* mass = groups.lane_masses + groups.parts[p].slot * LANES;
                store(mass, add_where(lanes, load(mass), power));
                if (groups.entropy) {
                    float* weighted = groups.lane_weighted + groups.parts[p].slot * LANES;
                    store(weighted, add_where(lanes, load(weighted), product));
                }
            }
        }
    }

    // Adds the step to the row's sums, which follow the maximum first. row counts from the item's first.
    HEADSCOPE_INLINE void finish(const RowState& state, int64_t row) {
        for (int d = 0; d < statistics_.distances; ++d) {
            double* sum = statistics_.distance[d].sums + row;
            *sum = static_cast<double>(state.rescale) * *sum + static_cast<double>(sum_of_lanes(sums_[d]));
        }
        const float rescale = state.rescale;
        const float moved = rescale == 0.0f ? 0.0f : static_cast<float>(state.moved);
        for (int g = 0; g < statistics_.groups; ++g) {
            const Groups& groups = statistics_.group[g];
            float* masses = groups.masses + row * groups.count;
            float* weighted = groups.entropy ? groups.weighted + row * groups.count : nullptr;
            if (rescale != 1.0f) {
                if (weighted) {
                    for (int64_t i = 0; i < groups.count; ++i) {
                        const float sum = rescale * (weighted[i] + moved * masses[i]);
                        weighted[i] = rescale * masses[i] < LEAST_MASS ? 0.0f : sum;
                    }
                }
                for (int64_t i = 0; i < groups.count; ++i) {
                    const float mass = rescale * masses[i];
                    masses[i] = mass < LEAST_MASS ? 0.0f : mass;
                }
            }
            for (int64_t s = 0; s < groups.slots; ++s) {
                const int32_t group = groups.group_of[s];
                masses[group] += sum_of_lanes(load(groups.lane_masses + s * LANES));
                if (weighted) weighted[group] += sum_of_lanes(load(groups.lane_weighted + s * LANES));
            }
        }
    }

private:
    const Statistics& statistics_;
    float y_[HEADSCOPE_MAX_STATISTICS], x_[HEADSCOPE_MAX_STATISTICS];
    Floats sums_[HEADSCOPE_MAX_STATISTICS];
};

// What the row's output is multiplied by at the end: 0 where no key was valid, NaN where one was NaN or infinite.
HEADSCOPE_INLINE float normaliser(const RowState& row) {
    return row.sum == 0.0 ? 0.0f : static_cast<float>(1.0 / row.sum);
}

// What the backward needs of `rows` rows: see row_max and log2_sum of headscope_attention.
inline void save_rows(const RowState* states, int64_t rows, float* row_max, float* log2_sum) {
    for (int64_t r = 0; r < rows; ++r) {
        const double sum = states[r].sum;
        const bool dead = sum == 0.0;
        const double log_sum = natural_log(sum) * (1.0 / LN_2);
        row_max[r] = dead ? 0.0f : states[r].running_max;
        log2_sum[r] = static_cast<float>(sum > 0.0 ? log_sum : (dead ? INFINITY : sum));
    }
}

HEADSCOPE_INLINE float group_entropy(float mass, float weighted) {
    if (mass == 0.0f) return 0.0f;
    const double entropy =
        natural_log(static_cast<double>(mass)) - LN_2 * static_cast<double>(weighted) / static_cast<double>(mass);
    // of a single key it is 0 but for rounding
    return entropy < 0.0 ? 0.0f : static_cast<float>(entropy);
}

// Group statistics of one row. results: its `count` numbers.
inline void write_groups(const Groups& groups, int64_t kind, const RowState& state, int64_t row, float* results) {
    const float* masses = groups.masses + row * groups.count;
    const float share = normaliser(state);
    if (state.sum != state.sum) {
        for (int64_t c = 0; c < groups.count; ++c) results[c] = NAN;
    } else if (kind == HEADSCOPE_GROUP_MASS) {
        for (int64_t c = 0; c < groups.count; ++c) results[c] = masses[c] * share;
    } else {
        const float* weighted = groups.weighted + row * groups.count;
        for (int64_t c = 0; c < groups.count; ++c) results[c] = group_entropy(masses[c], weighted[c]);
    }
}

constexpr int64_t MAX_BLOCK_ROWS = 64;

// Writes the statistics of `rows` rows, at most MAX_BLOCK_ROWS, at `index` of [batch, heads, queries] and on. row
// counts from the item's first. Loops run over rows, so that the compiler makes vectors of them.
inline void write_statistics(const headscope_attention& call, const Statistics& statistics, const RowState* states,
                             int64_t rows, int64_t row, int64_t index) {
    // one over the sum, 0 for a dead row, and the sum's logarithm, 0 for one; NaN where the row is
    double inverse[MAX_BLOCK_ROWS], log_sum[MAX_BLOCK_ROWS];
    for (int64_t r = 0; r < rows; ++r) {
        const double sum = states[r].sum;
        inverse[r] = sum == 0.0 ? 0.0 : 1.0 / sum;
        const double logarithm = natural_log(sum);
        log_sum[r] = sum >= 0.0 ? (sum == 0.0 ? 0.0 : logarithm) : sum;
    }
    int distances = 0;
    for (int64_t i = 0; i < call.statistic_count; ++i) {
        const headscope_statistic& statistic = call.statistics[i];
        float* results = statistic.output + index;
        switch (statistic.kind) {
            case HEADSCOPE_ENTROPY:
                for (int64_t r = 0; r < rows; ++r) {
                    results[r] = static_cast<float>(log_sum[r] - LN_2 * states[r].weighted * inverse[r]);
                }
                break;
            case HEADSCOPE_LOGSUMEXP:
            case HEADSCOPE_MAX_LOGIT:
                // without a NaN, a logit of a NaN row was +inf: the maximum and logsumexp are known
                for (int64_t r = 0; r < rows; ++r) {
                    const bool added = statistic.kind == HEADSCOPE_LOGSUMEXP && log_sum[r] == log_sum[r];
                    const double maximum = static_cast<double>(states[r].running_max);
                    results[r] = states[r].saw_nan ? NAN : static_cast<float>(maximum + (added ? log_sum[r] : 0.0));
                }
                break;
            case HEADSCOPE_MAX_PROB:
                for (int64_t r = 0; r < rows; ++r) results[r] = static_cast<float>(inverse[r]);
                break;
            case HEADSCOPE_COLLISION_ENTROPY:
                for (int64_t r = 0; r < rows; ++r) {
                    // at 1 where the row is dead or NaN, whose log_sum is 0 or NaN
                    const double squares = states[r].squares > 0.0 ? states[r].squares : 1.0;
                    const double entropy = 2.0 * log_sum[r] - natural_log(squares);
                    results[r] = entropy < 0.0 ? 0.0f : static_cast<float>(entropy);
                }
                break;
            case HEADSCOPE_DISTANCE: {
                const double* sums = statistics.distance[distances++].sums + row;
                for (int64_t r = 0; r < rows; ++r) results[r] = static_cast<float>(sums[r] * inverse[r]);
                break;
            }
            case HEADSCOPE_GROUP_MASS:
            case HEADSCOPE_GROUP_ENTROPY: {
                int g = 0;
                while (!same_groups(*statistics.group[g].statistic, statistic)) ++g;
                const Groups& groups = statistics.group[g];
                for (int64_t r = 0; r < rows; ++r) {
                    write_groups(groups, statistic.kind, states[r], row + r,
                                 statistic.output + (index + r) * groups.count);
                }
                break;
            }
            default:
                break;
        }
    }
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
