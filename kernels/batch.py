"""What the kernels know of a step."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

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
