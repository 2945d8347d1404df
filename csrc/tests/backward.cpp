// Every gradient from every cotangent against the formula in double.
//
// A sum may err by a part of the sum of its terms' sizes, which is summed up beside it: nothing hides behind what
// cancels.
#include "problem.h"

namespace {

constexpr int64_t COTANGENTS = 3;

// Which cotangents a call has: a sum of these.
constexpr int OUTPUT = 1, ROW_CONSTANTS = 2, ENTROPY = 4, GROUPS = 8, ALL_SOURCES = 15;

enum Name { QUERY, KEY, VALUE, GATE, TEMPERATURE, KEY_BIAS, KEY_SCALE, MASK, NAMES };

const char* const NAMED[NAMES] = {"gradient of query",     "gradient of key",         "gradient of value",
                                  "gradient of gate",      "gradient of temperature", "gradient of key_bias",
                                  "gradient of key_scale", "gradient of mask"};

// Groups of keys, ids of which some belong to none.
struct Groups {
    int64_t count, first;
    Shape shape;  // of ids; 1 where they repeat
    std::vector<int32_t> ids;
    Array cotangent;

    Groups(const Problem& p, int64_t count_, int64_t first_, bool of_each_head)
        : count(count_),
          first(first_),
          shape{of_each_head ? p.batch : 1, of_each_head ? p.heads : 1, p.keys, 1, 1},
          cotangent({COTANGENTS, p.batch, p.heads, p.queries, count_}, HEADSCOPE_FLOAT32) {
        for (int64_t i = 0; i < shape[0] * shape[1] * p.keys; ++i) {
            ids.push_back(static_cast<int32_t>(i * 7 % (first + count + 3)) - 1);
        }
    }

    int64_t stride(size_t dimension) const {
        if (shape[dimension] == 1) return 0;
        return dimension == 0 ? shape[1] * shape[2] : dimension == 1 ? shape[2] : 1;
    }
    int64_t group_of(int64_t b, int64_t h, int64_t j) const {
        return ids[static_cast<size_t>(b * stride(0) + h * stride(1) + j * stride(2))] - first;
    }
    headscope_group_cotangent argument() const {
        const headscope_stack all = cotangent.stack();
        return {static_cast<const float*>(all.data), count, first, ids.data(), {stride(0), stride(1), stride(2)}};
    }
};

struct Cotangents {
    Array output, row_constants, entropy;
    Groups groups[2];

    Cotangents(const Problem& p, int64_t dtype, Layout layout)
        : output({COTANGENTS, p.batch, p.heads, p.queries, p.dim_v}, dtype, layout),
          row_constants({COTANGENTS, p.batch, p.heads, p.queries, 1}, HEADSCOPE_FLOAT32),
          entropy({COTANGENTS, p.batch, p.heads, p.queries, 1}, HEADSCOPE_FLOAT32),
          groups{{p, 5, 0, true}, {p, 3, 2, false}} {}
};

// What the forward saves.
struct Saved {
    Array output, attention, row_max, log2_sum;
    bool done;

    Saved(const Inputs& inputs, int64_t dtype, Layout layout, int instruction_set)
        : output(rows_of(inputs, inputs.problem.dim_v), dtype, layout),
          attention(rows_of(inputs, inputs.problem.dim_v), dtype, layout),
          row_max(rows_of(inputs, 1), HEADSCOPE_FLOAT32),
          log2_sum(rows_of(inputs, 1), HEADSCOPE_FLOAT32) {
        const headscope_attention call = call_of(inputs, instruction_set);
        const int status = headscope_attention_forward(&call);
        done = status == HEADSCOPE_OK;
        if (!done) fail(headscope_status_message(status));
    }

    static Shape rows_of(const Inputs& inputs, int64_t width) {
        const Problem& p = inputs.problem;
        return {1, p.batch, p.heads, p.queries, width};
    }
    headscope_attention call_of(const Inputs& inputs, int instruction_set) const {
        headscope_attention call = inputs.call(instruction_set);
        call.output = output.tensor();
        if (inputs.problem.gate) call.attention = attention.tensor();
        call.row_max = static_cast<float*>(row_max.tensor().data);
        call.log2_sum = static_cast<float*>(log2_sum.tensor().data);
        return call;
    }
    // What the backward is given: the output itself where no gate is between it and the attention.
    headscope_attention for_backward(const Inputs& inputs, int instruction_set) const {
        headscope_attention call = call_of(inputs, instruction_set);
        call.attention = (inputs.problem.gate ? attention : output).tensor();
        return call;
    }
    const Array& attended(const Inputs& inputs) const { return inputs.problem.gate ? attention : output; }
};

// A sum and the sum of its terms' sizes, of each element.
struct Sums {
    std::vector<double> values, sizes;

