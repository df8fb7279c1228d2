"""Traces of the recall model's random schedules are what was, step by step: see traced_recall.py."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipaged.viewer.state import apply_patch, merge_patch
from minipaged.viewer.thinning import did_of_both
from minipaged.viewer.words import news_of_both, read_on
from tests import traced_recall

OFTEN = {
    "copies": 100, "swapped_out": 50, "recompute": 20, "forked_samples": 50, "forked_beams": 200, "evicted": 500,
    "found": 100, "recovered": 50, "resets": 5, "failed steps": 5, "branches": 50, "right": 200, "ended: cut": 10,
}  # fmt: skip


@pytest.mark.parametrize("chunk", range(2))
def test_random_schedules(chunk):
    seen = Counter()
    for seed in range(100 * chunk, 100 * chunk + 100):
        seen.update(traced_recall.run(seed))
    assert {name: seen[name] for name, least in OFTEN.items() if seen[name] < least} == {}


def test_engines_that_give_blocks_to_each_other():
    seen = Counter()
    for seed in range(30):
        seen.update(traced_recall.run_transfers(seed))
    assert seen["num_loads"] > 10 and seen["num_exports"] > 20 and seen["num_failed_loads"] > 1


# --- patches ----------------------------------------------------------------------------------------------------

leaves = st.integers(0, 3) | st.booleans() | st.text("ab", max_size=2) | st.lists(st.integers(0, 3), max_size=3)
states = st.recursive(
    st.dictionaries(st.sampled_from("abcd"), leaves, max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), leaves | inner, max_size=3),
)


@given(states, states)
def test_a_patch_makes_the_new_state_out_of_the_old_one(old, new):
    before = repr(old)
    made = apply_patch(old, merge_patch(old, new))
    assert made == new and repr(made).count("True") == repr(new).count("True") and repr(old) == before
    assert merge_patch(new, new) == {}


# --- several steps as one ---------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.integers(0, 10**9), st.integers(1, 9))
def test_what_is_new_in_several_steps_is_what_all_of_them_told(seed, number):
    """Names come, go on with what others had, and begin anew."""
    rng = random.Random(seed)
    words = {name: [rng.choice("xyz") for _ in range(rng.randint(0, 4))] for name in "AB"}
    before, whole = words, {}
    for _ in range(number):
        news = {}
        for name in rng.sample("ABCD", rng.randint(0, 4)):
            source = rng.choice([*words, name])
            new = {"keep": rng.randint(0, len(words.get(source, ()))), "add": rng.choices("uvw", k=rng.randint(0, 3))}
            news[name] = new if source == name else {"from": source, **new}
        words, whole = read_on(words, news), news_of_both(whole, news)
    assert read_on(before, whole) == words


def test_what_several_steps_did():
    one = {
        "computed": {"A": [0, 8, 0], "B": [4, 1, 3]}, "admitted": ["A"], "found": {"B": 4}, "preempted": {"C": "swap"},
        "copies": [[1, 2]], "guessed": {"B": [3, 1, 2]}, "freed": [5],
    }  # fmt: skip
    two = {
        "computed": {"A": [8, 1, 0], "D": [0, 2, 0]}, "admitted": ["D"], "found": {"B": 2, "D": 1}, "freed": [5],
        "preempted": {"C": "recompute"}, "copies": [[2, 3]], "guessed": {"B": [2, 2, 0]}, "finished": {"A": "stop"},
    }  # fmt: skip
    assert did_of_both(one, two) == {
        "computed": {"A": [0, 9, 0], "B": [4, 1, 3], "D": [0, 2, 0]}, "admitted": ["A", "D"], "found": {"B": 6, "D": 1},
        "preempted": {"C": "recompute"}, "copies": [[1, 2], [2, 3]], "guessed": {"B": [5, 3, 2]}, "freed": [5, 5],
        "finished": {"A": "stop"},
    }  # fmt: skip
    assert did_of_both({}, two) == two and did_of_both(one, {}) == one
