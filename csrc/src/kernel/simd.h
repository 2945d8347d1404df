// Vectors of floats, one set of operations per instruction set.
//
// Everything of a kernel lives in a namespace named after its instruction set: the same inline function compiled twice
// under one name would be merged by the linker, and could then run instructions that the machine lacks.
#ifndef HEADSCOPE_KERNEL_SIMD_H
#define HEADSCOPE_KERNEL_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if !defined(HEADSCOPE_TARGET)
#error "define HEADSCOPE_TARGET, the namespace of this instruction set, before including a kernel header"
#endif

#if defined(__GNUC__)
#define HEADSCOPE_INLINE inline __attribute__((always_inline))
#define HEADSCOPE_UNROLL _Pragma("GCC unroll 8")
#else
#define HEADSCOPE_INLINE inline
#define HEADSCOPE_UNROLL
#endif

namespace headscope {
namespace HEADSCOPE_TARGET {

template <typename To, typename From>
HEADSCOPE_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// Shared contract of the operations below:
//   max_of(a, b)            the larger; b where either is NaN
//   keep_from(x, low, y)    y where x >= low or x is NaN, else 0
//   round_to_integer(x)     to the nearest integer, |x| < 2^22
//   sum_of_lanes(x), max_of_lanes(x)   of numbers without NaN, the maximum
//   times_power_of_two(y, n)  y * 2^n for integral n in -126..127; anything at n = -127

#if defined(__AVX512F__)

using Floats = __m512;
constexpr int LANES = 16;
// 32 registers: 16 sums of logits or 24 of outputs, and the operands
constexpr int TILE_ROWS = 8;
constexpr int MAX_VALUE_VECTORS = 3;

HEADSCOPE_INLINE Floats broadcast(float x) { return _mm512_set1_ps(x); }
HEADSCOPE_INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
HEADSCOPE_INLINE void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
HEADSCOPE_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
HEADSCOPE_INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
HEADSCOPE_INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
HEADSCOPE_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
HEADSCOPE_INLINE Floats max_of(Floats a, Floats b) { return _mm512_max_ps(a, b); }
HEADSCOPE_INLINE Floats keep_from(Floats x, Floats low, Floats y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, low, _CMP_NLT_UQ), y);
}
HEADSCOPE_INLINE Floats round_to_integer(Floats x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
HEADSCOPE_INLINE Floats times_power_of_two(Floats y, Floats n) { return _mm512_scalef_ps(y, n); }
HEADSCOPE_INLINE float sum_of_lanes(Floats x) { return _mm512_reduce_add_ps(x); }
HEADSCOPE_INLINE float max_of_lanes(Floats x) { return _mm512_reduce_max_ps(x); }

#elif defined(__AVX2__)

using Floats = __m256;
constexpr int LANES = 8;
// 16 registers: 12 sums, two vectors and a broadcast
constexpr int TILE_ROWS = 6;
constexpr int MAX_VALUE_VECTORS = 2;

HEADSCOPE_INLINE Floats broadcast(float x) { return _mm256_set1_ps(x); }
HEADSCOPE_INLINE Floats load(const float* from) { return _mm256_loadu_ps(from); }
HEADSCOPE_INLINE void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
HEADSCOPE_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
HEADSCOPE_INLINE Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
HEADSCOPE_INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
HEADSCOPE_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
HEADSCOPE_INLINE Floats max_of(Floats a, Floats b) { return _mm256_max_ps(a, b); }
HEADSCOPE_INLINE Floats keep_from(Floats x, Floats low, Floats y) {
    return _mm256_and_ps(_mm256_cmp_ps(x, low, _CMP_NLT_UQ), y);
}
HEADSCOPE_INLINE Floats round_to_integer(Floats x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
HEADSCOPE_INLINE Floats times_power_of_two(Floats y, Floats n) {
    // a NaN converts to INT_MIN, whose shift is 0: y, NaN as well, stays
    const __m256i exponents = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponents));
}

#else

constexpr int LANES = 4;
#if defined(__aarch64__)
// 32 registers
constexpr int TILE_ROWS = 8;
#else
constexpr int TILE_ROWS = 4;
#endif
constexpr int MAX_VALUE_VECTORS = 2;

#if defined(__GNUC__)
// SSE2, NEON, VSX, RVV...: whatever the compiler makes of four floats
typedef float Floats __attribute__((vector_size(4 * LANES)));
#else
struct Floats {
    float lane[LANES];
    float& operator[](int i) { return lane[i]; }
    float operator[](int i) const { return lane[i]; }
};
HEADSCOPE_INLINE Floats operator+(Floats a, const Floats& b) {
    for (int i = 0; i < LANES; ++i) a[i] += b[i];
    return a;
}
HEADSCOPE_INLINE Floats operator-(Floats a, const Floats& b) {
    for (int i = 0; i < LANES; ++i) a[i] -= b[i];
    return a;
}
HEADSCOPE_INLINE Floats operator*(Floats a, const Floats& b) {
    for (int i = 0; i < LANES; ++i) a[i] *= b[i];
    return a;
}
#endif

HEADSCOPE_INLINE Floats broadcast(float x) { return Floats{x, x, x, x}; }
HEADSCOPE_INLINE Floats load(const float* from) {
    Floats x;
    memcpy(&x, from, sizeof x);
    return x;
}
HEADSCOPE_INLINE void store(float* to, Floats x) { memcpy(to, &x, sizeof x); }
HEADSCOPE_INLINE Floats add(Floats a, Floats b) { return a + b; }
HEADSCOPE_INLINE Floats subtract(Floats a, Floats b) { return a - b; }
HEADSCOPE_INLINE Floats multiply(Floats a, Floats b) { return a * b; }
// contracted to one instruction where the machine has it
HEADSCOPE_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
HEADSCOPE_INLINE Floats max_of(Floats a, Floats b) {
#if defined(__GNUC__)
    return a > b ? a : b;
#else
    for (int i = 0; i < LANES; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
#endif
}
HEADSCOPE_INLINE Floats keep_from(Floats x, Floats low, Floats y) {
#if defined(__GNUC__)
    return x < low ? Floats{} : y;
#else
    for (int i = 0; i < LANES; ++i) y[i] = x[i] < low[i] ? 0.0f : y[i];
    return y;
#endif
}
HEADSCOPE_INLINE Floats round_to_integer(Floats x) {
    // adding 1.5 * 2^23 leaves no bits for a fraction
    const Floats shift = broadcast(12582912.0f);
    return (x + shift) - shift;
}
HEADSCOPE_INLINE Floats times_power_of_two(Floats y, Floats n) {
    // by multiplication, so that NaN stays NaN; 2^n is built from its exponent bits
    Floats power;
    for (int i = 0; i < LANES; ++i) {
        // converting a NaN to an integer is undefined
        const int32_t exponent = n[i] == n[i] ? static_cast<int32_t>(n[i]) : 0;
        power[i] = bit_cast<float>((exponent + 127) << 23);
    }
    return y * power;
}

#endif

#if !defined(__AVX512F__)
HEADSCOPE_INLINE float sum_of_lanes(Floats x) {
    float lanes[LANES];
    store(lanes, x);
    // pairwise, as a tree
    for (int width = LANES / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    return lanes[0];
}

HEADSCOPE_INLINE float max_of_lanes(Floats x) {
    float lanes[LANES];
    store(lanes, x);
    float greatest = lanes[0];
    for (int i = 1; i < LANES; ++i) greatest = lanes[i] > greatest ? lanes[i] : greatest;
    return greatest;
}
#endif

// keys to a panel of packed keys: two vectors
constexpr int PANEL_KEYS = 2 * LANES;

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
