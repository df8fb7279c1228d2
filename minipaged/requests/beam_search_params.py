"""What a request may ask of beam search: see decoding/beam_search.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from minipaged.requests.checks import Rule, check_token_ids, plain, settle, wrong
from minipaged.requests.kv_transfer import read_extra_args


@dataclass(frozen=True)
class BeamSearchParams:
    """How to search for one request. Names as in vLLM's BeamSearchParams, else as in transformers.

    beam_width: how many beams run, and how many finished hypotheses are kept.
    max_tokens: the longest output, in tokens; None: as long as the model allows.
    ignore_eos: treat the model's end-of-text tokens like any other token.
    length_penalty: n tokens score log-probability / n ** length_penalty, from -10 to 10. As log-probabilities
        are negative, above 0 favours long outputs and below 0 short ones.
    early_stopping: what to do once beam_width hypotheses are finished. True: end the search. False: end it if
        the best running beam, scored at its present length, does not beat the worst of them. "never": like
        False, but if length_penalty > 0 score that beam as if it reached max_tokens at no further loss.
    n: how many hypotheses to return, best first; None: beam_width.
    stop_token_ids: tokens that end a hypothesis, besides the model's own; a copy is kept.
    skip_special_tokens: leave special tokens out of the text.
    extra_args: kv_transfer_params: see kv_transfer.py.

    >>> BeamSearchParams(beam_width=2, n=3)
    Traceback (most recent call last):
    ValueError: n=3: must be None or an integer from 1 to beam_width (2)
    """

    beam_width: int
    max_tokens: int | None = 16
    ignore_eos: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    n: int | None = None
    stop_token_ids: Sequence[int] | None = None
    skip_special_tokens: bool = True
    extra_args: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        settle(self, _RULES)
        early = plain(self.early_stopping)
        if not isinstance(early, bool) and not (isinstance(early, str) and early == "never"):
            raise wrong("early_stopping", self.early_stopping, "False, True or 'never'")
        object.__setattr__(self, "early_stopping", early)
        object.__setattr__(self, "extra_args", read_extra_args(self.extra_args))
        right = f"None or an integer from 1 to beam_width ({self.beam_width})"
        object.__setattr__(self, "n", Rule(int, right, 1, self.beam_width).read("n", self.n))

    def check(self, vocab_size: int, max_logprobs: int = -1) -> None:
        """What only an engine can know. ValueError for token ids that its model doesn't have; it asks for no logprobs.

        Takes the same as `SamplingParams.check`, so that an engine need not ask which of the two it has.
        """
        check_token_ids("stop_token_ids", self.stop_token_ids or (), vocab_size)


_RULES = {
    "beam_width": Rule(int, "an integer >= 1", 1),
    "max_tokens": Rule(int, "None or an integer >= 1", 1),
    "ignore_eos": Rule(bool, "True or False"),
    "length_penalty": Rule(float, "a number from -10 to 10", -10, 10),
    "stop_token_ids": Rule(int, "None or a list of integers >= 0", 0, many=True),
    "skip_special_tokens": Rule(bool, "True or False"),
}
