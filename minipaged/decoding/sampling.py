"""From logits to tokens: `sample` draws for a whole batch at once.

A row of logits takes these steps, in vLLM's order (adjust.py has the first five):

    1. allowed      structured_outputs, allowed_token_ids: all other tokens are forbidden
    2. bad words    the token that would complete one of bad_words is forbidden
    3. min_tokens   while the output is too short, the tokens that would end it are forbidden
    4. logit_bias   is added
    5. penalties    repetition (tokens of prompt and output), then frequency and presence (output only)
    6. greedy?      temperature 0 takes the largest logit, and is done
    7. temperature  logits / temperature
    8. min_p        drop what is less probable than min_p times the most probable token
    9. top_k        keep the k most probable
   10. top_p        keep the fewest most probable tokens that hold top_p of the probability left
   11. draw         by inverse CDF: the first token at which the running sum of probabilities exceeds u

Of equal tokens those with the lowest ids count as more probable: greedy takes the lowest id, and so does top_k=1.
(vLLM and transformers keep all that equal the k-th, so with them top_k=2 may draw from three.)

The random number u doesn't come from a generator, whose state would depend on who else drew from it. It is
computed, u = hash(seed, sample, position in the output), so that a request gets the same tokens alone or in
a crowd, on whatever step, and again after a preemption.

A row whose largest logit is not finite after step 5 gives BadLogits: the model gave NaN, say, or all tokens are
forbidden. No other row notices. Logprobs are of the logits as they came in, before step 1: see logprobs.py.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from minipaged.decoding.adjust import adjust, why_bad
from minipaged.decoding.logprobs import top_logprobs
from minipaged.requests.sampling_params import BadLogits, Draw, SampledToken, SamplingParams

RUNGS = (128, 4096)  # for top_k and top_p so many candidates are tried before all are sorted
BLOCK = 256  # tokens per block of the two-level inverse CDF


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[list[SampledToken] | BadLogits]:
    """Draw draws[r].num_draws tokens from row r of logits [R, V] float32. The logits are not changed.

    BadLogits for a row that can't be drawn from, or whose logprobs can't be told; it says why.
    """
    adjusted = adjust(logits, draws)
    tokens: dict[int, list[int] | None] = {}
    for way in (_best_token, _draw_any, _draw_truncated):
        rows = [r for r, d in enumerate(draws) if _way(d.params) is way]
        if rows:
            tokens |= zip(rows, way(take(adjusted, rows), [draws[r] for r in rows]), strict=True)
    sampled = {r: [SampledToken(token) for token in found] for r, found in tokens.items() if found}
    bad = add_logprobs(logits, draws, sampled)
    return [bad.get(r) or sampled.get(r) or why_bad(logits[r], draws[r]) for r in range(len(draws))]


def _way(params: SamplingParams) -> Callable[[Tensor, list[Draw]], list[list[int] | None]]:
    if params.greedy:
        return _best_token
    return _draw_truncated if params.top_k > 0 or params.top_p < 1 else _draw_any


def take(x: Tensor, rows: list[int]) -> Tensor:
    """x[rows] for rows in rising order, but faster, and no copy if that's all of them."""
    return x if len(rows) == len(x) else x.index_select(0, torch.tensor(rows, device=x.device))


def _best_token(x: Tensor, draws: list[Draw]) -> list[list[int] | None]:
    """Of equal ones the lowest id; of a row with NaN that. None if its logit is not finite.

    NumPy's argmax is 2 to 4 times as fast as PyTorch's on a CPU.
    """
    if x.device.type == "cpu":
        array = x.numpy()
        best = array.argmax(-1)
        peaks = array[range(len(array)), best].tolist()
    else:
        best = x.argmax(-1)
        peaks = x.gather(1, best.unsqueeze(1)).squeeze(1).tolist()
    rows = zip(best.tolist(), peaks, draws, strict=True)
    return [[token] * d.num_draws if math.isfinite(peak) else None for token, peak, d in rows]


