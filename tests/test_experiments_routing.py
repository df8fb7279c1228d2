"""Routing in the simulation: the trace, the caches, a queue with a known answer, the policies' order, the figure."""

import json
import random
import re
import sys
from dataclasses import replace

import pytest

from minipaged.experiments import __main__ as command
from minipaged.experiments import routing
from minipaged.experiments.hardware import PCIE, SERVERS
from minipaged.experiments.loads import TraceError
from minipaged.experiments.machine import Machine
from minipaged.experiments.policies import POLICIES, HeapedLeastLoaded, HeapedPrefixAffinity
from minipaged.experiments.routing import Blocks, Case, Prompt, Replica, read_blocks, run, scaled
from minipaged.experiments.study import Settings, Study
from minipaged.routing.policies import LeastLoaded, PrefixAffinity

figure = sys.modules["minipaged.experiments.figures.routing"]  # the package's own name is the function
MACHINE = Machine(SERVERS["llama"], step=0.0, host=0.0)
LINE = '{"timestamp": 3000, "input_length": 700, "output_length": 20, "hash_ids": [0, 1]}\n'


def conversations(count, turns, seed=0, gap=20.0):
    """Each turn begins with all of the one before; block 0 is in all. Sorted by time."""
    rng, prompts, number = random.Random(seed), [], 1
    for _ in range(count):
        when, blocks = rng.uniform(0, 300), [0]
        for _ in range(turns):
            blocks = [*blocks, *range(number, number + 4)]
            number += 4
            prompts.append(Prompt(when, 512 * len(blocks), 50, tuple(blocks)))
            when += rng.expovariate(1 / gap)
    return sorted(prompts)


# --- the trace ------------------------------------------------------------------------------------------------------


