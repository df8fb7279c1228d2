"""Which guesses are right, and by the papers' rule which are kept: small vocabularies, many draws, no model."""

import math
import random

import pytest
import torch

from minipaged.decoding.acceptance import accept, draws_behind
from minipaged.decoding.ngram import NgramProposer
from minipaged.decoding.rejection import GUESS, accept_by_chance, pick, probabilities
from minipaged.decoding.sampling import sample
from minipaged.requests.sampling_params import BadLogits, Draw, SampledToken, SamplingParams
from minipaged.requests.sequence import Sequence

# ---- n-grams: vLLM's semantics, written down in the slowest way -----------------------------------------------------


def looked_up(tokens, shortest, longest, count):
    """The longest end of `tokens` that stands there before; of its places the first; what follows."""
    for length in range(longest, shortest - 1, -1):
        for at in range(len(tokens) - length):
            if length < len(tokens) and tokens[at : at + length] == tokens[-length:]:
                return [tokens[at + length : at + length + count]]
    return []


def test_ngrams_are_looked_up_as_said():
    rng, found = random.Random(0), 0
    for _ in range(3000):
        vocabulary = rng.choice([2, 3, 6, 50])
        tokens = [rng.randrange(vocabulary) for _ in range(rng.randint(1, 40))]
        shortest, count = rng.randint(1, 5), rng.randint(1, 8)
        longest = shortest + rng.randint(0, 4)
        split = rng.randint(1, len(tokens))
        seq = Sequence(tokens[:split], output_token_ids=tokens[split:])
        wanted = looked_up(tokens, shortest, longest, count)
        assert NgramProposer(shortest, longest).propose(seq, count) == wanted
        found += bool(wanted)
    assert found > 1000


def test_ngrams_follow_a_sequence_that_grows_and_is_cut():
    rng, ngram, seq = random.Random(1), NgramProposer(1, 3), Sequence([1, 2, 3])
    for _ in range(300):
        if rng.random() < 0.1:
            del seq.output_token_ids[rng.randint(0, len(seq.output_token_ids)) :]
            ngram.forget()  # it goes on differently
        seq.output_token_ids += [rng.randrange(4) for _ in range(rng.randint(1, 3))]
        assert ngram.propose(seq, 4) == looked_up(seq.tokens(0, len(seq)), 1, 3, 4)
    del seq.output_token_ids[1:]
    assert ngram.propose(seq, 4) == looked_up(seq.tokens(0, len(seq)), 1, 3, 4), "one that is shorter is read anew"


def test_branches_of_ngrams_begin_differently():
    tokens = [1, 2, 5, 0, 1, 2, 6, 0, 1, 2, 5, 9, 0, 3, 2, 7, 1, 2]
    branches = NgramProposer(1, 3).propose(Sequence(tokens), 3, 4)
    assert branches == [[5, 0, 1], [6, 0, 1], [7, 1, 2]]
    assert NgramProposer(2, 3).propose(Sequence(tokens), 3, 2) == branches[:2]


# ---- the model's own draw decides -----------------------------------------------------------------------------------


def rows_of(*tokens):
    return [[SampledToken(token)] if token is not None else BadLogits("NaN") for token in tokens]


@pytest.mark.parametrize(
    ("drafts", "drawn", "tokens"),
    [
        ([], [5], [5]),
        ([5], [5, 6], [5, 6]),
        ([4], [5, 6], [5]),
        ([5, 6, 7], [5, 6, 7, 8], [5, 6, 7, 8]),
        ([5, 9, 7], [5, 6, 7, 8], [5, 6]),
        ([5, 6], [5, None, 7], [5]),  # the row that can't be drawn from is the first of the next step
        ([4, 6], [5, None, 7], [5]),
        ([5, 6], [5, 6, None], [5, 6]),
    ],
)
def test_guesses_are_kept_up_to_the_first_that_is_not_drawn(drafts, drawn, tokens):
    assert [token.token_id for token in accept(drafts, rows_of(*drawn))] == tokens


def draw_of(seed=0, output=(), **params):
    params = {"temperature": 1.0, "max_tokens": None} | params
    return Draw(SamplingParams(**params), seed, 0, 1, [1, 2], list(output), frozenset({3}))


def test_behind_a_guess_is_drawn_as_if_it_were_output():
    draw = draw_of(output=[4], min_tokens=3)
    behind = draws_behind(draw, [7, 8])
    assert [list(d.output_token_ids) for d in behind] == [[4], [4, 7], [4, 7, 8]] and draw.output_token_ids == [4]
    assert [bool(d.forbidden) for d in behind] == [True, True, False]


# ---- the papers' rule ---------------------------------------------------------------------------------------------

