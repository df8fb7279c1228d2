"""What the memory is used for: Table 1, and Figures 2, 13 and 15."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from minipaged.experiments import paper
from minipaged.experiments.figures.rates import HOUR, LOADS
from minipaged.experiments.hardware import GIB, SERVERS
from minipaged.experiments.report import Point, Report, Table, compare, verdict
from minipaged.experiments.runs import SYSTEMS, Result, Run
from minipaged.experiments.study import Study
from minipaged.experiments.systems import KINDS
from minipaged.teaching import plots

CONTINUOUS = ("max", "pow2", "oracle", "paged")  # the systems that schedule by iteration


def table1(study: Study) -> Report:
    """Slots for keys and values on each server."""
    rows, points, data = [], [], {}
    for name, server in SERVERS.items():
        slots = f"{server.num_slots / 1000:.1f}K"
        data[server.name] = {"kv_bytes": server.kv_bytes, "num_slots": server.num_slots}
        sizes = [f"{server.weight_bytes / 1e9:.0f}", f"{server.kv_memory / GIB:.0f}", f"{server.kv_bytes:,}"]
        rows.append([server.name, *sizes, slots])
        if name in paper.SLOTS:
            theirs = paper.SLOTS[name]
            points.append([server.model, slots, f"{theirs / 1000:.1f}K"])
    goals = [[*point, *verdict("", point[1] == point[2])[1:]] for point in points]
    return Report(
        "table1", "Table 1: token slots", data,
        [
            Table("Servers", ["", "weights GB", "KV GiB", "bytes/token", "slots"], rows),
            Table("Slots, to the printed digits", ["", "ours", "paper", "goal"], goals),
        ],
        ["GB of the table are taken as GiB for keys and values, which gives the printed slots of 13B and 175B. For 66B "
         "it gives fewer: its 21 may be rounded."],
    )  # fmt: skip


ALL_AT_ONCE = 1000.0, 2.0  # requests a second, and seconds
TRACED = "2000 requests of the trace, over again if it has fewer; all come at once."


def figure2(study: Study) -> Report:
    """What is in the memory while requests wait."""
    trace, seed = study.settings.trace, study.seed
    load, rate, seconds = (str(trace), *ALL_AT_ONCE) if trace else ("sharegpt", 4.0, study.seconds(HOUR / 2))
    runs = [Run(system, "13b", load, rate, seconds, seed) for system in reversed(CONTINUOUS)]
    found = dict(zip(reversed(CONTINUOUS), study.results("Figure 2", runs), strict=True))
    results = {system: found[system] for system in CONTINUOUS}
    cells = [[SYSTEMS[system], *(f"{result.shares[kind]:.1f}" for kind in KINDS)] for system, result in results.items()]
    points = [
        Point(f"{SYSTEMS[system]}: {kind}", results[system].shares[kind], theirs, "printed",
              study.goal(5) if kind == "tokens" else None, relative=False)
        for system, parts in paper.USE.items() for kind, theirs in parts.items()
    ]  # fmt: skip
    return Report(
        "fig2", f"Figure 2: what is in the memory (OPT-13B, {trace.name if trace else 'ShareGPT'})",
        {system: asdict(result) for system, result in results.items()},
        [Table("Percent of the memory, mean over time", ["", *KINDS], cells),
         *([] if trace else [compare("Points of percent", points, digits=1)])],
        [TRACED if trace else "4 requests a second: more than any system can take, so somebody always waits."],
        lambda: draw_use(results), "Four bars: tokens take a fifth with Orca (Max), and nearly all with minipaged",
    )  # fmt: skip


def draw_use(results: Mapping[str, Result]) -> Figure:
    with plots.drawing("What is in the memory for keys and values", size=(7.6, 3.0)) as (picture, (axes,)):
        plots.bars(axes, {SYSTEMS[system]: result.shares for system, result in results.items()})
    return picture


BATCH_RATES = {"sharegpt": (2.0, HOUR), "alpaca": (30.0, HOUR / 2)}  # requests a second, and for how long


def figure13(study: Study) -> Report:
    """How many requests are in the batch, on average over time."""
    trace, seed = study.settings.trace, study.seed
    loads = {str(trace): ALL_AT_ONCE} if trace else {
        load: (rate, study.seconds(seconds)) for load, (rate, seconds) in BATCH_RATES.items()
    }
    runs = [
        Run(system, "13b", load, rate, seconds, seed)
        for load, (rate, seconds) in reversed(loads.items()) for system in reversed(CONTINUOUS)
    ]  # fmt: skip
    found = dict(zip(runs, study.results("Figure 13", runs), strict=True))
    batch = {load: {run.system: found[run].mean_batch for run in reversed(runs) if run.load == load} for load in loads}
    points = [
        Point(f"{LOADS[load]}: {SYSTEMS[system]}", batch[load][system], theirs, "printed", study.goal(15))
        for load, systems in paper.BATCH.items() if load in batch for system, theirs in systems.items()
    ]  # fmt: skip
    cells = [
        [LOADS.get(load, Path(load).name), *(f"{one[name]:.2f}" for name in CONTINUOUS)] for load, one in batch.items()
    ]
    return Report(
        "fig13", "Figure 13: requests in the batch (OPT-13B)", dict(batch),
        [Table("Mean over time", ["", *(SYSTEMS[system] for system in CONTINUOUS)], cells),
         *([] if trace else [compare("Requests in the batch", points)])],
        [TRACED if trace else "ShareGPT at 2 requests a second, Alpaca at 30. The cost model is calibrated by the last "
         "number of the table, so that one proves nothing."],
        lambda: _draw13(batch), "Bars: minipaged batches about twice as many requests as Orca (Oracle)",
    )  # fmt: skip


def _draw13(batch: Mapping[str, Mapping[str, float]]) -> Figure:
    with plots.drawing(*(LOADS.get(load, Path(load).name) for load in batch)) as (picture, axes):
        for one, (load, systems) in zip(axes, batch.items(), strict=True):
            theirs = list(paper.BATCH.get(load, {}).values())
            _bars(one, [SYSTEMS[name] for name in systems], list(systems.values()), theirs)
            plots.label(one, "", "requests in the batch")
    return picture


def _bars(axes, names: Sequence[str], ours: Sequence[float], theirs: Sequence[float]) -> None:
    """Bars, and the paper's numbers as hollow diamonds."""
    axes.bar(range(len(names)), ours, color=plots.COLORS[0], width=0.6, label="ours")
    for place, value in enumerate(ours):
        above = max(value, theirs[place] if theirs else 0) + 0.03 * max(ours)
        axes.text(place, above, f"{value:.1f}", ha="center", va="bottom", fontsize=9)
    if theirs:
        axes.plot(range(len(theirs)), theirs, "D", color=plots.INK, markerfacecolor="white", label="paper")
        axes.legend(frameon=False, loc="upper left")
    axes.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names], fontsize=8.5)
    axes.margins(y=0.15)
