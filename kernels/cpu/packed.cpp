// Products with weights that stay in small numbers: see packed.py for the formula
//
//     W[o, i] = scale[o, g] (code[o, i] - zero[o, g]) + minimum[o, g]
//
// Two ways. *Exact*: codes become floats on their way from memory, the very floats that `dequantize` makes, and are
// summed as in linear.cpp, so that the outcome is the same to the last bit. *int8*: activations are rounded to 8 bits,
// with a scale for each 32 of them, and products are summed in integers.
//
// Codes lie in panels of P rows, as floats do, and in a panel in units of 32 columns. A lane is a row; its 32-bit words
// hold the codes of a unit so that a shift and a mask bring out a quad: 4 codes, 8 bits apart, columns 4t .. 4t + 3.
// That is what an instruction for integer dot products takes, and floats are made of its bytes one by one.
//
//     4 bits   word u: its low nibbles are quad 2u, its high ones quad 2u + 1
//     5 bits   the same, and a fifth word with the upper bits: quad t is at bit t of each byte
//     6 bits   the same, and two words with the upper two bits: quad t is at bits 2 (t % 4) of word t / 4
//     8 bits   word t is quad t

#include "vectors.h"

#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

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

// --- 1. codes and what makes numbers of them ----------------------------------------------------------------

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

// Calls use(k, c, weights) for each column k of a unit and both vectors c of a panel's rows, in order.
//
// A code becomes a float by being written into the mantissa of one. PLAIN: as the last bits of 2^23 it makes 2^23 + code,
// and what is too much is taken off with the zero. SHORT: as the first bits of 1 it makes f = 1 + code / 2^b, and then
// W = f (2^b scale) + (minimum - (2^b + zero) scale) is one instruction. That is the same float if the bracket is exact:
// cpp_packed.py looks whether it is.
template <int BITS, int FORM, class F>
static inline void each_weight(const Matrix& w, long panel, long first, F use) {
    constexpr float STEPS = 1 << BITS;
    const uint32_t* words = w.words + (panel * (w.K / UNIT) + first / UNIT) * BITS * P;
    Coefficients of;
#pragma GCC unroll 8
    for (int t = 0; t < 8; t++) {
        if (t % (8 / SCALES<BITS>) == 0) {
            find(w, panel, first + 4 * t, of);
            for (int c = 0; c < 2 && FORM == SHORT; c++) {
                of.minimum[c] -= (of.zero[c] + STEPS) * of.scale[c];
                of.scale[c] *= STEPS;
            }
        }
        VU quads[2] = {quad<BITS>(words, t), quad<BITS>(words + W, t)};
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            for (int c = 0; c < 2; c++) {
                VU code = quads[c] >> 8 * i & 255u;
                if constexpr (FORM == FLOAT8) use(4 * t + i, c, widen(fp8{}, code << 24) * of.scale[c]);
                if constexpr (FORM == PLAIN) {
                    V number = (V)(code | 0x4b000000u) - (of.zero[c] + 8388608.0f);
                    use(4 * t + i, c, number * of.scale[c] + of.minimum[c]);
                }
                if constexpr (FORM == SHORT) {  // the quad's other bytes are masked away where they are shifted to
                    constexpr int to = 23 - BITS;
                    VU moved = 8 * i < to ? quads[c] << (to - 8 * i) : quads[c] >> (8 * i - to);
                    V number = (V)((moved & (255u << to & 0x7fffffu)) | 0x3f800000u);
                    use(4 * t + i, c, number * of.scale[c] + of.minimum[c]);
                }
            }
    }
}

// All weights of a unit, to [UNIT, P].
template <int BITS, int FORM>
__attribute__((noinline)) static void unpack(const Matrix& w, long panel, long first, float* to) {
    each_weight<BITS, FORM>(w, panel, first, [&](int k, int c, V weights) { store(to + k * P + c * W, weights); });
}

// --- 2. exact -----------------------------------------------------------------------------------------------

