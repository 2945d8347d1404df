// What a matrix product multiplies at a time: one float32, or a pair of bfloat16 numbers whose products are exact.
//
// Both products, logits and outputs, read packed operands in units; a unit holds TERMS terms of the sum.
#ifndef HEADSCOPE_KERNEL_UNITS_H
#define HEADSCOPE_KERNEL_UNITS_H

#include "convert.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

#if defined(HEADSCOPE_DOTS)

using Unit = uint32_t;
using Units = __m512i;
constexpr int TERMS = 2;

HEADSCOPE_INLINE Units broadcast_unit(Unit x) { return _mm512_set1_epi32(static_cast<int>(x)); }
HEADSCOPE_INLINE Units load_units(const Unit* from) { return _mm512_loadu_si512(from); }
// sum + a . b, lane by lane
HEADSCOPE_INLINE Floats dot(Units a, Units b, Floats sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
// The weights of keys j..j + LANES - 1, in a row that starts at `row`.
HEADSCOPE_INLINE void store_powers(Unit* row, int64_t j, Floats powers) {
    const __m256bh rounded = _mm512_cvtneps_pbh(powers);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + j / TERMS), reinterpret_cast<__m256i>(rounded));
}
// Units of two rows: lane i is the pair of both rows' number i.
HEADSCOPE_INLINE void store_pairs(Unit* to, Floats first, Floats second) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
}

#else

using Unit = float;
using Units = Floats;
constexpr int TERMS = 1;

HEADSCOPE_INLINE Units broadcast_unit(Unit x) { return broadcast(x); }
HEADSCOPE_INLINE Units load_units(const Unit* from) { return load(from); }
HEADSCOPE_INLINE Floats dot(Units a, Units b, Floats sum) { return multiply_add(a, b, sum); }
HEADSCOPE_INLINE void store_powers(Unit* row, int64_t j, Floats powers) { store(row + j, powers); }

#endif

// Half a vector: the end of a head whose channels aren't a multiple of LANES.
#if defined(__AVX512F__)

constexpr int HALF_LANES = LANES / 2;
using HalfFloats = __m256;

