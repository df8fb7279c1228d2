"""What sharing is worth: Figures 14, 15 and 16."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from minipaged.experiments import paper
from minipaged.experiments.beams import REQUESTS, saving
from minipaged.experiments.figures.rates import LOADS, curves_data, draw_curves, walls
from minipaged.experiments.report import Point, Report, Table, compare, verdict
from minipaged.experiments.runs import SYSTEMS, Run
from minipaged.experiments.study import Study
from minipaged.teaching import plots

# Requests that all come at once: many times as many as a batch holds, so that its start and its end don't count.
CROWD = {"samples": 6000, "beams": 1200}


def figure14(study: Study) -> Report:
    """Parallel sampling and beam search on Alpaca: what sharing is worth."""
    systems = ("max", "pow2", "oracle", "paged")
    kinds = [("samples", 1), *((kind, n) for kind in CROWD for n in (2, 4, 6))]
    runs = [
        Run(system, "13b", "alpaca", 1000.0, study.seconds(CROWD[kind] / 1000), study.seed, samples=n,
            beams=kind == "beams")
        for kind, n in reversed(kinds) for system in reversed(systems)
    ]  # fmt: skip
    found = {(run.beams, run.samples, run.system): result.throughput
             for run, result in zip(runs, study.results("Figure 14", runs), strict=True)}  # fmt: skip
    rates = {(kind, n): {system: found[kind == "beams", n, system] for system in systems} for kind, n in kinds}
    cells = [
        [f"{n} {kind}", *(f"{rate[system]:.2f}" for system in systems), f"{rate['paged'] / rate['oracle']:.2f}x"]
        for (kind, n), rate in rates.items()
    ]  # fmt: skip
    compared = [
        Point(f"{n} {kind}", rates[kind, n]["paged"] / rates[kind, n]["oracle"], theirs, "recalled")
        for (kind, n), theirs in paper.OVER_ORACLE.items()
    ]
    return Report(
        "fig14", "Figure 14: several answers to a prompt (OPT-13B, Alpaca)",
        {f"{n} {kind}": rate for (kind, n), rate in rates.items()},
        [
            Table("Requests a second, always a queue", ["", "Max", "Pow2", "Oracle", "ours", "/Oracle"], cells),
            compare("Ours by Orca (Oracle)", compared),
        ],
        [
            "The baselines share nothing, and copy beams for nothing: that flatters them. The lead grows with the "
            "number of answers, less than in the paper: hundreds of sequences fit, their arithmetic limits, and then "
            "room for more of them is worth less."
        ],
        lambda: _draw14(rates), "Two panels: our lead over Pow2 and Oracle grows with the number of answers",
    )  # fmt: skip


def _draw14(rows: Mapping[tuple[str, int], Mapping[str, float]]) -> Figure:
    with plots.drawing("Parallel sampling", "Beam search") as (picture, axes):
        for one, kind in zip(axes, ("samples", "beams"), strict=True):
            counts = [n for name, n in rows if name == kind]
            for system in ("max", "pow2", "oracle"):
                ratios = [rows[kind, n]["paged"] / rows[kind, n][system] for n in counts]
                plots.line(one, counts, ratios, SYSTEMS[system])
            plots.label(one, kind, "our throughput by theirs")
            plots.logarithmic(one)
            one.set_xticks(counts)
    return picture


# --- Figure 15 ------------------------------------------------------------------------------------------------------

METHODS = {"samples": "parallel sampling", "beams": "beam search"}


def figure15(study: Study) -> Report:
    """Blocks saved by sharing, of those that there would be without."""
    bars = [(load, method, n) for load in ("sharegpt", "alpaca") for method in METHODS for n in (6, 4, 2)]
    asked = [(*bar, math.ceil(study.seconds(REQUESTS[bar[0], bar[1]])), study.seed) for bar in bars]
    saved = dict(zip(reversed(bars), reversed(study.each("Figure 15", saving, asked)), strict=True))
    cells = [
        [f"{LOADS[load]}, {METHODS[method]}", *(f"{saved[load, method, n]:.2f}" for n in (2, 4, 6))]
        for load in ("alpaca", "sharegpt") for method in METHODS
    ]  # fmt: skip
    points = [
        Point(f"{LOADS[load]}, {n} {method}", saved[load, method, n], theirs, "printed", study.goal(5), relative=False)
        for (method, load), printed in paper.SAVED.items() for n, theirs in printed.items()
    ]  # fmt: skip
    ranges = [
        verdict(f"ShareGPT, {METHODS[method]}: within {low}-{high} (said)",
                all(low <= saved[load, method, n] <= high for n in (2, 4, 6)))
        for (method, load), (low, high) in paper.SAVED_RANGE.items()
    ]  # fmt: skip
    return Report(
        "fig15", "Figure 15: memory saved by sharing (OPT-13B)",
        {f"{load} {n} {method}": value for (load, method, n), value in saved.items()},
        [Table("Percent of blocks", ["", "2", "4", "6"], cells), compare("Points of percent", points),
         Table("", ["", "goal"], ranges)],
        ["Beams part as those of a small real model do: see divergence.py. A larger one's may part otherwise."],
        lambda: _draw15(saved), "Lines that rise: beams share 38 to 80 percent of their memory, samples 6 to 27",
    )  # fmt: skip


def _draw15(saved: Mapping[tuple[str, str, int], float]) -> Figure:
    with plots.drawing(*(LOADS[load] for load in ("alpaca", "sharegpt"))) as (picture, axes):
        for one, load in zip(axes, ("alpaca", "sharegpt"), strict=True):
            for method, name in METHODS.items():
                plots.line(one, (2, 4, 6), [saved[load, method, n] for n in (2, 4, 6)], name, at=1, dy=12)
                if theirs := paper.SAVED.get((method, load)):
                    look: Any = dict(marker="D", facecolors="white", edgecolors=plots.INK, zorder=3)
                    one.scatter(list(theirs), list(theirs.values()), **look)
            one.set(ylim=(0, 100), xlim=(1.5, 6.5), xticks=(2, 4, 6))
            plots.label(one, "samples or beams (diamonds: paper)", "percent of blocks saved")
    return picture


# --- Figure 16: prompts that begin alike ----------------------------------------------------------------------------


def figure16(study: Study) -> Report:
    """Translation with one or five examples before every sentence: 80 or 341 tokens that all prompts share."""
    runs = [
        Run(system, "13b", "translation", 0, study.seconds(600), study.seed, prefix=prefix)
        for prefix in paper.PREFIX_SPEEDUP for system in ("paged", "oracle")
    ]  # fmt: skip
    points = dict(zip(runs, study.sweeps("Figure 16", runs), strict=True))
    panels = {
        prefix: {run.system: points[run] for run in runs if run.prefix == prefix} for prefix in paper.PREFIX_SPEEDUP
    }
    rates = {prefix: walls(curves) for prefix, curves in panels.items()}
    compared = [
        Point(f"{prefix} tokens in common", rates[prefix]["paged"] / rates[prefix]["oracle"], theirs, "said")
        for prefix, theirs in paper.PREFIX_SPEEDUP.items()
    ]
    cells = [[f"{prefix} tokens", f"{rate['oracle']:.2f}", f"{rate['paged']:.2f}"] for prefix, rate in rates.items()]
    return Report(
        "fig16", "Figure 16: prompts that begin alike (LLaMA-13B, translation)",
        curves_data({(prefix,): curves for prefix, curves in panels.items()}),
        [
            Table("Requests a second at 1 s/token", ["in common", "Orca (Oracle)", "ours"], cells),
            compare("Throughput, ours by Orca (Oracle)", compared),
        ],
        ["LLaMA-13B has the sizes of OPT-13B. Lengths of sentences are our guess: see loads.py."],
        lambda: draw_curves({("13b", f"prefix of {prefix}"): curves for prefix, curves in panels.items()}, {}),
        "Two panels: with a prefix in common minipaged takes 1.6 and 2.9 times as many requests",
    )  # fmt: skip
