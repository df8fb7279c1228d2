"""From sources to notebooks: `make chapters`, or python chapters/source/build.py --help.

A chapter is written as a Python file with cells (source/NN_name.py, jupytext's percent format) and committed as a
notebook with all that its cells show (NN_name.ipynb). A rebuild runs every cell in a fresh kernel. If nothing changed
it changes nothing: cells have the same ids each time, and what differs by luck alone is kept as it was, namely

- what a cell tagged "measured" shows: times of the machine that made the page, new only with --measure;
- a picture in which a few pixels differ.

Tags: "measured"; "exercise", a cell for the reader to fill in; "test", the test of the exercise before it.
"""

import argparse
import base64
import copy
import io
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import jupytext
import nbformat
import numpy as np
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kernels import load as load_kernels
from minipaged import cache_folder
from minipaged.models import ModelError
from minipaged.models.fetch import fetch_smollm2

SOURCES = Path(__file__).resolve().parent
CHAPTERS = SOURCES.parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}
# What must not be seen in an output: where somebody's machine keeps things, and what needs a running widget.
FOREIGN = re.compile(r"/(?:home|root|tmp|work|Users|usr|opt)/|site-packages|\\\\Users|object at 0x|widget-view")


class ChapterError(Exception):
    """A chapter is not as it must be; the message says which cell, and why."""


