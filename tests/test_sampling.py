"""Sampling, against transformers' logits processors, by statistics, and by what must never happen.

Most tests choose the random numbers themselves: with u = (i + 1/2) / N for N draws of one row, inverse CDF
must give a token of probability p between p N - 1 and p N + 1 times: a distribution is compared exactly.
"""

import doctest
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minipaged.decoding import adjust, sampling
from minipaged.decoding.logprobs import top_candidates, top_logprobs
from minipaged.decoding.sampling import sample, uniform
from minipaged.requests.sampling_params import BadLogits, Draw, Logprob, SampledToken, SamplingParams

ALMOST_ONE = 1 - 2.0**-53  # the largest random number there can be
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def draw(params=None, seed=0, index=0, num_draws=1, prompt=(), output=(), stop_ids=(), bad_word_ids=(), **kwargs):
    params = params or SamplingParams(**kwargs)
    return Draw(params, seed, index, num_draws, list(prompt), list(output), frozenset(stop_ids), bad_word_ids)


def tokens_of(logits, draws):
    return [[token.token_id for token in row] for row in sample(logits, draws)]


def random_logits(rows, vocab, spread=3.0, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def use_uniforms(monkeypatch, values):
    """Let sample number i of a request draw values[i]."""
    monkeypatch.setattr(sampling, "uniform", lambda seed, index, position: values[index])


# ---- the distribution ----------------------------------------------------------------------------

PROMPT, OUTPUT = [3, 7, 7, 11, 250], [7, 20, 20, 20, 21, 3]
WISHES = [
    dict(),
    dict(temperature=0.6),
    dict(temperature=7.5),
    dict(top_k=1),
    dict(top_k=5),
    dict(top_k=50, temperature=1.7),
    dict(top_k=200),
    dict(top_p=0.9),
    dict(top_p=0.3, temperature=0.7),
    dict(top_p=0.999),
    dict(top_p=1e-6),
    dict(min_p=0.05),
    dict(min_p=1.0),
    dict(top_k=40, top_p=0.8),
    dict(top_k=300, top_p=0.95, temperature=2.0),
    dict(top_k=20, top_p=0.9, min_p=0.02, temperature=1.3),
    dict(repetition_penalty=1.8),
    dict(repetition_penalty=0.5),
    dict(presence_penalty=1.5),
    dict(frequency_penalty=-0.7),
    dict(repetition_penalty=1.2, presence_penalty=1.0, frequency_penalty=0.9, temperature=0.8, top_p=0.95),
]


def expected(logits, p):
    """The distribution [V] by transformers in vLLM's order; presence and frequency by their definition."""
    ids = torch.tensor([PROMPT + OUTPUT])
    x = RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(ids, logits[None].double())
    for token, count in Counter(OUTPUT).items():
        x[0, token] -= p.frequency_penalty * count + p.presence_penalty
    x = TemperatureLogitsWarper(float(p.temperature))(ids, x)
    x = MinPLogitsWarper(p.min_p)(ids, x)
    x = TopKLogitsWarper(p.top_k)(ids, x) if p.top_k > 0 else x
    return TopPLogitsWarper(p.top_p)(ids, x)[0].softmax(-1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("vocab", "spread"), [(300, 3.0), (6000, 4.0), (6000, 0.5)])
@pytest.mark.parametrize("wish", WISHES, ids=str)
def test_distribution_is_that_of_transformers(monkeypatch, wish, vocab, spread, device):
    total = 2000
    use_uniforms(monkeypatch, [(i + 0.5) / total for i in range(total)])
    params, logits = SamplingParams(**wish), random_logits(1, vocab, spread)
    logits[0, [7, 11, 20, 3, 250, 21]] = torch.linspace(3, -1, 6) * spread  # so that penalties show
    request = draw(params, num_draws=total, prompt=PROMPT, output=OUTPUT)
    tokens = tokens_of(logits.to(device), [request])[0]
    counts, want = torch.bincount(torch.tensor(tokens), minlength=vocab), expected(logits[0], params)
    assert ((counts - want * total).abs() <= 1.01).all()
    assert not counts[want == 0].any()


def p_value(counts, probs):
    """Chi-square: how probable it is that counts of these probabilities differ at least so much."""
    want = probs * sum(counts)
    assert min(want) >= 5
    statistic = sum((count - w) ** 2 / w for count, w in zip(counts, want, strict=True))
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2), statistic / 2))


