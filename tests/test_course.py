"""The course: starters are cut from the package as it is, `check` tells a student, `generate` runs at every moment."""

import ast
import gc
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
from course_solutions import starters, write_in
from tiny_model import make_folder

from minipaged.course import checking, cut
from minipaged.course.__main__ import main
from minipaged.course.assignment import TITLES, load
from minipaged.course.checking import UNUSABLE, UNWRITTEN, WORKS, check
from minipaged.course.inside.loop import raised
from minipaged.course.running import made_whole
from minipaged.course.starter import StarterError, handout, notebook, start
from minipaged.course.submission import Submission, read, reference

NUMBERS = [number for number in TITLES if load(number).parts]
FILES = [(number, file) for number in NUMBERS for file in load(number).files]


# ---- cutting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "file"), FILES)
def test_a_stub_promises_what_the_reference_promises(number, file):
    assignment, source = load(number), reference(file)
    stubs = starters(assignment)[file]
    names, helpers = assignment.cut(file), assignment.helpers(file)
    seen = dict(cut.signatures(source))
    assert dict(cut.signatures(stubs)) == {name: head for name, head in seen.items() if name not in helpers}
    assert cut.unwritten(stubs, names) == list(names)
    assert not cut.unwritten(source, names)
    docs = {name: ast.get_docstring(found.node) for name, found in cut.functions(ast.parse(source)).items()}
    for name, found in cut.functions(ast.parse(stubs)).items():
        assert ast.get_docstring(found.node) == docs[name]
        assert name not in names or docs[name] or not _is_public(name), f"{name} promises nothing"
    assert "super()" not in "".join(ast.unparse(cut.functions(ast.parse(source))[name].node) for name in names)


def _is_public(name):
    return not name.rpartition(".")[2].startswith("_")


@pytest.mark.parametrize(("number", "file"), FILES)
def test_a_starter_with_everything_written_is_the_package(number, file):
    """So the whole suite has tried the solved tree: it is the same code."""
    solved = write_in(starters(load(number))[file], reference(file))
    assert _definitions(solved) == _definitions(reference(file))


def _definitions(source):
    """All of a module, without the order of its definitions."""
    tree = ast.parse(source)
    return {ast.unparse(node) for one in tree.body for node in (one.body if isinstance(one, ast.ClassDef) else [one])}


@pytest.mark.parametrize("number", NUMBERS)
def test_each_part_gets_its_points_while_the_others_are_not_written(number):
    assignment = load(number)
    for part in assignment.parts:
        sources = {
            file: cut.starter(
                reference(file), [name for name in assignment.cut(file) if file != part.file or name not in part.names],
                [], f"assignment {number}",
            )
            for file in assignment.files
        }  # fmt: skip
        result = check(Submission("one", sources), assignment)
        assert {one.part.name: one.state for one in result.parts} == {
            one.name: WORKS if one == part else UNWRITTEN for one in assignment.parts
        }
        assert result.points == part.points


@pytest.mark.parametrize("number", NUMBERS)
def test_points_and_parts_are_sound(number):
    assignment = load(number)
    assert assignment.points == 100
    assert len({part.name for part in assignment.parts}) == len(assignment.parts)
    names = [f"{part.file}:{name}" for part in assignment.parts for name in part.names]
    assert len(set(names)) == len(names), "each function is of one part"


def test_no_file_is_in_two_assignments():
    files = [file for _, file in FILES]
    assert len(set(files)) == len(files)


def test_what_is_filled_in_leaves_a_students_own_helpers_alone():
    ours = "def whole(x):\n    return _half(x) * 2\n\ndef _half(x):\n    return x / 2\n\ndef other(x):\n    return x\n"
    theirs = "def _half(x):\n    return 'mine'\n\ndef whole(x):\n    pass\n\ndef other(x):\n    return _half(x)\n"
    names = {}
    exec(cut.filled(theirs, ours, ["whole"], ["_half"]), names)
    assert names["whole"](3) == 3 and names["other"](3) == "mine"


def test_many_threads_parse_at_once():
    """What a finalizer does while garbage is collected lets another thread in; `ast.parse` then fails at times."""
    source = reference("minipaged/memory/block_allocator.py")
    interval, often = sys.getswitchinterval(), gc.get_threshold()

    class InACircle:
        def __init__(self):
            self.itself = self

        def __del__(self):
            for _ in range(300):
                pass

    def work(_):
        for _ in range(80):
            [InACircle() for _ in range(20)]
            assert cut.unwritten(source, ["blocks_for"]) == ["blocks_for"]

    sys.setswitchinterval(1e-5)
    gc.set_threshold(50, 2, 2)
    try:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(work, range(6)))
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*often)


