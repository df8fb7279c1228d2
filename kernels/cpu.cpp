// What a decode step on a CPU spends its time on, in C++: products with weights, attention through page tables,
// and the small operations between them. The third face of reference.py; symbols as there.
//
//   1 vectors     W floats at a time; the compiler turns them into what the machine has
//   2 the tile    y += x w for a few rows and two vectors of columns: the one loop that all the time is spent in
//   3 linear      tiles over weights that were packed once
//   4 attention   tiles over keys and values, read through the page table, with an online softmax
//   5 the rest    norm, rope and cache write, gated activation
//
// Plain functions on plain memory: cpp.py builds this file once and calls it through ctypes.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

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

// --- 3. linear ----------------------------------------------------------------------------------------------

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

// --- 4. attention -------------------------------------------------------------------------------------------

// One layer's keys and values [G, N, B, D], and the batch that looks at them.
template <class C>
struct Pool {
    const C *keys, *values;
    const int64_t *query_start, *context_lens, *tables;  // [S + 1], [S], [S, M]
    long S, M, G, N, B, D;

    // Where the keys and values of `count` positions lie in the pool, for group g of sequence s:
    // position -> (logical block, offset) -> (physical block, offset) -> slot -> the numbers of that slot.
    // Divided once, then walked: division takes longer than all the rest.
    void slots(long s, long g, long position, long count, long* places) const {
        const int64_t* block = tables + s * M + position / B;
        long offset = position % B;
        for (long j = 0; j < count; j++) {
            places[j] = ((g * N + *block) * B + offset) * D;
            if (++offset == B) offset = 0, block++;
        }
    }
};

constexpr long CHUNK = 64;  // keys between two steps of the softmax

// What a thread works with: `rows` queries that look at the same keys, and what they have summed up so far.
struct Scratch {
    long rows, depth;  // depth: D, filled up to whole panels
    std::vector<float> q, keys, values, scores, out, top, total;
    Scratch(long rows, long D)
        : rows(rows), depth((D + P - 1) / P * P), q(rows * D), keys(D * CHUNK), values(CHUNK * depth),
          scores(rows * CHUNK), out(rows * depth), top(rows), total(rows) {}
};

// W vectors of W numbers, transposed: halves change places, then quarters, down to neighbours.
template <int half, int... I>
static inline void transpose(V* v, std::integer_sequence<int, I...> all) {
    for (int i = 0; i < W; i++)
        if (!(i & half)) {
            V a = v[i], b = v[i + half];
            v[i] = __builtin_shufflevector(a, b, (I & half ? W + (I ^ half) : I)...);
            v[i + half] = __builtin_shufflevector(a, b, (I & half ? W + I : I ^ half)...);
        }
    if constexpr (half > 1) transpose<half / 2>(v, all);
}

template <class C>
static void call_for(const Pool<C>& pool, const long* places, long count) {
    for (long j = 0; j < count; j++)
        for (long d = 0; d < pool.D; d += 64 / sizeof(C)) {
            __builtin_prefetch(pool.keys + places[j] + d);
            __builtin_prefetch(pool.values + places[j] + d);
        }
}

// Keys [D, CHUNK] from `count` places in the pool, transposed: as a tile wants its weights. On the way, what lies at
// the `more` places of the next chunk is called from memory, a little at a time.
template <class C>
static void gather_keys(const Pool<C>& pool, const long* places, long count, long filled, const long* later, long more,
                        float* keys) {
    for (long j = 0; j < filled; j += W) {
        call_for(pool, later + j, std::clamp<long>(more - j, 0, W));
        const C* key[W];  // what lies beyond the context is not read: the last position stands in
        for (long i = 0; i < W; i++) key[i] = pool.keys + places[std::min(j + i, count - 1)];
        long d = 0;
        for (; d + W <= pool.D; d += W) {
            V v[W];
            for (int i = 0; i < W; i++) v[i] = load(key[i] + d);
            transpose<W / 2>(v, std::make_integer_sequence<int, W>{});
            for (int i = 0; i < W; i++) store(keys + (d + i) * CHUNK + j, v[i]);
        }
        for (; d < pool.D; d++)
            for (int i = 0; i < W; i++) keys[d * CHUNK + j + i] = get(key[i] + d);
    }
}

// out [rows, depth] += weights [rows, CHUNK] times the values of `count` places in the pool. For few rows values are
// read where they lie, in pieces as long as they lie side by side; for many it pays to bring them together first.
template <class C>
static void sum_values(const Pool<C>& pool, const long* places, long count, Scratch& my) {
    long D = pool.D, depth = my.depth;
    const float* weights = my.scores.data();
    float* out = my.out.data();
    if (my.rows <= ROWS && D == depth) {
        for (long j = 0, run; j < count; j += run) {
            for (run = 1; j + run < count && places[j + run] == places[j] + run * D;) run++;
            multiply(weights + j, CHUNK, pool.values + places[j], D, my.rows, run, D, out, D, true);
        }
        return;
    }
    for (long j = 0; j < count; j++) {
        const C* value = pool.values + places[j];
        float* to = my.values.data() + j * depth;
        long d = 0;
        for (; d + W <= D; d += W) store(to + d, load(value + d));
        for (; d < D; d++) to[d] = get(value + d);
    }
    multiply(weights, CHUNK, my.values.data(), depth, my.rows, count, depth, out, depth, true);
}

