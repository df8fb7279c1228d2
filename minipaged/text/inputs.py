"""What a caller may give: text, token ids or chat messages, one or many; and how that becomes token ids."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from minipaged.requests.beam_search_params import BeamSearchParams
from minipaged.requests.checks import is_number, plain
from minipaged.requests.sampling_params import SamplingParams
from minipaged.text.tokenizer import Message, Tokenizer

# Text, token ids, chat messages, or vLLM's {"prompt": text} and {"prompt_token_ids": ids}, with a "cache_salt" or not.
# Token ids may be an array of NumPy or PyTorch too.
Prompt = str | Sequence[int] | Sequence[dict[str, Any]] | Mapping[str, Any]
Params = SamplingParams | BeamSearchParams

PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}


class Encoded(NamedTuple):
    """A prompt as the engine takes it."""

    text: str | None  # None if token ids were given
    token_ids: list[int]  # a list of its own
    cache_salt: str | None = None  # if the prompt came with one


def as_list(prompts: Any) -> list[Any]:
    """One prompt or many: token ids and messages are lists themselves.

    Many may be any iterable that has an order, a generator too. What is wrong with a prompt, `encode` says.

    >>> as_list("one"), as_list([5, 6]), as_list(["one", [5, 6]]), as_list({"prompt": "one"})
    (['one'], [[5, 6]], ['one', [5, 6]], [{'prompt': 'one'}])
    """
    found = _items(prompts)
    if found is None:
        return [prompts]
    if not found or not (is_number(int, plain(found[0])) or isinstance(found[0], bool) or _is_message(found[0])):
        return found
    return [found]


def _items(prompts: Any) -> list[Any] | None:
    """What stands in a list of any kind; None for what is no list, or has no order."""
    if isinstance(prompts, (str, bytes, bytearray, memoryview, Mapping, set, frozenset)):
        return None
    found = plain(prompts)
    return list(found) if isinstance(found, Iterable) else None


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and not PROMPT_KEYS & value.keys()


def one_for_each(params: Params | Iterable[Params] | None, prompts: Sequence[Any]) -> list[Params]:
    """The parameters of each prompt; None: the default for all.

    ValueError if there are as many neither as one nor as prompts, or if something else stands among them.
    """
    if params is None or isinstance(params, (SamplingParams, BeamSearchParams)):
        return [params or SamplingParams()] * len(prompts)
    each: list[Any] = [params] if isinstance(params, (str, Mapping)) or not isinstance(params, Iterable) else [*params]
    for one in each:
        if not isinstance(one, (SamplingParams, BeamSearchParams)):
            raise ValueError(f"params must be SamplingParams or BeamSearchParams, not {_shown(one)}")
    if len(each) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(each)} params: give one for all or one for each")
    return each


def encode(prompt: Any, tokenizer: Tokenizer, vocab_size: int, keep: int | None = None) -> Encoded:
    """One prompt as text, token ids and cache salt. ValueError says what is wrong with a bad one.

    keep: use only so many last tokens; see `kept_tokens`.
    """
    salt = None
    if isinstance(prompt, Mapping):
        text, given, salt = _read_mapping(prompt)
    else:
        text, given = (prompt, None) if isinstance(prompt, str) else (None, _items(prompt))
        if text is None and given is None:
            raise ValueError(f"a prompt must be text, token ids or chat messages, not {_shown(prompt)}{_hint(prompt)}")
    if given is None:
        assert text is not None
        token_ids = tokenize(text, tokenizer)
    elif given and isinstance(given[0], Mapping):
        text = chat_text(given, tokenizer)
        token_ids = tokenize(text, tokenizer, add_special_tokens=False)
    else:
        token_ids = [_token_id(token, vocab_size) for token in given]
    if not token_ids:
        raise ValueError("the prompt is empty: it needs at least one token")
    return Encoded(text, token_ids if keep is None else token_ids[-keep:], salt)


def chat_text(messages: Sequence[Any], tokenizer: Tokenizer, add_generation_prompt: bool = True) -> str:
    """A conversation as the model reads it; it is tokenized without special tokens, for it has them all."""
    texts = [_text_only(i, message) for i, message in enumerate(messages)]
    return tokenizer.apply_chat_template(texts, add_generation_prompt)


def _read_mapping(prompt: Mapping[Any, Any]) -> tuple[str | None, list[Any] | None, str | None]:
    """Text, token ids and cache salt of a dict; where there are both, the text is only carried along, as in vLLM."""
    if "role" in prompt:
        raise ValueError("a chat message stands in a list: give [{'role': ..., 'content': ...}]")
    text, given, salt = (prompt.get(key) for key in ("prompt", "prompt_token_ids", "cache_salt"))
    if unknown := [key for key in prompt if key not in PROMPT_KEYS]:
        raise ValueError(f"a prompt with {unknown[0]!r}: a dict may have {', '.join(sorted(PROMPT_KEYS))}")
    if text is None and given is None:
        raise ValueError(f'a dict must have "prompt" or "prompt_token_ids", not only {list(prompt)}')
    if text is not None and not isinstance(text, str):
        raise ValueError(f'"prompt" must be text, not {_shown(text)}')
    token_ids = None if given is None else _items(given)
    if given is not None and (token_ids is None or any(isinstance(token, Mapping) for token in token_ids)):
        raise ValueError(f'"prompt_token_ids" must be a list of integers, not {_shown(given)}')
    if salt is not None and not (isinstance(salt, str) and salt):
        raise ValueError(f"cache_salt={salt!r}: must be None or a string that is not empty")
    return text, token_ids, salt


def _hint(prompt: Any) -> str:
    if isinstance(prompt, (bytes, bytearray, memoryview)):
        return ": decode it first"
    return ": a set has no order" if isinstance(prompt, (set, frozenset)) else ""


def _text_only(number: int, message: Any) -> Message:
    """The message with one text for content: OpenAI's clients send a list of parts. ValueError for an image."""
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), (list, tuple)):
        return message  # the tokenizer checks it
    texts = []
    for part in message["content"]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part if isinstance(part, str) else part.get("text") if kind == "text" else None
        if not isinstance(text, str):
            what = f"a part of type {kind!r}" if kind not in (None, "text") else _shown(part)
            raise ValueError(f"chat message {number}: {what}: only text is read here, {{'type': 'text', 'text': str}}")
        texts.append(text)
    return {**message, "content": "\n".join(texts)}  # so does vLLM


