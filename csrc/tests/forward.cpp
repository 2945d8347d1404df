// The forward's output and statistics against the formula in double.
#include <stdio.h>

#include "problem.h"

namespace {

constexpr int64_t GROUPS = 5, WIDTH = 7, KEY_WIDTH = 3;

double distance(int64_t i, int64_t j) {
    const double y = static_cast<double>(i / WIDTH - j / KEY_WIDTH), x = static_cast<double>(i % WIDTH - j % KEY_WIDTH);
    return sqrt(y * y + x * x);
}

double group_entropy(double mass, double mass_of_logs) { return mass > 0.0 ? log(mass) - mass_of_logs / mass : 0.0; }

// What one row's statistics should be: one number for each kind but group statistics, which have GROUPS, and key_mass.
void expect_row(const Row& row, const std::vector<int32_t>& groups, std::vector<double>* values) {
    const bool dead = row.maximum == -INF;
    double weighted = 0.0, squares = 0.0, distances = 0.0;
    double masses[GROUPS] = {}, logs[GROUPS] = {};
    for (size_t j = 0; j < row.powers.size(); ++j) {
        const double power = row.powers[j];
        const double log_power = power > 0.0 ? log(power) : 0.0;
        weighted += power * log_power;
        squares += power * power;
        distances += power * distance(row.query, static_cast<int64_t>(j));
        if (groups[j] < 0 || groups[j] >= GROUPS) continue;
        masses[groups[j]] += power;
        logs[groups[j]] += power * log_power;
    }
    const double share = row.share();
    *values = {dead ? 0.0 : log(row.sum) - weighted * share,
               dead ? -INF : row.maximum + log(row.sum),
               row.maximum,
               share,
               dead ? 0.0 : -log(squares * share * share),
               distances * share};
    for (const double mass : masses) values->push_back(mass * share);
    for (int64_t g = 0; g < GROUPS; ++g) values->push_back(group_entropy(masses[g], logs[g]));
}

}  // namespace

void check_forward(const Problem& p, int64_t dtype, int instruction_set) {
    const Inputs inputs(p, dtype);
    const Array output({1, p.batch, p.heads, p.queries, p.dim_v}, dtype);
    std::vector<int32_t> groups;
    for (int64_t j = 0; j < p.keys; ++j) groups.push_back(static_cast<int32_t>(j * (GROUPS + 2) / p.keys) - 1);
    const int64_t rows = inputs.rows();
    // entropy, logsumexp, max_logit, max_prob, collision_entropy, distance, group_mass, group_entropy, key_mass
    const int64_t widths[] = {1, 1, 1, 1, 1, 1, GROUPS, GROUPS};
    std::vector<float> results[9];
    headscope_attention call = inputs.call(instruction_set);
    call.output = output.tensor();
    call.statistic_count = 9;
    for (int64_t kind = 0; kind < 9; ++kind) {
        const int64_t count = kind == HEADSCOPE_KEY_MASS ? p.batch * p.heads * p.keys : rows * widths[kind];
        results[kind].resize(static_cast<size_t>(count));
        headscope_statistic& statistic = call.statistics[kind];
        statistic.kind = kind;
        statistic.output = results[kind].data();
        statistic.groups = groups.data();
        statistic.group_strides[2] = 1;
        const int64_t grid[] = {p.queries / WIDTH + 1, WIDTH, p.keys / KEY_WIDTH + 1, KEY_WIDTH};
        for (int i = 0; i < 4 && kind == HEADSCOPE_DISTANCE; ++i) statistic.sizes[i] = grid[i];
        if (kind == HEADSCOPE_GROUP_MASS || kind == HEADSCOPE_GROUP_ENTROPY) statistic.sizes[0] = GROUPS;
    }
    const int status = headscope_attention_forward(&call);
    if (status != HEADSCOPE_OK) return fail(headscope_status_message(status));
    std::vector<double> expected;
    double largest = 0.0;
    std::vector<double> key_mass(static_cast<size_t>(p.batch * p.heads * p.keys));
    int64_t index = 0;
    for_each_row(inputs, [&](const Row& row) {
        const int64_t b = row.batch, h = row.head;
        expect_row(row, groups, &expected);
        // four units in the last place of a logit
        const double logit = row.maximum == -INF ? 0.0 : 4.0 * ldexp(fabs(row.maximum), -24);
        largest = fmax(largest, logit);
        size_t next = 0;
        for (int kind = 0; kind < 8; ++kind) {
            const int64_t width = widths[kind];
            for (int64_t w = 0; w < width; ++w, ++next) {
                const double got = static_cast<double>(results[kind][static_cast<size_t>(index * width + w)]);
                const double tolerance = 2e-5 * (kind == HEADSCOPE_DISTANCE ? 1.0 + expected[next] : 1.0) + logit;
                if (differs(got, expected[next], tolerance)) fail("statistic", p, instruction_set, got, expected[next]);
            }
        }
        const double share = row.share(), gate = inputs.gate_of(b, h);
        std::vector<double> weights = row.powers;
        for (int64_t j = 0; j < p.keys; ++j) {
            double& weight = weights[static_cast<size_t>(j)];
            key_mass[static_cast<size_t>((b * p.heads + h) * p.keys + j)] += weight * share;
            if (p.edits) weight *= inputs.key_scale.get(0, b, h, j);
        }
        std::vector<double> attention(static_cast<size_t>(p.dim_v));
        for (int64_t j = 0; j < p.keys; ++j) {
            const double* value = inputs.value_of(b, row.kv_head, j);
            for (size_t c = 0; c < attention.size(); ++c) attention[c] += weights[static_cast<size_t>(j)] * value[c];
        }
        for (int64_t c = 0; c < p.dim_v; ++c) {
            const double fill = p.fill ? inputs.fill.get(0, h, 0, c) : 0.0;
            const double wanted = gate * attention[static_cast<size_t>(c)] * share + (1.0 - gate) * fill;
            const double tolerance = (dtype == HEADSCOPE_FLOAT32 ? 4e-6 : 1.6e-2) + logit;
            const double got = output.get(b, h, row.query, c);
            if (differs(got, wanted, tolerance)) fail("output", p, instruction_set, got, wanted);
        }
        ++index;
    });
    for (size_t j = 0; j < key_mass.size(); ++j) {
        const double got = static_cast<double>(results[HEADSCOPE_KEY_MASS][j]);
        if (differs(got, key_mass[j], (2e-5 + largest) * (1.0 + key_mass[j]))) {
            fail("key_mass", p, instruction_set, got, key_mass[j]);
        }
    }
}
