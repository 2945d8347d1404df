#include "problem.h"

#include <stdio.h>
#include <string.h>

namespace {

constexpr char GAP = 0x5a;

int64_t width_of(int64_t dtype) { return dtype == HEADSCOPE_BOOL ? 1 : dtype == HEADSCOPE_FLOAT32 ? 4 : 2; }

}  // namespace

double random_number() {
    static uint64_t state = 88172645463325252u;
    // xorshift
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<double>(state % 2000001) / 1000000.0 - 1.0;
}

Array::Array(const Shape& shape, int64_t dtype, Layout layout)
    : shape_(shape), strides_{}, dtype_(dtype), count_(1), width_(width_of(dtype)) {
    const bool scattered = layout == Layout::SCATTERED;
    // from the innermost dimension outwards
    const int orders[2][5] = {{4, 3, 2, 1, 0}, {3, 1, 4, 2, 0}};
    int64_t step = scattered ? 2 : 1, extent = 1;
    for (const int dimension : orders[scattered]) {
        const int64_t size = shape[static_cast<size_t>(dimension)];
        count_ *= size;
        if (size != 1) strides_[static_cast<size_t>(dimension)] = step;
        extent += (size - 1) * step;
        step *= size;
    }
    if (scattered && count_ > 0) {
        first_ = (shape[3] - 1) * strides_[3];
        strides_[3] = -strides_[3];
    }
    bytes_ = count_ > 0 ? static_cast<size_t>(extent * width_) : 0;
    if (bytes_ == 0) return;
    data_.reset(new char[bytes_]);
    memset(data_.get(), GAP, bytes_);
    for (int64_t i = 0; i < count_; ++i) set(i, random_number());
}

Shape Array::position_of(int64_t index) const {
    Shape position;
    for (size_t d = 5; d-- > 0;) {
        position[d] = index % shape_[d];
        index /= shape_[d];
    }
    return position;
}

char* Array::address_of(const Shape& position) const {
    int64_t offset = first_;
    for (size_t d = 0; d < 5; ++d) offset += position[d] * strides_[d];
    return data_.get() + offset * width_;
}

void Array::set(int64_t index, double x) {
    // eight bits of mantissa
    int exponent = 0;
    const double mantissa = frexp(x, &exponent);
    const float value = static_cast<float>(isfinite(x) ? ldexp(rint(mantissa * 256.0), exponent - 8) : x);
    char* to = address_of(position_of(index));
    uint32_t bits;
    static_assert(sizeof bits == sizeof value, "float is 32 bits");
    memcpy(&bits, &value, sizeof bits);
    const uint16_t upper = static_cast<uint16_t>(bits >> 16);
    if (dtype_ == HEADSCOPE_FLOAT32) memcpy(to, &value, sizeof value);
    if (dtype_ == HEADSCOPE_BFLOAT16) memcpy(to, &upper, sizeof upper);
    if (dtype_ == HEADSCOPE_BOOL) *to = x > -0.4;
}

void Array::fill(double x) {
    for (int64_t i = 0; i < count_; ++i) set(i, x);
}

double Array::get(const Shape& position) const {
    const char* from = address_of(position);
    if (dtype_ == HEADSCOPE_BOOL) return *from;
    float value;
    if (dtype_ == HEADSCOPE_FLOAT32) {
        memcpy(&value, from, sizeof value);
        return static_cast<double>(value);
    }
    uint16_t upper;
    memcpy(&upper, from, sizeof upper);
    const uint32_t bits = static_cast<uint32_t>(upper) << 16;
    memcpy(&value, &bits, sizeof value);
    return static_cast<double>(value);
}

std::vector<double> Array::values() const {
    std::vector<double> all;
    for (int64_t i = 0; i < count_; ++i) all.push_back(get(position_of(i)));
    return all;
}

bool Array::gaps_are_whole() const {
    if (bytes_ == static_cast<size_t>(count_ * width_)) return true;
    std::vector<bool> taken(bytes_, false);
    for (int64_t i = 0; i < count_; ++i) {
        const auto at = address_of(position_of(i)) - data_.get();
        for (int64_t byte = 0; byte < width_; ++byte) taken[static_cast<size_t>(at + byte)] = true;
    }
    for (size_t byte = 0; byte < bytes_; ++byte) {
        if (!taken[byte] && data_[byte] != GAP) return false;
    }
    return true;
}

headscope_tensor Array::tensor() const {
    const headscope_stack all = stack();
    return {all.data, {all.strides[1], all.strides[2], all.strides[3], all.strides[4]}, all.dtype};
}

headscope_edit Array::edit() const {
    const headscope_stack all = stack();
    return {static_cast<const float*>(all.data), {all.strides[2], all.strides[3], all.strides[4]}};
}

