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
from matplotlib.lines import Line2D

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
        (server, Path(load).name): {r.system: points[r] for r in reversed(runs) if (r.server, r.load) == (server, load)}
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
            f"{SERVERS[server].model}, {LOADS.get(load, load)}",
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
    panels: Mapping[tuple[str, str], Curves], theirs: Mapping[tuple[str, str], Mapping[str, float]]
) -> Figure:
    """A panel for each (server, load). theirs: the paper's crossings, as hollow marks on the upper edge."""
    titles = [f"{SERVERS[server].model}, {LOADS.get(load, load)}" for server, load in panels]
    with plots.drawing(*titles, rows=2 if len(panels) > 3 else 1) as (picture, axes):
        for one, (panel, curves) in zip(axes, panels.items(), strict=True):
            for system, points in curves.items():
                place = list(SYSTEMS).index(system)
                look: Any = dict(color=plots.COLORS[place], marker=plots.MARKERS[place])
                line = dict(look, linestyle=plots.DASHES[place], label=SYSTEMS[system])
                one.plot([rate for rate, _ in points], [result.latency for _, result in points], **line)
                if system in theirs.get(panel, {}):
                    mark = dict(look, linestyle="", markerfacecolor="white", markersize=7, clip_on=False, zorder=5)
                    one.plot([theirs[panel][system]], [LATENCY], **mark)
            one.set(ylim=(0, LATENCY), xlim=(0, None))
            one.set_title(one.get_title("left"), pad=10)
            plots.label(one, "requests a second", "seconds per token")
        handles, names = axes[0].get_legend_handles_labels()
        if any(theirs.values()):
            handles.append(Line2D([], [], marker="o", linestyle="", color=plots.GREY, markerfacecolor="white"))
            names.append("hollow: read off the paper's")
        picture.legend(handles, names, loc="outside lower center", ncols=6, frameon=False)
    return picture


# --- Figure 14: several answers to a prompt -------------------------------------------------------------------------


CROWD = {"samples": 2000, "beams": 300}  # requests that all come at once; beams cost the simulation a lot


def figure14(study: Study) -> Report:
    """Parallel sampling and beam search on Alpaca: what sharing is worth."""
    systems = ("max", "pow2", "oracle", "paged")
    kinds = [("samples", 1), *((kind, n) for kind in CROWD for n in (2, 4, 6))]
    runs = [
        Run(system, "13b", "alpaca", 1000.0, study.seconds(CROWD[kind] / 1000), study.settings.seed, samples=n,
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
        ["The baselines share nothing, and copy beams for nothing: that flatters them."],
        lambda: _draw14(rates), "Two panels: the more answers to a prompt, the larger our lead over Orca",
    )  # fmt: skip


def _draw14(rows: Mapping[tuple[str, int], Mapping[str, float]]) -> Figure:
    with plots.drawing("Parallel sampling", "Beam search") as (picture, axes):
        for one, kind in zip(axes, ("samples", "beams"), strict=True):
            counts = [n for name, n in rows if name == kind]
            for system in ("max", "pow2", "oracle"):
                ratios = [rows[kind, n]["paged"] / rows[kind, n][system] for n in counts]
                plots.line(one, counts, ratios, SYSTEMS[system])
            plots.label(one, kind, "our throughput by theirs")
            one.set_yscale("log")
            one.set_yticks((1, 2, 5, 10, 20), list(map(str, (1, 2, 5, 10, 20))))
            one.minorticks_off()
            one.set_xticks(counts)
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
        lambda: draw_curves({("13b", f"{prefix} tokens in common"): curves for prefix, curves in panels.items()}, {}),
        "Two panels: with a shared prefix minipaged takes several times as many requests",
    )  # fmt: skip


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


# --- not in the paper ------------------------------------------------------------------------------------------------


def today(study: Study) -> Report:
    """A model and a GPU of today under the paper's loads: four times fewer keys and values, four times the memory."""
    runs = [
        Run(system, "llama", load, 0, study.seconds(HOUR / 4), study.settings.seed)
        for load in ("alpaca", "sharegpt") for system in reversed(SYSTEMS)
    ]  # fmt: skip
    points = dict(zip(runs, study.sweeps("Today", runs), strict=True))
    panels = {
        ("llama", load): {run.system: points[run] for run in reversed(runs) if run.load == load}
        for load in ("sharegpt", "alpaca")
    }
    return Report(
        "today", "Today: Llama-3-8B on an H100", _data(panels), [_rates(panels)],
        ["Hundreds of requests fit, even with Orca (Max), and the host's work for each of them, which is that of 2023\n"
         "here, takes longer than the GPU's: memory is no longer what limits. Engines of today overlap the two."],
        lambda: draw_curves(panels, {}), "Two panels: all systems that schedule by iteration lie close together",
    )  # fmt: skip
