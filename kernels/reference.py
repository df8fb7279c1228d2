"""The reference: each kernel in the plainest PyTorch that is right.

Nothing here is fast, and nothing here is allowed to be clever: every other
backend, in PyTorch, C++ or Triton, is tested against this file. (What a layer
computes for itself, with no cache, stands in formulas.py.)

Shapes, as in the whole project: T tokens in the batch, S sequences in it,
N physical blocks, B block size, M blocks in a page table, H query heads,
G key/value heads, D head size. A cache may hold its numbers in eight bits: cache.py.
"""

import math

import torch
from torch import Tensor

from kernels.cache import LARGEST, codes, is_quantized, raw, scales
from kernels.formulas import rms_norm as rms_norm
from kernels.formulas import rope as rope
from kernels.formulas import silu_and_mul as silu_and_mul
from kernels.packed import Packed


def quantize(x: Tensor, dtype: torch.dtype, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Codes [..., D] and scales [...] of numbers x [..., D]: x is nearly code * scale.

    dtype int8 or float8_e4m3fn. The largest number gets the largest code, and no scale is below 1e-6 (vLLM's rules
    for int8_per_token_head, fp8_per_token_head). Halves are rounded away from zero in int8, to even in fp8.
    scale: one for all, from a checkpoint, instead; what it can't reach gets the largest code.
    A row that is not finite gets a scale of NaN, so it reads as NaN.
    """
    largest = LARGEST[dtype]
    tops = x.float().abs().amax(-1)
    scales = (tops * (1 / largest)).clamp(min=1e-6) if scale is None else torch.full_like(tops, scale)
    scales = torch.where(tops.isfinite(), scales, torch.nan)
    y = (x.float() / scales[..., None]).nan_to_num(0).clamp(-largest, largest)
    return ((y + y.sign() / 2) if dtype == torch.int8 else y).to(dtype), scales


def dequantize(cache: Tensor) -> Tensor:
    """The numbers of a cache, [..., N, B, D]; fp32 if it holds codes."""
    if not is_quantized(cache):
        return cache
    return codes(cache).float() * scales(cache)[..., None]


def write_kv(
    k: Tensor, v: Tensor, cache: Tensor, slot_mapping: Tensor, static: tuple[float, float] | None = None
) -> None:
    """Write this step's keys and values [T, G, D] into their slots.

    cache [2, G, N, B, D]: keys and values of one layer; in eight bits see cache.py. slot_mapping [T] holds
    ``block * B + offset``; a slot of -1 writes nothing. static: scales of keys and of values for an fp8 cache.
    """
    both = static if static and cache.dtype == torch.float8_e4m3fn else (None, None)
    for part, x, scale in zip(cache, (k, v), both, strict=True):
        if is_quantized(cache):
            x, new_scales = quantize(x, cache.dtype, scale)
            write_slots(scales(part), new_scales, slot_mapping)
        write_slots(raw(codes(part)), raw(x), slot_mapping)


def write_slots(part: Tensor, x: Tensor, slot_mapping: Tensor) -> None:
    """Write one row of x [T, G, ...] into each slot of part [G, N, B, ...]: keys, or values, or their scales.

    slot_mapping [T]: row t goes to offset ``slot % B`` of block ``slot // B``, in each head; one of -1 goes nowhere.
    No two rows have the same slot, but for -1. x is converted to the dtype of `part`; other slots stay as they are.
    """
    block_size = part.shape[2]
    for t, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, block_size)
            part[:, block, offset] = x[t]


def paged_attention(
    q: Tensor,
    cache: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention over a flat batch, keys and values read through page tables.

    Equation 4 of the PagedAttention paper, one sequence at a time:

        A_ij = exp(scale q_i . K_j) / sum_t exp(scale q_i . K_t),   o_i = sum_j A_ij V_j

    q [T, H, D]; cache [2, G, N, B, D]; query_start [S+1]; context_lens [S] counts
    the tokens of a sequence including this step's; block_tables [S, M].
    The queries of sequence s are the last ``query_start[s+1] - query_start[s]``
    of its ``context_lens[s]`` positions. Returns [T, H, D] in q's dtype.
    """
    out = torch.empty_like(q)
    block_size = cache.shape[3]
    groups = q.shape[1] // cache.shape[1]
    starts = query_start.tolist()
    for s, context in enumerate(context_lens.tolist()):
        begin, end = starts[s], starts[s + 1]
        blocks = block_tables[s, : math.ceil(context / block_size)].long()
        read = dequantize(raw(cache)[:, :, blocks].view(cache.dtype))
        keys, values = read.flatten(2, 3)[:, :, :context].float()  # [G, context, D]
        keys = keys.repeat_interleave(groups, 0)  # [H, context, D]
        values = values.repeat_interleave(groups, 0)
        scores = scale * torch.einsum("thd,hcd->htc", q[begin:end].float(), keys)
        query_position = torch.arange(context - (end - begin), context, device=q.device)
        future = torch.arange(context, device=q.device) > query_position[:, None]
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        out[begin:end] = torch.einsum("htc,hcd->thd", weights, values).to(q.dtype)
    return out


def paged_attention_by_blocks(
    q: Tensor,
    cache: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
) -> Tensor:
    """The same, a block at a time: nothing of a context is brought together, and no score outlives its block.

    Online softmax (Milakov and Gimelshein 2018), the rule of the kernels in C++ and Triton. For each query and head,
    keep m, the largest score so far, z, the sum of all exp(score - m), and o, the sum of all exp(score - m) V. The
    keys j of another block, with scores s_j, change them by

        m' = max(m, max_j s_j)
        z' = exp(m - m') z + sum_j exp(s_j - m')
        o' = exp(m - m') o + sum_j exp(s_j - m') V_j

    and at the end the answer is o / z. Arguments and answer: as of `paged_attention`. However long the contexts, no
    tensor of floats that is made on the way has more than 2 max(T H D, T H B, S H B D) numbers.
    """
    out = torch.empty_like(q)
    block_size = cache.shape[3]
    groups = q.shape[1] // cache.shape[1]
    starts = query_start.tolist()
    for s, context in enumerate(context_lens.tolist()):
        mine = q[starts[s] : starts[s + 1]].float().transpose(0, 1)  # [H, t, D]
        position = torch.arange(context - mine.shape[1], context, device=q.device)
        m = torch.full(mine.shape[:2], -math.inf, device=q.device)
        z, o = torch.zeros_like(m), torch.zeros_like(mine)
        for begin in range(0, context, block_size):
            filled = min(block_size, context - begin)
            block = int(block_tables[s, begin // block_size])
            read = dequantize(raw(cache)[:, :, block].view(cache.dtype))[:, :, :filled]
            keys, values = (part.repeat_interleave(groups, 0) for part in read.float())  # [H, filled, D]
            future = torch.arange(begin, begin + filled, device=q.device) > position[:, None]
            scores = (scale * (mine @ keys.transpose(1, 2))).masked_fill(future, -math.inf)  # [H, t, filled]
            m_new = torch.maximum(m, scores.amax(-1))
            weights, shrink = torch.exp(scores - m_new[..., None]), torch.exp(m - m_new)
            z = z * shrink + weights.sum(-1)
            o = o * shrink[..., None] + weights @ values
            m = m_new
        out[starts[s] : starts[s + 1]] = (o / z[..., None]).transpose(0, 1).to(q.dtype)
    return out


def copy_blocks(cache: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy whole blocks inside the pool, in all layers at once.

    cache [L, 2, G, N, B, D]; source and target [C]. Every source is read before
    any target is written, so the order of the pairs does not matter.
    """
    move_blocks(cache, cache, source, target)


def move_blocks(from_cache: Tensor, to_cache: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy blocks from one pool to another, on whatever devices they are: swapping.

    from_cache, to_cache [L, 2, G, N, B, D], N of each its own; source and target [C].
    """
    from_cache, to_cache = raw(from_cache), raw(to_cache)
    moved = from_cache[:, :, :, source.to(from_cache.device)]
    to_cache[:, :, :, target.to(to_cache.device)] = moved.to(to_cache.device)


def round_to_int8(x: Tensor) -> Tensor:
    """x [T, in] as int8 products see it: of each 32 numbers the largest is 127 steps, and all are whole steps."""
    blocks = x.unflatten(-1, (-1, 32))
    most = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * torch.where(most > 0, 127 / most, 0)).round()
    return (codes * (most / 127)).flatten(-2)


def packed_linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias for x [T, in] and W [out, in] in small numbers. Returns [T, out] in x's dtype; sums are in fp32."""
    y = x.float() @ packed.dequantize().t()
    return (y if bias is None else y + bias.float()).to(x.dtype)
