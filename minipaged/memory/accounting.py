"""What the memory holds, in numbers, and whether it agrees with itself. Reads, and never changes anything."""

from dataclasses import dataclass

from minipaged.memory.block_allocator import BlockAllocator, IntegrityError
from minipaged.memory.page_table import PageTable, blocks_for


@dataclass(frozen=True)
class MemoryUsage:
    """The account of one moment. A sequence that is swapped out counts in `cpu_used` only."""

    block_size: int
    num_blocks: int
    free: int  # idle ones among them: see `cached`
    used: int
    shared: int  # blocks in more than one page table
    tokens_stored: int  # slots in use; a shared block counts once
    tokens_logical: int  # the lengths of all sequences; a shared block counts once for each
    waste_percent: float  # empty slots, in percent of the slots of the blocks in use
    blocks_saved_by_sharing: int  # blocks that the same sequences would need on top without sharing
    cpu_total: int
    cpu_used: int
    # Since the beginning, in blocks:
    peak_used: int
    copies: int  # copied on write
    swapped_out_blocks: int
    swapped_in_blocks: int
    # Of the prefix cache. (The defaults are for traces that were written before there was one.)
    cached: int = 0  # free blocks whose contents can still be found
    evicted: int = 0  # since the beginning: of those, how many were taken for something else


@dataclass
class Counters:
    """Blocks that were copied and moved since the beginning."""

    copies: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0


class Pool:
    """The blocks of one memory, GPU or CPU, and the page tables of the sequences that live there."""

    def __init__(self, allocator: BlockAllocator):
        self.allocator = allocator
        self.tables: dict[int, PageTable] = {}


def measure(gpu: Pool, cpu: Pool, block_size: int, counters: Counters) -> MemoryUsage:
    """Visits sequences, not blocks: cheap enough for every step."""
    pool, tables = gpu.allocator, gpu.tables.values()
    # Only last blocks have room. One that is shared has the same room for all its holders, and counts once.
    empty = sum({table.blocks[-1]: table.room for table in tables if table.blocks}.values())
    slots = pool.num_used * block_size
    return MemoryUsage(
        block_size=block_size,
        num_blocks=pool.num_blocks,
        free=pool.num_free,
        used=pool.num_used,
        shared=pool.num_shared,
        tokens_stored=slots - empty,
        tokens_logical=sum(table.num_tokens for table in tables),
        waste_percent=100 * empty / slots if slots else 0.0,
        blocks_saved_by_sharing=sum(len(table.blocks) for table in tables) - pool.num_used,
        cpu_total=cpu.allocator.num_blocks,
        cpu_used=cpu.allocator.num_used,
        peak_used=pool.peak_used,
        copies=counters.copies,
        swapped_out_blocks=counters.swapped_out_blocks,
        swapped_in_blocks=counters.swapped_in_blocks,
        cached=pool.num_idle,
        evicted=pool.num_evicted,
    )


def check_pool(pool: Pool, block_size: int) -> None:
    """Raise IntegrityError if page tables and counts disagree. It visits every block: for debugging."""
    references: dict[int, int] = {}
    filled: dict[int, int] = {}  # slots in use of each block: all its holders must see the same number
    for seq_id, table in pool.tables.items():
        if len(table.blocks) != blocks_for(table.num_tokens, block_size):
            raise IntegrityError(f"sequence {seq_id} has {table.num_tokens} tokens in blocks {table.blocks}")
        if table.num_published * block_size > table.num_tokens:
            raise IntegrityError(f"sequence {seq_id} has {table.num_tokens} tokens, and published beyond them")
        for logical, block in enumerate(table.blocks):
            references[block] = references.get(block, 0) + 1
            tokens = min(block_size, table.num_tokens - logical * block_size)
            if (others := filled.setdefault(block, tokens)) != tokens:
                raise IntegrityError(f"block {block}: {tokens} tokens for {seq_id}, {others} for another")
    pool.allocator.check(references)
