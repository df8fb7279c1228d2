"""Processes of one machine add up their tensors through memory that they share: see cpu/ranks.cpp."""

import mmap
from collections.abc import Callable
from ctypes import CDLL

import torch
from torch import Tensor

SLOT = 256 * 1024  # bytes: larger tensors go in pieces. What all ranks bring stays in the second cache
PATIENCE = 5000  # microseconds, until Python looks whether the others are still there


def memory_size(library: CDLL, size: int) -> int:
    """Bytes of what `size` ranks share."""
    return library.ranks_memory(size, SLOT)


class SharedSum:
    """One of `size` ranks that call the same methods with tensors of the same shapes, in the same order.

    memory: theirs, see memory_size; all zeros when the first of them comes.
    check: called every few milliseconds while others are waited for, with the seconds that this sum has waited. If it
    raises, there are no more sums.
    """

    def __init__(self, library: CDLL, memory: mmap.mmap, rank: int, size: int, check: Callable[[float], None]):
        self.library, self.rank, self.size, self.check = library, rank, size, check
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        self._address = self._memory.data_ptr()
        self._number = 0  # of the last sum
        if len(self._memory) < memory_size(library, size):
            raise ValueError(f"{len(self._memory)} bytes: {size} ranks share {memory_size(library, size)}")

    def sum(self, x: Tensor) -> Tensor:
        """x of all ranks, added up in their order, in fp32, and rounded once. In x itself, where that can be."""
        if x.dtype not in (torch.float32, torch.bfloat16):
            return self.sum(x.float()).to(x.dtype)
        x, step = x.contiguous(), SLOT // x.itemsize
        for begin in range(0, x.numel(), step):
            at, n = x.data_ptr() + begin * x.itemsize, min(step, x.numel() - begin)
            self._bring(at, n * x.itemsize)
            self.library.ranks_add(self._address, self.size, SLOT, self._number, at, n, x.dtype == torch.bfloat16)
        return x

    def gather(self, x: Tensor, sizes: list[int]) -> Tensor:
        """x [R, sizes[rank]] of each, side by side: [R, sum(sizes)] on rank 0; elsewhere x."""
        x = x.contiguous()
        parts = [x if rank == self.rank else x.new_empty(len(x), size) for rank, size in enumerate(sizes)]
        most = max(part.nbytes for part in parts)
        for begin in range(0, most, SLOT):
            self._bring(x.data_ptr() + begin, _left(x, begin))
            for rank, part in enumerate(parts):
                if rank != self.rank == 0 and _left(part, begin):
                    to, size = part.data_ptr() + begin, _left(part, begin)
                    self.library.ranks_copy(self._address, self.size, SLOT, self._number, rank, to, size)
        return torch.cat(parts, 1) if self.rank == 0 else x

    def _bring(self, address: int, size: int) -> None:
        """Bring a piece, and wait for those of the others."""
        self._number += 1
        waits = 0  # counted, since a clock runs on while this process is stopped
        self.library.ranks_bring(self._address, self.rank, self.size, SLOT, self._number, address, size)
        while not self.library.ranks_wait(self._address, self.size, self._number, PATIENCE):
            waits += 1
            self.check(waits * PATIENCE / 1e6)


def _left(part: Tensor, begin: int) -> int:
    return max(0, min(SLOT, part.nbytes - begin))
