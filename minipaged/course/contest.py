"""The contest of assignment 6: a student's engine beside the reference, in one run, so that the machine doesn't matter.

Both are processes of their own, and get the same requests at the same times by their clocks, which run while they run:
by turns, half a second each, and whoever waits is stopped. An answer counts only if its tokens are the reference's. They
can be, to the last one: with the kernels in C++ and fp32, a request's numbers don't depend on its company (see
`same_bits` in kernels/cpp.py). All figures are ratios, of one round each, and the median of the rounds stands.

    contest_load.py      what is asked, and when
    contest_tree.py      the package of a student, and its C++
    contest_process.py   an engine in a process, and its clock outside
"""

import contextlib
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minipaged.course.assignment import Assignment, load
from minipaged.course.contest_load import Ask, Sizes, draw
from minipaged.course.contest_process import EngineProcess, Figures, Turn, TurnEnded, by_turns
from minipaged.course.contest_tree import Unfit, build_library, build_tree
from minipaged.course.process import Ended
from minipaged.models.fetch import fetch_smollm2

BASE = 40  # points for right answers
WEIGHTS = {"speed": 30, "first": 20, "late": 10}  # points for what is better, see `points_of`
BAND = 1.05  # what is less is noise,
FULL = 2.0  # and more than this gains nothing
MOST_MEMORY = 1.5  # times the reference's: who takes more has nothing but the base
SPREAD = 0.4  # of the seconds that the reference needs, requests come in: they come faster than they can be answered
SECONDS_TO_OPEN = 120.0
PATIENCE = 5.0  # times what the reference needs, and as many seconds besides as SECONDS_BESIDE
SECONDS_BESIDE = 20.0
RATIOS = {
    "speed": lambda yours, theirs: yours.speed / theirs.speed,
    "first": lambda yours, theirs: theirs.mean_first / yours.mean_first,
    "late": lambda yours, theirs: theirs.late_first / yours.late_first,
    "blocks": lambda yours, theirs: theirs.blocks / max(1, yours.blocks),
    "memory": lambda yours, theirs: theirs.memory / yours.memory if yours.memory else 1.0,
}  # fmt: skip


class ContestFailed(RuntimeError):
    """The reference itself can't play: it is nobody's fault."""


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


def contest(
    folder: Path, seed: str, rounds: int = 3, model: str = "smollm2", locked: bool = True,
    notice: Callable[[str], None] = lambda line: None, sizes: Sizes = Sizes(), threads: int | None = None,
    patience: float = SECONDS_BESIDE,
) -> Standing:  # fmt: skip
    """Let a submission play. folder: with a package in src/ or at its top. seed: the instructor's own secret.

    rounds: that count, after one that doesn't. model: "smollm2", a folder or a .gguf file. threads: that both have for
    products; by default one for each processor. patience: seconds beyond PATIENCE times the reference's.
    ContestFailed if the reference can't play; cpp_build.BuildFailed if there is no compiler.
    """
    assignment = _with_threads(load(6), threads or len(os.sched_getaffinity(0)))
    path = fetch_smollm2() if model == "smollm2" else Path(model).resolve()
    options = {
        "model": str(path), "device": "cpu", "dtype": "fp32", "kernels": "cpp", "num_blocks": sizes.num_blocks,
        "max_model_len": sizes.max_model_len, "seed": 0,
    }  # fmt: skip
    name = folder.resolve().name
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="contest-", ignore_cleanup_errors=True)))
        try:
            reference = stack.enter_context(_enter(place / "reference", assignment, None, path, locked))
            notice("the reference begins")
            reference.open(options, SECONDS_TO_OPEN)
            asks = draw(seed, 0, sizes)
            [first] = by_turns([Turn(reference, 0, asks, 0.0, 5 * SECONDS_TO_OPEN)])
        except Ended as ended:
            raise ContestFailed(f"the reference: {ended}\n{reference.printed}") from None
        ring = _Ring(reference, seed, sizes, first.seconds, first.seconds * PATIENCE + patience, notice)
        try:
            yours = stack.enter_context(_enter(place / "yours", assignment, folder, path, locked))
            return ring.run(name, yours, options, first, rounds)
        except Unfit as error:
            return Standing(name, 0, faults=[str(error)])


