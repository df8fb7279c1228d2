"""What may be asked: each field of the parameters with each kind of value, accepted and meant or refused by name."""

import copy
import doctest
import json
import math
import pickle
from dataclasses import asdict, fields, replace
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from minipaged.requests import beam_search_params, checks, sampling_params
from minipaged.requests.beam_search_params import BeamSearchParams
from minipaged.requests.sampling_params import RequestOutputKind, SamplingParams

NUMBERS = [math.nan, math.inf, -math.inf, "1", b"1", [1], (), {}, {1}, object(), 1j, Decimal(1), Fraction(1)]


def test_defaults_are_vllms():
    assert {field.name: field.default for field in fields(SamplingParams)} == dict(
        n=1, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, presence_penalty=0.0, frequency_penalty=0.0,
        repetition_penalty=1.0, seed=None, max_tokens=16, min_tokens=0, stop=None, stop_token_ids=None,
        ignore_eos=False, logprobs=None, prompt_logprobs=None, include_stop_str_in_output=False,
        skip_special_tokens=True, logit_bias=None, bad_words=None, allowed_token_ids=None,
        truncate_prompt_tokens=None, detokenize=True, output_kind=RequestOutputKind.CUMULATIVE,
        structured_outputs=None, extra_args=None,
    )  # fmt: skip
    assert {kind.name: kind.value for kind in RequestOutputKind} == dict(CUMULATIVE=0, DELTA=1, FINAL_ONLY=2)


FIELDS = [  # name, values that are right, and values that are wrong besides those of every field of this kind
    ("n", [1, 64], [0, -1, 1.0, True, None]),
    ("temperature", [0, 0.0, 2, 1e30], [-0.1, True, None, 10**50]),
    ("top_k", [-1, 0, 1, 10**12], [-2, 1.5, True, None]),
    ("top_p", [1, 1e-9, 0.5], [0, 0.0, -0.1, 1.0001, True, None]),
    ("min_p", [0, 1, 0.3], [-0.1, 1.1, True, None]),
    ("presence_penalty", [-2, 0, 2.0], [-2.1, 2.1, False, None]),
    ("frequency_penalty", [-2, 0, 2.0], [-2.1, 2.1, False, None]),
    ("repetition_penalty", [0.1, 1, 5], [0, 0.0, -1, True, None]),
    ("max_tokens", [None, 1, 10**9], [0, -1, 2.0, True]),
    ("min_tokens", [0, 16], [-1, 0.0, True, None, 17]),
    ("logprobs", [None, 0, 20, -1], [-2, 1.0, True]),
    ("prompt_logprobs", [None, 0, 20, -1], [-2, 1.0, True]),
    ("truncate_prompt_tokens", [None, 1, 10**9, -1], [0, -2, 1.0, True]),
]
SWITCHES = ["ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize"]


@pytest.mark.parametrize(("name", "good", "bad"), FIELDS, ids=[name for name, *_ in FIELDS])
def test_numbers(name, good, bad):
    for value in good:
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in bad + NUMBERS:
        with pytest.raises(ValueError, match=f"^{name}=") as error:
            SamplingParams(**{name: value})
        assert str(error.value).startswith(f"{name}={value!r}: must be ")


@pytest.mark.parametrize("name", SWITCHES)
def test_switches(name):
    for value in (True, False, np.True_, torch.tensor(False)):
        assert getattr(SamplingParams(**{name: value}), name) is bool(value)
    for value in (1, 0, None, "yes", 0.0, *NUMBERS[3:]):
        with pytest.raises(ValueError, match=f"^{name}=") as error:
            SamplingParams(**{name: value})
        assert ": must be True or False" in str(error.value)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor(3, dtype=torch.int16)])
def test_integers_of_other_libraries_are_kept_as_pythons(value):
    names = ("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens")
    params = SamplingParams(temperature=value, **dict.fromkeys(names, value), logit_bias={value: value})
    assert [(type(got), got) for got in (getattr(params, name) for name in names)] == [(int, 3)] * len(names)
    assert params.temperature == 3 and params.logit_bias == {3: 3.0}
    assert BeamSearchParams(value, value, n=value).n == 3
    json.dumps({**asdict(params), "output_kind": None})
    for wrong in (value * 1.0, value == 3, [value]):
        with pytest.raises(ValueError, match="^n="):
            SamplingParams(n=wrong)


