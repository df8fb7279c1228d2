"""How large a block should be, and what making way costs: Figures 18 and 19."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from minipaged.experiments import paper
from minipaged.experiments.figures.rates import LOADS
from minipaged.experiments.hardware import SERVERS
from minipaged.experiments.report import Report, Table, verdict
from minipaged.experiments.runs import Run
from minipaged.experiments.study import Study
from minipaged.memory import blocks_for
from minipaged.teaching import plots

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Requests a second and seconds: nine tenths of what blocks of 16 can take (Figure 12), where memory starts to matter.
BUSY = {"sharegpt": (1.8, 900.0), "alpaca": (28.0, 300.0)}
CONTEXT = 256  # tokens that are swapped or recomputed in Figure 19a


def figure18(study: Study) -> Report:
    """Latency over the size of a block."""
    runs = [
        Run("paged", "13b", load, rate, study.seconds(seconds), study.seed, block_size=size,
            preemption="recompute")
        for load, (rate, seconds) in BUSY.items() for size in SIZES
    ]  # fmt: skip
    found = study.results("Figure 18", runs)
    latency: dict[str, dict[int, float]] = {load: {} for load in BUSY}
    for run, result in zip(runs, found, strict=True):
        latency[run.load][run.block_size] = result.latency
    return Report(
        "fig18", "Figure 18b: latency over block size (OPT-13B)", dict(latency),
        [
            _sizes("Seconds per token", latency, 3),
            Table("The U", ["", "goal"], [_u(load, latency[load]) for load in BUSY]),
        ],
        ["Small blocks: attention waits for each of them. Large ones: their empty slots keep other requests out."],
        lambda: _draw_sizes("Latency", {LOADS[load]: one for load, one in latency.items()}, "seconds per token"),
        "Two lines shaped like a U, lowest at 16 to 64; Alpaca's rises steeply beyond",
    )  # fmt: skip


def _u(load: str, latency: Mapping[int, float]) -> list[str]:
    low, high = paper.BEST_BLOCK_SIZES[load]
    best = min(latency, key=lambda size: latency[size])
    edges = latency[1] > latency[best] < latency[256]
    return verdict(f"{LOADS[load]}: best at {best}, within the paper's {low}-{high}, and worse at both ends",
                   low <= best <= high and edges)  # fmt: skip


def _sizes(title: str, lines: Mapping[str, Mapping[int, float]], digits: int) -> Table:
    rows = [[LOADS.get(name, name), *(f"{line[size]:.{digits}f}" for size in SIZES)] for name, line in lines.items()]
    return Table(title, ["block size", *map(str, SIZES)], rows)


def _draw_sizes(title: str, lines: Mapping[str, Mapping[int, float]], y: str) -> Figure:
    with plots.drawing(title) as (picture, (axes,)):
        for name, line in lines.items():
            plots.line(axes, list(line), list(line.values()), name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, list(map(str, SIZES)))
        plots.logarithmic(axes)
        plots.label(axes, "block size (tokens)", y)
    return picture


# --- Figure 19 ------------------------------------------------------------------------------------------------------


def costs() -> dict[str, dict[int, float]]:
    """Milliseconds for CONTEXT tokens of OPT-13B, by block size: there and back by PCIe, or computed again."""
    server = SERVERS["13b"]
    moved = {size: 2e3 * server.swap_seconds(blocks_for(CONTEXT, size), size) for size in SIZES}
    return {"swap": moved, "recompute": dict.fromkeys(SIZES, 1e3 * server.matrix_seconds(CONTEXT))}


def figure19(study: Study) -> Report:
    """Swapping and recomputing: what one of them costs, and what a server's users notice."""
    runs = [
        Run("paged", "13b", load, rate, study.seconds(seconds), study.seed, block_size=size, preemption=mode)
        for load, (rate, seconds) in BUSY.items() for mode in ("swap", "recompute") for size in SIZES
    ]  # fmt: skip
    found = study.results("Figure 19", runs)
    latency: dict[str, dict[int, float]] = {}
    for run, result in zip(runs, found, strict=True):
        latency.setdefault(f"{LOADS[run.load]}, {run.preemption}", {})[run.block_size] = result.latency
    one = costs()
    low, high = paper.CROSSOVER
    crosses = one["swap"][low] > one["recompute"][low] and one["swap"][high] < one["recompute"][high]
    above = max(one["recompute"][size] / one["swap"][size] for size in SIZES)
    goals = [
        verdict(f"swapping becomes cheaper between {low} and {high}", crosses),
        verdict(f"recomputing at most {paper.MOST_ABOVE_SWAPPING}x swapping (said); ours {above:.1f}x",
                above <= paper.MOST_ABOVE_SWAPPING),
    ]  # fmt: skip
    return Report(
        "fig19", "Figure 19: swapping and recomputing (OPT-13B)", {"milliseconds": one, "latency": latency},
        [
            _sizes(f"a) Milliseconds for {CONTEXT} tokens", one, 1), Table("", ["", "goal"], goals),
            _sizes("b) Seconds per token, the whole load", latency, 3),
        ],
        ["Swapping starts a copy for every block, layer, key and value: with small blocks starting is all it does."],
        lambda: _draw_sizes("Making way for others, and back", one, f"milliseconds for {CONTEXT} tokens"),
        "Recomputing is flat; swapping falls with the block size and crosses it between 16 and 32",
    )  # fmt: skip
