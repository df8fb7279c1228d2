"""What a model asks of the others that compute it together with it: sums, and logits side by side.

A rank's layers are the whole model's, with fewer heads and a narrower MLP (split.py says whose are which). Where each
has only a part of a sum, they add up. Alone, nothing of this is there: `row_parallel` and the others give back what
they got.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from minipaged.models.split import shares

Linear = Callable[..., Tensor]


class Ranks:
    """One process alone; those of several processes extend it (execution).

    rank: which one this is, of `size`. All ranks of a model must make the same calls in the same order. Tensors are
    contiguous, and may have no rows.
    """

    rank: int = 0
    size: int = 1

    def sum(self, x: Tensor) -> Tensor:
        """Each number added up over all ranks, in the order of ranks: the same bits on each. x may be overwritten."""
        return x

    def gather(self, x: Tensor, sizes: list[int]) -> Tensor:
        """x [R, sizes[rank]] of each, side by side: [R, sum(sizes)] on rank 0. Elsewhere the result means nothing."""
        return x


ALONE = Ranks()  # keeps nothing, so one is enough


class RowParallel:
    """A product whose weight has only this rank's columns: all ranks' products are added up."""

    def __init__(self, linear: Linear, ranks: Ranks):
        self.linear, self.ranks = linear, ranks

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        y = self.ranks.sum(self.linear(x))
        return y if add_to is None else add_to.add_(y)


class VocabParallelEmbedding:
    """rows: of the tokens in this rank's share of the vocabulary. The others give zeros here, and add theirs."""

    def __init__(self, rows: Any, vocab_size: int, ranks: Ranks):
        self.rows, self.ranks, self.own = rows, ranks, shares(vocab_size, ranks.size)[ranks.rank]

    @property
    def device(self) -> Any:
        return self.rows.device

    def __getitem__(self, ids: Tensor) -> Tensor:
        """ids of any shape [...] -> [..., E]."""
        places = ids - self.own.start
        others = (places < 0) | (places >= len(self.own))
        found = self.rows[places.clamp(0, len(self.own) - 1)]
        return self.ranks.sum(found.masked_fill(others[..., None], 0))


class VocabParallelHead:
    """A projection to this rank's share of the vocabulary; on rank 0, what all of them make."""

    def __init__(self, linear: Linear, vocab_size: int, ranks: Ranks):
        self.linear, self.ranks = linear, ranks
        self.sizes = [len(share) for share in shares(vocab_size, ranks.size)]

    def __call__(self, x: Tensor) -> Tensor:
        return self.ranks.gather(self.linear(x), self.sizes)


def row_parallel(linear: Linear, ranks: Ranks) -> Linear:
    return linear if ranks.size == 1 else RowParallel(linear, ranks)


def vocab_parallel(embedding: Any, head: Linear, vocab_size: int, ranks: Ranks) -> tuple[Any, Linear]:
    """Both ends of a model."""
    if ranks.size == 1:
        return embedding, head
    return VocabParallelEmbedding(embedding, vocab_size, ranks), VocabParallelHead(head, vocab_size, ranks)
