"""y = x W^T + b in Triton, from weights of four or eight bits: a step of few tokens reads a quarter or half the bytes.

W[o, i] = scale[o, g] * (code[o, i] - zero[o, g]) + minimum[o, g], as in packed.py; contract: reference.packed_linear.
A tile never spans groups, so scales wait until after the product:

    y[t, o] = sum over tiles of   scale * (sum_i x[t, i] (code[o, i] - zero))   +   minimum * (sum_i x[t, i])

What goes into the tensor cores is whole numbers below 256, exact in any dtype, and what comes out is fp32: nothing is
rounded that the plain product of floats would not round, too, and of a weight nothing at all.

Symbols: T tokens, N outputs, K inputs; a tile has BLOCK_M tokens, BLOCK_N outputs and TILE_K inputs.

    codes    8 bits   uint8 [N, K], padded along K to whole tiles
             4 bits   uint8 [N, K / 2]: a byte holds column j of one tile, low, and column j of the next, high
    scales            [groups, N]: a tile reads its neighbours; zeros and minima likewise
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from kernels.packed import Packed
from kernels.triton_tiles import multiprocessors, power_of_2

FEW = 16  # tokens: the least that tensor cores take


@triton.jit
def _numbers(codes, FLOAT8: tl.constexpr):
    """uint8 codes as fp16. The bits of an e4m3 float, where fp16 has its own, are 2^-8 of it: scales make up for it."""
    if FLOAT8:
        bits = codes.to(tl.int16)
        return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return codes.to(tl.float16)


@triton.jit
def _add_tile(
    acc, codes, k_start, x_rows, real_m, n, scales, zeros, minima, K, N,
    GROUP: tl.constexpr, FLOAT8: tl.constexpr, ZEROS: tl.constexpr, ZERO: tl.constexpr, MINIMA: tl.constexpr,
    TILE_K: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] plus the product with a tile of codes [BLOCK_N, TILE_K] that begins at input k_start."""
    k = k_start + tl.arange(0, TILE_K)
    x_tile = tl.load(x_rows + k[None, :], mask=real_m[:, None] & (k < K)[None, :], other=0.0)
    real = (n < N) & (n * 0 + k_start < K)  # the last pair of tiles may lack its second
    at = k_start // GROUP * N + n
    weight = _numbers(codes, FLOAT8)
    if ZEROS:
        weight -= tl.load(zeros + at, mask=real, other=0.0)[:, None]
    elif ZERO != 0:
        weight -= ZERO
    part = tl.dot(x_tile, tl.trans(weight).to(x_tile.dtype), input_precision="ieee")
    acc += part * tl.load(scales + at, mask=real, other=0.0).to(tl.float32)[None, :]
    if MINIMA:
        minimum = tl.load(minima + at, mask=real, other=0.0).to(tl.float32)
        acc += tl.sum(x_tile.to(tl.float32), 1)[:, None] * minimum[None, :]
    return acc


