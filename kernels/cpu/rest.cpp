// The small operations between products and attention.

#include "vectors.h"

// y = x / rms(x) * weight over rows of E; the norm is taken in fp32.
template <class T>
static void rms_norm(const T* x, long x_stride, const T* weight, float eps, T* y, long rows, long E, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * E > 1 << 13)
    for (long r = 0; r < rows; r++) {
        const T* from = x + r * x_stride;
        V squares{};
        long e = 0;
        for (; e + W <= E; e += W) squares += load(from + e) * load(from + e);
        float total = sum(squares);
        for (; e < E; e++) total += get(from + e) * get(from + e);
        float scale = 1 / std::sqrt(total / E + eps);
        for (e = 0; e + W <= E; e += W) store(y + r * E + e, load(from + e) * scale * load(weight + e));
        for (; e < E; e++) put(y + r * E + e, get(from + e) * scale * get(weight + e));
    }
}

// Turns x [D] into y: the pair (i, i + D/2) by its angle.
template <class X, class Y>
static void rotate(const X* x, const float* cos, const float* sin, Y* y, long D) {
    long i = 0;
    for (; i + W <= D / 2; i += W) {
        V a = load(x + i), b = load(x + i + D / 2), c = load(cos + i), s = load(sin + i);
        store(y + i, a * c - b * s);
        store(y + i + D / 2, b * c + a * s);
    }
    for (; i < D / 2; i++) {
        float a = get(x + i), b = get(x + i + D / 2);
        put(y + i, a * cos[i] - b * sin[i]);
        put(y + i + D / 2, b * cos[i] + a * sin[i]);
    }
}

// Queries are turned in place; keys are turned on their way into their slots, and values go there as they are.
template <class T, class C>
static void rope_and_write(T* q, const T* k, const T* v, const long* strides, const float* cos, const float* sin,
                           C* keys, C* values, const int64_t* slots, long tokens, long H, long G, long slots_in_pool,
                           long D, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens > 4)
    for (long t = 0; t < tokens; t++) {
        const float *c = cos + t * D / 2, *s = sin + t * D / 2;
        for (long h = 0; h < H; h++) {
            T* head = q + t * strides[0] + h * D;
            rotate(head, c, s, head, D);
        }
        if (slots[t] < 0) continue;
        for (long g = 0; g < G; g++) {
            long place = (g * slots_in_pool + slots[t]) * D;
            rotate(k + t * strides[1] + g * D, c, s, keys + place, D);
            for (long d = 0; d < D; d++) put(values + place + d, get(v + t * strides[2] + g * D + d));
        }
    }
}

// y [rows, F] = silu(gate) * up for x [rows, 2F] = (gate, up), silu(x) = x / (1 + e^-x).
template <class T>
static void silu_and_mul(const T* x, T* y, long rows, long F, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * F > 1 << 13)
    for (long r = 0; r < rows; r++) {
        const T *gate = x + r * 2 * F, *up = gate + F;
        long f = 0;
        for (; f + W <= F; f += W) {
            V a = load(gate + f);
            store(y + r * F + f, a / (1.0f + exp(-a)) * load(up + f));
        }
        for (; f < F; f++) put(y + r * F + f, get(gate + f) / (1 + std::exp(-get(gate + f))) * get(up + f));
    }
}

extern "C" {

void cpu_rms_norm(const void* x, int is_bf16, long x_stride, const void* weight, float eps, void* y, long rows, long E,
                  int threads) {
    with_type(is_bf16, [&](auto t) {
        using T = decltype(t);
        rms_norm((const T*)x, x_stride, (const T*)weight, eps, (T*)y, rows, E, threads);
    });
}

void cpu_rope_and_write(void* q, const void* k, const void* v, int is_bf16, long q_stride, long k_stride,
                        long v_stride, const float* cos, const float* sin, void* cache, int cache_bf16,
                        const int64_t* slots, long tokens, long H, long G, long N, long B, long D, int threads) {
    const long strides[] = {q_stride, k_stride, v_stride};
    with_type(is_bf16, [&](auto t) {
        with_type(cache_bf16, [&](auto c) {
            using T = decltype(t);
            auto *keys = (decltype(c)*)cache, *values = keys + G * N * B * D;
            rope_and_write((T*)q, (const T*)k, (const T*)v, strides, cos, sin, keys, values, slots, tokens, H, G, N * B, D,
                           threads);
        });
    });
}

void cpu_silu_and_mul(const void* x, int is_bf16, void* y, long rows, long F, int threads) {
    with_type(is_bf16, [&](auto t) {
        using T = decltype(t);
        silu_and_mul((const T*)x, (T*)y, rows, F, threads);
    });
}
}
