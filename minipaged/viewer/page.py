"""Traces -> one HTML file that opens in any browser and needs nobody: no network, no server, no library.

What it is made of stands in page/: a body (replay.html), styles and scripts, which are put into it as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from minipaged.viewer.state import merge_patch
from minipaged.viewer.thinning import condensed
from minipaged.viewer.trace import TraceError, TraceStep, Watch, as_json, read_trace, unwatched, write

PARTS = Path(__file__).with_name("page")
MOST_STEPS = 2000  # that a page keeps: of longer runs it keeps every second one, or fourth, ...
DATA = re.compile(r'<script id="data" type="application/json">(.*?)</script>', re.DOTALL)
Line = dict[str, Any]


def write_page(traces: Sequence[str | Path], path: Path, step: int | None = None, watch: Watch = unwatched) -> None:
    """The page that replays one trace, or two beside each other. TraceError if a file is no trace, or none is written.

    step: at which it opens. Nothing is written before all traces were read.
    """
    write(path, "the page", page_of([run_of(trace, step, watch) for trace in traces]))


def run_of(path: str | Path, step: int | None = None, watch: Watch = unwatched) -> Line:
    """What the page knows of a trace: its name, its header, and its lines; of `every` steps it has the last one."""
    header, steps = read_trace(path, watch)
    kept, every = condensed(steps, MOST_STEPS)
    if not kept:
        raise TraceError(f"{path} has no steps: there is nothing to replay")
    if step is not None and not 1 <= step <= kept[-1].step:
        raise TraceError(f"{path} has no step {step}: the last is {kept[-1].step}")
    header = header if step is None else {**header, "open_at": step}
    title = header.get("title") or Path(path).stem
    return {"title": title, "header": header, "every": every, "lines": list(_lines(kept))}


def _lines(steps: Iterable[TraceStep]) -> Iterator[Line]:
    """Delta-coded, as in a trace."""
    before: Line = {}
    for step in steps:
        line = {name: value for name, value in vars(step).items() if name != "state" and value not in (None, {}, [])}
        yield {**line, "patch": merge_patch(before, step.state)}
        before = step.state


def page_of(runs: list[Line]) -> str:
    """The page with its data. Nothing that stands in a trace can end the element that it is put in."""
    data = as_json({"runs": runs})
    for sign in "<>&\u2028\u2029":
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    return assemble((PARTS / "replay.html").read_text(encoding="utf-8")).replace("{{data}}", data, 1)


def runs_in(page: str) -> list[Line]:
    """What `page_of` made a page of. ValueError if it is no such page."""
    try:
        return json.loads(DATA.search(page)[1])["runs"]  # type: ignore[index]
    except (TypeError, KeyError) as error:
        raise ValueError("no page of a run") from error


def assemble(body: str, own: Path = PARTS) -> str:
    """A page whose `{{name}}` lines have become the styles and scripts of these names, which stand in `own` or here."""
    return re.sub(r"^\{\{([a-z_]+\.(?:css|js))\}\}$", lambda found: part(found[1], own), body, flags=re.MULTILINE)


def part(name: str, own: Path = PARTS) -> str:
    """The text of one."""
    path = own / name
    return (path if path.is_file() else PARTS / name).read_text(encoding="utf-8").rstrip()
