"""Plain FP8: a weight of eight-bit floats (e4m3: up to 448, no infinity) and what it is to be multiplied by.

    weight  float8_e4m3fn [out, in]

    weight_scale      [] or [1], or [out] or [out, 1]             one for all, or for each output
    weight_scale_inv  [ceil(out / a), ceil(in / b)]               one for each block of a x b weights (DeepSeek, Qwen)

    W[o, i] = weight[o, i] * scale

Despite its name, weight_scale_inv is multiplied, too. Blocks that span several outputs become floats at load: a Packed
has groups within a row. input_scale, where activations are quantized in advance, is read over: see __init__.py.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels.packed import Packed
from minipaged.models.quantized.layer import FLOATS, Layer, Places, Shape


@dataclass(frozen=True)
class FP8:
    """block: the rows and columns that share a scale; None: no blocks."""

    name: ClassVar[str] = "FP8"
    parts: ClassVar[tuple[str, ...]] = ("weight", "weight_scale", "weight_scale_inv", "input_scale")
    weight_dtypes: ClassVar[tuple[str, ...]] = ("F8_E4M3", "F8_E5M2")
    block: tuple[int, int] | None = None

    def shape(self, layer: Layer) -> Shape:
        """Of the weight, as the model wants it; ModelError for whatever the headers show to be wrong."""
        shape = layer.header("weight", ("F8_E4M3",), dims=2).shape
        part = self._scale(layer)
        if self.block is None:
            layer.expect(part, ((), (1,), shape[:1], (shape[0], 1)), FLOATS)
        else:
            layer.expect(part, (blocks(shape, self.block),), FLOATS)
        return shape

    def places(self, layer: Layer, axis: int) -> Places | None:
        """Where its tensors have that dimension of the weight."""
        part = self._scale(layer)
        if self.block is not None:
            return {"weight": (axis, 1), part: (axis, self.block[axis])}
        for_rows = axis == 0 and layer.headers[part].shape[:1] not in ((), (1,))
        return {"weight": (axis, 1)} | ({part: (0, 1)} if for_rows else {})

    def weight(self, layer: Layer) -> Packed | Tensor:
        weight, scale = numbers(layer), layer.scale(self._scale(layer))
        if self.block is not None:
            return in_blocks(weight, scale, self.block)
        return of_rows(weight, scale)

    def _scale(self, layer: Layer) -> str:
        wanted = "weight_scale" if self.block is None else "weight_scale_inv"
        return next((part for part in (wanted, "weight_scale", "weight_scale_inv") if part in layer.headers), wanted)


def numbers(layer: Layer) -> Tensor:
    """The weight, all of whose codes are numbers: the kernels have no NaN."""
    weight = layer.tensor("weight")
    if (weight.view(torch.uint8) & 127 == 127).any():
        raise layer.error("weight", "holds NaN")
    return weight


def of_rows(weight: Tensor, scale: Tensor) -> Packed:
    """weight float8 [out, in], scale one for all, or for each row."""
    rows = scale.reshape(-1, 1).expand(len(weight), 1).contiguous()
    return Packed(weight.view(torch.uint8), 8, rows, float8=True)


def blocks(shape: Shape, block: tuple[int, int]) -> Shape:
    """How many blocks a matrix has each way; the last ones may be cut.

    >>> blocks((576, 128), (128, 128))
    (5, 1)
    """
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def in_blocks(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """weight [out, in], scale [blocks, blocks] -> fp32 [out, in]."""
    spread = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return weight.float() * spread[: weight.shape[0], : weight.shape[1]]
