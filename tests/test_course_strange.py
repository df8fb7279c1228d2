"""Strange folders, files and answers, which the grader itself touches: they hurt nobody but their own submission."""

import json
import math
import os
import random
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from minipaged.course import cut, grading, process
from minipaged.course import submission as submissions
from minipaged.course.assignment import TITLES, load
from minipaged.course.checking import UNUSABLE, check, judged
from minipaged.course.submission import ROOT, read, reference
from minipaged.course.words import clean

WHOLE = load(2)
ASSIGNMENT = replace(WHOLE, parts=WHOLE.parts[:1])
HONEST = {file: reference(file) for file in ASSIGNMENT.files}


# ---- folders, and files that nobody should parse --------------------------------------------------------------------


def hand_in(folder, data, file=ASSIGNMENT.files[0]):
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_bytes(data)
    return read(folder, ASSIGNMENT)


BOMBS = {
    "parentheses": b"(" * 100_000,
    "a sum": b"x = 1" + b" + 1" * 50_000,
    "attributes": b"x = a" + b".b" * 100_000,
    "minus": b"x = " + b"-" * 200_000 + b"1",
    "blocks": b"".join(b" " * depth + b"if x:\n" for depth in range(99)) + b" " * 99 + b"x" + b"+1" * 300,
    "text of texts": b"x = f'" + b"{a}" * 80_000 + b"'",
    "a number": b"x = " + b"9" * 100_000,
    "a number that can't be shown": b"x = 0x" + b"f" * 100_000,
    "too long": b"x = 1\n" * 100_000,
    "not UTF-8": b"x = '\xff'\n",
    "another encoding": b"# coding: utf-7\nx = 1\n",
    "a NUL": b"x = 1\0\n",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_file_that_can_not_be_parsed_hurts_only_itself(bomb, tmp_path):
    begin = time.process_time()
    submission = hand_in(tmp_path, BOMBS[bomb])
    assert submission.faults and "\n" not in submission.faults[ASSIGNMENT.files[0]][:20]
    assert {part.state for part in check(submission, ASSIGNMENT).parts} == {UNUSABLE}
    assert time.process_time() - begin < 5


def test_a_link_to_the_reference_is_no_submission(tmp_path):
    file = ASSIGNMENT.files[0]
    (tmp_path / "file/src" / file).parent.mkdir(parents=True)
    (tmp_path / "file/src" / file).symlink_to(ROOT / file)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/src").symlink_to(ROOT)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / Path(file).name).symlink_to(ROOT / file)
    (tmp_path / "round").mkdir()
    (tmp_path / "round/round").symlink_to(tmp_path / "round")
    for name in ("file", "folder", "flat", "round"):
        submission = read(tmp_path / name, ASSIGNMENT)
        assert file in submission.faults and not submission.sources, name


def test_folders_are_as_strange_as_they_want(tmp_path):
    name = Path(ASSIGNMENT.files[0]).name
    deep = tmp_path / "deep" / "/".join("d" * 40)
    deep.mkdir(parents=True)
    (deep / name).write_text("x = 1")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / name)
    (tmp_path / "folder" / name).mkdir(parents=True)
    for number in (1, 2):
        (tmp_path / f"two/\udcff\n{number}").mkdir(parents=True)
        (tmp_path / f"two/\udcff\n{number}" / name).write_text("x = 1")
    for folder in ("deep", "pipe", "folder", "two"):
        fault = read(tmp_path / folder, ASSIGNMENT).faults[ASSIGNMENT.files[0]]
        assert fault == clean(fault) and fault.encode()
    assert "several" in fault
    folders = [tmp_path / "\udcff\x1b[2J", tmp_path / "\udcfe\x1b[2J", tmp_path / "[/red]"]
    names = grading.named(folders)
    assert list(names.values()) == folders and all(name == clean(name) and name.encode() for name in names)


def test_a_folder_without_end_is_not_searched(tmp_path, monkeypatch):
    monkeypatch.setattr(submissions, "MOST_FOLDERS", 20)
    monkeypatch.setattr(submissions, "MOST_FILES", 20)
    for name in ("folders", "files"):
        (tmp_path / name).mkdir()
    for number in range(30):
        (tmp_path / f"folders/{number}").mkdir()
        (tmp_path / f"files/{number}").touch()
    for name in ("folders", "files"):
        assert "too many" in read(tmp_path / name, ASSIGNMENT).faults[ASSIGNMENT.files[0]]


def test_a_file_of_windows_is_a_file(tmp_path):
    submission = hand_in(tmp_path, b"\xef\xbb\xbf" + HONEST[ASSIGNMENT.files[0]].replace("\n", "\r\n").encode())
    assert submission.sources[ASSIGNMENT.files[0]] == HONEST[ASSIGNMENT.files[0]]


