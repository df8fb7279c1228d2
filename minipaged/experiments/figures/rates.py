"""How many requests a second: Figures 12, 14, 16 and 17.

Every system is given more and more of them, until its normalized latency (seconds per token of the answer) is beyond
one second. A multiple of one system's rate to another's means little without this threshold, so it stands everywhere.
"""

from __future__ import annotations

import math
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
        Run(system, server, load, 0, study.seconds(TRACES[server]), study.seed)
        for load in reversed(loads) for server in TRACES for system in reversed(SYSTEMS)
    ]  # fmt: skip  # the longest first
    points = dict(zip(runs, study.sweeps("Figure 12", runs), strict=True))
    panels = {
        (server, Path(load).name): {r.system: points[r] for r in reversed(runs) if (r.server, r.load) == (server, load)}
        for load in loads for server in TRACES
    }  # fmt: skip
    tables = [_rates(panels)]
    if not trace:
        tables += [_crossings(study, panels["13b", load], load) for load in loads]
        tables += [] if study.settings.quick else [_order(panels)]
    return Report(
        "fig12", "Figure 12: latency over request rate", curves_data(panels), tables, [THRESHOLD],
        lambda: draw_curves(panels, {("13b", load): paper.CROSSINGS.get(load, {}) for load in loads}),
        "Six panels: latency stays low, and then rises like a wall; minipaged's wall is furthest to the right",
    )  # fmt: skip


THRESHOLD = (
    f"Rates are those at which the normalized latency crosses {LATENCY:g} second per token, over the whole trace. An "
    "overloaded system's latency depends on how long the trace is, so the threshold is part of the number."
)


def walls(curves: Curves) -> dict[str, float]:
    """Requests a second at which each system's latency crosses the threshold."""
    return {system: crossing([(rate, result.latency) for rate, result in points]) for system, points in curves.items()}


def _rates(panels: Mapping[tuple[str, str], Curves]) -> Table:
    rows = []
    for (server, load), curves in panels.items():
        rates = walls(curves)
        ratios = [rates["paged"] / rates[system] for system in ("oracle", "max", "ft")]
        rows.append([
            f"{SERVERS[server].model}, {LOADS.get(load, load)}",
            *(number(rate, "{:.2f}") for rate in rates.values()),
            *(number(ratio, "{:.1f}x") for ratio in ratios),
        ])  # fmt: skip
    header = ["req/s at 1 s/token", "FT", "Max", "Pow2", "Oracle", "ours", "/Oracle", "/Max", "/FT"]
    return Table("What each can take, and ours by theirs (-: too short a trace)", header, rows)


def number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else form.format(value)


def _crossings(study: Study, curves: Curves, load: str) -> Table:
    rates, theirs = walls(curves), paper.CROSSINGS[load]
    allowed = study.goal(25) if load == "sharegpt" else None
    points = [Point(SYSTEMS[system], rates[system], theirs[system], "read", allowed) for system in theirs]
    return compare(f"OPT-13B, {LOADS[load]}: requests a second at 1 s/token", points)


def _order(panels: Mapping[tuple[str, str], Curves]) -> Table:
    rows = []
    for (server, load), curves in panels.items():
        rates = list(walls(curves).values())
        met = all(low < high for low, high in zip(rates, rates[1:], strict=False))
        rows.append(verdict(f"{SERVERS[server].model}, {LOADS[load]}: FT < Max < Pow2 < Oracle < ours", met))
    return Table("The order of the systems", ["panel", "goal"], rows)


def curves_data(panels: Mapping[tuple[Any, ...], Curves]) -> dict[str, Any]:
    return {
        " ".join(map(str, panel)): {
            system: [{"rate": rate, **asdict(result)} for rate, result in points] for system, points in curves.items()
        }
        for panel, curves in panels.items()
    }


def draw_curves(
    panels: Mapping[tuple[str, str], Curves],
    theirs: Mapping[tuple[str, str], Mapping[str, float]],
    called: Mapping[str, str] = SYSTEMS,
) -> Figure:
    """A panel for each (server, load). theirs: the paper's crossings, as hollow marks on the upper edge.

    called: what the legend says for each curve.
    """
    titles = [f"{SERVERS[server].model}, {LOADS.get(load, load)}" for server, load in panels]
    with plots.drawing(*titles, rows=2 if len(panels) > 3 else 1) as (picture, axes):
        for one, (panel, curves) in zip(axes, panels.items(), strict=True):
            for system, points in curves.items():
                place = list(called).index(system)
                look: Any = dict(color=plots.COLORS[place], marker=plots.MARKERS[place])
                line = dict(look, linestyle=plots.DASHES[place], label=called[system])
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


# --- Figure 17: chats ------------------------------------------------------------------------------------------------


def figure17(study: Study) -> Report:
    """Chats: the prompt is the last 1024 tokens of what was said, so most prompts are long."""
    runs = [
        Run(system, "13b", "chat", 0, study.seconds(HOUR), study.seed)
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
        "fig17", "Figure 17: chats of several rounds (OPT-13B)", curves_data({("13b", "chat"): curves}),
        [Table("Requests a second at 1 s/token", ["", "req/s"], cells), compare("Our rate", compared)],
        ["More than half of the prompts have 1024 tokens, so with any answer a buddy allocator gives 2048."],
        lambda: draw_curves({("13b", "chat"): curves}, {}), "The three Orcas lie on each other; minipaged takes more",
    )  # fmt: skip


# --- not in the paper ------------------------------------------------------------------------------------------------


def llama(study: Study) -> Report:
    """A model and a GPU of today under the paper's loads: four times fewer keys and values, four times the memory."""
    runs = [
        Run(system, "llama", load, 0, study.seconds(HOUR / 4), study.seed)
        for load in ("alpaca", "sharegpt") for system in reversed(SYSTEMS)
    ]  # fmt: skip
    points = dict(zip(runs, study.sweeps("Llama", runs), strict=True))
    panels = {
        ("llama", load): {run.system: points[run] for run in reversed(runs) if run.load == load}
        for load in ("sharegpt", "alpaca")
    }
    return Report(
        "llama", "Not in the paper: Llama-3-8B on an H100", curves_data(panels), [_rates(panels)],
        ["Hundreds of requests fit, even with Orca (Max), and the host's work for each of them, which is that of 2023 "
         "here, takes longer than the GPU's: memory is no longer what limits. Engines of today overlap the two."],
        lambda: draw_curves(panels, {}), "Two panels: all systems that schedule by iteration lie close together",
    )  # fmt: skip
