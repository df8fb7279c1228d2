# %% [markdown]
# # 5. Page tables
#
# Blocks may lie anywhere in memory, and yet a sequence can go on as if its tokens stood in a row. What makes that
# possible is a list of integers for each sequence, its page table. This chapter builds it, lets it grow one block at
# a time, shares it between two answers to one prompt, and measures how little memory is wasted.
#
# **You need**: the pool of equal blocks from [chapter 4](04_blocks.ipynb). **You get**: the paper's three examples of
# its memory, to the block number; a memory of your own that agrees with the package's; and a number for the waste.

# %% [markdown]
# ## The question
#
# Chapter 3 gave each request a row of memory as long as it might ever need, and most of it stayed empty. Chapter 4
# cut memory into equal blocks that anyone can take from anywhere. That leaves questions:
#
# - A sequence thinks in **positions**: token 0, 1, 2, and so on. Where does position 1000 live?
# - A sequence grows by one token a step. At which step does it need a block, and when does it not?
# - Two answers begin with the same prompt. Can both read the same blocks, and what if one of them writes?
# - The last block is rarely full. How much is wasted now?

# %% [markdown]
# ## The idea
#
# Operating systems solved this in the 1960s, and the words are taken from there:
#
# | | a computer's memory | the memory of a server |
# |---|---|---|
# | who uses it | a process | a sequence |
# | what is stored | a byte | a token's keys and values |
# | what it is cut into | pages, often of 4096 bytes | **blocks**, often of 16 tokens |
# | the address that the user sees | a virtual address | a **position** |
# | the address where it really is | a physical address | a **slot** |
# | what leads from one to the other | the page table | the **page table** |
#
# A sequence sees its tokens cut into **logical blocks** 0, 1, 2, ... of B tokens. Each lives in some **physical
# block** of the pool, and the page table says in which. A position is split in two: which logical block, and where in
# it. Only the first part is looked up. Here is the way of position 1000 in blocks of B = 16, if logical block 62
# happens to live in physical block 347:
#
# ```
#                     position 1000
#                    /             \             divmod(1000, 16)
#        logical block 62        offset 8
#               |                    |           table[62] = 347
#       physical block 347       offset 8
#                    \             /             347 * 16 + 8
#                       slot 5560
# ```
#
# The **slot** is the token's place when the whole pool of N blocks is seen as one row of N times B places. What
# touches memory works with slots and physical blocks. Everything else, rope and mask and our own thinking, works with
# positions.

# %% [markdown]
# ## Build it
#
# ### From position to slot
#
# A page table needs no class: it is a list. Its numbers are those of the blocks that were free when one was needed,
# so they come in no order. Here is one of 63 blocks, from a pool of 500:

# %%
from collections import Counter, deque
from copy import deepcopy
from random import Random
from types import SimpleNamespace

import torch

from minipaged.teaching import attempt, equal, loads, own, plots, show_source

table = Random(5).sample(range(500), 63)
print(table[:8], "...", table[62])


# %%
def locate(table, position, B):
    """(physical block, offset) of the token at `position`."""
    logical, offset = divmod(position, B)
    return table[logical], offset


def slot(table, position, B):
    block, offset = locate(table, position, B)
    return block * B + offset


print(divmod(1000, 16), "->", locate(table, 1000, 16), "-> slot", slot(table, 1000, 16))
assert slot(table, 1000, 16) == 5560  # as drawn above

# %% [markdown]
# Neighbours in the text are neighbours in memory, but only inside a block. Here are 160 positions in a pool of 20
# blocks:

# %%
small = Random(1).sample(range(20), 10)
alt = "Ten short rising strokes of 16 points each, scattered over the pool without any order"
with plots.figure("Where positions live", "position", "slot", size=(6.8, 2.8), alt=alt) as axes:
    places = [slot(small, position, 16) for position in range(160)]
    axes.plot(places, ".", color=plots.COLORS[0], markersize=3)
    axes.set(xticks=range(0, 161, 16), yticks=range(0, 321, 64))


# %% [markdown]
# A step often computes several tokens of a sequence: a whole prompt, or a piece of it. The slots of these tokens, in
# order, say where to write. Such a list is called a **slot mapping**:

# %%
def slots(table, start, count, B):
    """The slots of positions start .. start + count - 1."""
    return [slot(table, position, B) for position in range(start, start + count)]


print(slots(table, 12, 8, 16))

# %% [markdown]
# **Your turn.** Which of these eight slots are neighbours, and why is there a jump in the middle? And what does
# `slot(table, 1008, 16)` say? Decide before you run it.
#
# ### Real vectors
#
# Now we store something. A pool of N blocks of B slots holds, in each slot, a vector of D numbers. In the engine it
# is a key and a value for each layer; here one vector is enough. For writing, the pool is one row of slots:

# %%
N, B, D, T = 500, 16, 4, 1001
torch.manual_seed(0)
vectors = torch.randn(T, D)  # of positions 0 to 1000
pool = torch.full((N, B, D), torch.nan)
pool.view(N * B, D)[slots(table, 0, T, B)] = vectors
print(f"{pool.isnan().all(-1).sum()} of {N * B} slots are still empty")

# %% [markdown]
# For reading, take whole blocks in the order of the table, lay them end to end, and cut off what lies beyond the last
# token:

# %%
blocks = pool[table]  # [63, B, D]
read_back = blocks.flatten(0, 1)[:T]
assert torch.equal(read_back, vectors)
assert table != sorted(table)  # it was scrambled, so this was no accident
print(list(blocks.shape), "->", list(read_back.shape), "and all is as it was")

# %% [markdown]
# Attention needs the keys in order, and `pool[table]` gives them in order. Chapter 6 does the same without making
# this copy.
#
# *Does each layer need a table of its own?* No. The pool is laid out alike in every layer, so block 347 means place
# 347 in each of them: one table serves all layers, and keys as well as values.
#
# ### A memory for sequences
#
# Until now the table fell from the sky. It grows as its sequence grows, out of chapter 4's pool: `allocate(count)`
# takes free blocks or answers `NoSpace`, and `release` gives one back. `free_order` says which are handed out first,
# so that we can redraw the paper's pictures.
#
# `start` takes the blocks for a prompt, whose length is known. It takes none for the answer, however long that may
# become. This is where the reservations of chapter 3 disappear.

