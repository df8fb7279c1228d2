"""The papers' rule for guesses that were drawn by chance (Leviathan et al. 2023, Chen et al. 2023).

A guess x was drawn from q, the proposer's probabilities. The model's, after everything a request makes of its logits,
are p. Then x is kept with probability min(1, p(x) / q(x)). If it isn't, another token is drawn from what p has more
than q, max(0, p - q) made to sum to 1, and the guesses behind it are forgotten:

    P(token = x)  =  q(x) min(1, p(x) / q(x))  +  P(rejected) max(0, p(x) - q(x)) / P(rejected)  =  p(x)

    since P(rejected) = 1 - sum of min(p, q) = sum of max(0, p - q)

So tokens have the model's distribution, but are not those that would be drawn without guesses, nor the same each time
guesses fall differently. Of all rules for one guess it keeps the most: the sum of min(p, q) of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minipaged.decoding.acceptance import Drawn
from minipaged.decoding.adjust import adjust
from minipaged.decoding.sampling import first_above, nucleus, scale, take, uniform
from minipaged.requests.sampling_params import BadLogits, Draw, SampledToken

# What the random numbers of a position are for. The one without a purpose draws the token after all guesses.
GUESS, KEEP, REDRAW = "guess", "keep", "redraw"


def probabilities(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """What `sample` draws from, for rows of logits [R, V] that are not greedy: float64 [R, V].

    NaN in a row from which nothing can be drawn.
    """
    x = adjust(logits, draws)
    x = scale(x, x.amax(-1, keepdim=True), list(draws))
    weights = x.exp()
    cut = [r for r, d in enumerate(draws) if d.params.top_k > 0 or d.params.top_p < 1]
    if cut:
        kept, ids, _ = nucleus(take(x, cut), x.shape[1], [draws[r] for r in cut])
        weights[cut] = torch.zeros_like(kept).scatter_(1, ids, kept)
    chances = weights.double()
    return chances / chances.sum(-1, keepdim=True)


def pick(chances: Tensor, draw: Draw, purpose: str) -> int:
    """A token by inverse CDF of chances [V], which need not sum to 1."""
    running = chances.cumsum(-1)
    u = uniform(draw.seed, draw.index, len(draw.output_token_ids), purpose)
    return int(first_above(running, u * running[-1:]))


def accept_by_chance(
    drafts: Sequence[int], drawn: Sequence[Drawn], wanted: Tensor, chances: Tensor, draws: Sequence[Draw]
) -> list[SampledToken]:
    """The tokens that a sequence gets; as `accept`, by the rule above.

    drawn, wanted [k+1, V], draws: for the position of each of the k drafts, and the one behind them: a draw, and the
    probabilities p. chances [k, V]: what the drafts were drawn from, q.
    """
    tokens: list[SampledToken] = []
    for place, row in enumerate(drawn):
        if isinstance(row, BadLogits):
            break
        if place == len(drafts):
            return [*tokens, row[0]]
        p, q, draw, guess = wanted[place], chances[place], draws[place], drafts[place]
        u = uniform(draw.seed, draw.index, len(draw.output_token_ids), KEEP)
        kept = u * float(q[guess]) < float(p[guess])
        token = SampledToken(guess if kept else pick((p - q).clamp(min=0), draw, REDRAW))
        tokens.append(token)
        if not kept:
            break
    return tokens
