"""Growing: slots for more tokens, and a copy first where others would see what is written (paper, section 4.4).

Sequences that were forked share all blocks. A full block is never written again, so only the last block of a sequence
can be one that it must not write into. Then it gets a copy of it, of its own: at most one for each sequence. When all
holders write, the last of them is alone by then, and writes in place.
"""

from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from minipaged.memory.accounting import Pool
from minipaged.memory.block_allocator import MisuseError, NoSpace
from minipaged.memory.page_table import PageTable, blocks_for


@dataclass(frozen=True)
class Appended:
    """All sequences of the call have their new slots."""

    copies: list[tuple[int, int]]  # (source, target), to be carried out before writing; no block is both


class _Growth(NamedTuple):
    """What one sequence needs to grow."""

    table: PageTable
    num_tokens: int
    copy: bool  # its last block is shared and about to be written: it needs one of its own
    new_blocks: int  # besides that one


def grow(growing: dict[int, tuple[PageTable, int]], pool: Pool, keep_free: int) -> Appended | NoSpace:
    """Give sequences slots for so many more tokens, (table, tokens) by their ids: to all of them, or to none."""
    growths = _growths(growing, pool)
    blocks = pool.allocator.allocate(sum(g.copy + g.new_blocks for g in growths), keep_free)
    if isinstance(blocks, NoSpace):
        return blocks
    fresh, copies = iter(blocks), []
    for table, num_tokens, copy, new_blocks in growths:
        if copy:
            source, target = table.blocks[-1], next(fresh)
            pool.allocator.release(source)
            table.blocks = [*table.blocks[:-1], target]
            copies.append((source, target))
        if new_blocks:
            table.blocks = [*table.blocks, *islice(fresh, new_blocks)]
        table.num_tokens += num_tokens
    return Appended(copies)


def _growths(growing: dict[int, tuple[PageTable, int]], pool: Pool) -> list[_Growth]:
    growths = []
    holders: dict[int, int] = {}  # of last blocks: how many are left once those before got their copies
    for seq_id, (table, num_tokens) in growing.items():
        if num_tokens < 0:
            raise MisuseError(f"sequence {seq_id} cannot grow by {num_tokens} tokens")
        copy = False
        if num_tokens and table.room:
            last = table.blocks[-1]
            left = holders.get(last) or pool.allocator.ref_count(last)
            copy = left > 1
            holders[last] = left - copy
        new_blocks = blocks_for(table.num_tokens + num_tokens, table.block_size) - len(table.blocks)
        growths.append(_Growth(table, num_tokens, copy, new_blocks))
    return growths
