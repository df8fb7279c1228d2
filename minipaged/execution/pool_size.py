"""How large the pools are: as told, or a share of the memory that is free."""

import os
from dataclasses import dataclass

import torch

CPU_SHARE = 0.25  # of the free memory goes to the pool if nothing is said,
CUDA_SHARE = 0.85  # and most of a GPU's, which nobody else uses


@dataclass(frozen=True)
class Room:
    """A memory that blocks lie in: a machine's or a GPU's. Bytes of a block there, of all ranks, and bytes free.

    free: None: this machine's, or its GPU's, whatever that is by then.
    """

    block_bytes: int
    free: int | None = None

    def share_of(self, memory: int | None, block_bytes: int) -> int | None:
        """Its part of the memory for blocks of block_bytes in all rooms together."""
        return None if memory is None else memory * self.block_bytes // block_bytes


def choose_num_blocks(
    num_blocks: int | None, kv_cache_memory: int | None, block_bytes: int, most: int, device: str,
    share: float | None = None, free: int | None = None,
) -> int:  # fmt: skip
    """The size of the pool: as told, in blocks or in bytes, else a share of the memory that is free.

    most: as many blocks as can ever be used; more is never taken by default. share: that share, if told.
    free: bytes, where that isn't the memory of this machine, or of its GPU.
    """
    free = free_memory(device) if free is None else free
    if num_blocks is None:
        given = kv_cache_memory is not None
        budget = kv_cache_memory if kv_cache_memory is not None else share_of(free, device, share)
        num_blocks = budget // block_bytes if given else min(budget // block_bytes, most)
        if num_blocks < 1:
            raise ValueError(f"kv_cache_memory={budget}: one block takes {block_bytes} bytes")
    if num_blocks < 1:
        raise ValueError(f"num_blocks={num_blocks}: must be at least 1")
    if num_blocks * block_bytes > free:
        wanted = num_blocks * block_bytes >> 20
        raise ValueError(f"a pool of {num_blocks} blocks takes {wanted} MiB, and only {free >> 20} MiB are free")
    return num_blocks


def choose_num_cpu_blocks(
    num_cpu_blocks: int | None, num_blocks: int, block_bytes: int, device: str, preemption: str = "auto"
) -> int:
    """Blocks to swap to: as told, by default as many as the pool has, and never more; none if nothing is ever swapped.

    A CPU's are taken only as they are used. A GPU's are pinned, which takes them at once: a share of what is free.
    """
    if preemption == "recompute":
        return 0
    if num_cpu_blocks is None and device == "cuda":
        num_cpu_blocks = default_kv_cache_memory("cpu") // block_bytes
    return num_blocks if num_cpu_blocks is None else min(num_cpu_blocks, num_blocks)


def default_kv_cache_memory(device: str, share: float | None = None) -> int:
    """A share of the bytes that are free now."""
    return share_of(free_memory(device), device, share)


def share_of(free: int, device: str, share: float | None = None) -> int:
    return int((share or (CUDA_SHARE if device.startswith("cuda") else CPU_SHARE)) * free)


def free_memory(device: str) -> int:
    """Bytes that are free on a GPU or in main memory; where only the total is known (macOS), half of it."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
