"""The memory for keys and values, whole numbers or eight bits of them.

A cache is a tensor [L, 2, G, N, B, D]: for one layer, keys or values, and one head, a block is B D numbers in one
piece. In eight bits a number takes one byte, and each token and head has a scale: number = code * scale. The scales lie
in the block behind the codes, so that whoever copies, swaps, shares or exports blocks need not know of them:

    a block of one head      | B D codes, a byte each | B scales, fp32 |        B (D + 4) bytes

Such a cache is a tensor [L, 2, G, N, B, D + 4] of a dtype of one byte, which says what the codes are.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# dtype -> its largest code. (float8_e4m3fn: four bits of exponent, three of mantissa, no infinity.)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SCALE_BYTES = 4


def is_quantized(cache: Tensor) -> bool:
    """Whether it holds codes and scales."""
    return cache.dtype in LARGEST


def slot_size(head_size: int, dtype: torch.dtype) -> int:
    """Numbers of `dtype` that one token takes for one head: D, or D + 4 with a scale.

    ValueError for a head size that leaves scales at odd addresses.
    """
    if dtype not in LARGEST:
        return head_size
    if head_size % SCALE_BYTES:
        raise ValueError(f"keys and values in eight bits need a head size that is a multiple of 4, not {head_size}")
    return head_size + SCALE_BYTES


def head_size(cache: Tensor) -> int:
    """D of a cache [..., B, D] or [..., B, D + 4]."""
    return cache.shape[-1] - SCALE_BYTES * is_quantized(cache)


def raw(cache: Tensor) -> Tensor:
    """The cache as bytes if its dtype is one of a byte, for which PyTorch has few operations; else as it is."""
    return cache.view(torch.uint8) if is_quantized(cache) else cache


def codes(cache: Tensor) -> Tensor:
    """Its codes, or its numbers, [..., N, B, D]: a view, to be written to as well."""
    if not is_quantized(cache):
        return cache
    block_size, size = cache.shape[-2], head_size(cache)
    return raw(cache).flatten(-2)[..., : block_size * size].unflatten(-1, (block_size, size)).view(cache.dtype)


def scales(cache: Tensor) -> Tensor:
    """Its scales [..., N, B], fp32: a view, to be written to as well."""
    return raw(cache).flatten(-2)[..., cache.shape[-2] * head_size(cache) :].view(torch.float32)


def poison(cache: Tensor, blocks: list[int] | None = None) -> None:
    """Fill these blocks of a cache [L, 2, G, N, B, D], or all, with NaN: for eight bits, with scales of NaN."""
    cache, junk = (raw(cache), 0xFF) if is_quantized(cache) else (cache, torch.nan)
    if blocks is None:
        cache.fill_(junk)
    else:
        cache[:, :, :, blocks] = junk


def new_cache(
    layers: int, num_blocks: int, block_size: int, kv_heads: int, head_size: int,
    dtype: torch.dtype, device: torch.device | str = "cpu", pinned: bool = False,
    memory: Callable[[int], Tensor | None] | None = None,
) -> Tensor:  # fmt: skip
    """Keys and values of N blocks for all layers: [L, 2, G, N, B, D], or [..., D + 4] in eight bits; not initialised.

    A slot is never read before it is written, so the system need not give memory to blocks that are never used.
    Heads stand outside blocks, so that for one head a block is B D numbers in one piece.
    pinned: CPU memory that a GPU can reach by itself, to swap to. memory: who gives so many bytes;
    None, or if it gives none: PyTorch does.
    """
    shape = (layers, 2, kv_heads, num_blocks, block_size, slot_size(head_size, dtype))
    if memory is not None and (given := memory(math.prod(shape) * dtype.itemsize)) is not None:
        return given.view(dtype).view(shape)
    return torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)
