"""How many requests a second: Figures 12, 14, 16 and 17.

Every system is given more and more of them, until its normalized latency (seconds per token of the answer) is beyond
one second. A multiple of one system's rate to another's means little without this threshold, so it stands everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from minipaged.experiments import paper
from minipaged.experiments.hardware import SERVERS
from minipaged.experiments.report import Point, Report, Table, compare, verdict
from minipaged.experiments.runs import LATENCY, SYSTEMS, Points, Run, crossing
from minipaged.experiments.study import Study
from minipaged.teaching import plots

HOUR = 3600.0
TRACES = {"13b": HOUR, "66b": HOUR, "175b": HOUR / 4}  # seconds, as in the paper (section 6.1)
LOADS = {"sharegpt": "ShareGPT", "alpaca": "Alpaca", "chat": "chat", "translation": "translation"}
Curves = Mapping[str, Points]  # by system


def figure12(study: Study) -> Report:
    """Latency over request rate: three models, two data sets, five systems."""
    trace = study.settings.trace
    loads = [str(trace)] if trace else ["sharegpt", "alpaca"]
    runs = [
        Run(system, server, load, 0, study.seconds(TRACES[server]), study.settings.seed)
        for load in reversed(loads) for server in TRACES for system in reversed(SYSTEMS)
    ]  # fmt: skip  # the longest first
    points = dict(zip(runs, study.sweeps("Figure 12", runs), strict=True))
    panels = {
        (server, load): {run.system: points[run] for run in reversed(runs) if (run.server, run.load) == (server, load)}
        for load in loads for server in TRACES
    }  # fmt: skip
    tables = [_rates(panels)]
    if not trace:
        tables += [_crossings(panels["13b", load], load) for load in loads] + [_order(panels)]
    return Report(
        "fig12", "Figure 12: latency over request rate", _data(panels), tables, [THRESHOLD],
        lambda: draw_curves(panels, {("13b", load): paper.CROSSINGS.get(load, {}) for load in loads}),
        "Six panels: latency stays low, and then rises like a wall; minipaged's wall is furthest to the right",
    )  # fmt: skip


THRESHOLD = (
    f"Rates are those at which the normalized latency crosses {LATENCY:g} second per token, over the whole trace. An\n"
    "overloaded system's latency depends on how long the trace is, so the threshold is part of the number."
)


def walls(curves: Curves) -> dict[str, float]:
    """Requests a second at which each system's latency crosses the threshold."""
    return {system: crossing([(rate, result.latency) for rate, result in points]) for system, points in curves.items()}


def _rates(panels: Mapping[tuple[str, str], Curves]) -> Table:
    rows = []
    for (server, load), curves in panels.items():
        rates = walls(curves)
        ratios = [rates["paged"] / rates[system] for system in rates if system != "paged"]
        rows.append([
            f"{SERVERS[server].model}, {LOADS.get(load, Path(load).name)}",
            *(f"{rate:.2f}" for rate in rates.values()), *(f"{ratio:.1f}x" for ratio in reversed(ratios)),
        ])  # fmt: skip
    header = ["req/s at 1 s/token", "FT", "Max", "Pow2", "Oracle", "ours", "/Oracle", "/Pow2", "/Max", "/FT"]
    return Table("What each system can take, and ours by theirs", header, rows)


def _crossings(curves: Curves, load: str) -> Table:
    rates, theirs = walls(curves), paper.CROSSINGS[load]
    allowed = 25 if load == "sharegpt" else None
    points = [Point(SYSTEMS[system], rates[system], theirs[system], "read", allowed) for system in theirs]
    return compare(f"OPT-13B, {LOADS[load]}: requests a second at 1 s/token", points)


def _order(panels: Mapping[tuple[str, str], Curves]) -> Table:
    rows = []
    for (server, load), curves in panels.items():
        rates = list(walls(curves).values())
        met = all(low < high for low, high in zip(rates, rates[1:], strict=False))
        rows.append(verdict(f"{SERVERS[server].model}, {LOADS[load]}: FT < Max < Pow2 < Oracle < ours", met))
    return Table("The order of the systems", ["panel", "goal"], rows)


def _data(panels: Mapping[tuple[Any, ...], Curves]) -> dict[str, Any]:
    return {
        " ".join(map(str, panel)): {
            system: [{"rate": rate, **asdict(result)} for rate, result in points] for system, points in curves.items()
        }
        for panel, curves in panels.items()
    }


def draw_curves(
    panels: Mapping[tuple[str, str], Curves], theirs: Mapping[tuple[str, str], Mapping[str, float]], rows: int = 2
) -> Figure:
    """A panel for each (server, load). theirs: the paper's crossings, as hollow marks on the upper edge."""
    titles = [f"{SERVERS[server].model}, {LOADS.get(load, 'trace')}" for server, load in panels]
    rows = rows if len(panels) > 3 else 1
    with plots.drawing(*titles, rows=rows) as (picture, axes):
        for one, (panel, curves) in zip(axes, panels.items(), strict=True):
            for place, (system, points) in enumerate(curves.items()):
                look: Any = dict(color=plots.COLORS[place], marker=plots.MARKERS[place])
                line = dict(look, linestyle=plots.DASHES[place], label=SYSTEMS[system])
                one.plot([rate for rate, _ in points], [result.latency for _, result in points], **line)
                if system in theirs.get(panel, {}):
                    mark = dict(look, linestyle="", markerfacecolor="white", markersize=7, clip_on=False, zorder=5)
                    one.plot([theirs[panel][system]], [LATENCY], **mark)
            one.set(ylim=(0, LATENCY), xlim=(0, None))
            plots.label(one, "requests a second", "seconds per token")
        picture.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return picture


