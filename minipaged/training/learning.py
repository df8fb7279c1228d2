"""The head learns: what is a good guess, the steps towards it, and how many guesses are right."""


import torch
from torch import Tensor
from torch.nn import functional as F

from minipaged.training.files import Frozen
from minipaged.training.network import HeadNetwork
from minipaged.training.states import Lesson

CALLS = 3  # guesses in a row that are measured
LATER = 0.8  # what a guess counts, beside the one before it
NOISE = 0.1  # on the states that a head sees, against learning them by heart
APART = 0.1  # what it counts how far a state is off, beside which tokens are likely after it
LIKELIEST = 16  # tokens that a head learns the probabilities of
IGNORED = -1


@torch.no_grad()
def teach(texts: list[Lesson], frozen: Frozen) -> None:
    """Set the teacher of each text: what the model finds likely after each token of its own, among token_ids."""
    for text in texts:
        logits = (text.hidden[text.first :] @ frozen.output.T).float()
        best, columns = logits.topk(min(LIKELIEST, logits.shape[1]))
        text.teacher = columns, (best - logits.logsumexp(-1, keepdim=True)).exp()


def side_by_side(texts: list[Lesson], frozen: Frozen) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [S, C, E] before each token, embedded [S, C, E], and where the model's own words stand: bool [S, C]."""
    length = max(len(t.token_ids) for t in texts)
    before = torch.zeros(len(texts), length, texts[0].hidden.shape[1])  # zeros before the first token
    token_ids = torch.zeros(len(texts), length, dtype=torch.int64)
    own = torch.zeros(len(texts), length, dtype=torch.bool)
    for row, text in enumerate(texts):
        size = len(text.token_ids)
        before[row, 1:size] = text.hidden[:-1].float()
        token_ids[row, :size] = text.token_ids
        own[row, text.first : size] = True
    return before, frozen.embedding[token_ids], own


def loss_of(network: HeadNetwork, texts: list[Lesson], frozen: Frozen, calls: int) -> tuple[Tensor, float]:
    """Cross entropy with what the model finds likely, and how far off the states are: of `calls` guesses in a row.

    Returns the loss, and what the first guess has of it.
    """
    before, embedded, own = side_by_side(texts, frozen)
    before += NOISE * torch.randn_like(before)  # as true states are near the guessed ones, not equal to them
    true = torch.cat([t.hidden[t.first :] for t in texts]).float()
    columns, shares = (torch.cat(parts) for parts in zip(*(t.teacher for t in texts if t.teacher), strict=True))
    past: list[tuple[Tensor, Tensor]] = []
    losses = []
    with torch.autocast("cpu", torch.bfloat16):
        for call in range(calls):
            guessed = network(before, embedded, past)
            rows = guessed[own]
            logits = (rows.bfloat16() @ frozen.output.T).float()
            likely = (shares * logits.gather(1, columns)).sum(-1)
            wrong = (shares.sum(-1) * logits.logsumexp(-1) - likely).mean()
            losses.append(LATER**call * (wrong + APART * F.smooth_l1_loss(rows.float(), true)))
            before = F.pad(guessed, (0, 0, 1, 0))[:, :-1]
    return torch.stack(losses).sum(), losses[0].item()


@torch.no_grad()
def right_guesses(network: HeadNetwork, texts: list[Lesson], frozen: Frozen) -> list[float]:
    """The shares of first, second and third guesses that are the model's own next token, given those before were.

    texts: greedy ones, so that the next token is the likeliest.
    """
    right, all_ = torch.zeros(CALLS), torch.zeros(CALLS)
    for at in range(0, len(texts), 16):
        some = texts[at : at + 16]
        before, embedded, own = side_by_side(some, frozen)
        following = torch.full(own.shape, IGNORED)
        for row, text in enumerate(some):
            following[row, text.begin : len(text.token_ids) - 1] = text.token_ids[text.begin + 1 :]
        possible, past = following != IGNORED, []  # type: ignore[var-annotated]
        for call in range(CALLS):
            guessed = network(before, embedded, past)
            tokens = frozen.token_ids[(guessed @ frozen.output.float().T).argmax(-1)]
            hit = possible & (tokens == following)
            right[call] += hit.sum()
            all_[call] += possible.sum()
            before = F.pad(guessed, (0, 0, 1, 0))[:, :-1]
            possible = F.pad(hit, (1, 0))[:, :-1] & (following != IGNORED)
    return (right / all_.clamp(min=1)).tolist()
