"""A contest: both engines are made ready, and play round after round. See `minipaged.course.contest`."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from minipaged.course.assignment import Assignment, load
from minipaged.course.contest.load import Ask, Sizes, draw
from minipaged.course.contest.points import Round, Standing, leaderboard, standing_of
from minipaged.course.contest.process import EngineProcess, Figures, Turn, TurnEnded, by_turns
from minipaged.course.contest.tree import Unfit, build_library, build_tree
from minipaged.course.process import Ended
from minipaged.models.fetch import fetch_smollm2

__all__ = ["Contest", "ContestFailed", "Round", "Standing", "contest", "leaderboard"]

SPREAD = 0.25  # of the seconds that the reference needs, requests come in: they come faster than they can be answered
SECONDS_TO_OPEN = 120.0
PATIENCE = 5.0  # times what the reference needs, and as many seconds besides as SECONDS_BESIDE
SECONDS_BESIDE = 20.0


class ContestFailed(RuntimeError):
    """The reference itself can't play: it is nobody's fault."""


def contest(
    folder: Path, seed: str, rounds: int = 3, model: str = "smollm2", locked: bool = True,
    notice: Callable[[str], None] = lambda line: None, threads: int | None = None,
) -> Standing:  # fmt: skip
    """Let a submission play, beside a reference of its own: see `Contest` and `Contest.play`."""
    with Contest(seed, model, locked, notice, threads=threads) as one:
        return one.play(folder, rounds)


class Contest:
    """A load and the reference, for one submission or, in a test, for several, one after the other. Used in a `with`.

    seed: the instructor's own secret. model: "smollm2", a folder or a .gguf file. sizes: of the load. threads: that
    both have for products; by default one for each processor. patience: seconds that a round may take beyond PATIENCE
    times the reference's. ContestFailed if the reference can't play; cpp_build.BuildFailed if there is no compiler.
    """

    def __init__(
        self, seed: str, model: str = "smollm2", locked: bool = True,
        notice: Callable[[str], None] = lambda line: None, sizes: Sizes | None = None, threads: int | None = None,
        patience: float = SECONDS_BESIDE,
    ):  # fmt: skip
        self.seed, self.locked, self.notice, self.sizes = seed, locked, notice, sizes or Sizes()
        self.model = fetch_smollm2() if model == "smollm2" else Path(model).resolve()
        self.assignment = _with_threads(load(6), threads or _processors())
        self._patience = patience
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Contest":
        """The reference plays the first round alone: how fast it is here says how fast requests may come."""
        with contextlib.ExitStack() as stack:
            self.reference = stack.enter_context(self._engine(stack, None))
            self.notice("the reference plays")
            try:
                self.reference.open(self._options(), SECONDS_TO_OPEN)
                [self.first] = by_turns([self._turn(self.reference, 0, 5 * SECONDS_TO_OPEN)])
            except Ended as ended:
                raise self._failed(ended) from None
            self._stack = stack.pop_all()
        self.patience = PATIENCE * self.first.seconds + self._patience
        return self

    def __exit__(self, *args: object) -> None:
        self._stack.close()

    def play(self, folder: Path, rounds: int = 3) -> Standing:
        """folder: with a package, or a part of one, in src/ or at its top. rounds: that count, after one that doesn't.

        In the first one the answers are looked at, but not the time, in which much is made that is made once.
        """
        done: list[Round] = []
        name = folder.resolve().name
        with contextlib.ExitStack() as stack:
            try:
                yours = stack.enter_context(self._engine(stack, folder))
            except Unfit as error:
                return Standing(name, 0, faults=[str(error)])
            try:
                fault = self._begin(yours)
                while not fault and len(done) < rounds:
                    one, fault = self._round(len(done) + 1, yours)
                    done.append(one)
            except Ended as ended:
                if isinstance(ended, TurnEnded) and ended.engine is self.reference:
                    raise self._failed(ended) from None
                printed = yours.printed.strip()[-1500:]
                fault = f"{ended}" + (f"; the last that was printed:\n{printed}" if printed else "")
        return standing_of(name, done, [fault] if fault else [])

    def _begin(self, yours: EngineProcess) -> str:
        """Make the engine, and let it play the first round; what is wrong with the answers."""
        self.notice("yours begins")
        yours.open(self._options(), SECONDS_TO_OPEN)
        [figures] = by_turns([self._turn(yours, 0, self.patience)])
        return _wrong(0, draw(self.seed, 0, self.sizes), figures, self.first)

    def _round(self, number: int, yours: EngineProcess) -> tuple[Round, str]:
        engines = [yours, self.reference] if number % 2 else [self.reference, yours]  # who begins has the colder caches
        figures = by_turns([self._turn(engine, number, self.patience) for engine in engines])
        found = dict(zip(engines, figures, strict=True))
        one = Round(number, found[yours], found[self.reference])
        self.notice(f"round {number}: " + ", ".join(f"{key} {ratio:.2f}" for key, ratio in one.ratios.items()))
        return one, _wrong(number, draw(self.seed, number, self.sizes), one.yours, one.reference)

    def _turn(self, engine: EngineProcess, number: int, patience: float) -> Turn:
        """In the first round all requests come at once."""
        spread = SPREAD * self.first.seconds if number else 0.0
        return Turn(engine, number, draw(self.seed, number, self.sizes), spread, patience)

    def _options(self) -> dict[str, Any]:
        sizes = {"num_blocks": self.sizes.num_blocks, "max_model_len": self.sizes.max_model_len}
        return {"model": str(self.model), "device": "cpu", "dtype": "fp32", "kernels": "cpp", "seed": 0, **sizes}

    def _engine(self, stack: contextlib.ExitStack, folder: Path | None) -> EngineProcess:
        """A process for the package in `folder`, or for the reference. It begins when it is opened."""
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="contest-", ignore_cleanup_errors=True)))
        build_tree(place / "tree", self.assignment, folder)
        library = build_library(place / "tree", place / "library", self.locked)
        inside = place / "inside"
        inside.mkdir()
        environment = {"MINIPAGED_LIBRARY": str(library), "MINIPAGED_CACHE": str(inside)}
        assignment = replace(self.assignment, environment={**self.assignment.environment, **environment})
        return EngineProcess(inside, place / "tree", assignment, self.locked, [self.model, library])

    def _failed(self, ended: Ended) -> ContestFailed:
        return ContestFailed(f"the reference can't play: {ended}\n{self.reference.printed}")


def _with_threads(assignment: Assignment, threads: int) -> Assignment:
    """A waiting thread sleeps, so that both are the same however busy the machine is.

    NumPy's own library would make its threads when it is imported: before the locks, which are for one thread.
    """
    environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "OPENBLAS_NUM_THREADS": "1"}
    return replace(assignment, environment={**assignment.environment, **environment})


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
