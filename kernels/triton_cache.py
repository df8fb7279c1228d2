"""The cache's own kernels in Triton: write this step's keys and values, copy blocks, move blocks between pools.

Contracts: the functions of the same names in reference.py. Symbols as there; L layers, C pairs of blocks.

    slot  ->  block = slot // B, offset = slot % B  ->  block * stride_n + offset * stride_b, in 64 bits
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.cache import codes, is_quantized, raw, scales
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


@triton.jit
def _write_codes_kernel(
    k, v, codes, scales, slot_mapping, k_scale, v_scale, stride_k_t, stride_k_g, stride_v_t, stride_v_g,
    stride_kv, stride_g, stride_n, stride_b, stride_scale_kv, stride_scale_g, stride_scale_n,
    B: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, INT8: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """Keys (part 0) or values of one token and head, as codes and a scale: `quantize` of reference.py, bit for bit."""
    t, g, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    slot = tl.load(slot_mapping + t).to(tl.int64)
    if slot < 0:
        return
    d = tl.arange(0, D_PAD)
    if part == 0:
        x = tl.load(k + t * stride_k_t + g * stride_k_g + d, mask=d < D, other=0.0).to(tl.float32)
    else:
        x = tl.load(v + t * stride_v_t + g * stride_v_g + d, mask=d < D, other=0.0).to(tl.float32)
    largest = 127.0 if INT8 else 448.0
    finite = tl.min((tl.abs(x) < float("inf")).to(tl.int32), 0) > 0
    x = tl.where(finite, x, 0.0)
    scale = tl.maximum(tl.max(tl.abs(x), 0) * (1 / largest), 1e-6)
    if STATIC:
        scale = tl.where(part == 0, k_scale, v_scale)
    y = tl.minimum(tl.maximum(tl.div_rn(x, tl.zeros_like(x) + scale), -largest), largest)
    if INT8:  # halves away from zero
        code = (y + tl.where(y > 0, 0.5, tl.where(y < 0, -0.5, 0.0))).to(tl.int32)
    else:  # to the nearest, ties to even: as in cpu/rest.cpp, since GPUs before sm_89 and the interpreter do otherwise
        bits = tl.abs(y).to(tl.int32, bitcast=True)
        normal = (bits + 0x7FFFF + ((bits >> 20) & 1) - (120 << 23)) >> 20
        small = (tl.abs(y) + 16384.0).to(tl.int32, bitcast=True) - (141 << 23)  # below 2^-6 codes are 2^-9 apart
        code = tl.where(tl.abs(y) < 0.015625, small, normal) | ((y.to(tl.int32, bitcast=True) >> 24) & 0x80)
    place = part * stride_kv + g * stride_g + (slot // B) * stride_n + (slot % B) * stride_b
    tl.store(codes + place + d, code.to(tl.int8).to(codes.dtype.element_ty, bitcast=True), mask=d < D)
    behind = part * stride_scale_kv + g * stride_scale_g + (slot // B) * stride_scale_n + slot % B
    tl.store(scales + behind, tl.where(finite, scale, float("nan")))


def write_kv(
    k: Tensor, v: Tensor, cache: Tensor, slot_mapping: Tensor, static: tuple[float, float] | None = None
) -> None:
    """Write keys and values [T, G, D] into the slots of one layer's cache [2, G, N, B, D]; -1 writes nothing.

    slot_mapping [T], int32 or int64. static: for fp8, see reference.write_kv.
    The last dimension of k, v and cache must be contiguous, the others need not.
    """
    tokens, kv_heads, head_size = k.shape
    if not k.stride(2) == v.stride(2) == cache.stride(4) == 1:
        raise ValueError("write_kv: the numbers of a head must lie side by side in k, v and cache")
    if is_quantized(cache):
        fixed = static if static and cache.dtype == torch.float8_e4m3fn else None
        to, behind = codes(cache).view(torch.uint8), scales(cache)
        _write_codes_kernel[tokens, kv_heads, 2](
            k, v, to, behind, slot_mapping, *(fixed or (1.0, 1.0)), *k.stride()[:2], *v.stride()[:2],
            *to.stride()[:4], *behind.stride()[:3], B=cache.shape[3], D=head_size, D_PAD=power_of_2(head_size),
            INT8=cache.dtype == torch.int8, STATIC=fixed is not None, num_warps=1,
        )  # fmt: skip
        return
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
    from_cache, to_cache = raw(from_cache), raw(to_cache)
    size = from_cache.shape[4] * from_cache.shape[5]  # B D, or the bytes of a block in eight bits
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
