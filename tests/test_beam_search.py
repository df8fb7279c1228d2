"""Beam search against transformers, against enumerating every possible output, and by its invariants."""

import doctest
import itertools
import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from minipaged.decoding import beam_search
from minipaged.decoding.beam_search import BeamSearch, Continuation, memory_moves
from minipaged.requests.beam_search_params import BeamSearchParams

PENALTIES = [-1.0, 0.0, 0.5, 1.0, 2.0]
EARLY = [False, True, "never"]
VOCAB = 37


# ---- the oracle: transformers, on small random models whose hypotheses end at many lengths ----


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    """A random model of strong opinions, in float64 so that it says the same with and without a KV cache."""
    torch.manual_seed(len(request.param))
    if request.param == "llama":
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            tie_word_embeddings=False, eos_token_id=None, bos_token_id=None,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    else:
        config = GPT2Config(
            vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=3, n_positions=64,
            tie_word_embeddings=False, eos_token_id=None, bos_token_id=None,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.35)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for matrices this small, a second thread only costs
    yield model.double().eval()
    torch.set_num_threads(threads)


@torch.no_grad()
def log_probs(model, sequences):
    """log p(next token) after each of the equally long sequences, [S, V] float32."""
    return model(torch.tensor(sequences), use_cache=False).logits[:, -1].float().log_softmax(-1)


def drive(model, prompt, params, eos, seen=None):
    """The loop of an engine without an engine: recompute everything at each step."""
    seen = Counter() if seen is None else seen
    search = BeamSearch(params, params.max_tokens, eos)
    while not search.done:
        rows = log_probs(model, [prompt + list(beam.token_ids) for beam in search.running])
        top = rows.topk(min(search.num_candidates, VOCAB))
        candidates = [
            list(zip(ids, values, strict=True))
            for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        num_old = len(search.running)
        moves = memory_moves(search.advance(candidates), num_old)
        seen.update(steps=1, forks=len(moves.fork), frees=len(moves.free))
    return search.hypotheses()


def oracle(model, prompts, params, eos):
    """What transformers says: for each prompt, a list of (output tokens, score)."""
    inputs, width = torch.tensor(prompts), params.beam_width
    out = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), num_beams=width, num_return_sequences=width,
        max_new_tokens=params.max_tokens, length_penalty=params.length_penalty,
        early_stopping=params.early_stopping, eos_token_id=eos or None, pad_token_id=0, do_sample=False,
        return_dict_in_generate=True, output_scores=True,
        # generate() goes greedy for one beam; this sends it through its beam search all the same.
        custom_generate=type(model)._beam_search,
    )  # fmt: skip
    lengths = (out.beam_indices >= 0).sum(1).tolist()
    rows = [row[inputs.shape[1] :][:n] for row, n in zip(out.sequences.tolist(), lengths, strict=True)]
    results = list(zip(rows, out.sequences_scores.tolist(), strict=True))
    return [results[i : i + width] for i in range(0, len(results), width)]


@pytest.mark.parametrize("width", range(1, 9))
def test_equals_transformers(model, width):
    rng, seen = random.Random(width), Counter()
    num_eos = itertools.cycle([0, 1, 4, 8, 12])
    for penalty, early in itertools.product(PENALTIES, EARLY):
        eos = rng.sample(range(VOCAB), next(num_eos))
        prompts = [[rng.randrange(VOCAB) for _ in range(4)] for _ in range(3)]
        limit = rng.choice([1, 6, 18, 20])
        params = BeamSearchParams(width, limit, length_penalty=penalty, early_stopping=early)
        for prompt, expected in zip(prompts, oracle(model, prompts, params, eos), strict=True):
            before = seen["steps"]
            ours = drive(model, prompt, params, eos, seen)
            assert [list(h.token_ids) for h in ours] == [tokens for tokens, _ in expected], f"{params} {eos}"
            assert [h.score for h in ours] == pytest.approx([score for _, score in expected], abs=1e-4)
            for h in ours:
                stopped = h.token_ids[-1] in eos
                assert h.finish_reason == ("stop" if stopped else "length")
                assert h.stop_token_id == (h.token_ids[-1] if stopped else None)
                assert stopped or len(h.token_ids) == limit
            seen.update(h.finish_reason for h in ours)
            seen["early"] += seen["steps"] - before < limit
            seen["mixed lengths"] += len({len(h.token_ids) for h in ours}) > 1
    # It all happened: hypotheses ended in both ways, searches before their limit, beams split and died.
    assert seen["stop"] > 10 and seen["length"] > 10 and seen["early"] > 5
    assert width == 1 or (seen["mixed lengths"] > 5 and seen["forks"] > 50 and seen["frees"] > 50)