    explicit Sums(int64_t count) : values(static_cast<size_t>(count)), sizes(static_cast<size_t>(count)) {}
    void add(int64_t index, double value, double size) {
        values[static_cast<size_t>(index)] += value;
        sizes[static_cast<size_t>(index)] += size;
    }
};

Shape shape_of(const Problem& p, int name, const int64_t* mask_sizes) {
    switch (name) {
        case QUERY:
            return {COTANGENTS, p.batch, p.heads, p.queries, p.dim};
        case KEY:
            return {COTANGENTS, p.batch, p.kv_heads, p.keys, p.dim};
        case VALUE:
            return {COTANGENTS, p.batch, p.kv_heads, p.keys, p.dim_v};
        case GATE:
        case TEMPERATURE:
            return {COTANGENTS, p.batch, p.heads, 1, 1};
        case KEY_BIAS:
        case KEY_SCALE:
            return {COTANGENTS, p.batch, p.heads, p.keys, 1};
        default:
            return {COTANGENTS, mask_sizes[0], mask_sizes[1], mask_sizes[2], mask_sizes[3]};
    }
}

int64_t count_of(const Shape& shape) { return shape[0] * shape[1] * shape[2] * shape[3] * shape[4]; }

// A value, and how large it may have been before something cancelled.
struct Term {
    double value, size;
};

Term dot(const std::vector<double>& a, const double* b) {
    Term term = {0.0, 0.0};
    for (size_t d = 0; d < a.size(); ++d) {
        term.value += a[d] * b[d];
        term.size += fabs(a[d] * b[d]);
    }
    return term;
}

// Every gradient as the header defines them; the mask's is that of each logit.
struct Formula {
    const Inputs& inputs;
    const Cotangents& cotangents;
    const Array& attention;
    int sources;
    std::vector<Sums> sums;
    double largest_logit = 0.0;

    Formula(const Inputs& inputs_, const Cotangents& cotangents_, const Array& attention_, int sources_)
        : inputs(inputs_), cotangents(cotangents_), attention(attention_), sources(sources_) {
        const Problem& p = inputs.problem;
        const int64_t whole[] = {p.batch, p.heads, p.queries, p.keys};
        for (int name = 0; name < NAMES; ++name) sums.emplace_back(count_of(shape_of(p, name, whole)));
        for_each_row(inputs, [&](const Row& row) {
            if (row.maximum != -INF) largest_logit = fmax(largest_logit, fabs(row.maximum));
            for (int64_t c = 0; c < COTANGENTS; ++c) add_row(row, c);
        });
    }

