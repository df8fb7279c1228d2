"""What the engine asks of the hardware: tensors in, tensors out. Imports nothing of minipaged.

    reference.py         each kernel in the plainest PyTorch that is right; all others are tested against it
    torch_attention.py   paged attention in PyTorch, fast on a CPU
    linear.py            products with weights packed for the machine

This file is the door: callers name what they want, not who does it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels import reference, torch_attention
from kernels.linear import Linear, compute_dtype
from kernels.reference import copy_blocks, move_blocks, rms_norm, rope, silu_and_mul

__all__ = [
    "Batch", "Linear", "compute_dtype", "copy_blocks", "move_blocks", "new_cache", "paged_attention", "rms_norm",
    "rope", "silu_and_mul", "write_kv",
]  # fmt: skip


@dataclass
class Batch:
    """One step's flat batch, as the kernels see it; no padding anywhere.

    All int64: slot_mapping [T], query_start [S+1], context_lens [S], block_tables [S, M].
    """

    slot_mapping: Tensor
    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    plan: torch_attention.AttentionPlan | None = field(default=None, repr=False)  # made by the first layer


def new_cache(
    layers: int, num_blocks: int, block_size: int, kv_heads: int, head_size: int,
    dtype: torch.dtype, device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """Keys and values of N blocks for all layers: [L, 2, G, N, B, D], not initialised.

    A slot is never read before it is written, so the system need not give memory to blocks that are never used.
    Heads stand outside blocks, so that for one head a block is B D numbers in one piece.
    """
    return torch.empty(layers, 2, kv_heads, num_blocks, block_size, head_size, dtype=dtype, device=device)


def write_kv(k: Tensor, v: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Write keys and values [T, G, D] into the slots of one layer's cache [2, G, N, B, D]; -1 writes nothing."""
    if slot_mapping.min() < 0:
        kept = slot_mapping >= 0
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    keys, values = cache.flatten(2, 3)  # [G, N B, D]
    keys.index_copy_(1, slot_mapping, k.transpose(0, 1).to(cache.dtype))
    values.index_copy_(1, slot_mapping, v.transpose(0, 1).to(cache.dtype))


def paged_attention(q: Tensor, cache: Tensor, batch: Batch, scale: float) -> Tensor:
    """Causal attention of q [T, H, D] over cache [2, G, N, B, D], through the page tables. Returns [T, H, D].

    Contract: `reference.paged_attention`.
    """
    if q.device.type != "cpu":
        return reference.paged_attention(
            q, cache, batch.query_start, batch.context_lens, batch.block_tables, scale
        )
    if batch.plan is None:
        batch.plan = torch_attention.AttentionPlan(
            batch.query_start, batch.context_lens, batch.block_tables, q.shape[1], cache.shape
        )
    return torch_attention.paged_attention(q, cache, batch.plan, scale)
