"""Every plot of the chapters, in one style.

White paper, so that it reads on light and on dark pages; colours that colour-blind readers can tell apart, each
with its own dash, marker or hatch, so that it reads in grey; labels stand at what they name, not in a legend.

    with plots.figure("Growth", x="tokens", y="bytes") as axes:
        plots.line(axes, tokens, sizes, "keys and values")

shows itself in the notebook when the block ends.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FormatStrFormatter, LogLocator

INK, GREY, PAPER = "#222222", "#8a8a8a", "#ffffff"
# Okabe and Ito's colours, those that stand out on white; a dash and a marker for each.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#a0417e", "#222222", "#b58900")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")

# What a piece of memory is, always in the same dress: face, hatch, ink. Dark is useful, pale is waste.
KINDS: dict[str, tuple[str, str, str]] = {
    "tokens": ("#0072b2", "", "#ffffff"),
    "shared": ("#003f63", "", "#ffffff"),
    "other": ("#d55e00", "", "#ffffff"),
    "third": ("#009e73", "", "#ffffff"),
    "reserved": ("#9fd0ec", "//", INK),
    "internal": ("#f5d6a8", "..", INK),
    "external": ("#e6e6e6", "xx", INK),
    "free": ("#ffffff", "", GREY),
}
STYLE: Any = {
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER, "figure.dpi": 110,
    "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.edgecolor": GREY, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "lines.linewidth": 1.8, "lines.markersize": 5, "hatch.linewidth": 0.6, "svg.hashsalt": "minipaged",
}  # fmt: skip


@contextmanager
def figures(*titles: str, size: tuple[float, float] | None = None, alt: str = "") -> Iterator[list[Axes]]:
    """Axes side by side, one for each title; shown when the block ends. size: inches, of all together.

    alt: what the picture says, for those who can't see it; by default the titles.
    """
    with drawing(*titles, size=size) as (picture, axes):
        yield axes
        show(picture, alt or "; ".join(titles))


@contextmanager
def drawing(
    *titles: str, size: tuple[float, float] | None = None, rows: int = 1
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A picture and its axes, to be shown or saved; row by row, one for each title."""
    columns = -(-len(titles) // rows)
    size = size or (3.9 * columns if len(titles) > 1 else 6.8, 3.4 * rows)
    with matplotlib.rc_context(STYLE):
        picture = Figure(figsize=size, layout="constrained")
        axes = list(picture.subplots(rows, columns, squeeze=False).flat)
        for one, title in zip(axes, titles, strict=True):
            one.set_title(title)
        yield picture, axes


@contextmanager
def figure(
    title: str, x: str = "", y: str = "", size: tuple[float, float] | None = None, alt: str = ""
) -> Iterator[Axes]:
    """One pair of axes with its labels; x and y name the quantity and its unit."""
    with figures(title, size=size, alt=alt) as (axes,):
        label(axes, x, y)
        yield axes


def label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def logarithmic(axes: Axes) -> None:
    """The y axis, with plain numbers at 1, 2, 5, 10, ..."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.minorticks_off()


def line(
    axes: Axes, x: Sequence[float], y: Sequence[float], name: str, at: int = -1, dy: float = 0, **options: Any
) -> None:
    """A line in the next colour, dash and marker, with its name beside point number `at`; dy: points further up."""
    i = len(axes.lines) % len(COLORS)
    look = dict(color=COLORS[i], linestyle=DASHES[i], marker=MARKERS[i] if len(x) <= 24 else "")
    axes.plot(x, y, **(look | options))
    axes.annotate(
        name, (x[at], y[at]), (7, dy), textcoords="offset points", va="center", annotation_clip=False,
        color=(look | options)["color"], fontweight="bold", fontsize=9,
    )  # fmt: skip


def note(axes: Axes, x: float, y: float, text: str, dx: float = 25, dy: float = 25) -> None:
    """Words with a thin line to a point; dx, dy: where they stand, in points from it."""
    axes.annotate(
        text, (x, y), (dx, dy), textcoords="offset points", fontsize=9, ha="left" if dx >= 0 else "right",
        va="center", arrowprops=dict(arrowstyle="-", color=GREY, shrinkB=3), annotation_clip=False,
    )  # fmt: skip


def bars(axes: Axes, rows: Mapping[str, Mapping[str, float]], digits: int = 0, unit: str = " %") -> None:
    """One bar for each row, from left to right in parts; each part in the dress of its kind, with its number.

    rows: {"Orca (Max)": {"tokens": 20.4, "reserved": 13.3, ...}, ...}, the kinds those of KINDS.
    """
    total = max(sum(parts.values()) for parts in rows.values())
    for place, (name, parts) in enumerate(rows.items()):
        start = 0.0
        for kind, value in parts.items():
            _piece(axes, start, place - 0.36, value, 0.72, kind, "")
            if value >= total * 0.06:
                _words(axes, start + value / 2, place, f"{value:.{digits}f}{unit}", kind)
            start += value
        axes.text(-0.012 * total, place, name, ha="right", va="center")
    _kinds(axes, [kind for kind in KINDS if any(parts.get(kind) for parts in rows.values())])
    axes.set(xlim=(0, total), ylim=(len(rows) - 0.5, -0.6), yticks=[])
    axes.grid(visible=False)
    axes.spines[["left"]].set_visible(False)


def strips(axes: Axes, rows: Mapping[str, Sequence[tuple[float, str, str]]], kinds: bool = True) -> None:
    """Memory as strips: {"request A": [(width, kind, words), ...]}, from address 0 on. kinds: say what is what."""
    for place, (name, pieces) in enumerate(rows.items()):
        start = 0.0
        for width, kind, words in pieces:
            _piece(axes, start, place - 0.38, width, 0.76, kind, words)
            start += width
        axes.text(0, place, f"{name}  ", ha="right", va="center")
    if kinds:
        _kinds(axes, [kind for kind in KINDS if any(piece[1] == kind for row in rows.values() for piece in row)])
    longest = max(sum(piece[0] for piece in row) for row in rows.values())
    axes.set(xlim=(0, longest), ylim=(len(rows) - 0.5, -0.6), yticks=[])
    axes.grid(visible=False)
    axes.spines[["left"]].set_visible(False)


def matrix(
    axes: Axes, values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str],
    form: str = "", limit: float | None = None,
) -> None:  # fmt: skip
    """A small matrix as shaded cells, dark for large; NaN is left white. form: how to write the numbers, "" for not.

    limit: what is darkest; by default the largest value.
    """
    most = limit or max((v for row in values for v in row if v == v), default=1) or 1
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value != value:
                continue
            shade = min(1.0, max(0.0, value / most))
            face = tuple(1 - shade * (1 - part) for part in (0.0, 0.35, 0.58))
            axes.add_patch(Rectangle((j, i), 1, 1, facecolor=face, edgecolor=PAPER))
            if form:
                ink = PAPER if shade > 0.55 else INK
                axes.text(j + 0.5, i + 0.5, format(value, form), ha="center", va="center", color=ink, fontsize=8)
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0), aspect="equal")
    axes.set_xticks([j + 0.5 for j in range(len(columns))], columns)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
    axes.tick_params(length=0)
    axes.grid(visible=False)


def _piece(axes: Axes, x: float, y: float, width: float, height: float, kind: str, words: str) -> None:
    face, hatch, _ = KINDS[kind]
    edge = GREY if kind == "free" else PAPER
    axes.add_patch(Rectangle((x, y), width, height, facecolor=face, edgecolor=edge, linewidth=0.8))
    if hatch:
        axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=GREY, linewidth=0, hatch=hatch))
    if words:
        _words(axes, x + width / 2, y + height / 2, words, kind)


def _words(axes: Axes, x: float, y: float, words: str, kind: str) -> None:
    face, hatch, ink = KINDS[kind]
    behind = dict(facecolor=face, edgecolor="none", pad=1.0) if hatch else None
    axes.text(x, y, words, ha="center", va="center", color=ink, fontsize=8.5, bbox=behind)


def _kinds(axes: Axes, kinds: Sequence[str]) -> None:
    """A key above the bars, in the order in which the parts stand."""
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=KINDS[kind][0], hatch=KINDS[kind][1], edgecolor=GREY, linewidth=0.5)
        for kind in kinds
    ]
    axes.legend(
        handles, kinds, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(kinds), frameon=False,
        handlelength=1.4, handleheight=1.2, columnspacing=1.4, fontsize=9,
    )  # fmt: skip


def show(picture: Figure, alt: str) -> None:
    """In a notebook."""
    from IPython.display import Image, display

    data = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        picture.savefig(data, format="png", metadata={"Software": None}, bbox_inches="tight")  # no version, no date
    display(Image(data.getvalue(), alt=alt))


def save(picture: Figure, path: Path) -> list[Path]:
    """As PNG and as SVG, beside each other: path without its ending. The same picture gives the same bytes."""
    files = [path.with_suffix(".png"), path.with_suffix(".svg")]
    with matplotlib.rc_context(STYLE | {"svg.fonttype": "none"}):
        picture.savefig(files[0], metadata={"Software": None}, bbox_inches="tight", dpi=160)
        picture.savefig(files[1], metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    return files
