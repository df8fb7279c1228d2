"""Which part of a model is whose, when several ranks compute it together (tensor parallelism).

A matrix W [out, in] is split by its rows where each rank needs only some of the outputs, and by its columns where each
has only some of the inputs; what ranks make of columns must be added up:

    tensor                        split by            of W          then
    q, k, v; GPT-2's c_attn       heads               rows
    gate, up; c_fc                width of the MLP    rows
    o, down; both c_proj          heads; the width    columns       one sum; their bias is added by rank 0 alone
    embedding, output projection  vocabulary          rows          one sum; gathered
    norms, positions, scales      each has them whole

Heads stay together with the key/value head that they share, so ranks get whole groups; if they don't come out even,
the first ones take one more. Where there are more ranks than groups, several have the same key/value head, and share
the query heads of its group.

Source: Shoeybi et al., Megatron-LM, 2019 (arXiv:1909.08053), section 3.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.packed import Weight
from minipaged.models.config import ModelConfig
from minipaged.models.fields import ModelError

UNITS = (256, 128, 64, 32)  # columns of a group in most formats of quantized weights: better not cut through them
OUT, IN = 0, 1  # the dimensions of W
BY = {
    "self_attn.q_proj": (OUT, "heads"), "self_attn.k_proj": (OUT, "groups"), "self_attn.v_proj": (OUT, "groups"),
    "self_attn.o_proj": (IN, "heads"), "attn.c_attn": (OUT, "heads"), "attn.c_proj": (IN, "heads"),
    "mlp.gate_proj": (OUT, "mlp"), "mlp.up_proj": (OUT, "mlp"), "mlp.c_fc": (OUT, "mlp"),
    "mlp.down_proj": (IN, "mlp"), "mlp.c_proj": (IN, "mlp"),
    "model.embed_tokens": (OUT, "vocabulary"), "transformer.wte": (OUT, "vocabulary"), "lm_head": (OUT, "vocabulary"),
}  # fmt: skip


class Part(NamedTuple):
    """Some of a tensor: these ranges of one of its dimensions, one behind the other."""

    axis: int
    ranges: tuple[range, ...]


@dataclass(frozen=True)
class Split:
    """What rank `rank` of `size` computes of a model. ModelError if it can't be split among so many.

    >>> sizes = {"num_heads": 9, "num_kv_heads": 3, "head_size": 64, "intermediate_size": 1536, "vocab_size": 49152}
    >>> others = {"architecture": "llama", "hidden_size": 576, "num_layers": 30, "max_model_len": 8192}
    >>> others |= {"norm_eps": 1e-5, "tie_word_embeddings": True, "activation": "silu"}
    >>> smollm2 = ModelConfig(**sizes, **others)
    >>> for rank in range(2):
    ...     split = Split(smollm2, rank, 2)
    ...     print(split.heads, split.groups, split.mlp, split.vocabulary)
    range(0, 6) range(0, 2) range(0, 768) range(0, 24576)
    range(6, 9) range(2, 3) range(768, 1536) range(24576, 49152)
    >>> Split(smollm2, 1, 2).part("model.layers.0.self_attn.o_proj.weight")
    Part(axis=1, ranges=(range(384, 576),))
    """

    config: ModelConfig  # of the whole model
    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        config, size = self.config, self.size
        if not 0 <= self.rank < size:
            raise ModelError(f"rank {self.rank} of {size}: ranks are counted from 0")
        if size > (most := min(config.num_heads, config.intermediate_size, config.vocab_size)):
            raise ModelError(
                f"tensor_parallel_size={size} is too large: the model has {config.num_heads} query heads in "
                f"{config.num_kv_heads} groups, an MLP {config.intermediate_size} wide and {config.vocab_size} tokens; "
                f"at most {most} ranks have something of each"
            )

    @property
    def groups(self) -> range:
        """The key/value heads."""
        count, size = self.config.num_kv_heads, self.size
        if size <= count:
            return _spread(count, size)[self.rank]
        group = self.rank * count // size
        return range(group, group + 1)

    @property
    def heads(self) -> range:
        """The query heads."""
        count, size = self.config.num_kv_heads, self.size
        of_a_group = self.config.num_heads // count
        if size <= count:
            return _times(self.groups, of_a_group)
        first = self.groups.start * of_a_group
        sharing = [rank for rank in range(size) if rank * count // size == self.groups.start]
        own = _spread(of_a_group, len(sharing))[self.rank - sharing[0]]
        return range(first + own.start, first + own.stop)

    @property
    def mlp(self) -> range:
        return shares(self.config.intermediate_size, self.size)[self.rank]

    @property
    def vocabulary(self) -> range:
        return shares(self.config.vocab_size, self.size)[self.rank]

    @property
    def local(self) -> ModelConfig:
        """What the rank's own model is made of. Its vocab_size is still the whole model's."""
        heads, groups, mlp = len(self.heads), len(self.groups), len(self.mlp)
        return replace(self.config, num_heads=heads, num_kv_heads=groups, intermediate_size=mlp)

    def keeps(self, name: str) -> bool:
        """Whether the rank has anything of this tensor. A bias that is added to a sum must be added once."""
        return self.rank == 0 or not (name.endswith(".bias") and self.adds_up(name))

    def adds_up(self, name: str) -> bool:
        """Whether ranks have columns of this matrix, and add up what comes of them."""
        return _by(name)[0] == IN

    def part(self, name: str) -> Part | None:
        """What it has of the tensor that the model calls so; None: all."""
        side, what = _by(name)
        bias = name.endswith(".bias")
        if self.size == 1 or side is None or (bias and self.adds_up(name)):
            return None
        own: range = getattr(self, what)
        if what in ("heads", "groups"):
            own = _times(own, self.config.head_size)
        ranges: tuple[range, ...] = (own,)
        if name.rpartition(".")[0].endswith("attn.c_attn"):  # q, k and v in one
            e = self.config.hidden_size
            ranges = tuple(range(e * i + own.start, e * i + own.stop) for i in range(3))
        across = name.startswith("transformer.h.")  # GPT-2's matrices are [in, out]
        return Part(0 if bias else 1 - side if across else side, ranges)


def _by(name: str) -> tuple[int | None, str]:
    """The last two words before ".weight" or ".bias" say what a tensor is."""
    return BY.get(".".join(name.split(".")[-3:-1]), (None, ""))


def shares(total: int, size: int) -> list[range]:
    """A share for each of `size` ranks: the first ones are larger if need be. In whole units, if these are small enough
    for no rank to get much more than another.

    >>> shares(11008, 2)
    [range(0, 5632), range(5632, 11008)]
    >>> shares(50257, 2)
    [range(0, 25129), range(25129, 50257)]
    """
    fitting = [unit for unit in UNITS if total % unit == 0 and total // unit >= size]
    good = (unit for unit in fitting if total // unit % size == 0 or total // unit >= 8 * size)
    unit = next(good, fitting[-1] if fitting else 1)
    return [_times(share, unit) for share in _spread(total // unit, size)]


def _spread(count: int, size: int) -> list[range]:
    """
    >>> _spread(5, 3)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    ends = [rank * (count // size) + min(rank, count % size) for rank in range(size + 1)]
    return [range(begin, end) for begin, end in zip(ends, ends[1:], strict=False)]


def _times(share: range, factor: int) -> range:
    return range(share.start * factor, share.stop * factor)


def cut(weight: Weight, part: Part) -> Weight:
    """That part of a tensor, a copy: of matrices in small numbers the small numbers, where that can be."""
    if isinstance(weight, Tensor):
        return weight.index_select(part.axis, _places(part))
    if (part.axis == 0) != weight.across:
        return weight.rows(_places(part))
    [columns] = part.ranges
    return weight.columns(columns.start, columns.stop)


def _places(part: Part) -> Tensor:
    return torch.cat([torch.arange(own.start, own.stop) for own in part.ranges])
