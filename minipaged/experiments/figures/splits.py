"""What goodputs are shown as: tables, sentences and panels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minipaged.experiments.cluster import Layout
from minipaged.experiments.goodput import RATIO, Limits
from minipaged.experiments.report import Table
from minipaged.teaching import plots

HEADER = ["whole", "chunks", "", "split", "", "/whole", "/chunks"]
CALLED = {
    "whole": "together, whole prompts", "chunks": "together, best chunks",
    "split": "best split, NVLink", "rdma": "the same split, RDMA",
}  # fmt: skip


@dataclass(frozen=True)
class Best:
    """A system at one limit: requests a second for each GPU, by seed, with the layout that is best on average."""

    layout: Layout
    rates: list[float]

    @property
    def rate(self) -> float:
        return mean(self.rates)


Curves = dict[str, list[Best]]  # by system, one for each limit, prompt or link


def label(layout: Layout) -> str:
    """What was chosen: prompts:rest, or tokens a step."""
    if layout.together:
        return str(layout.budget) if layout.chunked else ""
    return f"{layout.prompts}:{layout.rest}"


def cells(curves: Curves, place: int) -> list[str]:
    one = {system: bests[place] for system, bests in curves.items()}
    row = [f"{one['whole'].rate:.2f}"]
    for system in ("chunks", "split"):
        row += [f"{one[system].rate:.2f}", label(one[system].layout) if one[system].rate else "-"]
    row += [f"{one['rdma'].rate:.2f}"] if "rdma" in one else []
    return row + [times(one["split"].rate, one[system].rate) for system in ("whole", "chunks")]


def times(rate: float, other: float) -> str:
    return f"{rate / other:.2f}x" if other else "-"


def table(load: str, limits: Sequence[Limits], curves: Curves) -> Table:
    rows = [[f"{1e3 * one.tpot:g} ms", *cells(curves, place)] for place, one in enumerate(limits)]
    header = ["TPOT", *HEADER[:5], "RDMA", *HEADER[5:]]
    return Table(f"{load}: requests a second for each GPU, TTFT {limits[0].ttft:g} s", header, rows)


def varied(title: str, names: Sequence[str], curves: Curves) -> Table:
    return Table(title, ["", *HEADER], [[name, *cells(curves, place)] for place, name in enumerate(names)])


def ratios(curves: Curves, other: str) -> list[float]:
    """Split by another; 0 where neither can keep the limits."""
    pairs = zip(curves["split"], curves[other], strict=True)
    return [one.rate / two.rate if two.rate else math.inf if one.rate else 0.0 for one, two in pairs]


def spans(xs: Sequence[float], ratios: Sequence[float]) -> list[tuple[float, float]]:
    """From where to where the ratio is above 1, in the order of xs; between two both are straight in logarithms.

    Where it is nowhere above RATIO, the two can't be told apart: that is left out.

    >>> spans([40.0, 10.0, 5.0], [0.5, 2.0, 1.5]), spans([4.0, 2.0], [2.0, 1.5]), spans([2.0, 1.0], [1.05, 0.5])
    ([(20.0, 5.0)], [(4.0, 2.0)], [])
    """
    found: list[tuple[float, float]] = []
    place = 0
    while place < len(xs):
        end = place
        while end < len(xs) and ratios[end] > 1:
            end += 1
        if max(ratios[place:end], default=0.0) > RATIO:
            found.append((_edge(xs, ratios, place, place - 1), _edge(xs, ratios, end - 1, end)))
        place = end + 1
    return found


def _edge(xs: Sequence[float], ratios: Sequence[float], place: int, other: int) -> float:
    """Where the ratio becomes 1 on the way to a neighbour; at `place` itself if there is none."""
    if not 0 <= other < len(xs) or ratios[other] > 1:
        return xs[place]
    inside, outside = (math.log(min(1e9, max(1e-9, ratios[one]))) for one in (place, other))
    share = inside / (inside - outside)
    return round(xs[place] ** (1 - share) * xs[other] ** share, 9)


def pays(what: str, xs: Sequence[float], curves: Curves, form: str) -> str:
    """A sentence: against whom splitting pays, and from where to where."""
    clauses = []
    for other, name in (("whole", "whole prompts"), ("chunks", "the best chunks")):
        one = ratios(curves, other)
        where = " and ".join(
            f"from {form.format(start)} to {form.format(end)}" for start, end in spans(xs, one)
        )  # fmt: skip
        most = max(range(len(xs)), key=lambda place: one[place])
        best = f"{one[most]:.2f}x at {form.format(xs[most])}" if math.isfinite(one[most]) else "the others take none"
        clauses.append(f"against {name} {where or 'nowhere'} (at most {best})")
    return f"Splitting pays, by {what}: {'; '.join(clauses)}."


# --- drawing --------------------------------------------------------------------------------------------------------


def draw(panels: Mapping[str, tuple[Sequence[float], str, Curves]]) -> Figure:
    with plots.drawing(*panels, rows=2 if len(panels) > 3 else 1) as (picture, axes):
        for one, (xs, name, curves) in zip(axes, panels.values(), strict=True):
            panel(one, xs, curves)
            plots.label(one, name, "requests a second and GPU")
        handles, names = axes[0].get_legend_handles_labels()
        picture.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    return picture


def panel(axes: Axes, xs: Sequence[float], curves: Curves) -> None:
    """Lines with the seeds' range; from where to where splitting pays against whole prompts, and against chunks."""
    for place, (system, bests) in enumerate(curves.items()):
        look: Any = dict(color=plots.COLORS[place], linestyle=plots.DASHES[place], marker=plots.MARKERS[place])
        axes.plot(xs, [one.rate for one in bests], label=CALLED[system], **look)
        low, high = ([pick(one.rates) for one in bests] for pick in (min, max))
        axes.fill_between(xs, low, high, color=plots.COLORS[place], alpha=0.15, linewidth=0)
    top = 1.08 * max(max(one.rates) for bests in curves.values() for one in bests)
    for other, words in (("whole", "split beats whole \N{RIGHTWARDS ARROW}"), ("chunks", "and chunks, too")):
        for start, end in spans(xs, ratios(curves, other)):
            for edge in {start, end} - {xs[0], xs[-1]}:
                axes.axvline(edge, color=plots.GREY, linewidth=0.9, linestyle=":")
            if start != xs[0]:
                axes.text(start, 0.03 * top, f" {words}", fontsize=8, color=plots.INK)
    axes.set(xscale="log", ylim=(0, top or 1))
    axes.set_xticks(list(xs), [f"{x:g}" for x in xs], rotation=45)
    axes.minorticks_off()
    if xs[0] > xs[-1]:
        axes.invert_xaxis()
    else:
        least = min((one.rate for bests in curves.values() for one in bests if one.rate), default=1)
        axes.set_ylim(0.7 * least, 1.3 * (top or 1))  # longer prompts: rates fall over more than one order
        plots.logarithmic(axes)
