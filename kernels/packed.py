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

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["OUTER", "Packed", "Weight", "floats", "quantize", "stack"]

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

    def t(self) -> "Packed":
        return replace(self, across=not self.across)

    def contiguous(self) -> "Packed":
        return self

    def to(self, device: torch.device | str) -> "Packed":
        """The same on that device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Packed":
        """The same with all its tensors changed, those of `outer` too."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        changed: dict[str, Any] = {name: change(value) for name, value in values if isinstance(value, Tensor)}
        if self.outer is not None:
            changed["outer"] = tuple(None if t is None else change(t) for t in self.outer)
        return replace(self, **changed)

    def is_finite(self) -> bool:
        """Whether all scales are numbers."""
        tensors = [self.scale, self.minimum, *(self.outer or ())]
        return all(bool(t.isfinite().all()) for t in tensors if t is not None)

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
        return replace(replace(self, order=None)._each(lambda tensor: tensor[which]), order=self.order)

    def columns(self, begin: int, end: int) -> "Packed | Tensor":
        """Columns begin to end of W (of its rows, where it lies across), a copy: the same numbers to the last bit.

        Where the cut goes through groups they become smaller ones, and through outer ones these are multiplied out.
        Floats if the columns stand in an order in which what is left of the groups isn't all of one size.
        """
        if self.order is not None:
            return self._scattered_columns(self.order, begin, end)
        if self.outer is not None and (begin % OUTER or end % OUTER):
            return replace(self, scale=self.scales(), minimum=self.minima(), outer=None).columns(begin, end)
        size = self.group_size
        in_one = begin // size == (end - 1) // size
        finer = end - begin if in_one else math.gcd(size, begin, end)
        groups = torch.arange(begin, end, finer, device=self.device) // size
        outer = self.outer
        if outer is not None:
            which = slice(begin // OUTER, end // OUTER)
            outer = outer[0][:, which].clone(), None if outer[1] is None else outer[1][:, which].clone()
        return replace(self._groups(groups), codes=self.codes[:, begin:end].contiguous(), outer=outer)

    def _scattered_columns(self, order: Tensor, begin: int, end: int) -> "Packed | Tensor":
        kept = ((order >= begin) & (order < end)).nonzero().flatten()
        groups, counts = (kept // self.group_size).unique_consecutive(return_counts=True)
        if not (counts == counts[0]).all():
            weight = replace(self, across=False).dequantize()[:, begin:end]
            return weight.t() if self.across else weight.contiguous()
        return replace(self._groups(groups), codes=self.codes[:, kept], order=order[kept] - begin)

    def _groups(self, which: Tensor) -> "Packed":
        """With the scales of these groups instead of all; codes must follow."""
        zero = self.zero if isinstance(self.zero, int) else self.zero[:, which]
        minimum = None if self.minimum is None else self.minimum[:, which]
        return replace(self, scale=self.scale[:, which], zero=zero, minimum=minimum)

    def __getitem__(self, which: Tensor) -> Tensor:
        """Some rows in floats, of any shape [...] -> [..., in]: an embedding."""
        return self.rows(which.flatten()).dequantize().unflatten(0, which.shape)

    def made_like(self, other: "Packed") -> bool:
        """Whether codes become numbers in the same way, so that both can stand in one matrix."""
        orders = (self.order, other.order)
        same_order = orders[0] is orders[1] or (None not in orders and torch.equal(*orders))  # type: ignore[arg-type]

        def kind(packed: Packed) -> tuple:
            tensors = packed.minimum is None, packed.outer is None, packed.scale.dtype
            return packed.bits, packed.group_size, packed.codes.shape[1], packed.float8, packed.across, tensors

        return same_order and kind(self) == kind(other)

    def zeros(self) -> Tensor:
        """[out, in / group size], uint8."""
        if isinstance(self.zero, Tensor):
            return self.zero
        return torch.full(self.scale.shape, self.zero, dtype=torch.uint8, device=self.device)


Weight = Tensor | Packed


def floats(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    return weight.dequantize(dtype) if isinstance(weight, Packed) else weight.to(dtype)


def quantize(weight: Tensor, bits: int) -> Packed:
    """Rounds W [out, in] to the nearest codes.

    8 bits: a scale for each row, the largest of its numbers being 127. 4 bits: scale and minimum for each 32 columns,
    in half precision, as GGUF's Q4_1 has them; in must be a multiple of 32.
    """
    if bits == 8:
        scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        return Packed(((weight / scale).round() + 128).to(torch.uint8), 8, scale, 128)
    groups = weight.float().unflatten(1, (-1, 32))
    least, most = groups.amin(2), groups.amax(2)
    minimum, scale = least.half(), ((most - least) / 15).half()
    steps = (groups - minimum.float()[..., None]) / scale.float().clamp(min=1e-30)[..., None]
    return Packed(steps.round().clamp(0, 15).to(torch.uint8).flatten(1), 4, scale, 0, minimum)


def stack(weights: Sequence[Weight]) -> list[Weight]:
    """Matrices one below the other, in as few as possible: one large product is faster than small ones."""
    stacked: list[Weight] = []
    for weight in weights:
        last = stacked[-1] if stacked else None
        if isinstance(last, Tensor) and isinstance(weight, Tensor):
            stacked[-1] = torch.cat((last, weight))
        elif isinstance(last, Packed) and isinstance(weight, Packed) and last.made_like(weight):
            stacked[-1] = _below(last, weight)
        else:
            stacked.append(weight)
    return stacked


def _below(a: Packed, b: Packed) -> Packed:
    def cat(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        return None if x is None or y is None else torch.cat((x, y))

    one_zero = isinstance(a.zero, int) and a.zero == b.zero
    outer = None
    if a.outer and b.outer:
        outer = torch.cat((a.outer[0], b.outer[0])), cat(a.outer[1], b.outer[1])
    return replace(
        a, codes=torch.cat((a.codes, b.codes)), scale=torch.cat((a.scale, b.scale)), minimum=cat(a.minimum, b.minimum),
        zero=a.zero if one_zero else torch.cat((a.zeros(), b.zeros())), outer=outer,
    )  # fmt: skip
