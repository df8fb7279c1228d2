"""Typed reading of JSON that somebody else wrote: every error names the field and what would be right."""

from collections.abc import Callable
from typing import Any


class ModelError(ValueError):
    """Something is wrong with a model, a checkpoint or its config; the message says what would be right."""


class Fields:
    """The fields of one JSON object. null counts as absent; absent without a default (``...``) is an error.

    >>> Fields({"n_head": 12}).integer("n_head")
    12
    >>> try:
    ...     Fields({"n_head": "12"}).integer("n_head")
    ... except ModelError as error:
    ...     print(error)
    model config: n_head='12' must be an integer from 1 to 2147483647
    """

    def __init__(self, values: Any, prefix: str = ""):
        if not isinstance(values, dict):
            name = f"model config: {prefix}".rstrip(":. ")
            raise ModelError(f"{name} must be a JSON object, not {values!r:.60}")
        self.values, self.prefix = values, prefix

    def error(self, name: str, what: str) -> ModelError:
        """The error to raise about the field ``name``; what: what must be true of it."""
        return ModelError(f"model config: {self.prefix}{name}={self.values.get(name)!r:.60} {what}")

    def _get(self, name: str, default: Any, expected: str, valid: Callable[[Any], bool]) -> Any:
        value = self.values.get(name)
        if value is None and default is ...:
            raise ModelError(f"model config: {self.prefix}{name} is missing; it must be {expected}")
        if value is not None and not valid(value):
            raise self.error(name, f"must be {expected}")
        return default if value is None else value

    def integer(self, name: str, default: Any = ..., low: int = 1, high: int = 2**31 - 1) -> Any:
        def valid(value: Any) -> bool:
            return type(value) is int and low <= value <= high  # type(): in Python a bool is an int

        return self._get(name, default, f"an integer from {low} to {high}", valid)

    def number(self, name: str, default: Any = ..., low: float = 1e-30, high: float = 1e30) -> Any:
        def valid(value: Any) -> bool:
            return type(value) in (int, float) and low <= value <= high  # false for NaN, too

        return self._get(name, default, f"a number from {low:g} to {high:g}", valid)

    def flag(self, name: str, default: bool) -> bool:
        return self._get(name, default, "true or false", lambda value: type(value) is bool)

    def choice(self, name: str, default: Any, known: tuple[str, ...]) -> str:
        return self._get(name, default, "one of " + ", ".join(known), lambda value: value in known)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id, a list of ids, or none."""
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise self.error(name, "must be a token id of at least 0, or a list of them")
        return tuple(ids)
