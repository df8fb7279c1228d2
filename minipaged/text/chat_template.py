"""Chat messages to the one string that a chat model was trained on, as transformers renders them.

A checkpoint's template is foreign code: it runs in jinja2's sandbox, and anything may come out of it.
"""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, Any]  # {"role": "user", "content": "Hello"}


class ChatTemplate:
    """A template, compiled at its first use: an error in it is told by whoever needs it.

    source: jinja. names: what it may use by name, such as {"bos_token": "<s>"}.
    """

    def __init__(self, source: str, names: dict[str, str]):
        self._source, self._names = source, names
        self._compiled: Template | None = None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Raises ValueError if the messages are malformed or the template fails."""
        _check_messages(messages)
        variables: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "tools": None}
        try:
            self._compiled = self._compiled or _environment().from_string(self._source)
            return self._compiled.render(variables | self._names, messages=list(messages))
        except Exception as error:
            raise ValueError(f"the model's chat template failed: {type(error).__name__}: {error}") from error


def check_text(text: str, what: str) -> None:
    """ValueError if there is half of a surrogate pair in it: no UTF-8 has that, and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        sign = ascii(text[error.start])
        raise ValueError(f"{what} has a lone surrogate, {sign}, at character {error.start}: that is no text") from None


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"chat messages must be a list of at least one message, not {messages!r:.80}")
    for i, message in enumerate(messages):
        texts = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None,)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"chat message {i} must be {{'role': str, 'content': str}}, not {message!r:.80}")
        for text in texts:
            check_text(str(text), f"chat message {i}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Unlike jinja's own filter this one does not escape <, > and &, which a model would read literally."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


class _Generation(Extension):
    """{% generation %}...{% endgeneration %} marks, for training, what the model says. Here it is only rendered."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)  # a scope of its own

    def _same(self, caller: Callable[[], str]) -> str:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    """The sandbox, with the helpers that transformers gives to chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment
