"""What each request does when: a trace, cut into spans of time.

    queue       it has arrived, or has lost its memory, and waits
    prefill     tokens of its prompt are computed: a span for each chunk
    decode      its sequences get a token each, or more if guesses were right: one span for all such steps in a row
    recompute   what was computed before, and was dropped to make room
    swapped     its blocks are in the memory of the CPU
    loading     its blocks come from another engine
    running     more isn't known: a trace of version 1
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from minipaged.terminal.snapshot import request_of
from minipaged.viewer.state import State
from minipaged.viewer.trace import TraceStep

Span = tuple[str, str, float, float, dict[str, Any]]  # whose, what, from when to when in seconds, and more about it


@dataclass
class Clock:
    """has_times: whether the trace has any. last: when the last step ended."""

    has_times: bool = False
    last: float | None = None

    def span(self, step: TraceStep) -> tuple[float, float]:
        """From when to when the step was, in seconds; without times it is a millisecond."""
        if step.time is None:
            return (step.step - 1) / 1000, step.step / 1000
        self.has_times = True
        start = self.last or 0.0
        if step.seconds is not None:
            start = max(start, step.time - step.seconds)
        return min(start, step.time), step.time


@dataclass(frozen=True)
class Moment:
    """A step, when it began and ended, and the state before it."""

    step: TraceStep
    start: float
    end: float
    before: State


def moments(steps: Iterable[TraceStep], clock: Clock) -> Iterator[Moment]:
    """Of all steps. `clock` knows afterwards when the last one ended."""
    before: State = {"requests": {}}
    for step in steps:
        start, end = clock.span(step)
        clock.last = end
        yield Moment(step, start, end, before)
        before = step.state


@dataclass
class Open:
    """A span that goes on."""

    kind: str
    start: float
    end: float
    args: dict[str, Any] = field(default_factory=dict)


class Spans:
    """All spans of a run, made of its moments."""

    def __init__(self) -> None:
        self._done: list[Span] = []
        self._open: dict[str, Open] = {}
        self._most: dict[str, int] = {}  # up to which position a request was computed
        self._again: dict[str, int] = {}  # up to which one it is computed again
        self._prompts: dict[str, int] = {}

    def add(self, moment: Moment) -> None:
        """The next one."""
        step = moment.step
        self._prompts |= {name: one["prompt"] for name, one in step.state["requests"].items()}
        for name, when in step.arrived.items():
            self._begin(name, "queue", moment.start if step.time is None else min(when, moment.start))
        for name in step.did.get("admitted", ()):
            self._again[name] = self._most.get(name, 0)
        computed: dict[str, list[list[int]]] = {}
        for name, numbers in step.did.get("computed", {}).items():
            computed.setdefault(request_of(name), []).append(numbers)
        away = step.did.get("preempted", {})
        for name in {**moment.before["requests"], **step.state["requests"], **step.did.get("finished", {}), **computed}:
            if name in computed:
                kind, args = self._computed(name, computed[name])
                self._compute(name, kind, moment, args)
            else:
                self._rest(name, moment, away.get(name))
        for name in step.did.get("finished", {}):
            self._end(name, moment.end)

    def _computed(self, name: str, rows: list[list[int]]) -> tuple[str, dict[str, Any]]:
        first, end = min(row[0] for row in rows), max(row[0] + row[1] for row in rows)
        tokens, guesses = sum(row[1] for row in rows), sum(row[2] for row in rows)
        args = {"tokens": tokens, "from": first, "to": end} | ({"guesses": guesses} if guesses else {})
        self._most[name] = max(end, self._most.get(name, 0))
        if first >= self._prompts.get(name, end) and all(row[1] == 1 for row in rows):
            return "decode", args
        return "recompute" if first < self._again.get(name, 0) else "prefill", args

    def _compute(self, name: str, kind: str, moment: Moment, args: dict[str, Any]) -> None:
        now = self._open.get(name)
        if kind == "decode" and now and now.kind == "decode":
            now.end, now.args["last step"], now.args["to"] = moment.end, moment.step.step, args["to"]
            now.args["tokens"] += args["tokens"]
            return
        self._begin(name, kind, moment.start, {"step": moment.step.step, **args})
        self._open[name].end = moment.end
        if kind == "decode":
            self._open[name].args["last step"] = moment.step.step

    def _rest(self, name: str, moment: Moment, preempted: str | None) -> None:
        """It computes nothing in this step."""
        now, request = self._open.get(name), moment.step.state["requests"].get(name)
        if request is None:
            if now and now.kind != "running":
                self._end(name, moment.start)
            return
        if preempted:
            kind = "swapped" if preempted == "swap" else "queue"
        elif request["state"] == "running":
            unknown = "computed" not in moment.step.did and not request["prompt"]
            kind = "loading" if name in moment.step.did.get("loading", {}) else "running" if unknown else ""
        else:
            kind = "swapped" if request["state"] == "swapped" else "queue"
        if preempted or not now or now.kind != kind:
            self._begin(name, kind, moment.start)

    def _begin(self, name: str, kind: str, when: float, args: dict[str, Any] | None = None) -> None:
        self._end(name, when)
        if kind:
            self._open[name] = Open(kind, when, when, args or {})

    def _end(self, name: str, when: float) -> None:
        """What is computed ends with its step; what waits, waits until now."""
        if now := self._open.pop(name, None):
            end = now.end if now.kind in ("prefill", "decode", "recompute") else max(when, now.start)
            self._done.append((name, now.kind, now.start, end, now.args))

    def ended(self, when: float) -> list[Span]:
        """All of them; what still goes on ends then."""
        for name in [*self._open]:
            self._end(name, when)
        return self._done