// sums [rows, P] become y [rows, N] at the columns of a panel.
static inline void put_panel(const float* sums, long panel, long rows, long N, const float* bias, float* y, bool add) {
    long first = panel * P, width = std::min<long>(P, N - first);
    for (long r = 0; r < rows; r++) {
        float* to = y + r * N + first;
        for (long n = 0; n < width; n++) to[n] = sums[r * P + n] + (bias ? bias[first + n] : 0) + (add ? to[n] : 0);
    }
}

// A panel with few rows: weights are used as they come. R rows at a time; `rows` of them are real.
template <int BITS, int FORM, int R>
static void exact_few(const Matrix& w, long panel, const float* x, long rows, float* to) {
    const float* row[R];
    for (long r = 0; r < R; r++) row[r] = x + std::min(r, rows - 1) * w.K;
    V sums[R][2] = {};
    for (long k = 0; k < w.K; k += UNIT)
        each_weight<BITS, FORM>(w, panel, k, [&](int i, int c, V weights) {
            for (int r = 0; r < R; r++) sums[r][c] += splat(row[r][k + i]) * weights;
        });
    for (long r = 0; r < rows; r++)
        for (int c = 0; c < 2; c++) store(to + r * P + c * W, sums[r][c]);
}

// As `linear`. For more than a few rows floats are made once, in pieces that stay in the first cache.
template <int BITS, int FORM>
static void exact(const Matrix& w, const float* x, const float* bias, float* y, long M, bool add, int threads) {
    constexpr long SLICE = 96, PIECE = 192, FEW = 4;
    long K = w.K, panels = (w.N + P - 1) / P;
#pragma omp parallel num_threads(threads)
    for (long m = 0; m < M; m += SLICE) {
        long rows = std::min(SLICE, M - m);
#pragma omp for schedule(static) nowait
        for (long p = 0; p < panels; p++) {
            float sums[SLICE * P], piece[PIECE * P];
            if (rows == 1) exact_few<BITS, FORM, 1>(w, p, x + m * K, rows, sums);
            else if (rows <= FEW) exact_few<BITS, FORM, FEW>(w, p, x + m * K, rows, sums);
            else
                for (long k = 0; k < K; k += PIECE) {
                    long depth = std::min(PIECE, K - k);
                    for (long u = 0; u < depth; u += UNIT) unpack<BITS, FORM>(w, p, k + u, piece + u * P);
                    const uint32_t* next = w.words + (p * (K / UNIT) + (k + depth) / UNIT) * BITS * P;
                    multiply(x + m * K + k, K, piece, P, rows, depth, P, sums, P, k > 0, next, depth * BITS * P / 8);
                }
            put_panel(sums, p, rows, w.N, bias, y + m * w.N, add);
        }
    }
}

// --- 3. int8 ------------------------------------------------------------------------------------------------

// acc + the dot product of a quad of codes (unsigned) and one of activations (signed), in each lane.
template <int BITS>
static inline VI dot(VI acc, VU codes, VI x) {
#if defined(__AVX512VNNI__)
    if constexpr (W == 16) return (VI)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, (__m512i)x);
#endif
#if defined(__AVX2__)
    if constexpr (W == 8) {
        auto add_products = [](VI to, VU c, VI x) {  // pairs of products must fit into 16 bits: c has 7 bits at the most
            __m256i pairs = _mm256_maddubs_epi16((__m256i)c, (__m256i)x);
            return to + (VI)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        };
        if constexpr (BITS < 8) return add_products(acc, codes, x);
        return add_products(acc, codes & 0x0f0f0f0fu, x) + (add_products(VI{}, codes >> 4 & 0x0f0f0f0fu, x) << 4);
    }
#endif
#if defined(__ARM_FEATURE_DOTPROD)
    if constexpr (W == 4 && BITS < 8) return (VI)vdotq_s32((int32x4_t)acc, (int8x16_t)codes, (int8x16_t)x);
#endif
    for (int i = 0; i < 4; i++) acc += (VI)(codes >> 8 * i & 255u) * ((x << (24 - 8 * i)) >> 24);
    return acc;
}

typedef int8_t VB __attribute__((vector_size(W)));
typedef int16_t VS __attribute__((vector_size(2 * W)));

// Rows of x in 8 bits: codes [M, K], of each UNIT a scale [M, K / UNIT] and of each half of one the sum of its codes.
struct Activations {
    std::vector<int8_t> codes;
    std::vector<float> scale, sums;
};