def _draw_any(x: Tensor, draws: list[Draw]) -> list[list[int] | None]:
    return _by_chance(x, draws, lambda x, draws: _draw(_exp_(x, draws), draws))


def _exp_(x: Tensor, draws: list[Draw]) -> Tensor:
    """exp(x) in the place of x. Of -inf by a detour: on a CPU it takes ten times as long as a number does."""
    if not any(d.mask for d in draws):
        return x.exp_()
    kept = (x > -torch.inf).to(x.dtype)
    return x.nan_to_num_(neginf=-80.0).exp_().mul_(kept)


def _draw_truncated(x: Tensor, draws: list[Draw]) -> list[list[int] | None]:
    return _by_chance(x, draws, _draw_from_nucleus)


def _by_chance(
    x: Tensor, draws: list[Draw], draw: Callable[[Tensor, list[Draw]], list[list[int]]]
) -> list[list[int] | None]:
    """Let `draw` draw from the scaled rows; None for those whose largest logit is not finite, as NaN makes it too."""
    peaks = x.amax(-1, keepdim=True)
    rows = [r for r, good in enumerate(peaks.isfinite().squeeze(1).tolist()) if good]
    if not rows:
        return [None] * len(draws)
    some = [draws[r] for r in rows]
    tokens = dict(zip(rows, draw(scale(take(x, rows), take(peaks, rows), some), some), strict=True))
    return [tokens.get(r) for r in range(len(draws))]


def scale(x: Tensor, peaks: Tensor, draws: list[Draw]) -> Tensor:
    """Temperature and min_p: a new tensor, each row's best token at 0, dropped tokens at -inf."""
    x = x - peaks
    x /= _column([d.params.temperature for d in draws], x)
    if any(d.params.min_p for d in draws):
        least = _column([math.log(d.params.min_p) if d.params.min_p else -math.inf for d in draws], x)
        x.masked_fill_(x < least, -torch.inf)
    return x


def _column(values: list[Any], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=dtype or like.dtype).unsqueeze(1)


def _draw_from_nucleus(x: Tensor, draws: list[Draw]) -> list[list[int]]:
    """With top_k and top_p. Sorting the vocabulary is slow, so first a few candidates are tried, then more.

    How many a row needs depends on that row alone, so the batch has no part in its tokens.
    """
    vocab = x.shape[1]
    tokens: dict[int, list[int]] = {}
    for rung in (*RUNGS, vocab):
        rows = [r for r in range(len(draws)) if r not in tokens]
        if rows:
            left = [draws[r] for r in rows]
            weights, ids, enough = nucleus(take(x, rows), min(rung, vocab), left)
            drawn = zip(rows, _draw(weights, left, ids), enough.tolist(), strict=True)
            tokens |= {r: row_tokens for r, row_tokens, ok in drawn if ok}
    return [tokens[r] for r in range(len(draws))]


def nucleus(x: Tensor, rung: int, draws: list[Draw]) -> tuple[Tensor, Tensor, Tensor]:
    """The weights [R, rung] of the best tokens, 0 where top_k or top_p cuts, their ids, and if that's all who count.

    x is scaled, so that exp(x) is a weight of at most 1. top_p is a part of what min_p and top_k have left.
    """
    best, ids = _best_first(x, rung)
    vocab = x.shape[1]
    top_k = [d.params.top_k if 0 < d.params.top_k < vocab else vocab for d in draws]
    k = _column(top_k, x, torch.long)
    weights = best.exp().masked_fill_(torch.arange(rung, device=x.device) >= k, 0)
    running = weights.cumsum(-1, dtype=torch.float64)
    total = running[:, -1:]
    if vocab in top_k:
        total = torch.where(k < vocab, total, _block_sums(_blocks(x.exp()))[:, -1:])
    limit = total * _column([d.params.top_p for d in draws], x, torch.float64)
    weights.masked_fill_(running - weights >= limit, 0)
    # Subtle: tokens that equal the last candidate may have been left out, though their ids are lower.
    last = (weights > 0).sum(-1, keepdim=True) - 1
    enough = ((k <= rung) | (k == vocab)) & (best.gather(1, last) > best[:, -1:])
    return weights, ids, enough.squeeze(1) | (rung == vocab)


