"""CUDA graphs of decode steps: the hundreds of kernels of a step are launched as one.

A decode step of a small model is over before Python has launched its kernels one by one. A CUDA graph records the
launches once and replays them, on the same memory each time. So a step's inputs are copied to where the recording
reads them, and batches are padded up to the sizes that were recorded:

    what         of a padding row      and so
    slot         -1                    nothing is written
    context      0 tokens              nothing is read, attention gives 0
    its logits                         nobody looks at them

Graphs are recorded before the first request comes, so that none waits for it. Where one can't be recorded, decode steps
are launched kernel by kernel from then on, which gives the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels import Batch, say
from minipaged.models import Model

Recorded = tuple[Callable[[], None], Tensor]  # replay, and where it leaves its result


class CudaRecorder:
    """Records what a function launches on a GPU. It runs once before, so that all kernels are compiled.

    All recordings share one memory pool: no two of them run at a time. (PyTorch's documentation, "CUDA semantics: CUDA
    graphs".)
    """

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, compute: Callable[[], Tensor]) -> Recorded:
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        before, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(before)
        with torch.cuda.stream(side):
            compute()
        before.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                result = compute()
        finally:
            torch.cuda.set_stream(before)  # a recording that breaks leaves its own stream behind
        return graph.replay, result


@dataclass
class DecodeGraphs:
    """One graph for each size of a batch, recorded by `record_all`, or else when it is first needed.

    max_num_seqs: larger batches are refused by `fits`. max_blocks: the longest page table.
    record: turns a function of no arguments into its replay and result.
    notice: is told in a line if that fails; then `fits` refuses every batch.
    """

    model: Model
    cache: Tensor  # [L, 2, G, N, B, D]
    max_num_seqs: int
    max_blocks: int
    record: Callable[[Callable[[], Tensor]], Recorded] = field(default_factory=CudaRecorder)
    notice: Callable[[str], None] = say

    def __post_init__(self) -> None:
        powers = [size for size in (1, 2, 4) if size < self.max_num_seqs]
        self.sizes = [*powers, *range(8, self.max_num_seqs, 8), self.max_num_seqs]
        self.graphs: dict[int, Recorded] = {}
        self.broken = False
        rows, device = self.max_num_seqs, self.cache.device
        self.input_ids, self.positions = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self.slots = torch.full_like(self.positions, -1)
        self.context_lens = torch.zeros_like(self.positions)
        self.block_tables = torch.zeros(rows, self.max_blocks, dtype=torch.int64, device=device)
        self.query_start = torch.arange(rows + 1, device=device)  # one token each

    @torch.inference_mode()
    def record_all(self) -> None:
        """All sizes, on padding alone. The largest goes first: the others find room in the memory that it took."""
        for size in reversed(self.sizes):
            if not self._ready(size):
                return

    def fits(self, batch: Batch) -> bool:
        """Whether `run` takes this batch: one token of each of not too many sequences."""
        rows, width = batch.block_tables.shape
        return not self.broken and batch.max_query_len == 1 and rows <= self.max_num_seqs and width <= self.max_blocks

    def run(self, input_ids: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        """What model(input_ids, positions, cache, batch) returns: hidden [T, E], until the next run."""
        rows, width = batch.block_tables.shape
        size = next(size for size in self.sizes if size >= rows)
        self.input_ids[:rows], self.positions[:rows] = input_ids, positions
        self.slots[:rows], self.slots[rows:size] = batch.slot_mapping, -1
        self.context_lens[:rows], self.context_lens[rows:size] = batch.context_lens, 0
        self.block_tables[:rows, :width] = batch.block_tables
        if not self._ready(size):
            return self.model(input_ids, positions, self.cache, batch)
        replay, hidden = self.graphs[size]
        replay()
        return hidden[:rows]

    def _ready(self, size: int) -> bool:
        """Whether there is a graph of this size, now at the latest."""
        if size not in self.graphs:
            try:
                self.graphs[size] = self.record(lambda: self._compute(size))
            except Exception as error:  # whatever a model, a kernel or the driver has against it
                self.broken = True
                self.graphs.clear()
                why = str(error).partition("\n")[0]
                self.notice(f"decode steps run without CUDA graphs: {type(error).__name__} while recording: {why}")
        return not self.broken

    def _compute(self, size: int) -> Tensor:
        batch = Batch(
            self.slots[:size], self.query_start[: size + 1], self.context_lens[:size], self.block_tables[:size]
        )
        # How the work is cut is recorded too, so it is cut for the longest context that may come.
        batch.max_query_len, batch.max_context_len = 1, self.max_blocks * self.cache.shape[4]
        return self.model(self.input_ids[:size], self.positions[:size], self.cache, batch)
