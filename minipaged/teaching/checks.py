"""What the tests of exercises are made with: a test that can't be fooled is still a few lines.

    slots = own(slots)                       what it is given stays as it is, and the package isn't called instead
    assert equal(got, [3, 4])                plain values, compared the strict way
    with counted(model.forward) as calls     how often something was called

A reader's answer may be anything, also an object whose `==` always says yes, or one that changes what it was given
and then compares its own change. So `equal` looks at types first, and `own` compares the arguments with a copy.
"""

import functools
import inspect
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from numbers import Number
from pathlib import Path
from types import CodeType, FrameType, SimpleNamespace
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
PACKAGES = tuple(str(ROOT / name) + "/" for name in ("minipaged", "kernels"))
TEACHING = str(Path(__file__).parent)


def equal(got: Any, expected: Any, tolerance: float = 0) -> bool:
    """Whether `got` is the plain value `expected`: numbers, texts, None, tensors, and lists, sets, dicts of them.

    A list may be a tuple, a number one of NumPy's or PyTorch's. True is no 1, and where an integer is expected, 1.0
    is none. Tensors agree in shape and dtype, and NaN is equal to NaN.
    tolerance: how far floats may be off, relative to the larger one of 1 and `expected`.

    >>> equal((1, 2), [1, 2]), equal(True, 1), equal(float("nan"), float("nan"))
    (True, False, True)
    """
    if type(got) is type(expected) is int and got == expected:
        return True  # most are such, and tests compare by the ten thousand
    if isinstance(expected, torch.Tensor):
        return _tensors_equal(got, expected, tolerance)
    if isinstance(got, np.generic) or (isinstance(got, torch.Tensor) and got.ndim == 0):
        got = got.item()
    if expected is None or isinstance(expected, (str, bytes, bool)):
        return type(got) is type(expected) and got == expected
    if isinstance(expected, Number):
        return _numbers_equal(got, expected, tolerance)
    if isinstance(expected, Mapping):
        same_keys = isinstance(got, Mapping) and equal(set(got), set(expected)) and len(got) == len(expected)
        return same_keys and all(equal(got[key], value, tolerance) for key, value in expected.items())
    if isinstance(expected, Set):
        plain = isinstance(got, Set) and all(type(one).__eq__ in HONEST for one in got)
        return plain and set(got) == set(expected)
    if isinstance(expected, (Sequence, deque)):
        row = isinstance(got, (list, tuple, deque, range)) and len(got) == len(expected)
        return row and all(equal(a, b, tolerance) for a, b in zip(got, expected, strict=True))
    return type(got) is type(expected) and got == expected


PLAIN = {int, float, bool, str, bytes, type(None)}
HONEST = {kind.__eq__ for kind in (int, float, bool, str, bytes, tuple, frozenset, type(None))}


def _numbers_equal(got: Any, expected: Any, tolerance: float) -> bool:
    if type(got) not in (int, float) or (type(expected) is int and type(got) is float):
        return False
    if got != got or expected != expected:
        return got != got and expected != expected
    return got == expected or abs(got - expected) <= tolerance * max(1.0, abs(expected))


