"""Assignment 3: what it is tried with. Cases from small to large, what is simpler than a case, and a case in words."""

import random
from collections.abc import Iterator
from typing import Any

from minipaged.course.assignment import Case
from minipaged.course.checking import without

HEADS = [(1, 1), (2, 1), (2, 2), (4, 2), (6, 3), (6, 2), (9, 3)]
ANYTHING = [1_000_000, -1, -7]  # behind a context, where nothing may be looked at
SHIFTS = [0.0, 0.0, 0.0, 0.0, 200.0, -200.0, -60000.0]


def write_cases(rng: random.Random) -> Iterator[Case]:
    for size in range(1, 100):
        block_size, num_blocks = rng.choice([1, 2, 3, 4]), rng.randrange(1, 2 + size // 2)
        places = num_blocks * block_size
        count = min(size, places)
        slots = rng.sample(range(places), rng.randrange(count + 1) if size > 3 else count)
        for _ in range(rng.choice([0, 1, 2])):
            slots.insert(rng.randrange(len(slots) + 1), -1)
        yield {
            "slots": slots, "block_size": block_size, "num_blocks": num_blocks, "kv_heads": rng.choice([1, 1, 2, 3]),
            "size": 4, "kv": rng.choice(["float32", "float16", "int8"]), "seed": rng.randrange(1000),
        }  # fmt: skip


def move_cases(rng: random.Random) -> Iterator[Case]:
    for size in range(1, 100):
        between = rng.random() < 0.5
        pools = [rng.randrange(2, 4 + size) for _ in range(1 + between)]
        targets = rng.sample(range(pools[-1]), rng.randrange(0 if size > 3 else 1, min(size, pools[-1]) + 1))
        some = rng.sample(range(pools[0]), min(2 + size // 3, pools[0]))  # few: they come twice, and overlap
        yield {
            "pairs": [[rng.choice(some), target] for target in targets], "pools": pools, "layers": rng.choice([1, 2]),
            "kv_heads": rng.choice([1, 2]), "block_size": rng.choice([1, 2]), "size": 4,
            "kv": rng.choice(["float32", "float32", "int8", "float8_e4m3fn"]), "seed": rng.randrange(1000),
        }  # fmt: skip


def sequences(rng: random.Random, size: int, block_size: int, kinds: str) -> tuple[list[dict[str, Any]], int]:
    """Contexts up to about `size`, anywhere in a pool. kinds: of one new token (d), some (c), all (p), none (n)."""
    found = []
    for _ in range(rng.randrange(1, 2 + min(size // 4, 5))):
        whole = block_size * rng.randrange(1, 2 + size // block_size)
        context = rng.choice([1, whole, whole + 1, rng.randrange(1, size + 2)])
        kind = rng.choice(kinds)
        new = {"d": 1, "p": context, "n": 0}.get(kind) or rng.randrange(kind != "n", context + 1)
        if kind == "n":
            context, new = rng.choice([0, context]), 0
        found.append({"context": context, "new": new})
    if not any(one["new"] for one in found):
        found[0] |= {"context": found[0]["context"] or 1, "new": 1}
    needed = [-(-one["context"] // block_size) for one in found]
    num_blocks = sum(needed) + 2
    order = rng.sample(range(num_blocks), num_blocks)
    placed: list[dict[str, Any]] = []
    for one, count in zip(found, needed, strict=True):
        placed.append(one | {"blocks": order[:count]})
        order = order[count:]
    return placed, num_blocks


def batch(rng: random.Random, size: int, kinds: str, block_size: int = 0, **more: Any) -> Case:
    block_size = block_size or rng.choice([1, 2, 3, 4])
    found, num_blocks = sequences(rng, size, block_size, kinds)
    heads, kv_heads = rng.choice(HEADS[: 1 + size])
    case = {
        "sequences": found, "block_size": block_size, "num_blocks": num_blocks, "heads": heads, "kv_heads": kv_heads,
        "size": rng.choice([1, 2, 4]), "dtype": "float32", "kv": "float32", "behind": [], "loud": 1.0, "shift": 0.0,
        "scale": rng.choice([0.5, 0.25, 1.0]), "seed": rng.randrange(1000),
    }  # fmt: skip
    return case | more


def attention_cases(rng: random.Random) -> Iterator[Case]:
    for size in range(1, 100):
        case = batch(rng, min(size, 40), "dcpn" if size > 3 else "dp")
        case |= {"behind": rng.choice([[], ANYTHING]), "shift": rng.choice(SHIFTS) if size > 3 else 0.0}
        if size % 4 == 3:
            case["loud"] = 8.0
        if size % 5 == 4:
            case |= {"dtype": "float16", "kv": "float16", "shift": rng.choice([0.0, 200.0]), "size": 4}
        if size % 7 == 6:
            case |= {"kv": "int8", "size": 4, "shift": 0.0}
        yield case


def by_blocks_cases(rng: random.Random) -> Iterator[Case]:
    """The same; and long contexts, where gathering would show."""
    for number, case in enumerate(attention_cases(rng)):
        if number % 6 == 5:
            context, block_size = rng.randrange(60, 90), rng.choice([1, 2])
            count = -(-context // block_size)
            long = {"context": context, "new": rng.choice([1, 1, 2]), "blocks": rng.sample(range(count + 2), count)}
            case |= {"sequences": [long], "block_size": block_size, "num_blocks": count + 2}
        yield case


def together_cases(rng: random.Random) -> Iterator[Case]:
    """Mostly sequences of one query; numbers behind a context are of blocks that are somebody's, or nobody's."""
    for size in range(1, 100):
        case = batch(rng, min(size, 40), "d" if size % 3 else "ddcpn")
        case["behind"] = rng.sample(range(case["num_blocks"]), rng.choice([0, 1, min(3, case["num_blocks"])]))
        case["shift"] = rng.choice(SHIFTS) if size > 3 else 0.0
        if size % 5 == 4:
            case |= {"kv": "int8", "size": 4, "shift": 0.0}
        if size % 5 == 2:
            case["sequences"], case["num_blocks"] = alike(rng, rng.randrange(3, 9), case["block_size"])
            case["behind"] = []
        yield case


def alike(rng: random.Random, count: int, block_size: int) -> tuple[list[dict[str, Any]], int]:
    """Sequences of one context, and one query each: they fit into one bucket."""
    context = rng.randrange(1, 12)
    needed = -(-context // block_size)
    order = rng.sample(range(count * needed + 2), count * needed)
    tables = [order[at * needed : (at + 1) * needed] for at in range(count)]
    return [{"context": context, "new": 1, "blocks": table} for table in tables], count * needed + 2


def attend_cases(rng: random.Random) -> Iterator[Case]:
    """Contexts of several tiles of 4 keys; each in one program, but for the last kind."""
    for size in range(1, 30):
        case = batch(rng, min(1 + 2 * size, 14), rng.choice("dcp"), rng.choice([1, 2, 4, 8]))
        case["heads"], case["kv_heads"] = rng.choice([(1, 1), (2, 1), (3, 1), (4, 2)])
        case |= {"behind": rng.choice([[], ANYTHING]), "splits": 1, "far": False, "size": rng.choice([1, 2, 4, 16, 16])}
        case["shift"] = rng.choice([0.0, 0.0, 200.0, -200.0, -60000.0])
        case["sequences"] = case["sequences"][: 1 + (size % 3 == 2)]
        if size % 4 == 3:
            case |= {"kv": "int8", "size": 4, "shift": 0.0, "far": size == 3}
        if size % 6 == 5:
            case |= {"dtype": "float16", "kv": "float16", "shift": 0.0}
        if case["far"]:  # the last block is the one that lies so far away: it should be read
            swapped = {case["sequences"][0]["blocks"][0]: case["num_blocks"] - 1}
            swapped |= {new: old for old, new in swapped.items()}
            for one in case["sequences"]:
                one["blocks"] = [swapped.get(block, block) for block in one["blocks"]]
        if any(one["new"] for one in case["sequences"]):
            yield case


def merge_cases(rng: random.Random) -> Iterator[Case]:
    """Several splits, of which some have nothing to do. Each program takes its time: a few queries, few heads."""
    for number, case in enumerate(attend_cases(rng)):
        one = case["sequences"][-1]
        few = one | {"new": min(one["context"], 1 + number % 3)}
        if few["new"]:
            case |= {"sequences": [few], "heads": 2, "kv_heads": rng.choice([1, 2]), "far": False}
            yield case | {"splits": rng.choice([2, 3, 5])}
        if number == 3:  # as in the padding of a CUDA graph: a query that sees nothing
            nothing = {"context": 0, "new": 1, "blocks": []}
            yield case | {"sequences": [nothing], "splits": 2, "behind": [0], "shift": 0.0}


def smaller_writes(case: Case) -> Iterator[Case]:
    yield from without(case, "slots")
    yield from plainer(case, kv_heads=1, size=1, kv="float32")


def smaller_moves(case: Case) -> Iterator[Case]:
    yield from without(case, "pairs")
    yield from plainer(case, layers=1, kv_heads=1, size=1, kv="float32", block_size=1)


def smaller_batches(case: Case) -> Iterator[Case]:
    """Fewer sequences, shorter ones, fewer new tokens, fewer heads."""
    for one in without(case, "sequences"):
        if any(each["new"] for each in one["sequences"]):
            yield one
    for at, one in enumerate(case["sequences"]):
        for context, new in shorter(one["context"], one["new"], case["block_size"]):
            kept = one["blocks"][: -(-context // case["block_size"])]
            changed = {"context": context, "new": new, "blocks": kept}
            several = [*case["sequences"][:at], changed, *case["sequences"][at + 1 :]]
            if any(each["new"] for each in several):
                yield case | {"sequences": several}
    for heads, kv_heads in ((1, 1), (2, 1), (2, 2), (4, 2)):
        if heads < case["heads"]:
            yield case | {"heads": heads, "kv_heads": kv_heads}
    yield from plainer(case, far=False)
    if case["dtype"] == case["kv"] != "float32":  # both at once: where they differ, something else may fail
        yield case | {"dtype": "float32", "kv": "float32"}
    elif not case.get("far"):  # such a pool is one of bytes
        yield from plainer(case, **{"kv" if case["dtype"] == "float32" else "dtype": "float32"})
    yield from plainer(case, shift=0.0, loud=1.0, size=1, behind=[])


def shorter(context: int, new: int, block_size: int) -> list[tuple[int, int]]:
    found = [(context // 2, new), (context - block_size, new), (context - 1, new), (context - 1, new - 1)]
    found += [(context, 1), (context, new - 1)]
    return [one for one in dict.fromkeys(found) if 0 <= one[1] <= one[0] < context or 0 <= one[1] < new <= context]


def plainer(case: Case, **wanted: Any) -> Iterator[Case]:
    for name, value in wanted.items():
        bytes_need_four = name == "size" and case["kv"] not in ("float32", "float16")
        if name in case and case[name] != value and not bytes_need_four:
            yield case | {name: value}


def show_batch(case: Case) -> str:
    lines = [
        f"H = {case['heads']}, G = {case['kv_heads']}, D = {case['size']}, "
        f"B = {case['block_size']}, N = {case['num_blocks']}, scale = {case['scale']:g}; "
        f"q in {case['dtype']}, cache in {case['kv']}"
    ]
    for s, one in enumerate(case["sequences"]):
        blocks = " ".join(map(str, one["blocks"])) or "none"
        lines.append(f"sequence {s}: context {one['context']}, {one['new']} of it new; blocks {blocks}")
    if case["behind"]:
        lines.append(f"behind the last block, page tables hold {' '.join(map(str, case['behind']))}")
    if case["shift"]:
        lines.append(f"all scores lie around {case['shift']:g}")
    if case.get("splits", 1) > 1:
        lines.append(f"{case['splits']} splits of a context")
    if case.get("far"):
        lines.append("the last block lies more than 2^31 numbers behind the first")
    return "\n".join(lines)


def show_write(case: Case) -> str:
    return (
        f"slots {case['slots']}; N = {case['num_blocks']}, B = {case['block_size']}, "
        f"G = {case['kv_heads']}, D = {case['size']}, cache in {case['kv']}"
    )


def show_move(case: Case) -> str:
    pairs = ", ".join(f"{source} -> {target}" for source, target in case["pairs"]) or "nothing"
    pools = "from a pool of {} blocks to one of {}" if len(case["pools"]) == 2 else "in a pool of {} blocks"
    return f"copy {pairs}, {pools.format(*case['pools'])}; L = {case['layers']}, cache in {case['kv']}"
