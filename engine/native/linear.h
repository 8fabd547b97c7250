// rows @ weight.T + bias, for few rows: the matrix is read once, as it lies in memory.
//
// Both operands are contiguous along the summed dimension, so a product of R weight rows and X input rows is R * X
// running dot products in registers. Every output is summed in the same order whatever R, X and the number of rows are:
// a row's result does not depend on the batch that it is in.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace prelay {

// outputs[x * stride + r] for R weight rows and X input rows, R * X <= 16.
template <class E, int R, int X>
inline void dot_block(const typename E::T* weight, const typename E::T* rows, const typename E::T* bias,
                      typename E::T* outputs, size_t inputs, size_t stride, size_t ahead) {
    __m512 sums[16];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    auto add = [&](int j, size_t k, size_t count) {
        const auto* p = weight + j * inputs + k;
        typename E::V w = count == E::lanes ? E::load(p) : E::load(p, count);
        for (int i = 0; i < X; i++) {
            const auto* x = rows + i * inputs + k;
            sums[i * R + j] = E::dot(sums[i * R + j], w, count == E::lanes ? E::load(x) : E::load(x, count));
        }
    };
    size_t whole = inputs / E::lanes * E::lanes;
    if constexpr (R > 4) {
        // Reading takes the time: row after row, as memory is read fastest.
#pragma GCC unroll 16
        for (int j = 0; j < R; j++)
            for (size_t k = 0; k < whole; k += E::lanes) {
                add(j, k, E::lanes);
                _mm_prefetch((const char*)(weight + j * inputs + k) + 8192, _MM_HINT_T0);
            }
    } else {
        // Computing does: R rows side by side, so that each input is loaded once for all of them.
        for (size_t k = 0; k < whole; k += E::lanes)
#pragma GCC unroll 16
            for (int j = 0; j < R; j++) {
                add(j, k, E::lanes);
                _mm_prefetch((const char*)(weight + (ahead + j) * inputs + k), _MM_HINT_T0);
            }
    }
    if (whole < inputs)
        for (int j = 0; j < R; j++) add(j, whole, inputs - whole);
    alignas(64) float out[16];
    _mm512_store_ps(out, sum_each(sums));
    for (int i = 0; i < X; i++) {
        __m512 sum = _mm512_maskz_loadu_ps(first16(R), out + i * R);
        if (bias) sum = _mm512_add_ps(sum, E::widen(bias, first16(R)));
        E::narrow(outputs + i * stride, sum, first16(R));
    }
}

constexpr size_t MANY = 128;  // rows

// The outputs from `first` to `last`, of all rows.
template <class E>
void linear(const typename E::T* rows, const typename E::T* weight, const typename E::T* bias, typename E::T* outputs,
            size_t num_rows, size_t num_outputs, size_t inputs, size_t first, size_t last) {
    // How many weight rows ahead to fetch: more while reading and computing take about equally long.
    size_t ahead = num_rows > 4 && num_rows <= 16 ? 8 : 4;
    auto run = [&](auto r, auto x, size_t n, size_t m) {
        if constexpr (r.value * x.value <= 16)
            dot_block<E, r.value, x.value>(weight + n * inputs, rows + m * inputs, bias ? bias + n : nullptr,
                                           outputs + m * num_outputs + n, inputs, num_outputs, ahead);
    };
    using Four = std::integral_constant<int, 4>;
    // So many rows at a time stay in the second cache, however often the weight's rows pass by.
    if (num_rows > MANY) {
        for (size_t m = 0; m < num_rows; m += MANY)
            linear<E>(rows + m * inputs, weight, bias, outputs + m * num_outputs, std::min(MANY, num_rows - m), num_outputs,
                      inputs, first, last);
        return;
    }
    // Rows are dealt out evenly over blocks of at most four: 6 are 3 and 3, not 4, 1 and 1.
    size_t blocks = (num_rows + 3) / 4;
    auto columns = [&](auto r, size_t n) {
        for (size_t block = 0; block < blocks; block++) {
            size_t m = block * num_rows / blocks;
            switch ((block + 1) * num_rows / blocks - m) {
                case 1: run(r, std::integral_constant<int, 1>{}, n, m); break;
                case 2: run(r, std::integral_constant<int, 2>{}, n, m); break;
                case 3: run(r, std::integral_constant<int, 3>{}, n, m); break;
                default: run(r, Four{}, n, m);
            }
        }
    };
    auto all = [&](auto r) {
        size_t n = first;
        for (; n + r.value <= last; n += r.value) columns(r, n);
        for (; n < last; n++) columns(std::integral_constant<int, 1>{}, n);
    };
    // Few rows: many weight rows at once, as reading them is what takes the time.
    if (num_rows == 1)
        all(std::integral_constant<int, 16>{});
    else if (num_rows == 2)
        all(std::integral_constant<int, 8>{});
    else
        all(Four{});
}

}  // namespace prelay
