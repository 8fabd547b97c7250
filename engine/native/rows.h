// What happens to every row between the matrices: norms, rotary embedding, gated activation.
#pragma once

#include "simd.h"

namespace prelay {

// out = rounded(x / rms(x)) * weight.
template <class E>
void rms_norm(const typename E::T* x, const typename E::T* weight, typename E::T* out, size_t width, float eps) {
    __m512 squares = _mm512_setzero_ps();
    for (size_t i = 0; i < width; i += 16) {
        __m512 v = E::widen(x + i, first16(width - i));
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps));
    for (size_t i = 0; i < width; i += 16) {
        __mmask16 mask = first16(width - i);
        __m512 v = E::rounded(_mm512_mul_ps(E::widen(x + i, mask), scale));
        E::narrow(out + i, _mm512_mul_ps(v, E::widen(weight + i, mask)), mask);
    }
}

// hidden += delta.
template <class E>
void add(typename E::T* hidden, const typename E::T* delta, size_t width) {
    for (size_t i = 0; i < width; i += 16) {
        __mmask16 mask = first16(width - i);
        E::narrow(hidden + i, _mm512_add_ps(E::widen(hidden + i, mask), E::widen(delta + i, mask)), mask);
    }
}

// One token's heads, turned in place; i pairs with i + head_dim / 2.
template <class E>
void rotate(typename E::T* heads, const float* cosines, const float* sines, size_t num_heads, size_t head_dim) {
    size_t half = head_dim / 2;
    for (size_t h = 0; h < num_heads; h++, heads += head_dim)
        for (size_t i = 0; i < half; i += 16) {
            __mmask16 mask = first16(half - i);
            __m512 a = E::widen(heads + i, mask), b = E::widen(heads + half + i, mask);
            __m512 c = _mm512_maskz_loadu_ps(mask, cosines + i), s = _mm512_maskz_loadu_ps(mask, sines + i);
            E::narrow(heads + i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)), mask);
            E::narrow(heads + half + i, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)), mask);
        }
}

// out = rounded(silu(gate)) * up.
template <class E>
void gated_silu(const typename E::T* gate, const typename E::T* up, typename E::T* out, size_t width) {
    __m512 one = _mm512_set1_ps(1.0f);
    for (size_t i = 0; i < width; i += 16) {
        __mmask16 mask = first16(width - i);
        __m512 g = E::widen(gate + i, mask);
        __m512 denominator = _mm512_add_ps(one, exp(_mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), g), _mm512_set1_ps(88.0f))));
        E::narrow(out + i, _mm512_mul_ps(E::rounded(_mm512_div_ps(g, denominator)), E::widen(up + i, mask)), mask);
    }
}

}  // namespace prelay
