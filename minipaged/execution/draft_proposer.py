"""A smaller model guesses (Leviathan et al., Chen et al.).

It computes every token that the model computes: prompts in chunks, the newest tokens, and its own guesses, which is
how it makes them. What it knows of a token lies in its own cache at the token's slot.

    model   [ t  a  b  c ]      checks all in one step
    draft   [ t ][ a ][ b ]     guesses one after the other: a behind t, b behind a, c behind b
                       [ c ]    computed afterwards, if the model has kept it: so that nothing is missing
"""

from dataclasses import replace

import torch
from torch import Tensor

import kernels
from minipaged.execution.flat_batch import FlatBatches
from minipaged.execution.proposer import Proposer
from minipaged.execution.speculative_config import SpeculativeConfig
from minipaged.models import Loaded, ModelError, Tokenizer
from minipaged.scheduling.plan import ScheduledSequence, StepOutput


class DraftProposer(Proposer):
    """loaded: the draft. caches: for its keys and values, of as many blocks as the model's two pools have."""

    def __init__(
        self, loaded: Loaded, caches: tuple[Tensor, Tensor], batches: FlatBatches, vocab_size: int,
        config: SpeculativeConfig,
    ):  # fmt: skip
        super().__init__(config)
        self.model, self.batches, self.vocab_size = loaded.model, batches, vocab_size
        self.cache, self.caches = caches[0], [caches]

    def start(self, sequences: list[ScheduledSequence]) -> Tensor:
        own = [_own_tokens(s) for s in sequences]
        hidden = self._compute(own)
        ends, end = [], 0
        for s in own:
            end += len(s.token_ids)
            if s.num_to_draft:
                ends.append(end - 1)
        return self._logits(hidden[ends])

    def go_on(self, rows: list[ScheduledSequence], places: list[int]) -> Tensor:
        return self._logits(self._compute(rows))

    def follow(
        self, sequences: list[ScheduledSequence], inputs: tuple[Tensor, Tensor, kernels.Batch], hidden: Tensor,
        output: StepOutput,
    ) -> None:  # fmt: skip
        """The last guess of a row that was all right: it has not computed that one."""
        winners = {output.winners.get(seq_id, seq_id): len(rows[0]) - 1 for seq_id, rows in output.tokens.items()}
        kept = [s for s in sequences if s.num_drafts and winners.get(s.seq_id) == s.num_drafts]
        if kept:
            self._compute([_last(s) for s in kept])

    def _compute(self, rows: list[ScheduledSequence]) -> Tensor:
        input_ids, positions, batch = self.batches.of(rows)
        return self.model(input_ids, positions, self.cache, batch)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Of the model's vocabulary: both have the same tokens, but may be padded differently."""
        logits = self.model.logits(hidden)
        missing = self.vocab_size - logits.shape[1]
        padding = logits.new_full((len(logits), max(0, missing)), float("-inf"))
        return logits[:, : self.vocab_size] if missing <= 0 else torch.cat((logits, padding), 1)


def _own_tokens(s: ScheduledSequence) -> ScheduledSequence:
    return replace(s, slots=s.slots[: s.num_own], targets=None)


def _last(s: ScheduledSequence) -> ScheduledSequence:
    place = len(s.token_ids) - 1
    return replace(
        s, token_ids=s.token_ids[place:], start=s.start + place, slots=s.slots[place:], num_drafts=0, targets=None
    )


def check_draft(name: str, draft: Loaded, tokenizer: Tokenizer, max_model_len: int) -> None:
    """ModelError unless it says the same tokens by the same numbers, for as many positions."""
    ours, theirs = (one.backend.get_vocab(with_added_tokens=True) for one in (tokenizer, draft.tokenizer))
    if ours != theirs:
        differ = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
        example = min(differ)
        raise ModelError(
            f"speculative_config: {name} has another vocabulary, so it can't guess: {len(differ):,} tokens differ, "
            f"such as {example!r}, which is {ours.get(example)} in the model and {theirs.get(example)} in the draft"
        )
    if draft.config.max_model_len < max_model_len:
        raise ModelError(
            f"speculative_config: {name} knows {draft.config.max_model_len} positions, and the engine may need "
            f"{max_model_len}: give max_model_len={draft.config.max_model_len}"
        )
