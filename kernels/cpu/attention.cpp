// Attention through page tables.

#include "vectors.h"

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

extern "C" {

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
}
