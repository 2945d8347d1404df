// Vectors of floats, one set of operations per instruction set.
//
// Everything of a kernel lives in a namespace named after its instruction set: the same inline function compiled twice
// under one name would be merged by the linker, and could then run instructions that the machine lacks.
#ifndef HEADSCOPE_KERNEL_SIMD_H
#define HEADSCOPE_KERNEL_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if !defined(HEADSCOPE_TARGET)
#error "define HEADSCOPE_TARGET, the namespace of this instruction set, before including a kernel header"
#endif

#if defined(__GNUC__)
#define HEADSCOPE_INLINE inline __attribute__((always_inline))
#define HEADSCOPE_UNROLL _Pragma("GCC unroll 16")
#define HEADSCOPE_PREFETCH(address) __builtin_prefetch(address)
#define HEADSCOPE_PREFETCH_WRITE(address) __builtin_prefetch(address, 1)
#else
#define HEADSCOPE_INLINE inline
#define HEADSCOPE_UNROLL
#define HEADSCOPE_PREFETCH(address) (void)(address)
#define HEADSCOPE_PREFETCH_WRITE(address) (void)(address)
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
//   load_some, store_some   the first `count` lanes, 0 < count <= LANES; the others load as 0
//   max_of(a, b)            the larger; b where either is NaN
//   scale_from(x, low, y, n)  y * 2^n for integral n in -126..127 where x >= low or x is NaN, else 0; any n there
//   round_to_integer(x)     to the nearest integer, |x| < 2^22
//   sum_of_lanes(x), max_of_lanes(x)   of numbers without NaN, the maximum
//   sum_of_each(x, sums), max_of_each(x, maxima)   the same of several vectors: a number for each, the same bits
//   mute(x, bias)           -inf where bias is -inf, whatever x, else x + bias
//   mask_of(bits)           lane i is on where bit i of `bits` is
//   add_where(mask, a, b)   a + b where the mask is on, else a
//   zero_where_zero(x, y)   0 where x is 0, else y
//   gather_or_zero(from, i) from[i] of each lane, 0 where i is negative

#if defined(__AVX512F__)

using Floats = __m512;
using LaneMask = __mmask16;
constexpr int LANES = 16;
// 32 registers: 24 sums and the operands
constexpr int TILE_ROWS = 8;
constexpr int MAX_VECTORS = 3;

