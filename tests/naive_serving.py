"""The systems of minipaged/experiments as plain as they can be: one iteration at a time, and nothing kept up to date.

Each is a System with the Work of one iteration, which it counts anew, as it does the account: slot by slot.
`moments` writes down what a system does, iteration by iteration, so that it can be compared with another.
"""

from collections import Counter
from dataclasses import dataclass, replace

from minipaged.experiments import systems
from minipaged.experiments.loads import Job
from minipaged.experiments.systems import Account, System, Work
from minipaged.memory import PREFIX_CACHES, KVCacheManager
from minipaged.requests.request import Request
from minipaged.requests.sampling_params import SampledToken, SamplingParams
from minipaged.scheduling.plan import StepOutput
from minipaged.scheduling.scheduler import Scheduler

NO_LIMIT = 1 << 40


# --- memory in one piece ----------------------------------------------------------------------------------------


def naive_holes(free: list[bool]) -> dict[int, list[int]]:
    """{size: starts} of the largest pieces of free slots whose size is a power of two and divides their start."""
    found: dict[int, list[int]] = {}
    start = 0
    while start < len(free):
        size = next(
            (s for s in (1 << bit for bit in reversed(range(len(free).bit_length())))
             if start % s == 0 and start + s <= len(free) and all(free[start : start + s])),
            0,
        )  # fmt: skip
        if size:
            found.setdefault(size, []).append(start)
        start += size or 1
    return {size: found[size] for size in sorted(found)}


class PaintedBuddy:
    """A row of slots that are free or not; a piece comes out of the smallest hole that will do, the first of these."""

    def __init__(self, total: int):
        self.free = [True] * total

    def allocate(self, size: int) -> tuple[int, int] | None:
        slots = 1
        while slots < size:
            slots *= 2
        for hole, starts in naive_holes(self.free).items():
            if hole >= slots:
                self.paint((starts[0], slots), False)
                return starts[0], slots
        return None

    def paint(self, piece: tuple[int, int], free: bool) -> None:
        start, slots = piece
        assert self.free[start : start + slots] == [not free] * slots
        self.free[start : start + slots] = [free] * slots


@dataclass
class Served:
    """A request in the batch: `done` iterations are over."""

    job: Job
    pieces: list[tuple[int, int]]
    asked: int
    done: int = 0


class NaiveContiguous:
    """What both have in common: an account that names slot by slot."""

    block_size = None

    def __init__(self, num_slots: int):
        self.memory = PaintedBuddy(num_slots)
        self.waiting: list[Job] = []
        self.batch: list[Served] = []

    def submit(self, job: Job) -> None:
        self.waiting.append(job)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        return len(self.batch)

    def account(self) -> Account:
        """A piece: tokens so far and in this iteration, those to come, the rest of what was asked for, rounding."""
        slots = ["external"] * len(self.memory.free)
        for one in self.batch:
            for start, size in one.pieces:
                assert not any(self.memory.free[start : start + size])
                for i in range(size):
                    slots[start + i] = self.name(one, i)
        return Account(*map(slots.count, ("tokens", "reserved", "internal", "external")))

    def name(self, one: Served, i: int) -> str:
        if one.done >= one.job.output:  # waits for others
            return "internal"
        if i < one.job.prompt + one.done:
            return "tokens"
        if i < one.job.prompt + one.job.output - 1:
            return "reserved"
        return "internal" if i < one.asked else "external"

    def release(self, one: Served) -> None:
        for piece in one.pieces:
            self.memory.paint(piece, True)


class NaiveOrca(NaiveContiguous):
    def __init__(self, num_slots: int, reserve: str, samples: int = 1):
        super().__init__(num_slots)
        self.reserve, self.samples = reserve, samples

    def asks(self, job: Job) -> int:
        if self.reserve == "max":
            return systems.LONGEST
        if self.reserve == "oracle":
            return job.prompt + job.output - 1
        answer = 1
        while answer < job.output:
            answer *= 2
        return min(job.prompt + answer, systems.LONGEST)

    def plan(self) -> Work | None:
        while self.waiting:
            job = self.waiting[0]
            pieces = [self.memory.allocate(self.asks(job)) for _ in range(self.samples)]
            if None in pieces:
                for piece in filter(None, pieces):
                    self.memory.paint(piece, True)
                break
            self.batch.append(Served(self.waiting.pop(0), pieces, self.asks(job)))
        if not self.batch:
            return None
        tokens = sum(self.samples if one.done else one.job.prompt for one in self.batch)
        context = self.samples * sum(one.job.prompt + one.done for one in self.batch if one.done)
        size = self.samples * len(self.batch)
        return Work(1, size, tokens, context)

    def finish(self, iterations: int) -> list[Job]:
        assert iterations == 1
        for one in self.batch:
            one.done += 1
        over = [one for one in self.batch if one.done == one.job.output]
        for one in over:
            self.release(one)
        self.batch = [one for one in self.batch if one not in over]
        return [one.job for one in over]


class NaiveFasterTransformer(NaiveContiguous):
    def plan(self) -> Work | None:
        while self.waiting and all(one.done == 0 for one in self.batch):
            piece = self.memory.allocate(systems.LONGEST)
            if piece is None:
                break
            self.batch.append(Served(self.waiting.pop(0), [piece], systems.LONGEST))
        if not self.batch:
            return None
        size, longest, step = len(self.batch), max(one.job.prompt for one in self.batch), self.batch[0].done
        return Work(1, size, size if step else size * longest, size * (longest + step) if step else 0)

    def finish(self, iterations: int) -> list[Job]:
        assert iterations == 1
        for one in self.batch:
            one.done += 1
        if any(one.done < one.job.output for one in self.batch):
            return []
        for one in self.batch:
            self.release(one)
        over, self.batch = self.batch, []
        return [one.job for one in over]


