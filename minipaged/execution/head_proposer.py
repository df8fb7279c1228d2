"""A head guesses: a small network on the model's own last hidden state (the idea of EAGLE, Li et al. 2024).

The state after the last computed token says most of what comes next. From it and the token that was drawn, the head
guesses the next state, which by the model's own output projection is the next token; and so on from there.

    state of s  +  token t  ->  guessed state of t  ->  a          s t: the newest tokens, t not yet computed
    that state  +  token a  ->  guessed state of a  ->  b          a b: guesses

The true states of all computed tokens lie in a cache, at their tokens' slots, and so do the head's own keys and values.
"""

from dataclasses import replace

import torch
from torch import Tensor

import kernels
from minipaged.execution.flat_batch import FlatBatches
from minipaged.execution.proposer import Proposer
from minipaged.execution.speculative_config import SpeculativeConfig
from minipaged.models.head import Head
from minipaged.scheduling.plan import ScheduledSequence, StepOutput


class HeadProposer(Proposer):
    """states, cache: each for both pools; see `kernels.new_cache`. A state of E numbers is kept as two halves."""

    def __init__(
        self, head: Head, states: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor], batches: FlatBatches,
        vocab_size: int, config: SpeculativeConfig,
    ):  # fmt: skip
        super().__init__(config)
        self.head, self.batches, self.vocab_size = head, batches, vocab_size
        self.states, self.cache = states[0][0], cache[0][0]  # of the one layer: [2, 1, N, B, E/2] and [2, G, N, B, D]
        self.caches = [states, cache]
        self._guessed = self.states.new_empty(0)  # the states that were guessed last, [R, E]

    def start(self, sequences: list[ScheduledSequence]) -> Tensor:
        rows = [replace(s, slots=s.slots[:1], targets=None, num_to_draft=0) for s in sequences if s.num_to_draft]
        return self._guess(self._states_before(rows), rows) if rows else self.states.new_empty(0, self.vocab_size)

    def go_on(self, rows: list[ScheduledSequence], places: list[int]) -> Tensor:
        return self._guess(self._guessed[places], rows)

    def _guess(self, before: Tensor, rows: list[ScheduledSequence]) -> Tensor:
        input_ids, positions, batch = self.batches.of(rows)
        self._guessed = self.head(before, input_ids, positions, self.cache, batch)
        logits = self.head.logits(self._guessed)
        if self.head.token_ids is None:
            return logits
        all_tokens = logits.new_full((len(logits), self.vocab_size), -torch.inf)
        return all_tokens.index_copy_(1, self.head.token_ids, logits)

    def follow(
        self, sequences: list[ScheduledSequence], inputs: tuple[Tensor, Tensor, kernels.Batch], hidden: Tensor,
        output: StepOutput,
    ) -> None:  # fmt: skip
        input_ids, positions, batch = inputs
        before = hidden.roll(1, 0)
        before[batch.query_start[:-1]] = self._states_before(sequences)
        first, second = hidden.unsqueeze(1).chunk(2, -1)
        self.head.backend.write_kv(first, second, self.states, batch)
        self.head.write(before, input_ids, positions, self.cache, batch)

    def _states_before(self, sequences: list[ScheduledSequence]) -> Tensor:
        """The true state before the first token of each, [S, E]; zeros at the very beginning."""
        size = self.batches.block_size
        last = [max(0, s.start - 1) for s in sequences]
        slots = [s.block_table[p // size] * size + p % size for s, p in zip(sequences, last, strict=True)]
        first, second = self.states[:, 0].flatten(1, 2)[:, slots]
        found = torch.cat((first, second), -1)
        found[[place for place, s in enumerate(sequences) if s.start == 0]] = 0
        return found
