// Runs the kernel without Python, against the formula in double: for the sanitizers, and for machines without torch.
// Every buffer is on the heap and exactly as large as its tensor, so that one element too far is found.
#include <math.h>
#include <stdio.h>

#include <memory>
#include <vector>

#include "headscope_cpu.h"

namespace {

constexpr double INF = INFINITY;

// xorshift: the same numbers everywhere
double random_number() {
    static uint64_t state = 88172645463325252u;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<double>(state % 2000001) / 1000000.0 - 1.0;
}

struct Problem {
    int64_t batch, heads, kv_heads, queries, keys, dim, dim_v;
    bool is_causal, bool_mask, additive_mask, gate, fill, edits;
    int64_t threads;
    double opposed = 0.0;  // where not 0, all queries are this and all keys minus this: logits far below the padding's
};

// A contiguous float32 or bfloat16 tensor; bfloat16 numbers are chosen exact, so that both have the same values.
struct Array {
    std::unique_ptr<char[]> data;
    headscope_tensor tensor;
    int64_t shape[4];

    Array(int64_t a, int64_t b, int64_t c, int64_t d, int64_t dtype) : shape{a, b, c, d} {
        const int64_t count = a * b * c * d;
        const int64_t width = dtype == HEADSCOPE_BOOL ? 1 : dtype == HEADSCOPE_FLOAT32 ? 4 : 2;
        if (count > 0) data.reset(new char[static_cast<size_t>(count * width)]);
        tensor.data = data.get();
        tensor.dtype = dtype;
        tensor.strides[3] = d == 1 ? 0 : 1;
        tensor.strides[2] = c == 1 ? 0 : d;
        tensor.strides[1] = b == 1 ? 0 : c * d;
        tensor.strides[0] = a == 1 ? 0 : b * c * d;
        for (int64_t i = 0; i < count; ++i) set(i, random_number());
    }

    void set(int64_t i, double x) {
        // eight bits of mantissa
        int exponent = 0;
        const double mantissa = frexp(x, &exponent);
        const float value = static_cast<float>(isinf(x) ? x : ldexp(rint(mantissa * 256.0), exponent - 8));
        uint32_t bits;
        static_assert(sizeof bits == sizeof value, "float is 32 bits");
        __builtin_memcpy(&bits, &value, sizeof bits);
        if (tensor.dtype == HEADSCOPE_FLOAT32) reinterpret_cast<float*>(data.get())[i] = value;
        if (tensor.dtype == HEADSCOPE_BFLOAT16) {
            reinterpret_cast<uint16_t*>(data.get())[i] = static_cast<uint16_t>(bits >> 16);
        }
        if (tensor.dtype == HEADSCOPE_BOOL) data.get()[i] = x > -0.4;
    }

    double get(int64_t a, int64_t b, int64_t c, int64_t d) const {
        const int64_t* s = tensor.strides;
        const int64_t i = a * s[0] + b * s[1] + c * s[2] + d * s[3];
        if (tensor.dtype == HEADSCOPE_BOOL) return data.get()[i];
        if (tensor.dtype == HEADSCOPE_FLOAT32)
            return static_cast<double>(reinterpret_cast<const float*>(data.get())[i]);
        const uint32_t bits = static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(data.get())[i]) << 16;
        float value;
        __builtin_memcpy(&value, &bits, sizeof value);
        return static_cast<double>(value);
    }
};

bool differs(double got, double expected, double tolerance) {
    if (isinf(expected) || isnan(expected)) return !(got == expected || (isnan(got) && isnan(expected)));
    return !(fabs(got - expected) <= tolerance);
}

int failures = 0;

void fail(const char* what, const Problem& p, int instruction_set, double got, double expected) {
    if (++failures > 20) return;
    printf("%s: got %.9g, expected %.9g at [%lld, %lld/%lld, %lld x %lld, %lld/%lld], instruction set %d\n", what, got,
           expected, static_cast<long long>(p.batch), static_cast<long long>(p.heads),
           static_cast<long long>(p.kv_heads), static_cast<long long>(p.queries), static_cast<long long>(p.keys),
           static_cast<long long>(p.dim), static_cast<long long>(p.dim_v), instruction_set);
}

headscope_edit edit_of(const Array& array) {
    const int64_t* s = array.tensor.strides;
    return {static_cast<const float*>(array.tensor.data), {s[1], s[2], s[3]}};
}

constexpr int64_t GROUPS = 5, WIDTH = 7, KEY_WIDTH = 3;

double distance(int64_t i, int64_t j) {
    const double y = static_cast<double>(i / WIDTH - j / KEY_WIDTH), x = static_cast<double>(i % WIDTH - j % KEY_WIDTH);
    return sqrt(y * y + x * x);
}

double group_entropy(double mass, double mass_of_logs) { return mass > 0.0 ? log(mass) - mass_of_logs / mass : 0.0; }