    void add_row(const Row& row, int64_t c) {
        const Problem& p = inputs.problem;
        const int64_t b = row.batch, h = row.head, kv = row.kv_head, i = row.query;
        const int64_t head = (c * p.batch + b) * p.heads + h;
        const double gate = inputs.gate_of(b, h);
        std::vector<double> cotangent, attended, filled;
        for (int64_t d = 0; d < p.dim_v && (sources & OUTPUT); ++d) {
            cotangent.push_back(cotangents.output.get({c, b, h, i, d}));
            attended.push_back(attention.get(b, h, i, d));
            filled.push_back(p.fill ? inputs.fill.get(0, h, 0, d) : 0.0);
        }
        const Term along = dot(cotangent, attended.data()), along_fill = dot(cotangent, filled.data());
        sums[GATE].add(head, along.value - along_fill.value, along.size + along_fill.size);
        Term constant = {gate * along.value, fabs(gate) * along.size};
        if (sources & ROW_CONSTANTS) {
            const double given = cotangents.row_constants.get({c, b, h, i, 0});
            constant.value += given;
            constant.size += fabs(given);
        }
        for (int64_t j = 0; j < p.keys; ++j) {
            const double probability = row.powers[static_cast<size_t>(j)] * row.share();
            if (probability == 0.0) continue;
            const double key_scale = p.edits ? inputs.key_scale.get(0, b, h, j) : 1.0;
            const Term product = dot(cotangent, inputs.value_of(b, kv, j));
            const Term statistics = of_statistics(row, c, j, log(probability));
            const double gradient = key_scale * gate * product.value + statistics.value - constant.value;
            const double size = fabs(key_scale * gate) * product.size + statistics.size + constant.size;
            const Term of_logit = {probability * gradient, probability * size};
            add_factors(row, c, j, of_logit);
            const double weight = probability * key_scale * gate;
            const int64_t first = (((c * p.batch + b) * p.kv_heads + kv) * p.keys + j) * p.dim_v;
            for (size_t d = 0; d < cotangent.size(); ++d) {
                const double added = weight * cotangent[d];
                sums[VALUE].add(first + static_cast<int64_t>(d), added, fabs(added));
            }
            sums[KEY_BIAS].add(head * p.keys + j, of_logit.value, of_logit.size);
            sums[KEY_SCALE].add(head * p.keys + j, probability * gate * product.value,
                                probability * fabs(gate) * product.size);
            sums[MASK].add((head * p.queries + i) * p.keys + j, of_logit.value, of_logit.size);
        }
    }

    // What the statistics' cotangents come to for one probability.
    Term of_statistics(const Row& row, int64_t c, int64_t j, double logarithm) const {
        const int64_t b = row.batch, h = row.head, i = row.query;
        const double entropy = sources & ENTROPY ? cotangents.entropy.get({c, b, h, i, 0}) : 0.0;
        // a logarithm errs as its logit does
        Term term = {-logarithm * entropy, (1.0 - logarithm) * fabs(entropy)};
        for (const Groups& groups : cotangents.groups) {
            const int64_t group = groups.group_of(b, h, j);
            if (!(sources & GROUPS) || group < 0 || group >= groups.count) continue;
            const double given = groups.cotangent.get({c, b, h, i, group});
            term.value += given;
            term.size += fabs(given);
        }
        return term;
    }

    // A logit's gradient, to those of its query, key and temperature.
    void add_factors(const Row& row, int64_t c, int64_t j, const Term& of_logit) {
        const Problem& p = inputs.problem;
        const int64_t b = row.batch, h = row.head, kv = row.kv_head, i = row.query;
        const int64_t head = (c * p.batch + b) * p.heads + h;
        const int64_t to_query = (head * p.queries + i) * p.dim;
        const int64_t to_key = (((c * p.batch + b) * p.kv_heads + kv) * p.keys + j) * p.dim;
        const double *query = inputs.query_of(b, h, i), *key = inputs.key_of(b, kv, j);
        const double scale = inputs.scale_of(h);
        const double temperature = p.edits ? inputs.temperature.get(0, 0, h, 0) : 1.0;
        for (int64_t d = 0; d < p.dim; ++d) {
            const double by_query = scale * query[d], by_key = scale * key[d];
            sums[QUERY].add(to_query + d, by_key * of_logit.value, fabs(by_key) * of_logit.size);
            sums[KEY].add(to_key + d, by_query * of_logit.value, fabs(by_query) * of_logit.size);
            const double by = -by_query * key[d] / temperature;
            sums[TEMPERATURE].add(head, by * of_logit.value, fabs(by) * of_logit.size);
        }
    }