@pytest.mark.parametrize("early", [False, True])
def test_width_one_is_greedy(model, early):
    for eos in ([], [3], [5, 11, 23, 30]):
        inputs = torch.tensor([[1, 2, 3]])
        out = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=12, do_sample=False,
            eos_token_id=eos or None, pad_token_id=0,
        )  # fmt: skip
        (ours,) = drive(model, [1, 2, 3], BeamSearchParams(1, 12, early_stopping=early), eos)
        assert list(ours.token_ids) == out[0, 3:].tolist()


def test_stop_token_ids_end_hypotheses_like_eos(model):
    def search(eos, **options):
        return drive(model, [1, 2], BeamSearchParams(4, 10, **options), eos)

    as_eos = search([5, 11, 23])
    assert as_eos == search([5], stop_token_ids=[11, 23])
    assert as_eos == search([7], stop_token_ids=[5, 11, 23], ignore_eos=True)
    assert any(h.finish_reason == "stop" for h in as_eos)
    assert [h.finish_reason for h in search([5, 11, 23], ignore_eos=True)] == ["length"] * 4


# ---- a made-up model: the next token's log-probabilities are a function of a seed and the tokens so far ----


def made_up(seed, token_ids, vocab):
    """All (token id, log-probability) after token_ids, likeliest first."""
    rng = random.Random(repr((seed, token_ids)))
    logits = [rng.gauss(0, 2) for _ in range(vocab)]
    total = math.log(sum(map(math.exp, logits)))
    return sorted(((i, x - total) for i, x in enumerate(logits)), key=lambda pair: -pair[1])


def everything(seed, vocab, stop_ids, limit, so_far=(), logprob=0.0):
    """Every possible output and its log-probability, by plain recursion."""
    for token_id, extra in made_up(seed, so_far, vocab):
        tokens = (*so_far, token_id)
        if token_id in stop_ids or len(tokens) == limit:
            yield tokens, logprob + extra
        else:
            yield from everything(seed, vocab, stop_ids, limit, tokens, logprob + extra)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_wide_enough_it_finds_the_best_outputs_of_all(penalty):
    for seed in range(20):
        outputs = list(everything(seed, vocab=4, stop_ids={0}, limit=3))
        assert len(outputs) == 40
        search = BeamSearch(BeamSearchParams(40, length_penalty=penalty, early_stopping="never", n=7), 3, [0])
        while not search.done:
            search.advance([made_up(seed, beam.token_ids, 4) for beam in search.running])
        best = sorted(outputs, key=lambda pair: -pair[1] / len(pair[0]) ** penalty)[:7]
        found = search.hypotheses()
        assert [h.token_ids for h in found] == [tokens for tokens, _ in best]
        assert [h.cumulative_logprob for h in found] == pytest.approx([logprob for _, logprob in best])