// What one row's statistics should be: one number for each kind but group statistics, which have GROUPS, and key_mass.
void expect_row(const std::vector<double>& powers, double maximum, int64_t row, const std::vector<int32_t>& groups,
                std::vector<double>* values) {
    const bool dead = maximum == -INF;
    double sum = 0.0, weighted = 0.0, squares = 0.0, distances = 0.0;
    double masses[GROUPS] = {}, logs[GROUPS] = {};
    for (size_t j = 0; j < powers.size(); ++j) {
        const double power = powers[j];
        const double log_power = power > 0.0 ? log(power) : 0.0;
        sum += power;
        weighted += power * log_power;
        squares += power * power;
        distances += power * distance(row, static_cast<int64_t>(j));
        if (groups[j] < 0 || groups[j] >= GROUPS) continue;
        masses[groups[j]] += power;
        logs[groups[j]] += power * log_power;
    }
    const double share = dead ? 0.0 : 1.0 / sum;
    *values = {dead ? 0.0 : log(sum) - weighted * share,
               dead ? -INF : maximum + log(sum),
               maximum,
               share,
               dead ? 0.0 : -log(squares * share * share),
               distances * share};
    for (const double mass : masses) values->push_back(mass * share);
    for (int64_t g = 0; g < GROUPS; ++g) values->push_back(group_entropy(masses[g], logs[g]));
}

void run(const Problem& p, int64_t dtype, int instruction_set) {
    Array query(p.batch, p.heads, p.queries, p.dim, dtype), key(p.batch, p.kv_heads, p.keys, p.dim, dtype);
    Array value(p.batch, p.kv_heads, p.keys, p.dim_v, dtype), output(p.batch, p.heads, p.queries, p.dim_v, dtype);
    Array mask(p.batch, 1, p.queries, p.keys, p.bool_mask ? HEADSCOPE_BOOL : HEADSCOPE_FLOAT32);
    Array fill(1, p.heads, 1, p.dim_v, HEADSCOPE_FLOAT32), gate(1, p.batch, p.heads, 1, HEADSCOPE_FLOAT32);
    // [batch, heads] and [batch, heads, keys], each behind a 1
    Array temperature(1, 1, p.heads, 1, HEADSCOPE_FLOAT32), bias(1, p.batch, 1, p.keys, HEADSCOPE_FLOAT32);
    Array key_scale(1, p.batch, p.heads, p.keys, HEADSCOPE_FLOAT32);
    if (p.additive_mask) {
        for (int64_t i = 0; i < p.batch * p.queries * p.keys; i += 3) mask.set(i, -INF);
    }
    for (int64_t i = 0; p.opposed != 0.0 && i < p.batch * p.heads * p.queries * p.dim; ++i) query.set(i, p.opposed);
    for (int64_t i = 0; p.opposed != 0.0 && i < p.batch * p.kv_heads * p.keys * p.dim; ++i) key.set(i, -p.opposed);
    for (int64_t i = 0; i < p.batch * p.heads; i += 3) gate.set(i, static_cast<double>(i % 2));
    for (int64_t i = 0; i < p.heads; ++i) temperature.set(i, 0.5 + 0.25 * static_cast<double>(i));
    for (int64_t i = 2; i < p.batch * p.keys; i += 5) bias.set(i, -INF);
    std::vector<int32_t> groups;
    for (int64_t j = 0; j < p.keys; ++j) groups.push_back(static_cast<int32_t>(j * (GROUPS + 2) / p.keys) - 1);
    const int64_t rows = p.batch * p.heads * p.queries;
    // entropy, logsumexp, max_logit, max_prob, collision_entropy, distance, group_mass, group_entropy, key_mass
    const int64_t widths[] = {1, 1, 1, 1, 1, 1, GROUPS, GROUPS};
    std::vector<float> results[9];
    headscope_attention call = {};
    call.batch = p.batch, call.heads = p.heads, call.kv_heads = p.kv_heads;
    call.queries = p.queries, call.keys = p.keys, call.dim = p.dim, call.dim_v = p.dim_v;
    call.query = query.tensor, call.key = key.tensor, call.value = value.tensor, call.output = output.tensor;
    if (p.bool_mask || p.additive_mask) call.mask = mask.tensor;
    if (p.fill) call.fill = fill.tensor;
    if (p.gate) call.gate = edit_of(gate);
    if (p.edits) {
        call.temperature = edit_of(temperature);
        call.key_bias = edit_of(bias);
        call.key_scale = edit_of(key_scale);
    }
    call.scale = 0.7;
    call.is_causal = p.is_causal;
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
    call.threads = p.threads;
    call.instruction_set = instruction_set;
    const int status = headscope_attention_forward(&call);
    if (status != HEADSCOPE_OK) {
        printf("%s\n", headscope_status_message(status));
        ++failures;
        return;
    }
    std::vector<double> powers(static_cast<size_t>(p.keys)), expected;
    double largest = 0.0;
    std::vector<double> key_mass(static_cast<size_t>(p.batch * p.heads * p.keys));
    for (int64_t index = 0; index < rows; ++index) {
        const int64_t b = index / (p.heads * p.queries), h = index / p.queries % p.heads, i = index % p.queries;
        const int64_t kv = h / (p.heads / p.kv_heads);
        const double scale = 0.7 / (p.edits ? temperature.get(0, 0, h, 0) : 1.0);
        double maximum = -INF;
        for (int64_t j = 0; j < p.keys; ++j) {
            double logit = 0.0;
            for (int64_t d = 0; d < p.dim; ++d) logit += scale * query.get(b, h, i, d) * key.get(b, kv, j, d);
            if (p.edits) logit += bias.get(0, b, 0, j);
            if (p.additive_mask) logit += mask.get(b, 0, i, j);
            if (p.bool_mask && mask.get(b, 0, i, j) == 0.0) logit = -INF;
            if (p.is_causal && j > i) logit = -INF;
            powers[static_cast<size_t>(j)] = logit;
            maximum = fmax(maximum, logit);
        }
        for (double& power : powers) power = maximum == -INF ? 0.0 : exp(power - maximum);
        expect_row(powers, maximum, i, groups, &expected);
        // four units in the last place of a logit
        const double logit = maximum == -INF ? 0.0 : 4.0 * ldexp(fabs(maximum), -24);
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
        const double share = expected[3];
        const double g = p.gate ? gate.get(0, b, h, 0) : 1.0;
        for (int64_t j = 0; j < p.keys; ++j) {
            double& power = powers[static_cast<size_t>(j)];
            key_mass[static_cast<size_t>((b * p.heads + h) * p.keys + j)] += power * share;
            if (p.edits) power *= key_scale.get(0, b, h, j);
        }
        for (int64_t c = 0; c < p.dim_v; ++c) {
            double attention = 0.0;
            for (int64_t j = 0; j < p.keys; ++j) attention += powers[static_cast<size_t>(j)] * value.get(b, kv, j, c);
            const double wanted = g * attention * share + (1.0 - g) * (p.fill ? fill.get(0, h, 0, c) : 0.0);
            const double tolerance = (dtype == HEADSCOPE_FLOAT32 ? 4e-6 : 1.6e-2) + logit;
            if (differs(output.get(b, h, i, c), wanted, tolerance)) {
                fail("output", p, instruction_set, output.get(b, h, i, c), wanted);
            }
        }
    }
    for (size_t j = 0; j < key_mass.size(); ++j) {
        const double got = static_cast<double>(results[HEADSCOPE_KEY_MASS][j]);
        if (differs(got, key_mass[j], (2e-5 + largest) * (1.0 + key_mass[j]))) {
            fail("key_mass", p, instruction_set, got, key_mass[j]);
        }
    }
}

}  // namespace

