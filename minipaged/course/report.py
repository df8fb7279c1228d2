"""How a submission stands, in words: for a student, in a terminal or in a file."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from minipaged.course.assignment import Assignment
from minipaged.course.checking import FAILS, UNTRIED, UNUSABLE, UNWRITTEN, WORKS, PartResult, Result

COLOURS = {WORKS: "green", FAILS: "red", UNUSABLE: "red", UNWRITTEN: "yellow", UNTRIED: "yellow"}


def print_result(result: Result, assignment: Assignment, console: Console) -> None:
    """A table of the parts, and what is wrong with those that don't work."""
    console.print(Text(f"Assignment {assignment.number}: {assignment.title}", "bold"))
    table = Table(box=None, pad_edge=False)
    for heading in ("part", "points", "", ""):
        table.add_column(heading, justify="right" if heading == "points" else "left")
    for part in result.parts:
        said = f"{part.cases} cases" if part.state == WORKS else "see below"
        if part.state == UNWRITTEN:
            said = "" if len(part.missing) == len(part.part.names) else ", ".join(part.missing)
        state = Text(part.state, COLOURS[part.state])
        table.add_row(part.part.name, f"{part.points} of {part.part.points}", state, said)
    console.print(table)
    said_of: dict[str, list[str]] = {}  # what is wrong with a file is said once, for all its parts
    for part in result.parts:
        if part.state in (FAILS, UNUSABLE, UNTRIED):
            said_of.setdefault(in_words(part), []).append(part.part.name)
    for said, names in said_of.items():
        console.print(Text(f"\n{', '.join(names)}", "bold"))
        for line in said.splitlines():
            console.print(Text(f"  {line}"), soft_wrap=True)
    right = [file for file, examples in result.doctests.items() if not examples["failed"]]
    if right:
        console.print(f"\nThe examples in these docstrings are right: {', '.join(right)}")
    for file, examples in result.doctests.items():
        if examples["failed"]:
            console.print(f"\n{examples['failed']} of the examples in the docstrings of {file} fail:", soft_wrap=True)
            for line in examples["said"].splitlines():
                console.print(Text(f"  {line}"), soft_wrap=True)
    console.print()
    console.print(f"{result.points} of {assignment.points} points")


def in_words(part: PartResult) -> str:
    """What is wrong with a part: lines."""
    return "\n".join(_lines(part))


def _lines(part: PartResult) -> Iterator[str]:
    failure = part.failure
    if failure is None:
        return
    yield failure.what
    if part.case is not None:
        before = f", after {part.cases} that were right" if part.cases else ""
        yield f"the smallest case that shows it{before}:"
        yield from _indented(part.part.show(part.case))
    for name, text in ("expected", failure.expected), ("got", failure.got):
        if "\n" in text:
            yield f"{name}:"
            yield from _indented(text)
        elif text:
            yield f"{name}: {text}"
    if failure.picture:
        yield ""
        yield from _indented(failure.picture)
    if part.printed.strip():
        yield "your code printed:"
        yield from _indented(part.printed.strip()[-1000:])


def _indented(text: str) -> Iterator[str]:
    return (f"    {line}" for line in text.splitlines())
