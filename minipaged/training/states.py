"""What the model thought at each token of a text: its last hidden states, computed again for whole texts at once."""

from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from minipaged.models import Model
from minipaged.training.text import Text

BLOCK = 16
TOGETHER = 16  # texts in a batch


@dataclass
class Lesson:
    """One text as the head learns it: token_ids [C], hidden [C, E] after each token, bf16; the others as in Text.

    teacher: the likeliest tokens after each token from `first` on: see `teach` in learning.py.
    """

    token_ids: Tensor
    first: int
    begin: int
    greedy: bool
    hidden: Tensor
    teacher: tuple[Tensor, Tensor] | None = None  # columns and probabilities, [C - first, K] each


@torch.inference_mode()
def lessons(model: Model, texts: list[Text]) -> list[Lesson]:
    """Run the model over all texts: no engine is needed, each text has its blocks side by side."""
    found = []
    for at in range(0, len(texts), TOGETHER):
        some = texts[at : at + TOGETHER]
        for text, hidden in zip(some, _states(model, [t.token_ids for t in some]), strict=True):
            found.append(Lesson(torch.tensor(text.token_ids), text.first, text.begin, text.greedy, hidden.bfloat16()))
    return found


def _states(model: Model, texts: list[list[int]]) -> tuple[Tensor, ...]:
    config, device = model.config, model.embedding.device
    lengths = torch.tensor([len(text) for text in texts])
    blocks = -(-lengths // BLOCK)
    ends = blocks.cumsum(0)
    tables = (ends - blocks)[:, None] + torch.arange(int(blocks.max()))  # what stands behind a table's end is not read
    tables = tables.clamp(max=int(ends[-1]) - 1)
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
    slots = positions + torch.repeat_interleave((ends - blocks) * BLOCK, lengths)
    query_start = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    cache = kernels.new_cache(
        config.num_layers, int(ends[-1]), BLOCK, config.num_kv_heads, config.head_size, model.dtype, device
    )
    batch = kernels.Batch(*(x.to(device) for x in (slots, query_start, lengths, tables)))
    input_ids = torch.tensor([token for text in texts for token in text], device=device)
    return model(input_ids, positions.to(device), cache, batch).cpu().split(lengths.tolist())
