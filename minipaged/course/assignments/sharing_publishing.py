"""Assignment 5: what publishing is tried with: sequences that are computed side by side."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from minipaged.course.assignment import Case, Failure
from minipaged.course.checking import without
from minipaged.memory.prefix_cache import Salt


@dataclass
class _Table:
    tokens: list[int]
    salt: Salt
    blocks: list[int] = field(default_factory=list)
    published: int = 0


def cases(rng: random.Random) -> Iterator[Case]:
    """taken: prefixes that the cache doesn't take, as if others had their hash."""
    for size in count():
        block_size, ops = rng.choice([1, 2, 2, 3]), []
        texts: dict[int, list[int]] = {}
        salts: list[Salt] = rng.choice([[None], [None], ["a", None]])
        for number in range(min(7, 1 + size // 8)):
            if rng.random() < 0.5 or not texts:
                tokens = list(rng.choice(list(texts.values()))) if texts and rng.random() < 0.7 else []
                tokens = tokens[: rng.randint(0, len(tokens))] + [rng.randint(1, 2) for _ in range(rng.randint(1, 6))]
                texts[number] = tokens
                ops.append(["start", number, tokens, rng.choice(salts)])
            elif rng.random() < 0.3:
                parent = rng.choice(list(texts))
                texts[number] = texts[parent]
                ops.append(["fork", parent, number])
            elif rng.random() < 0.15:
                gone = rng.choice(list(texts))
                del texts[gone]
                ops.append(["free", gone])
            for seq in rng.sample(list(texts), rng.randint(0, min(2, len(texts)))):
                ops.append(["publish", seq, rng.randint(0, len(texts[seq]))])
        ops += [["publish", seq, len(tokens)] for seq, tokens in texts.items()]
        taken = [[rng.choice(salts), [rng.randint(1, 2) for _ in range(block_size)]] for _ in range(rng.random() < 0.2)]
        yield {"block_size": block_size, "ops": ops, "taken": taken}


def smaller(case: Case) -> Iterator[Case]:
    if case["taken"]:
        yield {**case, "taken": []}
    yield from (one for one in without(case, "ops") if _possible(one))


def _possible(case: Case) -> bool:
    live: set[int] = set()
    for name, seq, *rest in case["ops"]:
        if (name == "start") == (seq in live):
            return False
        live |= {seq, rest[0]} if name == "fork" else {seq}
        live -= {seq} if name == "free" else set()
    return True


def judge(case: Case, answer: Any) -> Failure | None:
    size, taken = case["block_size"], {(salt, tuple(tokens)) for salt, tokens in case["taken"]}
    tables: dict[int, _Table] = {}
    known: dict[tuple[Salt, tuple[int, ...]], int] = {}
    for (name, seq, *rest), seen in zip(case["ops"], answer, strict=True):
        new, drawn = 0, f"before:\n{_tables(tables)}"
        if name == "start":  # which blocks it gets is the allocator's choice
            tables[seq] = next(_Table(rest[0], rest[1], *its) for number, *its in seen["tables"] if number == seq)
        elif name == "fork":
            old = tables[seq]
            tables[rest[0]] = _Table(old.tokens, old.salt, list(old.blocks), old.published)
        elif name == "free":
            del tables[seq]
        else:
            table = tables[seq]
            first, new = table.published, max(0, rest[0] // size - table.published) * size
            _publish(table, rest[0], size, tables, known, taken)
            if failure := _judge_asked(seen["asked"], first * size, new, drawn):
                return failure
        if failure := _judge_state(f"after: {_said(name, seq, *rest)}", seen, tables, known, drawn):
            return failure
    return None


def _publish(table: _Table, computed: int, size: int, tables: dict, known: dict, taken: set) -> None:
    for logical in range(table.published, computed // size):
        own, prefix = table.blocks[logical], (table.salt, tuple(table.tokens[: (logical + 1) * size]))
        before = known.get((table.salt, prefix[1][:-size]))
        if prefix not in taken and (logical == 0 or before is not None):
            other = known.setdefault(prefix, own)
            for one in tables.values():
                if one.blocks[logical : logical + 1] == [own]:
                    one.blocks[logical] = other
        table.published = logical + 1


def _judge_asked(asked: list[list[int]], start: int, new: int, drawn: str) -> Failure | None:
    """Each token of a new full block once, and no other."""
    total, inside = sum(many for _, many in asked), all(start <= at and at + many <= start + new for at, many in asked)
    if total <= new and (inside or not total):
        return None
    right = f"{new} tokens from {start} on, each once" if new else "no token"
    return Failure("which tokens are asked for, as [start, count]", right, str(asked), drawn)


def _judge_state(what: str, seen: Any, tables: dict[int, _Table], known: dict, drawn: str) -> Failure | None:
    if seen["raised"] is not None:
        return Failure(f"what publish returns, {what}", "None", str(seen["raised"]), drawn)
    expected = [[number, table.blocks, table.published] for number, table in sorted(tables.items())]
    if seen["tables"] != expected:
        return Failure(f"page tables {what}", _lines(expected), _lines(seen["tables"]), drawn)
    pairs = sorted([salt or "", list(tokens), block] for (salt, tokens), block in known.items())
    if sorted(seen["known"]) != pairs:
        both = (pairs, sorted(seen["known"]))
        found = [", ".join(f"{tokens} in block {block}" for _, tokens, block in one) for one in both]
        return Failure(f"what can be found {what}", found[0] or "nothing", found[1] or "nothing", drawn)
    counts = [sum(block in table.blocks for table in tables.values()) for block in range(len(seen["counts"]))]
    if seen["counts"] != counts:
        wrong = [block for block, (a, b) in enumerate(zip(counts, seen["counts"], strict=True)) if a != b]
        words = [", ".join(f"block {block}: {one[block]}" for block in wrong) for one in (counts, seen["counts"])]
        return Failure(f"reference counts {what}", words[0], words[1], drawn)
    if not seen["lists kept"]:
        return Failure(f"lists of blocks that others have, {what}", "as they were", "changed in place", drawn)
    return Failure(f"the pool {what}", "no contradiction", seen["check"], drawn) if seen["check"] else None


def _lines(tables: Any) -> str:
    lines = [f"sequence {number}: blocks {blocks}, {published} published" for number, blocks, published in tables]
    return "\n".join(lines) or "none"


def _tables(tables: dict[int, _Table]) -> str:
    """Each page table above the tokens in its blocks."""
    lines = []
    for number, table in sorted(tables.items()):
        size = -(-len(table.tokens) // max(1, len(table.blocks)))
        cells = [" ".join(map(str, table.tokens[at * size : (at + 1) * size])) for at in range(len(table.blocks))]
        widths = [max(len(cell), len(str(block))) for cell, block in zip(cells, table.blocks, strict=True)]
        salt = f", salt {table.salt!r}" if table.salt else ""
        lines += [
            f"sequence {number}: {table.published} published{salt}",
            "   blocks  " + " | ".join(str(b).ljust(w) for b, w in zip(table.blocks, widths, strict=True)),
            "   tokens  " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)),
        ]
    return "\n".join(lines) or "no sequence"


def show(case: Case) -> str:
    lines = [f"block_size={case['block_size']}"]
    for salt, tokens in case["taken"]:
        lines.append(f"the cache takes no block {tokens} at the beginning{f' under salt {salt!r}' if salt else ''}")
    return "\n".join(lines + [_said(*op) for op in case["ops"]])


def _said(name: str, seq: int, *rest: Any) -> str:
    if name == "start":
        return f"sequence {seq} starts with {rest[0]}" + (f", salt {rest[1]!r}" if rest[1] else "")
    if name == "publish":
        return f"publish(table of sequence {seq}, num_computed={rest[0]}, ...)"
    return f"sequence {seq} " + (f"is forked: {rest[0]} shares its blocks" if rest else "ends")