@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(2, 12),
    width=st.integers(1, 6),
    limit=st.integers(1, 8),
    stop_ids=st.sets(st.integers(0, 11), max_size=4),
    penalty=st.floats(-2, 2),
    early=st.sampled_from(EARLY),
)
def test_invariants(seed, vocab, width, limit, stop_ids, penalty, early):
    params = BeamSearchParams(width, limit, length_penalty=penalty, early_stopping=early)
    search, told_all = (BeamSearch(params, limit, stop_ids) for _ in range(2))
    memory = [[]]  # what each running beam's blocks would hold
    for steps in itertools.count(1):
        before, everyone = search.running, [made_up(seed, b.token_ids, vocab) for b in search.running]
        after = search.advance([offers[: search.num_candidates] for offers in everyone])
        assert told_all.advance(everyone) == after, "num_candidates of each beam are enough"
        assert search.done == (not after) == (not search.running)
        assert steps <= limit and len(after) <= width
        assert [c.score for c in after] == sorted((c.score for c in after), reverse=True)
        grown = [((*before[c.parent].token_ids, c.token_id), c.score) for c in after]
        assert search.running == grown
        assert all(c.score <= before[c.parent].score and c.token_id not in stop_ids for c in after)
        assert len({b.token_ids for b in search.running}) == len(after), "no beam twice"
        memory = carry_out(memory_moves(after, len(before)), memory, after)
        assert memory == [list(b.token_ids) for b in search.running]
        if search.done:
            break
    found = search.hypotheses()
    assert found == told_all.hypotheses() and found == sorted(found, key=lambda h: -h.score)
    assert len({h.token_ids for h in found}) == len(found) <= width
    for h in found:
        assert h.score == pytest.approx(h.cumulative_logprob / len(h.token_ids) ** penalty)
        assert not stop_ids.intersection(h.token_ids[:-1])
        assert (h.finish_reason == "stop") == (h.token_ids[-1] in stop_ids)
        assert h.finish_reason == "stop" or len(h.token_ids) == limit


def carry_out(moves, memory, continuations):
    """The moves on a memory of lists: a fork copies, a keep moves, and at the end nothing may be left."""
    owned, new = dict(enumerate(memory)), {}
    for old, child in moves.fork:
        new[child] = list(owned[old])
    for old, child in moves.keep:
        new[child] = owned.pop(old)
    for old in moves.free:
        del owned[old]
    assert not owned and len(new) == len(moves.fork) + len(moves.keep)
    for child, continuation in enumerate(continuations):
        new[child].append(continuation.token_id)
    return [new[child] for child in range(len(continuations))]


# ---- single points ----


def start(width, limit=10, eos=(0,), **options):
    return BeamSearch(BeamSearchParams(width, limit, **options), limit, eos)


def step(search, *candidates):
    return [(c.parent, c.token_id) for c in search.advance(candidates)]


def test_a_stop_token_below_the_first_ranks_is_dropped():
    search = start(width=2)
    assert step(search, [(5, -1.0), (6, -2.0), (0, -3.0), (7, -4.0)]) == [(0, 5), (0, 6)]
    assert search.hypotheses() == []
    # Among the first two it finishes, and the next best one takes its place among the running.
    assert step(search, [(0, -1.0), (5, -3.0), (6, -9.0)], [(5, -2.0), (6, -9.0)]) == [(0, 5), (1, 5)]
    assert [h.token_ids for h in search.hypotheses()] == [(5, 0)]


def finish_two(**options):
    """Two hypotheses finish with log-probability -2 (score -1); a beam of -2.2 (-1.1) could run on."""
    search = start(width=2, **options)
    search.advance([[(5, -1.0), (6, -1.0), (7, -8.0)]])
    search.advance([[(0, -1.0), (5, -1.2)], [(0, -1.0), (5, -9.0)]])
    return search


def test_early_stopping():
    assert finish_two(early_stopping=True).done
    assert finish_two(early_stopping=False).done  # -2.2 / 2 < -1: no better now
    assert not finish_two(early_stopping="never").done  # -2.2 / 10 > -1: could become better
    assert finish_two(early_stopping="never", length_penalty=0.0).done  # a longer output is never likelier
    going_on = finish_two(early_stopping="never")
    going_on.advance([[(0, -0.1), (5, -9.0)], [(5, -9.0)]])
    assert [h.token_ids for h in going_on.hypotheses()] == [(5, 5, 0), (5, 0)]  # -2.3 / 3 came to beat -2 / 2


