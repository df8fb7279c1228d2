"""The command line `python -m minipaged.trace FILE`: draws a run again, in the terminal or as a page. See viewer/."""

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from minipaged.terminal.draw import picture
from minipaged.viewer.page import write_page
from minipaged.viewer.perfetto import write_perfetto
from minipaged.viewer.trace import TraceError, TraceStep, read_trace


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m minipaged.trace",
        description="Draw a run again, from the file that --trace wrote; two files: beside each other, with --html.",
        epilog="Exit status: 0 fine, 2 bad input, 130 interrupted by Ctrl-C.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("files", metavar="FILE", nargs="+")
    add("--step", type=int, metavar="N", help="draw the memory after step N only")
    add("--list", action="store_true", help="a line for each step instead of a picture")
    add("--html", metavar="PAGE", help="write a page that replays it in any browser, without a network or a server")
    add("--perfetto", metavar="OUT", help="write its timeline for ui.perfetto.dev or chrome://tracing, as JSON")
    add("--no-color", action="store_true", help="no colours (as with NO_COLOR set)")
    args = parser.parse_args(argv)
    try:
        return _run(args, parser)
    except TraceError as error:
        print(f"minipaged.trace: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if len(args.files) > (2 if args.html else 1):
        parser.error("one FILE; or two with --html, which shows them beside each other")
    if args.html or args.perfetto:
        if args.step is not None or args.list:
            parser.error("--step and --list are for the terminal: not with --html or --perfetto")
        if args.perfetto:
            write_perfetto(args.files[0], Path(args.perfetto))
        if args.html:
            write_page(args.files, Path(args.html))
        return 0
    return _draw(args)


def _draw(args: argparse.Namespace) -> int:
    console = Console(no_color=args.no_color or None, highlight=False, soft_wrap=True)
    number = None
    header, steps = read_trace(args.files[0])
    for step in steps:
        number = step.step
        if args.step in (None, number):
            console.print(in_words(step) if args.list else drawn(header, step))
        if args.step == number:
            return 0
    if args.step is None:
        return 0
    raise TraceError(f"there is no step {args.step}: the last is {number}")


def drawn(header: dict[str, Any], step: TraceStep) -> Text:
    return picture(step.memory, f"{header['model']}, step {step.step}", [*step.events, ""], width=80)


def in_words(step: TraceStep) -> str:
    usage, tokens = step.state["usage"], step.state["step"]["tokens"]
    counts = f"{tokens:5} tokens, {usage['used']:5} blocks in use, {usage['shared']:4} shared"
    return f"step {step.step:5}: {counts}  {'; '.join(step.events)}"


if __name__ == "__main__":
    sys.exit(main())
