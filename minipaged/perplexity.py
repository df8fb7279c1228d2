"""The command line `python -m minipaged.perplexity [MODEL]`: what quantization loses, on a text. See quantization/."""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from minipaged.terminal.command import EPILOG, BadInput, Parser, run
from minipaged.terminal.engine_flags import RANKS_HELP, count

if TYPE_CHECKING:  # PyTorch takes seconds to import: not to say that a flag is wrong
    from minipaged.quantization.progress import Shown
    from minipaged.quantization.rtn import Grid

PROGRAM = "python -m minipaged.perplexity"
DESCRIPTION = (
    "Measure how well a model foresees a text, in floats and quantized in several ways. A table goes to standard "
    "output, all else to standard error."
)
METHODS = ("fp32", "file", "int8-products", "int8", "int4", "rtn", "gptq", "awq", "kv-int8", "kv-fp8")
METHODS_HELP = (
    "fp32: weights in floats; file: as the file has them; int8-products: and activations rounded, too; int8, int4: "
    "rounded when they are loaded; rtn, gptq, awq: as minipaged.quantize writes them, in 4 bits; kv-int8, kv-fp8: "
    "floats, but keys and values in eight bits "
    "(default: all that the model and the engine can do)"
)
CONTEXT = 1024
COLUMNS = {  # of the table: the field of a row, and how it is written
    "bits/weight": ("bits_per_weight", "{:.2f}"),
    "nats/token": ("nats_per_token", "{:.4f}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "bits/byte": ("bits_per_byte", "{:.4f}"),
    "to fp32": ("percent_to_fp32", "{:+.2f} %"),
    "seconds": ("seconds", "{:.0f}"),
}


def main(argv: list[str] | None = None) -> int:
    rows: list[dict[str, Any]] = []

    def work() -> None:
        args = _parser().parse_args(argv)
        _check(args)
        try:
            _run(args, rows)
        finally:
            if rows:
                _print(rows)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")

    return run("minipaged.perplexity", work)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, allow_abbrev=False, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", default="smollm2",
        help="smollm2, a folder in Hugging Face layout, a .gguf file or a hub id (default: smollm2)")  # fmt: skip
    add("--text", type=Path, metavar="FILE", help="default: the end of Moby-Dick, 26,000 words")
    add("--methods", nargs="+", choices=METHODS, metavar="NAME", help=METHODS_HELP)
    add("--group-size", type=int, default=64, choices=(32, 64, 128, -1),
        help="of rtn, gptq and awq: columns that share a scale; -1: a whole row (default: 64)")  # fmt: skip
    add("--asymmetric", action="store_true", help="of rtn, gptq and awq: a zero point for each group")
    add("--context", type=int, metavar="N", help=f"tokens of a window (default: {CONTEXT}, or the model's all)")
    add("--stride", type=int, metavar="N",
        help="from a window's beginning to the next one's; what overlaps is only read (default: a token)")  # fmt: skip
    add("--limit-tokens", type=int, metavar="N", help="only the text's first (default: all)")
    add("--tensor-parallel-size", type=count, default=1, metavar="N", help=RANKS_HELP)
    add("--json", type=Path, metavar="FILE", help="write the rows there, too")
    return parser


def _check(args: argparse.Namespace) -> None:
    for name, least in (("context", 2), ("stride", 1), ("limit_tokens", 2)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if args.stride and args.stride >= (args.context or CONTEXT):
        raise BadInput(f"--stride {args.stride}: must be less than --context, {args.context or CONTEXT}")
    if args.json and (args.json.is_dir() or not os.access(args.json.parent, os.W_OK)):
        raise BadInput(f"--json {args.json}: no file can be written there")


def _run(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from minipaged.models import ModelConfig, open_checkpoint
    from minipaged.quantization.methods import grid_for
    from minipaged.quantization.progress import Shown
    from minipaged.quantization.texts import TO_MEASURE, read_text

    try:
        text, checkpoint = read_text(args.text or TO_MEASURE), open_checkpoint(args.model)
        longest = ModelConfig.from_hf(checkpoint.config).max_model_len - 1  # a token is made, too
        grid = grid_for(checkpoint, 4, args.group_size, not args.asymmetric)
    except ValueError as error:
        raise BadInput(" ".join(str(error).split())) from error
    context = args.context or min(CONTEXT, longest)
    if context > longest:
        raise BadInput(f"--context {context}: this model can be given at most {longest}")
    with Shown() as shown:
        for name in dict.fromkeys(args.methods or METHODS):
            try:
                _add(rows, name, _measure(args, name, text, grid, context, shown))
            except (ValueError, MemoryError) as error:
                said = " ".join(str(error).split()) or "not enough memory"
                if args.methods:
                    raise BadInput(f"{name}: {said}") from error
                print(f"{name} is left out: {said}", file=sys.stderr)
    if not rows:
        raise BadInput("none of the methods can be run on this model")


def _measure(
    args: argparse.Namespace, name: str, text: str, grid: "Grid", context: int, shown: "Shown"
) -> dict[str, Any]:
    from minipaged.quantization.methods import WAYS, opened
    from minipaged.quantization.perplexity import score

    stride = min(args.stride or context - 1, context - 1)
    way = WAYS[name]
    way = replace(way, options=way.options | {"tensor_parallel_size": args.tensor_parallel_size})
    with opened(args.model, way, grid, context, shown.doing(f"{name}: layers")) as (llm, bits):
        began = time.monotonic()
        found = score(llm, text, context, stride, args.limit_tokens, shown.doing(f"{name}: windows"))
        return {
            "bits_per_weight": bits, "nats_per_token": found.per_token, "perplexity": found.perplexity,
            "bits_per_byte": found.bits_per_byte, "tokens": found.num_tokens, "bytes": found.num_bytes,
            "seconds": time.monotonic() - began,
        }  # fmt: skip


def _add(rows: list[dict[str, Any]], name: str, row: dict[str, Any]) -> None:
    rows.append({"method": name} | row)
    floats = next((row["perplexity"] for row in rows if row["method"] == "fp32"), None)
    for each in rows:
        each["percent_to_fp32"] = None if floats is None else 100 * (each["perplexity"] / floats - 1)


def _print(rows: list[dict[str, Any]]) -> None:
    written = [[row["method"], *(_written(row[field], form) for field, form in COLUMNS.values())] for row in rows]
    if sys.stdout.isatty():
        table = Table("method")
        for name in COLUMNS:
            table.add_column(name, justify="right")
        for cells in written:
            table.add_row(*cells)
        Console().print(table)
    else:
        for cells in (["method", *COLUMNS], *written):
            print(f"{cells[0]:13}" + "".join(f"{cell:>11}" for cell in cells[1:]).rstrip())
    print(f"{rows[0]['tokens']} tokens, {rows[0]['bytes']} bytes")


def _written(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


if __name__ == "__main__":
    sys.exit(main())
