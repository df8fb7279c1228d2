"""Not in the paper: which of many replicas gets a request, with 1 to 1,000 of them, on a real trace.

With a trace everything is computed; without one, what was computed before is drawn from experiments/routing.json, since
traces are not part of this package.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from minipaged.experiments.report import Report, Table
from minipaged.experiments.routing import MACHINE, POOLS, Answer, Case, Prompt, read_blocks, run
from minipaged.experiments.runs import recalled
from minipaged.experiments.study import Study
from minipaged.teaching import plots

KEPT = Path(__file__).parents[1] / "routing.json"
CALLED = {
    "round_robin": "round robin", "least_loaded": "least loaded", "prefix": "prefix affinity",
    "consistent_hash": "consistent hash", "shared": "one endless cache",
}  # fmt: skip
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1000)
MIDDLE = 64  # replicas, where something else is varied
REQUESTS = 32  # replicas' worth of them are measured where there are fewer replicas: with several seeds
VALUES = {"found": "found in memory (%)", "balance": "busiest / mean", "p50": "TTFT p50 (s)", "p99": "TTFT p99 (s)"}
FORMS = {"found": "{:.1f}", "balance": "{:.2f}", "p50": "{:.2f}", "p99": "{:.2f}"}
Row = dict[str, float]  # the fields of an Answer, means over seeds
Rows = dict[str, dict[str, Row]]  # situation -> policy -> what came of it


def situations() -> dict[str, dict[str, Any]]:
    """What is tried, with every policy: a name, and how it differs from a Case's defaults."""
    found: dict[str, dict[str, Any]] = {str(size): {"replicas": size} for size in SIZES}
    base = {"replicas": MIDDLE}
    found[f"{MIDDLE}, small pools"] = base | {"pool": "gpu"}
    found[f"{MIDDLE}, bursts"] = base | {"burst": 1 / 3}
    found[f"{MIDDLE}, half the load"] = base | {"rate": 0.5}
    found[f"{MIDDLE}, more load"] = base | {"rate": 1.4}
    found |= {f"{size}, the trace as it is": {"replicas": size, "fixed": True} for size in (4, 8, 16)}
    return found


BEGINNINGS = (1, 2, 4, 8)  # blocks that are hashed


def routing(study: Study) -> Report:
    """Found, balance and time to the first token, by the number of replicas; and which policy to use when."""
    data = measured(study) if study.settings.trace else json.loads(KEPT.read_text(encoding="utf-8"))
    rows: Rows = data["rows"]
    by_size = {name: one for name, one in rows.items() if name.isdecimal()}
    others = {name: one for name, one in rows.items() if "," in name}
    tables = [sizes(by_size, value) for value in VALUES]
    tables += [compared(f"{MIDDLE}, as above", rows[str(MIDDLE)])] if str(MIDDLE) in rows else []
    tables += [compared(name, one) for name, one in others.items()]
    tables += [hashed(rows), advice({**by_size, **others})]
    return Report(
        "routing", f"Routing: 1 to {max(map(int, by_size)):,} replicas of {MACHINE.server.name}", data, tables,
        [*said(by_size), *NOTES, made(data["made"])], lambda: draw(by_size),
        "With more replicas less is found by policies that don't look at the prompt, and only by these",
    )  # fmt: skip


# --- measuring ------------------------------------------------------------------------------------------------------


def measured(study: Study) -> dict[str, Any]:
    trace = study.settings.trace
    assert trace is not None
    plan = [(name, policy, options | {"policy": policy}) for name, options in situations().items() for policy in CALLED]
    plan += [(f"hash of {n}", "consistent_hash", {"replicas": MIDDLE, "policy": "consistent_hash", "beginning": n})
             for n in BEGINNINGS]  # fmt: skip
    if study.settings.quick:
        plan = [one for one in plan if one[2]["replicas"] <= MIDDLE]
    cases = [(place, case) for place, (_, _, options) in enumerate(plan) for case in seeded(options, study)]
    cases.sort(key=lambda one: one[1].replicas)  # the longest last
    answers: dict[int, list[Answer]] = {}
    results = study.each("Routing", answered, [(case, trace, study.settings.folder) for _, case in cases])
    for (place, _), answer in zip(cases, results, strict=True):
        answers.setdefault(place, []).append(answer)
    rows: Rows = {}
    for place, (name, policy, _) in enumerate(plan):
        rows.setdefault(name, {})[policy] = averaged(answers[place])
    content = trace.read_bytes()
    made = {
        "by": f"python -m minipaged.experiments routing --trace {trace.name}" + " --quick" * study.settings.quick,
        "requests": len(content.splitlines()), "sha256": hashlib.sha256(content).hexdigest(),
        "machine": MACHINE.server.name, "seconds": round(sum(one.seconds for one in results)),
    }  # fmt: skip
    return {"made": made, "rows": rows}