headscope_stack Array::stack() const {
    headscope_stack stack = {bytes_ > 0 ? data_.get() + first_ * width_ : nullptr, {}, dtype_};
    for (size_t d = 0; d < 5; ++d) stack.strides[d] = strides_[d];
    return stack;
}

Inputs::Inputs(const Problem& p, int64_t dtype, Layout layout)
    : problem(p),
      query({1, p.batch, p.heads, p.queries, p.dim}, dtype, layout),
      key({1, p.batch, p.kv_heads, p.keys, p.dim}, dtype, layout),
      value({1, p.batch, p.kv_heads, p.keys, p.dim_v}, dtype, layout),
      mask({1, p.batch, 1, p.queries, p.keys}, p.bool_mask ? HEADSCOPE_BOOL : HEADSCOPE_FLOAT32, layout),
      fill({1, 1, p.heads, 1, p.dim_v}, HEADSCOPE_FLOAT32, layout),
      // [batch, heads] and [batch, heads, keys], each behind ones
      gate({1, 1, p.batch, p.heads, 1}, HEADSCOPE_FLOAT32, layout),
      temperature({1, 1, 1, p.heads, 1}, HEADSCOPE_FLOAT32, layout),
      bias({1, 1, p.batch, 1, p.keys}, HEADSCOPE_FLOAT32, layout),
      key_scale({1, 1, p.batch, p.heads, p.keys}, HEADSCOPE_FLOAT32, layout) {
    if (p.additive_mask) {
        for (int64_t i = 0; i < mask.count(); i += 3) mask.set(i, -INF);
    }
    // rows that see nothing: the second and the last of each sample
    for (int64_t i = 0; (p.additive_mask || p.bool_mask) && i < mask.count(); ++i) {
        const int64_t row = i / p.keys % p.queries;
        if (row == 1 || row == p.queries - 1) mask.set(i, -INF);
    }
    if (p.opposed != 0.0) {
        query.fill(p.opposed);
        key.fill(-p.opposed);
    }
    for (int64_t i = 0; i < gate.count(); i += 3) gate.set(i, static_cast<double>(i % 2));
    for (int64_t i = 0; i < p.heads; ++i) temperature.set(i, 0.5 + 0.25 * static_cast<double>(i));
    for (int64_t i = 2; i < bias.count(); i += 5) bias.set(i, -INF);
    queries = query.values(), keys = key.values(), values = value.values();
}

headscope_attention Inputs::call(int instruction_set) const {
    headscope_attention call = {};
    call.batch = problem.batch, call.heads = problem.heads, call.kv_heads = problem.kv_heads;
    call.queries = problem.queries, call.keys = problem.keys, call.dim = problem.dim, call.dim_v = problem.dim_v;
    call.query = query.tensor(), call.key = key.tensor(), call.value = value.tensor();
    if (problem.bool_mask || problem.additive_mask) call.mask = mask.tensor();
    if (problem.fill) call.fill = fill.tensor();
    if (problem.gate) call.gate = gate.edit();
    if (problem.edits) {
        call.temperature = temperature.edit();
        call.key_bias = bias.edit();
        call.key_scale = key_scale.edit();
    }
    call.scale = SCALE;
    call.is_causal = problem.is_causal;
    call.threads = problem.threads;
    call.instruction_set = instruction_set;
    return call;
}

double Inputs::scale_of(int64_t head) const { return SCALE / (problem.edits ? temperature.get(0, 0, head, 0) : 1.0); }

Row row_of(const Inputs& inputs, int64_t index) {
    const Problem& p = inputs.problem;
    Row row = {{}, -INF, 0.0, index / (p.heads * p.queries), index / p.queries % p.heads, 0, index % p.queries};
    row.kv_head = row.head / (p.heads / p.kv_heads);
    const int64_t b = row.batch, i = row.query;
    const double* query = inputs.query_of(b, row.head, i);
    const double scale = inputs.scale_of(row.head);
    for (int64_t j = 0; j < p.keys; ++j) {
        double logit = 0.0;
        const double* key = inputs.key_of(b, row.kv_head, j);
        for (int64_t d = 0; d < p.dim; ++d) logit += scale * query[d] * key[d];
        if (p.edits) logit += inputs.bias.get(0, b, 0, j);
        if (p.additive_mask) logit += inputs.mask.get(b, 0, i, j);
        if (p.bool_mask && inputs.mask.get(b, 0, i, j) == 0.0) logit = -INF;
        if (p.is_causal && j > i) logit = -INF;
        row.powers.push_back(logit);
        row.maximum = fmax(row.maximum, logit);
    }
    for (double& power : row.powers) {
        power = row.maximum == -INF ? 0.0 : exp(power - row.maximum);
        row.sum += power;
    }
    return row;
}

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

void fail(const char* what) {
    if (++failures <= 20) printf("%s\n", what);
}
