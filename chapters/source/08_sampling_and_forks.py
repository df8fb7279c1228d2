# %% [markdown]
# # 8. Sampling, fork and copy-on-write
#
# Until now the model always said what it thought best. Ask it for four stories and it tells one story four times. This
# chapter lets it choose by chance, in a way that no other request can disturb, and keeps four answers to one prompt in
# little more memory than one.
#
# **You need**: counts of blocks ([chapter 4](04_blocks.ipynb)), and page tables with their fork
# ([chapter 5](05_page_tables.ipynb)). **You get**: a sampler that draws the package's tokens, random numbers without a
# generator, a plan of copies for a whole step, and the paper's saving of memory, measured again.

# %% [markdown]
# ## The question
#
# A model gives a score to each of its 49,152 tokens (the logits of [chapter 1](01_from_weights_to_text.ipynb)). So:
#
# - How does a row of scores become one token, if chance decides, and how is chance kept from saying nonsense?
# - Somebody gives a seed, to get the same answer again. Why would it depend on who else is on the server?
# - Four answers to one prompt begin with the same tokens. What do they share in memory, and until when?
# - In one step all four write. What must be copied before, and may all copies be made at once?

# %% [markdown]
# ## The idea
#
# A token is drawn in four moves, each of a line or two:
#
# ```
#   scores --> shape --> cut the tail --> lay side by side, and see where u falls
#              temperature  min-p, top-k, top-p     |.......blue......|..a..|red|:|
#                                                            ^ u, a random number from 0 to 1
# ```
#
# The number u comes from no generator. It is computed from the request's seed, the number of the sample, and the
# position of the token in its answer. Nobody else has a part in it.
#
# n samples of a prompt are one sequence at first. When the prompt is computed, its last row of scores is drawn from
# n times, and the page table is copied n - 1 times: a **fork**. No block is copied. Only who writes into a block that
# others hold too gets a copy of it first: **copy-on-write**.
#
# ```
#   A1   7  1 --+                A1   7  3       copied from 1, then written
#   A2   7  1 --+--> a step -->  A2   7  4       copied from 1, then written
#   A3   7  1 --+                A3   7  1       the last holder writes in place
# ```

# %% [markdown]
# ## Build it
#
# ### From scores to chances
#
# What comes after "My favourite colour is"? The package can tell the logarithm of each token's probability, its
# **logprob**. That is the logit less one number for the whole row, and softmax doesn't mind such a number. So we may
# take logprobs for logits:

# %%
import hashlib
import math
from collections import Counter
from random import Random
from unittest import mock

import numpy as np
import torch

from minipaged import LLM, SamplingParams
from minipaged.teaching import attempt, equal, loads, own, plots, show_source

llm = LLM("smollm2", num_blocks=200, prefix_cache="none", device="cpu", max_logprobs=-1)
tokenizer = llm.tokenizer


# %%
def scores(text):
    """Of each token that could come next (-1: tell all logprobs): [V]."""
    (out,) = llm.generate(text, SamplingParams(temperature=0, max_tokens=1, logprobs=-1))
    told = out.outputs[0].logprobs[0]
    row = torch.empty(len(told))
    row[list(told)] = torch.tensor([one.logprob for one in told.values()])
    return row


# %%
colours = scores("My favourite colour is")
chances, ids = colours.softmax(0).sort(descending=True)
for chance, token in zip(chances[:6].tolist(), ids[:6].tolist()):
    print(f"{chance:6.1%} {tokenizer.decode([token])!r}")
print(f"the best 100 have {chances[:100].sum():.0%}, all others {chances[100:].sum():.0%}")

# %% [markdown]
# Each token behind the best hundred is very improbable, but there are 49,052 of them. Drawn as it is, every fifth token
# comes from there, and a text soon makes no sense.
#
# ### Temperature
#
# Divide the logits by a number, the **temperature**, before the softmax. Below 1, differences grow and the best tokens
# win more; above 1 all become more alike. To subtract the largest logit first changes no probability, and no
# exponential can overflow then. The best token stands at 0, so its weight is exp(0) = 1.

# %%
def scaled(logits, temperature):
    """The best token is at 0, all others below."""
    return (logits - logits.max()) / temperature


# %%
alt = "Three rising curves: at 0.5 ten tokens hold nine tenths, at 1.5 a thousand two thirds"
title = "What the best tokens hold together"
with plots.figure(title, "so many best tokens", "% of the probability", alt=alt) as axes:
    few = [2**i for i in range(16)]
    for temperature, at in ((0.5, 4), (1.0, 6), (1.5, 8)):
        held = scaled(colours, temperature).softmax(0).sort(descending=True).values.cumsum(0)
        percent = [100 * float(held[count - 1]) for count in few]
        plots.line(axes, few, percent, f"T = {temperature}", at=at, dy=-9)
    axes.set(xscale="log", ylim=(0, 105))
    axes.xaxis.set_major_formatter("{x:g}")

# %% [markdown]
# Low temperatures make the tail small, but they also make the best token win all the time. At temperature 0 it always
# wins: that is greedy decoding, as in the chapters before.
#
# ### Cutting the tail
#
# To keep the variety and lose the nonsense, the tail is cut. There are three ways, and a request may ask for all:
#
# - **min-p**: drop what is less probable than `min_p` times the best token.
# - **top-k**: keep the k most probable.
# - **top-p**: keep the fewest most probable tokens that together hold at least `top_p` of the probability.
#
# A dropped token gets the score minus infinity, whose weight is 0. Of equal scores the lower id counts as more
# probable: without a rule the answer would depend on how a sort was written.

# %%
def best_first(x):
    """Ids from the best to the worst; equal ones by id, since the sort is stable."""
    return x.sort(descending=True, stable=True).indices


def cut_min_p(x, min_p):
    return x.masked_fill(x < math.log(min_p), -torch.inf) if min_p else x


def cut_top_k(x, k):
    return x.index_fill(0, best_first(x)[k:], -torch.inf) if k else x


# %%
def cut_top_p(x, top_p):
    if top_p == 1:
        return x
    ids = best_first(x)
    weights = x[ids].exp()
    before = weights.cumsum(0, dtype=torch.float64) - weights  # what better tokens hold
    enough = top_p * weights.sum(dtype=torch.float64)
    return x.index_fill(0, ids[before >= enough], -torch.inf)


# %%
def cut(logits, temperature=1.0, min_p=0.0, top_k=0, top_p=1.0):
    """All steps, in the package's order."""
    x = cut_min_p(scaled(logits, temperature), min_p)
    return cut_top_p(cut_top_k(x, top_k), top_p)


# %%
def left(x):
    return int((x > -torch.inf).sum())


