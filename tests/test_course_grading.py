"""Grading a class: the same points on every day and in every company, in every format, and nobody pays for another."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from xml.etree import ElementTree

import pytest
import yaml
from course_solutions import starters

from minipaged.course import commands, formats, process
from minipaged.course.__main__ import main
from minipaged.course.assignment import load
from minipaged.course.autograder import classroom, gradescope
from minipaged.course.checking import check
from minipaged.course.grading import fingerprint, named
from minipaged.course.likeness import likeness
from minipaged.course.submission import ROOT, Submission, read, reference

ASSIGNMENT = load(2)
FILE = ASSIGNMENT.files[0]
NEEDS_LOCKS = pytest.mark.skipif(bool(process.missing()), reason="; ".join(process.missing()))


def hand_in(folder, sources):
    for file, source in sources.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(source)
    return folder


@pytest.fixture
def handed_in(tmp_path):
    """As they come: where the starter puts files, without folders, half of it, nothing, rubbish."""
    everything = {file: reference(file) for file in ASSIGNMENT.files}
    hand_in(tmp_path / "in/whole/src", everything)
    hand_in(tmp_path / "in/flat", {file.rpartition("/")[2]: source for file, source in everything.items()})
    hand_in(tmp_path / "in/half", starters(ASSIGNMENT) | {FILE: reference(FILE)})
    hand_in(tmp_path / "in/stubs", starters(ASSIGNMENT))
    hand_in(tmp_path / "in/=rubbish", dict.fromkeys(ASSIGNMENT.files, "\0 (("))
    (tmp_path / "in/nothing").mkdir()
    return tmp_path / "in"


def graded(folder, out, *flags):
    status = main(["grade", str(folder), "--each", "--assignment", "2", "--seed", "s", "--out", str(out), *flags])
    assert status == 0
    return {row["name"]: row for row in csv.DictReader(io.StringIO((out / "grades.csv").read_text()))}


@NEEDS_LOCKS
def test_points_are_the_same_on_another_day_and_in_another_company(handed_in, tmp_path, capsys):
    rows = graded(handed_in, tmp_path / "out")
    part = sum(part.points for part in ASSIGNMENT.parts if part.file == FILE)
    points = {name: int(row["points"]) for name, row in rows.items()}
    assert points == {"whole": 100, "flat": 100, "half": part, "stubs": 0, "'=rubbish": 0, "nothing": 0}
    assert rows["whole"]["alike"] == "100" and not rows["stubs"]["alike"]
    printed = capsys.readouterr().out
    assert "whole" in printed and "100" in printed
    assert graded(handed_in, tmp_path / "again", "--jobs", "1") == rows
    one = json.loads((tmp_path / "out/grades.json").read_text())
    assert one == json.loads((tmp_path / "again/grades.json").read_text()) and one["grader"] == fingerprint()


@NEEDS_LOCKS
def test_every_format_says_the_same(handed_in, tmp_path):
    rows = graded(handed_in, tmp_path / "out")
    assert len(rows) == 6
    for folder in (tmp_path / "out").iterdir():
        if not folder.is_dir():
            continue
        row = rows.get(folder.name) or rows[f"'{folder.name}"]
        gradescope = json.loads((folder / "results.json").read_text())
        assert gradescope["score"] == int(row["points"]) == sum(test["score"] for test in gradescope["tests"])
        assert {test["status"] for test in gradescope["tests"]} <= {"passed", "failed"}
        suite = ElementTree.parse(folder / "junit.xml").getroot()
        passed = [case.get("name") for case in suite if case.find("failure") is None]
        assert passed == [part.name for part in ASSIGNMENT.parts if int(row[part.name])]
        assert int(suite.get("failures")) == len(ASSIGNMENT.parts) - len(passed)
        lines = (folder / "points.txt").read_text().splitlines()
        assert lines == [f"{part.name}: {row[part.name]} of {part.points} points" for part in ASSIGNMENT.parts]


def test_names_stay_apart(tmp_path):
    folders = [tmp_path / "a/work", tmp_path / "b/work", tmp_path / "b/work/"]
    assert list(named(folders)) == ["a-work", "b-work"]
    assert list(named([tmp_path / "a"])) == ["a"]


def test_strange_text_does_no_harm_to_a_file():
    text = "a\0b\x1b[2J\ud800 <script>&]]>"
    assert ElementTree.fromstring(f"<a>{ElementTree.Element('b').tag}</a>") is not None
    element = ElementTree.Element("a")
    element.text = formats._xml(text)
    assert ElementTree.fromstring(ElementTree.tostring(element)).text == "a?b?[2J? <script>&]]>"


@NEEDS_LOCKS
def test_broken_off_in_the_middle_what_is_done_is_kept(handed_in, tmp_path, monkeypatch):
    all_of_them = commands.grade_all

    def interrupted(*args, **kwargs):
        for number, one in enumerate(all_of_them(*args, **kwargs)):
            if number == 2:
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(commands, "grade_all", interrupted)
    flags = ["--each", "--assignment", "2", "--seed", "s", "--out", str(tmp_path / "out")]
    assert main(["grade", str(handed_in), *flags]) == 130
    assert len((tmp_path / "out/grades.csv").read_text().splitlines()) == 3


def test_where_nothing_can_be_locked_it_says_so_and_asks(handed_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "missing", lambda: ["there is no lock"])
    arguments = ["grade", str(handed_in / "flat"), "--assignment", "2", "--seed", "s", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "there is no lock" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*arguments, "--unlocked"]) == 0


@NEEDS_LOCKS
def test_gradescopes_zip_grades(tmp_path):
    """As Gradescope does it, in other folders, and with this Python."""
    archive = gradescope(ASSIGNMENT, "secret")
    assert archive == gradescope(ASSIGNMENT, "secret")
    at = tmp_path / "autograder"
    (at / "results").mkdir(parents=True)
    hand_in(at / "submission", {file.rpartition("/")[2]: reference(file) for file in ASSIGNMENT.files})
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        modes = {entry.filename: entry.external_attr >> 16 for entry in packed.infolist()}
        assert modes["setup.sh"] & modes["run_autograder"] & 0o111 and not modes["seed"] & 0o077
        packed.extractall(at / "source")
    for name in ("setup.sh", "run_autograder"):
        subprocess.run(["bash", "-n", at / "source" / name], check=True)
    assert "torch" not in (at / "source/setup.sh").read_text(), "memory needs no tensors"
    script = (at / "source/run_autograder").read_text()
    script = script.replace("/autograder/venv/bin/python", sys.executable).replace("/autograder", str(at))
    environment = os.environ | {"PYTHONPATH": str(at / "source")}
    script = script.replace("/tmp/grades", str(tmp_path / "grades"))
    subprocess.run(["bash", "-c", script], env=environment, check=True, capture_output=True)
    results = json.loads((at / "results/results.json").read_text())
    assert results["score"] == 100 and len(results["tests"]) == len(ASSIGNMENT.parts)


def test_classrooms_workflow_has_a_step_for_each_part():
    workflow = yaml.safe_load(classroom(ASSIGNMENT))
    steps = workflow["jobs"]["grade"]["steps"]
    graders = [step for step in steps if "command-grader" in step.get("uses", "")]
    assert [step["with"]["max-score"] for step in graders] == [part.points for part in ASSIGNMENT.parts]
    reporter = steps[-1]
    assert reporter["with"]["runners"] == ",".join(step["id"] for step in graders)
    assert set(reporter["env"]) == {f"{step['id'].upper()}_RESULTS" for step in graders}
    assert "secrets.COURSE_SEED" in str(steps) and sum("COURSE_SEED" in str(step.get("env")) for step in steps) == 1


def test_likeness_sees_through_other_names():
    same = Submission("same", {file: reference(file) for file in ASSIGNMENT.files})
    assert likeness(same, ASSIGNMENT) == 1
    renamed = Submission("renamed", {file: reference(file).replace("block", "page") for file in ASSIGNMENT.files})
    assert likeness(renamed, ASSIGNMENT) is None or likeness(renamed, ASSIGNMENT) > 0.5
    assert likeness(Submission("stubs", starters(ASSIGNMENT)), ASSIGNMENT) is None


def test_another_seed_draws_other_cases():
    import itertools
    import random

    for part in ASSIGNMENT.parts:
        one, other = (list(itertools.islice(part.cases(random.Random(seed)), 20)) for seed in (1, 2))
        assert one != other, part.name
        json.dumps(one)
    whole = read_whole()
    assert check(whole, ASSIGNMENT, "a").points == check(whole, ASSIGNMENT, "b").points == 100


def read_whole():
    return Submission("whole", {file: reference(file) for file in ASSIGNMENT.files})


def test_a_folder_may_have_files_anywhere_but_not_twice(tmp_path):
    hand_in(tmp_path / "once/deep/down", {FILE.rpartition("/")[2]: "x = 1"})
    assert read(tmp_path / "once", ASSIGNMENT).sources[FILE] == "x = 1"
    hand_in(tmp_path / "twice/a", {FILE.rpartition("/")[2]: "x = 1"})
    shutil.copytree(tmp_path / "twice/a", tmp_path / "twice/b")
    assert "there are several" in read(tmp_path / "twice", ASSIGNMENT).faults[FILE]
    assert (ROOT / FILE).is_file()
