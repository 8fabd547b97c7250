// What Python calls: plain C functions over addresses and sizes. See engine/kernels/native.py.
//
// Built once with the instruction sets that the helpers name; the caller makes sure that the CPU has them.
// All strides count elements. `threads` is how many threads may share the call's work.
#include "attention.h"
#include "linear.h"
#include "pool.h"
#include "rows.h"

using namespace prelay;

namespace {

Pool& pool() {
    static Pool* one = new Pool;  // never destroyed: its threads outlive every static
    return *one;
}

// The part-th of `parts` runs of 0 .. count - 1, in multiples of `unit`.
size_t border(size_t count, size_t part, size_t parts, size_t unit) {
    size_t units = (count + unit - 1) / unit;
    return std::min(count, units * part / parts * unit);
}

template <class E>
void linear_all(const void* rows, const void* weight, const void* bias, void* outputs, size_t num_rows,
                size_t num_outputs, size_t inputs, size_t threads) {
    using T = typename E::T;
    pool().run(threads, [&](size_t part) {
        linear<E>((const T*)rows, (const T*)weight, (const T*)bias, (T*)outputs, num_rows, num_outputs, inputs,
                  border(num_outputs, part, threads, 16), border(num_outputs, part + 1, threads, 16));
    });
}

struct Attention {
    const void* queries;   // [tokens][heads][D], strides below
    const void* keys;      // new ones: [tokens][kv_heads][D]
    const void* values;
    void* out;             // [tokens][heads][D], contiguous
    void* cached_keys;     // of this layer, in block 0 of the pool
    void* cached_values;
    const int32_t* query_starts;   // [chunks + 1]
    const int32_t* context_lens;   // [chunks]
    const int32_t* block_tables;   // [chunks][table_stride]
    size_t query_stride, key_stride, value_stride, block_stride, table_stride;
    size_t num_chunks, num_heads, num_kv_heads, head_dim, block_size;
    size_t window;                 // 0: none
    float scale;
    size_t threads;
};

// Below this many new tokens a chunk is computed token by token: packing its context would cost more than it saves.
constexpr size_t FEW = 8;

template <class E, int D>
void attend(const Attention& a) {
    using T = typename E::T;
    size_t token_stride = a.num_kv_heads * D, group = a.num_heads / a.num_kv_heads;
    auto* keys = (T*)a.cached_keys;
    auto* values = (T*)a.cached_values;
    for (size_t c = 0; c < a.num_chunks; c++) {
        const int32_t* table = a.block_tables + c * a.table_stride;
        size_t first = a.query_starts[c], last = a.query_starts[c + 1], start = a.context_lens[c] - (last - first);
        for (size_t row = first; row < last; row++) {
            size_t position = start + row - first;
            size_t at = table[position / a.block_size] * a.block_stride + position % a.block_size * token_stride;
            std::copy_n((const T*)a.keys + row * a.key_stride, token_stride, keys + at);
            std::copy_n((const T*)a.values + row * a.value_stride, token_stride, values + at);
        }
    }
    pool().run(a.threads, [&](size_t part) {
        static thread_local Scratch scratch;
        for (size_t c = part; c < a.num_chunks; c += a.threads) {
            size_t first = a.query_starts[c], count = a.query_starts[c + 1] - first;
            size_t start = a.context_lens[c] - count;
            Context<E> context{keys, values, a.block_tables + c * a.table_stride, a.block_stride, token_stride,
                               a.block_size};
            const T* queries = (const T*)a.queries + first * a.query_stride;
            T* out = (T*)a.out + first * a.num_heads * D;
            for (size_t t = 0; count < FEW && t < count; t++) {
                size_t end = start + t + 1, begin = a.window && end > a.window ? end - a.window : 0;
                decode<E, D>(context, queries + t * a.query_stride, a.num_heads, a.num_kv_heads, begin, end, a.scale,
                             out + t * a.num_heads * D, scratch.decode);
            }
            for (size_t h = 0; count >= FEW && h < a.num_kv_heads; h++, context.keys += D, context.values += D)
                prefill<E, D>(context, queries + h * group * D, a.query_stride, out + h * group * D, a.num_heads * D,
                              count, group, start, a.window, a.scale, scratch);
        }
    });
}

template <class E>
int attend_any(const Attention& a) {
    switch (a.head_dim) {
        case 16: if constexpr (E::lanes <= 16) return attend<E, 16>(a), 0; else return 1;
        case 32: return attend<E, 32>(a), 0;
        case 64: return attend<E, 64>(a), 0;
        case 128: return attend<E, 128>(a), 0;
        default: return 1;
    }
}

}  // namespace

#define FOR_EACH_ROW(E, call)                                                        \
    pool().run(threads, [&](size_t part) {                                           \
        using T = typename E::T;                                                     \
        size_t end = border(num_rows, part + 1, threads, 1);                         \
        for (size_t row = border(num_rows, part, threads, 1); row < end; row++) call; \
    })

extern "C" {

#define KERNELS(NAME, E)                                                                                              \
    void linear_##NAME(const void* rows, const void* weight, const void* bias, void* outputs, size_t num_rows,        \
                       size_t num_outputs, size_t inputs, size_t threads) {                                           \
        linear_all<E>(rows, weight, bias, outputs, num_rows, num_outputs, inputs, threads);                           \
    }                                                                                                                 \
    void rms_norm_##NAME(const void* x, const void* weight, void* out, size_t num_rows, size_t width, float eps,      \
                         size_t threads) {                                                                            \
        FOR_EACH_ROW(E, rms_norm<E>((const T*)x + row * width, (const T*)weight, (T*)out + row * width, width, eps)); \
    }                                                                                                                 \
    void add_rms_norm_##NAME(void* hidden, const void* delta, const void* weight, void* out, size_t num_rows,         \
                             size_t width, float eps, size_t threads) {                                               \
        FOR_EACH_ROW(E, {                                                                                             \
            add<E>((T*)hidden + row * width, (const T*)delta + row * width, width);                                   \
            rms_norm<E>((const T*)hidden + row * width, (const T*)weight, (T*)out + row * width, width, eps);         \
        });                                                                                                           \
    }                                                                                                                 \
    void rotate_##NAME(void* heads, const float* cosines, const float* sines, size_t num_rows, size_t row_stride,     \
                       size_t num_heads, size_t head_dim, size_t threads) {                                           \
        FOR_EACH_ROW(E, rotate<E>((T*)heads + row * row_stride, cosines + row * (head_dim / 2),                       \
                                  sines + row * (head_dim / 2), num_heads, head_dim));                                \
    }                                                                                                                 \
    void gated_silu_##NAME(const void* gate_up, void* out, size_t num_rows, size_t width, size_t threads) {           \
        FOR_EACH_ROW(E, gated_silu<E>((const T*)gate_up + row * 2 * width, (const T*)gate_up + (row * 2 + 1) * width, \
                                      (T*)out + row * width, width));                                                 \
    }                                                                                                                 \
    int attend_##NAME(const Attention* attention) { return attend_any<E>(*attention); }

const char* source_hash() { return SOURCE_HASH; }

KERNELS(float32, F32)
KERNELS(bfloat16, Bf16)
}
