# %% [markdown]
# # 4. Blocks
#
# The memory for keys and values is cut into equal pieces, and one small object knows which of them are free and who
# holds the others: the block allocator. This chapter builds it in six steps, and then asks how we can be sure of it.
# We plant mistakes that an ordinary test does not see, and let a machine look for them.
#
# **You need**: Python; [chapter 3](03_the_memory_wall.ipynb) for the reason. **You get**: an allocator that agrees with
# the package's block by block, and a way of testing that you can use for anything that has a state.

# %% [markdown]
# ## The question
#
# A server that gives each request one contiguous piece of memory wastes most of it. In the paper's measurements only
# 20.4 to 38.2 % of the memory for keys and values held tokens (Figure 2); chapter 3 shows where the rest goes.
# Operating systems had the same trouble, and solved it decades ago by cutting memory into **pages** of one size. We
# call such a piece a **block**: room for the keys and values of B tokens, in all layers.
#
# So what does an allocator of equal blocks have to do? It is going to be short, and everything else stands on it. A
# mistake in it does not crash. It lets one request read another one's words; below, it will. How do we know that it is
# right?

# %% [markdown]
# ## The idea
#
# Why does one size help? A request that ends leaves a hole. If pieces have to be contiguous, the next request needs a
# hole that is large enough. Blocks fit into any hole. Here B and D have ended, and E comes:

# %%
from minipaged.teaching import attempt, equal, loads, own, plots, show_source

A, C = (4, "tokens", "A"), (5, "other", "C")
rows = {
    "contiguous": [A, (4, "free", "4"), C, (3, "free", "3")],
    "E wants": [(6, "third", "E")],
    "blocks": [A, (4, "third", "E"), C, (2, "third", "E"), (1, "free", "1")],
}
title = "7 of 16 are free, and 6 are wanted"
alt = "A piece of 6 fits into neither hole, of 4 and of 3. As blocks it takes 4 and 2."
with plots.figure(title, "blocks", size=(6.8, 2.3), alt=alt) as axes:
    plots.strips(axes, rows, kinds=False)

# %% [markdown]
# Holes that are too small for anybody are called external fragmentation. With blocks it is gone, not by cleverness but
# by construction: a free block is as good as any other.
#
# The pool is then a row of N blocks with numbers, and there are two small things to remember:
#
# ```
#  block               0      1      2      3      4      5
#                  +------+------+------+------+------+------+
#                  |      |  A   | A  B |      |  B   |      |      A holds 1, 2; B holds 2, 4
#                  +------+------+------+------+------+------+
#  reference count     0      1      2      0      1      0         how many hold this block
#
#  free list       3 -> 0 -> 5                                      who is next: take in front,
#                                                                   give back behind
# ```
#
# The **free list** says which block is handed out next. The **reference count** of a block says how many sequences
# hold it: two samples that answer the same prompt hold the same blocks for it. At zero the block is free.
#
# ### What is left of the waste
#
# The last block of a sequence is seldom full. That is internal waste, less than one block for each sequence. How much
# is that? Here are requests with lengths like those of the paper, counted when they are complete:

# %%
from minipaged.memory import blocks_for


def empty_share(lengths, B):
    slots = sum(blocks_for(length, B) * B for length in lengths)
    return 1 - sum(lengths) / slots


# %%
for name, kind in {"ShareGPT": loads.SHAREGPT, "Alpaca": loads.ALPACA}.items():
    lengths = [job.prompt + job.output for job in loads.draw(kind, 1000, rate=1)]
    shares = ", ".join(f"{empty_share(lengths, B):.1%} of B={B}" for B in (1, 16, 256))
    print(f"{name:9} empty: {shares}")

# %% [markdown]
# ShareGPT holds long conversations, Alpaca short instructions: the shorter a request, the more its last block weighs.
#
# Then why not B = 1, with no waste at all? Because each block costs something: an entry in a table that is kept and
# read, and another place to go to when attention reads the keys. Which of the two weighs more depends on the machine;
# chapters [5](05_page_tables.ipynb) to [7](07_the_triton_kernel.ipynb) measure it. The paper tried many sizes (Figure
# 18b): ShareGPT was served best with 16 to 128, Alpaca with 16 and 32, and much worse beyond. 16 is good for both. It
# is the paper's default, and ours.

# %% [markdown]
# ## Build it
#
# ### 1. A free list
#
# To take a block is to take a number from a list. To give it back is to put it on the list again. A `deque` does both
# at its ends in constant time.

# %%
from collections import deque

free = deque(range(4))
a, b = free.popleft(), free.popleft()
free.append(a)
print("taken:", a, b, "  free:", list(free))

# %% [markdown]
# Block 0 came back, and stands behind 2 and 3. Why a list, when we could look for a block that nobody holds? Let us
# count how many of 1000 blocks a search from the left looks at, if some of them are free, anywhere:

# %%
from random import Random


def looks(num_free, N=1000):
    """Until it meets a free one; the mean of 300 tries."""
    return sum(min(Random(i).sample(range(N), num_free)) + 1 for i in range(300)) / 300


print({num_free: round(looks(num_free)) for num_free in (500, 50, 5, 1)})
assert looks(1) > 100 * looks(500)

# %% [markdown]
# The search is slow exactly when memory is short, and a good server's memory is nearly full. The free list costs the
# same at every fill.
#
# **Does the order matter?** Not for being right. Ours is first in, first out: the block that has been free longest goes
# next. xv6, a small operating system for teaching, takes from where it gives back, so the block that was freed last
# goes next; its contents may still be in the processor's caches. For us, what a free block holds can be worth something
# later: the next request may begin with the same words ([chapter 13](13_prefix_caching.ipynb)). So we take the oldest
# first.
#
# **Your turn.** Which blocks are taken here, in our order? And which, if `append` becomes `appendleft`, as in xv6?

# %%
free, taken = deque(range(4)), []
for _ in range(6):
    taken.append(block := free.popleft())
    free.append(block)  # and appendleft?
print(taken)

