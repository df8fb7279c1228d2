# %% [markdown]
# # 13. Prefix caching
#
# In a chat every question brings the whole conversation with it, and the server computes it all again. But it has
# computed nearly all of it before, a moment ago, and the blocks may still be there. This chapter finds them again: a
# block gets a name that says exactly what is in it.
#
# **You need**: blocks that are shared and counted ([chapter 4](04_blocks.ipynb), [chapter 5](05_page_tables.ipynb)).
# **You get**: a chain of hashes, an order of eviction that never cuts a chain, a real chat whose questions cost a few
# tokens instead of hundreds, and a spy who reads a neighbour's secret from the clock.

# %% [markdown]
# ## The question
#
# When a request ends, its blocks become free. Their contents are still there until somebody else writes into them.
#
# - When may a block that was computed for one request serve another?
# - How is it found, among thousands, without comparing texts?
# - When memory runs out, which of these blocks should be given up first?
# - And who may find whose?

# %% [markdown]
# ## The idea
#
# Give each full block a **name**, made from its tokens and from the name of the block before it:
#
# ```
#   tokens     | Name a fruit . | I like pears . | And you ?
#                     |                |
#   names       hash(-, tokens) -> hash(name, tokens)
#                     |                |
#   blocks            7                3            (not full: has no name)
# ```
#
# Then a table, name -> block, tells what is in memory. A new prompt is cut into blocks, and its names are looked up
# one after the other, until one isn't known. What was found is shared, as by a fork. Only the rest is computed.
#
# A block that nobody holds but that can still be found is **idle**. Idle blocks count as free: they cost nobody
# anything. When no other block is left, they are **evicted**, the one that was not used for the longest time first.

# %% [markdown]
# ## Build it
#
# ### What may be shared?
#
# Not whatever has the same words. The keys and values of a token depend on all tokens before it, through the attention
# of the layers below. Three prompts for the real model, of two blocks each. The second begins as the first does. The
# third has the same tokens as the first in its second block, behind another beginning:

# %%
import hashlib
from collections import Counter, OrderedDict, deque
from random import Random

import torch

from minipaged import LLM, SamplingParams
from minipaged.teaching import attempt, equal, own, plots, show_source

# %%
llm = LLM("smollm2", num_blocks=128, prefix_cache="none", device="cpu")
once = SamplingParams(temperature=0, max_tokens=1)


# %%
def contents(tokens):
    """Keys and values of a prompt, layer by layer: [L, 2, G, T, D]."""
    tables = []
    llm.observers.append(lambda plan, _: tables.append(plan.sequences[0].block_table.copy()))
    llm.generate({"prompt_token_ids": tokens}, once)
    llm.observers.pop()
    blocks = torch.stack([layer[:, :, tables[0]] for layer in llm.executor.runner.cache])
    return blocks.flatten(3, 4)


one, two, three = [*range(300, 316)], [*range(400, 416)], [*range(500, 516)]
first, same_start, same_end = contents(one + two), contents(one + three), contents(three + two)
print("same beginning:", torch.equal(first[..., :16, :], same_start[..., :16, :]))
print("same tokens behind another beginning:",
      torch.equal(first[..., 16:32, :], same_end[..., 16:32, :]))

# %% [markdown]
# The first are equal to the last bit. The others are not: how far are they apart, layer by layer?

# %%
apart = (first[..., 16:32, :] - same_end[..., 16:32, :]).abs().amax((1, 2, 3, 4))
print(f"layer 0: {apart[0]:.1f}, layer 1: {apart[1]:.1f}, layer 29: {apart[29]:.1f}")
assert apart[0] == 0 and all(apart[1:] > 0.1)

# %% [markdown]
# Layer 0 is equal: its keys come from the token and its position alone. From layer 1 on the past is in them. So a
# block may be shared if its tokens **and all tokens before them** are the same. That is what a name has to say.
#
# ### Names
#
# SHA-256 is a hash of 256 bits for which nobody has ever found two inputs with the same output. We take it here, and
# look at weaker ones later.

# %%
def name_of(parent, tokens, salt=""):
    """parent: the name of the block before, "" for none."""
    return hashlib.sha256(repr((parent, tuple(tokens), salt)).encode()).hexdigest()


def names(tokens, B, salt=""):
    """One for each full block."""
    found, parent = [], ""
    for end in range(B, len(tokens) + 1, B):
        parent = name_of(parent, tokens[end - B : end], salt)
        found.append(parent)
    return found


# %%
for tokens in ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 9, 9, 9], [9, 9, 3, 4, 5, 6]):
    print(tokens, "->", [name[:6] for name in names(tokens, 2)])

# %% [markdown]
# Blocks of 2, so the last token of the first two is in no full block. The second prompt has the first two names of the
# first. The third has `3, 4` and `5, 6` at the same places, and not one name in common: its beginning is another one.
#
# **Your turn.** Change one token in one of the three lists, and say before you run it which names will change.
#
# ### A memory that remembers
#
# Chapter 4's pool, with a table of names, and a third place for blocks beside free and in use: idle. `free` and `idle`
# are both in the order in which they are taken.

# %%
class Memory:
    def __init__(self, N, B):
        self.B, self.counts = B, [0] * N
        self.free, self.idle = deque(range(N)), OrderedDict()
        self.block, self.name = {}, {}  # name -> block, and block -> name

    def find(self, tokens, salt=""):
        """Blocks of the longest beginning that is known."""
        found = []
        for name in names(tokens, self.B, salt):
            if name not in self.block:
                break
            found.append(self.block[name])
        return found

    def take(self):
        if self.free:
            return self.free.popleft()
        block, _ = self.idle.popitem(last=False)  # evict the least recently used
        del self.block[self.name.pop(block)]
        return block


# %% [markdown]
# `start` begins a sequence with what is found, and takes blocks for the rest. It looks for all tokens but the last:
# that one has to be computed in any case, because its logits are what the request wants. It is all or nothing; blocks
# that are found and idle are not free for the rest any more.

