"""Which parts of a submission work.

First all of it together. A part that fails there, while others fail too, is tried once more among parts of the
reference: so nobody loses the points of a right part for a wrong one beside it. What isn't written yet is the
reference's from the beginning.
"""

import itertools
import random
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from minipaged.course.assignment import Assignment, Case, Failure, Part
from minipaged.course.process import Ended, StudentProcess
from minipaged.course.submission import Submission, build

PUBLIC_SEED = 0  # of the tests that students have
MOST_TRIES = 200  # to make a failing case smaller
WORKS, FAILS, UNWRITTEN, UNUSABLE = "works", "fails", "not written yet", "can't be used"
UNTRIED = "can't be tried here"  # this machine lacks a package


@dataclass(frozen=True)
class PartResult:
    """How a part stands. failure, case: what is wrong, and the smallest case that shows it. cases: how many were right.

    printed: the end of what the code has printed until then.
    """

    part: Part
    state: str
    failure: Failure | None = None
    case: Case | None = None
    cases: int = 0
    printed: str = ""

    @property
    def points(self) -> int:
        return self.part.points if self.state == WORKS else 0


@dataclass(frozen=True)
class Result:
    """A submission's standing."""

    name: str
    parts: list[PartResult]

    @property
    def points(self) -> int:
        return sum(part.points for part in self.parts)


def check(
    submission: Submission, assignment: Assignment, seed: int = PUBLIC_SEED, locked: bool = False,
    changed: dict[str, str] | None = None, notice: Callable[[str], None] = lambda line: None,
) -> Result:
    """Try all parts. seed: of the cases. changed: as of `build`. notice: hears which part is being tried."""
    unwritten, written = submission.unwritten(assignment), []
    results: dict[str, PartResult] = {}
    for part in assignment.parts:
        if part.file in submission.faults:
            fault = Failure(f"{part.file} can't be used", got=submission.faults[part.file])
            results[part.name] = PartResult(part, UNUSABLE, fault)
        elif missing := [name for name in part.names if f"{part.file}:{name}" in unwritten]:
            results[part.name] = PartResult(part, UNWRITTEN, Failure(f"not written yet: {', '.join(missing)}"))
        elif lacking := [name for name in part.needs if find_spec(name) is None]:
            said = f"this needs the package {lacking[0]}, which isn't installed here: it can be tried where it is"
            results[part.name] = PartResult(part, UNTRIED, Failure(said))
        else:
            written.append(part)
    bench = _Bench(submission, assignment, seed, locked, changed or {}, notice)
    results |= bench.run(written, unwritten)
    everything = {f"{part.file}:{name}" for part in assignment.parts for name in part.names}
    failed = [part for part in written if results[part.name].state == FAILS]
    if len(written) > 1 and len(failed) > 1:
        for part in failed:
            alone = everything - {f"{part.file}:{name}" for name in part.names}
            again = bench.run([part], alone)[part.name]
            if again.state == WORKS:
                results[part.name] = again
    return Result(submission.name, [results[part.name] for part in assignment.parts])


@dataclass
class _Bench:
    """Where a submission is tried."""

    submission: Submission
    assignment: Assignment
    seed: int
    locked: bool
    changed: dict[str, str]
    notice: Callable[[str], None]

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

    def _try(self, part: Part, process: StudentProcess) -> tuple[PartResult, bool]:
        """The first case that fails is made as small as can be. And whether the process still lives."""
        rng = random.Random(f"{self.assignment.number} {part.name} {self.seed}")
        done = 0
        for case in itertools.islice(part.cases(rng), part.num_cases):
            failure, alive = _ask(part, case, process)
            if failure:
                if alive:
                    case, failure, alive = _smallest(part, case, failure, process)
                return PartResult(part, FAILS, failure, case, done, process.printed), alive
            done += 1
        return PartResult(part, WORKS, cases=done), True


def _ask(part: Part, case: Case, process: StudentProcess) -> tuple[Failure | None, bool]:
    """What is wrong with the answer, and whether the process lives."""
    try:
        answer = process.ask(part.driver, case, part.seconds)
    except Ended as ended:
        return Failure(str(ended)), False
    if "raised" in answer:
        error = answer["raised"]
        return Failure(f"{error['kind']}: {error['said']}", got=error["where"]), True
    try:
        return part.judge(case, answer["answer"]), True
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, AssertionError) as error:
        # The answer isn't even of the form that the driver makes: somebody else has answered.
        said = f"{type(error).__name__}: {error}"
        return Failure("the answer is of no form that can be understood", got=said[:300]), True


def _smallest(part: Part, case: Case, failure: Failure, process: StudentProcess) -> tuple[Case, Failure, bool]:
    """A case that fails, none of whose `smaller` ones fails; or the best within so many tries."""
    tries = 0
    shrinking = True
    while shrinking:
        shrinking = False
        for one in part.smaller(case):
            tries += 1
            if tries > MOST_TRIES:
                return case, failure, True
            found, alive = _ask(part, one, process)
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

