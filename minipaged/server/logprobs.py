"""Logprobs in OpenAI's two shapes: parallel lists for completions, a list of objects for chats."""

from collections.abc import Mapping, Sequence
from typing import Any

from minipaged.requests.sampling_params import Logprob

LEAST = -9999.0  # JSON has no infinity; vLLM says this, too

Told = Sequence[tuple[int, Mapping[int, Logprob] | None]]  # each token, and what is told of its place


def of_completion(told: Told, num_top: int, text_offset: int = 0, first: str = "") -> dict[str, list[Any]]:
    """None for a token that nothing is told of: the first of a prompt, whose text is `first`.

    >>> two = [(7, None), (8, {8: Logprob(-0.5, 1, "b"), 9: Logprob(-2.0, 2, "c")})]
    >>> of_completion(two, 1)["top_logprobs"]
    [None, {'b': -0.5}]
    """
    shape: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for token, logprobs in told:
        own = logprobs[token] if logprobs else None
        text = own.decoded_token or "" if own else first
        shape["text_offset"].append(text_offset)
        shape["token_logprobs"].append(_number(own) if own else None)
        shape["tokens"].append(text)
        shape["top_logprobs"].append(_top(logprobs, token, num_top) if logprobs else None)
        text_offset += len(text)
    return shape


def _top(logprobs: Mapping[int, Logprob], own: int, num_top: int) -> dict[str, float]:
    """By text; of tokens with the same text the likelier one. The token's own is there in any case, as in vLLM."""
    found: dict[str, float] = {}
    for one in [*list(logprobs.values())[: max(num_top, 1)], logprobs[own]]:
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
            best = list(logprobs.values())[:num_top]
            content.append({**_object(logprobs[token]), "top_logprobs": [_object(one) for one in best]})
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


def _object(one: Logprob) -> dict[str, Any]:
    text = one.decoded_token or ""
    return {"token": text, "logprob": _number(one), "bytes": list(text.encode())}


def _number(one: Logprob) -> float:
    return max(one.logprob, LEAST)
