"""How much of what a student wrote is the reference, word for word: the package is public, and grading can't know who
wrote what. Names of variables, comments and types don't count; the order of lines does.
"""

import ast
import copy
from difflib import SequenceMatcher

from minipaged.course import cut
from minipaged.course.assignment import Assignment
from minipaged.course.submission import Submission, reference

FEWEST = 5  # lines: shorter functions are alike by themselves
MOST = 1000  # lines of a function that are compared


def likeness(submission: Submission, assignment: Assignment) -> float | None:
    """The share of lines, 0 to 1, of written functions that stand in the reference's, in its order.

    None if nothing was written that is long enough to say.
    """
    alike = total = 0
    unwritten = submission.unwritten(assignment)
    for file, source in submission.usable().items():
        theirs, ours = cut.functions(cut.parse(source)), cut.functions(cut.parse(reference(file)))
        for name in assignment.cut(file):
            if f"{file}:{name}" in unwritten:
                continue
            lines = _lines(theirs[name].node)
            if len(lines) >= FEWEST:
                matcher = SequenceMatcher(None, lines, _lines(ours[name].node), autojunk=False)
                alike += sum(match.size for match in matcher.get_matching_blocks())
                total += len(lines)
    return alike / total if total else None


def _lines(function: cut.Function) -> list[str]:
    """Its body, with names in the order in which they come up."""
    function = copy.deepcopy(function)
    _Anonymous().visit(function)
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return [line.strip() for statement in body for line in ast.unparse(statement).splitlines()][:MOST]


class _Anonymous(ast.NodeTransformer):
    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self.names.setdefault(node.id, f"v{len(self.names)}")
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.arg, node.annotation = self.names.setdefault(node.arg, f"v{len(self.names)}"), None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        if node.value is None:
            return ast.Pass()
        return ast.copy_location(ast.Assign([node.target], node.value, lineno=node.lineno), node)
