// Products with weights that were packed once.

#include "vectors.h"

// y [M, N] = x [M, K] W^T + bias, or += if add. packed [N / P, K, P]: panels of P rows of W, each transposed, so
// that a tile reads its weights in one line; the last panel is filled up with zeros.
//
// A panel serves all rows (in slices of x that stay in the second cache) before the next is touched: memory is
// read once. A panel is cut into pieces of K that stay in the first cache while the tiles go over them; meanwhile
// the next piece is called from memory.
template <class T>
static void linear(const float* x, const T* packed, const float* bias, float* y, long M, long N, long K, bool add,
                   int threads) {
    constexpr long SLICE = 96, PIECE = 192;
    bool unpack = sizeof(T) < sizeof(float) && M > ROWS;  // bf16 becomes fp32 once, not in every tile
    long panels = (N + P - 1) / P;
#pragma omp parallel num_threads(threads)
    for (long m = 0; m < M; m += SLICE) {
        long rows = std::min(SLICE, M - m);
#pragma omp for schedule(static) nowait
        for (long p = 0; p < panels; p++) {
            float sums[SLICE * P], unpacked[PIECE * P];
            for (long k = 0; k < K; k += PIECE) {
                const T* weights = packed + (p * K + k) * P;
                long depth = std::min(PIECE, K - k), ahead = rows > ROWS ? sizeof(T) * depth * P : 0;
                const T* next = weights + depth * P;
                if (unpack) {
                    for (long i = 0; i < depth * P; i += W) store(unpacked + i, load(weights + i));
                    multiply(x + m * K + k, K, unpacked, P, rows, depth, P, sums, P, k > 0, next, ahead);
                } else
                    multiply(x + m * K + k, K, weights, P, rows, depth, P, sums, P, k > 0, next, ahead);
            }
            // Subtle: what y held is added last. Sums that begin with a large number lose the small ones.
            long first = p * P, width = std::min<long>(P, N - first);
            for (long r = 0; r < rows; r++) {
                float* to = y + (m + r) * N + first;
                for (long n = 0; n < width; n++)
                    to[n] = sums[r * P + n] + (bias ? bias[first + n] : 0) + (add ? to[n] : 0);
            }
        }
    }
}

extern "C" {

int panel_width() { return P; }

void cpu_linear(const float* x, const void* packed, int packed_bf16, const float* bias, float* y, long M, long N,
                long K, int add, int threads) {
    with_type(packed_bf16, [&](auto t) {
        linear(x, (const decltype(t)*)packed, bias, y, M, N, K, add, threads);
    });
}
}
