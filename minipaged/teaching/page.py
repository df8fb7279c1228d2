"""What a cell of a chapter shows besides plots: the package's source, and how an exercise stands."""

import inspect
import sysconfig
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).parents[2]
# Whose lines tell a reader nothing: Python itself, and the package, whose messages say what is wrong.
LIBRARIES = sysconfig.get_paths()["stdlib"], str(ROOT / "minipaged"), str(ROOT / "kernels")


class Source(str):
    """Python code; in colour, on paper of its own, where a notebook shows it."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        paper = "background: #f7f7f7; color: #222222; padding: 0.5em 1em; overflow-x: auto;"
        letters = "background: none; color: inherit; margin: 0; white-space: pre-wrap; font: 90% monospace"
        look = HtmlFormatter(style="default", noclasses=True, cssstyles=paper, prestyles=letters)
        return highlight(self, PythonLexer(), look)


def show_source(*things: Any) -> Source:
    """The source of functions, methods or classes of the package, as it is now: a chapter never keeps a copy.

    >>> from minipaged.memory import blocks_for
    >>> show_source(blocks_for).splitlines()[0]
    '# minipaged/memory/page_table.py'
    """
    parts: list[str] = []
    shown = ""
    for thing in things:
        thing = inspect.unwrap(getattr(thing, "fn", getattr(thing, "fget", thing)))  # triton.jit, property, cache
        file = Path(inspect.getfile(thing)).resolve().relative_to(ROOT).as_posix()
        heading = [] if file == shown else [f"# {file}", ""]
        parts.append("\n".join([*heading, textwrap.dedent(inspect.getsource(thing)).rstrip()]))
        shown = file
    return Source("\n\n\n".join(parts))


def attempt(test: Callable[..., None], *solution: Any) -> None:
    """Run the test of an exercise on what the reader wrote, and say in a line or two how it went.

    >>> def double(x): raise NotImplementedError
    >>> def test_double(double): assert double(2) == 4
    >>> attempt(test_double, double)
    double: not solved yet
    """
    name = test.__name__.removeprefix("test_")
    try:
        test(*solution)
    except Exception as error:  # whatever a reader's first attempt does, it is told and not thrown
        cause, place = _origin(error)
        if _is_stub(cause, place):
            print(f"{name}: not solved yet")
            return
        what = "not right yet" if isinstance(cause, AssertionError) else f"stopped by {type(cause).__name__}"
        print(f"{name}: {what}" + (f": {cause}" if str(cause) else ""))
        print(f"    in {place.name}, line {place.lineno}: {place.line}")
    else:
        print(f"{name}: passed")


def _origin(error: BaseException) -> tuple[BaseException, traceback.FrameSummary]:
    """The error that began it, and where: the last line of a notebook or script, not one deep in a library.

    Triton's interpreter wraps what goes wrong in a kernel into an error of its own, whose cause has the reader's line.
    """
    found = error, traceback.extract_tb(error.__traceback__)[-1]
    cause: BaseException | None = error
    while cause is not None:
        own = [frame for frame in traceback.extract_tb(cause.__traceback__) if not _is_library(frame.filename)]
        found = (cause, own[-1]) if own else found
        cause = cause.__cause__
    return found


def _is_library(file: str) -> bool:
    return "site-packages" in file or file.startswith((*LIBRARIES, "<frozen"))


def _is_stub(error: BaseException, place: traceback.FrameSummary) -> bool:
    """PyTorch, too, has NotImplementedErrors: for an operation that a dtype has not."""
    return isinstance(error, NotImplementedError) and (place.line or "").endswith("raise NotImplementedError")
