// Exact products with packed weights, their packing, and their rows: read packed.h first.

#include "packed.h"

// --- 1. floats of codes -------------------------------------------------------------------------------------

// Calls use(k, c, weights) for each column k of a unit and both vectors c of a panel's rows, in order.
//
// A code becomes a float by being written into the mantissa of one. PLAIN: as the last bits of 2^23 it makes
// 2^23 + code, and what is too much is taken off with the zero. SHORT: as the first bits of 1 it makes
// f = 1 + code / 2^b, and then W = f (2^b scale) + (minimum - (2^b + zero) scale) is one instruction. That is the same
// float if neither product nor bracket are rounded: cpp_packed.py looks whether they are.
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
static void with_form(const Matrix& w, F call) {
    if (w.form == FLOAT8) call(std::integral_constant<int, 8>{}, std::integral_constant<int, FLOAT8>{});
    else if (w.form == SHORT) with_bits(w.bits, [&](auto bits) { call(bits, std::integral_constant<int, SHORT>{}); });
    else with_bits(w.bits, [&](auto bits) { call(bits, std::integral_constant<int, PLAIN>{}); });
}

extern "C" {

void cpu_pack(const uint8_t* codes, long N, long K, int bits, uint32_t* words, int threads) {
    with_bits(bits, [&](auto bits) { pack<bits()>(codes, N, K, words, threads); });
}

void cpu_packed_linear(const Matrix* w, const float* x, const float* bias, float* y, long M, int add, int threads) {
    with_form(*w, [&](auto bits, auto form) { exact<bits(), form()>(*w, x, bias, y, M, add, threads); });
}

void cpu_packed_rows(const Matrix* w, const int64_t* rows, long M, float* y) {
    with_form(*w, [&](auto bits, auto form) { rows_of<bits(), form()>(*w, rows, M, y); });
}
}
