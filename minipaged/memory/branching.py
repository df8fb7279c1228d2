"""Guesses of what comes next: their slots are taken back if they were wrong, and there may be several at a time.

Each of several is a branch, and one of them will stay. A branch shares all full blocks before its first own token with
the sequence that it branches off. The block in which that token lies, it gets as a copy, and behind it new blocks:
whatever the block size is, no slot is written twice.

    sequence   [ prompt ][ .... ][ ..t a b ][ c ]        t: its newest token; a b c: the first guess
    branch     [ same   ][ same ][ ..t x y ][ z ]        from t on its own: a copy of the block, and a new one

When it is known who was right, the sequence goes on with that branch's page table (`adopt`), and the others are freed.
"""

from minipaged.memory.accounting import Pool
from minipaged.memory.block_allocator import MisuseError, NoSpace
from minipaged.memory.copy_on_write import Appended
from minipaged.memory.page_table import PageTable, blocks_for


def branch(
    table: PageTable, start: int, count: int, pool: Pool, keep_free: int
) -> tuple[PageTable, Appended] | NoSpace:
    """A new table with the full blocks before position `start`, and `count` slots of its own from there on."""
    shared, num_tokens = start // table.block_size, start + count
    fresh = pool.allocator.allocate(blocks_for(num_tokens, table.block_size) - shared, keep_free, table.blocks[:shared])
    if isinstance(fresh, NoSpace):
        return fresh
    copies = [(table.blocks[shared], fresh[0])] if start % table.block_size else []
    published = min(table.num_published, shared)
    blocks = [*table.blocks[:shared], *fresh]
    return PageTable(table.block_size, blocks, num_tokens, published, table.salt, table.publishes), Appended(copies)


def adopt(pool: Pool, seq_id: int, branch_id: int) -> None:
    """The sequence goes on as its branch, whose name ends; what only the sequence held becomes free."""
    for block in reversed(pool.tables.pop(seq_id).blocks):
        pool.allocator.release(block)
    pool.tables[seq_id] = pool.tables.pop(branch_id)


def take_back(table: PageTable, count: int, pool: Pool) -> None:
    """Take the slots of the last `count` tokens back; blocks that are empty then become free.

    MisuseError if others could see these tokens: in a block that was published, or that another sequence holds too.
    """
    left = table.num_tokens - count
    if count < 0 or left < 0:
        raise MisuseError(f"of {table.num_tokens} tokens {count} can't be taken back")
    if not count:
        return
    shared = any(pool.allocator.ref_count(block) > 1 for block in table.blocks[left // table.block_size :])
    if shared or left < table.num_published * table.block_size:
        raise MisuseError(f"some of the last {count} tokens are in a block that others can see")
    kept = blocks_for(left, table.block_size)
    for block in reversed(table.blocks[kept:]):
        pool.allocator.release(block)
    table.blocks, table.num_tokens = table.blocks[:kept], left