france = scores("The capital of France is")
for wish in (dict(), dict(min_p=0.1), dict(top_k=10), dict(top_p=0.5), dict(top_p=0.9)):
    print(f"{str(wish or 'nothing is cut'):14}: {left(cut(colours, **wish)):5} are left",
          f"for the colour, {left(cut(france, **wish)):5} for the capital")

# %% [markdown]
# Top-k keeps its k tokens whether the model is sure or not. Min-p and top-p adapt: there are many colours, and France
# has one capital.
#
# The order counts. Top-p is a part of what is *left*: after `top_k=10` the ten hold everything there is, and half of
# it is held by fewer tokens. And the temperature comes first, so a hotter row keeps more:

# %%
x = scaled(colours, 1.0)
print("top-k 10, then top-p 0.5:", left(cut_top_p(cut_top_k(x, 10), 0.5)))
print("top-p 0.5, then top-k 10:", left(cut_top_k(cut_top_p(x, 0.5), 10)))
print("top-p 0.5 at 0.5, 1, 1.5:", [left(cut(colours, t, top_p=0.5)) for t in (0.5, 1, 1.5)])

# %% [markdown]
# **Your turn.** Which `min_p` leaves as many as `top_p=0.25` does? Tell it from the six chances above. Then set the
# temperature to 2 for both.

# %%
your_min_p, your_temperature = 0.1, 1.0
print(left(cut(colours, your_temperature, min_p=your_min_p)), "by min-p,",
      left(cut(colours, your_temperature, top_p=0.25)), "by top-p")

# %% [markdown]
# ### Where u falls
#
# Lay the weights that are left side by side, on a line from 0 to their sum. A random number u from 0 to 1, times the
# sum, is a place on that line. Whoever lies there is drawn. A token that is twice as wide is hit twice as often. Here
# u = 0.35 falls into the tail, on "a", and on "blue":

# %%
rows, kinds = {}, ("tokens", "other", "third", "shared")
for name, wish in {"as it is": {}, "top-p 0.5": {"top_p": 0.5},
                   "and T = 0.5": {"top_p": 0.5, "temperature": 0.5}}.items():
    best = cut(colours, **wish).softmax(0).sort(descending=True)
    wide = min(4, int((best.values > 0.04).sum()))
    words = [tokenizer.decode([token]).strip() for token in best.indices[:wide].tolist()]
    rest = float(best.values[wide:].sum()), "external", ""
    rows[name] = [*zip(best.values[:wide].tolist(), kinds, words), rest]

# %%
alt = "Four tokens fill 30 % of the first line and more of the second; two fill the third"
with plots.figure("The line of chances", "u", size=(6.8, 2.4), alt=alt) as axes:
    plots.strips(axes, rows, kinds=False)
    axes.axvline(0.35, color=plots.INK)

# %% [markdown]
# (Crossed out are all narrow tokens together.) In code it is a running sum, and the first place where that exceeds the
# target. This is called the **inverse CDF**: a running sum of probabilities is a cumulative distribution function.
# "Exceeds" is important. A token of weight 0 adds nothing to the sum, so it is never the first to exceed anything.

# %%
def draw(x, u, order):
    """The token on which u falls, if those in `order` stand side by side."""
    running = x[order].exp().cumsum(0, dtype=torch.float64)
    place = torch.searchsorted(running, u * running[-1:], right=True)
    return int(order[place])


# %%
def next_token(logits, u, temperature=1.0, min_p=0.0, top_k=0, top_p=1.0):
    if temperature == 0:
        return int(best_first(logits)[0])
    x = cut(logits, temperature, min_p, top_k, top_p)
    sorts = top_k > 0 or top_p < 1
    return draw(x, u, best_first(x) if sorts else torch.arange(len(x)))


print([tokenizer.decode([next_token(colours, u, top_p=0.5)]) for u in (0.0, 0.2, 0.5, 0.99)])

# %% [markdown]
# The order on the line does not matter for the chances. Where a sort was needed anyway, the package lays out the best
# first, otherwise in the order of ids, and we do the same to get its tokens.
#
# Is the distribution right? 10,000 numbers u, evenly spaced, must hit each token as often as its probability says, give
# or take one. No luck is needed for that:

# %%
x = cut(colours, 0.8, min_p=0.05, top_k=40, top_p=0.9)
order, probable = best_first(x)[: left(x)], x.softmax(0)
hits = Counter(draw(x, (i + 0.5) / 10_000, order) for i in range(10_000))
assert all(abs(hits[t] - 10_000 * float(probable[t])) < 1.01 for t in range(len(x)))
print(f"{len(hits)} tokens, each as often as it should be")

# %% [markdown]
# ### Whose random numbers?
#
# u is usually taken from a generator: an object with a state, which it changes at each call. A server has many requests
# at a time, and if they draw from one generator, each call changes the state for all. Here requests get six colours
# each, one in a step, from a generator that begins alike in both runs:

# %%
def six_colours(names, number):
    """number(name, position) -> u. -> what each has got."""
    got = {name: [] for name in names}
    for position in range(6):
        for name in names:
            token = next_token(colours, number(name, position), top_p=0.5)
            got[name].append(tokenizer.decode([token]).strip())
    return got


# %%
def one_generator(names):
    generator = Random(7)
    return six_colours(names, lambda name, position: generator.random())


print("A alone:   ", *one_generator("A")["A"])
print("A beside B:", *one_generator("AB")["A"])
assert one_generator("A")["A"] != one_generator("AB")["A"]

# %% [markdown]
# With B beside it, A gets every other number. So on a busy server a seed is worth nothing: no answer can be had again,
# nor a fault found again.
#
# A generator for each request would cure that. But each has a state that must be kept right: one for each of n samples,
# put back when a step is broken off, not moved on when tokens are computed a second time because the request had given
# way ([chapter 12](12_preemption.ipynb)). It is simpler to have no state at all, and to **compute** the number from
# what it is for:

# %%
def uniform(seed, sample, position):
    """From 0 up to, and without, 1."""
    text = f"{seed}/{sample}/{position}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()  # 64 bits
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


# %%
def computed(names):
    return six_colours(names, lambda name, position: uniform(ord(name), 0, position))


print("A alone:        ", *computed("A")["A"])
print("A beside B, C:  ", *computed("CAB")["A"])
assert computed("A")["A"] == computed("CAB")["A"]

# %% [markdown]
# A good hash makes of texts that differ by a letter numbers that have nothing in common, and no more is asked of random
# numbers. (53 bits, because a float has so many: with 64 the largest would be rounded to 1.) Is it even?

# %%
many = torch.tensor([uniform(seed, 0, at) for seed in range(100) for at in range(200)])
print("of 20,000, in each tenth:", torch.histc(many, bins=10, min=0, max=1).int().tolist())

# %% [markdown]
# **Your turn.** Write the text without its slashes. Some requests get the same number then. Find two, and look:

# %%
print(uniform(1, 23, 4), uniform(12, 3, 4))

