"""The four policies, against what they promise: by examples, by oracles, and by thousands of random lives."""

import random
import statistics
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.routing.forwarded import load_of
from minipaged.routing.policies import (
    POLICIES,
    ConsistentHash,
    LeastLoaded,
    PrefixAffinity,
    RoundRobin,
    cut,
    make_policy,
)

NAMES = "abcde"


def started(policy, names=NAMES):
    for name in names:
        policy.add(name)
    return policy


def send(policy, pieces, **options):
    replica = policy.choose(pieces, **options)
    policy.begin(replica, pieces)
    return replica


@pytest.mark.parametrize("name", POLICIES)
def test_a_wish_without_measure_is_a_load_that_can_be_compared(name):
    policy = started(make_policy(name), "ab")
    load = load_of({"prompt": "a", "n": 10**400})
    for replica in "ab":
        policy.begin(replica, [1], load)
    assert policy.choose([1], load) in ("a", "b")
    assert load_of({"prompt": ["a", "b"], "n": 3}) == 6


def test_an_unknown_policy_is_refused_by_name():
    with pytest.raises(ValueError, match=r"policy='fair': must be one of round_robin, least_loaded, prefix"):
        make_policy("fair")


def test_a_text_is_cut_into_whole_pieces():
    assert cut("x" * 130) == ["x" * 64, "x" * 64]
    assert cut("short") == []


def test_round_robin_takes_turns_and_passes_over_who_is_gone():
    policy = started(RoundRobin(), "abc")
    assert [send(policy, []) for _ in range(6)] == list("abcabc")
    policy.remove("b")
    assert [send(policy, []) for _ in range(4)] == list("acac")
    policy.add("b")
    assert send(policy, []) == "b"


def test_the_least_loaded_gets_it_and_equals_take_turns():
    policy = started(LeastLoaded(), "abc")
    assert [send(policy, []) for _ in range(3)] == list("abc")
    policy.end("b")
    assert send(policy, []) == "b"
    policy.begin("a", [], 10)
    assert [send(policy, []) for _ in range(4)] == list("cbcb")


@pytest.mark.parametrize("name", POLICIES)
@given(steps=st.lists(st.tuples(st.sampled_from(["send", "end", "add", "remove"]), st.integers(0, 9)), max_size=60))
def test_only_who_lives_is_chosen_and_loads_add_up(name, steps):
    policy, live, open_ = make_policy(name), set(), []
    for what, number in steps:
        replica = NAMES[number % 5]
        if what == "add":
            policy.add(replica), live.add(replica)
        elif what == "remove":
            policy.remove(replica), live.discard(replica)
        elif what == "end" and open_:
            policy.end(*open_.pop(number % len(open_)))
        elif what == "send":
            pieces, tried = list(range(number)), set(NAMES[: number % 3])
            chosen = policy.choose(pieces, number, tried)
            assert (chosen is None) == (not live - tried)
            if chosen is not None:
                assert chosen in live - tried
                policy.begin(chosen, pieces, number)
                open_.append((chosen, number))
        for replica in NAMES:
            assert policy.load.get(replica, 0) == sum(load for one, load in open_ if one == replica)
        assert set(policy.live) == live
        assert set(policy.load) <= live | {replica for replica, _ in open_}


# --- prefix affinity --------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=40), st.randoms(use_true_random=False))
def test_prefix_affinity_finds_what_a_dict_of_whole_beginnings_says(requests, rng):
    policy = started(PrefixAffinity(absolute=1e9))
    had = {name: set() for name in NAMES}
    for pieces in requests:
        def length(name, pieces=pieces):
            return max((n for n in range(1, len(pieces) + 1) if tuple(pieces[:n]) in had[name]), default=0)

        chosen = policy.choose(pieces)
        longest = max(map(length, NAMES))
        assert length(chosen) == longest
        alike = [name for name in NAMES if length(name) == longest]
        assert policy.load[chosen] == min(policy.load[name] for name in alike), "of equals, the least busy one"
        if rng.random() < 0.2:
            chosen = rng.choice(NAMES)
        found = length(chosen)
        before = policy.found
        policy.begin(chosen, pieces)
        assert policy.found - before == found
        had[chosen] |= {tuple(pieces[:n]) for n in range(1, len(pieces) + 1)}
        if rng.random() < 0.1:
            policy.remove(chosen), policy.add(chosen)
            had[chosen].clear()


