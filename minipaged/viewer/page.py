"""Traces -> one HTML file that opens in any browser and needs nobody: no network, no server, no library.

What it is made of stands in page/: a body (replay.html), styles and scripts, which are put into it as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minipaged.viewer.state import merge_patch
from minipaged.viewer.thinning import thinned
from minipaged.viewer.trace import TraceError, TraceStep, read_trace

PARTS = Path(__file__).with_name("page")
MOST_STEPS = 2000  # that a page keeps: of longer runs it keeps every second one, or third, ...
Line = dict[str, Any]


def write_page(traces: list[str | Path], path: Path) -> None:
    """The page that replays one trace, or two beside each other. TraceError if a file is no trace, or none is written.

    Nothing is written before all traces were read.
    """
    text = page_of([run_of(trace) for trace in traces])
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TraceError(f"cannot write the page {path}: {error.strerror}") from None


def run_of(path: str | Path) -> Line:
    """What the page knows of a trace: its name, its header, and its lines; of `every` steps it has the last one."""
    header, steps = read_trace(path)
    kept = list(steps)
    if not kept:
        raise TraceError(f"{path} has no steps: there is nothing to replay")
    every = -(-len(kept) // MOST_STEPS)
    title = header.get("title") or Path(path).stem
    return {"title": title, "header": header, "every": every, "lines": list(_lines(thinned(kept, every)))}


def _lines(steps: Iterable[TraceStep]) -> Iterator[Line]:
    """Delta-coded, as in a trace."""
    before: Line = {}
    for step in steps:
        line = {name: value for name, value in vars(step).items() if name != "state" and value not in (None, {}, [])}
        yield {**line, "patch": merge_patch(before, step.state)}
        before = step.state


def page_of(runs: list[Line]) -> str:
    """The page with its data. Nothing that stands in a trace can end the element that it is put in."""
    data = json.dumps({"runs": runs}, separators=(",", ":"), ensure_ascii=False)
    for sign in "<>&\u2028\u2029":
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    return assemble((PARTS / "replay.html").read_text(encoding="utf-8")).replace("{{data}}", data, 1)


def assemble(body: str, own: Path = PARTS) -> str:
    """A page whose `{{name}}` lines have become the styles and scripts of these names, which stand in `own` or here."""
    return re.sub(r"^\{\{([a-z_]+\.(?:css|js))\}\}$", lambda found: part(found[1], own), body, flags=re.MULTILINE)


def part(name: str, own: Path = PARTS) -> str:
    path = own / name
    return (path if path.is_file() else PARTS / name).read_text(encoding="utf-8").rstrip()
