"""Assignment 2, sequences in memory: cases, drawn while the reference goes along, so that most calls make sense."""

import random
from collections.abc import Callable, Iterator
from typing import Any

from minipaged.course.assignment import Case
from minipaged.course.assignments.blocks_memory import Reference
from minipaged.course.checking import without

SEQUENCES = ("allocate", "allocate", "allocate", "fork", "free", "free", "append", "swap_out")
GROWTH = ("allocate", "fork", "fork", "append", "append", "append", "append", "free")
SWAPS = ("allocate", "allocate", "fork", "append", "append", "free", "swap_out", "swap_out", "swap_in", "swap_in")
KEEP = {"allocate": 3, "append": 2, "swap_in": 2}  # where keep_free stands


def memory_cases(
    kinds: tuple[str, ...], cached: float = 0.0, cpu: bool = False
) -> Callable[[random.Random], Iterator[Case]]:
    """kinds: of operations. cached: the share of cases with a prefix cache."""
    def cases(rng: random.Random) -> Iterator[Case]:
        size = 3
        while True:
            size += 1
            case: Case = {
                "num_blocks": rng.randint(2, 3 + size // 6), "block_size": rng.choice([1, 2, 2, 3, 4]),
                "num_cpu_blocks": rng.randint(1, 2 + size // 6) if cpu else 0,
                "cached": size > 8 and rng.random() < cached, "ops": [],
            }  # fmt: skip
            draw = _Draw(rng, case)
            chosen = kinds + (("publish",) * 4 if case["cached"] else ())
            for _ in range(2 + size // 3):
                draw.add(rng.choice(chosen))
            if case["cached"] and "swap_in" in kinds:
                draw.add_return()
            if rng.random() < (0.5 if case["cached"] else 0.25):
                draw.add_misuse(grows="append" in kinds)
            yield case

    return cases


class _Draw:
    """Draws operations of a case, one after the other."""

    def __init__(self, rng: random.Random, case: Case):
        self.rng, self.case = rng, case
        self.reference, self.next_id = Reference(case), 1

    def add(self, name: str) -> None:
        memory = self.reference.memory
        living = memory.sequences()
        here = [seq_id for seq_id in living if not memory.is_swapped(seq_id)]
        there = [seq_id for seq_id in living if memory.is_swapped(seq_id)]
        if not living or (name in ("append", "publish", "swap_out") and not here) or (name == "swap_in" and not there):
            name = "allocate"
        op = [name, *getattr(self, f"_{name}")(living, here, there)]
        self.case["ops"].append(op)
        self.reference.do(op)

    def add_return(self) -> None:
        """A sequence leaves, all that it left behind is evicted, and it comes back: it must publish anew."""
        for name in ("allocate", "publish", "swap_out"):
            self.add(name)
        free, seq_id = self.reference.memory.num_free, self._new()
        tokens = [100 * seq_id + position for position in range(free * self.case["block_size"])]
        for op in (["allocate", seq_id, tokens, 0, []], ["free", seq_id]):
            self.case["ops"].append(op)
            self.reference.do(op)
        for name in ("swap_in", "publish", "publish", "free", "free"):
            self.add(name)

    def _keep_free(self) -> int:
        return self.rng.choice([0, 0, 0, 0, 1, 2])

    def _new(self) -> int:
        self.next_id += 1
        return self.next_id - 1

    def _allocate(self, living: list[int], here: list[int], there: list[int]) -> list[Any]:
        seq_id, rng, size = self._new(), self.rng, self.case["block_size"]
        count = rng.choice([0, 1, size - 1, size, size + 1, 2 * size, rng.randint(0, 4 * size)])
        salt: list[str] | None = None
        tokens = [100 * seq_id + position for position in range(count)]
        if self.case["cached"]:
            salt = rng.choice([None, [], [], [], [], ["mine"]])
            tokens = self._like_another(count) if rng.random() < 0.8 else tokens
        return [seq_id, tokens, self._keep_free(), salt]

    def _like_another(self, count: int) -> list[int]:
        """One of three prompts, perhaps with another end."""
        prompt = self.rng.choice([7000, 8000, 9000])
        cut = self.rng.choice([count, count, self.rng.randint(0, count)])
        return [prompt + position + 500 * (position >= cut) for position in range(count)]

    def _append(self, living: list[int], here: list[int], there: list[int]) -> list[Any]:
        rng, size = self.rng, self.case["block_size"]
        chosen = rng.sample(here, len(here) if rng.random() < 0.4 else rng.randint(1, len(here)))
        growing = []
        for seq_id in chosen:
            count, begin = rng.choice([0, 1, 1, 1, 1, size, rng.randint(0, 2 * size)]), 100 * seq_id + 50
            length = len(self.reference.tokens[seq_id])
            growing.append([seq_id, [begin + length + i for i in range(count)]])
        return [growing, self._keep_free()]

    def _fork(self, living: list[int], here: list[int], there: list[int]) -> list[Any]:
        return [self.rng.choice(living), self._new()]

    def _free(self, living: list[int], here: list[int], there: list[int]) -> list[Any]:
        return [self.rng.choice(living)]

    def _publish(self, living: list[int], here: list[int], there: list[int]) -> list[Any]:
        return [self.rng.choice(here)]

    def _swap_out(self, living: list[int], here: list[int], there: list[int]) -> list[Any]:
        return [sorted(self.rng.sample(here, self.rng.randint(1, len(here))))]

    def _swap_in(self, living: list[int], here: list[int], there: list[int]) -> list[Any]:
        return [sorted(self.rng.sample(there, self.rng.randint(1, len(there)))), self._keep_free()]

    def add_misuse(self, grows: bool) -> None:
        """What no correct caller does; nothing may change."""
        living, nobody = self.reference.memory.sequences(), 99
        ops: list[list[Any]] = [["free", nobody], ["fork", nobody, self._new()]]
        if living:
            one = self.rng.choice(living)
            ops += [["allocate", one, [1, 2], 0, None], ["fork", one, one]]
            if grows and not self.reference.memory.is_swapped(one):
                ops += [["shrink", [[one, -1]]]] * 2
        known = [tokens for tokens in self.reference.tokens.values() if self.reference.memory.find(tokens).blocks]
        if known and self.rng.random() < 0.7:
            ops = [["allocate_less", self._new(), self.rng.choice(known)]]
        self.case["ops"].append(self.rng.choice(ops))


def smaller_memory(case: Case) -> Iterator[Case]:
    """Fewer operations; shorter sequences; a smaller block."""
    yield from without(case, "ops")
    for at, op in enumerate(case["ops"]):
        for fewer in _fewer(op):
            yield {**case, "ops": [*case["ops"][:at], fewer, *case["ops"][at + 1 :]]}
    if case["block_size"] > 1:
        yield {**case, "block_size": case["block_size"] - 1}
    if case["cached"]:
        yield {**case, "cached": False}
    if case["num_cpu_blocks"]:
        yield {**case, "num_cpu_blocks": case["num_cpu_blocks"] - 1}


def _fewer(op: list[Any]) -> Iterator[list[Any]]:
    if op[0] == "allocate" and op[2]:
        yield ["allocate", op[1], op[2][:-1], *op[3:]]
    if op[0] in ("allocate", "append", "swap_in") and op[KEEP[op[0]]]:
        at = KEEP[op[0]]
        yield [*op[:at], 0, *op[at + 1 :]]
    if op[0] == "append":
        for at, (seq_id, tokens) in enumerate(op[1]):
            rest = [*op[1][:at], *op[1][at + 1 :]]
            yield ["append", rest, op[2]]
            if len(tokens) > 1:
                yield ["append", [*op[1][:at], [seq_id, tokens[:1]], *op[1][at + 1 :]], op[2]]
    if op[0] in ("swap_out", "swap_in") and len(op[1]) > 1:
        yield from ([op[0], [one for one in op[1] if one != gone], *op[2:]] for gone in op[1])
