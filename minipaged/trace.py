"""The command line `python -m minipaged.trace FILE`: draws a run again, in the terminal or as a page. See viewer/."""

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from minipaged.terminal.command import EPILOG, BadInput, Parser, run
from minipaged.terminal.draw import picture
from minipaged.viewer.page import write_page
from minipaged.viewer.perfetto import write_perfetto
from minipaged.viewer.trace import TraceError, TraceStep, read_trace

PATIENCE = 2.0  # seconds until a bar says how far reading is


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return its exit status: see the end of --help."""

    def work() -> None:
        args = _read_flags(argv)
        try:
            _write(args) if args.html is not None or args.perfetto is not None else _draw(args)
        except TraceError as error:
            raise BadInput(str(error)) from error

    return run("minipaged.trace", work)


def _read_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m minipaged.trace",
        description="Draw a run again, from the file that --trace wrote; two files: beside each other, with --html.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("files", metavar="FILE", nargs="+")
    add("--step", type=int, metavar="N", help="draw the memory after step N only; with --html: the page opens there")
    add("--list", action="store_true", help="a line for each step instead of a picture")
    add("--html", metavar="PAGE", help="write a page that replays it in any browser, without a network or a server")
    add("--perfetto", metavar="OUT", help="write its timeline for ui.perfetto.dev or chrome://tracing, as JSON")
    add("--no-color", action="store_true", help="no colours (as with NO_COLOR set)")
    args = parser.parse_args(argv)
    if args.html is None and args.perfetto is None:
        if len(args.files) > 1:
            parser.error("one FILE; or two with --html or --perfetto, which show them beside each other")
    elif len(args.files) > 2:
        parser.error(f"at most two files can be shown beside each other, not {len(args.files)}")
    elif args.list:
        parser.error("--list is for the terminal: not with --html or --perfetto")
    elif args.step is not None and args.html is None:
        parser.error("--step says where a page opens, or what the terminal shows: not with --perfetto alone")
    return args


def _write(args: argparse.Namespace) -> None:
    console = Console(stderr=True, no_color=args.no_color or None, highlight=False)
    outs = [out for out in (args.html, args.perfetto) if out is not None]
    for out in outs:
        _must_be_another(out, args.files)
    if len({os.path.realpath(out) for out in outs}) < len(outs):
        raise TraceError(f"--html and --perfetto can't both be {args.html}: the second would overwrite the first")
    with Reading(console) as reading:
        if args.perfetto is not None:
            write_perfetto(args.files, Path(args.perfetto), reading.watch)
        if args.html is not None:
            write_page(args.files, Path(args.html), args.step, reading.watch)


def _must_be_another(out: str, files: list[str]) -> None:
    for file in files:
        if os.path.exists(out) and os.path.exists(file) and os.path.samefile(out, file):
            raise TraceError(f"{out} is the trace itself: it would be overwritten")


class Reading:
    """A bar that says how far reading is, if it takes its time and somebody looks; gone when it is done."""

    def __init__(self, console: Console):
        self._bar = Progress(TextColumn("reading"), BarColumn(), console=console, transient=True)
        self._task = self._bar.add_task("", total=1.0)
        self._next = time.monotonic() + PATIENCE if console.is_terminal else math.inf

    def __enter__(self) -> "Reading":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def watch(self, share: float) -> None:
        """So much of a file was read."""
        if time.monotonic() > self._next:
            self._next += 0.1
            self._bar.start()
            self._bar.update(self._task, completed=share)


class Screen(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # `run` knows what to do


def _draw(args: argparse.Namespace) -> None:
    console = Screen(no_color=args.no_color or None, highlight=False, soft_wrap=True)
    number = None
    header, steps = read_trace(args.files[0])
    for step in steps:
        number = step.step
        if args.step in (None, number):
            console.print(in_words(step) if args.list else drawn(header, step))
        if args.step == number:
            return
    if number is None:
        raise TraceError(f"{args.files[0]} has no steps: there is nothing to draw")
    if args.step is not None:
        raise TraceError(f"{args.files[0]} has no step {args.step}: the last is {number}")


def drawn(header: dict[str, Any], step: TraceStep) -> Text:
    return picture(step.memory, f"{header['model']}, step {step.step}", [*step.events, ""], width=80)


def in_words(step: TraceStep) -> str:
    usage, tokens = step.state["usage"], step.state["step"]["tokens"]
    counts = f"{tokens:5} tokens, {usage['used']:5} blocks in use, {usage['shared']:4} shared"
    return f"step {step.step:5}: {counts}  {'; '.join(step.events)}"


if __name__ == "__main__":
    sys.exit(main())
