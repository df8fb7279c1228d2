"""What was computed once is found again: the two indexes, the memory, the scheduler, and the whole engine.

memory_model.py and recall.py put all of it to random tests; here stands, rule by rule, what they rely on.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_model import snapshot
from test_scheduler import WORD, Engine, computed
from tiny_model import make_folder

from minipaged import LLM, BeamSearchParams, SamplingParams
from minipaged.memory import PREFIX_CACHES, Allocated, HashCache, IntegrityError, KVCacheManager, NoSpace, RadixCache
from minipaged.scheduling.admission import PATIENCE
from minipaged.scheduling.plan import StepPlan
from minipaged.scheduling.scheduler import Step

both = pytest.mark.parametrize("cache", ["hash", "radix"])


def new_memory(cache, num_blocks=8, block_size=2, **settings):
    return KVCacheManager(num_blocks, block_size, cache=PREFIX_CACHES[cache](block_size), **settings)


def start(memory, seq_id, tokens, salt=None):
    """Start a sequence and let it be found, as if it was computed in between. Returns how many tokens were found."""
    prefix = memory.find(tokens, salt)
    assert isinstance(memory.allocate(seq_id, len(tokens), prefix=prefix), Allocated)
    memory.publish(seq_id, len(tokens), lambda at, count: tokens[at : at + count])
    memory.check()
    return prefix.num_tokens


# ---- the indexes -----------------------------------------------------------------------------------------------


class Plain:
    """The simplest index: whole prefixes in a dictionary."""

    def __init__(self):
        self.blocks: dict[tuple, int] = {}

    def find(self, tokens, salt):
        found = []
        for end in range(2, len(tokens) + 1, 2):
            if (salt, tuple(tokens[:end])) not in self.blocks:
                break
            found.append(self.blocks[salt, tuple(tokens[:end])])
        return found

    def add(self, block, tokens, salt):
        return self.blocks.setdefault((salt, tuple(tokens)), block)


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=10), st.sampled_from([None, "a"]), st.integers(0, 9))))
def test_both_indexes_are_what_a_dictionary_of_prefixes_is(histories):
    """Add a sequence's blocks one after another, look everything up, now and then remove the end of a path."""
    caches, plain, block = [HashCache(2), RadixCache(2)], Plain(), 0
    for tokens, salt, remove in histories:
        expected = plain.find(tokens, salt)
        assert [cache.find(tokens, salt) for cache in caches] == [expected, expected]
        path = expected[:]
        for end in range(2 * len(path) + 2, len(tokens) + 1, 2):
            block += 1
            parent = path[-1] if path else None
            known = plain.add(block, tokens[:end], salt)
            assert [cache.add(block, parent, tokens[end - 2 : end], salt) for cache in caches] == [known, known]
            path.append(known)
        parents = [cache.parents() for cache in caches]
        assert parents[0] == parents[1] and set(parents[0]) == set(plain.blocks.values())
        assert all(len(cache) == len(plain.blocks) for cache in caches)
        leaves = sorted(parents[0].keys() - set(parents[0].values()))
        for leaf in leaves[:remove]:
            plain.blocks = {key: block for key, block in plain.blocks.items() if block != leaf}
            for cache in caches:
                cache.remove(leaf)
                assert leaf not in cache
    for cache in caches:
        cache.clear()
        assert len(cache) == 0 and cache.find([0, 0]) == [] and cache.parents() == {}


def test_a_hash_may_lie():
    """All keys are equal: tokens are compared, nothing false is found, and who has the key keeps it."""
    cache = HashCache(2, hash_function=lambda what: 0)
    assert cache.add(1, None, [5, 6]) == 1
    assert cache.find([5, 6, 5, 6]) == [1]  # the second block has the key and the tokens, and not the place
    assert cache.add(2, None, [7, 8]) == 2 and cache.find([7, 8]) == [] and 2 not in cache
    assert cache.add(3, 2, [5, 6]) == 3 and 3 not in cache  # nobody can walk there
    assert cache.find([5, 6], salt="other") == []
    cache.remove(1)
    assert cache.add(2, None, [7, 8]) == 2 and cache.find([7, 8, 1]) == [2]
    memory = KVCacheManager(8, 2, cache=HashCache(2, hash_function=lambda what: 0))
    for seq_id, tokens in enumerate([[1, 2, 3, 4], [1, 2, 3, 5], [5, 6, 7, 8]]):
        assert start(memory, seq_id, tokens) == (2 if seq_id == 1 else 0)
    for seq_id in range(3):
        memory.free(seq_id)
    memory.check()


