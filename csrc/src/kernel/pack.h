// Copies of query, key and value blocks in units, in the order in which the tiles read them.
#ifndef HEADSCOPE_KERNEL_PACK_H
#define HEADSCOPE_KERNEL_PACK_H

#include "units.h"

namespace headscope {
namespace HEADSCOPE_TARGET {

#if defined(HEADSCOPE_DOTS)

// The units with terms 0..count - 1 of a row of numbers `stride` apart, 0 < count <= 2 * LANES; missing terms are 0.
HEADSCOPE_INLINE Floats gather_units(const BFloat16* from, int64_t stride, int64_t count) {
    if (stride == 1) {
        const __mmask32 some = count >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((1u << count) - 1u);
        return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(some, from));
    }
    BFloat16 terms[2 * LANES] = {};
    for (int64_t i = 0; i < count; ++i) terms[i] = from[i * stride];
    return _mm512_castsi512_ps(_mm512_loadu_si512(terms));
}
HEADSCOPE_INLINE void put_units(Unit* to, Floats units) { _mm512_storeu_ps(to, units); }
HEADSCOPE_INLINE void put_some_units(Unit* to, Floats units, int64_t count) {
    _mm512_mask_storeu_ps(to, first_lanes(count), units);
}
// The same operations whatever the dtype; here it is always bfloat16.
template <typename Function>
HEADSCOPE_INLINE void with_input_element(int64_t, const Function& function) {
    function(BFloat16{});
}

#else

template <typename Element>
HEADSCOPE_INLINE Floats gather_units(const Element* from, int64_t stride, int64_t count) {
    return gather_as_floats(from, stride, count);
}
HEADSCOPE_INLINE void put_units(Unit* to, Floats units) { store(to, units); }
HEADSCOPE_INLINE void put_some_units(Unit* to, Floats units, int64_t count) { store_some(to, units, count); }
template <typename Function>
HEADSCOPE_INLINE void with_input_element(int64_t dtype, const Function& function) {
    if (dtype == HEADSCOPE_FLOAT32) return function(float{});
    if (dtype == HEADSCOPE_BFLOAT16) return function(BFloat16{});
    function(Float16{});
}

#endif

// Rows first..first + count - 1 of a head's queries, or of whatever else meets columns of channels -> [count rounded up
// to TILE_ROWS][units of dim]; the rest are 0. Scaled here where units are float32; pairs of bfloat16 stay as they are,
// and their logits are scaled.
inline void pack_queries(const headscope_tensor& tensor, int64_t dim, int64_t sample, int64_t head, int64_t first,
                         int64_t count, float scale, Unit* packed) {
    // an empty tensor has no address to count from
    if (dim == 0) return;
    const int64_t units = units_of(dim);
    with_input_element(tensor.dtype, [&](auto element) {
        using Element = decltype(element);
        const int64_t* strides = tensor.strides;
        const Element* source = at<Element>(tensor, sample, head, first);
        for (int64_t row = 0; row < count; ++row) {
            const Element* from = source + row * strides[2];
            Unit* to = packed + row * units;
            for (int64_t d = 0; d < units; d += LANES) {
                const int64_t terms = smaller(LANES * TERMS, dim - d * TERMS);
                Floats x = gather_units(from + d * TERMS * strides[3], strides[3], terms);
                if (TERMS == 1) x = multiply(x, broadcast(scale));
                if (d + LANES <= units) {
                    put_units(to + d, x);
                } else {
                    put_some_units(to + d, x, units - d);
                }
            }
        }
    });
    const int64_t padding = round_up(count, TILE_ROWS) - count;
    memset(packed + count * units, 0, static_cast<size_t>(padding * units) * sizeof(Unit));
}

// Rows ahead of the one being packed that are on their way from memory.
constexpr int64_t ROWS_AHEAD = 16;

// Asks for a row of `bytes` bytes.
HEADSCOPE_INLINE void prefetch_row(const void* row, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += 64) HEADSCOPE_PREFETCH(static_cast<const char*>(row) + b);
}