// Softmax over a row's scores [count], of which only the first `seen` may be: they become weights e^(score - top),
// and what was summed up below a smaller top is scaled down to the new one.
static void online_softmax(float* scores, long seen, long count, float& top, float& total, float* out, long depth) {
    for (long j = std::max(seen, 0L); j < count; j++) scores[j] = -INFINITY;
    V tops = load(scores);
    for (long j = W; j < count; j += W) tops = larger(load(scores + j), tops);
    float new_top = top;
    for (int i = 0; i < W; i++) new_top = std::max(tops[i], new_top);
    V sums{};
    for (long j = 0; j < count; j += W) {
        V weights = exp(load(scores + j) - new_top);
        store(scores + j, weights);
        sums += weights;
    }
    float shrink = std::exp(top - new_top);
    total = total * shrink + sum(sums);
    if (shrink != 1)
        for (long d = 0; d < depth; d += W) store(out + d, load(out + d) * shrink);
    top = new_top;
}

// Attention of the queries [first, last) of sequence s with all heads of group g: row i R + r is query i, head r.
template <class T, class C>
static void attend(const Pool<C>& pool, const T* q, long q_stride, T* out, long s, long g, long first, long last, long R,
                   float scale, Scratch& my) {
    long D = pool.D, rows = my.rows = (last - first) * R, H = pool.G * R, depth = my.depth;
    long position = pool.context_lens[s] - pool.query_start[s + 1] + first;  // of the first query
    long end = position + (last - first);                                    // what the last one sees
    for (long row = 0; row < rows; row++) {
        const T* from = q + (first + row / R) * q_stride + (g * R + row % R) * D;
        for (long d = 0; d < D; d++) my.q[row * D + d] = get(from + d) * scale;
    }
    std::fill(my.out.begin(), my.out.end(), 0.0f);
    std::fill(my.top.begin(), my.top.end(), -INFINITY);
    std::fill(my.total.begin(), my.total.end(), 0.0f);
    long here[CHUNK], later[CHUNK];
    pool.slots(s, g, 0, std::min(CHUNK, end), here);
    for (long chunk = 0; chunk < end; chunk += CHUNK) {
        long count = std::min(CHUNK, end - chunk), filled = (count + P - 1) / P * P;
        long more = std::clamp(end - chunk - CHUNK, 0L, CHUNK);
        pool.slots(s, g, chunk + CHUNK, more, later);
        gather_keys(pool, here, count, filled, later, more, my.keys.data());
        multiply(my.q.data(), D, my.keys.data(), CHUNK, rows, D, filled, my.scores.data(), CHUNK, false);
        for (long row = 0; row < rows; row++)
            online_softmax(&my.scores[row * CHUNK], position + row / R + 1 - chunk, filled, my.top[row], my.total[row],
                           &my.out[row * depth], depth);
        sum_values(pool, here, count, my);
        std::copy_n(later, more, here);
    }
    for (long row = 0; row < rows; row++) {
        T* to = out + ((first + row / R) * H + g * R + row % R) * D;
        float total = my.total[row] ? my.total[row] : 1;  // a context of 0 tokens, as in padding, gives 0
        for (long d = 0; d < D; d++) put(to + d, my.out[row * depth + d] / total);
    }
}

// Every piece of work is a few queries of one sequence with the heads of one group, so that their keys and values
// are read once. Threads take the next piece when they are done with one.
template <class T, class C>
static void attention(const Pool<C>& pool, const T* q, long q_stride, T* out, long H, float scale, int threads) {
    struct Piece { long s, g, first, last; };
    long R = H / pool.G, most = 1;
    for (long s = 0; s < pool.S; s++) most = std::max<long>(most, pool.query_start[s + 1] - pool.query_start[s]);
    most = std::min(most, std::max(1L, 48 / R));
    std::vector<Piece> pieces;
    for (long s = 0; s < pool.S; s++)
        for (long first = pool.query_start[s]; first < pool.query_start[s + 1]; first += most)
            for (long g = 0; g < pool.G; g++)
                pieces.push_back({s, g, first, std::min<long>(first + most, pool.query_start[s + 1])});
#pragma omp parallel num_threads(threads)
    {
        Scratch my(most * R, pool.D);
#pragma omp for schedule(dynamic)
        for (long i = 0; i < (long)pieces.size(); i++) {
            Piece p = pieces[i];
            attend(pool, q, q_stride, out, p.s, p.g, p.first, p.last, R, scale, my);
        }
    }
}

// --- 5. the rest --------------------------------------------------------------------------------------------

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

// --- the door: types become templates -----------------------------------------------------------------------

template <class F>
static void with_type(int is_bf16, F call) {
    if (is_bf16) call(bf16{});
    else call(float{});
}

extern "C" {

int panel_width() { return P; }

void cpu_linear(const float* x, const void* packed, int packed_bf16, const float* bias, float* y, long M, long N,
                long K, int add, int threads) {
    with_type(packed_bf16, [&](auto t) {
        linear(x, (const decltype(t)*)packed, bias, y, M, N, K, add, threads);
    });
}

void cpu_attention(const void* q, int q_bf16, long q_stride, const void* cache, int cache_bf16, const int64_t* query_start,
                   const int64_t* context_lens, const int64_t* tables, void* out, long S, long M, long H, long G, long N,
                   long B, long D, float scale, int threads) {
    with_type(q_bf16, [&](auto t) {
        with_type(cache_bf16, [&](auto c) {
            auto *keys = (const decltype(c)*)cache, *values = keys + G * N * B * D;
            Pool<decltype(c)> pool{keys, values, query_start, context_lens, tables, S, M, G, N, B, D};
            attention(pool, (const decltype(t)*)q, q_stride, (decltype(t)*)out, H, scale, threads);
        });
    });
}

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
