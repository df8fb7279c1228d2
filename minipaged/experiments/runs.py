"""Many simulations: what one is made of, all at once on all processors, and none twice.

A `Run` says everything that goes into a simulation, so its result can be kept: by a hash of the run and of the
package's own source. When neither has changed, it is read instead of computed.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import exp, log
from pathlib import Path

from minipaged.experiments.hardware import SERVERS
from minipaged.experiments.loads import Job, jobs
from minipaged.experiments.paged import Paged
from minipaged.experiments.simulation import Outcome, simulate
from minipaged.experiments.systems import FasterTransformer, Orca, System

SYSTEMS = {  # who is compared, in the paper's order; ours is the package itself
    "ft": "FasterTransformer",
    "max": "Orca (Max)",
    "pow2": "Orca (Pow2)",
    "oracle": "Orca (Oracle)",
    "paged": "minipaged",
}


@dataclass(frozen=True)
class Run:
    """All inputs of a simulation. server: of SERVERS. rate: requests a second. seconds: so long they come."""

    system: str
    server: str
    load: str
    rate: float
    seconds: float
    seed: int = 0
    block_size: int = 16
    samples: int = 1
    prefix: int = 0  # tokens that stand before every prompt, the same in all
    preemption: str = "auto"

    def jobs(self) -> list[Job]:
        """At least one request comes."""
        drawn = jobs(self.load, self.rate, self.seconds, self.seed) or [Job(0.0, 1, 1)]
        return [Job(job.arrival, job.prompt + self.prefix, job.output) for job in drawn] if self.prefix else drawn

    def build(self) -> System:
        num_slots = SERVERS[self.server].num_slots
        if self.system == "paged":
            return Paged(num_slots, self.block_size, self.samples, self.prefix, self.preemption)
        if self.system == "ft":
            return FasterTransformer(num_slots)
        return Orca(num_slots, self.system, self.samples)


@dataclass(frozen=True)
class Result:
    """What is kept of an outcome; see there."""

    latency: float  # normalized: seconds per token of the answer, mean over requests
    p50: float
    p99: float
    mean_batch: float
    shares: dict[str, float]
    throughput: float  # requests a second, until the last was done
    num_requests: int
    num_preemptions: int

    @classmethod
    def of(cls, outcome: Outcome, system: System) -> Result:
        ordered = sorted(outcome.latencies)
        count = len(ordered)
        preempted = sum(system.scheduler.num_preemptions.values()) if isinstance(system, Paged) else 0
        return cls(
            outcome.normalized_latency, ordered[count // 2], ordered[min(count - 1, count * 99 // 100)],
            outcome.mean_batch, outcome.shares, count / outcome.seconds, count, preempted,
        )  # fmt: skip


def execute(run: Run, folder: Path | None) -> Result:
    """The result of a run: from the folder if it is there, else computed and put there."""
    file = folder / f"{_key(run)}.json" if folder else None
    if file and file.exists():
        return Result(**json.loads(file.read_text()))
    system = run.build()
    result = Result.of(simulate(system, run.jobs(), SERVERS[run.server]), system)
    if file:
        scratch = file.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(asdict(result)))
        scratch.replace(file)  # whole or not at all, whoever else is writing
    return result


def _key(run: Run) -> str:
    return hashlib.sha256(f"{_source()} {run}".encode()).hexdigest()[:32]


@cache
def _source() -> str:
    """A hash of all code that a simulation can depend on."""
    root = Path(__file__).parents[1]
    files = [*sorted(root.glob("*.py")), *sorted(root.glob("memory/*.py")), *sorted(root.glob("experiments/*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


# --- finding where a system gives up --------------------------------------------------------------------------------

LATENCY = 1.0  # seconds per token: where we say that a system is overloaded; the paper's plots end there
FRACTIONS = (0.4, 0.7, 0.9, 1.0, 1.06, 1.13, 1.2, 1.3, 1.5, 1.8, 2.2)  # of the estimated capacity


def capacity(run: Run, num_requests: int = 1500) -> float:
    """Requests a second that a system answers when there is always a queue: from the first part of the load."""
    rate = 1000.0
    system, server = run.build(), SERVERS[run.server]
    some = replace(run, rate=rate, seconds=num_requests / rate).jobs()
    return len(some) / simulate(system, some, server).seconds


def sweep(run: Run, folder: Path | None, limit: float = LATENCY) -> list[tuple[float, Result]]:
    """(rate, result) for rising rates, from little load to the first at which the latency is beyond the limit."""
    most, points = capacity(run), []
    for fraction in FRACTIONS:
        rate = round(fraction * most, 3)
        points.append((rate, execute(replace(run, rate=rate), folder)))
        if points[-1][1].latency > limit:
            break
    return points


def crossing(points: Iterable[tuple[float, float]], limit: float = LATENCY) -> float | None:
    """The rate at which the latency crosses the limit, between the points around it (straight in its logarithm).

    >>> round(crossing([(1.0, 0.1), (2.0, 10.0)]), 3)
    1.5
    """
    before = None
    for rate, latency in points:
        if latency >= limit and before:
            share = log(limit / before[1]) / log(latency / before[1])
            return before[0] + share * (rate - before[0])
        before = (rate, latency)
    return None
