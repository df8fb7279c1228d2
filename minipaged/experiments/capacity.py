"""Capacity: how many requests a second are answered when all of them are there from the start.

Then nothing that a system decides depends on how long a step takes. So a crowd is served once, with no clock, and what
was decided is priced afterwards with any constants at all:

    served = record(Paged(server.num_slots), jobs)
    price(served, server), price(served, server, attention=2.0), ...

And a system between reserving and paging: `without_holes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from minipaged.experiments.buddy import Buddy
from minipaged.experiments.hardware import HOST_PER_REQUEST, Server
from minipaged.experiments.loads import Job
from minipaged.experiments.systems import Orca, System


@dataclass(frozen=True)
class Served:
    """A crowd's answers. rows: of integers, a column for each stride: see `record`."""

    rows: np.ndarray
    block_size: int | None


def record(system: System, jobs: Sequence[Job]) -> Served:
    """Let all jobs come at once, and be answered. AssertionError if somebody never fits."""
    strides = []
    for job in jobs:
        system.submit(job)
    while (work := system.plan()) is not None:
        size = system.num_running
        ended = len(system.finish(work.iterations))
        strides.append((work.iterations, size, work.tokens, work.context, work.growth, work.moved_blocks, ended))
    if system.num_waiting:
        raise AssertionError(f"{system.num_waiting} requests can never fit")
    return Served(np.array(strides).T, system.block_size)


def price(served: Served, server: Server, attention: float = 1.0, host: float = HOST_PER_REQUEST) -> float:
    """Requests a second, while the second and third quarter were answered. As `simulate(...).throughput`.

    attention: by how much longer reading a context takes than the server says. host: seconds for each request in a
    step.
    """
    steps, requests, tokens, context, growth, moved, ended = served.rows
    read = attention * server.context_seconds(served.block_size)
    counts, which = np.unique(tokens, return_inverse=True)
    products = np.array([server.matrix_seconds(count) for count in counts.tolist()])[which]
    moving = np.array([server.swap_seconds(count, served.block_size or 1) for count in moved.tolist()])
    first = products + requests * host + context * read
    ends = np.repeat((moving + steps * first + growth * read * steps * (steps - 1) / 2).cumsum(), ended)
    quarter = len(ends) // 4
    return float(2 * quarter / (ends[3 * quarter] - ends[quarter]))


class Bag:
    """A memory without holes: a piece fits as long as so many slots are free, anywhere."""

    def __init__(self, total: int):
        self.num_free = total

    def allocate(self, size: int) -> tuple[int, int] | None:
        if size > self.num_free:
            return None
        self.num_free -= size
        return 0, size

    def release(self, piece: tuple[int, int]) -> None:
        self.num_free += piece[1]


def without_holes(num_slots: int, reserve: str = "oracle") -> Orca:
    """Orca, if pieces were moved together at no cost: it reserves, but nothing is lost between the pieces."""
    system: Any = Orca(num_slots, reserve)
    system._memory = cast(Buddy, Bag(num_slots))
    return system