# %%
class StartingMemory(Memory):
    def start(self, tokens, salt=""):
        """-> (page table, tokens found), or None."""
        found = self.find(tokens[:-1], salt)
        wanted = -(-len(tokens) // self.B) - len(found)
        if wanted > len(self.free) + len(self.idle) - sum(b in self.idle for b in found):
            return None
        for block in found:
            self.idle.pop(block, None)
            self.counts[block] += 1
        table = found + [self.take() for _ in range(wanted)]
        for block in table[len(found):]:
            self.counts[block] = 1
        return table, len(found) * self.B


# %% [markdown]
# `publish` gives names to the full blocks, once their contents are written. If somebody else has computed the same in
# the meantime, the name is taken. Then the sequence goes on with that block and drops its own. `end` gives the blocks
# back, from the last to the first:

# %%
class PrefixMemory(StartingMemory):
    def publish(self, table, tokens, salt=""):
        for i, name in enumerate(names(tokens, self.B, salt)):
            known = self.block.setdefault(name, table[i])
            if known == table[i]:
                self.name[known] = name
                continue
            self.counts[known] += 1
            self.idle.pop(known, None)
            self.drop(table[i])
            table[i] = known

    def drop(self, block):
        self.counts[block] -= 1
        if self.counts[block] == 0:
            if block in self.name:
                self.idle[block] = None
            else:
                self.free.append(block)

    def end(self, table):
        for block in reversed(table):
            self.drop(block)


# %% [markdown]
# A chat in blocks of 4, with numbers for tokens. Each turn has the conversation so far, a question, and then an
# answer. When the turn ends, its tokens are in memory as well, but for the last: it was chosen, and nothing was
# computed from it.

# %%
def serve(memory, prompt, answer=(), salt=""):
    """-> tokens of the prompt that had to be computed; the request is over then."""
    tokens = prompt + list(answer[:-1])
    started = memory.start(tokens, salt)
    if started is None:
        return None
    table, found = started
    found = min(found, (len(prompt) - 1) // memory.B * memory.B)
    memory.publish(table, tokens, salt)
    memory.end(table)
    return len(prompt) - found


# %%
memory, talk = PrefixMemory(N=16, B=4), []
for turn in range(5):
    question, answer = [10 * turn + i for i in range(5)], [10 * turn + 5 + i for i in range(5)]
    computed = serve(memory, talk + question, answer)
    print(f"turn {turn}: a prompt of {len(talk) + 5:2} tokens, {computed} computed")
    talk += question + answer
print(f"{len(memory.idle)} blocks idle, {len(memory.free)} free, {sum(memory.counts)} in use")

# %% [markdown]
# The prompts grow by ten with each turn, and what is computed stays between five and nine. It is the question, the
# last token of the answer before it, and what had not filled a block.
#
# ### Tails first
#
# Sooner or later idle blocks are taken for something else, the least recently used first. All blocks of a request are
# given back in the same moment. In which order do they become idle? Say the conversation has ten blocks, and four are
# taken. If the first four go, the other six are lost too: a walk begins at the beginning, and ends at the first name
# that isn't known. If the last four go, six can still be found. So `end` starts at the end, and tails go first:

# %%
class HeadsFirst(PrefixMemory):
    def end(self, table):
        for block in table:
            self.drop(block)


# %%
for kind in (PrefixMemory, HeadsFirst):
    memory = kind(N=10, B=4)
    serve(memory, list(range(40)))
    serve(memory, list(range(100, 116)))  # somebody else takes four
    print(f"{kind.__name__:12}: {len(memory.find(list(range(40))))} of 10 blocks are found")


# %% [markdown]
# With many conversations it is the same, in smaller change. Twenty people chat, in turns of random length, in a pool
# that can't hold all of their conversations:

# %%
def many_chats(kind, N, people=20, turns=400):
    """-> share of the prompts' tokens that was found."""
    random, memory, talks = Random(0), kind(N, 16), {}
    asked = computed = 0
    for _ in range(turns):
        who = random.randrange(people)
        talk = talks.setdefault(who, [])
        if len(talk) > 600:
            talk.clear()  # a new conversation
        prompt = talk + [random.randrange(1000) for _ in range(random.randint(5, 60))]
        answer = [random.randrange(1000) for _ in range(random.randint(5, 100))]
        computed += serve(memory, prompt, answer)
        asked += len(prompt)
        talk[:] = prompt + answer
    return 1 - computed / asked


# %%
SIZES = [50, 100, 200, 300, 400, 600, 800]
tails = [100 * many_chats(PrefixMemory, N) for N in SIZES]
heads = [100 * many_chats(HeadsFirst, N) for N in SIZES]

# %%
alt = "Both rise with the pool and meet at the top; tails first is above until all fits"
title = "What is found again"
with plots.figure(title, "blocks in the pool", "% of prompt tokens", alt=alt) as axes:
    plots.line(axes, SIZES, tails, "tails first", dy=7)
    plots.line(axes, SIZES, heads, "heads first", dy=-7)
assert all(a >= b for a, b in zip(tails, heads)) and tails[2] > heads[2]

# %% [markdown]
# **Your turn.** Give everyone the same first 160 tokens, as a server with a long system prompt would: where
# `many_chats` begins a talk (in two places), let it begin with `range(160)`. How far do both lines rise at 100 blocks,
# and why do they come closer to each other? Say it before you run it.
#
# ### Publish late
#
# When may a name be given? Only when the contents are really there. In a step many requests start, and none of their
# tokens are computed yet. If a name is given at the start, another request of the same step finds it, and reads what
# nobody has written. Here the blocks hold words, and a request that was started early reads them:

# %%
def two_requests(early):
    """The same prompt twice in one step; what does the second read in its first block?"""
    memory, stored = PrefixMemory(N=8, B=2), ["?"] * 8
    prompt = [1, 2, 3]
    a, _ = memory.start(prompt)
    if early:
        memory.publish(a, prompt)
    b, found = memory.start(prompt)
    read = stored[b[0]] if found else "computed by itself"
    stored[a[0]] = "1 2"
    return read


# %%
print("late: ", two_requests(early=False))
print("early:", two_requests(early=True))
assert two_requests(early=True) == "?"

# %% [markdown]
# ### A real chat
#
# The real model, with the package's cache, and without. The questions are short, the answers up to 60 tokens:

# %%
QUESTIONS = ["Tell me about the sea.", "How deep is it?", "What lives there?",
             "And on the beach?", "Which one is the largest?", "Can I see one?"]


def chat(cache, **options):
    """-> for each turn (tokens of the prompt, found, seconds to the first token); texts."""
    turns, talk = [], []
    with LLM("smollm2", num_blocks=128, prefix_cache=cache, device="cpu") as llm:
        for question in QUESTIONS:
            talk.append({"role": "user", "content": question})
            (out,) = llm.chat(talk, SamplingParams(temperature=0, max_tokens=60), **options)
            talk.append({"role": "assistant", "content": out.outputs[0].text})
            turns.append((len(out.prompt_token_ids), out.num_cached_tokens,
                          out.metrics.time_to_first_token))
    return turns, [message["content"] for message in talk]


# %%
cached, with_cache = chat("hash")
plain, without = chat("none")
assert with_cache == without and all(row[1] == 0 for row in plain)
print(f"{len(with_cache) // 2} answers, the same with and without")
print(f"the last one begins {without[-1][:40]!r}")

# %%
for turn, (prompt, found, _) in enumerate(cached):
    print(f"turn {turn}: {prompt:3} tokens, {found:3} found, {prompt - found:2} to compute")
assert all(found > 0.75 * prompt for prompt, found, _ in cached[2:])

# %% tags=["measured"]
alt = "Without a cache the time to the first token rises turn by turn; with it, it stays low"
with plots.figure("Time to the first token", "turn", "seconds", alt=alt) as axes:
    slow, fast = ([row[2] for row in rows] for rows in (plain, cached))
    plots.line(axes, range(len(slow)), slow, "without")
    plots.line(axes, range(len(fast)), fast, "with the cache")
    axes.set_ylim(0)

# %% [markdown]
# The same answers to the letter: what is found is what would be computed, and the first cells of this chapter showed
# that it is so to the bit. A question that comes late in a conversation costs about as much as the first one.
#
# Most chats begin alike, too. What stands before the first word of the user, the **system prompt**, is the same for
# everyone, and it is found from the second user on.
#
# ### The spy
#
# What saves time can be seen on a clock. A neighbour asks, and then you ask the same, and the answer comes sooner. So
# you know what the neighbour asked. Suppose it was a sentence with a secret:

# %%
def secret_prompt(colour):
    return ("This is confidential, and nobody else may know it. "
            f"The launch code of today is {colour}. Keep it to yourself. "
            "Write a short letter to the crew in which this code is used.")


COLOURS = ["red", "green", "blue", "white", "black", "yellow"]


def spy(salt_of_neighbour=None):
    """-> for each guess, tokens that were found for it."""
    with LLM("smollm2", num_blocks=64, prefix_cache="hash", device="cpu") as llm:
        llm.generate(secret_prompt("yellow"), once, cache_salt=salt_of_neighbour)
        outs = [llm.generate(secret_prompt(colour), once)[0] for colour in COLOURS]
    rows = [(out.num_cached_tokens, out.metrics.time_to_first_token) for out in outs]
    return dict(zip(COLOURS, rows))


# %%
guesses = spy()
print("tokens found for each guess:", {colour: found for colour, (found, _) in guesses.items()})
assert max(guesses, key=lambda colour: guesses[colour][0]) == "yellow"

# %% [markdown]
# The first five share the sentence up to the code, and the right one shares more. A client is not told how many tokens
# were found by every server, but anyone has a clock:

# %% tags=["measured"]
for colour, (_, seconds) in guesses.items():
    print(f"{colour:7} {1000 * seconds:4.0f} ms to the first token")

# %% [markdown]
# Half the prompt is found, and half the time is gone: nobody needs a better clock than that. And block by block a
# whole text can be guessed in this way (exercise 4). The cure is a **salt**: something that goes into every name and
# that only those know who may share. With `cache_salt` the neighbour's blocks have other names:

# %%
salted = spy(salt_of_neighbour="only for us")
print("tokens found for each guess:", {colour: found for colour, (found, _) in salted.items()})
assert salted["yellow"][0] == salted["blue"][0]

# %% [markdown]
# (What is found now are the spy's own earlier guesses, and it is the same for all colours but the first.) A server
# gives a salt to each tenant. All that tenants had in common, such as a public system prompt, is then computed once
# for each.

# %% [markdown]
# ## Check it
#
# Random prompts over three tokens, so that many begin alike, in a small pool. Several requests run at a time, and
# their contents are followed: each block of the pool holds the tokens that it was computed for **with all that came
# before**. What is found must hold just what would be computed.

# %%
def live(random, memory, seen, events=60):
    stored, running = {}, []
    for _ in range(events):
        if running and random.random() < 0.45:
            memory.end(running.pop(random.randrange(len(running))))
            continue
        tokens = [random.randrange(3) for _ in range(random.randint(1, 12))]
        known, before = len(memory.name), len(memory.free)
        started = memory.start(tokens)
        if started is None:
            seen["no room"] += 1
            assert len(memory.free) == before
            continue
        table, found = started
        for i, block in enumerate(table):
            text = tuple(tokens[: (i + 1) * memory.B])
            if i * memory.B < found:
                assert stored[block] == text, "it holds what would have been computed"
            stored[block] = text
        memory.publish(table, tokens)
        running.append(table)
        seen["found"] += found > 0
        seen["evicted"] += len(memory.name) < known
        held = Counter(block for table in running for block in table)
        assert all(memory.counts[block] == held[block] for block in range(len(memory.counts)))
        assert len(memory.free) + len(memory.idle) + len(held) == len(memory.counts)


# %%
seen = Counter()
for seed in range(300):
    random = Random(seed)
    live(random, PrefixMemory(random.randint(6, 12), random.randint(1, 3)), seen)
print(dict(seen))
assert len(seen) == 3 and min(seen.values()) > 100

# %% [markdown]
# ## The package's version
#
# The table of names is a class with one question and three changes:

# %%
from minipaged.memory import HashCache, KVCacheManager, NoSpace

show_source(HashCache.find, HashCache.add, HashCache.remove)

# %% [markdown]
# It is one of two versions of a `PrefixCache` ([chapter 14](14_radixattention.ipynb) has the other). Both can also
# `clear` all, and list the `parents` of their blocks, for checks. Names are Python's own `hash`, of 64 bits, which is
# fast and which two contents may share. So a hit is checked: the tokens are compared, and the entry that was reached
# from:

# %%
show_source(HashCache._key, HashCache._get)

# %% [markdown]
# How much that matters shows with a hash of 4 bits, beside a cache that trusts it. Many contents share a name:

# %%
class Trusting(HashCache):
    def _get(self, before, tokens, salt):
        return self._by_key.get(self._key(before, tokens, salt))


def four_bits(thing):
    return sum(map(ord, repr(thing))) % 16


def lookups(kind):
    """-> for each of 36 contents the block that is found; the right one has its number."""
    cache, contents = kind(2, four_bits), [[a, b] for a in range(6) for b in range(6)]
    for block, pair in enumerate(contents):
        cache.add(block, None, pair)
    return [cache.find(pair) for pair in contents]


# %%
for kind in (HashCache, Trusting):
    found = lookups(kind)
    right = sum(hit == [block] for block, hit in enumerate(found))
    print(f"{kind.__name__:9}: {right} right, {found.count([])} not found,", end=" ")
    print(f"{36 - right - found.count([])} keys and values of another text")
assert all(hit in ([], [block]) for block, hit in enumerate(lookups(HashCache)))
assert any(hit not in ([], [block]) for block, hit in enumerate(lookups(Trusting)))

# %% [markdown]
# What isn't found costs time and nothing else; another one's keys would cost the answer. vLLM hashes with SHA-256 by
# default and doesn't compare.
#
# The allocator knows what is idle. `allocate` takes what was found and what is new in one stroke, all or nothing:

# %%
from minipaged.memory import BlockAllocator

show_source(BlockAllocator.allocate, BlockAllocator._take, BlockAllocator.release)

# %% [markdown]
# `num_free` counts idle blocks too, `num_idle` only these, and `num_used` all that somebody holds. `idle()` lists
# them, the next victim first. `forget_all` is for a change of weights, after which nothing that was computed is right
# (`reset_prefix_cache` of the engine); `renewed` and the manager's `reset` are for a step that was broken off. `check`
# compares all of it, and raises an `IntegrityError`; a caller that frees what is free gets a `MisuseError`. Blocks
# whose contents are lost are told by `take_freed`, so that `debug=True` can fill them with NaN.
#
# A sequence publishes through the manager, which asks whether the tokens are really computed:

# %%
from minipaged.memory import publishing

show_source(KVCacheManager.publish, publishing.publish, publishing._replace)

# %% [markdown]
# `find` gives a `Prefix`, which `allocate` takes; its answer is `Allocated` or `NoSpace`. Where two sequences compute
# the same side by side, both hold the older block afterwards, as in ours. Do both agree? The same random lives, to the
# block number:

# %%
def compare(random, seen):
    N, B = random.randint(6, 12), random.randint(1, 3)
    mine, theirs, running = PrefixMemory(N, B), KVCacheManager(N, B, cache=HashCache(B)), {}
    for number in range(60):
        if running and random.random() < 0.45:
            ended = random.choice([*running])
            mine.end(running.pop(ended))
            theirs.free(ended)
            continue
        tokens = [random.randrange(3) for _ in range(random.randint(1, 12))]
        answer = theirs.allocate(number, len(tokens), prefix=theirs.find(tokens[:-1]))
        started = mine.start(tokens)
        assert isinstance(answer, NoSpace) == (started is None)
        if started is None:
            continue
        running[number], found = started
        mine.publish(running[number], tokens)
        theirs.publish(number, len(tokens), lambda at, count, t=tokens: t[at : at + count])
        assert {n: theirs.block_table(n) for n in running} == running
        assert theirs.idle_blocks() == [*mine.idle]
        seen["started"] += 1
        seen["found"] += found > 0
    theirs.check()


# %%
seen = Counter()
for seed in range(300):
    compare(Random(seed), seen)
print(f"{seen['started']} sequences with the same tables; {seen['found']} found something")
assert seen["found"] > 1000

# %% [markdown]
# The scheduler looks when it lets somebody in, and counts: `PrefixCounts` has the tokens that were `queried`, those
# that were `found`, and those that were `recovered` after a preemption. `llm.stats().prefix_hit_rate` is made of them.

# %%
from minipaged.scheduling.admission import Admission

show_source(Admission._find, Admission._count_hits)

# %% [markdown]
# ### Names that travel
#
# A name says what is in a block, whoever computed it. So it may have been computed elsewhere. Large servers let some
# machines compute prompts and others go on with them, and blocks are sent over. In the package that is
# `scheduling/transfer.py`, and its name for a beginning is one hash of all tokens and the salt:

# %%
from minipaged.scheduling import transfer

show_source(transfer.digest_of, transfer.Exports.pin, transfer.Exports.take_ended)

# %% [markdown]
# Who computed keeps its page table for a while, as an `Export`. `Exports.keep` gives it a secret name, `pin` lets it
# be read, if the digest is the right one, `unpin` ends that, and `end` says that nobody wants it any more. `has_ended`
# and `take_ended` tell what may be freed; `clear` is for memory that is given up:

# %%
exports = transfer.Exports(lease_seconds=60, clock=lambda: 0)
prompt = list(range(32))
digest = transfer.digest_of(prompt, None)
ticket = exports.keep("a request", seq_id=5, blocks=[7, 3], digest=digest)
print("another prompt:", exports.pin(ticket, transfer.digest_of(prompt[::-1], None), 0, 2))
export, blocks = exports.pin(ticket, digest, first=0, count=2)
exports.end(ticket)
print("being read:", blocks, " to be freed:", exports.take_ended())
exports.unpin(export, done=True)
print("read. To be freed: sequences", exports.take_ended())

# %% [markdown]
# The rest of the file, `Transfers`, is where the scheduler meets it. `check` refuses what this engine doesn't do. At
# the producer `request_finished` keeps the blocks, `abort` and `free_ended` give them up. At the consumer
# `get_num_new_matched_tokens` says how many tokens can come, behind those that were found here;
# `update_state_after_alloc` begins a `Load`, `build_connector_meta` names it in each plan, and with `load_ended` the
# request goes on, or computes its prompt itself (`drop`). `start_over` gives up all, and `TransferCounts` counts. The
# long names are vLLM's, so that who has read this finds its way there.

# %% [markdown]
# ## What must hold, and what breaks if it doesn't
#
# **A name says all that came before.** Name blocks by their own tokens only, and two texts share what isn't the same:

# %%
def short_sighted(tokens, B):
    return [name_of("", tokens[i : i + B]) for i in range(0, len(tokens) - B + 1, B)]


yes, no = [5, 6, 1, 2], [7, 8, 1, 2]
for way in (short_sighted, names):
    print(f"{way.__name__}: {len({*way(yes, 2)} & {*way(no, 2)})} names in common")

# %% [markdown]
# **The last token is always computed.** A prompt may be found whole, to its last full block. If nothing is left to
# compute, there are no logits, and nothing to say. In ours and in the package one token is left out of the search:

# %%
memory = PrefixMemory(N=8, B=4)
serve(memory, list(range(8)))
print("the same 8 tokens again:", serve(memory, list(range(8))), "computed, though", end=" ")
print(len(memory.find(list(range(8)))) * 4, "could be found")

# %% [markdown]
# Only full blocks have names, so these are the last four. It also means that nobody ever writes into a block that was
# found: it is full. **Copy-on-write is not needed here.**
#
# **Whoever takes an idle block takes its name away.** Forget that, and the name leads to somebody else's text:

# %%
class Forgetful(PrefixMemory):
    def take(self):
        return self.free.popleft() if self.free else self.idle.popitem(last=False)[0]


memory = Forgetful(N=2, B=4)
serve(memory, [1, 2, 3, 4, 5])
table, _ = memory.start([9, 9, 9, 9, 9, 9, 9, 9])  # takes the idle block, too
print("another one's block is found for 1 2 3 4:", memory.find([1, 2, 3, 4])[0] in table)
assert memory.find([1, 2, 3, 4])[0] in table

# %% [markdown]
# **Found blocks are held before others are taken.** The rest of the same request may need blocks, and idle ones are
# taken for it. If the found ones are still idle then, a request may evict its own beginning:

# %%
class Careless(PrefixMemory):
    def start(self, tokens, salt=""):
        found = self.find(tokens[:-1], salt)
        table = found + [self.take() for _ in range(-(-len(tokens) // self.B) - len(found))]
        for block in table:
            self.idle.pop(block, None)
            self.counts[block] += 1
        return table, len(found) * self.B


for kind in (Careless, PrefixMemory):
    memory = kind(N=3, B=2)
    serve(memory, [1, 2, 3, 4])
    print(f"{kind.__name__:12}: 4 blocks in a pool of 3:", memory.start([1, 2, 3, 4, 5, 6, 7]))

# %% [markdown]
# One block twice in a table: tokens 6 and 7 would be written over 3 and 4. That is why `start` takes what it found out
# of `idle` first, and counts it when it asks whether there is room.
#
# **The head is used whenever the tail is.** A held block's whole path is held. So a head is never evicted before its
# tail, and no name leads behind a name that is gone. The package's `check` looks for that in every step in debug mode:

# %%
manager = KVCacheManager(4, 2, cache=HashCache(2))
manager.allocate(1, 4, prefix=manager.find([]))
manager.publish(1, 4, lambda start, count: [1, 2, 3, 4][start : start + count])
head, tail = manager.block_table(1)
manager.free(1)
manager.check()
manager._gpu.allocator._idle.move_to_end(tail)  # as if the head had been given back first
try:
    manager.check()
except AssertionError as error:
    print(error)

# %% [markdown]
# ## Exercises
#
# Fill in the functions; each is followed by a test that says how far you are.
#
# **1. What can be saved?** (warm-up). One request has just ended, with the tokens `before`. How many tokens of
# `prompt` need not be computed?

# %% tags=["exercise"]
def tokens_saved(before, prompt, B):
    """Two lists of tokens. All full blocks of `before` can still be found."""
    raise NotImplementedError


# %% tags=["test"]
def test_tokens_saved(tokens_saved):
    tokens_saved = own(tokens_saved, forbid=[names, name_of, PrefixMemory])
    for seed in range(400):
        random = Random(seed)
        B = random.randint(1, 5)
        before = [random.randrange(9) for _ in range(random.randint(0, 20))]
        prompt = before[: random.randint(0, 20)] + [random.randrange(9) for _ in range(6)]
        prompt = random.choice([prompt, before[: random.randint(1, 20)] or [1]])
        same = 0
        while same < min(len(before), len(prompt)) and before[same] == prompt[same]:
            same += 1
        right = min(same, len(prompt) - 1) // B * B
        got = tokens_saved(before, prompt, B)
        assert equal(got, right), f"before={before}, prompt={prompt}, B={B}: {right}, not {got}"
    long = list(range(100_000))
    assert equal(tokens_saved(long, [*long, 5], 16), 100_000), "a prompt of 100,000 tokens"


attempt(test_tokens_saved, tokens_saved)

# %% [markdown]
# Costs are counted in what follows: a `Watched` integer notes whenever somebody looks at it, and `bytes_taken` says how
# much memory a call needs.

# %%
from minipaged.teaching.costs import Watched, bytes_taken

# %% [markdown]
# **2. A chain of your own.** Name the full blocks of a prompt with whatever you like, as long as names are equal
# exactly where blocks may be shared: the same tokens, the same tokens before, the same salt, the same B. A hash will
# do if it is long enough that nobody ever sees two names meet; the test looks at 200,000. Each token may be looked at a
# few times only, so don't hash whole prefixes again.

# %% tags=["exercise"]
def chain(tokens, B, salt):
    """tokens: integers; salt: a text or None. -> names: texts, numbers, bytes, tuples."""
    raise NotImplementedError


# %% tags=["test"]
def test_chain(chain):
    plain, chain = chain, own(chain, forbid=[names, name_of])
    met = {}
    for seed in range(3000):
        random = Random(seed)
        B, salt = random.randint(1, 3), random.choice([None, "", "a", "None"])
        tokens = [random.choice([0, 1, 12, 2]) for _ in range(random.randint(0, 7))]
        got = chain(tokens, B, salt)
        assert isinstance(got, list) and len(got) == len(tokens) // B, f"{tokens}, B={B}: {got}"
        for i, name in enumerate(got):
            assert type(name) in (int, str, bytes, tuple), f"a name is plain data, not {name!r}"
            right = B, salt, tuple(tokens[: (i + 1) * B])
            other = met.setdefault(name, right)
            assert other == right, f"(B, salt, tokens) {right} and {other} have one name"
    assert len(met) == len(set(met.values())), "the same block has two names"
    looks = []
    long = chain([Watched(token, looks) for token in range(500)], 1, "a")
    assert len(set(long)) == 500, "500 blocks have 500 names"
    most = "500 tokens are looked at {} times: is each prefix hashed anew?"
    assert len(looks) <= 10 * 500, most.format(len(looks))
    many = plain(range(200_000), 1, None)
    assert len(set(many)) == 200_000, "200,000 blocks, and some have one name: it is too short"


attempt(test_chain, chain)

# %% [markdown]
# **3. The idle blocks.** Build what keeps them, least recently used first. There may be millions, so each operation
# takes the same few moments however many there are: it neither searches nor copies.

# %% tags=["exercise"]
class Idle:
    """put(block): it became idle just now; it isn't idle already.
    take(): -> the one that was put first of those that are here. IndexError if none is.
    remove(block): somebody shares it, so it is idle no more. KeyError if it isn't here.
    len(idle): how many there are.
    """

    def __init__(self):
        raise NotImplementedError


# %% tags=["test"]
def test_Idle(Idle):
    Idle = own(Idle, forbid=[Memory])

    def refuses(error, function, *args):
        try:
            function(*args)
        except error:
            return
        raise AssertionError(f"no {error.__name__} from {function.__name__}{args}")

    for seed in range(60):
        random, idle, other, right = Random(seed), Idle(), Idle(), []
        for step in range(60):
            block = random.randrange(12)
            if block in right and random.random() < 0.5:
                right.remove(block)
                idle.remove(block)
            elif block in right:
                got, first = idle.take(), right.pop(0)
                assert equal(got, first), f"after {step} operations: {first}, not {got}"
            elif random.random() < 0.2:
                refuses(KeyError, idle.remove, block)
            else:
                right.append(block)
                idle.put(block)
            assert len(idle) == len(right), f"{len(right)} are idle, not {len(idle)}"
        assert len(other) == 0, "two of them share their blocks"
        while right:
            assert equal(idle.take(), right.pop(0)), "the order at the end"
        refuses(IndexError, idle.take)
    looks, many = [], Idle()
    for block in range(2000):
        many.put(Watched(block, looks))
    assert len(many) == 2000, f"2,000 were put, and {len(many)} are here"
    first, taken = zip(*[bytes_taken(many.take) for _ in range(3)])
    assert equal([int(block) for block in first], [0, 1, 2]), "of 2,000: 0, 1, 2 come first"
    assert min(taken) < 8000, f"a take needs {min(taken)} bytes of memory: does it copy all?"
    for block in range(1990, 300, -1):
        many.remove(block)
    for block in range(3, 301):
        assert equal(int(many.take()), block), f"of 2,000 blocks: {block} is next"
    most = "3,991 operations look at blocks {} times: does it search?"
    assert len(looks) <= 20 * 3991, most.format(len(looks))


attempt(test_Idle, Idle)

# %% [markdown]
# **4. The spy, block by block** (open). A neighbour has asked something, of `blocks` blocks of B tokens each, all from
# `words`. Find it. You can only ask, and see how many tokens had to be computed. But what you ask is cached, too.
# Trying all texts would take `len(words) ** (B * blocks)` questions; find a way that needs far fewer. The test is the
# easy half. The other half has no test: give `ask` a clock that is off by up to three tokens, up or down, with B = 1.
# A guess that is asked once is cached, so asking again tells nothing. How can you be sure all the same? And what could
# a server do against you, without a salt?

# %% tags=["exercise"]
def spy_out(ask, words, B, blocks):
    """ask(prompt): a list of integers, any -> how many had to be computed. -> the secret.

    At most len(words) ** B * blocks questions; no prompt of more than B * blocks + 1 tokens.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_spy_out(spy_out):
    memory, asked, most, longest = None, [], 0, 0

    def ask(prompt):
        asked.append(list(prompt))
        assert len(asked) <= most, f"more than {most} questions"
        assert 0 < len(prompt) <= longest, f"a prompt of {len(prompt)} tokens"
        return serve(memory, list(prompt))

    spy_out = own(spy_out, allow=[ask], forbid=[PrefixMemory, names, name_of, serve])

    for seed in range(40):
        random = Random(seed)
        words = random.sample(range(100), random.randint(1, 4))
        B, blocks = random.randint(1, 3), random.randint(1, 4)
        secret = [random.choice(words) for _ in range(B * blocks)]
        memory, most, longest = PrefixMemory(2000, B), len(words) ** B * blocks, B * blocks + 1
        serve(memory, [*secret, -1])
        asked.clear()
        got = spy_out(ask, words, B, blocks)
        assert equal(got, secret), f"words={words}, B={B}: the secret was {secret}, not {got}"
        for at in range(0, B * blocks, B):  # it asked for each block, or for all others
            known = [q for q in asked if q[:at] == secret[:at] and len(q) > at + B]
            tried = {(*q[at : at + B],) for q in known}
            sure = (*secret[at : at + B],) in tried or len(tried) >= len(words) ** B - 1
            assert sure, f"block {at // B} was never asked for: where does its text come from?"


attempt(test_spy_out, spy_out)

# %% [markdown]
# ## What's next
#
# A table of names finds what begins alike, block by block, and knows nothing else. It can't say which conversations
# share a beginning, or show what it holds, or which request should come next so that the cache is used best.
# [Chapter 14](14_radixattention.ipynb) keeps the same blocks in a tree.
#
# ## Sources
#
# - vLLM, *Automatic Prefix Caching* (design notes): names as hashes of the parent's name, the tokens and extras; only
#   full blocks; eviction by last use, tails first; `cache_salt`.
# - Kwon et al., *Efficient Memory Management for Large Language Model Serving with PagedAttention*, 2023, section 4.4:
#   shared prefixes.
# - Merkle, *A Digital Signature Based on a Conventional Encryption Function*, 1987: naming data by hashes of hashes.
# - Song et al., *The Early Bird Catches the Leak: Unveiling Timing Side Channels in LLM Serving Systems*, 2024: the
#   spy.
# - Zhong et al., *DistServe*, 2024, and Patel et al., *Splitwise*, 2024: blocks that travel.
