"""The report for eyes: a table for each part, the machine above, what the columns mean below."""

import sys
from collections.abc import Callable
from typing import Any

from kernels.bench.cells import WHAT
from kernels.bench.runner import Row


def _micro(name: str) -> Callable[[Row], str]:
    return lambda row: f"{1e6 * row['seconds'][name]:.1f}" if name in row["seconds"] else "n/a"


def _spread(row: Row) -> str:
    return f"{100 * row['spread']['ours']:.0f} %"


def _times(key: str) -> Callable[[Row], str]:
    return lambda row: "n/a" if row[key] is None else f"{row[key]:.2f}x"


def _teraflops(row: Row) -> str:
    return "n/a" if row["peer"] is None else f"{row['tflops'][row['peer']]:.2f}"


CELL: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row["model"],
    "batch": lambda row: str(row["batch"]),
    "context": lambda row: str(row["context"]),
}
BANDWIDTH: dict[str, Callable[[Row], str]] = {
    "us": _micro("ours"),
    "spread": _spread,
    "GB/s": lambda row: f"{row['bandwidth'] / 1e9:.1f}",
    "copy GB/s": lambda row: f"{row['copy_bandwidth'] / 1e9:.1f}",
    "of copy": lambda row: f"{100 * row['of_copy']:.0f} %",
}
PEER = {"peer": lambda row: row["peer"] or "n/a"}
COLUMNS: dict[str, dict[str, Callable[[Row], str]]] = {
    "decode": CELL | BANDWIDTH,
    "prefill": CELL | {
        "us": _micro("ours"), "spread": _spread, "TFLOP/s": lambda row: f"{row['tflops']['ours']:.2f}",
        "of product": lambda row: f"{100 * row['of_product']:.0f} %",
    } | PEER | {
        "its TFLOP/s": _teraflops, "ours is": _times("of_peer"),
    },
    "contiguous": CELL | BANDWIDTH | PEER | {
        "its us": lambda row: _micro(row["peer"])(row), "ours is": _times("of_peer"),
        "flex us": _micro("flex"), "ours is ": _times("of_flex"),
    },
    "paging": CELL | {"block": lambda row: str(row["block_size"])} | BANDWIDTH | {
        "ordered us": _micro("ordered"), "scrambling": lambda row: f"{100 * row['scrambling_costs']:+.1f} %",
    },
}  # fmt: skip
TITLES = {
    "decode": "Decode: one query a sequence, block size 16, scrambled tables",
    "prefill": "Prefill: causal, all tokens of the context, beside PyTorch's attention on contiguous tensors",
    "contiguous": "Decode beside PyTorch: its best attention on contiguous tensors, FlexAttention on pages of 128",
    "paging": "Paging: block sizes, and scrambled tables against ordered ones",
}
NOTES = """\
us: microseconds of one call for one layer, the median. spread: from its fastest to its slowest stretch of time; a
smaller difference is noise. GB/s: keys and values read, in that time.
of copy: this beside the bytes that a large copy reads and writes, timed in turns with it.
of product: operations a second, beside those of a large matrix product, timed in turns with it.
ours is: our speed as a multiple of the one's to the left. scrambling: how much longer than with ordered tables."""


def print_report(report: dict[str, Any]) -> None:
    """The tables, in colour on a terminal and plain in a pipe; the machine above them."""
    print(header(report))
    for what in WHAT:
        rows = [row for row in report["results"] if row["what"] == what]
        if not rows:
            continue
        measured = [row for row in rows if "seconds" in row]
        lines = [list(COLUMNS[what]), *([show(row) for show in COLUMNS[what].values()] for row in measured)]
        if sys.stdout.isatty():
            _rich_table(TITLES[what], lines)
        else:
            print("\n".join(["", TITLES[what], *plain_table(lines)]))
        for row in rows:
            for key in ("skipped", "failed"):
                if key in row:
                    print(f"{key}: {row['model']}, {row['batch']} x {row['context']}: {row[key]}")
    print(f"\n{NOTES}")
    slow = sorted({name for row in report["results"] for name in row.get("without_graph", ())})
    if slow:
        print(f"timed with their start from Python, since no CUDA graph holds them: {', '.join(slow)}")
    for name, reason in report["left_out"].items():
        print(f"left out: {name}: {reason}")


def header(report: dict[str, Any]) -> str:
    info = report["machine"]
    on = f"{info['threads']} of {info['cores']} cores of {info['cpu']}"
    versions = f"torch {info['torch']}, Triton {info['triton'] or 'not installed'}"
    if info["device"] == "cuda":
        on = f"{info['gpu']} ({info['memory_bytes'] / 2**30:.0f} GiB, {info['multiprocessors']} multiprocessors)"
        versions += f", CUDA {info['cuda']}"
    return f"kernels {report['kernels']} in {report['dtype']} on {on}, {versions}"


def plain_table(lines: list[list[str]]) -> list[str]:
    """Columns as wide as their widest cell; the first one is of words, the others of numbers.

    >>> plain_table([["model", "us"], ["smollm2", "9.1"]])
    ['model     us', 'smollm2  9.1']
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _rich_table(title: str, lines: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(lines[0]):
        style = "bold" if name in ("of copy", "ours is") else None
        table.add_column(name, justify="right" if i else "left", style=style)
    for before, line in zip(lines, lines[1:], strict=False):
        if before is not lines[0] and before[0] != line[0]:
            table.add_section()
        table.add_row(*line)
    Console().print(table)
