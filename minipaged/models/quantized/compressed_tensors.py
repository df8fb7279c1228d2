"""compressed-tensors, the format of llmcompressor: a recipe for groups of layers, and one of three layouts.

    pack-quantized    weight_packed  int32 [out, in * bits / 32]   codes of 4 or 8 bits along the input, + 2^(bits - 1)
                      weight_shape   int64 [2]                     out, in: the last word of a row may be half empty
    int-quantized     weight         int8 [out, in]
    float-quantized   weight         float8_e4m3fn [out, in]
    (naive-quantized) as one of the last two

    weight_scale        tensor: [1]        channel: [out, 1]        group: [out, groups]        block: as in fp8.py
    weight_zero_point   as the scale if asymmetric; packed along the *output* if the weight is
    weight_g_idx        int32 [in], with actorder "group": the group of each input, as in GPTQ

    W[o, i] = scale[o, g] * (q[o, i] - z[o, g])

The 2^(bits - 1), which makes codes unsigned, is in the zero points, too, and cancels. Here all codes are unsigned, so
an int8 gets its 128. Activations' scales (input_scale) are read over: see __init__.py.

Source: the compressors of vllm-project/compressed-tensors.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels.packed import Packed
from minipaged.models.fields import ModelError
from minipaged.models.quantized.fp8 import blocks, in_blocks, numbers, of_rows
from minipaged.models.quantized.layer import FLOATS, Layer, Places, Shape
from minipaged.models.quantized.words import unpack

STRATEGIES = ("tensor", "channel", "group", "block")


@dataclass(frozen=True)
class Scheme:
    """How the layers that `targets` name are stored. block: rows and columns, for the strategy of that name."""

    targets: tuple[str, ...]
    packed: bool
    is_float: bool
    bits: int
    strategy: str
    group_size: int
    symmetric: bool
    scattered: bool
    block: tuple[int, int] | None

    def names(self, layer: str) -> bool:
        return any(re.match(t[3:], layer) if t.startswith("re:") else t == layer for t in self.targets)

    def groups(self, layer: Layer, part: str, into: int) -> int:
        if self.strategy != "group":
            return 1
        if into % self.group_size:
            raise layer.error(part, f"has {into} inputs, no whole number of groups of {self.group_size}")
        return into // self.group_size


@dataclass(frozen=True)
class CompressedTensors:
    name: ClassVar[str] = "compressed-tensors"
    parts: ClassVar[tuple[str, ...]] = (
        "weight_packed", "weight", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale",
        "input_zero_point",
    )  # fmt: skip
    weight_dtypes: ClassVar[tuple[str, ...]] = ("I8", "F8_E4M3", "F8_E5M2")
    schemes: tuple[Scheme, ...]

    def scheme(self, layer: Layer) -> Scheme:
        """A scheme that names the layer goes before one for all Linears."""
        named = [scheme for scheme in self.schemes if scheme.names(layer.name)]
        fitting = named or [scheme for scheme in self.schemes if "Linear" in scheme.targets]
        if not fitting:
            raise ModelError(f"tensor {layer.name}.{next(iter(layer.headers))}: none of config_groups names its layer")
        return fitting[0]

    def shape(self, layer: Layer) -> Shape:
        """Of the weight, as the model wants it; ModelError for whatever the headers show to be wrong."""
        scheme = self.scheme(layer)
        shape = _packed_shape(layer, scheme.bits) if scheme.packed else _plain_shape(layer, scheme)
        out, into = shape
        if scheme.block is not None:
            layer.expect("weight_scale", (blocks(shape, scheme.block),), FLOATS)
            return shape
        groups = scheme.groups(layer, "weight_packed" if scheme.packed else "weight", into)
        sizes: tuple[Shape, ...] = ((), (1,)) if scheme.strategy == "tensor" else ((out, groups),)
        if scheme.strategy == "channel":
            sizes += ((out,),)
        layer.expect("weight_scale", sizes, FLOATS)
        if not scheme.symmetric:
            packed = scheme.packed and scheme.strategy != "tensor"
            words = -(-out * scheme.bits // 32)
            layer.expect("weight_zero_point", ((words, groups),) if packed else sizes, ("I32",) if packed else ("I8",))
        if scheme.scattered:
            layer.expect("weight_g_idx", ((into,),), ("I32", "I64"))
        return shape

    def places(self, layer: Layer, axis: int) -> Places | None:
        """Where its tensors have that dimension of the weight. None if a tensor says which group each input is of."""
        scheme = self.scheme(layer)
        if scheme.scattered and axis == 1:
            return None
        in_word = 32 // scheme.bits if scheme.packed else 1
        found = {"weight_packed": (axis, in_word if axis else 1)} if scheme.packed else {"weight": (axis, 1)}
        steps = {"tensor": None, "channel": (1, None), "group": (1, scheme.group_size), "block": scheme.block}
        of_scales = steps[scheme.strategy]
        if of_scales and (step := of_scales[axis]):
            found["weight_scale"] = axis, step
            if not scheme.symmetric:
                found["weight_zero_point"] = axis, step if axis else in_word
        return found

    def weight(self, layer: Layer) -> Packed | Tensor:
        scheme, scale = self.scheme(layer), layer.scale("weight_scale")
        if not scheme.packed and scheme.is_float:
            weight = numbers(layer)
            return in_blocks(weight, scale, scheme.block) if scheme.block else of_rows(weight, scale)
        if scheme.packed:
            into = _stored_shape(layer)[1]
            codes = unpack(layer.tensor("weight_packed"), scheme.bits)[:, :into]
        else:
            codes = layer.tensor("weight").view(torch.uint8) ^ 128
        if scheme.block is not None:
            return in_blocks(codes.float() - 128, scale, scheme.block)
        scale = scale.reshape(len(codes) if scale.numel() > 1 else 1, -1).expand(len(codes), -1).contiguous()
        size, part = codes.shape[1] // scale.shape[1], "weight_g_idx" if scheme.scattered else None
        return layer.grouped(codes, scheme.bits, scale, _zero(layer, scheme, len(codes)), size, part)


def _packed_shape(layer: Layer, bits: int) -> Shape:
    rows, words = layer.header("weight_packed", ("I32",), dims=2).shape
    shape = _stored_shape(layer)
    if (rows, words) != (shape[0], -(-shape[1] * bits // 32)):
        wanted = (shape[0], -(-shape[1] * bits // 32))
        raise layer.error("weight_packed", f"is {(rows, words)} and should be {wanted} for weight_shape {shape}")
    if "weight" in layer.headers:
        raise layer.error("weight", f"is there twice, as {layer.name}.weight_packed too: which one counts?")
    return shape


def _stored_shape(layer: Layer) -> Shape:
    layer.expect("weight_shape", ((2,),), ("I64", "I32"))
    out, into = layer.tensor("weight_shape").tolist()
    if out < 1 or into < 1:
        raise layer.error("weight_shape", f"says {(out, into)}: no shape")
    return out, into


def _plain_shape(layer: Layer, scheme: Scheme) -> Shape:
    return layer.header("weight", ("F8_E4M3",) if scheme.is_float else ("I8",), dims=2).shape


def _zero(layer: Layer, scheme: Scheme, out: int) -> Tensor | int:
    """[out, groups], or one for all, for unsigned codes."""
    if scheme.symmetric:
        return 1 << scheme.bits - 1
    zero = layer.tensor("weight_zero_point")
    if zero.dtype == torch.int32:
        return unpack(zero.t(), scheme.bits).t()[:out].contiguous()
    shift = 1 << scheme.bits - 1
    if int(zero.min()) < -shift or int(zero.max()) >= shift:
        raise layer.error("weight_zero_point", f"holds numbers beyond {-shift} to {shift - 1}")
    unsigned = (zero.int() + shift).to(torch.uint8)
    return unsigned.reshape(out if zero.numel() > 1 else 1, -1).expand(out, -1).contiguous()
