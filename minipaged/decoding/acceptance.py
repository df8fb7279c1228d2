"""Which guesses are right: the model's own draw decides.

At each position the token is the one that is drawn from the model's logits, with the random number of that position,
as without speculation. A guess is right if it is that token. Then the next position was computed for the right past,
and its draw counts too. So guesses change how many tokens a step gives, and never which.

(The papers have another rule, which loses fewer guesses of a proposer that draws by chance, and gives other tokens
with the same distribution: rejection.py.)
"""

from collections.abc import Sequence

from minipaged.requests.sampling_params import BadLogits, Draw, SampledToken

Drawn = list[SampledToken] | BadLogits  # what `sample` gives for a row of logits


def accept(drafts: Sequence[int], drawn: Sequence[Drawn]) -> list[SampledToken]:
    """The tokens that a sequence gets. drawn: one more than there are drafts, each behind the one before.

    A row that can't be drawn from ends them: in the next step it is the first, and ends the request.

    >>> rows = [[SampledToken(5)], [SampledToken(6)], [SampledToken(9)]]
    >>> [token.token_id for token in accept([5, 7], rows)]
    [5, 6]
    """
    tokens: list[SampledToken] = []
    for place, row in enumerate(drawn):
        if isinstance(row, BadLogits):
            break
        tokens.append(row[0])
        if drafts[place : place + 1] != [row[0].token_id]:
            break
    return tokens


def draws_behind(draw: Draw, drafts: Sequence[int]) -> list[Draw]:
    """What to draw behind each draft, as if those before it were output; and first, what without any."""
    if not drafts:
        return [draw]
    output = list(draw.output_token_ids)
    return [draw, *(draw.behind([*output, *drafts[: place + 1]]) for place in range(len(drafts)))]
