// What the driver's files share: problems, tensors whose buffers are exactly as large as they are, and the formula's
// probabilities in double.
#ifndef HEADSCOPE_TESTS_PROBLEM_H
#define HEADSCOPE_TESTS_PROBLEM_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include <array>
#include <memory>
#include <vector>

#include "headscope_cpu.h"

constexpr double INF = INFINITY;

// From -1 to 1, the same numbers everywhere.
double random_number();

struct Problem {
    int64_t batch, heads, kv_heads, queries, keys, dim, dim_v;
    bool is_causal, bool_mask, additive_mask, gate, fill, edits;
    int64_t threads;
    double opposed = 0.0;  // where not 0, all queries are this and all keys minus this: logits far below the padding's
};

using Shape = std::array<int64_t, 5>;

// CONTIGUOUS, or SCATTERED: another order of dimensions, tokens backwards, and something between any two numbers.
enum class Layout { CONTIGUOUS, SCATTERED };

// A tensor of up to five dimensions, of random numbers. It lies alone on the heap in a buffer that ends where it ends,
// so that a sanitizer finds one element too far. bfloat16 numbers are chosen exact: all dtypes have the same values.
class Array {
public:
    Array(const Shape& shape, int64_t dtype, Layout layout = Layout::CONTIGUOUS);

    int64_t count() const { return count_; }
    // By index in the order of the shape, whatever the layout.
    void set(int64_t index, double x);
    void fill(double x);
    double get(const Shape& position) const;
    double get(int64_t b, int64_t c, int64_t d, int64_t e) const { return get({0, b, c, d, e}); }
    std::vector<double> values() const;
    // Whether the gaps of a scattered tensor are as they were.
    bool gaps_are_whole() const;

    headscope_tensor tensor() const;
    headscope_edit edit() const;
    headscope_stack stack() const;

private:
    Shape shape_, strides_;  // in elements; 0 for a size of 1
    int64_t dtype_, count_, width_, first_ = 0;
    size_t bytes_;
    std::unique_ptr<char[]> data_;

    Shape position_of(int64_t index) const;
    char* address_of(const Shape& position) const;
};

// A problem's tensors, the same each time for the same dtype.
struct Inputs {
    Inputs(const Problem& problem, int64_t dtype, Layout layout = Layout::CONTIGUOUS);

    Problem problem;
    Array query, key, value, mask, fill, gate;
    Array temperature, bias, key_scale;
    std::vector<double> queries, keys, values;  // the first three, contiguous

    // The call, without results and statistics.
    headscope_attention call(int instruction_set) const;
    int64_t rows() const { return problem.batch * problem.heads * problem.queries; }
    double gate_of(int64_t batch, int64_t head) const { return problem.gate ? gate.get(0, batch, head, 0) : 1.0; }
    double scale_of(int64_t head) const;
    const double* query_of(int64_t batch, int64_t head, int64_t row) const {
        return queries.data() + ((batch * problem.heads + head) * problem.queries + row) * problem.dim;
    }
    const double* key_of(int64_t batch, int64_t kv_head, int64_t token) const {
        return keys.data() + ((batch * problem.kv_heads + kv_head) * problem.keys + token) * problem.dim;
    }
    const double* value_of(int64_t batch, int64_t kv_head, int64_t token) const {
        return values.data() + ((batch * problem.kv_heads + kv_head) * problem.keys + token) * problem.dim_v;
    }
};

constexpr double SCALE = 0.7;

// One row's probabilities, as the formula has them.
struct Row {
    std::vector<double> powers;  // exp(logit - maximum), 0 where not seen
    double maximum, sum;         // -inf and 0 where no key is seen
    int64_t batch, head, kv_head, query;

    double share() const { return sum > 0.0 ? 1.0 / sum : 0.0; }
};

// Row `index` of [batch, heads, queries].
Row row_of(const Inputs& inputs, int64_t index);

template <typename Function>
void for_each_row(const Inputs& inputs, const Function& function) {
    for (int64_t index = 0; index < inputs.rows(); ++index) function(row_of(inputs, index));
}

bool differs(double got, double expected, double tolerance);

// How many checks have failed, and one more of them.
extern int failures;
void fail(const char* what, const Problem& problem, int instruction_set, double got, double expected);
void fail(const char* what);

// Every result of the forward against the formula.
void check_forward(const Problem& problem, int64_t dtype, int instruction_set);

// Every gradient from every cotangent against the formula.
void check_backward(const Problem& problem, int64_t dtype, int instruction_set);

// What a backward refuses, with its status; nothing is written.
void check_refusals();

#endif
