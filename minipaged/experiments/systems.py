"""What a serving system is to the simulation; and the two that the paper compares itself with.

A system is asked again and again for its next iterations (`plan`), is told when they are over (`finish`), and says in
between what each slot of its memory is (`account`). How long they took is not its business.

    plan -> Work: k iterations with the same requests, until one ends or something else is to be decided
    finish -> the requests that have their answers now

FasterTransformer serves batches: those that wait are taken together, and run until the longest answer is complete.
Orca schedules by iteration: requests join and leave at every step. Both keep the keys and values of a request in one
piece, whose size is fixed when it comes in, cut by a buddy allocator.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from typing import Protocol

from minipaged.experiments.buddy import Buddy, next_power
from minipaged.experiments.loads import LONGEST, Job


@dataclass(frozen=True)
class Work:
    """Iterations that follow each other and differ in nothing but that contexts grow by a token each time."""

    iterations: int
    sequences: int  # in the batch, and each gets one token an iteration
    tokens: int  # computed in an iteration: of prompts, and one for each sequence beyond its prompt
    context: int  # tokens whose keys and values the first iteration reads
    growth: int = 0  # and how many more each that follows reads
    stored: int = 0  # and how many slots more hold tokens of requests that still need them
    moved_blocks: int = 0  # to CPU memory or back, before the first


KINDS = ("tokens", "reserved", "internal", "external")


@dataclass(frozen=True)
class Account:
    """Every slot of the memory under one name (paper, Figure 2); what they mean in bytes is one factor for all.

    tokens: hold a key and a value. reserved: empty, and this request will use it. internal: kept for a request that
    will not use it; pads too. external: of use to nobody: rounded up, in a hole that is too small, or not asked for.
    """

    tokens: float = 0
    reserved: float = 0
    internal: float = 0
    external: float = 0

    def must_be(self, total: int) -> None:
        parts = (self.tokens, self.reserved, self.internal, self.external)
        if sum(parts) != total or min(parts) < 0:
            raise AssertionError(f"{total} slots, but the account says {self}")


class System(Protocol):
    """One server. A request is known by the Job that came."""

    @property
    def block_size(self) -> int | None:
        """None: keys and values are contiguous."""

    def submit(self, job: Job) -> None: ...

    @property
    def num_waiting(self) -> int: ...

    @property
    def num_running(self) -> int:
        """Requests in the batch; those of `num_waiting` are not in it, neither are those that were preempted."""

    def plan(self) -> Work | None:
        """What is computed next, decided now; None if there is nothing to do."""

    def finish(self, iterations: int) -> list[Job]:
        """So many iterations of the plan are over, at most all: who is done."""

    def account(self) -> Account:
        """Of the first iteration that was planned. Its sum is the memory."""


# --- how much a contiguous piece has --------------------------------------------------------------------------------


def kept(job: Job) -> int:
    """Slots that the request will use: its last token is never computed, so it has none."""
    return job.prompt + job.output - 1


RESERVATIONS: dict[str, Callable[[Job], int]] = {
    "max": lambda job: LONGEST,
    "pow2": lambda job: min(LONGEST, job.prompt + next_power(job.output)),
    "oracle": kept,
}


@dataclass(slots=True)
class Running:
    """A request in Orca's batch."""

    job: Job
    pieces: list[tuple[int, int]]  # (start, slots) of each of its samples
    asked: int  # slots that it reserved for each; the allocator may have rounded them up


class Contiguous:
    """What the two have in common: a queue, and memory that is given out in pieces."""

    block_size = None

    def __init__(self, num_slots: int):
        self._memory = Buddy(num_slots)
        self._waiting: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        self._waiting.append(job)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)


