"""Many submissions, side by side, each in a process of its own. What one does to itself no other one notices."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from minipaged.course.assignment import Assignment
from minipaged.course.checking import Result, check
from minipaged.course.likeness import likeness
from minipaged.course.submission import PACKAGES, ROOT, read
from minipaged.course.words import clean


@dataclass(frozen=True)
class Grade:
    """alike: of what was written, the share that is the reference word for word; None if there is too little of it."""

    folder: Path
    result: Result
    alike: float | None


def named(folders: Sequence[Path]) -> dict[str, Path]:
    """Each under its own name, or, where names are the same, with those of the folders above; fit to be shown."""
    resolved = list(dict.fromkeys(folder.resolve() for folder in folders))
    depth = 1
    while len({path.parts[-depth:] for path in resolved}) < len(resolved):
        depth += 1
    names = [clean("-".join(path.parts[-depth:])) for path in resolved]
    if len(set(names)) < len(names):
        names = [f"{number} {name}" for number, name in enumerate(names, 1)]
    return dict(zip(names, resolved, strict=True))


def grade_all(
    folders: dict[str, Path], assignment: Assignment, seed: str, jobs: int, locked: bool = True,
) -> Iterator[Grade]:
    """One after the other, as they are done. OSError, at once, if a folder can't be read.

    The same seed gives the same points, on every machine and on every day.
    """
    with ThreadPoolExecutor(jobs) as pool:
        tasks = [pool.submit(_grade, name, folder, assignment, seed, locked) for name, folder in folders.items()]
        try:
            for task in as_completed(tasks):
                yield task.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _grade(name: str, folder: Path, assignment: Assignment, seed: str, locked: bool) -> Grade:
    submission = read(folder, assignment)
    submission.name = name
    alike = None
    with contextlib.suppress(RecursionError, MemoryError):  # of an absurd file: a class doesn't wait for one
        alike = likeness(submission, assignment)
    return Grade(folder, check(submission, assignment, seed, locked), alike)


def fingerprint() -> str:
    """Of all that points depend on but the seed: eight digits that change when the package does."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]

