"""Speculation: who has how many tokens checked besides its own, and what came of it (Leviathan et al., Chen et al.).

A decode step waits for memory: it reads every weight to make one token. To compute a few tokens more in the same step
costs little. So somebody cheap guesses how a sequence goes on (a proposer), the guesses are computed behind its own
token as if they were certain, and the model draws at each of these positions, as it would have without them:

    computed in one step       t    a    b    c          t: the newest token; a b c: guesses
    drawn at each position     a    b    x    -          a and b were right, x is the token after them

As long as the guess is what was drawn, the next position was computed for the right past. So each step gives the
tokens that were right, and one more. Guesses decide only how many positions a step computes, and never which token
stands there.

With several branches, a sequence has several guesses that begin differently. Each is a sequence of its own for the
length of a step: see memory/branching.py.

Guesses are soft: they take only tokens of the budget and blocks that nobody else needs for the token that is sure.
How many are worth it is told by `Speculation.count`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from minipaged.memory import Appended, KVCacheManager
from minipaged.requests.request import Request
from minipaged.requests.sequence import Sequence
from minipaged.scheduling.plan import Booked, ScheduledSequence, Step, StepOutput, StepPlan

FIRST_RATE = Sequence.acceptance  # the share of guesses that are right, before anything is known
# How much of that rate is left after one more guess was judged. Quotes begin and end all of a sudden; a model's guesses
# are right about as often everywhere.
MEMORY, LONG_MEMORY = 0.8, 0.95
RECOVERY = 0.003  # while nothing is guessed the rate goes back to the first one, so much of the way in each step


class Proposer(Protocol):
    """Who guesses from tokens alone: decoding/ngram.py. Those that compute tensors work in the execution room."""

    def propose(self, seq: Sequence, count: int, num_branches: int) -> list[list[int]]: ...

    def forget(self) -> None: ...


@dataclass
class SpeculationCounts:
    """Since the beginning; vLLM's names. A draft is what was guessed for a sequence in a step, by all its branches."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)  # how often so many were right at least

    @property
    def acceptance_rate(self) -> float:
        """The share of guessed tokens that were right."""
        return self.num_accepted_tokens / max(1, self.num_draft_tokens)

    @property
    def acceptance_rate_per_pos(self) -> list[float]:
        """Of all drafts, the share that was right so far at least: behind the first guess, the second, ..."""
        return [count / max(1, self.num_drafts) for count in self.num_accepted_tokens_per_pos]

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens that a step with guesses gave: those that were right, and the one after them."""
        return 1 + self.num_accepted_tokens / max(1, self.num_drafts)

    def copy(self) -> "SpeculationCounts":
        return replace(self, num_accepted_tokens_per_pos=self.num_accepted_tokens_per_pos.copy())


@dataclass
class Wish:
    """What a sequence would like to have checked besides its own token."""

    count: int  # tokens of its longest branch
    branches: list[list[int]]  # the guesses, the likeliest first; empty ones are left to whoever executes the plan

    @property
    def num_tokens(self) -> int:
        """All that is computed for it: branches compute the newest token again."""
        return sum(len(branch) or self.count for branch in self.branches) + len(self.branches) - 1


@dataclass
class Speculation:
    """The part of the scheduler that lets guesses be checked.

    num_speculative_tokens: the most guesses in a row. num_branches: the most of such rows for one sequence.
    proposer: who guesses from tokens alone; None: whoever executes the plan guesses.
    free_rows: how many tokens a step can compute in the time that it takes to read the weights.
    cost: of one more guess of a row, in steps. adaptive: whether fewer are guessed where fewer pay.
    """

    num_speculative_tokens: int
    num_branches: int = 1
    proposer: Proposer | None = None
    free_rows: float = 16
    cost: float = 0.0
    adaptive: bool = True
    counts: SpeculationCounts = field(default_factory=SpeculationCounts)

    def __post_init__(self) -> None:
        self.counts.num_accepted_tokens_per_pos = [0] * self.num_speculative_tokens

    # --- before a step ------------------------------------------------------------------------------------------

    def wishes(self, requests: Iterable[Request], num_running: int) -> dict[int, Wish]:
        """By sequence. Only who has one token to compute, and will draw the next, has something to wish.

        Nobody has, if what all could gain together, in steps, is not worth the making of their guesses.
        """
        found, gain = {}, 0.0
        for request in requests:
            for seq in request.live if request.search is None else ():
                ready = seq.in_memory and seq.output_token_ids and seq.num_uncomputed == 1
                if ready and (wish := self._wish(request, seq, num_running)):
                    found[seq.seq_id] = wish
                    gain += seq.acceptance / num_running - 1 / (num_running + self.free_rows)
        return found if gain > self.cost or not self.adaptive else {}

    def _wish(self, request: Request, seq: Sequence, num_running: int) -> Wish | None:
        most = min(self.num_speculative_tokens, request.max_tokens - len(seq.output_token_ids) - 1)
        count = self.count(seq, most, num_running)
        if count < 1:
            seq.acceptance += (FIRST_RATE - seq.acceptance) * RECOVERY
            return None
        width = self.num_branches
        if self.adaptive and num_running * width * (1 + count) > self.free_rows:
            width = 1
        if self.proposer is None:
            return Wish(count, [[] for _ in range(width)])
        branches = self.proposer.propose(seq, count, width)
        return Wish(max(map(len, branches)), branches) if branches else None

    def count(self, seq: Sequence, most: int, num_running: int) -> int:
        """How many guesses in a row are worth their price.

        Where S sequences run, a step takes S + free_rows, if what one row takes is 1; so a token costs each of them
        (S + free_rows) / S. A guess costs a row and its making, and saves a token if it is right, and with it all
        before it. So it pays as long as its chance is above S / (S + free_rows) + cost.
        """
        if not self.adaptive:
            return most
        least = num_running / (num_running + self.free_rows) + self.cost
        count, chance = 0, seq.acceptance
        while count < most and chance > least:
            count, chance = count + 1, chance * seq.acceptance
        return count

    def book(self, step: Step, wishes: dict[int, Wish], memory: KVCacheManager, new_id: Callable[[], int]) -> None:
        """Slots for as many guesses as there is room for, for those sequences that compute their own token now."""
        for _, counts in step.counts:
            for seq_id in counts:
                if wish := wishes.get(seq_id):
                    step.drafts[seq_id] = list(_book(step, seq_id, wish, memory, new_id))

    # --- after it -----------------------------------------------------------------------------------------------

    def settle(self, plan: StepPlan, output: StepOutput, memory: KVCacheManager) -> None:
        """Every sequence goes on with the memory of the branch that was right; the other branches end."""
        for s in plan.sequences:
            if s.branch_of is None:
                continue
            if output.winners.get(s.branch_of) == s.seq_id:
                memory.adopt(s.branch_of, s.seq_id)
            else:
                memory.free(s.seq_id)

    def learn(
        self, plan: StepPlan, output: StepOutput, requests: Iterable[Request], sequences: Callable[[int], Sequence]
    ) -> None:
        """What became of the guesses: counted, and kept in mind for the next ones."""
        by_id = {request.request_id: request for request in requests}
        rows: dict[int, list[ScheduledSequence]] = {}
        for s in plan.sequences:
            if output.drafts.get(s.seq_id):
                rows.setdefault(s.seq_id if s.branch_of is None else s.branch_of, []).append(s)
        for seq_id, guesses in rows.items():
            if seq_id in output.tokens:
                drafts = {s.seq_id: output.drafts[s.seq_id] for s in guesses}
                right = len(output.tokens[seq_id][0]) - 1
                self._count(by_id[guesses[0].request_id], sum(map(len, drafts.values())), right)
                longest = max(map(len, drafts.values()))
                guessed = len(drafts.get(output.winners.get(seq_id, seq_id), ())) or longest
                _judge(sequences(seq_id), guessed, right, MEMORY if self.proposer else LONG_MEMORY)

    def _count(self, request: Request, num_tokens: int, right: int) -> None:
        for counts in (self.counts, request.metrics):
            counts.num_drafts += 1
            counts.num_draft_tokens += num_tokens
            counts.num_accepted_tokens += right
        for place in range(right):
            self.counts.num_accepted_tokens_per_pos[place] += 1

    def start_over(self) -> None:
        """What was broken off may go on differently."""
        if self.proposer is not None:
            self.proposer.forget()


def _judge(seq: Sequence, guessed: int, right: int, memory: float) -> None:
    """Each guess up to the first wrong one says something; those behind it were never asked."""
    for place in range(min(guessed, right + 1)):
        seq.acceptance = memory * seq.acceptance + (1 - memory) * (place < right)


def with_guesses(s: ScheduledSequence, step: Step, memory: KVCacheManager) -> Iterator[ScheduledSequence]:
    """The sequence with its guesses behind its own token, and its branches."""
    for row in step.drafts[s.seq_id] or [Booked(s.seq_id, [])]:
        tokens = s.token_ids + row.drafts
        yield replace(
            s,
            seq_id=row.seq_id,
            token_ids=tokens,
            slots=memory.slots(row.seq_id, s.start, len(tokens) + row.num_to_draft),
            block_table=memory.current_table(row.seq_id),
            num_drafts=len(row.drafts),
            num_to_draft=row.num_to_draft,
            branch_of=s.seq_id if row.seq_id != s.seq_id else None,
        )


def _book(step: Step, seq_id: int, wish: Wish, memory: KVCacheManager, new_id: Callable[[], int]) -> Iterator[Booked]:
    first, *others = wish.branches
    count = min(len(first) or wish.count, step.spare)
    if not isinstance(memory.append({seq_id: count}), Appended):
        count = min(count, -memory.num_tokens(seq_id) % memory.block_size)  # what fits into its last block
        memory.append({seq_id: count})
    if not count:
        return
    step.spare -= count
    yield Booked(seq_id, first[:count], 0 if first else count)
    newest = memory.num_tokens(seq_id) - count - 1  # the position of its newest token, which branches compute again
    for guess in others:
        rows = 1 + min(len(guess) or count, count)
        if rows > step.spare:
            return
        branch_id = new_id()
        if not isinstance(grown := memory.branch(seq_id, branch_id, newest, rows), Appended):
            return
        step.spare -= rows
        step.add_copies(grown.copies)
        yield Booked(branch_id, guess[:count], 0 if guess else count)
