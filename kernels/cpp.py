"""The C++ backend: calls what cpp_build.py builds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.batch import Batch
from kernels.cpp_build import load
from kernels.cpp_packed import PackedMatrix, packs
from kernels.huge_pages import HugePages
from kernels.linear import Linear
from kernels.packed import Packed, Weight
from kernels.torch_backend import TorchBackend

VECTORS = 64  # numbers: PyTorch takes two vectors at a time, of at most 64 bytes
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.float8_e4m3fn: 3}  # of caches
SHARE = 16384  # numbers: from 32768 on PyTorch shares them out among threads


class CppBackend(TorchBackend):
    """Attention, norm, rope with cache write, gated activation and products in C++; the rest as in PyTorch.

    dtype: float32 or bfloat16. library: see `build`.
    products: "exact" or "int8", with weights that stay packed: see cpu/packed.h.
    same_bits: have oneDNN, which does products in bf16 where the processor can, take rows in groups of one size. All
    that is computed in fp32 is summed in one order for any number of rows anyway.
    """

    name = "cpp"

    def __init__(self, dtype: torch.dtype, library: Path, same_bits: bool = False, products: str = "exact"):
        super().__init__("cpu", dtype)
        self.products = products
        self.same_bits = same_bits or self.dtype == torch.float32
        self.library = load(library)
        self.pages = HugePages()

    def product(self, weight: Weight, bias: Tensor | None = None) -> Callable[..., Tensor]:
        """Where the processor computes in bf16 itself, oneDNN is the faster one."""
        if isinstance(weight, Packed):
            if packs(weight):
                return PackedMatrix(self.library, self.pages, weight, bias, int8=self.products == "int8")
            weight = weight.dequantize(self.dtype)
        if self.dtype == torch.float32:
            return PackedLinear(self, weight, bias)
        return Linear(weight, bias, in_groups=self.same_bits)

    def packs(self, weight: Packed) -> bool:
        """Not where products in bf16 are the processor's own: these are faster for more than a few rows."""
        return self.dtype == torch.float32 and packs(weight)

    def embedding(self, weight: Weight, linear: Callable[..., Tensor] | None = None) -> Any:
        if isinstance(linear, PackedMatrix):
            return linear  # has all rows already
        if isinstance(weight, Packed) and packs(weight):
            return PackedMatrix(self.library, self.pages, weight)
        return weight

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # of heads, too
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        y = torch.empty(x.shape, dtype=x.dtype)
        self.library.cpu_rms_norm(
            rows.data_ptr(), _bf16(x), rows.stride(0), weight.data_ptr(), eps, y.data_ptr(), *rows.shape,
            torch.get_num_threads(),
        )  # fmt: skip
        return y

    def silu_and_mul(self, x: Tensor) -> Tensor:
        rows, width = x.shape
        y = torch.empty(rows, width // 2, dtype=x.dtype)
        self.library.cpu_silu_and_mul(
            x.data_ptr(), _bf16(x), y.data_ptr(), rows, width // 2, torch.get_num_threads()
        )
        return y

    def pointwise(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Subtle: PyTorch has two formulas for some functions, one for whole vectors and one for the numbers left over
        at the end of a thread's share. In whole vectors, and too few for a second thread, all go by the first one.
        """
        width = x.shape[-1]
        if odd := -width % VECTORS:
            x = torch.nn.functional.pad(x, (0, odd))
        pieces = [function(piece) for piece in x.reshape(-1).split(SHARE)]
        y = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        return y.view(x.shape)[..., :width].contiguous()

    def rope_and_write(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, layer_cache: Tensor, batch: Batch,
        static: tuple[float, float] | None = None,
    ) -> Tensor:  # fmt: skip
        k_scale, v_scale = static if static and layer_cache.dtype == torch.float8_e4m3fn else (0.0, 0.0)
        self.library.cpu_rope_and_write(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), _bf16(q), q.stride(0), k.stride(0), v.stride(0),
            cos.data_ptr(), sin.data_ptr(), layer_cache.data_ptr(), KINDS[layer_cache.dtype],
            batch.slot_mapping.data_ptr(), *q.shape[:2], *layer_cache.shape[1:4], q.shape[2], k_scale, v_scale,
            torch.get_num_threads(),
        )  # fmt: skip
        return q

    def paged_attention(self, q: Tensor, layer_cache: Tensor, batch: Batch, scale: float) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype)
        self.library.cpu_attention(
            q.data_ptr(), _bf16(q), q.stride(0), layer_cache.data_ptr(), KINDS[layer_cache.dtype],
            batch.query_start.data_ptr(), batch.context_lens.data_ptr(), batch.block_tables.data_ptr(), out.data_ptr(),
            *batch.block_tables.shape, q.shape[1], *layer_cache.shape[1:4], q.shape[2], scale,
            torch.get_num_threads(),
        )  # fmt: skip
        return out


def _bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


class PackedLinear:
    """y = x W^T + bias in fp32, W kept in its own dtype, packed into panels: see `linear` in cpu/linear.cpp."""

    def __init__(self, backend: CppBackend, weight: Tensor, bias: Tensor | None):
        self.library = backend.library
        self.out, self.into = weight.shape
        self.bias = None if bias is None else bias.float().contiguous()
        width = self.library.panel_width()
        panels = -(-self.out // width)
        self.packed = backend.pages.empty((panels, self.into, width), weight.dtype)  # [out / P, in, P]
        if panels * width > self.out:
            weight = torch.cat((weight, weight.new_zeros(panels * width - self.out, self.into)))
        self.packed.copy_(weight.view(panels, width, self.into).transpose(1, 2))

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        y = torch.empty(len(x), self.out) if add_to is None else add_to
        self.library.cpu_linear(
            x.data_ptr(), self.packed.data_ptr(), _bf16(self.packed),
            None if self.bias is None else self.bias.data_ptr(), y.data_ptr(),
            len(x), self.out, self.into, add_to is not None, torch.get_num_threads(),
        )  # fmt: skip
        return y
