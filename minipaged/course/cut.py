"""The package with parts cut out, and parts put in again. The package itself is the only source: nothing can drift.

`starter` makes the file that a student gets; `filled` makes a student's file whole with the reference's version of what
is not theirs to write, or not written yet. Both leave all other lines where they are, so that a message about line 57
is about line 57 of the file that the student sees.
"""

import ast
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass

Function = ast.FunctionDef | ast.AsyncFunctionDef
STUB = "NotImplementedError"


_parsing = threading.Lock()


def parse(source: str) -> ast.Module:
    """`ast.parse`, by one thread at a time: where garbage is collected in the middle of it and another thread parses
    then, both lose count of how deep they are, and it fails (python/cpython issue 106905). SyntaxError as of that.
    """
    with _parsing:
        return ast.parse(source)


@dataclass(frozen=True)
class _Found:
    node: Function
    owner: ast.ClassDef | None


def functions(tree: ast.Module) -> dict[str, _Found]:
    """All functions of a module and methods of its classes, by their qualified names."""
    found = {}
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for owner in (None, *classes):
        for node in owner.body if owner else tree.body:
            if isinstance(node, Function):
                found[f"{owner.name}.{node.name}" if owner else node.name] = _Found(node, owner)
    return found


def starter(source: str, names: Collection[str], helpers: Collection[str], task: str) -> str:
    """The source with the bodies of `names` cut out, and `helpers` gone. task: what stubs say they belong to.

    KeyError if there is no function of such a name.

    >>> print(starter('def double(x):\\n    \"\"\"Twice x.\"\"\"\\n    return 2 * x', ["double"], [], "assignment 9"))
    def double(x):
        \"\"\"Twice x.\"\"\"
        raise NotImplementedError("assignment 9: double is yours to write")
    """
    lines = source.split("\n")
    found = functions(parse(source))
    changes: list[tuple[int, int, list[str]]] = []
    for name in names:
        node = found[name].node
        body = node.body[_has_docstring(node) :]
        first = node.body[0].end_lineno if _has_docstring(node) else _end_of_signature(node)
        assert first is not None
        indent = " " * node.body[0].col_offset
        end = (body[-1] if body else node.body[-1]).end_lineno or first
        stub = f'{indent}raise {STUB}("{task}: {name} is yours to write")'
        changes.append((first, end, [stub]))
    for name in helpers:
        node = found[name].node
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        end = node.end_lineno or first
        while end < len(lines) and not lines[end].strip():
            end += 1
        changes.append((first, end, []))
    for first, end, new in sorted(changes, reverse=True):
        lines[first:end] = new
    return "\n".join(lines).rstrip() + "\n" if source.endswith("\n") else "\n".join(lines)


def _has_docstring(node: Function) -> bool:
    return ast.get_docstring(node, clean=False) is not None


def _end_of_signature(node: Function) -> int:
    """Lines up to the colon; a comment between it and the body goes with the body."""
    ends = [node.lineno, *(getattr(argument, "end_lineno", None) or 0 for argument in ast.walk(node.args))]
    if node.returns is not None:
        ends.append(node.returns.end_lineno or 0)
    return max(max(ends), node.body[0].lineno - 1)


def is_stub(node: Function) -> bool:
    """Whether nothing was written yet: only ours may stand there, behind a docstring."""
    body = node.body[_has_docstring(node) :]
    if not body or all(isinstance(line, ast.Pass) for line in body):
        return True
    match body[0]:
        case ast.Raise(exc=ast.Call(func=ast.Name(id="NotImplementedError"), args=[ast.Constant(value=str() as said)])):
            return said.startswith("assignment ") and said.endswith(" is yours to write")
    return False


def unwritten(source: str, names: Collection[str]) -> list[str]:
    """Those of the names that are still stubs, or are missing. SyntaxError as of `parse`."""
    found = functions(parse(source))
    return [name for name in names if name not in found or is_stub(found[name].node)]


def filled(source: str, reference: str, names: Collection[str], helpers: Collection[str]) -> str:
    """A student's source in which `names` are the reference's, whatever stands there.

    They are put behind the last line. What they need of `helpers` comes along under other names, so that a student's
    helper of the same name stays as it is; what they don't need stays away, for it may be half of another part.
    """
    if not names:
        return source
    found = functions(parse(reference))
    helpers = _needed(names, helpers, found)
    renaming = _Renaming({name.rpartition(".")[2] for name in helpers})
    lines = [source.rstrip("\n"), "", ""]
    for name in [*helpers, *names]:
        owner = found[name].owner
        node = renaming.visit(found[name].node)
        called = node.name
        if owner is not None:  # under a name of its own: the module may have another thing of this name
            node.name = f"_{called.strip('_')}_of_{owner.name}"
        lines += [ast.unparse(node), *([f"{owner.name}.{called} = {node.name}"] if owner else []), ""]
    return "\n".join(lines)


def _needed(names: Collection[str], helpers: Collection[str], found: dict[str, _Found]) -> list[str]:
    """Those of the helpers that these functions mention, or their helpers do."""
    left, needed, new = list(helpers), set[str](), list(names)
    while new:
        nodes = [node for name in new for node in ast.walk(found[name].node)]
        mentioned = {getattr(node, "id", getattr(node, "attr", None)) for node in nodes}
        new = [name for name in left if name not in needed and name.rpartition(".")[2] in mentioned]
        needed |= set(new)
    return [name for name in left if name in needed]


class _Renaming(ast.NodeTransformer):
    """Calls of helpers, and helpers themselves, get a name that no student chooses."""

    def __init__(self, names: set[str]):
        self.names = names

    def _new(self, name: str) -> str:
        return f"{name}_of_the_reference" if name in self.names else name

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.name = self._new(node.name)
        return self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        node.attr = self._new(node.attr)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self._new(node.id)
        return node


def signatures(source: str) -> Iterator[tuple[str, str]]:
    """Each function with what callers see of it: decorators, arguments, what it returns."""
    for name, found in functions(parse(source)).items():
        node = found.node
        head = [ast.unparse(decorator) for decorator in node.decorator_list]
        yield name, f"{head} ({ast.unparse(node.args)}) -> {ast.unparse(node.returns) if node.returns else ''}"


def replaced(source: str, name: str, new: Function) -> str:
    """The source with another version of a function, at its place."""
    lines, node = source.split("\n"), functions(parse(source))[name].node
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    text = ast.unparse(ast.fix_missing_locations(new)).splitlines()
    lines[first : node.end_lineno] = [" " * node.col_offset + line if line else line for line in text]
    return "\n".join(lines)
