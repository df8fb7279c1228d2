"""What the systems are asked to do: requests with their lengths, and when they come.

The paper's data sets are not here, so lengths are drawn at random: log-normal, many short ones and a long tail, as
lengths of texts are. How the numbers were chosen:

    means          the paper's Figure 11
    limits         prompts up to 1024 tokens, prompt and answer together up to 2048: longer ones are drawn again.
                   So vLLM's own benchmark prunes the data sets; 2048 is all that OPT can read
    ShareGPT's     read from the paper's Figure 2. With Orca (Max) seven requests run, whatever they are, and 13.3 %
     answers       of 15,728 slots wait for tokens to come: 299 for each request. Over time a request has half its
                   answer to come, and long answers are there for longer: E[o^2] / 2 E[o] = 299. With the mean this
                   gives the spread, 0.87. The bar's other part says that answers don't depend on prompts: 20.4 - 13.3
                   per cent are 160 tokens for each request, and the mean prompt has 161
    the rest       chosen: people paste texts of any length (ShareGPT's prompts), Alpaca's instructions are short and
                   alike, and its answers spread as ShareGPT's do

Chats and translations (Figures 16 and 17) are described at `CHAT_ROUNDS` and `LENGTHS`. Instead of all this a trace
can be read from a file: see `read_trace`.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from itertools import count
from pathlib import Path
from random import Random
from statistics import NormalDist

import numpy as np

from minipaged.teaching.loads import Job, Lengths

LONGEST = 2048  # tokens of prompt and answer together
LONGEST_PROMPT = LONGEST_ANSWER = 1024  # the latter in chats only
# Chats: a question comes after so many rounds on average (geometric; our guess). Of all that was said the last 1024
# tokens are the prompt, and the answer ends at 1024 (paper, section 6.4).
CHAT_ROUNDS = 3.5


LENGTHS = {
    "sharegpt": Lengths(161.31, 337.99, 1.2, 0.87),
    "alpaca": Lengths(19.31, 58.45, 0.5, 0.87),
    # Figure 16 translates sentences; the examples before them are not counted here. About thirty tokens a sentence,
    # and German takes a few more than English.
    "translation": Lengths(30, 40, 0.5, 0.5),
}
NAMES = (*LENGTHS, "chat")


def jobs(load: str, rate: float, seconds: float, seed: int = 0) -> list[Job]:
    """The requests of so many seconds, `rate` of them a second at random (Poisson), in the order of arrival.

    The same seed gives the same requests at every rate: they only come faster.

    >>> two, four = jobs("sharegpt", 2.0, 1000), jobs("sharegpt", 4.0, 500)
    >>> [job[1:] for job in two] == [job[1:] for job in four], round(len(two), -2)
    (True, 2000)
    """
    if load not in NAMES:
        return _from_trace(read_trace(Path(load)), rate, seconds, seed)
    drawn: list[Job] = []
    for chunk in range(math.ceil(2 * rate * seconds / CHUNK) + 1):
        for job in _chunk(load, seed, chunk):
            arrival = (job.arrival + (drawn[-1].arrival * rate if drawn else 0.0)) / rate
            if arrival > seconds:
                return drawn
            drawn.append(Job(arrival, job.prompt, job.output))
    raise AssertionError("twice as many requests as expected were not enough")


CHUNK = 4096


def _from_trace(found: list[Job], rate: float, seconds: float, seed: int) -> list[Job]:
    """The requests of a trace, again and again from the start; its own times are stretched to the wanted rate."""
    random = Random(seed)
    drawn: list[Job] = []
    timed = found[0].arrival >= 0
    length = found[-1].arrival * (1 + 1 / len(found))  # and after as long as usual it begins anew
    now = 0.0
    for number in count():
        job = found[number % len(found)]
        if timed:
            now = (number // len(found) + job.arrival / length) * len(found) / rate
        else:
            now += random.expovariate(rate)
        if now > seconds:
            return drawn
        drawn.append(job._replace(arrival=now))
    raise AssertionError("time stands still")


@lru_cache(maxsize=256)
def _chunk(load: str, seed: int, number: int) -> list[Job]:
    """Requests number * CHUNK and on; `arrival` is the time since the one before, at one a second."""
    random = Random(f"{load} {seed} {number}")
    if load == "chat":
        return [Job(random.expovariate(1.0), *_chat(random)) for _ in range(CHUNK)]
    lengths = LENGTHS[load]
    return [Job(random.expovariate(1.0), *_draw(random, lengths)) for _ in range(CHUNK)]


def _draw(random: Random, lengths: Lengths) -> tuple[int, int]:
    """Tokens of a prompt and its answer."""
    centres = _centres(lengths)
    while True:
        prompt = round(random.lognormvariate(centres[0], lengths.prompt_spread))
        output = round(random.lognormvariate(centres[1], lengths.output_spread))
        if 1 <= prompt <= LONGEST_PROMPT and output >= 1 and prompt + output <= LONGEST:
            return prompt, output


def _chat(random: Random) -> tuple[int, int]:
    """A question after some rounds, and its answer."""
    lengths = LENGTHS["sharegpt"]
    prompt, output = _draw(random, lengths)
    while random.random() < 1 - 1 / (1 + CHAT_ROUNDS):
        prompt += sum(_draw(random, lengths))
    return min(prompt, LONGEST_PROMPT), min(output, LONGEST_ANSWER)


@lru_cache
def _centres(lengths: Lengths) -> tuple[float, float]:
    """The means of the logarithms for which the lengths within the limits have the given means."""
    normal, wanted = NormalDist(), np.log([lengths.prompt, lengths.output])
    quantiles = np.array([normal.inv_cdf((i + 0.5) / 400) for i in range(400)])
    centres = wanted.copy()
    for _ in range(100):  # what comes out too low is raised
        prompts = np.exp(centres[0] + quantiles * lengths.prompt_spread)[:, None]
        outputs = np.exp(centres[1] + quantiles * lengths.output_spread)[None, :]
        fit = (prompts <= LONGEST_PROMPT) & (prompts + outputs <= LONGEST)
        centres += wanted - np.log([(fit * prompts).sum() / fit.sum(), (fit * outputs).sum() / fit.sum()])
    return float(centres[0]), float(centres[1])


class TraceError(ValueError):
    """A trace file that can't be used; the message names the line."""


