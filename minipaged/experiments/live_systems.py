"""Three ways of giving requests memory, in one engine: the same model, the same kernels, the same pool of blocks.

    static       padded batches: the earliest requests that fit are padded alike, run until the longest of them is
                 complete, and nobody joins meanwhile (FasterTransformer; paper, section 6.1)
    contiguous   requests join and leave at every step, but each reserves the longest that it may become, in one
                 piece from a buddy allocator (Orca, "Max"). -pow2 and -oracle reserve less: see `SYSTEMS`
    paged        the package as it is

An engine can't tell them apart: a reserved piece is a page table whose blocks follow each other.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minipaged.experiments.buddy import Buddy, next_power
from minipaged.experiments.loads import Job
from minipaged.llm import LLM
from minipaged.memory import BlockAllocator, IntegrityError, KVCacheManager, MisuseError, NoSpace, Prefix, Swapped
from minipaged.memory.kv_manager import Allocated, Appended
from minipaged.scheduling.scheduler import Scheduler


class RunAllocator(BlockAllocator):
    """Blocks that follow each other, from a buddy allocator.

    What the buddy allocator rounds a run up by belongs to nobody: it counts as free, and yet nobody can have it.

    >>> pool = RunAllocator(16)
    >>> pool.allocate(3), pool.allocate(8)
    ([0, 1, 2], [8, 9, 10, 11, 12, 13, 14, 15])
    >>> pool.num_free, pool.allocate(5)
    (5, NoSpace(needed=5, free=5))
    """

    def __init__(self, num_blocks: int):
        super().__init__(num_blocks)
        self._buddy = Buddy(num_blocks)
        self._pieces: dict[int, tuple[int, int]] = {}  # by the run's first block

    def allocate(self, count: int, keep_free: int = 0, found: object = ()) -> list[int] | NoSpace:
        """A run of `count` blocks, all to be released together. keep_free: no effect, all that it needs is in it."""
        if count < 1 or found:
            raise MisuseError(f"a run has at least 1 block and shares none, not {count} and {found}")
        piece = self._buddy.allocate(count)
        if piece is None:
            return NoSpace(needed=count, free=self.num_free)
        start, _ = piece
        self._pieces[start] = piece
        run = range(start, start + count)
        self._free = deque([*run, *(block for block in self._free if block not in run)])  # they are taken from the left
        return super().allocate(count)

    def release(self, block: int) -> None:
        """As ever; with its first block, which `KVCacheManager.free` gives back last, all of a run is free."""
        super().release(block)
        if block in self._pieces:
            self._buddy.release(self._pieces.pop(block))


class ContiguousKVCacheManager(KVCacheManager):
    """Each sequence has one run of blocks from its beginning to its end, and so never needs another.

    reservations: tokens to reserve for a sequence, by its id. Nothing is ever preempted, since nobody needs more than
    what is reserved. One sequence for each request: no samples, no beams, no swapping.

    >>> memory = ContiguousKVCacheManager(num_blocks=16, block_size=4, reservations=[32, 32, 32])
    >>> memory.allocate(seq_id=0, num_tokens=3), memory.allocate(seq_id=1, num_tokens=30)
    (Allocated(blocks=[0, 1, 2, 3, 4, 5, 6, 7]), Allocated(blocks=[8, 9, 10, 11, 12, 13, 14, 15]))
    >>> memory.allocate(seq_id=2, num_tokens=3)
    NoSpace(needed=8, free=0)
    """

    def __init__(self, num_blocks: int, block_size: int, reservations: Sequence[int]):
        super().__init__(num_blocks, block_size)
        self._gpu.allocator = RunAllocator(num_blocks)
        self._reservations = reservations

    def allocate(
        self, seq_id: int, num_tokens: int, keep_free: int = 0, prefix: Prefix | None = None
    ) -> Allocated | NoSpace:
        """Take the whole reservation. MisuseError if it is too small for `num_tokens`."""
        self._must_fit(seq_id, num_tokens)
        answer = super().allocate(seq_id, self._reservations[seq_id], prefix=prefix)
        if isinstance(answer, Allocated):
            self._gpu.tables[seq_id].num_tokens = num_tokens
        return answer

    def append(self, counts: dict[int, int], keep_free: int = 0) -> Appended:
        """More tokens in the slots that are there. MisuseError if one of the sequences outgrows its reservation."""
        for seq_id, count in counts.items():
            self._must_fit(seq_id, self.num_tokens(seq_id) + count)
        for seq_id, count in counts.items():
            self._gpu.tables[seq_id].num_tokens += count
        return Appended([])

    def _must_fit(self, seq_id: int, num_tokens: int) -> None:
        if num_tokens > self._reservations[seq_id]:
            raise MisuseError(f"sequence {seq_id} has {self._reservations[seq_id]} slots reserved, not {num_tokens}")

    def fork(self, parent: int, child: int) -> None:
        raise MisuseError("contiguous memory can't be shared: one sequence for each request, no samples, no beams")

    def swap_out(self, seq_ids: object) -> Swapped | NoSpace:
        raise MisuseError("nothing is preempted here: a request has all its memory from the beginning")

    def check(self) -> None:
        """Raise IntegrityError if a table is no run, or two runs overlap."""
        references: dict[int, int] = {}
        for seq_id, table in self._gpu.tables.items():
            if table.blocks != list(range(table.blocks[0], table.blocks[0] + len(table.blocks))):
                raise IntegrityError(f"sequence {seq_id} is not contiguous: {table.blocks}")
            for block in table.blocks:
                if block in references:
                    raise IntegrityError(f"block {block} belongs to two runs")
                references[block] = 1
        self._gpu.allocator.check(references)


@dataclass(frozen=True)
class System:
    """reserve: tokens, of a job and max_model_len; None: nothing is reserved. padded: in batches that end together."""

    reserve: Callable[[Job, int], int] | None
    padded: bool = False


def _most(job: Job, max_model_len: int) -> int:
    return max_model_len


def _pow2(job: Job, max_model_len: int) -> int:
    """Orca (Pow2): the answer's length is known up to a factor of two (paper, section 6.1: 25 -> 32)."""
    return min(max_model_len, job.prompt + next_power(job.output))