def test_a_tree_splits_where_sequences_part_and_is_shed_from_its_leaves():
    cache = RadixCache(2)
    for block, parent, tokens in [(0, None, "ab"), (1, 0, "cd"), (2, 1, "ef"), (3, 0, "xy"), (4, None, "ab")]:
        cache.add(block, parent, list(tokens))
    text = "".join
    assert cache.draw(text).splitlines() == [
        "4 blocks",
        "`-- 1 block 0: ab",
        "    |-- 2 blocks 1 2: cdef",
        "    `-- 1 block 3: xy",
    ]
    for block in (0, 1):
        with pytest.raises(ValueError, match=f"block {block} is not the end of a path"):
            cache.remove(block)
    cache.remove(3)
    cache.remove(2)
    cache.add(5, 1, list("gh"))  # a leaf grows
    assert cache.draw(text).splitlines()[1:] == ["`-- 1 block 0: ab", "    `-- 2 blocks 1 5: cdgh"]
    cache.add(6, None, list("ab"), "me")
    assert len(cache.draw(text).splitlines()) == 4  # a tree of its own
    assert all(len(line) <= 20 for line in RadixCache.draw(cache, lambda tokens: "long " * 20, 20).splitlines())
    for block in (6, 5, 1, 0):
        cache.remove(block)
        cache.add(block + 10, None, list("ab"), f"tenant {block}")
    assert cache.draw(text, most=2).splitlines()[-1] == "..." and len(cache._roots) == 4
    for block in (10, 11, 15, 16):
        cache.remove(block)
    assert cache.draw() == str(cache) == "0 blocks" and not cache._roots


# ---- the memory ------------------------------------------------------------------------------------------------


@both
def test_blocks_stay_findable_until_their_memory_is_needed(cache):
    memory = new_memory(cache)
    assert start(memory, 0, [1, 2, 3, 4, 5]) == 0
    memory.free(0)
    usage = memory.usage()
    assert (usage.used, usage.free, usage.cached) == (0, 8, 2)  # the third block was not full
    assert memory.take_freed() == [2]
    assert start(memory, 1, [1, 2, 3, 4, 9, 9]) == 4 and memory.block_table(1)[:2] == [0, 1]
    assert start(memory, 2, [1, 2, 9, 9]) == 2 and memory.usage().shared == 1
    assert memory.find([3, 4]).blocks == [] and memory.find([1]).blocks == []


@both
def test_least_recently_used_first_and_tails_before_heads(cache):
    memory = new_memory(cache, num_blocks=6)
    start(memory, 0, [1, 2, 3, 4])  # blocks 0 1
    start(memory, 1, [5, 6, 7, 8])  # blocks 2 3
    memory.free(0)
    memory.free(1)
    assert memory.idle_blocks() == [1, 0, 3, 2]
    start(memory, 2, [1, 2])  # block 0 is used again
    assert memory.idle_blocks() == [1, 3, 2]
    memory.free(2)
    assert memory.idle_blocks() == [1, 3, 2, 0]
    memory.allocate(3, 2 * 2)  # blocks 4 and 5, which were free
    assert memory.usage().evicted == 0
    memory.allocate(4, 2 * 3)
    assert memory.block_table(4) == [1, 3, 2] and memory.usage().evicted == 3
    assert memory.find([1, 2, 3, 4]).blocks == [0] and memory.find([5, 6, 7, 8]).blocks == []
    memory.check()


