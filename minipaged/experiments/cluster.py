"""Several engines under one clock: each with whole requests, or some with the prompts and others with the rest.

    together    request -> engine -> answer
    apart       request -> engine for prompts -> link: keys and values -> engine for the rest -> answer

A request goes to the engine that has the fewest tokens of prompts to answer for, and so does what crosses a link.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

from minipaged.experiments.loads import Job
from minipaged.experiments.machine import Machine
from minipaged.experiments.paged import NO_LIMIT
from minipaged.experiments.serving import Ask, Engine


@dataclass(frozen=True)
class Layout:
    """Who does what: engines for whole requests; for prompts, and for the rest. budget: tokens a step."""

    together: int = 0
    prompts: int = 0
    rest: int = 0
    budget: int = 512
    chunked: bool = True

    @property
    def num_engines(self) -> int:
        return self.together + self.prompts + self.rest

    def build(self, machine: Machine) -> tuple[list[Engine], list[Engine]]:
        part = "prompt" if self.prompts else "all"
        fronts = [Engine(machine, self.budget, self.chunked, part) for _ in range(self.together + self.prompts)]
        return fronts, [Engine(machine, NO_LIMIT, part="rest") for _ in range(self.rest)]


class Cluster:
    """The clock. After `run`, every Ask has its times; not if `enough`, asked at first and last tokens, said so."""

    def __init__(self, layout: Layout, machine: Machine, enough: Callable[[Ask], bool] = lambda ask: False):
        self._machine, self._enough = machine, enough
        self.fronts, self.backs = layout.build(machine)
        self._events: list[tuple[float, int, Engine, int, Ask | None]] = []  # when, order, where, stride, who comes
        self._order = count()
        self._stopped = False

    def run(self, jobs: Sequence[Job]) -> list[Ask]:
        """jobs: in the order of arrival."""
        asks = [Ask(job) for job in jobs]
        coming = iter(asks)
        ask = next(coming, None)
        while (ask or self._events) and not self._stopped:
            if ask and (not self._events or ask.job.arrival <= self._events[0][0]):
                self._come(ask, chosen(self.fronts, ask), ask.job.arrival)
                ask = next(coming, None)
                continue
            now, _, engine, stride, sent = heappop(self._events)
            if sent:
                self._come(sent, engine, now)
            elif engine.stride == stride:
                self._over(engine, now)
        return asks

    def _put(self, when: float, engine: Engine, ask: Ask | None = None) -> None:
        heappush(self._events, (when, next(self._order), engine, engine.stride, ask))

    def _come(self, ask: Ask, engine: Engine, now: float) -> None:
        engine.submit(ask)
        if engine.idle:
            self._begin(engine, now)
        elif engine.steps > 1:
            self._put(engine.cut(now), engine)

    def _begin(self, engine: Engine, now: float) -> None:
        if (over := engine.begin(now)) is not None:
            self._put(over, engine)

    def _over(self, engine: Engine, now: float) -> None:
        begun, done = engine.finish()
        front = engine in self.fronts
        for ask in begun if front else ():
            ask.first = now
            self._stopped |= self._enough(ask)
        for ask in done:
            if front and self.backs and ask.job.output > 1:
                self._send(ask, engine, now)
            else:
                ask.last = now
                self._stopped |= self._enough(ask)
        self._begin(engine, now)

    def _send(self, ask: Ask, source: Engine, now: float) -> None:
        """Over the link, one after another."""
        source.link_free = max(now, source.link_free) + self._machine.moving_seconds(ask.job.prompt)
        self._put(source.link_free, chosen(self.backs, ask), ask)


def chosen(engines: Sequence[Engine], ask: Ask) -> Engine:
    """The one with the least to answer for; from now on with this request, too."""
    engine = min(engines, key=lambda engine: engine.load)
    engine.load += ask.job.prompt
    return engine
