"""Rounding to nearest: the grid that all methods share, and the least that can be done with it.

A group of neighbouring weights in a row shares a scale and a zero point, and each weight is kept as a code:

    code = round(w / scale) + zero, cut to 0 .. 2^bits - 1          w' = (code - zero) * scale

    symmetric    zero = 2^(bits - 1) for all;  scale = 2 max|w| / (2^bits - 1)
    asymmetric   zero = round(-low / scale);   scale = (high - low) / (2^bits - 1), where low <= 0 <= high

A code is wrong by half a step at the most. Sixteen codes over the largest weight of a group: one outlier makes the
step large for all its neighbours, and that is why groups are small. A scale is rounded to the sixteen bits in which
it is stored before a code is chosen, so that codes fit the scale that a reader will find.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.packed import Packed
from minipaged.models.config import ModelConfig
from minipaged.quantization.layers import MATRICES, Seen, Weights

WIDTHS = (4, 8)  # bits that are written
GROUP_SIZES = (32, 64, 128, -1)


@dataclass(frozen=True)
class Grid:
    """bits: of a code. group_size: columns that share a scale; -1: a whole row. dtype: in which scales are kept.

    symmetric: one zero point in the middle of the codes for all, and none is stored.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = True
    dtype: torch.dtype = torch.float16

    @property
    def largest(self) -> int:
        return 2**self.bits - 1

    def groups(self, weight: Tensor) -> Tensor:
        """[out, in] -> [out, groups, columns of one]. ValueError if the columns can't be divided so."""
        columns = weight.shape[1] if self.group_size == -1 else self.group_size
        if weight.shape[1] % columns:
            raise ValueError(f"groups of {columns} columns: {weight.shape[1]} columns can't be divided into them")
        return weight.reshape(len(weight), -1, columns)


def fit(weight: Tensor, grid: Grid, shrink: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group of weight [out, in]: two of [out, groups], in fp32.

    shrink: cut the range to this share of it (or a share for each group): the largest weights lose, all others gain.
    """
    groups = grid.groups(weight)
    if grid.symmetric:
        scale = 2 * groups.abs().amax(-1) * shrink / grid.largest
        zero = torch.full_like(scale, 2 ** (grid.bits - 1))
        return _stored(scale, grid), zero
    low, high = groups.amin(-1).clamp(max=0) * shrink, groups.amax(-1).clamp(min=0) * shrink
    scale = _stored((high - low) / grid.largest, grid)
    return scale, (-low / scale).round().clamp(0, grid.largest)


def _stored(scale: Tensor, grid: Grid) -> Tensor:
    """As a reader will find it. Of a group of nothing but zeros any scale is right, but 0."""
    rounded = scale.to(grid.dtype).float()
    return torch.where(rounded == 0, 2.0**-24, rounded)


def codes_of(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The nearest codes, in fp32. Scale and zero are given for each weight, or broadcast."""
    return ((weight / scale).round() + zero).clamp(0, grid.largest)


def packed(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Packed:
    """codes [out, in], scale and zero [out, groups], all fp32 -> the matrix as files and kernels have it."""
    zeros = 2 ** (grid.bits - 1) if grid.symmetric else zero.to(torch.uint8)
    return Packed(codes.to(torch.uint8), grid.bits, scale.to(grid.dtype), zeros)


def rtn(weight: Tensor, grid: Grid, shrink: float | Tensor = 1.0) -> Packed:
    """Each weight of [out, in] to its nearest code; no data is needed."""
    scale, zero = fit(weight, grid, shrink)
    codes = codes_of(grid.groups(weight), scale[..., None], zero[..., None], grid)
    return packed(codes.reshape(weight.shape), scale, zero, grid)


def rtn_layer(weights: Weights, seen: dict[str, Seen], config: ModelConfig, grid: Grid) -> dict[str, Packed]:
    """All matrices of a layer. Of what they read nothing is asked."""
    return {name: rtn(weights[name], grid) for name in MATRICES}
