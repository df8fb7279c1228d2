"""Sampling, against transformers' logits processors, by statistics, and by what must never happen.

Most tests choose the random numbers themselves: with u = (i + 1/2) / N for N draws of one row, inverse CDF
must give a token of probability p between p N - 1 and p N + 1 times: a distribution is compared exactly.
"""

import doctest
import math
from collections import Counter
from dataclasses import fields

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

from minipaged.decoding import sampling
from minipaged.decoding.sampling import sample, top_candidates, uniform
from minipaged.requests import sampling_params
from minipaged.requests.sampling_params import Draw, SampledToken, SamplingParams

ALMOST_ONE = 1 - 2.0**-53  # the largest random number there can be
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def draw(params=None, seed=0, index=0, num_draws=1, prompt=(), output=(), stop_ids=(), **kwargs):
    params = params or SamplingParams(**kwargs)
    return Draw(params, seed, index, num_draws, list(prompt), list(output), frozenset(stop_ids))


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


@pytest.mark.parametrize("wish", [dict(), dict(top_p=0.5), dict(top_k=2, min_p=0.1)])
@pytest.mark.parametrize("bad", [[math.nan, 1.0], [-math.inf, -math.inf], [math.inf, 1.0]])
def test_no_distribution_is_an_error(bad, wish):
    with pytest.raises(ValueError, match="nothing to sample from"):
        sample(torch.tensor([[0.0, 1.0], bad]), [draw(**wish), draw(**wish)])


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
    with pytest.raises(ValueError, match="nothing to sample from"):
        sample(logits[:1], [draw(min_tokens=1, stop_ids=range(4))])


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
            want = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            assert token.top_logprobs == pytest.approx(want | {token.token_id: token.logprob}, abs=1e-6)
            assert list(token.top_logprobs.values()) == sorted(token.top_logprobs.values(), reverse=True)


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


# ---- parameters ----------------------------------------------------------------------------------


def test_defaults_are_vllms():
    assert {field.name: field.default for field in fields(SamplingParams)} == dict(
        n=1, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, presence_penalty=0.0, frequency_penalty=0.0,
        repetition_penalty=1.0, seed=None, max_tokens=16, min_tokens=0, stop=None, stop_token_ids=None,
        ignore_eos=False, logprobs=None, prompt_logprobs=None, include_stop_str_in_output=False,
        skip_special_tokens=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("n", [1, 64], [0, -1, 1.0, True, "2", None]),
        ("temperature", [0, 0.0, 2, 1e30], [-0.1, math.nan, math.inf, True, "1", None]),
        ("top_k", [-1, 0, 1, 10**12], [-2, 1.5, True, "5", None]),
        ("top_p", [1, 1e-9, 0.5], [0, 0.0, -0.1, 1.0001, math.nan, True, "1", None]),
        ("min_p", [0, 1, 0.3], [-0.1, 1.1, math.nan, True, None]),
        ("presence_penalty", [-2, 0, 2.0], [-2.1, 2.1, math.nan, -math.inf, False]),
        ("frequency_penalty", [-2, 0, 2.0], [-2.1, 2.1, math.nan, math.inf, False]),
        ("repetition_penalty", [0.1, 1, 5], [0, 0.0, -1, math.nan, math.inf, True]),
        ("seed", [None, 0, 2**80], [-1, 1.0, True, "0"]),
        ("max_tokens", [None, 1, 10**9], [0, -1, 2.0, True]),
        ("min_tokens", [0, 16], [-1, 0.0, True, None, 17]),
        ("stop", [None, "a", [], ["a", "bc"], ("x",)], ["", ["a", ""], 3, [3], {"a": 1}, [None], b"a"]),
        ("stop_token_ids", [None, [], [0, 5], (7,)], [[-1], ["a"], [True], [1.0], 5, "5"]),
        ("ignore_eos", [True, False], [1, 0, None, "yes"]),
        ("logprobs", [None, 0, 20], [-1, 1.0, True, "5"]),
        ("include_stop_str_in_output", [True, False], [1, None]),
        ("skip_special_tokens", [True, False], [1, None]),
    ],
)
def test_values_out_of_range_are_named(name, good, bad):
    for value in good:
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(ValueError, match=f"^{name}=") as error:
            SamplingParams(**{name: value})
        assert f"{name}={value!r}: must be " in str(error.value)


def test_values_that_do_not_go_together():
    with pytest.raises(ValueError, match="min_tokens=5: must be <= max_tokens=4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    assert SamplingParams(min_tokens=5000, max_tokens=None).min_tokens == 5000
    with pytest.raises(ValueError, match="n must be 1 when using greedy sampling"):
        SamplingParams(n=2, temperature=0)


def test_stop_strings_have_one_form():
    forms = [None, [], "END", ["a", "b"]]
    assert [list(SamplingParams(stop=stop).stop_strings) for stop in forms] == [[], [], ["END"], ["a", "b"]]


@pytest.mark.parametrize("module", [sampling, sampling_params])
def test_the_examples_in_the_docstrings(module):
    assert doctest.testmod(module).failed == 0
