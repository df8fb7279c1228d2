"""The cache's own kernels in Triton: write this step's keys and values, copy blocks, move blocks between pools.

Contracts: the functions of the same names in reference.py. Symbols as there; L layers, C pairs of blocks.

    slot  ->  block = slot // B, offset = slot % B  ->  block * stride_n + offset * stride_b, in 64 bits
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.triton_tiles import power_of_2

MAX_PAIRS = 512  # pairs of blocks that one launch of copy_blocks takes: a program holds a piece of each in registers


@triton.jit
def _write_kernel(
    k, v, cache, slot_mapping, stride_k_t, stride_k_g, stride_v_t, stride_v_g, stride_kv, stride_g, stride_n, stride_b,
    G: tl.constexpr, B: tl.constexpr, D: tl.constexpr, GD_PAD: tl.constexpr,
):  # fmt: skip
    """One token: its keys and values of all G heads."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + t).to(tl.int64)
    if slot < 0:
        return
    number = tl.arange(0, GD_PAD)
    g, d = number // D, number % D
    real = number < G * D
    keys = cache + g.to(tl.int64) * stride_g + (slot // B) * stride_n + (slot % B) * stride_b + d
    new_k = tl.load(k + t * stride_k_t + g * stride_k_g + d, mask=real)
    new_v = tl.load(v + t * stride_v_t + g * stride_v_g + d, mask=real)
    tl.store(keys, new_k.to(cache.dtype.element_ty), mask=real)
    tl.store(keys + stride_kv, new_v.to(cache.dtype.element_ty), mask=real)


def write_kv(k: Tensor, v: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Write keys and values [T, G, D] into the slots of one layer's cache [2, G, N, B, D]; -1 writes nothing.

    slot_mapping [T], int32 or int64. The last dimension of k, v and cache must be contiguous, the others need not.
    """
    tokens, kv_heads, head_size = k.shape
    if not k.stride(2) == v.stride(2) == cache.stride(4) == 1:
        raise ValueError("write_kv: the numbers of a head must lie side by side in k, v and cache")
    padded = power_of_2(kv_heads * head_size)
    _write_kernel[tokens,](
        k, v, cache, slot_mapping, *k.stride()[:2], *v.stride()[:2], *cache.stride()[:4],
        G=kv_heads, B=cache.shape[3], D=head_size, GD_PAD=padded, num_warps=min(max(padded // 256, 1), 8),
        enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_pairs"])
def _copy_kernel(
    from_pool, to_pool, source, target, num_pairs, stride_from, stride_to,
    SIZE: tl.constexpr, PAIRS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """PIECE of the SIZE = B D numbers of a block, in one plane (layer, key or value, head), for PAIRS pairs."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    number = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    plane = tl.program_id(2).to(tl.int64)
    real = (pair < num_pairs)[:, None] & (number < SIZE)[None, :]
    begin = plane * stride_from + tl.load(source + pair, mask=pair < num_pairs, other=0).to(tl.int64) * SIZE
    end = plane * stride_to + tl.load(target + pair, mask=pair < num_pairs, other=0).to(tl.int64) * SIZE
    held = tl.load(from_pool + begin[:, None] + number[None, :], mask=real)
    tl.debug_barrier()  # every thread has read before any writes
    tl.store(to_pool + end[:, None] + number[None, :], held, mask=real)


def _launch(from_cache: Tensor, to_cache: Tensor, source: Tensor, target: Tensor, pairs: int, piece: int) -> None:
    size = from_cache.shape[4] * from_cache.shape[5]  # B D
    planes = from_cache.shape[:3].numel()  # L 2 G
    device = to_cache.device if from_cache.device.type == "cpu" else from_cache.device
    source, target = torch.stack((source, target)).to(device)
    piece = min(piece, power_of_2(size))
    _copy_kernel[triton.cdiv(len(source), pairs), triton.cdiv(size, piece), planes](
        from_cache.view(planes, -1), to_cache.view(planes, -1), source, target, len(source),
        from_cache.shape[3] * size, to_cache.shape[3] * size, SIZE=size, PAIRS=pairs, PIECE=piece,
        enable_fp_fusion=True,
    )  # fmt: skip


def copy_blocks(cache: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy whole blocks inside the pool [L, 2, G, N, B, D], in all layers at once; source and target [C].

    Every source is read before any target is written, also where a block is both. Programs run in no order, so the
    work is cut such that the order does not matter: a number in a target depends on the number at the same place of
    its source, so one program takes the same few places of all blocks. It reads them all, then it writes them.

    One launch for up to MAX_PAIRS pairs; more go through the reference, and its second copy in memory.
    """
    if len(source) > MAX_PAIRS:
        reference.copy_blocks(cache, source, target)
    elif len(source) > 0:
        pairs = 16 if len(source) <= 16 else MAX_PAIRS  # two kernels to compile, not one for each count
        _launch(cache, cache, source, target, pairs, max(4096 // pairs, 16))


def move_blocks(from_cache: Tensor, to_cache: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy blocks from one pool to another [L, 2, G, N, B, D], N of each its own; source and target [C]: swapping.

    A GPU reaches pinned memory of the CPU by itself: one launch, no second copy of the blocks, and nobody waits (who
    reads the CPU's pool on the CPU must synchronise first). Memory that is not pinned goes through the reference.
    """
    if len(source) == 0:
        return
    if _reachable(from_cache) and _reachable(to_cache):
        _launch(from_cache, to_cache, source, target, 1, 2048)
    else:
        reference.move_blocks(from_cache, to_cache, source, target)


def _reachable(pool: Tensor) -> bool:
    """Whether kernels can read and write it: the interpreter's run on the CPU, all others on the GPU."""
    interpreted = not isinstance(_copy_kernel, triton.JITFunction)
    return pool.device.type != "cpu" or interpreted or pool.is_pinned()
