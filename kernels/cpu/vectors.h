// What a decode step on a CPU spends its time on, in C++. The third face of reference.py; symbols as there.
//
//   vectors.h      W floats at a time, which the compiler turns into what the machine has; and the tile, y += x w for
//                  a few rows and two vectors of columns: the one loop that all the time is spent in
//   linear.cpp     tiles over weights that were packed once
//   packed.h       weights in small numbers: packed.cpp, exact products; packed_int8.cpp, with activations rounded, too
//   attention.cpp  tiles over keys and values, read through the page table, with an online softmax
//   rest.cpp       norm, rope and cache write, gated activation
//   ranks.cpp      sums over several processes, through memory that they share
//
// Plain functions on plain memory: cpp.py builds these files once and calls them through ctypes.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// --- 1. vectors ---------------------------------------------------------------------------------------------

#if defined(LANES)  // tests try the widths of other machines
constexpr int W = LANES;
#elif defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t VI __attribute__((vector_size(4 * W)));
typedef uint32_t VU __attribute__((vector_size(4 * W)));
typedef uint16_t VH __attribute__((vector_size(2 * W)));
struct bf16 { uint16_t bits; };  // the upper half of a float

static inline V splat(float x) { return x - V{}; }  // a compiler may leave out "- 0", but not "+ 0"
static inline V load(const float* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
static inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
static inline V load(const bf16* p) {
    VH h;
    std::memcpy(&h, p, sizeof h);
    return (V)(__builtin_convertvector(h, VU) << 16);
}
static inline void store(bf16* p, V v) {
    VU bits = (VU)v;
    VU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to the nearest, ties to even
    VH h = __builtin_convertvector(v == v ? rounded : VU{} + 0x7fc0u, VH);  // a NaN stays one
    std::memcpy(p, &h, sizeof h);
}
static inline float get(const float* p) { return *p; }
static inline float get(const bf16* p) {
    uint32_t bits = (uint32_t)p->bits << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
static inline void put(float* p, float x) { *p = x; }
static inline void put(bf16* p, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    p->bits = x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : 0x7fc0u;
}

// Eight bits: whole numbers, or floats of four bits of exponent and three of mantissa (e4m3: 2^-9 to 448, no infinity).
// `widen` makes numbers of codes that stand in the upper bytes of words.
struct int8 { int8_t bits; };
struct fp8 { uint8_t bits; };

static inline V widen(int8, VU words) { return __builtin_convertvector((VI)words >> 24, V); }
// Sign, 4 bits of exponent and 3 of mantissa, moved to where a float has them, whose exponents begin 120 later. Exponent 0
// has no leading one: it gets the next exponent, and the one is taken off. (Multiplying by 2^120 does it all, but takes a
// hundred times as long where a float has no leading one, either.)
static inline V widen(fp8, VU words) {
    VU bits = words >> 4 & 0x07f00000u, low = (VU)(bits < 1u << 23);
    V size = (V)(bits + (120u << 23) + (low & 1u << 23)) - (V)(low & (VU)splat(0x1p-6f));
    return (V)((VU)size | (words & 0x80000000u));
}

// W codes, each as a word of its sign or of zeros. (What a compiler makes of a conversion of bytes to words is slow.)
template <class C>
static inline VU extend(const C* p) {
    VU words;
#if defined(__AVX512F__)
    if constexpr (W == 16) {
        __m128i codes = _mm_loadu_si128((const __m128i*)p);
        __m512i wide = std::is_same_v<C, int8> ? _mm512_cvtepi8_epi32(codes) : _mm512_cvtepu8_epi32(codes);
        std::memcpy(&words, &wide, sizeof words);
        return words;
    }
#endif
#if defined(__AVX2__)
    if constexpr (W == 8) {
        __m128i codes = _mm_loadl_epi64((const __m128i*)p);
        __m256i wide = std::is_same_v<C, int8> ? _mm256_cvtepi8_epi32(codes) : _mm256_cvtepu8_epi32(codes);
        std::memcpy(&words, &wide, sizeof words);
        return words;
    }
#endif
    for (int i = 0; i < W; i++) words[i] = (uint32_t)(int32_t)p[i].bits;
    return words;
}
static inline V load(const int8* p) { return __builtin_convertvector((VI)extend(p), V); }
static inline V load(const fp8* p) { return widen(fp8{}, extend(p) << 24); }
template <class C, class = std::enable_if_t<sizeof(C) == 1>>
static inline float get(const C* p) { return widen(C{}, VU{} + ((uint32_t)(uint8_t)p->bits << 24))[0]; }

static inline float sum(V v) { float s = 0; for (int i = 0; i < W; i++) s += v[i]; return s; }
static inline V larger(V a, V b) { return a > b ? a : b; }

// e^x = 2^n e^r with r = x - n ln 2, |r| <= ln(2)/2: a power of two is an exponent, and the rest a polynomial.
// Below -87, where floats end, it is 0: -inf, the score of what may not be seen, weighs nothing.
static inline V exp(V x) {
    V clamped = x > 88.0f ? splat(88.0f) : x < -87.0f ? splat(-87.0f) : x;
    V n = clamped * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 leaves no bits for a fraction: it rounds
    VI exponent = (VI)n - (VI)splat(12582912.0f);
    n -= 12582912.0f;
    V r = clamped - n * 0.693359375f;
    r += n * 2.12194440e-4f;
    V p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    return x < -87.0f ? V{} : p * (V)((exponent + 127) << 23);
}

// --- 2. the tile --------------------------------------------------------------------------------------------

// y [R, C W] += x [R, K] w [K, C W], or = if not add. Strides between rows: ldx, ldw, ldy; within a row 1.
// All the R C sums stay in registers.
// `ahead`: memory that is needed next; K times `step` bytes of it are called for on the way.
template <int R, int C, class T>
static void tile(const float* x, long ldx, const T* w, long ldw, long K, float* y, long ldy, bool add,
                 const char* ahead, long step) {
    V sums[R][C] = {};
    if (add)
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) sums[r][c] = load(y + r * ldy + c * W);
#pragma GCC unroll 4
    for (long k = 0; k < K; k++) {
        __builtin_prefetch(ahead + k * step, 0, 2);
        if constexpr (R < C) {  // what there is less of waits in registers for the other
            V xs[R];
            for (int r = 0; r < R; r++) xs[r] = splat(x[r * ldx + k]);
            for (int c = 0; c < C; c++) {
                V weights = load(w + k * ldw + c * W);
                for (int r = 0; r < R; r++) sums[r][c] += xs[r] * weights;
            }
        } else {
            V weights[C];
            for (int c = 0; c < C; c++) weights[c] = load(w + k * ldw + c * W);
            for (int r = 0; r < R; r++) {
                V xk = splat(x[r * ldx + k]);
                for (int c = 0; c < C; c++) sums[r][c] += xk * weights[c];
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(y + r * ldy + c * W, sums[r][c]);
}

constexpr int P = 2 * W;  // the columns of a tile of many rows, and the width of a panel of weights
// A tile of that width has at most so many rows. AVX2 has 16 registers, and some must hold weights.
constexpr int ROWS = W == 8 ? 6 : 12;

// The same for any number of rows, cut into tiles of nearly the same height, and for columns in whole panels. A
// tile's size must be known when it is compiled, so there is a function for each height, in a table; few rows are
// taken two panels at a time, or there would be too few sums to keep the multipliers busy.
template <class T, int... R>
static void multiply(std::integer_sequence<int, R...>, const float* x, long ldx, const T* w, long ldw, long rows, long K,
                     long columns, float* y, long ldy, bool add, const char* ahead, long bytes) {
    static constexpr decltype(&tile<1, 2, T>) narrow[] = {&tile<R + 1, 2, T>...};
    static constexpr decltype(&tile<1, 4, T>) wide[] = {&tile<R / 2 + 1, 4, T>...};
    long count = (rows + ROWS - 1) / ROWS, step = bytes / count / K;
    for (long i = 0; i < count; i++) {
        long begin = rows * i / count, height = rows * (i + 1) / count - begin;
        for (long c = 0; c < columns;) {
            bool two = 2 * height <= ROWS && c + 2 * P <= columns;
            auto f = two ? wide[2 * height - 1] : narrow[height - 1];
            f(x + begin * ldx, ldx, w + c, ldw, K, y + begin * ldy + c, ldy, add, ahead + bytes / count * i, step);
            c += two ? 2 * P : P;
        }
    }
}

// `ahead`: so many bytes from there on are called from memory meanwhile. (With none, w serves: it is there already.)
template <class T>
static void multiply(const float* x, long ldx, const T* w, long ldw, long rows, long K, long columns, float* y, long ldy,
                     bool add, const void* ahead = nullptr, long bytes = 0) {
    multiply(std::make_integer_sequence<int, ROWS>{}, x, ldx, w, ldw, rows, K, columns, y, ldy, add,
             (const char*)(ahead ? ahead : w), bytes);
}

// --- 3. types become templates ------------------------------------------------------------------------------

template <class F>
static void with_type(int is_bf16, F call) {
    if (is_bf16) call(bf16{});
    else call(float{});
}

// What a cache holds: see `KINDS` in cpp.py.
template <class F>
static void with_cache_type(int kind, F call) {
    if (kind == 0) call(float{});
    if (kind == 1) call(bf16{});
    if (kind == 2) call(int8{});
    if (kind == 3) call(fp8{});
}