# --- memory in blocks -------------------------------------------------------------------------------------------


class NaivePaged:
    """The package's Scheduler as an engine drives it: one token for each sequence and iteration."""

    def __init__(self, num_slots: int, block_size: int, samples: int = 1, prefix: int = 0, preemption: str = "auto"):
        self.block_size, self.num_slots, self.samples, self.prefix = block_size, num_slots, samples, prefix
        blocks = num_slots // block_size
        cache = PREFIX_CACHES["hash"](block_size) if prefix else None
        self.memory = KVCacheManager(blocks, block_size, 4 * blocks, cache=cache)
        self.scheduler = Scheduler(self.memory, NO_LIMIT, NO_LIMIT, preemption)
        self.jobs: list[Job] = []
        self.computing: set[str] = set()

    def submit(self, job: Job) -> None:
        number = len(self.jobs)
        prompt = [*range(-self.prefix, 0)] + [number] * (job.prompt - self.prefix)
        params = SamplingParams(n=self.samples)
        self.scheduler.add(Request(str(number), number, prompt, params, job.output + 1))
        self.jobs.append(job)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting) + len(self.scheduler.swapped)

    @property
    def num_running(self) -> int:
        return len(self.computing)

    def plan(self) -> Work | None:
        if not self.scheduler.has_unfinished:
            return None
        plan, output = self.scheduler.schedule(), StepOutput()
        for s in plan.sequences:
            if s.draw:  # what the samples of one request say differs
                first = self.scheduler.sequences[s.seq_id].index
                output.tokens[s.seq_id] = [[SampledToken(1000 + first + i)] for i in range(s.draw.num_draws)]
        self.scheduler.update(plan, output)
        self.memory.check()
        self.computing = {s.request_id for s in plan.sequences}
        context = sum(s.context_len for s in plan.sequences if s.request_id not in plan.admitted)
        moved = len(plan.swap_out) + len(plan.swap_in)
        return Work(1, len(plan.sequences), plan.num_tokens, context, moved_blocks=moved)

    def finish(self, iterations: int) -> list[Job]:
        assert iterations == 1
        over = [r for r in self.scheduler.running if len(r.live[0].output_token_ids) == self.job(r).output]
        for request in over:
            for seq in request.live:
                self.scheduler.finish(request, seq, "length")
        return [self.job(request) for request in over]

    def job(self, request: Request) -> Job:
        return self.jobs[int(request.request_id)]

    def account(self) -> Account:
        names: dict[int, str] = {}  # of slots; tokens go before what others would write there
        for request in self.scheduler.running:
            kept = self.job(request).prompt + self.job(request).output - 1
            for seq in request.live:
                if seq.in_memory:
                    table, length = self.memory.block_table(seq.seq_id), self.memory.num_tokens(seq.seq_id)
                    for i in range(len(table) * self.block_size):
                        slot = table[i // self.block_size] * self.block_size + i % self.block_size
                        name = "tokens" if i < length else "reserved" if i < kept else "internal"
                        assert names.setdefault(slot, name) == name
        count = Counter(names.values())
        parts = [count[name] for name in ("tokens", "reserved", "internal")]
        return Account(*parts, self.num_slots - len(names))


# --- iteration by iteration -------------------------------------------------------------------------------------


@dataclass
class Moment:
    """One iteration."""

    running: int
    sequences: int
    tokens: int
    context: int
    moved_blocks: int
    account: Account
    queues: list[list[str]]  # of paging: who runs, waits, is swapped out
    used_blocks: int
    preemptions: dict[str, int]
    done: list[Job]


def moments(system: System, jobs: list[Job], limit: int = 5000) -> list[Moment]:
    """From the beginning to the end; `arrival` counts iterations here. Each one cuts a stride."""
    result: list[Moment] = []
    coming = list(jobs)
    now = 0
    while True:
        while coming and coming[0].arrival <= now:
            system.submit(coming.pop(0))
        work = system.plan()
        if work is None:
            if not coming:
                return result
            now = int(coming[0].arrival)
            continue
        k = work.iterations
        if coming:
            k = min(k, int(coming[0].arrival) - now)
        account = system.account()
        for i in range(k):
            result.append(moment(system, work, i, account))
        now += k
        result[-1].done = sorted(system.finish(k))
        assert len(result) < limit, "it goes on and on"


def moment(system: System, work: Work, i: int, account: Account) -> Moment:
    more = i * work.stored
    shifted = replace(account, tokens=account.tokens + more, reserved=account.reserved - more)
    queues, used, preemptions = [], 0, {}
    if scheduler := getattr(system, "scheduler", None):
        queues = [[r.request_id for r in q] for q in (scheduler.running, scheduler.waiting, scheduler.swapped)]
        used, preemptions = system.memory.num_blocks - system.memory.num_free, dict(scheduler.num_preemptions)
    return Moment(
        system.num_running, work.sequences, work.tokens, work.context + i * work.growth,
        work.moved_blocks if i == 0 else 0, shifted, queues, used, preemptions, [],
    )  # fmt: skip