@pytest.mark.parametrize("vary", ["seed", "index", "output"])
def test_draws_follow_the_distribution(vary):
    """With the real random numbers, whichever of their three coordinates varies."""
    logits = torch.tensor([0.0, 2.0, 1.0, -0.5, 1.5, 0.5])
    value = (lambda i: [0] * i) if vary == "output" else (lambda i: i)
    draws = [draw(**{"seed": 5, vary: value(i)}) for i in range(4000)]
    counts = Counter(row[0] for row in tokens_of(logits.expand(4000, 6), draws))
    assert p_value([counts[t] for t in range(6)], logits.softmax(-1)) > 1e-4


def test_random_numbers_are_uniform_and_the_next_sample_independent():
    pairs = [(uniform(s, i, 3), uniform(s, i + 1, 3)) for s in range(400) for i in range(0, 40, 2)]
    counts = Counter((int(a * 8), int(b * 8)) for a, b in pairs)
    assert p_value([counts[a, b] for a in range(8) for b in range(8)], torch.full((64,), 1 / 64)) > 1e-4
    assert all(0 <= u < 1 for pair in pairs for u in pair)


def test_random_numbers_stay_the_same():
    """They are a promise: a seed gives the same tokens with the next version."""
    assert uniform(0, 0, 0) == pytest.approx(0.5213453336981362, abs=1e-15)
    assert uniform(2**70, 3, 9000) == pytest.approx(0.31951943798329063, abs=1e-15)
    assert len({uniform(s, i, p) for s in range(12) for i in range(12) for p in range(12)}) == 12**3


# ---- nobody else matters -------------------------------------------------------------------------


def test_n_draws_are_those_of_the_single_samples():
    logits = random_logits(1, 700)
    together = tokens_of(logits, [draw(seed=9, index=2, num_draws=5)])[0]
    assert together == [tokens_of(logits, [draw(seed=9, index=2 + i)])[0][0] for i in range(5)]
    assert len(set(together)) > 1


