"""Logprobs: log-softmax of the logits as the model gave them, whatever a request makes of them for its draws."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minipaged.decoding.adjust import columns, why_bad
from minipaged.requests.sampling_params import BadLogits, Logprob


def top_logprobs(logits: Tensor, wanted: Sequence[tuple[int, int, int]]) -> list[dict[int, Logprob] | BadLogits]:
    """For each (row, k, token) wanted: the Logprob of the k best tokens of that row of logits [R, V], by token id.

    k = -1: of all tokens. Falling; the token's own is always there, and comes last if it is not among the best.
    BadLogits for a row in which there is NaN or +inf, or nothing but -inf.
    """
    raw = logits.log_softmax(-1)
    most = [0] * len(raw)
    for row, k, _ in wanted:
        most[row] = max(most[row], raw.shape[1] if k == -1 else k)
    best = [_ranked(row) for row in _best(raw, most)]
    rows, tokens = columns([(row, token) for row, _, token in wanted], raw, torch.long)
    values = raw[rows, tokens]
    found = [dict(best[row][: None if k == -1 else k]) for row, k, _ in wanted]
    alone = [i for i, (_, _, token) in enumerate(wanted) if token not in found[i]]
    larger = (raw[rows[alone]] > values[alone].unsqueeze(1)).sum(-1)
    for i, value, count in zip(alone, values[alone].tolist(), larger.tolist(), strict=True):
        found[i][wanted[i][2]] = Logprob(value, 1 + count)
    good = (values == values).tolist()  # one NaN or +inf makes the whole row NaN, as does nothing but -inf
    return [one if ok else why_bad(logits[row]) for one, ok, (row, _, _) in zip(found, good, wanted, strict=True)]


def _ranked(best: list[tuple[int, float]]) -> list[tuple[int, Logprob]]:
    """Equal ones share the rank of the first of them."""
    ranked: list[tuple[int, Logprob]] = []
    for place, (token, value) in enumerate(best, 1):
        rank = ranked[-1][1].rank if ranked and ranked[-1][1].logprob == value else place
        ranked.append((token, Logprob(value, rank)))
    return ranked


def top_candidates(logits: Tensor, k: int) -> list[list[tuple[int, float]] | BadLogits]:
    """The k >= 1 best (token, logprob) of each row of logits [R, V], best first, equal ones by token id.

    BadLogits for a row in which there is NaN or +inf, or nothing but -inf.
    """
    best = _best(logits.log_softmax(-1), [k] * len(logits))
    return [found or why_bad(row) for found, row in zip(best, logits, strict=True)]


def _best(logprobs: Tensor, most: list[int]) -> list[list[tuple[int, float]]]:
    """The most[r] best (token, logprob) of row r, equal ones by token id; nothing for a row of NaN."""
    vocab = logprobs.shape[1]
    kth = torch.tensor([torch.inf if k == 0 else -torch.inf for k in most], device=logprobs.device).unsqueeze(1)
    some = [r for r, k in enumerate(most) if 0 < k < vocab]  # the others need no look at the values
    if some:
        place = torch.tensor([most[r] - 1 for r in some], device=logprobs.device).unsqueeze(1)
        chosen = logprobs if len(some) == len(most) else logprobs[some]
        kth[some] = chosen.topk(max(most[r] for r in some), dim=-1).values.gather(1, place)
    where = (logprobs >= kth).nonzero(as_tuple=True)  # more than k where some equal the k-th
    result: list[list[tuple[int, float]]] = [[] for _ in most]
    for row, token, value in zip(*(t.tolist() for t in (*where, logprobs[where])), strict=True):
        result[row].append((token, value))
    return [sorted(row, key=lambda pair: -pair[1])[:k] for row, k in zip(result, most, strict=True)]  # stable: by id
