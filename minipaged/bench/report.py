"""The results: rows from runs, the machine they ran on, a table for eyes and one for pipes."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from minipaged.bench.contenders import LABELS
from minipaged.bench.loads import Load, Run, agreement

Row = dict[str, Any]
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")
MIB = 1 << 20
NOTES = """\
tok/s: useful output tokens per second. first: seconds to a request's first token, the median.
KV: MiB of keys and values at their peak (minipaged: the blocks in use; padded batches: the padded tensors;
continuous batching: its pool, made to fit the load; vLLM and llama.cpp: theirs, made to fit the largest load).
peak: MiB, the most that the process held in all.
minipaged is: its speed as a multiple of this one's, run beside it. same: requests with the same tokens as
minipaged's (where two tokens are about as likely, rounding may choose, and all that follows differs)."""


def summarize(load: Load, dtype: str, runs: dict[str, list[Run]]) -> list[Row]:
    """A row for each contender that has runs; medians over the rounds.

    runs: by contender, one Run for each round. Ratios to minipaged are taken within each round, between runs
    that stood side by side, and the median of these is reported.
    """
    return [_row(load, dtype, name, own, runs.get("minipaged", [])) for name, own in runs.items() if own]


def _row(load: Load, dtype: str, name: str, runs: list[Run], engine: list[Run]) -> Row:
    first = [run.first_token for run in runs if run.first_token]
    row: Row = {
        "load": load.name,
        "dtype": dtype,
        "contender": name,
        "requests": len(load.prompts),
        "output_tokens": load.num_output_tokens,
        "seconds": median(run.seconds for run in runs),
        "tokens_per_second": median(run.tokens_per_second for run in runs),
        "rounds": [run.tokens_per_second for run in runs],
        "time_to_first_token": median(map(median, first)) if first else None,
        "kv_bytes": max(run.kv_bytes for run in runs),
        "peak_bytes": max(run.peak_bytes for run in runs),
        "ratio": None,
        "same_tokens": None,
    }
    pairs = list(zip(engine, runs, strict=False))  # a contender that broke has fewer rounds
    if name != "minipaged" and pairs:
        row["ratio"] = median(ours.tokens_per_second / theirs.tokens_per_second for ours, theirs in pairs)
        row["same_tokens"] = agreement(engine[0], runs[0])
    if runs[0].times is not None:
        row["split"] = split(runs)
    return row


def split(runs: list[Run]) -> dict[str, float]:
    """Percent of the time by what it was spent on, over all rounds.

    overhead is all that is neither model nor sampling: the scheduler, memory, batch building, text, and what
    lies between them. Its parts are there too, as far as they are measured one by one.

    >>> run = Run([[1]], 10.0, [], 0, times={"schedule": 0.1, "model": 9.0, "sample": 0.5})
    >>> {name: round(percent, 1) for name, percent in split([run]).items()}
    {'overhead': 5.0, 'schedule': 1.0, 'model': 90.0, 'sample': 5.0}
    """
    seconds = sum(run.seconds for run in runs)
    parts = [run.times or {} for run in runs]
    percent = {name: 100 * sum(part[name] for part in parts) / seconds for name in parts[0]}
    return {"overhead": 100 - percent["model"] - percent["sample"]} | percent


def machine(threads: int) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    cpu, flags = _cpu()
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "flags": {flag: flag in flags for flag in CPU_FLAGS},
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
    }


def _cpu() -> tuple[str, set[str]]:
    """The processor's name and instruction sets, as Linux tells them; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return fields.get("model name", platform.machine()), set(fields.get("flags", "").split())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- for eyes -----------------------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[Row], str]] = {
    "load": lambda row: row["load"],
    "dtype": lambda row: row["dtype"],
    "contender": lambda row: LABELS[row["contender"]],
    "tok/s": lambda row: f"{row['tokens_per_second']:.1f}",
    "first": lambda row: "n/a" if row["time_to_first_token"] is None else f"{row['time_to_first_token']:.2f}",
    "KV": lambda row: f"{row['kv_bytes'] / MIB:.0f}",
    "peak": lambda row: f"{row['peak_bytes'] / MIB:.0f}",
    "minipaged is": lambda row: "" if row["ratio"] is None else f"{row['ratio']:.2f}x",
    "same": lambda row: "" if row["same_tokens"] is None else f"{row['same_tokens']}/{row['requests']}",
}
WORDS = 3  # columns of words stand to the left, those of numbers to the right


def print_report(report: dict[str, Any]) -> None:
    """The table, in colour on a terminal and plain in a pipe; the machine above it, the split below."""
    info = report["machine"]
    print(
        f"{report['model']} in {info['threads']} of {info['cores']} cores of {info['cpu']}, "
        f"torch {info['torch']}, transformers {info['transformers'] or 'not installed'}"
    )
    cells = [[show(row) for show in COLUMNS.values()] for row in report["results"]]
    if sys.stdout.isatty():
        _rich_table(cells)
    else:
        print("\n".join(plain_table([list(COLUMNS), *cells])))
    for row in report["results"]:
        if "split" in row:
            print(_split_line(row))
    print(NOTES)
    for name, about in report["about"].items():
        print(f"{LABELS[name]}: {about}")
    for name, reason in report["left_out"].items():
        print(f"left out: {LABELS[name]}: {reason}")
    for name, reason in report["failed"].items():
        print(f"failed: {name}: {reason}")


def plain_table(lines: list[list[str]]) -> list[str]:
    """Columns as wide as their widest cell.

    >>> plain_table([["load", "dtype", "contender", "tok/s"], ["mixed", "fp32", "minipaged", "9.1"]])
    ['load   dtype  contender  tok/s', 'mixed  fp32   minipaged    9.1']
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < WORDS else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _rich_table(cells: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for i, name in enumerate(COLUMNS):
        style = "bold" if name == "tok/s" else None
        table.add_column(name, justify="left" if i < WORDS else "right", style=style)
    for before, line in zip([None, *cells], cells, strict=False):
        if before and before[:2] != line[:2]:
            table.add_section()
        table.add_row(*line)
    Console().print(table)


def _split_line(row: Row) -> str:
    part = row["split"]
    return (
        f"a step of minipaged, {row['load']} {row['dtype']}: model {part['model']:.1f} %, sampling "
        f"{part['sample']:.1f} %, scheduler, memory, batch building and text {part['overhead']:.1f} %"
    )