some_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, -1, 1, 7, 130, 10**9]),
    top_p=st.sampled_from([0.1, 0.9, 0.9999999, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    min_tokens=st.sampled_from([0, 4]),
    logprobs=st.sampled_from([None, 0, 3]),
)
some_draws = st.builds(
    Draw,
    params=some_params,
    seed=st.integers(0, 2**64),
    index=st.integers(0, 3),
    num_draws=st.sampled_from([1, 1, 3]),
    prompt_token_ids=st.lists(st.integers(0, 299), max_size=5),
    output_token_ids=st.lists(st.integers(0, 299), max_size=6),
    stop_ids=st.frozensets(st.integers(0, 400), max_size=3),
)


@given(st.lists(some_draws, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_a_request_is_alone_in_any_batch(draws, random):
    logits = random_logits(len(draws), 300)
    before = logits.clone()
    batch = sample(logits, draws)
    assert torch.equal(logits, before)
    order = random.sample(range(len(draws)), len(draws))
    shuffled = sample(logits[order], [draws[r] for r in order])
    for place, r in enumerate(order):
        assert len(batch[r]) == draws[r].num_draws
        for other in (shuffled[place], sample(logits[r : r + 1], [draws[r]])[0]):
            assert [token.token_id for token in other] == [token.token_id for token in batch[r]]
            assert [token.logprob for token in other] == pytest.approx([token.logprob for token in batch[r]])


@pytest.mark.parametrize("wish", [dict(top_p=0.9), dict(top_p=0.99, top_k=5000), dict(top_k=50)])
def test_candidates_are_only_a_short_cut(monkeypatch, wish):
    """Sorting everything gives the same tokens as trying a few candidates first."""
    logits = random_logits(12, 6000, spread=1.5) * torch.linspace(0.2, 3, 12).unsqueeze(1)
    draws = [draw(seed=seed, num_draws=20, **wish) for seed in range(12)]
    short = tokens_of(logits, draws)
    monkeypatch.setattr(sampling, "RUNGS", ())
    assert tokens_of(logits, draws) == short


# ---- what must never happen ----------------------------------------------------------------------

some_logits = st.one_of(
    st.floats(-12, 12, width=32), st.sampled_from([0.0, 1.0, -math.inf, 1e38, -1e38, 3.4e38, -200.0, 88.0])
)


@given(
    st.lists(some_logits, min_size=1, max_size=12).filter(lambda row: max(row) > -math.inf),
    st.sampled_from([1, 300]),
    st.sampled_from([0.01, 1.0, 50.0]),
    st.integers(0, 12),
    st.sampled_from([1e-9, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([0.0, 0.25, 0.5, ALMOST_ONE]),
)
def test_only_tokens_that_are_left(row, stretch, temperature, top_k, top_p, min_p, u):
    """Whatever the logits: inside top_k and the nucleus, over min_p, and never of probability 0."""
    x = torch.tensor(row).repeat_interleave(stretch)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_uniforms(monkeypatch, [u])
        token = tokens_of(x[None], [draw(params)])[0][0]
    probs = (x.double() / temperature).softmax(-1)
    kept = probs[probs >= min_p * probs.max() * (1 - 1e-5)].sort(descending=True).values[: top_k or None]
    better = kept[kept > probs[token]]
    assert probs[token] > 0
    assert probs[token] >= min_p * probs.max() * (1 - 1e-5)
    assert not top_k or len(better) < top_k
    assert better.sum() <= top_p * kept.sum() * (1 + 1e-5)


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 1000, 50257])
@pytest.mark.parametrize("wish", [dict(), dict(top_p=0.99999), dict(top_k=3)])
def test_probability_zero_at_both_ends(monkeypatch, vocab, wish):
    use_uniforms(monkeypatch, [0.0, 0.3, ALMOST_ONE])
    lonely = torch.full((3, vocab), -torch.inf)
    for row, place in enumerate((0, vocab // 2, vocab - 1)):
        lonely[row, place] = -50.0
    requests = [draw(num_draws=3, **wish)] * 3
    assert tokens_of(lonely, requests) == [[place] * 3 for place in (0, vocab // 2, vocab - 1)]


def test_rounding_never_leads_past_the_last_token(monkeypatch):
    """The sum of a block in float32 is often more than the running sum in it, in float64, ever reaches."""
    use_uniforms(monkeypatch, [ALMOST_ONE])
    logits = random_logits(50, 512, spread=1.0)
    logits[:, 251:256] = logits[:, 300:] = -torch.inf
    assert tokens_of(logits, [draw()] * 50) == [[299]] * 50
    assert tokens_of(logits[:, :256], [draw()] * 50) == [[250]] * 50


def test_every_token_of_a_large_vocabulary_can_be_drawn(monkeypatch):
    """Where a running sum in float32 is too coarse: the first token weighs 10^8 times the others."""
    vocab = 50257
    logits = torch.zeros(1, vocab)
    logits[0, 0] = math.log(1e8)
    use_uniforms(monkeypatch, [(1e8 + place) / (1e8 + vocab) for place in range(20000, 22000)])
    assert len(set(tokens_of(logits, [draw(num_draws=2000)])[0])) > 1990


def test_every_token_of_a_block_can_be_drawn(monkeypatch):
    """The running sum in a block is of float64: in float32 about 20 of these 255 tokens could come."""
    logits = torch.zeros(1, sampling.BLOCK)
    logits[0, 0] = math.log(1e8)
    use_uniforms(monkeypatch, [(1e8 + place - 0.5) / (1e8 + 255) for place in range(1, 256)])
    assert len(set(tokens_of(logits, [draw(num_draws=255)])[0])) > 200


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_a_nucleus_is_cut_at_the_same_place_alone_and_in_company(monkeypatch, two_threads):
    """PyTorch cuts the sum of a single long row in two for its threads, and of several rows it doesn't.

    So top_p is put between the two sums, where the nucleus ends with token 100, and its last token is drawn.
    """
    use_uniforms(monkeypatch, [ALMOST_ONE])
    logits = random_logits(30, 49152)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    sums = [(weights.sum(-1)[r].item(), weights[r : r + 1].sum(-1).item()) for r in range(30)]
    first = weights.double().topk(100).values.sum(-1).tolist()
    draws = [draw(top_p=2 * f / (one + other)) for f, (one, other) in zip(first, sums, strict=True)]
    assert tokens_of(logits, draws) == [tokens_of(x, [d])[0] for x, d in zip(logits.split(1), draws, strict=True)]


# ---- rows that can't be drawn from ---------------------------------------------------------------

EVERY_WAY = [dict(temperature=0), dict(), dict(top_p=0.5), dict(top_k=2, min_p=0.1), dict(top_k=1)]
BAD_ROWS = {
    "NaN": [0.0, math.nan, 1.0, 2.0],
    "NaN and infinite": [math.inf, math.nan, 1.0, -math.inf],
    "infinite": [0.0, math.inf, 1.0, 2.0],
    "-inf for every token": [-math.inf] * 4,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wish", EVERY_WAY, ids=str)
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_and_nobody_else_notices(name, wish, device):
    good = random_logits(5, 4)
    logits = torch.cat([good[:2], torch.tensor([BAD_ROWS[name]]), good[2:], torch.tensor([BAD_ROWS[name]])])
    others = [dict(temperature=0), dict(logprobs=2), dict(top_p=0.7), dict(top_k=3, logprobs=0), wish]
    draws = [draw(seed=seed, num_draws=2, **other) for seed, other in enumerate(others)]
    bad = draw(num_draws=3, **wish)
    found = sample(logits.to(device), [*draws[:2], bad, *draws[2:], bad])
    assert found[2] == found[6] == BadLogits(f"the model's logits are {name.split(' and ')[0]}")
    assert found[:2] + found[3:6] == sample(good.to(device), draws)
    assert sample(logits[2:3].to(device), [bad]) == [found[2]]


FORBIDDING = [
    (dict(min_tokens=2, stop_ids=range(4)), "min_tokens=2 forbids 4 of 4 as stop tokens"),
    (dict(allowed_token_ids=[2, 3], bad_word_ids=[[7, 2], [3], [0, 1]], output=[7]),
     "allowed_token_ids allows only 2 of 4 tokens, bad_words forbid 2 of 4 tokens"),
    (dict(allowed_token_ids=[1], min_tokens=1, stop_ids=[1, 9]),
     "allowed_token_ids allows only 1 of 4 tokens, min_tokens=1 forbids 1 of 4 as stop tokens"),
]  # fmt: skip


@pytest.mark.parametrize("wish", EVERY_WAY, ids=str)
@pytest.mark.parametrize(("more", "said"), FORBIDDING)
def test_a_row_that_is_forbidden_whole_says_by_what(more, said, wish):
    logits = random_logits(2, 4)
    [bad, good] = sample(logits, [draw(**more, **wish), draw(**wish)])
    assert str(bad) == f"every token is forbidden: {said}"
    assert [good] == sample(logits[1:], [draw(**wish)])


def test_a_penalty_may_be_too_strong():
    [bad] = sample(torch.tensor([[1e20, 2.0]]), [draw(prompt=[0], repetition_penalty=1e-30)])
    assert str(bad) == "repetition_penalty=1e-30 makes a logit infinite"


def test_what_nobody_looks_at_may_be_broken():
    """A NaN that is forbidden anyway does no harm; but no logprob can be told of such a row."""
    logits = torch.tensor([[math.nan, 1.0, 2.0]])
    assert tokens_of(logits, [draw(temperature=0, allowed_token_ids=[1, 2])]) == [[2]]
    for wish in (dict(temperature=0), dict(), dict(top_k=1)):
        found = sample(logits, [draw(allowed_token_ids=[1, 2], logprobs=0, **wish)])
        assert found == [BadLogits("the model's logits are NaN")]


@pytest.mark.parametrize("name", BAD_ROWS)
def test_no_candidates_and_no_logprobs_come_from_a_bad_row(name):
    good = random_logits(2, 4)
    logits = torch.cat([good[:1], torch.tensor([BAD_ROWS[name]]), good[1:]])
    bad = BadLogits(f"the model's logits are {name.split(' and ')[0]}")
    for k in (1, 3, 4, 9):
        one, two = top_candidates(good, k)
        assert top_candidates(logits, k) == [one, bad, two]
    for k in (0, 2, 4, -1):
        one, two = top_logprobs(good, [(0, k, 3), (1, 1, 0)])
        assert top_logprobs(logits, [(0, k, 3), (1, k, 2), (2, 1, 0), (1, 0, 0)]) == [one, bad, two, bad]


@given(
    st.lists(st.sampled_from([0.0, 1.0, -3.0, 200.0, -math.inf, math.inf, math.nan, 3e38]), min_size=2, max_size=9),
    some_params,
    st.integers(0, 99),
)
def test_never_a_token_of_probability_zero_and_never_an_exception(row, params, seed):
    logits = torch.tensor([row, [0.0] * len(row)])
    [found, other] = sample(logits, [draw(params, seed), draw(params, seed)])
    assert other == sample(logits[1:], [draw(params, seed)])[0]
    if not math.isfinite(max(row)) or any(map(math.isnan, row)):
        assert isinstance(found, BadLogits)
    else:
        assert row[found[0].token_id] > -math.inf


# ---- greedy, penalties, min_tokens ---------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_takes_the_first_of_the_best(device):
    logits = torch.tensor([[1.0, 5.0, 5.0, 5.0], [-math.inf, -3.0, -2.0, -2.0], [0.0, 0.0, 0.0, 0.0]])
    assert tokens_of(logits.to(device), [draw(temperature=0)] * 3) == [[1], [2], [0]]


def test_small_temperatures():
    logits = random_logits(2, 400)
    best = logits.argmax(-1).tolist()
    assert SamplingParams(temperature=1e-6).greedy and not SamplingParams(temperature=1e-4).greedy
    assert tokens_of(logits, [draw(temperature=1e-6), draw(temperature=1e-4)]) == [[best[0]], [best[1]]]
    assert tokens_of(logits, [draw(temperature=1e30, top_k=1)] * 2) == [[best[0]], [best[1]]]


def test_greedy_rows_do_nothing_else():
    """No operation over the logits but argmax, which is NumPy's on a CPU."""

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    logits = random_logits(4, 1000)
    with Recorder():
        tokens = tokens_of(logits, [draw(temperature=0, prompt=[1], output=[2], stop_ids=[3])] * 4)
    assert "numpy" in seen and set(seen) <= {"numpy", "__len__", "__get__"}
    assert tokens == [[t] for t in logits.argmax(-1).tolist()]


def test_penalties_move_the_greedy_choice():
    logits = torch.tensor([[1.0, 3.0, 2.9, -0.5]])

    def choose(**kwargs):
        return tokens_of(logits, [draw(temperature=0, prompt=[1], output=[2, 2], **kwargs)])[0][0]

    assert choose() == 1
    assert choose(repetition_penalty=1.1) == 1  # both shrink
    assert choose(repetition_penalty=3.5) == 0
    assert choose(presence_penalty=-0.2) == 2  # of the output only
    assert choose(frequency_penalty=-0.06) == 2  # twice
    assert choose(presence_penalty=2.0, frequency_penalty=2.0) == 1
    assert tokens_of(-logits, [draw(temperature=0, output=[3], repetition_penalty=1.1)]) == [[3]]
    assert tokens_of(-logits - 1, [draw(temperature=0, output=[3, 0], repetition_penalty=9.0)]) == [[2]]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_min_tokens_forbid_the_end(temperature):
    logits = torch.tensor([[9.0, 8.0, -30.0, 7.0]] * 3)
    wish = dict(temperature=temperature, min_tokens=2, stop_ids=[0, 1, 77])
    draws = [draw(seed=seed, output=[2] * seed, **wish) for seed in range(3)]
    tokens = tokens_of(logits, draws)
    assert tokens[:2] == [[3], [3]] and (temperature or tokens[2] == [0])


# ---- the other wishes ----------------------------------------------------------------------------

ALL_STEPS = dict(
    allowed_token_ids=[*range(0, 300, 2), 7, 11, 301],
    bad_word_ids=[[20], [5, 6], [20, 22], [21, 3, 24], [21, 4, 26], [1, 2, 3, 4, 5, 6, 7, 7]],
    min_tokens=9, stop_ids=[28, 30, 400], logit_bias={7: 2.5, 20: 100, 28: 50, 32: -100, 34: 1.25, 999: 9},
    repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3,
)  # fmt: skip


def by_definition(row, d):
    """Steps 1 to 5, one token at a time, on one row of Python floats."""
    p, x = d.params, row.tolist()
    for token in range(len(x)):
        if p.allowed_token_ids and token not in p.allowed_token_ids:
            x[token] = -math.inf
        for *start, last in d.bad_word_ids:
            if last == token and d.output_token_ids[len(d.output_token_ids) - len(start) :] == start:
                x[token] = -math.inf
        if len(d.output_token_ids) < p.min_tokens and token in d.stop_ids:
            x[token] = -math.inf
        x[token] += (p.logit_bias or {}).get(token, 0)
        if token in d.prompt_token_ids or token in d.output_token_ids:
            x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
        count = d.output_token_ids.count(token)
        x[token] -= p.frequency_penalty * count + p.presence_penalty * (count > 0)
    return torch.tensor(x)


@pytest.mark.parametrize("leave_out", [None, *ALL_STEPS])
def test_the_steps_come_in_vllms_order(leave_out):
    """All that changes logits at once, and each left out in turn, against the definition."""
    logits = random_logits(3, 300)
    wish = {key: value for key, value in ALL_STEPS.items() if key != leave_out}
    d = draw(prompt=PROMPT, output=OUTPUT, **wish)
    found = adjust.adjust(logits, [draw(), d, draw(min_tokens=1, stop_ids=[3])])
    assert torch.equal(found[0], logits[0])
    assert torch.allclose(found[1], by_definition(logits[1], d), atol=1e-5)
    assert found[2].isneginf().nonzero().tolist() == [[3]]
    if leave_out is None:
        assert found[1].isneginf().sum() == 300 - 152 + len([20, 24]) + len([28, 30])


def test_bad_words_are_found_in_the_output_only():
    def forbidden(words, output):
        return draw(bad_word_ids=words, output=output, prompt=[1, 2]).completes_bad_word

    assert forbidden([[5]], []) == {5}
    assert forbidden([[1, 2, 5]], []) == forbidden([[1, 2, 5]], [2]) == set()
    assert forbidden([[1, 2, 5]], [1, 2]) == forbidden([[1, 2, 5]], [9, 1, 2]) == {5}
    assert forbidden([[1, 2, 5], [2, 6], [7], [2, 2, 8]], [1, 2]) == {5, 6, 7}
    assert forbidden([[1, 2, 5]], [1, 2, 9]) == set()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab", [3, 50, 6000])
def test_equal_logits_are_cut_by_the_lowest_ids(monkeypatch, vocab, device):
    """Also where more tokens are equal than candidates are tried at first."""
    total = 500
    use_uniforms(monkeypatch, [(i + 0.5) / total for i in range(total)])

    def drawn(logits, **wish):
        return set(tokens_of(logits.to(device), [draw(num_draws=total, **wish)])[0])

    flat = torch.zeros(1, vocab)
    assert drawn(flat, top_k=1) == {0} == drawn(flat, temperature=1e-3, top_k=1)
    for k in (2, 3):
        assert drawn(flat, top_k=k) == set(range(k)) == drawn(flat, top_p=k / vocab - 1e-4 / vocab)
    steps = torch.arange(vocab).flip(0).div(2, rounding_mode="floor").float()[None] / vocab  # pairs, the last are best
    best_first = sorted(range(vocab), key=lambda t: (-steps[0, t].item(), t))
    for k in {1, 2, min(vocab, 127), min(vocab, 128), min(vocab, 129)}:
        assert drawn(steps, top_k=k) <= set(best_first[:k])
    assert drawn(steps, top_k=1) == {int(steps.argmax())} == drawn(steps, top_p=1e-9)


def test_ties_are_cut_alike_whatever_is_tried_first(monkeypatch):
    """Logits of bf16 are equal often. All sorted give the same tokens as few candidates."""
    logits = random_logits(12, 6000, spread=1.5).bfloat16().float()
    wishes = [dict(top_p=0.9), dict(top_k=50), dict(top_k=128), dict(top_k=300, top_p=0.8), dict(top_p=0.3, min_p=0.01)]
    draws = [draw(seed=seed, num_draws=30, **wishes[seed % 5]) for seed in range(12)]
    short = tokens_of(logits, draws)
    monkeypatch.setattr(sampling, "RUNGS", ())
    assert tokens_of(logits, draws) == short


# ---- logprobs ------------------------------------------------------------------------------------


def test_logprobs_are_the_raw_models(monkeypatch):
    """Before penalties, temperature and truncation, and only for the rows that ask."""
    logits, rows = random_logits(4, 500), []
    real = torch.Tensor.log_softmax
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda x, dim: (rows.append(len(x)), real(x, dim))[1])
    best = logits.argmax(-1).tolist()
    wishes = [
        dict(logprobs=3, repetition_penalty=5.0, min_p=0.1),
        dict(temperature=0),
        dict(logprobs=0, top_k=2),
        dict(logprobs=2, temperature=0, presence_penalty=2.0),
    ]
    draws = [draw(output=[b], **wish) for b, wish in zip(best, wishes, strict=True)]
    draws[0].num_draws = 5
    sampled = sample(logits, draws)
    assert rows == [3]
    raw = real(logits, -1)
    for r, wish in enumerate(wishes):
        for token in sampled[r]:
            if "logprobs" not in wish:
                assert token == SampledToken(token.token_id, None, None)
                continue
            assert token.logprob == pytest.approx(raw[r, token.token_id].item(), abs=1e-6)
            top = raw[r].topk(wish["logprobs"])
            want = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)) | {token.token_id: token.logprob}
            assert list(token.top_logprobs) == list(want)
            values = [one.logprob for one in token.top_logprobs.values()]
            assert values == pytest.approx([*want.values()], abs=1e-6) == sorted(values, reverse=True)


@pytest.mark.parametrize("k", [0, 1, 2, 3, 5, 6, -1])
def test_ranks_count_what_is_larger(k):
    """1 is the likeliest; equal ones share a rank, as in a race."""
    logits = torch.tensor([[1.0, 5.0, 1.0, -math.inf, 3.0, 5.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    ranks = {1: 1, 5: 1, 4: 3, 0: 4, 2: 4, 3: 6}  # best first, by id
    raw = logits.log_softmax(-1).tolist()
    for token in ranks:
        first, second = top_logprobs(logits, [(0, k, token), (1, k, token)])
        told = dict.fromkeys([*ranks][: 6 if k == -1 else k]) | {token: None}
        assert first == {t: Logprob(pytest.approx(raw[0][t]), ranks[t]) for t in told}
        assert list(first) == list(told)
        assert {one.rank for one in second.values()} == {1}


def test_who_asks_for_all_logprobs_costs_the_others_nothing():
    logits = random_logits(3, 50)
    [few], [everything], [own] = sample(logits, [draw(logprobs=2), draw(logprobs=-1), draw(logprobs=0)])
    assert len(everything.top_logprobs) == 50 and len(few.top_logprobs) in (2, 3)
    assert own.top_logprobs.keys() == {own.token_id}
    assert [[few]] == sample(logits[:1], [draw(logprobs=2)])


@pytest.mark.parametrize("device", DEVICES)
def test_top_candidates(device):
    logits = random_logits(3, 800)
    top = logits.log_softmax(-1).topk(6)
    got = top_candidates(logits.to(device), 6)
    assert [[t for t, _ in row] for row in got] == top.indices.tolist()
    assert [v for row in got for _, v in row] == pytest.approx(top.values.flatten().tolist(), abs=1e-5)


def test_top_candidates_that_are_equal():
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 9.0]])
    assert [[t for t, _ in row] for row in top_candidates(logits, 3)] == [[1, 3, 0], [4, 0, 1]]
    assert [t for t, _ in top_candidates(torch.zeros(1, 5000), 4)[0]] == [0, 1, 2, 3]
    assert [len(row) for row in top_candidates(logits, 99)] == [5, 5]
    assert top_candidates(torch.tensor([[0.0, -math.inf]]), 2) == [[(0, 0.0), (1, -math.inf)]]


@pytest.mark.parametrize("module", [sampling, adjust])
def test_the_examples_in_the_docstrings(module):
    found = doctest.testmod(module)
    assert found.failed == 0 and found.attempted > 0
