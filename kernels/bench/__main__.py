"""The run: flags in, cells one after another, a report out."""

import argparse
import json
import math
import sys
import time
from typing import Any

import torch

import kernels
from kernels.bench.cells import GRIDS, POINTS, QUICK, SHAPES, SMOKE, WHAT, Grid, Shape, Work
from kernels.bench.runner import Bench, Row, first_line
from kernels.bench.tables import print_report
from kernels.bench.timing import WrongKernel, cache_bytes, machine

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
QUICK_ROUNDS, ROUNDS = 5, 7


class BadInput(ValueError):
    """The flags ask for what can't be had here."""


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 fine, 1 a kernel is wrong or broke, 2 bad input, 130 interrupted by Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        report = bench(args)
    except (BadInput, kernels.Unavailable) as error:
        _say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    print(json.dumps(report, indent=2)) if args.json else print_report(report)
    return int(any("failed" in row for row in report["results"]))


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Run what the flags ask for. BadInput if that is impossible."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("PyTorch sees no GPU here; --device cpu runs without one")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    backend = kernels.load(args.kernels, device, DTYPES[dtype], notice=_say)
    grid = SMOKE if args.smoke else QUICK if args.quick else POINTS if args.points else GRIDS[device.type]
    rounds = 1 if args.smoke else QUICK_ROUNDS if args.quick else ROUNDS
    overflow = 1 if args.smoke else cache_bytes(device)
    small: dict[str, Any] = dict(seconds=1e-9, copied=1 << 16, multiplied=16) if args.smoke else {}
    runner = Bench(backend, device, DTYPES[dtype], overflow, rounds, flex=grid.flex, **small)
    report = {"machine": machine(device), "kernels": backend.name, "dtype": dtype, "rounds": rounds}
    end = time.monotonic() + args.limit if args.limit else math.inf
    results = run(runner, grid, args.what, [SHAPES[name] for name in args.model], end)
    return report | {"results": results, "left_out": runner.left_out}


def run(runner: Bench, grid: Grid, what: list[str], shapes: list[Shape], end: float = math.inf) -> list[Row]:
    """All cells, table by table. One that yields no figures has the reason in its row instead: skipped or failed.

    end: of time.monotonic: what has not begun by then is skipped.
    """
    rows: list[Row] = []
    for table in what:
        for shape in shapes:
            for work in grid.cells(table, shape):
                name = f"{table} {shape.name}, {work.batch} x {work.context}, block size {work.block_size}"
                late = {"skipped": "no time was left"}
                rows.append(_row(runner, table, work) if time.monotonic() < end else runner.cell(table, work) | late)
                row = rows[-1]
                told = next((f"{key}: {row[key]}" for key in ("skipped", "failed") if key in row), None)
                _say(f"{name}: {told or format(1e6 * row['seconds']['ours'], '.1f') + ' us'}")
    return rows


def _row(runner: Bench, table: str, work: Work) -> Row:
    cell = runner.cell(table, work)
    try:
        return getattr(runner, table)(work)
    except torch.OutOfMemoryError as error:
        return cell | {"skipped": first_line(error)}
    except WrongKernel as error:
        return cell | {"failed": str(error)}
    except Exception as error:  # a kernel that breaks in one cell should not cost the figures of all others
        return cell | {"failed": f"{type(error).__name__}: {first_line(error)}"}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench",
        description="Measure the attention kernels: against the speed of a copy, and against PyTorch's own.\n"
        "The tables go to standard output, progress to standard error.",
        epilog="Exit status: 0 fine, 1 a kernel is wrong or broke, 2 bad input, 130 interrupted by Ctrl-C.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--device", choices=["auto", "cuda", "cpu"], default="auto", help="default: a GPU where PyTorch sees one")
    add("--what", nargs="+", choices=WHAT, default=list(WHAT), metavar="WHAT",
        help=f"of {', '.join(WHAT)} (default: all). contiguous: decode beside PyTorch's attention; "
        "paging: block sizes, scrambled against ordered tables")  # fmt: skip
    add("--model", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="MODEL",
        help=f"whose heads: of {', '.join(SHAPES)} (default: all)")  # fmt: skip
    add("--dtype", choices=DTYPES, help="of keys and values (default: bf16 on a GPU, fp32 on a CPU)")
    add("--kernels", choices=kernels.BACKENDS, default="auto",
        help="which to measure (default: triton on a GPU, cpp on a CPU)")  # fmt: skip
    size = parser.add_mutually_exclusive_group().add_argument
    size("--quick", action="store_true", help="few cells and few rounds, to try it out")
    size("--points", action="store_true", help="the cells that matter most on a GPU")
    size("--smoke", action="store_true", help="one tiny cell of each kind; the figures mean nothing")
    add("--limit", type=float, metavar="SECONDS", help="begin no cell after so many seconds")
    add("--json", action="store_true", help="print JSON, with more figures than the tables")
    return parser


if __name__ == "__main__":
    sys.exit(main())
