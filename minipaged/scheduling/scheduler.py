"""Who computes how many tokens in this step, and who makes way when memory runs out.

    plan = scheduler.schedule()        decides, and books the memory
    output = runner.execute(plan)      computes
    scheduler.update(plan, output)     appends what was drawn, forks, frees

Continuous batching (Orca): requests join and leave at every step. First come, first served (or as admission.py
has it), and the latest arrival is preempted first (paper, section 4.5); the sequences of one request go together. So
the earliest request always moves on, and nothing starves.

Chunked prefill (Sarathi-Serve): a step computes at most so many tokens. Every running sequence gets one; what is
left goes to prompts under way, then to new ones, and a prompt that doesn't fit is cut: the rest follows in the next
steps. So nobody's next token waits for somebody's long prompt. Nor does a short prompt: see `Step`.

Speculation: between the tokens that are sure and new prompts, guesses are computed too: see speculation.py.
"""

import sys
from collections.abc import Iterable
from itertools import islice

from minipaged.decoding.beam_search import BeamSearch
from minipaged.memory import KVCacheManager, NoSpace
from minipaged.requests.beam_search_params import BeamSearchParams
from minipaged.requests.request import Request, RequestRefused
from minipaged.requests.sequence import Sequence
from minipaged.scheduling.admission import WINDOW, Admission
from minipaged.scheduling.growth import LiveSequences
from minipaged.scheduling.plan import ScheduledSequence, Step, StepOutput, StepPlan
from minipaged.scheduling.preemption import MODES, preempt, share_rebuilt_prompt
from minipaged.scheduling.queues import Queues, put
from minipaged.scheduling.speculation import Speculation, Wish, with_guesses
from minipaged.scheduling.transfer import Transfers


