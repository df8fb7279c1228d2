"""Goodput: how many requests a second a GPU takes so that nine of ten get what they were promised.

Promised are a time to the first token (TTFT) and a time for each that follows (TPOT, the mean over one answer); both
must be kept. The highest rate at which nine of ten requests have both, divided by the GPUs, is the goodput (DistServe,
Zhong et al., OSDI 2024). A run at one rate says of all limits whether they are kept, so the search for one limit uses
the runs of the others.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

from minipaged.experiments.cluster import Cluster, Layout
from minipaged.experiments.loads import Job, TraceError
from minipaged.experiments.machine import Machine
from minipaged.experiments.runs import recalled
from minipaged.experiments.serving import Ask

SHARE = 0.9  # of the requests must have both (DistServe)
RATIO = 1.06  # between rates that are told apart
SLOWEST = 0.05  # requests a second for each GPU: who can't keep the limits at this rate can't keep them
STEPS = 119  # of RATIO: up to 50 requests a second
LONGEST = 32_768  # tokens of a prompt, and of an answer


@dataclass(frozen=True)
class Limits:
    """Seconds."""

    ttft: float
    tpot: float

    def kept(self, asks: Sequence[Ask]) -> float:
        """The share of requests that have both; 0 of none."""
        return sum(ask.ttft <= self.ttft and ask.tpot <= self.tpot for ask in asks) / (len(asks) or 1)


@dataclass(frozen=True)
class Kind:
    """Log-normal lengths: means in tokens, and the standard deviations of their logarithms. """

    prompt: float
    output: float
    prompt_spread: float
    output_spread: float

    def draw(self, random: Random) -> tuple[int, int]:
        while True:
            prompt, output = (
                round(random.lognormvariate(math.log(mean) - spread**2 / 2, spread))
                for mean, spread in ((self.prompt, self.prompt_spread), (self.output, self.output_spread))
            )
            if 1 <= prompt <= LONGEST and 1 <= output <= 4096:
                return prompt, output


# The means of Azure's traces of 2023, conversation and code; and documents to be summarised. The spreads are chosen.
KINDS = {
    "conversation": Kind(1155, 211, 0.9, 0.9),
    "code": Kind(2048, 28, 0.9, 1.2),
    "long": Kind(8000, 200, 0.7, 0.7),
}
LENGTHS = (500, 2000, 8000)  # mean prompts; answers of 200
KINDS |= {str(length): Kind(length, 200, 0.5, 0.7) for length in LENGTHS}


@dataclass(frozen=True)
class Trial:
    """All inputs of a simulation, but the rate. load: of KINDS, or the path of a trace.

    Requests come for at least so many seconds, and there are at least so many.
    """

    load: str
    layout: Layout
    machine: Machine
    seed: int = 0
    seconds: float = 20.0
    count: int = 1000

    def asks(self, rate: float, limits: Limits) -> list[Ask]:
        """The answered requests at so many a second, without the first and the last tenth.

        None of them once it is certain that too few keep the limits: an overloaded system takes long to simulate.
        """
        jobs = arrivals(self.load, rate, max(self.count, round(rate * self.seconds)), self.seed)
        tenth = len(jobs) // 10
        counted = jobs[tenth : len(jobs) - tenth]
        hopeless = Hopeless(limits, counted)
        asks = Cluster(self.layout, self.machine, hopeless).run(jobs)[tenth : len(jobs) - tenth]
        return [] if hopeless.certain else asks


class Hopeless:
    """Told of first and last tokens, it says whether too many of the counted requests have missed the limits."""

    def __init__(self, limits: Limits, counted: Sequence[Job]):
        self._limits, self._counted, self._missed = limits, set(counted), set[Job]()
        self._most = (1 - SHARE) * len(counted) * (1 + 1e-9)

    @property
    def certain(self) -> bool:
        return len(self._missed) > self._most

    def __call__(self, ask: Ask) -> bool:
        late = ask.ttft > self._limits.ttft or (ask.last and ask.tpot > self._limits.tpot)
        if late and ask.job in self._counted:
            self._missed.add(ask.job)
        return self.certain


def arrivals(load: str, rate: float, count: int, seed: int) -> list[Job]:
    """Poisson. The same seed gives the same requests at every rate: they only come faster."""
    return [Job(when / rate, prompt, output) for when, prompt, output in _drawn(load, count, seed)]


@lru_cache(maxsize=16)
def _drawn(load: str, count: int, seed: int) -> list[tuple[float, int, int]]:
    """Whatever the count, the first ones are the same."""
    random = Random(f"{load} {seed}")
    kind, found = KINDS.get(load), None if load in KINDS else read_lengths(Path(load))
    now, drawn = 0.0, []
    for _ in range(count):
        now += random.expovariate(1.0)
        drawn.append((now, *(kind.draw(random) if kind else random.choice(found or []))))
    return drawn


@dataclass(frozen=True)
class Found:
    """For each of the limits: requests a second for each GPU, the highest of `runs` that were tried; 0: never kept."""

    rates: list[float]
    runs: int


def search(trial: Trial, limits: Sequence[Limits], folder: Path | None = None) -> Found:
    """Bisection over rates that are RATIO apart; every run counts for all limits. From the folder if it is there.

    limits: with one TTFT, the loosest first.
    """
    trace = b"" if trial.load in KINDS else Path(trial.load).read_bytes()
    return recalled(folder, f"{trial} {limits} ".encode() + trace, lambda: _search(trial, limits), Found)


def _search(trial: Trial, limits: Sequence[Limits]) -> Found:
    gpus = trial.layout.num_engines * trial.machine.server.num_gpus
    runs: dict[int, list[Ask]] = {}
    shares: dict[tuple[int, Limits], float] = {}
    found = []
    for one in limits:
        shares.update({(step, one): one.kept(asks) for step, asks in runs.items()})
        kept = [step for step in runs if shares[step, one] >= SHARE]
        low = max(kept, default=-1)
        high = min((step for step in runs if shares[step, one] < SHARE and step > low), default=STEPS)
        while high - low > 1:
            step = (low + high) // 2
            runs[step] = trial.asks(SLOWEST * RATIO**step * gpus, limits[0])
            shares[step, one] = one.kept(runs[step])
            low, high = (step, high) if shares[step, one] >= SHARE else (low, step)
        found.append(low)
    return Found([SLOWEST * RATIO**step if step >= 0 else 0.0 for step in found], len(runs))


def read_lengths(path: Path) -> list[tuple[int, int]]:
    """Tokens of prompts and answers, from an Azure LLM inference trace: TIMESTAMP,ContextTokens,GeneratedTokens."""
    wanted = "ContextTokens", "GeneratedTokens"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise TraceError(f"{path} is no text; a CSV file with {' and '.join(wanted)} is wanted") from None
    names = next(csv.reader(lines[:1]), [])
    if not set(wanted) <= set(names):
        raise TraceError(f"{path}, line 1: columns {' and '.join(wanted)} are wanted, not {', '.join(names) or 'none'}")
    places = [names.index(name) for name in wanted]
    found = [_lengths(path, number, row, places) for number, row in enumerate(csv.reader(lines[1:]), 2) if row]
    if not found:
        raise TraceError(f"{path}: no requests")
    return found


def _lengths(path: Path, number: int, row: list[str], places: list[int]) -> tuple[int, int]:
    cells = [row[place] if place < len(row) else "" for place in places]
    if not all(cell.isdecimal() and 1 <= int(cell) <= LONGEST for cell in cells):
        raise TraceError(f"{path}, line {number}: tokens from 1 to {LONGEST} are wanted, not {', '.join(cells)}")
    return int(cells[0]), int(cells[1])
