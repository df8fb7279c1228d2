"""What a caller gets back. Names as in vLLM's `RequestOutput`, and for beam search its `BeamSearchOutput`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from minipaged.requests.request import Request, RequestMetrics
from minipaged.requests.sampling_params import Logprob
from minipaged.requests.sequence import Sequence
from minipaged.text.logprobs import with_text
from minipaged.text.sequence_text import SequenceText
from minipaged.text.tokenizer import Tokenizer


@dataclass
class CompletionOutput:
    """One output of a request."""

    index: int
    text: str
    token_ids: list[int]  # with the stop token, if one ended it
    cumulative_logprob: float | None = None  # sampling: only if logprobs were asked for
    logprobs: list[dict[int, Logprob]] | None = None  # for each token, by token id; the drawn one is among them
    finish_reason: str | None = None  # "stop", "length", "abort", "error"; None while it runs
    stop_reason: int | str | None = None  # the stop string, or the id of one of stop_token_ids
    score: float | None = None  # beam search: the length-normalised score

    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_chars(self) -> int:
        return len(self.text)

    def after(self, num_chars: int, num_tokens: int) -> "CompletionOutput":
        """The same without the beginning of its text, and without its first tokens."""
        logprobs = self.logprobs[num_tokens:] if self.logprobs is not None else None
        return self._with(self.text[num_chars:], self.token_ids[num_tokens:], logprobs)

    def _with(
        self, text: str, token_ids: list[int], logprobs: list[dict[int, Logprob]] | None
    ) -> "CompletionOutput":
        return CompletionOutput(
            self.index, text, token_ids, self.cumulative_logprob, logprobs, self.finish_reason, self.stop_reason,
            self.score,
        )  # fmt: skip


@dataclass
class RequestOutput:
    """The state of a request after a step, or at its end."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # for each token of the prompt; None for the first
    error: str | None = None  # why an output ended with finish_reason "error"
    kv_transfer_params: dict[str, Any] | None = None  # where its blocks are kept for another engine
    only_new = False  # whether the request is told only what is new: SamplingParams.output_kind

    @property
    def num_cached_tokens(self) -> int:
        """How many tokens of the prompt were found in the prefix cache."""
        return self.metrics.num_cached_tokens

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds between the tokens after the first."""
        return self.metrics.time_per_output_token(max((len(o.token_ids) for o in self.outputs), default=0))

    def since(self, told: "RequestOutput | None") -> "RequestOutput":
        """The same with what came after `told` only."""
        known = {output.index: output for output in told.outputs} if told else {}
        outputs = [_since(output, known.get(output.index)) for output in self.outputs]
        prompt_logprobs = None if told else self.prompt_logprobs
        return RequestOutput(
            self.request_id, self.prompt, self.prompt_token_ids, outputs, self.finished, self.metrics,
            prompt_logprobs, self.error, self.kv_transfer_params,
        )  # fmt: skip


def _since(output: CompletionOutput, told: CompletionOutput | None) -> CompletionOutput:
    return output.after(told.num_chars, told.num_tokens) if told else output.after(0, 0)


# --- while they grow --------------------------------------------------------------------------------------------------
# A step must not cost what was there before it. So these hold where the step ended, and make lists and text when
# somebody looks at them. They are copies: whatever a caller does with them, the engine goes on with its own.


class GrowingOutput(CompletionOutput):
    """The output of one sequence as it is now, whenever it is looked at."""

    def __init__(self, seq: Sequence, text: SequenceText, tokenizer: Tokenizer):
        self.index, self.finish_reason, self.stop_reason = seq.index, seq.finish_reason, seq.stop_reason
        self._seq, self._num_tokens = seq, len(seq.output_token_ids)
        self._text, self._length, self._tokenizer = text, text.shown_length(self.finished()), tokenizer

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    @property
    def num_chars(self) -> int:
        return self._length

    @cached_property
    def text(self) -> str:  # type: ignore[override]
        return self._text.part(0, self._length)

    @cached_property
    def token_ids(self) -> list[int]:  # type: ignore[override]
        return self._seq.output_token_ids[: self._num_tokens]

    @cached_property
    def logprobs(self) -> list[dict[int, Logprob]] | None:  # type: ignore[override]
        return self._logprobs_from(0)

    def after(self, num_chars: int, num_tokens: int) -> CompletionOutput:
        text = self._text.part(num_chars, self._length) if num_chars < self._length else ""
        tokens = self._seq.output_token_ids[num_tokens : self._num_tokens]
        return self._with(text, tokens, self._logprobs_from(num_tokens))

    def _logprobs_from(self, first: int) -> list[dict[int, Logprob]] | None:
        if not self._num_tokens or self._seq.sampled[0].top_logprobs is None:
            return None
        sampled = self._seq.sampled[first : self._num_tokens]
        for token in sampled:  # once: the next output of this sequence finds it
            token.top_logprobs = with_text(token.top_logprobs or {}, self._tokenizer)
        return [dict(token.top_logprobs or {}) for token in sampled]

    @cached_property
    def cumulative_logprob(self) -> float | None:  # type: ignore[override]
        if not self._num_tokens or self._seq.sampled[0].logprob is None:
            return None
        sampled = self._seq.sampled[: self._num_tokens]
        own = [token.logprob for token in sampled if token.logprob is not None]
        return sum(own) if sampled and len(own) == len(sampled) else None


class BeamOutput(CompletionOutput):
    """A hypothesis, or a beam that runs."""

    def __init__(
        self, index: int, token_ids: tuple[int, ...], logprob: float, decode: Callable[[], str],
        finish_reason: str | None = None, stop_reason: int | None = None, score: float | None = None,
    ):  # fmt: skip
        self.index, self.cumulative_logprob, self.score = index, logprob, score
        self.finish_reason, self.stop_reason = finish_reason, stop_reason
        self._token_ids, self._decode = token_ids, decode

    @cached_property
    def text(self) -> str:  # type: ignore[override]
        return self._decode()

    @cached_property
    def token_ids(self) -> list[int]:  # type: ignore[override]
        return list(self._token_ids)


class Answer(RequestOutput):
    """The state of a request as it is now."""

    def __init__(self, request: Request, outputs: list[CompletionOutput], tokenizer: Tokenizer):
        self.request_id, self.prompt, self.outputs = request.request_id, request.prompt, outputs
        self.finished, self.metrics, self.error = request.finished, request.metrics, request.error
        self.only_new, self.kv_transfer_params = request.only_new, request.kv_transfer_told
        self._request, self._num_logprobs, self._tokenizer = request, len(request.prompt_logprobs or ()), tokenizer

    @cached_property
    def prompt_token_ids(self) -> list[int]:  # type: ignore[override]
        return self._request.prompt_token_ids.copy()

    @cached_property
    def prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:  # type: ignore[override]
        if self._request.prompt_logprobs is None:
            return None
        return [one and with_text(one, self._tokenizer) for one in self._request.prompt_logprobs[: self._num_logprobs]]


# --- beam search, in vLLM's form --------------------------------------------------------------------------------------


@dataclass
class BeamSearchSequence:
    """A hypothesis with its prompt. tokens, text: of both together."""

    tokens: list[int]
    cum_logprob: float
    text: str
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass
class BeamSearchOutput:
    """What `LLM.beam_search` returns for a prompt: its hypotheses, best first."""

    sequences: list[BeamSearchSequence]


def as_beam_search_output(output: RequestOutput) -> BeamSearchOutput:
    prompt, text = output.prompt_token_ids, output.prompt or ""
    whole = [(prompt + one.token_ids, one.cumulative_logprob or 0.0, text + one.text) for one in output.outputs]
    ends = [(one.finish_reason, one.stop_reason) for one in output.outputs]
    return BeamSearchOutput([BeamSearchSequence(*a, *b) for a, b in zip(whole, ends, strict=True)])