# %% [markdown]
# For examples a chosen order is handy. Figure 6 of the paper hands out the blocks 7, 1 and 3. We let the caller say
# which go first.
#
# ### 2. All or nothing
#
# A prompt of 40 tokens needs three blocks at once. What if two are left? There are four possible answers:
#
# | answer | what it leads to |
# |---|---|
# | `-1` | a valid index in Python: who forgets to compare writes into the last block, and nothing complains |
# | an exception | a full pool is no accident; it is asked about at every step |
# | two blocks | whoever gets them sits on them, and waits for the third |
# | a result with a name | the caller must look at what it got |
#
# So our refusal is a type of its own, which says how many blocks were needed and how many were free. It cannot be
# mistaken for a list, and a type checker reports the caller that forgets it.

# %%
from dataclasses import dataclass


@dataclass(frozen=True)
class NoSpace:
    """Refused: nothing has changed."""

    needed: int
    free: int


class AllOrNothing:
    def __init__(self, num_blocks, first=()):
        self.num_blocks = num_blocks
        self.free = deque([*first, *(b for b in range(num_blocks) if b not in first)])

    def allocate(self, count):
        """`count` blocks; or NoSpace, and nothing has changed."""
        if count > len(self.free):
            return NoSpace(needed=count, free=len(self.free))
        return [self.free.popleft() for _ in range(count)]


# %%
pool = AllOrNothing(4, first=[3, 1])
print(pool.allocate(2), pool.allocate(3), pool.allocate(2))


# %% [markdown]
# The refusal in the middle took nothing: the two blocks that were left went to the next caller.
#
# ### 3. Reference counts
#
# Now several sequences may hold a block. `share` says that there is one holder more, `release` that there is one less.
# The allocator keeps numbers, not names; who holds what is written in the page tables
# ([chapter 5](05_page_tables.ipynb)).

# %%
class Counted(AllOrNothing):
    def __init__(self, num_blocks, first=()):
        super().__init__(num_blocks, first)
        self.counts = [0] * num_blocks

    def allocate(self, count):
        blocks = super().allocate(count)
        for block in blocks if isinstance(blocks, list) else []:
            self.counts[block] = 1
        return blocks

    def share(self, block):
        self.counts[block] += 1

    def release(self, block):
        self.counts[block] -= 1
        if self.counts[block] == 0:
            self.put_back(block)

    def put_back(self, block):
        self.free.append(block)


# %% [markdown]
# Figure 8 of the paper in these words. Two samples (answers to the same prompt), A1 and A2, share it in the blocks 7
# and 1. Then A1 wants to write into block 1, which A2 reads too. It takes block 3 for a copy, and lets go of 1. Then A2
# is alone with block 1, and may write where it is.

# %%
def show(words):
    print(f"{words:22}", "  ".join(f"block {b}: {pool.counts[b]}" for b in (7, 1, 3)))


pool = Counted(8, first=[7, 1, 3])
table1 = pool.allocate(2)
show("A1 has the prompt")
table2 = list(table1)
for block in table2:
    pool.share(block)
show("A2 shares it")
(copy,) = pool.allocate(1)
pool.release(table1[1])
table1[1] = copy
show("A1 writes, in a copy")
for words, table in [("A1 ends", table1), ("A2 ends", table2)]:
    for block in table:
        pool.release(block)
    show(words)
assert len(pool.free) == 8

# %% [markdown]
# Neither sample knows of the other, and neither decides whether a block is free. The count does.
#
# **Your turn.** Write down the counts and the free list behind these calls, in a pool of three. Then run them, and make
# up your own:

# %%
pool = Counted(3)
calls = [("allocate", 2), ("share", 0), ("release", 1), ("allocate", 1), ("release", 0)]
for op, number in calls:
    getattr(pool, op)(number)  # pool.allocate(2), pool.share(0), ...
print("counts:", pool.counts, "  free:", list(pool.free))

# %% [markdown]
# ### 4. Misuse stops at once
#
# What if a caller makes a mistake, and releases a block twice? In this version nothing is said:

# %%
pool = Counted(4)
(block,) = pool.allocate(1)
pool.release(block)
pool.release(block)
print("counts:", pool.counts, "  free:", list(pool.free))

# %% [markdown]
# A count of -1 has no meaning, and from now on this block is one holder short. `pool.release(-1)` would even hit a
# block that the caller never had. The mistake shows much later and somewhere else, if it shows at all. xv6 stops the
# whole machine when something is freed that cannot be a page; we raise an error, before anything has changed.

# %%
class MisuseError(ValueError):
    """A call that no correct caller makes. Nothing was changed."""


class Strict(Counted):
    def ref_count(self, block):
        if not 0 <= block < self.num_blocks:
            raise MisuseError(f"block {block} does not exist")
        return self.counts[block]

    def must_be_held(self, block):
        if self.ref_count(block) == 0:
            raise MisuseError(f"block {block} is free")

    def allocate(self, count):
        if count < 0:
            raise MisuseError(f"{count} blocks cannot be taken")
        return super().allocate(count)

    def share(self, block):
        self.must_be_held(block)
        super().share(block)

    def release(self, block):
        self.must_be_held(block)
        super().release(block)


# %%
pool = Strict(4)
(block,) = pool.allocate(1)
pool.release(block)
for op, number in [("release", 0), ("share", 0), ("release", -1), ("allocate", -1)]:
    try:
        getattr(pool, op)(number)
    except MisuseError as error:
        print(f"{op}({number}): {error}")
assert pool.counts == [0] * 4 and len(pool.free) == 4  # and nothing changed

# %% [markdown]
# A full pool is answered with a result, and misuse with an exception. The first is usual in a busy server and nobody's
# fault; the second must never happen.
#
# ### 5. Freed memory is poison
#
# A caller can be wrong in a way that no count shows: it gives a block back, but keeps the number, and reads on. For a
# while it still finds what it wrote, and a test that looks at the answer passes. In a busy server the block soon has a
# new owner. Then the answer is wrong, but only sometimes, and it still looks like numbers.
#
# So freed memory is filled with something that nobody can overlook. xv6 fills a freed page with junk; for floating
# point there is NaN, which stays NaN whatever is added to it, and even if it is multiplied by a weight of zero. The
# allocator only notes which blocks have lost their contents:

# %%
class Noting(Strict):
    def __init__(self, num_blocks, first=()):
        super().__init__(num_blocks, first)
        self.freed = {}  # a set that keeps its order

    def put_back(self, block):
        super().put_back(block)
        self.freed[block] = None

    def take_freed(self):
        """Blocks that became free since the last call, also those in use again by now."""
        freed, self.freed = list(self.freed), {}
        return freed


# %%
import torch

pool, store = Noting(4), torch.zeros(4, 2)  # N=4 blocks of B=2 slots, a number for each token
(block,) = pool.allocate(1)
store[block] = torch.tensor([1.0, 2.0])
pool.release(block)
print("after release:", store[block].tolist())
store[pool.take_freed()] = torch.nan
print("when poisoned:", store[block].tolist(), " times 0:", (0 * store[block]).tolist())

# %% [markdown]
# Why not fill with zeros? A weighted sum with a few zeros is a slightly smaller number, and nobody notices. **Your
# turn.** Attention weighs four values, and one of them lies in a freed block. Try other poisons. Which of them would
# you see?

# %%
your_poison = 0.0
values, weights = torch.tensor([0.8, 1.1, 0.9, 1.2]), torch.tensor([0.1, 0.2, 0.3, 0.4])
values[0] = your_poison
print(f"with {your_poison} the sum is {weights @ values:.2f}, and it should be 1.05")

# %% [markdown]
# Why note the blocks, and not fill them on the spot? The allocator knows numbers and no tensors; that lets us test it
# fast, with integers alone. And the moment matters: a block may be *swapped out*, copied to CPU memory to make room
# ([chapter 12](12_preemption.ipynb)), and then its contents must be saved first. So the runner, the part of the engine
# that computes, asks once at the start of a step. A block that was freed and taken again in between is on the list,
# too: its new owner has written nothing yet, and must not find old numbers either.
#
# ### 6. A check that anyone may call
#
# Last, the allocator is asked to examine itself. The caller hands in what the page tables hold, and all must agree:
# no block twice in the free list, no block lost, every count equal to the number of holders.

# %%
class IntegrityError(AssertionError):
    """The memory contradicts itself."""


class Allocator(Noting):
    @property
    def num_free(self):
        return len(self.free)

    def check(self, references):
        """references: {block: how many page tables hold it}."""
        free = set(self.free)
        if len(free) != len(self.free):
            raise IntegrityError(f"a block is in the free list twice: {list(self.free)}")
        for block, count in enumerate(self.counts):
            if (count == 0) != (block in free):
                place = "in" if block in free else "not in"
                raise IntegrityError(f"block {block}: count {count}, {place} the free list")
            if count != (held := references.get(block, 0)):
                raise IntegrityError(f"block {block}: count {count}, but {held} hold it")


# %%
pool = Allocator(4)
table1 = pool.allocate(2)
pool.share(table1[0])
pool.check({0: 2, 1: 1})  # silence is the good answer
try:
    pool.check({0: 1, 1: 1})
except IntegrityError as error:
    print(error)

# %% [markdown]
# `check` looks at every block, so it is no part of the work. It runs in tests, and in the engine when `debug` is on.
#
# ## Check it
#
# ### An example test, and five mistakes
#
# Here is the test that most of us would write. It takes, shares, releases, runs into the end of the pool, and tries a
# double free:

# %%
def test_examples(new):
    pool = new(4)
    a, b = pool.allocate(2)
    pool.share(a)
    assert pool.ref_count(a) == 2 and pool.num_free == 2
    pool.release(a)
    pool.release(b)
    assert pool.ref_count(a) == 1 and pool.ref_count(b) == 0
    try:
        pool.release(b)
        raise AssertionError("a double free is not noticed")
    except MisuseError:
        pass
    assert isinstance(pool.allocate(9), NoSpace)


test_examples(Allocator)


# %% [markdown]
# Now five allocators with one mistake each. Read them, and try to say for each whether the test sees it.
#
# The first compares with `>=`. The second takes block by block, and gives up on the way:

# %%
class OffByOne(Allocator):
    def allocate(self, count):
        if count >= len(self.free):
            return NoSpace(count, len(self.free))
        return super().allocate(count)

# %%
class TakesSome(Allocator):
    def allocate(self, count):
        blocks = []
        while self.free and len(blocks) < count:
            blocks += super().allocate(1)
        return blocks if len(blocks) == count else NoSpace(count, 0)


# %% [markdown]
# The third lets a block that was freed lately come to life again, and forgets that it stands in the free list:

# %%
class Undead(Allocator):
    def share(self, block):
        if block not in self.freed:
            self.must_be_held(block)
        Counted.share(self, block)

# %% [markdown]
# The fourth gives a block back when one holder is left. The fifth keeps counts in two bits, to save memory:

# %%
class TooEarly(Allocator):
    def release(self, block):
        self.must_be_held(block)
        self.counts[block] -= 1
        if self.counts[block] < 2:
            self.put_back(block)

# %%
class TwoBits(Allocator):
    def share(self, block):
        super().share(block)
        self.counts[block] &= 0b11


# %%
BUGS = [OffByOne, TakesSome, Undead, TooEarly, TwoBits]
for bug in BUGS:
    test_examples(bug)
print(f"the example test is content with all {len(BUGS)} of them")


# %% [markdown]
# The test is not careless. It just asks about one way through the allocator, the way its author had in mind, and so
# had the author of the mistake.
#
# ### The contract as a model
#
# Let us turn it round: don't write examples, write down what must be true after *any* sequence of calls. For that we
# need to know what should happen, so we keep a **model**: something so simple that it is obviously right. Ours is a
# counter, `{block: how many hold it}`. Nothing in it about lists or orders.

# %%
from collections import Counter


