"""Solutions of the course's assignments, right and wrong, as submissions. They stand in tests/solutions/course_N.py:

RIGHT = {"a style": {file: definitions}}      written into the starter: functions, and classes with the methods meant
WRONG = [Wrong("what is wrong", "part", file, old, new, "where it happened")]     an edit of the reference; or
        [Wrong("what is wrong", "part", file, text=definitions)]                  definitions, written into it
"""

import ast
from dataclasses import dataclass

from minipaged.course import cut
from minipaged.course.assignment import Assignment
from minipaged.course.submission import Submission, reference


@dataclass(frozen=True)
class Wrong:
    """part: the name of the one that must fail; all others must work, but those of `also`, which may do either.

    source: of a bug that a real engine had.
    """

    what: str
    part: str
    file: str
    old: str = ""
    new: str = ""
    source: str = ""
    text: str = ""
    also: tuple[str, ...] = ()


def write_in(source: str, text: str) -> str:
    """Definitions take the place of those of the same name, in classes too; others are put behind, imports before."""
    tree, new = ast.parse(source), ast.parse(text)
    _merge(tree.body, new.body)
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    begin = [node for node in tree.body[:1] if isinstance(node, ast.Expr)]
    others = [node for node in tree.body if node not in imports and node not in begin]
    return ast.unparse(ast.Module([*begin, *imports, *others], []))


def _merge(body: list, new: list) -> None:
    for node in new:
        name = getattr(node, "name", None)
        at = next((i for i, old in enumerate(body) if name and getattr(old, "name", None) == name), None)
        if at is None:
            body.append(node)
        elif isinstance(node, ast.ClassDef):
            _merge(body[at].body, node.body)
        else:
            body[at] = node


def starters(assignment: Assignment) -> dict[str, str]:
    return {
        file: cut.starter(
            reference(file), assignment.cut(file), assignment.helpers(file), f"assignment {assignment.number}"
        )
        for file in assignment.files
    }


def right(assignment: Assignment, name: str, texts: dict[str, str]) -> Submission:
    """Everything of it is written into the starter: nothing of the reference is left."""
    sources = starters(assignment)
    return Submission(name, {file: write_in(source, texts.get(file, "")) for file, source in sources.items()})


def wrong(assignment: Assignment, one: Wrong) -> Submission:
    sources = {file: reference(file) for file in assignment.files}
    if one.text:
        sources[one.file] = write_in(sources[one.file], one.text)
    else:
        assert sources[one.file].count(one.old) == 1, f"{one.what}: the reference has no such line, or several"
        sources[one.file] = sources[one.file].replace(one.old, one.new)
    return Submission(one.what, sources)