@pytest.mark.parametrize("body", ["pass", "raise NotImplementedError('mine')", "...", "return NotImplementedError"])
def test_only_our_own_stub_counts_as_not_written(body):
    assert cut.unwritten(f"def f():\n    {body}\n", ["f"]) == (["f"] if body == "pass" else [])
    stub = cut.starter(f"def f():\n    '''It.'''\n    {body}\n", ["f"], [], "assignment 1")
    assert cut.unwritten(stub, ["f"]) == ["f"] and cut.unwritten("", ["f"]) == ["f"]


# ---- the student's folder -------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_a_folder_has_all_that_the_first_day_needs(tmp_path, capsys):
    folder = tmp_path / "my work"
    status, out, _ = run(capsys, "start", 2, folder)
    assert status == 0 and str(folder / "assignment-2.md") in out
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "assignment-2.md", "assignment-2.ipynb", "course.json", "src", "tests",
    }  # fmt: skip
    assert not list(folder.rglob("__pycache__")) and not (folder / "src/minipaged/course").exists()
    status, out, _ = run(capsys, "check", folder)
    assert status == 1 and "0 of 100 points" in out and "not written yet" in out and "see below" not in out
    for file in load(2).files:
        assert str(folder / "src" / file) and "is yours to write" in (folder / "src" / file).read_text()
        (folder / "src" / file).write_text(reference(file))
    status, out, _ = run(capsys, "check", folder)
    assert status == 0 and "100 of 100 points" in out and "docstrings are right" in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_its_tests_run_with_pytest(tmp_path):
    start(2, tmp_path / "work")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    for file in load(2).files[:1]:
        (tmp_path / "work/src" / file).write_text(reference(file))
    done = subprocess.run(command, cwd=tmp_path / "work", capture_output=True, text=True)
    works = sum(part.file == load(2).files[0] for part in load(2).parts)
    assert f"{works} passed" in done.stdout and "not written yet" in done.stdout, done.stdout


@pytest.mark.parametrize("number", TITLES)
def test_a_handout_is_whole_and_a_notebook_too(number):
    text = handout(load(number))
    assert "{parts}" not in text and "{work}" not in text and "my-work/" in text
    for part in load(number).parts:
        assert f"| {part.name} | {part.points} |" in text
    assert text.count("<details>") == text.count("</details>") >= (3 * len(load(number).parts) or 3)
    book = nbformat.reads(notebook(text), as_version=4)
    nbformat.validate(book)
    assert "".join(text.split()) == "".join(
        "".join(f"```python{cell.source}```" if cell.cell_type == "code" else cell.source for cell in book.cells
                if cell.source != 'import sys\n\nsys.path.insert(0, "src")').split()
    )  # fmt: skip


