// Causal attention over paged keys and values, in place: no context is copied out of its blocks to decode.
//
// A few new tokens (decode): one token at a time, all its heads over one span of keys after the other; keys and values are
// read from memory once for all query heads that share them.
// Many new tokens (prefill): keys and values of a KV head are packed once into panels of 64 columns, and blocks of query
// rows run over them with a running softmax (Dao et al. 2022, "FlashAttention"), both products on one register tile.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "simd.h"

namespace prelay {

// Where one sequence's keys and values of one layer and one KV head lie.
template <class E>
struct Context {
    const typename E::T* keys;   // of block 0 of the pool
    const typename E::T* values;
    const int32_t* table;
    size_t block_stride, token_stride, block_size;

    // Read the blocks that hold positions first .. last - 1 from end to end, keys and then values. The CPU foresees
    // such reads, and not the strides of one head: what follows finds the blocks in its cache, in half the time.
    void touch(size_t first, size_t last) const {
        size_t bytes = 2 * block_size * token_stride * sizeof(typename E::T);
        for (size_t b = first / block_size; b * block_size < last; b++) {
            const char* at = (const char*)(keys + table[b] * block_stride);
#pragma GCC unroll 4
            for (size_t i = 0; i < bytes; i += 64) (void)*(const volatile char*)(at + i);
        }
    }

