"""Measures one cell at a time: ours, verified against the reference, and the peers beside it.

Symbols as in reference.py. The copies of the cache through which the calls of a contender go, so that each finds its
keys and values in memory and in no cache, are what an engine has anyway: the layers of a model.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels import reference
from kernels.bench.cells import Work
from kernels.bench.peers import Peer, contiguous_decode_peers, prefill_peers
from kernels.bench.timing import (
    Contender,
    Times,
    WrongKernel,
    copy_contender,
    free_bytes,
    measure,
    product_contender,
)

Row = dict[str, Any]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
MOST_LAYERS = 1024


@dataclass
class Inputs:
    q: Tensor  # [T, H, D]
    cache: Tensor  # [L, 2, G, N, B, D]
    scrambled: kernels.Batch
    ordered: kernels.Batch


@dataclass
class Bench:
    """The bench of one backend. Its four methods below are the four tables; each takes a cell, and returns its row.

    Errors: WrongKernel if the backend's result is not the reference's; torch.OutOfMemoryError.
    """

    backend: kernels.Backend
    device: torch.device
    dtype: torch.dtype
    cache_bytes: int  # of the device's last cache
    rounds: int = 7
    seconds: float | None = None  # of a stretch; None: as suits the device
    copied: int | None = None  # bytes of the copy that bandwidth is compared with
    multiplied: int | None = None  # rows and columns of the matrices that prefill is compared with
    flex: bool = True  # whether FlexAttention stands beside
    left_out: dict[str, str] = field(default_factory=dict)  # peers that did not run, with the reason
    random: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.random = torch.Generator(self.device).manual_seed(0)
        self.copy, self.copy_bytes = copy_contender(self.device, self.copied)
        self.product, self.product_flops = product_contender(self.device, self.dtype, self.multiplied)

    def decode(self, work: Work) -> Row:
        """How near reading keys and values through page tables comes to a plain copy."""
        inputs = self.inputs(work)
        times = self.measure({"ours": self.ours(work, inputs, inputs.scrambled)[0]})
        return self.row("decode", work, times)

    def prefill(self, work: Work) -> Row:
        """Beside PyTorch's FlashAttention, which finds keys and values in one piece, and beside a matrix product."""
        # Prefill waits for arithmetic more than for memory: few layers do, and on a CPU one.
        inputs = self.inputs(work, copies=3, most_layers=4 if self.device.type == "cuda" else 1)
        ours, out = self.ours(work, inputs, inputs.scrambled)
        peers = self.peers("prefill", prefill_peers(inputs.q, self.contiguous_kv(inputs), work.batch), out)
        times = self.measure({"product": self.product, "ours": ours} | peers)
        row = self.row("prefill", work, times)
        row["tflops"] = {name: work.flops() / times[name].median / 1e12 for name in ("ours", *peers)}
        row["tflops"]["product"] = self.product_flops / times["product"].median / 1e12
        row["of_product"] = row["tflops"]["ours"] / row["tflops"]["product"]
        row["peer"] = next(iter(peers), None)
        row["of_peer"] = times[row["peer"]].median / times["ours"].median if peers else None
        return row

    def contiguous(self, work: Work) -> Row:
        """Decode beside PyTorch's attention over contiguous keys and values, and beside FlexAttention over paged."""
        inputs = self.inputs(work, copies=4)  # ours, contiguous, FlexAttention's, and what making these takes
        ours, out = self.ours(work, inputs, inputs.scrambled)
        makers = contiguous_decode_peers(inputs.q, self.contiguous_kv(inputs), work.context)
        makers = {name: make for name, make in makers.items() if self.flex or name != "flex"}
        peers = self.peers("contiguous", makers, out)
        times = self.measure({"ours": ours} | peers)
        row = self.row("contiguous", work, times)
        plain = [name for name in peers if name != "flex"]
        row["peer"] = min(plain, key=lambda name: times[name].median, default=None)
        for key, name in (("of_peer", row["peer"]), ("of_flex", "flex")):
            row[key] = times[name].median / times["ours"].median if name in peers else None
        return row

    def paging(self, work: Work) -> Row:
        """The same keys and values by scrambled tables, and by tables in the order of memory."""
        inputs = self.inputs(work)
        contenders = {
            "ours": self.ours(work, inputs, inputs.scrambled)[0],
            "ordered": self.ours(work, inputs, inputs.ordered)[0],
        }
        times = self.measure(contenders)
        row = self.row("paging", work, times)
        row["scrambling_costs"] = times["ours"].median / times["ordered"].median - 1
        return row

    # --- parts ----------------------------------------------------------------------------------------------

    def inputs(self, work: Work, copies: int = 1, most_layers: int = MOST_LAYERS) -> Inputs:
        """Random inputs of as many layers as no cache holds. torch.OutOfMemoryError if `copies` of them don't fit."""
        shape, size = work.shape, work.pool_bytes(self.dtype.itemsize)
        layers = min(max(math.ceil(4 * self.cache_bytes / size), 1), most_layers)
        free = free_bytes(self.device)
        if copies * layers * size > free:
            gib = copies * layers * size / 2**30
            raise torch.OutOfMemoryError(f"needs {gib:.1f} GiB, and {free / 2**30:.1f} are free for it")
        num_blocks = work.batch * work.blocks_each
        cache = kernels.new_cache(
            layers, num_blocks, work.block_size, shape.kv_heads, shape.head_size, self.dtype, self.device
        )
        cache[0].normal_(generator=self.random)
        for layer in cache[1:]:
            layer.copy_(cache[0])
        tokens = work.batch * work.queries
        q = torch.empty(tokens, shape.heads, shape.head_size, dtype=self.backend.dtype, device=self.device)
        q.normal_(generator=self.random)
        order = torch.randperm(num_blocks, generator=self.random, device=self.device)
        return Inputs(q, cache, self.batch(work, order), self.batch(work, order.sort().values))

    def batch(self, work: Work, order: Tensor) -> kernels.Batch:
        """order [N]: the blocks as the sequences take them."""
        return kernels.Batch(
            torch.full((work.batch * work.queries,), -1, device=self.device),
            torch.arange(work.batch + 1, device=self.device) * work.queries,
            torch.full((work.batch,), work.context, device=self.device),
            order.view(work.batch, work.blocks_each),
        )

    def ours(self, work: Work, inputs: Inputs, batch: kernels.Batch) -> tuple[Contender, Tensor]:
        """The backend's calls, one for each layer, and its result for the first."""
        scale = work.shape.head_size**-0.5

        def call(layer: Tensor) -> Callable[[], Tensor]:
            return lambda: self.backend.paged_attention(inputs.q, layer, batch, scale)

        contender = Contender([call(layer) for layer in inputs.cache], in_graph=self.backend.name != "torch")
        out = contender.calls[0]()
        self.verify(out, inputs.q, inputs.cache[0], batch, scale)
        return contender, out

    def verify(self, out: Tensor, q: Tensor, layer: Tensor, batch: kernels.Batch, scale: float, some: int = 4) -> None:
        """Compare the first, the last and `some` random rows with the reference. WrongKernel if they differ."""
        picked = torch.randint(len(q), (some,), generator=self.random, device=self.device)
        rows = torch.cat((picked, picked.new_tensor([0, len(q) - 1])))
        s = torch.searchsorted(batch.query_start, rows, right=True) - 1
        # A query over the context up to its own position is a sequence of its own, for the reference.
        contexts = batch.context_lens[s] - (batch.query_start[s + 1] - 1 - rows)
        starts = torch.arange(len(rows) + 1, device=self.device)
        right = reference.paged_attention(q[rows].float(), layer, starts, contexts, batch.block_tables[s], scale)
        error, most = relative_error(out[rows], right), TOLERANCE[self.dtype]
        if not error <= most:  # NaN is wrong, too
            raise WrongKernel(
                f"the kernels of backend {self.backend.name} are wrong, and a wrong kernel is not timed: their result "
                f"is off by {error:.2g} of its size, where {most} would be rounding"
            )

    def contiguous_kv(self, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
        """Each layer's keys and values, [S, G, context, D] each, in one piece."""
        tables, context = inputs.scrambled.block_tables, int(inputs.scrambled.context_lens[0])
        both = [
            [pool[:, tables].flatten(2, 3)[:, :, :context].transpose(0, 1).contiguous() for pool in layer]
            for layer in inputs.cache
        ]
        return [(keys, values) for keys, values in both]

    def peers(self, what: str, makers: dict[str, Callable[[], Peer]], out: Tensor) -> dict[str, Contender]:
        """The peers that run here and compute the same; the reason for each other one goes to left_out."""
        found = {}
        for name, make in makers.items():
            try:
                peer = make()
                error = relative_error(peer.rows(peer.calls[0]()), out)
            except Exception as problem:  # whatever goes wrong in a peer is no reason not to measure ours
                self.left_out[f"{name} ({what})"] = f"not available: {first_line(problem)}"
                continue
            if error <= 2 * TOLERANCE[self.dtype]:
                found[name] = Contender(peer.calls)
            else:
                self.left_out[f"{name} ({what})"] = f"its result is off by {error:.2g} of its size"
        return found

    def measure(self, contenders: dict[str, Contender]) -> dict[str, Times]:
        return measure({"copy": self.copy} | contenders, self.device, self.rounds, self.seconds)

    def cell(self, what: str, work: Work) -> Row:
        cell = {"what": what, "model": work.shape.name} | asdict(work)
        del cell["shape"]
        return cell

    def row(self, what: str, work: Work, times: dict[str, Times]) -> Row:
        bandwidth = work.kv_bytes(self.dtype.itemsize) / times["ours"].median
        copy = self.copy_bytes / times["copy"].median
        return self.cell(what, work) | {
            "seconds": {name: one.median for name, one in times.items()},
            "spread": {name: one.spread for name, one in times.items()},
            "without_graph": [name for name, one in times.items() if self.device.type == "cuda" and not one.in_graph],
            "bandwidth": bandwidth,  # bytes a second, of keys and values
            "copy_bandwidth": copy,  # bytes a second, read and written
            "of_copy": bandwidth / copy,
        }


def relative_error(ours: Tensor, right: Tensor) -> float:
    """The largest |ours - right| / |right| of a token's head, both [T, H, D]."""
    norms = (ours.float() - right.float()).norm(dim=-1) / right.float().norm(dim=-1)
    return float(norms.max())


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0][:200]