def _enter(place: Path, assignment: Assignment, folder: Path | None, model: Path, locked: bool) -> EngineProcess:
    """A process for the package in `folder`, or the reference's."""
    place.mkdir()
    build_tree(place / "tree", assignment, folder)
    library = build_library(place / "tree", place / "library", locked)
    inside = place / "inside"
    inside.mkdir()
    environment = {**assignment.environment, "MINIPAGED_LIBRARY": str(library), "MINIPAGED_CACHE": str(inside)}
    return EngineProcess(inside, place / "tree", replace(assignment, environment=environment), locked, [model, library])


def _with_threads(assignment: Assignment, threads: int) -> Assignment:
    """A waiting thread sleeps, so that both are the same however busy the machine is."""
    environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    return replace(assignment, environment={**assignment.environment, **environment})


@dataclass
class _Ring:
    """seconds: what the reference took when all came at once. patience: how long a turn may take."""

    reference: EngineProcess
    seed: str
    sizes: Sizes
    seconds: float
    patience: float
    notice: Callable[[str], None]

    def run(
        self, name: str, yours: EngineProcess, options: dict[str, Any], first: Figures, rounds: int
    ) -> Standing:
        """The first round, which the reference has played, is there for right answers alone."""
        done: list[Round] = []
        try:
            yours.open(options, SECONDS_TO_OPEN)
            asks = draw(self.seed, 0, self.sizes)
            [figures] = by_turns([Turn(yours, 0, asks, 0.0, self.patience)])
            fault = _wrong(0, asks, figures, first)
            for number in range(1, rounds + 1):
                if fault:
                    break
                one, fault = self._round(number, yours)
                done.append(one)
                self.notice(f"round {number}: " + ", ".join(f"{key} {ratio:.2f}" for key, ratio in one.ratios.items()))
        except Ended as ended:
            if isinstance(ended, TurnEnded) and ended.engine is self.reference:
                raise ContestFailed(f"the reference: {ended}\n{self.reference.printed}") from None
            printed = yours.printed.strip()
            fault = f"{ended}" + (f"; the last that was printed:\n{printed[-1500:]}" if printed else "")
        return standing_of(name, done, [fault] if fault else [])

    def _round(self, number: int, yours: EngineProcess) -> tuple[Round, str]:
        asks, spread = draw(self.seed, number, self.sizes), SPREAD * self.seconds
        turns = [Turn(engine, number, asks, spread, self.patience) for engine in (yours, self.reference)]
        figures = by_turns(turns)
        one = Round(number, figures[0], figures[1])
        return one, _wrong(number, asks, one.yours, one.reference)


def _wrong(number: int, asks: list[Ask], yours: Figures, reference: Figures) -> str:
    """The first answer that isn't the reference's, in words."""
    for at, (got, expected) in enumerate(zip(yours.tokens, reference.tokens, strict=True)):
        if got != expected:
            same = len(os.path.commonprefix([got, expected]))

            def said(tokens: list[int], same: int = same) -> str:
                return f"token {tokens[same]}" if same < len(tokens) else "its end"

            return (
                f"round {number}, request {at} ({asks[at].kind}, {asks[at].text[:40]!r}...): after {same} right tokens "
                f"comes {said(got)}, where the reference has {said(expected)}"
            )
    return ""


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

    >>> points_of({"speed": 1.0, "first": 1.04, "late": 0.97}), points_of({"speed": 2.0, "first": 2.5, "late": 2.0})
    (40, 100)
    >>> points_of({"speed": 1.5, "first": 1.0, "late": 1.0}), points_of({"speed": 1.5, "first": 0.6, "late": 1.0})
    (54, 41)
    """
    return BASE + max(0, round(sum(weight * gain(ratios[key]) for key, weight in WEIGHTS.items())))


def gain(ratio: float) -> float:
    """From 0, for all that is within the band, to 1 at FULL; for what got worse the same, below 0.

    >>> gain(1.05), round(gain(1.525), 3), gain(3), gain(0.5)
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
