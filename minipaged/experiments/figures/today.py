"""Not in the paper: an eight-bit cache and four-bit weights, under its loads and on its smallest server.

Small numbers help twice. They leave room: weights for the cache, and the cache for more tokens. And they are read in
less time. They don't multiply in less time: arithmetic stays in fp16, so a step that waits for it gets no faster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace

from minipaged.experiments.figures.rates import HOUR, LOADS, THRESHOLD, curves_data, draw_curves, number, walls
from minipaged.experiments.hardware import FOUR_BITS, GIB, HOST_PER_REQUEST, SERVERS
from minipaged.experiments.report import Report, Table
from minipaged.experiments.runs import LATENCY, Points, Result, Run
from minipaged.experiments.study import Study

NUMBERS = {"13b": "fp16", "13b-kv8": "8-bit cache", "13b-w4": "4-bit weights", "13b-w4-kv8": "both"}
SECONDS = {"sharegpt": HOUR, "alpaca": HOUR / 4}  # how long requests come; ShareGPT's are those of Figure 12
# Requests a second, and seconds: more than any can take, so that somebody always waits once the memory is full.
FULL = {"sharegpt": (24.0, HOUR / 12), "alpaca": (300.0, HOUR / 60)}
BLOCK = 16
NOTES = [
    "Nobody measured this, and the paper has no numbers to compare it with: it is what the cost model answers, with "
    "the constants of all figures (hardware.py). fp16 on ShareGPT is minipaged's curve of Figure 12; on Alpaca "
    "requests come for a quarter of an hour here, not for one.",
    "8-bit cache: a byte for each number, and an fp32 scale for each token and head, of its key and of its value, as "
    "this engine's: D + 4 bytes instead of 2 D. 4-bit weights: groups of 128, each with an fp16 scale and a zero of 4 "
    f"bits, as GPTQ and AWQ store them, so {FOUR_BITS:.2f} bits; the embedding, which is OPT's output matrix too, "
    "stays in fp16. What the weights leave is room for keys and values.",
    "Arithmetic stays in fp16, so it takes as long as ever; and making numbers of the codes costs nothing here, which "
    "flatters them. Weights in fp16 are waited for up to 179 tokens a step, in four bits up to 49: with more, room is "
    "all that small weights are worth. The host's work for each request is that of 2023, calibrated by Figure 13; "
    "engines of today hide it behind the GPU's: the last column.",
]


def today(study: Study) -> Report:
    """What fits, and how many requests a second, with smaller numbers."""
    sweeps = [
        Run("paged", server, load, 0, study.seconds(SECONDS[load]), study.seed)
        for load in SECONDS for server in reversed(NUMBERS)
    ]  # fmt: skip  # the longest first
    points = dict(zip(sweeps, study.sweeps("Today", sweeps), strict=True))
    for _ in range(0 if study.settings.quick else 2):
        middles = [(run, rate) for run in sweeps for rate in steep(points[run])]
        between = study.results("Today, between", [replace(run, rate=rate) for run, rate in middles])
        for (run, rate), result in zip(middles, between, strict=True):
            points[run] = sorted([*points[run], (rate, result)], key=lambda point: point[0])
    crowds = [
        Run("paged", server, load, rate, study.seconds(seconds), study.seed)
        for load, (rate, seconds) in FULL.items() for server in NUMBERS
    ]  # fmt: skip
    found = dict(zip(crowds, study.results("Today, full", crowds), strict=True))
    full = {load: {run.server: found[run] for run in crowds if run.load == load} for load in FULL}
    panels = {
        ("13b", load): {run.server: points[run] for run in reversed(sweeps) if run.load == load} for load in SECONDS
    }
    data = curves_data(panels) | {
        f"full {load}": {name: asdict(result) for name, result in results.items()} for load, results in full.items()
    }
    return Report(
        "today", "Today: an 8-bit cache and 4-bit weights (OPT-13B on one A100)", data,
        [_fits(full), _rates(panels), *(_steps(load, full[load]) for load in full)],
        [THRESHOLD, *NOTES],
        lambda: draw_curves(panels, {}, NUMBERS),
        "Two panels: the wall moves to the right with an 8-bit cache, with 4-bit weights, and most with both",
    )  # fmt: skip


def steep(points: Points) -> list[float]:
    """The middle of each wide step in which the latency rises: a straight line would pass far above the true one.

    `sweep` steps wide where nearly all requests of its first guess fit at once, so that it guesses too much.
    """
    return [
        float(f"{math.sqrt(low * high):.3g}")
        for (low, before), (high, after) in zip(points, points[1:], strict=False)
        if high > 1.2 * low and before.latency < LATENCY and after.latency > 2 * before.latency
    ]  # fmt: skip


def _fits(full: Mapping[str, Mapping[str, Result]]) -> Table:
    """The memory, and the mean number of requests in it while others wait."""
    rows = []
    for name, called in NUMBERS.items():
        server = SERVERS[name]
        batches = [f"{one[name].mean_batch:.0f}" for one in full.values()]
        rows.append([
            called, f"{server.weight_bytes / 1e9:.1f}", f"{server.kv_memory / GIB:.1f}", f"{server.kv_bytes:,}",
            f"{server.num_slots:,}", f"{server.num_slots // BLOCK:,}", *batches,
        ])  # fmt: skip
    header = ["", "weights GB", "KV GiB", "bytes/token", "tokens", "blocks", *(LOADS[load] for load in full)]
    return Table("What fits: tokens, blocks, and requests on average while others wait", header, rows)


def _rates(panels: Mapping[tuple[str, str], Mapping[str, Points]]) -> Table:
    rates = [walls(curves) for curves in panels.values()]
    rows = []
    for name, called in NUMBERS.items():
        cells = [[number(one[name], "{:.2f}"), number(one[name] / one["13b"], "{:.2f}x")] for one in rates]
        rows.append([called, *(cell for pair in cells for cell in pair)])
    header = [name for _, load in panels for name in (LOADS[load], "by fp16")]
    return Table("Requests a second at 1 s/token (-: too short a trace)", ["", *header], rows)


def parts(name: str, full: Result) -> dict[str, float]:
    """Milliseconds of a step that gives everybody in a full memory a token. Of the first two the longer one counts."""
    server, batch = SERVERS[name], full.mean_batch
    starting = server.matrix_seconds(0) - server.reading_seconds()
    seconds = {
        "weights": server.reading_seconds(),
        "arithmetic": server.computing_seconds(batch),
        "cache": full.shares["tokens"] / 100 * server.num_slots * server.context_seconds(BLOCK),
        "kernels": starting,
        "host": batch * HOST_PER_REQUEST,
    }
    return {part: 1e3 * one for part, one in seconds.items()}


def _steps(load: str, full: Mapping[str, Result]) -> Table:
    rows, header = [], [""]
    for name, called in NUMBERS.items():
        one = parts(name, full[name])
        gpu = max(one["weights"], one["arithmetic"]) + one["cache"] + one["kernels"]
        speeds = [f"{1e3 * full[name].mean_batch / step:.0f}" for step in (gpu + one["host"], gpu)]
        rows.append([called, *(f"{part:.1f}" for part in one.values()), *speeds])
        header = ["", *one, "tok/s", "if host hidden"]
    title = f"{LOADS[load]}, memory full: milliseconds of a step (of weights and arithmetic the longer counts)"
    return Table(title, header, rows)
