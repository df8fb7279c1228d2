"""Text to token ids and back, and chat messages to the one string that a chat model was trained on.

Works on a ``tokenizers.Tokenizer``, be it from a ``tokenizer.json`` or built from GGUF metadata.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import tokenizers
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, Any]  # {"role": "user", "content": "Hello"}


class TokenizerError(ValueError):
    """A tokenizer that can't be built from what a checkpoint has; the message says what is wrong."""


class Tokenizer:
    """A tokenizer and the model's chat template.

    backend: the tokenizers.Tokenizer that does the work.
    chat_template: jinja source or None; a checkpoint's template is foreign code and runs in jinja2's sandbox.
    special_tokens: names that a template may use, such as {"bos_token": "<s>"}.

    eos_token_ids, the tokens that end an answer, come from the model's config: load() sets them.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: str | None = None,
        special_tokens: dict[str, str] | None = None,
    ):
        backend.no_truncation()  # some tokenizer.json files cut at 512 tokens, or pad to them
        backend.no_padding()
        self.backend = backend
        self.chat_template = chat_template
        self.special_tokens = special_tokens or {}
        self.eos_token_ids: tuple[int, ...] = ()
        self.special_ids = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        # Sentencepiece's byte fallback: ids of <0x00> to <0xFF>, which the decoder joins to characters.
        fallback = backend.decoder is not None and b"ByteFallback" in backend.decoder.__getstate__()
        self.byte_ids = {backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256 if fallback else 0)}

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's V may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text. add_special_tokens adds what the tokenizer itself asks for: often a
        beginning-of-text token, often nothing. Rendered chat messages are encoded without: their
        template has written every special token already.
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def is_silent(self, token_id: int, skip_special_tokens: bool = True) -> bool:
        """Whether decode() passes over this token: unknown ids, and special ones if they are skipped."""
        skipped = skip_special_tokens and token_id in self.special_ids
        return skipped or self.backend.id_to_token(token_id) is None

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, as transformers renders it.

        messages: [{"role": "user", "content": "Hello"}, ...], oldest first.
        add_generation_prompt: end with the opening of the assistant's next answer.
        Raises ValueError if there is no template, if messages are malformed, or if the template fails.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template: give it plain text instead of messages")
        _check_messages(messages)
        variables: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "tools": None}
        try:
            template = _template_environment().from_string(self.chat_template)
            return template.render(variables | self.special_tokens, messages=list(messages))
        except Exception as error:  # foreign code: anything may come out of it
            raise ValueError(f"the model's chat template failed: {type(error).__name__}: {error}") from error


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"chat messages must be a list of at least one message, not {messages!r:.80}")
    for i, message in enumerate(messages):
        texts = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None,)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"chat message {i} must be {{'role': str, 'content': str}}, not {message!r:.80}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Unlike jinja's own filter this one does not escape <, > and &, which a model would read literally."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _template_environment() -> ImmutableSandboxedEnvironment:
    """The sandbox, with the helpers that transformers gives to chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment
