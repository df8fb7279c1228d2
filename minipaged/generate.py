"""The command line: `python -m minipaged.generate [PROMPT ...]`.

This file is what is done; the flags, what is asked, said and drawn are in terminal/, and trace.py keeps it.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console

from minipaged.execution.engine_args import EngineArgs
from minipaged.terminal.options import HINTS, BadInput, parse, speculative_config
from minipaged.terminal.prompts import Job, NoPrompt, for_each, read_jobs
from minipaged.terminal.report import Results, ignore_closed_pipe, show_account, show_prefixes
from minipaged.terminal.trace import TraceError, TraceWriter
from minipaged.terminal.watch import Display, EventLines, ProgressLine, Watch, can_draw, note_interrupts, waiting

if TYPE_CHECKING:  # PyTorch takes seconds to import: not for --help, nor to say that a flag is wrong
    from minipaged.llm import LLM

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130  # exit statuses
OPTIONS = (  # of LLM, that there are flags for
    "dtype", "quantization", "products", "kv_cache_dtype", "device", "kernels", "block_size", "num_blocks",
    "kv_cache_memory", "prefix_cache", "schedule", "max_num_seqs", "max_num_batched_tokens", "chunked_prefill",
    "preemption", "debug",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return its exit status: see the end of --help."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        with contextlib.ExitStack() as stack:
            args = parse(argv)
            return _generate(args, read_jobs(args), stack)
    except BadInput as error:
        if isinstance(error, NoPrompt) and not argv:
            print(HINTS)
            return 0
        for line in str(error).splitlines():
            print(f"minipaged.generate: error: {line}", file=sys.stderr)
        return BAD_INPUT
    except TraceError as error:
        print(f"minipaged.generate: error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return ignore_closed_pipe()
    except OSError as error:  # a full disk below standard output, say
        print(f"minipaged.generate: error: {error}", file=sys.stderr)
        ignore_closed_pipe()
        return FAILED


def _generate(args: argparse.Namespace, jobs: list[Job], stack: contextlib.ExitStack) -> int:
    _check_options(args)
    console = Console(stderr=True, no_color=args.no_color or None, highlight=False)
    trace = stack.enter_context(_open_trace(args.trace)) if args.trace else None
    llm = _load(args, console)
    _add_all(llm, jobs, args.chat)
    if trace:
        with contextlib.suppress(OSError):  # a pipe has nothing to be removed
            trace.truncate(0)
        llm.observers.append(TraceWriter(llm, trace))
    return _run(llm, jobs, args, console)


def _check_options(args: argparse.Namespace) -> None:
    """Say what is wrong with them now, and not after loading."""
    try:
        EngineArgs.of(args.model, _options(args))
    except ValueError as error:
        raise BadInput(str(error)) from None


def _options(args: argparse.Namespace) -> dict[str, Any]:
    options = {name: getattr(args, name) for name in OPTIONS}
    return options | {"speculative_config": speculative_config(args)}


def _open_trace(path: str) -> IO[str]:
    """Opened before anything runs; but what it held is kept until there is something to write."""
    try:
        return open(path, "a", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot write the trace {path}: {error.strerror}") from None


def _load(args: argparse.Namespace, console: Console) -> "LLM":
    with waiting(console, "loading PyTorch"):
        from minipaged.llm import LLM
        from minipaged.models.fetch import fetch_smollm2

    try:
        if args.model == "smollm2":
            fetch_smollm2()  # by itself, since it draws a progress bar of its own
        fetched = args.model == "smollm2" or Path(args.model).exists()
        words = f"loading {args.model}"
        with waiting(console, words) if fetched else contextlib.nullcontext():
            return LLM(args.model, **_options(args))
    except (ValueError, OSError, MemoryError) as error:
        raise BadInput(" ".join(str(error).split()) or "not enough memory") from error
    except RuntimeError as error:  # PyTorch's way to say that there is no memory
        if "memory" not in str(error):
            raise
        raise BadInput("not enough memory: lower --num-blocks or --kv-cache-memory") from error


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
