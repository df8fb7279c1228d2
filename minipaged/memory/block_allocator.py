"""A pool of equal blocks: which are free, and how many page tables hold each of the others.

The allocator knows numbers only. It does not know what a block contains, how large it is, or who holds it: a
reference count says how many page tables name the block, and at zero the block is free again. It is xv6's
`kalloc.c`, a free list, with the counts that sharing needs (paper, section 4.4).

With a prefix cache, a block is in one of three places:

    free      nobody holds it, and what it holds is of no use
    idle      nobody holds it, but the cache can find it: `share` brings it back as it is
    in use    page tables hold it

Idle blocks count as free. They are taken when no other is left, the least recently used first; the cache forgets
a block that is taken.
"""

from collections import OrderedDict, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from minipaged.memory.prefix_cache import PrefixCache


@dataclass(frozen=True)
class NoSpace:
    """The answer of an operation that was refused, and changed nothing, because too few blocks are free."""

    needed: int  # blocks to take, plus those that had to stay free
    free: int  # blocks that are free, idle ones among them


class MisuseError(ValueError):
    """A call that no correct caller makes: an unknown sequence, a block freed twice. Nothing was changed."""


class IntegrityError(AssertionError):
    """The memory contradicts itself: `check` found a mistake in this package, not in its caller."""


class BlockAllocator:
    """The free list and the reference counts of `num_blocks` blocks, numbered from 0. O(1) for each block.

    `free_order` names the blocks to be handed out first, in that order; the others follow in ascending order.
    `cache` knows which blocks can be found again; without one, none can.

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

    def __init__(
        self, num_blocks: int, free_order: Iterable[int] | None = None, cache: PrefixCache | None = None
    ):
        first = list(free_order or ())
        if num_blocks < 0:
            raise MisuseError(f"num_blocks must be at least 0, not {num_blocks}")
        if len(set(first)) != len(first) or not set(first) <= set(range(num_blocks)):
            raise MisuseError(f"free_order must name different blocks of 0..{num_blocks - 1}, not {first}")
        self.num_blocks = num_blocks
        self.num_shared = 0  # blocks held more than once
        self.peak_used = 0
        self._ref_counts = [0] * num_blocks
        self._free = deque(first + sorted(set(range(num_blocks)) - set(first)))
        self._cache = cache
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.num_evicted = 0  # idle blocks that were taken
        self._freed: dict[int, None] = {}  # an ordered set: lost their contents since the last `take_freed`

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def ref_count(self, block: int) -> int:
        """How many page tables hold `block`; 0: it is free. MisuseError if there is no such block."""
        if not 0 <= block < self.num_blocks:
            raise MisuseError(f"block {block} does not exist: the pool has blocks 0..{self.num_blocks - 1}")
        return self._ref_counts[block]

    def allocate(
        self, count: int, keep_free: int = 0, found: Collection[int] = ()
    ) -> list[int] | NoSpace:
        """Take `count` free blocks, each with a reference count of 1, and leave at least `keep_free` behind.

        found: blocks, each named once, to be shared in the same stroke; those among them that are idle are free
        no longer, and are not evicted for the others. Taking no block at all is never refused, however few are free.
        """
        if count < 0 or keep_free < 0:
            raise MisuseError(f"count and keep_free must be at least 0, not {count} and {keep_free}")
        for block in found:
            self._must_have_contents(block)
        taken = count + sum(block in self._idle for block in found)
        if taken and taken + keep_free > self.num_free:
            return NoSpace(needed=taken + keep_free, free=self.num_free)
        for block in found:
            self.share(block)
        blocks = [self._take() for _ in range(count)]
        self.peak_used = max(self.peak_used, self.num_used)
        return blocks

    def _take(self) -> int:
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._idle.popitem(last=False)
            assert self._cache is not None
            self._cache.remove(block)
            self._freed[block] = None
            self.num_evicted += 1
        self._ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more page table holds `block`. MisuseError if the block is free and can't be found."""
        self._must_have_contents(block)
        self._idle.pop(block, None)
        self._ref_counts[block] += 1
        self.num_shared += self._ref_counts[block] == 2

    def _must_have_contents(self, block: int) -> None:
        if self.ref_count(block) == 0 and block not in self._idle:
            raise MisuseError(f"block {block} is free, so it cannot be shared: allocate it first")

    def release(self, block: int) -> None:
        """One page table less holds `block`; after the last it is free, or idle. MisuseError if it is already."""
        count = self.ref_count(block)
        if count == 0:
            raise MisuseError(f"block {block} is free already, so it cannot be released")
        self._ref_counts[block] = count - 1
        self.num_shared -= count == 2
        if count == 1:
            if self._cache is not None and block in self._cache:
                self._idle[block] = None
            else:
                self._drop(block)

    def _drop(self, block: int) -> None:
        self._free.append(block)
        self._freed[block] = None

    def forget_all(self) -> None:
        """The cache forgets every block. Those in use stay in use; idle ones are free."""
        if self._cache is not None:
            self._cache.clear()
        while self._idle:
            self._drop(self._idle.popitem(last=False)[0])

    def take_freed(self) -> list[int]:
        """The blocks whose contents were lost since the last call, each once, also those in use again by now.

        They were freed, or were idle and are idle no more.

        Debug mode fills them with NaN when a step starts: after its swap-outs have saved what they held, and
        before anything of that step is written to them (rule 8 of the design).
        """
        freed = list(self._freed)
        self._freed.clear()
        return freed

    def renewed(self) -> "BlockAllocator":
        """All blocks free, their contents lost. The sums since the beginning go on."""
        new = BlockAllocator(self.num_blocks, cache=self._cache)
        new._freed = dict.fromkeys(range(self.num_blocks))
        new.peak_used, new.num_evicted = self.peak_used, self.num_evicted
        return new

    def idle(self) -> list[int]:
        """The idle blocks, least recently used first."""
        return list(self._idle)

    def check(self, references: dict[int, int]) -> None:
        """Raise IntegrityError if the pool contradicts itself, or the number of page tables on a block."""
        free, counts = {*self._free, *self._idle}, self._ref_counts
        if len(free) != self.num_free:
            raise IntegrityError(f"a block stands twice in the free list: {list(self._free)}, idle {self.idle()}")
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
        self._check_cache()

    def _check_cache(self) -> None:
        """free + idle + in use = all; and whoever follows a block falls out of use before it (prefix_cache.py)."""
        parents = self._cache.parents() if self._cache is not None else {}
        order = {block: place for place, block in enumerate(self._idle)}
        for block in self._free:
            if block in parents:
                raise IntegrityError(f"block {block} is free, but the cache finds it")
        for block in order:
            if block not in parents:
                raise IntegrityError(f"block {block} is idle, but the cache does not find it")
        for block, parent in parents.items():
            if parent is None:
                continue
            if parent not in parents:
                raise IntegrityError(f"block {block} is known to follow block {parent}, which is not known")
            if self._ref_counts[parent] < self._ref_counts[block]:
                raise IntegrityError(f"block {block} is held more often than block {parent} before it")
            if parent in order and order[parent] < order[block]:
                raise IntegrityError(f"block {parent} would be evicted before block {block} that follows it")
