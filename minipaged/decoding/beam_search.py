"""Beam search: keep the likeliest few continuations of one prompt, instead of a single one.

Everything about beam search is in this file, but its parameters: its scores, who survives a step, when it ends, and
what a step means for the memory of the beams. Integers and floats only: log-probabilities come in, the
next running beams go out. The memory itself is the scheduler's: `memory_moves` says what to do with it.

One step, `BeamSearch.advance`, with W = beam_width:

    W running beams -> each offers its likeliest next tokens -> all ranked by total log-probability
      among ranks 0..W-1, with a stop token  -> finished; the W best finished ones are kept
      the W best without a stop token        -> the running beams of the next step
      everything else                        -> forgotten

With the last token that max_tokens allows, all of ranks 0..W-1 finish, stop token or not, and nothing runs on.

If two continuations of a beam survive, it is forked: two sequences share all its blocks. If none does, it is
freed. All that paged memory has to do for beam search is sharing (paper, section 4.4).

The rules are those of transformers 5 (`GenerationMixin._beam_search`), so tokens and scores equal its. Two
differences: sums are Python floats, not float32, so candidates that differ by a rounding may swap ranks; and
of equal scores the better beam's, then the earlier candidate's goes first, where torch promises no order. Of
equal hypotheses the one that finished first stays first; in one step, the one of the better rank.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from minipaged.requests.beam_search_params import BeamSearchParams


class Beam(NamedTuple):
    """A running beam: its output tokens so far, and the sum of their log-probabilities."""

    token_ids: tuple[int, ...]
    score: float


class Continuation(NamedTuple):
    """A beam of the next step: what beam `parent` of this step becomes with one more token."""

    parent: int
    token_id: int
    score: float


class Hypothesis(NamedTuple):
    """A finished output: its tokens without the prompt, but with the stop token if one ended it.

    score: cumulative_logprob / len(token_ids) ** length_penalty; transformers calls it sequences_scores.
    """

    token_ids: tuple[int, ...]
    score: float
    cumulative_logprob: float
    finish_reason: Literal["stop", "length"]
    stop_token_id: int | None


class BeamSearch:
    """The search of one request. It begins with one running beam: the prompt, no output, score 0.

    It need not know the prompt or its length: all lengths here count output tokens.

    Token 0 ends a text. Token 1 looks better than 2 at first, but after 2 the end is nearly certain:

    >>> from math import log
    >>> search = BeamSearch(BeamSearchParams(beam_width=2), max_tokens=3, eos_token_ids=[0])
    >>> [(c.parent, c.token_id) for c in search.advance([[(1, log(0.5)), (2, log(0.4)), (0, log(0.1))]])]
    [(0, 1), (0, 2)]
    >>> after_1 = [(1, log(0.40)), (2, log(0.35)), (0, log(0.25))]
    >>> after_2 = [(0, log(0.90)), (1, log(0.06)), (2, log(0.04))]

    Best of all is 2 and the end: finished. The two that run on both come from beam 0: fork it, free beam 1.

    >>> [(c.parent, c.token_id) for c in search.advance([after_1, after_2])]
    [(0, 1), (0, 2)]
    >>> search.advance([after_1, after_1])  # the third token: whatever still runs ends here
    []
    >>> for h in search.hypotheses():
    ...     print(h.token_ids, h.finish_reason, round(h.score, 3))
    (2, 0) stop -0.511
    (1, 1, 1) length -0.842
    """

    def __init__(self, params: BeamSearchParams, max_tokens: int, eos_token_ids: Iterable[int]) -> None:
        """max_tokens: the limit that applies, params.max_tokens or what the model has room for."""
        if type(max_tokens) is not int or max_tokens < 1:
            raise ValueError(f"max_tokens must be an integer of at least 1, got {max_tokens!r}")
        self.params = params
        self.max_tokens = max_tokens
        own = () if params.ignore_eos else eos_token_ids
        self.stop_ids = frozenset(own) | frozenset(params.stop_token_ids or ())
        self.running = [Beam((), 0.0)]  # best first
        self.finished: list[Hypothesis] = []  # best first, at most beam_width
        self.done = False

    @property
    def num_candidates(self) -> int:
        """How many of its likeliest tokens each running beam must offer.

        All survivors may come from one beam, and in each beam every stop token may rank above them.
        """
        return max(2, 1 + len(self.stop_ids)) * self.params.beam_width

    def advance(self, candidates: Sequence[Sequence[tuple[int, float]]]) -> list[Continuation]:
        """One step. Returns the beams that run now, best first; none: the search is over, see `hypotheses`.

        candidates[i]: the `num_candidates` likeliest (token id, log-probability) after beam i of `running`,
        likeliest first. Fewer only if the vocabulary has no more.
        A search that is over stays as it is: no beam runs, and advance([]) is [].
        Errors: ValueError, and nothing changed, if the lists do not fit the running beams or hold a NaN.
        """
        if len(candidates) != len(self.running):
            raise ValueError(f"{len(self.running)} beams are running, got candidates for {len(candidates)}")
        width = self.params.beam_width
        at_limit = not self.done and len(self.running[0].token_ids) + 1 == self.max_tokens
        ranked = self._rank(candidates)
        # Subtle: a stop token below rank `width` does not finish, and does not run on either.
        finishing = [c for c in ranked[:width] if at_limit or c.token_id in self.stop_ids]
        survivors = [c for c in ranked if not (at_limit or c.token_id in self.stop_ids)][:width]

        finished = self.finished + [self._finish(c) for c in finishing]
        self.finished = sorted(finished, key=lambda h: h.score, reverse=True)[:width]
        self.done = not survivors or not self._can_improve(survivors[0].score, len(self.running[0].token_ids) + 1)
        if self.done:
            survivors = []
        self.running = [Beam((*self.running[c.parent].token_ids, c.token_id), c.score) for c in survivors]
        return survivors

    def _rank(self, candidates: Sequence[Sequence[tuple[int, float]]]) -> list[Continuation]:
        """The `num_candidates` best continuations of all beams together, best first."""
        ranked = [
            Continuation(parent, token_id, beam.score + logprob)
            for parent, beam in enumerate(self.running)
            for token_id, logprob in candidates[parent]
        ]
        if any(math.isnan(c.score) for c in ranked):
            raise ValueError("a candidate's log-probability is NaN: the model's logits are broken")
        return sorted(ranked, key=lambda c: c.score, reverse=True)[: self.num_candidates]

    def _finish(self, last: Continuation) -> Hypothesis:
        token_ids = (*self.running[last.parent].token_ids, last.token_id)
        score = last.score / len(token_ids) ** self.params.length_penalty
        if last.token_id in self.stop_ids:
            return Hypothesis(token_ids, score, last.score, "stop", last.token_id)
        return Hypothesis(token_ids, score, last.score, "length", None)

    def _can_improve(self, best_score: float, length: int) -> bool:
        """Whether to go on, once this step's hypotheses are among `finished`. See `BeamSearchParams.early_stopping`.

        best_score, length: log-probability and tokens of the best beam that would run on, this step's token included.
        While fewer than beam_width hypotheses are finished, the search goes on in any case.
        """
        if len(self.finished) < self.params.beam_width:
            return True
        if self.params.early_stopping is True:
            return False
        penalty = self.params.length_penalty
        if self.params.early_stopping == "never" and penalty > 0:
            length = self.max_tokens
        return best_score / length**penalty > self.finished[-1].score

    @property
    def num_wanted(self) -> int:
        return self.params.n or self.params.beam_width

    def hypotheses(self) -> list[Hypothesis]:
        """The `n` best finished hypotheses, best first; of those finished so far while the search runs."""
        return self.finished[: self.num_wanted]


class MemoryMoves(NamedTuple):
    """What a step means for memory: numbers of old and new beams. Do it in this order: fork, keep, free."""

    fork: list[tuple[int, int]]  # (old, new): the new beam shares the blocks of the old
    keep: list[tuple[int, int]]  # (old, new): the new beam takes over the blocks of the old
    free: list[int]  # old beams of which nothing goes on


def memory_moves(continuations: Sequence[Continuation], num_old: int) -> MemoryMoves:
    """The first child of a beam keeps its memory, further children fork it, a beam without a child is freed.

    Forks come before any beam gets its new token, while the blocks of the old beams are as they were.

    >>> memory_moves([Continuation(0, 7, -1.0), Continuation(2, 7, -2.0), Continuation(0, 9, -3.0)], 3)
    MemoryMoves(fork=[(0, 2)], keep=[(0, 0), (2, 1)], free=[1])
    """
    heir: dict[int, int] = {}
    for new, continuation in enumerate(continuations):
        heir.setdefault(continuation.parent, new)
    fork = [(c.parent, new) for new, c in enumerate(continuations) if heir[c.parent] != new]
    return MemoryMoves(fork, list(heir.items()), [old for old in range(num_old) if old not in heir])