def try_allocate(pool, held, count):
    free = pool.num_blocks - len(held)
    answer = pool.allocate(count)
    if count > free:
        assert not isinstance(answer, list), "hands out more than it has"
        return
    assert isinstance(answer, list), "refuses, though enough is free"
    assert len({*answer} - held.keys()) == count, "hands out a block that is held"
    held.update(answer)


# %% [markdown]
# Wrong calls belong to the contract: they must be refused, and right ones must not.

# %%
def try_count(pool, held, op, block):
    try:
        getattr(pool, op)(block)  # pool.share(block) or pool.release(block)
    except ValueError:
        assert block not in held, f"refuses to {op} a block that is held"
        return
    assert block in held, f"lets a free block be {op}d"
    held[block] += 1 if op == "share" else -1
    if held[block] == 0:
        del held[block]


# %% [markdown]
# After each call all counts must be those of the model, and free blocks and held blocks together must be all blocks.

# %%
def play(pool, ops):
    """Do ops, [(name, number), ...], on pool and model. AssertionError says what broke."""
    held = Counter()
    for op, number in ops:
        if op == "allocate":
            try_allocate(pool, held, number)
        else:
            try_count(pool, held, op, number)
        for block in range(pool.num_blocks):
            assert pool.ref_count(block) == held[block], "a count is wrong"
        assert pool.num_free + len(held) == pool.num_blocks, "free + held is not all"


def fault(new, ops):
    """What breaks when a new pool of two blocks does ops; None if nothing does."""
    try:
        play(new(2), ops)
    except Exception as error:  # a crash is a fault as well
        return str(error)


# %% [markdown]
# ### Any sequence of calls
#
# All calls on a pool of two blocks, wrong ones among them (there is no block 2, and no third one to take), and random
# sequences of them:

# %%
OPS = [("allocate", count) for count in (0, 1, 2, 3)]
OPS += [(op, block) for block in (0, 1, 2) for op in ("share", "release")]


def random_ops(length, random):
    return [random.choice(OPS) for _ in range(length)]


random = Random(1)
assert all(fault(Allocator, random_ops(40, random)) is None for _ in range(500))
print("500 random sequences of 40 calls: the right allocator passes")

# %% [markdown]
# Why so small a pool? Because what goes wrong, goes wrong at the edges: empty, full, one left. In a pool of two the
# edges are everywhere; in a pool of a thousand, random calls would hardly meet them. How long must a sequence be until
# it finds something?

# %%
steps = [1, 2, 3, 5, 8, 12, 20, 30]
random = Random(2)


def found(bug, length):
    """How many percent of 200 random sequences of this length find the mistake."""
    return sum(fault(bug, random_ops(length, random)) is not None for _ in range(200)) / 2


percents = {bug.__name__: [found(bug, length) for length in steps] for bug in BUGS}
assert percents["TakesSome"][-1] > 80 > percents["TooEarly"][-1]

# %%
title, x, y = "Which sequences find it?", "calls in a sequence", "% that find it"
alt = "30 random calls nearly always find two of the mistakes, the others less often."
up = {"OffByOne": 5, "TakesSome": -3, "Undead": -6, "TooEarly": 4}
with plots.figure(title, x, y, alt=alt) as axes:
    for name, percent in percents.items():
        plots.line(axes, steps, percent, name, dy=up.get(name, 0))

# %% [markdown]
# Two mistakes need only one wrong moment. The other three need certain calls in a certain order, and even 30 calls
# often miss them. So we try hundreds of sequences, and then we find everything. But look at what we find. Which of
# these calls did the damage?

# %%
random = Random(3)
long = next(ops for _ in range(99) if fault(TwoBits, ops := random_ops(30, random)))
for first in range(0, 30, 6):
    print(*(f"{op} {number}," for op, number in long[first : first + 6]))
print(fault(TwoBits, long))

# %% [markdown]
# ### hypothesis
#
# The library *hypothesis* does both: it draws random inputs from a description of them, and when one fails it
# **shrinks** it: it leaves out calls and makes numbers simpler, as long as the failure stays. What is left is small
# enough to be understood. `find` gives the smallest input that it can reach:

# %%
from hypothesis import find, settings
from hypothesis import strategies as st

SETTINGS = settings(max_examples=600, derandomize=True, database=None, deadline=None)
often = ["allocate"] * 4 + ["share"] * 4 + ["release"] * 2  # so that counts grow
call = st.tuples(st.sampled_from(often), st.integers(0, 3))

# %%
def smallest(new):
    """The smallest list of calls on which it fails, as far as hypothesis finds one."""
    fails = lambda ops: fault(new, ops) is not None
    return find(st.lists(call, max_size=30), fails, settings=SETTINGS)


# %%
for bug in BUGS:
    ops = smallest(bug)
    calls = ", ".join(f"{op} {number}" for op, number in ops)
    print(f"{bug.__name__:10} {calls:42} {fault(bug, ops)}")

# %% [markdown]
# Look at the last: the whole story in four calls. A block is taken and shared three times, and the count of four does
# not fit into two bits. The others need three calls or fewer. Each is now a good example test, and a better one than
# ours: it asks what we forgot to ask. (`derandomize` and `database=None` make each run the same; usually hypothesis
# looks elsewhere every time, and remembers what failed.)
#
# **Your turn.** Plant a sixth mistake. It should be a small one, of the kind that you make yourself. Is it found? (If
# none is, hypothesis says `NoSuchExample`.)

# %%
class Sixth(Allocator):
    def share(self, block):
        self.must_be_held(block)
        self.counts[block] = 2  # for example


test_examples(Sixth)
print("the example test is content; hypothesis:", ops := smallest(Sixth), fault(Sixth, ops))

# %% [markdown]
# What does it *not* find? What is out of reach. With eight bits instead of two it would take 256 holders to see the
# mistake, and lists of 30 calls do not get there. "Nothing found" means: not with these calls, not within these
# lengths. So make limits small in tests (two bits instead of eight, two blocks instead of a thousand), and know which
# limits are left. Ours are Python's integers, which have none.
#
# ## The package's version
#
# The engine's allocator is `BlockAllocator`, in a file without a single tensor:

