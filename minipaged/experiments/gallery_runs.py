"""What the gallery records: six short runs of the real model, each chosen so that its lesson is seen.

Pools are small, so that all of a pool is seen at once, and so that it matters who has which block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from minipaged.experiments.loads import Job
from minipaged.requests.beam_search_params import BeamSearchParams
from minipaged.requests.sampling_params import SamplingParams
from minipaged.viewer.trace import TraceStep


@dataclass(frozen=True)
class Ask:
    """A message to the model. after: so many steps are over when it comes."""

    message: str
    params: SamplingParams | BeamSearchParams
    after: int = 0


@dataclass(frozen=True)
class Run:
    """A run to record.

    lesson: what it shows, in a sentence. chapter: that explains it.
    shown: how well a step shows it; the page opens at the one that does best, or the first of them.
    options: of the engine. asks: what it is asked.
    jobs: if there are any, these are answered instead, from contiguous memory, each of which reserves just what it will
        need; and once more, beside it, from paged memory.
    height: of its picture, in pixels: as far down the page as its lesson is seen.
    """

    name: str
    title: str
    lesson: str
    chapter: str
    shown: Callable[[TraceStep], float]
    options: dict[str, Any] = field(default_factory=dict)
    asks: Sequence[Ask] = ()
    jobs: Sequence[Job] = ()
    height: int = 900


def drawn(max_tokens: int, n: int = 1, seed: int = 1) -> SamplingParams:
    return SamplingParams(n=n, temperature=0.8, seed=seed, max_tokens=max_tokens)


def likeliest(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens)


# --- how well a step shows it ---------------------------------------------------------------------------------------


def forked(step: TraceStep) -> float:
    """Blocks that are shared while others are copied."""
    return step.state["usage"]["shared"] * len(step.did.get("copies", ()))


def parted(step: TraceStep) -> float:
    """How differently blocks are held: by all beams, by some, alone. No copy is of a block that is free now."""
    holders, copies = step.memory.holders(), step.did.get("copies", ())
    sharers = {tuple(names) for names in holders.values() if len(names) > 1}
    alone = any(len(names) == 1 for names in holders.values())
    return len(sharers) + 2 * alone + 0.1 * len(copies) - any(source not in holders for source, _ in copies)


def swapped(step: TraceStep) -> float:
    return len(step.did.get("swap_out", ()))


def found(step: TraceStep) -> float:
    """Tokens that were found, once something had to be evicted."""
    return sum(step.did.get("found", {}).values()) if step.state["usage"]["evicted"] else 0


def chunk(step: TraceStep) -> float:
    """Tokens of a prompt that has begun, beside others' next ones."""
    computed = step.did.get("computed", {}).values()
    return max((own for start, own, _ in computed if start > 40 and len(computed) > 2), default=0)


def useless(step: TraceStep) -> float:
    """Blocks that stay free while somebody waits."""
    usage = step.state["usage"]
    waits = any(request["state"] == "waiting" for request in step.state["requests"].values())
    return usage["num_blocks"] - usage["used"] if waits and "finished" not in step.did else 0


# --- the runs -------------------------------------------------------------------------------------------------------

EXAMPLES = "Which is larger? A mouse or a cat: a cat. A tree or a leaf: a tree. "
COLOURS = "Give the colour of each thing. Grass: green. Snow: white. "
BEGINNINGS = (
    EXAMPLES + "A car or a bus:", EXAMPLES + "The sun or the moon:", COLOURS + "Coal:", COLOURS + "A lemon:",
    EXAMPLES + "The sun or a star:", "Name a fruit.", COLOURS + "A lemon and a lime:", "Name a river.",
    EXAMPLES + "The sun or the moon or a star:",
)  # fmt: skip
STORY = (
    "Summarize this in one sentence. The lighthouse stood at the end of the long pier, and every evening the keeper "
    "climbed its hundred and twelve steps to light the lamp. In winter the waves broke over the stones and the wind "
    "took his hat, and once a fishing boat was thrown against the rocks below, and he pulled four men out of the "
    "water with a rope. They came back each year on that day, and brought him bread, a bottle of wine, and a new hat. "
    "When he grew old, the youngest of them took the lamp over, and counted the steps again, since the keeper had "
    "always said that there might be one more."
)
ALONE = {"num_cpu_blocks": 0, "prefix_cache": "none"}  # one mechanism at a time

RUNS = (
    Run(
        "fork", "Three samples of one prompt",
        "Three samples share the blocks of their prompt; who writes into a block that others hold gets a copy first.",
        "08_sampling_and_forks", forked,
        {"num_blocks": 24, **ALONE},
        [Ask("Why is the sky blue? Tell it to a child of five years, in two short sentences.", drawn(40, n=3, seed=3))],
    ),
    Run(
        "beams", "Beam search, four beams",
        "Beams part and die: what they have in common is stored once, and what a dead one alone held is free at once.",
        "09_beam_search", parted,
        {"num_blocks": 24, **ALONE},
        [Ask("Write one sentence about the sea.", BeamSearchParams(beam_width=4, max_tokens=40))],
    ),
    Run(
        "swap", "Too little memory for all",
        "When no block is left, the latest request makes way: its blocks are copied to CPU memory, and later back.",
        "12_preemption", swapped,
        {"num_blocks": 16, "num_cpu_blocks": 16, "preemption": "swap", "prefix_cache": "none"},
        [Ask(text, drawn(48, n=2)) for text in ("Tell me a joke.", "Name three rivers.", "What is love?")],
        height=1080,
    ),
    Run(
        "prefixes", "A tree of prefixes",
        "Prompts that begin alike find what was computed for others; what was used longest ago is evicted first.",
        "14_radixattention", found,
        {"num_blocks": 24, "num_cpu_blocks": 0, "block_size": 8, "prefix_cache": "radix", "max_num_seqs": 2},
        [Ask(text, likeliest(12)) for text in BEGINNINGS],
        height=1740,
    ),
    Run(
        "chunks", "A long prompt in pieces",
        "A step computes first a token for everyone who runs, then a piece of the long prompt: nobody waits for it.",
        "11_chunked_prefill", chunk,
        {"num_blocks": 24, "max_num_seqs": 4, "max_num_batched_tokens": 18, **ALONE},
        [Ask("Count from one to twenty.", likeliest(44)), Ask("Name the days of the week.", likeliest(44)),
         Ask(STORY, likeliest(24), after=8)],
        height=1000,
    ),
    Run(
        "fragments", "Free, and of no use",
        "Half of the memory is free, and yet E waits: in contiguous memory there is no hole that is large enough.",
        "03_the_memory_wall", useless,
        {"num_blocks": 32, **ALONE},
        jobs=[Job(0.0, 100, 29), Job(0.0, 50, 79), Job(0.0, 96, 33), Job(0.0, 60, 69), Job(0.0, 224, 33)],
    ),
)  # fmt: skip
PAGED = "The same requests from paged memory: blocks need not lie side by side, so E runs."  # beside the last one
