"""Random schedules on the recall model (see recall.py): 2,000 in the suite, `pytest --schedules 1000000` for more.

A seed that fails prints the command that replays it.
"""

import random
from collections import Counter
from dataclasses import replace

import pytest

from minipaged.memory import Appended, BlockAllocator, KVCacheManager, NoSpace, branching
from minipaged.requests.request import Request
from minipaged.requests.sampling_params import SamplingParams
from minipaged.scheduling.admission import Admission
from minipaged.scheduling.growth import LiveSequences
from minipaged.scheduling.plan import Step, StepPlan
from minipaged.scheduling.scheduler import Scheduler
from minipaged.scheduling.speculation import Speculation
from tests import recall, recall_model
from tests.recall import Run, Scenario, scenario
from tests.recall_model import END, RecallRunner

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
    "found": 400,  # tokens
    "recovered": 150,  # tokens, after a preemption
    "evicted": 1000,
    "computed twice": 30,
    "overtaken": 15,
    "resets": 15,
    "failed steps": 15,
    "hits, evictions and preemptions": 20,  # all in one schedule
    "guessed": 2000,  # tokens
    "right": 900,
    "all right": 400,  # drafts
    "branches": 300,
    "winners": 50,
    "ended in the middle": 120,  # of the tokens of a step
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


def turmoil(seed):
    """A pool as small as can be, and twelve requests that want all of it, with nearly the same prompt."""
    rng = random.Random(seed)
    size, longest = rng.choice([1, 2]), rng.randint(10, 16)
    prompt = [rng.randint(3, 10**6) for _ in range(longest)]
    requests = []
    for i in range(12):
        params = SamplingParams(n=rng.choice([1, 1, 2]), max_tokens=12)
        own = prompt[: rng.randint(longest - 2, longest)]
        requests.append(Request(f"r{i}", i, own, params, 12, frozenset({END}), i))
    return Scenario(
        memory={"num_blocks": max(r.most_blocks(size) for r in requests), "block_size": size, "num_cpu_blocks": 0},
        cache=rng.choice(["hash", "radix"]),
        scheduler={"max_num_seqs": 12, "max_num_batched_tokens": 24, "watermark": 0.0},
        requests=requests,
        arrivals=list(range(12)),
    )


def test_nearly_every_step_evicts_preempts_or_finds():
    happened: Counter[int] = Counter()  # how many of the three, in how many steps
    for seed in range(40):
        run, before = Run(turmoil(seed)), Counter()
        for request in run.given.requests:
            run.add(request)
        while run.scheduler.has_unfinished:
            run.step()
            new = run.seen - before
            before = run.seen.copy()
            kinds = (new["evicted"], new["recompute"], new["found"] + new["recovered"])
            happened[sum(map(bool, kinds))] += 1
        run.check_end()
    steps = sum(happened.values())
    assert happened[0] < 0.15 * steps and happened[2] + happened[3] > 0.35 * steps, happened


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_both_caches_decide_alike(first):
    """The same history at the same capacity: the same hits, down to the block numbers, and the same evictions.

    That need not be: vLLM gives up block by block what fell out of use first, and SGLang the least recently used
    leaf, a whole run at a time, by a clock that also ticks when a prefix is looked up. Both are the same rule, since
    whoever uses a block uses all blocks before it: on every path the order runs from the tail to the head, so what
    fell out of use first is always the end of a leaf. Here both take one block at a time, by the same clock; in
    SGLang a leaf goes whole, so it may lose blocks that nobody needed to take.
    """
    evicted = 0
    for seed in range(first, first + 100):
        plans = []
        for cache in ("hash", "radix"):
            run = Run(replace(scenario(seed), cache=cache))
            evicted += run.run()["evicted"]
            plans.append([plan.to_json() for plan in run.plans])
        assert plans[0] == plans[1], f"schedule {seed}"
    assert evicted > 1000


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


def publish_at_once(self, seq_id, num_tokens, keep_free=0, prefix=None):
    """Blocks are found before their keys and values exist."""
    answer = RIGHT_ALLOCATE(self, seq_id, num_tokens, keep_free, prefix)
    if self.cache is not None and self.promised and not isinstance(answer, NoSpace):
        self.publish(seq_id, num_tokens, lambda start, count: self.promised[start : start + count])
    return answer


def remember_what_is_looked_up(self, tokens, salt=None):
    self.promised = [*tokens, 0]
    return RIGHT_FIND(self, tokens, salt)


def find_all(self, request):
    """A prompt that is found whole computes nothing."""
    leader = request.live[0]
    return self._memory.find(leader.tokens(0, request.target(leader)), request.cache_salt)


def let_idle_be_found_after_eviction(self):
    """A block that is taken is not forgotten."""
    if self._free:
        return RIGHT_TAKE(self)
    block, _ = self._idle.popitem(last=False)
    self._freed[block] = None
    self._ref_counts[block] = 1
    return block


def evict_what_was_found(self, count, keep_free=0, found=()):
    """The blocks that were found are shared only after others were taken, if they are still there."""
    blocks = RIGHT_TAKE_MANY(self, count, keep_free)
    if not isinstance(blocks, NoSpace):
        for block in found:
            self.share(block)
    return blocks


def head_first(self, seq_id):
    home = self._home(seq_id)
    for block in home.tables.pop(seq_id).blocks:
        home.allocator.release(block)


def forget_the_idle(self):
    """A reset, after which sequences still publish what they computed before it."""
    self._gpu.allocator.forget_all()


def one_slot_further(self, seq_id, start, count):
    table = self._gpu.tables[seq_id]
    return table.slots(start - 1, count) if start else table.slots(start, count)


