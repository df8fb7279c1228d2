"""Assignment 4: what the scheduler is tried with."""

import json
import random
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from minipaged.course.assignment import Case
from minipaged.course.checking import without
from minipaged.course.inside import drive_scheduler
from minipaged.requests.request import Request
from minipaged.requests.sampling_params import SamplingParams

NAMES = "abcdefghij"
PLAIN: Case = {
    "cpu_blocks": 0, "cache": "none", "seqs": 8, "budget": 64, "watermark": 0.0, "schedule": "fcfs", "chunks": True,
    "preemption": "recompute", "patience": 2, "patience_of_driver": 400,
}  # fmt: skip
ALONE = {"at": 0, "same": 0, "n": 1, "beams": 0, "scored": False, "abort": None}
SMALL_BUDGETS = (0, 1, 2, 4, 8, 16)


# --- servers ---------------------------------------------------------------------------------------------------


def request(rng: random.Random, number: int, longest: int, **wish: Any) -> Case:
    prompt, most = rng.randint(1, longest), rng.randint(*wish.get("outputs", (1, 4)))
    same = rng.choice([0, prompt // 2, prompt]) if wish.get("alike") else 0
    n = rng.choice([1, *wish.get("samples", (1,))])
    beams = rng.choice(wish.get("beams", (0,))) if n == 1 else 0
    scored = not beams and rng.random() < wish.get("scored", 0)
    at = rng.randint(0, wish.get("spread", 4))
    abort = at + rng.randint(1, 8) if rng.random() < wish.get("aborts", 0) else None
    return {
        "name": NAMES[number], "at": at, "prompt": prompt, "same": same, "most": most, "n": n, "beams": beams,
        "scored": scored, "abort": abort,
    }  # fmt: skip


def most_blocks(asked: Case, block_size: int) -> int:
    """What it can need at the worst."""
    width = asked["beams"] or asked["n"]
    like = Request("", 0, [0] * asked["prompt"], SamplingParams(width, max_tokens=asked["most"]), asked["most"])
    return like.most_blocks(block_size)


def server(rng: random.Random, size: int, longest: int, spare: int, **wish: Any) -> Case:
    """Up to `size` requests, and a pool that has up to `spare` blocks more than the largest of them needs."""
    block_size = rng.choice([1, 2, 4, 4])
    asked = [request(rng, number, longest, **wish) for number in range(size)]
    for one in asked:
        one["at"] = 0 if one is asked[0] else one["at"]
    widest = max(one["beams"] or one["n"] for one in asked)
    seqs = widest + rng.choice([0, 1, 4, 8])
    need = max(most_blocks(one, block_size) for one in asked)
    return {
        **PLAIN,
        "blocks": need + rng.randint(0, spare),
        "block_size": block_size,
        "cpu_blocks": rng.choice(wish.get("cpu", (0,))),
        "cache": rng.choice(wish.get("caches", ("none",))),
        "seqs": seqs,
        "budget": seqs + rng.choice(wish.get("budgets", SMALL_BUDGETS)),
        "watermark": rng.choice(wish.get("watermarks", (0.0,))),
        "schedule": rng.choice(wish.get("schedules", ("fcfs",))),
        "chunks": rng.random() < wish.get("chunks", 1),
        "preemption": rng.choice(wish.get("modes", ("recompute",))),
        "patience": rng.choice([0, 1, 2]),
        "requests": asked,
    }


def served(case: Case) -> Any:
    """What the reference does with a case; not to be changed."""
    return _served(json.dumps(case))


@lru_cache(maxsize=8)
def _served(case: str) -> Any:
    return drive_scheduler.serve(json.loads(case))


def eventful(cases: Iterator[Case], what: str, every: int, in_full_steps: bool = False) -> Iterator[Case]:
    """Those with a step in which somebody was `what`: "preempted" or "resumed"; and each so manieth of the others.

    in_full_steps: only steps that compute as many tokens as they may.
    """
    others = 0
    for case in cases:
        steps = served(case)["steps"]
        if in_full_steps:
            steps = [step for step in steps if sum(len(s["tokens"]) for s in step["sequences"]) == case["budget"]]
        happens = any(step[what] for step in steps)
        others += not happens
        if happens or others % every == 1:
            yield case


def sizes(most: int, longest: int) -> Iterator[tuple[int, int]]:
    """(how many requests, the longest prompt): from small to large."""
    for round_ in range(1000):
        yield min(2 + round_ // 10, most), min(4 + round_ // 2, longest)


def _known(asked: list[tuple[str, int, int, int, int]], **settings: Any) -> Case:
    """A case that chance seldom makes. asked: (name, at, prompt, most, n)."""
    keys = ("name", "at", "prompt", "most", "n")
    requests = [{**ALONE, **dict(zip(keys, one, strict=True))} for one in asked]
    return {**PLAIN, "cpu_blocks": 20, "seqs": 4, "budget": 4, "preemption": "auto", **settings, "requests": requests}


# Others have all the tokens for long prompts when one that is long by now may come back.
LONG_AND_AWAY = _known(
    [("a", 0, 11, 5, 1), ("c", 0, 8, 1, 1), ("d", 0, 3, 7, 2), ("f", 0, 1, 1, 1)], blocks=8, block_size=4, budget=7,
    preemption="swap",
)  # fmt: skip
# There is one token less than the sequences that may come back need, or just as many.
ONE_TOO_FEW = _known(
    [("a", 0, 1, 9, 1), ("b", 0, 13, 3, 1), ("c", 0, 1, 3, 1), ("d", 0, 2, 2, 2)], blocks=11, block_size=2
)
JUST_ENOUGH = _known([("a", 0, 2, 7, 1), ("b", 0, 14, 1, 1), ("d", 1, 4, 2, 2)], blocks=20, block_size=1)


# The prompts are alike, and the salts are not.
SALTED = _known([("a", 0, 4, 4, 1), ("b", 1, 4, 1, 1)], blocks=8, block_size=1, budget=8, cache="hash")
SALTED["requests"] = [{**one, "same": 4, "salt": salt} for one, salt in zip(SALTED["requests"], "xy", strict=True)]
# Who makes way gives two tokens back, and another has use for both.
TWO_BACK = _known(
    [("a", 0, 3, 7, 1), ("b", 3, 11, 1, 1), ("c", 3, 1, 4, 2)], blocks=6, block_size=4, budget=5, seqs=5,
    preemption="recompute", cpu_blocks=0,
)  # fmt: skip


def admit_cases(rng: random.Random) -> Iterator[Case]:
    yield from (LONG_AND_AWAY, SALTED)
    for size, longest in sizes(6, 24):
        spare = rng.choice([0, 2, 6, 30])
        yield server(
            rng, size, longest, spare, samples=(1, 1, 2), alike=True, caches=("none", "hash", "radix"), chunks=0.7,
            watermarks=(0.0, 0.1, 0.3), schedules=("fcfs", "fcfs", "prefix"), scored=0.15, modes=("recompute", "auto"),
            cpu=(0, 6),
        )  # fmt: skip


def run_cases(rng: random.Random) -> Iterator[Case]:
    """Of three kinds by turns: all that there is; memory that is short; prompts that are longer than a step."""
    kinds = [eventful(_run_cases(rng), "preempted", 3), make_way_cases(rng)]
    kinds.append(eventful(_chunked_cases(rng), "preempted", 20, in_full_steps=True))
    yield from map(next, kinds)
    yield TWO_BACK
    while True:
        yield from map(next, kinds)


def _run_cases(rng: random.Random) -> Iterator[Case]:
    for size, longest in sizes(5, 12):
        yield server(
            rng, size, longest, rng.choice([0, 1, 2, 5]), samples=(1, 2, 3), beams=(0, 0, 0, 2, 3), scored=0.2,
            aborts=0.15, outputs=(2, 8), spread=2, cpu=(0, 4, 20), modes=("recompute", "swap", "auto"), chunks=0.8,
            alike=True, caches=("none", "none", "hash"),
        )  # fmt: skip


def make_way_cases(rng: random.Random) -> Iterator[Case]:
    return eventful(_make_way_cases(rng), "preempted", 8)


def _make_way_cases(rng: random.Random) -> Iterator[Case]:
    for size, longest in sizes(4, 9):
        yield server(
            rng, size, longest, rng.choice([0, 0, 1]), samples=(1, 2, 3), beams=(0, 0, 2), aborts=0.1,
            cpu=(0, 3, 6, 30), modes=("recompute", "swap", "auto"), caches=("none", "none", "hash", "radix"), spread=2,
            outputs=(4, 10), budgets=(0, 1, 2, 4, 16),
        )  # fmt: skip


def resume_cases(rng: random.Random) -> Iterator[Case]:
    yield from (ONE_TOO_FEW, JUST_ENOUGH)
    kinds = [eventful(_resume_cases(rng), "resumed", 8)]
    kinds.append(eventful(_chunked_cases(rng), "resumed", 20, in_full_steps=True))
    while True:
        yield from map(next, kinds)


def _chunked_cases(rng: random.Random) -> Iterator[Case]:
    """A short prompt with a long answer, a long one with a short answer, and others, in small steps."""
    while True:
        case = server(
            rng, rng.randint(3, 4), 4, 0, samples=(1, 1, 2, 2), cpu=(20, 40),
            modes=("auto", "auto", "swap", "recompute"), outputs=(4, 10), spread=3,
        )  # fmt: skip
        first, second, *_ = case["requests"]
        first |= {"most": rng.randint(8, 14), "n": 1}
        second |= {"prompt": rng.randint(8, 16), "most": rng.randint(1, 3), "n": 1, "at": rng.randint(0, 1)}
        seqs = rng.randint(3, 5)
        need = max(most_blocks(one, case["block_size"]) for one in case["requests"])
        yield {
            **case, "seqs": seqs, "budget": seqs + rng.randint(0, 4), "blocks": need + rng.randint(1, 3),
        }  # fmt: skip


def _resume_cases(rng: random.Random) -> Iterator[Case]:
    for size, longest in sizes(4, 6):
        yield server(
            rng, size, longest, rng.choice([0, 0, 1, 2]), samples=(1, 2, 3), beams=(0, 0, 2), cpu=(30, 60),
            modes=("swap", "swap", "auto"), caches=("none", "hash"), aborts=0.1, watermarks=(0.0, 0.1, 0.3), spread=2,
            outputs=(4, 10),
        )  # fmt: skip


def smaller_server(case: Case) -> Iterator[Case]:
    """Fewer requests, shorter ones, plainer ones; and plainer settings."""
    if len(case["requests"]) > 1:
        yield from without(case, "requests")
    for key in ("cache", "watermark", "schedule", "chunks", "cpu_blocks"):
        if case[key] != PLAIN[key]:
            yield {**case, key: PLAIN[key]}
    for place, asked in enumerate(case["requests"]):
        for key in ("n", "beams", "scored", "abort", "same"):
            if asked[key] != ALONE[key]:
                yield _with(case, place, {**asked, key: ALONE[key]})
        if asked.get("salt"):
            yield _with(case, place, {**asked, "salt": None})
        for key, least in (("at", 0), ("prompt", 1), ("most", 1)):
            for less in dict.fromkeys(((asked[key] + least) // 2, asked[key] - 1)):
                if least <= less < asked[key]:
                    yield _with(case, place, {**asked, key: less, "same": min(asked["same"], less)
                                if key == "prompt" else asked["same"]})  # fmt: skip
    if case["blocks"] > 1:
        yield {**case, "blocks": case["blocks"] - 1}


def _with(case: Case, place: int, asked: Case) -> Case:
    return {**case, "requests": [*case["requests"][:place], asked, *case["requests"][place + 1 :]]}


def some(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def show_server(case: Case) -> str:
    cpu = f" (and {case['cpu_blocks']} in CPU memory)" if case["cpu_blocks"] else ""
    extra = [f"{case['schedule']}"]
    extra += [f"cache {case['cache']}"] if case["cache"] != "none" else []
    extra += [f"watermark {case['watermark']}"] if case["watermark"] else []
    extra += [] if case["chunks"] else ["no chunked prefill"]
    return "\n".join([
        f"{some(case['blocks'], 'block')} of {some(case['block_size'], 'token')}{cpu}; a step computes at most "
        f"{some(case['budget'], 'token')}, of at most {some(case['seqs'], 'sequence')}",
        f"preemption by {case['preemption']}; {', '.join(extra)}",
        *(show_request(asked) for asked in case["requests"]),
    ])  # fmt: skip


def show_request(asked: Case) -> str:
    said = f"{asked['name']}: arrives before step {asked['at'] + 1}, {some(asked['prompt'], 'prompt token')}"
    said += f" (the first {asked['same']} as in every such prompt)" if asked["same"] else ""
    said += f", at most {asked['most']} more"
    said += f", {asked['n']} samples" if asked["n"] > 1 else ""
    said += f", {asked['beams']} beams" if asked["beams"] else ""
    said += ", with prompt_logprobs" if asked["scored"] else ""
    said += f", cache_salt {asked['salt']!r}" if asked.get("salt") else ""
    return said + (f", aborted before step {asked['abort'] + 1}" if asked["abort"] is not None else "")
