"""What the instructor's commands do; the flags are in __main__.py."""

import argparse
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from minipaged.course import formats
from minipaged.course import mutants as made
from minipaged.course.assignment import Assignment
from minipaged.course.grading import Grade, grade_all, named
from minipaged.course.process import missing
from minipaged.terminal.command import BadInput, CommandFailed


def seed_of(args: argparse.Namespace) -> str:
    """Of the hidden cases. BadInput if the file can't be read, or has none."""
    if args.seed_file is None:
        seed = str(args.seed)
    else:
        try:
            seed = args.seed_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"--seed-file {args.seed_file}: {error}") from None
    if not seed:
        raise BadInput("the seed of the hidden cases is empty: give a word that students don't know")
    return seed


def grade(args: argparse.Namespace, assignment: Assignment) -> int:
    """Points as a table; as files below --out, also of those that are done when it is broken off."""
    seed = seed_of(args)
    folders = folders_of(args)
    if args.gradescope and len(folders) != 1:
        raise BadInput(f"--gradescope is for one submission, not {len(folders)}")
    if (why := missing()) and not args.unlocked:
        raise BadInput(
            f"strangers' code can't be locked in here: {'; '.join(why)}.\n"
            "--unlocked runs it all the same: on a machine that has nothing to lose or to be read"
        )
    _writable(args.out)
    grades: list[Grade] = []
    begin = time.monotonic()
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("grading", total=len(folders))
            for one in grade_all(folders, assignment, seed, args.jobs or _processors(), locked=not why):
                grades.append(one)
                progress.advance(bar)
                _write_one(args.out / one.result.name, one, assignment, time.monotonic() - begin)
    finally:
        if grades:
            (args.out / "grades.csv").write_text(formats.as_csv(grades, assignment), encoding="utf-8")
            (args.out / "grades.json").write_text(formats.as_json(grades, assignment), encoding="utf-8")
            _print(grades, assignment)
    if args.gradescope:
        args.gradescope.write_text(formats.for_gradescope(grades[0], time.monotonic() - begin), encoding="utf-8")
    return 0


def folders_of(args: argparse.Namespace) -> dict[str, Path]:
    """The submissions, by name. BadInput if one is no folder, or there is none."""
    for folder in args.folders:
        if not folder.is_dir():
            raise BadInput(f"{folder} is no folder" if folder.exists() else f"there is no folder {folder}")
    folders = args.folders
    if args.each:
        folders = [inner for folder in folders for inner in sorted(folder.iterdir()) if inner.is_dir()]
    if not folders:
        raise BadInput("there is no submission: --each takes the folders in DIR, and there are none")
    return named(folders)


def _writable(out: Path) -> None:
    """Better now than after an hour."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "grades.csv").touch()
    except OSError as error:
        raise BadInput(f"--out {out}: {error}") from None


def _write_one(folder: Path, one: Grade, assignment: Assignment, seconds: float) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(formats.for_gradescope(one, seconds), encoding="utf-8")
    (folder / "junit.xml").write_text(formats.as_junit(one, assignment), encoding="utf-8")
    (folder / "points.txt").write_text(formats.as_points(one), encoding="utf-8")


def _print(grades: Sequence[Grade], assignment: Assignment) -> None:
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("submission")
    for part in assignment.parts:
        table.add_column(f"{part.name}\n{part.points}", justify="right")
    table.add_column(f"points\n{assignment.points}", justify="right")
    table.add_column("alike", justify="right")
    for one in sorted(grades, key=lambda grade: grade.result.name):
        alike = "" if one.alike is None else f"{one.alike:.0%}"
        points = [str(part.points) for part in one.result.parts]
        table.add_row(Text(one.result.name), *points, str(one.result.points), alike)
    console.print(table)


def mutants(args: argparse.Namespace, assignment: Assignment) -> int:
    """A line for each that nobody finds, and the share of those that are found."""
    every = made.mutants(assignment)
    if not every:
        raise BadInput(f"assignment {assignment.number} has no parts that could be broken")
    with Progress(console=Console(stderr=True), transient=True) as progress, ThreadPoolExecutor(
        args.jobs or _processors()
    ) as pool:
        bar = progress.add_task("mutants", total=len(every))
        found = []
        for one in pool.map(lambda mutant: made.is_found(mutant, assignment), every):
            found.append(one)
            progress.advance(bar)
    left = [mutant for mutant, was_found in zip(every, found, strict=True) if not was_found]
    for mutant in left:
        print(f"{'harmless' if mutant.text in assignment.harmless else 'NOT FOUND'}  {mutant.text}")
        if mutant.text in assignment.harmless:
            print(f"          {assignment.harmless[mutant.text]}")
    num_harmless = sum(mutant.text in assignment.harmless for mutant in left)
    counted = len(every) - num_harmless
    print(f"{sum(found)} of {counted} found, {sum(found) / counted:.1%}; {num_harmless} more change nothing")
    if sum(found) < 0.95 * counted:
        raise CommandFailed("fewer than 95 % are found")
    return 0


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