# %%
from minipaged.memory import BlockAllocator

show_source(BlockAllocator.allocate, BlockAllocator._take)

# %%
show_source(BlockAllocator.share, BlockAllocator.release, BlockAllocator._drop)

# %% [markdown]
# You will recognize all of it. What it does more:
#
# - **`keep_free`**: take blocks only if so many stay free. A scheduler that admits a new request into the very last
#   block may have to throw somebody out one step later. The blocks that it keeps are called the **watermark**.
# - **`num_used`, `num_shared`, `num_idle` and `peak_used`** are kept up to date at each call. Statistics after every
#   step must not cost a walk through the pool.
# - **`found` and a third place, *idle***. So far a block is free or in use. With a prefix cache (chapter 13), the keys
#   and values of a finished request stay where they are and can be found by the next request with the same beginning:
#
# ```
#                 allocate                     release, count 0,
#      free  ----------------->   in use   ------------------------>  idle
#        ^                        |    ^      the cache knows it        |
#        |   release, count 0,    |    |                                |
#        +------------------------+    +--------------------------------+
#            nobody knows it               share: found again, as it was
# ```
#
# An idle block counts as free. It is taken for something else when no other is left, the least recently used first.

# %%
known = {0, 1}  # in place of a cache: it has to say `block in cache`, and to forget
pool = BlockAllocator(4, cache=known)
for block in pool.allocate(3):
    pool.release(block)
print("free:", pool.num_free, " idle among them:", pool.idle())
pool.share(1)  # somebody begins with the same words
print("3 blocks are taken:", pool.allocate(3), " the cache still knows", known)

# %% [markdown]
# Block 0 went last, and the cache forgot it. The package's `check` does what ours does, and also looks at idle blocks.
# Two methods forget more than one block. `forget_all` is for a cache that is of no use any more, as when the model has
# got other weights. `renewed` is for a step that broke off half way: nobody knows what is in memory, so all blocks are
# free, all count as lost, and only the sums go on.

# %%
known = {0, 1}
pool = BlockAllocator(4, cache=known)
for block in pool.allocate(3):
    pool.release(block)
print("idle:", pool.num_idle, " free:", pool.num_free, " the cache knows", known)
pool.forget_all()
print("idle:", pool.num_idle, " free:", pool.num_free, " the cache knows", known)
new = pool.renewed()
print("renewed: free:", new.num_free, " lost:", new.take_freed(), " peak_used:", new.peak_used)

# %% [markdown]
# ### Do they agree?
#
# Block number by block number, on 400 random sequences with pools of different sizes and orders, refusals and misuse
# included. An answer is what came back, or that it was misuse:

# %%
def answer(pool, op, number):
    try:
        got = getattr(pool, op)(number)
    except ValueError:
        return "misuse"
    return got if got is None or isinstance(got, list) else (got.needed, got.free)


seen = Counter()
for seed in range(400):
    random = Random(seed)
    size = random.randint(0, 6)
    order = random.sample(range(size), random.randint(0, size))
    mine, theirs = Allocator(size, order), BlockAllocator(size, order)
    for _ in range(60):
        op = random.choice(["allocate", "share", "release", "release"])
        number = random.randint(-1, 4 if op == "allocate" else size)
        got = answer(mine, op, number)
        assert got == answer(theirs, op, number)
        assert mine.num_free == theirs.num_free
        seen[got if isinstance(got, str) else type(got).__name__] += 1
    assert mine.take_freed() == theirs.take_freed()
    assert mine.counts == [theirs.ref_count(block) for block in range(size)]

assert min(seen.values()) > 1000  # every kind of answer was really met
print("all 400 agree, with more than 1000 answers of each of", len(seen), "kinds")

# %% [markdown]
# The package's class also has to pass what found our five mistakes. (Its own tests go further. They drive page tables,
# copies and swaps with hypothesis's state machine, in which a rule may depend on what happened before, and look at
# `check` after each.)

# %%
from hypothesis.errors import NoSuchExample

try:
    print(smallest(BlockAllocator))
except NoSuchExample:
    print("nothing found")

# %% [markdown]
# ### The account
#
# Beside the allocator stands the engine's account of its memory. A `Pool` is an allocator with the page tables that are
# made of its blocks, and an engine has two, for the GPU and for the CPU. `measure`, which chapter 3 reads, makes a
# `MemoryUsage` of both and of `Counters`, which add up what was copied and moved since the beginning. Here is Figure 8
# again, in the package's memory (`KVCacheManager`, chapter 5):

# %%
from dataclasses import asdict

from minipaged.memory import KVCacheManager

memory = KVCacheManager(num_blocks=8, block_size=4, free_order=[7, 1, 3])
memory.allocate(1, num_tokens=7)
memory.fork(1, 2)  # A2 shares what A1 has
before = asdict(memory.usage())
memory.append({1: 1})  # A1 writes
for name, now in asdict(memory.usage()).items():
    if now or before[name]:
        print(f"{name:24} {before[name]:5.3g} {now:5.3g}")

# %% [markdown]
# The prompt of 7 tokens is stored once and read twice (`tokens_stored`, `tokens_logical`): two blocks are saved. When
# A1 has its copy, one is, and 11 of 12 slots are full. What is not printed is zero: nothing was swapped or cached.
#
# The account is checked as well. `check_pool` counts anew who holds which block, and hands that to the allocator's
# `check`. It also compares how full those who share a block believe it to be. (`num_published`: so many of its blocks
# a prefix cache may find.)

# %%
from minipaged.memory.accounting import check_pool

show_source(check_pool)

# %% [markdown]
# ### In the engine
#
# The engine lends its memory to be looked at. We give it 16 blocks of 4 tokens, so that they can be drawn, and two
# requests: A asks for two samples, B for one. There is no prefix cache, so a block is free or in use, as in ours. With
# `debug`, freed blocks are filled with NaN, and `check` runs after every step, with the page tables of all sequences.
# After each step we keep a picture, and look which blocks of the engine's tensor, `cache [L, 2, G, N, B, D]`, hold
# nothing but NaN:

# %%
from minipaged import LLM, SamplingParams
from minipaged.terminal.draw import block_map, page_tables
from minipaged.terminal.slots import sheet
from minipaged.terminal.snapshot import Observer

two = SamplingParams(n=2, temperature=1.0, max_tokens=8, ignore_eos=True, seed=0)
one = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)

# %%
llm = LLM("smollm2", device="cpu", num_blocks=16, block_size=4, prefix_cache="none", debug=True)
observer = Observer(llm)  # gives sequences their short names
llm.observers.append(lambda plan, output: observer.follow(plan, output))
llm.add_request("The capital of France is", two)
llm.add_request("The capital of Italy is", one)
moments = []
while llm.has_unfinished_requests:
    llm.step()
    poisoned = llm.executor.runner.cache.isnan().all(dim=(0, 1, 2, 4, 5))  # [N]
    moments.append((observer.snapshot(), poisoned.tolist()))


# %%
def picture(step):
    snapshot, _ = moments[step - 1]
    return sheet(block_map(snapshot), page_tables(snapshot))


picture(step=1)

# %% [markdown]
# Each prompt has 5 tokens and takes two blocks. The two samples of A share theirs: four table entries, two blocks. In
# the next step both samples write their first token into the block that has room, and they are not alone in it:

# %%
assert moments[0][0].usage.shared == 2
picture(step=2)

# %% [markdown]
# A1 got block 4 and a copy of block 1, as in Figure 8. Block 0 is full and nobody writes into it again; it stays
# shared to the end. Two steps later B is done, and its blocks are free:

# %%
picture(step=4)

# %% [markdown]
# One step later B's blocks are poisoned. NaN is in exactly the blocks that nobody holds (with `debug` the tensor began
# full of NaN, and B's blocks went back to that):

# %%
snapshot, poisoned = moments[4]
assert [block for block in range(16) if not poisoned[block]] == sorted(snapshot.holders())
print("can be read:", sorted(snapshot.holders()))
print("blocks in use, step by step:", [snapshot.usage.used for snapshot, _ in moments])

# %%
show_source(type(llm.executor.runner)._move_memory)

# %% [markdown]
# The comment on the order is the reason why the allocator only takes notes.

# %% [markdown]
# ## What must hold, and what breaks if it doesn't
#
# **A block is free or held, never both.** `TooEarly` gives a block back while somebody still holds it. Then two
# sequences write into the same memory, and both believe that it is theirs:

# %%
pool, store = TooEarly(2), torch.zeros(2, 2)
(block,) = pool.allocate(1)
pool.share(block)  # A1 and A2 hold it
store[block] = torch.tensor([1.0, 2.0])
pool.release(block)  # A1 ends
theirs = pool.allocate(2)  # B comes
store[theirs] = 9.0
print("A2 reads", store[block].tolist(), "and had written [1.0, 2.0]")
assert block in theirs

# %% [markdown]
# **Nothing gets lost.** A block that is neither free nor held is gone until the server is started again. Let us make
# the package forget to put blocks back. Each request loses a little, and no answer is wrong:

# %%
from unittest.mock import patch

memory = KVCacheManager(num_blocks=8, block_size=4)
with patch.object(BlockAllocator, "_drop", lambda self, block: None):
    for i in range(6):
        print(i, memory.allocate(i, num_tokens=7))
        if i in memory.sequences():
            memory.free(i)
try:
    memory.check()
except AssertionError as error:
    print(error)

# %% [markdown]
# From the fifth request on nobody is ever served again, in a memory that is empty. `check` names the first lost block.
# With `debug` the engine calls it after every step, and stops in the step in which that block is lost.

# %% [markdown]
# **All or nothing.** Four blocks; C holds two of them, A and B need three each. If each takes what it can get:

# %%
def serve(whole):
    pool, A, B = Allocator(4), [], []
    C = pool.allocate(2)
    for table in (A, B, A, B):
        wanted = 3 - len(table)
        answer = pool.allocate(wanted if whole else min(wanted, pool.num_free))
        table += answer if isinstance(answer, list) else []
        while C:  # it ends when A has asked for the first time
            pool.release(C.pop())
    return f"A holds {A}, B holds {B}"


print("what it can get:", serve(whole=False))
print("all or nothing: ", serve(whole=True))

# %% [markdown]
# Each sits on two and waits for a third that the other one has. That is a deadlock, and no more asking resolves it.
# With all or nothing B runs, and A gets the blocks when B is done.
#
# **Only holders release.** An allocator knows numbers only. If somebody releases a block that is not theirs, it is a
# right call at the wrong time, and the allocator can't see that. What does it look like from outside? Anna and Robert
# tell the engine their secrets. Its memory has a single block, which is Anna's. After one step somebody releases it, by
# mistake. Robert comes, and is given what is free:

# %%
few = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
ANNA = "My name is Anna, and my secret number is 7351. I repeat: my secret number"
ROBERT = "My name is Robert, and my secret number is 9842. I repeat: my secret number"


def served(num_blocks, mistake, debug=False):
    """-> {who: what the model said in seven steps}."""
    sizes = dict(num_blocks=num_blocks, block_size=64, max_model_len=64, watermark=0)
    llm = LLM("smollm2", device="cpu", prefix_cache="none", debug=debug, **sizes)
    llm.add_request(ANNA, few, request_id="Anna")
    llm.step()
    if mistake:
        llm.memory._gpu.allocator.release(0)
    llm.add_request(ROBERT, few, request_id="Robert")
    answers = [answer for _ in range(6) for answer in llm.step()]
    return {answer.request_id: answer.outputs[0].text for answer in answers}


# %%
print("two blocks, no mistake:", served(2, mistake=False))
print("one block, released:   ", wrong := served(1, mistake=True))
assert "9842" in wrong["Anna"]

# %% [markdown]
# Anna is told Robert's number. No error, no strange characters: a good sentence, with the wrong secret. Page tables
# know who holds what. That is why `check` asks for them, and why in the engine only the code that keeps them calls
# `release`. With `debug` the engine stops in the step in which Robert gets the block:

# %%
try:
    served(1, mistake=True, debug=True)
except AssertionError as error:
    print(error)

# %% [markdown]
# Both sequences hold block 0, and don't agree on how full it is.
#
# **Freed memory is never read.** You saw above what it looks like if it is: like right numbers without poison, like
# NaN with it.
#
# ## Exercises
#
# `Allocator`, `play` and `fault` are there to be used.
#
# **1. What sharing saves** (warm-up). The paper measures sharing as blocks saved, divided by the blocks that would be
# needed without it. Compute it from the page tables, which stay as they are.

# %% tags=["exercise"]
def saved_by_sharing(tables):
    """tables: for each sequence the list of its blocks -> a float, 0 to 1; 0 if none is held.

    >>> saved_by_sharing([[7, 3], [7, 1]])
    0.25
    """
    raise NotImplementedError


# %% tags=["test"]
def test_saved_by_sharing(saved_by_sharing):
    saved_by_sharing = own(saved_by_sharing)
    cases = [([[7, 3], [7, 1]], 0.25), ([], 0.0), ([[], []], 0.0), ([[5]], 0.0)]
    for seed in range(200):
        random, N = Random(seed), 200
        memory = KVCacheManager(N, 4, free_order=random.sample(range(N), N))
        for i in range(random.randint(1, 12)):
            if i and random.random() < 0.7:
                memory.fork(random.randrange(i), i)
            else:
                memory.allocate(i, random.randint(0, 20))
            memory.append({random.randint(0, i): random.randint(0, 9)})
        tables = [memory.block_table(i) for i in memory.sequences()]
        random.shuffle(tables)
        without = sum(map(len, tables))
        saved = memory.usage().blocks_saved_by_sharing
        cases.append((tables, saved / without if without else 0.0))
    for tables, right in cases:
        got = saved_by_sharing(tables)
        assert equal(got, right, tolerance=1e-9), f"{tables}: {right:.4f}, not {got}"


attempt(test_saved_by_sharing, saved_by_sharing)

# %% [markdown]
# **2. The free list as one number.** Keep the free blocks in the bits of a Python integer: bit b is 1 if block b is
# free. Always hand out the lowest free blocks, in ascending order. (`x & -x` is the lowest bit of x alone.) The point
# is the memory that it takes: a bit for each block, and besides that something for each block in use, and nothing else.

# %% tags=["exercise"]
class BitmapAllocator:
    """Does what Allocator does, without check and take_freed; hands out the lowest free blocks.

    num_blocks; bits, an int that is kept and not made when asked for; num_free;
    allocate(count) -> list, lowest first, or NoSpace(needed, free); MisuseError if count < 0;
    share(block), release(block): MisuseError if the block is free or does not exist;
    ref_count(block): how many hold it, any number; MisuseError if it does not exist.
    Nothing changes when it refuses. 100,000 free blocks take less than 30,000 bytes.
    """

    def __init__(self, num_blocks):
        raise NotImplementedError


# %% tags=["test"]
def test_BitmapAllocator(BitmapAllocator):
    import tracemalloc

    BitmapAllocator = own(BitmapAllocator)

    def do(pool, op, number):
        """What it answers, as plain data."""
        try:
            got = getattr(pool, op)(number)
        except MisuseError:
            return "MisuseError"
        return (got.needed, got.free) if hasattr(got, "needed") else got

    def expected(counts, op, number):
        """The same from a list of counts, which is changed by it."""
        free = [block for block, count in enumerate(counts) if count == 0]
        if op == "allocate":
            if not 0 <= number <= len(free):
                return "MisuseError" if number < 0 else (number, len(free))
            for block in free[:number]:
                counts[block] = 1
            return free[:number]
        if not 0 <= number < len(counts) or counts[number] == 0:
            return "MisuseError"
        counts[number] += 1 if op == "share" else -1

    def compare(pool, counts, op, number):
        held = {block: count for block, count in enumerate(counts) if count}
        done = f"{len(counts)} blocks, of which {held} are held, {op}({number})"
        right, got = expected(counts, op, number), do(pool, op, number)
        assert equal(got, right), f"{done}: {right}, not {got}"
        for block, count in enumerate(counts):
            got = pool.ref_count(block)
            assert equal(got, count), f"{done}: block {block} has {count} holders, not {got}"
        bits = sum(1 << block for block, count in enumerate(counts) if count == 0)
        assert type(pool.bits) is int, f"{done}: bits is {pool.bits}, and not an int"
        assert pool.bits == bits, f"{done}: the bits are {bits:b}, not {pool.bits:b}"
        assert equal(pool.num_free, counts.count(0)), f"{done}: num_free, not {pool.num_free}"
        for block in (-1, len(counts)):
            assert do(pool, "ref_count", block) == "MisuseError", f"there is no block {block}"

    for seed in range(60):
        random = Random(seed)
        sizes = [random.choice([0, 1, 3, 8, 70]) for _ in range(2)]  # two, which share nothing
        pools = [BitmapAllocator(size) for size in sizes]
        counts = [[0] * size for size in sizes]
        for _ in range(50):
            i = random.randrange(2)
            op = random.choice(["allocate", "share", "share", "release", "release"])
            held = [block for block, count in enumerate(counts[i]) if count] or [0]
            number = random.choice([random.choice(held), random.randint(-2, sizes[i] + 1)])
            if op == "allocate":
                number = random.randint(-1, random.choice([2, sizes[i] + 1]))
            compare(pools[i], counts[i], op, number)
    pool, counts = BitmapAllocator(2), [0, 0]
    compare(pool, counts, "allocate", 1)
    for op in ["share"] * 300 + ["release"] * 301:  # many holders
        compare(pool, counts, op, 0)
    BitmapAllocator(100)  # what is made only once, is made now
    tracemalloc.start()
    try:
        pool = BitmapAllocator(100_000)
        for block in pool.allocate(5):
            pool.release(block)
        taken = tracemalloc.get_traced_memory()[0]
        kept = pool.bits is pool.bits
    finally:
        tracemalloc.stop()
    assert taken < 30_000, f"100,000 free blocks take {taken:,} bytes, not less than 30,000"
    assert kept, "bits is made anew when it is asked for: keep it"