# %%
from minipaged.memory import BlockAllocator, NoSpace


class NoBlock(Exception):
    """Not enough blocks are free. Nothing was changed."""


class Memory:
    """Sequences by name: for each a page table, and how many tokens it has."""

    def __init__(self, N, B, free_order=()):
        self.pool, self.B = BlockAllocator(N, free_order), B
        self.tables, self.lengths = {}, {}

    def take(self, count):
        blocks = self.pool.allocate(count)
        if isinstance(blocks, NoSpace):
            raise NoBlock(blocks)
        return blocks

    def start(self, name, length):
        self.tables[name] = self.take(-(-length // self.B))  # length / B, rounded up
        self.lengths[name] = length


# %% [markdown]
# ### Growing on demand
#
# Then a token comes. If the last block has room, nothing is taken. If it is full, one block is taken. `append` is
# three lines, and they are the reason for the small waste. If no block is free, `take` refuses, and nothing has
# changed. Who has to give way then is a question for a scheduler; the memory only says no.

# %%
class GrowingMemory(Memory):
    def room(self, name):
        """Empty slots in the last block."""
        return len(self.tables[name]) * self.B - self.lengths[name]

    def append(self, name):
        """One more token has a slot."""
        if self.room(name) == 0:
            self.tables[name] += self.take(1)
        self.lengths[name] += 1

    def slots(self, name, start=0):
        """Where the tokens from position `start` on live."""
        return slots(self.tables[name], start, self.lengths[name] - start, self.B)

    def end(self, name):
        for block in reversed(self.tables.pop(name)):  # as the package does; any order is right
            self.pool.release(block)
        del self.lengths[name]


# %% [markdown]
# ### Figure 6, step by step
#
# The paper draws it with blocks of 4 tokens and a prompt of 7. Here and in the next two figures the words and the
# numbers of the blocks are the paper's. We store the words themselves in place of vectors, in a list with a place for
# each slot:

# %%
def write(memory, stored, name, words):
    """Put `words` into the last slots of a sequence."""
    start = memory.lengths[name] - len(words)
    for slot, word in zip(memory.slots(name, start), words):
        stored[slot] = word


def read(memory, stored, name):
    return [stored[slot] for slot in memory.slots(name)]


def say(memory, stored, name, word):
    """The model has said one more word."""
    memory.append(name)
    write(memory, stored, name, [word])


# %% [markdown]
# The package can draw page tables. It will draw ours, if we hand over the sizes and the tables. The words in its
# drawings are read from their slots:

# %%
from minipaged.terminal.slots import logical_view, physical_view, sheet
from minipaged.terminal.snapshot import Snapshot, Table


def draw(memory, stored):
    tables = [Table(name, memory.lengths[name], table) for name, table in memory.tables.items()]
    sizes = SimpleNamespace(num_blocks=memory.pool.num_blocks, block_size=memory.B)
    words = {name: read(memory, stored, name) for name in memory.tables}
    moment = Snapshot(sizes, tables)
    return sheet(logical_view(moment, words), physical_view(moment, words))


# %% [markdown]
# **Step 1**: the prompt. Blocks 7 and 1 are the first free ones. One is filled, the other holds three; a dot is an
# empty slot.

# %%
PROMPT = "Four score and seven years ago our".split()


def figure_6(*said):
    """A fresh memory with the prompt of A, and then what the model said."""
    memory, stored = GrowingMemory(N=8, B=4, free_order=[7, 1, 3, 5, 2]), ["."] * 32
    memory.start("A", len(PROMPT))
    write(memory, stored, "A", PROMPT)
    for word in said:
        say(memory, stored, "A", word)
    return memory, stored


draw(*figure_6())

# %% [markdown]
# **Step 2**: the model says "fathers". Block 1 has an empty slot, so the word goes there, and no block is taken:

# %%
memory, stored = figure_6("fathers")
assert memory.tables["A"] == [7, 1] and memory.room("A") == 0  # block 1: filled 3 -> 4
print("page table", memory.tables["A"], " the new word is in slot", memory.slots("A")[-1])

# %% [markdown]
# **Step 3**: "brought". Both blocks are full, so the next free block, 3, becomes logical block 2:

# %%
memory, stored = figure_6("fathers", "brought")
assert memory.tables["A"] == [7, 1, 3] and memory.room("A") == 3  # block 3: filled 1
draw(memory, stored)


# %% [markdown]
# In the lower drawing the beginning of the text stands at the end of memory. The upper drawing is the same memory,
# seen through the table.
#
# ### Figure 7: a second sequence
#
# Another request comes, and gets blocks 5 and 2. Neither sequence knows of the other:

# %%
OTHER = "It was the best of times".split()


def figure_7():
    memory, stored = figure_6("fathers", "brought")
    memory.start("B", len(OTHER))
    write(memory, stored, "B", OTHER)
    return memory, stored


memory, stored = figure_7()
assert memory.tables == {"A": [7, 1, 3], "B": [5, 2]}
assert read(memory, stored, "A") == [*PROMPT, "fathers", "brought"]
draw(memory, stored)

# %% [markdown]
# **Your turn.** `free_order` in `figure_6` decides which blocks are taken. Turn it round. What changes in the upper
# drawing, and what in the lower one?
#
# Wasted are the slots that are taken and empty: the dots in rows that have an owner, 3 of A's and 2 of B's. The free
# rows are for anyone.
#
# Over time, what a sequence holds is a staircase just above the line of its tokens. A row in the manner of chapter 3
# has its full length at once:

# %%
growing, held = GrowingMemory(N=100, B=16), []
growing.start("A", 20)
for _ in range(80):
    held.append(len(growing.tables["A"]) * 16)
    growing.append("A")

alt = "Held slots rise in steps of 16 just above the tokens; a reserved row is at 120"
with plots.figure("What one sequence holds", "tokens", "slots", alt=alt) as axes:
    plots.line(axes, range(20, 100), [120] * 80, "reserved for 120 tokens", at=2, dy=9)
    plots.line(axes, range(20, 100), held, "blocks of 16", drawstyle="steps-post")
    plots.line(axes, range(20, 100), range(20, 100), "tokens", at=52, dy=-11)
    axes.set_ylim(0, 140)


# %% [markdown]
# ### Figure 8: sharing
#
# Somebody wants two answers, A1 and A2, to one prompt. Both begin with the same 7 tokens, whose keys and values are
# the same numbers. Why keep them twice? A **fork** copies the page table, and not the blocks. The reference counts of
# chapter 4 say how many tables name a block; it is free again when the last of them is gone.

# %%
class ForkingMemory(GrowingMemory):
    def fork(self, parent, child):
        """Start `child` with all tokens of `parent`, in the same blocks."""
        self.tables[child] = self.tables[parent].copy()
        self.lengths[child] = self.lengths[parent]
        for block in self.tables[child]:
            self.pool.share(block)  # its count goes up by one


# %% [markdown]
# Then A1 says "fathers", and A2 something else, say "mothers". Both words belong into the last slot of logical block
# 1, which is one and the same slot. So whoever writes into a block that others hold too must get a copy first. That
# is **copy-on-write**; operating systems do it with the pages of a process that was forked.
#
# Which blocks can need a copy? Only the last: all before it are full, and a full block is never written again. So
# there is at most one copy for a sequence that writes:

# %%
class SharingMemory(ForkingMemory):
    def append(self, name):
        """One more slot. Returns None, or (source, target): a block to copy first."""
        table, copy = self.tables[name], None
        if self.room(name) and self.pool.ref_count(table[-1]) > 1:
            copy = table[-1], self.take(1)[0]
            self.pool.release(table[-1])
            table[-1] = copy[1]
        super().append(name)
        return copy


# %% [markdown]
# The memory knows numbers only and can't copy what a block holds. It tells, and whoever owns the contents does it:

# %%
def copy_and_say(memory, stored, name, word):
    if copy := memory.append(name):
        source, target = (block * memory.B for block in copy)
        stored[target : target + memory.B] = stored[source : source + memory.B]
    write(memory, stored, name, [word])
    return copy


# %% [markdown]
# The prompt once more in blocks 7 and 1, and a **fork**: two sequences of 7 tokens, and two blocks.

# %%
def figure_8(*said):
    """The prompt of A1, forked to A2; then (who, word), one after the other."""
    memory, stored = SharingMemory(N=8, B=4, free_order=[7, 1, 3]), ["."] * 32
    memory.start("A1", len(PROMPT))
    write(memory, stored, "A1", PROMPT)
    memory.fork("A1", "A2")
    copies = [copy_and_say(memory, stored, *one) for one in said]
    return memory, stored, copies


memory, stored, _ = figure_8()
assert memory.tables == {"A1": [7, 1], "A2": [7, 1]}
assert memory.pool.ref_count(7) == memory.pool.ref_count(1) == 2
draw(memory, stored)

# %% [markdown]
# **A1 writes.** The count of block 1 is 2. Block 3 is taken, the contents of 1 are copied to 3, and the count of 1
# falls to 1:

# %%
memory, _, copies = figure_8(("A1", "fathers"))
assert copies == [(1, 3)] and memory.pool.ref_count(1) == 1
assert memory.tables == {"A1": [7, 3], "A2": [7, 1]}
counts = {block: memory.pool.ref_count(block) for block in (7, 1, 3)}
print("copied:", copies, " counts:", counts)

# %% [markdown]
# **A2 writes.** It is alone in block 1 by now, so it writes there, and nothing is copied:

# %%
memory, stored, copies = figure_8(("A1", "fathers"), ("A2", "mothers"))
assert copies == [(1, 3), None] and memory.tables["A2"] == [7, 1]
assert [read(memory, stored, name)[-1] for name in ("A1", "A2")] == ["fathers", "mothers"]
draw(memory, stored)

# %% [markdown]
# Block 7 stays shared until both have ended:

# %%
memory, *_ = figure_8(("A1", "fathers"), ("A2", "mothers"))
for name in ("A1", "A2"):
    memory.end(name)
    free, count = memory.pool.num_free, memory.pool.ref_count(7)
    print(f"{name} ended: {free} of 8 blocks free, count of 7 is {count}")

# %% [markdown]
# **Your turn.** Let A2 write first. Which of the two gets the copy then, and into which block does A1 write? And what
# if the prompt were eight words long?

# %% [markdown]
# ### How much is wasted?
#
# First by arithmetic. A sequence of $n$ tokens has $\lceil n/B \rceil$ blocks, of which only the last can have empty
# slots:
#
# $$ \text{waste} = B \lceil n/B \rceil - n, \qquad 0 \le \text{waste} \le B - 1 $$
#
# That is less than one block for each sequence, whether it has ten tokens or ten thousand. If every filling of the
# last block is equally likely, the mean is that of 0, 1, ..., B-1, which is (B-1)/2: 7.5 slots for B = 16.

# %% [markdown]
# Now with the load of chapter 3, requests with lengths like those of ShareGPT's conversations. They all wait from the
# start; 40 run at a time, and each gets one token a step. Chapter 4 counted the waste of requests that are complete.
# Here we see them grow.

# %%
jobs = loads.draw(loads.SHAREGPT, 300, rate=2.0)
print("tokens of prompt and answer:", [(job.prompt, job.output) for job in jobs[:6]], "...")


# %%
def serve(jobs, B, at_once=40):
    """-> for each step (sequences, tokens, slots held), until the queue is empty."""
    memory = SharingMemory(N=at_once * (loads.MAX_LEN // B), B=B)
    waiting, ends, history = deque(enumerate(jobs)), {}, []
    while waiting:
        while waiting and len(ends) < at_once:
            name, job = waiting.popleft()
            memory.start(name, job.prompt)
            ends[name] = job.prompt + job.output
        for name in ends:
            memory.append(name)
        tokens = sum(memory.lengths.values())
        history.append((len(ends), tokens, memory.pool.num_used * B))
        for name in [name for name, end in ends.items() if memory.lengths[name] == end]:
            memory.end(name)
            del ends[name]
    return history


# %%
def waste_percent(history):
    """Empty slots in percent of the held ones."""
    held = sum(row[2] for row in history)
    return 100 * (held - sum(row[1] for row in history)) / held


SIZES = [1, 4, 8, 16, 32, 64, 128, 256]
runs = {B: serve(jobs, B) for B in SIZES}
for B, history in runs.items():
    print(f"B = {B:3}: {waste_percent(history):4.1f} % of the held slots are empty")
assert waste_percent(runs[1]) == 0 and 0 < waste_percent(runs[16]) < 4

# %% [markdown]
# In all runs the same sequences have the same tokens at the same step; only B differs. For vLLM the paper's Figure 2
# prints 96.3 % of tokens, and its announcement says that under 4 % is wasted. For B = 16 we come out below that. (Our
# pool is never full, and we count the blocks in use only. Chapter 3 counted the free ones too.) The percentage depends
# on the lengths: short sequences have as many empty slots as long ones, and fewer tokens.
#
# And the row of chapter 3? That is one block, as long as a sequence may ever be:

# %%
one_block = waste_percent(serve(jobs, loads.MAX_LEN))
print(f"B = {loads.MAX_LEN}: {one_block:.0f} % of the slots are empty")
assert one_block > 70

# %% [markdown]
# So reserving the maximum is paging too, with pages of 2048 tokens. Of such a system, Orca (Max), the paper says that
# 20.4 % of the memory holds tokens.
#
# **Your turn.** Take `loads.ALPACA`, short instructions with short answers, in place of `loads.SHAREGPT`. Do the
# percentages rise or fall, and the mean number of empty slots of a sequence?
#
# ### The other side
#
# Small blocks waste less, so why not B = 1? Because a block costs something by itself, however much is in it. It has an
# entry in a table, which Python keeps and hands to the device at each step, and which whoever reads the sequence has to
# look up. And a look-up is a wait: the block's number must have come before its contents can be asked for. All this
# grows with the number of blocks. So we draw both, for one sequence on average:

# %%
waste = [sum(h - t for _, t, h in runs[B]) / sum(s for s, _, _ in runs[B]) for B in SIZES]
entries = [sum(h / B for _, _, h in runs[B]) / sum(s for s, _, _ in runs[B]) for B in SIZES]
alt = "Left: waste lies on the line (B-1)/2. Right: entries fall from hundreds to two."
titles = "Empty slots of a sequence", "Blocks of a sequence"
with plots.figures(*titles, size=(8.6, 3.2), alt=alt) as (a, b):
    plots.label(a, "block size B", "slots")
    plots.line(a, SIZES, [(B - 1) / 2 for B in SIZES], "(B-1)/2", at=6, dy=-8, marker="")
    plots.line(a, SIZES, waste, "counted", at=5, dy=-8, linestyle="")
    plots.label(b, "block size B", "entries M")
    plots.line(b, SIZES, entries, "counted", at=4, dy=9)
    b.set(xscale="log", yscale="log", xticks=SIZES, xticklabels=SIZES)
    b.minorticks_off()

# %%
for B, empty, M in zip(SIZES, waste, entries):
    assert abs(empty - (B - 1) / 2) <= 0.1 * (B - 1) / 2  # at most a tenth from theory
    print(f"B = {B:3}: {empty:5.1f} empty slots, {M:5.1f} entries")

# %% [markdown]
# From 1 to 16 the number of blocks falls almost to a sixteenth, for a few slots. Beyond, the waste doubles each time,
# and there are few look-ups left to save. The paper's default is 16; chapter 4 says what it measured, and
# [chapter 6](06_pagedattention.ipynb) what else speaks for and against small blocks.
#
# The room for the table itself doesn't count: an entry of 8 bytes points to 16 tokens of 819,200 bytes (the paper's
# OPT-13B), more than a million times as much.

# %% [markdown]
# ## Check it
#
# The examples are right. Is everything? We let random sequences start, grow, fork and end, in small pools with random
# free orders. Every new token is different. Beside the pool each sequence has its own plain list, `truth`, and after
# each event everything is compared:

# %%
def check(memory, stored, truth):
    holders = Counter()
    for name, tokens in truth.items():
        places = memory.slots(name)
        assert [stored[slot] for slot in places] == tokens, "what was written is read"
        assert len(set(places)) == len(places), "no slot twice"
        assert len(memory.tables[name]) == -(-len(tokens) // memory.B), "ceil(n/B) blocks"
        holders.update(memory.tables[name])
    memory.pool.check(holders)  # chapter 4: counts and free list agree with the tables


# %% [markdown]
# That no two sequences write into one slot needs no line of its own: one of them would read a wrong token. Now the
# events. `seen` counts what happened, and each `append` must take a block at a border or for a copy, and at no other
# time:

# %%
def watched_say(memory, stored, name, word, seen):
    table, free = memory.tables[name], memory.pool.num_free
    border, shared = memory.room(name) == 0, memory.pool.ref_count(table[-1]) > 1
    copy = copy_and_say(memory, stored, name, word)
    assert free - memory.pool.num_free == (border or shared)
    assert bool(copy) == (shared and not border)
    event = "border" if border else "copy" if copy else "room"
    seen["append: " + event] += 1


# %%
def live(random, seen):
    """80 random events in one memory, checked after each."""
    memory = SharingMemory(24, random.randint(1, 5), random.sample(range(24), 10))
    stored, truth = [None] * 24 * memory.B, {}
    for step in range(80):
        name = random.choice([*truth, step])
        event = random.choice(["fork", "end"] + ["append"] * 6) if name in truth else "start"
        try:
            if event == "start":
                memory.start(name, random.randint(1, 12))
                truth[name] = [(name, i) for i in range(memory.lengths[name])]
                write(memory, stored, name, truth[name])
            elif event == "fork":
                memory.fork(name, step)
                truth[step] = truth[name].copy()
            elif event == "end":
                memory.end(name)
                del truth[name]
            else:
                watched_say(memory, stored, name, (name, step), seen)
                truth[name].append((name, step))
        except NoBlock:
            seen["no block"] += 1
        check(memory, stored, truth)
        long = [table for table in memory.tables.values() if len(table) > 1]
        seen["tables"] += len(long)
        seen["tables in a row"] += sum(t == [*range(t[0], t[0] + len(t))] for t in long)


# %%
seen = Counter()
for seed in range(200):
    live(Random(seed), seen)
for event, times in sorted(seen.items()):
    print(f"{event:16} {times:6}")
assert len(seen) == 6 and min(seen.values()) > 200
assert seen["tables in a row"] < seen["tables"] / 2

# %% [markdown]
# The counts matter as much as the asserts. Every case did come up, hundreds of times, and of the tables with two or
# more blocks most did not lie in a row. A test in which all of them do would prove nothing.

# %% [markdown]
# ## The package's version
#
# The page table, as the engine has it, is a small record:

# %%
from minipaged.memory import KVCacheManager, MisuseError, PageTable, blocks_for

theirs = PageTable(block_size=4, blocks=[7, 1], num_tokens=7)
print(theirs)
print("empty slots:", theirs.room, " blocks for 7, 8, 9 tokens:",
      [blocks_for(n, block_size=4) for n in (7, 8, 9)])

# %% [markdown]
# The first three fields are what we kept in `tables` and `lengths`. The others are for blocks that can be found again
# after their sequence has ended: how many of the first blocks have been made known (`num_published`), to whom (`salt`),
# and whether that is allowed at all (`publishes`). They wait for [chapter 13](13_prefix_caching.ipynb). The functions
# around them:

# %%
lookups = PageTable.locate, PageTable.slot, PageTable.slots
show_source(blocks_for, PageTable.room, *lookups, PageTable._must_have)

# %% [markdown]
# The arithmetic is yours. What is added is `_must_have`: a position that has no token is refused, with a sentence. In a
# plain list position 7 of a sequence of 7 tokens would have a block, and so it would get a slot in which nothing was
# written:

# %%
print("the plain list:", slot([7, 1], 7, B=4))
try:
    theirs.slot(7)
except MisuseError as error:
    print("the package:   ", error)

# %% [markdown]
# All sequences together are kept by the `KVCacheManager`, the only door to memory for the rest of the engine:

# %%
show_source(KVCacheManager.allocate, KVCacheManager.fork, KVCacheManager.free)

# %% [markdown]
# `allocate` is your `start`. Its answer names the case: `Allocated`, or `NoSpace`, and then nothing has changed.
# `keep_free` leaves blocks for those who already run. `prefix` begins with blocks that hold the same tokens from an
# earlier request; such blocks are also the reason for the order in which `free` gives them back.

# %%
from minipaged.memory import Appended, copy_on_write

show_source(copy_on_write.grow, copy_on_write._growths)

# %% [markdown]
# Your `append` gave one token to one sequence. The package's gives any number of tokens to many sequences, **all or
# nothing**, and it is a file of its own: `_growths` finds out what everybody needs, then all blocks are taken in one
# go or none, and only then anything changes. Half a step would be worse than none: some sequences would have slots
# for tokens that this step does not compute.
#
# One thing is subtle. When A1 and A2 write in the same step, only the first needs a copy; the second is alone by
# then. `holders` counts how many are left. Figure 8 in one call:

# %%
manager = KVCacheManager(num_blocks=8, block_size=4, free_order=[7, 1, 3])
manager.allocate(1, num_tokens=7)
manager.fork(1, 2)
before = manager.current_table(1), manager.current_table(2)
print(manager.append({1: 1, 2: 1}), manager.block_table(1), manager.block_table(2))
assert (manager.block_table(1), manager.block_table(2)) == ([7, 3], [7, 1])

# %% [markdown]
# `grow` writes `table.blocks = [...]` where ours changed the list in place. A list of the package is **replaced, never
# changed**. So whoever was given one can tell with a glance whether it has changed, namely when it is another list:

# %%
after = manager.current_table(1), manager.current_table(2)
print("the same list as before:", [old is new for old, new in zip(before, after)])
assert before[0] == [7, 1]  # what was handed out still says what it said

# %% [markdown]
# Is it always the same? Both memories live through the same random lives, and must agree to the slot. Ours
# does one `append` after the other, on a trial copy that is kept only if all of it fits:

# %%
def begin(mine, theirs, name, length):
    answer = theirs.allocate(name, length)
    try:
        mine.start(name, length)
    except NoBlock:
        assert isinstance(answer, NoSpace)


def grow(mine, theirs, names, seen):
    answer, trial = theirs.append(dict.fromkeys(names, 1)), deepcopy(mine)
    try:
        copies = [copy for name in names if (copy := trial.append(name))]
    except NoBlock:
        assert isinstance(answer, NoSpace)
        seen["refused"] += 1
        return mine
    assert answer == Appended(copies)
    seen["copies"] += len(copies)
    return trial


# %%
def compare(random, seen):
    size, first = random.randint(1, 6), random.sample(range(20), 9)
    mine, theirs = SharingMemory(20, size, first), KVCacheManager(20, size, free_order=first)
    for step in range(40):
        name, event = random.choice([*mine.tables, step]), random.random()
        if name == step:
            begin(mine, theirs, step, random.randint(1, 14))
        elif event < 0.7:
            some = random.sample([*mine.tables], random.randint(1, len(mine.tables)))
            mine = grow(mine, theirs, some, seen)
        elif event < 0.85:
            mine.fork(name, step)
            theirs.fork(name, step)
        else:
            mine.end(name)
            theirs.free(name)
        assert mine.tables == {name: theirs.block_table(name) for name in theirs.sequences()}
        for name, length in mine.lengths.items():
            assert mine.slots(name) == theirs.slots(name, 0, length)
            seen["tables"] += 1


# %%
seen = Counter()
for seed in range(300):
    compare(Random(seed), seen)
print(seen["tables"], "tables equal, slot by slot;",
      seen["copies"], "copies,", seen["refused"], "refusals")
assert seen["copies"] > 300 and seen["refused"] > 300

# %% [markdown]
# ### One row for a whole step
#
# How do tables reach the model? A step computes T tokens of S sequences, all in one row. For each token the batch
# says where to write, `slot_mapping [T]`; for each sequence, where to read, `block_tables [S, M]`. The runner lays
# them out:

# %%
from minipaged.execution.flat_batch import FlatBatches

show_source(FlatBatches.of)

# %% [markdown]
# The tables themselves stay lists of Python integers. `self._tables` has them once more, as one tensor on the device,
# and writes a row of it only when its table is another list than before: mostly it isn't. A tensor's rows have one
# length, so shorter tables are filled up with 0. Block 0 may belong to anybody, yet it is not read by mistake:
# `context_lens` says how many tokens a sequence has, and readers stop there.
#
# Writing is what you did with `pool.view(N * B, D)[slots]`; chapter 2 showed the reference for it, `write_kv`.
#
# ### The real engine
#
# Three requests for the real model, with blocks of 4 so that much happens in few steps, and a fourth later. The
# drawings are those of `python -m minipaged.generate --watch`.

# %%
from minipaged import LLM, SamplingParams
from minipaged.terminal.draw import block_map, page_tables
from minipaged.terminal.snapshot import Observer

llm = LLM("smollm2", num_blocks=24, block_size=4, prefix_cache="none", device="cpu")


def run(asked, steps, shown=()):
    """asked: step -> [(text, tokens), ...]. -> answers as they end, drawings by step."""
    observer, answers, drawings = Observer(llm), [], {}
    llm.observers.append(observer.follow)
    for step in range(1, steps + 1):
        for text, tokens in asked.get(step, []):
            params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
            llm.add_request(text, params)
        answers += [out for out in llm.step() if out.finished]
        if step in shown:
            moment = observer.snapshot()
            drawings[step] = sheet(block_map(moment, 72), page_tables(moment, 72))
    llm.observers.pop()
    return answers, drawings


# %%
FRANCE, DRAGON = "The capital of France is", "Once upon a time there was a very small dragon"
asked = {1: [(FRANCE, 30), (" ".join(OTHER) + ", it was the worst of times", 8),
             (" ".join(PROMPT), 24)], 9: [(DRAGON, 16)]}  # fmt: skip
answers, drawings = run(asked, steps=30, shown=(1, 9, 23))
assert len(answers) == 4 and llm.stats().memory.used == 0  # in the end all blocks are free

# %%
drawings[1]

# %% [markdown]
# The first step computed the three prompts. The pool was empty, so the blocks lie side by side. From now on whoever
# is at a border takes the next free block. After 8 steps B has its 8 tokens and has ended; then D comes:

# %%
drawings[9]

# %% [markdown]
# B's old blocks stand at the end of the free list. 14 steps later all others are used up, and A and C have begun to
# take them:

# %%
drawings[23]

# %% [markdown]
# Is every answer still right? The first request must get the tokens that it gets when it is alone:

# %%
alone, *_ = run({1: [(FRANCE, 30)]}, steps=30)[0]
(crowded,) = (answer for answer in answers if answer.prompt == FRANCE)
assert alone.outputs[0].token_ids == crowded.outputs[0].token_ids
print("the same", len(alone.outputs[0].token_ids), "tokens, alone and in the crowd")

# %% [markdown]
# ### Whose dog is it?
#
# How much hangs on a table? Two people tell the model about their dogs, in the same number of tokens. We let the first
# step pass. From then on, behind the engine's back, each of them reads through **the other one's page table**. Not a
# weight, not a key and not a token is touched, only who reads by which list of integers:

# %%
from dataclasses import replace
from unittest.mock import patch

straight = FlatBatches.of


def crossed(self, sequences):
    a, b = sequences
    if a.start > 0 < b.start:  # after the first step
        tables = a.block_table, b.block_table
        sequences = [replace(a, block_table=tables[1]), replace(b, block_table=tables[0])]
    return straight(self, sequences)


def dogs():
    asked = [f"My dog is called {name}. What is my dog called?" for name in ("Rex", "Max")]
    talks = [[{"role": "user", "content": question}] for question in asked]
    outs = llm.chat(talks, SamplingParams(temperature=0, max_tokens=6))
    return [out.outputs[0].text for out in outs]


# %%
right = dogs()
with patch.object(FlatBatches, "of", crossed):
    wrong = dogs()
print("own table:        ", right)
print("the other's table:", wrong)
assert "Rex" in right[0] and "Max" in right[1] and wrong == right[::-1]

# %% [markdown]
# Each gets the other one's dog, in a fluent sentence. But for the newest token, a conversation is to the model what the
# page table leads to. So the lists of this chapter also decide who can read whose words.

# %% [markdown]
# ## What must hold, and what breaks if it doesn't
#
# **Every access goes through the table.** Take Figure 7 again, and read A's 9 tokens as if memory were a plain row,
# in which slot and position are the same:

# %%
memory, stored = figure_7()
print("through the table:", *read(memory, stored, "A"))
print("as a plain row:   ", *stored[:9])
assert "of" in stored[:9] and "of" in OTHER

# %% [markdown]
# Empty slots, A's own words in the wrong place, and one of B's words.
#
# **A table dies with its sequence.** Whoever keeps a table after `end` holds numbers that belong to others soon. Here
# A ends, C starts, and the old table is used once more:

# %%
memory, stored = figure_7()
old_table = memory.tables["A"]
memory.end("A")
memory.start("C", 24)
write(memory, stored, "C", [f"secret{i}" for i in range(24)])
leaked = [stored[slot] for slot in slots(old_table, 0, 9, B=4)]
print(leaked)
assert all("secret" in word for word in leaked)

# %% [markdown]
# No error and no crash: one user's words have come into another user's answer. The engine's `debug=True` makes such
# mistakes visible: freed blocks are filled with NaN, so that a read through an old table spoils the output. It helps
# until others have written there; here it would come too late. So it also checks all tables and counts at each step.
#
# **A block is taken exactly at the border.** One token too late, and the table has no block for the token. Python
# raises an IndexError. A kernel that looks into the table does not check: it takes whatever number stands behind the
# last entry, and in a batch that is the 0 of the filling, somebody else's block.

# %%
memory, stored = GrowingMemory(4, 4), ["."] * 16
memory.start("B", 4)
write(memory, stored, "B", OTHER[:4])
memory.start("A", 4)
memory.lengths["A"] += 1  # one token more, and nobody looked whether there is room
padded = memory.tables["A"] + [0]  # its row of block_tables [S, M]
stored[slots(padded, 4, 1, B=4)[0]] = "years"
print("B:", *read(memory, stored, "B"))
assert read(memory, stored, "B")[0] == "years"


# %% [markdown]
# One token too early is harder to see: every text is right. But whoever stops at a border holds a block for nothing:

# %%
class TooEarly(GrowingMemory):
    def append(self, name):
        super().append(name)
        if self.room(name) == 0:
            self.tables[name] += self.take(1)


for kind in (GrowingMemory, TooEarly):
    memory = kind(300, 4)
    for name in range(100):
        memory.start(name, 7)
        memory.append(name)
    print(f"{kind.__name__}: 100 sequences of 8 tokens in {memory.pool.num_used} blocks")

# %% [markdown]
# So a test has to count blocks, and not only compare texts.
#
# **A shared block is not written.** Fork, and leave the copy out. Both samples write into one slot, and the last
# wins:

# %%
memory, stored = ForkingMemory(8, 4), ["."] * 32  # its append never copies
memory.start("A1", len(PROMPT))
write(memory, stored, "A1", PROMPT)
memory.fork("A1", "A2")
say(memory, stored, "A1", "fathers")
say(memory, stored, "A2", "mothers")
print("A1:", *read(memory, stored, "A1"))
assert read(memory, stored, "A1")[-1] == "mothers"

# %% [markdown]
# **Every holder is counted.** A fork that copies the table and forgets the counts works well, until one of the two
# ends:

# %%
memory = ForkingMemory(2, 4)
memory.start("A1", 8)
memory.tables["A2"], memory.lengths["A2"] = memory.tables["A1"].copy(), 8
memory.end("A1")
memory.start("B", 8)
print("A2 and B both have blocks", sorted({*memory.tables["A2"]} & {*memory.tables["B"]}))

# %% [markdown]
# ## Exercises
#
# Fill in the functions; each is followed by a test that says how far you are. What was built above may be used, the
# package not (but for `blocks_for`); and what a function is given belongs to its caller, and stays as it is.
#
# **1. The way back** (warm-up). A page table leads from a position to a slot. Which tokens live in a given slot?
# Whoever looks for a mistake wants to know. An empty slot has none, a shared one several.

# %% tags=["exercise"]
def residents(number, tables, lengths, B):
    """number: of a slot. tables: name -> list of blocks; lengths: name -> number of tokens.

    -> the tokens in that slot: (name, position) of each, in a list that is sorted.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_residents(residents):
    residents = own(residents, allow=[blocks_for])
    for seed in range(60):
        random = Random(seed)
        memory = SharingMemory(40, random.randint(1, 5), random.sample(range(40), 40))
        for name in random.sample("ABCDEF", random.randint(1, 5)):
            if memory.tables and random.random() < 0.6:
                memory.fork(random.choice([*memory.tables]), name)
            else:
                memory.start(name, random.randint(1, 3 * memory.B))
            for _ in range(random.randint(0, 4)):
                memory.append(random.choice([*memory.tables]))
        expected = {slot: [] for slot in range(40 * memory.B)}
        for name in sorted(memory.tables):
            for position, slot in enumerate(memory.slots(name)):
                expected[slot].append((name, position))
        for slot, tokens in expected.items():
            got = residents(slot, memory.tables, memory.lengths, memory.B)
            case = f"slot {slot}, {memory.tables}, {memory.lengths}, B={memory.B}"
            assert equal(got, tokens), f"{case}: {tokens}, not {got}"


attempt(test_residents, residents)

# %% [markdown]
# **2. The flat batch.** A step computes `counts[s]` tokens of sequence s, from position `starts[s]` on. Make of it
# what the runner makes: a slot for each token, and tables of one length.

# %% tags=["exercise"]
def flat_batch(tables, starts, counts, B):
    """S lists, S integers, S integers -> slot_mapping [T], block_tables [S, M], int64 tensors.

    The tokens stand sequence by sequence. M is the length of the longest list in `tables`,
    whether all of its blocks are in use or not; shorter ones are filled up with 0 behind.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_flat_batch(flat_batch):
    from minipaged.scheduling.plan import ScheduledSequence

    flat_batch = own(flat_batch, allow=[blocks_for])
    for seed in range(200):
        random = Random(seed)
        B, S = random.randint(1, 6), random.randint(1, 5)
        tables = [random.sample(range(50), random.randint(1, 6)) for _ in range(S)]
        starts = [random.randrange((len(t) - 1) * B + 1) for t in tables]
        counts = [random.randint(1, len(t) * B - start) for t, start in zip(tables, starts)]
        _, _, batch = llm.executor.runner.batches.of([
            ScheduledSequence(i, str(i), [0] * n, start, slots(t, start, n, B), t)
            for i, (t, start, n) in enumerate(zip(tables, starts, counts))
        ])
        slot_mapping, block_tables = flat_batch(tables, starts, counts, B)
        case = f"tables={tables}, starts={starts}, counts={counts}, B={B}"
        for name, got in [("slot_mapping", slot_mapping), ("block_tables", block_tables)]:
            right = getattr(batch, name)
            assert equal(got, right), f"{case}: {name} is {right}, not {got}"


attempt(test_flat_batch, flat_batch)

# %% [markdown]
# Costs are counted in what follows, as lines of Python that run. A loop runs its lines again in each round, also when
# it stands in brackets.

# %%
import sys


def lines_run(function, *arguments, most=100_000):
    """How many lines run when `function` is called; broken off after `most`."""
    ran = []

    def trace(frame, event, _):
        ran.extend(["a line"] * (event == "line"))
        assert len(ran) <= most, f"more than {most} lines run: is there a loop?"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*arguments)
    finally:
        sys.settrace(before)
    return len(ran)


print(lines_run(slot, table, 1000, 16), "lines;", lines_run(slots, table, 0, 1000, 16), "lines")

# %% [markdown]
# **3. What does sharing save?** A prompt gets n samples of `output` tokens each. How many blocks does sharing save at
# the end? Find a formula: no loop over tokens, blocks or samples, so that a hundred of them cost as many lines as
# one. Mind the block in which the prompt ends.

# %% tags=["exercise"]
def blocks_saved(n, prompt, output, B):
    """Blocks of n separate sequences, less those of n samples forked after the prompt.

    n, prompt and B are at least 1, output at least 0. An integer, in at most 40 lines that run.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_blocks_saved(blocks_saved):
    alone = own(blocks_saved, allow=[blocks_for], forbid=[SharingMemory, GrowingMemory])
    small, large = [(1, 5), (1, 20), (0, 9), (1, 6)], [(60, 90), (800, 999), (80, 99), (1, 16)]
    for seed in range(310):
        random = Random(seed)
        n, prompt, output, B = (random.randint(*r) for r in (small if seed < 300 else large))
        memory = SharingMemory(n * (prompt + output), B)
        memory.start(0, prompt)
        for sample in range(1, n):
            memory.fork(0, sample)
        for _ in range(output):
            for sample in range(n):
                memory.append(sample)
        saved = n * -(-(prompt + output) // B) - memory.pool.num_used
        case = f"n={n}, prompt={prompt}, output={output}, B={B}"
        lines = lines_run(blocks_saved, n, prompt, output, B, most=2000)
        got = alone(n, prompt, output, B)
        assert equal(got, saved), f"{case}: {saved}, not {got}"
        assert lines <= 40, f"{case}: {lines} lines run; a formula has no loop"


attempt(test_blocks_saved, blocks_saved)

# %% [markdown]
# **4. Tables of tables** (open). A fork copies the whole page table: 512 entries for 8192 tokens, and as many again
# for each further sample. A CPU's page table is a tree: a directory names **leaves**, lists of `width` entries, and
# leaves can be shared like blocks. Build one with two levels. A table and its forks are independent: whichever of them
# grows, the others don't notice. When it works, find out from which lengths and how many samples on it pays.

# %% tags=["exercise"]
class TwoLevelTable:
    """Logical block -> physical block. leaves: lists of `width` entries, the last perhaps less.

    append(block): the next logical block lives in `block`.
    block(logical): the physical block; IndexError if there is none, as for -1. No search.
    fork(): a table with the same entries. Full leaves are the same objects in both; all that
        a fork takes is room for another directory and one leaf.
    """

    def __init__(self, width):
        raise NotImplementedError


# %% tags=["test"]
def test_TwoLevelTable(TwoLevelTable):
    import tracemalloc

    def look_at(table, entries, width):
        got = [table.block(i) for i in range(len(entries))]
        assert equal(got, entries), f"width {width}: the blocks are {entries}, not {got}"
        leaves = [[*leaf] for leaf in table.leaves if len(leaf)]
        right = [entries[i : i + width] for i in range(0, len(entries), width)]
        assert equal(leaves, right), f"width {width}: the leaves are {right}, not {leaves}"
        for logical in (-1, -len(entries), len(entries), len(entries) + width):
            if logical not in range(len(entries)):
                try:
                    table.block(logical)
                except IndexError:
                    continue
                raise AssertionError(f"block({logical}) of {len(entries)}: no IndexError")

    for seed in range(60):
        random = Random(seed)
        widths = random.randint(1, 8), random.randint(1, 8)
        family = [(TwoLevelTable(width), [], width) for width in widths]
        for step in range(80):
            table, entries, width = random.choice(family)
            if random.random() < 0.2:
                child, full = table.fork(), len(entries) // width
                pairs = [*zip([*table.leaves][:full], child.leaves)]
                same = len(pairs) == full and all(a is b for a, b in pairs)
                assert same, "full leaves are the same objects after a fork"
                family.append((child, entries.copy(), width))
            else:
                table.append(step)
                entries.append(step)
            look_at(*random.choice(family))
        for one in family:
            look_at(*one)
    large = TwoLevelTable(200)
    for block in range(40_100):
        large.append(block)
    lines = lines_run(large.block, 40_050)
    assert lines <= 50, f"block() of a table of 40,100 runs {lines} lines: does it search?"
    tracemalloc.start()
    child = large.fork()
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert equal(child.block(40_050), 40_050)
    assert taken < 50_000, f"a fork of 201 leaves of 200 takes {taken:,} bytes: a copy of all?"


attempt(test_TwoLevelTable, TwoLevelTable)

# %% [markdown]
# ## What's next
#
# We can say where every token lives. Attention still wants its keys side by side, and `pool[table]` copies all of
# them at each step. [Chapter 6](06_pagedattention.ipynb) computes attention block by block, right where the blocks
# lie.
#
# ## Sources
#
# - Kwon et al., *Efficient Memory Management for Large Language Model Serving with PagedAttention*, 2023: Figures 2,
#   6, 7 and 8, and the sections around them. The vLLM team's announcement of the same year: "under 4 %".
# - Kilburn, Edwards, Lanigan and Sumner, *One-Level Storage System*, 1962: paged memory, in the Atlas computer.
# - Cox, Kaashoek and Morris, *xv6: a simple, Unix-like teaching operating system*: page tables and a free list in a
#   few pages of C. The drawing of a split address follows its habit.
# - vLLM, whose names for these things (block table, slot mapping) the engine's batch keeps.
