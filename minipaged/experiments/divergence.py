"""How beams diverge: tokens that look like a model's to a beam search, made up.

How much memory beams share depends on one thing only: how far back their paths meet. A beam search finds that out by
itself if the log-probabilities it gets have the right gaps. So these are what is made up, and nothing about paths:

    the best token, the second, the third, ... of a beam; from the k-th to the next the log-probability falls by
    gap k, which is exponential, with mean s / k:      as if logits had exponential tails
    s = scale, but some steps are sharp and others flat (for all beams alike), and some beams are sharper

A softmax over TOKENS of them makes probabilities of it. The numbers are not taken from the paper's Figure 15, but from
a real model: `python -m minipaged.experiments.divergence` lets SmolLM2-135M search, and `fit` looks at the gaps alone:
scale 1.97, by_step 0.17, by_beam 0.24. So where beams meet is not fitted, and is a check. It prints
(standard errors of the real means: 1.5, 8 and 2 percent):

    beams   parents of survivors    tokens back to where    blocks saved by
            in a step               all of them meet        sharing, percent
            real      made up       real      made up       real      made up
        2   1.72         1.72        3.6          3.3       31.3         31.5
        4   3.18         3.17        9.3          9.0       45.2         45.6
        6   4.70         4.64       11.6         13.0       49.5         50.1
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import combinations
from math import log1p, sqrt
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minipaged.decoding.beam_search import BeamSearch
from minipaged.requests.beam_search_params import BeamSearchParams
from minipaged.scheduling.plan import StepOutput, StepPlan

if TYPE_CHECKING:
    from minipaged.llm import LLM

BLOCK_SIZE = 16
OUTPUT = 58  # tokens that are searched: Alpaca's mean answer (paper, Figure 11)
WIDTHS = (2, 4, 6)  # the paper's
TOKENS = 200  # in the made-up vocabulary: the best 12 have 91 % of the probability; measured: 90 %
CHUNK = 32  # steps that are drawn at a time
PROMPTS = (
    "Give three tips for staying healthy when you work at a desk all day.",
    "Explain why the sky is blue to a child who is six years old.",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "List the main causes of the First World War and say which one mattered most.",
    "Describe the structure of an atom, and name the particles that it is made of.",
    "Rewrite this sentence in the passive voice: The committee has chosen a new chairman this morning.",
    "How can I learn to play the guitar if I have only half an hour a day?",
    "Suggest a healthy dinner for two people that takes less than thirty minutes to cook.",
    "Summarize the plot of Romeo and Juliet in a few sentences for a school newspaper.",
    "Write a Python function that returns the largest number in a list of integers.",
    "Compare the advantages of trains and airplanes for a journey of five hundred miles.",
    "Classify the following animals as mammals, birds or reptiles: whale, penguin, crocodile, bat, snake, ostrich.",
)


@dataclass(frozen=True)
class Divergence:
    """scale: the mean of k times gap k, in nats; larger: sharper. The others: standard deviations of log s."""

    scale: float = 1.97
    by_step: float = 0.17
    by_beam: float = 0.24


MEASURED = Divergence()


class Candidates:
    """What a model offers to the beams of one request.

    It depends on seed, request, step and the beam's rank, and not on what was asked before: whatever memory does to
    a request, its search is the same.
    """

    def __init__(self, width: int, seed: int = 0, request: int = 0, model: Divergence = MEASURED):
        self._width, self._seed, self._request, self._model = width, seed, request, model
        self._chunk = -1

    def at(self, step: int) -> list[list[tuple[int, float]]]:
        """For each beam, best first: its 2 * width best next tokens and their log-probabilities."""
        chunk, row = divmod(step, CHUNK)
        if chunk != self._chunk:
            self._chunk, self._logprobs = chunk, self._draw(chunk)
        return [list(enumerate(beam)) for beam in self._logprobs[row].tolist()]

    def _draw(self, chunk: int) -> np.ndarray:
        """Log-probabilities [CHUNK, width, 2 * width]."""
        random, model = np.random.default_rng([self._seed, self._request, chunk]), self._model
        shape = CHUNK, self._width
        spread = model.by_step * random.standard_normal((CHUNK, 1)) + model.by_beam * random.standard_normal(shape)
        sharpness = model.scale * np.exp(spread - (model.by_step**2 + model.by_beam**2) / 2)
        gaps = random.standard_exponential((*shape, TOKENS - 1)) * sharpness[..., None] / np.arange(1, TOKENS)
        logits = np.zeros((*shape, TOKENS))
        logits[..., 1:] = -gaps.cumsum(-1)
        return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[..., : 2 * self._width]


# --- searches, real and made up -------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One step of a search."""

    logprobs: list[list[float]]  # of each beam: what it offered, best first
    paths: list[tuple[int, ...]]  # who survived: all output tokens


@dataclass
class Search:
    """The steps of one request but the last, after which nobody runs. prompt: tokens."""

    width: int
    prompt: int
    steps: list[Step] = field(default_factory=list)


def made_up(width: int, prompt: int, request: int, model: Divergence = MEASURED, output: int = OUTPUT) -> Search:
    """A search of candidates that are made up."""
    search = BeamSearch(BeamSearchParams(width, output, ignore_eos=True), output, ())
    candidates, result = Candidates(width, 0, request, model), Search(width, prompt)
    for number in range(output - 1):
        offered = candidates.at(number)[: len(search.running)]
        search.advance(offered)
        logprobs = [[logprob for _, logprob in beam] for beam in offered]
        result.steps.append(Step(logprobs, [beam.token_ids for beam in search.running]))
    return result


