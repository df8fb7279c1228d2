"""What a caller gets back: names as in vLLM's `RequestOutput`."""

from collections.abc import Callable
from dataclasses import dataclass

from minipaged.requests.request import Request, RequestMetrics
from minipaged.requests.sampling_params import SamplingParams
from minipaged.requests.sequence import Sequence
from minipaged.text.detokenizer import StreamDecoder
from minipaged.text.sequence_text import SequenceText
from minipaged.text.tokenizer import Tokenizer


@dataclass
class CompletionOutput:
    """One output of a request."""

    index: int
    text: str
    token_ids: list[int]  # with the stop token, if one ended it
    cumulative_logprob: float | None = None  # sampling: only if logprobs were asked for
    logprobs: list[dict[int, float]] | None = None  # for each token: {token id: logprob}, the drawn one among them
    finish_reason: str | None = None  # "stop", "length", "abort"; None while it runs
    stop_reason: int | str | None = None  # the stop string, or the id of one of stop_token_ids
    score: float | None = None  # beam search: the length-normalised score


@dataclass
class RequestOutput:
    """The state of a request after a step, or at its end."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, float] | None] | None = None  # for each token of the prompt; None for the first

    @property
    def num_cached_tokens(self) -> int:
        """How many tokens of the prompt were found in the prefix cache."""
        return self.metrics.num_cached_tokens

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds between the tokens after the first."""
        return self.metrics.time_per_output_token(max((len(o.token_ids) for o in self.outputs), default=0))


class Texts:
    """The texts of all sequences that are not finished, up to date with their tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._by_id: dict[int, SequenceText] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def read(self, request: Request, finish: Callable[[Request, Sequence, str, str], None]) -> int:
        """Read the new tokens of a request, and return how many they are.

        finish: called for a sequence that a stop string ends, with "stop" and the string.
        """
        return sum(self._read(request, seq, finish) for seq in request.sequences)

    def _read(self, request: Request, seq: Sequence, finish: Callable[[Request, Sequence, str, str], None]) -> bool:
        params = request.params
        assert isinstance(params, SamplingParams)
        text = self._by_id.get(seq.seq_id)
        if text is None:
            text = self._by_id[seq.seq_id] = SequenceText(self._tokenizer, request.prompt_token_ids, params)
        if text.num_tokens == len(seq.output_token_ids):
            return False
        silent = seq.finish_reason == "stop" and not params.include_stop_str_in_output
        stop = text.add(seq.output_token_ids[-1], silent, check_stops=len(seq.output_token_ids) >= params.min_tokens)
        if stop is not None:
            if seq.finish_reason is None:
                finish(request, seq, "stop", stop)
            seq.finish_reason, seq.stop_reason = "stop", stop
        elif seq.finish_reason is not None:
            text.finish()
        return True

    def outputs(self, request: Request) -> list[CompletionOutput]:
        """The outputs of a sampling request, as far as they were read."""
        return [_sampled_output(seq, self._by_id[seq.seq_id]) for seq in request.sequences]

    def forget(self, request: Request) -> None:
        for seq in request.sequences:
            self._by_id.pop(seq.seq_id, None)


def _sampled_output(seq: Sequence, text: SequenceText) -> CompletionOutput:
    logprobs = [t.top_logprobs for t in seq.sampled if t.top_logprobs is not None]
    own = [t.logprob for t in seq.sampled if t.logprob is not None]
    asked = bool(seq.sampled) and len(own) == len(seq.sampled)
    return CompletionOutput(
        index=seq.index,
        text=text.shown(seq.finish_reason is not None),
        token_ids=seq.output_token_ids.copy(),
        cumulative_logprob=sum(own) if asked else None,
        logprobs=logprobs if asked else None,
        finish_reason=seq.finish_reason,
        stop_reason=seq.stop_reason,
    )


def beam_outputs(request: Request, tokenizer: Tokenizer) -> list[CompletionOutput]:
    """The best hypotheses of a beam search, as far as it got."""
    assert request.search is not None
    skip = request.params.skip_special_tokens
    outputs = []
    for index, h in enumerate(request.search.hypotheses()):
        ids = list(h.token_ids)
        decoder = StreamDecoder(tokenizer, request.prompt_token_ids, skip)
        text = "".join(map(decoder.add, ids)) + decoder.flush()
        own = h.stop_token_id if h.stop_token_id not in request.eos_token_ids else None
        outputs.append(CompletionOutput(index, text, ids, h.cumulative_logprob, None, h.finish_reason, own, h.score))
    return outputs
