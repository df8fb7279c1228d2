"""Our own system: the package's Scheduler and KVCacheManager, and no copy of them.

They decide everything: who comes in, who gets which block, who makes way. What a model would have said is made up
here, since only lengths matter.

One thing makes it fast. A sequence needs the scheduler only when its last block is full, every 16th iteration. So it
is told the tokens of a whole block at once (they are made up anyway), and the scheduler plans to compute them in one
step, as it does with any tokens that are not computed yet. The clock here says which of them exist:

    block     | . . . . . . . . . . . . . . . . |
    planned   |=================================|      the slots are booked; the scheduler has nothing to do
    computed  |===========|                            one more in each iteration
                          ^ clock                      `due`: when the block is full, and the next is asked for

Blocks are taken in the same iterations as if it were asked every time, and so are all its decisions
(tests/test_experiments.py compares the two).
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from minipaged.experiments.loads import Job
from minipaged.experiments.systems import Account, Work, kept
from minipaged.memory import HashCache, KVCacheManager, blocks_for
from minipaged.requests.request import Request
from minipaged.requests.sampling_params import SampledToken, SamplingParams
from minipaged.scheduling.plan import ScheduledSequence, StepOutput, StepPlan
from minipaged.scheduling.queues import arrival
from minipaged.scheduling.scheduler import Scheduler

NEVER = -1
NO_LIMIT = 1 << 40


@dataclass(slots=True, eq=False)
class Group:
    """A request with its samples, which are equally long. Iterations are counted from the start of the run."""

    job: Job
    request: Request
    rows: int = 1  # sequences in the batch: one for the prompt, and after it all samples
    length: int = 0  # slots booked for each of them
    came: int = NEVER  # the iteration that computed its prompt
    had: int = 0  # tokens of the answer that there were before it: it was preempted, and is computed again
    due: int = NEVER  # the iteration that needs a new block
    end: int = NEVER  # the last one
    left: int = NEVER  # the iteration in which it was swapped out; what is above stands still since then

    def stored(self, clock: int) -> int:
        """Slots in which a sequence has keys and values when iteration `clock` begins."""
        return self.job.prompt + self.had + clock - self.came - 1


class InformedScheduler(Scheduler):
    """The package's scheduler, which need not search: it is told who has something to compute, and how many run.

    Nor does it look again whether there is room for those who wait, if nobody came, went or gave way. And its plans
    name no slots and no blocks, since there is no runner to read them.
    """

    due: list[Request]
    num_seqs = 0
    stirred = True

    def ready(self) -> list[Request]:
        return self.due

    def num_live_seqs(self) -> int:
        return self.num_seqs

    def num_promised_seqs(self) -> int:
        return self.num_seqs if self.stirred else NO_LIMIT

    def _scheduled(self, request: Request, counts: dict[int, int]) -> Iterable[ScheduledSequence]:
        for seq_id, count in counts.items():
            start = self.sequences[seq_id].num_computed_tokens
            yield ScheduledSequence(seq_id, request.request_id, [0] * count, start, [], [])


class Paged:
    """Paging, with copy-on-write for samples and, if requests begin alike, a prefix cache.

    samples: sequences of a request. prefix: so many tokens of every prompt are the same in all. preemption: see
    minipaged/scheduling/preemption.py.
    """

    def __init__(
        self, num_slots: int, block_size: int = 16, samples: int = 1, prefix: int = 0, preemption: str = "auto"
    ):
        num_blocks = num_slots // block_size
        cache = HashCache(block_size) if prefix else None
        self.block_size, self._num_slots, self._samples, self._prefix = block_size, num_slots, samples, prefix
        self.memory = KVCacheManager(num_blocks, block_size, 4 * num_blocks, cache=cache)
        self.scheduler = InformedScheduler(self.memory, NO_LIMIT, NO_LIMIT, preemption)
        self._params = SamplingParams(n=samples)
        self._groups: dict[str, Group] = {}
        self._due: dict[int, list[Group]] = defaultdict(list)  # who may be due and end when; some were put off
        self._ends: dict[int, list[Group]] = defaultdict(list)
        self._stirred = False  # somebody came or went since the scheduler looked at those who wait
        self._clock = self._arrivals = 0
        # Of all in the batch, kept up to date: requests, sequences, and slots: those that store a token, that are
        # booked, that lie in their blocks, and of these the ones behind the last token that there will be.
        self.num_running = self._rows = self._stored = self._booked = self._held = self._surplus = 0

    # --- requests come and go -----------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting) + len(self.scheduler.swapped)

    def submit(self, job: Job) -> None:
        name = str(self._arrivals)
        prompt = [*range(-self._prefix, 0), *[self._arrivals] * (job.prompt - self._prefix)]
        request = Request(name, self._arrivals, prompt, self._params, max(2, job.output))  # it ends when we say so
        self._arrivals += 1
        self.scheduler.add(request)
        self._groups[name] = group = Group(job, request)
        self._tell(group, self._known(group))
        self._stirred = True

    def _known(self, group: Group) -> int:
        """Up to where a sequence without memory knows its tokens: to the end of a block. Samples: to be forked."""
        there = group.job.prompt + group.had
        if self._samples > 1:
            return there
        return min(there + -there % self.block_size, kept(group.job))

    def _tell(self, group: Group, length: int) -> None:
        """Its sequences learn (or forget) tokens, so that they have so many together with the prompt."""
        for seq in group.request.live:
            seq.output_token_ids = [seq.index] * (length - group.job.prompt)  # each sample says something else

    def _count(self, group: Group, sign: int) -> None:
        blocks = blocks_for(group.length, self.block_size)
        self._rows += sign * group.rows
        self._booked += sign * group.rows * group.length
        self._held += sign * group.rows * blocks * self.block_size
        self._surplus += sign * group.rows * max(0, blocks * self.block_size - kept(group.job))

    # --- iterations ---------------------------------------------------------------------------------------------

    def plan(self) -> Work | None:
        clock, prompts, fresh, moved, preempted = self._clock, 0, 0, 0, False
        due = [group for group in self._due.pop(clock, ()) if group.due == clock and group.left == NEVER]
        for group in due:
            self._next_block(group)
        old = self._rows
        if due or (self._stirred and self.num_waiting):
            self.scheduler.due = sorted((group.request for group in due), key=arrival)
            self.scheduler.num_seqs, self.scheduler.stirred = self._rows, self._stirred
            plan = self.scheduler.schedule()
            self.scheduler.update(plan, self._first_tokens(plan))
            prompts, fresh = self._carry_out(plan)
            preempted = bool(plan.preempted)
            moved = len(plan.swap_out) + len(plan.swap_in)
            old = self._rows - len(plan.admitted)
        self._stirred = preempted or bool(prompts and self._prefix)  # others may find now what these have published
        if not self._rows:
            return None
        self._stored += old
        iterations = 1
        while not prompts and clock + iterations not in self._due and clock + iterations - 1 not in self._ends:
            iterations += 1
        return Work(iterations, self._rows, old + prompts, self._stored - fresh, self._rows, self._rows, moved)

    def _next_block(self, group: Group) -> None:
        """Its last block is full: its sequences learn the tokens of the next one."""
        self._count(group, -1)
        if group.rows < self._samples:  # they share the prompt, and write into its last block from now on
            self._stored += (self._samples - group.rows) * group.stored(self._clock)
            group.rows = self._samples
        room = -group.length % self.block_size or self.block_size
        self._book(group, min(group.length + room, kept(group.job)))
        self._count(group, +1)
        self._tell(group, group.length)

    def _book(self, group: Group, length: int) -> None:
        """`length` slots from now on; when are they full?"""
        group.length = length
        full = length - group.job.prompt - group.had  # iterations after the one of the prompt
        group.due = group.came + 1 + full if length < kept(group.job) else NEVER
        self._note(group)

    def _note(self, group: Group) -> None:
        if group.due != NEVER:
            self._due[group.due].append(group)

    def _carry_out(self, plan: StepPlan) -> tuple[int, int]:
        """What the scheduler decided about who runs. Returns the tokens of prompts: to be computed, and in all."""
        for name, mode in plan.preempted:
            self._leave(self._groups[name], mode)
        for name in plan.resumed:
            self._return(self._groups[name])
        found = sum(s.start for s in plan.sequences if s.request_id in plan.admitted) if self._prefix else 0
        fresh = sum(self._begin(self._groups[name]) for name in plan.admitted)
        return fresh - found, fresh

    def _first_tokens(self, plan: StepPlan) -> StepOutput:
        """What the model says: only the first tokens of samples matter, since with them the prompt is forked."""
        if self._samples == 1:
            return StepOutput()
        first = [self._groups[name].request.live[0].seq_id for name in plan.admitted]
        return StepOutput({seq_id: [[SampledToken(index)] for index in range(self._samples)] for seq_id in first})

    def _begin(self, group: Group) -> int:
        """Its prompt is there after this iteration, and what it had of its answer. Returns how many tokens that is."""
        clock, there = self._clock, group.job.prompt + group.had
        group.came, group.rows = clock, 1
        group.end = clock + group.job.output - group.had - 1
        self._ends[group.end].append(group)
        self._book(group, self._known(group))
        self._count(group, +1)
        self.num_running += 1
        self._stored += there
        return there

    def _leave(self, group: Group, mode: str) -> None:
        """It was preempted: swapped out, or its memory was dropped."""
        clock = self._clock
        self._count(group, -1)
        self._stored -= group.rows * group.stored(clock)
        self.num_running -= 1
        if mode == "recompute":
            if self._samples > 1:
                raise AssertionError("samples are swapped out: there is CPU memory for all of them")
            group.had += clock - group.came
            self._tell(group, self._known(group))
            group.due = group.end = NEVER
        else:
            group.left = clock

    def _return(self, group: Group) -> None:
        """It was swapped in, and goes on in this iteration where it was."""
        if group.request.live[0].num_uncomputed:
            raise AssertionError("who comes back has room for the next tokens: the scheduler keeps it free")
        away, group.left = self._clock - group.left, NEVER
        group.came, group.end = group.came + away, group.end + away
        group.due = group.due + away if group.due != NEVER else NEVER
        self._note(group)
        self._ends[group.end].append(group)
        self._count(group, +1)
        self._stored += group.rows * group.stored(self._clock)
        self.num_running += 1

    def finish(self, iterations: int) -> list[Job]:
        self._clock += iterations
        self._stored += self._rows * (iterations - 1)
        last = self._clock - 1
        done = [group for group in self._ends.pop(last, ()) if group.end == last and group.left == NEVER]
        for group in done:
            for seq in group.request.live:
                self.scheduler.finish(group.request, seq, "length")
            del self._groups[group.request.request_id]
            self._count(group, -1)
            self._stored -= group.rows * kept(group.job)
            self.num_running -= 1
            self._stirred = True
        return [group.job for group in done]

    # --- the account --------------------------------------------------------------------------------------------

    def account(self) -> Account:
        """Slots that are booked and not yet filled are reserved, and so is the rest of a block that will be."""
        size, free = self.block_size, self.memory.num_free * self.block_size
        tokens, held = self._stored, self._held
        if self._samples > 1 or self._prefix:  # shared slots count once, and what is shared is filled
            usage = self.memory.usage()
            tokens, held = usage.tokens_stored - (self._booked - self._stored), usage.used * size
        return Account(tokens, held - tokens - self._surplus, self._surplus, free + self._num_slots % size)
