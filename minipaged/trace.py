"""The command line `python -m minipaged.trace FILE`: draws a run again. See terminal/trace.py."""

import argparse
import sys

from rich.console import Console

from minipaged.terminal.trace import TraceError, drawn, in_words, read_trace


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m minipaged.trace", description="Draw a run again, from the file that --trace wrote."
    )
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--step", type=int, metavar="N", help="draw the memory after step N only")
    parser.add_argument("--list", action="store_true", help="a line for each step instead of a picture")
    parser.add_argument("--no-color", action="store_true", help="no colours (as with NO_COLOR set)")
    args = parser.parse_args(argv)
    console = Console(no_color=args.no_color or None, highlight=False, soft_wrap=True)
    number = None
    try:
        header, steps = read_trace(args.file)
        for step in steps:
            number = step.step
            if args.step in (None, number):
                console.print(in_words(step) if args.list else drawn(header, step))
            if args.step == number:
                return 0
    except TraceError as error:
        print(f"minipaged.trace: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if args.step is None:
        return 0
    print(f"minipaged.trace: error: there is no step {args.step}: the last is {number}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
