"""From logits to tokens: `sample` draws for a whole batch at once, `top_candidates` serves beam search.

A row of logits takes these steps, in vLLM's order:

    1. min_tokens   while the output is too short, the tokens that would end it are forbidden
    2. penalties    repetition (tokens of prompt and output), then frequency and presence (output only)
    3. greedy?      temperature 0 takes the largest logit, and is done
    4. temperature  logits / temperature
    5. min_p        drop what is less probable than min_p times the most probable token
    6. top_k        keep the k most probable
    7. top_p        keep the fewest most probable tokens that hold top_p of the probability left
    8. draw         by inverse CDF: the first token at which the running sum of probabilities exceeds u

The random number u doesn't come from a generator, whose state would depend on who else drew from it. It is
computed, u = hash(seed, sample, position in the output), so that a request gets the same tokens alone or in
a crowd, on whatever step, and again after a preemption.

Logprobs are the raw model's: log-softmax of the logits as they came in, before step 1.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from minipaged.requests.sampling_params import Draw, SampledToken, SamplingParams

RUNGS = (128, 4096)  # for top_k and top_p so many candidates are tried before all are sorted
BLOCK = 256  # tokens per block of the two-level inverse CDF


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[list[SampledToken]]:
    """Draw draws[r].num_draws tokens from row r of logits [R, V] float32. The logits are not changed.

    ValueError if a row to be sampled from has NaN or +inf in it, or -inf for every token.
    """
    adjusted = _adjust(logits, draws)
    tokens: dict[int, list[int]] = {}
    for way in (_best_token, _draw_any, _draw_truncated):
        rows = [r for r, d in enumerate(draws) if _way(d.params) is way]
        if rows:
            tokens |= zip(rows, way(_take(adjusted, rows), [draws[r] for r in rows]), strict=True)
    sampled = [[SampledToken(token) for token in tokens[r]] for r in range(len(draws))]
    _add_logprobs(logits, draws, sampled)
    return sampled


def _way(params: SamplingParams) -> Callable[[Tensor, list[Draw]], list[list[int]]]:
    if params.greedy:
        return _best_token
    return _draw_truncated if params.top_k > 0 or params.top_p < 1 else _draw_any


def _take(x: Tensor, rows: list[int]) -> Tensor:
    """x[rows] for rows in rising order, but faster, and no copy if that's all of them."""
    return x if len(rows) == len(x) else x.index_select(0, torch.tensor(rows, device=x.device))


