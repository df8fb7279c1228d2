"""Paged attention in the tree of assignment 1, in the place of kernels/torch_attention.py: sequences go one by one.

It reads a sequence's keys and values through its page table and puts them into a row; `attention` does the rest. How it
finds them is a matter for assignments 2 and 3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.formulas import attention


@dataclass
class AttentionPlan:
    """The batch, as the backend hands it over. cache: one layer's, [2, G, N, B, D]."""

    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    heads: int
    cache: Tensor


def paged_attention(q: Tensor, cache: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """q [T, H, D], cache [2, G, N, B, D] -> [T, H, D]."""
    out, starts = torch.empty_like(q), plan.query_start.tolist()
    for s, context in enumerate(plan.context_lens.tolist()):
        rows = slice(starts[s], starts[s + 1])
        blocks = plan.block_tables[s, : -(-context // cache.shape[3])]
        keys, values = cache[:, :, blocks].flatten(2, 3)[:, :, :context]  # [G, C, D]
        out[rows] = attention(q[rows], keys, values, scale)
    return out