// Keys first..first + count - 1 of a key head, or of whatever else meets rows of channels -> [panels][units of
// dim][panel's width]; keys past the last are 0. Scaled here where units are float32.
inline void pack_keys(const headscope_tensor& tensor, int64_t dim, int64_t sample, int64_t kv_head, int64_t first,
                      int64_t count, float scale, Unit* packed) {
    if (dim == 0 || count <= 0) return;
    const int64_t units = units_of(dim);
    with_input_element(tensor.dtype, [&](auto element) {
        using Element = decltype(element);
        const int64_t* strides = tensor.strides;
        const Element* source = at<Element>(tensor, sample, kv_head, first);
        const int64_t padded = round_up(count, LANES);
        for (int64_t key = 0; key < padded;) {
            const int64_t width = first_key_panel(padded - key).width();
            for (int64_t end = key + width; key < end; key += LANES, packed += LANES) {
                if (strides[3] == 1) {
                    const int64_t bytes = dim * static_cast<int64_t>(sizeof(Element));
                    for (int64_t i = key + LANES; i < smaller(count, key + 2 * LANES); ++i) {
                        prefetch_row(source + i * strides[2], bytes);
                    }
                }
                for (int64_t d = 0; d < units; d += LANES) {
                    const int64_t terms = smaller(LANES * TERMS, dim - d * TERMS);
                    const Element* from = source + d * TERMS * strides[3];
                    Floats block[LANES];
                    HEADSCOPE_UNROLL
                    for (int i = 0; i < LANES; ++i) {
                        block[i] = key + i < count ? gather_units(from + (key + i) * strides[2], strides[3], terms)
                                                   : broadcast(0.0f);
                        if (TERMS == 1) block[i] = multiply(block[i], broadcast(scale));
                    }
                    transpose(block);
                    const int64_t rows = smaller(LANES, units - d);
                    if (rows == LANES) {
                        HEADSCOPE_UNROLL
                        for (int i = 0; i < LANES; ++i) put_units(packed + (d + i) * width, block[i]);
                    } else {
                        HEADSCOPE_UNROLL
                        for (int i = 0; i < LANES; ++i) {
                            if (i < rows) put_units(packed + (d + i) * width, block[i]);
                        }
                    }
                }
            }
            packed += (units - 1) * width;
        }
    });
}

#if defined(HEADSCOPE_DOTS)

// Values of keys first..first + count - 1, or whatever else is weighted and summed -> [panels][pairs of keys][panel's
// width]; what is missing is 0. Returns whether all of them are finite.
inline bool pack_values(const headscope_tensor& tensor, int64_t dim, int64_t sample, int64_t kv_head, int64_t first,
                        int64_t count, Unit* packed) {
    if (dim == 0 || count <= 0) return true;
    const __m256i exponent = _mm256_set1_epi16(0x7f80);
    const int64_t stride = tensor.strides[3];
    const int64_t pairs = units_of(count);
    const int64_t width = padded_channels(dim);
    const BFloat16* source = at<BFloat16>(tensor, sample, kv_head, first);
    unsigned not_finite = 0;
    const auto gather = [&](int64_t key, int64_t channel, int64_t channels) {
        if (key >= count) return _mm256_setzero_si256();
        const BFloat16* from = source + key * tensor.strides[2] + channel * stride;
        __m256i x;
        if (stride == 1) {
            x = _mm256_maskz_loadu_epi16(first_lanes(channels), from);
        } else {
            BFloat16 some[LANES] = {};
            for (int64_t c = 0; c < channels; ++c) some[c] = from[c * stride];
            x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(some));
        }
        not_finite |= _mm256_cmpeq_epi16_mask(_mm256_and_si256(x, exponent), exponent);
        return x;
    };
    for (int64_t channel = 0; channel < width;) {
        const int64_t panel = first_panel(width - channel).width();
        for (int64_t pair = 0; pair < pairs; ++pair, packed += panel) {
            if (stride == 1 && 2 * pair + ROWS_AHEAD + 1 < count) {
                const BFloat16* ahead = source + (2 * pair + ROWS_AHEAD) * tensor.strides[2] + channel;
                prefetch_row(ahead, 2 * panel);
                prefetch_row(ahead + tensor.strides[2], 2 * panel);
            }
            for (int64_t c = 0; c < panel; c += LANES) {
                const int64_t channels = larger(0, smaller(LANES, dim - channel - c));
                const __m512i even = _mm512_cvtepu16_epi32(gather(2 * pair, channel + c, channels));
                const __m512i odd = _mm512_cvtepu16_epi32(gather(2 * pair + 1, channel + c, channels));
                const __m512i both = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
                put_some_units(packed + c, _mm512_castsi512_ps(both), smaller(LANES, panel - c));
            }
        }
        channel += panel;
    }
    return not_finite == 0;
}

