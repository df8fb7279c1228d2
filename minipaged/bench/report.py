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
tok/s: useful output tokens per second, those of all beams. first: seconds to a request's first token, the median.
KV: MiB of keys and values at their peak (minipaged: the blocks in use; padded batches: the padded tensors;
continuous batching: its pool, made to fit the load; vLLM and llama.cpp: theirs, made to fit the largest load).
peak: MiB, the most that the process held in all.
minipaged is: its speed as a multiple of this one's, run beside it. same: requests with the same tokens as
minipaged's (where two tokens are about as likely, rounding may choose, and all that follows differs)."""


# Columns that stand there only if a row has something to say: the field of the row, and what the column is.
SOMETIMES = {
    "found": ("found", "percent of the prompts' tokens that the prefix cache had, and that were not computed again"),
    "gap": ("longest_gap", "milliseconds, the longest between two tokens of one output that follow each other"),
    "gap is": ("gap_ratio", "the gap, as a multiple of minipaged's beside it"),
    "speed is": ("speedup", "that of one who guesses, as a multiple of plain minipaged's beside it"),
    "guessed": ("guessed", "tokens that were guessed"),
    "right": ("guessed", "percent of the guesses that were right"),
    "a step": ("tokens_per_step", "tokens that a request got in a step, the mean"),
}


def summarize(load: Load, dtype: str, runs: dict[str, list[Run]]) -> list[Row]:
    """A row for each contender that has runs; medians over the rounds.

    runs: by contender, one Run for each round. Ratios to minipaged are taken within each round, between runs
    that stood side by side, and the median of these is reported.
    """
    return [_row(load, dtype, name, own, runs.get("minipaged", [])) for name, own in runs.items() if own]


def _row(load: Load, dtype: str, name: str, runs: list[Run], engine: list[Run]) -> Row:
    first = [run.first_token for run in runs if run.first_token]
    found = [run.found for run in runs if run.found is not None]
    waits = [run.longest_gap for run in runs if run.longest_gap is not None]
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
        "time_to_first_token_p90": median(map(p90, first)) if first else None,
        "found": median(found) if found else None,
        "longest_gap": median(waits) if waits else None,
        "kv_bytes": max(run.kv_bytes for run in runs),
        "peak_bytes": max(run.peak_bytes for run in runs),
        "ratio": None,
        "gap_ratio": None,
        "same_tokens": None,
        "speedup": None,
    }
    pairs = list(zip(engine, runs, strict=False))  # a contender that broke has fewer rounds
    if name != "minipaged" and pairs:
        row["ratio"] = median(ours.tokens_per_second / theirs.tokens_per_second for ours, theirs in pairs)
        gaps = [(ours.longest_gap, theirs.longest_gap) for ours, theirs in pairs]
        ratios = [theirs / ours for ours, theirs in gaps if ours and theirs]
        row["gap_ratio"] = median(ratios) if ratios else None
        row["same_tokens"] = agreement(engine[0], runs[0])
        if runs[0].guesses:
            row["speedup"] = median(theirs.tokens_per_second / ours.tokens_per_second for ours, theirs in pairs)
    row |= _of_guesses(load, runs[0])
    if runs[0].times is not None:
        row["split"] = split(runs)
    return row


def _of_guesses(load: Load, run: Run) -> Row:
    """What guessing gave; None for those who don't. A step gives one token, and those that were guessed right."""
    guessed, right = run.guesses or (None, 0)
    steps = load.num_output_tokens - right
    return {
        "guessed": guessed,
        "guessed_right": None if guessed is None else right,
        "tokens_per_step": None if guessed is None else load.num_output_tokens / steps,
    }


def p90(numbers: list[float]) -> float:
    """The smallest of them that 90 percent don't exceed.

    >>> p90([5.0, 1.0, 2.0, 3.0, 4.0]), p90([float(n) for n in range(100)])
    (5.0, 89.0)
    """
    return sorted(numbers)[-(-9 * len(numbers) // 10) - 1]


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
    "found": lambda row: "" if row["found"] is None else f"{100 * row['found']:.0f}",
    "gap": lambda row: "" if row["longest_gap"] is None else f"{1000 * row['longest_gap']:.0f}",
    "gap is": lambda row: "" if row["gap_ratio"] is None else f"{row['gap_ratio']:.2f}x",
    "guessed": lambda row: "" if row["guessed"] is None else f"{row['guessed']}",
    "right": lambda row: f"{100 * row['guessed_right'] / row['guessed']:.0f}" if row["guessed"] else "",
    "a step": lambda row: "" if row["tokens_per_step"] is None else f"{row['tokens_per_step']:.2f}",
    "speed is": lambda row: "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
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
    shown = columns(report["results"])
    cells = [[COLUMNS[name](row) for name in shown] for row in report["results"]]
    if sys.stdout.isatty():
        _rich_table(shown, cells)
    else:
        print("\n".join(plain_table([shown, *cells])))
    for row in report["results"]:
        if "split" in row:
            print(_split_line(row))
    print(NOTES)
    for name in shown:
        if name in SOMETIMES:
            print(f"{name}: {SOMETIMES[name][1]}.")
    for name, about in report["about"].items():
        print(f"{LABELS[name]}: {about}")
    for name, reason in report["left_out"].items():
        print(f"left out: {LABELS[name]}: {reason}")
    for name, reason in report["failed"].items():
        print(f"failed: {name}: {reason}")


def columns(rows: list[Row]) -> list[str]:
    """The table's columns: of those that stand there sometimes, the ones where a row has more than nothing."""
    return [name for name in COLUMNS if name not in SOMETIMES or any(row[SOMETIMES[name][0]] for row in rows)]


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


def _rich_table(names: list[str], cells: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for i, name in enumerate(names):
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
        f"a step of {LABELS[row['contender']]}, {row['load']} {row['dtype']}: model {part['model']:.1f} %, sampling "
        f"{part['sample']:.1f} %, scheduler, memory, batch building and text {part['overhead']:.1f} %"
    )
