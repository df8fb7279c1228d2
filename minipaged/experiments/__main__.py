"""The command: which figures, and where they go."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from minipaged import cache_folder
from minipaged.experiments.figures import FIGURES, STUDIES
from minipaged.experiments.goodput import read_lengths
from minipaged.experiments.loads import TraceError, read_trace
from minipaged.experiments.report import Report
from minipaged.experiments.routing import read_blocks
from minipaged.experiments.study import Settings, Study, progress
from minipaged.viewer.recording import check_page

if TYPE_CHECKING:
    from minipaged.experiments.live import LiveSettings

WITH_TRACE = ("fig2", "fig12", "fig13")  # of which a user's own requests can be asked
READERS: dict[str, Callable[[Path], object]] = {
    **dict.fromkeys(WITH_TRACE, read_trace), "goodput": read_lengths, "routing": read_blocks,
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog="python -m minipaged.experiments",
        description="Redo the evaluation of the PagedAttention paper: a simulation with the package's own scheduler\n"
        "and memory, Orca and FasterTransformer beside it, and a cost model instead of a GPU.\n"
        "`live` compares static batches, contiguous memory and paging on the real model instead; `gallery`\n"
        "records six short runs of it as pages, each with a lesson.",
        epilog="Figures: " + ", ".join(FIGURES) + ",\n"
        "and with many engines: " + ", ".join(STUDIES) + ".\n"
        "Not in the paper: llama (a model and a GPU of today), today (an 8-bit cache and\n"
        "4-bit weights), goodput (prompts and answers on GPUs of their own), routing\n"
        "(which of 1 to 1,000 replicas gets a request; without --trace it draws what was\n"
        "computed before).\n"
        "Each writes NAME.txt, .json, .png and .svg. What was computed once is kept in the\n"
        "cache folder.\n"
        "Exit status: 0 fine, 1 a process died, 2 bad input, 130 interrupted by Ctrl-C.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = flags.add_argument
    add("figures", nargs="*", metavar="FIGURE",
        help=f"which ones (default: all but live, gallery, {', '.join(STUDIES)})")  # fmt: skip
    add("--quick", action="store_true",
        help="a look, in a minute: traces of a fifteenth, in which overload has no time to show")  # fmt: skip
    add("--out", type=Path, metavar="FOLDER", help="where files go (default: results; gallery: results/gallery)")
    add("--trace", type=Path, metavar="FILE",
        help=f"requests of your own for {', '.join(WITH_TRACE)}: one JSON object a line, "
        '{"prompt": 161, "output": 338}, and "arrival" in seconds if they come at given times; for goodput an '
        "Azure LLM inference trace (CSV), for routing a Mooncake trace (JSON with hash_ids)")  # fmt: skip
    add("--seed", type=_at_least(0), metavar="N", help="of the drawn loads (default: 0; live: 1)")
    add("--jobs", type=_at_least(1), default=_processors(), metavar="N",
        help="processes (default: one for each processor)")
    add("--no-cache", action="store_true", help="compute everything anew, and keep nothing")
    add("--html", type=Path, metavar="PAGE",
        help="live: each system once more, not measured, as a page that replays contiguous beside paged memory; and "
        "static batches in PAGE-static.html")  # fmt: skip
    add("--pictures", action="store_true", help="gallery: pictures of the pages too, made by Chromium (playwright)")
    add("--redraw", action="store_true", help="gallery: of the runs that are there; nothing is recorded")
    return flags


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} on")
        return int(text)

    return number


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(arguments: list[str] | None = None) -> int:
    flags = parser()
    args = flags.parse_args(arguments)
    names = args.figures or list(WITH_TRACE if args.trace else FIGURES)
    if unknown := [name for name in names if name not in (*FIGURES, *STUDIES, "live", "gallery")]:
        flags.error(f"no figure {', '.join(unknown)}; there are {', '.join((*FIGURES, *STUDIES))}, live, and gallery")
    for flag, name in (("html", "live"), ("pictures", "gallery"), ("redraw", "gallery")):
        if getattr(args, flag) and name not in names:
            flags.error(f"--{flag} is for {name}, not for {', '.join(names)}")
    if args.trace:
        if useless := [name for name in names if name not in READERS]:
            flags.error(f"--trace is for {', '.join(READERS)}, not for {', '.join(useless)}")
        try:
            for reader in {READERS[name] for name in names}:
                reader(args.trace)
        except (OSError, TraceError) as error:
            flags.error(f"--trace: {error}")
    try:
        (args.out or Path("results")).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        flags.error(f"--out {args.out}: {error.strerror}")
    trace = args.trace.resolve() if args.trace else None
    settings = Settings(args.quick, args.seed, args.jobs, None if args.no_cache else _kept(), trace)
    try:
        if args.html:
            check_page(str(args.html))
        run(names, settings, args)
    except KeyboardInterrupt:
        _say("\ninterrupted; what was finished is kept")
        return 130
    except (OSError, ValueError) as error:  # no model, no space, no requests that fit
        flags.error(str(error))
    except BrokenProcessPool:
        _say("a process was killed, perhaps because memory ran out; what was finished is kept: try --jobs 1")
        return 1
    return 0


def _kept() -> Path | None:
    """Where results are kept; None if they can't be."""
    folder = cache_folder() / "experiments"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return folder if os.access(folder, os.W_OK) else None
    except OSError:
        return None


def run(names: list[str], settings: Settings, args: argparse.Namespace) -> None:
    with Study(settings) as study:
        for name in dict.fromkeys(names):
            start = time.perf_counter()
            files = gallery(args) if name == "gallery" else figure(name, study, args.out or Path("results"))
            if name == "live" and args.html:
                files += live_pages(settings, args.html)
            _say(f"{name}: {time.perf_counter() - start:.1f} s; {', '.join(str(file) for file in files)}")


def figure(name: str, study: Study, out: Path) -> list[Path]:
    report = (FIGURES | STUDIES)[name](study) if name != "live" else live(study.settings)
    report.title += " (quick)" if study.settings.quick else ""
    report.show(Console())
    return report.write(out)


def live(settings: Settings) -> Report:
    """The comparison on the real model, which simulations need not load."""
    from minipaged.experiments import live as real

    with progress("live") as advance:
        result = real.run(_chosen(settings), lambda what, share: advance(round(100 * share), 100, f"live, {what}"))
    return real.report(result)


def live_pages(settings: Settings, page: Path) -> list[Path]:
    from minipaged.experiments.live_record import record

    with progress("live") as advance:
        return record(_chosen(settings), page, lambda what, share: advance(round(100 * share), 100, f"live, {what}"))


def _chosen(settings: Settings) -> LiveSettings:
    from minipaged.experiments.live import QUICK, LiveSettings

    chosen = QUICK if settings.quick else LiveSettings()
    return chosen if settings.seed is None else replace(chosen, seed=settings.seed)


def gallery(args: argparse.Namespace) -> list[Path]:
    from minipaged.experiments.gallery import make

    with progress("gallery") as advance:
        return make(args.out or Path("results", "gallery"), args.pictures, args.redraw, advance)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
