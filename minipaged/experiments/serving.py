"""An engine of today in the simulation: the package's Scheduler and KVCacheManager, with its budget and its chunks.

As in paged.py, the scheduler is asked only when there is something to decide; between two decisions the steps differ
in nothing but that contexts grow, and are taken in one stride. The token that needs a new block is booked by the
scheduler, the others lie in blocks that are there, and are booked behind it (`_next_block`).
tests/test_experiments_goodput.py compares with a scheduler that is asked for every token.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import count

from minipaged.experiments.loads import Job
from minipaged.experiments.machine import Machine
from minipaged.experiments.paged import InformedScheduler
from minipaged.experiments.simulation import until
from minipaged.memory import KVCacheManager
from minipaged.requests.request import Request
from minipaged.requests.sampling_params import SamplingParams
from minipaged.scheduling.plan import StepOutput, StepPlan

BLOCK = 256  # tokens: so seldom is the scheduler asked. Attention pays for smaller ones: see machine.py
MAX_SEQS = 256  # that run in an engine at a time; vLLM's default on an H100 is of this order
NEVER = -1


@dataclass(slots=True, eq=False)
class Ask:
    """A request on its way. first, last: seconds at which the first and the last token of its answer were there."""

    job: Job
    first: float = 0.0
    last: float = 0.0

    @property
    def ttft(self) -> float:
        return self.first - self.job.arrival

    @property
    def tpot(self) -> float:
        """Seconds per token after the first; 0 if there is none."""
        return (self.last - self.first) / (self.job.output - 1) if self.job.output > 1 else 0.0


@dataclass(slots=True, eq=False)
class Seat:
    """A request in an engine. Steps are counted from the start of the run."""

    ask: Ask
    request: Request
    prompt: int
    output: int  # tokens that this engine makes
    came: int = NEVER  # the step that computed its prompt
    had: int = 0  # tokens of the answer that there were before it: it was preempted, and is computed again
    booked: int = 0  # slots that it can write to without asking
    due: int = NEVER  # the step that needs a new block
    end: int = NEVER  # the last one

    def made(self, clock: int) -> int:
        """Tokens of the answer when step `clock` begins."""
        return self.had + (clock - self.came if self.came != NEVER else 0)

    def stored(self, clock: int) -> int:
        return self.prompt + self.made(clock) - 1


class Engine:
    """One engine. budget: tokens a step, at most. chunked: whether prompts are cut.

    part: "all" of a request; "prompt", up to the first token; or the "rest", for which it gets keys and values.
    """

    def __init__(self, machine: Machine, budget: int, chunked: bool = True, part: str = "all"):
        num_blocks = machine.server.num_slots // BLOCK
        self.machine, self._part = machine, part
        self.memory = KVCacheManager(num_blocks, BLOCK)
        self.scheduler = InformedScheduler(
            self.memory, min(MAX_SEQS, budget), budget, "recompute", chunked_prefill=chunked
        )
        self.load = 0  # tokens of prompts of all requests that are here
        self.link_free = 0.0  # seconds from which on what it made can be sent
        self.stride = 0  # counts what was begun, so that an end that was put off can be told from the real one
        self._params = SamplingParams()
        self._seats: dict[str, Seat] = {}
        self._prompts: dict[str, Seat] = {}  # under way
        self._due: dict[int, list[Seat]] = defaultdict(list)
        self._ends: dict[int, list[Seat]] = defaultdict(list)
        self._arrivals = count()
        self._clock = self._rows = self._stored = 0  # steps so far; who makes tokens, and what they have in memory
        self._stirred = False  # somebody came or went since the scheduler looked at those who wait
        self._began = self._first = self._growth = 0.0
        self.steps = 0  # of the stride; 0: idle

    @property
    def idle(self) -> bool:
        return not self.steps

    def submit(self, ask: Ask) -> None:
        """ValueError if it could never fit."""
        prompt, output = ask.job.prompt, ask.job.output
        if self._part == "prompt":
            output = 1
        if self._part == "rest":  # the first token is there, and what was before it is in memory
            prompt, output = prompt + 1, output - 1
        number = next(self._arrivals)
        request = Request(str(number), number, [0] * prompt, self._params, output + 1)  # it ends when we say so
        self.scheduler.add(request)
        self._seats[request.request_id] = Seat(ask, request, prompt, output)
        self._stirred = True

    # --- one stride -------------------------------------------------------------------------------------------------

    def begin(self, now: float) -> float | None:
        """Decide what comes next. Returns the seconds at which it is over; None if there is nothing to do."""
        clock = self._clock
        due = [seat for seat in dict.fromkeys(self._due.pop(clock, ())) if seat.due == clock]
        if due or self._prompts or self._stirred:
            self._schedule(due)
        else:
            self._first = self.machine.seconds(self._rows, self._rows, self._stored, 0)
        if not self._rows and not self._prompts:
            self.steps = 0
            return None
        self._began, self._growth, self.steps = now, self._rows * self.machine.per_context, 1
        while not self._prompts and not (clock + self.steps in self._due or clock + self.steps - 1 in self._ends):
            self.steps += 1
        self.stride += 1
        return self._over()

    def _over(self) -> float:
        k = self.steps
        return self._began + k * self._first + self._growth * k * (k - 1) / 2

    def cut(self, now: float) -> float:
        """Somebody came: the stride ends with the step that is under way. Returns when."""
        self.steps = min(self.steps, until(now - self._began, self._first, self._growth))
        self.stride += 1
        return self._over()

    def _schedule(self, due: list[Seat]) -> None:
        scheduler, clock = self.scheduler, self._clock
        for seat in due:
            self._next_block(seat)
        asking = [seat.request for seat in (*due, *self._prompts.values())]
        scheduler.due = sorted(asking, key=lambda request: request.arrival)
        scheduler.num_seqs = self._rows + len(self._prompts)
        plan = scheduler.schedule()
        scheduler.update(plan, StepOutput())
        for name, _ in plan.preempted:
            self._leave(self._seats[name])
        for name in plan.admitted:
            self._prompts[name] = self._seats[name]
        fresh, context, pairs = self._compute(plan)
        self._first = self.machine.seconds(
            self._rows + fresh, self._rows + len(self._prompts), self._stored + context, pairs
        )
        for seat in due:
            self._book(seat)
        self._stirred = False
        done = [seat for seat in self._prompts.values() if not seat.request.live[0].num_uncomputed]
        for seat in done:
            seat.came, seat.end = clock, clock + seat.output - seat.had - 1
            self._ends[seat.end].append(seat)
            self._book(seat)

    def _compute(self, plan: StepPlan) -> tuple[int, int, int]:
        """What a step has of prompts: tokens computed, tokens read, and pairs of them."""
        fresh = context = pairs = 0
        for s in plan.sequences:
            seat = self._prompts.get(s.request_id)
            if seat is None:
                continue
            tokens = len(s.token_ids)
            if self._part == "rest" and not seat.had:  # all but the last came over the link
                tokens = int(s.start + tokens == seat.prompt)
            start = s.start + len(s.token_ids) - tokens
            fresh, context, pairs = fresh + tokens, context + start, pairs + tokens * (2 * start + tokens) // 2
        return fresh, context, pairs

    def _next_block(self, seat: Seat) -> None:
        """Its last block is full. What was written since the scheduler was asked is booked; it needs no new block."""
        seq = seat.request.live[0]
        self.memory.append({seq.seq_id: seat.booked - seq.num_computed_tokens})
        seq.num_computed_tokens = seat.booked
        seq.output_token_ids = [0] * (seat.booked + 1 - seat.prompt)

    def _book(self, seat: Seat) -> None:
        """It has a slot for its next token, and the rest of that block."""
        seq = seat.request.live[0]
        if not seq.in_memory:
            return  # it had to make way
        tokens = seq.num_computed_tokens
        seq.output_token_ids = [0] * (tokens + 1 - seat.prompt)  # it has one token to compute, whenever one looks
        seat.booked = tokens + -tokens % BLOCK
        seat.due = seat.came + 1 + seat.booked - seat.prompt - seat.had
        if seat.due > seat.end:
            seat.due = NEVER
        else:
            self._due[seat.due].append(seat)

    def _leave(self, seat: Seat) -> None:
        """It was preempted: its memory was dropped, and its tokens are computed again."""
        if self._prompts.pop(seat.request.request_id, None) is None:
            self._rows -= 1
            self._stored -= seat.stored(self._clock)
            self._ends[seat.end].remove(seat)
        seat.had = seat.made(self._clock)
        seat.came = seat.due = seat.end = NEVER
        seat.request.live[0].output_token_ids = [0] * seat.had

    def finish(self) -> tuple[list[Ask], list[Ask]]:
        """The stride is over: who has its first token here, and who its last."""
        self._clock += self.steps
        self._stored += self._rows * self.steps
        begun = []
        for name, seat in list(self._prompts.items()):
            if seat.came != NEVER:
                del self._prompts[name]
                self._rows += 1
                self._stored += seat.stored(self._clock)
                self._stirred = True
                if not seat.had:
                    begun.append(seat.ask)
        done = self._ends.pop(self._clock - 1, [])
        for seat in done:
            self.scheduler.finish(seat.request, seat.request.live[0], "length")
            del self._seats[seat.request.request_id]
            self._rows -= 1
            self._stored -= seat.stored(self._clock)
            self.load -= seat.ask.job.prompt
        self._stirred |= bool(done)
        return begun, [seat.ask for seat in done]
