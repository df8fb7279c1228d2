"""What the scheduler and the runner say to each other: plain data, no tensors.

A plan can be printed, drawn, written to a file, replayed, and tested with no model at all.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from minipaged.requests.kv_transfer import KVTransferParams
from minipaged.requests.request import Request
from minipaged.requests.sampling_params import Draw, Logprob, PromptTargets, SampledToken


@dataclass(frozen=True)
class ScheduledSequence:
    """The tokens that one sequence computes in this step.

    Speculation: behind its own tokens it may have guesses computed, of which it keeps those that turn out right. A
    branch is another guess for the same sequence, in the place of a sequence of its own: see speculation.py.
    """

    seq_id: int
    request_id: str
    token_ids: list[int]
    start: int  # the position of the first of them: so many tokens were computed before
    slots: list[int]  # where their keys and values go, one for each token, and for each that is to be guessed
    block_table: list[int]
    draw: Draw | None = None  # what to draw from the logits of the last token
    num_candidates: int = 0  # beam search: how many of the best next tokens to return instead
    targets: PromptTargets | None = None  # tokens of the prompt whose logprobs are to be returned too
    num_drafts: int = 0  # so many of token_ids, the last ones, are guesses
    num_to_draft: int = 0  # so many more are guessed by whoever executes the plan, who appends them
    branch_of: int | None = None  # the sequence that it is a branch of

    @property
    def num_own(self) -> int:
        """How many of token_ids are certain."""
        return len(self.token_ids) - self.num_drafts

    @property
    def draft_token_ids(self) -> list[int]:
        return self.token_ids[self.num_own :]

    @property
    def context_len(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class Load:
    """Blocks of another engine that come here, in the course of several steps: see transfer.py."""

    number: int  # which no other load has
    request_id: str
    source: KVTransferParams  # where they are
    digest: str  # of the tokens of all blocks that are there
    first: int  # the first of them that is wanted; those before it are here already
    blocks: list[int]  # where it and those behind it go


@dataclass(frozen=True)
class StepPlan:
    """One step. Memory is moved first, in the order of the fields; then the tokens are computed.

    Pairs are (from, to): swap_out from a GPU block to a CPU block, swap_in back, copies inside the GPU pool.
    """

    step: int
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    freed: list[int] = field(default_factory=list)  # nobody's any more: poisoned in debug mode
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    sequences: list[ScheduledSequence] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)  # request ids, as are the next two
    preempted: list[tuple[str, str]] = field(default_factory=list)  # (request id, "swap" or "recompute")
    resumed: list[str] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)  # those that go on, and no others
    unneeded: list[KVTransferParams] = field(default_factory=list)  # what is kept elsewhere for nothing

    @property
    def num_tokens(self) -> int:
        """Guesses among them."""
        return sum(len(s.token_ids) + s.num_to_draft for s in self.sequences)

    def to_json(self) -> dict[str, Any]:
        """For a trace. A draw is reduced to a yes: what it draws from is in the request."""
        sequences = [
            {**vars(s), "draw": s.draw is not None, "targets": s.targets and asdict(s.targets)} for s in self.sequences
        ]
        loads, unneeded = map(asdict, self.loads), map(asdict, self.unneeded)
        return {**vars(self), "sequences": sequences, "loads": [*loads], "unneeded": [*unneeded]}


@dataclass(frozen=True)
class StepOutput:
    """What came of a step, by sequence id.

    tokens: a list for each sample: n of them after a prompt of n samples, else one. In it its new tokens, in order:
        the guesses that were right, and one more, which the model drew where they end.
    winners: the branch that was right, for sequences whose own guess was not. Its memory holds the new tokens.
    loaded: loads that have ended, by number, and why nothing comes of them; None: all their blocks are written.
    """

    tokens: dict[int, list[list[SampledToken]]] = field(default_factory=dict)
    candidates: dict[int, Sequence[tuple[int, float]]] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[dict[int, Logprob]]] = field(default_factory=dict)  # one for each target
    errors: dict[int, str] = field(default_factory=dict)  # why nothing can be drawn for a sequence, ever
    drafts: dict[int, list[int]] = field(default_factory=dict)  # what was guessed, by branches too
    winners: dict[int, int] = field(default_factory=dict)
    loaded: dict[int, str | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Booked:
    """A row of guesses that has its slots. seq_id: of the sequence that it is for, or of a branch."""

    seq_id: int
    drafts: list[int]
    num_to_draft: int = 0


@dataclass
class Step:
    """The plan of one step while it is being made.

    A prompt is long if what is left of it would not fit into one step. Long ones leave to the others what these need,
    but not more than half of what there is: so nobody waits until a very long prompt is through, and that takes twice
    as long at the worst. Among long ones, and among the others, who came first is first.
    """

    plan: StepPlan
    spare: int  # tokens of the budget that are nobody's yet
    short: int = sys.maxsize  # the most tokens of a short prompt
    wanted_by_short: Callable[["Step"], int] = lambda step: 0  # asked only if there is a long one
    for_long: int | None = None  # the tokens of `spare` that long prompts may take; None: no long one has asked
    set_aside: int = 0  # for guesses
    filled: bool = False  # whether a request got more than one token for each sequence
    counts: list[tuple[Request, dict[int, int]]] = field(default_factory=list)
    drafts: dict[int, list[Booked]] = field(default_factory=dict)  # by sequence: its own row first, then its branches'

    def counts_of(self, request: Request) -> dict[int, int]:
        """How many tokens each sequence computes: one, and more if it has more to do and the budget allows.

        By sequence id: those that are in memory and have something to do, up to `Request.target`. What they get
        beyond one token each comes out of the same grant, in the order of `request.live`.
        """
        counts, granted = {}, 0
        for seq in request.live:
            todo = request.target(seq) - seq.num_computed_tokens if seq.in_memory else 0
            if todo > 0:
                counts[seq.seq_id] = 1 + max(0, min(todo - 1, self.grant(todo) - granted))
                granted += counts[seq.seq_id] - 1
        return counts

    def grant(self, todo: int) -> int:
        """The most tokens for somebody who has so many to compute.

        All that is spare, for who is not long. The first long one that asks while there is something settles what
        long ones may take in this step (`for_long`): what is spare then, less what short ones want, which is at most
        half of it, rounded down.
        """
        if todo <= self.short or self.spare < 1:
            return self.spare
        if self.for_long is None:
            self.for_long = self.spare - min(self.spare // 2, self.wanted_by_short(self))
        return min(self.spare, self.for_long)

    def take(self, request: Request, counts: dict[int, int], copies: list[tuple[int, int]], set_aside: int) -> None:
        """The request computes so many tokens; `set_aside` of them are out of the budget already.

        A long one takes the others out of `for_long` too, if that was settled. The step notes `counts` and copies.
        """
        extra = sum(counts.values()) - set_aside
        self.spare -= extra
        if self.for_long is not None and self._is_long(request):
            self.for_long -= extra
        self.filled |= sum(counts.values()) > len(counts)
        self.add_copies(copies)
        self.counts.append((request, counts))

    def add_copies(self, copies: list[tuple[int, int]]) -> None:
        """All copies of a step are made at once: of a block that is a copy itself, its source is copied."""
        sources = {target: source for source, target in self.plan.copies}
        self.plan.copies.extend((sources.get(source, source), target) for source, target in copies)

    def _is_long(self, request: Request) -> bool:
        todos = (request.target(seq) - seq.num_computed_tokens for seq in request.live if seq.in_memory)
        return any(todo > self.short for todo in todos)
