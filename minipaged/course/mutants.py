"""One-line faults of the reference, made by machine: do the tests of the course find them?

Each mutant changes one spot of one function that a student writes: a comparison, a sign, a number, a condition, a
statement that is gone. One that no test finds either shows what the tests don't look at, or changes nothing that
anybody could see; which of the latter there are, an assignment says with a reason (`Assignment.harmless`).
"""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

from minipaged.course import cut
from minipaged.course.assignment import Assignment
from minipaged.course.checking import WORKS, check
from minipaged.course.submission import Submission, reference

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip
GOING = (ast.Expr, ast.AugAssign, ast.Assign, ast.Continue, ast.Break, ast.Delete)
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "popleft": "pop", "append": "appendleft"}


@dataclass(frozen=True)
class Mutant:
    """A fault. name: of the function; text: what it is, "function: line -> line"; source: the file with it."""

    file: str
    name: str
    text: str
    source: str


def mutants(assignment: Assignment) -> list[Mutant]:
    """All of them; of two with the same text only the first."""
    found: dict[str, Mutant] = {}
    for file in assignment.files:
        source = reference(file)
        for name in [*assignment.cut(file), *assignment.helpers(file)]:
            node = cut.functions(cut.parse(source))[name].node
            for changed, before, after in _changes(node):
                text = f"{name}: {before} -> {after}"
                found.setdefault(text, Mutant(file, name, text, cut.replaced(source, name, changed)))
    return list(found.values())


def is_found(mutant: Mutant, assignment: Assignment) -> bool:
    """Whether a submission with this fault loses a point: in its own part, as most do, or in another one."""
    own = [part for part in assignment.parts if part.file == mutant.file and mutant.name in part.names + part.helpers]
    others = [part for part in assignment.parts if part not in own]
    return any(_loses(mutant, replace(assignment, parts=tuple(parts))) for parts in (own, others) if parts)


def _loses(mutant: Mutant, assignment: Assignment) -> bool:
    sources = {file: reference(file) for file in assignment.files} | {mutant.file: mutant.source}
    result = check(Submission("mutant", sources), assignment)
    return any(part.state != WORKS for part in result.parts)


def _changes(function: cut.Function) -> Iterator[tuple[cut.Function, str, str]]:
    """Copies of a function with one spot changed, and the line before and after."""
    others: list[ast.AST] = [function.args, *([function.returns] if function.returns else [])]  # types and defaults
    others += [node for node in ast.walk(function) if isinstance(node, ast.JoinedStr)]  # what errors say
    skipped = {id(node) for part in others for node in ast.walk(part)}
    for place, spot in enumerate(ast.walk(function)):
        if id(spot) in skipped:
            continue
        for change in _ways(spot):
            changed = copy.deepcopy(function)
            change(list(ast.walk(changed))[place])
            before, after = ast.unparse(function).splitlines(), ast.unparse(changed).splitlines()
            at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), None)
            if at is not None:
                yield changed, before[at].strip(), after[at].strip()


def _ways(spot: ast.AST) -> Iterator:
    """What can be changed at a node: functions that do it to the same node of a copy."""
    if isinstance(spot, ast.Compare) and type(spot.ops[0]) in COMPARISONS:
        yield lambda node: node.ops.__setitem__(0, COMPARISONS[type(node.ops[0])]())
    elif isinstance(spot, (ast.BinOp, ast.AugAssign)) and type(spot.op) in OPERATORS:
        yield lambda node: setattr(node, "op", OPERATORS[type(node.op)]())
    elif isinstance(spot, ast.BoolOp):
        yield lambda node: setattr(node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And())
        yield lambda node: node.values.pop()
    elif isinstance(spot, ast.Constant) and type(spot.value) in (int, bool):
        yield lambda node: setattr(node, "value", not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(spot, ast.Name) and spot.id in NAMES:
        yield lambda node: setattr(node, "id", NAMES[node.id])
    elif isinstance(spot, ast.UnaryOp) and isinstance(spot.op, ast.Not):
        yield lambda node: setattr(node, "operand", ast.UnaryOp(ast.Not(), node.operand))
    elif isinstance(spot, (ast.If, ast.While, ast.IfExp)):
        yield lambda node: setattr(node, "test", ast.UnaryOp(ast.Not(), node.test))
    for field in ("body", "orelse"):
        lines = getattr(spot, field, None)
        for at, line in enumerate(lines if isinstance(lines, list) else ()):
            if isinstance(line, GOING) and not _says(line):
                yield lambda node, field=field, at=at: getattr(node, field).__setitem__(at, ast.Pass())


def _says(line: ast.stmt) -> bool:
    """A docstring; or a name that is set, without which nothing runs."""
    if isinstance(line, ast.Assign):
        return all(isinstance(target, (ast.Name, ast.Tuple)) for target in line.targets)
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
