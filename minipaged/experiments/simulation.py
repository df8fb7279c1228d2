"""The clock: requests arrive, a system decides, and a cost model says how long it takes.

Nothing is computed, and no time passes but the simulated. Between two decisions iterations differ only in that
contexts grow, so they are taken in one stride: a day of serving takes seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from minipaged.experiments.hardware import HOST_PER_REQUEST, Server
from minipaged.experiments.loads import Job
from minipaged.experiments.systems import KINDS, Account, System, Work


@dataclass
class Outcome:
    """What came of a run. Means are over the time in which something runs, until the last request has come."""

    latencies: list[float] = field(default_factory=list)  # seconds from arrival to the end, by tokens of the answer
    mean_batch: float = 0.0  # requests in the batch
    shares: dict[str, float] = field(default_factory=dict)  # percent of the slots: tokens, reserved, internal, external
    ends: list[float] = field(default_factory=list)  # seconds at which requests were done, in their order
    num_iterations: int = 0

    @property
    def normalized_latency(self) -> float:
        """Seconds per token of the answer, mean over requests (paper, section 6.1)."""
        return sum(self.latencies) / len(self.latencies)

    @property
    def throughput(self) -> float:
        """Requests a second, while the second and third quarter of all were answered: without start and end."""
        count, quarter = len(self.ends), len(self.ends) // 4
        seconds = self.ends[3 * quarter] - self.ends[quarter]
        return 2 * quarter / seconds if seconds else count / self.ends[-1]  # so few that they end at once


class Durations:
    """Seconds that iterations take."""

    def __init__(self, server: Server, block_size: int | None):
        self._server, self._block_size = server, block_size
        self._per_context = server.context_seconds(block_size)
        self._fixed: dict[int, float] = {}

    def first(self, work: Work, num_requests: int) -> float:
        if work.tokens not in self._fixed:
            self._fixed[work.tokens] = self._server.matrix_seconds(work.tokens)
        return self._fixed[work.tokens] + num_requests * HOST_PER_REQUEST + work.context * self._per_context

    def moving(self, work: Work) -> float:
        """Before the first iteration."""
        return self._server.swap_seconds(work.moved_blocks, self._block_size or 1) if work.moved_blocks else 0.0

    def growth(self, work: Work) -> float:
        """By how much each iteration is longer than the one before."""
        return work.growth * self._per_context


def simulate(system: System, jobs: list[Job], server: Server) -> Outcome:
    """Let all requests come and be answered. AssertionError if an account does not add up."""
    durations, outcome, meter = Durations(server, system.block_size), Outcome(), Meter(server.num_slots)
    now, coming = 0.0, 0  # seconds; who comes next
    last = jobs[-1].arrival
    while True:
        while coming < len(jobs) and jobs[coming].arrival <= now:
            system.submit(jobs[coming])
            coming += 1
        work = system.plan()
        if work is None:
            if coming == len(jobs):
                if system.num_waiting:
                    raise ValueError(f"{system.num_waiting} requests can never fit into {server.num_slots} slots")
                break
            now = jobs[coming].arrival
            continue
        first = durations.first(work, system.num_running)
        moving, growth, k = durations.moving(work), durations.growth(work), work.iterations
        if k > 1 and coming < len(jobs) and not system.num_waiting:
            k = min(k, until(jobs[coming].arrival - now - moving, first, growth))  # it may join then
        seconds = moving + k * first + growth * k * (k - 1) / 2
        if now <= last:
            meter.add(system.account(), system.num_running, work.stored * (k - 1) / 2, seconds)
        now += seconds
        outcome.num_iterations += k
        done = system.finish(k)
        outcome.latencies += [(now - job.arrival) / job.output for job in done]
        outcome.ends += [now] * len(done)
    outcome.mean_batch, outcome.shares = meter.mean_batch(), meter.shares()
    return outcome


def until(seconds: float, first: float, growth: float) -> int:
    """The first k for which k iterations take at least so long: k first + growth k (k - 1) / 2 >= seconds."""
    half, seconds = growth / 2, max(0.0, seconds)
    if half == 0:
        return max(1, math.ceil(seconds / first))
    return max(1, math.ceil((half - first + math.sqrt((first - half) ** 2 + 4 * half * seconds)) / (2 * half)))


class Meter:
    """Means over time of the batch and of the account."""

    def __init__(self, num_slots: int):
        self._num_slots = num_slots
        self._seconds = self._batch = 0.0
        self._sums = [0.0, 0.0, 0.0, 0.0]

    def add(self, account: Account, batch: int, more: float, seconds: float) -> None:
        """more: slots that the account calls reserved, and that on average hold a token during these seconds."""
        account.must_be(self._num_slots)
        self._seconds += seconds
        self._batch += batch * seconds
        sums = self._sums
        sums[0] += (account.tokens + more) * seconds
        sums[1] += (account.reserved - more) * seconds
        sums[2] += account.internal * seconds
        sums[3] += account.external * seconds

    def mean_batch(self) -> float:
        return self._batch / self._seconds

    def shares(self) -> dict[str, float]:
        """Percent of all slots."""
        whole = self._num_slots * self._seconds / 100
        return {kind: part / whole for kind, part in zip(KINDS, self._sums, strict=True)}
