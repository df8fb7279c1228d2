// Products with weights that stay in small numbers: see packed.py for the formula
//
//     W[o, i] = scale[o, g] (code[o, i] - zero[o, g]) + minimum[o, g]
//
// Two ways. *Exact* (packed.cpp): codes become floats on their way from memory, the very floats that `dequantize` makes,
// and are summed as in linear.cpp, so that the outcome is the same to the last bit. *int8* (packed_int8.cpp):
// activations are rounded to 8 bits, with a scale for each 32 of them, and products are summed in integers.
//
// Codes lie in panels of P rows, as floats do, and in a panel in units of 32 columns. A lane is a row; its 32-bit words
// hold the codes of a unit so that a shift and a mask bring out a quad: 4 codes, 8 bits apart, columns 4t .. 4t + 3.
// That is what an instruction for integer dot products takes, and floats are made of its bytes one by one.
//
//     4 bits   word u: its low nibbles are quad 2u, its high ones quad 2u + 1
//     5 bits   the same, and a fifth word with the upper bits: quad t is at bit t of each byte
//     6 bits   the same, and two words with the upper two bits: quad t is at bits 2 (t % 4) of word t / 4
//     8 bits   word t is quad t

#pragma once

#include "vectors.h"

constexpr long UNIT = 32, OUTER = 256;
enum Scale { HALF, FLOAT, NESTED };  // fp16; fp32; int8 times an fp16 for OUTER columns
enum Form { PLAIN, SHORT, FLOAT8 };  // how a code becomes a float, see each_weight

// As in packed.py, and laid out by cpp_packed.py: words [N / P, K / UNIT, bits, P]; of each group of columns scale,
// minimum, zeros [N / P, groups, P]; outer ones [N / P, K / OUTER, P].
struct Matrix {
    const uint32_t* words;
    const void *scale, *minimum;  // minimum may be null
    const uint16_t* zeros;        // null if `zero` is that of all
    const uint16_t *outer_scale, *outer_minimum;
    long N, K, groups, shift;  // column k is in group k >> shift: a division takes longer than a product
    float zero;
    int bits, kind, form;
};

// --- codes, and what makes numbers of them ------------------------------------------------------------------

static inline VU load(const uint32_t* p) { VU v; std::memcpy(&v, p, sizeof v); return v; }

static inline V load_half(const uint16_t* p) {  // finite ones
    [[maybe_unused]] V v;
#if defined(__AVX512F__)
    if constexpr (W == 16) {
        __m512 floats = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
        std::memcpy(&v, &floats, sizeof v);
        return v;
    }
#endif
#if defined(__F16C__)
    if constexpr (W == 8) {
        __m256 floats = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
        std::memcpy(&v, &floats, sizeof v);
        return v;
    }
#endif
    VH h;
    std::memcpy(&h, p, sizeof h);
    VU bits = __builtin_convertvector(h, VU);
    V size = (V)((bits & 0x7fffu) << 13) * 0x1p112f;  // the exponents of fp16 begin 112 later
    return (V)((VU)size | (bits & 0x8000u) << 16);
}

// Quad t of W rows; `words`: their first word of the unit.
template <int BITS>
static inline VU quad(const uint32_t* words, int t) {
    if constexpr (BITS == 8) return load(words + t * P);
    VU low = load(words + t / 2 * P);
    low = (t % 2 ? low >> 4 : low) & 0x0f0f0f0fu;
    if constexpr (BITS == 5) return low | (load(words + 4 * P) >> t & 0x01010101u) << 4;
    if constexpr (BITS == 6) return low | (load(words + (4 + t / 4) * P) >> 2 * (t % 4) & 0x03030303u) << 4;
    return low;
}

// The coefficients of the formula for the P rows of a panel and one group.
struct Coefficients { V scale[2], zero[2], minimum[2]; };

// Scales (or minima) at `inner`, and `outer` ones, if they are not simply fp16.
__attribute__((noinline)) static V find_other(const Matrix& w, const void* inner, long at, const uint16_t* outer, long to) {
    if (w.kind == FLOAT) return load((const float*)inner + at);
    return load((const int8*)inner + at) * load_half(outer + to);
}

static inline void find(const Matrix& w, long panel, long k, Coefficients& of) {
    long at = (panel * w.groups + (k >> w.shift)) * P, outer = (panel * (w.K / OUTER) + k / OUTER) * P;
    for (int c = 0; c < 2; c++, at += W, outer += W) {
        of.scale[c] = w.kind == HALF ? load_half((const uint16_t*)w.scale + at)
                                     : find_other(w, w.scale, at, w.outer_scale, outer);
        of.minimum[c] = !w.minimum       ? V{}
                        : w.kind == HALF ? load_half((const uint16_t*)w.minimum + at)
                                         : find_other(w, w.minimum, at, w.outer_minimum, outer);
        of.zero[c] = w.zeros ? load_half(w.zeros + at) : splat(w.zero);
    }
}

template <int BITS>
constexpr int SCALES = BITS == 6 ? 2 : 1;  // groups in a unit: Q6_K's have 16 columns

// sums [rows, P] become y [rows, N] at the columns of a panel.
static inline void put_panel(const float* sums, long panel, long rows, long N, const float* bias, float* y, bool add) {
    long first = panel * P, width = std::min<long>(P, N - first);
    for (long r = 0; r < rows; r++) {
        float* to = y + r * N + first;
        for (long n = 0; n < width; n++) to[n] = sums[r * P + n] + (bias ? bias[first + n] : 0) + (add ? to[n] : 0);
    }
}

template <class F>
static void with_bits(int bits, F call) {
    if (bits == 4) call(std::integral_constant<int, 4>{});
    else if (bits == 5) call(std::integral_constant<int, 5>{});
    else if (bits == 6) call(std::integral_constant<int, 6>{});
    else call(std::integral_constant<int, 8>{});
}
