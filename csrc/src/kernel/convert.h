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
#elif defined(__aarch64__)
    return static_cast<float>(bit_cast<__fp16>(x.bits));
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
#elif defined(__aarch64__)
    return Float16{bit_cast<uint16_t>(static_cast<__fp16>(x))};
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

// LANES numbers as float32, one after the other in memory.
HEADSCOPE_INLINE Floats load_as_floats(const float* from) { return load(from); }
template <typename Element>
HEADSCOPE_INLINE Floats load_as_floats(const Element* from) {
    float lanes[LANES];
    for (int i = 0; i < LANES; ++i) lanes[i] = to_float(from[i]);
    return load(lanes);
}
#if defined(__AVX512F__)
HEADSCOPE_INLINE Floats load_as_floats(const BFloat16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
HEADSCOPE_INLINE Floats load_as_floats(const Float16* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#elif defined(__AVX2__)
HEADSCOPE_INLINE Floats load_as_floats(const BFloat16* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
HEADSCOPE_INLINE Floats load_as_floats(const Float16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#elif defined(__GNUC__)
typedef uint16_t Halfwords __attribute__((vector_size(2 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
HEADSCOPE_INLINE Floats load_as_floats(const BFloat16* from) {
    Halfwords bits;
    memcpy(&bits, from, sizeof bits);
    return bit_cast<Floats>(__builtin_convertvector(bits, Words) << 16);
}
#if defined(__aarch64__)
HEADSCOPE_INLINE Floats load_as_floats(const Float16* from) {
    float16x4_t halves;
    memcpy(&halves, from, sizeof halves);
    return vcvt_f32_f16(halves);
}
#endif
#endif

// The first `count` of LANES numbers `stride` elements apart, 0 < count <= LANES; the other lanes are 0.
template <typename Element>
HEADSCOPE_INLINE Floats gather_as_floats(const Element* from, int64_t stride, int64_t count) {
    if (stride == 1 && count == LANES) return load_as_floats(from);
    float lanes[LANES] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = to_float(from[i * stride]);
    return load(lanes);
}
HEADSCOPE_INLINE Floats gather_as_floats(const float* from, int64_t stride, int64_t count) {
    if (stride == 1) return count == LANES ? load(from) : load_some(from, count);
    float lanes[LANES] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = from[i * stride];
    return load(lanes);
}

// Stores LANES numbers rounded to the element's type.
HEADSCOPE_INLINE void store_as(float* to, Floats x) { store(to, x); }
template <typename Element>
HEADSCOPE_INLINE void store_as(Element* to, Floats x) {
    float lanes[LANES];
    store(lanes, x);
    for (int i = 0; i < LANES; ++i) to[i] = from_float<Element>(lanes[i]);
}
#if defined(__AVX512F__)
HEADSCOPE_INLINE void store_as(BFloat16* to, Floats x) {
    // not by the bf16 instruction, which takes subnormal numbers for 0
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16)));
}
HEADSCOPE_INLINE void store_as(Float16* to, Floats x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
HEADSCOPE_INLINE void store_as(Float16* to, Floats x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__GNUC__)
HEADSCOPE_INLINE void store_as(BFloat16* to, Floats x) {
    const Words bits = bit_cast<Words>(x);
    const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const Words quiet = x == x ? rounded : Words{} + 0x7fc00000u;
    const Halfwords halves = __builtin_convertvector(quiet >> 16, Halfwords);
    memcpy(to, &halves, sizeof halves);
}
#if defined(__aarch64__)
HEADSCOPE_INLINE void store_as(Float16* to, Floats x) {
    const float16x4_t halves = vcvt_f16_f32(x);
    memcpy(to, &halves, sizeof halves);
}
#endif
#endif

// The first `count` lanes, `stride` elements apart.
template <typename Element>
HEADSCOPE_INLINE void scatter_as(Element* to, int64_t stride, Floats x, int64_t count) {
    if (stride == 1 && count == LANES) return store_as(to, x);
    float lanes[LANES];
    store(lanes, x);
    for (int64_t i = 0; i < count; ++i) to[i * stride] = from_float<Element>(lanes[i]);
}

HEADSCOPE_INLINE void scatter_as(float* to, int64_t stride, Floats x, int64_t count) {
    if (stride == 1) return count == LANES ? store(to, x) : store_some(to, x, count);
    float lanes[LANES];
    store(lanes, x);
    for (int64_t i = 0; i < count; ++i) to[i * stride] = lanes[i];
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
