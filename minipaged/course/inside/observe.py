"""What drivers are made with: answers of a student's code as plain data."""

import contextlib
import dataclasses
import doctest
import importlib
import io

MOST_BITS, DEEPEST = 10_000, 40


class NotPlain(TypeError):
    """An answer that is of no plain type."""


def plain(value, depth=0):
    """A copy of what JSON can say.

    Lists and tuples become lists, sets sorted lists, dicts lists of pairs unless all keys are text. What is of a class
    with fields (a dataclass, a NamedTuple) becomes {"is": name of the class, field: value ...}. A subclass of int may
    say yes to everything, so types are compared, not asked. NotPlain if there is something else in it.
    """
    kind = type(value)
    if value is None or kind in (bool, str, float) or (kind is int and value.bit_length() < MOST_BITS):
        return value
    if depth > DEEPEST:
        raise NotPlain("it is nested too deeply")
    if kind in (list, tuple):
        return [plain(one, depth + 1) for one in value]
    if kind in (set, frozenset):
        return sorted(plain(one, depth + 1) for one in value)
    if kind is dict and all(type(key) is str for key in value):
        return {key: plain(one, depth + 1) for key, one in value.items()}
    if kind is dict:
        return [[plain(key, depth + 1), plain(one, depth + 1)] for key, one in value.items()]
    if fields := _fields(kind):
        return {"is": kind.__name__} | {name: plain(getattr(value, name), depth + 1) for name in fields}
    raise NotPlain(f"a {kind.__module__}.{kind.__qualname__} where numbers, lists or text should be")


def _fields(kind):
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)]
    return getattr(kind, "_fields", ()) if issubclass(kind, tuple) else ()


def outcome(function, *args, **kwargs):
    """What it answers, as plain data; {"raised": the error's class, "said": its text} if it raises a ValueError.

    All errors that a contract of this package promises are ValueErrors; the others are bugs, and go on.
    """
    try:
        return plain(function(*args, **kwargs))
    except NotPlain:
        raise
    except ValueError as error:
        return {"raised": type(error).__name__, "said": str(error)[:500]}


def doctests(case):
    """The examples in a module's docstrings: how many there are, and what is wrong with those that fail.

    The tree's path is left out of what is said.
    """
    module = importlib.import_module(case["module"])
    runner, said, count = doctest.DocTestRunner(verbose=False), io.StringIO(), 0
    for test in doctest.DocTestFinder().find(module):
        with contextlib.redirect_stdout(said):
            runner.run(test, out=said.write)
        count += bool(test.examples)
    with contextlib.redirect_stdout(io.StringIO()):
        failed = runner.summarize(verbose=False).failed
    return {"count": count, "failed": failed, "said": said.getvalue().replace(case["tree"], "")[:4000]}
