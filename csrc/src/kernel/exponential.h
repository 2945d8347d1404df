// 2^x for vectors.
#ifndef HEADSCOPE_KERNEL_EXPONENTIAL_H
#define HEADSCOPE_KERNEL_EXPONENTIAL_H

#include "simd.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

// log2(e), to get from nats to the powers of two below
constexpr float LOG2_E = 1.44269504f;

// Arguments below this give 0: the result would be subnormal, which is slow and adds nothing to a sum of at least 1.
constexpr float LOWEST_EXPONENT = -126.0f;

// 2^x for x <= 0, relative error below 2^-23; exactly 1 at 0, exactly 0 below -126 (so at -inf too), NaN at NaN.
// `bounded` is x or, where that is lower, -127: finite, so that a product with the result of 0 is 0.
HEADSCOPE_INLINE Floats exp2_of(Floats x, Floats* bounded) {
    // x second: a NaN passes
    const Floats clamped = max_of(broadcast(LOWEST_EXPONENT - 1.0f), x);
    *bounded = clamped;
    const Floats integer = round_to_integer(clamped);
    const Floats fraction = subtract(clamped, integer);
    // minimax in relative error on [-1/2, 1/2] with the constant term fixed at 1: 3.0e-9
    Floats power = broadcast(0x1.416b5cp-13f);
    power = multiply_add(power, fraction, broadcast(0x1.5f0830p-10f));
    power = multiply_add(power, fraction, broadcast(0x1.3b2de0p-7f));
    power = multiply_add(power, fraction, broadcast(0x1.c6af7cp-5f));
    power = multiply_add(power, fraction, broadcast(0x1.ebfbdcp-3f));
    power = multiply_add(power, fraction, broadcast(0x1.62e430p-1f));
    power = multiply_add(power, fraction, broadcast(1.0f));
    return scale_from(x, broadcast(LOWEST_EXPONENT), power, integer);
}

constexpr double LN_2 = 0.6931471805599453;

// ln x for positive, normal x, relative error below 1e-11: once or more per row, where libm's call would show.
HEADSCOPE_INLINE double natural_log(double x) {
    const uint64_t bits = bit_cast<uint64_t>(x);
    // the mantissa in sqrt(1/2)..sqrt(2): 0x3fe6a09e667f3bcd is sqrt(1/2)
    const uint64_t shifted = bits - 0x3fe6a09e667f3bcdu;
    const int64_t exponent = static_cast<int64_t>(shifted) >> 52;
    const double mantissa = bit_cast<double>(bits - (static_cast<uint64_t>(exponent) << 52));
    // 2 artanh((m - 1) / (m + 1))
    const double ratio = (mantissa - 1.0) / (mantissa + 1.0);
    const double square = ratio * ratio;
    double series = 2.0 / 13.0;
    series = series * square + 2.0 / 11.0;
    series = series * square + 2.0 / 9.0;
    series = series * square + 2.0 / 7.0;
    series = series * square + 2.0 / 5.0;
    series = series * square + 2.0 / 3.0;
    series = series * square + 2.0;
    return static_cast<double>(exponent) * LN_2 + series * ratio;
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
