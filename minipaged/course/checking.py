"""Which parts of a submission work.

First all of it together. A part that fails there, while others fail too, is tried once more among parts of the
reference: so nobody loses the points of a right part for a wrong one beside it. What isn't written yet is the
reference's from the beginning.
"""

import contextlib
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minipaged.course.assignment import Assignment, Case, Failure, Part
from minipaged.course.process import Ended, StudentProcess
from minipaged.course.submission import Submission, build
from minipaged.course.words import clean

PUBLIC_SEED = 0  # of the tests that students have
SECONDS_FOR_DOCTESTS = 20.0
MOST_TRIES, MOST_SECONDS_OF_TRIES = 200, 20.0  # to make a failing case smaller
PATIENCE = 300.0  # seconds, for all of a submission
WORKS, FAILS, UNWRITTEN, UNUSABLE = "works", "fails", "not written yet", "can't be used"
UNTRIED = "can't be tried here"  # this machine lacks a package


@dataclass(frozen=True)
class PartResult:
    """How a part stands. failure, case: what is wrong, and the smallest case that shows it. cases: how many were right.

    printed: the end of what the code has printed until then. missing: the names that are not written yet.
    """

    part: Part
    state: str
    failure: Failure | None = None
    case: Case | None = None
    cases: int = 0
    printed: str = ""
    missing: tuple[str, ...] = ()

    @property
    def points(self) -> int:
        return self.part.points if self.state == WORKS else 0


@dataclass(frozen=True)
class Result:
    """A submission's standing."""

    name: str
    parts: list[PartResult]

    doctests: dict[str, dict] = field(default_factory=dict)  # by file, as of observe.doctests, if they were asked for

    @property
    def points(self) -> int:
        return sum(part.points for part in self.parts)


def check(
    submission: Submission, assignment: Assignment, seed: int | str = PUBLIC_SEED, locked: bool = False,
    changed: dict[str, str] | None = None, notice: Callable[[str], None] = lambda line: None, doctests: bool = False,
    patience: float = PATIENCE,
) -> Result:
    """Try all parts. seed: of the cases. changed: as of `build`. notice: hears which part is being tried.

    doctests: run the examples in the docstrings, too; they give no points. patience: seconds after which nothing more
    is tried. NotStarted if this machine can't run anybody's code.
    """
    unwritten, written = submission.unwritten(assignment), []
    results: dict[str, PartResult] = {}
    for part in assignment.parts:
        if part.file in submission.faults:
            fault = Failure(f"{part.file} can't be used", got=submission.faults[part.file])
            results[part.name] = PartResult(part, UNUSABLE, fault)
        elif missing := [name for name in part.names if f"{part.file}:{name}" in unwritten]:
            said = f"not written yet: {', '.join(missing)}"
            results[part.name] = PartResult(part, UNWRITTEN, Failure(said), missing=tuple(missing))
        elif lacking := [name for name in part.needs if find_spec(name) is None]:
            said = f"this needs the package {lacking[0]}, which isn't installed here: it can be tried where it is"
            results[part.name] = PartResult(part, UNTRIED, Failure(said))
        else:
            written.append(part)
    until = time.monotonic() + patience
    bench = _Bench(submission, assignment, seed, locked, changed or {}, notice, until)
    results |= bench.run(written, unwritten)
    everything = {f"{part.file}:{name}" for part in assignment.parts for name in part.names}
    failed = [part for part in written if results[part.name].state == FAILS]
    if len(written) > 1 and len(failed) > 1:
        for part in failed:
            alone = everything - {f"{part.file}:{name}" for name in part.names}
            again = bench.run([part], alone)[part.name]
            if again.state == WORKS:
                results[part.name] = again
    examples = bench.doctests(unwritten) if doctests and written else {}
    return Result(submission.name, [results[part.name] for part in assignment.parts], examples)


