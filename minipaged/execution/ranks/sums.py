"""How ranks add up: through shared memory on one machine, through torch.distributed between machines.

Either way every rank gets all pieces and adds them in the order of ranks: the same bits on each, every time. That is
what `same bits in any company` needs; an all-reduce of gloo or nccl may choose another order for another size.
"""

import mmap
import os
from collections.abc import Callable
from ctypes import CDLL
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import cpp_build, cpp_sum
from minipaged import cache_folder
from minipaged.execution.ranks.errors import SumBroken
from minipaged.models import Ranks

LONGEST = timedelta(hours=1)  # for a sum between machines: who dies is noticed otherwise


class SharedRanks(Ranks):
    """memory: a file of `shared_memory` that all ranks have open; it goes when the last of them goes.

    check: see SharedSum.
    """

    def __init__(self, memory: int, rank: int, size: int, check: Callable[[float], None]):
        self.rank, self.size = rank, size
        self._shared = cpp_sum.SharedSum(_library(), mmap.mmap(memory, 0), rank, size, check)

    def sum(self, x: Tensor) -> Tensor:
        return self._shared.sum(x)

    def gather(self, x: Tensor, sizes: list[int]) -> Tensor:
        return self._shared.gather(x, sizes)


def shared_memory(size: int) -> int:
    """A nameless file in memory for `size` ranks: its descriptor. `cpp_build.BuildFailed` without a C++ compiler."""
    length = cpp_sum.memory_size(_library(), size)
    if hasattr(os, "memfd_create"):
        memory = os.memfd_create("minipaged-ranks")
    else:  # macOS
        import tempfile

        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    os.ftruncate(memory, length)
    return memory


def _library() -> CDLL:
    return cpp_build.load(cpp_build.build(Path(cache_folder()) / "kernels", lambda line: None))


class DistributedRanks(Ranks):
    """Over gloo on CPUs, and nccl on GPUs (not tested on several of them). store: where they find each other."""

    def __init__(self, store: dist.Store, rank: int, size: int, device: str):
        self.rank, self.size = rank, size
        self._group: Any
        store = dist.PrefixStore("sums", store)
        if device == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = LONGEST
            self._group = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            self._group = dist.ProcessGroupGloo(store, rank, size, LONGEST)

    def sum(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x
        first, *others = self._all(x)
        total = first.float()
        for piece in others:
            total += piece.float()
        return total.to(x.dtype)

    def gather(self, x: Tensor, sizes: list[int]) -> Tensor:
        """All get it, since gloo and nccl want one size for everybody; so the narrower ones are filled up."""
        if not x.numel():
            return x.new_empty(len(x), sum(sizes))
        padded = torch.nn.functional.pad(x, (0, max(sizes) - x.shape[1]))
        return torch.cat([piece[:, :size] for piece, size in zip(self._all(padded), sizes, strict=True)], 1)

    def _all(self, x: Tensor) -> list[Tensor]:
        pieces = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        try:
            self._group.allgather([pieces], [x.contiguous()]).wait()
        except RuntimeError as error:
            raise SumBroken(str(error).partition("\n")[0]) from None
        return pieces