@both
@pytest.mark.parametrize("keep_free", [0, 1])
def test_a_failed_allocation_changes_nothing_and_hits_count_once(cache, keep_free):
    """Four blocks, all idle, two of them hits: there is room for two more, and not for three."""
    memory = new_memory(cache, num_blocks=4 + keep_free)
    start(memory, 0, [1, 2, 3, 4, 5, 6, 7, 8])
    memory.free(0)
    prefix = memory.find([1, 2, 3, 4, 9, 9])
    assert prefix.blocks == [0, 1]
    before = snapshot(memory)
    assert memory.allocate(1, 10, keep_free, prefix) == NoSpace(needed=5 + keep_free, free=4 + keep_free)
    assert snapshot(memory) == before
    assert isinstance(memory.allocate(1, 8, keep_free, prefix), Allocated)  # it evicts the rest, and not its own
    assert memory.block_table(1)[:2] == [0, 1] and memory.num_free == keep_free
    memory.check()


@both
def test_two_that_compute_the_same_side_by_side_end_with_one_copy(cache):
    memory = new_memory(cache)
    tokens = [1, 2, 3, 4, 5]
    for seq_id in (0, 1):
        memory.allocate(seq_id, 5, prefix=memory.find(tokens))  # neither is computed when the other starts
    memory.fork(1, 2)
    assert memory.usage().used == 6
    for seq_id in (0, 1, 2):
        memory.publish(seq_id, 5, lambda at, count: tokens[at : at + count])
        memory.check()
    assert memory.block_table(1)[:2] == memory.block_table(2)[:2] == memory.block_table(0)[:2] == [0, 1]
    assert memory.usage().used == 4 and memory.take_freed() == [3, 4]


@both
def test_salts_and_resets(cache):
    memory = new_memory(cache, num_blocks=20, num_cpu_blocks=4)
    assert start(memory, 0, [1, 2, 3, 4], salt="a") == 0
    assert start(memory, 1, [1, 2, 3, 4], salt="b") == 0
    assert start(memory, 2, [1, 2, 3, 4]) == 0
    assert start(memory, 3, [1, 2, 3, 4], salt="a") == 4
    memory.fork(0, 4)
    memory.swap_out([3])
    memory.free(2)
    memory.take_freed()
    memory.reset_prefix_cache()
    assert memory.find([1, 2, 3, 4], "a").blocks == [] and memory.usage().cached == 0
    assert sorted(memory.take_freed()) == [4, 5]  # what nobody held is poison from now on
    memory.swap_in([3], tokens={3: [1, 2, 3, 4]})
    for seq_id in (0, 3, 4):  # what was computed before the reset
        memory.append({seq_id: 2})
        memory.publish(seq_id, 6, lambda at, count: [1, 2, 3, 4, 5, 6][at : at + count])
    assert memory.find([1, 2, 3, 4, 5, 6], "a").blocks == []
    assert start(memory, 5, [1, 2, 3, 4], salt="a") == 0 and start(memory, 6, [1, 2, 3, 4], salt="a") == 4


@both
def test_a_sequence_of_nobody_publishes_nothing(cache):
    """Who did not look does not say for whom it computes, and silence must not mean: for all."""
    memory = new_memory(cache)
    memory.allocate(0, 4)
    memory.publish(0, 4, lambda at, count: [1] * count)
    assert memory.find([1] * 4).blocks == []


@both
def test_what_is_still_found_is_not_swapped_in(cache):
    memory = new_memory(cache, num_blocks=4, num_cpu_blocks=8)
    tokens = [1, 2, 3, 4, 5]
    start(memory, 0, tokens)
    assert len(memory.swap_out([0]).moves) == 3
    memory.allocate(1, 4)  # blocks 3 and 2: nothing is evicted
    memory.free(1)
    assert memory.swap_in([0], tokens={0: tokens}).moves == [(2, 2)] and memory.block_table(0) == [0, 1, 2]
    memory.check()
    memory.swap_out([0])
    memory.allocate(1, 6)  # evicts block 1
    memory.free(1)
    assert len(memory.swap_in([0], tokens={0: tokens}).moves) == 2
    memory.check()