int main() {
    const Problem problems[] = {
        // batch, heads, kv, queries, keys, dim, dim_v, causal, bool, additive, gate, fill, edits, threads
        {1, 1, 1, 1, 1, 1, 1, false, false, false, false, false, false, 1},
        {2, 4, 2, 37, 77, 40, 40, false, false, false, false, false, true, 3},
        {1, 2, 1, 65, 529, 17, 33, true, false, false, true, true, false, 2},
        {2, 3, 3, 70, 63, 12, 20, false, true, false, true, false, true, 2},
        {1, 3, 1, 63, 600, 8, 5, false, false, true, true, true, false, 1},
        {1, 2, 2, 9, 1030, 80, 160, false, false, false, false, false, true, 1},
        {1, 1, 1, 600, 20, 4, 4, true, false, false, false, false, false, 4},
        // whole tiles of rows and channels: read and written in place
        {1, 4, 2, 72, 150, 16, 40, false, false, false, false, false, false, 2},
        {2, 1, 1, 144, 700, 8, 16, true, false, false, false, false, false, 2},
        {1, 1, 1, 3, 2, 8, 8, false, false, false, false, false, false, 1, 20.0},
        {1, 2, 1, 9, 21, 16, 8, true, false, false, false, false, true, 1, 20.0},
        {1, 2, 2, 5, 0, 8, 8, false, false, false, true, true, true, 1},
        {1, 2, 2, 0, 5, 8, 8, false, false, false, false, false, false, 2},
        {0, 2, 2, 5, 5, 8, 8, true, false, false, false, false, true, 1},
        {1, 2, 2, 5, 5, 0, 8, false, false, false, false, false, false, 1},
        {1, 2, 2, 5, 5, 8, 0, false, false, false, true, true, true, 1},
    };
    int sets = 0;
    for (int instruction_set = HEADSCOPE_BASELINE; instruction_set <= HEADSCOPE_AVX512_BF16; ++instruction_set) {
        const char* name = headscope_instruction_set_name(instruction_set);
        if (!name) continue;
        ++sets;
        for (const Problem& problem : problems) {
            run(problem, HEADSCOPE_FLOAT32, instruction_set);
            run(problem, HEADSCOPE_BFLOAT16, instruction_set);
        }
        printf("%s: %s\n", name, failures ? "failed" : "passed");
    }
    return failures || !sets ? 1 : 0;
}
