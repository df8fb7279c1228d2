"""One moment of an engine as an object that JSON can hold, and what changes from one to the next.

The same object is what the server tells its page (server/live.py), what a trace keeps (trace.py), and what the page
draws (page/). TRACE.md says what stands in it. It is made anew for every moment; what is kept or sent is a merge patch
(RFC 7386): what changed, and null for what is gone.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from minipaged.memory import MemoryUsage
from minipaged.terminal.snapshot import Observer, Snapshot, Table, guesses, letters

if TYPE_CHECKING:  # a trace is read without PyTorch
    from minipaged.memory import KVCacheManager
    from minipaged.requests.request import Request
    from minipaged.scheduling.plan import StepOutput, StepPlan
    from minipaged.scheduling.scheduler import Scheduler

MOST_BLOCKS = 4096  # of larger pools it isn't told which block is found after which

NAME = re.compile(r"[A-Z]+[0-9]*|kept[0-9]+")  # of a request, a sequence, or what is kept for another engine

State = dict[str, Any]


class Watched(Protocol):
    """What there must be to look at: an engine has it, and so has a scheduler under test."""

    memory: KVCacheManager
    scheduler: Scheduler


class Eye:
    """Looks at an engine between two steps. `follow` must hear of every step, after it.

    step: the last one, and how many sequences and tokens it computed. events: what it did to the memory, in words.
    known: the blocks that can be found again, each with the one that it follows; evicted: those that could be found
    before the last step, and were taken for others in it. Of very large pools neither is told.
    """

    def __init__(self, engine: Watched, step: int = 0):
        self._engine, self.observer = engine, Observer(engine)  # type: ignore[arg-type]
        self.step: State = {"number": step, "sequences": 0, "tokens": 0}
        self.events: list[str] = []
        self.num_drawn = 0  # tokens, since it looks
        self.num_finished = 0
        self._there: list[Request] = self.observer.came
        self._came: list[Request] = []
        self.known, self.evicted = self._known_blocks(), list[int]()
        self._last: int | None = None  # step
        self._num_evicted = engine.memory.usage().evicted

    def follow(self, plan: StepPlan, output: StepOutput) -> None:
        self.events = self.observer.follow(plan, output)
        self.num_drawn += len(output.candidates)
        self.num_drawn += sum(len(sample) for samples in output.tokens.values() for sample in samples)
        self._came, self._there = self._there + self.observer.came, []
        self.num_finished += len(self.observer.gone)
        self.step = {"number": plan.step, "sequences": len(plan.sequences), "tokens": plan.num_tokens}
        self.evicted = self._evictions(plan)
        self.known = self._known_blocks()

    def did(self, plan: StepPlan, output: StepOutput) -> State:
        """What the step did that was just followed: see TRACE.md. What is empty isn't there."""
        names, requests = self.observer.names, self.observer.requests
        told = {
            "computed": _computed(plan, names),
            "admitted": [requests[i] for i in plan.admitted],
            "found": {requests[i]: tokens for i, tokens in _found(plan, self._engine.memory.block_size).items()},
            "preempted": {requests[i]: how for i, how in plan.preempted},
            "resumed": [requests[i] for i in plan.resumed],
            "finished": {letters(one.arrival): _reasons(one) for one in self.observer.gone},
            "copies": plan.copies,
            "swap_out": plan.swap_out,
            "swap_in": plan.swap_in,
            "freed": plan.freed,
            "evicted": self.evicted,
            "guessed": guesses(plan, output, names),
            "reached": _reached(plan, output, names),
            "loading": {requests[load.request_id]: load.blocks for load in plan.loads},
            "errors": {names[i]: words for i, words in output.errors.items()},
        }
        return {name: value for name, value in told.items() if value}

    def arrivals(self) -> dict[str, float]:
        """When those arrived that were not there before the last step, in seconds of `time.monotonic`."""
        return {letters(one.arrival): one.metrics.arrival_time for one in self._came}

    def _evictions(self, plan: StepPlan) -> list[int]:
        """Of the blocks that lost what they held, those that could be found until then, and were taken for others.

        After a reset, or a step that was broken off, all have lost it.
        """
        before, self._num_evicted = self._num_evicted, self._engine.memory.usage().evicted
        last, self._last = self._last, plan.step
        broken_off = last is not None and plan.step != last + 1
        return [block for block in plan.freed if block in self.known and self._num_evicted > before and not broken_off]

    def _known_blocks(self) -> dict[int, int | None]:
        memory = self._engine.memory
        return memory.cache.parents() if memory.cache and memory.num_blocks <= MOST_BLOCKS else {}

    def state(self) -> State:
        """Of this moment: see TRACE.md."""
        snapshot, prefixes = self.observer.snapshot(), self._engine.scheduler.admission.prefixes
        usage = asdict(snapshot.usage)
        del usage["waste_percent"]  # the others say it
        return {
            "step": self.step,
            "usage": usage,
            "num_drawn": self.num_drawn,
            "num_finished": self.num_finished,
            "num_preemptions": snapshot.num_preemptions,
            "prefixes": {"queried": prefixes.queried, "found": prefixes.found},
            "requests": self._requests(),
            "tables": {
                table.name: {"tokens": table.num_tokens, "blocks": table.blocks, "swapped": table.swapped}
                for table in snapshot.tables
            },
            "cached": dict.fromkeys(map(str, snapshot.cached), 1),
            "index": {str(block): -1 if at is None else at for block, at in self.known.items()},
        }

    def _requests(self) -> State:
        scheduler = self._engine.scheduler
        queues = {"running": scheduler.running, "waiting": scheduler.waiting, "swapped": scheduler.swapped}
        return {
            letters(request.arrival): {
                "id": request.request_id, "state": state, "prompt": len(request.prompt_token_ids),
                "output": request.num_output_tokens, "sequences": len(request.live), "most": request.max_tokens,
            }
            for state, requests in queues.items() for request in requests
        }  # fmt: skip