def _adjust(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """min_tokens and penalties on a copy, or the logits themselves where there is nothing to change."""
    forbidden = [(r, t) for r, d in enumerate(draws) for t in d.forbidden if t < logits.shape[1]]
    penalties = [_penalties(d) for d in draws]
    if not forbidden and not any(penalties):
        return logits
    x = logits.clone()
    if forbidden:
        x[_columns(forbidden, x, torch.long)] = -torch.inf
    if any(penalties):
        rows = torch.tensor([r for r, row in enumerate(penalties) for _ in row], device=x.device)
        ids = torch.tensor([t for row in penalties for t in row], device=x.device)
        subtract = torch.tensor([a for row in penalties for a in row.values()], device=x.device)
        repetition = torch.tensor([d.params.repetition_penalty for d in draws], device=x.device)[rows]
        old = x[rows, ids]
        x[rows, ids] = torch.where(old > 0, old / repetition, old * repetition) - subtract
    return x


def _penalties(draw: Draw) -> dict[int, float]:
    """For each token that the repetition penalty divides, what the other two penalties subtract from it.

    >>> params = SamplingParams(presence_penalty=1.0, frequency_penalty=0.25, repetition_penalty=1.1)
    >>> _penalties(Draw(params, 0, 0, 1, [7, 8], output_token_ids=[8, 8, 9], stop_ids=frozenset()))
    {7: 0.0, 8: 1.5, 9: 1.25}
    """
    p = draw.params
    counts: Counter[int] = Counter(draw.output_token_ids if p.penalises else ())
    subtract = {t: p.presence_penalty + p.frequency_penalty * count for t, count in counts.items()}
    return subtract if p.repetition_penalty == 1 else dict.fromkeys(draw.prompt_token_ids, 0.0) | subtract


def _columns(rows: list[Any], like: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A list of tuples as one tensor for each place in the tuple."""
    return torch.tensor(list(zip(*rows, strict=True)), dtype=dtype, device=like.device).unbind()


def _best_token(x: Tensor, draws: list[Draw]) -> list[list[int]]:
    """Of equal ones the lowest id. NumPy's argmax is 2 to 4 times as fast as PyTorch's on a CPU."""
    best = x.numpy().argmax(-1) if x.device.type == "cpu" else x.argmax(-1)
    return [[token] * d.num_draws for token, d in zip(best.tolist(), draws, strict=True)]


def _draw_any(x: Tensor, draws: list[Draw]) -> list[list[int]]:
    return _draw(_scale(x, draws).exp_(), draws)


def _scale(x: Tensor, draws: list[Draw]) -> Tensor:
    """Temperature and min_p: a new tensor, each row's best token at 0, dropped tokens at -inf."""
    x = x - x.amax(-1, keepdim=True)
    x /= _column([d.params.temperature for d in draws], x)
    if any(d.params.min_p for d in draws):
        least = _column([math.log(d.params.min_p) if d.params.min_p else -math.inf for d in draws], x)
        x.masked_fill_(x < least, -torch.inf)
    return x


def _column(values: list[Any], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=dtype or like.dtype).unsqueeze(1)


def _draw_truncated(x: Tensor, draws: list[Draw]) -> list[list[int]]:
    """With top_k and top_p. Sorting the vocabulary is slow, so first a few candidates are tried, then more.

    How many a row needs depends on that row alone, so the batch has no part in its tokens.
    """
    x, vocab = _scale(x, draws), x.shape[1]
    tokens: dict[int, list[int]] = {}
    for rung in (*RUNGS, vocab):
        rows = [r for r in range(len(draws)) if r not in tokens]
        if rows:
            left = [draws[r] for r in rows]
            weights, ids, enough = _nucleus(_take(x, rows), min(rung, vocab), left)
            drawn = zip(rows, _draw(weights, left, ids), enough.tolist(), strict=True)
            tokens |= {r: row_tokens for r, row_tokens, ok in drawn if ok}
    return [tokens[r] for r in range(len(draws))]


def _nucleus(x: Tensor, rung: int, draws: list[Draw]) -> tuple[Tensor, Tensor, Tensor]:
    """The weights [R, rung] of the best tokens, 0 where top_k or top_p cuts, their ids, and if no more count.

    x is scaled, so that exp(x) is a weight of at most 1. top_p is a part of what min_p and top_k have left.
    """
    best, ids = x.topk(rung, dim=-1)
    vocab = x.shape[1]
    top_k = [d.params.top_k if 0 < d.params.top_k < vocab else vocab for d in draws]
    k = _column(top_k, x, torch.long)
    weights = best.exp_().masked_fill_(torch.arange(rung, device=x.device) >= k, 0)
    running = weights.cumsum(-1, dtype=torch.float64)
    total = running[:, -1:]
    if vocab in top_k:
        total = torch.where(k < vocab, total, x.exp().sum(-1, keepdim=True))
    limit = total * _column([d.params.top_p for d in draws], x, torch.float64)
    enough = (k <= rung) | ((k == vocab) & (running[:, -1:] >= limit)) | (weights[:, -1:] == 0)
    return weights.masked_fill_(running - weights >= limit, 0), ids, enough.squeeze(1)


def _draw(weights: Tensor, draws: list[Draw], ids: Tensor | None = None) -> list[list[int]]:
    """Tokens by inverse CDF of weights [R, C] >= 0, which need not sum to 1. ids [R, C]: whose they are.

    Two levels: sums of blocks choose a block, a running sum within it the token. A single running sum over
    the vocabulary is slower, and in float32 it loses tokens of small weight.
    """
    owner = [r for r, d in enumerate(draws) for _ in range(d.num_draws)]
    u = [uniform(d.seed, d.index + i, len(d.output_token_ids)) for d in draws for i in range(d.num_draws)]
    if missing := -weights.shape[1] % BLOCK:
        weights = pad(weights, (0, missing))
    blocks = weights.unflatten(1, (-1, BLOCK))
    sums = blocks.sum(-1).cumsum(-1, dtype=torch.float64)[owner]  # [draws, blocks]
    if not sums[:, -1].isfinite().all():
        raise ValueError("nothing to sample from: a row of logits has NaN or +inf in it, or nothing but -inf")
    target = _column(u, sums) * sums[:, -1:]
    block = _first_above(sums, target)
    target -= pad(sums, (1, 0)).gather(1, block)  # what is left of it at the start of the block
    inner = blocks[owner, block.squeeze(1)].cumsum(-1, dtype=torch.float64)  # [draws, BLOCK]
    index = (block * BLOCK + _first_above(inner, target)).squeeze(1)
    tokens = iter((index if ids is None else ids[owner, index]).tolist())
    return [[next(tokens) for _ in range(d.num_draws)] for d in draws]


def _first_above(running: Tensor, target: Tensor) -> Tensor:
    """Index [.., 1] of the first running sum above target: never one of weight 0, for that adds nothing.

    Rounding may have put target at the last sum or beyond; it's moved below, to the last weight that counts.
    """
    last = running[:, -1:]
    below = torch.minimum(target, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(running, below, right=True)


def uniform(seed: int, sample: int, position: int) -> float:
    """The random number in [0, 1) for token `position` of a sample's output: 53 bits of a hash.

    >>> uniform(7, 0, 0) == uniform(7, 0, 0) != uniform(7, 1, 0)
    True
    """
    digest = hashlib.blake2b(f"{seed}/{sample}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _add_logprobs(logits: Tensor, draws: Sequence[Draw], sampled: list[list[SampledToken]]) -> None:
    limits = {r: d.params.logprobs for r, d in enumerate(draws) if d.params.logprobs is not None}
    if not limits:
        return
    drawn = [(i, limit, token) for i, (r, limit) in enumerate(limits.items()) for token in sampled[r]]
    found = top_logprobs(_take(logits, list(limits)), [(i, limit, token.token_id) for i, limit, token in drawn])
    for (_, _, token), logprobs in zip(drawn, found, strict=True):
        token.logprob, token.top_logprobs = logprobs[token.token_id], logprobs


def top_logprobs(logits: Tensor, wanted: Sequence[tuple[int, int, int]]) -> list[dict[int, float]]:
    """For each (row, k, token) wanted: {token id: logprob} of the k best tokens of that row of logits [R, V].

    Falling; the token's own is always there, and comes last if it is not among the best.
    """
    raw = logits.log_softmax(-1)
    best = _best(raw, max(k for _, k, _ in wanted))
    values = raw[_columns([(row, token) for row, _, token in wanted], raw, torch.long)].tolist()
    return [{**dict(best[row][:k]), token: value} for (row, k, token), value in zip(wanted, values, strict=True)]


def top_candidates(logits: Tensor, k: int) -> list[list[tuple[int, float]]]:
    """The k best (token, raw logprob) of each row of logits [R, V], best first, equal ones by token id."""
    return _best(logits.log_softmax(-1), k)


def _best(logprobs: Tensor, k: int) -> list[list[tuple[int, float]]]:
    k = min(k, logprobs.shape[1])
    if k == 0:
        return [[] for _ in logprobs]
    kth = logprobs.topk(k, dim=-1).values[:, -1:]
    where = (logprobs >= kth).nonzero(as_tuple=True)  # more than k where some equal the k-th
    result: list[list[tuple[int, float]]] = [[] for _ in logprobs]
    for row, token, value in zip(*(t.tolist() for t in (*where, logprobs[where])), strict=True):
        result[row].append((token, value))
    return [sorted(row, key=lambda pair: -pair[1])[:k] for row in result]  # equal ones stay in order of id
