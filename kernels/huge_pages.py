"""Where weights lie that every step reads."""

import mmap

import torch
from torch import Tensor


class HugePages:
    """Memory for weights in pages of 2 MiB where the system has them.

    Each step reads all weights once, and in pages of 4 KiB the processor looks up 512 times as often where they lie.
    """

    PAGE, CHUNK = 2 << 20, 64 << 20

    def __init__(self) -> None:
        self.free = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = -(-torch.Size(shape).numel() * dtype.itemsize // 64) * 64
        if len(self.free) < size:
            self.free = self._chunk(max(size, self.CHUNK))
        taken, self.free = self.free[:size], self.free[size:]
        return taken.view(dtype)[: torch.Size(shape).numel()].view(shape)

    def _chunk(self, size: int) -> Tensor:
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(size, dtype=torch.uint8)
        memory = mmap.mmap(-1, size + self.PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        chunk = torch.frombuffer(memory, dtype=torch.uint8)
        return chunk[-chunk.data_ptr() % self.PAGE :][:size]