    size_t offset(size_t position) const {
        return table[position / block_size] * block_stride + position % block_size * token_stride;
    }
    // How many of `count` positions from `position` on lie one after the other.
    size_t run(size_t position, size_t count) const { return std::min(count, block_size - position % block_size); }
};

constexpr float NONE = -std::numeric_limits<float>::infinity();

// ---- decode ----

constexpr size_t SPAN = 128;  // keys between two rescalings of the running softmax

struct Running {
    float top, sum;
};

// scores[head * SPAN + position - first] = query[head] . key[position], positions first .. last - 1.
template <class E, int D>
void score(const Context<E>& context, const typename E::T* queries, size_t num_heads, size_t first, size_t last,
           float* scores) {
    constexpr int STEPS = D / E::lanes;
    for (size_t p = first; p < last;) {
        size_t count = context.run(p, std::min<size_t>(16, last - p));
        const auto* key = context.keys + context.offset(p);
        for (size_t head = 0; head < num_heads; head++) {
            typename E::V q[STEPS];
            for (int k = 0; k < STEPS; k++) q[k] = E::load(queries + head * D + k * E::lanes);
            __m512 sums[16];
#pragma GCC unroll 16
            for (size_t j = 0; j < 16; j++) {
                sums[j] = _mm512_setzero_ps();
                // Beyond the run the last key again: what it gives is not stored.
                const auto* row = key + std::min(j, count - 1) * context.token_stride;
                for (int k = 0; k < STEPS; k++) sums[j] = E::dot(sums[j], E::load(row + k * E::lanes), q[k]);
            }
            _mm512_mask_storeu_ps(scores + head * SPAN + p - first, first16(count), sum_each(sums));
        }
        p += count;
    }
}

// Softmax weights of one row's scores of the columns low .. high - 1 (others get 0), with what came before them.
// Returns by how much the row's output so far is to be multiplied.
template <class E>
float soften(const float* scores, typename E::T* weights, size_t columns, size_t low, size_t high, float scale,
                  Running& row) {
    auto visible = [&](size_t i) {
        return (__mmask16)(first16(high > i ? high - i : 0) & ~first16(low > i ? low - i : 0));
    };
    __m512 top = _mm512_set1_ps(NONE);
    for (size_t i = low / 16 * 16; i < high; i += 16)
        top = _mm512_max_ps(top, _mm512_mask_loadu_ps(top, visible(i), scores + i));
    float before = row.top;
    row.top = std::max(before, _mm512_reduce_max_ps(top) * scale);
    __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(row.top), sum = _mm512_setzero_ps();
    for (size_t i = 0; i < columns; i += 16) {
        __mmask16 mask = visible(i);
        __m512 w = _mm512_setzero_ps();
        if (mask) w = _mm512_maskz_mov_ps(mask, exp(_mm512_fmsub_ps(_mm512_maskz_loadu_ps(mask, scores + i), factor, shift)));
        sum = _mm512_add_ps(sum, w);
        E::narrow(weights + i, w);
    }
    float correction = before == NONE ? 0.0f : std::exp(before - row.top);
    row.sum = row.sum * correction + _mm512_reduce_add_ps(sum);
    return correction;
}

// Adds weight * value of `count` tokens that lie one after the other; acc: HEADS * D / 16 registers.
template <int D, int HEADS>
inline void add_values(__m512* acc, const float* value, size_t token_stride, const float* weights, size_t stride,
                       size_t count) {
    for (size_t j = 0; j < count; j++)
        for (int d = 0; d < D / 16; d++) {
            __m512 v = _mm512_loadu_ps(value + j * token_stride + d * 16);
            for (int h = 0; h < HEADS; h++)
                acc[h * D / 16 + d] = _mm512_fmadd_ps(_mm512_set1_ps(weights[h * stride + j]), v, acc[h * D / 16 + d]);
        }
}

// The same by pairs of tokens, whose elements are interleaved; the accumulators stay in the order of the unpacking.
template <int D, int HEADS>
inline void add_values(__m512* acc, const uint16_t* value, size_t token_stride, const uint16_t* weights, size_t stride,
                       size_t count) {
    for (size_t j = 0; j < count; j += 2) {
        const uint16_t *even = value + j * token_stride, *odd = even + (j + 1 < count ? token_stride : 0);
        __m512bh w[HEADS];
        for (int h = 0; h < HEADS; h++) {
            __m512i pair = (__m512i)Bf16::broadcast(weights + h * stride + j);
            // An odd token at the end has the weight of a token of the next run beside it.
            w[h] = (__m512bh)(j + 1 < count ? pair : _mm512_and_si512(pair, _mm512_set1_epi32(0xffff)));
        }
        for (int d = 0; d < D / 32; d++) {
            __m512i a = _mm512_loadu_si512(even + d * 32), b = _mm512_loadu_si512(odd + d * 32);
            auto low = (__m512bh)_mm512_unpacklo_epi16(a, b), high = (__m512bh)_mm512_unpackhi_epi16(a, b);
            for (int h = 0; h < HEADS; h++) {
                __m512* to = acc + h * D / 16 + d * 2;
                to[0] = _mm512_dpbf16_ps(to[0], low, w[h]);
                to[1] = _mm512_dpbf16_ps(to[1], high, w[h]);
            }
        }
    }
}

inline void store_values(F32, const float* acc, float* out, int width, float factor) {
    for (int d = 0; d < width / 16; d++) F32::narrow(out + d * 16, _mm512_mul_ps(_mm512_loadu_ps(acc + d * 16), _mm512_set1_ps(factor)));
}

inline void store_values(Bf16, const float* acc, uint16_t* out, int width, float factor) {
    __m512 f = _mm512_set1_ps(factor);
    for (int d = 0; d < width / 16; d += 2) {
        __m512 low = _mm512_loadu_ps(acc + d * 16), high = _mm512_loadu_ps(acc + d * 16 + 16);
        __m512 a = _mm512_shuffle_f32x4(low, high, 0x44), b = _mm512_shuffle_f32x4(low, high, 0xee);
        Bf16::narrow(out + d * 16, _mm512_mul_ps(_mm512_shuffle_f32x4(a, a, 0xd8), f));
        Bf16::narrow(out + d * 16 + 16, _mm512_mul_ps(_mm512_shuffle_f32x4(b, b, 0xd8), f));
    }
}

// out[head * D ..] = out * corrections[head] + weights[head] . values, positions first .. last - 1.
template <class E, int D, int HEADS>
void weigh(const Context<E>& context, const typename E::T* weights, const float* corrections, size_t first,
           size_t last, float* out) {
    __m512 acc[HEADS * D / 16];
    for (int i = 0; i < HEADS * D / 16; i++)
        acc[i] = _mm512_mul_ps(_mm512_loadu_ps(out + i * 16), _mm512_set1_ps(corrections[i / (D / 16)]));
    for (size_t p = first; p < last;) {
        size_t count = context.run(p, last - p);
        add_values<D, HEADS>(acc, context.values + context.offset(p), context.token_stride, weights + p - first, SPAN,
                             count);
        p += count;
    }
    for (int i = 0; i < HEADS * D / 16; i++) _mm512_storeu_ps(out + i * 16, acc[i]);
}

template <class E, int D>
void weigh_all(const Context<E>& context, const typename E::T* weights, const float* corrections, size_t num_heads,
               size_t first, size_t last, float* out) {
    constexpr size_t AT_ONCE = std::max<size_t>(1, std::min<size_t>(4, 256 / D));
    size_t h = 0;
    auto some = [&](auto heads) {
        for (; h + heads.value <= num_heads; h += heads.value)
            weigh<E, D, heads.value>(context, weights + h * SPAN, corrections + h, first, last, out + h * D);
    };
    some(std::integral_constant<int, AT_ONCE>{});
    if constexpr (AT_ONCE >= 4) some(std::integral_constant<int, 3>{});
    if constexpr (AT_ONCE >= 3) some(std::integral_constant<int, 2>{});
    some(std::integral_constant<int, 1>{});
}

// One new token: all its heads, over positions first .. last - 1.
template <class E, int D>
void decode(Context<E> context, const typename E::T* queries, size_t num_heads, size_t num_kv_heads, size_t first,
            size_t last, float scale, typename E::T* out, std::vector<float>& scratch) {
    using T = typename E::T;
    size_t group = num_heads / num_kv_heads;
    scratch.resize(num_heads * (2 * SPAN + D + 3));
    float *scores = scratch.data(), *sums = scores + num_heads * SPAN, *corrections = sums + num_heads * D;
    auto* running = (Running*)(corrections + num_heads);
    auto* weights = (T*)(running + num_heads);
    std::fill_n(sums, num_heads * D, 0.0f);
    std::fill_n(running, num_heads, Running{NONE, 0.0f});
    for (size_t p = first; p < last; p += SPAN) {
        size_t end = std::min(p + SPAN, last);
        context.touch(p, end);
        Context<E> head = context;
        for (size_t h = 0; h < num_kv_heads; h++, head.keys += D) {
            score<E, D>(head, queries + h * group * D, group, p, end, scores + h * group * SPAN);
        }
        for (size_t h = 0; h < num_heads; h++)
            corrections[h] = soften<E>(scores + h * SPAN, weights + h * SPAN, SPAN, 0, end - p, scale, running[h]);
        head = context;
        for (size_t h = 0; h < num_kv_heads; h++, head.values += D) {
            weigh_all<E, D>(head, weights + h * group * SPAN, corrections + h * group, group, p, end,
                            sums + h * group * D);
        }
    }
    for (size_t h = 0; h < num_heads; h++) store_values(E{}, sums + h * D, out + h * D, D, 1.0f / running[h].sum);
}

// ---- prefill ----

constexpr size_t PANEL = 64;   // columns of a packed operand
constexpr size_t STRETCH = 512;  // keys between two rescalings of the running softmax
constexpr size_t ROWS = 24;    // query rows that run over the keys together
constexpr int TILE = 6;        // query rows of one register tile

// out[row][column] = or += rows (elements, `depth` along the sum) times a packed panel; R rows, C * 16 columns.
template <class E, int R, int C>
inline void tile(const typename E::T* rows, size_t row_stride, const typename E::T* panel, size_t panel_width,
                 size_t depth, float* out, size_t out_stride, bool accumulate) {
    __m512 acc[R * C];
    for (int i = 0; i < R; i++)
        for (int c = 0; c < C; c++)
            acc[i * C + c] = accumulate ? _mm512_loadu_ps(out + i * out_stride + c * 16) : _mm512_setzero_ps();
    for (size_t k = 0; k < depth; k += E::group, panel += panel_width * E::group) {
        typename E::V b[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) b[c] = E::load(panel + c * E::lanes);
#pragma GCC unroll 6
        for (int i = 0; i < R; i++) {
            typename E::V a = E::broadcast(rows + i * row_stride + k);
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) acc[i * C + c] = E::dot(acc[i * C + c], a, b[c]);
        }
    }
    for (int i = 0; i < R; i++)
        for (int c = 0; c < C; c++) _mm512_storeu_ps(out + i * out_stride + c * 16, acc[i * C + c]);
}

