"""A trace as Chrome's trace events, which ui.perfetto.dev and chrome://tracing draw.

A process for each run. In it a thread for the engine, with a slice for each step, and one for each request, with slices
for what it waits for and what is computed: see spans.py. Counters tell the account, and instants what happened at once.
Everything is in microseconds; where a trace knows no times, a step is a millisecond, and the process's name says so.

The format: "Trace Event Format", Google, 2016.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minipaged.terminal.snapshot import request_of
from minipaged.viewer.spans import Clock, Moment, Spans, moments
from minipaged.viewer.state import State, waste_of
from minipaged.viewer.trace import TraceError, Watch, read_trace, unwatched, write

ENGINE = 1  # its thread; those of the requests follow in the order of arrival
NO_TIMES = " (no times are known: a step is a millisecond)"
Event = dict[str, Any]


def write_perfetto(traces: Sequence[str | Path], path: Path, watch: Watch = unwatched) -> None:
    """TraceError if a file is no trace, or none is written. Nothing is written before all traces were read."""
    events = [event for number, trace in enumerate(traces, 1) for event in events_of(trace, number, watch)]
    lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
    write(path, "the timeline", f'{{"displayTimeUnit":"ms","traceEvents":[\n{lines}\n]}}\n')


def events_of(trace: str | Path, pid: int = 1, watch: Watch = unwatched) -> list[Event]:
    """All events of a run, those of no time first, the others as time goes."""
    header, steps = read_trace(trace, watch)
    clock, spans, events, labels = Clock(), Spans(), list[Event](), dict[str, str]()
    for moment in moments(steps, clock):
        labels |= {name: _label(name, one) for name, one in moment.step.state["requests"].items() if name not in labels}
        spans.add(moment)
        events += [*_step(moment), *_counters(moment), *_instants(moment)]
    if clock.last is None:
        raise TraceError(f"{trace} has no steps: there is no timeline")
    for name, kind, start, end, args in spans.ended(clock.last):
        labels.setdefault(name, name)
        what = {"ph": "X", "name": kind, "cat": "request", "who": name, "args": args}
        events.append({**what, "ts": start, "dur": end - start})
    tids = {name: number for number, name in enumerate(sorted(labels, key=_arrival), ENGINE + 1)}
    title = header.get("title") or Path(trace).stem
    title = f"{title}, {header['model']}{'' if clock.has_times else NO_TIMES}"
    first = min(event["ts"] for event in events)
    named = [*_meta("process", title, pid, ENGINE), *_meta("thread", "the engine", pid, ENGINE)]
    named += [event for name, tid in tids.items() for event in _meta("thread", labels[name], pid, tid)]
    return named + [_placed(event, first, pid, tids) for event in sorted(events, key=lambda event: event["ts"])]


def _placed(event: Event, first: float, pid: int, tids: dict[str, int]) -> Event:
    """In whole nanoseconds from the beginning, and on its thread."""
    who = event.pop("who", "")
    event["ts"] = round(1e6 * (event["ts"] - first), 3)
    if "dur" in event:
        event["dur"] = round(1e6 * event["dur"], 3)
    return {**event, "pid": pid, "tid": tids.get(who, ENGINE)}


def _meta(what: str, name: str, pid: int, tid: int) -> Iterator[Event]:
    where = {"ph": "M", "pid": pid, "tid": tid}
    yield {**where, "name": f"{what}_name", "args": {"name": name}}
    yield {**where, "name": f"{what}_sort_index", "args": {"sort_index": tid if what == "thread" else pid}}


def _label(name: str, request: State) -> str:
    """What a request's thread is called."""
    if not request["prompt"]:
        return name  # version 1 knows no more
    return f"{name}: {request['id']}, {request['prompt']} prompt tokens, up to {request['most']} more"


def _arrival(name: str) -> tuple[int, str]:
    return len(name), name


def _step(moment: Moment) -> Iterator[Event]:
    step = moment.step
    sizes = step.state["step"]
    args = {"tokens": sizes["tokens"], "sequences": sizes["sequences"], "events": step.events}
    yield {"ph": "X", "name": f"step {step.step}", "cat": "step", "ts": moment.start, "dur": moment.end - moment.start,
           "args": args}  # fmt: skip


def _counters(moment: Moment) -> Iterator[Event]:
    """The account after the step; and the tokens that are computed in it, from its beginning on."""
    usage, tokens = moment.step.state["usage"], moment.step.state["step"]["tokens"]
    account = {
        "blocks used": usage["used"], "blocks shared": usage["shared"], "blocks cached": usage["cached"],
        "CPU blocks used": usage["cpu_used"], "waste, %": round(waste_of(usage), 1),
    }  # fmt: skip
    yield {"ph": "C", "name": "tokens in a step", "ts": moment.start, "args": {"tokens": tokens}}
    for name, value in account.items():
        yield {"ph": "C", "name": name, "ts": moment.end, "args": {"value": value}}


def _instants(moment: Moment) -> Iterator[Event]:
    """What happened at once: when the step began, or, for what came of it, at its end."""
    did = moment.step.did

    def at(when: float, name: str, who: str = "", **args: Any) -> Event:
        return {"ph": "i", "s": "t", "name": name, "cat": "event", "ts": when, "who": who, "args": args}

    for name, how in did.get("preempted", {}).items():
        yield at(moment.start, "swapped out to make room" if how == "swap" else "dropped to make room", name)
    for name, tokens in did.get("found", {}).items():
        yield at(moment.start, f"{tokens} tokens found", name, tokens=tokens)
    for kind, what in (("copies", "copied on write"), ("evicted", "evicted")):
        if blocks := did.get(kind):
            yield at(moment.start, f"{len(blocks)} {what}", blocks=blocks)
    for name, reason in did.get("finished", {}).items():
        yield at(moment.end, f"finished: {reason}" if reason else "finished", name)
    for name, (guessed, right, _) in did.get("guessed", {}).items():
        yield at(moment.end, f"{name}: {right} of {guessed} guesses right", request_of(name))
    for name, words in did.get("errors", {}).items():
        yield at(moment.end, f"error: {words}", request_of(name))
