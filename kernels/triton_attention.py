"""Paged attention as Triton kernels: decode, prefill and any mix of them, over one flat batch.

Read reference.py first: this file computes the same Equation 4 of the PagedAttention paper,

    o_i = sum_j exp(scale q_i . K_j) V_j  /  sum_j exp(scale q_i . K_j),        j = 0 .. position of i

but never holds all scores. Three ideas.

**Online softmax** (Milakov and Gimelshein 2018, FlashAttention). Go through the keys a tile at a time and keep, for
each query, m (the largest score so far), z (the sum of all 2^(score - m)) and o (the sum of all 2^(score - m) V). A
tile with scores s_j = log2(e) scale q . K_j changes them by

    m' = max(m, max_j s_j)                 the new largest
    p_j = 2^(s_j - m')                     what the tile's keys weigh
    z' = 2^(m - m') z + sum_j p_j          what was summed against the old m shrinks to the new one
    o' = 2^(m - m') o + sum_j p_j V_j

and at the end the answer is o / z. (Powers of two, since that is what the hardware computes: e^x = 2^(x log2 e).)

**Page tables.** Keys and values lie wherever the block allocator put them, so each position is looked up:

     position j of sequence s                         cache [2, G, N, B, D]
    +------------------+-------------+
    | logical j // B   | offset j % B|
    +------------------+-------------+
             |                |
     block_tables[s, .]       |
             |                |
    +------------------+-------------+
    | physical block   |   offset    |   -> block * stride_n + offset * stride_b, the slot of D numbers, in 64 bits
    +------------------+-------------+

In eight bits (cache.py) slots hold codes, and each has a scale, which lies behind the codes of its block.

A tile of keys is BLOCK_N positions, whatever B is: it may hold many blocks, or a part of one.

**Splitting** (flash-decoding). One query of one sequence is work for G programs only, and a GPU has room for hundreds.
So a context may be cut into splits; each finds its own m, z and o, and a second kernel merges them by the same rule:

    m = max_i m_i,    z = sum_i 2^(m_i - m) z_i,    o = sum_i 2^(m_i - m) o_i / z

Symbols as in reference.py; R = H / G query heads share a key/value head, and one program computes them together, so
that keys are loaded once for all R. Row r of a program's tile is head r % R of the tile's query r // R.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cache import codes, is_quantized, scales
from kernels.triton_tiles import Tiles, check_input, choose_splits, choose_tiles, multiprocessors, power_of_2

NONE = tl.constexpr(-1.0e38)  # m before the first key: below any score, but finite, since -inf - -inf is NaN


@triton.jit
def _find_queries(tile, query_start, num_seqs, least, TILE_Q: tl.constexpr, DECODE: tl.constexpr):
    """Whose queries are in this tile: (s, its first token in the batch, its number of queries, the tile's first one).

    DECODE takes the sequences of one query: tile and sequence are the same. The other launch takes those of `least` and
    more: the tiles of sequence s begin at number query_start[s] // TILE_Q + s. That is one tile too many at times, but
    no sum over the sequences before; the last s that does not begin behind `tile` is found by bisection.
    """
    s = tile
    first = 0
    if not DECODE:
        s = 0
        beyond = num_seqs
        while beyond - s > 1:
            middle = (s + beyond) // 2
            if tl.load(query_start + middle).to(tl.int32) // TILE_Q + middle <= tile:
                s = middle
            else:
                beyond = middle
        first = (tile - s - tl.load(query_start + s).to(tl.int32) // TILE_Q) * TILE_Q
    start = tl.load(query_start + s).to(tl.int32)
    count = tl.load(query_start + s + 1).to(tl.int32) - start
    if (DECODE and count > 1) or count < least:
        count = 0  # the other launch's
    return s, start, count, first


@triton.jit
def _load(pointers, inside, ALL: tl.constexpr):
    """What lies inside, and 0 elsewhere: slots beyond a context may hold NaN, and 0 * NaN is NaN."""
    if ALL:
        return tl.load(pointers)
    return tl.load(pointers, mask=inside, other=0.0)


# What the next one is given. q, o [BLOCK_M, D_PAD], m, z, position [BLOCK_M]: of each row's query; m is in powers of
# two, and NONE where nothing was seen. keys, values, key_scales, value_scales: where block 0 of this head begins, and
# table: where the page table does. Columns D and beyond of q are 0, and o's are nobody's. Not MASKED: all rows see
# all keys, in whole tiles of BLOCK_N. MASKED: what lies at `end` and beyond must not reach o. It returns o, m and z.


@triton.jit
def _attend(
    q, o, m, z, position, keys, values, key_scales, value_scales, table, begin, end, stride_n, stride_b, stride_scale_n,
    scale_log2, B: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, SCALED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Take the keys begin .. end - 1 into o, m and z. MASKED: some of them lie behind some query's position."""
    d = tl.arange(0, D_PAD)
    for tile_begin in range(begin, end, BLOCK_N):
        j = tile_begin + tl.arange(0, BLOCK_N)
        inside = (j < end)[:, None] & (d < D)[None, :]
        block = _load(table + j // B, j < end, not MASKED).to(tl.int64)
        slot = block * stride_n + (j % B) * stride_b
        numbers = slot[:, None] + d[None, :]  # [BLOCK_N, D]
        scale = block * stride_scale_n + j % B  # [BLOCK_N]

        k = _load(keys + numbers, inside, not MASKED and D == D_PAD).to(q.dtype)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]; ieee: no TF32 for fp32
        if SCALED:
            products *= _load(key_scales + scale, j < end, not MASKED)[None, :]
        if MASKED:
            products = tl.where(j[None, :] <= position[:, None], products, float("-inf"))
        m_new = tl.maximum(m, tl.max(products, 1) * scale_log2)  # s = products * scale_log2
        p = tl.exp2(products * scale_log2 - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        m = m_new
        z = z * shrink + tl.sum(p, 1)
        v = _load(values + numbers, inside, not MASKED and D == D_PAD)
        if SCALED:  # here, since a p times a small scale may be less than fp16 has
            v = v.to(tl.float32) * _load(value_scales + scale, j < end, not MASKED)[:, None]
        o = tl.dot(p.to(q.dtype), v.to(q.dtype), o * shrink[:, None], input_precision="ieee")
    return o, m, z


@triton.jit(do_not_specialize=["num_seqs", "least", "stride_table"])
def _attention_kernel(
    out, partial_o, partial_mz, q, cache, scales, query_start, context_lens, block_tables, num_seqs, least, scale_log2,
    stride_out_t, stride_out_h, stride_q_t, stride_q_h, stride_kv, stride_g, stride_n, stride_b,
    stride_scale_kv, stride_scale_g, stride_scale_n, stride_table, SCALED: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, TILE_Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DECODE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One tile of queries, one key/value head, one split of the context."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last queries of a prefill have the most keys: they go first
    g = tl.program_id(1)
    s, start, count, first = _find_queries(tile, query_start, num_seqs, least, TILE_Q, DECODE)
    if first >= count:
        return
    context = tl.load(context_lens + s).to(tl.int32)

    row = tl.arange(0, BLOCK_M)
    query = first + row // R
    head = g * R + row % R
    real = (row < TILE_Q * R) & (query < count)
    position = context - count + query
    token = (start + query).to(tl.int64)
    d = tl.arange(0, D_PAD)
    there = real[:, None] & (d < D)[None, :]
    tile_q = tl.load(q + token[:, None] * stride_q_t + head[:, None] * stride_q_h + d[None, :], mask=there, other=0.0)

    # Some query of the tile sees the keys 0 .. end - 1, and this split takes its share of them. Every query sees
    # 0 .. all_see - 1, which need no mask. Decode waits for memory, not for masks: one loop, whose loads never pause.
    end = context - count + tl.minimum(first + TILE_Q, count)
    share = tl.cdiv(tl.cdiv(end, BLOCK_N), tl.num_programs(2)) * BLOCK_N
    split_begin = tl.program_id(2) * share
    split_end = tl.minimum(split_begin + share, end)
    all_see = 0 if DECODE else (context - count + first + 1) // BLOCK_N * BLOCK_N
    middle = tl.minimum(tl.maximum(all_see, split_begin), split_end)

    o = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    m = tl.full([BLOCK_M], NONE, tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    keys = cache + g.to(tl.int64) * stride_g
    values = keys + stride_kv
    key_scales = scales + g.to(tl.int64) * stride_scale_g
    value_scales = key_scales + stride_scale_kv
    table = block_tables + s.to(tl.int64) * stride_table
    for masked in tl.static_range(DECODE, 2):
        o, m, z = _attend(
            tile_q, o, m, z, position, keys, values, key_scales, value_scales, table,
            middle if masked else split_begin, split_end if masked else middle, stride_n, stride_b, stride_scale_n,
            scale_log2, B, D, D_PAD, BLOCK_N, SCALED, masked,
        )  # fmt: skip

    if SPLIT:
        place = (tile * TILE_Q + row // R).to(tl.int64) * (tl.num_programs(1) * R) + head
        place = place * tl.num_programs(2) + tl.program_id(2)
        tl.store(partial_mz + place * 2, m, mask=real)
        tl.store(partial_mz + place * 2 + 1, z, mask=real)
        tl.store(partial_o + place[:, None] * D + d[None, :], o, mask=there & (z > 0)[:, None])
    else:
        o = o / tl.where(z > 0, z, 1.0)[:, None]  # a context of 0 tokens, as in the padding of a CUDA graph, gives 0
        pointers = out + token[:, None] * stride_out_t + head[:, None] * stride_out_h + d[None, :]
        tl.store(pointers, o.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["num_seqs", "least", "num_splits"])
def _merge_kernel(
    out, partial_o, partial_mz, query_start, num_seqs, least, num_splits, stride_out_t, stride_out_h,
    D: tl.constexpr, D_PAD: tl.constexpr, TILE_Q: tl.constexpr, DECODE: tl.constexpr, SPLITS_PAD: tl.constexpr,
):  # fmt: skip
    """One query, one head: the splits' m, z and o become the answer, o / z; zeros if no split saw a key.

    Program (i, head) has query i % TILE_Q of tile i // TILE_Q. partial_mz [rows, H, num_splits, 2] and partial_o
    [rows, H, num_splits, D] lie in one piece, with i for the row; where z is 0, o was never written. SPLITS_PAD: the
    power of two that is not below num_splits.
    """
    tile = tl.program_id(0) // TILE_Q
    s, start, count, first = _find_queries(tile, query_start, num_seqs, least, TILE_Q, DECODE)
    query = first + tl.program_id(0) % TILE_Q
    if query >= count:
        return
    head = tl.program_id(1)
    i = tl.arange(0, SPLITS_PAD)
    d = tl.arange(0, D_PAD)
    place = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head) * num_splits + i
    m = tl.load(partial_mz + place * 2, mask=i < num_splits, other=NONE)
    z = tl.load(partial_mz + place * 2 + 1, mask=i < num_splits, other=0.0)
    filled = (z > 0)[:, None] & (d < D)[None, :]  # a split without keys left its o unwritten
    o = tl.load(partial_o + place[:, None] * D + d[None, :], mask=filled, other=0.0)
    weight = tl.exp2(m - tl.max(m, 0))
    total = tl.sum(weight * z, 0)
    merged = tl.sum(weight[:, None] * o, 0) / tl.where(total > 0, total, 1.0)
    pointers = out + (start + query).to(tl.int64) * stride_out_t + head * stride_out_h + d
    tl.store(pointers, merged.to(out.dtype.element_ty), mask=d < D)


def paged_attention(
    q: Tensor, cache: Tensor, query_start: Tensor, context_lens: Tensor, block_tables: Tensor, scale: float,
    max_query_len: int, max_context_len: int, num_splits: int | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q [T, H, D], cache [2, G, N, B, D] -> [T, H, D]. Contract: reference.paged_attention; scale is positive.

    query_start [S+1], context_lens [S] and block_tables [S, M] may be int32 or int64. The caller knows the two maxima,
    so nothing here waits for the GPU, and a step can be captured in a CUDA graph; max_context_len may be an upper
    bound. A query over a context of 0 tokens gives zeros, a sequence of no queries writes nothing, and rows that no
    sequence owns stay as they are in `out`. num_splits: chosen from the work unless given.
    """
    check_input(q, cache, scale)
    num_seqs, group_size = len(context_lens), q.shape[1] // cache.shape[1]
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    # Sequences of one query have a launch of their own, unless there is nothing else, or (most likely) none of them.
    alone = max_query_len == 1 or len(q) == num_seqs * max_query_len
    for decode in [max_query_len == 1] if alone else [True, False]:
        few = max_query_len * group_size <= 64
        tiles = choose_tiles(group_size, q.shape[2], q.element_size(), decode, few)
        num_tiles = num_seqs if decode else len(q) // tiles.queries + num_seqs
        programs, processors = num_tiles * cache.shape[1], multiprocessors(q.device)
        splits = num_splits or choose_splits(programs, max_context_len, processors, min_keys=8 * tiles.rows)
        batch, least = (query_start, context_lens, block_tables), 1 if decode or alone else 2
        _launch(out, q, cache, batch, scale * math.log2(math.e), tiles, num_tiles, splits, decode, least)
    return out


def _launch(
    out: Tensor, q: Tensor, cache: Tensor, batch: tuple[Tensor, Tensor, Tensor], scale_log2: float,
    tiles: Tiles, num_tiles: int, splits: int, decode: bool, least: int,
) -> None:  # fmt: skip
    (_, heads, head_size), (_, kv_heads, _, block_size, _) = q.shape, cache.shape
    num_seqs = len(batch[1])
    rows = num_tiles * tiles.queries if splits > 1 else 0
    behind = scales(cache) if is_quantized(cache) else cache  # of a cache without scales nothing is read there
    partial_o = torch.empty(rows, heads, splits, head_size, dtype=torch.float32, device=q.device)
    partial_mz = torch.empty(rows, heads, splits, 2, dtype=torch.float32, device=q.device)
    shape = dict(D=head_size, D_PAD=power_of_2(max(head_size, 16)), TILE_Q=tiles.queries, DECODE=decode)
    _attention_kernel[num_tiles, kv_heads, splits](
        out, partial_o, partial_mz, q, codes(cache), behind, *batch, num_seqs, least, scale_log2,
        *out.stride()[:2], *q.stride()[:2], *codes(cache).stride()[:4], *behind.stride()[:3], batch[2].stride(0),
        SCALED=is_quantized(cache),
        R=heads // kv_heads, B=block_size, BLOCK_M=tiles.rows, BLOCK_N=tiles.keys, SPLIT=splits > 1, **shape,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[rows, heads](
            out, partial_o, partial_mz, batch[0], num_seqs, least, splits, *out.stride()[:2],
            SPLITS_PAD=power_of_2(splits), **shape, num_warps=8 if splits > 32 else 4, enable_fp_fusion=True,
        )  # fmt: skip