def read_trace(path: Path) -> list[Job]:
    """Requests from a file with one JSON object a line: {"prompt": 161, "output": 338, "arrival": 0.25}.

    prompt and output: tokens. arrival: seconds from the beginning, never falling; where no line has one, they come at
    random, as drawn loads do.
    """
    found: list[Job] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise TraceError(f"{path} is no text; one JSON object a line is wanted, {EXAMPLE}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append(_read_job(json.loads(line)))
            except (ValueError, OverflowError, RecursionError) as error:
                raise TraceError(f"{path}, line {number}: {error}") from None
    if not found:
        raise TraceError(f"{path}: no requests; one JSON object a line is wanted, {EXAMPLE}")
    timed = [job.arrival for job in found if job.arrival >= 0]
    if timed and (len(timed) < len(found) or timed != sorted(timed)):
        raise TraceError(f"{path}: either all lines or none must have an arrival, and arrivals must not fall")
    if timed and timed[-1] == 0:
        raise TraceError(f"{path}: the arrivals are all 0, so they have no rate; leave them out")
    return found


EXAMPLE = '{"prompt": 161, "output": 338}'


def _read_job(line: dict) -> Job:
    if not isinstance(line, dict) or not {"prompt", "output"} <= line.keys():
        raise ValueError(f"an object such as {EXAMPLE} is wanted, not {json.dumps(line)}")
    if unknown := line.keys() - {"prompt", "output", "arrival"}:
        raise ValueError(f"unknown {', '.join(sorted(unknown))}; known are prompt, output and arrival")
    for name in ("prompt", "output"):
        if type(line[name]) is not int or line[name] < 1:
            raise ValueError(f"{name} must be a number of tokens from 1 on, not {json.dumps(line[name])}")
    if line["prompt"] + line["output"] > LONGEST:
        raise ValueError(f"prompt and output together have more than {LONGEST} tokens")
    arrival = line.get("arrival", -1)
    if type(arrival) not in (int, float) or ("arrival" in line and not 0 <= arrival < math.inf):
        raise ValueError(f"arrival must be a number of seconds, not {json.dumps(line['arrival'])}")
    return Job(float(arrival), line["prompt"], line["output"])