attempt(test_BitmapAllocator, BitmapAllocator)


# %% [markdown]
# **3. Shrink it yourself.** What hypothesis does to a failing list, in its simplest form: leave out one call after the
# other, as long as the rest still fails. When are you done? A call that was needed at first may be needless after
# others are gone.

# %% tags=["exercise"]
def shrink(new, ops):
    """ops: a list in which fault(new, ops) finds something -> a list of what is left, in order.

    It still fails, and without any single one of its calls it doesn't. It may be empty, if a
    new pool fails by itself. `ops` stays as it is. Don't call hypothesis.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_shrink(shrink):
    shrink = own(shrink, forbid=[find, smallest])

    class NoPool(Allocator):
        def __init__(self, num_blocks):
            raise ValueError("no pool")

    def forgets(most):
        """A new mistake each time: it can count to `most` holders, on one of the blocks."""

        class Forgets(Allocator):
            def share(self, block):
                super().share(block)
                if block == most % 2:
                    self.counts[block] = min(self.counts[block], most)

        return Forgets

    tried = 0
    for seed in range(300):
        random = Random(seed)
        new = random.choice([*BUGS, NoPool, forgets(random.randint(1, 4))])
        ops = random_ops(random.choice([3, 10, 25]), random)
        if not fault(new, ops):
            continue
        tried, rest = tried + 1, iter(ops)
        small = shrink(new, ops)
        what = f"{new.__name__}, {ops}"
        assert isinstance(small, (list, tuple)), f"{what}: a list, not {small}"
        in_order = all(any(equal(op, one) for one in rest) for op in small)
        assert in_order, f"{what}: {small} are others, or in another order"
        small = list(small)
        assert fault(new, small), f"{what}: {small} doesn't fail"
        for i in range(len(small)):
            without = small[:i] + small[i + 1 :]
            assert not fault(new, without), f"{what}: {small} fails without {small[i]}, too"
    assert tried > 100


attempt(test_shrink, shrink)


# %% [markdown]
# **4. A third place** (open). Give `Allocator` the package's idle blocks. `keep(block)` says of a block in use that its
# contents are worth keeping. The test compares with the package, block by block, also what is to be poisoned. When it
# passes, go on: is the block that has been idle longest the best one to give up? What would you want to know about a
# block to choose better?

# %% tags=["exercise"]
class Thrifty(Allocator):
    """Allocator with idle blocks: nobody holds them, but their contents are kept.

    keep(block): mark a block that is in use; MisuseError if it isn't. When its last holder
        releases it, it becomes idle, and not free for good.
    idle(): the idle blocks, longest idle first. They count as free (num_free).
    share(block): brings an idle block back, marked as it was.
    allocate(count): takes idle blocks when no other is left, longest idle first; their marks
        are gone then.
    take_freed(): the blocks that lost their contents since the last call, each once, in any
        order. An idle block has not lost them; one that was taken for something else has.
    As before, nothing changes when it refuses. There is no need for check.
    """

    def __init__(self, num_blocks):
        raise NotImplementedError


# %% tags=["test"]
def test_Thrifty(Thrifty):
    Thrifty = own(Thrifty)

    def step(mine, theirs, marks, random, size):
        op = random.choice("allocate share release release keep freed".split())
        number = random.randint(-1, size + (op == "allocate"))
        before = f"idle {theirs.idle()}, {theirs.num_free} free, marked {sorted(marks)}: {op}"
        if op == "freed":
            got, right = list(mine.take_freed()), sorted(theirs.take_freed())
            what = f"{before}: {right} lost their contents, not {got}"
            assert equal(sorted(got), right), what
        elif op == "keep":
            held = {number} if 0 <= number < size and theirs.ref_count(number) else set()
            got, right = answer(mine, op, number), None if held else "misuse"
            assert equal(got, right), f"{before} {number}: {right}, not {got}"
            marks |= held
        else:
            got, right = answer(mine, op, number), answer(theirs, op, number)
            assert equal(got, right), f"{before} {number}: the package says {right}, not {got}"
        got, right = mine.idle(), theirs.idle()
        assert equal(got, right), f"{before} {number}: now {right} are idle, not {got}"
        assert equal(mine.num_free, theirs.num_free), f"{before} {number}: num_free"
        counts = [theirs.ref_count(block) for block in range(size)]
        got = [mine.ref_count(block) for block in range(size)]
        assert equal(got, counts), f"{before} {number}: now the counts are {counts}, not {got}"

    for seed in range(150):
        random = Random(seed)
        sizes = [random.randint(1, 6) for _ in range(2)]  # two of them, which share nothing
        marks = [set(), set()]
        mine = [Thrifty(size) for size in sizes]
        theirs = [BlockAllocator(size, cache=known) for size, known in zip(sizes, marks)]
        for _ in range(80):
            i = random.randrange(2)
            step(mine[i], theirs[i], marks[i], random, sizes[i])


attempt(test_Thrifty, Thrifty)

# %% [markdown]
# ## What's next
#
# A block has a number, and a sequence has a list of numbers. [Chapter 5](05_page_tables.ipynb) makes a page table of
# that list: where does the token at position 37 live, and what happens when two sequences share a block and one of
# them writes?
#
# ## Sources
#
# - Kwon et al., *Efficient Memory Management for Large Language Model Serving with PagedAttention*, SOSP 2023: blocks,
#   reference counts, the figures named above.
# - Cox, Kaashoek and Morris, *xv6: a simple, Unix-like teaching operating system*: `kalloc.c`, a whole allocator on one
#   page, with junk in freed pages.
# - Claessen and Hughes, *QuickCheck*, 2000: properties instead of examples. MacIver et al., *Hypothesis: A new approach
#   to property-based testing*, 2019.
# - Zeller and Hildebrandt, *Simplifying and Isolating Failure-Inducing Input*, 2002: shrinking, by an older name.
