// Rows of tensors: where they are, their products, and sums stored as such.
#ifndef HEADSCOPE_KERNEL_BACKWARD_ROWS_H
#define HEADSCOPE_KERNEL_BACKWARD_ROWS_H

#include "../pack.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

// Rows of channels of one head, some elements apart.
struct HeadRows {
    char* data;
    int64_t row_stride, stride;
    int64_t dtype;

    template <typename Element>
    HEADSCOPE_INLINE Element* row(int64_t index) const {
        return reinterpret_cast<Element*>(data) + index * row_stride;
    }
};

HEADSCOPE_INLINE int64_t bytes_of(int64_t dtype) {
    return dtype == HEADSCOPE_FLOAT64 ? 8 : dtype == HEADSCOPE_FLOAT32 ? 4 : 2;
}

// The rows of a head from `row` on.
HEADSCOPE_INLINE HeadRows rows_of(const headscope_tensor& tensor, int64_t sample, int64_t head, int64_t row) {
    const int64_t* strides = tensor.strides;
    const int64_t offset = sample * strides[0] + head * strides[1] + row * strides[2];
    return {static_cast<char*>(tensor.data) + offset * bytes_of(tensor.dtype), strides[2], strides[3], tensor.dtype};
}

// One of a stack's tensors.
HEADSCOPE_INLINE headscope_tensor tensor_of(const headscope_stack& stack, int64_t index) {
    headscope_tensor tensor;
    tensor.data =
        stack.data ? static_cast<char*>(stack.data) + index * stack.strides[0] * bytes_of(stack.dtype) : nullptr;
    for (int d = 0; d < 4; ++d) tensor.strides[d] = stack.strides[d + 1];
    tensor.dtype = stack.dtype;
    return tensor;
}

// sum_c a_c * b_c of one row of each, still in lanes.
template <typename A, typename B>
HEADSCOPE_INLINE Floats row_products(const A* a, int64_t a_stride, const B* b, int64_t b_stride, int64_t dim) {
    Floats sum = broadcast(0.0f);
    for (int64_t c = 0; c < dim; c += LANES) {
        const int64_t count = smaller(LANES, dim - c);
        sum = multiply_add(gather_as_floats(a + c * a_stride, a_stride, count),
                           gather_as_floats(b + c * b_stride, b_stride, count), sum);
    }
    return sum;
}

// sums[r] = sum_c a[r][c] * b[r][c], of rows of these types. Lanes are summed of several rows at a time.
template <typename A, typename B>
void sum_typed_products(const HeadRows& a, const HeadRows& b, int64_t rows, int64_t dim, float* sums) {
    int64_t r = 0;
#if defined(__AVX512F__)
    for (; r + LANES <= rows; r += LANES) {
        Floats parts[LANES];
        for (int64_t i = 0; i < LANES; ++i) {
            parts[i] = row_products(a.row<A>(r + i), a.stride, b.row<B>(r + i), b.stride, dim);
        }
        sum_of_each(parts, sums + r);
    }
#endif
    // the same bits: sum_of_lanes adds in the order of sum_of_each
    for (; r < rows; ++r) sums[r] = sum_of_lanes(row_products(a.row<A>(r), a.stride, b.row<B>(r), b.stride, dim));
}

// The same of any rows, a's of query's type.
inline void sum_products(const HeadRows& a, const HeadRows& b, int64_t rows, int64_t dim, float* sums) {
    if (dim == 0) {
        for (int64_t r = 0; r < rows; ++r) sums[r] = 0.0f;
        return;
    }
    with_input_element(a.dtype, [&](auto element) {
        using A = decltype(element);
        switch (b.dtype) {
            case HEADSCOPE_FLOAT32:
                return sum_typed_products<A, float>(a, b, rows, dim, sums);
            case HEADSCOPE_BFLOAT16:
                return sum_typed_products<A, BFloat16>(a, b, rows, dim, sums);
            case HEADSCOPE_FLOAT16:
                return sum_typed_products<A, Float16>(a, b, rows, dim, sums);
            default:
                return sum_typed_products<A, double>(a, b, rows, dim, sums);
        }
    });
}

// Stores rows of sums, `stride` apart (null: zeros).
inline void store_rows(const HeadRows& to, int64_t rows, int64_t dim, const float* sums, int64_t stride) {
    with_element(to.dtype, [&](auto element) {
        for (int64_t r = 0; r < rows; ++r, sums += sums ? stride : 0) {
            auto* place = to.row<decltype(element)>(r);
            for (int64_t c = 0; c < dim; c += LANES) {
                const int64_t count = smaller(LANES, dim - c);
                const Floats x = !sums ? broadcast(0.0f) : count == LANES ? load(sums + c) : load_some(sums + c, count);
                scatter_as(place + c * to.stride, to.stride, x, count);
            }
        }
    });
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