# %% [markdown]
# ### Alone and among others, for real
#
# Five requests for the real model. Mine has a seed, and asks for variety. First alone, then beside four others of
# other lengths and wishes:

# %%
mine = "Once upon a time there was a", SamplingParams(top_p=0.9, seed=3, max_tokens=20)
others = [("My favourite colour is", SamplingParams(temperature=1.5, max_tokens=15)),
          ("The capital of France is", SamplingParams(temperature=0, max_tokens=6)),
          ("In the garden I saw a", SamplingParams(n=3, min_p=0.1, max_tokens=12)),
          ("One, two, three,", SamplingParams(top_k=20, max_tokens=25))]


# %%
def answer_of_mine(requests):
    outputs = llm.generate(*zip(*requests))
    return outputs[requests.index(mine)].outputs[0].token_ids


# %%
alone, crowded = answer_of_mine([mine]), answer_of_mine([*others[:2], mine, *others[2:]])
print(tokenizer.decode(alone))
assert alone == crowded

# %% [markdown]
# The same 20 tokens. (For that, logits must not depend on the company either. If they moved in the last bit, a u near a
# border would now and then fall on its other side. The package's C++ kernels compute each row in the same order,
# whoever stands beside it.)
#
# ### n samples are one sequence first
#
# A request for n samples has one prompt, and it is computed once. Its last row of logits is drawn from n times, with
# the u of samples 0, 1, ..., n - 1. For their memory we take page tables and the fork of chapter 5:

# %%
from minipaged.memory import Appended, BlockAllocator, KVCacheManager, MisuseError, NoSpace


