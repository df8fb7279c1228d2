"""The folder that a student works in, and what is in it.

    README.md               what to do with it
    assignment-3.md, .ipynb the handout, to read and to run
    src/                    the package, with the parts cut out that are theirs to write
    tests/                  pytest, for whoever likes it better than `check`
    course.json             which assignments were started here

One folder serves for the whole course: an assignment that is started later is cut into the same src/.
"""

import json
import re
import shutil
from pathlib import Path

from minipaged.course import cut
from minipaged.course.assignment import TITLES, Assignment, load
from minipaged.course.submission import NEVER, ROOT, copy_package, reference

README = """\
# Your engine

This folder was made by `python -m minipaged.course start`. `src/` has the package, and in it stand stubs where you are
to write; the handouts `assignment-N.md` (the same to run: `assignment-N.ipynb`) say what must hold.

    python -m minipaged.course check .        which parts work, and the smallest case that shows what doesn't
    python -m minipaged.course generate . "Why is the sky blue?"      the real model runs on what is there
    python -m pytest tests                    the same tests, for whoever likes pytest
    python -m minipaged.course contest .      assignment 6, without stubs or tests: yours beside the reference

Run these with the Python in which minipaged is installed. Beside the named functions you may add helpers, attributes
and imports in the files that you hand in.
"""
TEST = '''\
"""Assignment {number}, part by part. `python -m minipaged.course check .` says the same in more words.

The cases and what is expected stand in minipaged/course/assignments/{file}.py, of the installed package.
"""

import functools
from pathlib import Path

import pytest

from minipaged.course.assignment import load
from minipaged.course.checking import WORKS, check
from minipaged.course.report import in_words
from minipaged.course.submission import read

ASSIGNMENT = load({number})


@functools.cache
def result():
    return check(read(Path(__file__).parents[1], ASSIGNMENT), ASSIGNMENT)


@pytest.mark.parametrize("number", range(len(ASSIGNMENT.parts)), ids=[part.name for part in ASSIGNMENT.parts])
def test_part(number):
    part = result().parts[number]
    assert part.state == WORKS, in_words(part)
'''
WORK = """\
`python -m minipaged.course start {number} my-work/` writes a folder. In its `src/` the functions named above are stubs;
everything else works. `python -m minipaged.course check my-work/` says which parts work, and shows the smallest case
that fails. `python -m minipaged.course generate my-work/ "Hello"` lets the real model answer with what you have
written; where nothing is written yet, the reference stands in. What you don't write in this assignment is the
reference's; with `--mine` your own earlier parts are used instead."""


class StarterError(ValueError):
    """This folder can't be used so; the message says why."""


def started(folder: Path) -> list[int]:
    """Which assignments were started in a folder, in that order; StarterError if none was."""
    try:
        numbers = json.loads((folder / "course.json").read_text(encoding="utf-8"))["started"]
        if numbers and all(number in TITLES for number in numbers):
            return list(numbers)
    except FileNotFoundError:
        where = "there is no such folder" if not folder.exists() else "it has no course.json"
        raise StarterError(f"{folder} was not made by `python -m minipaged.course start`: {where}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StarterError(f"{folder / 'course.json'} can't be read: {error}") from None
    raise StarterError(f"{folder / 'course.json'} names no assignment of this course")


def start(number: int, folder: Path) -> list[Path]:
    """Write what assignment `number` needs, into a new folder or one of this course. Returns the files to be edited.

    StarterError, and nothing was written, if work would be lost.
    """
    assignment = load(number)
    before = started(folder) if folder.exists() and any(folder.iterdir()) else []
    if number in before:
        raise StarterError(f"assignment {number} was started in {folder} already; start anew in another folder")
    sources = {file: starter_source(assignment, file) for file in assignment.files}
    if before:
        _refuse_changed(folder, assignment, before)
        _put_back(folder / "src", load(before[0]))
    else:
        copy_package(folder / "src", assignment.absent)
        for file, text in assignment.also.items():
            _write(folder / "src" / file, text)
        _write(folder / "README.md", README)
    for file, source in sources.items():
        _write(folder / "src" / file, source)
    text = handout(assignment)
    _write(folder / f"assignment-{number}.md", text)
    _write(folder / f"assignment-{number}.ipynb", notebook(text))
    if assignment.parts:
        _write(folder / "tests" / f"test_assignment_{number}.py", TEST.format(number=number, file=TITLES[number]))
    _write(folder / "course.json", json.dumps({"started": [*before, number]}) + "\n")
    return [folder / "src" / file for file in assignment.files]


def _refuse_changed(folder: Path, assignment: Assignment, before: list[int]) -> None:
    theirs = {file for number in before for file in load(number).files}
    first = load(before[0]).also
    for file in assignment.files:
        path = folder / "src" / file
        ours = reference(file), first.get(file)
        if file in theirs or (path.exists() and path.read_text(encoding="utf-8") not in ours):
            raise StarterError(f"{path} was changed, and assignment {assignment.number} cuts it anew: move it away")


def _put_back(src: Path, first: Assignment) -> None:
    """The package's own files, where those of the first assignment stand or none does: later ones need them."""
    for path in first.absent:
        if (ROOT / path).is_dir():
            shutil.copytree(ROOT / path, src / path, ignore=shutil.ignore_patterns(*NEVER), dirs_exist_ok=True)
        elif not (src / path).exists():
            _write(src / path, reference(path))
    for path, text in first.also.items():
        if (src / path).exists() and (src / path).read_text(encoding="utf-8") == text:
            _write(src / path, reference(path))


def starter_source(assignment: Assignment, file: str) -> str:
    """One of its files, with stubs."""
    task = f"assignment {assignment.number}"
    return cut.starter(reference(file), assignment.cut(file), assignment.helpers(file), task)


def handout(assignment: Assignment) -> str:
    """Markdown, with the table of parts in it."""
    rows = ["| part | points | file | what you write |", "| --- | --- | --- | --- |"]
    for part in assignment.parts:
        names = ", ".join(f"`{name}`" for name in part.names)
        rows.append(f"| {part.name} | {part.points} | `{part.file}` | {names} |")
    text = assignment.handout.replace("{parts}", "\n".join(rows) if assignment.parts else "")
    return text.replace("{work}", WORK.format(number=assignment.number))


def notebook(markdown: str) -> str:
    """The same as a notebook: its Python blocks become cells. It finds the student's package before any other."""
    pieces = re.split(r"^```python\n(.*?)^```\n?", markdown, flags=re.M | re.S)  # words, code, words, ...
    kinds = ("markdown", "code")
    cells = [_cell(kinds[at % 2], piece.strip(), at) for at, piece in enumerate(pieces) if piece.strip()]
    cells.insert(1, _cell("code", 'import sys\n\nsys.path.insert(0, "src")', len(pieces)))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, indent=1) + "\n"


def _cell(kind: str, text: str, number: int) -> dict[str, object]:
    cell: dict[str, object] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
    cell["source"] = text.splitlines(keepends=True)
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
