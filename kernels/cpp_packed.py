"""Products in C++ with weights that stay in small numbers: lays them out as cpu/packed.h says."""

import ctypes

import torch
from torch import Tensor

from kernels.huge_pages import HugePages
from kernels.packed import OUTER, Packed

UNIT = 32  # columns
POWERS = [UNIT << i for i in range(32)]
NAN = 127  # of float8_e4m3fn, beside the sign
HALF, FLOAT, NESTED = range(3)  # how scales are kept
PLAIN, SHORT, FLOAT8 = range(3)  # how codes become floats


class Matrix(ctypes.Structure):
    """The struct of the same name in packed.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("words", "scale", "minimum", "zeros", "outer_scale", "outer_minimum")],
        *[(name, ctypes.c_long) for name in ("N", "K", "groups", "shift")],
        ("zero", ctypes.c_float),
        *[(name, ctypes.c_int) for name in ("bits", "kind", "form")],
    ]


def packs(packed: Packed) -> bool:
    """Whether there is a product for this one: groups of 32, 64, 128 ... or whole rows; for 6 bits of 16."""
    group, bits, into = packed.group_size, packed.bits, packed.codes.shape[1]
    fits = into % UNIT == 0 and (group == UNIT // 2 if bits == 6 else group == into or group in POWERS)
    if packed.outer is not None:
        fits = fits and into % OUTER == 0
    return fits and bits in (4, 5, 6, 8) and not (packed.float8 and bool((packed.codes & NAN == NAN).any()))


class PackedMatrix:
    """y = x W^T + bias in fp32; `matrix[rows]` are rows of W.

    int8: round activations to 8 bits for it.
    """

    def __init__(
        self, library: ctypes.CDLL, pages: HugePages, packed: Packed, bias: Tensor | None = None, int8: bool = False
    ):
        self.library, self.pages = library, pages
        self.product = library.cpu_packed_linear_int8 if int8 and not packed.float8 else library.cpu_packed_linear
        self.out, self.into = packed.codes.shape
        self.bias = None if bias is None else bias.float().contiguous()
        self.order = packed.order
        self.width = self.library.panel_width()
        self.panels = -(-self.out // self.width)
        codes = packed.codes.contiguous()
        self.words = pages.empty((self.panels, self.into // UNIT, packed.bits, self.width), torch.int32)
        self.library.cpu_pack(
            codes.data_ptr(), self.out, self.into, packed.bits, self.words.data_ptr(), torch.get_num_threads()
        )
        self.device = codes.device
        self.kept: list[Tensor] = []  # what self.matrix points to
        kind, dtype = _kind(packed)
        zero = packed.zero if isinstance(packed.zero, int) else 0
        outer = packed.outer or (None, None)
        self.matrix = Matrix(
            self.words.data_ptr(), self._panels(packed.scale, dtype), self._panels(packed.minimum, dtype),
            self._panels(packed.zero if isinstance(packed.zero, Tensor) else None, torch.float16),
            self._panels(outer[0], torch.float16), self._panels(outer[1], torch.float16),
            self.out, self.into, *_groups(packed), zero, packed.bits, kind, self._form(packed),
        )  # fmt: skip
        self.told = ctypes.byref(self.matrix), None if self.bias is None else self.bias.data_ptr()

    def _panels(self, tensor: Tensor | None, dtype: torch.dtype) -> int | None:
        """[out, groups] as [panels, groups, P]: the address of it."""
        if tensor is None:
            return None
        filled = torch.zeros(self.panels * self.width, tensor.shape[1], dtype=dtype)
        filled[: self.out] = tensor
        self.kept.append(self.pages.empty((self.panels, tensor.shape[1], self.width), dtype))
        self.kept[-1].copy_(filled.view(self.panels, self.width, -1).transpose(1, 2))
        return self.kept[-1].data_ptr()

    def _form(self, packed: Packed) -> int:
        """The short way to make floats of codes, where it makes the same ones."""
        if packed.float8:
            return FLOAT8
        scales, minima, steps = packed.scales(), packed.minima(), 1 << packed.bits
        few_digits = bool((scales.view(torch.int32) & (2 * steps - 1) == 0).all())  # code times scale needs no rounding
        zeros = (0 if minima is None else minima.double()) - scales.double() * (steps + packed.zeros().double())
        return SHORT if few_digits and torch.equal(zeros.float().double(), zeros) else PLAIN

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        rows = x.float().contiguous() if self.order is None else x.float().index_select(1, self.order)
        y = torch.empty(len(x), self.out) if add_to is None or add_to.dtype != torch.float32 else add_to
        add, (matrix, bias) = y is add_to, self.told
        self.product(matrix, rows.data_ptr(), bias, y.data_ptr(), len(x), add, torch.get_num_threads())
        return y.to(x.dtype) if add or add_to is None else add_to.add_(y)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """rows: int64, of any shape [...] -> [..., in], fp32."""
        y = torch.empty(*rows.shape, self.into)
        rows = rows.contiguous()
        self.library.cpu_packed_rows(ctypes.byref(self.matrix), rows.data_ptr(), rows.numel(), y.data_ptr())
        return y if self.order is None else torch.empty_like(y).index_copy_(-1, self.order, y)


def _groups(packed: Packed) -> tuple[int, int]:
    """How many, and how far a column's number is shifted to get that of its group."""
    groups = packed.scale.shape[1]
    return groups, packed.group_size.bit_length() - 1 if groups > 1 else 62


def _kind(packed: Packed) -> tuple[int, torch.dtype]:
    if packed.outer is not None:
        return NESTED, torch.int8
    tensors = [packed.scale] + ([packed.minimum] if packed.minimum is not None else [])
    if all(torch.equal(t.half().float(), t.float()) for t in tensors):
        return HALF, torch.float16
    return FLOAT, torch.float32
