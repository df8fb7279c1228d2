"""How the Triton kernels cut their work: tile sizes and numbers of programs, from the shapes alone.

Plain functions of numbers, so that they can be read and tested without a GPU and without Triton. Fixed rules and no
autotuning: no step should stop to try out kernels, and what a test compiles should be what will run.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels.cache import head_size

KEY_BYTES = 2**14  # of keys in a decode tile: a few such tiles on their way keep a multiprocessor's memory port busy
MAX_SPLITS = 128
RESIDENT = 2  # programs that we want on each multiprocessor at a time


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below n: Triton's ranges have no other lengths.

    >>> [power_of_2(n) for n in (1, 2, 3, 80)]
    [1, 2, 4, 128]
    """
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Tiles:
    """What one program of the attention kernel takes on at a time."""

    queries: int  # TILE_Q: consecutive queries of a sequence; each brings R heads, which share a key/value head
    rows: int  # BLOCK_M: queries * R, padded to a power of two of at least 16, the least that tensor cores take
    keys: int  # BLOCK_N: keys of one iteration
    num_warps: int
    num_stages: int  # how far ahead table entries, keys and values are fetched


@cache
def choose_tiles(group_size: int, head_size: int, itemsize: int, decode: bool, few: bool = False) -> Tiles:
    """Tiles for R = group_size query heads over each key/value head, in a dtype of `itemsize` bytes.

    Decode (one query a sequence) waits for memory: few rows, many bytes of keys on their way.
    Prefill waits for arithmetic: many rows, so that every key loaded is used often; `few`: 64 would hold all.
    fp32 must be exact, so it has no tensor cores: small tiles, or the operands do not fit into registers.

    >>> choose_tiles(group_size=4, head_size=128, itemsize=2, decode=True)
    Tiles(queries=1, rows=16, keys=64, num_warps=4, num_stages=5)
    >>> choose_tiles(group_size=3, head_size=64, itemsize=2, decode=False)
    Tiles(queries=42, rows=128, keys=64, num_warps=8, num_stages=3)
    """
    padded = power_of_2(max(head_size, 16))
    exact = itemsize == 4
    if decode:
        keys = min(max(KEY_BYTES // (padded * itemsize), 16), 128)
        return Tiles(1, power_of_2(max(group_size, 16)), keys, 8 if exact else 4, num_stages=3 if exact else 5)
    if exact:
        rows, keys = 32, min(max(2048 // padded, 16), 32)
    else:
        rows, keys = (128, 64) if padded <= 128 and not few else (64, 64 if padded <= 128 else 32)
    rows = power_of_2(max(rows, group_size))
    return Tiles(rows // group_size, rows, keys, 8 if rows >= 128 or padded > 128 else 4, num_stages=3)


@cache
def choose_splits(num_programs: int, max_context_len: int, num_multiprocessors: int, min_keys: int = 128) -> int:
    """Over how many programs each context is split, where `num_programs` would run if none was.

    Few programs leave multiprocessors idle, and so does a last wave that is nearly empty. Take the smallest number
    of splits that keeps the GPU within a tenth of as busy as the best number would; a split of fewer than `min_keys`
    keys would cost more in the merging than it gains. (The rule of FlashAttention's num_splits_heuristic.)

    >>> choose_splits(num_programs=8, max_context_len=32768, num_multiprocessors=132)
    30
    >>> choose_splits(num_programs=8, max_context_len=500, num_multiprocessors=132)  # too short for more
    3
    >>> choose_splits(num_programs=2048, max_context_len=32768, num_multiprocessors=132)
    1
    """
    places = RESIDENT * num_multiprocessors

    def busy(splits: int) -> float:
        waves = num_programs * splits / places
        return waves / max(math.ceil(waves), 1)

    choices = range(1, min(max(max_context_len // min_keys, 1), MAX_SPLITS) + 1)
    enough = 0.9 * max(busy(splits) for splits in choices)
    return next(splits for splits in choices if busy(splits) >= enough)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many the GPU has; Triton's interpreter runs programs one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def check_input(q: Tensor, cache: Tensor, scale: float) -> None:
    """ValueError for a q [T, H, D] or a cache [2, G, N, B, D] that the attention kernel would misread."""
    if q.shape[1] % cache.shape[1] or q.shape[2] != head_size(cache):
        raise ValueError(f"q {list(q.shape)} has no whole number of heads for each of cache {list(cache.shape)}")
    if q.stride(2) != 1 or cache.stride(4) != 1:
        raise ValueError("the numbers of a head must lie side by side, in q and in the cache")
    if scale <= 0:
        raise ValueError(f"scale={scale}: must be positive")
    if q.device.type == "cpu" and torch.bfloat16 in (q.dtype, cache.dtype):
        raise ValueError("Triton's interpreter computes bf16 wrongly: use fp32 or fp16 without a GPU")
