"""What is measured: the heads of some models, the work of a cell, and the grids of cells."""

from collections.abc import Iterator
from dataclasses import dataclass

WHAT = ("decode", "prefill", "contiguous", "paging")  # the tables
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Shape:
    name: str
    heads: int
    kv_heads: int
    head_size: int


SHAPES = {shape.name: shape for shape in (
    Shape("smollm2", 9, 3, 64), Shape("llama3-8b", 32, 8, 128), Shape("mha-7b", 32, 32, 128),
)}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """S sequences of equal context, of which each computes its last `queries` tokens: 1 is decode, all is prefill."""

    shape: Shape
    batch: int
    context: int
    queries: int = 1
    block_size: int = 16

    def kv_bytes(self, itemsize: int) -> int:
        """Keys and values that must be read, in bytes; queries and results are small beside them.

        >>> Work(SHAPES["smollm2"], batch=2, context=100).kv_bytes(itemsize=2)  # 2 x 100 tokens x 2 x 3 x 64 numbers
        153600
        """
        return self.batch * self.context * 2 * self.shape.kv_heads * self.shape.head_size * itemsize

    def flops(self) -> int:
        """A multiplication and an addition for each number of each key that a query may see, and of each value.

        >>> Work(SHAPES["smollm2"], batch=2, context=3, queries=3).flops()  # 2 x (1 + 2 + 3) keys x 9 x 64 x 2 x 2
        27648
        """
        seen = self.queries * self.context - self.queries * (self.queries - 1) // 2
        return self.batch * seen * self.shape.heads * self.shape.head_size * 2 * 2

    @property
    def blocks_each(self) -> int:
        return -(-self.context // self.block_size)

    def pool_bytes(self, itemsize: int) -> int:
        return Work(self.shape, self.batch, self.blocks_each * self.block_size).kv_bytes(itemsize)


@dataclass(frozen=True)
class Grid:
    """The cells. Each batch meets each context; the comparison with contiguous tensors has fewer of them."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    few_batches: tuple[int, ...]
    few_contexts: tuple[int, ...]
    lengths: tuple[int, ...]  # of prefills
    paging: tuple[int, int]  # batch and context
    block_sizes: tuple[int, ...] = BLOCK_SIZES
    prefill_tokens: int = 8192  # in a batch, if one sequence isn't more
    flex: bool = True  # whether FlexAttention is compared with: it is compiled for each cell

    def cells(self, what: str, shape: Shape) -> Iterator[Work]:
        if what == "prefill":
            for length in self.lengths:
                yield Work(shape, max(self.prefill_tokens // length, 1), length, queries=length)
        elif what == "paging":
            for block_size in self.block_sizes:
                yield Work(shape, *self.paging, block_size=block_size)
        else:
            few = what == "contiguous"
            for batch in self.few_batches if few else self.batches:
                for context in self.few_contexts if few else self.contexts:
                    yield Work(shape, batch, context)


GRIDS = {
    "cuda": Grid((1, 4, 16, 64, 256), (128, 512, 2048, 8192, 32768), (1, 16, 256), (512, 2048, 8192, 32768),
                 (512, 1024, 2048, 4096, 8192), (64, 4096)),
    "cpu": Grid((1, 8, 32), (128, 1024, 4096), (1, 8), (1024, 4096),
                (512, 1024, 2048), (16, 1024), prefill_tokens=2048),
}  # fmt: skip
# What a first look at a GPU is for: a few contexts and batches, in a minute.
POINTS = Grid((1, 8, 64), (1024, 8192, 32768), (1, 8, 64), (1024, 8192, 32768), (512, 2048, 8192), (64, 8192),
              block_sizes=(16, 256), flex=False)  # fmt: skip
SMOKE = Grid((2,), (20,), (1,), (20,), (9,), (1, 20), block_sizes=(16,), prefill_tokens=9)
QUICK = Grid((1, 4), (128, 512), (4,), (512,), (256,), (4, 512), block_sizes=(1, 16, 256), prefill_tokens=256)
