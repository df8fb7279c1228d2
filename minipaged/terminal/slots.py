"""Draws blocks with what stands in their slots: for the few blocks of an example, where every token can be seen.

The other drawings, for pools of any size, are in draw.py.
"""

from collections.abc import Iterable, Mapping, Sequence

from rich.text import Text

from minipaged.terminal.draw import FREE, HEADING, SHARED, color
from minipaged.terminal.snapshot import Snapshot


def sheet(*parts: Iterable[Text]) -> Text:
    """Drawings one below the other, with an empty line between: what a terminal or a notebook shows as a whole."""
    lines: list[Text] = []
    for part in parts:
        lines += [Text(), *part] if lines else part
    return Text("\n").join(lines)


def logical_view(snapshot: Snapshot, words: Mapping[str, Sequence[str]]) -> list[Text]:
    """Each sequence as it sees itself: its tokens in a row, block by block, and below them its page table.

    words: of each sequence by name, its tokens as they should be read.
    """
    lines: list[Text] = []
    size = snapshot.usage.block_size
    margin = max([1, *(len(table.name) for table in snapshot.tables)]) + 2
    for table in snapshot.tables:
        top = Text().append(table.name, f"black on {color(table.name)}").append(" " * (margin - len(table.name)))
        below = Text(" " * margin)
        for logical, block in enumerate(table.blocks):
            cells = _slots(words[table.name][: table.num_tokens], logical, size)
            text, name = " ".join(cells), f"{logical} -> {block}"
            width = max(len(text), len(name))
            top.append("| ").append(text.ljust(width)).append(" ")
            below.append("| ").append(name.ljust(width)).append(" ")
        lines += [top.append("|"), below.append("|")]
    return [Text().append("LOGICAL", HEADING).append(" blocks, and below them: logical -> physical"), *lines]


def physical_view(snapshot: Snapshot, words: Mapping[str, Sequence[str]]) -> list[Text]:
    """The pool, one row a block: what stands in its slots, who holds it as which logical block.

    >>> from minipaged.memory import KVCacheManager
    >>> memory = KVCacheManager(num_blocks=3, block_size=2, free_order=[2, 0, 1])
    >>> _ = memory.allocate(0, num_tokens=3)
    >>> print(sheet(physical_view(Snapshot.of(memory), {"A": ["to", "be", "or"]})))
    PHYSICAL blocks: slots, and who holds them as which logical block
    0 | or .  | A[1]
    1 | .  .  | free
    2 | to be | A[0]
    """
    size = snapshot.usage.block_size
    rows: dict[int, list[str]] = {}
    holders: dict[int, list[str]] = {}
    for table in snapshot.tables:
        for logical, block in enumerate(table.blocks):
            rows[block] = _slots(words[table.name][: table.num_tokens], logical, size)
            holders.setdefault(block, []).append(f"{table.name}[{logical}]")
    width = max([1, *(len(word) for row in rows.values() for word in row)])
    margin = len(str(snapshot.usage.num_blocks - 1))
    lines = [Text().append("PHYSICAL", HEADING).append(" blocks: slots, and who holds them as which logical block")]
    for block in range(snapshot.usage.num_blocks):
        cells = rows.get(block, ["."] * size)
        line = Text(f"{block:>{margin}} | ")
        style = FREE if block not in rows else ""
        line.append(" ".join(cell.ljust(width) for cell in cells), style).append(" | ")
        names = holders.get(block, ["cached" if block in snapshot.cached else "free"])
        line.append("  ".join(names), SHARED if len(names) > 1 else style)
        lines.append(line.append("  shared" if len(names) > 1 else ""))
    return lines


def _slots(words: Sequence[str], logical: int, size: int) -> list[str]:
    """The words of one logical block; a dot for an empty slot."""
    filled = list(words[logical * size : (logical + 1) * size])
    return [word.replace("\n", "\\n").strip() or "_" for word in filled] + ["."] * (size - len(filled))