def seeded(options: dict[str, Any], study: Study) -> list[Case]:
    """Few replicas have few requests: the same with other seeds."""
    count = max(1, min(8, REQUESTS // options["replicas"]))
    short: dict[str, Any] = {"warm": 60.0, "counted": 60.0} if study.settings.quick else {}
    return [Case(**options, **short, seed=study.seed + seed) for seed in range(count)]


def answered(case: Case, path: Path, folder: Path | None) -> Answer:
    """From the folder if it is there."""
    return recalled(folder, f"{case} ".encode() + path.read_bytes(), lambda: run(case, _trace(path)), Answer)


@lru_cache(maxsize=1)
def _trace(path: Path) -> list[Prompt]:
    return read_blocks(path)


def averaged(answers: Sequence[Answer]) -> Row:
    row = {name: mean(getattr(one, name) for one in answers) for name in (*VALUES, "busy", "requests")}
    return {name: round(value, 5) for name, value in row.items()}


# --- saying ---------------------------------------------------------------------------------------------------------


def shown(row: Row, value: str) -> str:
    return FORMS[value].format(100 * row[value] if value == "found" else row[value])


def sizes(by_size: Rows, value: str) -> Table:
    rows = [[f"{int(size):,}", *(shown(one[policy], value) for policy in CALLED)] for size, one in by_size.items()]
    return Table(f"By the number of replicas: {VALUES[value]}", ["", *CALLED.values()], rows)


def compared(name: str, one: Mapping[str, Row]) -> Table:
    rows = [[CALLED[policy], *(shown(row, value) for value in VALUES)] for policy, row in one.items()]
    return Table(name, ["", *VALUES.values()], rows)


def hashed(rows: Rows) -> Table:
    found = {name: one["consistent_hash"] for name, one in rows.items() if name.startswith("hash of")}
    cells = [[name.removeprefix("hash of "), *(shown(row, value) for value in VALUES)] for name, row in found.items()]
    return Table(f"Consistent hash of so many blocks, {MIDDLE} replicas", ["", *VALUES.values()], cells)


def best(one: Mapping[str, Row]) -> str:
    """The policy with the lowest p50 of those whose p99 is within a tenth of the lowest."""
    real = {policy: row for policy, row in one.items() if policy != "shared"}
    least = min(row["p99"] for row in real.values())
    return min((policy for policy in real if real[policy]["p99"] <= 1.1 * least), key=lambda name: real[name]["p50"])


def advice(rows: Rows) -> Table:
    cells = []
    for name, one in rows.items():
        if name == "1":
            continue  # there is nothing to choose
        policy, called = best(one), f"{int(name):,} replicas" if name.isdecimal() else name
        cells.append([called, CALLED[policy], *(shown(one[policy], value) for value in VALUES)])
    title = "Which to use: the lowest p50 of those within 10 % of the lowest p99"
    return Table(title, ["", "", *VALUES.values()], cells)


def said(by_size: Rows) -> list[str]:
    """What the numbers say, in sentences."""
    first, last = (by_size[size] for size in (min(by_size, key=int), max(by_size, key=int)))
    most, words = max(map(int, by_size)), []
    for policy in CALLED:
        share = last[policy]["found"] / last["shared"]["found"]
        words.append(f"{CALLED[policy]} {100 * last[policy]['found']:.1f} % ({100 * share:.0f} % of what there is)")
    alone = f"with one replica {100 * first['prefix']['found']:.1f} %"
    found = f"Found with {most:,} replicas: {', '.join(words)}; {alone}."
    runs: list[tuple[str, list[str]]] = []
    for size, one in by_size.items():
        if size == "1":
            continue
        policy = best(one)
        if runs and runs[-1][0] == policy:
            runs[-1][1].append(size)
        else:
            runs.append((policy, [size]))
    parts = [f"{CALLED[policy]} with {span(names)} replicas" for policy, names in runs]
    return [found, f"Which to use when, by the last table: {'; '.join(parts)}."]


def span(names: Sequence[str]) -> str:
    return f"{int(names[0]):,}" if len(names) == 1 else f"{int(names[0]):,} to {int(names[-1]):,}"


def made(by: Mapping[str, Any]) -> str:
    what = f"{by['requests']:,} requests, SHA-256 {by['sha256'][:16]}..."
    return f"Made by `{by['by']}` ({what}) in {by['seconds']:,} s of one processor."


NOTES = [
    "The trace is that of conversations (Mooncake, FAST 2025). A replica gets one request a second: so many copies of "
    "the trace come as are needed for that, each of other people, each beginning elsewhere in it; only the first block "
    "that all prompts have in common is the same. 150 s warm up, 100 s count. Of fewer than 32 replicas several runs "
    "are averaged. The router's policies are the package's own (routing/policies.py) with its defaults; its loads are "
    "mean prompts, and the hash is of two blocks.",
    f"A replica keeps {POOLS['host'] / 1e9:.0f} GB of keys and values, on its H100 and in an eighth of a host's 2 TB "
    f"(small pools: {POOLS['gpu'] / 1e9:.0f} GB). It computes prompts in steps of 2,048 tokens, one prompt after "
    "another; answers under way make its steps longer; what is found is copied over PCIe. One endless cache: least "
    "loaded, and everything that was ever computed is found by all: nobody can find more.",
    "Bursts: in every minute all requests come within 20 s. Half the load, more load: 0.5 and 1.4 requests a second "
    f"for each replica. The trace as it is: {12031 / 3540:.1f} requests a second in all.",
]


# --- drawing --------------------------------------------------------------------------------------------------------


def draw(by_size: Rows) -> Figure:
    xs = [int(size) for size in by_size]
    with plots.drawing(*(name[0].upper() + name[1:] for name in VALUES.values()), rows=2) as (picture, axes):
        for one, value in zip(axes, VALUES, strict=True):
            for place, (policy, name) in enumerate(CALLED.items()):
                ys = [row[policy][value] * (100 if value == "found" else 1) for row in by_size.values()]
                look: Any = dict(color=plots.COLORS[place], linestyle=plots.DASHES[place], marker=plots.MARKERS[place])
                one.plot(xs, ys, label=name, **look)
            one.set(xscale="log", ylim=(0, None))
            one.set_xticks(xs, [f"{x:,}" if x in (1, 4, 16, 64, 256, 1000) else "" for x in xs])
            one.minorticks_off()
            plots.label(one, "replicas", "")
        handles, names = axes[0].get_legend_handles_labels()
        picture.legend(handles, names, loc="outside lower center", ncols=5, frameon=False)
    return picture
