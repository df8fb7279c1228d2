"""AWQ, in the layout "gemm": four bits, packed along the output, its columns interleaved.

    qweight  int32 [in, out / 8]        qzeros  int32 [groups, out / 8]        scales  [groups, out]

    W[o, i] = scales[g, o] * (q[i, o] - z[g, o]),   g = i // group size

AWQ's GPU kernel turns the eight codes of a word into half precision two at a time, the low four beside the high four;
so that they come out in order, they go in as 0 2 4 6 1 3 5 7. Zero points are packed the same way, stored as they are.

Source: Lin et al., AWQ, 2023; the layout as AutoAWQ's packing code writes it.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kernels.packed import Packed
from minipaged.models.quantized.layer import FLOATS, Layer, Places, Shape, single
from minipaged.models.quantized.words import unpack

PLACE = [0, 4, 1, 5, 2, 6, 3, 7]  # of each of eight columns in its word


@dataclass(frozen=True)
class AWQ:
    """group_size: inputs that share a scale; -1: all."""

    name: ClassVar[str] = "AWQ"
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")
    weight_dtypes: ClassVar[tuple[str, ...]] = ()
    group_size: int

    def shape(self, layer: Layer) -> Shape:
        """Of the weight, as the model wants it; ModelError for whatever the headers show to be wrong."""
        into, words = layer.header("qweight", ("I32",), dims=2).shape
        size = into if self.group_size == -1 else self.group_size
        if into % size:
            raise layer.error("qweight", f"is {(into, words)}: {into} inputs are no whole number of groups of {size}")
        layer.expect("scales", ((into // size, words * 8),), FLOATS)
        layer.expect("qzeros", ((into // size, words),), ("I32",))
        return words * 8, into

    def places(self, layer: Layer, axis: int) -> Places | None:
        """Where its tensors have that dimension of the weight."""
        if axis == 0:
            return {"qweight": (1, 8), "qzeros": (1, 8), "scales": (1, 1)}
        groups = {} if self.group_size == -1 else dict.fromkeys(("qzeros", "scales"), (0, self.group_size))
        return {"qweight": (0, 1)} | groups

    def weight(self, layer: Layer) -> Packed | Tensor:
        codes, zero = (_in_order(layer.tensor(part)) for part in ("qweight", "qzeros"))
        return Packed(codes, 4, layer.scale("scales").t().contiguous(), single(zero))


def _in_order(words: Tensor) -> Tensor:
    """int32 [n, out / 8] -> uint8 [out, n]."""
    return unpack(words, 4).unflatten(1, (-1, 8))[..., PLACE].flatten(1).t().contiguous()