@dataclass
class _Bench:
    """Where a submission is tried."""

    submission: Submission
    assignment: Assignment
    seed: int | str
    locked: bool
    changed: dict[str, str]
    notice: Callable[[str], None]
    until: float  # nothing is asked after this time

    def run(self, parts: list[Part], not_theirs: Collection[str]) -> dict[str, PartResult]:
        """Try some parts in one tree. A process that ends is followed by another one."""
        results: dict[str, PartResult] = {}
        if not parts:
            return results
        with tempfile.TemporaryDirectory(prefix="minipaged-", ignore_cleanup_errors=True) as name:
            tree = Path(name) / "tree"
            build(tree, self.assignment, self.submission.usable(), not_theirs, self.changed)
            left = list(parts)
            while left:
                with tempfile.TemporaryDirectory(prefix="inside-", dir=name) as folder, StudentProcess(
                    Path(folder), tree, self.assignment, self.locked
                ) as process:
                    alive = True
                    while left and alive:
                        part = left.pop(0)
                        self.notice(part.name)
                        results[part.name], alive = self._try(part, process)
        return results

    def doctests(self, not_theirs: Collection[str]) -> dict[str, dict]:
        """Of each file in which something is theirs. A file whose examples end the process has none."""
        found = {}
        for file, source in self.submission.usable().items():
            if all(f"{file}:{name}" in not_theirs for name in self.assignment.cut(file)):
                continue
            with tempfile.TemporaryDirectory(prefix="minipaged-", ignore_cleanup_errors=True) as name:
                tree, folder = Path(name) / "tree", Path(name) / "inside"
                folder.mkdir()
                case = {"module": file.removesuffix(".py").replace("/", "."), "tree": f"{tree}/"}
                build(tree, self.assignment, {file: source}, not_theirs, self.changed)
                with StudentProcess(folder, tree, self.assignment, self.locked) as process, contextlib.suppress(Ended):
                    found[file] = process.ask("doctests", case, SECONDS_FOR_DOCTESTS).get("answer", {})
        return {file: answer for file, answer in found.items() if isinstance(answer, dict) and answer.get("count")}

    def _try(self, part: Part, process: StudentProcess) -> tuple[PartResult, bool]:
        """The first case that fails is made as small as can be. And whether the process still lives."""
        rng = random.Random(f"{self.assignment.number} {part.name} {self.seed}")
        done = 0
        for case in itertools.islice(part.cases(rng), part.num_cases):
            failure, alive = _ask(part, case, process, self.until)
            if failure:
                if alive:
                    until = min(self.until, time.monotonic() + MOST_SECONDS_OF_TRIES)
                    case, failure, alive = _smallest(part, case, failure, process, until)
                return PartResult(part, FAILS, failure, case, done, process.printed), alive
            done += 1
        return PartResult(part, WORKS, cases=done), True


def _ask(part: Part, case: Case, process: StudentProcess, until: float) -> tuple[Failure | None, bool]:
    """What is wrong with the answer, and whether the process lives."""
    left = until - time.monotonic()
    if left <= 0:
        return Failure("there was no time left to try this"), True
    try:
        answer = process.ask(part.driver, case, min(left, part.seconds))
    except Ended as ended:
        return Failure(str(ended)), False
    if "raised" in answer:
        error = answer["raised"]
        return Failure(f"{error['kind']}: {error['said']}", got=error["where"]), True
    return judged(part, case, answer["answer"]), True


def judged(part: Part, case: Case, answer: Any) -> Failure | None:
    """What is wrong with an answer, whatever it is: the code that made it may have answered in the driver's place."""
    try:
        failure = part.judge(case, answer)
    except Exception as error:  # it isn't of the form that the driver makes
        said = f"{type(error).__name__}: {error}"
        return Failure("the answer is of no form that can be understood", got=clean(said, 300))
    if failure is None:
        return None
    return Failure(clean(failure.what), clean(failure.expected), clean(failure.got), clean(failure.picture, 10_000))


def _smallest(
    part: Part, case: Case, failure: Failure, process: StudentProcess, until: float
) -> tuple[Case, Failure, bool]:
    """A case that fails, none of whose `smaller` ones fails; or the best within so many tries, or so much time."""
    tries = 0
    shrinking = True
    while shrinking:
        shrinking = False
        for one in part.smaller(case):
            tries += 1
            if tries > MOST_TRIES or time.monotonic() > until:
                return case, failure, True
            found, alive = _ask(part, one, process, until)
            if found:
                case, failure, shrinking = one, found, alive
                if not alive:
                    return case, failure, False
                break
    return case, failure, True


def without(case: Case, key: str) -> list[Case]:
    """The case with one item less in case[key], a list: halves first, then one by one. For `Part.smaller`."""
    items = case[key]
    cuts = [items[len(items) // 2 :], items[: len(items) // 2]] if len(items) > 3 else []
    cuts += [items[:at] + items[at + 1 :] for at in range(len(items))] if items else []
    return [{**case, key: one} for one in cuts]

