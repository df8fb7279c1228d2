"""GPTQ: codes packed along the input, in a layout that AutoGPTQ set and others keep.

    qweight  int32 [in * bits / 32, out]        a column of words is one output's codes, first input lowest
    qzeros   int32 [groups, out * bits / 32]    zero points, packed along the output
    scales         [groups, out]
    g_idx    int32 [in]                         the group of each input; absent: one group after the other

    W[o, i] = scales[g, o] * (q[i, o] - z[g, o]),   g = g_idx[i]

Two things to know. Format "gptq" stores zero points less one (modulo 2^bits: a zero point 0 is stored as all ones), an
accident that became the standard; "gptq_v2" stores them as they are. The wrong reading raises nothing, it only makes
every weight wrong by one step. And with desc_act, columns were quantized in the order of their importance, so that the
groups are scattered: g_idx says where. Here columns are sorted by group, and the input is sorted likewise.

Source: Frantar et al., GPTQ, 2022; the layout as AutoGPTQ's and GPTQModel's packing code writes it.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from kernels.packed import Packed
from minipaged.models.quantized.layer import FLOATS, Layer, Places, Shape
from minipaged.models.quantized.words import unpack


@dataclass(frozen=True)
class GPTQ:
    """group_size: inputs that share a scale; -1: all. zeros_less_one: format "gptq"; not "gptq_v2".

    scattered: desc_act, so g_idx must be there. across: the model wants W as [in, out] (GPT-2's Conv1D), which is
    packed as any other.
    """

    name: ClassVar[str] = "GPTQ"
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")
    weight_dtypes: ClassVar[tuple[str, ...]] = ()
    bits: int
    group_size: int
    zeros_less_one: bool
    scattered: bool
    across: bool = False

    def shape(self, layer: Layer) -> Shape:
        """Of the weight, as the model wants it; ModelError for whatever the headers show to be wrong."""
        bits = self.bits
        words, out = layer.header("qweight", ("I32",), dims=2).shape
        into = words * 32 // bits
        if words * 32 % bits:
            raise layer.error("qweight", f"is {(words, out)}: no whole number of {bits}-bit codes along the input")
        if out * bits % 32:
            raise layer.error("qzeros", f"can't hold {out} zero points of {bits} bits in whole words")
        groups = 1 if self.group_size == -1 else -(-into // self.group_size)
        layer.expect("scales", ((groups, out),), FLOATS)
        layer.expect("qzeros", ((groups, out * bits // 32),), ("I32",))
        if "g_idx" in layer.headers or self.scattered:
            layer.expect("g_idx", ((into,),), ("I32", "I64"))
        return (into, out) if self.turned(layer) else (out, into)

    def turned(self, layer: Layer) -> bool:
        return self.across and not layer.name.endswith("lm_head")

    def places(self, layer: Layer, axis: int) -> Places | None:
        """Where its tensors have that dimension of the weight. None if it is cut elsewhere: codes of three bits, and
        inputs whose groups g_idx names.
        """
        outputs = axis == (1 if self.turned(layer) else 0)
        if self.bits == 3 or "g_idx" in layer.headers and not outputs:
            return None
        codes = 32 // self.bits
        if outputs:
            return {"qweight": (1, 1), "qzeros": (1, codes), "scales": (1, 1)}
        groups = {} if self.group_size == -1 else dict.fromkeys(("qzeros", "scales"), (0, self.group_size))
        return {"qweight": (0, codes)} | groups

    def weight(self, layer: Layer) -> Packed | Tensor:
        codes = unpack(layer.tensor("qweight").t(), self.bits)  # [out, in]
        zero = unpack(layer.tensor("qzeros"), self.bits).t()  # [out, groups]
        if self.zeros_less_one:
            zero = zero + 1 & (1 << self.bits) - 1
        scale = layer.scale("scales").t().contiguous()
        size = codes.shape[1] if self.group_size == -1 else self.group_size
        part = "g_idx" if "g_idx" in layer.headers else None
        weight = layer.grouped(codes, max(self.bits, 4), scale, zero.contiguous(), size, part)  # 2 and 3 kept as 4
        if not self.turned(layer):
            return weight
        return replace(weight, across=True) if isinstance(weight, Packed) else weight.t()
