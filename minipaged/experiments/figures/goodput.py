"""Not in the paper: DistServe's goodput. Do prompts and answers belong on GPUs of their own?

One model on four H100s, and the same requests: four engines that compute whole prompts, four that cut them, and every
split of the four into engines for prompts and engines for the rest. Of several chunk sizes, and of the splits, the
best counts, for each load and limit: whoever runs a service tries them too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minipaged.experiments.cluster import Layout
from minipaged.experiments.figures.splits import HEADER, Best, Curves, cells, draw, label, pays, ratios, table, varied
from minipaged.experiments.goodput import KINDS, LENGTHS, RATIO, SHARE, SLOWEST, Found, Limits, Trial, search
from minipaged.experiments.hardware import SERVERS
from minipaged.experiments.machine import Machine
from minipaged.experiments.report import Report, Table
from minipaged.experiments.study import Study

GPUS = 4
# Requests come for at least 20 s, and there are at least 1,000, or 3 million tokens of prompts if that is less.
SECONDS, COUNT, TOKENS = 20.0, 1000, 3_000_000
SYSTEMS: dict[str, list[Layout]] = {
    "whole": [Layout(together=GPUS, budget=2**17, chunked=False)],
    "chunks": [Layout(together=GPUS, budget=budget) for budget in (256, 512, 1024)],
    "split": [Layout(prompts=part, rest=GPUS - part, budget=1024) for part in range(1, GPUS)],
}
MACHINE = Machine(SERVERS["llama"])
RDMA = 50e9  # bytes a second one way; NVLink's 450 are Machine's own
TTFT = {"conversation": 0.5, "code": 0.5, "long": 2.0}
TPOT = (0.1, 0.05, 0.03, 0.02, 0.015, 0.01)
TRACED = 0.5  # TTFT limit of a trace
FIXED = 0.02  # TPOT limit where something else is varied
VARIED = "conversation"  # the load of the constants that are turned
LINKS = (450e9, 10e9, 2e9)



def goodput(study: Study) -> Report:
    """Requests a second for each GPU that keep both limits, by TPOT limit, prompt length and link."""
    trace = study.settings.trace
    loads = {str(trace): TRACED} if trace else TTFT
    asked = {load: [Limits(ttft, tpot) for tpot in TPOT] for load, ttft in loads.items()}
    curves = measure(study, "Goodput", {load: (load, MACHINE, limits) for load, limits in asked.items()}, num_seeds=3)
    for load, one in curves.items():
        one["rdma"] = over_rdma(study, load, asked[load], one["split"])
    tables = [table(Path(load).name, asked[load], one) for load, one in curves.items()]
    notes = [said(Path(load).name, one) for load, one in curves.items()]
    data: dict[str, Any] = {"limits": {load: [vars(one) for one in limits] for load, limits in asked.items()}}
    panels: dict[str, tuple[Sequence[float], str, Curves]] = {
        f"{Path(load).name}, TTFT {loads[load]:g} s": ([1e3 * tpot for tpot in TPOT], "TPOT limit (ms)", one)
        for load, one in curves.items()
    }
    if not trace:
        by_length, by_link, turned = lengths(study), links(study), constants(study)
        panels[f"by prompt, TPOT {1e3 * FIXED:g} ms"] = LENGTHS, "tokens of a mean prompt", by_length
        unit = f"requests a second for each GPU, TPOT {1e3 * FIXED:g} ms"
        tables += [varied(f"By mean prompt: {unit}", [f"{n:,} tokens" for n in LENGTHS], by_length),
                   varied(f"By link, {VARIED}: {unit}", [f"{link / 1e9:g} GB/s" for link in LINKS], by_link),
                   turned[0]]  # fmt: skip
        notes += [pays("mean prompt", LENGTHS, by_length, "{:,.0f} tokens"),
                  pays("link", [link / 1e9 for link in LINKS], by_link, "{:.3g} GB/s"), turned[2]]  # fmt: skip
        data |= turned[1] | {"by link": rates(by_link)}
    data |= {title: rates(one) for title, (_, _, one) in panels.items()}
    return Report(
        "goodput", f"Goodput: {MACHINE.server.name}, {GPUS} of them", data, tables, [*notes, *NOTES],
        lambda: draw(panels),
        "Goodput falls as the limit tightens; it falls first where whole prompts are computed beside answers",
    )  # fmt: skip


# --- measuring ------------------------------------------------------------------------------------------------------

Case = tuple[str, Machine, Sequence[Limits]]  # a load on a machine, and what it is asked for


def measure(
    study: Study, title: str, cases: Mapping[Any, Case], systems: Sequence[str] = (*SYSTEMS,), num_seeds: int = 1
) -> dict[Any, Curves]:
    """case -> Curves."""
    seeds = range(study.seed, study.seed + (1 if study.settings.quick else num_seeds))
    plan = [(key, system, layout, seed) for key in cases for system in systems for layout in SYSTEMS[system]
            for seed in seeds]  # fmt: skip
    items = [trial(study, cases[key], layout, seed) for key, _, layout, seed in plan]
    found = dict(zip(plan, study.each(title, search, items), strict=True))
    return {
        key: {system: [best({layout: [found[key, system, layout, seed] for seed in seeds]
                             for layout in SYSTEMS[system]}, place) for place in range(len(limits))]
              for system in systems}
        for key, (_, _, limits) in cases.items()
    }  # fmt: skip


def trial(study: Study, case: Case, layout: Layout, seed: int) -> tuple[Any, ...]:
    """What `search` wants."""
    load, machine, limits = case
    count = min(COUNT, TOKENS // round(KINDS[load].prompt)) if load in KINDS else COUNT
    length = study.seconds(SECONDS), int(study.seconds(count))  # of a quick look: a fifteenth
    return Trial(load, layout, machine, seed, *length), tuple(limits), study.settings.folder


def over_rdma(study: Study, load: str, limits: Sequence[Limits], split: Sequence[Best]) -> list[Best]:
    """The best splits once more, over a slower link."""
    case, layouts = (load, replace(MACHINE, link=RDMA), limits), list(dict.fromkeys(one.layout for one in split))
    seeds = range(study.seed, study.seed + len(split[0].rates))
    plan = [(layout, seed) for layout in layouts for seed in seeds]
    items = [trial(study, case, layout, seed) for layout, seed in plan]
    found = dict(zip(plan, study.each("Goodput, RDMA", search, items), strict=True))
    return [best({one.layout: [found[one.layout, seed] for seed in seeds]}, place) for place, one in enumerate(split)]


def best(found: Mapping[Layout, Sequence[Found]], place: int) -> Best:
    """Of several layouts the one with the highest mean rate; place: of the limit."""
    layouts = [Best(layout, [one.rates[place] for one in by_seed]) for layout, by_seed in found.items()]
    return max(layouts, key=lambda one: one.rate)


def lengths(study: Study) -> Curves:
    """TTFT limit: a quarter of a second for each thousand tokens of the mean prompt, and no less than that."""
    cases: dict[Any, Case] = {
        length: (str(length), MACHINE, [Limits(0.25 * max(1.0, length / 1000), FIXED)]) for length in LENGTHS
    }
    return across(measure(study, "Goodput, prompts", cases))


def links(study: Study) -> Curves:
    limits = [Limits(TTFT[VARIED], FIXED)]
    cases: dict[Any, Case] = {link: (VARIED, replace(MACHINE, link=link), limits) for link in LINKS}
    split = across(measure(study, "Goodput, links", cases, ["split"]))
    others = measure(study, "Goodput, no link", {0: (VARIED, MACHINE, limits)}, ["whole", "chunks"])[0]
    return {name: bests * len(LINKS) for name, bests in others.items()} | split


def across(found: Mapping[Any, Curves]) -> Curves:
    """Of cases with one limit each: a curve over the cases."""
    systems = next(iter(found.values()))
    return {system: [curves[system][0] for curves in found.values()] for system in systems}


def constants(study: Study) -> tuple[Table, dict[str, Any], str]:
    """One constant after another is turned, until splitting loses or wins."""
    limits, ttft = [Limits(TTFT[VARIED], FIXED)], TTFT[VARIED]
    cases: dict[Any, Case] = {
        "as they are": (VARIED, MACHINE, limits),
        "5 ms beside each step": (VARIED, replace(MACHINE, step=5e-3), limits),
        "reading doesn't overlap": (VARIED, replace(MACHINE, overlap=False), limits),
        "OPT-13B": (VARIED, replace(MACHINE, server=SERVERS["13b-h100"]), limits),
        f"TTFT {ttft / 2:g} s": (VARIED, MACHINE, [Limits(ttft / 2, FIXED)]),
    }
    found = measure(study, "Goodput, constants", cases)
    rows = [[name, *(cells(curves, 0))] for name, curves in found.items()]
    title = f"Constants turned: {VARIED}, TTFT {ttft:g} s, TPOT {1e3 * FIXED:g} ms"
    data = {name: {system: bests[0].rates for system, bests in curves.items()} for name, curves in found.items()}
    won = [f"{name} ({one[0]:.2f}x)" for name, curves in found.items() if (one := ratios(curves, "chunks"))[0] > RATIO]
    said = f"Of the constants turned, splitting beats the best chunks with: {', '.join(won) or 'none'}."
    return Table(title, ["", *HEADER], rows), {"constants": data}, said


def rates(curves: Curves) -> dict[str, Any]:
    return {
        system: [{"layout": label(one.layout), "rates": one.rates} for one in bests] for system, bests in curves.items()
    }


def said(load: str, curves: Curves) -> str:
    return f"{load}: " + pays("TPOT limit", [1e3 * tpot for tpot in TPOT], curves, "{:.3g} ms")


NOTES = [
    f"Goodput: the highest rate at which {100 * SHARE:.0f} % of requests have both their first token and the mean time "
    "of each that follows within the limits, by the number of GPUs (DistServe, OSDI 2024). Poisson arrivals for at "
    f"least {SECONDS:g} s, and at least {COUNT:,} requests or {TOKENS / 1e6:g} million tokens of prompts; the first "
    "and last tenth of them don't count. By TPOT limit: means over three seeds, and their range in the picture; the "
    f"rest: one. Rates are told apart by {100 * RATIO - 100:.0f} %. 0: not even {SLOWEST:g} a second.",
    "DistServe's chatbot had TTFT 0.25 s and TPOT 0.1 s (recalled), on A100s. An H100 and a model of 8B keep that with "
    "ease, so TPOT is tightened from there. TTFT is eight times what a mean prompt takes alone or more, so that there "
    "is time to wait for others.",
    "Engines are the package's scheduler and memory. Best chunks: of 256, 512 and 1,024 tokens a step; best split: of "
    "1:3, 2:2 and 3:1 engines for prompts and for the rest; both chosen for each row. A split computes prompts in "
    "steps of 1,024 tokens; keys and values cross the link after the prompt, one request after another for each GPU: "
    "NVLink 450 GB/s, RDMA 50 GB/s, one way.",
    f"A step takes {1e3 * MACHINE.step:g} ms and {1e6 * MACHINE.host:g} us a request beside its work (chosen), weights "
    "are read while it multiplies (0.67 and 0.6 of the data sheet are reached), attention within a prompt is "
    "multiplied at the same speed, and keys and values are read at 0.67 of the bandwidth. Nobody measured any of this.",
]