@both
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: m._gpu.allocator._free.append(m._gpu.allocator._idle.popitem()[0]), "is free, but the cache"),
        (lambda m: m.cache.remove(1), "is idle, but the cache does not find it"),
        (lambda m: m._gpu.allocator._idle.move_to_end(1), "would be evicted before block 1"),
        (lambda m: m._gpu.allocator._free.append(0), "stands twice"),
        (lambda m: setattr(m._gpu.tables[7], "num_published", 9), "published beyond them"),
    ],
)
def test_damage_is_found(cache, damage, message):
    memory = new_memory(cache)
    start(memory, 0, [1, 2, 3, 4])
    start(memory, 7, [9])
    memory.free(0)
    memory.check()
    damage(memory)
    with pytest.raises(IntegrityError, match=message):
        memory.check()


# ---- the scheduler ---------------------------------------------------------------------------------------------


WORDS = list(range(100, 200))


@both
def test_a_prompt_found_whole_computes_its_last_token(cache):
    engine = Engine(cache=cache)
    for name, length in (("a", 12), ("b", 12), ("c", 13), ("d", 11)):
        engine.add(name, WORDS[:length])
        plan = engine.step()
        [mine] = [s for s in plan.sequences if s.request_id == name]
        assert mine.draw is not None
        assert (mine.start, len(mine.token_ids)) == {"a": (0, 12), "b": (8, 4), "c": (12, 1), "d": (8, 3)}[name]
    assert [r.metrics.num_cached_tokens for r in engine.requests] == [0, 8, 12, 8]
    assert vars(engine.scheduler.admission.prefixes) == {"queried": 48, "found": 28, "recovered": 0}


@both
def test_identical_prompts_of_one_step_do_not_read_each_other(cache):
    engine = Engine(cache=cache)
    engine.add("a", WORDS[:9])
    engine.add("b", WORDS[:9])
    plan = engine.step()
    assert [(s.start, len(s.token_ids)) for s in plan.sequences] == [(0, 9), (0, 9)]
    one, other = (s.block_table for s in plan.sequences)
    assert not set(one) & set(other)
    assert engine.step().sequences[1].block_table[:2] == one[:2]  # then they share what both computed
    engine.run()


@both
def test_half_a_prompt_is_found_when_only_half_is_computed(cache):
    """Publish late: of a prompt under way, only the chunks that were computed."""
    engine = Engine(cache=cache, max_num_seqs=2, max_num_batched_tokens=12)
    a = engine.add("a", WORDS[:20])
    engine.step()
    b = engine.add("b", WORDS[:20])
    plan = engine.step()
    assert computed(plan) == {"a": [8], "b": [4]} and [s.start for s in plan.sequences] == [12, 12]
    engine.run()
    assert a.metrics.num_cached_tokens == 0 and b.metrics.num_cached_tokens == 12


@both
def test_generated_tokens_are_found_in_the_next_turn(cache):
    engine = Engine(cache=cache)
    engine.add("a", WORDS[:6], max_tokens=7)
    engine.run()
    again = engine.add("b", [*WORDS[:6], *[WORD] * 7, 1, 2, 3])
    engine.run()
    assert again.metrics.num_cached_tokens == 12  # of 13 tokens, the last was drawn and never computed


@both
@pytest.mark.parametrize("n", [1, 3])
def test_a_preempted_request_finds_its_own_blocks_again(cache, n):
    engine = Engine(cache=cache, num_blocks=9 if n == 1 else 12, preemption="recompute")
    engine.add("a", WORDS[:12], max_tokens=16)
    engine.add("b", WORDS[20:33], max_tokens=9, n=n)
    seen = engine.run()
    preempted = [plan.step for plan in seen if plan.preempted]
    assert preempted and engine.scheduler.admission.prefixes.recovered > 0
    first = next(plan for plan in seen if plan.step > preempted[0] and "b" in plan.admitted)
    assert first.sequences[-1].start >= 4 and engine.requests[1].metrics.num_cached_tokens == 0


