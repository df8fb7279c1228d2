"""Grades as files: a table for a spreadsheet, JSON, Gradescope's results.json, JUnit XML for anything else."""

import csv
import io
import json
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from minipaged.course.assignment import Assignment
from minipaged.course.checking import UNUSABLE, UNWRITTEN, WORKS, PartResult
from minipaged.course.grading import Grade, fingerprint
from minipaged.course.report import in_words


def as_csv(grades: Sequence[Grade], assignment: Assignment) -> str:
    """A row for each submission, by name: points of each part, the sum, how alike it is to the reference in percent."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["name", "points", "of", *(part.name for part in assignment.parts), "alike"])
    for grade in _sorted(grades):
        points = [part.points for part in grade.result.parts]
        name = grade.result.name
        safe = f"'{name}" if name[:1] in "=+-@\t\r" else name  # a spreadsheet takes it for a formula
        writer.writerow([safe, grade.result.points, assignment.points, *points, _percent(grade.alike)])
    return out.getvalue()


def as_json(grades: Sequence[Grade], assignment: Assignment) -> str:
    """Everything, and by which version of the grader. The seed is not in it."""
    submissions = [
        {
            "name": grade.result.name, "folder": str(grade.folder), "points": grade.result.points,
            "alike": grade.alike, "parts": [_part(part) for part in grade.result.parts],
        }
        for grade in _sorted(grades)
    ]  # fmt: skip
    whole = {
        "assignment": assignment.number, "title": assignment.title, "of": assignment.points,
        "grader": fingerprint(), "submissions": submissions,
    }  # fmt: skip
    return json.dumps(whole, indent=2) + "\n"


def _part(part: PartResult) -> dict[str, Any]:
    return {
        "name": part.part.name, "points": part.points, "of": part.part.points, "state": part.state,
        "said": in_words(part), "cases": part.cases,
    }  # fmt: skip


def for_gradescope(grade: Grade, seconds: float) -> str:
    """results.json. Students see their parts and what fails; the case that shows it is a hidden one, and stays so."""
    tests = [
        {
            "name": part.part.name, "number": str(number), "score": part.points, "max_score": part.part.points,
            "status": "passed" if part.state == WORKS else "failed", "output_format": "text",
            "output": hint(part), "visibility": "visible",
        }
        for number, part in enumerate(grade.result.parts, 1)
    ]  # fmt: skip
    whole = {
        "score": grade.result.points, "execution_time": round(seconds), "visibility": "visible",
        "stdout_visibility": "hidden", "tests": tests,
        "output": f"Graded by version {fingerprint()} with hidden cases. `check` tries others of the same kind.",
    }  # fmt: skip
    return json.dumps(whole, indent=2) + "\n"


def as_points(grade: Grade) -> str:
    """A line for each part, for a shell to look into."""
    return "".join(f"{part.part.name}: {part.points} of {part.part.points} points\n" for part in grade.result.parts)


def hint(part: PartResult) -> str:
    """What a student may know of a hidden case."""
    if part.failure is None:
        return f"{part.state}: {part.cases} cases"
    return f"{part.state}: {in_words(part) if part.state in (UNUSABLE, UNWRITTEN) else part.failure.what}"


def as_junit(grade: Grade, assignment: Assignment) -> str:
    """A test case for each part; one that isn't written yet is a failure, too."""
    failures = sum(part.state != WORKS for part in grade.result.parts)
    count = str(len(grade.result.parts))
    suite = ElementTree.Element(
        "testsuite", name=f"assignment {assignment.number}", tests=count, failures=str(failures), errors="0"
    )
    for part in grade.result.parts:
        case = ElementTree.SubElement(suite, "testcase", classname=_xml(grade.result.name), name=part.part.name)
        properties = ElementTree.SubElement(case, "properties")
        ElementTree.SubElement(properties, "property", name="points", value=str(part.points))
        ElementTree.SubElement(properties, "property", name="of", value=str(part.part.points))
        if part.state != WORKS:
            failure = ElementTree.SubElement(case, "failure", message=_xml(hint(part)).splitlines()[0])
            failure.text = _xml(in_words(part))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def _xml(text: str) -> str:
    """XML knows no control characters, and a student's text may have any."""
    return re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd]", "?", text)


def _percent(share: float | None) -> str:
    return "" if share is None else str(round(100 * share))


def _sorted(grades: Sequence[Grade]) -> list[Grade]:
    return sorted(grades, key=lambda grade: grade.result.name)