HEADSCOPE_INLINE Floats broadcast(float x) { return _mm512_set1_ps(x); }
HEADSCOPE_INLINE __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }
HEADSCOPE_INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
HEADSCOPE_INLINE void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
HEADSCOPE_INLINE Floats load_some(const float* from, int64_t count) {
    return _mm512_maskz_loadu_ps(first_lanes(count), from);
}
HEADSCOPE_INLINE void store_some(float* to, Floats x, int64_t count) {
    _mm512_mask_storeu_ps(to, first_lanes(count), x);
}
HEADSCOPE_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
HEADSCOPE_INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
HEADSCOPE_INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
HEADSCOPE_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
HEADSCOPE_INLINE Floats max_of(Floats a, Floats b) { return _mm512_max_ps(a, b); }
HEADSCOPE_INLINE Floats square_root(Floats x) { return _mm512_sqrt_ps(x); }
HEADSCOPE_INLINE Floats scale_from(Floats x, Floats low, Floats y, Floats n) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, low, _CMP_NLT_UQ), y, n);
}
HEADSCOPE_INLINE Floats round_to_integer(Floats x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// in the order of sum_of_each, so that both give the same bits
HEADSCOPE_INLINE float sum_of_lanes(Floats x) {
    x = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4e));
    x = _mm512_add_ps(x, _mm512_permute_ps(x, 0xb1));
    x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
    return _mm512_cvtss_f32(_mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e)));
}
HEADSCOPE_INLINE float max_of_lanes(Floats x) { return _mm512_reduce_max_ps(x); }
// Combines the lanes of four vectors in pairs, twice: [a, b, c, d] in each quarter is what is left of each of them.
template <typename Combine>
HEADSCOPE_INLINE Floats quarters_of_four(const Floats* x, const Combine& combine) {
    const Floats a = combine(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const Floats b = combine(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    return combine(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
}
// Combines the quarters of two vectors in pairs: two of the first, then two of the second.
template <typename Combine>
HEADSCOPE_INLINE Floats halves_of_two(Floats a, Floats b, const Combine& combine) {
    return combine(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
HEADSCOPE_INLINE void sum_of_each(const Floats x[16], float sums[16]) {
    const Floats a = halves_of_two(quarters_of_four(x, add), quarters_of_four(x + 4, add), add);
    const Floats b = halves_of_two(quarters_of_four(x + 8, add), quarters_of_four(x + 12, add), add);
    store(sums, halves_of_two(a, b, add));
}
HEADSCOPE_INLINE void max_of_each(const Floats x[8], float maxima[8]) {
    const Floats a = halves_of_two(quarters_of_four(x, max_of), quarters_of_four(x + 4, max_of), max_of);
    _mm256_storeu_ps(maxima, _mm512_castps512_ps256(halves_of_two(a, a, max_of)));
}
HEADSCOPE_INLINE Floats mute(Floats x, Floats bias) {
    const Floats lowest = _mm512_set1_ps(-INFINITY);
    return _mm512_mask_add_ps(lowest, _mm512_cmp_ps_mask(bias, lowest, _CMP_NEQ_UQ), x, bias);
}
HEADSCOPE_INLINE LaneMask mask_of(uint32_t bits) { return static_cast<__mmask16>(bits); }
HEADSCOPE_INLINE Floats add_where(LaneMask mask, Floats a, Floats b) { return _mm512_mask_add_ps(a, mask, a, b); }
HEADSCOPE_INLINE Floats zero_where_zero(Floats x, Floats y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ), y);
}
HEADSCOPE_INLINE Floats gather_or_zero(const float* from, const int32_t* index) {
    const __m512i lanes = _mm512_loadu_si512(index);
    const __mmask16 valid = _mm512_cmpge_epi32_mask(lanes, _mm512_setzero_si512());
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), valid, lanes, from, 4);
}

// lane j of vector i becomes lane i of vector j
HEADSCOPE_INLINE void transpose(Floats x[LANES]) {
    Floats y[LANES];
    HEADSCOPE_UNROLL
    for (int i = 0; i < 16; i += 4) {
        const Floats a = _mm512_unpacklo_ps(x[i], x[i + 1]), b = _mm512_unpackhi_ps(x[i], x[i + 1]);
        const Floats c = _mm512_unpacklo_ps(x[i + 2], x[i + 3]), d = _mm512_unpackhi_ps(x[i + 2], x[i + 3]);
        // 4 x 4 blocks: vector i + k holds columns k, k + 4, k + 8, k + 12 of rows i..i + 3
        y[i] = _mm512_shuffle_ps(a, c, 0x44);
        y[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
        y[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
        y[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
    }
    HEADSCOPE_UNROLL
    for (int k = 0; k < 4; ++k) {
        const Floats a = _mm512_shuffle_f32x4(y[k], y[k + 4], 0x88), b = _mm512_shuffle_f32x4(y[k], y[k + 4], 0xdd);
        const Floats c = _mm512_shuffle_f32x4(y[k + 8], y[k + 12], 0x88);
        const Floats d = _mm512_shuffle_f32x4(y[k + 8], y[k + 12], 0xdd);
        x[k] = _mm512_shuffle_f32x4(a, c, 0x88);
        x[k + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
        x[k + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
        x[k + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
}

#elif defined(__AVX2__)

using Floats = __m256;
using LaneMask = __m256i;
constexpr int LANES = 8;
// 16 registers: 12 sums, two vectors and a broadcast
constexpr int TILE_ROWS = 6;
constexpr int MAX_VECTORS = 2;

HEADSCOPE_INLINE Floats broadcast(float x) { return _mm256_set1_ps(x); }
HEADSCOPE_INLINE __m256i first_lanes(int64_t count) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes);
}
HEADSCOPE_INLINE Floats load(const float* from) { return _mm256_loadu_ps(from); }
HEADSCOPE_INLINE void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
HEADSCOPE_INLINE Floats load_some(const float* from, int64_t count) {
    return _mm256_maskload_ps(from, first_lanes(count));
}
HEADSCOPE_INLINE void store_some(float* to, Floats x, int64_t count) { _mm256_maskstore_ps(to, first_lanes(count), x); }
HEADSCOPE_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
HEADSCOPE_INLINE Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
HEADSCOPE_INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
HEADSCOPE_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
HEADSCOPE_INLINE Floats max_of(Floats a, Floats b) { return _mm256_max_ps(a, b); }
HEADSCOPE_INLINE Floats square_root(Floats x) { return _mm256_sqrt_ps(x); }
HEADSCOPE_INLINE Floats scale_from(Floats x, Floats low, Floats y, Floats n) {
    // a NaN converts to INT_MIN, whose shift is 0: y, NaN as well, stays
    const __m256i exponents = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    const Floats scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponents));
    return _mm256_and_ps(_mm256_cmp_ps(x, low, _CMP_NLT_UQ), scaled);
}
HEADSCOPE_INLINE Floats round_to_integer(Floats x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
HEADSCOPE_INLINE Floats mute(Floats x, Floats bias) {
    const Floats lowest = _mm256_set1_ps(-INFINITY);
    return _mm256_blendv_ps(_mm256_add_ps(x, bias), lowest, _mm256_cmp_ps(bias, lowest, _CMP_EQ_OQ));
}
HEADSCOPE_INLINE LaneMask mask_of(uint32_t bits) {
    const __m256i powers = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), powers), powers);
}
HEADSCOPE_INLINE Floats add_where(LaneMask mask, Floats a, Floats b) {
    return _mm256_add_ps(a, _mm256_and_ps(_mm256_castsi256_ps(mask), b));
}
HEADSCOPE_INLINE Floats zero_where_zero(Floats x, Floats y) {
    return _mm256_and_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_UQ), y);
}
HEADSCOPE_INLINE Floats gather_or_zero(const float* from, const int32_t* index) {
    const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
    const __m256 valid = _mm256_castsi256_ps(_mm256_cmpgt_epi32(lanes, _mm256_set1_epi32(-1)));
    return _mm256_mask_i32gather_ps(_mm256_setzero_ps(), from, lanes, valid, 4);
}