@both
@pytest.mark.parametrize("more", [0, 1, 4, 5])
def test_samples_find_their_outputs_again_but_compute_their_last_token(cache, more):
    """Once the prompt of 13 tokens is there again. Another request has computed all their tokens, the last too."""
    engine = Engine(cache=cache, preemption="recompute")
    engine.add("a", [*WORDS[:13], *[WORD] * (3 + more)], max_tokens=30)
    b = engine.add("b", WORDS[:13], max_tokens=20, n=3)
    for _ in range(3 + more):
        engine.step()
    assert [len(seq) for seq in b.sequences] == [16 + more] * 3
    engine.scheduler._preempt(engine.scheduler.running.pop(), Step(StepPlan(0), 0))
    rebuilt, after = engine.step(), engine.step()
    assert computed(rebuilt)["b"] == [1] and rebuilt.sequences[-1].start == 12
    start = (15 + more) // 4 * 4
    start = max(start, 13)
    assert [(s.start, len(s.token_ids)) for s in after.sequences if s.request_id == "b"] == [
        (start, 16 + more - start)
    ] * 3
    engine.run()
    assert [seq.output_token_ids for seq in b.sequences] == [[WORD] * 20] * 3


@both
def test_tenants_share_nothing(cache):
    engine = Engine(cache=cache)
    for number, salt in enumerate(["x", "y", None, "x"]):
        engine.add(str(number), WORDS[:9], salt=salt)
    assert len(engine.step().sequences) == 4
    tables = {s.request_id: set(s.block_table) for s in engine.step().sequences}
    assert tables["0"] & tables["3"] and not any(tables[a] & tables[b] for a, b in [("0", "1"), ("0", "2"), ("1", "2")])
    engine.run()


@both
def test_an_abort_leaves_what_was_computed_to_others(cache):
    engine = Engine(cache=cache, max_num_seqs=2, max_num_batched_tokens=8)
    a = engine.add("a", WORDS[:30])
    engine.step()
    engine.step()
    engine.scheduler.abort(a)
    b = engine.add("b", WORDS[:30])
    engine.run()
    assert b.metrics.num_cached_tokens == 16


def order_of_admission(engine):
    return [name for plan in engine.run() for name in plan.admitted]


def test_the_longest_prefix_may_come_first():
    settings = {"max_num_seqs": 1, "max_num_batched_tokens": 100}
    for schedule, order in (("fcfs", "abcdef"), ("prefix", "acfdbe")):
        engine = Engine(cache="radix", schedule=schedule, **settings)
        engine.add("a", WORDS[:20], max_tokens=1)
        engine.step()
        for name, tokens in (("b", WORDS[50:70]), ("c", WORDS[:20]), ("d", WORDS[:8]), ("e", WORDS[50:70])):
            engine.add(name, tokens, max_tokens=1)
        engine.add("f", WORDS[:18], max_tokens=1)
        assert "a" + "".join(order_of_admission(engine)) == order


def test_nobody_is_overtaken_for_ever():
    """New requests keep coming that share a long prefix. One that shares nothing waits, and not for ever."""
    engine = Engine(cache="hash", schedule="prefix", max_num_seqs=1, max_num_batched_tokens=100)
    engine.add("first", WORDS[:20], max_tokens=1)
    engine.step()
    lonely = engine.add("lonely", WORDS[50:60], max_tokens=1)
    order = []
    for number in range(2 * PATIENCE):
        engine.add(str(number), WORDS[:20], max_tokens=1)
        order += engine.step().admitted
    assert order.index("lonely") == PATIENCE == lonely.num_overtaken


def test_nobody_is_overtaken_more_often_in_a_single_step():
    engine = Engine(cache="hash", schedule="prefix", max_num_seqs=64, max_num_batched_tokens=1000)
    engine.add("first", WORDS[:20], max_tokens=1)
    engine.step()
    engine.add("lonely", WORDS[50:60], max_tokens=1)
    for number in range(2 * PATIENCE):
        engine.add(str(number), WORDS[:20], max_tokens=1)
    assert len(engine.step().admitted) == PATIENCE and engine.step().admitted[0] == "lonely"