static void round_row(const float* x, long K, int8_t* codes, float* scale, float* sums) {
    for (long u = 0; u < K / UNIT; u++, x += UNIT, codes += UNIT) {
        V tops{}, odd{};
        for (long i = 0; i < UNIT; i += W) {
            tops = larger((V)((VU)load(x + i) & 0x7fffffffu), tops);
            odd += load(x + i) * 0.0f;  // NaN if one is NaN or infinite: it must not end as some other number
        }
        float top = 0;
        for (int i = 0; i < W; i++) top = std::max(tops[i], top);
        scale[u] = top / 127 + sum(odd);
        float inverse = top > 1e-30f ? 127 / top : 0;
        for (long h = 0; h < 2; h++) {
            V total{};
            for (long i = h * UNIT / 2; i < (h + 1) * UNIT / 2; i += W) {
                V code = load(x + i) * inverse + 12582912.0f;  // rounds, as in exp
                total += code - 12582912.0f;
                VB bytes = __builtin_convertvector(__builtin_convertvector((VI)code - 0x4b400000, VS), VB);
                std::memcpy(codes + i, &bytes, sizeof bytes);
            }
            sums[2 * u + h] = sum(total);
        }
    }
}

// sums [R, P] of a panel: R rows from `row` on.
template <int BITS, int R>
static void int8_tile(const Matrix& w, long panel, const Activations& x, long row, float* to) {
    constexpr int QUADS = 8 / SCALES<BITS>;
    long units = w.K / UNIT;
    V sums[R][2] = {};
    for (long u = 0; u < units; u++) {
        const uint32_t* words = w.words + (panel * units + u) * BITS * P;
        for (int part = 0; part < SCALES<BITS>; part++) {
            VI dots[R][2] = {};
#pragma GCC unroll 8
            for (int t = part * QUADS; t < (part + 1) * QUADS; t++) {
                VU quads[2] = {quad<BITS>(words, t), quad<BITS>(words + W, t)};
                for (int r = 0; r < R; r++) {
                    int32_t four;
                    std::memcpy(&four, &x.codes[(row + r) * w.K + u * UNIT + 4 * t], 4);
                    for (int c = 0; c < 2; c++) dots[r][c] = dot<BITS>(dots[r][c], quads[c], VI{} + four);
                }
            }
            Coefficients of;
            find(w, panel, u * UNIT + part * UNIT / 2, of);
            for (int c = 0; c < 2; c++) of.minimum[c] -= of.zero[c] * of.scale[c];
            for (int r = 0; r < R; r++) {
                const float* halves = &x.sums[2 * ((row + r) * units + u)];
                float sum = SCALES<BITS> == 2 ? halves[part] : halves[0] + halves[1], scale = x.scale[(row + r) * units + u];
                for (int c = 0; c < 2; c++)
                    sums[r][c] += (__builtin_convertvector(dots[r][c], V) * of.scale[c] + of.minimum[c] * sum) * scale;
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < 2; c++) store(to + r * P + c * W, sums[r][c]);
}

constexpr int HIGH = W == 16 ? 6 : 2;  // rows of such a tile: its sums should stay in registers

template <int BITS, int... R>
static void int8_rows(std::integer_sequence<int, R...>, const Matrix& w, long panel, const Activations& x, long row,
                      long rows, float* to) {
    static constexpr decltype(&int8_tile<BITS, 1>) tiles[] = {&int8_tile<BITS, R + 1>...};
    long count = (rows + HIGH - 1) / HIGH;
    for (long i = 0; i < count; i++) {
        long begin = rows * i / count, height = rows * (i + 1) / count - begin;
        tiles[height - 1](w, panel, x, row + begin, to + begin * P);
    }
}

template <int BITS>
static void rounded(const Matrix& w, const float* x, const float* bias, float* y, long M, bool add, int threads) {
    constexpr long SLICE = 96;
    long units = w.K / UNIT, panels = (w.N + P - 1) / P;
    Activations to{std::vector<int8_t>(M * w.K), std::vector<float>(M * units), std::vector<float>(2 * M * units)};
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long m = 0; m < M; m++)
            round_row(x + m * w.K, w.K, &to.codes[m * w.K], &to.scale[m * units], &to.sums[2 * m * units]);
        for (long m = 0; m < M; m += SLICE) {
            long rows = std::min(SLICE, M - m);
#pragma omp for schedule(static) nowait
            for (long p = 0; p < panels; p++) {
                float sums[SLICE * P];
                int8_rows<BITS>(std::make_integer_sequence<int, HIGH>{}, w, p, to, m, rows, sums);
                put_panel(sums, p, rows, w.N, bias, y + m * w.N, add);
            }
        }
    }
}

