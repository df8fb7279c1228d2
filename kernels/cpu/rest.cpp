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

// A code in the lowest bytes of y, which lies within what codes can say: see `quantize` in reference.py.
static inline VU encode(int8, V y) {
    return (VU)__builtin_convertvector(y + (y > 0 ? splat(0.5f) : y < 0 ? splat(-0.5f) : V{}), VI);
}
static inline VU encode(fp8, V y) {
    VU bits = (VU)y & 0x7fffffffu;
    VU normal = (bits + 0x7ffffu + (bits >> 20 & 1u) - (120u << 23)) >> 20;  // to the nearest, ties to even
    VU small = (VU)((V)bits + 16384.0f) - (VU)splat(16384.0f);  // below 2^-6 codes are 2^-9 apart, as floats there are
    return ((V)bits < 0x1p-6f ? small : normal) | ((VU)y >> 24 & 0x80u);
}

// Codes [D] and a scale for x [D]; `fixed` is that scale, if it isn't 0.
template <class T, class C>
static void quantize(const T* x, C* codes, C* scale, long D, float fixed) {
    constexpr float largest = std::is_same_v<C, int8> ? 127 : 448;
    float top = 0;
    bool finite = true;
    for (long d = 0; d < D; d++) top = std::max(top, std::abs(get(x + d))), finite &= std::isfinite(get(x + d));
    float by = fixed ? fixed : std::max(top * (1 / largest), 1e-6f), nan = NAN;
    std::memcpy(scale, finite ? &by : &nan, sizeof by);
    for (long d = 0; d < D; d += W) {
        V y{};
        long count = std::min<long>(W, D - d);
        for (long i = 0; i < count; i++) y[i] = finite ? get(x + d + i) : 0;
        y /= by;
        VU code = encode(C{}, y > largest ? splat(largest) : y < -largest ? splat(-largest) : y);
        for (long i = 0; i < count; i++) codes[d + i].bits = code[i];
    }
}

// A layer's cache [2, G, N, B, D], and the slots that the batch's tokens are written to. fixed: see `quantize`.
template <class C>
struct Target {
    C* cache;
    const int64_t* slots;
    long G, N, B, D;
    float fixed[2];

    // Key (part 0) or value (part 1) x [D] of token t, head g.
    template <class T>
    void write(int part, long t, long g, const T* x) const {
        constexpr bool scaled = sizeof(C) == 1;
        long block = slots[t] / B, offset = slots[t] % B;
        C* begin = cache + ((part * G + g) * N + block) * B * (scaled ? D + (long)sizeof(float) : D);
        if constexpr (scaled) quantize(x, begin + offset * D, begin + B * D + offset * sizeof(float), D, fixed[part]);
        else
            for (long d = 0; d < D; d++) put(begin + offset * D + d, get(x + d));
    }
};

// Queries are turned in place; keys are turned on their way into their slots, and values go there as they are.
template <class T, class C>
static void rope_and_write(T* q, const T* k, const T* v, const long* strides, const float* cos, const float* sin,
                           const Target<C>& target, long tokens, long H, int threads) {
    long D = target.D;
#pragma omp parallel for num_threads(threads) if (tokens > 4)
    for (long t = 0; t < tokens; t++) {
        const float *c = cos + t * D / 2, *s = sin + t * D / 2;
        for (long h = 0; h < H; h++) {
            T* head = q + t * strides[0] + h * D;
            rotate(head, c, s, head, D);
        }
        if (target.slots[t] < 0) continue;
        std::vector<T> key(D);
        for (long g = 0; g < target.G; g++) {
            rotate(k + t * strides[1] + g * D, c, s, key.data(), D);
            target.write(0, t, g, key.data());
            target.write(1, t, g, v + t * strides[2] + g * D);
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
                        long v_stride, const float* cos, const float* sin, void* cache, int cache_kind,
                        const int64_t* slots, long tokens, long H, long G, long N, long B, long D, float k_scale,
                        float v_scale, int threads) {
    const long strides[] = {q_stride, k_stride, v_stride};
    with_type(is_bf16, [&](auto t) {
        with_cache_type(cache_kind, [&](auto c) {
            using T = decltype(t);
            Target<decltype(c)> target{(decltype(c)*)cache, slots, G, N, B, D, {k_scale, v_scale}};
            rope_and_write((T*)q, (const T*)k, (const T*)v, strides, cos, sin, target, tokens, H, threads);
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
