"""Traces -> one HTML file that opens in any browser and needs nobody: no network, no server, no library.

What it is made of stands in page/: a body (replay.html), styles and scripts, which are put into it as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from minipaged.viewer.state import merge_patch
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


def thinned(steps: list[TraceStep], every: int) -> Iterator[TraceStep]:
    """The last of every so many steps, as if it had done what all of them did."""
    for start in range(0, len(steps), every):
        whole, *others = steps[start : start + every]
        for step in others:
            seconds = None if step.seconds is None else (whole.seconds or 0) + step.seconds
            whole = replace(
                step, seconds=seconds, did=did_of_both(whole.did, step.did), words=words_of_both(whole.words, step.words),
                texts={**whole.texts, **step.texts},
                arrived={**whole.arrived, **step.arrived}, events=whole.events + step.events,
            )  # fmt: skip
        yield whole


def did_of_both(first: Line, second: Line) -> Line:
    """What two steps did, one after the other: see TRACE.md."""
    both = dict(first)
    for name, value in second.items():
        before = both.get(name)
        if isinstance(value, list):
            both[name] = [*(before or []), *value]
        elif name in ("computed", "guessed"):
            both[name] = dict(before or {})
            for who, numbers in value.items():
                old = both[name].get(who)
                first_number = numbers[0] if name == "computed" or old is None else old[0] + numbers[0]
                both[name][who] = numbers if old is None else [
                    old[0] if name == "computed" else first_number, *(a + b for a, b in zip(old[1:], numbers[1:]))
                ]  # fmt: skip
        else:
            both[name] = {**(before or {}), **value}
    return both


def words_of_both(first: Line, second: Line) -> Line:
    """What is new in words after two steps: see words.py.

    >>> words_of_both({"A": {"keep": 3, "add": ["x", "y"]}}, {"B": {"from": "A", "keep": 4, "add": ["z"]}})["B"]
    {'from': 'A', 'keep': 3, 'add': ['x', 'z']}
    """
    both = dict(first)
    for name, new in second.items():
        source = new.get("from", name)
        if source in first:
            old = first[source]
            keep = min(new["keep"], old["keep"])
            origin = old.get("from", source)
            new = {**({"from": origin} if origin != name else {}), "keep": keep,
                   "add": [*old["add"][: new["keep"] - keep], *new["add"]]}  # fmt: skip
        both[name] = new
    return both


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
