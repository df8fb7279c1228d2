"""Figures from answers, by the names of vLLM's `vllm bench serve`, and a page of them.

    TTFT  time to first token, from the moment the request is sent
    TPOT  time per output token after the first: (last - first) / (tokens - 1), a number for each request
    ITL   inter-token latency: seconds between two events that brought tokens, a number for each pair
    E2EL  end-to-end latency, from the moment the request is sent to its last token

A failed request counts as a failure, and nowhere else.
"""

import sys
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from minipaged.bench.loads import Load, Run
from minipaged.bench.serve_answers import Answer, Played

Figures = dict[str, Any]
LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}
LIMITABLE = ("ttft", "tpot", "e2el")  # what --goodput knows, as in vLLM
PERCENTILES = (50, 90, 99)


def latencies(answers: list[Answer]) -> dict[str, list[float]]:
    """Seconds, of answers that did not fail, by the names of LATENCIES."""
    return {
        "ttft": [a.times[0] - a.sent for a in answers],
        "tpot": [tpot(a) for a in answers if a.num_tokens > 1],
        "itl": [now - then for a in answers for then, now in zip(a.times, a.times[1:], strict=False)],
        "e2el": [a.times[-1] - a.sent for a in answers],
    }


def tpot(answer: Answer) -> float:
    """Seconds; 0 if there is but one token.

    >>> tpot(Answer(sent=1.0, times=[2.0, 3.0, 6.0], num_tokens=5))
    1.0
    """
    return (answer.times[-1] - answer.times[0]) / (answer.num_tokens - 1) if answer.num_tokens > 1 else 0.0


def is_good(answer: Answer, limits: dict[str, float]) -> bool:
    """Whether an answer was there in time. limits: milliseconds, by the names of LIMITABLE."""
    took = {"ttft": answer.times[0] - answer.sent, "tpot": tpot(answer), "e2el": answer.times[-1] - answer.sent}
    return all(1000 * took[name] <= limit for name, limit in limits.items())


def figures_of(played: Played, limits: dict[str, float]) -> Figures:
    """What one run of a load over sockets gave."""
    done = [a for a in played.answers if not a.failure and a.times]
    failed = [a for a in played.answers if a.failure]
    told = [a.cached_tokens for a in done if a.cached_tokens is not None]
    figures = _throughput(
        played.seconds, len(done), sum(a.prompt_tokens for a in done), sum(a.num_tokens for a in done)
    ) | {
        "failed": len(failed),
        "failures": dict(Counter(str(a.failure) for a in failed)),
        "said": {str(a.failure): a.said for a in reversed(failed)},
        "request_goodput": sum(is_good(a, limits) for a in done) / played.seconds if limits else None,
        "cached_tokens": sum(told) if told else None,
        "most_open_connections": played.most_open,
        "client_cpu": played.cpu_seconds / played.seconds,
    }
    for name, seconds in latencies(done).items():
        figures |= _spread(name, seconds)
    return figures


def figures_of_run(load: Load, run: Run) -> Figures:
    """Of the same load without a server between. Its requests were all there at once, so latencies say nothing."""
    prompts = sum(load.lengths) - sum(load.outputs)
    found = None if run.found is None else round(run.found * prompts)
    return _throughput(run.seconds, len(load.prompts), prompts, load.num_output_tokens) | {
        "failed": 0, "failures": {}, "said": {}, "cached_tokens": found
    }  # fmt: skip


def _throughput(seconds: float, completed: int, tokens_in: int, tokens_out: int) -> Figures:
    return {
        "completed": completed, "duration": seconds, "total_input_tokens": tokens_in, "total_output_tokens": tokens_out,
        "request_throughput": completed / seconds, "output_throughput": tokens_out / seconds,
        "total_token_throughput": (tokens_in + tokens_out) / seconds,
    }  # fmt: skip


def _spread(name: str, seconds: list[float]) -> Figures:
    """Mean and percentiles in milliseconds, percentiles between two values by a straight line; None of nothing."""
    if not seconds:
        return {f"{kind}_{name}_ms": None for kind in ("mean", "median", "p90", "p99")}
    p50, p90, p99 = (1000 * float(value) for value in np.percentile(seconds, PERCENTILES))
    mean = 1000 * float(np.mean(seconds))
    return {f"mean_{name}_ms": mean, f"median_{name}_ms": p50, f"p90_{name}_ms": p90, f"p99_{name}_ms": p99}


# --- over the rounds --------------------------------------------------------------------------------------------------


