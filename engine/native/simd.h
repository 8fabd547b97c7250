// AVX-512 helpers, and the two element types that all kernels are written for.
//
// A kernel is a template over `F32` or `Bf16`: how sixteen or thirty-two elements are loaded, multiplied into float32
// accumulators, and rounded back. Products of bfloat16 use the CPU's dot-product instruction (AVX512_BF16).
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace prelay {

inline __mmask16 first16(size_t count) { return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1); }
inline __mmask32 first32(size_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }

struct F32 {
    using T = float;
    static constexpr size_t lanes = 16;  // elements of one vector
    static constexpr size_t group = 1;   // elements along the summed dimension that one lane multiplies at once
    using V = __m512;

    static V load(const T* p) { return _mm512_loadu_ps(p); }
    static V load(const T* p, size_t count) { return _mm512_maskz_loadu_ps(first16(count), p); }
    static __m512 dot(__m512 sum, V a, V b) { return _mm512_fmadd_ps(a, b, sum); }
    static V broadcast(const T* p) { return _mm512_set1_ps(*p); }
    // Sixteen elements to float32 and back.
    static __m512 widen(const T* p, __mmask16 mask = 0xffff) { return _mm512_maskz_loadu_ps(mask, p); }
    static void narrow(T* p, __m512 v, __mmask16 mask = 0xffff) { _mm512_mask_storeu_ps(p, mask, v); }
    static __m512 rounded(__m512 v) { return v; }
    // Sixteen columns of `group` rows, column by column.
    static void interleave(const T* row, const T*, T* out) { _mm512_storeu_ps(out, _mm512_loadu_ps(row)); }
};

struct Bf16 {
    using T = uint16_t;
    static constexpr size_t lanes = 32;
    static constexpr size_t group = 2;
    using V = __m512bh;

    static V load(const T* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static V load(const T* p, size_t count) { return (__m512bh)_mm512_maskz_loadu_epi16(first32(count), p); }
    static __m512 dot(__m512 sum, V a, V b) { return _mm512_dpbf16_ps(sum, a, b); }
    static V broadcast(const T* p) {
        int32_t pair;
        __builtin_memcpy(&pair, p, sizeof pair);
        return (__m512bh)_mm512_set1_epi32(pair);
    }
    static __m512 widen(const T* p, __mmask16 mask = 0xffff) {
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static void narrow(T* p, __m512 v, __mmask16 mask = 0xffff) {
        _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(v));
    }
    static __m512 rounded(__m512 v) {
        __m512i wide = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static void interleave(const T* even, const T* odd, T* out) {
        __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)even));
        __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)odd));
        _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
};

// Lane i of the result is the sum over the lanes of v[i]. Every v[i] is added up in the same order.
inline __m512 sum_each(const __m512* v) {
    auto pairs = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
    auto quads = [](__m512 a, __m512 b) {
        __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
        return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    };
    auto lanes = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    __m512 q[4];
    for (int i = 0; i < 4; i++) q[i] = quads(pairs(v[4 * i], v[4 * i + 1]), pairs(v[4 * i + 2], v[4 * i + 3]));
    return lanes(lanes(q[0], q[1]), lanes(q[2], q[3]));
}

// exp(x) for x <= 88, with a relative error below 2e-7; -inf gives 0.
inline __m512 exp(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-104.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    // ln 2 in two parts, so that what is left of x keeps its digits.
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, n);
}

}  // namespace prelay
