"""What a request may ask of its tokens: plain data without tensors, so that the scheduler can carry it.

`SamplingParams` is the user's wish, with vLLM's names, defaults and meanings. `Draw` tells the sampler
(decoding/sampling.py) what to draw in one step. The answer is a `SampledToken`, with a `Logprob` for each token that
it tells about, or `BadLogits`. `PromptTargets` names the tokens of a prompt whose logprobs are wanted besides.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from minipaged.requests.checks import Rule, check_token_ids, is_number, plain, settle, wrong
from minipaged.requests.kv_transfer import read_extra_args
from minipaged.requests.structured_outputs import Mask, StructuredOutputsParams

GREEDY_BELOW = 1e-5  # a smaller temperature is taken as 0, as in vLLM
MOST_BIAS = 100.0  # a stronger logit_bias is taken as this, as in OpenAI's API and vLLM


class RequestOutputKind(Enum):
    """What the outputs of a request hold while it runs. Names as in vLLM."""

    CUMULATIVE = 0  # all that there is so far
    DELTA = 1  # what came since the last one
    FINAL_ONLY = 2  # nothing comes before the end


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. A value out of range is a ValueError that names it and the range.

    Lists are copied, to tuples. Numbers may be NumPy's or PyTorch's too, and are kept as Python's.

    >>> SamplingParams(temperature=0.8, top_p=1.5)
    Traceback (most recent call last):
    ValueError: top_p=1.5: must be a number > 0 and <= 1 (1: off)
    """

    n: int = 1  # samples of one prompt
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0 or -1: off
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0  # subtracted once from the logit of each token that stands in the output
    frequency_penalty: float = 0.0  # subtracted as often as the token stands in the output
    repetition_penalty: float = 1.0  # divides the logit of a token seen before, or multiplies it if negative
    seed: int | None = None  # None or -1: a new one for each request
    max_tokens: int | None = 16  # None: as many as the model's length allows
    min_tokens: int = 0  # so many tokens before end of text or a token of stop_token_ids
    stop: str | Sequence[str] | None = None  # the output ends before the first of these
    stop_token_ids: Sequence[int] | None = None  # the output ends after the first of these
    ignore_eos: bool = False
    logprobs: int | None = None  # report so many best tokens with each token drawn, and always its own; -1: all
    prompt_logprobs: int | None = None  # the same for each token of the prompt after the first
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)  # added to logits, from -100 to 100
    bad_words: Sequence[str] | None = None  # the token that would complete one of these in the output never comes
    allowed_token_ids: Sequence[int] | None = None  # no other token is drawn, not even end of text
    truncate_prompt_tokens: int | None = None  # use only so many last tokens of the prompt; -1: as many as fit
    detokenize: bool = True  # False: no text, which is cheaper
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: StructuredOutputsParams | None = None  # or a dict of its fields: the form of the output
    extra_args: Mapping[str, Any] | None = field(default=None, hash=False)  # kv_transfer_params: see kv_transfer.py

    def __post_init__(self) -> None:
        settle(self, _RULES)
        object.__setattr__(self, "seed", None if self.seed == -1 else self.seed)
        object.__setattr__(self, "logit_bias", _read_bias(self.logit_bias))
        object.__setattr__(self, "structured_outputs", StructuredOutputsParams.of(self.structured_outputs))
        object.__setattr__(self, "extra_args", read_extra_args(self.extra_args))
        if self.truncate_prompt_tokens == 0:
            raise wrong("truncate_prompt_tokens", 0, _RULES["truncate_prompt_tokens"].right)
        if not isinstance(self.output_kind, RequestOutputKind):
            kinds = ", ".join(kind.name for kind in RequestOutputKind)
            raise wrong("output_kind", self.output_kind, f"a RequestOutputKind: {kinds}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens}: must be <= max_tokens={self.max_tokens}")
        if self.greedy and self.n > 1:
            raise ValueError(f"n={self.n}: n must be 1 when using greedy sampling (temperature=0)")
        if self.stop and not self.detokenize:
            raise ValueError(f"stop={self.stop!r}: needs text, so detokenize must be True")
        if self.structured_outputs and self.ignore_eos:
            raise ValueError("ignore_eos=True: not with structured_outputs, which says where the text ends")

    def check(self, vocab_size: int, max_logprobs: int = -1) -> None:
        """What only an engine can know. ValueError for token ids that its model doesn't have, and too many logprobs.

        max_logprobs: how many a request may ask for; -1: any number.
        """
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            check_token_ids(name, getattr(self, name) or (), vocab_size)
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(self, name)
            count = vocab_size if asked == -1 else asked or 0
            if count > max_logprobs != -1:
                words = f"{name}={asked}: asks for all {vocab_size}" if asked == -1 else f"{name}={asked}"
                raise ValueError(f"{words}: must be at most max_logprobs={max_logprobs}, which the engine was given")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def penalises(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def stop_strings(self) -> Sequence[str]:
        """`stop`, and nothing for None."""
        return self.stop or ()


def _read_bias(bias: Any) -> dict[int, float] | None:
    """A copy with plain numbers. Token ids may be text: JSON has no other keys."""
    right = "None or a dict {token id: number}, no number NaN"
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise wrong("logit_bias", bias, right)
    found = {}
    for key, amount in ((plain(key), plain(amount)) for key, amount in bias.items()):
        token = int(key) if isinstance(key, str) and key.isdecimal() else key
        if not is_number(int, token) or token < 0 or not is_number(float, amount) or math.isnan(amount):
            raise wrong("logit_bias", bias, right)
        found[token] = float(max(-MOST_BIAS, min(amount, MOST_BIAS)))
    return found


_TINY, _HUGE = 1e-30, 1e30  # what float32 can still multiply and divide by
_RULES = {
    "n": Rule(int, "an integer >= 1", 1),
    "temperature": Rule(float, "a finite number >= 0 (0: greedy)", 0, _HUGE),
    "top_k": Rule(int, "an integer >= 1, or 0 or -1 (off)", -1),
    "top_p": Rule(float, "a number > 0 and <= 1 (1: off)", _TINY, 1),
    "min_p": Rule(float, "a number >= 0 (off) and <= 1", 0, 1),
    "presence_penalty": Rule(float, "a number from -2 to 2 (0: off)", -2, 2),
    "frequency_penalty": Rule(float, "a number from -2 to 2 (0: off)", -2, 2),
    "repetition_penalty": Rule(float, "a finite number > 0 (1: off)", _TINY, _HUGE),
    "seed": Rule(int, "None or an integer (-1: like None)"),
    "max_tokens": Rule(int, "None or an integer >= 1", 1),
    "min_tokens": Rule(int, "an integer >= 0", 0),
    "stop": Rule(str, "None, a string or a list of strings, none empty", many=True),
    "stop_token_ids": Rule(int, "None or a list of integers >= 0", 0, many=True),
    "ignore_eos": Rule(bool, "True or False"),
    "logprobs": Rule(int, "None or an integer >= 0, or -1 (all tokens)", -1),
    "prompt_logprobs": Rule(int, "None or an integer >= 0, or -1 (all tokens)", -1),
    "include_stop_str_in_output": Rule(bool, "True or False"),
    "skip_special_tokens": Rule(bool, "True or False"),
    "bad_words": Rule(str, "None or a list of strings, none empty", many=True),
    "allowed_token_ids": Rule(int, "None or a list of integers >= 0, not empty", 0, many=True, one_at_least=True),
    "truncate_prompt_tokens": Rule(int, "None or an integer >= 1, or -1 (as many as fit)", -1),
    "detokenize": Rule(bool, "True or False"),
}


@dataclass
class Draw:
    """What to draw from one row of logits."""

    params: SamplingParams
    seed: int  # the request's: params.seed, or a random one
    index: int  # which sample of the request the first draw is
    num_draws: int  # n if the prompt of n samples was just computed, else 1
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    stop_ids: frozenset[int]  # end of text and stop_token_ids, forbidden before min_tokens
    bad_word_ids: Sequence[Sequence[int]] = ()  # the tokens of params.bad_words: see text/inputs.py
    grammar: Any = None  # of params.structured_outputs, compiled: a `Grammar` of decoding/grammar.py
    mask: Mask | None = None  # what it allows now; whoever draws adds it

    def behind(self, output_token_ids: Sequence[int]) -> "Draw":
        """The same, further on."""
        return replace(self, output_token_ids=output_token_ids)

    @property
    def forbidden(self) -> frozenset[int]:
        """What must not be drawn now, whatever the logits are; allowed_token_ids stand for themselves."""
        return self.too_short | self.completes_bad_word

    @property
    def too_short(self) -> frozenset[int]:
        """What must not be drawn because the output is shorter than min_tokens."""
        return self.stop_ids if len(self.output_token_ids) < self.params.min_tokens else frozenset()

    @property
    def completes_bad_word(self) -> set[int]:
        """The last token of each bad word whose other tokens are those that the output ends with."""
        output = self.output_token_ids
        return {last for *others, last in self.bad_word_ids if list(output[len(output) - len(others) :]) == others}


@dataclass(frozen=True)
class PromptTargets:
    """Tokens of a prompt whose logprobs are wanted. Their logits are those of the tokens before them.

    So the last target of a chunk of the prompt is the first token of the next chunk.
    """

    start: int  # the position of the first of them
    token_ids: list[int]
    num_best: int  # params.prompt_logprobs


@dataclass(frozen=True, slots=True)
class Logprob:
    """What the model thought of one token. Names as in vLLM."""

    logprob: float
    rank: int | None = None  # 1 + how many tokens have a larger logit: the likeliest has 1, equal ones share theirs
    decoded_token: str | None = None  # its text, once the text room has filled it in


@dataclass
class SampledToken:
    """A token drawn, and if params.logprobs is given, its logprob and those of the best tokens."""

    token_id: int
    logprob: float | None = None
    top_logprobs: dict[int, Logprob] | None = None  # falling; the drawn token comes last if not among them


@dataclass(frozen=True)
class BadLogits:
    """Instead of a token: nothing can be drawn from this row of logits. It ends its own request, and no other."""

    message: str  # why

    def __str__(self) -> str:
        return self.message
