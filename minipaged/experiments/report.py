"""What a figure comes to: tables, a picture and what they say; on a terminal, in a pipe, and in files."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from minipaged.teaching import plots


@dataclass(frozen=True)
class Table:
    """Cells are text; the first column names the row."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """Aligned with spaces, for a pipe or a file."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        aligned = [
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *aligned])

    def rich(self) -> RichTable:
        look: Any = dict(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, title_justify="left", title_style="bold")
        table = RichTable(title=Text(self.title), **look)
        for column, name in enumerate(self.header):
            table.add_column(Text(name), justify="right" if column else "left")
        for row in self.rows:
            table.add_row(*(Text(cell, style=COLOURS.get(cell, "")) for cell in row))
        return table


COLOURS = {"met": "green", "missed": "red"}
WIDTH = 90  # of notes in a pipe and in files


@dataclass
class Report:
    """One figure. name: of its files. data: what the tables and the picture show, as numbers (JSON)."""

    name: str
    title: str
    data: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    draw: Callable[[], Figure] | None = None
    alt: str = ""

    def text(self) -> str:
        notes = ["\n".join(textwrap.fill(line, WIDTH) for line in note.splitlines()) for note in self.notes]
        return "\n\n".join([f"=== {self.title}", *(table.text() for table in self.tables), *notes]) + "\n"

    def show(self, console: Console) -> None:
        """On a terminal with colour and lines, else as text."""
        if not console.is_terminal:
            console.print(self.text(), markup=False, highlight=False, soft_wrap=True)
            return
        console.rule(Text(self.title, style="bold"), align="left")
        for table in self.tables:
            console.print(table.rich())
        for note in self.notes:
            console.print(note, markup=False, highlight=False)

    def write(self, folder: Path) -> list[Path]:
        """name.txt, name.json, name.png and name.svg. Returns what was written."""
        files = [folder / f"{self.name}.txt", folder / f"{self.name}.json"]
        files[0].write_text(self.text(), encoding="utf-8")
        files[1].write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        return files + (plots.save(self.draw(), folder / self.name) if self.draw else [])


# --- comparing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One number of ours and the paper's. kind: see paper.py. allowed: how far ours may be off; None: no goal.

    relative: the distance is a share of the paper's number, else their difference.
    """

    name: str
    ours: float
    paper: float
    kind: str
    allowed: float | None = None
    relative: bool = True

    @property
    def off(self) -> float:
        """In percent of the paper's number, or in its own unit."""
        return 100 * (self.ours / self.paper - 1) if self.relative else self.ours - self.paper

    @property
    def met(self) -> bool | None:
        return None if self.allowed is None else abs(self.off) <= self.allowed  # a NaN has missed it


def compare(title: str, points: Sequence[Point], digits: int = 2) -> Table:
    """The deviation table of a figure."""
    goals = any(point.allowed is not None for point in points)
    header = ["", "ours", "paper", "(kind)", "off", *(["goal", ""] if goals else [])]
    return Table(title, header, [_line(point, digits, goals) for point in points])


def _line(point: Point, digits: int, goals: bool) -> list[str]:
    unit = " %" if point.relative else ""
    cells = [
        point.name, f"{point.ours:.{digits}f}", f"{point.paper:.{digits}f}", f"({point.kind})",
        f"{point.off:+.1f}{unit}",
    ]  # fmt: skip
    if goals and point.allowed is None:
        return [*cells, "", ""]
    return [*cells, f"{point.allowed:g}{unit}", "met" if point.met else "missed"] if goals else cells


def verdict(name: str, met: bool) -> list[str]:
    """A row of a table of goals that are no numbers."""
    return [name, "met" if met else "missed"]
