// Products of packed weights with activations in 8 bits: read packed.h first.

#include "packed.h"

#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

// acc + the dot product of a quad of codes (unsigned) and one of activations (signed), in each lane.
template <int BITS>
static inline VI dot(VI acc, VU codes, VI x) {
#if defined(__AVX512VNNI__)
    if constexpr (W == 16) return (VI)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, (__m512i)x);
#endif
#if defined(__AVX2__)
    if constexpr (W == 8) {
        auto add_products = [](VI to, VU c, VI x) {  // a pair of products must fit into 16 bits: c has 7 at the most
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
                float sum = SCALES<BITS> == 2 ? halves[part] : halves[0] + halves[1];
                float scale = x.scale[(row + r) * units + u];
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

extern "C" {

void cpu_packed_linear_int8(const Matrix* w, const float* x, const float* bias, float* y, long M, int add,
                            int threads) {
    with_bits(w->bits, [&](auto bits) { rounded<bits()>(*w, x, bias, y, M, add, threads); });
}
}