def tokenize(text: str, tokenizer: Tokenizer, add_special_tokens: bool = True) -> list[int]:
    """ValueError for text that no bytes can carry."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} of the text is half a surrogate pair: not valid Unicode") from None
    return tokenizer.encode(text, add_special_tokens)


def _token_id(given: Any, vocab_size: int) -> int:
    token = given if type(given) is int else plain(given)
    if not is_number(int, token) or not 0 <= token < vocab_size:
        raise ValueError(f"token id {_shown(given)} in the prompt: must be an integer from 0 to {vocab_size - 1}")
    return int(token)


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:80] + "..."


def kept_tokens(params: Params, max_model_len: int) -> int | None:
    """How many last tokens of a prompt these parameters want; None: all. At -1 one output token has room after them."""
    asked = params.truncate_prompt_tokens if isinstance(params, SamplingParams) else None
    return max(1, max_model_len - 1) if asked == -1 else asked


def bad_word_ids(params: Params, tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of each of params.bad_words, as it may stand at the beginning of a text and, with a space, in it.

    As in vLLM the second form counts only if it is as long and begins with another token: else the space is a token
    of its own, and the first form is found behind it.
    """
    words = params.bad_words or () if isinstance(params, SamplingParams) else ()
    found = []
    for word in words:
        first, spaced = (tokenize(space + word.lstrip(), tokenizer, False) for space in ("", " "))
        if not first:
            raise ValueError(f"bad_words={list(words)!r}: {word!r} has no tokens")
        found.append(first)
        if spaced and spaced[0] != first[0] and len(spaced) == len(first):
            found.append(spaced)
    return found