def test_those_who_were_overtaken_too_often_come_in_by_arrival():
    """Two of them, and the later one has the longer prefix: neither may wait for the other."""
    engine = Engine(cache="hash", schedule="prefix", max_num_seqs=1, max_num_batched_tokens=100)
    engine.add("first", WORDS[:20], max_tokens=1)
    engine.step()
    engine.add("lonely", WORDS[50:60], max_tokens=1)
    engine.add("half", [*WORDS[:8], 1, 2, 3], max_tokens=1)
    order = []
    for number in range(PATIENCE + 3):
        engine.add(str(number), WORDS[:20], max_tokens=1)
        order += engine.step().admitted
    assert order[PATIENCE : PATIENCE + 2] == ["lonely", "half"]


@both
def test_samples_find_their_outputs_only_behind_the_prompt_that_they_share(cache):
    """A reset while the prompt of two samples is rebuilt; then another copy of the prompt and one output is cached."""
    engine = Engine(cache=cache, num_blocks=10, preemption="recompute", max_num_seqs=4, max_num_batched_tokens=8)
    request = engine.add("a", WORDS[:8], max_tokens=17, n=2)
    assert request.most_blocks(4) == 10
    for _ in range(6):
        engine.step()
    engine.scheduler._preempt(engine.scheduler.running.pop(), Step(StepPlan(0), 0))
    request.sequences[1].output_token_ids[:] = [WORD + 1] * 6  # not the same as the other's
    engine.scheduler.max_num_batched_tokens = 5
    engine.memory.reset_prefix_cache()
    engine.step()
    engine.memory.reset_prefix_cache()
    start(engine.memory, 999, [*WORDS[:8], *[WORD] * 4])
    engine.memory.free(999)
    engine.scheduler.max_num_batched_tokens = 8
    plans = engine.run()
    assert not any(plan.preempted for plan in plans)


def test_without_a_cache_the_longest_prefix_is_nobodys():
    engine = Engine(schedule="prefix", max_num_seqs=1)
    for name in "abc":
        engine.add(name, prompt=9, max_tokens=1)
    assert order_of_admission(engine) == ["a", "b", "c"]


# ---- the whole engine ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("prefix")))


COMMON = [(7 * i * i + 3 * i) % 90 for i in range(29)]
PROMPTS = [COMMON[:cut] + [(11 * i + cut) % 90 for i in range(more)] for cut, more in
           ((29, 9), (29, 0), (20, 5), (0, 12), (29, 9), (8, 1), (29, 2))]  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)


@pytest.fixture(scope="module")
def greedy(folder):
    llm = LLM(folder, prefix_cache="none", num_blocks=200, block_size=4)
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("cache", ["none", "hash", "radix"])
@pytest.mark.parametrize("num_blocks", [13, 17, 200])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 16, 256])
def test_greedy_is_the_same_with_every_cache_chunk_and_pool(folder, greedy, cache, chunk, num_blocks):
    llm = LLM(
        folder, prefix_cache=cache, num_blocks=num_blocks, block_size=4, max_num_batched_tokens=chunk,
        max_num_seqs=min(chunk, 7), schedule="prefix" if chunk == 7 else "fcfs", watermark=0.0, debug=True,
    )  # fmt: skip
    plans = []
    llm.observers.append(lambda plan, output: plans.append(plan))
    assert tokens(llm.generate(PROMPTS, GREEDY)) == greedy
    assert tokens(llm.generate(PROMPTS[::-1], GREEDY)) == greedy[::-1]  # and again, with what is left of the first
    assert all(plan.num_tokens <= chunk for plan in plans) and max(plan.num_tokens for plan in plans) >= min(chunk, 29)
    stats = llm.stats()
    assert (stats.prefixes.found > 0) == (cache != "none")
    assert (stats.memory.evicted > 0) == (cache != "none" and num_blocks < 200)
    assert num_blocks == 200 or chunk < 3 or sum(stats.num_preemptions.values()) > 0
    assert stats.memory.free == num_blocks