    // A gradient in its own shape: the mask's is summed where a size is 1.
    Sums summed(int name, const Shape& shape) const {
        const Sums& all = sums[static_cast<size_t>(name)];
        if (name != MASK) return all;
        const Problem& p = inputs.problem;
        const Shape whole = {COTANGENTS, p.batch, p.heads, p.queries, p.keys};
        Sums result(count_of(shape));
        for (int64_t index = 0; index < count_of(whole); ++index) {
            int64_t rest = index, to = 0, step = 1;
            for (size_t d = 5; d-- > 0;) {
                if (shape[d] != 1) to += rest % whole[d] * step;
                step *= shape[d];
                rest /= whole[d];
            }
            result.add(to, all.values[static_cast<size_t>(index)], all.sizes[static_cast<size_t>(index)]);
        }
        return result;
    }
};

// What a call is asked for.
struct Request {
    int sources = ALL_SOURCES;
    int64_t cotangents = COTANGENTS;
    int64_t threads = 1;
    bool wanted[NAMES] = {};
    int64_t mask_sizes[4] = {};
};

// Gradients of a call, in tensors that held something else.
class Backward {
public:
    Backward(const Inputs& inputs, const Cotangents& cotangents, const Saved& saved, int64_t dtype, Layout layout,
             int instruction_set, const Request& request)
        : problem_(inputs.problem), instruction_set_(instruction_set), dtype_(dtype), request_(request) {
        headscope_attention call = saved.for_backward(inputs, instruction_set);
        call.threads = request.threads;
        headscope_gradients gradients = {};
        gradients.cotangents = request.cotangents;
        if (request.sources & OUTPUT) gradients.output = cotangents.output.stack();
        if (request.sources & ROW_CONSTANTS) gradients.row_constants = floats(cotangents.row_constants);
        if (request.sources & ENTROPY) gradients.entropy = floats(cotangents.entropy);
        if (request.sources & GROUPS) {
            gradients.group_count = 2;
            for (int i = 0; i < 2; ++i) gradients.groups[i] = cotangents.groups[i].argument();
        }
        for (int i = 0; i < 4; ++i) gradients.mask_sizes[i] = request.mask_sizes[i];
        for (int name = 0; name < NAMES; ++name) {
            const bool strided = name == QUERY || name == KEY || name == VALUE;
            shapes_.push_back(shape_of(problem_, name, request.mask_sizes));
            shapes_.back()[0] = request.wanted[name] ? request.cotangents : 0;
            results_.emplace_back(shapes_.back(), strided ? dtype : static_cast<int64_t>(HEADSCOPE_FLOAT32),
                                  strided ? layout : Layout::CONTIGUOUS);
            results_.back().fill(NAN);
        }
        const bool* wanted = request.wanted;
        if (wanted[QUERY]) gradients.query = results_[QUERY].stack();
        if (wanted[KEY]) gradients.key = results_[KEY].stack();
        if (wanted[VALUE]) gradients.value = results_[VALUE].stack();
        float** const of_floats[] = {&gradients.gate, &gradients.temperature, &gradients.key_bias, &gradients.key_scale,
                                     &gradients.mask};
        for (int name = GATE; name < NAMES; ++name) {
            if (wanted[name]) *of_floats[name - GATE] = floats(results_[static_cast<size_t>(name)]);
        }
        const int status = headscope_attention_backward(&call, &gradients);
        if (status != HEADSCOPE_OK) fail(headscope_status_message(status));
    }

    void check(const Formula& formula) const {
        const Problem& p = problem_;
        // p errs as its logit does, by four units of the largest, or of one; both are in what is summed
        const double terms = static_cast<double>(p.keys + p.queries * p.heads / p.kv_heads + p.dim + p.dim_v);
        double part = ldexp(32.0 + 4.0 * sqrt(terms) + 8.0 * formula.largest_logit, -24);
        const bool is_low = dtype_ == HEADSCOPE_BFLOAT16;
        // both factors of products of bfloat16 are rounded
        if (is_low && instruction_set_ == HEADSCOPE_AVX512_BF16) part += ldexp(3.0, -9);
        for (int name = 0; name < NAMES; ++name) {
            const Array& result = results_[static_cast<size_t>(name)];
            const std::vector<double> got = result.values();
            if (!result.gaps_are_whole()) fail("something is written between a gradient's elements");
            if (!request_.wanted[name]) continue;
            Shape shape = shapes_[static_cast<size_t>(name)];
            shape[0] = COTANGENTS;
            const Sums expected = formula.summed(name, shape);
            const bool rounded = is_low && (name == QUERY || name == KEY || name == VALUE);
            for (size_t i = 0; i < got.size(); ++i) {
                const double size = expected.sizes[i];
                const double tolerance = part * size + (rounded ? ldexp(fabs(expected.values[i]), -8) : 0.0) + 1e-35;
                if (!differs(got[i], expected.values[i], tolerance)) continue;
                fail(NAMED[name], p, instruction_set_, got[i], expected.values[i]);
            }
        }
    }

