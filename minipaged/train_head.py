"""The command line `python -m minipaged.train_head`: makes a head for a model. See training/."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from minipaged.terminal.command import EPILOG, BadInput, Parser, run

if TYPE_CHECKING:  # PyTorch takes seconds to import: not to say that a flag is wrong
    from minipaged.training.course import Report

PROGRAM = "python -m minipaged.train_head"
DESCRIPTION = (
    "Train a head: a small network that guesses a model's next tokens from its last hidden state. The model itself "
    "writes the text that it is trained on."
)
LINES = 10  # of progress where there is no terminal


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv

    def work() -> None:
        args = _parser().parse_args(argv)
        _check(args)
        _run(args, shlex.join([*PROGRAM.split(), *argv]))

    return run("minipaged.train_head", work, "interrupted: no head was written")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, allow_abbrev=False, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2, a folder in Hugging Face layout, a .gguf file or a hub id")
    add("--out", required=True, metavar="FILE", help="where the head is written: a .safetensors file")
    add("--minutes", type=float, default=20.0, metavar="M", help="for all together (default: 20)")
    add("--vocabulary", type=int, default=8192, metavar="N", help="guess among the N likeliest tokens (default: 8192)")
    add("--seed", type=int, default=0, metavar="N", help="of texts and training (default: 0)")
    return parser


def _check(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if out.suffix != ".safetensors":
        raise BadInput(f"--out {out}: must end with .safetensors")
    if not out.parent.is_dir():
        raise BadInput(f"--out {out}: there is no folder {out.parent}")
    if out.is_dir():
        raise BadInput(f"--out {out}: is a folder")
    if not os.access(out.parent, os.W_OK):
        raise BadInput(f"--out {out}: nothing may be written there")
    if not 0 < args.minutes <= 10_000:
        raise BadInput(f"--minutes {args.minutes:g}: must be more than 0, at most 10000")
    if args.vocabulary < 1:
        raise BadInput(f"--vocabulary {args.vocabulary}: must be at least 1")
    if args.seed < 0:
        raise BadInput(f"--seed {args.seed}: must be at least 0")


def _run(args: argparse.Namespace, command: str) -> None:
    from minipaged.llm import LLM
    from minipaged.training.course import Course

    console = Console(stderr=True, highlight=False)
    try:
        llm = LLM(args.model, dtype="bf16", max_num_seqs=128, max_num_batched_tokens=1024)
    except (ValueError, OSError, MemoryError) as error:
        raise BadInput(" ".join(str(error).split()) or "not enough memory") from error
    with llm, _Shown(console) as shown:
        course = Course(llm, args.minutes, args.seed, args.vocabulary, shown)
        report = course.run(Path(args.out), command)
    _print(report, args.out)


class _Shown:
    """Progress: a bar in a terminal, else a line now and then."""

    def __init__(self, console: Console):
        self.console, self.said = console, -1
        doing, remark = TextColumn("{task.description}"), TextColumn("{task.fields[remark]}")
        self.bar = Progress(
            doing, BarColumn(), TimeElapsedColumn(), remark, console=console, transient=True,
            disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("writing", total=1.0, remark="")

    def __enter__(self) -> "_Shown":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, doing: str, share: float, remark: str) -> None:
        self.bar.update(self.task, description=doing, completed=min(share, 1.0), remark=remark)
        if not self.console.is_terminal and int(share * LINES) > self.said:
            self.said = int(share * LINES)
            self.console.print(f"{min(share, 1.0):4.0%}  {doing}: {remark}", soft_wrap=True)


def _print(report: "Report", out: str) -> None:
    def shares(values: list[float]) -> str:
        return ", ".join(f"{value:.3f}" for value in values)

    print("guesses right at temperature 0, first, second, third (each given that those before it were):")
    if report.held_out:
        print(f"  held-out questions: {shares(report.held_out)}")
    print(f"  questions of its own, not learned from: {shares(report.own)}")
    print("first guesses right after minutes:")
    for minutes, share in report.curve:
        print(f"  {minutes:5.1f}  {share:.3f}")
    print(f"{report.num_texts} texts, {report.num_tokens} tokens of answers; {report.num_steps} steps")
    print(f"{report.seconds:.0f} seconds; {out}: {report.num_bytes} bytes")


if __name__ == "__main__":
    sys.exit(main())
