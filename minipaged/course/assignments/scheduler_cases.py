"""Assignment 4: what the scheduler is tried with."""

import json
import random
from collections.abc import Callable, Iterator
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


def eventful(cases: Iterator[Case], event: Callable[[Case], Any], every: int) -> Iterator[Case]:
    """Those in which it happens in a step; and each so manieth of the others."""
    others = 0
    for case in cases:
        happens = any(event(step) for step in served(case)["steps"])
        others += not happens
        if happens or others % every == 1:
            yield case


def sizes(most: int, longest: int) -> Iterator[tuple[int, int]]:
    """(how many requests, the longest prompt): from small to large."""
    for round_ in range(1000):
        yield min(2 + round_ // 10, most), min(4 + round_ // 2, longest)


def admit_cases(rng: random.Random) -> Iterator[Case]:
    for size, longest in sizes(6, 24):
        spare = rng.choice([0, 2, 6, 30])
        yield server(
            rng, size, longest, spare, samples=(1, 1, 2), alike=True, caches=("none", "hash", "radix"), chunks=0.7,
            watermarks=(0.0, 0.1, 0.3), schedules=("fcfs", "fcfs", "prefix"), scored=0.15, modes=("recompute", "auto"),
            cpu=(0, 6),
        )  # fmt: skip


def run_cases(rng: random.Random) -> Iterator[Case]:
    """Of two kinds by turns: all that there is, and memory that is short."""
    crowded = make_way_cases(rng)
    for mixed in eventful(_run_cases(rng), lambda step: step["preempted"], 3):
        yield mixed
        yield next(crowded)


def _run_cases(rng: random.Random) -> Iterator[Case]:
    for size, longest in sizes(5, 12):
        yield server(
            rng, size, longest, rng.choice([0, 1, 2, 5]), samples=(1, 2, 3), beams=(0, 0, 0, 2, 3), scored=0.2,
            aborts=0.15, outputs=(2, 8), spread=2, cpu=(0, 4, 20), modes=("recompute", "swap", "auto"), chunks=0.8,
            alike=True, caches=("none", "none", "hash"),
        )  # fmt: skip


def make_way_cases(rng: random.Random) -> Iterator[Case]:
    return eventful(_make_way_cases(rng), lambda step: step["preempted"], 8)


def _make_way_cases(rng: random.Random) -> Iterator[Case]:
    for size, longest in sizes(4, 6):
        yield server(
            rng, size, longest, rng.choice([0, 0, 1]), samples=(1, 2, 3), beams=(0, 0, 2), aborts=0.1,
            cpu=(0, 3, 6, 30), modes=("recompute", "swap", "auto"), caches=("none", "none", "hash", "radix"), spread=2,
            outputs=(4, 10), budgets=(0, 1, 2, 4, 16),
        )  # fmt: skip


def resume_cases(rng: random.Random) -> Iterator[Case]:
    return eventful(_resume_cases(rng), lambda step: step["resumed"], 8)


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
        for key, least in (("at", 0), ("prompt", 1), ("most", 1)):
            for less in dict.fromkeys(((asked[key] + least) // 2, asked[key] - 1)):
                if least <= less < asked[key]:
                    yield _with(case, place, {**asked, key: less, "same": min(asked["same"], less)
                                if key == "prompt" else asked["same"]})  # fmt: skip
    if case["blocks"] > 1:
        yield {**case, "blocks": case["blocks"] - 1}


def _with(case: Case, place: int, asked: Case) -> Case:
    return {**case, "requests": [*case["requests"][:place], asked, *case["requests"][place + 1 :]]}


def show_server(case: Case) -> str:
    cpu = f" (and {case['cpu_blocks']} in CPU memory)" if case["cpu_blocks"] else ""
    extra = [f"{case['schedule']}"]
    extra += [f"cache {case['cache']}"] if case["cache"] != "none" else []
    extra += [f"watermark {case['watermark']}"] if case["watermark"] else []
    extra += [] if case["chunks"] else ["no chunked prefill"]
    return "\n".join([
        f"{case['blocks']} blocks of {case['block_size']} tokens{cpu}; a step computes at most {case['budget']} tokens, "
        f"of at most {case['seqs']} sequences",
        f"preemption by {case['preemption']}; {', '.join(extra)}",
        *(_show_request(asked) for asked in case["requests"]),
    ])  # fmt: skip


def _show_request(asked: Case) -> str:
    said = f"{asked['name']}: arrives before step {asked['at'] + 1}, {asked['prompt']} prompt tokens"
    said += f" (the first {asked['same']} are those of every such prompt)" if asked["same"] else ""
    said += f", at most {asked['most']} more"
    said += f", {asked['n']} samples" if asked["n"] > 1 else ""
    said += f", {asked['beams']} beams" if asked["beams"] else ""
    said += ", with prompt_logprobs" if asked["scored"] else ""
    return said + (f", aborted before step {asked['abort'] + 1}" if asked["abort"] is not None else "")


# --- parts alone -----------------------------------------------------------------------------------------------


def refuse_cases(rng: random.Random) -> Iterator[Case]:
    while True:
        asked = request(rng, 0, 20, samples=(1, 2, 3), beams=(0, 2))
        block_size = rng.choice([1, 2, 4])
        blocks = max(1, most_blocks(asked, block_size) + rng.choice([-2, -1, 0, 0, 1]))
        seqs = max(1, (asked["beams"] or asked["n"]) + rng.choice([-1, 0, 0, 1]))
        yield {"blocks": blocks, "block_size": block_size, "seqs": seqs, "requests": [asked]}


def smaller_refusal(case: Case) -> Iterator[Case]:
    for one in smaller_server({**PLAIN, **case}):
        yield {key: one[key] for key in case}


def show_refusal(case: Case) -> str:
    return (
        f"{case['blocks']} blocks of {case['block_size']} tokens, at most {case['seqs']} sequences\n"
        f"{_show_request(case['requests'][0])}"
    )


def share_cases(rng: random.Random) -> Iterator[Case]:
    for round_ in range(1000):
        spare = rng.randint(0, 6 + round_ // 4)
        takers = [_taker(rng) for _ in range(1 + min(round_ // 20, 4))]
        yield {
            "spare": spare, "short": rng.choice([4, 8, 1000]), "wanted": rng.randint(0, spare + 4), "takers": takers,
        }  # fmt: skip


def _taker(rng: random.Random) -> Case:
    prompt = rng.randint(1, 20)
    outputs = [rng.randint(0, 3)] if rng.random() < 0.6 else [rng.randint(1, 4) for _ in range(rng.randint(2, 3))]
    computed = rng.choice([0, 0, rng.randint(0, prompt), prompt])
    away = [i for i in range(len(outputs)) if i and rng.random() < 0.1] if len(outputs) > 1 else []
    number = rng.randint(0, 2)
    copies = [rng.sample(range(4), 2) for _ in range(number)] if rng.random() < 0.5 else []
    return {
        "prompt": prompt, "outputs": outputs, "computed": computed, "away": away, "set_aside": rng.random() < 0.7,
        "grants": [rng.randint(1, 12) for _ in range(rng.choice([0, 0, 1, 2]))], "copies": copies,
    }  # fmt: skip


def show_share(case: Case) -> str:
    lines = [
        f"Step(plan, spare={case['spare']}, short={case['short']}), and short prompts want {case['wanted']} tokens"
    ]
    for number, one in enumerate(case["takers"]):
        lines += [f"grant({todo})" for todo in one["grants"]]
        lengths = [one["prompt"] + length for length in one["outputs"]]
        away = f", of which {one['away']} have no memory" if one["away"] else ""
        lines.append(
            f"request {number}: {one['prompt']} prompt tokens, sequences of {lengths} tokens{away}, "
            f"{one['computed']} computed in each; it takes what counts_of gives"
            f"{', one token each of which was set aside' if one['set_aside'] else ''}"
        )
    return "\n".join(lines)


def smaller_share(case: Case) -> Iterator[Case]:
    yield from without(case, "takers")
    for place, one in enumerate(case["takers"]):
        for less in without(one, "grants") + without(one, "copies"):
            yield {**case, "takers": [*case["takers"][:place], less, *case["takers"][place + 1 :]]}
    for key in ("spare", "wanted"):
        if case[key]:
            yield {**case, key: case[key] - 1}


def grow_cases(rng: random.Random) -> Iterator[Case]:
    for round_ in range(1000):
        n = rng.choice([1, 1, 2, 3])
        guesses = rng.random() < 0.5
        rounds = [[[_word(rng)] for _ in range(n)]]
        for _ in range(rng.randint(0, 1 + round_ // 8)):
            rounds.append([[_word(rng) for _ in range(rng.randint(1, 3) if guesses else 1)] for _ in range(n)])
        yield {
            "block_size": rng.choice([1, 2, 4]), "prompt": rng.randint(1, 6), "n": n, "most": rng.randint(1, 8),
            "ignore_eos": rng.random() < 0.3, "rounds": rounds, "swapped": rng.random() < 0.5,
        }  # fmt: skip


def _word(rng: random.Random) -> int:
    return rng.choice([0, 1, *range(10, 22)])


def show_grow(case: Case) -> str:
    eos = "not told to ignore end of text (0)" if not case["ignore_eos"] else "told to ignore end of text (0)"
    lines = [
        f"a prompt of {case['prompt']} tokens in blocks of {case['block_size']}, {case['n']} sample(s) of at most "
        f"{case['most']} tokens; 1 is a stop token; {eos}"
    ]
    lines += [f"step {number}: drawn for those that live: {rows}" for number, rows in enumerate(case["rounds"], 1)]
    swapped = " they are swapped out, and then" if case["swapped"] else ""
    lines.append(f"step {len(lines)}: for those that live still:{swapped} LiveSequences.end")
    return "\n".join(lines)


def smaller_grow(case: Case) -> Iterator[Case]:
    if len(case["rounds"]) > 1:
        yield from ({**one} for one in without(case, "rounds") if one["rounds"] and len(one["rounds"][0]) == case["n"])
    if case["n"] > 1:
        yield {**case, "n": case["n"] - 1, "rounds": [rows[:-1] for rows in case["rounds"]]}
    if case["swapped"]:
        yield {**case, "swapped": False}
    for key in ("prompt", "most"):
        if case[key] > 1:
            yield {**case, key: case[key] - 1}
