"""What a standing in the contest is worth. The figures are ratios to the reference beside it, more than 1 is better."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from minipaged.course.contest.process import Figures

BASE = 40  # points for right answers
WEIGHTS = {"speed": 30, "first": 20, "late": 10}  # points for what is better, see `points_of`
BAND = 1.05  # what is less is noise,
FULL = 1.5  # and more than this gains nothing
MOST_MEMORY = 1.5  # times the reference's: who takes more has nothing but the base
RATIOS = {
    "speed": lambda yours, theirs: yours.speed / theirs.speed,
    "first": lambda yours, theirs: theirs.mean_first / yours.mean_first,
    "late": lambda yours, theirs: theirs.late_first / yours.late_first,
    "blocks": lambda yours, theirs: theirs.blocks / max(1, yours.blocks),
    "memory": lambda yours, theirs: theirs.memory / yours.memory if yours.memory else 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Round:
    """A round that counts."""

    number: int
    yours: Figures
    reference: Figures

    @property
    def ratios(self) -> dict[str, float]:
        return {name: ratio(self.yours, self.reference) for name, ratio in RATIOS.items()}


@dataclass(frozen=True)
class Standing:
    """How a submission stands. faults: why it has no points, or not more.

    ratios: medians of the rounds, and more than 1 is better: "speed", useful tokens in a second; "first" and "late",
    the time to the first token, in the mean and of the one request in ten that waits longest; "blocks", the most in
    use, as the engine itself says; "memory", the most main memory, as the system says.
    """

    name: str
    points: int
    ratios: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)


def standing_of(name: str, rounds: list[Round], faults: list[str]) -> Standing:
    """Medians, and what they are worth."""
    found = [one.ratios for one in rounds]
    ratios = {key: statistics.median(one[key] for one in found) for key in RATIOS} if found else {}
    if faults or not found:
        return Standing(name, 0, ratios, faults or ["no round was played"], rounds)
    points = points_of(ratios)
    if ratios["memory"] < 1 / MOST_MEMORY:
        points = BASE
        faults = [f"{1 / ratios['memory']:.2f} times the reference's memory: with more than {MOST_MEMORY} there is "
                  "nothing but the base"]  # fmt: skip
    return Standing(name, points, ratios, faults, rounds)


def points_of(ratios: dict[str, float]) -> int:
    """The base, and what was gained; what got worse is subtracted from that.

    >>> points_of({"speed": 1.0, "first": 1.04, "late": 0.97}), points_of({"speed": 1.5, "first": 2.5, "late": 1.5})
    (40, 100)
    >>> points_of({"speed": 1.5, "first": 1.0, "late": 1.0}), points_of({"speed": 1.5, "first": 0.6, "late": 1.0})
    (70, 50)
    """
    return BASE + max(0, round(sum(weight * gain(ratios[key]) for key, weight in WEIGHTS.items())))


def gain(ratio: float) -> float:
    """From 0, for all that is within the band, to 1 at FULL; for what got worse the same, below 0.

    >>> gain(1.05), round(gain(1.275), 3), gain(3), gain(0.5)
    (0.0, 0.5, 1.0, -1.0)
    """
    if ratio < 1:
        return -gain(1 / ratio) if ratio > 0 and math.isfinite(1 / ratio) else -1.0
    return min(1.0, max(0.0, (ratio - BAND) / (FULL - BAND)))


def leaderboard(standings: Iterable[Standing]) -> list[dict[str, Any]]:
    """A row each, the best first; who has the same points and speed, by name."""
    order = sorted(standings, key=lambda one: (-one.points, -one.ratios.get("speed", 0.0), one.name))
    return [
        {"place": place, "name": one.name, "points": one.points}
        | {key: round(one.ratios[key], 2) if key in one.ratios else None for key in RATIOS}
        | {"fault": one.faults[0].partition("\n")[0] if one.faults else ""}
        for place, one in enumerate(order, 1)
    ]
