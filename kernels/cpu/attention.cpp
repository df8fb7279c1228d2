// Attention through page tables.

#include "vectors.h"

struct Place { long at, scale; };  // where in a pool the numbers of a slot are, and its scale

// One layer's keys and values [G, N, B, D], and the batch that looks at them. In eight bits (see cache.py) the scales
// of a block follow its B D codes.
template <class C>
struct Pool {
    static constexpr bool scaled = sizeof(C) == 1;
    const C *keys, *values;
    const int64_t *query_start, *context_lens, *tables;  // [S + 1], [S], [S, M]
    long S, M, G, N, B, D;
    long block_size() const { return B * (scaled ? D + (long)sizeof(float) : D); }

    // Where the keys and values of `count` positions lie in the pool, for group g of sequence s:
    // position -> (logical block, offset) -> (physical block, offset) -> slot -> the numbers of that slot.
    // Divided once, then walked: division takes longer than all the rest.
    void slots(long s, long g, long position, long count, Place* places) const {
        const int64_t* block = tables + s * M + position / B;
        long offset = position % B;
        for (long j = 0; j < count; j++) {
            long begin = (g * N + *block) * block_size();
            places[j] = {begin + offset * D, begin + B * D + offset * (long)sizeof(float)};
            if (++offset == B) offset = 0, block++;
        }
    }
};

constexpr long CHUNK = 64;   // keys between two steps of the softmax
constexpr long SPAN = 1024;  // keys that are summed up by themselves, so that several threads can take a long context

// What some queries have summed up over some keys: values [rows, depth] times e^(score - top), and these weights.
struct Sums {
    std::vector<float> out, top, total;
    Sums(long rows = 0, long depth = 0) : out(rows * depth), top(rows), total(rows) {}
    void clear() {
        std::fill(out.begin(), out.end(), 0.0f);
        std::fill(top.begin(), top.end(), -INFINITY);
        std::fill(total.begin(), total.end(), 0.0f);
    }
};