@dataclass
class Chapter:
    source: Path

    @property
    def name(self) -> str:
        return self.source.stem

    @property
    def notebook(self) -> Path:
        return CHAPTERS / f"{self.name}.ipynb"

    def read(self) -> NotebookNode:
        """The cells of the source, not yet run."""
        notebook = jupytext.read(self.source, fmt="py:percent")
        notebook.metadata = nbformat.from_dict(METADATA)
        notebook.nbformat, notebook.nbformat_minor = 4, 5
        for i, cell in enumerate(notebook.cells):
            cell.id = f"c{self.name[:2]}-{i + 1:03}"
            cell.metadata = nbformat.from_dict({"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {})
        return notebook

    def committed(self) -> NotebookNode:
        """The notebook as it stands; without cells if there is none yet."""
        if not self.notebook.exists():
            return nbformat.v4.new_notebook()
        return nbformat.read(self.notebook, as_version=4)


def chapters(prefixes: list[str]) -> list[Chapter]:
    """Those whose names begin so; all, if none is named."""
    found = [Chapter(path) for path in sorted(SOURCES.glob("[0-9][0-9]_*.py"))]
    for prefix in prefixes:
        if not any(chapter.name.startswith(prefix) for chapter in found):
            names = ", ".join(chapter.name for chapter in found)
            raise ChapterError(f"there is no chapter {prefix!r}; there are {names}")
    return [chapter for chapter in found if not prefixes or chapter.name.startswith(tuple(prefixes))]


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def run(
    notebook: NotebookNode, tell: Callable[[int], None] = lambda cell: None, measure: bool = False, again: float = 0
) -> NotebookNode:
    """Run all cells in a fresh kernel, in an empty folder. ChapterError at the first that fails or complains.

    measure: with all cores; else with one thread, so that two that run side by side don't wait for each other.
    again: then run each cell that took less than so many seconds again, alone; see run_again().
    """
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        client = NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources=resources, record_timing=False,
            coalesce_streams=True, extra_arguments=["--log-level=CRITICAL"],
        )  # fmt: skip
        root = str(CHAPTERS.parent)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        environment |= {} if measure else {"OMP_NUM_THREADS": "1"}
        with client.setup_kernel(env=environment):
            quick = []
            for i, cell in enumerate(notebook.cells):
                tell(i)
                began = time.perf_counter()
                run_cell(client, cell, i)
                if cell.cell_type == "code" and time.perf_counter() - began < again:
                    quick.append(i)
            run_again(client, notebook, quick)
    return notebook


def run_cell(client: NotebookClient, cell: NotebookNode, i: int) -> None:
    try:
        client.execute_cell(cell, i)
    except CellExecutionError as error:
        raise ChapterError(f"cell {cell.id} fails:\n{cell.source}\n{error}") from None
    except (DeadKernelError, CellTimeoutError) as error:
        raise ChapterError(f"cell {cell.id} does not end well: {error}\n{cell.source}") from None
    look_over(cell)


def run_again(client: NotebookClient, notebook: NotebookNode, cells: list[int]) -> None:
    """Run single cells again after Run All: from the last to the first, then in a random order, each time the same.

    A reader goes back, turns a number, and runs that one cell. So no cell may need to be the first of its kind, and
    none may take away what another one needs.
    """
    failed: dict[str, ChapterError] = {}
    for i in [*reversed(cells), *Random(0).sample(cells, len(cells))]:
        cell = notebook.cells[i]
        try:
            run_cell(client, copy.deepcopy(cell), i)
        except ChapterError as error:
            failed.setdefault(cell.id, error)
        finally:
            notebook.cells[i] = cell
    if failed:
        names, first = ", ".join(failed), next(iter(failed.values()))
        raise ChapterError(f"run again after Run All, {len(failed)} cells fail: {names}; the first: {first}")


def look_over(cell: NotebookNode) -> None:
    """No error, nothing on stderr, no path of a machine, nothing that a page without a kernel can't show."""
    for output in cell.get("outputs", []):
        if output.output_type == "error":
            raise ChapterError(f"cell {cell.id} shows an error: {output.ename}: {output.evalue}")
        if output.get("name") == "stderr":
            raise ChapterError(f"cell {cell.id} writes to stderr: {output.text}")
        shown = {kind: data for kind, data in output.get("data", output).items() if kind != "image/png"}
        if foreign := FOREIGN.search(json.dumps(shown)):
            raise ChapterError(f"cell {cell.id} shows {foreign[0]!r}, which is of this machine alone:\n{cell.source}")


# --- what is new, and what only differs by luck --------------------------------------------------------------


def same_outputs(old: list[NotebookNode], new: list[NotebookNode]) -> bool:
    if len(old) != len(new):
        return False
    return all(plain(a) == plain(b) and same_picture(a, b) for a, b in zip(old, new, strict=True))


def plain(output: NotebookNode) -> dict:
    """All that must be equal to the letter: not the number of the cell, not pictures, and not how text is coloured."""
    kept = {key: value for key, value in output.items() if key not in ("data", "execution_count")}
    return kept | {kind: data for kind, data in output.get("data", {}).items() if kind == "text/plain"}


def same_picture(old: NotebookNode, new: NotebookNode) -> bool:
    """Other processors round otherwise, and that moves a few pixels."""
    both = [output.get("data", {}).get("image/png") for output in (old, new)]
    if both[0] == both[1]:
        return True
    if None in both:
        return False
    a, b = (np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"), dtype=float) for data in both)
    return a.shape == b.shape and float((abs(a - b) > 64).mean()) < 0.002


def keep_luck(old: NotebookNode, new: NotebookNode, measure: bool = False) -> None:
    """Put the committed outputs back where only luck differs."""
    committed: dict[str, list[NotebookNode]] = {}
    for cell in old.cells:
        committed.setdefault(cell.source, []).append(cell)  # in order, if there are several
    for cell in new.cells:
        if cell.cell_type != "code" or not committed.get(cell.source):
            continue
        before = committed[cell.source].pop(0)
        if measure and "measured" in tags(cell):
            continue
        if "measured" in tags(cell) or same_outputs(before.outputs, cell.outputs):
            cell.outputs = before.outputs
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = cell.execution_count


def differences(old: NotebookNode, new: NotebookNode) -> Iterator[str]:
    """Where the committed notebook is not what its source gives, in words."""
    if [written(cell) for cell in old.cells] != [written(cell) for cell in new.cells]:
        yield "the cells of the notebook are not those of its source"
        return
    for before, now in zip(old.cells, new.cells, strict=True):
        if before.cell_type == "code" and not same_outputs(before.outputs, now.outputs):
            yield f"cell {now.id} shows something else now:\n{now.source}\n--> {words(now)}\ncommitted: {words(before)}"


def written(cell: NotebookNode) -> tuple:
    """What of a cell is its author's."""
    return cell.id, cell.cell_type, tags(cell), cell.source


def words(cell: NotebookNode) -> str:
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "\n".join(texts)[:2000]


def reading_minutes(notebook: NotebookNode) -> int:
    """180 words of prose a minute, and 12 lines of code: slow enough to understand them. To the nearest 5.

    Without the exercises: who tries them knows better.
    """
    prose = sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown")
    read = [cell for cell in notebook.cells if cell.cell_type == "code" and not {"exercise", "test"} & set(tags(cell))]
    code = sum(len(cell.source.splitlines()) for cell in read)
    return max(5, round((prose / 180 + code / 12) / 5) * 5)


def prepare() -> None:
    """Fetch the model and build what is built on first use. What they say on the way is no output of a cell."""
    fetch_smollm2()
    load_kernels("auto", folder=cache_folder(), notice=lambda line: print(line, file=sys.stderr))


# --- the command line ----------------------------------------------------------------------------------------


def build(chapter: Chapter, measure: bool, tell: Callable[[int], None], again: float = 0) -> NotebookNode:
    """The chapter run anew, with what only differs by luck as it was."""
    notebook = run(chapter.read(), tell, measure, again)
    keep_luck(chapter.committed(), notebook, measure)
    return notebook


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the chapters and write their notebooks.")
    parser.add_argument("chapters", nargs="*", metavar="NN", help="how their names begin; all, if none is named")
    parser.add_argument("--measure", action="store_true", help='run "measured" cells for what they show, too')
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a notebook would change")
    parser.add_argument("--again", type=float, default=0, metavar="S", help="then run each cell that took less than "
                        "S seconds again, alone, in two orders")  # fmt: skip
    options = parser.parse_args(arguments)
    console = Console()
    table = Table("chapter", "cells", "lines of code", "to read, min", "ran, s", box=None)
    bad = 0
    try:
        wanted = chapters(options.chapters)
        prepare()
        for chapter in wanted:
            began = time.perf_counter()
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            hidden = not console.is_terminal
            with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
                task = progress.add_task(chapter.name, total=len(chapter.read().cells))
                tell = lambda i: progress.update(task, completed=i)  # noqa: B023, E731
                notebook = build(chapter, options.measure, tell, options.again)
            code = [cell for cell in notebook.cells if cell.cell_type == "code"]
            lines = sum(len(cell.source.splitlines()) for cell in code)
            ran = f"{time.perf_counter() - began:.0f}"
            table.add_row(chapter.name, str(len(notebook.cells)), str(lines), str(reading_minutes(notebook)), ran)
            if options.check:
                for difference in differences(chapter.committed(), notebook):
                    bad += 1
                    console.print(f"{chapter.name}: {difference}", markup=False)
            else:
                nbformat.write(notebook, chapter.notebook)
    except (ChapterError, ModelError) as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("build.py: stopped; the chapter under way is as it was", file=sys.stderr)
        return 130
    console.print(table)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
