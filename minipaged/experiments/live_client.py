"""Sends one system its requests on time, and keeps the account of its memory while it answers.

Every moment of a run belongs to a step, or to waiting for the next request, and is weighed by how long it took.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from minipaged.experiments.live_systems import System, batch_size, install
from minipaged.experiments.loads import Job
from minipaged.experiments.systems import KINDS, Account
from minipaged.llm import LLM
from minipaged.requests.sampling_params import SamplingParams
from minipaged.scheduling.plan import ScheduledSequence, StepOutput, StepPlan
from minipaged.text.outputs import RequestOutput

PAD = 0  # any token will do: only speed is of interest where there are pads


@dataclass(frozen=True)
class Tenant:
    """What the account must know of a request. reservation: tokens; None: it has whole blocks, as it needs them.

    stored: tokens that it will have in memory at its end. pads: tokens in front of its prompt.
    """

    stored: int
    pads: int = 0
    reservation: int | None = None

    def account(self, num_tokens: int, capacity: int) -> Account:
        """Of one request alone, with `num_tokens` slots written, pads included, of `capacity`.

        >>> Tenant(stored=40, reservation=100).account(num_tokens=25, capacity=112)
        Account(tokens=25, reserved=15, internal=60, external=12)
        >>> Tenant(stored=40).account(num_tokens=25, capacity=32)
        Account(tokens=25, reserved=7, internal=0, external=0)
        """
        own = capacity if self.reservation is None else min(capacity, self.reservation)
        tokens = min(max(0, num_tokens - self.pads), self.stored)
        reserved = min(self.stored, own) - tokens
        return Account(tokens, reserved, own - tokens - reserved, capacity - own)


def account(plan: StepPlan, tenants: Sequence[Tenant], num_blocks: int, block_size: int) -> Account:
    """All memory during a step. Every running request is in the plan. RuntimeError if the parts are not the whole."""
    held = [block for s in plan.sequences for block in s.block_table]
    parts = [_of(s, tenants, block_size) for s in plan.sequences]
    free = Account(external=(num_blocks - len(set(held))) * block_size)
    whole = Account(*(sum(getattr(part, name) for part in [*parts, free]) for name in KINDS))
    values = [getattr(whole, name) for name in KINDS]
    if sum(values) != num_blocks * block_size or min(values) < 0:
        raise RuntimeError(f"{whole} of {num_blocks} blocks of {block_size}: a mistake in minipaged")
    return whole


def _of(s: ScheduledSequence, tenants: Sequence[Tenant], block_size: int) -> Account:
    return tenants[int(s.request_id)].account(s.context_len, len(s.block_table) * block_size)


@dataclass(frozen=True)
class Moment:
    """seconds, and what was true all that time. waiting: requests that had come and did not run. computed: tokens."""

    seconds: float
    running: int
    waiting: int
    account: Account
    computed: int = 0


@dataclass
class Client:
    """One run of one system. clock, sleep: in seconds; others than the real ones in tests.

    watch: makes an observer of the engine, once the system is installed.
    first, finished: by the job's number, seconds from its arrival to its first token, and to its last.
    tokens: its answer.
    """

    llm: LLM
    system: System
    jobs: Sequence[Job]
    prompts: Sequence[list[int]]
    max_model_len: int
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    watch: Callable[[LLM], Callable[[StepPlan, StepOutput], None]] | None = None
    moments: list[Moment] = field(default_factory=list)

    def __post_init__(self) -> None:
        memory, reserve = self.llm.memory, self.system.reserve
        most = batch_size(memory.num_blocks, memory.block_size, self.max_model_len)
        self._batch_size = min(most, self.llm.scheduler.max_num_seqs)
        self._tenants = [
            Tenant(job.prompt + job.output - 1, 0, reserve(job, self.max_model_len) if reserve else None)
            for job in self.jobs
        ]
        self.first: dict[int, float] = {}
        self.finished: dict[int, float] = {}
        self.tokens: dict[int, list[int]] = {}
        self._sent = 0  # jobs, in their order
        self._plan = StepPlan(0)

    def run(self) -> None:
        """Send every job when it is due, and step until all are answered."""
        install(self.llm, self.system, self.jobs, self.max_model_len)
        observers = [self._observe, *([self.watch(self.llm)] if self.watch else [])]
        self.llm.observers += observers
        try:
            began = before = self.clock()
            while self._sent < len(self.jobs) or self.llm.has_unfinished_requests:
                self._send(before - began)
                idle = not self.llm.has_unfinished_requests
                self._step_or_sleep(idle, began)
                waiting = self._num_waiting(before - began)
                now = self.clock()
                self.moments.append(self._moment(idle, now - before, waiting))
                before = now
        finally:
            for observer in observers:
                self.llm.observers.remove(observer)

    def _step_or_sleep(self, idle: bool, began: float) -> None:
        if idle:
            self.sleep(max(0.0, self.jobs[self._sent].arrival - (self.clock() - began)))
            return
        outputs = self.llm.step()
        now = self.clock() - began
        for output in outputs:
            self._receive(output, now)

    def _observe(self, plan: StepPlan, output: StepOutput) -> None:
        self._plan = plan

    # --- requests out -------------------------------------------------------------------------------------------

    def _send(self, now: float) -> None:
        """Those that are due; padded ones in a batch, and only when the one before has ended."""
        due = self._due(now)
        if not self.system.padded:
            for number in due:
                self._add(number, 0, self.jobs[number].output)
        elif not self.llm.has_unfinished_requests:
            batch = self._batch(due)
            prompt, output = self._longest(batch)
            for number in batch:
                self._add(number, prompt - self.jobs[number].prompt, output)

    def _due(self, now: float) -> list[int]:
        """Jobs that have arrived and were not sent."""
        return [n for n in range(self._sent, len(self.jobs)) if self.jobs[n].arrival <= now]

    def _batch(self, due: list[int]) -> list[int]:
        """The earliest; but whom the batch's padding would take beyond max_model_len waits for the next batch."""
        batch: list[int] = []
        for number in due[: self._batch_size]:
            if sum(self._longest([*batch, number])) > self.max_model_len:
                break
            batch.append(number)
        return batch

    def _longest(self, batch: list[int]) -> tuple[int, int]:
        """The longest prompt and the longest answer."""
        jobs = [self.jobs[number] for number in batch]
        return max((job.prompt for job in jobs), default=0), max((job.output for job in jobs), default=0)

    def _add(self, number: int, pads: int, output: int) -> None:
        tenant = self._tenants[number]
        self._tenants[number] = Tenant(tenant.stored, pads, tenant.reservation)
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        self.llm.add_request([PAD] * pads + self.prompts[number], params, request_id=str(number))
        self._sent += 1

    # --- answers in ---------------------------------------------------------------------------------------------

    def _receive(self, output: RequestOutput, now: float) -> None:
        """now: seconds since the beginning. A padded batch gives its results when it ends: its first tokens too."""
        number = int(output.request_id)
        since = now - self.jobs[number].arrival
        if not self.system.padded or output.finished:
            self.first.setdefault(number, since)
        if output.finished:
            self.finished[number] = since
            self.tokens[number] = output.outputs[0].token_ids[: self.jobs[number].output]

    # --- the account --------------------------------------------------------------------------------------------

    def _num_waiting(self, then: float) -> int:
        """Of the requests that had come by then, when the step began: those that were not let in."""
        scheduler = self.llm.scheduler
        return len(scheduler.waiting) + len(scheduler.swapped) + len(self._due(then))

    def _moment(self, idle: bool, seconds: float, waiting: int) -> Moment:
        plan, memory = StepPlan(0) if idle else self._plan, self.llm.memory
        parts = account(plan, self._tenants, memory.num_blocks, memory.block_size)
        return Moment(seconds, len(plan.sequences), waiting, parts, plan.num_tokens)
