"""What a request may ask of its tokens: plain data without tensors, so that the scheduler can carry it.

`SamplingParams` is the user's wish, with vLLM's names, defaults and meanings. `Draw` tells the sampler
(sampling.py) what to draw in one step, and `SampledToken` is the answer; `PromptTargets` names the tokens of a prompt
whose logprobs are wanted besides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

GREEDY_BELOW = 1e-5  # a smaller temperature is taken as 0, as in vLLM


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. A value out of range is a ValueError that names it and the range.

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
    seed: int | None = None  # None: a new one for each request
    max_tokens: int | None = 16  # None: as many as the model's length allows
    min_tokens: int = 0  # so many tokens before end of text or a token of stop_token_ids
    stop: str | Sequence[str] | None = None  # the output ends before the first of these
    stop_token_ids: Sequence[int] | None = None  # the output ends after the first of these
    ignore_eos: bool = False
    logprobs: int | None = None  # report so many best tokens with each token drawn, and always its own
    prompt_logprobs: int | None = None  # the same for each token of the prompt after the first
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name, (kind, low, high, allowed) in _ALLOWED.items():
            value = getattr(self, name)
            if value is None and allowed.startswith("None"):
                continue
            if not _is(kind, value) or not low <= value <= high:
                raise ValueError(f"{name}={value!r}: must be {allowed}")
        if not _all_are(str, self.stop_strings) or "" in self.stop_strings:
            raise ValueError(f"stop={self.stop!r}: must be None, a string or a list of strings, none empty")
        ids = () if self.stop_token_ids is None else self.stop_token_ids
        if not _all_are(int, ids) or any(i < 0 for i in ids):
            raise ValueError(f"stop_token_ids={ids!r}: must be None or a list of integers >= 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens}: must be <= max_tokens={self.max_tokens}")
        if self.greedy and self.n > 1:
            raise ValueError(f"n={self.n}: n must be 1 when using greedy sampling (temperature=0)")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def penalises(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def stop_strings(self) -> Sequence[str]:
        """`stop` as a sequence, whichever of its forms was given."""
        return [self.stop] if isinstance(self.stop, str) else self.stop if self.stop is not None else []


_TINY, _HUGE = 1e-30, 1e30  # what float32 can still multiply and divide by
_ALLOWED: dict[str, tuple[type, float, float, str]] = {  # type, least, most, in words
    "n": (int, 1, math.inf, "an integer >= 1"),
    "temperature": (float, 0, _HUGE, "a finite number >= 0 (0: greedy)"),
    "top_k": (int, -1, math.inf, "an integer >= 1, or 0 or -1 (off)"),
    "top_p": (float, _TINY, 1, "a number > 0 and <= 1 (1: off)"),
    "min_p": (float, 0, 1, "a number >= 0 (off) and <= 1"),
    "presence_penalty": (float, -2, 2, "a number from -2 to 2 (0: off)"),
    "frequency_penalty": (float, -2, 2, "a number from -2 to 2 (0: off)"),
    "repetition_penalty": (float, _TINY, _HUGE, "a finite number > 0 (1: off)"),
    "seed": (int, 0, math.inf, "None or an integer >= 0"),
    "max_tokens": (int, 1, math.inf, "None or an integer >= 1"),
    "min_tokens": (int, 0, math.inf, "an integer >= 0"),
    "ignore_eos": (bool, 0, 1, "True or False"),
    "logprobs": (int, 0, math.inf, "None or an integer >= 0"),
    "prompt_logprobs": (int, 0, math.inf, "None or an integer >= 0"),
    "include_stop_str_in_output": (bool, 0, 1, "True or False"),
    "skip_special_tokens": (bool, 0, 1, "True or False"),
}


def _is(kind: type, value: Any) -> bool:
    """isinstance, but an integer is a float too, and True and False are no numbers."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _all_are(kind: type, values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(_is(kind, value) for value in values)


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

    @property
    def forbidden(self) -> frozenset[int]:
        return self.stop_ids if len(self.output_token_ids) < self.params.min_tokens else frozenset()


@dataclass(frozen=True)
class PromptTargets:
    """Tokens of a prompt whose logprobs are wanted. Their logits are those of the tokens before them.

    So the last target of a chunk of the prompt is the first token of the next chunk.
    """

    start: int  # the position of the first of them
    token_ids: list[int]
    num_best: int  # params.prompt_logprobs


@dataclass
class SampledToken:
    """A token drawn, and if params.logprobs is given, its logprob and those of the best tokens."""

    token_id: int
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None  # falling; the drawn token comes last if not among them
