"""Logprobs in OpenAI's two shapes: parallel lists for completions, a list of objects for chats."""

from collections.abc import Mapping, Sequence
from typing import Any

from minipaged.requests.sampling_params import Logprob
from minipaged.text.detokenizer import StreamDecoder
from minipaged.text.tokenizer import Tokenizer

LEAST = -9999.0  # JSON has no infinity; vLLM says this, too

Told = Sequence[tuple[int, Mapping[int, Logprob] | None]]  # each token, and what is told of its place


class Offsets:
    """Where in a text each token begins to show: a token alone doesn't say, for it may be half a character.

    start: where the first one begins. prompt: the tokens before it.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, start: int = 0, prompt: Sequence[int] = ()):
        self._decoder, self._at = StreamDecoder(tokenizer, prompt, skip_special_tokens), start

    def next(self, token: int) -> int:
        begin = self._at
        self._at += len(self._decoder.add(token))
        return begin


def of_completion(told: Told, num_top: int, offsets: Sequence[int], first: str = "") -> dict[str, list[Any]]:
    """offsets: of each token. None for a token that nothing is told of: the first of a prompt, whose text is `first`.

    >>> two = [(7, None), (8, {8: Logprob(-0.5, 1, "b"), 9: Logprob(-2.0, 2, "c")})]
    >>> of_completion(two, 1, [0, 1], "a")["top_logprobs"]
    [None, {'b': -0.5}]
    """
    owns = [logprobs[token] if logprobs else None for token, logprobs in told]
    return {
        "text_offset": list(offsets),
        "token_logprobs": [_number(own) if own else None for own in owns],
        "tokens": [own.decoded_token or "" if own else first for own in owns],
        "top_logprobs": [_top(logprobs, token, num_top) if logprobs else None for token, logprobs in told],
    }


def _top(logprobs: Mapping[int, Logprob], own: int, num_top: int) -> dict[str, float]:
    """By text; of tokens with the same text the likelier one. The token's own is there in any case, as in vLLM."""
    found: dict[str, float] = {}
    for one in [*_best(logprobs, max(num_top, 1) if num_top >= 0 else -1), logprobs[own]]:
        found.setdefault(one.decoded_token or "", _number(one))
    return found


def of_chat(told: Told, num_top: int) -> dict[str, list[dict[str, Any]]]:
    """
    >>> [token] = of_chat([(8, {8: Logprob(-0.5, 1, "b")})], 1)["content"]
    >>> token["token"], token["bytes"], len(token["top_logprobs"])
    ('b', [98], 1)
    """
    content = []
    for token, logprobs in told:
        if logprobs:
            best = [_object(one) for one in _best(logprobs, num_top)]
            content.append({**_object(logprobs[token]), "top_logprobs": best})
    return {"content": content}


def of_prompt(prompt_logprobs: Sequence[Mapping[int, Logprob] | None] | None) -> list[Any] | None:
    """As vLLM tells them: by token id."""
    if prompt_logprobs is None:
        return None
    return [
        one and {
            str(token): {"logprob": _number(p), "rank": p.rank, "decoded_token": p.decoded_token}
            for token, p in one.items()
        }
        for one in prompt_logprobs
    ]  # fmt: skip


def _best(logprobs: Mapping[int, Logprob], count: int) -> list[Logprob]:
    """They stand in their order already. -1: all."""
    return list(logprobs.values())[: None if count < 0 else count]


def _object(one: Logprob) -> dict[str, Any]:
    text = one.decoded_token or ""
    return {"token": text, "logprob": _number(one), "bytes": list(text.encode())}


def _number(one: Logprob) -> float:
    return max(one.logprob, LEAST)
