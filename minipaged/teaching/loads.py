"""Requests that look like those of the paper: how long their prompts and answers are, and when they come.

The paper draws them from two data sets of conversations, of which Figure 11 gives the mean lengths. The data sets
themselves are not here, so lengths are drawn from log-normal distributions, which are what lengths of texts look
like: many short ones, a few very long. The means are the paper's. The spread is our choice, and stated below.

This is the plain version, for the first chapters. Chapter 15 reads the spread out of one of the paper's figures, and
draws again what is too long, instead of cutting it: minipaged/experiments/loads.py.
"""

import math
from dataclasses import dataclass
from random import Random
from statistics import NormalDist
from typing import NamedTuple

MAX_LEN = 2048  # tokens of prompt and answer together: the limit of OPT, the paper's model


class Job(NamedTuple):
    """One request: seconds until it comes, tokens of its prompt, and tokens of the answer that it is going to get."""

    arrival: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of prompts and answers, and the standard deviations of their logarithms (before the limits)."""

    prompt: float
    output: float
    prompt_spread: float
    output_spread: float


# Alpaca's instructions are short and alike; what people pasted into ShareGPT's conversations varies most.
SHAREGPT = Lengths(prompt=161.31, output=337.99, prompt_spread=1.2, output_spread=0.9)
ALPACA = Lengths(prompt=19.31, output=58.45, prompt_spread=0.5, output_spread=0.9)


def draw(lengths: Lengths, count: int, rate: float, seed: int = 0) -> list[Job]:
    """`count` jobs in the order of their arrival, `rate` of them a second, at random (Poisson).

    No prompt and no answer is longer than MAX_LEN / 2, so that both together always fit.

    >>> jobs = draw(SHAREGPT, 10_000, rate=2.0)
    >>> round(sum(job.prompt for job in jobs) / 10_000), round(sum(job.output for job in jobs) / 10_000)
    (161, 340)
    """
    random = Random(seed)
    prompt_mu = _mu(lengths.prompt, lengths.prompt_spread, MAX_LEN // 2)
    output_mu = _mu(lengths.output, lengths.output_spread, MAX_LEN // 2)
    jobs, now = [], 0.0
    for _ in range(count):
        now += random.expovariate(rate)
        prompt = random.lognormvariate(prompt_mu, lengths.prompt_spread)
        output = random.lognormvariate(output_mu, lengths.output_spread)
        jobs.append(Job(now, *(max(1, round(min(length, MAX_LEN // 2))) for length in (prompt, output))))
    return jobs


def _mu(mean: float, spread: float, limit: float) -> float:
    """The logarithm's mean for which lengths that are cut off at `limit` have the given mean."""
    low, high = 0.0, math.log(limit)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _mean_up_to(limit, middle, spread) < mean else (low, middle)
    return low


def _mean_up_to(limit: float, mu: float, spread: float) -> float:
    """The mean of min(X, limit) for a log-normal X."""
    normal = NormalDist()
    beyond = (math.log(limit) - mu) / spread
    below = math.exp(mu + spread**2 / 2) * normal.cdf(beyond - spread)
    return below + limit * (1 - normal.cdf(beyond))
