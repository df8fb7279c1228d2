"""What the chapters need beside the engine: plots in one style, sources, and exercises that say how far one has come.

    plots.py       every plot of the chapters, in one style
    page.py        what a cell shows: the package's own source, and how an exercise stands
    checks.py      what the tests of exercises are made with
    costs.py       what a solution costs: looks, lines, memory, counted
    launches.py    what Triton kernels read and write, and what a compiler makes of them
    loads.py       requests that look like those of the paper
"""

from minipaged.teaching import plots
from minipaged.teaching.checks import counted, equal, own
from minipaged.teaching.page import attempt, show_source

__all__ = ["attempt", "counted", "equal", "own", "plots", "show_source"]
