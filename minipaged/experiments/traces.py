"""Real traces in a few numbers: python -m minipaged.experiments.traces FILE ...

A trace of an hour has ten thousand requests. Of their lengths and times we keep what a page can hold, in traces.json,
and draw requests from that:

    prompts   quantiles of their lengths
    answers   the same for each quarter of the prompts, from the shortest to the longest: do long ones get long answers?
    minutes   how many requests came in each minute

What is lost: which lengths follow each other, which prompts begin alike (see prefixes.py), and what happens within a
minute.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from random import Random

import numpy as np

from minipaged.experiments.goodput import read_lengths
from minipaged.experiments.loads import Job, TraceError
from minipaged.experiments.routing import read_blocks

FILE = Path(__file__).with_name("traces.json")
LEVELS = (0, 0.01, 0.03, 0.06, *(0.1 + 0.05 * i for i in range(17)), 0.94, 0.97, 0.99, 1)  # of the quantiles
GROUPS = 4  # of prompts, by length


@dataclass(frozen=True)
class Summary:
    """What is kept of a trace. prompts, and each of `answers`: tokens at LEVELS."""

    requests: int
    prompts: list[int]
    answers: list[list[int]]
    minutes: list[int]

    def draw(self, random: Random) -> tuple[int, int]:
        """Tokens of a prompt and its answer."""
        share = random.random()
        return _at(self.prompts, share), _at(self.answers[int(share * GROUPS)], random.random())

    def jobs(self, rate: float, seconds: float, seed: int = 0, rhythm: bool = False) -> list[Job]:
        """Requests of so many seconds, `rate` of them a second on average.

        They come at random (Poisson). rhythm: with the trace's ups and downs, its minutes stretched to the seconds.
        The same seed gives the same requests in the same order, whatever the rest.
        """
        lengths, gaps = Random(f"lengths {seed}"), Random(f"gaps {seed}")
        share, ends = np.cumsum(self.minutes) / sum(self.minutes), np.arange(1, len(self.minutes) + 1)
        found, now = [], 0.0
        while (now := now + gaps.expovariate(rate)) <= seconds:
            when = np.interp(now / seconds, [0, *share], [0, *ends / len(ends)]) * seconds if rhythm else now
            found.append(Job(float(when), *self.draw(lengths)))
        return found


def _at(quantiles: Sequence[int], share: float) -> int:
    """Between two quantiles in equal ratios: lengths of texts spread so."""
    place = min(bisect_right(LEVELS, share), len(LEVELS) - 1)
    low, high = LEVELS[place - 1 : place + 1]
    part = (share - low) / (high - low)
    return round(quantiles[place - 1] ** (1 - part) * quantiles[place] ** part)


def summarize(requests: Sequence[Job]) -> Summary:
    """arrival: seconds from any beginning. The last minute counts only if it is a whole one."""
    if len(requests) < GROUPS:
        raise TraceError(f"{len(requests)} requests are too few for quantiles")
    ordered = sorted(requests, key=lambda job: (job.prompt, job.output))
    bounds = [len(ordered) * group // GROUPS for group in range(GROUPS + 1)]
    groups = [ordered[low:high] for low, high in zip(bounds, bounds[1:], strict=False)]
    begin, end = (pick(job.arrival for job in requests) for pick in (min, max))
    minutes = [0] * max(1, math.floor((end - begin) / 60))
    for job in requests:
        if (minute := int((job.arrival - begin) / 60)) < len(minutes):
            minutes[minute] += 1
    return Summary(
        len(requests), _quantiles(job.prompt for job in ordered),
        [_quantiles(job.output for job in group) for group in groups], minutes,
    )  # fmt: skip


def _quantiles(lengths) -> list[int]:
    return [round(value) for value in np.quantile(list(lengths), LEVELS)]


def read(path: Path) -> list[Job]:
    """Requests of an Azure LLM inference trace (CSV) or of a Mooncake trace (JSON lines), as they came."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if not file.readline().startswith("TIMESTAMP,"):
                return [Job(one.when, one.tokens, one.output) for one in read_blocks(path)]
            file.seek(0)
            times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in csv.DictReader(file)]
    except ValueError as error:
        raise TraceError(f"{path}: {error}") from None
    lengths = read_lengths(path)
    return [Job(when, *both) for when, both in zip(times, lengths, strict=True)]


def known() -> dict[str, Summary]:
    """The traces of traces.json, by name."""
    traces = json.loads(FILE.read_text())["traces"]
    return {name: Summary(**{key: one[key] for key in Summary.__annotations__}) for name, one in traces.items()}


def main(paths: Sequence[str]) -> int:
    """Print the summary of each file, as JSON."""
    if not paths or paths[0] in ("-h", "--help"):
        print("usage: python -m minipaged.experiments.traces FILE ...\n\n"
              "Quantiles of lengths, and requests a minute, of Azure LLM inference traces (CSV)\n"
              "or Mooncake traces (JSON lines), as traces.json has them.")  # fmt: skip
        return 0 if paths else 2
    for path in paths:
        try:
            print(json.dumps(asdict(summarize(read(Path(path))))))
        except (OSError, ValueError) as error:
            print(f"traces: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
