"""What a parameter may be. A right value is kept as plain Python, a wrong one is a ValueError that names it.

Numbers and arrays of NumPy and PyTorch count as what they hold. Lists are copied, so that nothing changes here when
their owner changes them. True and False are no numbers, and a number is never rounded.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

NO_LISTS = (str, bytes, bytearray, memoryview, Mapping)  # though each can be walked through


@dataclass(frozen=True)
class Rule:
    """What one parameter may be. right: the same in words; if they begin with None, None is allowed.

    >>> Rule(int, "an integer >= 1", least=1).read("n", 2.5)
    Traceback (most recent call last):
    ValueError: n=2.5: must be an integer >= 1
    >>> Rule(int, "a list of integers", many=True).read("ids", [3, 4])
    (3, 4)
    """

    kind: type  # int, float, bool or str
    right: str
    least: float = -inf
    most: float = inf
    many: bool = False  # any number of them, kept as a tuple
    one_at_least: bool = False  # of the many; a text is never empty

    def read(self, name: str, value: Any) -> Any:
        """The value in plain Python. ValueError if it isn't as it must be."""
        if value is None and self.right.startswith("None"):
            return None
        found = plain(value)
        if not self.many and self._holds(found):
            return found
        if self.many and (items := self._items(found)) is not None:
            return items
        raise wrong(name, value, self.right)

    def _items(self, found: Any) -> tuple[Any, ...] | None:
        if self.kind is str and isinstance(found, str):
            found = [found]  # one text is a list of one
        if isinstance(found, NO_LISTS) or not isinstance(found, Iterable):
            return None
        items = tuple(map(plain, found))
        right = all(map(self._holds, items)) and (items or not self.one_at_least)
        return items if right else None

    def _holds(self, value: Any) -> bool:
        if self.kind is str:
            return isinstance(value, str) and value != ""
        return is_number(self.kind, value) and self.least <= value <= self.most


def is_number(kind: type, value: Any) -> bool:
    """isinstance, but an integer is a float too, and True and False are no numbers."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def plain(value: Any) -> Any:
    """What a number or an array of NumPy or PyTorch holds, in Python's own types; others as they are."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, NO_LISTS) else value


def wrong(name: str, value: Any, right: str) -> ValueError:
    """The error for a parameter of this name and value, which must be something else."""
    shown = repr(value)
    return ValueError(f"{name}={shown if len(shown) <= 200 else shown[:200] + '...'}: must be {right}")


def settle(params: Any, rules: dict[str, Rule], where: str = "") -> None:
    """Read the fields of a frozen dataclass by their rules, and keep what came of it. where: before names in errors."""
    for name, rule in rules.items():
        object.__setattr__(params, name, rule.read(where + name, getattr(params, name)))


def check_token_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """ValueError if one of them is no token of the model."""
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"token id {token} in {name}: must be an integer from 0 to {vocab_size - 1}")
