"""What a request may ask of beam search: see decoding/beam_search.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


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
    stop_token_ids: tokens that end a hypothesis, besides the model's own.
    skip_special_tokens: leave special tokens out of the text.

    >>> BeamSearchParams(beam_width=2, n=3)
    Traceback (most recent call last):
    ValueError: n must be an integer from 1 to beam_width (2) or None, got 3
    """

    beam_width: int
    max_tokens: int | None = 16
    ignore_eos: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    n: int | None = None
    stop_token_ids: Sequence[int] | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        width, penalty, ids = self.beam_width, self.length_penalty, self.stop_token_ids
        _check(self, "beam_width", _is_int(width, 1), "an integer of at least 1")
        limit_ok = self.max_tokens is None or _is_int(self.max_tokens, 1)
        _check(self, "max_tokens", limit_ok, "an integer of at least 1 or None")
        penalty_ok = isinstance(penalty, float) or _is_int(penalty, -10)
        _check(self, "length_penalty", penalty_ok and abs(penalty) <= 10, "a number from -10 to 10")
        early_ok = isinstance(self.early_stopping, bool) or self.early_stopping == "never"
        _check(self, "early_stopping", early_ok, "False, True or 'never'")
        n_ok = self.n is None or (_is_int(self.n, 1) and self.n <= width)
        _check(self, "n", n_ok, f"an integer from 1 to beam_width ({width}) or None")
        ids_ok = ids is None or (isinstance(ids, (list, tuple)) and all(_is_int(i, 0) for i in ids))
        _check(self, "stop_token_ids", ids_ok, "a list of token ids (integers of at least 0) or None")
        for name in ("ignore_eos", "skip_special_tokens"):
            _check(self, name, isinstance(getattr(self, name), bool), "True or False")


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check(params: BeamSearchParams, name: str, ok: bool, right: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {right}, got {getattr(params, name)!r}")
