"""What a cell of a chapter shows besides plots: the package's source, and how an exercise stands."""

import inspect
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Page:
    """Markdown that a notebook renders; as plain text where there is no notebook."""

    def __init__(self, markdown: str):
        self.markdown = markdown

    def __repr__(self) -> str:
        return self.markdown

    def _repr_markdown_(self) -> str:
        return self.markdown


def show_source(*things: Any) -> Page:
    """The source of functions, methods or classes of the package, as it is now: a chapter never keeps a copy.

    >>> from minipaged.memory import blocks_for
    >>> print(show_source(blocks_for).markdown.splitlines()[1])
    # minipaged/memory/page_table.py
    """
    parts: list[str] = []
    shown = ""
    for thing in things:
        thing = getattr(thing, "fn", getattr(thing, "fget", thing))  # what triton.jit and property wrap
        file = Path(inspect.getfile(thing)).resolve().relative_to(ROOT).as_posix()
        heading = [] if file == shown else [f"# {file}", ""]
        parts.append("\n".join([*heading, textwrap.dedent(inspect.getsource(thing)).rstrip()]))
        shown = file
    return Page("```python\n" + "\n\n".join(parts) + "\n```")


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
    except NotImplementedError:
        print(f"{name}: not solved yet")
    except Exception as error:  # whatever a reader's first attempt does, it is told and not thrown
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = "not right yet" if isinstance(error, AssertionError) else f"stopped by {type(error).__name__}"
        print(f"{name}: {what}" + (f": {error}" if str(error) else ""))
        print(f"    in {place.name}, line {place.lineno}: {place.line}")
    else:
        print(f"{name}: passed")