class Samples:
    """Page tables by name, and how many tokens each has slots for."""

    def __init__(self, N, B, free_order=()):
        self.pool, self.B = BlockAllocator(N, free_order), B
        self.tables, self.lengths = {}, {}

    def start(self, name, length):
        blocks = self.pool.allocate(-(-length // self.B))
        if not isinstance(blocks, NoSpace):
            self.tables[name], self.lengths[name] = blocks, length

    def fork(self, parent, child):
        self.tables[child], self.lengths[child] = [*self.tables[parent]], self.lengths[parent]
        for block in self.tables[child]:
            self.pool.share(block)

    def end(self, name):
        for block in reversed(self.tables.pop(name)):
            self.pool.release(block)
        del self.lengths[name]


# %% [markdown]
# ### Copy-on-write, for a whole step
#
# Chapter 5 gave one sequence one slot. In a step all write, and all get their slots, or none. So what they need must be
# known before anything is taken. There are three cases for a writer:
#
# 1. Its last block is full: it takes a new one.
# 2. Its last block has room, and others hold it too: it takes a copy.
# 3. Its last block has room, and nobody else holds it *by then*: it writes in place.
#
# "By then": if three hold a block and all write, the first two get copies, and each lets go of the old block with that.
# The third is alone. If only two of the three write, both get copies, since the third still reads:

# %%
class Growing(Samples):
    def needs(self, names):
        """-> {name: "copy" or "new"}, of those who can't write in place."""
        needs, holders = {}, {}
        for name in names:
            last = self.tables[name][-1]
            left = holders.get(last, self.pool.ref_count(last))
            if self.lengths[name] % self.B == 0:
                needs[name] = "new"
            elif left > 1:
                needs[name], holders[last] = "copy", left - 1
        return needs

# %% [markdown]
# Now all blocks are taken in one go, or none. The memory knows no contents, so it tells which blocks have to be copied:

# %%
class Stepping(Growing):
    def step(self, names):
        """A slot more for each. -> [(source, target), ...]; or NoSpace, and no change."""
        needs = self.needs(names)
        fresh = self.pool.allocate(len(needs))
        if isinstance(fresh, NoSpace):
            return fresh
        copies = []
        for name, block in zip(needs, fresh):
            table = self.tables[name]
            if needs[name] == "new":
                table.append(block)
                continue
            copies.append((table[-1], block))
            self.pool.release(table[-1])
            table[-1] = block
        for name in names:
            self.lengths[name] += 1
        return copies


# %% [markdown]
# ### Figure 8, in steps
#
# The paper's example once more, with contents. A pool of blocks of four slots holds words instead of keys and values.
# Copies are made **all at once**: every source is read before any target is written.

# %%
def put(memory, stored, name, at, word):
    stored[memory.tables[name][at // memory.B], at % memory.B] = word


# %%
def say(memory, stored, words):
    """One step: each of these sequences says a word. stored [N, B]. -> the copies."""
    copies = memory.step([*words])
    sources, targets = [s for s, _ in copies], [t for _, t in copies]
    stored[targets] = stored[sources]
    for name, word in words.items():
        put(memory, stored, name, memory.lengths[name] - 1, word)
    return copies


def read(memory, stored, name):
    return [*stored[memory.tables[name]].ravel()[: memory.lengths[name]]]


# %%
def figure_8():
    """-> memory and contents, with the prompt in blocks 7 and 1, and forked."""
    memory, stored = Stepping(N=8, B=4, free_order=[7, 1, 3]), np.full((8, 4), ".", object)
    memory.start("A1", 7)
    for at, word in enumerate("Four score and seven years ago our".split()):
        put(memory, stored, "A1", at, word)
    memory.fork("A1", "A2")
    return memory, stored


# %%
def counts(memory):
    return {block: memory.pool.ref_count(block) for block in (7, 1, 3)}


memory, stored = figure_8()
assert memory.tables == {"A1": [7, 1], "A2": [7, 1]} and counts(memory) == {7: 2, 1: 2, 3: 0}

# %% [markdown]
# **A1 writes.** Block 3 is taken, 1 is copied to 3, and the count of 1 falls to 1. In the next step **A2 writes**, into
# block 1, in place:

# %%
memory, stored = figure_8()
print("A1 writes: copies", say(memory, stored, {"A1": "fathers"}), "counts", counts(memory))
assert memory.tables["A1"] == [7, 3] and counts(memory) == {7: 2, 1: 1, 3: 1}
print("A2 writes: copies", say(memory, stored, {"A2": "mothers"}), "counts", counts(memory))
assert memory.tables["A2"] == [7, 1]

# %% [markdown]
# In a real step both write. It is the same, to the block number:

# %%
memory, stored = figure_8()
assert say(memory, stored, {"A1": "fathers", "A2": "mothers"}) == [(1, 3)]
for name, table in memory.tables.items():
    print(name, table, *read(memory, stored, name))

# %% [markdown]
# **Your turn.** In the last cell, fork A1 once more before the step, as A3, and let all three write. Which block is
# copied twice, and who stays in it? Then let A1 and A2 write, and not A3.

# %% [markdown]
# ### One launch of copies
#
# A GPU makes all copies of a step in one launch ([chapter 7](07_the_triton_kernel.ipynb)): thousands of programs in no
# order. Suppose a block were target of one copy and source of another. Then the result would depend on who comes
# first:

# %%
def one_by_one(copies):
    blocks = ["a", "b", "c"]
    for source, target in copies:
        blocks[target] = blocks[source]
    return "".join(blocks)


print("0 to 1, then 1 to 2:", one_by_one([(0, 1), (1, 2)]))
print("1 to 2, then 0 to 1:", one_by_one([(1, 2), (0, 1)]))

# %% [markdown]
# In our plan no block is both. Targets were free when the step began. Sources were held, and **stay held**: the last
# holder writes in place and never lets go. So no source falls free in the middle of a step, to be handed out as a
# target. (*What must hold* shows a plan in which one does.)
#
# ### What is saved?
#
# Full blocks of the prompt are never written again, so all samples share them to the end. The block in which the prompt
# ends is shared until the first step. With P tokens in the prompt and a length of T tokens in all:
#
# $$ \text{alone: } n \lceil T/B \rceil \qquad \text{shared: }
# \lfloor P/B \rfloor + n \left( \lceil T/B \rceil - \lfloor P/B \rfloor \right) $$

# %%
def without_sharing(n, P, T, B=16):
    return n * -(-T // B)


def with_sharing(n, P, T, B=16):
    return P // B + n * (-(-T // B) - P // B)


six = 6, 93, 122
print("6 samples of 93 + 29 tokens:", with_sharing(*six), "blocks, not", without_sharing(*six))

# %% [markdown]
# The saving is n - 1 times the full blocks of the prompt. A prompt of 15 tokens saves nothing at all with B = 16.
#
# ### n answers, for real
#
# The beginning of a story gets up to six continuations. First as one request for n samples; then as n requests, each of
# which we tell which sample it is, so that it has the same random numbers. The plan of each step has the page tables of
# all who compute, and we count different blocks:

# %%
STORY = ("Once upon a time there was a small house at the edge of a wide forest. An old woman "
         "lived in it with a cat, a clock that was always late, and a map of a country that "
         "nobody had ever found. One night in autumn somebody knocked at the door. She opened "
         "it, and saw a")
P = len(tokenizer.encode(STORY))


def serve(requests):
    """[(n, sample)] -> tokens of all answers, blocks at the peak, tokens computed."""
    names, answers, plans = [], {}, []
    for n, sample in requests:
        wish = SamplingParams(n=n, top_p=0.9, seed=7, max_tokens=30, ignore_eos=True)
        names.append(llm.add_request(STORY, wish))
        llm.scheduler.waiting[-1].sequences[0].index = sample
    llm.observers.append(lambda plan, _: plans.append(plan))
    while llm.has_unfinished_requests:
        answers |= {out.request_id: out.outputs for out in llm.step() if out.finished}
    llm.observers.pop()
    held = [{block for s in plan.sequences for block in s.block_table} for plan in plans]
    tokens = [one.token_ids for name in names for one in answers[name]]
    return tokens, max(map(len, held)), sum(plan.num_tokens for plan in plans)


# %%
NUMBERS = [1, 2, 4, 6]
shared = {n: serve([(n, 0)]) for n in NUMBERS}
single = {n: serve([(1, sample) for sample in range(n)]) for n in NUMBERS}
print(f"a prompt of {P} tokens")
for n in NUMBERS:
    assert shared[n][0] == single[n][0]
    print(f"n = {n}: peak {shared[n][1]:2} blocks and {shared[n][2]:3} tokens computed,",
          f"separately {single[n][1]:2} and {single[n][2]:3}")

# %%
for tokens in shared[6][0]:
    print("... and saw a" + tokenizer.decode(tokens)[:60].replace("\n", " "), "...")

# %% [markdown]
# The same tokens in both, sample by sample. The prompt was computed once instead of six times, and the peak is what the
# formula says. (The last token is drawn and never computed, so it has no slot. And the cache of
# [chapter 13](13_prefix_caching.ipynb), which finds prompts of other requests, is off here.)

# %%
T = P + 30 - 1
for n in NUMBERS:
    assert shared[n][1] == with_sharing(n, P, T) and single[n][1] == without_sharing(n, P, T)

alt = "Separately each sample takes the same again; shared, each further one takes three blocks"
with plots.figure("n answers to one prompt", "n", "blocks at the peak", alt=alt) as axes:
    plots.line(axes, NUMBERS, [single[n][1] for n in NUMBERS], "separately", at=2, dy=-12)
    plots.line(axes, NUMBERS, [shared[n][1] for n in NUMBERS], "shared", at=2, dy=-12)
    axes.set(ylim=0, xticks=NUMBERS)


# %% [markdown]
# ### The paper's Figure 15
#
# The paper measured how much n = 2, 4 and 6 samples save on short instructions (Alpaca): 6.09, 8.53 and 9.79 % of the
# blocks that there would be without sharing. We do the same on lengths like Alpaca's, with the package's account of
# memory, summed over all steps in which samples run:

# %%
def saving(jobs, n):
    """Percent of the blocks, as the package counts them."""
    saved = without = 0
    for job in jobs:
        manager = KVCacheManager(num_blocks=n * 130, block_size=16)
        manager.allocate(0, job.prompt)
        for sample in range(1, n):
            manager.fork(0, sample)
        for _ in range(job.output - 1):
            manager.append(dict.fromkeys(range(n), 1))
            usage = manager.usage()
            saved += usage.blocks_saved_by_sharing
            without += usage.used + usage.blocks_saved_by_sharing
    return 100 * saved / without


# %% [markdown]
# The formula gives the same, and is faster. A few long answers weigh much, so we take 5,000 requests. Of the paper's
# lengths we know the means only. How far answers spread is our choice: 0.9, as in
# [chapter 3](03_the_memory_wall.ipynb), is the standard deviation of their logarithms. Beside it stand a narrower and
# a wider one.

# %%
from dataclasses import replace


def by_formula(jobs, n):
    steps = [(n, job.prompt, job.prompt + t) for job in jobs for t in range(1, job.output)]
    shared, alone = (sum(f(*s) for s in steps) for f in (with_sharing, without_sharing))
    return 100 * (1 - shared / alone)


# %%
jobs = loads.draw(loads.ALPACA, 40, rate=1)
assert math.isclose(saving(jobs, 2), by_formula(jobs, 2))
assert math.isclose(saving(jobs, 6), by_formula(jobs, 6))

# %%
figure_15 = {"the paper": {2: 6.09, 4: 8.53, 6: 9.79}}
for spread in (0.5, 0.9, 1.3):
    jobs = loads.draw(replace(loads.ALPACA, output_spread=spread), 5000, rate=1)
    figure_15[f"spread {spread}"] = {n: by_formula(jobs, n) for n in (2, 4, 6)}
for name, row in figure_15.items():
    print(f"{name:10}", ", ".join(f"n = {n}: {percent:5.2f} %" for n, percent in row.items()))

# %% [markdown]
# So this is a comparison, and no proof: our choice comes near, and with another one we could have hit either side. A
# wide spread saves less, since long answers are there for many steps, and all they share is a short prompt.
#
# One thing holds for any lengths. If all samples of a request run equally long, the saving is (n - 1)/n times one
# number, the share that full blocks of prompts have in all blocks. Divided by (n - 1)/n, a row should always give it:

# %%
for name, row in figure_15.items():
    print(f"{name:10}", [round(percent * n / (n - 1), 1) for n, percent in row.items()])

# %% [markdown]
# Nearly so in the paper, and not quite. So its samples, or its way of counting, differ a little from ours. Why the
# saving is small is clear: Alpaca's prompts have 19 tokens, mostly one full block, and the answers are three times as
# long. With ShareGPT's long prompts the paper has 16.2 to 30.5 %. Beams share parts of their *answers*, too, and save
# much more: [chapter 9](09_beam_search.ipynb).

# %% [markdown]
# ## Check it
#
# Random lives. Sequences start, fork, write in steps and end, in small pools. Everything ever said is kept in plain
# lists, `truth`, and read back through the page tables after each event. The copies of a step are made one by one, in
# a random order: if the order mattered, some life would show it.

# %%
def random_event(random, number, names):
    chance = random.random()
    if not names or chance < 0.1:
        return "start", number, random.randint(1, 9)
    if chance < 0.35:
        return "fork", random.choice(names), number
    if chance < 0.45:
        return "end", random.choice(names)
    return "step", random.sample(names, random.randint(1, len(names)))


# %%
def live(random):
    """-> B, the order of free blocks, and what happened: [(event, answer, tables after it)]."""
    B, order, history = random.randint(1, 5), random.sample(range(30), 9), []
    memory, stored, truth = Stepping(30, B, order), np.zeros((30, B)), {}
    for number in range(50):
        op, *about = random_event(random, number, [*truth])
        answer = getattr(memory, op)(*about)
        if isinstance(answer, list):
            for source, target in random.sample(answer, len(answer)):
                stored[target] = stored[source]
        if op == "fork":
            truth[number] = truth[about[0]].copy()
        truth = {name: truth.get(name, []) for name in memory.tables}
        for name, words in truth.items():
            for at in range(len(words), memory.lengths[name]):
                words.append(random.random())
                put(memory, stored, name, at, words[-1])
        assert all(read(memory, stored, name) == words for name, words in truth.items())
        memory.pool.check(Counter(b for table in memory.tables.values() for b in table))
        history.append((op, about, answer, {name: [*t] for name, t in memory.tables.items()}))
    return B, order, history


# %%
lives = [live(Random(seed)) for seed in range(200)]
steps = [answer for *_, history in lives for op, _, answer, _ in history if op == "step"]
seen = Counter("refused" if isinstance(a, NoSpace) else f"copies: {len(a)}" for a in steps)
print(dict(sorted(seen.items())))
assert min(seen["refused"], seen["copies: 1"], seen["copies: 2"]) > 100

# %% [markdown]
# ## The package's version
#
# ### The sampler
#
# `decoding/sampling.py` draws for a whole batch at once: `logits [R, V]`, and for each row a `Draw`. That has the
# request's wishes and seed, which sample it is, how many are drawn, and the tokens so far. Temperature, min-p, and u:

# %%
from minipaged.decoding import sampling

show_source(sampling.scale, sampling.uniform)

# %% [markdown]
# `purpose` makes a second number for the same position, for those who need one (speculation, further below). Top-k
# and top-p:

# %%
show_source(sampling.nucleus)

# %% [markdown]
# It is your `cut_top_k` and `cut_top_p` in one, and longer because it avoids sorting 49,152 numbers. It looks at the
# best 128 first, then at 4,096, and then at all (a `rung`). If the model is sure, 128 are plenty. How many a row needs
# depends on that row alone. And the drawing:

# %%
show_source(sampling._draw, sampling.first_above)

# %% [markdown]
# The running sum has two levels, sums of blocks of 256 and then the sum within one block. Why, its docstring
# says. `first_above` moves the target below the last sum, for rounding could have put it there.
#
# Do both agree? Random rows with many equal scores, random wishes, many draws from each:

# %%
from minipaged.requests.sampling_params import Draw

CHOICES = {"temperature": [0, 0.5, 1.0, 1.7], "min_p": [0, 0, 0.02, 0.3],
           "top_k": [0, 0, 1, 3, 20], "top_p": [1, 1, 0.3, 0.8]}


# %%
def draws_agree(seed):
    """Five rows, three samples of each; -> tokens compared."""
    random, n = Random(seed), 3
    shape = 5, random.choice([60, 5000])
    logits = torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)) / 2
    wishes = [{k: random.choice(some) for k, some in CHOICES.items()} for _ in logits]
    asked = [Draw(SamplingParams(**wish), seed, 2, n, [], [0] * 9, frozenset())
             for wish in wishes]
    for row, wish, theirs in zip(logits, wishes, sampling.sample(logits, asked)):
        ours = [next_token(row, uniform(seed, 2 + i, 9), **wish) for i in range(n)]
        assert [token.token_id for token in theirs] == ours
    return n * len(logits)


# %%
print(sum(draws_agree(seed) for seed in range(150)), "tokens are the same")

# %% [markdown]
# What it does more comes before the temperature: a request may forbid or allow tokens, ask for a form such as JSON, add
# to single logits, punish repetition. `adjust.py` has these steps. A row that has NaN gives `BadLogits`, which ends
# its own request with a reason, and no other row notices. (vLLM has a generator for each request with a seed.)
#
# ### Who forks, and when
#
# A step's tokens come back to the scheduler, and `scheduling/growth.py` lets the sequences grow. `LiveSequences` has
# all that haven't ended, by their ids:

# %%
from minipaged.scheduling.growth import LiveSequences

show_source(LiveSequences._append, LiveSequences._fork, KVCacheManager.fork)

# %% [markdown]
# `rows` has one list of new tokens, or n of them when the prompt of n samples has just been computed. Then n - 1
# children are forked, and each appends what was drawn for it. `parent.child` copies the tokens, `memory.fork` shares
# the blocks. The step is over, so all slots of the parent are written.

# %%
parts = LiveSequences
show_source(parts.add, parts.new_id, parts.end, parts._append_tokens)

# %% [markdown]
# `_append_tokens` says why a sequence ended: a token that stops, or the limit. `end` frees its memory at once. The
# other samples go on, and what was shared stays theirs, because it is counted. (`transfers` is for blocks that another
# engine wants: [chapter 13](13_prefix_caching.ipynb).)

# %%
show_source(LiveSequences.grow, LiveSequences._settle)

# %% [markdown]
# `grow` takes what a step has for one request: errors first, then beams ([chapter 9](09_beam_search.ipynb)), then
# samples. `_settle` makes memory and sequence agree. A sequence may have got slots for guesses that turned out wrong;
# these are taken back. `start_over` forgets all, after a step that was broken off.
#
# ### The manager
#
# The scheduler's only door to memory is the `KVCacheManager`. Its `append` is your `step`, for any number of tokens:

# %%
from minipaged.memory import copy_on_write

show_source(KVCacheManager.append, copy_on_write.Appended, copy_on_write.grow)

# %%
show_source(copy_on_write._Growth, copy_on_write._growths)

# %% [markdown]
# `_growths` is your `needs`. Who gets several tokens may need a copy *and* new blocks behind it. A list of
# blocks is replaced and never changed, so that who was handed `current_table` can see with `is` that nothing happened.
# `keep_free` leaves blocks for others; who grows asks for none, a newcomer does.
#
# Do both agree? The package lives through the same lives, event by event:

# %%
DO = {"start": KVCacheManager.allocate, "fork": KVCacheManager.fork, "end": KVCacheManager.free,
      "step": lambda manager, names: manager.append(dict.fromkeys(names, 1))}
for B, order, history in lives:
    manager = KVCacheManager(30, B, free_order=order)
    for op, about, ours, tables in history:
        theirs = DO[op](manager, *about)
        if op == "step":
            assert theirs == (ours if isinstance(ours, NoSpace) else Appended(ours))
        assert {name: manager.block_table(name) for name in manager.sequences()} == tables
print(len(steps), "steps: the same copies, refusals and page tables")

# %% [markdown]
# A step of the engine calls `append` once for each request. Their copies go into one list, `plan.copies`, and the
# runner makes them in one launch. What the manager has besides: `num_blocks`, `num_free` and `blocks_for` for whoever
# asks whether there is room; `num_tokens` and `slots` of a sequence; `is_swapped`; `take_freed`, `reset` and `check` as
# in chapter 4. `swap_out` and `swap_in` are chapter 12's, `find` and `publish` chapter 13's.
#
# ### Figure 8 in the real engine
#
# "Once upon a time there was a" has seven tokens. With blocks of four and three samples:

# %%
plans, options = [], dict(num_blocks=16, block_size=4, prefix_cache="none", device="cpu")
with LLM("smollm2", **options, debug=True) as small:
    small.observers.append(lambda plan, output: plans.append(plan))
    wish = SamplingParams(n=3, seed=3, max_tokens=4, ignore_eos=True)
    small.generate("Once upon a time there was a", wish)
for plan in plans:
    tables = [s.block_table for s in plan.sequences]
    print(f"step {plan.step}: copies {plan.copies}, tables {tables}")
assert [plan.copies for plan in plans] == [[], [(1, 2), (1, 3)], [], []]

# %% [markdown]
# Step 1 computed the prompt. In step 2 two samples got copies of block 1, and the third wrote in place. In step 3 all
# were full, and each took a new one. Block 0 was shared to the end.
#
# ### Branches: a fork from an earlier token
#
# A fork begins at the end of its parent. One that begins earlier is in `memory/branching.py`. It is for
# **speculation**: somebody cheap guesses the next tokens, and the model checks all guesses in one step, which costs
# hardly more than one token, since the weights are read once for all ([chapter 3](03_the_memory_wall.ipynb)). Each of
# several guesses needs slots of its own, from the newest sure token on:

# %%
from minipaged.memory import branching

show_source(KVCacheManager.branch, branching.branch, branching.adopt)

# %% [markdown]
# Full blocks before the start are shared, as in a fork. The block of the start gets a copy at once, whatever the counts
# say: the parent's tokens behind the start are other guesses, and must stay. Ten tokens, of which number 9 is the
# newest, and a branch of three from there:

# %%
manager = KVCacheManager(num_blocks=8, block_size=4)
manager.allocate(1, num_tokens=10)
manager.append({1: 2})  # the first guess: two tokens, in place
print(manager.branch(1, 2, start=9, count=3), manager.block_table(1), manager.block_table(2))
manager.adopt(1, 2)  # the branch was right
print("goes on with", manager.block_table(1), "and has", manager.num_tokens(1), "tokens;",
      manager.num_free, "of 8 are free")

# %% [markdown]
# `adopt` ends the name of the branch: the sequence goes on with its page table, and what only the sequence held is
# free. Guesses that were wrong give their slots back:

# %%
show_source(branching.take_back)

# %%
manager = KVCacheManager(num_blocks=8, block_size=4)
manager.allocate(1, num_tokens=13)
manager.take_back(1, 2)
print(manager.num_tokens(1), "tokens left, in", manager.block_table(1))
manager.fork(1, 2)
try:
    manager.take_back(1, 1)
except MisuseError as error:
    print("refused:", error)

# %% [markdown]
# Of 13 tokens two were taken back, and the fourth block with them. Then somebody else held the third block. Who takes
# slots back will write others into them, so it must be alone there.
#
# In a step of speculation a sequence may first get a copy of its last block, and then branch from that very block. Then
# the copy would be source and target in one launch. The plan puts that right, with the source of the source:

# %%
from minipaged.scheduling.plan import Step, StepPlan

show_source(Step.add_copies)

# %%
step = Step(StepPlan(1), spare=0)
step.add_copies([(1, 3)])  # a sample gets its copy
step.add_copies([(3, 6)])  # and branches from it
print(step.plan.copies)
assert step.plan.copies == [(1, 3), (1, 6)]

# %% [markdown]
# ## What must hold, and what breaks if it doesn't
#
# **Nobody's chance depends on the company.** Let the real engine draw from one generator, and ask once more, alone and
# in company:

# %%
def with_one_generator(requests):
    generator = Random(0)
    with mock.patch.object(sampling, "uniform", lambda *about: generator.random()):
        return answer_of_mine(requests)


# %%
again, beside = with_one_generator([mine]), with_one_generator([*others, mine])
print("alone:     ", tokenizer.decode(again)[:60])
print("in company:", tokenizer.decode(beside)[:60])
assert again != beside

# %% [markdown]
# **What was dropped is never drawn.** Search for the first running sum that *reaches* the target, instead of exceeding
# it, and a u of 0 draws the first token, whatever its weight:

# %%
weights = torch.tensor([0.0, 0.5, 0.5])  # token 0 is forbidden
for right, word in ((False, "reaches"), (True, "exceeds")):
    token = int(torch.searchsorted(weights.cumsum(0), torch.tensor([0.0]), right=right))
    print(f"{word}: token {token}, of weight {weights[token]}")

# %% [markdown]
# A u of 0 comes once in 2^53 draws, so nobody would ever find out why.
#
# **The last holder writes in place.** Let everybody who shares get a copy, the last one too. Then the old block falls
# free in the middle of the step, and the next request of the same step may get it. Here A1 and A2 write, and then C1,
# a sample of another request:

# %%
class AllCopy(Stepping):
    def needs(self, names):
        return dict.fromkeys(names, "copy") | super().needs(names)


# %%
for kind in (Stepping, AllCopy):
    memory = kind(N=6, B=2)
    for name in "AC":
        memory.start(f"{name}1", 3)
        memory.fork(f"{name}1", f"{name}2")
    copies = memory.step(["A1", "A2"]) + memory.step(["C1"])
    print(f"{kind.__name__:8}: copies {copies}, both source and target:",
          {source for source, _ in copies} & {target for _, target in copies})

# %% [markdown]
# With one launch in no order, A1 and A2 may get what C1 was to have. (The free list is short in this example. With a
# long one the block would come last, and the mistake would show on a busy day only.)
#
# **Copies first, then new tokens.** The other way round, A2 writes its word into block 1 in place, and the copy takes
# it along:

# %%
memory, stored = figure_8()
((source, target),) = memory.step(["A1", "A2"])
put(memory, stored, "A1", 7, "fathers")
put(memory, stored, "A2", 7, "mothers")
stored[target] = stored[source]
print("A1 reads", *read(memory, stored, "A1"))
assert read(memory, stored, "A1")[-1] == "mothers"

# %% [markdown]
# **Fork when all is written.** A fork shares slots, also those that have been given and are still empty. Whoever fills
# them later writes for both. A1 gets a slot, is forked, and only then writes:

# %%
memory, stored = figure_8()
memory.end("A2")
memory.step(["A1"])
memory.fork("A1", "A3")
put(memory, stored, "A1", 7, "fathers")
print("A3, which said nothing, reads", *read(memory, stored, "A3"))
assert read(memory, stored, "A3")[-1] == "fathers"

# %% [markdown]
# So the package forks when a step is over, and before the next one is planned.

# %% [markdown]
# ## Exercises
#
# Fill in the functions; each is followed by a test that says how far you are.
#
# **1. Who is kept?** (warm-up). Apply top-k, and top-p to what is left. Of equal weights the lower ids count as more
# probable. Weights and `percent` are integers: compare integers, so that no rounding decides.

# %% tags=["exercise"]
def kept(weights, top_k, percent):
    """weights: a positive integer for each token; top_k: 0 means all; percent: from 1 to 100.

    -> the set of ids that are kept: of the top_k best the fewest best that together hold
    at least `percent` percent of the weight of these top_k.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_kept(kept):
    kept = own(kept, forbid=[best_first, cut_top_k, cut_top_p, cut])
    for seed in range(600):
        random = Random(seed)
        weights = [random.choice([1, 2, 3, 5, 50]) for _ in range(random.randint(1, 12))]
        top_k, percent = random.choice([0, 0, 1, 3, 20]), random.choice([1, 29, 50, 90, 100])
        order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
        order = order[: top_k or len(order)]
        total, right, held = sum(weights[token] for token in order), set(), 0
        for token in order:
            if 100 * held < percent * total:
                right.add(token)
                held += weights[token]
        got = kept(weights, top_k, percent)
        if isinstance(got, (set, frozenset)):  # NumPy's integers are integers, too
            got = {token.item() if isinstance(token, np.generic) else token for token in got}
        assert equal(got, right), f"{weights}, top_k={top_k}, {percent} %: {right}, not {got}"


attempt(test_kept, kept)

# %% [markdown]
# **2. A number for each draw.** Write your own `uniform`. It may depend on nothing but its three arguments: not on what
# was asked before, nor on the process (Python's `hash` of a text is another one in each), and whoever uses the
# generators of Python, NumPy and PyTorch must not notice. Numbers are evenly spread, other arguments give others, and
# neighbours have nothing to do with each other.

# %% tags=["exercise"]
def number(seed, sample, position):
    """Integers; seeds may be negative and very large -> a float >= 0 and < 1."""
    raise NotImplementedError


# %% tags=["test"]
def test_number(number):
    number = own(number, forbid=[uniform])

    def plain_hash(thing, real=hash):
        parts = thing if isinstance(thing, (tuple, frozenset)) else [thing]
        text = any(isinstance(part, (str, bytes)) for part in parts)
        assert not text, "hash of a text: another one in each process"
        return real(thing)

    def states():
        numpy = str(np.random.get_state())
        return str(random.getstate()), numpy, torch.get_rng_state().tolist()

    def ask(triple):
        with mock.patch("builtins.hash", plain_hash):
            got = number(*triple)
        assert isinstance(got, float) and 0 <= got < 1, f"number{triple}: {got!r}"
        return float(got)

    def elsewhere(triples):
        """Asked in a copy of this process, which doesn't know what is asked here later."""
        result, told = os.pipe()
        with warnings.catch_warnings(action="ignore"):
            child = os.fork()
        if child == 0:
            signal.alarm(60)
            try:
                os.write(told, json.dumps([ask(triple) for triple in triples]).encode())
            finally:
                os._exit(0)
        os.close(told)
        with open(result) as file:
            answer = file.read()
        os.waitpid(child, 0)
        return json.loads(answer or "[]")

    import json
    import os
    import random
    import signal
    import time
    import warnings

    ask((1, 2, 3))
    now = time.time_ns()  # so they are not remembered from an earlier test
    anew = [(now, i % 3, i) for i in range(20)]
    there, here = elsewhere(anew[::-1]), [ask(triple) for triple in anew]
    assert there == here[::-1], "another process, asked in another order, has other numbers"

    large = [(2**power - less, 0, 0) for power in (32, 61, 64, 128) for less in (0, 1)]
    far = [(10**30, 0, 0), (-1, 0, 0), (-2, 0, 0), *large]
    near = [(a, b, c) for a in (0, 1, 2, 12, 123) for b in range(13) for c in range(24)]
    rows = {"seeds": [(i, 0, 0) for i in range(4000)],
            "samples": [(7, i, 0) for i in range(4000)],
            "positions": [(7, 0, i) for i in range(4000)]}
    before, triples = states(), [*dict.fromkeys(sum(rows.values(), far + near))]
    found = {triple: ask(triple) for triple in triples}
    assert states() == before, "a generator that belongs to all has moved"
    seen = {}
    for triple, u in found.items():
        other = seen.setdefault(u, triple)
        assert other == triple, f"{other} and {triple} have the same number"
    for triple in Random(0).sample(triples, 300):
        assert equal(ask(triple), found[triple]), f"{triple} has another one later"
    for name, row in rows.items():
        u = np.array([found[triple] for triple in row])
        most = max(abs(np.histogram(u, 20, (0, 1))[0] - 200))
        assert most < 75, f"4,000 {name}: a twentieth has 200 give or take {most}"
        for apart in (1, 2, 3):
            alike = np.corrcoef(u[apart:], u[:-apart])[0, 1]
            assert abs(alike) < 0.08, f"{name} {apart} apart know of each other: {alike:.2f}"


attempt(test_number, number)

# %% [markdown]
# **3. Plan a step.** Each of `writers` gets a slot for one token more. Take as few blocks as possible. All copies are
# made first, at once, in no particular order, and then all tokens are written. So no block may be source and target.

# %% tags=["exercise"]
def plan_step(tables, lengths, writers, free, B):
    """tables: {name: [block, ...]} of all sequences, also of those who don't write now;
    lengths: {name: tokens that have slots}, 1 at least; free: blocks that nobody holds.

    -> (copies [(source, target), ...], {name: new page table} of all), or None if too few
    are free.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_plan_step(plan_step):
    plan_step = own(plan_step, forbid=[Samples, Growing, Stepping])
    for seed in range(500):
        random = Random(seed)
        B = random.randint(1, 4)
        memory = Stepping(40, B, random.sample(range(40), 20))
        stored = np.full((40, B), None, object)
        for first in range(random.randint(1, 3)):
            names = [f"{first}{i}" for i in range(random.randint(1, 4))]
            memory.start(names[0], random.randint(1, 7))
            for name in names[1:]:
                memory.fork(names[0], name)
            if random.random() < 0.4:
                memory.step(random.sample(names, random.randint(1, len(names))))
        for name in memory.tables:
            for at in range(memory.lengths[name]):
                put(memory, stored, name, at, f"{memory.tables[name][at // B]}.{at}")
        truth = {name: read(memory, stored, name) for name in memory.tables}
        writers = random.sample([*truth], random.randint(1, len(truth)))
        needed = len(memory.needs(writers))
        unused = [block for block in range(40) if memory.pool.ref_count(block) == 0]
        free = random.sample(unused, max(0, needed + random.choice([-1, 0, 0, 2])))
        tables = {name: [*table] for name, table in memory.tables.items()}
        case = f"{tables}, {memory.lengths}, {writers} write, free {free}, B={B}"
        got = plan_step(tables, dict(memory.lengths), [*writers], [*free], B)
        if needed > len(free):
            assert got is None, f"{case}: {needed} blocks are needed, so None, not {got}"
            continue
        pair = isinstance(got, (tuple, list)) and len(got) == 2
        assert pair, f"{case}: (copies, tables), not {got}"
        copies, new = [tuple(pair) for pair in got[0]], got[1]
        assert isinstance(new, dict) and equal(set(new), set(tables)), f"{case}: tables of all"
        sources, targets = [s for s, _ in copies], [t for _, t in copies]
        assert not {*sources} & {*targets}, f"{case}: source and target in {copies}"
        assert len({*targets}) == len(targets) and {*targets} <= {*free}, f"{case}: {copies}"
        held = {block for table in tables.values() for block in table}
        taken = {block for table in new.values() for block in table} - held
        assert taken <= {*free}, f"{case}: takes {taken - {*free}}"
        least = f"{case}: {needed} blocks are enough, and {taken} are taken"
        assert len(taken | {*targets}) == needed, least
        for source, target in random.sample(copies, len(copies)):
            stored[target] = stored[source]
        for name in writers:
            logical, offset = divmod(memory.lengths[name], B)
            assert logical < len(new[name]), f"{case}: {name} has no slot in {new[name]}"
            stored[new[name][logical], offset] = f"new {name}"
        for name, words in truth.items():
            words = words + [f"new {name}"] * (name in writers)
            reads = [*stored[[*new[name]]].ravel()[: len(words)]]
            assert len(new[name]) == -(-len(words) // B), f"{case}: {name} has {new[name]}"
            assert reads == words, f"{case}: {name} reads {reads} in {new[name]}"


attempt(test_plan_step, plan_step)

# %% [markdown]
# **4. What could be shared at best?** (open). At a low temperature samples often say the same for a while, and by then
# they have parted in memory. Suppose that whatever is the same were shared: two blocks, if they hold the same tokens
# and all tokens before are the same. How many blocks would be enough? Look at each token a few times only, so don't
# compare whole beginnings again and again. Then try it on answers of the model, at temperatures of 0.2 and 1. What
# would an engine need to share so? (Chapters 9 and 13 have two answers.)

# %% tags=["exercise"]
def least_blocks(texts, B):
    """texts: lists of tokens, integers; each with its last block, if that isn't full -> blocks.

    [1, 2, 3] and [1, 2, 3, 4] in blocks of 2: 1 2 is shared; 3 and 3 4 are not the same.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_least_blocks(least_blocks):
    from minipaged.teaching.costs import Watched

    least_blocks = own(least_blocks)
    assert equal(least_blocks([[1, 2, 3], [1, 2, 3, 4]], 2), 3), "the example"
    for seed in range(500):
        random = Random(seed)
        B, start, texts = random.randint(1, 4), [random.randrange(2) for _ in range(6)], []
        for _ in range(random.randint(0, 6)):
            rest = [random.randrange(2) for _ in range(random.randint(0, 6))]
            texts.append(start[: random.randint(0, 6)] + rest)
        right = {tuple(text[: end + B]) for text in texts for end in range(0, len(text), B)}
        got = least_blocks(texts, B)
        assert equal(got, len(right)), f"{texts}, B={B}: {len(right)}, not {got}"
    looks = []
    long = [[Watched(i, looks) for i in range(250)] for _ in range(3)]
    assert equal(least_blocks(long, 1), 250), "three texts that are the same"
    most = "750 tokens are looked at {} times: is each beginning compared anew?"
    assert len(looks) <= 40 * 750, most.format(len(looks))


attempt(test_least_blocks, least_blocks)

# %% [markdown]
# ## What's next
#
# Samples part once and never meet again. In a beam search the best answers so far are kept, and the others dropped, at
# every token: sequences fork and die all the time. [Chapter 9](09_beam_search.ipynb) does that with the memory of this
# chapter.
#
# **See it run**: [three samples, step by step](gallery/README.md#three-samples-of-one-prompt), as recorded.
#
# ## Sources
#
# - Kwon et al., *Efficient Memory Management for Large Language Model Serving with PagedAttention*, 2023: section 4.4
#   (fork, copy-on-write, parallel sampling), Figures 8 and 15.
# - Fan, Lewis and Dauphin, *Hierarchical Neural Story Generation*, 2018: top-k. Holtzman et al., *The Curious Case of
#   Neural Text Degeneration*, 2020: the tail, and top-p. Nguyen et al., *Turning Up the Heat: Min-p Sampling for
#   Creative and Coherent LLM Outputs*, 2024.
# - Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*, 2011: random numbers that are computed from what they
#   are for.
# - Bobrow et al., *TENEX, a Paged Time Sharing System for the PDP-10*, 1972: copy-on-write.
