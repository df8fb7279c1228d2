"""The figures of the paper, each a function: what a Study computes -> Report."""

from minipaged.experiments.figures.blocks import figure18, figure19
from minipaged.experiments.figures.goodput import goodput
from minipaged.experiments.figures.memory import figure2, figure13, table1
from minipaged.experiments.figures.rates import figure12, figure17, llama
from minipaged.experiments.figures.routing import routing
from minipaged.experiments.figures.sharing import figure14, figure15, figure16
from minipaged.experiments.figures.today import today

FIGURES = {
    "table1": table1,
    "fig2": figure2,
    "fig12": figure12,
    "fig13": figure13,
    "fig14": figure14,
    "fig15": figure15,
    "fig16": figure16,
    "fig17": figure17,
    "fig18": figure18,
    "fig19": figure19,
    "llama": llama,
    "today": today,
}
STUDIES = {"goodput": goodput, "routing": routing}  # of many engines; they take long, or need a trace
