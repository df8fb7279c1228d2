"""The tensors of one quantized linear layer, and what is asked of all of them, whatever the format."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.packed import Packed
from minipaged.models.fields import ModelError
from minipaged.models.split import Part

Shape = tuple[int, ...]
Read = Callable[[str, Part | None], Tensor]  # the tensor of a name, or some of it
Places = dict[str, tuple[int, int]]  # part -> dimension, step
FLOATS = ("F16", "BF16", "F32")  # as safetensors names dtypes


class Header(NamedTuple):
    """What the head of a safetensors file says of a tensor."""

    shape: Shape
    dtype: str


@dataclass(frozen=True)
class Layer:
    """name: of the layer, without the part. headers: of the parts that are there. read: gives a tensor by full name.

    cuts: of which parts of the layer only some is wanted, and what.
    """

    name: str
    headers: dict[str, Header]
    read: Read
    cuts: dict[str, Part] = field(default_factory=dict)

    def cut(self, places: Places, ranges: tuple[range, ...]) -> "Layer | None":
        """The layer with only these of its outputs, or inputs. None if they aren't whole steps along all its parts.

        places: the dimension of each part along which these lie, and how many a step is.
        """
        if any(end % step for _, step in places.values() for own in ranges for end in (own.start, own.stop)):
            return None
        cuts = {}
        for part, (axis, step) in places.items():
            cuts[part] = Part(axis, tuple(range(own.start // step, own.stop // step) for own in ranges))
        return replace(self, cuts=cuts)

    def error(self, part: str, what: str) -> ModelError:
        return ModelError(f"tensor {self.name}.{part} {what}")

    def header(self, part: str, dtypes: tuple[str, ...], dims: int | None = None) -> Header:
        """The header of a part that must be there, be of one of these dtypes, have so many dimensions and no zero."""
        if part not in self.headers:
            others = ", ".join(self.headers)
            raise self.error(part, f"is missing, although the layer is quantized: it has {others}")
        header = self.headers[part]
        if header.dtype not in dtypes:
            raise self.error(part, f"is {header.dtype} and should be {' or '.join(dtypes)}")
        if dims is not None and len(header.shape) != dims:
            raise self.error(part, f"is {header.shape} and should have {dims} dimensions")
        if 0 in header.shape:
            raise self.error(part, f"is {header.shape}: empty")
        return header

    def expect(self, part: str, shapes: tuple[Shape, ...], dtypes: tuple[str, ...]) -> None:
        """The part must be there, in one of these shapes and dtypes."""
        shape = self.header(part, dtypes).shape
        if shape not in shapes:
            raise self.error(part, f"is {shape} and should be {' or '.join(map(str, shapes))}")

    def tensor(self, part: str) -> Tensor:
        return self.read(f"{self.name}.{part}", self.cuts.get(part))

    def scale(self, part: str) -> Tensor:
        """A tensor of scales, all finite: one that is not would spoil every product with it."""
        scale = self.tensor(part)
        if not scale.isfinite().all():
            raise self.error(part, "holds NaN or infinity: no scale")
        return scale

    def grouped(
        self, codes: Tensor, bits: int, scale: Tensor, zero: Tensor | int, size: int, part: str | None
    ) -> Packed | Tensor:
        """W from codes [out, in], scale and zero [out, groups] and the tensor `part`, [in], of each column's group.

        Without it, groups of `size` lie side by side. If all have that size, columns can be sorted by them: a Packed
        with an `order`. Else floats [out, in], fp32.
        """
        groups, into = scale.shape[1], codes.shape[1]
        group = torch.arange(into) // size if part is None else self.tensor(part).long()
        if group.min() < 0 or group.max() >= groups:
            at = f"from {int(group.min())} to {int(group.max())}"
            raise self.error(part or "scales", f"names groups {at}, and there are 0 to {groups - 1}")
        zero = single(zero)
        if not (torch.bincount(group, minlength=groups) == size).all():
            taken = zero if isinstance(zero, int) else zero[:, group].float()
            return (codes.float() - taken) * scale[:, group].float()
        order = group.argsort(stable=True)
        if torch.equal(order, torch.arange(into)):
            return Packed(codes, bits, scale, zero)
        return Packed(codes[:, order], bits, scale, zero, order=order)


def single(zero: Tensor | int) -> Tensor | int:
    """One number where all zero points are the same: kernels like that."""
    if isinstance(zero, int) or not (zero == zero.flatten()[0]).all():
        return zero
    return int(zero.flatten()[0])
