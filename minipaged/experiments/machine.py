"""What a step costs on one engine's GPUs of today, and what a link between two engines carries.

hardware.py's roofline, and beside it what long prompts pay: every token attends to all before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from minipaged.experiments.hardware import REACHED_COMPUTE, Server

PAGE = 16  # tokens of a block, for what attention pays to find it


@dataclass(frozen=True)
class Machine:
    """What a step costs on one engine's GPUs, and what a link carries.

    step: seconds that each step costs beside its work, host: and for each of its requests. Engines of today start a
    step as one graph, and prepare the next while it runs: chosen, not measured. compute: the share of the data sheet's
    operations that is reached. overlap: whether a step reads weights while it multiplies; else one after the other.
    link: bytes a second between two engines, one way, and latency in seconds.
    """

    server: Server
    step: float = 1e-3
    host: float = 10e-6
    compute: float = REACHED_COMPUTE
    overlap: bool = True
    link: float = 450e9
    latency: float = 100e-6

    def seconds(self, tokens: int, requests: int, context: int, pairs: int) -> float:
        """A step: tokens computed; tokens whose keys and values are read; pairs of tokens within prompts."""
        products, reading = tokens * self.per_token, self.reading
        matrices = max(reading, products) if self.overlap else reading + products
        return self.step + requests * self.host + matrices + pairs * self.per_pair + context * self.per_context

    # Parts of it, computed once.

    @cached_property
    def reading(self) -> float:
        return self.server.reading_seconds()

    @cached_property
    def per_token(self) -> float:
        return self.server.computing_seconds(1) * REACHED_COMPUTE / self.compute

    @cached_property
    def per_pair(self) -> float:
        """A product with a key, and one with a value, in all layers and heads."""
        server = self.server
        operations = 4 * server.layers * server.heads * server.head_size
        return operations / (server.num_gpus * server.gpu.peak * self.compute)

    @cached_property
    def per_context(self) -> float:
        return self.server.context_seconds(PAGE)

    def moving_seconds(self, tokens: int) -> float:
        """For the keys and values of so many tokens."""
        return self.latency + tokens * self.server.kv_bytes / self.link
