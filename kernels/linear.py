"""y = x W^T + b, with W stored as this machine's fastest product wants it.

On a CPU, PyTorch's `linear` repacks the weights at every call; for the few rows of a decode step that costs as
much as the product itself. oneDNN, which does the product, lets us pack once.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 64  # rows: with AMX, fewer than that take hardly less time, and at 512 larger groups gain little


def compute_dtype(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """What to compute in when weights and cache are kept in `dtype`: fp32 where a CPU has no such arithmetic.

    Without bf16 instructions, a CPU's bf16 product is several times slower than its fp32 one.
    """
    if torch.device(device).type != "cpu" or dtype == torch.float32:
        return dtype
    ops = torch.ops.mkldnn
    native = {torch.bfloat16: ops._is_mkldnn_bf16_supported, torch.float16: ops._is_mkldnn_fp16_supported}
    return dtype if torch.backends.mkldnn.is_available() and native[dtype]() else torch.float32


class Linear:
    """x [T, in] -> [T, out] for weight [out, in] and bias [out] or None.

    The weights are kept in `compute_dtype`: that of x, so that a product never converts.
    in_groups: always GROUP rows at a time, the last ones filled up with zeros. The library chooses by the number of
    rows in which order it sums; so it always chooses the same, and a row does not depend on how many are beside it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, in_groups: bool = False):
        self.in_groups = in_groups
        dtype = compute_dtype(weight.dtype, weight.device)
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.packed = _pack(self.weight)
        if self.packed is not None:
            self.weight = self.packed

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        """The product, or add_to plus the product, in place."""
        y = self._grouped(x) if self.in_groups else self._product(x)
        return y if add_to is None else add_to.add_(y)

    def _grouped(self, x: Tensor) -> Tensor:
        groups = pad(x, (0, 0, 0, -len(x) % GROUP)).split(GROUP)
        products = [self._product(group) for group in groups]
        return torch.cat(products)[: len(x)] if len(products) > 1 else products[0][: len(x)]

    def _product(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return torch.nn.functional.linear(x, self.weight, self.bias)


class SideBySide:
    """One product with several matrices, one below the other, that can't stand in one."""

    def __init__(self, linears: list[Callable[..., Tensor]]):
        self.linears = linears

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        y = torch.cat([linear(x) for linear in self.linears], 1)
        return y if add_to is None else add_to.add_(y)


def _pack(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's own layout, or None where there is no oneDNN, or it does not take this one."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        torch.ops.mkldnn._linear_pointwise(weight.new_zeros(1, weight.shape[1]), packed, None, "none", [], "")
    except (RuntimeError, AttributeError, NotImplementedError):
        return None
    return packed
