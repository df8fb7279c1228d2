"""Paged attention in plain PyTorch, made fast for a CPU.

The reference goes through the sequences one by one. Here the sequences that compute a single token (decode) go
together, in buckets of similar context; those that compute several (prefill) go one by one, since each is work
enough for PyTorch's own attention. What is the same in all layers is prepared once a step: `AttentionPlan`.

A bucket of n sequences costs what reading its keys and values costs:

    K          one gather of whole blocks, which lie in one piece for each head
    q K^T      a batched product, one for each sequence and key/value head; then softmax
    P V        `embedding_bag`, PyTorch's weighted sum of table rows: the pool is the table, slots are the row
               numbers, probabilities the weights. Values are summed right out of the pool and never gathered.

A cache in eight bits (cache.py) is gathered for both, and becomes numbers on the way; P V is a batched product then.

Symbols as in reference.py; R = H / G query heads read the same key/value head; m blocks hold a bucket's contexts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.cache import LARGEST, head_size, raw
from kernels.reference import dequantize

BUCKET_COST = 48  # another bucket costs about as much as reading so many blocks of padding
BUCKET_SIZE = 2**21  # numbers: the keys of a bucket should stay in the CPU's cache between gather and product


@dataclass
class Bucket:
    """n sequences that compute one token each, padded to m blocks."""

    rows: Tensor  # [n] which queries of the batch
    key_blocks: Tensor  # [G n m] their blocks, as rows of the pool seen as [G N, B D]
    value_slots: Tensor  # [G n R m B] their slots, as rows of the pool seen as [G N B, D]
    offsets: Tensor  # [G n R] where the bags of value_slots begin
    beyond: Tensor  # [n, 1, m B] which slots lie beyond the context


@dataclass
class Prefill:
    """One sequence that computes t > 1 tokens, the last of its context."""

    rows: slice
    context: int
    blocks: Tensor  # [G m] as key_blocks above
    mask: Tensor | None  # [t, context] what each query may see; None if nothing was computed before


class AttentionPlan:
    """All that attention has to know about a batch, for every layer of the step."""

    def __init__(
        self, query_start: Tensor, context_lens: Tensor, block_tables: Tensor, heads: int, cache: Tensor
    ):
        """cache: one layer's, [2, G, N, B, D]."""
        _, self.kv_heads, self.num_blocks, self.block_size, _ = cache.shape
        self.head_size = head_size(cache)
        self.repeat = heads // self.kv_heads  # R
        self.tables, self.context_lens, self.query_start = block_tables, context_lens, query_start
        contexts, starts = context_lens.tolist(), query_start.tolist()
        counts = [end - start for start, end in zip(starts, starts[1:], strict=False)]
        decodes = sorted((s for s, count in enumerate(counts) if count == 1), key=lambda s: -contexts[s])
        self.buckets = [self._bucket(torch.tensor(bucket)) for bucket in self._cut(decodes, contexts)]
        prefills = [s for s, count in enumerate(counts) if count > 1]
        self.prefills = [self._prefill(s, slice(starts[s], starts[s + 1]), contexts[s]) for s in prefills]

    def _cut(self, decodes: list[int], contexts: list[int]) -> list[list[int]]:
        """Cut the sequences, longest first, where padding the rest would cost more than another bucket."""
        buckets: list[list[int]] = []
        block_numbers = self.kv_heads * self.block_size * self.head_size
        widest = 0
        for place, s in enumerate(decodes):
            blocks = -(-contexts[s] // self.block_size)
            padding = (len(decodes) - place) * (widest - blocks)
            full = bool(buckets) and (len(buckets[-1]) + 1) * widest * block_numbers > BUCKET_SIZE
            if not buckets or padding > BUCKET_COST or full:
                buckets.append([])
                widest = blocks
            buckets[-1].append(s)
        return buckets

    def _bucket(self, members: Tensor) -> Bucket:
        """What `_decode` has to know of these sequences [n], each of one query. Every block number in `tables` is one
        of the pool's, but what lies behind a context is nobody's."""
        contexts = self.context_lens[members]
        width = -(-int(contexts.max()) // self.block_size)
        tables = self.tables[members, :width]  # [n, m]
        head = torch.arange(self.kv_heads)
        slots = (tables[:, :, None] * self.block_size + torch.arange(self.block_size)).flatten(1)  # [n, m B]
        beyond = torch.arange(slots.shape[1]) >= contexts[:, None]
        # Subtle: a weight of 0 does not silence a NaN, so what lies beyond the context must not even be read.
        slots = torch.where(beyond, slots[:, :1], slots)
        value_slots = head[:, None, None, None] * (self.num_blocks * self.block_size) + slots[:, None]
        value_slots = value_slots.expand(-1, -1, self.repeat, -1).flatten()  # [G, n, R, m B] in one row
        offsets = torch.arange(0, value_slots.numel(), slots.shape[1])
        key_blocks = (head[:, None, None] * self.num_blocks + tables).flatten()
        return Bucket(self.query_start[members], key_blocks, value_slots, offsets, beyond[:, None])

    def _prefill(self, s: int, rows: slice, context: int) -> Prefill:
        t = rows.stop - rows.start
        table = self.tables[s, : -(-context // self.block_size)]
        blocks = (torch.arange(self.kv_heads)[:, None] * self.num_blocks + table).flatten()
        mask = None
        if t < context:
            mask = torch.arange(context) <= torch.arange(context - t, context)[:, None]
        return Prefill(rows, context, blocks, mask)


def paged_attention(q: Tensor, cache: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """q [T, H, D], cache [2, G, N, B, D] -> [T, H, D]. Contract: reference.paged_attention."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    pools = raw(cache).flatten(1, 2).flatten(2)  # keys and values, [G N, B D] each, or bytes of blocks
    kind = cache.dtype
    for bucket in plan.buckets:
        out.index_copy_(0, bucket.rows, _decode(q, pools, kind, plan, bucket, scale))
    for prefill in plan.prefills:
        out[prefill.rows] = _prefill(q[prefill.rows], pools, kind, plan, prefill, scale)
    return out


def _gather(pool: Tensor, kind: torch.dtype, blocks: Tensor, plan: AttentionPlan, dtype: torch.dtype) -> Tensor:
    """The numbers of blocks of a pool of dtype `kind`, [blocks, B, D], in `dtype`."""
    gathered = pool.index_select(0, blocks).unflatten(1, (plan.block_size, -1))
    return dequantize(gathered.view(kind)).to(dtype)


def _decode(
    q: Tensor, pools: Tensor, kind: torch.dtype, plan: AttentionPlan, bucket: Bucket, scale: float
) -> Tensor:
    """Attention of the n queries of a bucket: [n, H, D], with as many calls of PyTorch for any n.

    q [T, H, D]: all of the batch; pools: keys and values [G N, B D] each; kind: the cache's dtype.
    """
    n, d, g, r = len(bucket.rows), q.shape[-1], plan.kv_heads, plan.repeat
    queries = q.index_select(0, bucket.rows).view(n, g, r, d).transpose(0, 1).reshape(g * n, r, d)
    gathered = _gather(pools[0], kind, bucket.key_blocks, plan, q.dtype).view(g * n, -1, d)  # [G n, m B, D]
    scores = torch.bmm(queries * scale, gathered.transpose(1, 2))  # [G n, R, m B]
    scores.view(g, n, r, -1).masked_fill_(bucket.beyond, -torch.inf)
    weights = scores.softmax(-1)
    if kind in LARGEST:
        values = _gather(pools[1], kind, bucket.key_blocks, plan, q.dtype).view(g, n, -1, d)
        values.masked_fill_(bucket.beyond.transpose(1, 2), 0)  # as above: there may be NaN
        summed = torch.bmm(weights, values.view(g * n, -1, d))
    else:
        slots = pools[1].view(-1, d)  # [G N B, D]
        summed = torch.embedding_bag(
            slots, bucket.value_slots, bucket.offsets, mode=0, per_sample_weights=weights.to(slots.dtype).flatten()
        )[0]  # fmt: skip
    return summed.to(q.dtype).view(g, n, r, d).transpose(0, 1).reshape(n, g * r, d)


def _prefill(
    q: Tensor, pools: Tensor, kind: torch.dtype, plan: AttentionPlan, prefill: Prefill, scale: float
) -> Tensor:
    """Attention of the t queries of one sequence: [t, H, D]."""
    shape = (1, plan.kv_heads, -1, q.shape[-1])
    keys, values = (
        _gather(pool, kind, prefill.blocks, plan, q.dtype).view(shape)[:, :, : prefill.context] for pool in pools
    )  # [1, G, context, D]
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys,
        values,
        attn_mask=prefill.mask,
        is_causal=prefill.mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)
