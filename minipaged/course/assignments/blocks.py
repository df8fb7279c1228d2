"""Assignment 2: blocks and page tables."""

import random
from collections.abc import Iterator
from typing import Any

from minipaged.course.assignment import Assignment, Case, Failure, Part
from minipaged.course.assignments.blocks_cases import GROWTH, SEQUENCES, SWAPS, memory_cases, smaller_memory
from minipaged.course.assignments.blocks_memory import judge_memory
from minipaged.course.assignments.blocks_pool import judge_pool, plainly, show_pool
from minipaged.course.assignments.blocks_pool_cases import pool_cases, smaller_pool
from minipaged.course.assignments.blocks_words import show_memory
from minipaged.course.inside.observe import outcome
from minipaged.memory import PageTable, blocks_for

ALLOCATOR = "minipaged/memory/block_allocator.py"
TABLE = "minipaged/memory/page_table.py"
MANAGER = "minipaged/memory/kv_manager.py"
GROW = "minipaged/memory/copy_on_write.py"
SWAP = "minipaged/memory/swapping.py"


def table_cases(rng: random.Random) -> Iterator[Case]:
    size = 0
    while True:
        size += 1
        block_size, num_tokens = rng.choice([1, 2, 3, 4, 16]), rng.randint(0, size)
        if rng.random() < 0.3:
            num_tokens = block_size * rng.randint(0, 3)  # on a block's border
        start = rng.randint(-1, num_tokens + 1)
        count = rng.choice([0, 1, max(0, num_tokens - start), rng.randint(-1, num_tokens + 1)])
        blocks = rng.sample(range(9 + size), -(-num_tokens // block_size))
        yield _table_case(block_size, blocks, num_tokens, start, count)


def _table_case(block_size: int, blocks: list[int], num_tokens: int, start: int, count: int) -> Case:
    return {
        "block_size": block_size, "blocks": blocks, "num_tokens": num_tokens, "position": start + max(0, count - 1),
        "start": start, "count": count,
    }  # fmt: skip


def judge_table(case: Case, answer: Any) -> Failure | None:
    table = PageTable(case["block_size"], list(case["blocks"]), case["num_tokens"])
    position, start, count = case["position"], case["start"], case["count"]
    expected = {
        f"blocks_for({case['num_tokens']}, {case['block_size']})": blocks_for(case["num_tokens"], case["block_size"]),
        "table.room": table.room,
        f"table.locate({position})": outcome(table.locate, position),
        f"table.slot({position})": outcome(table.slot, position),
        f"table.slots({start}, {count})": outcome(table.slots, start, count),
    }
    for (call, right), got in zip(expected.items(), answer.values(), strict=True):
        if "slots" in call and count < 1 and got == []:
            continue  # no position is named, so there is none without a slot
        error = right.get("raised") if isinstance(right, dict) else None
        if (error and not (isinstance(got, dict) and got.get("raised") == error)) or (not error and got != right):
            return Failure(f"`{call}`", error or str(right), plainly(got), draw_table(case))
    return None


def draw_table(case: Case) -> str:
    """The page table, and which positions are where."""
    if not case["blocks"]:
        return ""
    size, lines = case["block_size"], ["logical  physical  positions -> slots"]
    for logical, block in enumerate(case["blocks"][:12]):
        first = logical * size
        last = min(first + size, case["num_tokens"]) - 1
        lines.append(f"{logical:7}  {block:8}  {first}..{last} -> {block * size}..{block * size + last - first}")
    return "\n".join(lines)


def show_table(case: Case) -> str:
    fields = ", ".join(f"{name}={case[name]}" for name in ("block_size", "blocks", "num_tokens"))
    return f"table = PageTable({fields})"


def smaller_table(case: Case) -> Iterator[Case]:
    tokens, size = case["num_tokens"], case["block_size"]
    start, count = case["start"], case["count"]
    if tokens:
        yield _table_case(size, case["blocks"][: -(-(tokens - 1) // size)], tokens - 1, start, count)
    if start > 0:
        yield _table_case(size, case["blocks"], tokens, start - 1, count)
    if count > 1:
        yield _table_case(size, case["blocks"], tokens, start, count - 1)


HARMLESS = {
    "BlockAllocator.forget_all: self._drop(self._idle.popitem(last=False)[0]) -> "
    "self._drop(self._idle.popitem(last=True)[0])": "in which order idle blocks become free is not promised",
    "move: moves = dict(zip(sources, targets, strict=True)) -> moves = dict(zip(sources, targets, strict=False))":
    "allocate gives just as many as it is asked for",
}  # fmt: skip

ASSIGNMENT = Assignment(
    number=2,
    title="Blocks and page tables",
    parts=(
        Part(
            "the allocator", 20, ALLOCATOR,
            ("BlockAllocator.allocate", "BlockAllocator.share", "BlockAllocator.release"),
            "pool", pool_cases(first=16), judge_pool, smaller=smaller_pool, show=show_pool, num_cases=60,
        ),
        Part(
            "idle blocks", 15, ALLOCATOR,
            ("BlockAllocator._take", "BlockAllocator._drop", "BlockAllocator.take_freed", "BlockAllocator.forget_all"),
            "pool", pool_cases(first=0), judge_pool, smaller=smaller_pool, show=show_pool, num_cases=60,
        ),
        Part(
            "page tables", 15, TABLE,
            ("blocks_for", "PageTable.room", "PageTable.locate", "PageTable.slot", "PageTable.slots"),
            "table", table_cases, judge_table, smaller=smaller_table, show=show_table, num_cases=60,
        ),
        Part(
            "sequences", 15, MANAGER,
            ("KVCacheManager.allocate", "KVCacheManager.fork", "KVCacheManager.free"),
            "memory", memory_cases(SEQUENCES, cached=0.75, cpu=True), judge_memory,
            smaller=smaller_memory, show=show_memory, num_cases=60,
        ),
        Part(
            "append", 20, GROW, ("grow",), "memory", memory_cases(GROWTH), judge_memory, helpers=("_growths",),
            smaller=smaller_memory, show=show_memory, num_cases=60,
        ),
        Part(
            "swapping", 15, SWAP, ("move",), "memory", memory_cases(SWAPS, cached=0.7, cpu=True), judge_memory,
            smaller=smaller_memory, show=show_memory, num_cases=120,
        ),
    ),
    chapters=(3, 4, 5, 8),
    hours="5 to 8",
    generate=("--n", "2"),
    harmless=HARMLESS,
)  # fmt: skip
