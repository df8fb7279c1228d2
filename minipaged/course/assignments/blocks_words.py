"""Assignment 2: cases in words, and what is in memory as a picture."""

from typing import Any, Protocol

from minipaged.course.assignment import Case

WIDTH = 80


def in_words(op: list[Any]) -> str:
    """The call as it would be written."""
    name, *arguments = op
    if name == "allocate":
        seq_id, tokens, keep_free, salt = arguments
        found = ", prefix=find(its tokens)" if salt is not None else ""
        return f"allocate({seq_id}, {len(tokens)}{_keep(keep_free)}{found})"
    if name == "append":
        growing, keep_free = arguments
        return f"append({{{', '.join(f'{seq_id}: {len(tokens)}' for seq_id, tokens in growing)}}}{_keep(keep_free)})"
    if name == "allocate_less":
        return f"allocate({arguments[0]}, one token less than is found, prefix=find(its tokens))"
    if name == "shrink":
        return f"append({{{', '.join(f'{seq_id}: {count}' for seq_id, count in arguments[0])}}})"
    if name == "swap_in":
        return f"swap_in({arguments[0]}{_keep(arguments[1])})"
    return f"{name}({', '.join(map(str, arguments))})"


def _keep(keep_free: int) -> str:
    return f", keep_free={keep_free}" if keep_free else ""


def show_memory(case: Case) -> str:
    cpu = f", num_cpu_blocks={case['num_cpu_blocks']}" if case["num_cpu_blocks"] else ""
    cache = ", with a prefix cache" if case["cached"] else ""
    first = f"memory = KVCacheManager({case['num_blocks']}, block_size={case['block_size']}{cpu}){cache}"
    lines = [first, *(f"  {in_words(op)}" for op in case["ops"])]
    tokens = [f"  tokens of {op[1]}: {' '.join(map(str, op[2]))}" for op in case["ops"] if op[0] == "allocate"]
    return "\n".join(lines + (tokens if case["cached"] else []))


class Drawn(Protocol):
    """What can be drawn: page tables, (swapped, blocks) by sequence, and the slots of blocks, by swapped and number."""

    tables: dict[int, tuple[bool, list[int]]]
    pools: dict[bool, dict[int, list[Any]]]


def draw_memory(case: Case, shadow: Drawn, counts: list[int] | None = None) -> str:
    """Page tables, and below the blocks with the tokens that were written into them."""
    lines = ["page tables (logical block -> physical block)"]
    for seq_id, (swapped, blocks) in sorted(shadow.tables.items()):
        lines.append(f"  {seq_id}: {''.join(f'[{block}]' for block in blocks)}{'  in CPU memory' if swapped else ''}")
    for swapped, size in ((False, case["num_blocks"]), (True, case["num_cpu_blocks"])):
        rows = [row for block in range(size) if (row := _row(shadow, swapped, block, None if swapped else counts))]
        rest = f"  and {size - len(rows)} free ones" if len(rows) < size else ""
        lines += [f"{'CPU ' if swapped else ''}blocks", *rows, *([rest] if rest else [])] if size else []
    return "\n".join(line if len(line) <= WIDTH else line[: WIDTH - 3] + "..." for line in lines)


def _row(shadow: Drawn, swapped: bool, block: int, counts: list[int] | None) -> str | None:
    """A block with its contents and holders; None if there are neither."""
    slots = shadow.pools[swapped].get(block, [])
    tables = sorted(shadow.tables.items())
    holders = [str(seq_id) for seq_id, (where, blocks) in tables if where == swapped and block in blocks]
    count = counts[block] if counts and block < len(counts) else 0
    if not holders and not count and not any(slots):
        return None
    row = " ".join(f"{contents[-1] if contents else '.':>4}" for contents in slots)
    words = f"count {count}, " if counts else ""
    return f"  {block:2} |{row} |  {words}held by {' '.join(holders) or 'nobody'}"