def test_a_trace_is_read(tmp_path):
    (tmp_path / "t.jsonl").write_text(LINE + "\n" + LINE.replace("3000", "4500").replace("[0, 1]", "[0, 7]"))
    assert read_blocks(tmp_path / "t.jsonl") == [Prompt(3.0, 700, 20, (0, 1)), Prompt(4.5, 700, 20, (0, 7))]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no requests, or all at once"),
        (LINE.replace("3000", "0"), "no requests, or all at once"),
        (LINE + "{", "line 2: Expecting property name"),
        (LINE + "[" * 100_000, "line 2"),
        (LINE + '{"timestamp": 1}', 'line 2: an object such as {"timestamp": 3000'),
        (LINE + LINE.replace("3000", "2999"), "line 2: timestamps must not fall"),
        (LINE.replace("3000", "-1"), "line 1: timestamp must be a number of milliseconds, not -1"),
        (LINE.replace("3000", "NaN"), "line 1: timestamp must be a number of milliseconds, not NaN"),
        (LINE.replace("20", "0"), "line 1: output_length must be a number of tokens from 1 on, not 0"),
        (LINE.replace("700", "true"), "line 1: input_length must be a number of tokens from 1 on, not true"),
        (LINE.replace("[0, 1]", "[0]"), "line 1: hash_ids must be 2 numbers, one for each 512 tokens of 700"),
        (LINE.replace("[0, 1]", '[0, "1"]'), "line 1: hash_ids must be 2 numbers"),
        ("\udcff", "is no text"),
    ],
)
def test_a_bad_trace_is_named_by_its_line(content, words, tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(TraceError, match=re.escape(words)):
        read_blocks(path)
    with pytest.raises(SystemExit) as end:
        command.main(["routing", "--trace", str(path), "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert end.value.code == 2 and words in said.err and not said.out and not (tmp_path / "out").exists()


def test_a_trace_that_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["routing", "--trace", str(tmp_path / "none.jsonl")])
    assert end.value.code == 2 and "none.jsonl" in capsys.readouterr().err


def test_more_replicas_get_more_copies_and_each_has_its_own_people():
    trace = conversations(200, 3)
    length = trace[-1].when + routing.TICK
    for replicas in (1, 3, 40):
        case = Case("prefix", replicas, rate=2.0, warm=100.0, counted=100.0)
        found = list(scaled(trace, case))
        assert [one.when for one in found] == sorted(one.when for one in found)
        assert all(0 <= one.when < 200 for one in found)
        assert len(found) == pytest.approx(2.0 * replicas * 200, rel=0.35)
        assert found == list(scaled(trace, case)) != list(scaled(trace, replace(case, seed=1)))
    copies = 2.0 * 40 * length / len(trace)
    own, size = {}, 1 + max(max(one.blocks) for one in trace)
    for one in found:
        assert one.blocks[0] == 0 and 0 not in one.blocks[1:]  # all have it in common
        (copy,) = {block // size for block in one.blocks[1:]}
        own.setdefault(copy, set()).update(one.blocks)
    assert len(own) == -(-copies // 1)
    texts = {one.blocks[1:]: one for one in trace}
    assert all(tuple(block % size for block in one.blocks[1:]) in texts for one in found)


def test_of_the_last_copy_whole_conversations_are_there():
    trace = conversations(200, 3, gap=1.0)
    found = list(scaled(trace, Case("prefix", 1, rate=len(trace) / 600, warm=150, counted=200)))
    by_start = {}
    for one in found:
        by_start.setdefault(one.blocks[1], []).append(one)
    assert 40 < len(by_start) < 160 and sum(len(turns) == 3 for turns in by_start.values()) > 0.9 * len(by_start)


def test_a_fixed_load_is_the_trace_and_bursts_are_the_same_requests():
    trace = conversations(50, 2)
    case = Case("prefix", 7, fixed=True, warm=0.0, counted=1e4)
    found = list(scaled(trace, case))
    when = {one.blocks: one.when for one in trace}
    assert len(found) == len(trace) and {one.blocks for one in found} == when.keys()
    assert all(0 <= one.when - when[one.blocks] < routing.TICK for one in found)
    burst = list(scaled(trace, replace(case, burst=0.25)))
    assert [one.blocks for one in burst] == [one.blocks for one in found]
    assert all(one.when % 60 <= 15 and one.when // 60 == old.when // 60 for one, old in zip(burst, found, strict=True))


# --- a replica ------------------------------------------------------------------------------------------------------


def test_blocks_against_a_list():
    rng, cache, naive = random.Random(2), Blocks(12), []  # naive: the most recently used first
    for _ in range(3000):
        start = rng.randrange(4)
        blocks = [100 * start + i for i in range(rng.randint(1, 6))]
        wanted = next((i for i, block in enumerate(blocks) if block not in naive), len(blocks))
        naive = (blocks + [block for block in naive if block not in blocks])[:12]
        assert cache.use(blocks) == wanted


def test_a_prompt_longer_than_the_memory_leaves_its_beginning():
    cache = Blocks(3)
    assert [cache.use([1, 2, 3, 4, 5]), cache.use([1, 2, 3, 4, 5]), cache.use([9, 1])] == [0, 3, 0]


def test_a_queue_with_a_known_answer():
    """Four prompts: one alone; one that waits for it; one that is found; one beside two answers."""
    server, peak = MACHINE.server, 0.6 * 989e12
    read = server.context_seconds(16)

    def seconds(tokens, found=0, batch=0, context=0):
        fresh = tokens - found
        steps = -(-fresh // 2048)
        products = max(fresh * 16.1e9 / peak, steps * 16.1e9 / (0.67 * 3350e9))
        pairs = (tokens**2 - found**2) / 2 * 4 * 32 * 32 * 128 / peak
        return found * server.kv_bytes / PCIE + steps * (batch * 16.1e9 / peak + context * read) + products + pairs

    replica = Replica(MACHINE, Blocks(100))
    one = replica.answer(Prompt(1.0, 5000, 2000, tuple(range(10))))
    assert one[:3] == (0, 1.0, pytest.approx(1.0 + seconds(5000)))
    step = 16.1e9 / (0.67 * 3350e9) + (5000 + 2000) * read
    assert one[3] == pytest.approx(one[2] + 1999 * step)
    two = replica.answer(Prompt(1.0, 512, 1, (50,)))
    assert two[:3] == (0, one[2], pytest.approx(one[2] + seconds(512, 0, 1, 7000))) and two[3] == two[2]
    three = replica.answer(Prompt(2.0, 1500, 1000, (0, 1, 77)))
    assert three[:3] == (1024, 2.0, pytest.approx(2.0 + seconds(1500, 1024, 1, 7000)))
    four = replica.answer(Prompt(2.5, 512, 10, (50,)))
    assert four[:3] == (511, 2.5, pytest.approx(2.5 + seconds(512, 511, 2, 9500)))
    five = replica.answer(Prompt(1000.0, 100, 10, (99,)))
    assert five[:3] == (0, 1000.0, pytest.approx(1000.0 + seconds(100)))  # all answers are over


# --- many -----------------------------------------------------------------------------------------------------------


def hand_made(policy, replicas=2, **options):
    """Two conversations of four turns, strictly in turns, far apart in time."""
    blocks = {"a": (0, 1, 2, 3), "b": (0, 11, 12, 13)}
    trace = [Prompt(100.0 * i, 512 * (1 + i // 2), 5, blocks["ab"[i % 2]][: 1 + i // 2]) for i in range(8)]
    case = Case(policy, replicas, fixed=True, warm=0.0, counted=1e4, **options)
    return run(case, trace, MACHINE)


def test_what_is_found_of_a_trace_made_by_hand():
    """Tokens: 2 x (512 + ... + 2048) = 10,240. Who stays finds all but the new block of each turn, and one token of a
    prompt that is there whole: block 0 alone, the second time."""
    new = 7 * 512 + 1
    assert hand_made("shared").found == pytest.approx(1 - new / 10240)
    assert hand_made("prefix").found == pytest.approx(1 - new / 10240, abs=0.06)
    alone = hand_made("round_robin", 8)
    assert alone.found == 0 and alone.requests == 8
    assert hand_made("round_robin", 2).found == pytest.approx(1 - 8 * 512 / 10240)  # by chance each has its own
    assert hand_made("round_robin", 3).found < hand_made("prefix", 3).found


def test_the_order_of_the_policies():
    """Long conversations on eight replicas: who looks at the prompt finds more, and nobody more than there is."""
    trace = conversations(400, 6)
    answers = {policy: run(Case(policy, 8, rate=1.0, warm=60, counted=200), trace) for policy in POLICIES}
    found = {policy: answer.found for policy, answer in answers.items()}
    assert found["shared"] >= found["prefix"] > 0.6 * found["shared"]
    assert min(found["prefix"], found["consistent_hash"]) > 1.5 * max(found["round_robin"], found["least_loaded"])
    assert all(answer.balance >= 1 and answer.p50 <= answer.p99 and 0 < answer.busy < 1 for answer in answers.values())
    assert len({answer.requests for answer in answers.values()}) == 1
    small = run(Case("prefix", 8, pool="gpu", warm=60, counted=200), conversations(400, 6, gap=120))
    assert small.found <= run(Case("prefix", 8, warm=60, counted=200), conversations(400, 6, gap=120)).found


def test_a_hash_of_what_all_have_in_common_sends_all_to_one():
    trace = conversations(300, 4)
    one, two = (run(Case("consistent_hash", 8, beginning=n, warm=60, counted=200), trace) for n in (1, 2))
    assert two.found > one.found and one.p50 > two.p50


@pytest.mark.parametrize(
    ("fast", "plain"), [(HeapedLeastLoaded(), LeastLoaded()), (HeapedPrefixAffinity(9), PrefixAffinity(9))],
    ids=["least_loaded", "prefix"],
)  # fmt: skip
def test_the_heap_chooses_what_the_plain_policy_chooses(fast, plain):
    rng, under_way = random.Random(4), []
    for step in range(3000):
        if step % 300 == 0:
            for policy in (fast, plain):
                policy.add(str(step // 300))
        if step % 700 == 699:
            for policy in (fast, plain):
                policy.remove(str(step // 700))
        if under_way and rng.random() < 0.45:
            replica, load = under_way.pop(rng.randrange(len(under_way)))
            for policy in (fast, plain):
                policy.end(replica, load)
        pieces, load = [0, rng.randrange(5), rng.randrange(3)], rng.choice((1, 1, 0.3, 2.5))
        without = {plain.choose(pieces, load)} if rng.random() < 0.1 else ()
        replica = plain.choose(pieces, load, without)
        assert fast.choose(pieces, load, without) == replica
        if replica is not None:
            for policy in (fast, plain):
                policy.begin(replica, pieces, load)
            under_way.append((replica, load))


# --- the figure -----------------------------------------------------------------------------------------------------


def test_the_figure_from_what_is_kept(tmp_path):
    with Study(Settings(workers=1)) as study:
        report = figure.routing(study)
    assert {file.suffix for file in report.write(tmp_path)} == {".txt", ".json", ".png", ".svg"}
    text = report.text()
    assert max(map(len, text.splitlines())) <= 110 and "Made by `python -m minipaged.experiments routing" in text
    assert report.data == json.loads(figure.KEPT.read_text()) and figure.KEPT.stat().st_size < 200_000


def test_the_figure_of_a_trace(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figure, "SIZES", (1, 3))
    monkeypatch.setattr(figure, "MIDDLE", 3)
    monkeypatch.setattr(figure, "REQUESTS", 3)
    lines = [{"timestamp": 1e3 * one.when, "input_length": one.tokens, "output_length": one.output,
              "hash_ids": one.blocks} for one in conversations(150, 3)]  # fmt: skip
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.chdir(tmp_path)
    flags = ["routing", "--trace", "mine.jsonl", "--quick", "--no-cache", "--jobs", "1"]
    assert command.main(flags) == 0
    text = capsys.readouterr().out
    assert "routing --trace mine.jsonl --quick` (450 requests" in " ".join(text.split()) and "nan" not in text
    assert json.loads((tmp_path / "results" / "routing.json").read_text())["rows"]["3"]["prefix"]["found"] > 0


def test_which_to_use_is_computed():
    def row(p50, p99):
        return {"found": 0.1, "balance": 1.0, "p50": p50, "p99": p99}

    one = {"round_robin": row(0.1, 9.0), "least_loaded": row(0.5, 5.0), "prefix": row(0.3, 5.4), "shared": row(0, 1)}
    assert figure.best(one) == "prefix"
    assert figure.best(one | {"prefix": row(0.3, 5.6)}) == "least_loaded"
    assert figure.advice({"2": one}).rows == [["2 replicas", "prefix affinity", "10.0", "1.00", "0.30", "5.40"]]
