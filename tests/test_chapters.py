"""The chapters: each committed notebook is what its source gives today, reads well, and its exercises can be graded.

Every chapter runs once, in a fresh kernel; then its exercises' tests meet solutions, right and wrong ones.
"""

import json
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

# Runs in the chapter's kernel, behind its last cell: prints what became of each solution, right and wrong.
GRADE = """
import json
mine = dict(globals())
exec(compile(open({path!r}).read(), {path!r}, "exec"), mine)
found = {{}}
for name in {names!r}:
    found[name] = []
    for solution in [mine[name], *mine["WRONG"][name]]:
        try:
            globals()["test_" + name](solution)
        except Exception as error:
            found[name].append(f"{{type(error).__name__}}: {{error}}")
        else:
            found[name].append("passed")
print(json.dumps(found))
"""

each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.name)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def exercises(notebook):
    """The names of its exercises: the function or class that each exercise's cell defines first."""
    cells = [cell.source for cell in code_cells(notebook) if "exercise" in build.tags(cell)]
    return [re.search(r"^(?:def|class) (\w+)", source, re.MULTILINE)[1] for source in cells]


@each_chapter
def test_runs_and_shows_what_is_committed(chapter):
    if "triton" in chapter.name:
        pytest.importorskip("triton")
    build.prepare()
    names = exercises(chapter.read())
    notebook = chapter.read()
    path = str(SOLUTIONS / f"ch{chapter.name[:2]}.py")
    grade = nbformat.v4.new_code_cell(GRADE.format(path=path, names=names))
    notebook.cells.append(grade)
    build.run(notebook)
    notebook.cells.remove(grade)
    build.keep_luck(chapter.committed(), notebook)
    assert list(build.differences(chapter.committed(), notebook)) == [], "run `make chapters`, and look at the diff"
    results = json.loads(grade.outputs[0].text)
    for name, (right, *wrong) in results.items():
        assert right == "passed", f"{name}: the solution fails"
        assert wrong and "passed" not in wrong, f"{name}: its test is content with a wrong solution: {wrong}"
        slips = [error for error in wrong if error.startswith(("NameError", "NotImplementedError", "UnboundLocal"))]
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
