"""What an assignment is made of.

A part is a piece of the package that a student writes. It is tried with cases: each is plain data (what JSON can say),
made from a seed. A driver, inside the student's process, does with the student's code what a case says, and answers
with plain data too. A judge, outside, says what is wrong with an answer.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module, resources
from typing import Any

Case = dict[str, Any]
TITLES = {1: "attention", 2: "blocks", 3: "pagedattention", 4: "scheduler", 5: "sharing", 6: "project"}


@dataclass(frozen=True)
class Failure:
    """What is wrong with an answer. expected, got: for a reader, in a few lines; picture: what was drawn of it."""

    what: str
    expected: str = ""
    got: str = ""
    picture: str = ""


@dataclass(frozen=True)
class Part:
    """A piece to be written, with its own points.

    file: below the root, such as minipaged/memory/page_table.py.
    names: functions and methods whose bodies are cut out, qualified (`PageTable.slots`); what they promise stays.
    helpers: functions of the same file that only these use: they would give it away, and are cut out whole.
    driver: a function of the assignment's driver file.
    cases: endlessly many, or not, from small to large, from a seed.
    judge: of a case and its answer, None if it is right.
    smaller: cases that are simpler than this one, for the search for the smallest that fails.
    num_cases, seconds: how many are tried, and for how long one may take.
    needs: packages that not every machine has; without them the part can't be tried.
    """

    name: str
    points: int
    file: str
    names: tuple[str, ...]
    driver: str
    cases: Callable[[random.Random], Iterator[Case]]
    judge: Callable[[Case, Any], Failure | None]
    helpers: tuple[str, ...] = ()
    smaller: Callable[[Case], Iterator[Case]] = lambda case: iter(())
    show: Callable[[Case], str] = str
    num_cases: int = 100
    seconds: float = 10.0
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Assignment:
    """number, title, and what a student gets and is tried with.

    absent: files and folders of the package that would give it away; they are in no student's tree.
    imports: what the process imports before its doors are closed: packages that look around in the machine; those
    that it doesn't have are left out.
    environment: variables that the process has, and the student's tests.
    generate: flags with which `generate` uses what the student writes.
    generate_also: those of `also` that `generate` needs for this: the package's own file does without it.
    """

    number: int
    title: str
    parts: tuple[Part, ...]
    chapters: tuple[int, ...]  # to read before
    hours: str
    absent: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    generate: tuple[str, ...] = ()
    generate_also: tuple[str, ...] = ()
    memory: int = 1 << 30  # bytes, that its process may have
    also: dict[str, str] = field(default_factory=dict)  # files in the tree beside the package: path -> text
    harmless: dict[str, str] = field(default_factory=dict)  # mutants.py: those that change nothing -> why

    @property
    def points(self) -> int:
        return sum(part.points for part in self.parts)

    @property
    def files(self) -> list[str]:
        """What is handed in."""
        return sorted({part.file for part in self.parts})

    def cut(self, file: str) -> tuple[str, ...]:
        """The names that are cut out of a file."""
        return tuple(name for part in self.parts if part.file == file for name in part.names)

    def helpers(self, file: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts if part.file == file for name in part.helpers))

    @property
    def handout(self) -> str:
        """Markdown."""
        return (resources.files("minipaged.course.assignments") / f"{self.number}.md").read_text(encoding="utf-8")

    @property
    def driver_source(self) -> str:
        return (resources.files("minipaged.course.inside") / f"drive_{TITLES[self.number]}.py").read_text("utf-8")


def load(number: int) -> Assignment:
    """KeyError if there is none of this number."""
    assignment: Assignment = import_module(f"minipaged.course.assignments.{TITLES[number]}").ASSIGNMENT
    return assignment
