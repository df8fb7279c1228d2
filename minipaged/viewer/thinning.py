"""A long trace with fewer steps: the last of every so many, as if it had done what all of them did."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from minipaged.viewer.trace import TraceStep
from minipaged.viewer.words import news_of_both

Did = dict[str, Any]


def condensed(steps: Iterable[TraceStep], most: int) -> tuple[list[TraceStep], int]:
    """At most so many steps (an even number), and how many each of them stands for; the last one for fewer, perhaps.

    All are read once, and no more than `most` are kept at a time.
    """
    kept: list[TraceStep] = []
    every = 1
    for number, step in enumerate(steps):
        if number % every:
            kept[-1] = both(kept[-1], step)
        elif len(kept) < most:
            kept.append(step)
        else:
            kept, every = [*thinned(kept, 2), step], 2 * every
    return kept, every


def thinned(steps: Iterable[TraceStep], every: int) -> Iterator[TraceStep]:
    """The very last of them may stand for fewer steps."""
    whole: TraceStep | None = None
    for number, step in enumerate(steps, 1):
        whole = both(whole, step) if whole else step
        if number % every == 0:
            yield whole
            whole = None
    if whole:
        yield whole


def both(first: TraceStep, second: TraceStep) -> TraceStep:
    """Two steps as one, after which everything is as after the second."""
    spent = [step.seconds for step in (first, second) if step.seconds is not None]
    return replace(
        second,
        seconds=round(sum(spent), 6) if spent else None,
        did=did_of_both(first.did, second.did),
        arrived=first.arrived | second.arrived,
        words=news_of_both(first.words, second.words),
        texts=first.texts | second.texts,
        events=first.events + second.events,
    )


def did_of_both(first: Did, second: Did) -> Did:
    """What two steps did, one after the other.

    >>> did_of_both({"computed": {"A": [0, 8, 0]}, "freed": [3]}, {"computed": {"A": [8, 1, 2]}, "freed": [4]})
    {'computed': {'A': [0, 9, 2]}, 'freed': [3, 4]}
    """
    return first | {name: HOW.get(name, _later)(first[name], value) if name in first else value
                    for name, value in second.items()}  # fmt: skip


def _later(first: Did, second: Did) -> Did:
    return first | second


def _appended(first: list[Any], second: list[Any]) -> list[Any]:
    return [*first, *second]


def _added(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    return first | {name: first.get(name, 0) + number for name, number in second.items()}


def _computed(first: Did, second: Did) -> Did:
    """Where the first began, and how many tokens both computed."""
    return first | {name: [first[name][0], *_sums(first[name][1:], numbers[1:])] if name in first else numbers
                    for name, numbers in second.items()}  # fmt: skip


def _guessed(first: Did, second: Did) -> Did:
    return first | {name: _sums(first[name], numbers) if name in first else numbers for name, numbers in second.items()}


def _furthest(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    return first | {name: max(first.get(name, 0), number) for name, number in second.items()}


def _sums(first: list[int], second: list[int]) -> list[int]:
    return [one + other for one, other in zip(first, second, strict=True)]


LISTS = ("admitted", "resumed", "copies", "swap_out", "swap_in", "freed", "evicted")
HOW: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(LISTS, _appended), "found": _added, "computed": _computed, "guessed": _guessed,
    "reached": _furthest,
}  # fmt: skip
