"""Assignment 4: what parts of the scheduler are tried with that need no server."""

import random
from collections.abc import Iterator

from minipaged.course.assignment import Case
from minipaged.course.assignments.scheduler_cases import PLAIN, most_blocks, request, show_request, smaller_server, some
from minipaged.course.checking import without


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
        f"{some(case['blocks'], 'block')} of {some(case['block_size'], 'token')}, at most "
        f"{some(case['seqs'], 'sequence')}\n"
        f"{show_request(case['requests'][0])}"
    )


# Only a sequence without memory has more to do than a short one.
REBUILDING: Case = {
    "spare": 9, "short": 4, "wanted": 3, "takers": [{
        "prompt": 8, "outputs": [2, 2], "computed": 5, "away": [1], "set_aside": True, "grants": [9], "copies": [],
    }, {
        "prompt": 12, "outputs": [0], "computed": 0, "away": [], "set_aside": False, "grants": [], "copies": [],
    }],
}  # fmt: skip


def share_cases(rng: random.Random) -> Iterator[Case]:
    for round_ in range(1000):
        if round_ == 30:
            yield REBUILDING
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
        f"Step(plan, spare={case['spare']}, short={case['short']}), and short prompts want "
        f"{some(case['wanted'], 'token')}"
    ]
    for number, one in enumerate(case["takers"]):
        lines += [f"grant({todo})" for todo in one["grants"]]
        lengths = [one["prompt"] + length for length in one["outputs"]]
        away = f", of which {one['away']} have no memory and nothing computed" if one["away"] else ""
        lines.append(
            f"request {number}: {some(one['prompt'], 'prompt token')}, sequences of {lengths} tokens{away}, "
            f"{one['computed']} computed in each{' other' if one['away'] else ''}; it takes what counts_of gives"
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
        f"a prompt of {some(case['prompt'], 'token')} in blocks of {case['block_size']}, {some(case['n'], 'sample')}; "
        f"request.max_tokens {case['most']}, params.max_tokens {case['most'] + 1}; 1 is a stop token; {eos}"
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
