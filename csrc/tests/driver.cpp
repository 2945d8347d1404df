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
    bool is_causal, bool_mask, additive_mask, gate, fill;
    int64_t threads;
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

void run(const Problem& p, int64_t dtype, int instruction_set) {
    Array query(p.batch, p.heads, p.queries, p.dim, dtype), key(p.batch, p.kv_heads, p.keys, p.dim, dtype);
    Array value(p.batch, p.kv_heads, p.keys, p.dim_v, dtype), output(p.batch, p.heads, p.queries, p.dim_v, dtype);
    Array mask(p.batch, 1, p.queries, p.keys, p.bool_mask ? HEADSCOPE_BOOL : HEADSCOPE_FLOAT32);
    Array fill(1, p.heads, 1, p.dim_v, HEADSCOPE_FLOAT32), gate(1, 1, p.batch, p.heads, HEADSCOPE_FLOAT32);
    if (p.additive_mask) {
        for (int64_t i = 0; i < p.batch * p.queries * p.keys; i += 3) mask.set(i, -INF);
    }
    for (int64_t i = 0; i < p.batch * p.heads; i += 3) gate.set(i, static_cast<double>(i % 2));
    const int64_t rows = p.batch * p.heads * p.queries;
    std::vector<float> entropy(static_cast<size_t>(rows)), logsumexp(entropy), max_logit(entropy), max_prob(entropy);
    headscope_attention call = {};
    call.batch = p.batch, call.heads = p.heads, call.kv_heads = p.kv_heads;
    call.queries = p.queries, call.keys = p.keys, call.dim = p.dim, call.dim_v = p.dim_v;
    call.query = query.tensor, call.key = key.tensor, call.value = value.tensor, call.output = output.tensor;
    if (p.bool_mask || p.additive_mask) call.mask = mask.tensor;
    if (p.fill) call.fill = fill.tensor;
    if (p.gate) {
        call.gate = static_cast<const float*>(gate.tensor.data);
        call.gate_strides[0] = p.heads;
        call.gate_strides[1] = 1;
    }
    call.scale = 0.7;
    call.is_causal = p.is_causal;
    call.entropy = entropy.data(), call.logsumexp = logsumexp.data();
    call.max_logit = max_logit.data(), call.max_prob = max_prob.data();
    call.threads = p.threads;
    call.instruction_set = instruction_set;
    const int status = headscope_attention_forward(&call);
    if (status != HEADSCOPE_OK) {
        printf("%s\n", headscope_status_message(status));
        ++failures;
        return;
    }
    std::vector<double> logits(static_cast<size_t>(p.keys));
    for (int64_t index = 0; index < rows; ++index) {
        const int64_t b = index / (p.heads * p.queries), h = index / p.queries % p.heads, i = index % p.queries;
        const int64_t kv = h / (p.heads / p.kv_heads);
        double maximum = -INF;
        for (int64_t j = 0; j < p.keys; ++j) {
            double logit = 0.0;
            for (int64_t d = 0; d < p.dim; ++d) logit += 0.7 * query.get(b, h, i, d) * key.get(b, kv, j, d);
            if (p.additive_mask) logit += mask.get(b, 0, i, j);
            if (p.bool_mask && mask.get(b, 0, i, j) == 0.0) logit = -INF;
            if (p.is_causal && j > i) logit = -INF;
            logits[static_cast<size_t>(j)] = logit;
            maximum = fmax(maximum, logit);
        }
        const bool dead = maximum == -INF;
        double sum = 0.0, weighted = 0.0;
        for (double& logit : logits) {
            const double power = dead ? 0.0 : exp(logit - maximum);
            sum += power;
            if (power > 0.0) weighted += power * (logit - maximum);
            logit = power;
        }
        const size_t at = static_cast<size_t>(index);
        const double expected[] = {dead ? 0.0 : log(sum) - weighted / sum, dead ? -INF : maximum + log(sum), maximum,
                                   dead ? 0.0 : 1.0 / sum};
        const float got[] = {entropy[at], logsumexp[at], max_logit[at], max_prob[at]};
        const char* const names[] = {"entropy", "logsumexp", "max_logit", "max_prob"};
        for (int s = 0; s < 4; ++s) {
            if (differs(static_cast<double>(got[s]), expected[s], 2e-5)) {
                fail(names[s], p, instruction_set, static_cast<double>(got[s]), expected[s]);
            }
        }
        const double g = p.gate ? gate.get(0, 0, b, h) : 1.0;
        for (int64_t c = 0; c < p.dim_v; ++c) {
            double attention = 0.0;
            for (int64_t j = 0; j < p.keys; ++j) attention += logits[static_cast<size_t>(j)] * value.get(b, kv, j, c);
            attention = dead ? 0.0 : attention / sum;
            const double wanted = g * attention + (1.0 - g) * (p.fill ? fill.get(0, h, 0, c) : 0.0);
            const double tolerance = dtype == HEADSCOPE_FLOAT32 ? 4e-6 : 8e-3;
            if (differs(output.get(b, h, i, c), wanted, tolerance)) {
                fail("output", p, instruction_set, output.get(b, h, i, c), wanted);
            }
        }
    }
}

}  // namespace

int main() {
    const Problem problems[] = {
        // batch, heads, kv, queries, keys, dim, dim_v, causal, bool, additive, gate, fill, threads
        {1, 1, 1, 1, 1, 1, 1, false, false, false, false, false, 1},
        {2, 4, 2, 37, 77, 40, 40, false, false, false, false, false, 3},
        {1, 2, 1, 65, 529, 17, 33, true, false, false, true, true, 2},
        {2, 3, 3, 70, 63, 12, 20, false, true, false, true, false, 2},
        {1, 3, 1, 63, 600, 8, 5, false, false, true, true, true, 1},
        {1, 2, 2, 9, 1030, 80, 160, false, false, false, false, false, 1},
        {1, 1, 1, 600, 20, 4, 4, true, false, false, false, false, 4},
        {1, 2, 2, 5, 0, 8, 8, false, false, false, true, true, 1},
        {1, 2, 2, 0, 5, 8, 8, false, false, false, false, false, 2},
        {0, 2, 2, 5, 5, 8, 8, true, false, false, false, false, 1},
        {1, 2, 2, 5, 5, 0, 8, false, false, false, false, false, 1},
        {1, 2, 2, 5, 5, 8, 0, false, false, false, true, true, 1},
    };
    int sets = 0;
    for (int instruction_set = HEADSCOPE_BASELINE; instruction_set <= HEADSCOPE_AVX512; ++instruction_set) {
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