V = 6
CASES = [
    {},
    {"temperature": 0.5},
    {"top_k": 3},
    {"top_p": 0.7},
    {"top_k": 4, "top_p": 0.9, "temperature": 1.5},
    {"min_p": 0.2},
    {"repetition_penalty": 1.5, "presence_penalty": 0.5, "logit_bias": {2: 1.0}},
]


def logits_of(seed, rows, scale=1.5):
    return scale * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("params", CASES)
def test_probabilities_are_what_sample_draws_from(params):
    logits, draws = logits_of(3, 1), [draw_of(seed, output=[4], **params) for seed in range(4000)]
    [chances] = probabilities(logits, draws[:1])
    tokens = [row[0].token_id for row in sample(logits.expand(4000, V), draws)]
    counts = torch.bincount(torch.tensor(tokens), minlength=V)
    assert chances.sum() == pytest.approx(1) and chi_square(counts, chances) < LIMIT
    assert not counts[chances == 0].any()


# 1 of 10,000 sound generators is above it with 5 degrees of freedom: 25.7; with 35: 74.9.
LIMIT, LIMIT_OF_PAIRS = 25.7, 74.9


def chi_square(counts, chances):
    possible = chances > 0
    wanted = chances[possible] * counts.sum()
    return float(((counts[possible] - wanted) ** 2 / wanted).sum())


def step(seed, model, drafter, draft_count, output=(), **params):
    """One step by the rule: what a sequence gets, if `drafter` guesses and `model` checks."""
    draw, drafts, chances = draw_of(seed, output=output, **params), [], []
    for _ in range(draft_count):
        behind = draw.behind([*output, *drafts])
        chances.append(drafter(behind))
        drafts.append(pick(chances[-1], behind, GUESS))
    draws = draws_behind(draw, drafts)
    drawn = [[SampledToken(0)]] * draft_count + sample(model.logits(draws[-1]), draws[-1:])
    return accept_by_chance(drafts, drawn, torch.stack([model(d) for d in draws]), torch.stack(chances), draws)


class Table:
    """A model or a drafter: logits for each output of up to two tokens, and the probabilities that they become."""

    def __init__(self, seed, **params):
        self.table, self.known = logits_of(seed, (V + 1) * (V + 1)), {}

    def logits(self, draw):
        first, second = ([*draw.output_token_ids, -1, -1])[:2]
        return self.table[(first + 1) * (V + 1) + second + 1].unsqueeze(0)

    def __call__(self, draw):
        key = tuple(draw.output_token_ids)
        if key not in self.known:
            [self.known[key]] = probabilities(self.logits(draw), [draw])
        return self.known[key]


@pytest.mark.parametrize(("number", "params"), list(enumerate(CASES)))
def test_tokens_kept_by_chance_have_the_models_distribution(number, params):
    """The first two tokens: 100,000 draws, each pair with another seed, as another request's would be."""
    model, drafter, tries = Table(2 * number), Table(2 * number + 1), 4_000 if number else 50_000
    counts, wanted = torch.zeros(V, V), torch.zeros(V, V, dtype=torch.float64)
    for seed in range(tries):
        tokens = [token.token_id for token in step(seed, model, drafter, 2, **params)]
        if len(tokens) == 1:  # the second comes from the next step
            tokens += [token.token_id for token in step(seed, model, drafter, 1, tokens, **params)]
        counts[tokens[0], tokens[1]] += 1
    first = model(draw_of(**params))
    for token in range(V):
        wanted[token] = first[token] * model(draw_of(output=[token], **params))
    assert chi_square(counts.sum(1), first) < LIMIT
    assert chi_square(counts.flatten(), wanted.flatten()) < LIMIT_OF_PAIRS


def test_as_many_are_kept_as_can_be():
    """The sum of min(p, q): and that is more than draw alike by the same random number."""
    model, drafter = Table(100), Table(101)
    p, q = model(draw_of()), drafter(draw_of())
    tries = 4000
    kept = sum(len(step(seed, model, drafter, 1)) == 2 for seed in range(tries)) / tries
    most = float(torch.minimum(p, q).sum())
    assert abs(kept - most) < 4 * math.sqrt(most * (1 - most) / tries)
    draws = [draw_of(seed) for seed in range(tries)]
    alike = [sample(one.logits(draws[0]).expand(tries, V), draws) for one in (model, drafter)]
    coupled = sum(a[0].token_id == b[0].token_id for a, b in zip(*alike, strict=True)) / tries
    assert coupled < kept


def test_guesses_behind_a_rejected_one_are_forgotten():
    sure, other = Table(0), Table(0)
    sure.table = torch.full_like(sure.table, -30.0)
    sure.table[:, 2] = 30.0
    other.table = sure.table.roll(1, 1)
    assert [token.token_id for token in step(1, sure, other, 3)] == [2]
    assert [token.token_id for token in step(1, sure, sure, 3)] == [2, 2, 2, 2]
