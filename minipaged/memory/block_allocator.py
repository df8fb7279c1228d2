"""A pool of equal blocks: which are free, and how many page tables hold each of the others.

The allocator knows numbers only. It does not know what a block contains, how large it is, or who holds it: a
reference count says how many page tables name the block, and at zero the block is free again. It is xv6's
`kalloc.c`, a free list, with the counts that sharing needs (paper, section 4.4).
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class NoSpace:
    """The answer of an operation that was refused, and changed nothing, because too few blocks are free."""

    needed: int  # blocks to take, plus those that had to stay free
    free: int  # blocks that are free


class MisuseError(ValueError):
    """A call that no correct caller makes: an unknown sequence, a block freed twice. Nothing was changed."""


class IntegrityError(AssertionError):
    """The memory contradicts itself: `check` found a mistake in this package, not in its caller."""


class BlockAllocator:
    """The free list and the reference counts of `num_blocks` blocks, numbered from 0. O(1) for each block.

    `free_order` names the blocks to be handed out first, in that order; the others follow in ascending order.

    >>> pool = BlockAllocator(4, free_order=[2, 0])
    >>> pool.allocate(3)
    [2, 0, 1]
    >>> pool.allocate(2)
    NoSpace(needed=2, free=1)
    >>> pool.share(0); pool.release(0); pool.ref_count(0)
    1
    >>> pool.release(0); pool.take_freed()
    [0]
    """

    def __init__(self, num_blocks: int, free_order: Iterable[int] | None = None):
        first = list(free_order or ())
        if num_blocks < 0:
            raise MisuseError(f"num_blocks must be at least 0, not {num_blocks}")
        if len(set(first)) != len(first) or not set(first) <= set(range(num_blocks)):
            raise MisuseError(f"free_order must name different blocks of 0..{num_blocks - 1}, not {first}")
        self.num_blocks = num_blocks
        self.num_shared = 0  # blocks held more than once
        self.peak_used = 0
        self._ref_counts = [0] * num_blocks
        # A queue: freed blocks go to its end, and the next block taken is the one that has been free longest.
        # A stack would do as well today. But in a queue the contents of a freed block stay intact as long as
        # possible, and that makes them worth finding again: prefix caching lives on it.
        self._free = deque(first + sorted(set(range(num_blocks)) - set(first)))
        self._freed: dict[int, None] = {}  # an ordered set: freed since the last `take_freed`

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def ref_count(self, block: int) -> int:
        """How many page tables hold `block`; 0: it is free. MisuseError if there is no such block."""
        if not 0 <= block < self.num_blocks:
            raise MisuseError(f"block {block} does not exist: the pool has blocks 0..{self.num_blocks - 1}")
        return self._ref_counts[block]

    def allocate(self, count: int, keep_free: int = 0) -> list[int] | NoSpace:
        """Take `count` free blocks, each with a reference count of 1, and leave at least `keep_free` behind.

        Taking no block at all is never refused, however few are free.
        """
        if count < 0 or keep_free < 0:
            raise MisuseError(f"count and keep_free must be at least 0, not {count} and {keep_free}")
        if count and count + keep_free > len(self._free):
            return NoSpace(needed=count + keep_free, free=len(self._free))
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._ref_counts[block] = 1
        self.peak_used = max(self.peak_used, self.num_used)
        return blocks

    def share(self, block: int) -> None:
        """One more page table holds `block`. MisuseError if the block is free."""
        count = self.ref_count(block)
        if count == 0:
            raise MisuseError(f"block {block} is free, so it cannot be shared: allocate it first")
        self._ref_counts[block] = count + 1
        self.num_shared += count == 1

    def release(self, block: int) -> None:
        """One page table less holds `block`; after the last it is free. MisuseError if it is free already."""
        count = self.ref_count(block)
        if count == 0:
            raise MisuseError(f"block {block} is free already, so it cannot be released")
        self._ref_counts[block] = count - 1
        self.num_shared -= count == 2
        if count == 1:
            self._free.append(block)
            self._freed[block] = None

    def take_freed(self) -> list[int]:
        """The blocks that became free since the last call, each once, also those in use again by now.

        Debug mode fills them with NaN when a step starts: after its swap-outs have saved what they held, and
        before anything of that step is written to them (rule 8 of the design).
        """
        freed = list(self._freed)
        self._freed.clear()
        return freed

    def check(self, references: dict[int, int]) -> None:
        """Raise IntegrityError if the pool contradicts itself, or the number of page tables on a block."""
        free, counts = set(self._free), self._ref_counts
        if len(free) != len(self._free):
            raise IntegrityError(f"a block stands twice in the free list: {list(self._free)}")
        if self.num_shared != sum(count > 1 for count in counts):
            raise IntegrityError(f"num_shared is {self.num_shared}, but the counts are {counts}")
        if unknown := references.keys() - range(self.num_blocks):
            raise IntegrityError(f"page tables hold blocks that do not exist: {sorted(unknown)}")
        for block, count in enumerate(counts):
            if (count == 0) != (block in free):
                place = "in" if block in free else "not in"
                raise IntegrityError(f"block {block} has {count} references and is {place} the free list")
            if count != (named := references.get(block, 0)):
                raise IntegrityError(f"block {block} has count {count}, but {named} page tables hold it")
