"""Publishing: the full blocks of a sequence are put where a prefix cache finds them (prefix_cache.py).

Where two sequences computed the same tokens side by side, only one of the two blocks can be found. All go on with that
one: whoever holds a block must hold what it is known to follow.
"""

from collections.abc import Callable, Sequence

from minipaged.memory.accounting import Pool
from minipaged.memory.page_table import PageTable
from minipaged.memory.prefix_cache import PrefixCache


def publish(
    table: PageTable, num_computed: int, tokens: Callable[[int, int], Sequence[int]], pool: Pool, cache: PrefixCache
) -> None:
    """Let the full blocks of the first `num_computed` tokens of a table be found; tokens(start, count): those there.

    They are given to the cache from the beginning on, each once: `table.num_published` counts them. Where the cache
    finds another block instead, each table of the pool that holds the one gets a list with the other in its place, and
    the allocator's counts follow.
    """
    size = table.block_size
    for logical in range(table.num_published, num_computed // size):
        own, parent = table.blocks[logical], table.blocks[logical - 1] if logical else None
        known = cache.add(own, parent, tokens(logical * size, size), table.salt)
        if known != own:
            _replace(pool, logical, own, known)
        table.num_published = logical + 1


def _replace(pool: Pool, logical: int, own: int, known: int) -> None:
    """All who hold `own` go on with `known`."""
    for table in pool.tables.values():
        if table.blocks[logical : logical + 1] == [own]:
            pool.allocator.share(known)
            pool.allocator.release(own)
            table.blocks = [*table.blocks[:logical], known, *table.blocks[logical + 1 :]]
