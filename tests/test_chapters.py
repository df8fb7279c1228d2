"""The chapters: each committed notebook is what its source gives today, reads well, and its exercises can be graded.

Every chapter runs once, in a fresh kernel; then its exercises' tests meet solutions, right and wrong ones.
"""

import ast
import json
import math
import re
import statistics
from pathlib import Path

import nbformat
import pytest
from chapter_builder import ROOT, build

SOLUTIONS = Path(__file__).parent / "solutions"

CHAPTERS = build.chapters([])
HEADINGS = ["The question", "The idea", "Build it", "Check it", "The package's version",
            "What must hold, and what breaks if it doesn't", "Exercises", "What's next", "Sources"]  # fmt: skip

# Runs in the chapter's kernel, behind its last cell: prints what became of each solution, right and wrong. In hex, so
# that what a wrong one says isn't taken for what a page shows.
GRADE = """
import json, sys
sys.path.insert(0, {tests!r})
import exercise_grader
print(json.dumps(exercise_grader.grade({path!r}, {names!r}, globals())).encode().hex())
"""
SLIPS = "NameError", "NotImplementedError", "UnboundLocal", "SyntaxError", "IndentationError"

each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.name)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def exercises(notebook):
    """The names of its exercises: the function or class that each exercise's cell defines first."""
    cells = [cell.source for cell in code_cells(notebook) if "exercise" in build.tags(cell)]
    return [re.search(r"^(?:def|class) (\w+)", source, re.MULTILINE)[1] for source in cells]


@each_chapter
def test_runs_and_shows_what_is_committed(chapter, pytestconfig):
    """Also when a reader runs a cell again (cells of more than a second with --all-cells); and its tests can grade."""
    if "triton" in chapter.name:
        pytest.importorskip("triton")
    build.prepare()
    notebook = chapter.read()
    path = str(SOLUTIONS / f"ch{chapter.name[:2]}.py")
    source = GRADE.format(tests=str(Path(__file__).parent), path=path, names=exercises(notebook))
    grade = nbformat.v4.new_code_cell(source, id="grade")
    notebook.cells.append(grade)
    build.run(notebook, again=math.inf if pytestconfig.getoption("--all-cells") else 1)
    notebook.cells.remove(grade)
    build.keep_luck(chapter.committed(), notebook)
    assert list(build.differences(chapter.committed(), notebook)) == [], "run `make chapters`, and look at the diff"
    for name, found in json.loads(bytes.fromhex(grade.outputs[0].text)).items():
        right, wrong, made = found["right"], found["wrong"], found["made"]
        assert set(right) == {"passed"}, f"{name}: a right solution is refused: {right}"
        assert wrong and "passed" not in wrong, f"{name}: its test is content with a wrong solution: {wrong}"
        assert len(right) >= 3 and len(wrong) >= 5, f"{name}: three right solutions, and five wrong ones"
        assert "passed" not in made.values(), f"{name}: its test is content with a wrong solution: {made}"
        slips = [error for error in wrong if error.startswith(SLIPS)]
        assert not slips, f"{name}: a wrong solution fails by our own slip: {slips}"


@each_chapter
def test_no_committed_page_shows_an_error(chapter):
    """Also in cells that are not compared, since they measure."""
    for cell in code_cells(chapter.committed()):
        build.look_over(cell)


@each_chapter
def test_exercises_are_unsolved_and_say_so(chapter):
    notebook = chapter.committed()
    names = exercises(notebook)
    assert 3 <= len(names) <= 5
    tests = [cell for cell in code_cells(notebook) if "test" in build.tags(cell)]
    assert all(f"attempt(test_{name}, {name})" in cell.source for name, cell in zip(names, tests, strict=True))
    assert [cell.outputs[0].text for cell in tests] == [f"{name}: not solved yet\n" for name in names]


@each_chapter
def test_reads_well(chapter):
    notebook = chapter.read()
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.findall(r"^## (.*)$", prose, re.MULTILINE) == HEADINGS
    assert not re.search(r"!\[|<img|https?://\S+\.(png|svg|jpg)", prose), "pictures are made by cells"
    sizes = [len(cell.source.splitlines()) for cell in code_cells(notebook) if "test" not in build.tags(cell)]
    assert statistics.median(sizes) <= 7 and max(sizes) <= 32
    long = [line for cell in code_cells(notebook) for line in cell.source.splitlines() if len(line) > 96]
    assert not long, "lines that a page has to scroll"
    alts = [output.metadata["image/png"]["alt"] for cell in code_cells(chapter.committed())
            for output in cell.outputs if "image/png" in output.get("data", {})]  # fmt: skip
    assert alts and all(alts)


@each_chapter
def test_is_in_the_table_of_contents(chapter):
    table = (ROOT / "chapters" / "README.md").read_text()
    row = next(line for line in table.splitlines() if f"({chapter.notebook.name})" in line)
    assert f"| {build.reading_minutes(chapter.committed())} |" in row, row


# --- the rooms that the chapters explain -----------------------------------------------------------------------

FILES = [path for room in ("memory", "scheduling") for path in sorted((ROOT / "minipaged" / room).glob("[a-z]*.py"))]


def public_names(path):
    """"function", "Class", and "Class.method", but for private ones."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name
            parts = node.body if isinstance(node, ast.ClassDef) else []
            methods = [part.name for part in parts if isinstance(part, ast.FunctionDef)]
            yield from (f"{node.name}.{name}" for name in methods if not name.startswith("_"))


def seen_in_chapters():
    """(what their cells and outputs say, what their prose says in code letters)."""
    code, prose = [], []
    for chapter in CHAPTERS:
        for cell in chapter.committed().cells:
            if cell.cell_type == "markdown":
                prose += re.findall(r"`([^`\n]+)`", cell.source)
                continue
            code.append(cell.source)
            code += [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "\n".join(code), "\n".join(prose)


def test_every_file_of_memory_and_scheduling_is_shown():
    code, _ = seen_in_chapters()
    files = [path.relative_to(ROOT).as_posix() for path in FILES]
    assert [file for file in files if f"# {file}\n" not in code] == []


def test_every_public_name_of_memory_and_scheduling_is_explained():
    """Its source is shown, or a cell uses it, or the prose names it."""
    code, prose = seen_in_chapters()
    missing = []
    for path in FILES:
        for name in public_names(path):
            last = name.split(".")[-1]
            used = rf"\.{last}\b" if "." in name else rf"\b{last}\b"
            defined = rf"(?:def|class) {last}\b"
            if not re.search(f"{defined}|{used}", code) and not re.search(rf"\b{last}\b", prose):
                missing.append(f"{path.name}: {name}")
    assert missing == []
