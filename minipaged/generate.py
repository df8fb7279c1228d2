"""The command line: `python -m minipaged.generate [PROMPT ...]`.

This file is what is done; the flags, what is asked, said and drawn are in terminal/, and viewer/ keeps it.
"""

import argparse
import contextlib
import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console

from minipaged.terminal.command import FAILED, INTERRUPTED, BadInput, CommandFailed, run
from minipaged.terminal.engine_flags import engine_options
from minipaged.terminal.loading import end_as_rank, load
from minipaged.terminal.options import HINTS, parse
from minipaged.terminal.prompts import Job, NoPrompt, for_each, read_jobs
from minipaged.terminal.report import Results, show_account, show_prefixes
from minipaged.terminal.watch import Display, EventLines, ProgressLine, Watch, can_draw, note_interrupts
from minipaged.viewer.recording import recording
from minipaged.viewer.trace import TraceError

if TYPE_CHECKING:  # PyTorch takes seconds to import: not for --help, nor to say that a flag is wrong
    from minipaged.llm import LLM


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return its exit status: see the end of --help."""
    argv = sys.argv[1:] if argv is None else argv

    def work() -> int:
        try:
            with contextlib.ExitStack() as stack:  # at its end the page is written
                args = parse(argv)
                end_as_rank(args.model, engine_options(args))
                return _generate(args, read_jobs(args), stack)
        except NoPrompt:
            if argv:
                raise
            print(HINTS)
            return 0
        except TraceError as error:
            raise CommandFailed(str(error)) from error

    return run("minipaged.generate", work)


def _generate(args: argparse.Namespace, jobs: list[Job], stack: contextlib.ExitStack) -> int:
    options = engine_options(args)
    console = Console(stderr=True, no_color=args.no_color or None, highlight=False)
    record = stack.enter_context(recording(args.trace, args.html)) if (args.trace, args.html) != (None, None) else None
    llm: LLM = load("LLM", args.model, options, console)
    _add_all(llm, jobs, args.chat)
    if record:
        record.follow(llm)
    return _run(llm, jobs, args, console)


def _add_all(llm: "LLM", jobs: list[Job], chat: bool | None) -> None:
    """Add all requests, or, if the engine refuses some, none."""
    chat = llm.tokenizer.has_chat_template if chat is None else chat
    if chat and not llm.tokenizer.has_chat_template:
        raise BadInput(f"--chat: {llm.model_name} has no chat template; use --raw")

    def add(numbered: tuple[int, Job]) -> None:
        number, job = numbered
        as_message = chat and isinstance(job.prompt, str)
        prompt = [{"role": "user", "content": job.prompt}] if as_message else job.prompt
        try:
            llm.add_request(prompt, job.params, str(number), job.cache_salt)
        except ValueError as error:
            raise BadInput(f"{job.where}: {error}") from None

    for_each(enumerate(jobs), add)


def _run(llm: "LLM", jobs: list[Job], args: argparse.Namespace, console: Console) -> int:
    streaming = len(jobs) == 1 and jobs[0].is_single and not args.json
    results = Results(jobs, sys.stdout, args.json, streaming)
    began = time.monotonic()
    try:
        with note_interrupts() as interrupts, _display(llm, args.watch, streaming, console) as display:
            while llm.has_unfinished_requests and not interrupts:
                for output in llm.step():
                    results.add(output)
                if results.ready:
                    display.print(results.flush)
    finally:
        results.close()
    seconds = time.monotonic() - began
    if interrupts:
        print(f"interrupted: {results.num_finished} of {len(jobs)} prompts were finished", file=sys.stderr)
    for error in results.errors:
        print(f"minipaged.generate: error: {error}", file=sys.stderr)
    if results.num_cut and console.file.isatty():
        print(f"({results.num_cut} of {len(jobs)} prompts: cut at max_tokens)", file=sys.stderr)
    if args.stats:
        show_account(llm.stats(), seconds, console)
        show_prefixes(llm, console)
    return INTERRUPTED if interrupts else FAILED if results.errors else 0


def _display(llm: "LLM", watch: bool, streaming: bool, console: Console) -> Display:
    if watch:
        return Watch(llm, console) if can_draw(console) else EventLines(llm, console)
    return Display(llm, console) if streaming or not can_draw(console) else ProgressLine(llm, console)


if __name__ == "__main__":
    sys.exit(main())
