"""The reference: each kernel in the plainest PyTorch that is right.

Nothing here is fast, and nothing here is allowed to be clever: every other
backend, in PyTorch, C++ or Triton, is tested against this file.

Shapes, as in the whole project: T tokens in the batch, S sequences in it,
N physical blocks, B block size, M blocks in a page table, H query heads,
G key/value heads, D head size.
"""

import math

import torch
from torch import Tensor

from kernels.packed import Packed


def write_kv(k: Tensor, v: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Write this step's keys and values [T, G, D] into their slots.

    cache [2, G, N, B, D]: keys and values of one layer. slot_mapping [T] holds
    ``block * B + offset``; a slot of -1 writes nothing.
    """
    block_size = cache.shape[3]
    for t, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, block_size)
            cache[0, :, block, offset] = k[t]
            cache[1, :, block, offset] = v[t]


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
        keys, values = cache[:, :, blocks].flatten(2, 3)[:, :, :context].float()  # [G, context, D]
        keys = keys.repeat_interleave(groups, 0)  # [H, context, D]
        values = values.repeat_interleave(groups, 0)
        scores = scale * torch.einsum("thd,hcd->htc", q[begin:end].float(), keys)
        query_position = torch.arange(context - (end - begin), context, device=q.device)
        future = torch.arange(context, device=q.device) > query_position[:, None]
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        out[begin:end] = torch.einsum("htc,hcd->thd", weights, values).to(q.dtype)
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
    moved = from_cache[:, :, :, source.to(from_cache.device)]
    to_cache[:, :, :, target.to(to_cache.device)] = moved.to(to_cache.device)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; the norm is taken in fp32."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, heads, D] by its positions; cos and sin [T, D/2].

    Dimension i is paired with i + D/2 (the layout of Hugging Face's Llama).
    """
    a, b = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up for x [T, 2F] = (gate, up). Returns [T, F]."""
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


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
