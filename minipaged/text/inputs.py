"""What a caller may give: text, token ids or chat messages, one or many; and how that becomes token ids."""

from collections.abc import Sequence
from typing import Any, cast

from minipaged.requests.beam_search_params import BeamSearchParams
from minipaged.requests.sampling_params import SamplingParams
from minipaged.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]  # text, token ids, or chat messages
Params = SamplingParams | BeamSearchParams


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many: token ids and messages are lists themselves.

    >>> as_list("one"), as_list([5, 6]), as_list(["one", [5, 6]])
    (['one'], [[5, 6]], ['one', [5, 6]])
    """
    many = isinstance(prompts, Sequence) and not isinstance(prompts, str)
    if not many or (prompts and isinstance(prompts[0], (int, dict))):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))


def one_for_each(params: Params | Sequence[Params] | None, prompts: list[Prompt]) -> list[Params]:
    """The parameters of each prompt. ValueError if there are as many neither as one nor as prompts."""
    params = SamplingParams() if params is None else params
    each = list(params) if isinstance(params, (list, tuple)) else [cast(Params, params)] * len(prompts)
    if len(each) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(each)} params: give one for all or one for each")
    return each


def encode(prompt: Prompt, tokenizer: Tokenizer, vocab_size: int) -> tuple[str | None, list[int]]:
    """The prompt's text, if it has any, and its token ids. ValueError says what is wrong with a bad one."""
    if not isinstance(prompt, Sequence):
        raise ValueError(f"a prompt must be text, token ids or chat messages, not {prompt!r}")
    text: str | None = None
    if isinstance(prompt, str):
        text, token_ids = prompt, tokenizer.encode(prompt)
    elif prompt and isinstance(prompt[0], dict):
        text = tokenizer.apply_chat_template(cast(Sequence[dict[str, Any]], prompt))
        token_ids = tokenizer.encode(text, add_special_tokens=False)
    else:
        token_ids = list(cast(Sequence[int], prompt))
    if not token_ids:
        raise ValueError("the prompt is empty: it needs at least one token")
    for token in token_ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise ValueError(f"token id {token!r} in the prompt: must be an integer from 0 to {vocab_size - 1}")
    return text, token_ids