@triton.jit(do_not_specialize=["T"])
def _packed_kernel(
    x, codes, scales, zeros, minima, bias, y, T, N, K, stride_x, stride_y, stride_codes,
    GROUP: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, ZEROS: tl.constexpr, ZERO: tl.constexpr,
    MINIMA: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M tokens, BLOCK_N outputs. Programs that share weights run side by side."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real_m, real_n = m < T, n < N
    x_rows = x + m.to(tl.int64)[:, None] * stride_x
    code_rows = codes + n.to(tl.int64)[:, None] * stride_codes + tl.arange(0, TILE_K)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(tl.cdiv(K, TILE_K * (8 // BITS))):
        octets = tl.load(code_rows + tile * TILE_K, mask=real_n[:, None], other=0)
        if BITS == 4:
            acc = _add_tile(acc, octets & 15, tile * 2 * TILE_K, x_rows, real_m, n, scales, zeros, minima, K, N,
                            GROUP, FLOAT8, ZEROS, ZERO, MINIMA, TILE_K)  # fmt: skip
            acc = _add_tile(acc, octets >> 4, (tile * 2 + 1) * TILE_K, x_rows, real_m, n, scales, zeros, minima, K, N,
                            GROUP, FLOAT8, ZEROS, ZERO, MINIMA, TILE_K)  # fmt: skip
        else:
            acc = _add_tile(acc, octets, tile * TILE_K, x_rows, real_m, n, scales, zeros, minima, K, N,
                            GROUP, FLOAT8, ZEROS, ZERO, MINIMA, TILE_K)  # fmt: skip
    if BIAS:
        acc += tl.load(bias + n, mask=real_n, other=0.0).to(tl.float32)[None, :]
    place = y + m.to(tl.int64)[:, None] * stride_y + n[None, :]
    real = real_m[:, None] & real_n[None, :]
    if ADD:
        acc += tl.load(place, mask=real, other=0.0).to(tl.float32)
    tl.store(place, acc.to(y.dtype.element_ty), mask=real)


@dataclass(frozen=True)
class Tiles:
    """What one program takes on."""

    tokens: int  # BLOCK_M
    outputs: int  # BLOCK_N
    num_warps: int
    num_stages: int  # how far ahead codes and x are fetched


@cache
def choose_tiles(tokens: int, outputs: int, bits: int, itemsize: int, num_multiprocessors: int) -> Tiles:
    """Few tokens wait for memory: narrow tiles, so that every multiprocessor has some. Many wait for arithmetic.

    With four bits, two tiles are on their way at a time, which takes registers; fp32 has no tensor cores.

    >>> choose_tiles(tokens=1, outputs=4096, bits=4, itemsize=2, num_multiprocessors=132)
    Tiles(tokens=16, outputs=16, num_warps=2, num_stages=5)
    >>> choose_tiles(tokens=2000, outputs=4096, bits=4, itemsize=2, num_multiprocessors=132)
    Tiles(tokens=64, outputs=128, num_warps=8, num_stages=3)
    """
    if itemsize == 4:
        return Tiles(16, 32, 4, 2) if tokens <= FEW else Tiles(32, 32, 8, 2)
    if tokens <= FEW:
        wide = next((width for width in (64, 32) if outputs // width >= 2 * num_multiprocessors), 16)
        return Tiles(FEW, wide, 2 if wide == 16 else 4, 5)
    return Tiles(min(max(power_of_2(tokens), 32), 64 if bits == 4 else 128), 128, 8, 3)


def takes(packed: Packed) -> bool:
    """Whether PackedLinear multiplies from it."""
    whole = packed.scale.shape[1] == 1 or packed.group_size % 16 == 0
    return packed.bits in (4, 8) and packed.outer is None and whole


class PackedLinear:
    """x [T, K] -> x W^T + bias [T, N], for a Packed W [N, K] of 4 or 8 bits on x's device."""

    def __init__(self, packed: Packed, bias: Tensor | None = None):
        if not takes(packed) or packed.across:
            raise ValueError("PackedLinear takes codes of 4 or 8 bits in groups of a multiple of 16, not across")
        self.shape, self.order, self.bias = packed.shape, packed.order, bias
        self.bits, self.float8, self.group = packed.bits, packed.float8, packed.group_size
        self.tile = tile_k(packed)
        self.codes = pack(packed.codes, packed.bits, self.tile)
        scales = packed.scales() * 256 if packed.float8 else packed.scale
        self.scales = _by_group(scales)
        self.zeros = None if isinstance(packed.zero, int) else _by_group(packed.zero.half())
        self.zero = packed.zero if isinstance(packed.zero, int) else 0
        self.minima = None if packed.minimum is None else _by_group(packed.minimum)

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        """The product, or add_to plus the product, in place."""
        outputs, inputs = self.shape
        if x.shape[1] != inputs:
            raise ValueError(f"x {list(x.shape)} does not fit weights {list(self.shape)}")
        if self.order is not None:
            x = x.index_select(1, self.order)
        x = x if x.stride(1) == 1 else x.contiguous()
        y = x.new_empty(len(x), outputs) if add_to is None else add_to
        if len(x) > 0:
            self._launch(x, y, add_to is not None)
        return y

    def _launch(self, x: Tensor, y: Tensor, add: bool) -> None:
        outputs, inputs = self.shape
        tiles = choose_tiles(
            power_of_2(len(x)), outputs, self.bits, x.element_size(), multiprocessors(x.device)
        )
        _packed_kernel[triton.cdiv(len(x), tiles.tokens), triton.cdiv(outputs, tiles.outputs)](
            x, self.codes, self.scales, self.zeros, self.minima, self.bias, y, len(x), outputs, inputs,
            x.stride(0), y.stride(0), self.codes.stride(0),
            GROUP=self.group, BITS=self.bits, FLOAT8=self.float8, ZEROS=self.zeros is not None, ZERO=self.zero,
            MINIMA=self.minima is not None, BIAS=self.bias is not None, ADD=add, BLOCK_M=tiles.tokens,
            BLOCK_N=tiles.outputs, TILE_K=self.tile, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            enable_fp_fusion=True,
        )  # fmt: skip


def tile_k(packed: Packed) -> int:
    """Inputs in a tile: a power of two, from 16 (the least that tensor cores take) to 64, that lies in one group."""
    if packed.scale.shape[1] == 1:
        return min(max(power_of_2(packed.codes.shape[1]), 16), 64)
    return min(packed.group_size & -packed.group_size, 64)


def pack(codes: Tensor, bits: int, tile: int) -> Tensor:
    """uint8 [N, K] -> [N, K padded], or with 4 bits half as many: two tiles beside each other in one's bytes.

    >>> pack(torch.arange(8, dtype=torch.uint8)[None], bits=4, tile=4).tolist() == [[64, 81, 98, 115]]
    True
    """
    span = tile if bits == 8 else 2 * tile
    codes = pad(codes, (0, -codes.shape[1] % span))
    if bits == 8:
        return codes.contiguous()
    low, high = codes.unflatten(1, (-1, 2, tile)).unbind(2)
    return (low | high << 4).flatten(1)


def _by_group(scales: Tensor) -> Tensor:
    """[N, groups] -> [groups, N], fp16 or fp32."""
    return (scales if scales.dtype == torch.float16 else scales.float()).t().contiguous()