HEADSCOPE_INLINE void transpose(Floats x[LANES]) {
    Floats y[LANES];
    HEADSCOPE_UNROLL
    for (int i = 0; i < 8; i += 4) {
        const Floats a = _mm256_unpacklo_ps(x[i], x[i + 1]), b = _mm256_unpackhi_ps(x[i], x[i + 1]);
        const Floats c = _mm256_unpacklo_ps(x[i + 2], x[i + 3]), d = _mm256_unpackhi_ps(x[i + 2], x[i + 3]);
        y[i] = _mm256_shuffle_ps(a, c, 0x44);
        y[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
        y[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
        y[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    HEADSCOPE_UNROLL
    for (int k = 0; k < 4; ++k) {
        x[k] = _mm256_permute2f128_ps(y[k], y[k + 4], 0x20);
        x[k + 4] = _mm256_permute2f128_ps(y[k], y[k + 4], 0x31);
    }
}

#else

constexpr int LANES = 4;
#if defined(__aarch64__)
// 32 registers
constexpr int TILE_ROWS = 8;
#else
constexpr int TILE_ROWS = 4;
#endif
constexpr int MAX_VECTORS = 2;

#if defined(__GNUC__)
// SSE2, NEON, VSX, RVV...: whatever the compiler makes of four floats
typedef float Floats __attribute__((vector_size(4 * LANES)));
#if defined(__clang__) || __GNUC__ >= 12
#define HEADSCOPE_SHUFFLES
#endif
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

using LaneMask = uint32_t;

HEADSCOPE_INLINE Floats broadcast(float x) { return Floats{x, x, x, x}; }
HEADSCOPE_INLINE Floats load(const float* from) {
    Floats x;
    memcpy(&x, from, sizeof x);
    return x;
}
HEADSCOPE_INLINE void store(float* to, Floats x) { memcpy(to, &x, sizeof x); }
HEADSCOPE_INLINE Floats load_some(const float* from, int64_t count) {
    float lanes[LANES] = {};
    for (int i = 0; i < LANES; ++i) {
        if (i < count) lanes[i] = from[i];
    }
    return load(lanes);
}
HEADSCOPE_INLINE void store_some(float* to, Floats x, int64_t count) {
    for (int i = 0; i < LANES; ++i) {
        if (i < count) to[i] = x[i];
    }
}
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
HEADSCOPE_INLINE Floats square_root(Floats x) {
    for (int i = 0; i < LANES; ++i) x[i] = sqrtf(x[i]);
    return x;
}
HEADSCOPE_INLINE Floats round_to_integer(Floats x) {
    // adding 1.5 * 2^23 leaves no bits for a fraction
    const Floats shift = broadcast(12582912.0f);
    return (x + shift) - shift;
}
HEADSCOPE_INLINE Floats scale_from(Floats x, Floats low, Floats y, Floats n) {
    // by multiplication, so that NaN stays NaN; 2^n is built from its exponent bits
    Floats power;
    for (int i = 0; i < LANES; ++i) {
        // converting a NaN to an integer is undefined, and so is shifting too large a one
        const int32_t exponent = n[i] <= 127.0f ? static_cast<int32_t>(n[i]) : 127;
        power[i] = bit_cast<float>((exponent + 127) << 23);
    }
    y = y * power;
#if defined(__GNUC__)
    return x < low ? Floats{} : y;
#else
    for (int i = 0; i < LANES; ++i) y[i] = x[i] < low[i] ? 0.0f : y[i];
    return y;
#endif
}
HEADSCOPE_INLINE Floats mute(Floats x, Floats bias) {
#if defined(__GNUC__)
    const Floats lowest = broadcast(-INFINITY);
    return bias == lowest ? lowest : x + bias;
#else
    for (int i = 0; i < LANES; ++i) x[i] = bias[i] == -INFINITY ? -INFINITY : x[i] + bias[i];
    return x;
#endif
}
HEADSCOPE_INLINE LaneMask mask_of(uint32_t bits) { return bits; }
HEADSCOPE_INLINE Floats add_where(LaneMask mask, Floats a, Floats b) {
#if defined(__GNUC__)
    typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
    const Bits own = {1, 2, 4, 8};
    return a + ((Bits{mask, mask, mask, mask} & own) == own ? b : Floats{});
#else
    for (int i = 0; i < LANES; ++i) a[i] += (mask >> i) & 1u ? b[i] : 0.0f;
    return a;
#endif
}
HEADSCOPE_INLINE Floats zero_where_zero(Floats x, Floats y) {
    for (int i = 0; i < LANES; ++i) y[i] = x[i] == 0.0f ? 0.0f : y[i];
    return y;
}
HEADSCOPE_INLINE Floats gather_or_zero(const float* from, const int32_t* index) {
    Floats x = broadcast(0.0f);
    for (int i = 0; i < LANES; ++i) {
        if (index[i] >= 0) x[i] = from[index[i]];
    }
    return x;
}
HEADSCOPE_INLINE void transpose(Floats x[LANES]) {
#if defined(HEADSCOPE_SHUFFLES)
    const Floats a = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5);
    const Floats b = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7);
    const Floats c = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5);
    const Floats d = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
    x[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
    x[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
    x[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
    x[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
#else
    float lanes[LANES][LANES];
    for (int i = 0; i < LANES; ++i) {
        for (int j = 0; j < LANES; ++j) lanes[j][i] = x[i][j];
    }
    for (int i = 0; i < LANES; ++i) x[i] = load(lanes[i]);
#endif
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

template <int COUNT>
HEADSCOPE_INLINE void sum_of_each(const Floats (&x)[COUNT], float sums[COUNT]) {
    for (int i = 0; i < COUNT; ++i) sums[i] = sum_of_lanes(x[i]);
}

template <int COUNT>
HEADSCOPE_INLINE void max_of_each(const Floats (&x)[COUNT], float maxima[COUNT]) {
    for (int i = 0; i < COUNT; ++i) maxima[i] = max_of_lanes(x[i]);
}
#endif

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