class Scheduler:
    """Decides step by step. It sees integers and lists; what a tensor is, it does not know.

    memory: where the tokens live; this is its only user.
    max_num_seqs: the most sequences that run at a time.
    max_num_batched_tokens: the most tokens computed in one step. Every running sequence is sure of one of them;
        the others go to those that have more to compute.
    chunked_prefill: cut a prompt that does not fit into what is left. Without, it waits for a step that has room
        for it; one that would not fit even beside a single token for each running sequence is cut all the same.
    schedule: "fcfs" or "prefix": see admission.py.
    preemption: "recompute", "swap" or "auto": see preemption.py.
    watermark: the share of blocks that an admission leaves free, so that it does not cause a preemption at once.
    speculation: what guesses may be computed besides; None: none.
    transfers: what becomes of blocks that go to other engines, or come from them; None: there are none.
    """

    def __init__(
        self,
        memory: KVCacheManager,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        preemption: str = "auto",
        watermark: float = 0.01,
        schedule: str = "fcfs",
        chunked_prefill: bool = True,
        speculation: Speculation | None = None,
        transfers: Transfers | None = None,
    ):
        if preemption not in MODES:
            raise ValueError(f"preemption={preemption!r}: must be one of {', '.join(MODES)}")
        if max_num_seqs < 1:
            raise ValueError(f"max_num_seqs={max_num_seqs}: must be at least 1")
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={max_num_batched_tokens}: must be at least max_num_seqs={max_num_seqs}, "
                "so that every running sequence can have a token"
            )
        self.memory = memory
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.chunked_prefill = chunked_prefill
        self.preemption, self.speculation = preemption, speculation
        self.transfers = transfers or Transfers()
        self.queues = Queues()
        self.waiting, self.running, self.swapped = self.queues.lists()
        self.admission = Admission(memory, self.queues, self.transfers, schedule, watermark, chunked_prefill)
        self.num_preemptions = {"recompute": 0, "swap": 0}
        self.sequences = LiveSequences(memory, self.transfers)
        self._num_steps = 0

    # --- requests come and go -----------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Let a request wait. RequestRefused as `check` has it."""
        self.check(request)
        request.sequences = [self.sequences.add(Sequence(request.prompt_token_ids))]
        if isinstance(request.params, BeamSearchParams):
            request.search = BeamSearch(request.params, request.max_tokens, request.eos_token_ids)
        put(self.waiting, request)

    def check(self, request: Request) -> None:
        """RequestRefused if it could not be served even if it were alone."""
        self.transfers.check(request)
        self._check_size(request)

    def _check_size(self, request: Request) -> None:
        """RequestRefused, with the numbers, for more sequences than may run, or more blocks than the pool has."""
        if request.width > self.max_num_seqs:
            raise RequestRefused(
                f"the request wants {request.width} sequences at once, but max_num_seqs is {self.max_num_seqs}"
            )
        most = request.most_blocks(self.memory.block_size)
        if most > self.memory.num_blocks:
            raise RequestRefused(
                f"the request can need {most} blocks ({len(request.prompt_token_ids)} prompt tokens, up to "
                f"{request.max_tokens} output tokens, {request.width} sequence(s), block size "
                f"{self.memory.block_size}), but the pool has {self.memory.num_blocks}: "
                "lower max_tokens, shorten the prompt, or give the pool more blocks"
            )

    def abort(self, request: Request) -> None:
        """End a request at once, wherever it is, and free everything it holds."""
        self.fail(request, "abort")

    def fail(self, request: Request, reason: str) -> None:
        """End what lives of a request."""
        for seq in request.live:
            self.finish(request, seq, reason)

    def finish(self, request: Request, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End one sequence, and its request with the last of them."""
        self.sequences.end(request, seq, reason, stop_reason)
        self._leave_if_finished(request)

    def _leave_if_finished(self, request: Request) -> None:
        if request.finished:
            self.queues.remove(request)

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running or self.swapped)

    # --- deciding -----------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Decide on the next step, and book the slots for it."""
        self._num_steps += 1
        self.transfers.free_ended(self.memory)
        short = self.max_num_batched_tokens if self.chunked_prefill else sys.maxsize
        step = Step(StepPlan(self._num_steps), self.max_num_batched_tokens, short, self._wanted_by_short)
        wishes = self._wishes(step)
        self._continue_running(step)
        self._book_drafts(step, wishes)
        if not step.plan.preempted:
            self.admission.let_in(step, self.max_num_seqs - self.num_promised_seqs())
        for request, counts in step.counts:
            for s in self._scheduled(request, counts):
                step.plan.sequences.extend(with_guesses(s, step, self.memory) if s.seq_id in step.drafts else [s])
        self.transfers.build_connector_meta(step.plan, self.running)
        step.plan.freed.extend(self.memory.take_freed())
        return step.plan

    def _wishes(self, step: Step) -> dict[int, Wish]:
        """What sequences would like to have guessed. The tokens for it are set aside before prompts take them."""
        step.spare -= self.num_live_seqs()
        if self.speculation is None:
            return {}
        wishes = self.speculation.wishes(self.ready(), self.num_live_seqs())
        step.set_aside = min(step.spare, sum(wish.num_tokens for wish in wishes.values()))
        step.spare -= step.set_aside
        return wishes

    def _book_drafts(self, step: Step, wishes: dict[int, Wish]) -> None:
        """Once everybody has the token that is sure, and if nobody had to make way for that."""
        step.spare += step.set_aside
        if self.speculation is not None and not step.plan.preempted:
            self.speculation.book(step, wishes, self.memory, self.sequences.new_id)

    def _continue_running(self, step: Step) -> None:
        """Slots for what the running requests compute, in the order of arrival; or the latest of them make way.

        One by one, and no more than have to: what a request computes is settled before, and is not changed by what
        became free. Who makes way for itself computes nothing. For each sequence that computes, one token is out of
        the budget already.
        """
        for request in self.ready():
            if not self.running or self.running[-1].arrival < request.arrival:
                break  # it was preempted just now, and so were all behind it
            counts = step.counts_of(request)
            while isinstance(grown := self.memory.append(counts), NoSpace):
                victim = self.running.pop()  # the latest arrival; it has not been scheduled in this step
                self._preempt(victim, step)
                if victim is request:
                    break
            else:
                step.take(request, counts, grown.copies, set_aside=len(counts))

    # These three look at every running request in every step; a simulation, which knows the answers, overrides them.

    def ready(self) -> list[Request]:
        """The running requests that can have something to compute, in the order of arrival."""
        return [request for request in self.running if request.load is None]

    def num_live_seqs(self) -> int:
        """Sequences that run."""
        return sum(len(request.live) for request in self.running)

    def num_promised_seqs(self) -> int:
        """Sequences that run, and those that will when a prompt is forked."""
        return sum(request.width for request in self.running)

    def _scheduled(self, request: Request, counts: dict[int, int]) -> Iterable[ScheduledSequence]:
        """What the plan says of each sequence that computes so many tokens, by sequence id.

        Only the logits of a sequence's last token tell something new: a draw, or for beams `Search.num_candidates`.
        """
        for seq_id, count in counts.items():
            seq = self.sequences[seq_id]
            start = seq.num_computed_tokens
            last = start + count == len(seq)
            yield ScheduledSequence(
                seq_id,
                request.request_id,
                seq.tokens(start, count),
                start,
                self.memory.slots(seq_id, start, count),
                self.memory.current_table(seq_id),
                draw=request.draw(seq) if last and not request.search else None,
                num_candidates=request.search.num_candidates if last and request.search else 0,
                targets=request.targets(start + count),
            )

    def _preempt(self, request: Request, step: Step) -> None:
        """Take the memory of a request that is not among the running ones any more, and let it wait or be swapped out.

        The tokens that were set aside for its sequences are anybody's again. The plan and the counts tell of it.
        """
        done = preempt(request, self.memory, self.preemption if request.load is None else "recompute")
        request.load = None
        put(self.swapped if done.mode == "swap" else self.waiting, request)
        step.spare += len(request.live)
        step.plan.swap_out.extend(done.moves)
        step.plan.preempted.append((request.request_id, done.mode))
        request.metrics.num_preemptions += 1
        self.num_preemptions[done.mode] += 1

    def _wanted_by_short(self, step: Step) -> int:
        """Tokens that short prompts could have now: those under way, and those that wait and find room."""
        done = {id(request) for request, _ in step.counts}
        running = [r for r in self.running if r.load is None and id(r) not in done]
        todos = [r.target(r.live[0]) - r.live[0].num_computed_tokens for r in running]
        wanted = sum(todo - 1 for todo in todos if todo <= step.short)
        room, free = self.max_num_seqs - self.num_promised_seqs(), self.memory.num_free
        for request in islice(self.waiting, WINDOW):
            todo = request.target(request.live[0])
            if todo <= step.short and request.width <= room and self.memory.blocks_for(todo) <= free:
                wanted, room, free = wanted + todo, room - request.width, free - self.memory.blocks_for(todo)
        return wanted

    def start_over(self, requests: Iterable[Request]) -> None:
        """After something was broken off, wherever: of these requests only the tokens count. The rest is computed anew.

        They wait, in the order of arrival, and memory is empty. Doing it twice does no harm.
        """
        self.transfers.start_over()
        self.memory.reset()
        self.sequences.start_over()
        if self.speculation is not None:
            self.speculation.start_over()
        for queue in self.queues.lists():
            queue.clear()
        for request in requests:
            request.load = None
            for seq in request.live:
                seq.in_memory, seq.num_computed_tokens = False, 0
                self.sequences.add(seq)
            put(self.waiting, request)

    # --- learning what came of it -------------------------------------------------------------------------------

    def update(self, plan: StepPlan, output: StepOutput) -> list[Request]:
        """Append the new tokens, fork and free. Returns the requests that got new tokens."""
        touched = {s.request_id for s in plan.sequences}
        requests = [request for request in self.running if request.request_id in touched]
        if self.speculation is not None:
            self.speculation.settle(plan, output, self.memory)
            self.speculation.learn(plan, output, requests, self.sequences.__getitem__)
        self._count_computed(plan)
        changed = self._end_loads(output)
        for request in requests:
            share_rebuilt_prompt(request, self.memory)
            if self.sequences.grow(request, output):
                changed.append(request)
            self._leave_if_finished(request)
        return changed

    def _count_computed(self, plan: StepPlan) -> None:
        """What a sequence has computed of its own tokens counts, and can be found by others from now on.

        Branches (`branch_of`) are no sequences of ours any more.
        """
        for s in plan.sequences:
            if s.branch_of is None:
                seq = self.sequences[s.seq_id]
                seq.num_computed_tokens += s.num_own
                self.memory.publish(s.seq_id, seq.num_computed_tokens, seq.tokens)

    def _end_loads(self, output: StepOutput) -> list[Request]:
        """Who has got its blocks goes on; who can't get them waits to be computed here, or ends: these are returned."""
        failed = []
        for request in [r for r in self.running if r.load is not None and r.load.number in output.loaded]:
            if self.transfers.load_ended(request, output.loaded[request.load.number], self.memory):
                continue
            if request.error is None:
                self.running.remove(request)
                put(self.waiting, request)
            else:
                self.fail(request, "error")
                failed.append(request)
        return failed