def settle_without_taking_back(self, seq):
    """What was guessed wrong stays where it is, and counts as computed."""
    slots = self._memory.num_tokens(seq.seq_id)
    seq.num_computed_tokens = min(slots, len(seq) - 1)
    self._memory.publish(seq.seq_id, seq.num_computed_tokens, seq.tokens)


def publish_guesses(self, plan, output):
    """All that was computed can be found, also what was guessed."""
    for s in plan.sequences:
        if s.branch_of is None and s.num_drafts and s.seq_id not in output.winners:
            tokens = self.sequences[s.seq_id].tokens(0, s.start) + s.token_ids
            self.memory.publish(s.seq_id, s.context_len, lambda at, count, tokens=tokens: tokens[at : at + count])
    return RIGHT_UPDATE(self, plan, output)


def keep_one_too_many(seq_id, family, output):
    """The token behind a wrong guess is taken, too."""
    RIGHT_FAMILY(seq_id, family, output)
    (s, rows), *_ = family
    [tokens, *_] = output.tokens[seq_id]
    if s.num_drafts >= len(tokens) and seq_id not in output.winners:
        tokens.append(rows[len(tokens)][0])


def copy_nothing_for_branches(table, start, count, pool, keep_free):
    answer = RIGHT_BRANCH(table, start, count, pool, keep_free)
    return answer if isinstance(answer, NoSpace) else (answer[0], Appended([]))


def share_the_last_block(table, start, count, pool, keep_free):
    """A branch writes into the block that its sequence writes, too."""
    answer = RIGHT_BRANCH(table, start, count, pool, keep_free)
    if isinstance(answer, NoSpace) or not answer[1].copies:
        return answer
    new, [(source, target)] = answer[0], answer[1].copies
    new.blocks = [source if block == target else block for block in new.blocks]
    pool.allocator.share(source)
    pool.allocator.release(target)
    return new, Appended([])


def losers_stay(self, plan, output, memory):
    for s in plan.sequences:
        if s.branch_of is not None and output.winners.get(s.branch_of) == s.seq_id:
            memory.adopt(s.branch_of, s.seq_id)


def no_chain(self, copies):
    """A copy of a copy, in one stroke."""
    self.plan.copies.extend(copies)


def guess_beyond_the_end(self, seq, most, num_running):
    return self.num_speculative_tokens


RIGHT_UPDATE, RIGHT_FAMILY, RIGHT_BRANCH = Scheduler.update, recall_model.answer_family, branching.branch
RIGHT_MOVE, RIGHT_APPEND = RecallRunner._move, KVCacheManager.append
RIGHT_ALLOCATE, RIGHT_FIND = KVCacheManager.allocate, KVCacheManager.find
RIGHT_TAKE, RIGHT_TAKE_MANY = BlockAllocator._take, BlockAllocator.allocate
BROKEN = {
    "copies are forgotten": forget("copies"),
    "swapping in is forgotten": forget("swap_in"),
    "swapping out is forgotten": forget("swap_out"),
    "moves in the wrong order": (RecallRunner, "_move", move_in_the_wrong_order),
    "writing without a copy": (KVCacheManager, "append", never_copy),
    "writing one slot before": (KVCacheManager, "slots", one_slot_further),
    "ended sequences keep their memory": (KVCacheManager, "free", lambda self, seq_id: None),
    "what is not yet computed can be found": (KVCacheManager, "allocate", publish_at_once),
    "a prompt that is found whole computes nothing": (Admission, "_find", find_all),
    "salts are ignored": (KVCacheManager, "find", lambda self, tokens, salt=None: RIGHT_FIND(self, tokens)),
    "what is evicted can still be found": (BlockAllocator, "_take", let_idle_be_found_after_eviction),
    "what was found is evicted": (BlockAllocator, "allocate", evict_what_was_found),
    "heads are evicted before tails": (KVCacheManager, "free", head_first),
    "what was computed before a reset can be found after it": (KVCacheManager, "reset_prefix_cache", forget_the_idle),
    "the first of several rebuilds all": (Request, "target", lambda self, seq: len(seq)),
    "nobody forks a rebuilt prompt": (
        "minipaged.scheduling.scheduler.share_rebuilt_prompt", lambda request, memory: None
    ),
    "wrong guesses are not taken back": (LiveSequences, "_settle", settle_without_taking_back),
    "wrong guesses can be found": (Scheduler, "update", publish_guesses),
    "one token too many is kept": ("tests.recall_model.answer_family", keep_one_too_many),
    "branches copy nothing": ("minipaged.memory.kv_manager.branch", copy_nothing_for_branches),
    "branches write into a shared block": ("minipaged.memory.kv_manager.branch", share_the_last_block),
    "the losers keep their memory": (Speculation, "settle", losers_stay),
    "the winner's memory is not taken": (Speculation, "settle", lambda self, plan, output, memory: [
        memory.free(s.seq_id) for s in plan.sequences if s.branch_of is not None
    ]),
    "a copy of a copy is made at once": (Step, "add_copies", no_chain),
    "guesses beyond the longest output": (Speculation, "count", guess_beyond_the_end),
    "the worst case is too small": (Request, "most_blocks", lambda self, size: len(self.prompt_token_ids) // size + 1),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_it_notices_what_is_broken(monkeypatch, broken):
    monkeypatch.setattr(KVCacheManager, "promised", None, raising=False)
    if publish_at_once in BROKEN[broken]:
        monkeypatch.setattr(KVCacheManager, "find", remember_what_is_looked_up)
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
