"""Assignment 5: what the two prefix caches are tried with: whole prefixes in a dictionary say what must be found."""

import random
from collections.abc import Iterator
from itertools import count
from typing import Any

from minipaged.course.assignment import Case, Failure
from minipaged.course.assignments.sharing_model import Prefixes
from minipaged.course.checking import without
from minipaged.memory.prefix_cache import Salt
from minipaged.memory.radix_cache import RadixCache

# --- cases


def chain_cases(rng: random.Random) -> Iterator[Case]:
    """Honest hashes and such that lie, always or often. Three cases are about costs, and what is left behind."""
    for size in count():
        if size == 20:
            yield _cost()
            yield _come_and_go()
            yield _strangers()
        modulus = rng.choice([None, None, 1, 2, 3, 5])
        removals = size > 12 and rng.random() < 0.7
        yield {**_history(rng, 1 + size // 8, removals, twins=modulus is None), "modulus": modulus}


def tree_cases(rng: random.Random) -> Iterator[Case]:
    """Nothing is removed, so the tree that is drawn can have one form only."""
    for size in count():
        if size == 20:
            yield _cost()
            yield _strangers()
        yield {**_history(rng, 1 + size // 8), "draw": True}


def shed_cases(rng: random.Random) -> Iterator[Case]:
    """Ends of paths go, and others are refused."""
    for size in count():
        if size == 20:
            yield _come_and_go()
        yield _history(rng, 1 + size // 8, removals=True, refusals=size % 2 == 0)


def _cost() -> Case:
    return {"kind": "cost", "block_size": 4, "blocks": 40, "beside": [5, 300]}


def _come_and_go() -> Case:
    return {"kind": "come and go", "block_size": 2, "times": 600}


def _strangers() -> Case:
    return {"kind": "strangers", "block_size": 2, "times": 600}


def _history(
    rng: random.Random, size: int, removals: bool = False, refusals: bool = False, twins: bool = True
) -> Case:
    """Sequences that begin alike are looked up, and computed; ends of paths are removed.

    twins: what is known may be added again. (Not where hashes lie: a cache that refused the first may take the second,
    and then others follow a block than the ones planned.)
    """
    model, free = Prefixes(rng.choice([1, 2, 2, 3])), rng.sample(range(400), 400)
    ops: list[list[Any]] = []
    salts: list[Salt] = rng.choice([[None], [None], [None, "a"], ["a", "b"]])
    for _ in range(size):
        salt, tokens = rng.choice(salts), _tokens(rng, model)
        ops.append(["find", tokens, salt])
        found, parent = model.find(tokens, salt), None
        for at in range(len(tokens) // model.block_size):
            own = tokens[at * model.block_size : (at + 1) * model.block_size]
            if at < len(found) and not (twins and rng.random() < 0.2):
                parent = found[at]
                continue
            block, prefix = free.pop(), model.prefix(parent, own, salt)
            ops.append(["add", block, parent, own, salt])
            if prefix not in model.blocks:
                model.add(block, prefix)
            parent = model.blocks[prefix]
        while removals and model.blocks and rng.random() < 0.6:
            inner = sorted(model.prefixes.keys() - set(model.leaves()))
            if refusals and inner and rng.random() < 0.5:
                ops.append(["remove", rng.choice(inner)])
            else:
                gone = rng.choice(model.leaves())
                ops.append(["remove", gone])
                model.remove(gone)
                free.append(gone)  # the next that is taken
    ops += [["find", [*tokens, 1], salt] for salt, tokens in model.blocks][-4:]
    return {"kind": "history", "block_size": model.block_size, "ops": ops}


def _tokens(rng: random.Random, model: Prefixes) -> list[int]:
    """A beginning that is known, as often as not, and then anything; to the border of a block, or beside it."""
    start: list[int] = []
    if model.blocks and rng.random() < 0.6:
        start = list(rng.choice([tokens for _, tokens in model.blocks]))
        start = start[: rng.randint(0, len(start) // model.block_size) * model.block_size]
    more = rng.randint(0, 3) * model.block_size + rng.choice([0, 0, 0, 1, -1])
    return start + [rng.randint(1, 2) for _ in range(more)]


def smaller(case: Case) -> Iterator[Case]:
    if case["kind"] == "history":
        yield from (one for one in without(case, "ops") if _possible(one))


def _possible(case: Case) -> bool:
    """Whether a correct caller could do this. Only a tree refuses to remove a block that others follow."""
    model = Prefixes(case["block_size"])
    for name, block, *rest in case["ops"]:
        if name == "add":
            parent, own, salt = rest
            if block in model.prefixes or not (parent is None or parent in model.prefixes):
                return False
            if (prefix := model.prefix(parent, own, salt)) not in model.blocks:
                model.add(block, prefix)
            elif case.get("modulus") is not None:
                return False  # no twins: see _history
        elif name == "remove":
            if block in model.leaves():
                model.remove(block)
            elif block not in model.prefixes or "modulus" in case:
                return False
    return True


# --- judges


def judge(case: Case, answer: Any) -> Failure | None:
    if case["kind"] == "cost":
        return _judge_cost(case, answer)
    if case["kind"] in ("come and go", "strangers"):
        if answer["len"] == 0 and answer["bytes"] < 16_000:
            return None
        when = "nothing was ever added" if case["kind"] == "strangers" else "all blocks have been removed"
        return Failure(f"what is left when {when}", "no blocks, and no memory worth mentioning",
                       f"{answer['len']} blocks, {answer['bytes']:,} bytes")  # fmt: skip
    model, drawing = Prefixes(case["block_size"]), RadixCache(case["block_size"])
    for op, step in zip(case["ops"], answer["steps"], strict=True):
        failure = _judge_step(op, step, model, case.get("modulus") is not None)
        if failure:
            return failure
        if case.get("draw") and op[0] == "add":
            drawing.add(*op[1:])
    expected = drawing.draw(str, 10_000)
    if case.get("draw") and _nodes(answer["drawn"]) != _nodes(expected):
        return Failure("the tree that `draw` shows", expected, answer["drawn"])
    return None


def _judge_step(op: list, step: Any, model: Prefixes, lies: bool) -> Failure | None:
    """lies: the hash may be equal for different contents; then a cache may refuse a block, and never be wrong."""
    name, *rest = op
    before = _picture(model, "known before")
    expected: Any = None
    if name == "find":
        expected = model.find(*rest)
    elif name == "add":
        block, parent, own, salt = rest
        expected = block
        if parent is None or parent in model.prefixes:
            prefix = model.prefix(parent, own, salt)
            expected = model.blocks.get(prefix, block)
            refused = lies and model.blocks and block not in step["known"]
            if expected == block and not refused:
                model.add(block, prefix)
    elif rest[0] in model.leaves():
        model.remove(rest[0])
    elif rest[0] in model.prefixes:
        expected = "a ValueError"
    got = "a ValueError" if isinstance(step["result"], dict) else step["result"]
    if got != expected:
        return Failure(f"what {_call(op)} returns", str(expected), str(got), before)
    known = sorted(model.prefixes)
    parents = {block: parent for block, parent in step["parents"] if [block, parent] not in model.parents()}
    right_parents = {block: parent for block, parent in model.parents() if [block, parent] not in step["parents"]}
    for what, right, seen in (
        ("the blocks that are known", known, step["known"]),
        ("len", len(known), step["len"]),
        ("parents(), where it is wrong,", right_parents, parents),
    ):
        if seen != right:
            return Failure(f"{what} after {_call(op)}", str(right), str(seen), _picture(model, "right after it"))
    return None


def _judge_cost(case: Case, answer: Any) -> Failure | None:
    few, many = answer
    tokens = case["blocks"] * case["block_size"]
    for one in answer:
        if one["found"] != one["path"]:
            return Failure("what find returns", str(one["path"]), str(one["found"]))
        if one["looks"] > 10 * tokens:
            return Failure(f"how often find looks at tokens, of {tokens}", f"at most {10 * tokens}", str(one["looks"]))
    for name, a, b in [("find", few["steps"], many["steps"])] + [
        (name, sum(few[name]), sum(many[name])) for name in ("add", "remove") if name in few
    ]:
        if b > 2 * a + 200:
            n, m = case["beside"]
            return Failure(f"the cost of {name}", f"the same beside {m} blocks as beside {n}",
                           f"{a} steps of the interpreter beside {n}, {b} beside {m}")  # fmt: skip
    return None


def _nodes(drawn: str) -> list[tuple[int, str]]:
    """The lines, each with its depth, in any order."""
    return sorted((line.find("-- "), line[line.find("-- ") + 1 :].lstrip("- ")) for line in drawn.splitlines())


def _picture(model: Prefixes, title: str) -> str:
    if not model.blocks:
        return f"{title}: nothing"
    return f"{title}: " + model.tree().draw(lambda tokens: " ".join(map(str, tokens)), 80, most=12)


# --- words


def _call(op: list) -> str:
    name, *rest = op
    if name != "remove" and rest[-1] is None:
        rest = rest[:-1]
    elif name != "remove":
        return f"{name}({', '.join(map(repr, rest[:-1]))}, salt={rest[-1]!r})"
    return f"{name}({', '.join(map(repr, rest))})"


def show(case: Case) -> str:
    size = case["block_size"]
    if case["kind"] == "cost":
        return f"find {case['blocks']} blocks of {size}, while {case['beside'][1]} others begin alike, or as it does"
    if case["kind"] == "come and go":
        return f"two blocks are added and removed, {case['times']} times, each time with another salt"
    if case["kind"] == "strangers":
        return f"an empty cache is asked to find tokens, {case['times']} times, each time with another salt"
    modulus = case.get("modulus")
    hashing = "" if modulus is None else f", hash_function=lambda what: zlib.crc32(repr(what).encode()) % {modulus}"
    if modulus == 1:
        hashing = ", hash_function=lambda what: 0"
    return "\n".join([f"a cache of block_size={size}{hashing}"] + [_call(op) for op in case["ops"]])