    bool equals(const Backward& other) const {
        for (size_t name = 0; name < NAMES; ++name) {
            const std::vector<double> ours = results_[name].values(), theirs = other.results_[name].values();
            for (size_t i = 0; i < ours.size(); ++i) {
                if (ours[i] != theirs[i] && !(isnan(ours[i]) && isnan(theirs[i]))) return false;
            }
        }
        return true;
    }

private:
    Problem problem_;
    int instruction_set_;
    int64_t dtype_;
    Request request_;
    std::vector<Shape> shapes_;
    std::vector<Array> results_;

    static float* floats(const Array& array) { return static_cast<float*>(array.stack().data); }
};

void check_saved(const Inputs& inputs, const Saved& saved, int instruction_set) {
    for_each_row(inputs, [&](const Row& row) {
        const bool dead = row.maximum == -INF;
        const double largest = saved.row_max.get(row.batch, row.head, row.query, 0);
        const double sum = saved.log2_sum.get(row.batch, row.head, row.query, 0);
        const double logit = dead ? 0.0 : row.maximum, wanted = dead ? INF : log2(row.sum);
        const double tolerance = 2e-5 + ldexp(fabs(logit), -22);
        if (differs(largest, logit, tolerance)) fail("row_max", inputs.problem, instruction_set, largest, logit);
        if (differs(sum, wanted, tolerance)) fail("log2_sum", inputs.problem, instruction_set, sum, wanted);
    });
}

// All gradients that there are; with every single one, and every single source, where `apart`.
void check_layout(const Problem& p, int64_t dtype, Layout layout, int instruction_set, bool apart) {
    const Inputs inputs(p, dtype, layout);
    const Cotangents cotangents(p, dtype, layout);
    const Saved saved(inputs, dtype, layout, instruction_set);
    if (!saved.done) return;
    check_saved(inputs, saved, instruction_set);
    const Formula formula(inputs, cotangents, saved.attended(inputs), ALL_SOURCES);
    Request everything;
    const bool there[NAMES] = {true, true, true, p.gate, p.edits, p.edits, p.edits, p.additive_mask};
    for (int name = 0; name < NAMES; ++name) everything.wanted[name] = there[name];
    const int64_t whole[] = {p.batch, p.heads, p.queries, p.keys};
    for (int i = 0; i < 4; ++i) everything.mask_sizes[i] = whole[i];
    const auto run = [&](const Request& request) {
        return Backward(inputs, cotangents, saved, dtype, layout, instruction_set, request);
    };
    const Backward first = run(everything);
    first.check(formula);
    Request changed = everything;
    changed.threads = 3;
    if (!run(changed).equals(first)) fail("threads change a gradient", p, instruction_set, 3.0, 1.0);
    changed = everything;
    changed.cotangents = 1;
    run(changed).check(formula);
    if (!apart) return;
    for (int name = 0; name < NAMES; ++name) {
        changed = everything;
        for (int other = 0; other < NAMES; ++other) {
            // the temperature's is found along the queries'
            const bool along = name == TEMPERATURE && other == QUERY;
            changed.wanted[other] = (other == name || along) && there[name];
        }
        run(changed).check(formula);
        for (int summed = 1; name == MASK && there[name] && summed < 16; ++summed) {
            for (int i = 0; i < 4; ++i) changed.mask_sizes[i] = summed >> i & 1 ? 1 : whole[i];
            run(changed).check(formula);
        }
    }
    for (const int sources : {OUTPUT, ROW_CONSTANTS, ENTROPY, GROUPS, ROW_CONSTANTS | ENTROPY}) {
        changed = everything;
        changed.sources = sources;
        run(changed).check(Formula(inputs, cotangents, saved.attended(inputs), sources));
    }
}

}  // namespace

void check_backward(const Problem& problem, int64_t dtype, int instruction_set) {
    // bfloat16 goes ways of its own only where there are dot products of it
    const bool apart = dtype == HEADSCOPE_FLOAT32 || instruction_set == HEADSCOPE_AVX512_BF16;
    check_layout(problem, dtype, Layout::CONTIGUOUS, instruction_set, apart);
    check_layout(problem, dtype, Layout::SCATTERED, instruction_set, false);
}