def test_starting_another_assignment_keeps_what_was_written(tmp_path):
    start(2, tmp_path / "work")
    mine = tmp_path / "work/src" / load(2).files[0]
    mine.write_text(reference(load(2).files[0]) + "# mine\n")
    start(5, tmp_path / "work")
    assert mine.read_text().endswith("# mine\n")
    assert json.loads((tmp_path / "work/course.json").read_text()) == {"started": [2, 5]}
    with pytest.raises(StarterError, match="started in .* already"):
        start(5, tmp_path / "work")
    other = tmp_path / "work/src" / load(4).files[0]
    other.write_text("# changed\n")
    with pytest.raises(StarterError, match="was changed"):
        start(4, tmp_path / "work")
    assert other.read_text() == "# changed\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["start", "7", "x"], "invalid choice"),
        (["start", "2", "."], "was not made by"),
        (["check", "nowhere"], "there is no such folder"),
        (["check", "."], "it has no course.json"),
        (["check", "work", "--assignment", "3"], "was not started in"),
        (["check", "work", "--fast"], "unrecognized"),
        (["grade", "nowhere", "--assignment", "2", "--seed", "x"], "there is no folder"),
        (["grade", "work", "--assignment", "2"], "required"),
        (["grade", "work", "--assignment", "9", "--seed", "x"], "there is no assignment 9"),
        (["grade", "work", "--assignment", "2", "--seed-file", "nowhere"], "nowhere"),
        (["grade", "work", "--assignment", "2", "--seed", ""], "seed"),
        (["grade", "work", "--assignment", "2", "--seed", "x", "--out", "file"], "--out"),
        (["generate", "work"], ""),
        ([], "required"),
    ],
)
def test_what_can_not_be_done_is_said_in_a_line(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    start(2, tmp_path / "work")
    if arguments == ["generate", "work"]:
        arguments = ["check", "work"]
        (tmp_path / "work/course.json").write_text("{}")
        said = "course.json"
    status, out, err = run(capsys, *arguments)
    assert status == 2 and said in err and err.startswith("minipaged.course: error:") and "Traceback" not in err


def test_a_mistake_in_a_file_is_shown_where_it_is(tmp_path, capsys):
    start(2, tmp_path / "work")
    file = load(2).files[0]
    (tmp_path / "work/src" / file).write_text("def broken(:\n")
    status, out, _ = run(capsys, "check", tmp_path / "work")
    assert status == 1 and "line 1" in out and "can't be used" in out
    assert out.count("def broken(:") == 1, "once, however many parts are in it"
    submission = read(tmp_path / "work", load(2))
    states = {part.state for part in check(submission, load(2)).parts if part.part.file == file}
    assert states == {UNUSABLE}


def test_a_part_that_this_machine_lacks_a_package_for_says_so(tmp_path, capsys, monkeypatch):
    assignment = load(3)
    lacking = [part for part in assignment.parts if "triton" in part.needs]
    monkeypatch.setattr(checking, "find_spec", lambda name: None if name == "triton" else name)
    start(3, tmp_path / "work")
    for file in {part.file for part in lacking}:
        (tmp_path / "work/src" / file).write_text(reference(file))
    status, out, _ = run(capsys, "check", tmp_path / "work")
    assert status == 1 and lacking and out.count("can't be tried here") == len(lacking)
    assert out.count("needs the package triton") == 1


def test_an_error_shows_the_students_line_and_where_it_came_from():
    names = {}
    exec(compile("def given(x):\n    return x.no", "/tree/minipaged/given.py", "exec"), names)
    exec(compile("\ndef mine(x):\n    return given(x)", "/tree/minipaged/mine.py", "exec"), names)
    for files, lines in (["minipaged/mine.py"], [3, 2]), (["minipaged/given.py"], [2]), ([], [2]):
        with pytest.raises(AttributeError) as error:
            names["mine"](1)
        where = raised(error.value, "/tree", files)["where"].splitlines()
        assert [int(line.split("line ")[1].split(",")[0]) for line in where] == lines
    assert where[0].startswith("minipaged/given.py, line 2, in given")


# ---- generate, and one's own earlier parts --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("course") / "model")


def generate(folder, model, *arguments):
    command = [sys.executable, "-m", "minipaged.course", "generate", folder, "Hello", "--model", model]
    return subprocess.run([*command, "--max-tokens", "4", "--seed", "1", *arguments], capture_output=True, text=True)


def test_generate_runs_on_whatever_is_there(tmp_path, model):
    start(2, tmp_path / "work")
    begin = generate(tmp_path / "work", model)
    assert begin.returncode == 0 and begin.stdout and "yours: nothing yet" in begin.stderr
    for file in load(2).files:
        (tmp_path / "work/src" / file).write_text(reference(file) + "\nprint('mine is running')\n")
    whole = generate(tmp_path / "work", model)
    assert whole.returncode == 0 and "mine is running" in whole.stdout and "the reference's" not in whole.stderr
    assert whole.stdout.endswith(begin.stdout), "the same tokens"
    wrong = generate(tmp_path / "work", model, "--no-such-flag")
    assert wrong.returncode == 2 and "no-such-flag" in wrong.stderr


def test_generate_asks_the_attention_that_a_student_wrote(tmp_path, model):
    start(1, tmp_path / "work")
    for file in load(1).files:
        (tmp_path / "work/src" / file).write_text(reference(file))
    formulas = tmp_path / "work/src/kernels/formulas.py"
    formulas.write_text(formulas.read_text() + "\ndef attention(*given):\n    raise RuntimeError('mine was asked')\n")
    assert "mine was asked" in generate(tmp_path / "work", model).stderr


def test_with_mine_a_wrong_earlier_part_counts_and_without_it_does_not(tmp_path, capsys):
    for number in (2, 5):
        start(number, tmp_path / "work")
        for file in load(number).files:
            (tmp_path / "work/src" / file).write_text(reference(file))
    allocator = tmp_path / "work/src/minipaged/memory/block_allocator.py"
    allocator.write_text(allocator.read_text() + "\nraise RuntimeError('mine is broken')\n")
    assert run(capsys, "check", tmp_path / "work")[0] == 0
    status, out, err = run(capsys, "check", tmp_path / "work", "--mine")
    assert status == 1 and "mine is broken" in out and "your own assignments 2" in err
    sources, written, missing = made_whole(tmp_path / "work", [2])
    assert set(sources) == set(load(2).files) and written and not missing
