"""Moving sequences from one pool to another: to CPU memory when there is no room, and back (paper, section 4.5).

Sequences are moved in groups, and what they share is moved once and stays shared. A block that a sequence outside
the group holds too remains where it is for that one, and the group takes a copy along.
"""

from dataclasses import dataclass

from minipaged.memory.accounting import Pool
from minipaged.memory.block_allocator import NoSpace
from minipaged.memory.page_table import PageTable


@dataclass(frozen=True)
class Swapped:
    """A group of sequences lives in the other pool now."""

    moves: list[tuple[int, int]]  # (block in the old pool, block in the new pool)


def move(
    tables: dict[int, PageTable], old: Pool, new: Pool, keep_free: int, found: dict[int, int]
) -> Swapped | NoSpace:
    """Move a group, given by sequence id, and leave at least `keep_free` blocks of the new pool free.

    found: blocks of the old pool whose contents stand in the new one already, and where: those are not moved.
    """
    sources = dict.fromkeys(block for table in tables.values() for block in table.blocks if block not in found)
    kept = set(found.values())
    targets = new.allocator.allocate(len(sources), keep_free, kept)
    if isinstance(targets, NoSpace):
        return targets
    moves = dict(zip(sources, targets, strict=True))
    places = moves | found
    unheld = kept.union(targets)  # their first reference waits for a holder
    for seq_id, table in tables.items():
        for source in reversed(table.blocks):
            target = places[source]
            old.allocator.release(source)
            if target in unheld:
                unheld.remove(target)
            else:
                new.allocator.share(target)
        table.blocks = [places[source] for source in table.blocks]
        table.num_published = sum(block in kept for block in table.blocks)
        new.tables[seq_id] = old.tables.pop(seq_id)
    return Swapped(list(moves.items()))