class Orca(Contiguous):
    """Iteration-level scheduling; a contiguous piece for each request, by first come, first served.

    reserve: "max", "pow2" or "oracle": how many slots a request asks for. samples: sequences of a request; they are
    equally long, the prompt is computed for one of them and copied to the others at no cost, and nothing is shared.
    """

    def __init__(self, num_slots: int, reserve: str, samples: int = 1):
        super().__init__(num_slots)
        self._reserve, self._samples = RESERVATIONS[reserve], samples
        self._running: list[tuple[int, int, Running]] = []  # a heap: who ends first
        self._order = count()
        self._clock = 0  # iterations so far
        # Of all who run, kept up to date: slots that hold tokens, that will, that were asked for, that were given.
        self._stored = self._kept = self._asked = self._given = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    def plan(self) -> Work | None:
        old, context = len(self._running) * self._samples, self._stored
        prompts = self._admit()
        if not self._running:
            return None
        iterations = 1 if prompts else self._running[0][0] - self._clock
        self._stored += old  # who came in has stored its prompt, and nothing else in its first iteration
        size = len(self._running) * self._samples
        return Work(iterations, size, old + prompts, context + old, growth=size, stored=size)

    def _admit(self) -> int:
        """Let in who fits, in the order of arrival. Returns the tokens of their prompts."""
        prompts = 0
        while self._waiting:
            job = self._waiting[0]
            asked = self._reserve(job)
            pieces = self._allocate(asked)
            if pieces is None:
                break
            self._waiting.popleft()
            one = Running(job, pieces, asked)
            heappush(self._running, (self._clock + job.output, next(self._order), one))
            self._count(one, +1)
            self._stored += self._samples * job.prompt
            prompts += job.prompt
        return prompts

    def _allocate(self, asked: int) -> list[tuple[int, int]] | None:
        """A piece for each sample, or none at all."""
        pieces: list[tuple[int, int]] = []
        while len(pieces) < self._samples:
            piece = self._memory.allocate(asked)
            if piece is None:
                for taken in pieces:
                    self._memory.release(taken)
                return None
            pieces.append(piece)
        return pieces

    def _count(self, one: Running, sign: int) -> None:
        self._kept += sign * self._samples * kept(one.job)
        self._asked += sign * self._samples * one.asked
        self._given += sign * sum(slots for _, slots in one.pieces)

    def finish(self, iterations: int) -> list[Job]:
        self._clock += iterations
        self._stored += len(self._running) * self._samples * (iterations - 1)
        done = []
        while self._running and self._running[0][0] <= self._clock:
            one = heappop(self._running)[2]
            for piece in one.pieces:
                self._memory.release(piece)
            self._count(one, -1)
            self._stored -= self._samples * kept(one.job)
            done.append(one.job)
        return done

    def account(self) -> Account:
        return Account(
            self._stored,
            self._kept - self._stored,
            self._asked - self._kept,
            self._given - self._asked + self._memory.num_free,
        )


class FasterTransformer(Contiguous):
    """Static batches of the earliest requests, each with a piece for the longest that there can be.

    Prompts are padded to the longest of the batch, and the batch runs until its longest answer is complete. Then all
    have their answers, and the next batch begins.
    """

    def __init__(self, num_slots: int):
        super().__init__(num_slots)
        self._batch: list[tuple[Job, tuple[int, int]]] = []
        self._step = 0  # iterations of this batch so far

    @property
    def num_running(self) -> int:
        return len(self._batch)

    def plan(self) -> Work | None:
        if not self._batch:
            while self._waiting and (piece := self._memory.allocate(LONGEST)):
                self._batch.append((self._waiting.popleft(), piece))
            self._batch.sort(key=lambda member: member[0].output)
            self._step = 0
        if not self._batch:
            return None
        size, padded = len(self._batch), max(job.prompt for job, _ in self._batch)
        if self._step == 0:
            return Work(1, size, size * padded, 0)
        going = [job for job, _ in self._batch if job.output > self._step]
        iterations = going[0].output - self._step  # then the account changes
        return Work(iterations, size, size, size * (padded + self._step), growth=size, stored=len(going))

    def finish(self, iterations: int) -> list[Job]:
        self._step += iterations
        if self._step < self._batch[-1][0].output:
            return []
        done, self._batch = self._batch, []
        for _, piece in done:
            self._memory.release(piece)
        return [job for job, _ in done]

    def account(self) -> Account:
        """An answer that is complete waits for the others: what it keeps is of no use any more."""
        going = [job for job, _ in self._batch if job.output > self._step]
        tokens = sum(job.prompt + self._step for job in going)
        reserved = sum(map(kept, going)) - tokens
        internal = LONGEST * len(self._batch) - tokens - reserved
        return Account(tokens, reserved, internal, self._memory.num_free)