@pytest.mark.parametrize("value", [0.5, np.float64(0.5), np.float16(0.5), torch.tensor(0.5)])
def test_floats_of_other_libraries_are_kept_as_pythons(value):
    params = SamplingParams(temperature=value, top_p=value, presence_penalty=value, logit_bias={1: value})
    assert [type(got) for got in (params.temperature, params.top_p, params.presence_penalty)] == [float] * 3
    assert params.temperature == params.logit_bias[1] == 0.5
    with pytest.raises(ValueError, match=r"^top_k=.*0\.5.*: must be an integer >= 1, or 0 or -1"):
        SamplingParams(top_k=value)


def test_seed():
    assert [SamplingParams(seed=seed).seed for seed in (None, 0, 2**80, -7, -1)] == [None, 0, 2**80, -7, None]
    for bad in (1.0, True, "x", math.nan, [1], b"1"):
        with pytest.raises(ValueError, match=r"^seed=.*: must be None or an integer \(-1: like None\)$"):
            SamplingParams(seed=bad)


LISTS = [  # what is given, and what is kept
    ([5, 0, 7], (5, 0, 7)), ((7,), (7,)), (range(3), (0, 1, 2)), ({4}, (4,)), ({1: 0, 2: 0}.keys(), (1, 2)),
    (np.array([3, 4]), (3, 4)), (torch.tensor([3, 4]), (3, 4)), ([np.int32(2), torch.tensor(1)], (2, 1)),
]  # fmt: skip


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids"])
def test_token_ids(name):
    for given, kept in [*LISTS, (None, None)]:
        assert getattr(SamplingParams(**{name: given}), name) == kept
    for bad in ([-1], ["a"], [True], [1.0], [None], [[1]], 5, "5", b"5", {1: 2}, [1, math.nan], np.array([0.5]), 1.5):
        with pytest.raises(ValueError, match=f"^{name}=") as error:
            SamplingParams(**{name: bad})
        assert ": must be None or a list of integers >= 0" in str(error.value)
    assert getattr(SamplingParams(**{name: (i for i in (1, 2))}), name) == (1, 2)
    assert SamplingParams(stop_token_ids=[]).stop_token_ids == ()
    with pytest.raises(ValueError, match=r"^allowed_token_ids=\[\]: must be None or a list of .* not empty"):
        SamplingParams(allowed_token_ids=[])


@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_lists_of_strings(name):
    good = [("a", ("a",)), ([], ()), (["a", "bc"], ("a", "bc")), (("x",), ("x",)), ([np.str_("y")], ("y",))]
    for given, kept in [*good, (None, None)]:
        params = SamplingParams(**{name: given})
        assert getattr(params, name) == kept and params.stop_strings == (params.stop or ())
    for bad in ("", ["a", ""], 3, [3], {"a": 1}, [None], b"a", [b"a"], [["a"]], True, np.array([1])):
        with pytest.raises(ValueError, match=f"^{name}=") as error:
            SamplingParams(**{name: bad})
        assert "strings, none empty" in str(error.value)


def test_logit_bias():
    def kept(bias):
        return SamplingParams(logit_bias=bias).logit_bias

    assert kept(None) is None and kept({}) == {}
    assert kept({3: 1, 4: -0.5}) == {3: 1.0, 4: -0.5}
    assert kept({1: 1000, 2: -101, 3: math.inf, 4: -math.inf}) == {1: 100.0, 2: -100.0, 3: 100.0, 4: -100.0}
    assert kept({"50256": -100}) == {50256: -100.0}  # JSON's keys
    keys = [{-1: 1}, {"-1": 1}, {"a": 1}, {1.0: 1}, {True: 1}, {None: 1}]
    for bad in (5, "5", [1], [(1, 2)], *keys, {1: "1"}, {1: None}, {1: True}, {1: math.nan}, {1: [1]}):
        with pytest.raises(ValueError, match="^logit_bias=.*: must be None or a dict"):
            SamplingParams(logit_bias=bad)