HEADSCOPE_INLINE HalfFloats half_zero() { return _mm256_setzero_ps(); }
HEADSCOPE_INLINE HalfFloats half_load(const float* from) { return _mm256_loadu_ps(from); }
HEADSCOPE_INLINE void half_store(float* to, HalfFloats x) { _mm256_storeu_ps(to, x); }
HEADSCOPE_INLINE HalfFloats half_add(HalfFloats a, HalfFloats b) { return _mm256_add_ps(a, b); }
HEADSCOPE_INLINE HalfFloats half_multiply(float a, HalfFloats b) { return _mm256_mul_ps(_mm256_set1_ps(a), b); }
HEADSCOPE_INLINE HalfFloats half_multiply_add(float a, HalfFloats b, HalfFloats c) {
    return _mm256_fmadd_ps(_mm256_set1_ps(a), b, c);
}
#if defined(HEADSCOPE_DOTS)
using HalfUnits = __m256i;
HEADSCOPE_INLINE HalfUnits half_load_units(const Unit* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
HEADSCOPE_INLINE HalfFloats half_dot(Units a, HalfUnits b, HalfFloats sum) {
    return _mm256_dpbf16_ps(sum, reinterpret_cast<__m256bh>(_mm512_castsi512_si256(a)), reinterpret_cast<__m256bh>(b));
}
#else
using HalfUnits = __m256;
HEADSCOPE_INLINE HalfUnits half_load_units(const Unit* from) { return _mm256_loadu_ps(from); }
HEADSCOPE_INLINE HalfFloats half_dot(Units a, HalfUnits b, HalfFloats sum) {
    return _mm256_fmadd_ps(_mm512_castps512_ps256(a), b, sum);
}
#endif

#else

// whole vectors are short enough
constexpr int HALF_LANES = 0;
using HalfFloats = Floats;
using HalfUnits = Units;
HEADSCOPE_INLINE HalfFloats half_zero() { return broadcast(0.0f); }
HEADSCOPE_INLINE HalfFloats half_load(const float* from) { return load(from); }
HEADSCOPE_INLINE void half_store(float* to, HalfFloats x) { store(to, x); }
HEADSCOPE_INLINE HalfFloats half_add(HalfFloats a, HalfFloats b) { return add(a, b); }
HEADSCOPE_INLINE HalfFloats half_multiply(float a, HalfFloats b) { return multiply(broadcast(a), b); }
HEADSCOPE_INLINE HalfFloats half_multiply_add(float a, HalfFloats b, HalfFloats c) {
    return multiply_add(broadcast(a), b, c);
}
HEADSCOPE_INLINE HalfUnits half_load_units(const Unit* from) { return load_units(from); }
HEADSCOPE_INLINE HalfFloats half_dot(Units a, HalfUnits b, HalfFloats sum) { return dot(a, b, sum); }

#endif

HEADSCOPE_INLINE int64_t round_up(int64_t size, int64_t multiple) {
    return (size + multiple - 1) / multiple * multiple;
}
HEADSCOPE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
HEADSCOPE_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
// units that hold `terms` terms
HEADSCOPE_INLINE int64_t units_of(int64_t terms) { return (terms + TERMS - 1) / TERMS; }

// How a width, of keys or of channels, is cut into panels: as wide as the registers allow.
struct Panel {
    int vectors;
    bool half;  // and half a vector
    HEADSCOPE_INLINE int64_t width() const { return vectors * LANES + (half ? HALF_LANES : 0); }
};

// Channels rounded up to what panels hold.
HEADSCOPE_INLINE int64_t padded_channels(int64_t channels) {
    const int64_t rest = channels % LANES;
    return rest > 0 && rest <= HALF_LANES ? channels - rest + HALF_LANES : round_up(channels, LANES);
}

// The panel at the start of a padded width.
HEADSCOPE_INLINE Panel first_panel(int64_t width) {
    const int vectors = static_cast<int>(smaller(width / LANES, 8));
    const bool half = width % LANES != 0;
    // the half goes with at most two; 4 = 2 + 2, one alone loads too often
    if (half && vectors < MAX_VECTORS) return {vectors, true};
    if (vectors > MAX_VECTORS && vectors - MAX_VECTORS < (half ? 0 : 2)) return {MAX_VECTORS - 1, false};
    if (half && vectors == MAX_VECTORS) return {MAX_VECTORS - 1, false};
    return {vectors < MAX_VECTORS ? vectors : MAX_VECTORS, false};
}

// The panel at the start of a padded number of keys: two vectors, whose keys and queries fit the first cache together.
HEADSCOPE_INLINE Panel first_key_panel(int64_t width) {
    const int vectors = static_cast<int>(smaller(width / LANES, 4));
    // one alone loads too often
    return {vectors == MAX_VECTORS ? vectors : static_cast<int>(smaller(vectors, 2)), false};
}

template <int COUNT>
struct Constant {
    static constexpr int value = COUNT;
};

// Calls function(vectors) with a number of whole vectors as a compile-time constant.
template <typename Function>
HEADSCOPE_INLINE void with_vectors(int vectors, const Function& function) {
    if (vectors == 1) return function(Constant<1>{});
    if constexpr (MAX_VECTORS == 3) {
        if (vectors == 3) return function(Constant<3>{});
    }
    function(Constant<2>{});
}

// Calls function(vectors, half) with the panel's shape as compile-time constants.
template <typename Function>
HEADSCOPE_INLINE void with_panel(Panel panel, const Function& function) {
    if constexpr (HALF_LANES > 0) {
        if (panel.half && panel.vectors == 0) return function(Constant<0>{}, Constant<1>{});
        if (panel.half && panel.vectors == 1) return function(Constant<1>{}, Constant<1>{});
        if (panel.half) return function(Constant<2>{}, Constant<1>{});
    }
    with_vectors(panel.vectors, [&](auto vectors) { function(vectors, Constant<0>{}); });
}

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