def _oracle(job: Job, max_model_len: int) -> int:
    """Orca (Oracle): it is known. Nothing comes after the last token, so that one is never stored."""
    return job.prompt + job.output - 1


SYSTEMS = {
    "static": System(_most, padded=True),
    "contiguous": System(_most),
    "contiguous-pow2": System(_pow2),
    "contiguous-oracle": System(_oracle),
    "paged": System(None),
}


def batch_size(num_blocks: int, block_size: int, max_model_len: int) -> int:
    """How many requests of max_model_len can have a contiguous piece at a time.

    >>> batch_size(64, 16, 256), batch_size(20, 16, 256), batch_size(15, 16, 256)
    (4, 1, 0)
    """
    memory, count = Buddy(num_blocks), 0
    while memory.allocate(-(-max_model_len // block_size)):
        count += 1
    return count


def install(llm: LLM, system: System, jobs: Sequence[Job], max_model_len: int) -> None:
    """Give the engine, which must be idle, this system's memory, and a scheduler of its own for it.

    The jobs must be added in this order: the first becomes sequence 0, and so on.
    """
    blocks, size, old = llm.memory.num_blocks, llm.memory.block_size, llm.scheduler
    if old.has_unfinished:
        raise ValueError("the engine has unfinished requests: their memory can't be replaced")
    budget = old.max_num_batched_tokens
    memory = KVCacheManager(blocks, size)
    if system.reserve:
        memory = ContiguousKVCacheManager(blocks, size, [system.reserve(job, max_model_len) for job in jobs])
    if system.padded:  # prompts are computed in one step, that all may end in one
        budget = max(budget, max_model_len * batch_size(blocks, size, max_model_len))
    # The only place where an engine is changed from outside. The runner's tensors stay: a block is a block.
    llm.memory, llm.scheduler = memory, Scheduler(memory, old.max_num_seqs, budget)