def _computed(plan: StepPlan, names: dict[int, str]) -> dict[str, list[int]]:
    """By sequence: from which position on, how many tokens that were sure, and how many guesses, those of branches too.

    A branch computes the newest token once more, which isn't counted.
    """
    computed: dict[str, list[int]] = {}
    for s in plan.sequences:
        numbers = computed.setdefault(names[s.seq_id if s.branch_of is None else s.branch_of], [s.start, 0, 0])
        numbers[1] += s.num_own if s.branch_of is None else 0
        numbers[2] += s.num_drafts + s.num_to_draft
    return computed


def _reached(plan: StepPlan, output: StepOutput, names: dict[int, str]) -> dict[str, int]:
    """By sequence that had guesses: up to which position the row was computed whose memory it keeps, wrong ones too."""
    ends = {s.seq_id: s.start + len(s.slots) for s in plan.sequences}
    rows = [s for s in plan.sequences if s.num_drafts or s.num_to_draft]
    guessing = {s.seq_id if s.branch_of is None else s.branch_of for s in rows}
    return {names[i]: ends[output.winners.get(i, i)] for i in sorted(guessing)}


def _found(plan: StepPlan, block_size: int) -> dict[str, int]:
    """By the id of a request that was admitted: how many of its tokens were in memory already."""
    starts = {load.request_id: load.first * block_size for load in plan.loads}
    for s in plan.sequences:
        starts[s.request_id] = max(s.start, starts.get(s.request_id, 0))
    return {i: starts[i] for i in plan.admitted if starts.get(i)}


def _reasons(request: Request) -> str:
    """Why a request ended; of a search that is over, nothing."""
    return ", ".join(sorted({seq.finish_reason or "" for seq in request.sequences}))


def snapshot_of(state: State) -> Snapshot:
    """What draw.py draws. KeyError or TypeError if it is no state; a reader may rely on names to be names."""
    if wrong := [name for name in (*state["tables"], *state["requests"]) if not NAME.fullmatch(name)]:
        raise KeyError(wrong[0])
    usage = MemoryUsage(**{**state["usage"], "waste_percent": waste_of(state["usage"])})
    tables = [Table(name, one["tokens"], one["blocks"], one["swapped"]) for name, one in state["tables"].items()]
    queues = {which: [name for name, one in state["requests"].items() if one["state"] == which]
              for which in ("running", "waiting", "swapped")}  # fmt: skip
    cached = [int(block) for block in state["cached"]]
    return Snapshot(usage, tables, **queues, num_preemptions=state["num_preemptions"], cached=cached)


def waste_of(usage: State) -> float:
    """Empty slots of the blocks in use, in percent."""
    slots = usage["used"] * usage["block_size"]
    return 100 * (slots - usage["tokens_stored"]) / slots if slots else 0.0


def merge_patch(old: State, new: State) -> State:
    """What makes `new` of `old`, by RFC 7386. Neither has a null.

    >>> merge_patch({"a": {"b": 1, "c": 2}, "d": [3]}, {"a": {"b": 1, "c": 4, "e": {}}, "f": 5})
    {'a': {'c': 4, 'e': {}}, 'f': 5, 'd': None}
    """
    patch: State = {}
    for name, value in new.items():
        before = old.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            if inner := merge_patch(before, value):
                patch[name] = inner
        elif value != before:
            patch[name] = value
    return patch | {name: None for name in old if name not in new}


def apply_patch(state: State, patch: State) -> State:
    """What `merge_patch` was made of. The old state stays as it is, and what stays the same is shared with the new.

    >>> apply_patch({"a": {"b": 1, "c": 2}, "d": [3]}, {"a": {"c": 4}, "d": None})
    {'a': {'b': 1, 'c': 4}}
    """
    state = dict(state)
    for name, value in patch.items():
        if value is None:
            state.pop(name, None)
        elif isinstance(value, dict):
            before = state.get(name)
            state[name] = apply_patch(before if isinstance(before, dict) else {}, value)
        else:
            state[name] = value
    return state
