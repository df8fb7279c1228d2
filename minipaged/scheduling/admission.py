"""Who comes in next, of all that wait or are swapped out, and with what.

    fcfs     who arrived first
    prefix   who has the longest beginning in memory already; who arrived first among equals

Where many requests begin alike, `prefix` lets those that share follow each other while their prefix is still there;
for a cache as a tree it is the order of a walk in depth (RadixAttention, SGLang). But a request that shares nothing
would wait for ever if others keep coming. So nobody is overtaken more than PATIENCE times: then it comes first, and
all others wait for it.

A new request comes in with what the prefix cache has of its prompt; so does one that comes back after a preemption,
and it finds what it had computed itself, as far as nobody else needed the memory.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import merge
from itertools import islice

from minipaged.memory import KVCacheManager, NoSpace, Prefix
from minipaged.requests.request import Request
from minipaged.scheduling.plan import Step
from minipaged.scheduling.queues import Queues, arrival, put
from minipaged.scheduling.transfer import Transfers

SCHEDULES = ("fcfs", "prefix")
PATIENCE = 16
WINDOW = 128  # so many of the earliest are compared, since each is looked up in every step


@dataclass
class PrefixCounts:
    """Tokens that were looked for in the prefix cache since the beginning, and that were there."""

    queried: int = 0  # prompts of new requests
    found: int = 0
    recovered: int = 0  # of requests that were preempted: found again, and not computed again


class Admission:
    """The part of the scheduler that lets requests in. schedule: "fcfs" or "prefix".

    patience: how many may come in before a request that arrived earlier.
    """

    def __init__(
        self,
        memory: KVCacheManager,
        queues: Queues,
        transfers: Transfers,
        schedule: str = "fcfs",
        watermark: float = 0.01,
        chunked_prefill: bool = True,
        patience: int = PATIENCE,
    ):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r}: must be one of {', '.join(SCHEDULES)}")
        if not 0 <= watermark < 1:
            raise ValueError(f"watermark={watermark}: must be at least 0 and less than 1")
        self._memory, self._queues, self._transfers = memory, queues, transfers
        self.schedule, self.patience, self._chunked_prefill = schedule, patience, chunked_prefill
        self.watermark_blocks = math.ceil(watermark * memory.num_blocks)
        self.prefixes = PrefixCounts()

    def let_in(self, step: Step, room: int) -> None:
        """Let requests in, be they new, preempted, or swapped out, until one can't: nobody overtakes that one.

        room: so many sequences may run besides those that do. A request needs room for its `width`.
        Running requests are kept in the order of arrival, so the earliest is the last to be preempted.
        """
        if step.spare < 1:
            return
        for request in self._in_order():
            if step.spare < 1 or request.width > room:
                return
            if self._has_to_wait(request, step):
                continue
            room -= request.width
            if not self._may_overtake(request):
                return
            come_in = self._resume if request in self._queues.swapped else self._admit
            if not come_in(request, step):
                return
            put(self._queues.running, request)

    def _has_to_wait(self, request: Request, step: Step) -> bool:
        """Whether other long prompts have taken all that a long one may have: then shorter ones may pass.

        Not for long: once these are through, nobody passes it any more. So it doesn't starve. Long is who has more
        than `Step.short` to compute without a prefix. Who is swapped out never has to wait for that, and asks no grant.
        """
        todo = request.target(request.live[0])  # all of it: looking up what is there of it would take long
        return request not in self._queues.swapped and todo > step.short and step.grant(todo) < 1

    # --- in which order -----------------------------------------------------------------------------------------

    def _in_order(self) -> Iterable[Request]:
        waiting, swapped = self._queues.waiting, self._queues.swapped
        requests = merge(waiting.copy(), swapped.copy(), key=arrival)
        if self.schedule == "fcfs":
            return requests
        away = {id(request) for request in swapped}

        def rank(request: Request) -> tuple[bool, int, int]:
            if request.num_overtaken >= self.patience:  # among these only the arrival counts, or they would block
                return False, 0, request.arrival  # each other: see _may_overtake
            known = request.live[0].num_computed_tokens if id(request) in away else self._find(request).num_tokens
            return True, -known, request.arrival

        return sorted(islice(requests, WINDOW), key=rank)

    def _may_overtake(self, request: Request) -> bool:
        """Whether all that wait and arrived earlier have patience left. Under fcfs nobody loses it."""
        return self.schedule == "fcfs" or all(other.num_overtaken < self.patience for other in self._earlier(request))

    def _earlier(self, request: Request) -> list[Request]:
        others = self._queues.waiting + self._queues.swapped
        return [other for other in others if other.arrival < request.arrival]

    # --- whether there is room ----------------------------------------------------------------------------------

    def _admit(self, request: Request, step: Step) -> bool:
        """Start a request, or start it again after a recomputation; False if there is no room."""
        prefix = self._find(request)
        loading = self._transfers.get_num_new_matched_tokens(request, prefix.num_tokens, self._memory.block_size)
        count = loading or self._first_chunk(request, prefix, step)
        if count < 1 or not self._start(request, prefix, count):
            return False
        self._count_hits(request, prefix)
        step.plan.admitted.append(request.request_id)
        self._leave(self._queues.waiting, request)
        if loading:
            self._transfers.update_state_after_alloc(request, prefix.num_tokens, self._memory)
        else:
            self._transfers.drop(request)
            step.take(request, {request.live[0].seq_id: count}, [], set_aside=0)
        return True

    def _first_chunk(self, request: Request, prefix: Prefix, step: Step) -> int:
        """How many tokens its first sequence computes in this step, behind those of the prefix.

        As many as it may (`Request.target`) and the step grants. Without chunked prefill it gets less than it wants
        only in a step in which nobody got more than one token for each sequence (`Step.filled`); else 0: it waits.
        """
        wanted = request.target(request.live[0]) - prefix.num_tokens
        count = min(wanted, step.grant(wanted))
        return 0 if count < wanted and step.filled and not self._chunked_prefill else count

    def _start(self, request: Request, prefix: Prefix, count: int) -> bool:
        """Slots for its first sequence: the prefix, of which all is computed, and `count` tokens behind it.

        False, and nothing has changed, if less would be free then than must be kept (`_keep_free`). Its rest are the
        blocks for all tokens that the request has now (`Request.num_blocks`) that these slots don't give.
        """
        leader, slots = request.live[0], prefix.num_tokens + count
        rest = request.num_blocks(self._memory.block_size) - self._memory.blocks_for(slots)
        if isinstance(self._memory.allocate(leader.seq_id, slots, self._keep_free(rest), prefix), NoSpace):
            return False
        leader.in_memory, leader.num_computed_tokens = True, prefix.num_tokens
        return True

    def _resume(self, request: Request, step: Step) -> bool:
        """Swap a request in; False, and nothing has changed, if there is no room.

        Each of its sequences is sure of a token. Its rest (see `_keep_free`) are, for each, the blocks for the tokens
        that it has and not yet computed, and one at least. Of what it computed, memory may still find blocks.
        """
        if step.spare < len(request.live):
            return False
        held = {seq.seq_id: seq.tokens(0, seq.num_computed_tokens) for seq in request.live if seq.in_memory}
        blocks_for = self._memory.blocks_for
        rest = sum(max(1, blocks_for(len(seq)) - blocks_for(seq.num_computed_tokens)) for seq in request.live)
        moved = self._memory.swap_in(held, self._keep_free(rest), held)
        if isinstance(moved, NoSpace):
            return False
        step.plan.swap_in.extend(moved.moves)
        step.plan.resumed.append(request.request_id)
        self._leave(self._queues.swapped, request)
        step.spare -= len(request.live)
        counts = step.counts_of(request)
        if not isinstance(grown := self._memory.append(counts), NoSpace):
            step.take(request, counts, grown.copies, set_aside=len(counts))  # otherwise it computes in the next step
        return True

    def _leave(self, queue: list[Request], request: Request) -> None:
        queue.remove(request)
        if self.schedule == "prefix":
            for other in self._earlier(request):
                other.num_overtaken += 1

    def _keep_free(self, rest: int) -> int:
        """What must be left when a request joins others: the watermark, and the rest that it will want soon.

        The rest is what a long prompt needs in later steps, what is yet to be recomputed, or the next block of
        each sequence. Without it, it would be preempted at once. Alone, a request may have the whole pool.
        """
        return self.watermark_blocks + rest if self._queues.running else 0

    # --- what is there already ----------------------------------------------------------------------------------

    def _find(self, request: Request) -> Prefix:
        """What the prefix cache has of a request. Its last token is always computed: its logits are wanted."""
        leader = request.live[0]
        tokens = [] if request.needs_prompt_logits else leader.tokens(0, request.target(leader) - 1)
        return self._memory.find(tokens, request.cache_salt)

    def _count_hits(self, request: Request, prefix: Prefix) -> None:
        was_admitted, request.was_admitted = request.was_admitted, True
        if was_admitted:
            self.prefixes.recovered += prefix.num_tokens
        elif not request.needs_prompt_logits:
            request.metrics.num_cached_tokens = prefix.num_tokens
            self.prefixes.queried += len(request.prompt_token_ids)
            self.prefixes.found += prefix.num_tokens
