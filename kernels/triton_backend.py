"""The Triton backend: attention, cache writes, block moves and packed weights on a GPU; the rest as in PyTorch.

Without a GPU it runs where TRITON_INTERPRET=1 is set before Python starts: slow, but every line can be stepped through.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from kernels import triton_attention, triton_cache, triton_packed
from kernels.batch import Batch
from kernels.packed import Packed, Weight
from kernels.torch_backend import TorchBackend


class TritonBackend(TorchBackend):
    """Not the same bits in any company: products are PyTorch's; and attention takes other tiles for a single query than
    for several (`choose_tiles`), and cuts contexts by the number of programs in the batch (`choose_splits`), so the
    order of its sums depends on both.
    """

    name = "triton"

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        super().__init__(device, dtype)
        self.device = torch.device(device)

    def why_no_cache(self, dtype: torch.dtype) -> str | None:
        if dtype != torch.float8_e4m3fn or self.device.type != "cuda":
            return None
        found = torch.cuda.get_device_capability(self.device)
        return None if found >= (8, 9) else f"needs compute capability 8.9, not {found[0]}.{found[1]}: take int8"

    def packs(self, weight: Packed) -> bool:
        """Not under the interpreter: there floats are faster by far."""
        return self.device.type == "cuda" and triton_packed.takes(weight)

    def product(self, weight: Weight, bias: Tensor | None = None) -> Callable[..., Tensor]:
        if isinstance(weight, Packed) and triton_packed.takes(weight):
            return triton_packed.PackedLinear(weight, bias)
        return super().product(weight, bias)

    def write_kv(
        self, k: Tensor, v: Tensor, layer_cache: Tensor, batch: Batch, static: tuple[float, float] | None = None
    ) -> None:
        triton_cache.write_kv(k, v, layer_cache, batch.slot_mapping, static)

    def paged_attention(self, q: Tensor, layer_cache: Tensor, batch: Batch, scale: float) -> Tensor:
        return triton_attention.paged_attention(
            q, layer_cache, batch.query_start, batch.context_lens, batch.block_tables, scale,
            batch.max_query_len, batch.max_context_len,
        )  # fmt: skip

    def copy_blocks(self, cache: Tensor, source: Tensor, target: Tensor) -> None:
        triton_cache.copy_blocks(cache, source, target)

    def move_blocks(self, from_cache: Tensor, to_cache: Tensor, source: Tensor, target: Tensor) -> None:
        triton_cache.move_blocks(from_cache, to_cache, source, target)


def why_not(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why the kernels can't run on this device in this dtype; None if they can."""
    if torch.device(device).type != "cpu":
        return None
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "kernels in Triton need a GPU, or its interpreter (set TRITON_INTERPRET=1)"
    return "Triton's interpreter computes bf16 wrongly" if dtype == torch.bfloat16 else None