def _tensors_equal(got: Any, expected: torch.Tensor, tolerance: float) -> bool:
    if not isinstance(got, torch.Tensor) or (got.shape, got.dtype) != (expected.shape, expected.dtype):
        return False
    if tolerance:
        return torch.allclose(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    return bool(((got == expected) | ((got != got) & (expected != expected))).all())


def own(
    solution: Any, allow: Collection[Any] = (), forbid: Collection[Any] = (), changes: Collection[str] = ()
) -> Any:
    """`solution`, a function or a class, as a test should call it: AssertionError where it isn't the reader's own.

    While it runs, nothing of the package may be called, and nothing that is in `forbid` (functions or classes, also of
    the notebook); but what is in `allow` may, and may call what it likes. Its arguments must be afterwards what they
    were before, but for those named in `changes`. Objects with methods may do as they like; lists, dicts, tensors and
    records are compared.
    """
    watch = _Watch(_codes(allow), _codes(forbid), frozenset(changes))
    if not inspect.isclass(solution):
        return watch.wrap(solution)
    namespace: dict[str, Any] = {"__slots__": (), "__module__": solution.__module__, "__doc__": solution.__doc__}
    for kind in solution.__mro__[:-1]:
        if kind.__module__.split(".")[0] in sys.stdlib_module_names - {"__main__"} | {"torch", "numpy"}:
            continue
        for name, thing in vars(kind).items():
            if name not in namespace and inspect.isfunction(thing):
                namespace[name] = watch.wrap(thing, method=True)
    meta: Any = type(solution)
    return meta(solution.__name__, (solution,), namespace)


class _Watch:
    """What may not be called; only the outermost of a class's own methods looks."""

    def __init__(self, allow: set[CodeType], forbid: set[CodeType], changes: frozenset[str]):
        self.allow, self.forbid, self.changes = allow, forbid, changes
        self.harmless: dict[int, CodeType] = {}  # what was looked at and may be called; to hash a code takes long
        self.inside = False

    def wrap(self, function: Callable[..., Any], method: bool = False) -> Callable[..., Any]:
        """method: its first argument is the object itself, which it may change."""

        names = _names(function)

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            named = dict([*names(args, kwargs).items()][method:])
            mutable = {name: value for name, value in named.items() if type(value) not in PLAIN}
            before = {name: _copy(value) for name, value in mutable.items() if name not in self.changes}
            result, culprit = self._run(function, args, kwargs)
            assert not culprit, f"it calls {culprit}: write it yourself"
            for name, value in before.items():
                assert _copy(named[name]) == value, f"it changes its argument {name}, which is its caller's"
            return result

        return called

    def _run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, str]:
        culprit = ""

        def look(frame: FrameType, event: str, _: Any) -> None:
            nonlocal culprit
            code = frame.f_code
            if event == "call" and not culprit and self._is_foreign(frame):
                culprit = code.co_qualname

        before = sys.getprofile()
        self.inside = True
        sys.setprofile(look)
        try:
            return function(*args, **kwargs), culprit
        except Exception:
            if culprit:  # what it says is about the package, and of no help
                return None, culprit
            raise
        finally:
            sys.setprofile(before)
            self.inside = False

    def _is_foreign(self, frame: FrameType) -> bool:
        """Whether the reader's code, and nothing that may be called, called what may not be."""
        code, caller = frame.f_code, frame.f_back
        if id(code) in self.harmless:
            return False
        package = code.co_filename.startswith(PACKAGES) and not code.co_filename.startswith(TEACHING)
        if code in self.allow or not (package or code in self.forbid):
            self.harmless[id(code)] = code
            return False
        while caller is not None and caller.f_code.co_filename != __file__:
            if caller.f_code in self.allow:
                return False
            caller = caller.f_back
        return True


def _codes(things: Collection[Any]) -> set[CodeType]:
    """The code of functions, and of all methods of classes."""
    found = set()
    for thing in things:
        thing = inspect.unwrap(getattr(thing, "fn", getattr(thing, "fget", thing)))
        kinds = thing.__mro__[:-1] if inspect.isclass(thing) else ()
        parts = [thing, *(part for kind in kinds for part in vars(kind).values())]
        parts = [getattr(part, "__func__", getattr(part, "fget", part)) for part in parts]
        found |= {part.__code__ for part in parts if hasattr(part, "__code__")}
    return found


def _names(function: Callable[..., Any]) -> Callable[[Any, Any], dict[str, Any]]:
    """Tells arguments by the names that the reader gave them."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return _numbered
    kinds = {one.kind for one in signature.parameters.values()}
    plain = not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    names = list(signature.parameters)

    def named(args: Any, kwargs: Any) -> dict[str, Any]:
        if plain and len(args) <= len(names):
            return dict(zip(names, args, strict=False)) | kwargs
        try:
            return dict(signature.bind(*args, **kwargs).arguments)
        except TypeError:
            return _numbered(args, kwargs)

    return named


def _numbered(args: Any, kwargs: Any) -> dict[str, Any]:
    return {str(i): value for i, value in enumerate(args)} | kwargs


def _copy(thing: Any, depth: int = 8) -> Any:
    """Something that is equal only as long as `thing` is as it is now."""
    if type(thing) in PLAIN:
        return type(thing), thing
    if depth == 0:
        return None
    if isinstance(thing, torch.Tensor):
        return "tensor", tuple(thing.shape), thing.dtype, _bytes(thing)
    if isinstance(thing, np.ndarray):
        return "array", thing.shape, thing.dtype, thing.tobytes()
    if isinstance(thing, (list, tuple, deque)):
        return type(thing), [_copy(one, depth - 1) for one in thing]
    if isinstance(thing, (set, frozenset)):
        return type(thing), {id(one) if type(one).__eq__ not in HONEST else one for one in thing}
    if isinstance(thing, dict):
        return type(thing), [(_copy(key, depth - 1), _copy(value, depth - 1)) for key, value in thing.items()]
    if isinstance(thing, SimpleNamespace) or hasattr(type(thing), "__dataclass_fields__"):
        parts = getattr(thing, "__dict__", {})
        return type(thing), [(name, _copy(value, depth - 1)) for name, value in parts.items()]
    return (type(thing), thing) if type(thing).__eq__ in HONEST else id(thing)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@contextmanager
def counted(*functions: Callable[..., Any]) -> Iterator[list[str]]:
    """The names of those of `functions` that are called inside, a name for each call."""
    codes, calls, before = _codes(functions), [], sys.getprofile()

    def look(frame: FrameType, event: Any, argument: Any) -> None:
        if event == "call" and frame.f_code in codes:
            calls.append(frame.f_code.co_name)
        if before:
            before(frame, event, argument)

    sys.setprofile(look)
    try:
        yield calls
    finally:
        sys.setprofile(before)
