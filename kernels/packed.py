"""A matrix of weights in small numbers, as files of quantized models have it.

Quantization keeps of each weight a code of a few bits, and of each group of columns in a row how codes become
numbers again:

    W[o, i] = scale[o, g] * (code[o, i] - zero[o, g]) + minimum[o, g],      g = i // group size

All formats that are read here are cases of it:

    GGUF Q4_0, Q5_0, Q8_0   groups of 32, zero is 8, 16, 128                Q4_1, Q5_1   groups of 32 with a minimum
    Q4_K, Q5_K, Q6_K        groups of 32 or 16, whose scales are themselves small numbers, in outer groups of 256
    GPTQ, AWQ, packed INT4  groups of 32 and more, or whole rows, with a zero for each group or the same for all
    INT8, FP8               a scale for each row; an FP8 code is a number by itself

The arithmetic is exact up to the last rounding: a code times a scale of half precision fits into a float.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

OUTER = 256  # columns in an outer group


@dataclass(frozen=True)
class Packed:
    """W [out, in] by the formula above. Unpacked to one byte a code: backends pack it as their kernels want it.

    codes: uint8 [out, in], below 2^bits; if float8, the bytes of float8_e4m3fn.
    scale: [out, in / group size] in fp32, fp16 or bf16; int8 or uint8 if there are outer ones.
    zero: what is taken from a code: one for all, or uint8 [out, in / group size].
    minimum: as scale, or None.
    outer: what scale and minimum are multiplied by, each [out, in / OUTER] in fp16.
    order: column j of codes is column order[j] of W (GPTQ's desc_act); None if they stand as they are.
    across: W is meant transposed, [in, out], as GPT-2's checkpoints have it.
    """

    codes: Tensor
    bits: int
    scale: Tensor
    zero: Tensor | int = 0
    minimum: Tensor | None = None
    outer: tuple[Tensor, Tensor | None] | None = None
    order: Tensor | None = None
    float8: bool = False
    across: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        out, into = self.codes.shape
        return (into, out) if self.across else (out, into)

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device: torch.device) -> "Packed":
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        zero = self.zero if isinstance(self.zero, int) else self.zero.to(device)
        outer = None if self.outer is None else (self.outer[0].to(device), move(self.outer[1]))
        moved = replace(self, codes=self.codes.to(device), scale=self.scale.to(device), zero=zero, outer=outer)
        return replace(moved, minimum=move(self.minimum), order=move(self.order))

    def t(self) -> "Packed":
        return replace(self, across=not self.across)

    def contiguous(self) -> "Packed":
        return self

    def scales(self) -> Tensor:
        """[out, in / group size], fp32."""
        return self._times_outer(self.scale, 0)

    def minima(self) -> Tensor | None:
        return None if self.minimum is None else self._times_outer(self.minimum, 1)

    def _times_outer(self, inner: Tensor, which: int) -> Tensor:
        if self.outer is None:
            return inner.float()
        outer = self.outer[which]
        assert outer is not None
        return inner.float() * outer.float().repeat_interleave(OUTER // self.group_size, 1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W in floats."""
        out, into = self.codes.shape
        codes = self.codes.view(torch.float8_e4m3fn) if self.float8 else self.codes
        numbers = codes.float().view(out, -1, self.group_size)
        zero = self.zero if isinstance(self.zero, int) else self.zero.float()[..., None]
        numbers = numbers.sub_(zero).mul_(self.scales()[..., None])
        if (minima := self.minima()) is not None:
            numbers = numbers.add_(minima[..., None])
        weight = numbers.view(out, into)
        if self.order is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.order, weight)
        return (weight.t() if self.across else weight).to(dtype)

    def rows(self, which: Tensor | slice) -> "Packed":
        """Some rows, in this order."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[which]

        zero = self.zero if isinstance(self.zero, int) else self.zero[which]
        outer = None if self.outer is None else (self.outer[0][which], pick(self.outer[1]))
        picked = replace(self, codes=self.codes[which], scale=self.scale[which], zero=zero, outer=outer)
        return replace(picked, minimum=pick(self.minimum))