@both
def test_with_samples_beams_aborts_and_swapping(folder, cache):
    """All of it together, on few blocks, twice, and against the same without a cache on many."""

    def run(**settings):
        llm = LLM(folder, block_size=4, seed=3, debug=True, max_num_seqs=12, watermark=0.0, **settings)
        results = []
        for _ in range(2):
            for number, prompt in enumerate(PROMPTS):
                params = [
                    SamplingParams(n=3, seed=number, max_tokens=12, ignore_eos=True),
                    BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True),
                    GREEDY,
                ][number % 3]
                llm.add_request(prompt, params, str(number), cache_salt="us" if number == 6 else None)
            done = {}
            for step in range(400):
                if step == 5:
                    llm.abort("2")
                done.update({output.request_id: output for output in llm.step()})
            done.pop("2", None)
            assert not llm.has_unfinished_requests and len(done) == len(PROMPTS) - 1
            results.append([[one.token_ids for one in done[name].outputs] for name in sorted(done)])
        return llm, results

    _, expected = run(prefix_cache="none", num_blocks=300)
    for preemption in ("auto", "recompute"):
        llm, results = run(prefix_cache=cache, num_blocks=22, preemption=preemption)
        assert results == expected
        stats = llm.stats()
        assert stats.memory.copies > 0 and stats.memory.evicted > 0 and stats.prefixes.found > 0
        assert sum(stats.num_preemptions.values()) > 0


@both
def test_hit_rates(folder, cache):
    llm = LLM(folder, prefix_cache=cache, num_blocks=100, block_size=4)
    first = llm.generate([COMMON], GREEDY)[0]
    second = llm.generate([COMMON + [1, 2, 3]], GREEDY)[0]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 28)
    stats = llm.stats()
    assert stats.prefix_hit_rate == 28 / (29 + 32) and stats.prefix_cache == cache
    turn = COMMON + first.outputs[0].token_ids
    assert llm.generate([turn + [5]], GREEDY)[0].metrics.num_cached_tokens == 40  # 29 + 13 were computed
    llm.reset_prefix_cache()
    assert llm.generate([COMMON], GREEDY)[0].metrics.num_cached_tokens == 0
    assert llm.generate([COMMON], GREEDY, cache_salt="me")[0].metrics.num_cached_tokens == 0
    assert llm.generate([COMMON], GREEDY, cache_salt="me")[0].metrics.num_cached_tokens == 28
    assert list(llm.stream([COMMON], GREEDY, cache_salt="you"))[-1].metrics.num_cached_tokens == 0


def test_a_reset_does_not_disturb_those_under_way(folder, greedy):
    llm = LLM(folder, num_blocks=100, block_size=4, debug=True, max_num_batched_tokens=16, max_num_seqs=7)
    for number, prompt in enumerate(PROMPTS):
        llm.add_request(prompt, GREEDY, str(number))
    done = {}
    for step in range(200):
        if step in (2, 9):
            llm.reset_prefix_cache()
        done.update({output.request_id: output for output in llm.step()})
    assert [done[str(number)].outputs[0].token_ids for number in range(len(PROMPTS))] == greedy


@pytest.mark.parametrize("salt", ["", 5, b"me"])
def test_a_salt_is_a_string(folder, salt):
    llm = LLM(folder, num_blocks=8)
    with pytest.raises(ValueError, match="cache_salt=.*: must be None or a string that is not empty"):
        llm.add_request([1], cache_salt=salt)


def test_settings_are_refused_by_name(folder):
    with pytest.raises(ValueError, match="prefix_cache='tree': must be one of none, hash, radix"):
        LLM(folder, prefix_cache="tree")
    with pytest.raises(ValueError, match="schedule='lifo': must be one of fcfs, prefix"):
        LLM(folder, num_blocks=8, schedule="lifo")