template <class E, int C>
void tiles(const typename E::T* rows, size_t num_rows, size_t row_stride, const typename E::T* panel,
           size_t panel_width, size_t depth, float* out, size_t out_stride, bool accumulate) {
    size_t r = 0;
    for (; r + TILE <= num_rows; r += TILE)
        tile<E, TILE, C>(rows + r * row_stride, row_stride, panel, panel_width, depth, out + r * out_stride, out_stride,
                         accumulate);
    for (; r < num_rows; r++)
        tile<E, 1, C>(rows + r * row_stride, row_stride, panel, panel_width, depth, out + r * out_stride, out_stride,
                      accumulate);
}

// Sixteen rows of sixteen 32-bit words become sixteen columns.
inline void transpose(__m512i* v) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        v[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        v[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
}

// Positions first .. last - 1, padded with zeros to a multiple of PANEL: keys into panels [D / group][PANEL][group] of
// PANEL keys each, values into panels [padded / group][width][group] of at most PANEL columns each.
template <class E, int D>
void pack(const Context<E>& context, size_t first, size_t last, size_t padded, typename E::T* keys,
          typename E::T* values) {
    using T = typename E::T;
    constexpr size_t G = E::group, WIDTH = std::min<size_t>(D, PANEL), WORDS = 16 * G;
    static const T zeros[D] = {};
    auto row = [&](const T* base, size_t n) { return first + n < last ? base + context.offset(first + n) : zeros; };
    for (size_t n = 0; n < padded; n += 16) {
        const T* rows[16];
        for (size_t j = 0; j < 16; j++) rows[j] = row(context.keys, n + j);
        T* to = keys + n / PANEL * PANEL * D + n % PANEL * G;
        for (size_t d = 0; d < D; d += WORDS) {
            __m512i words[16];
            for (size_t j = 0; j < 16; j++) words[j] = _mm512_loadu_si512(rows[j] + d);
            transpose(words);
            for (size_t j = 0; j < 16; j++) _mm512_storeu_si512(to + (d / G + j) * PANEL * G, words[j]);
        }
        for (size_t j = 0; j < 16; j += G) {
            const T *even = row(context.values, n + j), *odd = row(context.values, n + j + G - 1);
            for (size_t d = 0; d < D; d += 16)
                E::interleave(even + d, odd + d,
                              values + d / WIDTH * WIDTH * padded + (n + j) * WIDTH + d % WIDTH * G);
        }
    }
}

struct Scratch {
    std::vector<float> decode, scores, output;
    std::vector<unsigned char> keys, values, weights, queries;
};

template <class T>
T* room(std::vector<unsigned char>& bytes, size_t count) {
    if (bytes.size() < count * sizeof(T) + 64) bytes.resize(count * sizeof(T) + 64);
    return (T*)(((uintptr_t)bytes.data() + 63) / 64 * 64);
}

// Many new tokens of one sequence, one KV head and its query heads; out and queries: [num_tokens][...] with strides.
template <class E, int D>
void prefill(const Context<E>& context, const typename E::T* queries, size_t query_stride, typename E::T* out,
             size_t out_stride, size_t num_tokens, size_t num_heads, size_t start, size_t window, float scale,
             Scratch& scratch) {
    using T = typename E::T;
    constexpr size_t WIDTH = std::min<size_t>(D, PANEL);
    size_t origin = window && start + 1 > window ? start + 1 - window : 0, last = start + num_tokens;
    size_t padded = (last - origin + PANEL - 1) / PANEL * PANEL;
    T* keys = room<T>(scratch.keys, padded * D);
    T* values = room<T>(scratch.values, padded * D);
    T* weights = room<T>(scratch.weights, ROWS * STRETCH);
    scratch.scores.resize(ROWS * STRETCH);
    scratch.output.resize(ROWS * D);
    float *scores = scratch.scores.data(), *output = scratch.output.data();
    pack<E, D>(context, origin, last, padded, keys, values);
    for (size_t head = 0; head < num_heads; head++)
        for (size_t token = 0; token < num_tokens; token += ROWS) {
            size_t rows = std::min(ROWS, num_tokens - token);
            const T* q = queries + token * query_stride + head * D;
            Running running[ROWS];
            for (auto& row : running) row = {NONE, 0.0f};
            // In columns from `origin` on: what the block's first row sees first, and its last row sees last.
            auto sees_from = [&](size_t r) {
                size_t position = start + token + r;
                return window && position + 1 > window + origin ? position + 1 - window - origin : 0;
            };
            auto sees_to = [&](size_t r) { return start + token + r + 1 - origin; };
            size_t begin = sees_from(0) / PANEL * PANEL, end = sees_to(rows - 1);
            for (size_t stretch = begin; stretch < end; stretch += STRETCH) {
                size_t columns = std::min(STRETCH, (end - stretch + PANEL - 1) / PANEL * PANEL);
                for (size_t c = 0; c < columns; c += PANEL)
                    tiles<E, 4>(q, rows, query_stride, keys + (stretch + c) * D, PANEL, D, scores + c, STRETCH, false);
                for (size_t r = 0; r < rows; r++) {
                    size_t from = sees_from(r), to = sees_to(r);
                    size_t low = std::min(columns, from > stretch ? from - stretch : 0);
                    size_t high = std::min(columns, to > stretch ? to - stretch : 0);
                    if (low > high) low = high;
                    float correction = 1.0f;
                    if (low == high)
                        std::fill_n(weights + r * STRETCH, columns, T{});
                    else
                        correction = soften<E>(scores + r * STRETCH, weights + r * STRETCH, columns, low, high, scale,
                                                    running[r]);
                    if (stretch == begin)
                        std::fill_n(output + r * D, D, 0.0f);
                    else if (correction != 1.0f)
                        for (size_t d = 0; d < D; d += 16) {
                            __m512 o = _mm512_loadu_ps(output + r * D + d);
                            _mm512_storeu_ps(output + r * D + d, _mm512_mul_ps(o, _mm512_set1_ps(correction)));
                        }
                }
                for (size_t d = 0; d < D; d += WIDTH)
                    tiles<E, WIDTH / 16>(weights, rows, STRETCH, values + d * padded + stretch * WIDTH, WIDTH, columns,
                                         output + d, D, true);
            }
            for (size_t r = 0; r < rows; r++)
                for (size_t d = 0; d < D; d += 16)
                    E::narrow(out + (token + r) * out_stride + head * D + d,
                              _mm512_mul_ps(_mm512_loadu_ps(output + r * D + d), _mm512_set1_ps(1.0f / running[r].sum)));
        }
}

}  // namespace prelay
