"""Runs in a chapter's kernel, behind its last cell: the tests of its exercises meet right solutions and wrong ones.

`grade(path, names, notebook)` executes tests/solutions/chNN.py in a copy of the notebook's names. That file has

    RIGHT = {"slots": [three or more, in different styles]}
    WRONG = {"slots": [five or more]}
    CHANGES = {"write_kv": ["cache"]}        arguments that a solution is there to change; others must stay

To the wrong ones this file adds two for each exercise: an answer that equals everything, and (for functions) a right
answer that spoils its arguments behind its caller's back.
"""

import functools
import inspect
from collections import deque

import torch


class Anything:
    """Says yes to whatever it is asked, and is of any length."""

    def __init__(self, *args, **kwargs):
        pass

    def _itself(self, *args, **kwargs):
        return self

    def _yes(self, *args):
        return True

    __call__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __floordiv__ = _itself
    __mod__ = __neg__ = __abs__ = __round__ = __enter__ = __getitem__ = _itself
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __bool__ = __exit__ = __setitem__ = _yes
    __hash__ = object.__hash__

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __len__(self):
        return 1

    def __int__(self):
        return 1

    __index__ = __int__

    def __float__(self):
        return 1.0

    def __iter__(self):
        yield self


def spoil(thing):
    """Change it in place. -> what puts it right again, or None if there was nothing to change."""
    if isinstance(thing, torch.Tensor) and thing.numel():
        kept = thing.detach().clone()
        with torch.no_grad():
            thing.copy_(~thing if thing.dtype == torch.bool else thing + 1)
        return None if kept.isnan().all() else lambda: thing.detach().copy_(kept)
    if isinstance(thing, (list, deque)) and thing:
        thing.append(thing[0])
        return thing.pop
    if isinstance(thing, dict) and thing:
        kept = thing.copy()
        thing.popitem()
        return lambda: thing.update(kept)
    if isinstance(thing, set) and thing:
        one = thing.pop()
        return lambda: thing.add(one)
    undo = [done for done in map(spoil, thing) if done] if isinstance(thing, tuple) else []
    return (lambda: [done() for done in undo]) if undo else None


def spoiling(solution, kept):
    """`solution`, which changes its arguments when it has its answer; kept: those that it may change anyway.

    And what puts them right again, by argument: they may be the notebook's own.
    """
    happened = []

    @functools.wraps(solution)
    def spoils(*args, **kwargs):
        answer = solution(*args, **kwargs)
        named = inspect.signature(solution).bind(*args, **kwargs).arguments
        for name, value in named.items():
            if name not in kept and (undo := spoil(value)):
                happened.append((name, undo))
        return answer

    return spoils, happened


def outcome(test, solution):
    try:
        test(solution)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "passed"


def grade(path, names, notebook):
    """-> for each exercise {"right": [outcome, ...], "wrong": [...], "made": {kind: outcome}}."""
    mine = dict(notebook)
    with open(path) as file:
        exec(compile(file.read(), path, "exec"), mine)
    found = {}
    for name in names:
        test = notebook["test_" + name]
        right = mine["RIGHT"][name]
        made = {"equals everything": Anything if inspect.isclass(right[0]) else lambda *args, **kwargs: Anything()}
        outcomes = {kind: outcome(test, solution) for kind, solution in made.items()}
        if inspect.isfunction(right[0]):
            spoils, happened = spoiling(right[0], mine.get("CHANGES", {}).get(name, ()))
            said = outcome(test, spoils)
            for _, undo in reversed(happened):
                undo()
            if happened:
                outcomes[f"spoils {happened[0][0]}"] = said
        found[name] = {
            "right": [outcome(test, solution) for solution in right],
            "wrong": [outcome(test, solution) for solution in mine["WRONG"][name]],
            "made": outcomes,
        }
    return found
