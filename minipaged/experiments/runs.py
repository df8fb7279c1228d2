"""Many simulations: what one is made of, all of them on all processors, and none twice.

A `Run` says everything that goes into a simulation, so its result can be kept: under a hash of the run and of the
package's own source. When neither has changed, it is read instead of computed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypeVar

from minipaged.experiments.beams import PagedBeams
from minipaged.experiments.hardware import SERVERS
from minipaged.experiments.loads import NAMES, Job, jobs
from minipaged.experiments.paged import Paged
from minipaged.experiments.simulation import Outcome, simulate
from minipaged.experiments.systems import FasterTransformer, Orca, System

Kept = TypeVar("Kept")
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
    load: str  # of loads.NAMES, or the path of a trace
    rate: float
    seconds: float
    seed: int = 0
    block_size: int = 16
    samples: int = 1
    prefix: int = 0  # tokens that stand before every prompt, the same in all
    preemption: str = "auto"
    beams: bool = False  # `samples` beams instead of samples

    def jobs(self) -> list[Job]:
        """At least one request comes."""
        drawn = jobs(self.load, self.rate, self.seconds, self.seed) or [Job(0.0, 1, 1)]
        return [Job(job.arrival, job.prompt + self.prefix, job.output) for job in drawn] if self.prefix else drawn

    def build(self) -> System:
        num_slots = SERVERS[self.server].num_slots
        if self.system == "paged" and self.beams:
            return PagedBeams(num_slots, self.block_size, self.samples, self.preemption, self.seed)
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
    throughput: float  # requests a second
    num_requests: int
    num_preemptions: int

    @classmethod
    def of(cls, outcome: Outcome, system: System) -> Result:
        ordered = sorted(outcome.latencies)
        count = len(ordered)
        preempted = sum(system.scheduler.num_preemptions.values()) if isinstance(system, (Paged, PagedBeams)) else 0
        return cls(
            outcome.normalized_latency, ordered[count // 2], ordered[min(count - 1, count * 99 // 100)],
            outcome.mean_batch, outcome.shares, outcome.throughput, count, preempted,
        )  # fmt: skip


def execute(run: Run, folder: Path | None) -> Result:
    """The result of a run: from the folder if it is there, else computed and put there."""

    def compute() -> Result:
        system = run.build()
        return Result.of(simulate(system, run.jobs(), SERVERS[run.server]), system)

    trace = b"" if run.load in NAMES else Path(run.load).read_bytes()
    return recalled(folder, str(run).encode() + trace, compute, Result)


def recalled(folder: Path | None, inputs: bytes, compute: Callable[[], Kept], kind: type[Kept]) -> Kept:
    """What `compute` returns, a flat dataclass: from the folder if it is there for these inputs, else put there."""
    key = hashlib.sha256(f"{_source()} ".encode() + inputs).hexdigest()[:32] if folder else ""
    file = folder / f"{key}.json" if folder else None
    if file and (known := _read(file, kind)):
        return known
    result = compute()
    if file:
        scratch = file.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(vars(result)))
        scratch.replace(file)  # whole or not at all, whoever else is writing
    return result


def _read(file: Path, kind: type[Kept]) -> Kept | None:
    """None if it isn't there, or is damaged: then it is written again."""
    try:
        return kind(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


@cache
def _source() -> str:
    """A hash of all code that a simulation can depend on."""
    root = Path(__file__).parents[1]
    rooms = ("memory", "requests", "scheduling", "experiments")
    files = [file for name in rooms for file in sorted((root / name).glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


# --- finding where a system gives up --------------------------------------------------------------------------------

LATENCY = 1.0  # seconds per token: where a system counts as overloaded; about where the paper's plots end
FRACTIONS = (0.4, 0.7, 0.9, 1.0, 1.1, 1.2, 1.4, 1.7, 2.2, 3, 4, 6, 9)  # of what it answers if there is always a queue
COARSE = (0.5, 1, 2, 5)  # for a quick look
NEAR = 1.06  # rates around the crossing: so far apart at most, or one between them is tried
Points = list[tuple[float, Result]]  # by rate


def sweep(run: Run, limit: float = LATENCY, coarse: bool = False) -> Generator[Run, Result, Points]:
    """Rising rates, from little load to the first at which the latency is beyond the limit; then nearer to it.

    Yields the next run, wants its result, and returns the points by rate.
    """
    crowd = yield replace(run, rate=1000.0, seconds=min(2.0, run.seconds / 300))
    points: Points = []
    for fraction in COARSE if coarse else FRACTIONS:
        rate = _rounded(fraction * crowd.throughput)
        points.append((rate, (yield replace(run, rate=rate))))
        if points[-1][1].latency > limit:
            break
    for _ in range(0 if coarse else 2):
        guess = crossing(((rate, result.latency) for rate, result in points), limit)
        if math.isnan(guess):
            break
        place = next(i for i, (_, result) in enumerate(points) if result.latency >= limit)
        if points[place][0] < NEAR * points[place - 1][0]:
            break
        rate = _rounded(guess)
        points.insert(place, (rate, (yield replace(run, rate=rate))))
    return points


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def crossing(points: Iterable[tuple[float, float]], limit: float = LATENCY) -> float:
    """The rate at which the latency crosses the limit, between the points around it (straight in its logarithm).

    NaN if it never does.

    >>> round(crossing([(1.0, 0.1), (2.0, 10.0)]), 3)
    1.5
    """
    before = None
    for rate, latency in points:
        if latency >= limit:
            if before is None:
                break
            share = math.log(limit / before[1]) / math.log(latency / before[1])
            return before[0] + share * (rate - before[0])
        before = (rate, latency)
    return float("nan")
