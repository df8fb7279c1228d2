"""Proposers that compute: what draft_proposer.py and head_proposer.py share.

A plan leaves the guessing to them (`ScheduledSequence.num_to_draft`), and has booked slots for it. They guess at the
beginning of a step, one token after the other, in all rows at once, and the model checks the guesses in the same step.

What they remember of each token lies in caches of their own shape under the same page tables as the model's keys and
values: the same slots, the same block numbers. So whatever is forked, copied, swapped or found in a prefix cache is
so for both, and nobody has to know.

A guess is drawn as the model will draw, with the same parameters and the same random number. So where the proposer's
probabilities are like the model's, the same token is likely to come (coupling). Where they aren't, to guess what seems
likeliest is better (`draft_sample_method`). The papers' rule needs guesses that are independent of the model's draw:
drawn with another number, see decoding/rejection.py.
"""

from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import kernels
from minipaged.decoding.rejection import GUESS, pick, probabilities
from minipaged.decoding.sampling import sample
from minipaged.execution.speculative_config import SpeculativeConfig
from minipaged.requests.sampling_params import BadLogits, Draw
from minipaged.scheduling.plan import ScheduledSequence, StepOutput


@dataclass
class Guesses:
    """By sequence or branch. chances: for the papers' rule, what each guess was drawn from, [guesses, V]."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    chances: dict[int, list[Tensor]] = field(default_factory=dict)

    def appended(self, sequences: list[ScheduledSequence]) -> list[ScheduledSequence]:
        """The sequences as they are computed: with their guesses behind their own tokens."""
        return [self._with_guesses(s) if s.num_to_draft else s for s in sequences]

    def _with_guesses(self, s: ScheduledSequence) -> ScheduledSequence:
        tokens = s.token_ids + self.tokens.get(s.seq_id, [])
        num_drafts = len(tokens) - s.num_own
        return replace(s, token_ids=tokens, slots=s.slots[: len(tokens)], num_drafts=num_drafts, num_to_draft=0)


class Proposer(ABC):
    """The loop. caches: pairs of what lies in the device's and in the CPU's pool, each [L, 2, G, N, B, D]."""

    caches: list[tuple[Tensor, Tensor]]

    def __init__(self, config: SpeculativeConfig):
        self._by_chance = config.acceptance == "rejection"
        self._greedy = config.guesses_greedily

    @abstractmethod
    def start(self, sequences: list[ScheduledSequence]) -> Tensor:
        """Learn of the own tokens of all sequences. Logits [R, V] behind the last one of those that want guesses."""

    @abstractmethod
    def go_on(self, rows: list[ScheduledSequence], places: list[int]) -> Tensor:
        """Logits [R, V] behind the guess that each row has as its only token; its place among the rows before."""

    @abstractmethod
    def follow(
        self, sequences: list[ScheduledSequence], inputs: tuple[Tensor, Tensor, kernels.Batch], hidden: Tensor,
        output: StepOutput,
    ) -> None:  # fmt: skip
        """The model has computed a step: input_ids, positions and batch, to hidden [T, E]."""

    def propose(self, sequences: list[ScheduledSequence]) -> Guesses:
        guesses = Guesses()
        logits = self.start(sequences)
        rows = [s for s in sequences if s.num_to_draft]
        for s in rows:
            guesses.tokens[s.seq_id] = []
        while rows:
            tokens = self._draw(rows, logits, guesses)
            going = [
                (place, s) for place, s in enumerate(rows)
                if tokens[place] is not None and len(guesses.tokens[s.seq_id]) < s.num_to_draft
            ]  # fmt: skip
            places, rows = [place for place, _ in going], [s for _, s in going]
            if rows:
                logits = self.go_on([_next_row(s, guesses.tokens[s.seq_id]) for s in rows], places)
        return guesses

    def _draw(self, rows: list[ScheduledSequence], logits: Tensor, guesses: Guesses) -> list[int | None]:
        """The next guess of each row, noted in `guesses`; None where nothing can be drawn."""
        draws = [self._behind(s, guesses.tokens[s.seq_id]) for s in rows]
        found: list[int | None] = []
        for drawn in sample(logits, draws):
            found.append(None if isinstance(drawn, BadLogits) else drawn[0].token_id)
        if self._by_chance:
            self._draw_by_chance(rows, logits, draws, found, guesses)
        else:
            _branch_out(rows, logits, found, guesses)
        for s, token in zip(rows, found, strict=True):
            if token is not None:
                guesses.tokens[s.seq_id].append(token)
        return found

    def _behind(self, s: ScheduledSequence, guessed: list[int]) -> Draw:
        draw = s.draw
        assert draw is not None
        if draw.params.logprobs is not None or (self._greedy and not draw.params.greedy):
            params = copy(draw.params)  # they were checked, and nobody else sees these
            vars(params).update(logprobs=None, temperature=0.0 if self._greedy else params.temperature)
            draw = replace(draw, params=params)
        return draw.behind([*draw.output_token_ids, *guessed]) if guessed else draw

    def _draw_by_chance(
        self, rows: list[ScheduledSequence], logits: Tensor, draws: list[Draw], found: list[int | None],
        guesses: Guesses,
    ) -> None:  # fmt: skip
        chosen = [r for r, draw in enumerate(draws) if not draw.params.greedy and found[r] is not None]
        if chosen:
            for r, chances in zip(chosen, probabilities(logits[chosen], [draws[r] for r in chosen]), strict=True):
                found[r] = pick(chances, draws[r], GUESS)
                guesses.chances.setdefault(rows[r].seq_id, []).append(chances)


def _branch_out(rows: list[ScheduledSequence], logits: Tensor, found: list[int | None], guesses: Guesses) -> None:
    """Branches begin with what seems likeliest after the token that is guessed for the sequence itself."""
    taken: dict[int, list[int]] = {}
    for place, s in enumerate(rows):
        token = found[place]
        if guesses.tokens[s.seq_id] or token is None:
            continue
        if s.branch_of is None:
            taken[s.seq_id] = [token]
        elif s.branch_of in taken:
            others = taken[s.branch_of]
            best = logits[place].topk(len(others) + 1).indices.tolist()
            found[place] = next(one for one in best if one not in others)
            others.append(found[place])  # type: ignore[arg-type]


def _next_row(s: ScheduledSequence, guessed: list[int]) -> ScheduledSequence:
    """The newest guess, alone, where it will stand."""
    place = len(s.token_ids) + len(guessed) - 1
    return replace(
        s, token_ids=guessed[-1:], start=s.start + place, slots=s.slots[place : place + 1], targets=None, num_to_draft=0
    )


def stack(chances: dict[int, list[Tensor]]) -> dict[int, Tensor]:
    return {seq_id: torch.stack(rows) for seq_id, rows in chances.items()}