// Makes 0 of what isn't finite.
inline void drop_not_finite(Unit* packed, int64_t units) {
    for (int64_t i = 0; i < units; ++i) {
        if ((packed[i] & 0x7f80u) == 0x7f80u) packed[i] &= 0xffff0000u;
        if ((packed[i] & 0x7f800000u) == 0x7f800000u) packed[i] &= 0xffffu;
    }
}

HEADSCOPE_INLINE float packed_power(const Unit* row, int64_t key) {
    return bit_cast<float>(key % 2 ? row[key / 2] & 0xffff0000u : row[key / 2] << 16);
}
HEADSCOPE_INLINE float packed_value(const Unit* panel, int64_t width, int64_t key, int64_t channel) {
    return packed_power(panel + key / 2 * width + channel, key % 2);
}

#else

// Values of keys first..first + count - 1, or whatever else is weighted and summed -> [panels][count][panel's width],
// channels past dim are 0. Returns whether all of them are finite.
inline bool pack_values(const headscope_tensor& tensor, int64_t dim, int64_t sample, int64_t kv_head, int64_t first,
                        int64_t count, Unit* packed) {
    if (dim == 0 || count <= 0) return true;
    // 0 times anything finite is 0, everything else makes this NaN
    Floats not_finite = broadcast(0.0f);
    with_input_element(tensor.dtype, [&](auto element) {
        using Element = decltype(element);
        const int64_t* strides = tensor.strides;
        const Element* source = at<Element>(tensor, sample, kv_head, first);
        const int64_t width = padded_channels(dim);
        for (int64_t channel = 0; channel < width;) {
            const int64_t panel = first_panel(width - channel).width();
            for (int64_t key = 0; key < count; ++key, packed += panel) {
                const Element* from = source + key * strides[2] + channel * strides[3];
                if (strides[3] == 1 && key + ROWS_AHEAD < count) {
                    prefetch_row(from + ROWS_AHEAD * strides[2], panel * static_cast<int64_t>(sizeof(Element)));
                }
                for (int64_t c = 0; c < panel; c += LANES) {
                    const int64_t channels = smaller(LANES, dim - channel - c);
                    const Floats x = gather_as_floats(from + c * strides[3], strides[3], channels);
                    not_finite = multiply_add(x, broadcast(0.0f), not_finite);
                    if (c + LANES <= panel) {
                        store(packed + c, x);
                    } else {
                        store_some(packed + c, x, panel - c);
                    }
                }
            }
            channel += panel;
        }
    });
    return sum_of_lanes(not_finite) == 0.0f;
}

// Makes 0 of what isn't finite.
inline void drop_not_finite(Unit* packed, int64_t units) {
    for (int64_t i = 0; i < units; ++i) packed[i] = packed[i] * 0.0f == 0.0f ? packed[i] : 0.0f;
}

HEADSCOPE_INLINE float packed_power(const Unit* row, int64_t key) { return row[key]; }
HEADSCOPE_INLINE float packed_value(const Unit* panel, int64_t width, int64_t key, int64_t channel) {
    return panel[key * width + channel];
}

#endif

}  // namespace HEADSCOPE_TARGET
}  // namespace headscope

#endif
