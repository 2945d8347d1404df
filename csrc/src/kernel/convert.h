// Element types and their conversions to and from float32.
#ifndef HEADSCOPE_KERNEL_CONVERT_H
#define HEADSCOPE_KERNEL_CONVERT_H

#include "headscope_cpu.h"
#include "simd.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

HEADSCOPE_INLINE float to_float(float x) { return x; }
HEADSCOPE_INLINE float to_float(double x) { return static_cast<float>(x); }
HEADSCOPE_INLINE float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
HEADSCOPE_INLINE float to_float(Float16 x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t exponent = x.bits & 0x7c00u;
    uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
    if (exponent == 0x7c00u) {
        magnitude += 0x70000000u;  // infinity and NaN keep the largest exponent
    } else if (exponent != 0) {
        magnitude += 0x38000000u;  // from a bias of 15 to one of 127
    } else {
        // subnormal: give it the exponent of 2^-14 with its leading one, then take that one off again
        magnitude = bit_cast<uint32_t>(bit_cast<float>(magnitude + 0x38800000u) - bit_cast<float>(0x38800000u));
    }
    return bit_cast<float>(magnitude | sign);
#endif
}

// to the nearest, ties to even
template <typename Element>
HEADSCOPE_INLINE Element from_float(float x);

template <>
HEADSCOPE_INLINE float from_float<float>(float x) {
    return x;
}

template <>
HEADSCOPE_INLINE double from_float<double>(float x) {
    return static_cast<double>(x);
}

template <>
HEADSCOPE_INLINE BFloat16 from_float<BFloat16>(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    // a carry could turn a NaN into infinity
    return BFloat16{static_cast<uint16_t>(x == x ? rounded : 0x7fc0u)};
}

template <>
HEADSCOPE_INLINE Float16 from_float<Float16>(float x) {
#if defined(__F16C__)
    return Float16{static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {
        half = 0x7c00u;  // 65520 and above round to infinity
    } else if (magnitude < 0x38800000u) {
        // below 2^-14: the last bit of 0.5f is float16's smallest subnormal, so this addition rounds to it
        half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    return Float16{static_cast<uint16_t>(half | sign)};
#endif
}

// Calls function(Element{}) with the element type of a dtype; false if it isn't a floating one.
template <typename Function>
bool with_element(int64_t dtype, const Function& function) {
    switch (dtype) {
        case HEADSCOPE_FLOAT32:
            function(float{});
            return true;
        case HEADSCOPE_BFLOAT16:
            function(BFloat16{});
            return true;
        case HEADSCOPE_FLOAT16:
            function(Float16{});
            return true;
        case HEADSCOPE_FLOAT64:
            function(double{});
            return true;
        default:
            return false;
    }
}

// The address of element (a, b, c, 0) of a tensor.
template <typename Element>
HEADSCOPE_INLINE Element* at(const headscope_tensor& tensor, int64_t a, int64_t b, int64_t c) {
    const int64_t* strides = tensor.strides;
    return static_cast<Element*>(tensor.data) + a * strides[0] + b * strides[1] + c * strides[2];
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
