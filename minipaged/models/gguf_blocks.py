"""GGUF's quantized blocks, taken apart into codes and scales: what `Packed` says of a matrix.

A block is 32 weights of a row, or 256 in the K-quants. All numbers are little-endian; d and m are fp16. Of 32 codes of
4 bits, byte j holds number j in its low nibble and j + 16 in its high one (in the K-quants: 64 codes, j and j + 32).

    Q4_0   18 bytes   d, 16 bytes of codes                            w = d (code - 8)
    Q4_1   20         d, m, codes                                     w = d code + m
    Q5_0   22         d, 4 bytes with the fifth bits, codes           w = d (code - 16)
    Q5_1   24         d, m, fifth bits, codes                         w = d code + m
    Q8_0   34         d, 32 signed bytes                              w = d code
    Q4_K   144        d, dmin, 12 bytes of scales and minima, codes   w = d scale code - dmin minimum, groups of 32
    Q5_K   176        the same, and 32 bytes with the fifth bits      the same
    Q6_K   210        128 bytes with 4 bits, 64 bytes with 2 bits, 16 signed scales, d
                                                                      w = d scale (code - 32), groups of 16

Source: ggml-common.h and ggml-quants.c of llama.cpp; tests compare with the gguf package to the last bit.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kernels.packed import OUTER, Packed

BLOCK = 32


def _codes(blocks: Tensor, half: int) -> Tensor:
    """Nibbles [n, bytes] -> codes [n, 2 bytes]: of each `half` bytes the low ones, then the high ones."""
    pieces = blocks.unflatten(-1, (-1, half))
    return torch.stack((pieces & 15, pieces >> 4), -2).flatten(-3)


def _fifth_bits(blocks: Tensor) -> Tensor:
    """4 bytes [n, 4] -> 16 or 0 for each of 32 codes: bit j of the 32 is that of code j."""
    return (blocks[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2) << 4


def _halves(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.float16)


def _simple(blocks: Tensor, bits: int, zero: int | None) -> Packed:
    """The five with blocks of 32. blocks [out, n, bytes]; zero: None if there is a minimum."""
    d, rest = _halves(blocks[..., :2]), blocks[..., 2:]
    minimum = None
    if zero is None:
        minimum, rest = _halves(rest[..., :2])[..., 0], rest[..., 2:]
    if bits == 8:
        codes = rest ^ 128  # signed: 128 more, and unsigned
    elif bits == 5:
        codes = _codes(rest[..., 4:], BLOCK // 2) | _fifth_bits(rest[..., :4])
    else:
        codes = _codes(rest, BLOCK // 2)
    return Packed(codes.flatten(1), bits, d[..., 0], zero or 0, minimum)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits in 12 bytes [.., 12]: the first four of both lie in the low 6 bits of
    bytes 0-3 and 4-7; the others have their low 4 bits in bytes 8-11, and their high 2 above the first ones.
    """
    a, b, c = packed.split(4, -1)
    scales = torch.cat((a & 63, c & 15 | a >> 6 << 4), -1)
    return scales, torch.cat((b & 63, c >> 4 | b >> 6 << 4), -1)


def _k_4_or_5(blocks: Tensor, bits: int) -> Packed:
    d, dmin = _halves(blocks[..., :4]).unbind(-1)
    scales, minima = _six_bits(blocks[..., 4:16])
    codes = _codes(blocks[..., -OUTER // 2 :], BLOCK)
    if bits == 5:  # bit j of byte i is that of code 32 j + i
        bytes_ = blocks[..., 16 : 16 + BLOCK, None]
        codes = codes | (bytes_ >> torch.arange(8, dtype=torch.uint8) & 1).transpose(-1, -2).flatten(-2) << 4
    inner = (scales.flatten(1).view(torch.int8), minima.flatten(1).view(torch.int8))
    return Packed(codes.flatten(1), bits, inner[0], 0, inner[1], (d, -dmin))


def _q6_k(blocks: Tensor) -> Packed:
    """Of each 128 codes: bytes 0-63 hold the low 4 bits of codes i and i + 64; of 32 bytes, byte i holds the high 2 of
    codes i, i + 32, i + 64 and i + 96.
    """
    low = _codes(blocks[..., :128], 64)
    pairs = blocks[..., 128:192].unflatten(-1, (2, 1, 32)) >> torch.tensor([[0], [2], [4], [6]], dtype=torch.uint8) & 3
    scales = blocks[..., 192:208].contiguous().view(torch.int8)
    d = _halves(blocks[..., 208:])[..., 0]
    return Packed((low | pairs.flatten(-3) << 4).flatten(1), 6, scales.flatten(1), 32, None, (d, None))


# Type -> its bytes in a block, and how they are taken apart.
TYPES: dict[str, tuple[int, Callable[[Tensor], Packed]]] = {
    "Q4_0": (18, lambda blocks: _simple(blocks, 4, 8)),
    "Q4_1": (20, lambda blocks: _simple(blocks, 4, None)),
    "Q5_0": (22, lambda blocks: _simple(blocks, 5, 16)),
    "Q5_1": (24, lambda blocks: _simple(blocks, 5, None)),
    "Q8_0": (34, lambda blocks: _simple(blocks, 8, 128)),
    "Q4_K": (144, lambda blocks: _k_4_or_5(blocks, 4)),
    "Q5_K": (176, lambda blocks: _k_4_or_5(blocks, 5)),
    "Q6_K": (210, lambda blocks: _q6_k(blocks)),
}


def take_apart(kind: str, rows: np.ndarray) -> Packed | None:
    """rows: uint8 [out, bytes in a row] of a matrix of this type. None for types that stay unknown to kernels."""
    if kind not in TYPES or rows.ndim != 2:
        return None
    size, apart = TYPES[kind]
    return apart(torch.from_numpy(rows.copy()).view(len(rows), -1, size))  # the file may change while we run