def test_output_kind():
    assert SamplingParams(output_kind=RequestOutputKind.DELTA).output_kind is RequestOutputKind.DELTA
    for bad in (None, 1, "DELTA", True):
        with pytest.raises(ValueError, match="^output_kind=.*: must be a RequestOutputKind: CUMULATIVE, DELTA, FINAL"):
            SamplingParams(output_kind=bad)


def test_values_that_do_not_go_together():
    with pytest.raises(ValueError, match="min_tokens=5: must be <= max_tokens=4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    assert SamplingParams(min_tokens=5000, max_tokens=None).min_tokens == 5000
    with pytest.raises(ValueError, match="n must be 1 when using greedy sampling"):
        SamplingParams(n=2, temperature=0)
    with pytest.raises(ValueError, match=r"^stop=\('x',\): needs text, so detokenize must be True"):
        SamplingParams(stop="x", detokenize=False)
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)


def test_what_is_given_may_change_later():
    lists = dict(stop=["a"], stop_token_ids=[1], bad_words=["b"], allowed_token_ids=[2], logit_bias={3: 1})
    params, same = SamplingParams(**lists), SamplingParams(**copy.deepcopy(lists))
    for one in lists.values():
        one.clear()
    assert params == same and params.stop == ("a",) and params.logit_bias == {3: 1.0}
    beams, ids = BeamSearchParams(2, stop_token_ids=(ids := [1])), ids
    ids.append(2)
    assert beams.stop_token_ids == (1,)


def test_they_can_be_copied_compared_pickled_and_hashed():
    params = SamplingParams(n=2, stop=["a"], logit_bias={3: 1}, seed=5)
    for other in (copy.deepcopy(params), pickle.loads(pickle.dumps(params)), replace(params), replace(params, n=2)):
        assert other == params and hash(other) == hash(params)
    assert replace(params, seed=6) != params


def test_what_an_engine_checks():
    SamplingParams(stop_token_ids=[9], logit_bias={9: 1}, allowed_token_ids=[0, 9], logprobs=20).check(10, 20)
    for name, bad in (("stop_token_ids", [3, 10]), ("logit_bias", {10: 1}), ("allowed_token_ids", [10])):
        with pytest.raises(ValueError, match=f"^token id 10 in {name}: must be an integer from 0 to 9$"):
            SamplingParams(**{name: bad}).check(10)
    with pytest.raises(ValueError, match="^token id 10 in stop_token_ids"):
        BeamSearchParams(2, stop_token_ids=[10]).check(10, 20)
    for name in ("logprobs", "prompt_logprobs"):
        for asked in (None, 0, 20):
            SamplingParams(**{name: asked}).check(100, 20)
        for asked in (21, -1, 10**9):
            SamplingParams(**{name: asked}).check(100, -1)
            with pytest.raises(ValueError, match=f"^{name}={asked}.*: must be at most max_logprobs=20"):
                SamplingParams(**{name: asked}).check(100, 20)
        SamplingParams(**{name: -1}).check(20, 20)  # all are no more


BEAM_FIELDS = [
    ("beam_width", [1, 500], [0, -1, 2.0, True, None]),
    ("max_tokens", [None, 1, 10**9], [0, -1, 2.0, True]),
    ("length_penalty", [-10, 10, 0.5, 0], [10.1, -10.1, True, None]),
    ("n", [None, 1, 4], [0, 5, 2.0, True]),
    ("early_stopping", [True, False, "never"], [1, 0, None, "always"]),
    ("ignore_eos", [True, False], [1, 0, None]),
    ("skip_special_tokens", [True, False], [1, 0, None]),
]


@pytest.mark.parametrize(("name", "good", "bad"), BEAM_FIELDS, ids=[name for name, *_ in BEAM_FIELDS])
def test_beam_search(name, good, bad):
    for value in good:
        kept = getattr(BeamSearchParams(**{"beam_width": 4, name: value}), name)
        assert kept == value and type(kept) is type(value)
    for value in bad + NUMBERS:
        with pytest.raises(ValueError, match=f"^{name}=") as error:
            BeamSearchParams(**{"beam_width": 4, name: value})
        assert str(error.value).startswith(f"{name}={value!r}: must be ")


@pytest.mark.parametrize("module", [sampling_params, beam_search_params, checks])
def test_the_examples_in_the_docstrings(module):
    found = doctest.testmod(module)
    assert found.failed == 0 and found.attempted > 0
