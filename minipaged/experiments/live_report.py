"""What came of the live comparison: rows from runs, two tables, three pictures."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minipaged.experiments.live_client import Client, Moment
from minipaged.experiments.report import Report, Table
from minipaged.experiments.systems import KINDS
from minipaged.teaching import plots


@dataclass(frozen=True)
class LiveRow:
    """One system at one rate. Times are in seconds; means over time are weighted by it."""

    system: str
    rate: float | None  # requests a second; None: all at once
    num_requests: int
    seconds: float  # to the last token
    output_tokens: int  # useful ones
    computed_tokens: int  # all: prompts, pads, surplus, and what was computed again after a preemption
    tokens_per_second: float  # useful ones
    preemptions: int
    mean_running: float
    peak_running: int
    account: dict[str, float]  # percent of the memory: see `Account`
    waiting: float  # the share of the time in which at least one request waited
    account_waiting: dict[str, float] | None  # the account of that time alone, when memory was wanted
    latency: dict[str, float]  # normalized: seconds to the end for each token of the answer; "p50", "p90", "p99"
    first_token: dict[str, float]  # "p50", "p99"; a padded batch gives its results when it ends
    same_tokens: int | None = None  # answers that are the same as paged's; None where pads or nothing to compare


@dataclass(frozen=True)
class LiveResult:
    """rows: rate by rate, the systems in their order. settings: LiveSettings, with the rates that were run."""

    rows: list[LiveRow]
    machine: dict[str, Any]
    settings: dict[str, Any]
    mean_prompt: float  # tokens
    mean_output: float
    kv_bytes: int  # of the whole memory
    most_contiguous: int  # requests of max_model_len that can have a contiguous piece at a time


def summarize(name: str, rate: float, client: Client, paged: Client | None) -> LiveRow:
    """A run as a row. RuntimeError if a request did not get the tokens that it wanted."""
    got = [len(client.tokens.get(number, [])) for number in range(len(client.jobs))]
    if got != [job.output for job in client.jobs]:
        raise RuntimeError(f"{name}: answers have {got} tokens, not what was asked for: a mistake in minipaged")
    seconds = sum(moment.seconds for moment in client.moments)
    crowded = [moment for moment in client.moments if moment.waiting]
    compare = paged is not None and paged is not client and not client.system.padded
    return LiveRow(
        system=name,
        rate=None if rate == math.inf else rate,
        num_requests=len(client.jobs),
        seconds=seconds,
        output_tokens=sum(got),
        computed_tokens=sum(moment.computed for moment in client.moments),
        tokens_per_second=sum(got) / seconds,
        preemptions=sum(client.llm.scheduler.num_preemptions.values()),
        mean_running=sum(moment.running * moment.seconds for moment in client.moments) / seconds,
        peak_running=max(moment.running for moment in client.moments),
        account=percent(client.moments),
        waiting=sum(moment.seconds for moment in crowded) / seconds,
        account_waiting=percent(crowded) if crowded else None,
        latency=percentiles([client.finished[n] / job.output for n, job in enumerate(client.jobs)], 50, 90, 99),
        first_token=percentiles(list(client.first.values()), 50, 99),
        same_tokens=sum(client.tokens[n] == paged.tokens[n] for n in client.tokens) if compare and paged else None,
    )


def percent(moments: Sequence[Moment]) -> dict[str, float]:
    """The mean account over time, in percent of the memory."""
    sums = {name: sum(getattr(moment.account, name) * moment.seconds for moment in moments) for name in KINDS}
    return {name: 100 * value / sum(sums.values()) for name, value in sums.items()}


def percentiles(numbers: Sequence[float], *wanted: int) -> dict[str, float]:
    """The smallest of the numbers that so many percent don't exceed.

    >>> percentiles([5.0, 1.0, 2.0, 3.0, 4.0], 50, 90)
    {'p50': 3.0, 'p90': 5.0}
    """
    ranked = sorted(numbers)
    return {f"p{part}": ranked[-(-part * len(ranked) // 100) - 1] for part in wanted}


# --- for eyes ---------------------------------------------------------------------------------------------------


def tables(result: LiveResult) -> list[Table]:
    """How fast, and what became of the memory."""
    speed = ["requests/s, system", "tok/s", "batch", "most", "p50", "p90", "p99", "first", "computed"]
    memory = ["requests/s, system", *KINDS, "waiting"]
    return [
        Table("Speed", speed, [[_name(row), *_speed(row)] for row in result.rows]),
        Table("Percent of the memory", memory, [[_name(row), *_memory(row)] for row in result.rows]),
    ]


NOTES = (
    "tok/s: useful output tokens a second. batch: requests in it, the mean over time; most: the most of them. p50, p90 "
    "and p99: milliseconds from arrival to the end, for each token of the answer. first: seconds to the first token, "
    "median. computed: tokens computed for one useful output token, with prompts, pads and surplus.",
    "waiting: percent of the time in which a request waited. If there was such a time, the account is of it alone.",
)


def _name(row: LiveRow) -> str:
    return f"{'all at once' if row.rate is None else f'{row.rate:g}'}, {row.system}"


def _speed(row: LiveRow) -> list[str]:
    latency = [f"{1000 * value:.0f}" for value in row.latency.values()]
    running = [f"{row.mean_running:.1f}", f"{row.peak_running}"]
    computed = f"{row.computed_tokens / row.output_tokens:.1f}"
    return [f"{row.tokens_per_second:.1f}", *running, *latency, f"{row.first_token['p50']:.2f}", computed]


def _memory(row: LiveRow) -> list[str]:
    account = row.account_waiting or row.account
    return [*(f"{account[name]:.1f}" for name in KINDS), f"{100 * row.waiting:.0f}"]


def draw(result: LiveResult, median: Axes, tail: Axes, memory: Axes) -> None:
    """Normalized latency over the rate, its median and p90; and the account while requests wait, at the highest rate.

    All at once has no rate: it stands in the third picture only.
    """
    systems = list(dict.fromkeys(row.system for row in result.rows))
    for axes, part in ((median, "p50"), (tail, "p90")):
        for name in systems:
            points = sorted((row.rate, row.latency[part]) for row in result.rows if row.system == name and row.rate)
            if points:
                plots.line(axes, [rate for rate, _ in points], [1000 * value for _, value in points], name)
        plots.logarithmic(axes)
        plots.label(axes, "requests a second", "ms for each token")
    highest = max(math.inf if row.rate is None else row.rate for row in result.rows)
    last = [row for row in result.rows if (math.inf if row.rate is None else row.rate) == highest]
    plots.bars(memory, {row.system: row.account_waiting or row.account for row in last})


def report(result: LiveResult) -> Report:
    """Tables and pictures of a comparison."""
    machine, settings = result.machine, result.settings
    slots = settings["num_blocks"] * settings["block_size"]
    about = (
        f"{settings['model']} in {settings['dtype']} on {machine['cpu']}, {machine['threads']} threads, kernels "
        f"{machine['kernels']}; {settings['num_requests']} requests, prompts of {result.mean_prompt:.0f} and answers "
        f"of {result.mean_output:.0f} tokens on average; memory for {slots} tokens, that is, {result.most_contiguous} "
        f"requests of {settings['max_model_len']}."
    )

    def picture() -> Figure:
        names = ("Latency, median", "Latency, 90th percentile", "Memory, while requests wait")
        with plots.drawing(*names, size=(12.5, 3.4)) as (drawing, axes):
            draw(result, *axes)
        return drawing

    alt = "Latency over request rate, of static batches, contiguous memory and paging; and what is in the memory"
    title = "Live: three memories, one engine"
    return Report("live", title, asdict(result), tables(result), [*NOTES, about], picture, alt)
