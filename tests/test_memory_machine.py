"""Random schedules of memory operations, each compared with the model of memory_model.py.

They are driven in two ways: hypothesis looks for strange corners and shrinks what it finds, and seeded random
walks, which look more like an engine at work, go deep into sharing, copying and swapping.
"""

import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from memory_model import CheckedMemory, snapshot

from minipaged.memory import BlockAllocator, MisuseError, NoSpace

CACHES = st.sampled_from(["none", "hash", "radix", "hash", "radix"])
SALTS = st.sampled_from([None, None, None, "a", "b"])
KEEP_FREE = st.sampled_from([0, 0, 0, 0, 1, 2])
POOLS = st.sampled_from([0, 1, 2, 3, 5, 8, 12, 20])


class MemoryMachine(RuleBasedStateMachine):
    memory: CheckedMemory

    @initialize(
        data=st.data(), num_blocks=POOLS, block_size=st.sampled_from([4, 2, 1]), num_cpu_blocks=POOLS, cache=CACHES
    )
    def start(self, data, num_blocks, block_size, num_cpu_blocks, cache):
        order = data.draw(st.none() | st.permutations(range(num_blocks)))
        self.memory = CheckedMemory(num_blocks, block_size, num_cpu_blocks, order, cache)
        self.past = [[]]  # tokens of all streams that ever were

    def some(self, data, swapped):
        """Some sequences of one pool, in any order."""
        ids = data.draw(st.permutations(self.memory.ids(swapped)))
        return ids[: data.draw(st.integers(1, len(ids)))]

    @rule(data=st.data(), keep_free=KEEP_FREE)
    def allocate(self, data, keep_free):
        self.memory.allocate(data.draw(st.integers(0, 3 * self.memory.size)), keep_free)

    @rule(data=st.data(), keep_free=KEEP_FREE, salt=SALTS, more=st.integers(0, 5))
    def begin_like_another(self, data, keep_free, salt, more):
        self.past += [stream.tokens for stream in self.memory.streams.values() if stream.tokens not in self.past]
        tokens = data.draw(st.sampled_from(self.past))
        self.memory.allocate(more, keep_free, tokens[: data.draw(st.integers(0, len(tokens)))], salt)

    @precondition(lambda self: self.memory.ids(swapped=False))
    @rule(data=st.data())
    def publish(self, data):
        for seq_id in self.some(data, swapped=False):
            length = len(self.memory.streams[seq_id].tokens)
            self.memory.publish(seq_id, data.draw(st.sampled_from([length, length, length // 2])))

    @precondition(lambda self: self.memory.known)
    @rule(often=st.integers(0, 3))
    def forget_all(self, often):
        if often == 0:
            self.memory.forget_all()

    @precondition(lambda self: self.memory.ids(swapped=False))
    @rule(data=st.data(), keep_free=KEEP_FREE)
    def append_one_token(self, data, keep_free):
        self.memory.append(dict.fromkeys(self.some(data, swapped=False), 1), keep_free)

    @precondition(lambda self: self.memory.ids(swapped=False))
    @rule(data=st.data(), keep_free=KEEP_FREE)
    def append_many_tokens(self, data, keep_free):
        some = self.some(data, swapped=False)
        self.memory.append({seq_id: data.draw(st.integers(0, 6)) for seq_id in some}, keep_free)

    @precondition(lambda self: self.memory.ids(swapped=False))
    @rule(data=st.data(), count=st.integers(0, 6))
    def take_back(self, data, count):
        self.memory.take_back(data.draw(st.sampled_from(self.memory.ids(swapped=False))), count)

    @precondition(lambda self: self.memory.ids(swapped=False))
    @rule(data=st.data(), count=st.integers(1, 6), keep_free=KEEP_FREE)
    def branch(self, data, count, keep_free):
        parent = data.draw(st.sampled_from(self.memory.ids(swapped=False)))
        start = data.draw(st.integers(0, len(self.memory.streams[parent].tokens)))
        self.memory.branch(parent, start, count, keep_free)

    @precondition(lambda self: len(self.memory.ids(swapped=False)) > 1)
    @rule(data=st.data())
    def adopt(self, data):
        self.memory.adopt(*data.draw(st.permutations(self.memory.ids(swapped=False)))[:2])

    @rule(often=st.integers(0, 7))
    def reset(self, often):
        if often == 0:
            self.memory.reset()

    @precondition(lambda self: self.memory.streams)
    @rule(data=st.data())
    def fork(self, data):
        self.memory.fork(data.draw(st.sampled_from(list(self.memory.streams))))

    @precondition(lambda self: self.memory.streams)
    @rule(data=st.data())
    def free(self, data):
        self.memory.free(data.draw(st.sampled_from(list(self.memory.streams))))

    @precondition(lambda self: self.memory.ids(swapped=False))
    @rule(data=st.data())
    def swap_out(self, data):
        self.memory.swap_out(self.some(data, swapped=False))

    @precondition(lambda self: self.memory.ids(swapped=True))
    @rule(data=st.data(), keep_free=KEEP_FREE)
    def swap_in(self, data, keep_free):
        self.memory.swap_in(self.some(data, swapped=True), keep_free)

    @precondition(lambda self: self.memory.streams)
    @rule(data=st.data(), which=st.integers(0, 19))
    def misuse(self, data, which):
        self.memory.misuse(data.draw(st.sampled_from(list(self.memory.streams))), which)

    @invariant()
    def agrees_with_the_model(self):
        self.memory.verify()

    def teardown(self):
        if hasattr(self, "memory"):
            self.memory.finish()


def walk(seed, operations=60):
    """A few requests that fork, write, end and are swapped, as an engine would do it, but in a hurry."""
    rng = random.Random(seed)
    num_blocks, num_cpu_blocks = rng.choice([2, 8, 16, 40]), rng.choice([0, 8, 24])
    size = rng.choice([1, 2, 4, 4])
    cache = rng.choice(["none", "hash", "radix"])
    memory = CheckedMemory(num_blocks, size, num_cpu_blocks, rng.sample(range(num_blocks), num_blocks), cache)
    past = [[]]
    for _ in range(operations):
        one_operation(rng, memory, past)
        memory.verify()
    memory.finish()
    return memory


def one_operation(rng, memory, past):
    here, away, keep_free = memory.ids(swapped=False), memory.ids(swapped=True), rng.choice([0, 0, 0, 1, 3])
    rng.shuffle(here)
    weights = {"allocate": 10}
    weights |= {"append": 40, "fork": 18, "swap out": 7, "publish": 30, "take back": 8, "branch": 8} if here else {}
    weights |= {"adopt": 5} if len(here) > 1 else {}
    weights |= {"begin alike": 15} | ({"forget": 1} if memory.known else {})
    weights |= {"swap in": 10} if away else {}
    weights |= {"fork anywhere": 2, "free": 10, "misuse": 3} if memory.streams else {}
    match rng.choices(list(weights), list(weights.values()))[0]:
        case "allocate":
            memory.allocate(rng.randint(0, 3 * memory.size), keep_free)
        case "begin alike":
            tokens = rng.choice([*past, *(stream.tokens for stream in memory.streams.values())])
            salt = rng.choice([None, None, None, "a"])
            memory.allocate(rng.randint(0, 5), keep_free, tokens[: rng.choice([len(tokens), len(tokens) // 2])], salt)
        case "publish":
            for seq_id in here[: rng.randint(1, 4)]:
                memory.publish(seq_id, len(memory.streams[seq_id].tokens))
                past.append(memory.streams[seq_id].tokens)
        case "forget":
            memory.forget_all()
        case "append":
            some = here[: rng.randint(1, 4)]
            memory.append({seq_id: rng.choice([1, 1, 1, 0, 5]) for seq_id in some}, keep_free)
        case "take back":
            memory.take_back(here[0], rng.choice([0, 1, 1, 2, 5]))
        case "branch":
            length = len(memory.streams[here[0]].tokens)
            memory.branch(here[0], max(0, length - rng.choice([0, 1, 1, 2, 7])), rng.randint(1, 5), keep_free)
        case "adopt":
            memory.adopt(*here[:2])
        case "fork":
            memory.fork(here[0])
        case "fork anywhere":
            memory.fork(rng.choice([*here, *away]))
        case "free":
            memory.free(rng.choice([*here, *away]))
        case "swap out":
            memory.swap_out(here[: rng.randint(1, 4)])
        case "swap in":
            memory.swap_in(rng.sample(away, rng.randint(1, len(away))), keep_free)
        case "misuse":
            memory.misuse(rng.choice([*here, *away]), rng.randrange(100))


def test_random_walks():
    done = Counter()
    for seed in range(250):
        try:
            memory = walk(seed)
        except Exception as error:
            raise AssertionError(f"walk({seed}) fails") from error
        done += memory.seen
    often = {"copies": 200, "moved out": 600, "moved in": 200, "found": 200, "evicted": 600, "not moved": 100}
    often |= {"computed twice": 20, "taken back": 100, "branches": 100, "adopted": 60}
    rare = {name: done[name] for name, least in often.items() if done[name] < least}
    assert not rare, "the walks no longer reach what they are for"


class AllocatorMachine(RuleBasedStateMachine):
    """The allocator alone, to the block number: a list as the queue, a Counter for the counts."""

    @initialize(num_blocks=st.integers(0, 6), data=st.data())
    def start(self, num_blocks, data):
        order = data.draw(st.permutations(range(num_blocks)))
        named = order[: data.draw(st.integers(0, num_blocks))]
        self.pool, self.held = BlockAllocator(num_blocks, named), Counter()
        self.queue = named + [block for block in range(num_blocks) if block not in named]
        self.freed: list[int] = []

    @rule(count=st.integers(0, 4), keep_free=KEEP_FREE)
    def allocate(self, count, keep_free):
        before = snapshot(self.pool)
        if count and count + keep_free > len(self.queue):
            assert self.pool.allocate(count, keep_free) == NoSpace(count + keep_free, len(self.queue))
            assert snapshot(self.pool) == before
            return
        expected, self.queue = self.queue[:count], self.queue[count:]
        assert self.pool.allocate(count, keep_free) == expected
        self.held.update(expected)

    @rule(block=st.integers(-1, 6))
    def share(self, block):
        self.change(self.pool.share, block, +1)

    @rule(block=st.integers(-1, 6))
    def release(self, block):
        self.change(self.pool.release, block, -1)

    def change(self, operation, block, by):
        if not self.held[block]:
            before = snapshot(self.pool)
            with pytest.raises(MisuseError):
                operation(block)
            assert snapshot(self.pool) == before
            return
        operation(block)
        self.held[block] += by
        if not self.held[block]:
            self.queue.append(block)
            self.freed += [block] if block not in self.freed else []

    @rule()
    def take_freed(self):
        assert self.pool.take_freed() == self.freed
        self.freed = []

    @invariant()
    def counts_are_right(self):
        pool = self.pool
        pool.check(dict(self.held))
        assert all(pool.ref_count(block) == self.held[block] for block in range(pool.num_blocks))
        assert pool.num_free == len(self.queue) and pool.num_used == sum(n > 0 for n in self.held.values())
        assert pool.num_free + pool.num_used == pool.num_blocks
        assert pool.num_shared == sum(n > 1 for n in self.held.values())


TestMemory = MemoryMachine.TestCase
TestMemory.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