def test_a_helper_of_a_part_is_not_there_when_that_part_is_tried():
    ours = "".join(
        f"def {name}(x):\n    return {body}\n"
        for name, body in {"a": "_both(x) + _a(x)", "_a": "1", "b": "_both(x)", "_both": "x"}.items()
    )
    filled = cut.filled("def a(x):\n    return 2\n", ours, ["b"], ["_a", "_both"])
    assert "_both_of_the_reference" in filled and "_a_of_the_reference" not in filled


# ---- answers --------------------------------------------------------------------------------------------------------

NUMBERS = [number for number in TITLES if (ROOT / f"minipaged/course/assignments/{TITLES[number]}.py").exists()]
PARTS = [(load(number), part) for number in NUMBERS for part in load(number).parts]
# Triton has a mode of its own, set where it is imported first.
HERE = [(whole, part) for whole, part in PARTS if not getattr(part, "needs", ())]
ANSWERS = [
    None, True, 0, -1, 1e308, math.nan, math.inf, 10**300, "", "x" * 100_000, [], {}, [[]], [None] * 3, [0] * 100_000,
    {"raised": "ValueError"}, {"raised": None}, {"raised": [], "said": {}}, {"is": "x"}, [[0, math.nan]] * 3,
    json.loads("[" * 900 + "]" * 900), {"answer": True},
]  # fmt: skip


def cases(assignment, part, most=12):
    rng = random.Random(f"{assignment.number} {part.name} hidden")
    return [case for case, _ in zip(part.cases(rng), range(min(most, part.num_cases)), strict=False)]


@pytest.mark.parametrize(("assignment", "part"), PARTS, ids=lambda one: getattr(one, "name", ""))
def test_no_answer_is_right_for_all_cases_and_none_breaks_a_judge(assignment, part):
    asked = cases(assignment, part)
    for answer in ANSWERS:
        begin = time.monotonic()
        assert any(judged(part, case, answer) for case in asked), answer
        assert time.monotonic() - begin < 10, "a judge that an answer can keep busy"
    for key in set.intersection(*(set(case) for case in asked)):
        assert any(judged(part, case, case[key]) for case in asked), f"a case holds its own answer: {key}"
    assert any(judged(part, case, case) for case in asked)


@pytest.mark.parametrize(("assignment", "part"), HERE, ids=lambda one: getattr(one, "name", ""))
def test_answers_of_other_cases_and_no_numbers_are_not_taken(assignment, part, monkeypatch):
    """Drivers run here, with the reference."""
    monkeypatch.syspath_prepend(str(ROOT / "minipaged/course/inside"))
    driver = getattr(import_module(f"drive_{TITLES[assignment.number]}"), part.driver)
    asked = cases(assignment, part)
    answers = [import_module("observe").plain(driver(case)) for case in asked]
    assert not any(judged(part, case, answer) for case, answer in zip(asked, answers, strict=True))
    moved = answers[1:] + answers[:1]
    assert any(judged(part, case, answer) for case, answer in zip(asked, moved, strict=True))
    spoilt = [without_numbers(answer) for answer in answers]
    if spoilt != answers:
        assert any(judged(part, case, answer) for case, answer in zip(asked, spoilt, strict=True))


def without_numbers(answer):
    if isinstance(answer, list):
        return [without_numbers(one) for one in answer]
    if isinstance(answer, dict):
        return {key: without_numbers(one) for key, one in answer.items()}
    return math.nan if type(answer) in (int, float) else answer


def test_a_judge_that_breaks_says_no():
    judges = [lambda case, answer, error=error: error[answer] for error in ([], {}, "", None)]
    judges += [lambda case, answer: answer // 0, lambda case, answer: 2.0**answer]
    judges += [lambda case, answer: judges[-1](case, answer)]
    for judge in judges:
        assert "no form" in judged(replace(ASSIGNMENT.parts[0], judge=judge), {}, 10**9).what


def test_a_submission_that_breaks_the_comparison_does_not_end_the_class(tmp_path, monkeypatch):
    def absurd(*args):
        raise RecursionError

    monkeypatch.setattr(grading, "likeness", absurd)
    (tmp_path / "empty").mkdir()
    [grade] = grading.grade_all({"empty": tmp_path / "empty"}, ASSIGNMENT, "s", 1, locked=False)
    assert grade.alike is None and grade.result.points == 0


def test_files_that_are_read_are_bounded():
    assert submissions.LONGEST < 1 << 20 and process.LONGEST_ANSWER < 1 << 23