// --- 4. packing, and rows -----------------------------------------------------------------------------------

// codes [N, K], a byte each, into words; rows beyond N get zeros.
template <int BITS>
static void pack(const uint8_t* codes, long N, long K, uint32_t* words, int threads) {
    long panels = (N + P - 1) / P;
#pragma omp parallel for num_threads(threads)
    for (long p = 0; p < panels; p++)
        for (long u = 0; u < K / UNIT; u++)
            for (long n = 0; n < P; n++) {
                uint32_t all[BITS] = {};
                const uint8_t* row = codes + (p * P + n) * K + u * UNIT;
                for (int k = 0; k < UNIT && p * P + n < N; k++) {
                    uint32_t code = row[k], t = k / 4, byte = 8 * (k % 4);
                    if (BITS == 8) all[t] |= code << byte;
                    else all[t / 2] |= (code & 15) << (byte + 4 * (t % 2));
                    if (BITS == 5) all[4] |= (code >> 4) << (byte + t);
                    if (BITS == 6) all[4 + t / 4] |= (code >> 4) << (byte + 2 * (t % 4));
                }
                for (int i = 0; i < BITS; i++) words[((p * (K / UNIT) + u) * BITS + i) * P + n] = all[i];
            }
}

// Some rows of W in floats, y [M, K]: an embedding.
template <int BITS, int FORM>
static void rows_of(const Matrix& w, const int64_t* rows, long M, float* y) {
    float unit[UNIT * P];
    for (long m = 0; m < M; m++)
        for (long k = 0; k < w.K; k += UNIT) {
            unpack<BITS, FORM>(w, rows[m] / P, k, unit);
            for (long i = 0; i < UNIT; i++) y[m * w.K + k + i] = unit[i * P + rows[m] % P];
        }
}

template <class F>
static void with_bits(int bits, F call) {
    if (bits == 4) call(std::integral_constant<int, 4>{});
    else if (bits == 5) call(std::integral_constant<int, 5>{});
    else if (bits == 6) call(std::integral_constant<int, 6>{});
    else call(std::integral_constant<int, 8>{});
}

template <class F>
static void with_form(const Matrix& w, F call) {
    if (w.form == FLOAT8) call(std::integral_constant<int, 8>{}, std::integral_constant<int, FLOAT8>{});
    else if (w.form == SHORT) with_bits(w.bits, [&](auto bits) { call(bits, std::integral_constant<int, SHORT>{}); });
    else with_bits(w.bits, [&](auto bits) { call(bits, std::integral_constant<int, PLAIN>{}); });
}

extern "C" {

int has_fma() {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return 1;
#else
    return 0;
#endif
}

void cpu_pack(const uint8_t* codes, long N, long K, int bits, uint32_t* words, int threads) {
    with_bits(bits, [&](auto bits) { pack<bits()>(codes, N, K, words, threads); });
}

void cpu_packed_linear(const Matrix* w, const float* x, const float* bias, float* y, long M, int add, int int8,
                       int threads) {
    if (int8 && w->form != FLOAT8)
        with_bits(w->bits, [&](auto bits) { rounded<bits()>(*w, x, bias, y, M, add, threads); });
    else with_form(*w, [&](auto bits, auto form) { exact<bits(), form()>(*w, x, bias, y, M, add, threads); });
}

void cpu_packed_rows(const Matrix* w, const int64_t* rows, long M, float* y) {
    with_form(*w, [&](auto bits, auto form) { rows_of<bits(), form()>(*w, rows, M, y); });
}
}