def finish_one_by_one(second, **options):
    """One hypothesis of -1.5 finishes after a token, one of -1 + second after two; a beam of -1.3 runs."""
    search = start(width=2, **options)
    search.advance([[(5, -1.0), (0, -1.5), (6, -8.0)]])
    search.advance([[(5, -0.3), (0, second)], [(5, -9.0)]])
    assert len(search.finished) == 2
    return search


def test_early_stopping_goes_by_the_worst_of_the_finished():
    assert finish_one_by_one(-0.2, early_stopping=True).done
    assert not finish_one_by_one(-0.2, early_stopping=False).done  # -1.3 / 2 > -1.5 / 1
    assert not finish_one_by_one(-0.2, early_stopping="never").done
    # A length penalty below zero: the present length counts for "never" too, -1.3 * 2 and not -1.3 * 10.
    assert not finish_one_by_one(-5.0, early_stopping="never", length_penalty=-1.0).done  # worst: -6 * 2
    assert finish_one_by_one(-0.1, early_stopping="never", length_penalty=-1.0).done  # worst: -1.1 * 2


def test_a_running_beam_that_is_only_as_good_ends_the_search():
    search = start(width=2)
    search.advance([[(5, -1.0), (6, -1.0)]])
    search.advance([[(0, -1.0)], [(0, -1.0), (5, -1.0)]])
    assert search.done and [h.score for h in search.hypotheses()] == [-1.0, -1.0]


def test_at_the_limit_running_beams_compete_with_finished_ones():
    search = start(width=2, limit=2)
    search.advance([[(0, -1.0), (5, -1.1), (6, -1.2)]])
    assert search.advance([[(0, -0.1), (5, -3.0)], [(5, -0.2), (6, -0.3)]]) == [] and search.done
    assert [(h.token_ids, h.finish_reason, h.stop_token_id) for h in search.hypotheses()] == [
        ((5, 0), "stop", 0),
        ((6, 5), "length", None),
    ]
    assert search.advance([]) == []


def test_equal_scores_go_by_rank_of_the_beam_then_order_of_the_candidates():
    search = start(width=3)
    assert step(search, [(9, -1.0), (4, -1.0), (8, -1.0), (2, -1.0)]) == [(0, 9), (0, 4), (0, 8)]
    assert step(search, [(3, -1.0)], [(7, -1.0), (1, -1.0)], [(2, -1.0)]) == [(0, 3), (1, 7), (1, 1)]


def test_a_vocabulary_of_stop_tokens_only_ends_at_once():
    search = start(width=4, eos=(0, 1))
    assert search.advance([[(0, -0.5), (1, -0.9)]]) == [] and search.done
    assert [h.token_ids for h in search.hypotheses()] == [(0,), (1,)]


def test_num_candidates():
    assert start(width=4, eos=()).num_candidates == 8
    assert start(width=4, eos=(1,)).num_candidates == 8
    assert start(width=4, eos=(1, 2), stop_token_ids=[2, 3]).num_candidates == 16
    assert start(width=4, eos=(1, 2), ignore_eos=True).num_candidates == 8


def test_candidates_that_do_not_fit_are_refused_and_change_nothing():
    search = start(width=2)
    search.advance([[(5, -1.0), (6, -2.0)]])
    before = list(search.running)
    with pytest.raises(ValueError, match="2 beams are running, got candidates for 1"):
        search.advance([[(5, -1.0)]])
    with pytest.raises(ValueError, match="NaN"):
        search.advance([[(0, -1.0)], [(5, math.nan)]])
    assert search.running == before and not search.finished and not search.done


def test_memory_moves():
    children = [Continuation(parent, 7, 0.0) for parent in (2, 0, 2, 2)]
    assert memory_moves(children, 4) == ([(2, 2), (2, 3)], [(2, 0), (0, 1)], [1, 3])
    assert memory_moves([], 2) == ([], [], [0, 1])


def test_a_limit_is_needed():
    with pytest.raises(ValueError, match="max_tokens must be an integer of at least 1, got None"):
        BeamSearch(BeamSearchParams(2, None), None, [])


def test_docstrings():
    result = doctest.testmod(beam_search)
    assert result.attempted > 5 and result.failed == 0
