"""What prefix caches find on a real trace: python -m minipaged.experiments.prefixes FILE ...

A Mooncake trace has no texts. It names every 512 tokens of a prompt by a number, and equal numbers are equal
beginnings. So both caches can be replayed on it with blocks of a single "token", the number. Prompts come one after
another in pools of several sizes; what is kept, in prefixes.json, is what was found, and enough to draw a trace of the
same kind:

    goes_on   the share of requests that begin with more of an earlier one than all have in common
    back      for these, quantiles: how many requests ago the one came that they go on from
    kept      ... of how many percent of its blocks they begin with
    new       ... and how many blocks follow
    fresh     quantiles: blocks of all the others

What is lost: that long conversations are those that go on, and all times. Answers are not named until they come back
in the next prompt, so they are never found: a real server does a little better.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

from minipaged.experiments.loads import TraceError
from minipaged.experiments.routing import PIECE, read_blocks
from minipaged.experiments.traces import LEVELS
from minipaged.memory import PREFIX_CACHES, KVCacheManager, NoSpace

FILE = Path(__file__).with_name("prefixes.json")
CACHES = ("hash", "radix")
CAPACITIES = (500, 1000, 2000, 4000, 8000, 16_000, 32_000, 64_000, 128_000)  # blocks of PIECE tokens
QUEUE = 64  # requests that wait, where the order is tried


class Asked(NamedTuple):
    """A prompt. blocks: the numbers of its full blocks. may_find: of so many; its last token is always computed."""

    blocks: tuple[int, ...]
    may_find: int


@dataclass(frozen=True)
class Summary:
    """What is kept of a trace, and what was found in it. found, in_order: share of all full blocks, at CAPACITIES."""

    requests: int
    blocks: int  # full ones
    different: int
    runs: int  # nodes of a radix tree that has all of them
    ideal: float  # found if nothing is ever given up
    found: dict[str, list[float]]  # by cache
    in_order: list[float]  # of QUEUE requests that wait, the one with the longest known beginning comes next
    goes_on: float
    back: list[int]
    kept: list[int]
    new: list[int]
    fresh: list[int]

    def draw(self, count: int, seed: int = 0) -> list[Asked]:
        """Requests of the same kind. Block 0 is what all have in common; from each request only one other goes on."""
        random, drawn, ended, unused = Random(seed), list[Asked](), set[int](), 1
        for number in range(count):
            begins: tuple[int, ...] = (0,)
            new = max(0, _at(self.fresh, random) - 1)
            if random.random() < self.goes_on:
                before = number - _at(self.back, random)
                while before in ended:
                    before -= 1
                if before >= 0:
                    ended.add(before)
                    blocks = drawn[before].blocks
                    begins = blocks[: max(1, round(len(blocks) * _at(self.kept, random) / 100))]
                    new = _at(self.new, random)
            own = (*begins, *range(unused, unused + new))
            unused += new
            drawn.append(Asked(own, len(own)))
        return drawn


def _at(quantiles: Sequence[int], random: Random) -> int:
    return round(float(np.interp(random.random(), LEVELS, quantiles)))


def asked(path: Path) -> list[Asked]:
    """The prompts of a Mooncake trace, as they came."""
    return [Asked(one.blocks[: one.tokens // PIECE], (one.tokens - 1) // PIECE) for one in read_blocks(path)]


def replay(requests: Sequence[Asked], capacity: int, cache: str = "hash", queue: int = 1) -> int:
    """Blocks that are found, one request after another. queue: of so many that wait, the one of which most is there.

    A prompt that is larger than the pool is not served.
    """
    memory = KVCacheManager(capacity, 1, cache=PREFIX_CACHES[cache](1))  # type: ignore[misc]
    waiting, found, coming = list[Asked](), 0, iter(requests)
    while True:
        waiting += islice(coming, queue - len(waiting))
        if not waiting:
            return found
        prefixes = [memory.find(one.blocks[: one.may_find]) for one in waiting]
        first = max(range(len(waiting)), key=lambda i: prefixes[i].num_tokens)
        one, prefix = waiting.pop(first), prefixes[first]
        if not one.blocks or isinstance(memory.allocate(0, len(one.blocks), prefix=prefix), NoSpace):
            continue
        memory.publish(0, len(one.blocks), partial(_tokens, one))
        memory.free(0)
        found += prefix.num_tokens


def _tokens(one: Asked, start: int, count: int) -> Sequence[int]:
    return one.blocks[start : start + count]


def summarize(requests: Sequence[Asked]) -> Summary:
    last: dict[int, int] = {}  # block -> the last request that had it
    after: dict[int | None, set[int]] = {}  # block -> those that follow it
    ideal, rows, fresh = 0, list[tuple[int, int, int]](), list[int]()
    common = _common(requests)
    for number, one in enumerate(requests):
        known = sum(1 for _ in takewhile(last.__contains__, one.blocks))
        ideal += min(known, one.may_find)
        if known > common:
            before = last[one.blocks[known - 1]]
            share = 100 * known / len(requests[before].blocks)
            rows.append((number - before, round(share), len(one.blocks) - known))
        else:
            fresh.append(len(one.blocks))
        for parent, block in zip((None, *one.blocks), one.blocks, strict=False):
            after.setdefault(parent, set()).add(block)
        last.update(dict.fromkeys(one.blocks, number))
    if not rows or not fresh:
        raise TraceError("no two requests begin alike, or all do: there is nothing to summarize")
    total = sum(len(one.blocks) for one in requests)
    runs = sum(len(blocks) for parent, blocks in after.items() if parent is None or len(blocks) > 1)
    shares = {cache: [replay(requests, size, cache) / total for size in CAPACITIES] for cache in CACHES}
    back, kept, new = ([row[column] for row in rows] for column in range(3))
    return Summary(
        len(requests), total, len(last), runs, round(ideal / total, 5),
        {cache: _rounded(found) for cache, found in shares.items()},
        _rounded([replay(requests, size, queue=QUEUE) / total for size in CAPACITIES]),
        round(len(rows) / len(requests), 4), _quantiles(back), _quantiles(kept), _quantiles(new), _quantiles(fresh),
    )  # fmt: skip


def _common(requests: Sequence[Asked]) -> int:
    """How many blocks all of them begin with."""
    return sum(1 for column in zip(*(one.blocks for one in requests), strict=False) if len(set(column)) == 1)


def _rounded(shares: Sequence[float]) -> list[float]:
    return [round(share, 5) for share in shares]


def _quantiles(values: Sequence[int]) -> list[int]:
    return [round(value) for value in np.quantile(values, LEVELS)]


def known() -> dict[str, Summary]:
    """The traces of prefixes.json, by name."""
    traces = json.loads(FILE.read_text())["traces"]
    return {name: Summary(**{key: one[key] for key in Summary.__annotations__}) for name, one in traces.items()}


def main(paths: Sequence[str]) -> int:
    """Print the summary of each file, as JSON."""
    if not paths or paths[0] in ("-h", "--help"):
        print("usage: python -m minipaged.experiments.prefixes FILE ...\n\n"
              "What a table and a tree find again on a Mooncake trace (JSON lines with hash_ids), in pools\n"
              "of several sizes, as prefixes.json has it. It takes some minutes.")  # fmt: skip
        return 0 if paths else 2
    for path in paths:
        try:
            print(json.dumps(asdict(summarize(asked(Path(path))))))
        except (OSError, ValueError) as error:
            print(f"prefixes: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
