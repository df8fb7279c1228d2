"""Assignment 2: blocks and page tables."""

import random
from collections.abc import Iterator
from typing import Any

from minipaged.course.assignment import Assignment, Case, Failure, Part
from minipaged.memory import PageTable

TABLE = "minipaged/memory/page_table.py"


def table_cases(rng: random.Random) -> Iterator[Case]:
    for size in range(1, 200):
        block_size = rng.choice([1, 2, 4, 16])
        tokens = rng.randrange(0, size + 1)
        blocks = rng.sample(range(300), -(-tokens // block_size))
        start, count = rng.randrange(-1, tokens + 2), rng.randrange(0, size)
        yield {"block_size": block_size, "tokens": tokens, "blocks": blocks, "start": start, "count": count}


def judge_table(case: Case, answer: Any) -> Failure | None:
    table = PageTable(case["block_size"], case["blocks"], case["tokens"])
    try:
        expected: Any = table.slots(case["start"], case["count"])
    except ValueError as error:
        expected = type(error).__name__
    got = answer["raised"] if isinstance(answer, dict) else answer
    if got != expected:
        return Failure("slots", str(expected), str(got))
    return None


ASSIGNMENT = Assignment(
    number=2,
    title="Blocks and page tables",
    parts=(
        Part(
            "slots", 10, TABLE, ("PageTable.slot", "PageTable.slots", "PageTable.locate"), "slots", table_cases,
            judge_table, helpers=("PageTable._must_have",),
        ),
    ),
    chapters=(4, 5),
    hours="4 to 6",
)  # fmt: skip
