"""Assignment 2, the allocator: cases."""

import random
from collections.abc import Callable, Iterator
from typing import Any

from minipaged.course.assignment import Case
from minipaged.course.assignments.blocks_pool import PoolModel
from minipaged.course.checking import without

# The block that would be evicted next is found: it stays, and the other idle one is evicted.
FOUND_FIRST: Case = {
    "num_blocks": 3, "free_order": [], "cached": True, "ops": [
        ["allocate", 3, 0, []], ["know", ["nth", 0]], ["know", ["nth", 1]], ["release", ["nth", 0]],
        ["release", ["nth", 1]], ["allocate", 1, 0, [["nth", 0]]], ["take_freed"],
    ],
}  # fmt: skip


def smaller_pool(case: Case) -> Iterator[Case]:
    if "cost" not in case:
        yield from without(case, "ops")
        yield from without(case, "free_order")
        for at, op in enumerate(case["ops"]):
            if op[0] == "allocate" and op[2] > 0:
                yield {**case, "ops": [*case["ops"][:at], [*op[:2], 0, op[3]], *case["ops"][at + 1 :]]}


def pool_cases(first: int) -> Callable[[random.Random], Iterator[Case]]:
    """Operations that correct callers make, and one that none makes at the end of some.

    first: so many cases have no prefix cache; then there is one in every second, and at the end in all.
    """
    def cases(rng: random.Random) -> Iterator[Case]:
        size = 0
        while True:
            size += 1
            cached = size > first and (size % 2 == 0 or size > 2 * first)
            num_blocks = rng.randint(min(1 + cached, size), 2 + size // 6)
            order = rng.sample(range(num_blocks), rng.randint(0, num_blocks)) if rng.random() < 0.5 else []
            yield _case(rng, num_blocks, order, cached, 2 + size // 2)
            if size == 2 * first + 11:
                yield FOUND_FIRST
            if size in (12, 2 * first + 12):
                for known in (2000, 4000) if cached else (0,):
                    yield {"cost": 4000, "known": known, "num_blocks": 4000, "free_order": [], "cached": cached}

    return cases


def _case(rng: random.Random, num_blocks: int, order: list[int], cached: bool, length: int) -> Case:
    draw = _Draw(rng, num_blocks, cached)
    ops = [draw.op() for _ in range(length)]
    if rng.random() < 0.5:
        ops.append(draw.misuse())
    ops.append(["take_freed"])
    return {"num_blocks": num_blocks, "free_order": order, "cached": cached, "ops": ops}


class _Draw:
    """Draws operations, and knows roughly which blocks are held by then."""

    def __init__(self, rng: random.Random, num_blocks: int, cached: bool):
        self.rng, self.num_blocks, self.cached = rng, num_blocks, cached
        self.held: list[int] = []  # blocks, as the nth that was handed out: once for each holder
        self.known: list[int] = []
        self.model = PoolModel(num_blocks, list(range(num_blocks)))

    def op(self) -> list[Any]:
        rng = self.rng
        names = ["allocate"] * 3 + ["take_freed"] * (rng.random() < 0.3)
        names += ["share"] * 2 + ["release"] * 4 if self.held else []
        names += ["know"] * 3 + ["forget_all"] * (rng.random() < 0.2) if self.held and self.cached else []
        name = rng.choice(names)
        return self._take(getattr(self, f"_{name}", lambda: [name])())

    def _take(self, op: list[Any]) -> list[Any]:
        """The model takes the step, with the first blocks that are allowed."""
        if op[0] != "allocate":
            self.model.step(op, None)
            return op
        free = sorted(self.model.unused()) + self.model.idle
        found = [self.model.block(one) for one in op[3]]
        choice = [block for block in free if block not in found][: op[1]]
        self.model.fresh = False
        before = len(self.model.handed_out)
        self.model.step(op, choice)
        self.held += range(before, len(self.model.handed_out))
        self.held += [named[1] for named in op[3]] if self.model.handed_out[before:] or not op[1] else []
        return op

    def _allocate(self) -> list[Any]:
        free = self.model.num_blocks - sum(map(bool, self.model.counts))
        count = self.rng.choice([0, 1, 1, 2, free, free + 1, self.rng.randint(0, self.num_blocks + 1)])
        found: list[int] = []
        if self.cached and self.model.handed_out and self.rng.random() < 0.5:
            newest = {block: nth for nth, block in enumerate(self.model.handed_out)}
            usable = [nth for block, nth in newest.items() if self.model.has_contents(block)]
            found = self.rng.sample(usable, self.rng.randint(0, min(2, len(usable))))
        return ["allocate", count, self.rng.choice([0, 0, 0, 1, 2]), [["nth", nth] for nth in found]]

    def _share(self) -> list[Any]:
        newest = {block: nth for nth, block in enumerate(self.model.handed_out)}
        nth = self.rng.choice([nth for block, nth in newest.items() if self.model.has_contents(block)] or self.held)
        self.held.append(nth)
        return ["share", ["nth", nth]]

    def _release(self) -> list[Any]:
        return ["release", ["nth", self.held.pop(self.rng.randrange(len(self.held)))]]

    def _know(self) -> list[Any]:
        return ["know", ["nth", self.rng.choice(self.held)]]

    def misuse(self) -> list[Any]:
        block = self.rng.choice([-1, self.num_blocks, *range(self.num_blocks)])
        op = self.rng.choice(["share", "release", "allocate"])
        if op == "allocate":
            found = [["block", block]] if self.rng.random() < 0.5 else []
            if others := self._allocate()[3]:  # what is right before it must not be shared
                found = [*others, ["block", -1]]
            return [op, self.rng.choice([-1, 0, 1]), self.rng.choice([-1, 0]), found]
        return [op, ["block", block]]
