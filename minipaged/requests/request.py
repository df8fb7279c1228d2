"""One prompt with all its sequences: what was asked for, and how far it got."""

import math
import time
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any, Protocol

from minipaged.requests.beam_search_params import BeamSearchParams
from minipaged.requests.kv_transfer import NAME, KVTransferParams
from minipaged.requests.sampling_params import Draw, Logprob, PromptTargets, RequestOutputKind, SamplingParams
from minipaged.requests.sequence import Sequence


class RequestRefused(ValueError):
    """A request that can never be served; the message has the numbers."""


class Search(Protocol):
    """What a request with beams carries along: see decoding/beam_search.py. running: its beams, best first."""

    running: list[Any]

    @property
    def num_candidates(self) -> int: ...

    @property
    def num_wanted(self) -> int: ...

    def advance(self, candidates: Many[Many[tuple[int, float]]]) -> list[Any]: ...

    def hypotheses(self) -> list[Any]: ...


@dataclass
class RequestMetrics:
    """When things happened, in seconds of `time.monotonic`; and what was saved, and done twice."""

    arrival_time: float = field(default_factory=time.monotonic)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    num_cached_tokens: int = 0  # of the prompt: found in the prefix cache, and not computed for this request
    num_transferred_tokens: int = 0  # of the prompt: taken from another engine
    num_drafts: int = 0  # speculation: steps with guesses for a sequence of it, tokens guessed, tokens that were right
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    @property
    def queue_time(self) -> float | None:
        """Seconds from the arrival to the first computation."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    def time_per_output_token(self, num_tokens: int) -> float | None:
        """Mean seconds between the tokens after the first; num_tokens: the length of the longest output."""
        if self.first_token_time is None or self.finished_time is None or num_tokens < 2:
            return None
        return (self.finished_time - self.first_token_time) / (num_tokens - 1)


@dataclass(eq=False)
class Request:
    """One prompt and all its sequences (the paper's sequence group): scheduled and preempted together."""

    request_id: str
    arrival: int  # its place in the order of arrivals
    prompt_token_ids: list[int]
    params: SamplingParams | BeamSearchParams
    max_tokens: int  # params.max_tokens, or less where the model's length ends
    eos_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    prompt: str | None = None
    cache_salt: str | None = None  # only requests with the same one share what is cached
    bad_word_ids: list[list[int]] = field(default_factory=list)  # the tokens of params.bad_words
    grammar: Any = None  # params.structured_outputs, compiled
    was_admitted: bool = False  # at least once: what it finds later may be its own
    num_overtaken: int = 0  # how many requests came in before it that arrived later; see admission.py
    sequences: list[Sequence] = field(default_factory=list)  # for beam search: the running beams, in order
    search: Search | None = None  # the scheduler gives it one
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    error: str | None = None  # why it, or a sample of it, ended with finish_reason "error"
    load: Any = None  # of the plan: blocks that are on their way to it. Until they are there it computes nothing
    kv_transfer_told: dict[str, Any] | None = None  # where its blocks are kept for another engine

    def __post_init__(self) -> None:
        asked = isinstance(self.params, SamplingParams) and self.params.prompt_logprobs is not None
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = [None] if asked else None  # as far as computed
        self.kv_transfer = KVTransferParams.of((self.params.extra_args or {}).get(NAME))
        own = frozenset(self.params.stop_token_ids or ())
        self.stop_ids = own if self.params.ignore_eos else own | self.eos_token_ids

    @property
    def width(self) -> int:
        """How many sequences it will have, or has left."""
        if isinstance(self.params, BeamSearchParams):
            return self.params.beam_width
        return len(self.live) if len(self.sequences) > 1 else self.params.n

    @property
    def only_new(self) -> bool:
        """Whether who asked is told only what is new."""
        return getattr(self.params, "output_kind", None) is RequestOutputKind.DELTA

    @property
    def only_the_end(self) -> bool:
        return getattr(self.params, "output_kind", None) is RequestOutputKind.FINAL_ONLY

    @property
    def live(self) -> list[Sequence]:
        """Those that have not ended; not to be changed, since it may be `sequences` itself."""
        sequences = self.sequences
        if len(sequences) == 1 and sequences[0].finish_reason is None:  # asked for in every step, by far most often
            return sequences
        return [seq for seq in sequences if seq.finish_reason is None]

    @property
    def finished(self) -> bool:
        return not self.live

    @property
    def num_output_tokens(self) -> int:
        """Of all its sequences together."""
        return sum(len(seq.output_token_ids) for seq in self.sequences)

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether prompt_logprobs are wanted and not complete. The prefix cache has keys and values, and no logits."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt_token_ids)

    def target(self, seq: Sequence) -> int:
        """Up to which position this sequence may be computed now.

        Two cases are not simply "to its end", both after a preemption by recomputation. While there are
        sequences without memory, the first one rebuilds only the prompt, which all will share again by fork. And
        beams are ranked against each other, so none computes its last token until all can.
        """
        if len(self.sequences) == 1:
            return len(seq)
        live = self.live
        if any(not other.in_memory for other in live):
            return len(self.prompt_token_ids) if len(live) > 1 else len(seq)
        if self.search and len(live) > 1 and any(other.num_uncomputed > 1 for other in live):
            return len(seq) - 1
        return len(seq)

    def draw(self, seq: Sequence) -> Draw:
        """What to draw from the logits of its last token: one token, or the first one of each of n samples."""
        assert isinstance(self.params, SamplingParams)
        num_draws = 1 if seq.output_token_ids else self.params.n
        prompt, output = seq.prompt_token_ids, seq.output_token_ids
        ends = self.stop_ids, self.bad_word_ids, self.grammar
        return Draw(self.params, self.seed, seq.index, num_draws, prompt, output, *ends)

    def stop_reason(self, token_id: int) -> int | None:
        """What is told of a token that ended the text: nothing if it is the model's own end."""
        own_end = token_id in self.eos_token_ids and not self.params.ignore_eos
        return None if own_end else token_id

    def targets(self, end: int) -> PromptTargets | None:
        """Which logprobs of the prompt can be told next, once all tokens before position `end` are computed."""
        if not self.needs_prompt_logits:
            return None
        assert isinstance(self.params, SamplingParams) and self.prompt_logprobs is not None
        start = len(self.prompt_logprobs)
        token_ids = self.prompt_token_ids[start : end + 1]
        return PromptTargets(start, token_ids, self.params.prompt_logprobs or 0) if token_ids else None

    def num_blocks(self, block_size: int) -> int:
        """The blocks for all the tokens that it has now, with only the full blocks of the prompt shared."""
        shared = len(self.prompt_token_ids) // block_size
        return shared + sum(math.ceil(len(seq) / block_size) - shared for seq in self.live)

    def most_tokens(self, num_blocks: int, block_size: int) -> int:
        """The longest output that a pool has room for: `most_blocks` turned round."""
        shared = len(self.prompt_token_ids) // block_size
        longest = shared + max(0, num_blocks - shared) // self.width
        return longest * block_size + 1 - len(self.prompt_token_ids)

    def most_blocks(self, block_size: int) -> int:
        """The blocks it can need at the worst: the full blocks of the prompt are shared, the rest is not.

        The very last token is never computed, since nothing comes after it.
        """
        shared = len(self.prompt_token_ids) // block_size
        longest = len(self.prompt_token_ids) + self.max_tokens - 1
        width = self.width if self.max_tokens > 1 else 1  # a single token comes from the prompt's own sequence
        return shared + width * (math.ceil(longest / block_size) - shared)
