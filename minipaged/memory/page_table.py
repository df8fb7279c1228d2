"""The page table of one sequence: where in the pool does the token at a position live?

A sequence sees its tokens in a row, cut into logical blocks 0, 1, 2, ... of `block_size` slots. They fill
from left to right, and each lives in a physical block anywhere in the pool. Only the last one has room left,
so a sequence wastes less than one block (paper, section 4.3).
"""

from dataclasses import dataclass, field

from minipaged.memory.block_allocator import MisuseError


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that `num_tokens` tokens need.

    >>> blocks_for(7, 4), blocks_for(8, 4), blocks_for(9, 4)
    (2, 2, 3)
    """
    return -(-num_tokens // block_size)


@dataclass(slots=True)
class PageTable:
    """Logical block -> physical block, for one sequence. Here is Figure 6 of the paper: 7 tokens, B=4.

    >>> table = PageTable(block_size=4, blocks=[7, 1], num_tokens=7)
    >>> table.locate(5)
    (1, 1)
    >>> table.slot(5)
    5
    >>> table.slots(2, 3)
    [30, 31, 4]
    """

    block_size: int
    # Logical -> physical. Replaced, never changed: whoever was given the list may keep it, and a table that is still
    # the same list has not changed.
    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0  # tokens that have a slot
    num_published: int = 0  # leading blocks that were given to the prefix cache, or found in it
    salt: str | None = None  # and for whom; see prefix_cache.py
    publishes: bool = False  # whether it may: not after a reset, since its beginning is forgotten

    @property
    def room(self) -> int:
        """Empty slots in the last block."""
        return len(self.blocks) * self.block_size - self.num_tokens

    # The way of position 2 in blocks [7, 1] of 4 slots:
    #
    #                position 2
    #               /          \             divmod(2, 4)
    #     logical block 0    offset 2
    #              |            |            blocks[0] = 7
    #     physical block 7   offset 2
    #               \          /             7 * 4 + 2
    #                 slot 30
    #
    def locate(self, position: int) -> tuple[int, int]:
        """(physical block, offset) of the token at `position`. MisuseError if it has no slot."""
        self._must_have(position, 1)
        logical, offset = divmod(position, self.block_size)
        return self.blocks[logical], offset

    def slot(self, position: int) -> int:
        """The slot of the token at `position`: its place when the whole pool is seen as one row of slots."""
        block, offset = self.locate(position)
        return block * self.block_size + offset

    def slots(self, start: int, count: int) -> list[int]:
        """The slots of the positions start .. start + count - 1."""
        self._must_have(start, count)
        size, blocks = self.block_size, self.blocks
        return [blocks[position // size] * size + position % size for position in range(start, start + count)]

    def _must_have(self, start: int, count: int) -> None:
        if start < 0 or count < 0 or start + count > self.num_tokens:
            asked = f"{count} positions from {start} on"
            raise MisuseError(f"{asked}: the page table has slots for positions 0..{self.num_tokens - 1}")
