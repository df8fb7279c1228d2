"""One stream of tokens.

A sequence has no phase. It knows its tokens and how many of them have been computed, that is, have keys and
values in memory; the difference is the work to be done. A prompt that just arrived, a chunk of it, one more token,
and everything again after a preemption are the same thing with other numbers:

    token_ids    |  prompt ...................  |  output ........ |
    computed     |==============================|=========|        ^ not yet computed: at least the newest token
"""

from dataclasses import dataclass, field, replace

from minipaged.requests.sampling_params import SampledToken


@dataclass(eq=False)
class Sequence:
    """One stream of tokens: a prompt, shared with the other sequences of the request, and its own output."""

    prompt_token_ids: list[int]
    seq_id: int = -1  # given when the scheduler takes it
    index: int = 0  # which sample of its request
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    in_memory: bool = False  # whether it has a page table, on the GPU or swapped out
    sampled: list[SampledToken] = field(default_factory=list)  # the output again, with logprobs where asked for
    finish_reason: str | None = None  # "stop", "length", or "abort"
    acceptance: float = 0.7  # speculation: about how many of the last guesses were right
    stop_reason: int | str | None = None  # the stop token or the stop string, if one of the request's own ended it

    def __len__(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_uncomputed(self) -> int:
        return len(self) - self.num_computed_tokens

    def tokens(self, start: int, count: int) -> list[int]:
        """The tokens at positions start .. start + count - 1."""
        split = len(self.prompt_token_ids)
        if start >= split:
            return self.output_token_ids[start - split : start - split + count]
        end = start + count
        return self.prompt_token_ids[start:end] + self.output_token_ids[: max(0, end - split)]

    def child(self, index: int) -> "Sequence":
        """A second sequence with the same past. Its memory is forked elsewhere."""
        output, sampled = self.output_token_ids.copy(), self.sampled.copy()
        return replace(self, seq_id=-1, index=index, output_token_ids=output, sampled=sampled)