# --- Figure 14: several answers to a prompt -------------------------------------------------------------------------


def figure14(study: Study) -> Report:
    """Parallel sampling and beam search on Alpaca: what sharing is worth."""
    seconds, seed = study.seconds(600), study.settings.seed
    runs = [
        Run(system, "13b", "alpaca", 0, seconds / (4 if beams else 1), seed, samples=samples, beams=beams)
        for beams in (True, False) for samples in (6, 4, 2) for system in ("paged", "oracle", "pow2", "max")
    ] + [Run(system, "13b", "alpaca", 0, seconds, seed) for system in ("paged", "oracle", "pow2", "max")]  # fmt: skip
    points = dict(zip(runs, study.sweeps("Figure 14", runs), strict=True))
    rows: dict[tuple[str, int], dict[str, float]] = {}
    for run in sorted(runs, key=lambda run: (run.beams, run.samples)):
        rows.setdefault(("beams" if run.beams else "samples", run.samples), {}).update(walls({run.system: points[run]}))
    header = ["req/s at 1 s/token", "Max", "Pow2", "Oracle", "ours", "/Oracle"]
    cells = [
        [f"{n} {kind}"] + [f"{rates[name]:.2f}" for name in ("max", "pow2", "oracle", "paged")]
        + [f"{rates['paged'] / rates['oracle']:.2f}x"] for (kind, n), rates in rows.items()
    ]  # fmt: skip
    compared = [
        Point(f"{n} {kind}", rows[kind, n]["paged"] / rows[kind, n]["oracle"], theirs, "recalled")
        for (kind, n), theirs in paper.OVER_ORACLE.items()
    ]
    return Report(
        "fig14", "Figure 14: several answers to a prompt (OPT-13B, Alpaca)",
        {f"{n} {kind}": rates for (kind, n), rates in rows.items()},
        [Table("What each system can take", header, cells), compare("Ours by Orca (Oracle)", compared)],
        ["The baselines share nothing, and copy beams for nothing: that flatters them. " + "Traces are shorter here."],
        lambda: _draw14(rows), "Two panels: the more answers to a prompt, the larger our lead over Orca (Oracle)",
    )  # fmt: skip


def _draw14(rows: Mapping[tuple[str, int], Mapping[str, float]]) -> Figure:
    with plots.drawing("Parallel sampling", "Beam search") as (picture, axes):
        for one, kind in zip(axes, ("samples", "beams"), strict=True):
            counts = [n for name, n in rows if name == kind]
            for system in ("max", "pow2", "oracle"):
                ratios = [rows[kind, n]["paged"] / rows[kind, n][system] for n in counts]
                plots.line(one, counts, ratios, f"by {SYSTEMS[system]}")
            plots.label(one, kind, "ours by theirs, at 1 s/token")
            one.set(ylim=(0, None), xticks=counts)
    return picture


# --- Figure 16: prompts that begin alike ----------------------------------------------------------------------------


def figure16(study: Study) -> Report:
    """Translation with one or five examples before every sentence: 80 or 341 tokens that all prompts share."""
    runs = [
        Run(system, "13b", "translation", 0, study.seconds(600), study.settings.seed, prefix=prefix)
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
        _data({(prefix,): curves for prefix, curves in panels.items()}),
        [
            Table("Requests a second at 1 s/token", ["in common", "Orca (Oracle)", "ours"], cells),
            compare("Throughput, ours by Orca (Oracle)", compared),
        ],
        ["LLaMA-13B has the sizes of OPT-13B. Lengths of sentences are our guess: see loads.py."],
        lambda: _draw16(panels), "Two panels: with a shared prefix minipaged takes several times as many requests",
    )  # fmt: skip


def _draw16(panels: Mapping[int, Curves]) -> Figure:
    with plots.drawing(*(f"{prefix} tokens in common" for prefix in panels)) as (picture, axes):
        for one, curves in zip(axes, panels.values(), strict=True):
            for system, points in reversed(list(curves.items())):
                shown = [(rate, result.latency) for rate, result in points if result.latency <= LATENCY]
                plots.line(one, [rate for rate, _ in shown], [latency for _, latency in shown], SYSTEMS[system])
            one.set(ylim=(0, None), xlim=(0, None))
            plots.label(one, "requests a second", "seconds per token")
    return picture


# --- Figure 17: chats ------------------------------------------------------------------------------------------------


def figure17(study: Study) -> Report:
    """Chats: the prompt is the last 1024 tokens of what was said, so most prompts are long."""
    runs = [
        Run(system, "13b", "chat", 0, study.seconds(HOUR), study.settings.seed)
        for system in ("paged", "oracle", "pow2", "max")
    ]  # fmt: skip
    points = study.sweeps("Figure 17", runs)
    curves = {run.system: found for run, found in reversed(list(zip(runs, points, strict=True)))}
    rates = walls(curves)
    compared = [
        Point(f"by {SYSTEMS[name]}", rates["paged"] / rates[name], paper.CHAT_SPEEDUP, "recalled")
        for name in ("max", "pow2", "oracle")
    ]
    cells = [[SYSTEMS[name], f"{rate:.2f}"] for name, rate in rates.items()]
    return Report(
        "fig17", "Figure 17: chats of several rounds (OPT-13B)", _data({("13b", "chat"): curves}),
        [Table("Requests a second at 1 s/token", ["", "req/s"], cells), compare("Our rate", compared)],
        ["More than half of the prompts have 1024 tokens, so with any answer a buddy allocator gives 2048."],
        lambda: draw_curves({("13b", "chat"): curves}, {}), "The three Orcas lie on each other; minipaged takes more",
    )  # fmt: skip
