"""Random schedules on the recall model (see recall.py): 2,000 in the suite, `pytest --schedules 1000000` for more.

A seed that fails prints the command that replays it.
"""

from collections import Counter

import pytest

from minipaged.memory import Appended, KVCacheManager, NoSpace
from minipaged.plan import StepPlan
from minipaged.sequence import Request
from tests import recall
from tests.recall import Run, scenario
from tests.recall_model import RecallRunner

CHUNK = 250  # schedules in one test

# Each chunk shows that everything really happened in it: at least so often.
OFTEN = {
    "copies": 300,
    "swapped_out": 50,
    "swapped_in": 40,
    "swap": 20,
    "resumed": 15,
    "recompute": 40,
    "recompute several": 12,
    "swap space exhausted": 4,
    "again after a preemption": 40,
    "chunks of a prompt": 100,
    "forked_samples": 150,
    "forked_beams": 400,
    "searches": 150,
    "ended: stop": 40,
    "ended: length": 400,
    "ended: cut": 40,
    "aborted waiting": 15,
    "aborted running": 12,
    "aborted swapped": 1,
    "aborted beams": 1,
    "refused": 1000,
    "whole pool used": 50,
}


def pytest_generate_tests(metafunc):
    if "first_seed" in metafunc.fixturenames:
        schedules = metafunc.config.getoption("--schedules")
        metafunc.parametrize("first_seed", range(0, schedules, CHUNK))


def test_random_schedules(first_seed):
    seen: Counter[str] = Counter()
    for seed in range(first_seed, first_seed + CHUNK):
        seen.update(recall.run(seed))
    rare = {name: seen[name] for name, least in OFTEN.items() if seen[name] < least}
    assert not rare, "the schedules do not exercise these"


# ---- the recall model notices what is broken --------------------------------------------------------------------


def forget(name):
    """A runner that leaves out one kind of memory moves."""

    def move(self, plan, original=RecallRunner._move):
        kept = {n: [] if n == name else getattr(plan, n) for n in ("swap_out", "freed", "swap_in", "copies")}
        original(self, StepPlan(plan.step, **kept))

    return RecallRunner, "_move", move


def move_in_the_wrong_order(self, plan):
    for part in (StepPlan(plan.step, freed=plan.freed), StepPlan(plan.step, swap_out=plan.swap_out)):
        RIGHT_MOVE(self, part)
    RIGHT_MOVE(self, StepPlan(plan.step, copies=plan.copies))
    RIGHT_MOVE(self, StepPlan(plan.step, swap_in=plan.swap_in))


def never_copy(self, counts, keep_free=0):
    """Copy-on-write without the copy: writers share."""
    answer = RIGHT_APPEND(self, counts, keep_free)
    if isinstance(answer, NoSpace):
        return answer
    for source, target in answer.copies:
        for table in self._gpu.tables.values():
            if target in table.blocks:
                table.blocks[-1 if table.blocks[-1] == target else table.blocks.index(target)] = source
                self._gpu.allocator.share(source)
                self._gpu.allocator.release(target)
    return Appended([])


def one_slot_further(self, seq_id, start, count):
    table = self._gpu.tables[seq_id]
    return table.slots(start - 1, count) if start else table.slots(start, count)


RIGHT_MOVE, RIGHT_APPEND = RecallRunner._move, KVCacheManager.append
BROKEN = {
    "copies are forgotten": forget("copies"),
    "swapping in is forgotten": forget("swap_in"),
    "swapping out is forgotten": forget("swap_out"),
    "moves in the wrong order": (RecallRunner, "_move", move_in_the_wrong_order),
    "writing without a copy": (KVCacheManager, "append", never_copy),
    "writing one slot before": (KVCacheManager, "slots", one_slot_further),
    "ended sequences keep their memory": (KVCacheManager, "free", lambda self, seq_id: None),
    "the first of several rebuilds all": (Request, "target", lambda self, seq: len(seq)),
    "nobody forks a rebuilt prompt": ("minipaged.scheduler.share_rebuilt_prompt", lambda request, memory: None),
    "the worst case is too small": (Request, "most_blocks", lambda self, size: len(self.prompt_token_ids) // size + 1),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_it_notices_what_is_broken(monkeypatch, broken):
    monkeypatch.setattr(*BROKEN[broken])
    with pytest.raises(Exception) as failure:
        for seed in range(150):
            recall.run(seed)
    assert f"replay it: python -m tests.recall --seed {seed} --verbose" in failure.value.__notes__


def test_replay_prints_every_plan(capsys):
    seen = recall.run(3, verbose=True)
    printed = capsys.readouterr().out
    assert printed.count("step ") == seen["steps"] and printed.count("add r") == len(scenario(3).requests)
    assert Run(scenario(3)).run() == seen  # and it is the same each time