// What a thread works with: `rows` queries that look at the same keys, what they have summed up in the span `now`, and
// in `all` before it.
struct Scratch {
    long rows, depth;  // depth: D, filled up to whole panels
    std::vector<float> q, keys, values, scores, key_scales, value_scales;
    Sums now, all;
    Scratch(long rows, long D)
        : rows(rows), depth((D + P - 1) / P * P), q(rows * D), keys(D * CHUNK), values(CHUNK * depth),
          scores(rows * CHUNK), key_scales(CHUNK), value_scales(CHUNK), now(rows, depth), all(rows, depth) {}
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
static void call_for(const Pool<C>& pool, const Place* places, long count) {
    auto call = [&](long at) { __builtin_prefetch(pool.keys + at), __builtin_prefetch(pool.values + at); };
    for (long j = 0; j < count; j++) {
        for (long d = 0; d < pool.D; d += 64 / sizeof(C)) call(places[j].at + d);
        if (pool.scaled) call(places[j].scale);
    }
}

// Keys [D, CHUNK] from `count` places in the pool, transposed: as a tile wants its weights. On the way, what lies at
// the `more` places of the next chunk is called from memory, a little at a time.
template <class C>
static void gather_keys(const Pool<C>& pool, const Place* places, long count, long filled, const Place* later, long more,
                        float* keys) {
    for (long j = 0; j < filled; j += W) {
        call_for(pool, later + j, std::clamp<long>(more - j, 0, W));
        const C* key[W];  // what lies beyond the context is not read: the last position stands in
        for (long i = 0; i < W; i++) key[i] = pool.keys + places[std::min(j + i, count - 1)].at;
        long d = 0;
        if constexpr (pool.scaled)  // four codes at a time
            for (; d + 4 * W <= pool.D; d += 4 * W) {
                V words[W];
                for (int i = 0; i < W; i++) words[i] = load((const float*)(key[i] + d));
                transpose<W / 2>(words, std::make_integer_sequence<int, W>{});
                for (int i = 0; i < W; i++)
                    for (int byte = 0; byte < 4; byte++)
                        store(keys + (d + 4 * i + byte) * CHUNK + j, widen(C{}, (VU)words[i] << (24 - 8 * byte)));
            }
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
static void sum_values(const Pool<C>& pool, const Place* places, long count, Scratch& my) {
    long D = pool.D, depth = my.depth;
    const float* weights = my.scores.data();
    float* out = my.now.out.data();
    if (my.rows <= ROWS && D == depth) {
        for (long j = 0, run; j < count; j += run) {
            for (run = 1; j + run < count && places[j + run].at == places[j].at + run * D;) run++;
            multiply(weights + j, CHUNK, pool.values + places[j].at, D, my.rows, run, D, out, D, true);
        }
        return;
    }
    for (long j = 0; j < count; j++) {
        const C* value = pool.values + places[j].at;
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
    if (seen <= 0) return (void)std::fill_n(scores, count, 0.0f);
    for (long j = seen; j < count; j++) scores[j] = -INFINITY;
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

// The scales of the keys and values at `count` places.
template <class C>
static void load_scales(const Pool<C>& pool, const Place* places, long count, Scratch& my) {
    for (long j = 0; j < count; j++) {
        std::memcpy(&my.key_scales[j], pool.keys + places[j].scale, sizeof(float));
        std::memcpy(&my.value_scales[j], pool.values + places[j].scale, sizeof(float));
    }
}

// What lies in columns [rows, CHUNK], times the scale of each column: scores by keys', weights by values'.
static void scale_columns(std::vector<float>& columns, const std::vector<float>& scales, long rows, long count) {
    for (long row = 0; row < rows; row++)
        for (long j = 0; j < count; j += W) {
            float* at = &columns[row * CHUNK + j];
            store(at, load(at) * load(&scales[j]));
        }
}

// The queries [first, last) of sequence s with all heads of group g: row i R + r is query i, head r.
// The keys [begin, end): all that the last of them sees, or a span of these, whose sums then become number `part`.
struct Piece { long s, g, first, last, position, begin, end, part; };  // position: of the first query

// Sums up the keys [begin, end) of a piece, of a span at the most.
template <class C>
static void sum_span(const Pool<C>& pool, const Piece& p, long begin, long end, long R, Scratch& my) {
    Place here[CHUNK], later[CHUNK];
    my.now.clear();
    pool.slots(p.s, p.g, begin, std::min(CHUNK, end - begin), here);
    if (begin == p.begin) call_for(pool, here, std::min(CHUNK, end - begin));
    for (long chunk = begin; chunk < end; chunk += CHUNK) {
        long count = std::min(CHUNK, end - chunk), filled = (count + P - 1) / P * P;
        long more = std::clamp(p.end - chunk - CHUNK, 0L, CHUNK);  // of the next span, too
        pool.slots(p.s, p.g, chunk + CHUNK, more, later);
        gather_keys(pool, here, count, filled, later, more, my.keys.data());
        multiply(my.q.data(), pool.D, my.keys.data(), CHUNK, my.rows, pool.D, filled, my.scores.data(), CHUNK, false);
        if (pool.scaled) load_scales(pool, here, count, my), scale_columns(my.scores, my.key_scales, my.rows, filled);
        for (long row = 0; row < my.rows; row++)
            online_softmax(&my.scores[row * CHUNK], p.position + row / R + 1 - chunk, filled, my.now.top[row],
                           my.now.total[row], &my.now.out[row * my.depth], my.depth);
        if (pool.scaled) scale_columns(my.scores, my.value_scales, my.rows, filled);
        sum_values(pool, here, count, my);
        std::copy_n(later, more, here);
    }
}

// Adds the sums of the next span. Always in the order of the spans, so that it doesn't matter who computed them.
static void merge(Sums& all, const Sums& next, long rows, long depth) {
    for (long row = 0; row < rows; row++) {
        float top = std::max(all.top[row], next.top[row]);
        float old = std::exp(all.top[row] - top), fresh = std::exp(next.top[row] - top);
        all.total[row] = all.total[row] * old + next.total[row] * fresh;
        for (long d = row * depth; d < (row + 1) * depth; d += W)
            store(&all.out[d], load(&all.out[d]) * old + load(&next.out[d]) * fresh);
        all.top[row] = top;
    }
}

template <class T>
static void finish(const Sums& all, const Piece& p, T* out, long H, long R, long D, long depth) {
    for (long row = 0; row < (p.last - p.first) * R; row++) {
        T* to = out + ((p.first + row / R) * H + p.g * R + row % R) * D;
        float total = all.total[row] ? all.total[row] : 1;  // a context of 0 tokens, as in padding, gives 0
        for (long d = 0; d < D; d++) put(to + d, all.out[row * depth + d] / total);
    }
}

template <class T, class C>
static void attend(const Pool<C>& pool, const T* q, long q_stride, T* out, const Piece& p, long R, float scale,
                   Scratch& my, std::vector<Sums>& parts) {
    long D = pool.D, H = pool.G * R;
    my.rows = (p.last - p.first) * R;
    for (long row = 0; row < my.rows; row++) {
        const T* from = q + (p.first + row / R) * q_stride + (p.g * R + row % R) * D;
        for (long d = 0; d < D; d++) my.q[row * D + d] = get(from + d) * scale;
    }
    if (p.end <= p.begin) my.all.clear();
    for (long begin = p.begin; begin < p.end; begin += SPAN) {
        sum_span(pool, p, begin, std::min(begin + SPAN, p.end), R, my);
        if (begin == p.begin) std::swap(my.all, my.now);
        else merge(my.all, my.now, my.rows, my.depth);
    }
    if (p.part < 0) finish(my.all, p, out, H, R, D, my.depth);
    else parts[p.part] = my.all;
}

// Every piece of work is a few queries of one sequence with the heads of one group, so that their keys and values
// are read once. Threads take the next piece when they are done with one. A piece that would keep one thread busy when
// the others are done is cut into spans.
template <class T, class C>
static void attention(const Pool<C>& pool, const T* q, long q_stride, T* out, long H, float scale, int threads) {
    long R = H / pool.G, most = 1, work = 0, count = 0;
    for (long s = 0; s < pool.S; s++) most = std::max<long>(most, pool.query_start[s + 1] - pool.query_start[s]);
    most = std::min(most, std::max(1L, 48 / R));
    std::vector<Piece> whole, pieces, cut;  // cut: those in spans; `part` is the first of their parts
    for (long s = 0; s < pool.S; s++)
        for (long first = pool.query_start[s]; first < pool.query_start[s + 1]; first += most)
            for (long g = 0; g < pool.G; g++) {
                long last = std::min<long>(first + most, pool.query_start[s + 1]);
                long end = pool.context_lens[s] - pool.query_start[s + 1] + last;  // what the last one sees
                whole.push_back({s, g, first, last, end - (last - first), 0, end, -1});
                work += end;
            }
    for (Piece p : whole) {
        if (p.end <= SPAN || p.end * 4 * threads <= work || threads == 1) { pieces.push_back(p); continue; }
        p.part = count;
        cut.push_back(p);
        for (long begin = 0; begin < p.end; begin += SPAN)
            pieces.push_back({p.s, p.g, p.first, p.last, p.position, begin, std::min(begin + SPAN, p.end), count++});
    }
    std::vector<Sums> parts(count);
#pragma omp parallel num_threads(threads)
    {
        Scratch my(most * R, pool.D);
#pragma omp for schedule(dynamic)
        for (long i = 0; i < (long)pieces.size(); i++)
            attend(pool, q, q_stride, out, pieces[i], R, scale, my, parts);
#pragma omp for schedule(dynamic)
        for (long i = 0; i < (long)cut.size(); i++) {
            Sums& all = parts[cut[i].part];
            for (long begin = SPAN, next = cut[i].part + 1; begin < cut[i].end; begin += SPAN, next++)
                merge(all, parts[next], (cut[i].last - cut[i].first) * R, my.depth);
            finish(all, cut[i], out, H, R, pool.D, my.depth);
        }
    }
}

extern "C" {

void cpu_attention(const void* q, int q_bf16, long q_stride, const void* cache, int cache_kind, const int64_t* query_start,
                   const int64_t* context_lens, const int64_t* tables, void* out, long S, long M, long H, long G, long N,
                   long B, long D, float scale, int threads) {
    with_type(q_bf16, [&](auto t) {
        with_cache_type(cache_kind, [&](auto c) {
            auto* keys = (const decltype(c)*)cache;
            Pool<decltype(c)> pool{keys, keys, query_start, context_lens, tables, S, M, G, N, B, D};
            pool.values += G * N * pool.block_size();
            attention(pool, (const decltype(t)*)q, q_stride, (decltype(t)*)out, H, scale, threads);
        });
    });
}
}