def _best_first(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best values and their ids, both [R, count]; equal ones by id, but any of those that equal the last.

    One sort does both: no value of x is above 0, the bits of -x compare as -x does, and the id goes below them.
    """
    best, ids = x.topk(count, dim=-1, sorted=False)
    keys = ((best.abs().view(torch.int32).long() << 32) | ids).sort().values
    return -(keys >> 32).int().view(torch.float32), keys & 0xFFFFFFFF


def _blocks(weights: Tensor) -> Tensor:
    """[R, C] as [R, blocks, BLOCK], the last block filled up with 0."""
    if missing := -weights.shape[1] % BLOCK:  # to fill up with nothing would be a copy
        weights = pad(weights, (0, missing))
    return weights.unflatten(1, (-1, BLOCK))


def _block_sums(blocks: Tensor) -> Tensor:
    """[R, blocks]: the sum of each block and all before it. The same bits whatever R is: a plain sum differs at 1."""
    return blocks.sum(-1).cumsum(-1, dtype=torch.float64)


def _draw(weights: Tensor, draws: list[Draw], ids: Tensor | None = None) -> list[list[int]]:
    """Tokens by inverse CDF of weights [R, C] >= 0, which need not sum to 1. ids [R, C]: whose they are.

    Two levels: sums of blocks choose a block, a running sum within it the token. A single running sum over
    the vocabulary is slower, and in float32 it loses tokens of small weight.
    """
    owner = [r for r, d in enumerate(draws) for _ in range(d.num_draws)]
    u = [uniform(d.seed, d.index + i, len(d.output_token_ids)) for d in draws for i in range(d.num_draws)]
    blocks = _blocks(weights)
    sums = _block_sums(blocks)[owner]  # [draws, blocks]
    target = _column(u, sums) * sums[:, -1:]
    block = first_above(sums, target)
    target -= pad(sums, (1, 0)).gather(1, block)  # what is left of it at the start of the block
    inner = blocks[owner, block.squeeze(1)].cumsum(-1, dtype=torch.float64)  # [draws, BLOCK]
    index = (block * BLOCK + first_above(inner, target)).squeeze(1)
    tokens = iter((index if ids is None else ids[owner, index]).tolist())
    return [[next(tokens) for _ in range(d.num_draws)] for d in draws]


def first_above(running: Tensor, target: Tensor) -> Tensor:
    """Index [.., 1] of the first running sum above target: never one of weight 0, for that adds nothing.

    Rounding may have put target at the last sum or beyond; it's moved below, to the last weight that counts.
    """
    last = running[..., -1:]
    below = torch.minimum(target, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(running, below, right=True)


def uniform(seed: int, sample: int, position: int, purpose: str = "") -> float:
    """The random number in [0, 1) for token `position` of a sample's output: 53 bits of a hash.

    purpose: other numbers for the same position, for what is decided besides (rejection.py).

    >>> uniform(7, 0, 0) == uniform(7, 0, 0) != uniform(7, 1, 0)
    True
    """
    digest = hashlib.blake2b(f"{seed}/{sample}/{position}{purpose}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def add_logprobs(
    logits: Tensor, draws: Sequence[Draw], sampled: dict[int, list[SampledToken]]
) -> dict[int, BadLogits]:
    """Give the tokens drawn their logprobs, where they are asked for. Returns the rows that have none."""
    limits = {r: limit for r in sampled if (limit := draws[r].params.logprobs) is not None}
    if not limits:
        return {}
    rows = sorted(limits)
    drawn = [(place, r, token) for place, r in enumerate(rows) for token in sampled[r]]
    found = top_logprobs(take(logits, rows), [(place, limits[r], token.token_id) for place, r, token in drawn])
    bad = {}
    for (_, r, token), logprobs in zip(drawn, found, strict=True):
        if isinstance(logprobs, BadLogits):
            bad[r] = logprobs
        else:
            token.logprob, token.top_logprobs = logprobs[token.token_id].logprob, logprobs
    return bad
