"""What form an output must have: plain data. What it makes of the logits: decoding/grammar.py."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from minipaged.requests.checks import Rule, settle, wrong

KINDS = ("json", "json_object", "regex", "choice", "grammar")


@dataclass(frozen=True)
class StructuredOutputsParams:
    """The form of an output: one of the first five. Names as in vLLM.

    json: a JSON schema, as a dict or as text; it is kept as text.
    json_object: True: any JSON object.
    regex: the whole output matches; Rust's syntax (no look-around, no back-references), \\d and \\w for ASCII only.
    choice: the output is one of these texts.
    grammar: the output is a sentence of it: Lark if it has a rule `start`, GBNF (llama.cpp's EBNF) if `root`.

    Of JSON besides:
    disable_any_whitespace: none between its parts. whitespace_pattern: a regex for it.

    >>> StructuredOutputsParams(regex="a+", choice=["b"])
    Traceback (most recent call last):
    ValueError: structured_outputs: regex and choice are given, just one must be: json, json_object, regex, choice, grammar
    """  # noqa: E501

    json: str | Mapping[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "json", _schema(self.json))
        settle(self, _RULES, "structured_outputs.")
        given = [name for name in KINDS if getattr(self, name)]
        if len(given) != 1:
            said = f"{' and '.join(given)} are given" if given else "nothing is given"
            raise ValueError(f"structured_outputs: {said}, just one must be: {', '.join(KINDS)}")
        if not given[0].startswith("json") and (self.disable_any_whitespace or self.whitespace_pattern):
            raise ValueError(f"structured_outputs: whitespace is JSON's, so it can't be chosen for {given[0]}")
        for name in ("regex", "choice", "grammar", "whitespace_pattern"):
            _must_be_unicode(name, getattr(self, name))

    @property
    def kind(self) -> str:
        """Which of the five."""
        return next(name for name in KINDS if getattr(self, name))

    @classmethod
    def of(cls, value: Any) -> "StructuredOutputsParams | None":
        """Read what a user gave: None, one of these, or a dict of its fields. ValueError if it's something else."""
        if value is None or isinstance(value, cls):
            return value
        names = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping):
            raise wrong("structured_outputs", value, f"None, StructuredOutputsParams or a dict of {', '.join(names)}")
        if unknown := [key for key in value if key not in names]:
            raise ValueError(f"structured_outputs.{unknown[0]}: unknown; there are {', '.join(names)}")
        return cls(**value)


@dataclass(frozen=True)
class Mask:
    """Which tokens may come next. bits: one for each token; that of token t is bit t % 8 of byte t // 8.

    error: why there are none, if that isn't the grammar's wish.
    """

    bits: bytes
    error: str | None = None


def _schema(given: Any) -> str | None:
    """The schema as text. Its keys keep their order, in which they are written."""
    right = "a JSON schema: a dict, or its text, which begins with {"
    if given is None:
        return None
    try:
        text = json.dumps(given, allow_nan=False) if isinstance(given, Mapping) else given
        if isinstance(text, str) and isinstance(json.loads(text), dict):
            return text
    except (ValueError, TypeError, RecursionError) as error:
        raise wrong("structured_outputs.json", given, f"{right} ({error})") from None
    raise wrong("structured_outputs.json", given, right)


def _must_be_unicode(name: str, value: str | Sequence[str] | None) -> None:
    try:
        "".join(value or ()).encode()
    except UnicodeEncodeError:
        raise wrong(f"structured_outputs.{name}", value, "valid Unicode, without half a surrogate pair") from None


_RULES = {
    "json_object": Rule(bool, "None, True or False"),
    "regex": Rule(str, "None or a text that is not empty"),
    "choice": Rule(str, "None or a list of texts, not empty, none of them empty", many=True, one_at_least=True),
    "grammar": Rule(str, "None or a text that is not empty"),
    "disable_any_whitespace": Rule(bool, "True or False"),
    "whitespace_pattern": Rule(str, "None or a text that is not empty"),
}