def measured(llm: LLM, prompts: Iterable[str], output: int = OUTPUT) -> list[Search]:
    """Searches of a real model after all prompts, with all widths, side by side."""
    searches: dict[str, Search] = {}
    for width in WIDTHS:
        for prompt in prompts:
            tokens = llm.tokenizer.encode(prompt)
            name = llm.add_request(prompt, BeamSearchParams(width, output, ignore_eos=True))
            searches[name] = Search(width, len(tokens))
    llm.observers.append(_recorder(llm, searches))
    while llm.has_unfinished_requests:
        llm.step()
    llm.observers.pop()
    return list(searches.values())


def _recorder(llm: LLM, searches: dict[str, Search]) -> Callable[[StepPlan, StepOutput], None]:
    def record(plan: StepPlan, output: StepOutput) -> None:
        running = {request.request_id: request.search for request in llm.scheduler.running}
        offered: dict[str, list[list[float]]] = defaultdict(list)
        for s in plan.sequences:
            if s.num_candidates:
                offered[s.request_id].append([logprob for _, logprob in output.candidates[s.seq_id]])
        for name, logprobs in offered.items():
            if search := running.get(name):
                searches[name].steps.append(Step(logprobs, [beam.token_ids for beam in search.running]))

    return record


# --- what they show -------------------------------------------------------------------------------------------------


class Figures(NamedTuple):
    """Means over the steps of searches."""

    parents: float  # beams that at least one survivor comes from
    depth: float  # tokens from the survivors back to where all their paths meet
    saved: float  # percent of the blocks that the beams would have if they shared none


def figures(searches: Iterable[Search]) -> Figures:
    parents, depths, saved = [], [], []
    for search in searches:
        for logprobs, paths in search.steps:
            if len(logprobs) > 1:  # not the prompt
                parents.append(len({path[:-1] for path in paths}))
            depths.append(_depth(paths))
            used, without = count_blocks(search.prompt, paths)
            saved.append(100 * (1 - used / without))
    return Figures(*(float(np.mean(values)) for values in (parents, depths, saved)))


def _depth(paths: list[tuple[int, ...]]) -> int:
    first, last = min(paths), max(paths)  # all others lie between, and so agree wherever these two do
    together = next((place for place, (a, b) in enumerate(zip(first, last, strict=True)) if a != b), len(first))
    return len(first) - together


def count_blocks(prompt: int, paths: list[tuple[int, ...]], block_size: int = BLOCK_SIZE) -> tuple[int, int]:
    """Blocks that beams have, and that they would have without sharing, once their newest tokens are stored.

    No memory is asked: two beams share a block if all is equal up to its end.

    >>> count_blocks(3, [(7, 8, 1), (7, 8, 2)], block_size=2)
    (4, 6)
    """
    length = prompt + len(paths[0])
    ends = [min(end, length) for end in range(block_size, length + block_size, block_size)]
    used = sum(len({path[: max(0, end - prompt)] for path in paths}) for end in ends)
    return used, len(ends) * len(paths)


def fit(searches: list[Search]) -> Divergence:
    """Moments. The mean of k times gap k, over a beam's gaps, estimates s; all such estimates have mean `scale`.

    Estimates of beams at the same step vary together by_step. Of their variance the rest is by_beam, and what comes of
    estimating: n gaps are exponential, so their mean has a relative variance of 1 / n.
    """
    widest = max(search.width for search in searches)  # it tells the most gaps
    steps = [step.logprobs for search in searches if search.width == widest for step in search.steps[1:]]
    logprobs = np.array(steps)
    estimates = -(np.diff(logprobs) * np.arange(1, logprobs.shape[-1])).mean(-1)  # [steps, beams]
    scale = estimates.mean()
    relative = estimates / scale - 1
    together = np.mean([(relative[:, a] * relative[:, b]).mean() for a, b in combinations(range(widest), 2)])
    error = 1 / (logprobs.shape[-1] - 1)
    alone = (1 + relative.var()) / (1 + error) / (1 + together) - 1
    return Divergence(float(scale), sqrt(log1p(max(0.0, together))), sqrt(log1p(max(0.0, alone))))


# --- the command ----------------------------------------------------------------------------------------------------


def table(real: list[Search], model: Divergence, num_made_up: int) -> str:
    """Figures of real searches beside those of made-up ones, by beam width."""
    lines = ["beams   parents of survivors    tokens back to where    blocks saved by",
             "        in a step               all of them meet        sharing, percent",
             "        real      made up       real      made up       real      made up"]  # fmt: skip
    for width in sorted({search.width for search in real}):
        some = [search for search in real if search.width == width]
        others = [made_up(width, some[n % len(some)].prompt, n, model) for n in range(num_made_up)]
        pairs = zip(figures(some), figures(others), (2, 1, 1), strict=True)
        lines.append(f"{width:5d}" + "".join(f"{a:7.{digits}f}{b:13.{digits}f}    " for a, b, digits in pairs).rstrip())
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minipaged.experiments.divergence", description=main.__doc__)
    parser.add_argument("--model", default="smollm2", help="any that the package loads (smollm2)")
    parser.add_argument("--quick", action="store_true", help="three prompts instead of all")
    args = parser.parse_args(argv)
    from minipaged.llm import LLM  # here, since simulations need candidates and no torch

    prompts = PROMPTS[:3] if args.quick else PROMPTS
    llm = LLM(args.model, prefix_cache="none", max_num_seqs=len(prompts) * sum(WIDTHS))
    real = measured(llm, prompts)
    now = fit(real)
    print(f"{args.model}, {len(prompts)} prompts, {OUTPUT} tokens\n\n{table(real, MEASURED, len(prompts) * 8)}\n")
    print(f"fit: scale {now.scale:.2f}, by_step {now.by_step:.2f}, by_beam {now.by_beam:.2f}; made up with {MEASURED}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
