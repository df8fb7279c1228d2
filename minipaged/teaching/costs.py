"""What an exercise's solution costs, counted: a promise of few looks, few lines or little memory can be checked.

    tokens = [Watched(i, looks) for i in range(500)]     integers that note when somebody looks at them
    own(patient(solution))                               broken off when it runs too many lines of Python
    answer, room = bytes_taken(function)                 the most memory that a call needs

Clocks are never read: what they say depends on the machine.
"""

import sys
import tracemalloc
from collections.abc import Callable
from functools import wraps
from itertools import count
from types import FrameType
from typing import Any


class Watched(int):
    """An integer that appends to `looks` whenever somebody compares it, hashes it, writes it down, or calculates.

    >>> looks = []
    >>> {Watched(3, looks): "a key"}[3], len(looks) > 0
    ('a key', True)
    """

    def __new__(cls, value: int, looks: list[None]) -> "Watched":
        self = super().__new__(cls, value)
        self.looks = looks
        return self

    looks: list[None]


def _noting(method: Callable[..., Any]) -> Callable[..., Any]:
    def look(self: Watched, *args: Any, **kwargs: Any) -> Any:
        self.looks.append(None)
        return method(self, *args, **kwargs)

    return look


_LOOKS = "eq ne lt gt le ge hash repr str format index int bool neg add radd sub rsub mul rmul floordiv mod"
for _name in _LOOKS.split():
    setattr(Watched, f"__{_name}__", _noting(getattr(int, f"__{_name}__")))
Watched.to_bytes = _noting(int.to_bytes)  # type: ignore[method-assign]


def patient(solution: Callable[..., Any], most: int = 20_000) -> Callable[..., Any]:
    """`solution`, broken off with an AssertionError after so many lines of Python in one call.

    So a loop over 10^15 tokens is told so, and doesn't run for ever.
    """

    @wraps(solution)
    def called(*args: Any, **kwargs: Any) -> Any:
        lines = count(1)

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            too_many = event == "line" and next(lines) > most
            assert not too_many, f"after {most} lines it is still at work: is there a loop?"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            return solution(*args, **kwargs)
        finally:
            sys.settrace(before)

    return called


def bytes_taken(function: Callable[[], Any]) -> tuple[Any, int]:
    """(What it returns, the most bytes of memory that it needed on the way.)"""
    tracemalloc.start()
    try:
        return function(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
