"""y = x W^T + b, with W stored as this machine's fastest product wants it.

On a CPU, PyTorch's `linear` repacks the weights at every call; for the few rows of a decode step that costs as
much as the product itself. oneDNN, which does the product, lets us pack once.
"""

import torch
from torch import Tensor


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
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        dtype = compute_dtype(weight.dtype, weight.device)
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.packed = _pack(self.weight)
        if self.packed is not None:
            self.weight = self.packed

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        """The product, or add_to plus the product, in place."""
        if self.packed is not None:
            y = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        else:
            y = torch.nn.functional.linear(x, self.weight, self.bias)
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
