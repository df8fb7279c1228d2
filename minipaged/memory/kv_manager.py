"""The scheduler's only door to memory: slots for the tokens of many sequences, out of one pool of blocks.

Over the allocator (which block is free?) and the page tables (where is my token?) this file adds what
sequences do: start (`allocate`), grow (`append`), split without copying (`fork`), end (`free`), and make way
for others (`swap_out`, `swap_in`). Guesses get slots that are taken back (`take_back`), or a `branch`. With a prefix
cache, a sequence starts with the blocks that `find` finds, and `publish` lets its own be found. How that is done stands
in copy_on_write.py, branching.py, swapping.py and publishing.py.

Everything here is numbers. Where contents have to follow, the answer holds pairs (from, to), and the runner
moves the tensors: in each step swap-outs, then swap-ins, then copies, and then the new tokens are written.

Every operation is all or nothing: after the answer `NoSpace`, and after a MisuseError, nothing has changed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from minipaged.memory.accounting import Counters, MemoryUsage, Pool, check_pool, measure
from minipaged.memory.block_allocator import BlockAllocator, IntegrityError, MisuseError, NoSpace
from minipaged.memory.branching import adopt, branch, take_back
from minipaged.memory.copy_on_write import Appended, grow
from minipaged.memory.page_table import PageTable, blocks_for
from minipaged.memory.prefix_cache import PrefixCache, Salt
from minipaged.memory.publishing import publish
from minipaged.memory.swapping import Swapped, move


@dataclass(frozen=True)
class Prefix:
    """The beginning of a sequence that is in memory already. Valid until the next operation."""

    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0
    salt: Salt = None


@dataclass(frozen=True)
class Allocated:
    """A new sequence has its slots."""

    blocks: list[int]  # its page table


class KVCacheManager:
    """Page tables over a pool of `num_blocks` blocks, and a second pool, in CPU memory, to swap to.

    cache: finds blocks by their tokens, see prefix_cache.py; without one, nothing is found.

    The caller names sequences by numbers. Here is Figure 8 of the paper: two samples share a prompt of 7
    tokens, and the first to write gets a copy.

    >>> memory = KVCacheManager(num_blocks=8, block_size=4, free_order=[7, 1, 3])
    >>> memory.allocate(seq_id=1, num_tokens=7)
    Allocated(blocks=[7, 1])
    >>> memory.fork(parent=1, child=2)
    >>> memory.append({1: 1, 2: 1})
    Appended(copies=[(1, 3)])
    >>> memory.block_table(1), memory.block_table(2)
    ([7, 3], [7, 1])
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_cpu_blocks: int = 0,
        free_order: list[int] | None = None,
        cache: PrefixCache | None = None,
    ):
        if block_size < 1:
            raise MisuseError(f"block_size must be at least 1, not {block_size}")
        self.block_size = block_size
        self.cache = cache
        self._gpu = Pool(BlockAllocator(num_blocks, free_order, cache))
        self._cpu = Pool(BlockAllocator(num_cpu_blocks))
        self._counters = Counters()

    @property
    def num_blocks(self) -> int:
        return self._gpu.allocator.num_blocks

    @property
    def num_free(self) -> int:
        return self._gpu.allocator.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that a sequence of `num_tokens` tokens needs if it shares none."""
        return blocks_for(num_tokens, self.block_size)

    def sequences(self) -> list[int]:
        """All sequences, those on the GPU first."""
        return [*self._gpu.tables, *self._cpu.tables]

    def is_swapped(self, seq_id: int) -> bool:
        return self._home(seq_id) is self._cpu

    def num_tokens(self, seq_id: int) -> int:
        """Tokens that have a slot, wherever the sequence lives."""
        return self._home(seq_id).tables[seq_id].num_tokens

    def block_table(self, seq_id: int) -> list[int]:
        """A copy of the page table, logical -> physical; in the CPU pool if the sequence is swapped out."""
        return self._home(seq_id).tables[seq_id].blocks.copy()

    def current_table(self, seq_id: int) -> list[int]:
        """The page table itself, not to be changed: as long as it doesn't change, it is the same list at every call.

        So whoever keeps it need neither copy nor compare it. The sequence must be on the GPU.
        """
        return self._table(self._gpu, seq_id).blocks

    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        """Where the tokens at positions start .. start + count - 1 go. The sequence must be on the GPU."""
        return self._table(self._gpu, seq_id).slots(start, count)

    def find(self, tokens: Sequence[int], salt: Salt = None) -> Prefix:
        """The longest beginning of `tokens` whose keys and values are in full blocks here, under the same salt."""
        blocks = self.cache.find(tokens, salt) if self.cache is not None else []
        return Prefix(blocks, len(blocks) * self.block_size, salt)

    def allocate(
        self, seq_id: int, num_tokens: int, keep_free: int = 0, prefix: Prefix | None = None
    ) -> Allocated | NoSpace:
        """Start a sequence with slots for `num_tokens` tokens, and leave at least `keep_free` blocks free.

        prefix: what `find` has just found of it: these blocks are shared, and only the others are new. Without one,
        nobody knows for whom the sequence is computed, and it publishes nothing.
        """
        self._must_be_new(seq_id)
        publishes = prefix is not None
        prefix = prefix or Prefix()
        if num_tokens < prefix.num_tokens:
            raise MisuseError(f"sequence {seq_id} cannot start with {num_tokens} tokens, {prefix.num_tokens} found")
        new_blocks = self.blocks_for(num_tokens) - len(prefix.blocks)
        blocks = self._gpu.allocator.allocate(new_blocks, keep_free, prefix.blocks)
        if isinstance(blocks, NoSpace):
            return blocks
        blocks = prefix.blocks + blocks
        table = PageTable(self.block_size, blocks, num_tokens, len(prefix.blocks), prefix.salt, publishes)
        self._gpu.tables[seq_id] = table
        return Allocated(blocks.copy())

    def publish(self, seq_id: int, num_computed: int, tokens: Callable[[int, int], Sequence[int]]) -> None:
        """Let the full blocks of the first `num_computed` tokens be found; their keys and values are written.

        tokens(start, count): the sequence's tokens there. See publishing.py.
        """
        table = self._table(self._gpu, seq_id)
        if num_computed > table.num_tokens:
            raise MisuseError(f"sequence {seq_id} has slots for {table.num_tokens} tokens, not {num_computed}")
        if self.cache is not None and table.publishes:
            publish(table, num_computed, tokens, self._gpu, self.cache)

    def idle_blocks(self) -> list[int]:
        """The free blocks whose contents can still be found, least recently used first."""
        return self._gpu.allocator.idle()

    def reset_prefix_cache(self) -> None:
        """Nothing that was computed until now is found any more. Sequences keep what they hold."""
        self._gpu.allocator.forget_all()
        for pool in (self._gpu, self._cpu):
            for table in pool.tables.values():
                table.publishes = False

    def reset(self) -> None:
        """No sequence, and nothing to be found: as it was made. What all blocks held counts as lost."""
        if self.cache is not None:
            self.cache.clear()
        self._gpu, self._cpu = (Pool(pool.allocator.renewed()) for pool in (self._gpu, self._cpu))

    def append(self, counts: dict[int, int], keep_free: int = 0) -> Appended | NoSpace:
        """Give each sequence slots for `counts[seq_id]` more tokens, or none of them any: see copy_on_write.py."""
        growing = {seq_id: (self._table(self._gpu, seq_id), count) for seq_id, count in counts.items()}
        answer = grow(growing, self._gpu, keep_free)
        if isinstance(answer, Appended):
            self._counters.copies += len(answer.copies)
        return answer

    def take_back(self, seq_id: int, count: int) -> None:
        """Take the slots of the last `count` tokens back; blocks that are empty then become free: see branching.py."""
        try:
            take_back(self._table(self._gpu, seq_id), count, self._gpu)
        except MisuseError as error:
            raise MisuseError(f"sequence {seq_id}: {error}") from None

    def fork(self, parent: int, child: int) -> None:
        """Start `child` with all tokens of `parent`: it shares every block, and nothing is copied.

        All slots of the parent must be written by then: a shared slot that is written later changes both.
        """
        home = self._home(parent)
        self._must_be_new(child)
        table = home.tables[parent]
        for block in table.blocks:
            home.allocator.share(block)
        home.tables[child] = replace(table)

    def branch(self, parent: int, child: int, start: int, count: int, keep_free: int = 0) -> Appended | NoSpace:
        """Start `child` with the parent's tokens before position `start`, and `count` slots of its own behind them.

        See branching.py. The parent's slots before `start` must be written by then.
        """
        table = self._table(self._gpu, parent)
        self._must_be_new(child)
        if not 0 <= start <= table.num_tokens or count < 1:
            raise MisuseError(
                f"sequence {parent} has {table.num_tokens} tokens: no branch of {count} tokens can start at {start}"
            )
        answer = branch(table, start, count, self._gpu, keep_free)
        if isinstance(answer, NoSpace):
            return answer
        self._gpu.tables[child], appended = answer
        self._counters.copies += len(appended.copies)
        return appended

    def adopt(self, seq_id: int, branch_id: int) -> None:
        """The sequence goes on with the page table of one of its branches, which ends with that."""
        self._table(self._gpu, seq_id), self._table(self._gpu, branch_id)
        if seq_id == branch_id:
            raise MisuseError(f"sequence {seq_id} is no branch of itself")
        adopt(self._gpu, seq_id, branch_id)

    def free(self, seq_id: int) -> None:
        """End a sequence, wherever it lives. Blocks that no other sequence holds become free.

        From the last to the first: of what can be found again, the beginning is the last to be evicted, since
        more sequences can begin with it.
        """
        home = self._home(seq_id)
        for block in reversed(home.tables.pop(seq_id).blocks):
            home.allocator.release(block)

    def take_freed(self) -> list[int]:
        """GPU blocks that became free since the last call: see `BlockAllocator.take_freed`."""
        return self._gpu.allocator.take_freed()

    def swap_out(self, seq_ids: Iterable[int]) -> Swapped | NoSpace:
        """Move a group of sequences to the CPU pool; see swapping.py."""
        tables = {seq_id: self._table(self._gpu, seq_id) for seq_id in seq_ids}
        answer = move(tables, self._gpu, self._cpu, 0, {})
        if isinstance(answer, Swapped):
            self._counters.swapped_out_blocks += len(answer.moves)
        return answer

    def swap_in(
        self, seq_ids: Iterable[int], keep_free: int = 0, tokens: Mapping[int, Sequence[int]] | None = None
    ) -> Swapped | NoSpace:
        """Move a group of sequences back, and leave at least `keep_free` GPU blocks free.

        tokens: of each sequence, those that are computed. What is still found of them is shared instead of moved.
        """
        tables = {seq_id: self._table(self._cpu, seq_id) for seq_id in seq_ids}
        found: dict[int, int] = {}
        for seq_id, table in tables.items():
            if tokens and table.publishes:
                found |= zip(table.blocks, self.find(tokens[seq_id], table.salt).blocks, strict=False)
        answer = move(tables, self._cpu, self._gpu, keep_free, found)
        if isinstance(answer, Swapped):
            self._counters.swapped_in_blocks += len(answer.moves)
        return answer

    def usage(self) -> MemoryUsage:
        """The account of this moment; cheap."""
        return measure(self._gpu, self._cpu, self.block_size, self._counters)

    def check(self) -> None:
        """Raise IntegrityError if page tables, counts and free lists contradict each other."""
        if both := self._gpu.tables.keys() & self._cpu.tables.keys():
            raise IntegrityError(f"sequences {sorted(both)} live on the GPU and on the CPU")
        for pool in (self._gpu, self._cpu):
            check_pool(pool, self.block_size)

    def _home(self, seq_id: int) -> Pool:
        if seq_id in self._gpu.tables:
            return self._gpu
        if seq_id in self._cpu.tables:
            return self._cpu
        raise MisuseError(f"there is no sequence {seq_id}")

    def _table(self, pool: Pool, seq_id: int) -> PageTable:
        if self._home(seq_id) is not pool:
            raise MisuseError(f"sequence {seq_id} is {'swapped out' if pool is self._gpu else 'on the GPU'}")
        return pool.tables[seq_id]

    def _must_be_new(self, seq_id: int) -> None:
        if seq_id in self._gpu.tables or seq_id in self._cpu.tables:
            raise MisuseError(f"sequence {seq_id} exists already")
