"""What the kernels know of a step, and the memory that they read and write."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """One step's flat batch, as the kernels see it; no padding anywhere.

    All int64: slot_mapping [T], query_start [S+1], context_lens [S], block_tables [S, M].
    """

    slot_mapping: Tensor
    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    plan: Any = field(default=None, repr=False)  # what a backend prepares once for all layers of the step

    @cached_property
    def max_query_len(self) -> int:
        """The most tokens that a sequence computes in this step."""
        return int(self.query_start.diff().max())

    @cached_property
    def max_context_len(self) -> int:
        return int(self.context_lens.max())


def new_cache(
    layers: int, num_blocks: int, block_size: int, kv_heads: int, head_size: int,
    dtype: torch.dtype, device: torch.device | str = "cpu", pinned: bool = False,
) -> Tensor:  # fmt: skip
    """Keys and values of N blocks for all layers: [L, 2, G, N, B, D], not initialised.

    A slot is never read before it is written, so the system need not give memory to blocks that are never used.
    Heads stand outside blocks, so that for one head a block is B D numbers in one piece.
    pinned: CPU memory that a GPU can reach by itself, to swap to.
    """
    shape = (layers, 2, kv_heads, num_blocks, block_size, head_size)
    return torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)
