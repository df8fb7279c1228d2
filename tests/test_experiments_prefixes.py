"""What prefix caches find on a trace that names beginnings by numbers."""

import json
import random
import subprocess
import sys

import pytest

from minipaged.experiments import prefixes
from minipaged.experiments.loads import TraceError
from minipaged.experiments.prefixes import CACHES, CAPACITIES, Asked, asked, replay, summarize
from minipaged.experiments.routing import Blocks
from minipaged.experiments.traces import LEVELS

# Two chats behind one beginning, and somebody else who has only that. 512 tokens a number; the last one may be partial.
ROWS = [
    (0, 1100, [0, 1, 2]), (9, 1536, [0, 5, 6]), (900, 2048, [0, 1, 3, 4]),
    (1000, 600, [0, 7]), (2000, 2049, [0, 1, 3, 4, 8]), (3000, 1536, [0, 5, 6]),
]  # fmt: skip
PROMPTS = [
    Asked((0, 1), 2), Asked((0, 5, 6), 2), Asked((0, 1, 3, 4), 3),
    Asked((0,), 1), Asked((0, 1, 3, 4), 4), Asked((0, 5, 6), 2),
]  # fmt: skip


def write(tmp_path, rows=ROWS):
    path = tmp_path / "small.jsonl"
    keys = "timestamp", "input_length", "hash_ids"
    lines = [json.dumps(dict(zip(keys, row, strict=True)) | {"output_length": 1}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def drawn(seed, count=300):
    """Chats of random numbers."""
    rng, chats, rows = random.Random(seed), [(0,)], []
    for _ in range(count):
        begin = rng.choice(chats[-20:])
        cut = begin[: rng.randint(1, len(begin))]
        new = tuple(len(rows) * 10 + i + 1 for i in range(rng.randint(1, 5)))
        chats.append((*cut, *new))
        rows.append(Asked(chats[-1], len(chats[-1]) - rng.randint(0, 1)))
    return rows


def test_only_full_blocks_count_and_the_last_token_is_computed(tmp_path):
    assert asked(write(tmp_path)) == PROMPTS


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("seed", range(5))
def test_a_replay_finds_what_a_list_of_last_uses_has(cache, seed):
    for capacity in (25, 40, 100, 1000):
        rows, plain, found = drawn(seed), Blocks(capacity), 0
        longest = max(len(one.blocks) for one in rows)
        assert longest <= 1000
        for one in rows:
            if len(one.blocks) <= capacity:
                found += min(plain.use(one.blocks), one.may_find)
        assert replay(rows, capacity, cache) == found > 0


def test_who_has_the_longest_beginning_comes_first():
    chats = [Asked((0, i % 4, 10 + i), 3) for i in range(40)]
    assert replay(chats, 4) == 39 and replay(chats, 4, queue=40) == 39 + 36
    assert replay(chats, 2) == 0, "who is larger than the pool is not served"


def test_the_summary_of_a_small_trace(tmp_path):
    told = summarize(PROMPTS)
    assert (told.requests, told.blocks, told.different, told.runs) == (6, 17, 6, 3)
    assert told.ideal == round((0 + 1 + 2 + 1 + 4 + 2) / 17, 5)
    assert told.found == dict.fromkeys(CACHES, [told.ideal] * len(CAPACITIES))
    assert told.goes_on == round(3 / 6, 4) and len(told.back) == len(LEVELS)
    assert (told.back[0], told.back[-1], told.kept[0], told.new[-1], told.fresh[-1]) == (2, 4, 100, 2, 3)
    with pytest.raises(TraceError, match="no two requests begin alike"):
        summarize([Asked((0, i), 2) for i in range(1, 4)])


def test_a_drawn_trace_is_like_its_model():
    first = summarize(prefixes.known()["mooncake"].draw(150))
    again = summarize(first.draw(150, seed=1))
    assert again.goes_on == pytest.approx(first.goes_on, abs=0.15)
    assert again.ideal == pytest.approx(first.ideal, abs=0.15) and 0.02 < first.ideal < 0.5
    assert first.draw(50) == first.draw(50) != first.draw(50, seed=1)


def test_the_command(tmp_path):
    path = write(tmp_path)
    command = [sys.executable, "-m", "minipaged.experiments.prefixes", str(path), str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0] == lines[1] and prefixes.Summary(**json.loads(lines[0])) == summarize(PROMPTS)


@pytest.mark.parametrize("text", ["", "{}\n", "no JSON\n", json.dumps({"timestamp": 1}) + "\n"])
def test_bad_files_are_named(text, tmp_path, capsys):
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    assert prefixes.main([str(path)]) == 2 and "trace.jsonl" in capsys.readouterr().err
    assert prefixes.main([str(tmp_path / "none")]) == 2 and prefixes.main([]) == 2 and prefixes.main(["--help"]) == 0


def test_what_is_committed_is_small_and_agrees_with_itself():
    assert prefixes.FILE.stat().st_size < 3000
    [told] = json.loads(prefixes.FILE.read_text())["traces"].values()
    assert told["source"] and told["licence"] == "Apache 2.0"
    real = prefixes.known()["mooncake"]
    assert real.found["hash"] == real.found["radix"] == sorted(real.found["hash"])
    assert real.found["hash"][-1] <= real.ideal and real.runs < real.different < real.blocks
    assert all(a <= b + 0.001 for a, b in zip(real.found["hash"], real.in_order, strict=True))
    for row in (real.back, real.kept, real.new, real.fresh):
        assert len(row) == len(LEVELS) and row == sorted(row)


def test_equal_numbers_are_equal_beginnings():
    """What a drawn trace has to keep, or it is none: a number has always the same ones before it."""
    before = {}
    for one in prefixes.known()["mooncake"].draw(2000):
        assert one.may_find == len(one.blocks) > 0
        for at, block in enumerate(one.blocks):
            assert before.setdefault(block, one.blocks[:at]) == one.blocks[:at]
        assert len(set(one.blocks)) == len(one.blocks)