def test_who_is_too_busy_does_not_get_what_it_has():
    policy = started(PrefixAffinity(absolute=3, relative=2), "ab")
    first = send(policy, [1, 2])
    other = "b" if first == "a" else "a"
    assert [send(policy, [1, 2]) for _ in range(3)] == [first] * 3  # 3 more than the other one, then 4
    assert send(policy, [1, 2]) == other
    for _ in range(20):  # both are busy, and twice as much is not yet too much
        policy.begin("a", [9]), policy.begin("b", [9])
    for _ in range(3):
        policy.begin(first, [5])
    assert policy.load[first] > policy.load[other] + 3
    assert send(policy, [5]) == first


def test_a_replica_s_memory_is_as_large_as_is_said_and_ends_go_before_beginnings():
    policy = started(PrefixAffinity(capacity=4), "ab")
    policy.begin("a", [1, 2, 3])
    policy.begin("a", [1, 2, 4, 5])  # 5 pieces: 3 goes, which was used before the beginning was
    assert len(policy._held["a"]) == 4
    queried, found = policy.queried, policy.found
    policy.begin("a", [1, 2, 3])
    assert (policy.queried - queried, policy.found - found) == (3, 2)
    policy.begin("b", [1, 2, 3, 4, 5, 6])  # longer than its memory: the beginning stays
    found = policy.found
    policy.begin("b", [1, 2, 3, 4])
    assert policy.found - found == 4
    policy.remove("a"), policy.remove("b")
    assert policy._holders == {}


# --- the ring ---------------------------------------------------------------------------------------------------------


def homes(policy, keys=400):
    return {key: policy.choose([key]) for key in range(keys)}


@given(st.sampled_from(range(1, 20)), st.integers(0, 19))
def test_who_leaves_or_comes_moves_its_own_share_only(count, gone):
    names = [f"replica {i}" for i in range(count + 1)]
    policy = started(ConsistentHash(points=16), names)
    before = homes(policy, 100)
    leaver = names[gone % len(names)]
    policy.remove(leaver)
    after = homes(policy, 100)
    assert {key for key in before if before[key] != after[key]} == {key for key in before if before[key] == leaver}
    policy.add(leaver)
    assert homes(policy, 100) == before


def test_shares_of_the_ring_are_alike_and_the_same_in_every_process():
    policy = started(ConsistentHash(), [f"replica {i}" for i in range(10)])
    shares = list(homes(policy, 5000).values())
    assert all(300 < shares.count(name) < 750 for name in policy.live)
    assert [policy.choose([key]) for key in ("a", "b", "c")] == ["replica 2", "replica 8", "replica 0"]
    assert policy.choose([*range(8), "this"]) == policy.choose([*range(8), "that"]), "the beginning counts"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=80))
def test_nobody_has_much_more_to_do_than_the_mean(requests):
    policy = started(ConsistentHash(bound=1.25))
    for key, load in requests:
        replica = policy.choose([key], load)
        policy.begin(replica, [key], load)
        assert policy.load[replica] - load < 1.25 * sum(policy.load.values()) / len(NAMES)


# --- many -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_a_thousand_replicas_cost_no_more_than_a_look_at_each(name):
    """Long prompts that all have the same beginning: the cost is their length and the number of replicas, in sum."""
    policy, rng, times = started(make_policy(name), [f"replica {i}" for i in range(1000)]), random.Random(0), []
    for number in range(400):
        pieces = [*range(200), *(rng.random() for _ in range(200))]
        began = time.perf_counter()
        replica = policy.choose(pieces)
        policy.begin(replica, pieces)
        times.append(time.perf_counter() - began)
        if number % 3:
            policy.end(replica)
    assert statistics.median(times) < 0.01  # a look at each piece of each replica would take 20 times as long