def summarize(
    rounds: dict[str, list[Figures]], tokens: dict[str, list[list[int]]], first: str, closed: bool = True
) -> dict[str, Figures]:
    """A column for each contender: medians over its rounds, failures summed up, and how it stands to the first one.

    tokens: of each contender's first round, by request; they are compared with those of the engine offline, or
    with the first contender's. Ratios are of runs side by side, in a closed loop only: in an open one, the clients
    decide how much is done in a second.
    """
    judge = "offline" if "offline" in tokens else first
    columns = {}
    for name, runs in rounds.items():
        speeds = [[run["output_throughput"] for run in one] for one in (rounds.get(first, []), runs)]
        ratios = [ours / theirs for ours, theirs in zip(*speeds, strict=False) if theirs]
        columns[name] = _over(runs) | {
            "ratio": median(ratios) if closed and name != first and ratios else None,
            "same_tokens": None if name == judge or judge not in tokens else _same(tokens[judge], tokens[name]),
            "requests": len(tokens[name]),
            "rounds": runs,
        }
    return columns


def _over(runs: list[Figures]) -> Figures:
    """Medians; but failures are summed up, with one example of each kind."""
    return {key: _median([run[key] for run in runs]) for key in runs[0] if key not in ("failures", "said")} | {
        "failed": sum(run["failed"] for run in runs),
        "failures": dict(sum((Counter(run["failures"]) for run in runs), Counter())),
        "said": {kind: said for run in reversed(runs) for kind, said in run["said"].items()},
    }


def _median(values: list[Any]) -> Any:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _same(one: list[list[int]], other: list[list[int]]) -> int:
    return sum(a == b for a, b in zip(one, other, strict=True) if a)


# --- for eyes ---------------------------------------------------------------------------------------------------------


def _number(key: str, digits: int = 2) -> Callable[[Figures], str]:
    return lambda column: "" if column.get(key) is None else f"{column[key]:.{digits}f}"


def _percent(part: str, whole: str | None = None) -> Callable[[Figures], str]:
    def show(column: Figures) -> str:
        whole_is = column[whole] if whole else 1
        return "" if column.get(part) is None or not whole_is else f"{100 * column[part] / whole_is:.1f} %"

    return show


RATIO = "  {} is"  # the first contender: so many times as fast as this one, run beside it
LINES: dict[str, Callable[[Figures], str]] = {
    "Successful requests": _number("completed", 0),
    "Failed requests": _number("failed", 0),
    "Benchmark duration (s)": _number("duration"),
    "Total input tokens": _number("total_input_tokens", 0),
    "Total generated tokens": _number("total_output_tokens", 0),
    "Request throughput (req/s)": _number("request_throughput"),
    "Request goodput (req/s)": _number("request_goodput"),
    "Output token throughput (tok/s)": _number("output_throughput"),
    RATIO: lambda column: "" if column["ratio"] is None else f"{column['ratio']:.2f}x",
    "Same tokens": lambda c: "" if c["same_tokens"] is None else f"{c['same_tokens']} of {c['requests']}",
    "Input found in a prefix cache": _percent("cached_tokens", "total_input_tokens"),
    "Connections open at once, at most": _number("most_open_connections", 0),
    "Clients' share of a core": _percent("client_cpu"),
} | {
    f"{kind} {word} (ms)": _number(f"{kind.lower()}_{name}_ms")
    for name, word in LATENCIES.items() for kind in ("Mean", "Median", "P90", "P99")
}  # fmt: skip
SECTIONS = ("Request throughput (req/s)", "Same tokens", *(f"Mean {word} (ms)" for word in LATENCIES.values()))


def _heading(result: dict[str, Any]) -> str:
    return f"{result['load']}, {result['arrivals']}, {result['requests']} requests"


def _table(result: dict[str, Any], labels: dict[str, str]) -> Table:
    """Contenders side by side. Lines that nobody fills are left out."""
    terminal, columns = sys.stdout.isatty(), result["contenders"]
    first = labels[next(iter(columns))] if columns else ""
    table = Table(box=box.ROUNDED if terminal else None, pad_edge=terminal)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(labels[name], justify="right")
    for line, show in LINES.items():
        cells = [show(column) for column in columns.values()]
        if terminal and line in SECTIONS:
            table.add_section()
        if any(cells):
            table.add_row(line.format(first), *cells, style="bold" if "Output token" in line else None)
    return table


def print_report(report: dict[str, Any], labels: dict[str, str]) -> None:
    """In colour on a terminal, plain in a pipe."""
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    info = report["machine"]
    console.print(f"{report['model']} in {info['threads']} of {info['cores']} cores of {info['cpu']}", markup=False)
    for result in report["results"]:
        console.print(f"\n{_heading(result)}", markup=False)
        console.print(_table(result, labels))
    for result in report["results"]:
        for name, column in result["contenders"].items():
            for kind, count in column["failures"].items():
                where = f"{labels[name]}, {result['load']}, {result['arrivals']}"
                console.print(f"{where}: {count} failed: {kind}: {column['said'][kind]}", markup=False)
    for name, why in (report["left_out"] | report["failed"]).items():
        console.print(f"{labels.get(name, name)}: {why}", markup=False)
