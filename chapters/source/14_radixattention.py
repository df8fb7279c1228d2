# %% [markdown]
# # 14. RadixAttention
#
# A table of names finds again what was computed before, and can't say what it has. This chapter keeps the same blocks
# in a tree, in which every prompt is a path from the root. The tree finds what the table finds, and not one block more.
# But it can be looked at. And it answers a question that a table never asked: in which order should those who wait come
# in, so that most is found?
#
# **You need**: blocks that are found again ([chapter 13](13_prefix_caching.ipynb)). **You get**: a radix tree that is
# split, held and shed leaf by leaf; nine questions for the real model that cost less than half in another order; the
# request that pays for it, and a bound on what it pays; and an hour of a real service.

# %% [markdown]
# ## The question
#
# Chapter 13 gave each block a name and kept a table, name -> block. That is all it takes to find a beginning. But:
#
# - Who shares what with whom? The table has the answer, in no order at all.
# - Would a tree find more?
# - Many requests wait, and memory is short. Who should come next, so that what is in memory is used before it is gone?
# - Who pays for that?

# %% [markdown]
# ## The idea
#
# Four prompts, in blocks of two letters. Beside them is a tree in which each is a path:
#
# ```
#                        +-- ab cd --+-- ef --+-- gh
#   abcdefgh             |           |        |
#   abcdefxy     root ---+           |        +-- xy
#   abcdpq               |           +-- pq
#   mnop                 |
#                        +-- mn op
# ```
#
# What stands between two forks is one **node**: a **run** of blocks that have always followed each other. If every
# block were a node of its own, this would be a *trie*. With runs it is a **radix tree** (Morrison, 1968). SGLang keeps
# its prefix cache so, and calls it **RadixAttention**. (Attention itself stays what it is.)
#
# - A prompt is found by walking down.
# - A new prompt is hung on where its walk ended. If that is in the middle of a run, the run is split.
# - Who runs holds its path. What nobody holds is given up from the leaves, the least recently used leaf first.
#
# And the order of those who wait can be read off the tree: first all below one node, then all below the next.

# %% [markdown]
# ## Build it
#
# ### A walk
#
# A node has the tokens of each of its blocks, and the blocks' numbers. Its children are known by the tokens of their
# first blocks: no two children begin alike, or that block would be in the parent.

# %%
from collections import Counter, deque
from dataclasses import dataclass
from itertools import permutations
from random import Random

from minipaged.teaching import attempt, equal, own, plots, show_source


# %%
class Node:
    def __init__(self, parent, tokens, blocks):
        self.parent, self.tokens, self.blocks = parent, tokens, blocks
        self.children = {}  # tokens of the first block -> node
        self.holders = self.used = 0  # who holds it; when that was last given up


# %%
def cut(tokens, B):
    """-> the tokens of each full block."""
    return [tuple(tokens[end - B : end]) for end in range(B, len(tokens) + 1, B)]


# %% [markdown]
# `match` walks down as long as the tokens agree. It says in which node it ended, after how many blocks of that node,
# and which blocks it went through:

# %%
def match(root, wanted):
    """wanted: tokens of each block. -> (node, blocks of it that agree, all blocks found)."""
    node, at, found = root, 0, []
    for own_tokens in wanted:
        if at == len(node.blocks) and own_tokens in node.children:
            node, at = node.children[own_tokens], 0
        if at == len(node.blocks) or node.tokens[at] != own_tokens:
            break
        found.append(node.blocks[at])
        at += 1
    return node, at, found


# %% [markdown]
# ### A run is split
#
# If a walk ends inside a run, what follows can't be hung there: a node has children only at its end. So the run is cut
# in two. The upper part is a new node, and the old node keeps the lower part. (Why not the other way round? See the
# rules at the end.) Cuts lie between blocks: half a block can't be shared.

# %%
def split(node, at):
    """Cut a run after its first `at` blocks. -> a new node, with these."""
    upper = Node(node.parent, node.tokens[:at], node.blocks[:at])
    upper.holders, upper.used = node.holders, node.used
    upper.children = {node.tokens[at]: node}
    node.parent.children[node.tokens[0]] = upper
    node.tokens, node.blocks, node.parent = node.tokens[at:], node.blocks[at:], upper
    return upper


# %%
def insert(root, wanted, blocks):
    """Hang on what isn't there yet. -> the node in which the path ends."""
    node, at, found = match(root, wanted)
    if at < len(node.blocks):
        node = split(node, at)
    if len(found) == len(wanted):
        return node
    leaf = Node(node, wanted[len(found):], blocks[len(found):])
    node.children[leaf.tokens[0]] = leaf
    return leaf


# %% [markdown]
# The four prompts of the picture. Blocks are numbered as they come:

# %%
def draw(node, before=""):
    for child in node.children.values():
        words = " ".join("".join(map(str, own_tokens)) for own_tokens in child.tokens)
        print(f"{before}|-- {words}   blocks {child.blocks}")
        draw(child, before + "    ")


# %%
root, number = Node(None, [], []), 0
for text in ("abcdefgh", "abcdefxy", "abcdpq", "mnop"):
    insert(root, cut(text, 2), [*range(number, number + len(text) // 2)])
    number += len(text) // 2
draw(root)
print("found for abcdefxz:", match(root, cut("abcdefxz", 2))[2])

# %% [markdown]
# Nine blocks in six runs. Of `abcdefxz` the first three blocks are found, and `xz` is none that is known. (Numbers such
# as 4 are missing: that was a block of the second prompt which the tree had already.)
#
# **Your turn.** Which runs would be split if `ab` came as a fifth prompt? And `abcdefghij`? Say it, then try.
#
# ### Holding a path
#
# Now memory. As in chapter 13, a request starts with what is found, takes blocks for the rest, publishes its full
# blocks when they are computed, and ends. While it runs it **holds** the node in which its path ends, and all nodes
# above it. When it ends, these nodes note the time (a counter will do).

# %%
def path(node):
    """From below the root to the node."""
    nodes = []
    while node.parent:
        nodes.append(node)
        node = node.parent
    return nodes[::-1]


# %%
def below(node):
    """All nodes below it."""
    for child in node.children.values():
        yield child
        yield from below(child)


# %%
@dataclass
class Running:
    node: Node  # where what it holds of the tree ends
    table: list  # its page table
    found: int  # tokens


# %% [markdown]
# A block is taken from the free ones. If there is none, one is **evicted**: of all leaves that nobody holds, the one
# that was used longest ago gives its last block. If that was its only one, the node is gone, and its parent may be a
# leaf now.

# %%
class Pool:
    def __init__(self, N, B):
        self.B, self.free, self.clock = B, deque(range(N)), 0
        self.root = Node(None, [], [])

    def find(self, tokens):
        return match(self.root, cut(tokens, self.B))[2]

    def take(self):
        if self.free:
            return self.free.popleft()
        leaves = [n for n in below(self.root) if not n.children and not n.holders]
        leaf = min(leaves, key=lambda node: node.used)
        first = leaf.tokens[0]
        leaf.tokens.pop()
        block = leaf.blocks.pop()
        if not leaf.blocks:
            del leaf.parent.children[first]
        return block


# %% [markdown]
# `start` is all or nothing. Idle blocks, which nobody holds, count as free, but for those that are found: they are
# about to be held. The last token is always computed, because its logits are wanted, so it is left out of the search.

# %%
class StartingPool(Pool):
    def start(self, tokens):
        """-> Running, or None."""
        node, at, found = match(self.root, cut(tokens[:-1], self.B))
        node = split(node, at) if at < len(node.blocks) else node
        held = path(node)
        idle = sum(len(n.blocks) for n in below(self.root) if not n.holders and n not in held)
        wanted = -(-len(tokens) // self.B) - len(found)
        if wanted > len(self.free) + idle:
            return None
        self.hold(held)
        table = found + [self.take() for _ in range(wanted)]
        return Running(node, table, len(found) * self.B)

    def hold(self, nodes):
        for node in nodes:
            node.holders += 1


# %% [markdown]
# `publish` inserts the full blocks. Where somebody else has computed the same in the meantime, the sequence goes on
# with that block and frees its own. Then it holds the longer path.

# %%
class Tree(StartingPool):
    def publish(self, run, tokens):
        wanted = cut(tokens, self.B)
        node = insert(self.root, wanted, run.table[: len(wanted)])
        known = [block for part in path(node) for block in part.blocks]
        self.free.extend(mine for mine, block in zip(run.table, known) if mine != block)
        run.table[: len(known)] = known
        self.hold(path(node))
        self.let_go(run.node)
        run.node = node

    def let_go(self, node):
        for part in path(node):
            part.holders -= 1

    def end(self, run):
        self.clock += 1
        self.let_go(run.node)
        for part in path(run.node):
            part.used = self.clock
        known = sum(len(part.blocks) for part in path(run.node))
        self.free.extend(reversed(run.table[known:]))


# %% [markdown]
# Three people chat, in blocks of four. Each turn brings the conversation so far and eight tokens more; all
# conversations begin with the same eight, a system prompt. Letters are tokens:

# %%
def serve(tree, tokens):
    """One request, by itself. -> tokens that were found."""
    run = tree.start(tokens)
    tree.publish(run, tokens)
    tree.end(run)
    return run.found


# %%
TALKS = ["SYSTEM: name one red fruit. a cherry. good",
         "SYSTEM: name one red flower. a rose. good.",
         "SYSTEM: hello. hello! how are you? fine."]
chats = Tree(N=40, B=4)
for turn in (24, 32, 40):
    print("found:", [serve(chats, talk[:turn]) for talk in TALKS])
draw(chats.root)
print(sum(len(node.blocks) for node in below(chats.root)), "blocks")

# %% [markdown]
# All three share the system prompt, two of them also `name one red`, and each has a tail of its own. Every turn has
# added a run to its conversation.
#
# In chapter 13 the same blocks stand in a table of 23 names, and to see who shares what one has to follow each name to
# its parent. The tree *is* the answer.
#
# **Your turn.** Give the pool 12 blocks instead of 40, and draw it after each turn. Who loses its tail first?
#
# ### In which order?
#
# Now memory is short, and several requests wait. They have beginnings in common, and each has a last token that is its
# own. What is found depends on who comes when. Six requests, in blocks of one letter, and a pool with room for just one
# of them:

# %%
BATCH = ["sfa1", "sgb2", "sfa3", "sga4", "sfb5", "sgb6"]


# %%
def computed(order, N, B=1):
    """Tokens that are not found, if they come in this order."""
    tree = Tree(N, B)
    return sum(len(tokens) - serve(tree, tokens) for tokens in order)


# %%
every = Counter(computed(order, N=4) for order in permutations(BATCH))
for tokens, orders in sorted(every.items()):
    print(f"{tokens} tokens computed: in {orders:3} orders")
print("as they came:", computed(BATCH, N=4))

# %% [markdown]
# Of 720 orders a few are best. How could one know that nothing is better, without trying all? Draw all requests into
# one endless tree. Each of its blocks has to be computed at least once, whatever the order:

# %%
def size(batch):
    """Blocks in the tree of all of them (blocks of one token)."""
    return len({tuple(tokens[:end]) for tokens in batch for end in range(1, len(tokens) + 1)})


# %%
print("the tree of all six:", size(BATCH), "blocks")
assert size(BATCH) == min(every)

# %% [markdown]
# And is it always enough to compute each block once? Yes, if requests come in the order of a walk **in depth**: all
# that is below a node comes before anything else does. While the requests below some node are served, each of them
# holds the path down to that node before it takes a block. So what is evicted is not on that path. When the walk leaves
# a node, nobody will want it again. Memory needs room for the longest path, and no more. This is SGLang's theorem:
# *with a cache that holds the longest request, the order of a walk in depth is optimal.*
#
# A server need not draw that tree in advance. The same order comes out of a simple rule: **next comes who has the
# longest beginning in memory**. After a request, that is one which shares most with it, so the walk goes up no further
# than it must.

# %%
def longest_first(batch, N, B=1):
    """-> the order in which they come."""
    tree, left, order = Tree(N, B), list(batch), []
    while left:
        order.append(max(left, key=lambda tokens: len(tree.find(tokens[:-1]))))
        left.remove(order[-1])
        serve(tree, order[-1])
    return order


# %%
print(longest_first(BATCH, N=4))
assert computed(longest_first(BATCH, N=4), N=4) == size(BATCH)

# %% [markdown]
# A thousand random batches, each with a pool as small as its longest request:

# %%
total = Counter()
for seed in range(1000):
    random = Random(seed)
    batch = [[random.randrange(3) for _ in range(random.randint(0, 5))] + [f"own {i}"]
             for i in range(random.randint(2, 9))]
    N = max(map(len, batch))
    total["as they came"] += computed(batch, N)
    total["longest first"] += computed(longest_first(batch, N), N)
    total["the least there is"] += size(batch)
print(dict(total))
assert total["longest first"] == total["the least there is"] < total["as they came"]

# %% [markdown]
# (That each request has a last token of its own matters. If a prompt is the beginning of another one, its last token is
# computed even if it is there: `ab` before `abc` costs 3 tokens, after it 4.)
#
# **Your turn.** Give the pools five blocks more. Why does the first number come closer to the others?
#
# ### They keep coming
#
# The theorem is about a batch that waits as a whole. In a server requests keep coming, so we count. Ten kinds of
# requests, some asked for more often than others. Each kind has a beginning of five blocks. A pool of 24 blocks holds
# four beginnings at the best. There are always 30 who wait:

# %%
@dataclass
class Ask:
    name: int  # in the order of arrival
    tokens: list
    overtaken: int = 0  # how many came in before it that arrived later


# %%
def arrivals(seed, count=300, kinds=10, B=4):
    random = Random(seed)
    for name in range(count):
        kind = random.choices(range(kinds), [1 / (1 + kind) for kind in range(kinds)])[0]
        yield Ask(name, [kind] * (5 * B) + [random.randrange(1000) for _ in range(6)])


# %% [markdown]
# The rule is one line. `patience` will be explained in a moment: with 0 it is first come, first served, and if it is
# endless, the longest beginning always comes first.

# %%
ENDLESS = float("inf")


# %%
def next_of(waiting, tree, patience):
    """waiting: in the order of arrival."""
    tired = [one for one in waiting if one.overtaken >= patience]
    if tired:
        return tired[0]
    return max(waiting, key=lambda one: len(tree.find(one.tokens[:-1])))  # the first of equals


# %%
def play(asks, N, patience, backlog=30, B=4):
    """-> (the names in the order in which they came in, tokens found)."""
    tree, asks, waiting, order, found = Tree(N, B), iter(asks), [], [], 0
    while True:
        while len(waiting) < backlog and (one := next(asks, None)):
            waiting.append(one)
        if not waiting:
            return order, found
        chosen = next_of(waiting, tree, patience)
        waiting.remove(chosen)
        for other in waiting:
            other.overtaken += other.name < chosen.name
        found += serve(tree, chosen.tokens)
        order.append(chosen.name)


# %%
def share(N, patience):
    """Of all tokens, in percent, that were found."""
    return 100 * play(arrivals(0), N, patience)[1] / sum(len(one.tokens) for one in arrivals(0))


# %%
POOLS = [8, 12, 16, 24, 36, 56, 80]
came, longest = ([share(N, patience) for N in POOLS] for patience in (0, ENDLESS))

# %%
alt = "Longest first is near its best from the smallest pool on; first come rises slowly to it"
with plots.figure("Ten kinds of requests", "blocks in the pool", "% found", alt=alt) as axes:
    plots.line(axes, POOLS, came, "first come, first served", at=3, dy=-12)
    plots.line(axes, POOLS, longest, "longest beginning first", at=0, dy=17)
    axes.set_ylim(0, 90)
assert longest[0] > 2 * came[0] and all(a >= b for a, b in zip(longest, came))

# %% [markdown]
# With longest first, room for one beginning is nearly as good as room for all ten: among 30 who wait there is nearly
# always one whose beginning is there. First come, first served needs a pool several times as large for the same.
#
# ### Somebody pays
#
# A request that shares nothing has nothing in memory. As long as others wait whose beginning is there, they go first,
# also those who came an hour later. Here is one among a crowd that all begin alike:

# %%
def lonely_crowd(others):
    crowd = [Ask(1 + i, [5] * 20 + [i, i]) for i in range(others)]
    first = Ask(-1, [5] * 20 + [0])  # so that the crowd's beginning is there
    return [first, Ask(0, [7] * 12), *crowd]


# %%
def lonely(others, patience):
    """-> how many came in before number 0, which shares nothing."""
    order, _ = play(lonely_crowd(others), 16, patience, backlog=4)
    return order.index(0) - 1


# %%
print("with 10, 100, 500 others:", [lonely(others, ENDLESS) for others in (10, 100, 500)])
assert lonely(500, ENDLESS) == 500

# %% [markdown]
# It waits until nobody else is left. If they don't stop coming, it waits for ever: it **starves**. SGLang's paper says
# it of its own order.
#
# The cure is `patience`. Each request counts how many came in before it that arrived later. With as many as its
# patience allows it is **tired**, and then it comes first. Among tired ones the first come is first.

# %%
print("with patience 0, 4, 16, 64:", [lonely(500, patience) for patience in (0, 4, 16, 64)])

# %% [markdown]
# What does the bound cost? The same 300 requests in a pool of 12, with more and more patience. Left what is found,
# right how often the one was overtaken that had it worst:

# %%
def worst(order):
    """The largest number of later ones that came in before somebody."""
    return max(sum(other > name for other in order[:at]) for at, name in enumerate(order))


# %%
PATIENCES = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256]
results = [play(arrivals(0), 12, patience) for patience in PATIENCES]
ALL = sum(len(one.tokens) for one in arrivals(0))

# %%
alt = "Found rises from 23 % and levels off at 66 %; the worst case is the patience, up to 44"
with plots.figures("Found, %", "Overtaken, at the worst", size=(7.6, 3.0), alt=alt) as axes:
    for one, values in zip(axes, ([100 * found / ALL for _, found in results],
                                  [worst(order) for order, _ in results])):
        plots.line(one, range(len(PATIENCES)), values, "")
        one.set_xticks(range(len(PATIENCES)), PATIENCES)
        plots.label(one, "patience", "")
        one.set_ylim(0)

# %% [markdown]
# (Nobody was overtaken more than 44 times, so there more patience changes nothing.) Patience is a dial between what is
# found and how long the unlucky wait, and its bound is a promise: **who arrived with k before it comes in as one of the
# first k + patience + 1**. For those who came earlier may all go first, and of the others no more than its patience. We
# check that below.
#
# **Your turn.** Let 300 wait instead of 30 (`backlog`). What happens to both curves, and why?

# %% [markdown]
# ## Check it
#
# Random requests over three tokens, so that many begin alike, in small pools. They start, publish and end at random, so
# that two often compute the same side by side. The tree must be one: nobody above is held less often than somebody
# below, or was used earlier; and each block is in one place.

# %%
def check(tree, running, N):
    parts = [*below(tree.root)]
    for part in parts:
        assert len(part.blocks) == len(part.tokens) > 0
        assert part.holders == sum(part in path(run.node) for run in running)
        if part.parent is not tree.root:
            assert part.parent.holders >= part.holders and part.parent.used >= part.used
    known = [block for part in parts for block in part.blocks]
    mine = {block for run in running for block in run.table} - {*known}
    assert sorted([*known, *mine, *tree.free]) == list(range(N))


# %% [markdown]
# And each block is followed: it holds the tokens that it was computed for, with all that came before. What is found
# must hold just what would be computed. (`others` and `after` are for later.)

# %%
def live(random, seen, others=lambda N, B: [], after=check, events=60):
    N, B = random.randint(6, 12), random.randint(1, 3)
    tree, more, running, texts, holds = Tree(N, B), others(N, B), {}, {}, {}
    for name in range(events):
        what, which = random.random(), random.choice([*running] or [0])
        if running and what < 0.3:
            tree.end(running.pop(which))
            for other in more:
                other.free(which)
        elif running and what < 0.6:
            free = len(tree.free)
            tree.publish(running[which], texts[which])
            for other in more:
                publish(other, which, texts[which])
            seen["computed twice"] += len(tree.free) > free
        else:
            tokens = texts[name] = [random.randrange(3) for _ in range(random.randint(1, 12))]
            for other in more:
                start(other, name, tokens)
            if (run := tree.start(tokens)) is None:
                seen["no room"] += 1
                continue
            running[name], seen["found"] = run, seen["found"] + (run.found > 0)
            for i, block in enumerate(run.table):
                text = tuple(tokens[: (i + 1) * B])
                assert i * B >= run.found or holds[block] == text, "what would be computed"
                holds[block] = text
        after(tree, [*running.values()], N, *more)


# %%
seen = Counter()
for seed in range(300):
    live(Random(seed), seen)
print(dict(seen))
assert len(seen) == 3 and min(seen.values()) > 50

# %% [markdown]
# And the promise of patience, with random kinds, pools, backlogs and patience:

# %%
for seed in range(60):
    random = Random(seed)
    asks, patience = arrivals(seed, 80, random.randint(1, 12)), random.choice([0, 1, 3, 10, 30])
    order, _ = play(asks, random.randint(8, 40), patience, random.randint(1, 40))
    assert worst(order) <= patience
    assert all(at <= name + patience for at, name in enumerate(order))

# %% [markdown]
# ## The package's version
#
# `RadixCache` stands behind the same interface as chapter 13's table, `PrefixCache`: `find`, `add`, `remove`, `clear`.

# %%
from minipaged.memory import HashCache, KVCacheManager, RadixCache

show_source(RadixCache.find, RadixCache.add, RadixCache._split)

# %% [markdown]
# Two things differ from ours.
#
# **It has no holders and no times.** They are there already. The allocator counts for each block how many page tables
# hold it, and whoever holds a block holds the path to it, because page tables begin at the beginning. And the allocator
# keeps idle blocks in the order in which they fell out of use, tails first. So the first idle block is always the last
# block of a leaf: the leaf that was used longest ago. The tree is told which block goes, and refuses any other:

# %%
show_source(RadixCache.remove)

# %% [markdown]
# **It splits only where two part.** Ours also splits where a request ends inside a run, since it holds nodes. And where
# ours hangs the next turn of a chat below the last one, the package makes the leaf longer. So its runs are as long as
# they can be, and its picture has fewer lines:

# %%
def start(manager, name, tokens):
    manager.allocate(name, len(tokens), prefix=manager.find(tokens[:-1]))


# %%
def publish(manager, name, tokens):
    if name in manager.sequences():
        manager.publish(name, len(tokens), lambda at, count: tokens[at : at + count])


# %%
def three_turns(manager):
    for turn in (24, 32, 40):
        for name, talk in enumerate(TALKS):
            start(manager, name, talk[:turn])
            publish(manager, name, talk[:turn])
            manager.free(name)


# %%
package = KVCacheManager(40, 4, cache=RadixCache(4))
three_turns(package)
print(package.cache.draw("".join))

# %% [markdown]
# `draw` takes a function that turns tokens into words, and can leave out what is too much (`width`, `most`). The text
# of the tree is its `_walk`. `parents` says of each block which one it follows. For the table of names it is the same:

# %%
table = KVCacheManager(40, 4, cache=HashCache(4))
three_turns(table)
assert table.cache.parents() == package.cache.parents()
show_source(RadixCache.parents, RadixCache._walk, RadixCache.draw)

# %% [markdown]
# A **salt** (chapter 13) is a tree of its own: only who knows the salt gets to its root, and nothing is shared.

# %%
salted = RadixCache(block_size=2)
salted.add(0, None, list("ab"), salt="tenant 7")
print(salted.find(list("ab"), salt="tenant 7"), salted.find(list("ab"), salt="tenant 8"))

# %% [markdown]
# ### Publishing
#
# How a sequence comes into the tree is the same code for both caches:

# %%
from minipaged.memory import publishing

show_source(publishing.publish, publishing._replace)

# %% [markdown]
# `add` answers with the block that is found from now on. If it is another one, somebody was faster, and all who hold
# our block go on with that one. *All*: samples of one prompt hold the same blocks, and if one of them went on with a
# block that follows `known` while another still held `own`, then somebody would hold a block and not the path to it.

# %%
twins = KVCacheManager(8, 2, cache=RadixCache(2))
for name in (1, 2):
    start(twins, name, "abcde")
print("side by side:", twins.block_table(1), twins.block_table(2))
for name in (1, 2):
    publish(twins, name, "abcde")
print("published:   ", twins.block_table(1), twins.block_table(2))

# %% [markdown]
# Both computed `ab cd`, and one copy of it is free again. What doesn't fill a block, `e`, each keeps to itself.
#
# ### All three, side by side
#
# Does the tree find more than the table? The same random lives as above, three times at once: our tree, the package's
# tree, and the package's table, which chapter 13 compared with its own, to the block number. We want equal page tables,
# and the same order in which blocks would be evicted:

# %%
def idle(tree):
    """Blocks in the order in which they would be evicted."""
    parts = [part for part in below(tree.root) if not part.holders]
    parts.sort(key=lambda part: (part.used, -len(path(part))))
    return [block for part in parts for block in reversed(part.blocks)]


# %%
def the_same(tree, running, N, *managers):
    for manager in managers:
        tables = [manager.block_table(name) for name in manager.sequences()]
        assert tables == [run.table for run in running]
        assert manager.idle_blocks() == idle(tree)
        manager.check()


# %%
def both_caches(N, B):
    return [KVCacheManager(N, B, cache=kind(B)) for kind in (HashCache, RadixCache)]


# %%
seen = Counter()
for seed in range(200):
    live(Random(seed), seen, both_caches, the_same)
print(f"{200 * 60} events, {seen['found']} sequences found something: all three are the same")
assert seen["found"] > 400

# %% [markdown]
# **The same blocks are found, and the same are evicted.** So whoever measures a difference between "radix tree" and
# "hash table" measures something else. Three real differences remain:
#
# - A table knows a block by a hash, and a hash may lie. Then the second content has no name, and neither has what
#   follows it. A tree compares tokens all the way. With a hash of four bits:

# %%
weak = HashCache(4, hash_function=lambda thing: sum(map(ord, repr(thing))) % 16)
three_turns(KVCacheManager(40, 4, cache=weak))
print(len(weak), "of", len(package.cache), "blocks are known in the table")

# %% [markdown]
# - A name travels: one number says what is in a block, also on another machine. A place in a tree doesn't.
# - In SGLang's paper a block has one token, in vLLM and here 16. *That* changes what is found: from each beginning that
#   is known, what doesn't fill a block is lost. The price is sixteen times as many blocks to keep account of.
#
# ### The order, in the package
#
# `schedule="prefix"` is our rule, in `scheduling/admission.py`. (`"fcfs"` is the default: first come, first served.)

# %%
from minipaged.scheduling import admission
from minipaged.scheduling.admission import Admission

print("PATIENCE =", admission.PATIENCE, " WINDOW =", admission.WINDOW)
show_source(Admission._in_order, Admission._may_overtake, Admission._earlier, Admission._leave)

# %% [markdown]
# Only the `WINDOW` of the earliest is compared, because each is looked up in every step. Who is swapped out
# ([chapter 12](12_preemption.ipynb)) counts what it had computed: it has that ready. `num_overtaken` grows for all who
# arrived earlier and still wait, in either queue. The rest is `let_in`, which is asked once in every step:

# %%
show_source(Admission.let_in, Admission._has_to_wait)

# %% [markdown]
# It lets in one after the other, and ends at the first who doesn't fit: nobody passes that one. Only a long prompt may
# be passed (`_has_to_wait`), when other long ones have taken what long ones may have of this step ([chapter
# 11](11_chunked_prefill.ipynb)). But whoever passes, `_may_overtake` is asked each time, so that even in a single step
# nobody is overtaken more often than `patience` says.
#
# Is that our order? One request after another, with answers of one token and no model: whatever it is, we say token 7.

# %%
from minipaged import SamplingParams
from minipaged.requests.request import Request
from minipaged.requests.sampling_params import SampledToken
from minipaged.scheduling.plan import StepOutput
from minipaged.scheduling.scheduler import Scheduler


# %%
def play_package(asks, N, patience, backlog=30, B=4, schedule="prefix", kind=Admission):
    memory = KVCacheManager(N, B, cache=RadixCache(B))
    scheduler = Scheduler(memory, max_num_seqs=1, watermark=0, schedule=schedule)
    scheduler.admission.__class__ = kind  # for what must hold
    scheduler.admission.patience, asks, order = patience, iter(asks), []
    while True:
        while len(scheduler.waiting) < backlog and (one := next(asks, None)):
            params = SamplingParams(max_tokens=1)
            scheduler.add(Request(str(one.name), one.name, one.tokens, params, 1))
        plan = scheduler.schedule()
        if not plan.sequences:
            return order, scheduler.admission.prefixes.found
        order += map(int, plan.admitted)
        drawn = {s.seq_id: [[SampledToken(7)]] for s in plan.sequences}
        scheduler.update(plan, StepOutput(tokens=drawn))


# %%
for seed in range(12):
    random = Random(seed)
    patience, kinds = random.choice([0, 1, 4, 16, ENDLESS]), random.randint(1, 12)
    N, backlog = random.randint(8, 40), random.randint(1, 40)
    ours = play(arrivals(seed, 100, kinds), N, patience, backlog)
    assert ours == play_package(arrivals(seed, 100, kinds), N, patience, backlog)
    fcfs = play_package(arrivals(seed, 100, kinds), N, 0, backlog, schedule="fcfs")
    assert fcfs == play(arrivals(seed, 100, kinds), N, 0, backlog)
print("12 loads: the same order, and as many tokens found")
for patience in (ENDLESS, admission.PATIENCE):
    order, _ = play_package(lonely_crowd(100), 16, patience, backlog=4)
    print(f"patience {patience}: {order.index(0) - 1} of 100 come in before the lonely one")

# %% [markdown]
# ### Nine questions for the real model
#
# A model that has seen a few examples in its prompt goes on in their manner (*few-shot*). Three kinds of questions,
# each behind its own examples, and all behind the same first lines. They come mixed:

# %%
from minipaged import LLM

HEAD = "Here is a list for children. Each line has one fact, and it ends with a full stop.\n"
KINDS = {
    "Country: {}. Capital: {}.\n": "France Paris Japan Tokyo Egypt Cairo Peru Lima Cuba Havana",
    "Word: {}. Opposite: {}.\n": "hot cold big small early late rich poor empty full hard soft",
    "Animal: {}. Its young: {}.\n": "dog puppy cat kitten cow calf hen chick horse foal",
}
ASKED = ["Italy", "up", "goat", "Germany", "young", "duck", "Spain", "dark", "lion"]
PROMPTS = []
for i, word in enumerate(ASKED):
    form, pairs = [*KINDS.items()][i % 3]
    words = pairs.split()
    examples = "".join(map(form.format, words[::2], words[1::2]))
    PROMPTS.append(HEAD + examples + form.format(word, "").rstrip(" .\n"))
print(PROMPTS[0][-60:])


# %%
def ask(cache, num_blocks, **options):
    """-> (answers, tokens computed, the order in which they came in, the tree as text)."""
    with LLM("smollm2", num_blocks=num_blocks, block_size=8, prefix_cache=cache, device="cpu",
             max_num_seqs=1, **options) as llm:
        plans = []
        llm.observers.append(lambda plan, output: plans.append(plan))
        outs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=5, stop=["."]))
        drawn = llm.memory.cache.draw(llm.tokenizer.decode, 96) if cache == "radix" else ""
    order = [int(name) for plan in plans for name in plan.admitted]
    answers = [out.outputs[0].text.strip() for out in outs]
    return answers, sum(plan.num_tokens for plan in plans), order, drawn


# %%
runs = {cache: ask(cache, num_blocks=100) for cache in ("none", "hash", "radix")}
for cache, (answers, tokens_computed, _, _) in runs.items():
    assert answers == runs["none"][0]
    print(f"{cache:5}: {tokens_computed} tokens computed")
print(dict(zip(ASKED, runs["radix"][0])))
print(runs["radix"][3])

# %% [markdown]
# Three times the same answers (right or wrong, they are the model's), from a fraction of the work. The tree shows the
# experiment: the first lines, three kinds of examples, and the questions.
#
# That was with plenty of memory. Now there are 14 blocks: one prompt and its answer fit, and little else. All nine
# wait. First come, first served, and then longest beginning first:

# %%
small = {order: ask("radix", num_blocks=14, schedule=order) for order in ("fcfs", "prefix")}
for order, (answers, tokens_computed, names, _) in small.items():
    assert answers == runs["none"][0]
    print(f"{order:6}: {tokens_computed} tokens computed, in the order {names}")
assert small["prefix"][1] <= runs["radix"][1] < 0.6 * small["fcfs"][1]

# %% [markdown]
# The order did what seven times the memory did. It is the walk in depth: all of one kind, then all of the next.

# %% [markdown]
# ### An hour of a real service
#
# Moonshot AI has published an hour of its chat service Kimi (*Mooncake*, FAST 2025, Apache 2.0): 12,031 requests, and
# no texts. In their place there is a number for every 512 tokens of a prompt, and equal numbers are equal beginnings.
# That is all a prefix cache needs: each number is taken for a block's only "token", and both caches are replayed.
#
# The trace is public and too large for a course (`conversation_trace.jsonl`, in the folder `FAST25-release/traces` of
# github.com/kvcache-ai/Mooncake). If you have it, `python -m minipaged.experiments.prefixes FILE` takes a minute or two
# and prints what follows. The package keeps these numbers:

# %%
from minipaged.experiments import prefixes

hour = prefixes.known()["mooncake"]
print(f"{hour.requests:,} requests, {hour.blocks:,} full blocks, {hour.different:,} different")
print(f"in a tree: {hour.runs:,} runs; found if nothing is evicted: {100 * hour.ideal:.1f} %")
assert hour.found["hash"] == hour.found["radix"]
first_come, in_order = (100 * found[3] for found in (hour.found["radix"], hour.in_order))
print(f"at 4,000 blocks {first_come:.1f} % as they came, {in_order:.1f} % longest first")
print(f"half of those that go on do so after more than {hour.back[12]} requests")

# %%
alt = "An S from 4 % at 500 blocks to 38 %; longest first lies above it where memory is short"
with plots.figure("An hour of chats", "blocks of 512 tokens", "% found", alt=alt) as axes:
    for values, name, at, dy in ((hour.found["radix"], "hash and radix", 5, -10),
                                 (hour.in_order, "longest first of 64", 0, 26)):
        plots.line(axes, prefixes.CAPACITIES, [100 * one for one in values], name, at=at, dy=dy)
    axes.axhline(100 * hour.ideal, color=plots.GREY, linewidth=1)
    axes.text(500, 100 * hour.ideal + 0.8, "nothing evicted", fontsize=9, color=plots.INK)
    axes.set_xscale("log")
    axes.set_xticks(prefixes.CAPACITIES[::2], [f"{N:,}" for N in prefixes.CAPACITIES[::2]])
    axes.minorticks_off()
    axes.set_ylim(0, 44)

# %% [markdown]
# - Hash and radix are one line, to the block.
# - The line begins at 4 %, which is the one block that all requests begin with. Conversations are found only when the
#   pool holds what was said some hundred requests ago. Half of those that go on do so after more than 423 requests, two
#   minutes: so long it takes to be answered, to read and to type.
# - That takes memory. Chapter 15's server of today has room for 426,000 tokens beside the model, which is 832 of these
#   blocks: far to the left. That is why such services keep blocks in the machines' other memories as well.
# - If there is always a queue of 64 and the longest beginning comes first, more is found where memory is short: at
#   4,000 blocks 13.0 % instead of 9.4 %. Where all fits, order is worth nothing.

# %% [markdown]
# The package also keeps how requests go on from each other: how many do, how long ago the other came, how much is new.
# From that `draw` makes a trace of the same kind, and here are both caches on it:

# %%
drawn = hour.draw(2000)
for N, real in zip(prefixes.CAPACITIES[1::2], hour.found["radix"][1::2]):
    both = [prefixes.replay(drawn, N, cache) for cache in ("hash", "radix")]
    part_found = 100 * both[0] / sum(len(one.blocks) for one in drawn)
    print(f"{N:6} blocks: {part_found:4.1f} %; in the real hour {100 * real:4.1f} %")
    assert both[0] == both[1]

# %% [markdown]
# It has 2,000 requests, six times fewer than the real hour. So in large pools less is found: less was there before.

# %% [markdown]
# ## What must hold, and what breaks if it doesn't
#
# **An end stays where it is.** A request holds the node in which its path ends. If that node is split while it runs, it
# must still hold *both* parts. In our `split` the old node stays below, so the request's end is still its end. Let the
# old node be the upper part, and it gives back only that. (The package's `_split` does it so, and may: nobody holds
# nodes there.)

# %%
def wrong_split(node, at):
    lower = Node(node, node.tokens[at:], node.blocks[at:])
    lower.children, lower.holders, lower.used = node.children, node.holders, node.used
    for child in lower.children.values():
        child.parent = lower
    node.children = {lower.tokens[0]: lower}
    node.tokens, node.blocks = node.tokens[:at], node.blocks[:at]
    return node


# %%
for cutting in (split, wrong_split):
    tree = Tree(8, 1)
    run = tree.start("abcd")
    tree.publish(run, "abcd")
    cutting(tree.root.children["a",], 2)  # while it runs, somebody parts from it after "ab"
    tree.end(run)
    held = sum(len(part.blocks) for part in below(tree.root) if part.holders)
    print(f"{cutting.__name__}: nobody runs, and {held} blocks are held for ever")

# %% [markdown]
# **The whole path is held.** It may look as if holding the last node were enough, since only leaves are evicted, and
# who has a child is none. But then the nodes above count as free blocks that can be had. `start` says yes, and `take`
# finds no leaf:

# %%
class HoldsOnlyTheEnd(Tree):
    def hold(self, nodes):
        super().hold(nodes[-1:])

    def let_go(self, node):
        node.holders -= node.parent is not None


# %%
def crowded(kind):
    tree = kind(6, 1)
    serve(tree, "ab12")
    serve(tree, "ab34")  # two paths part after ab: 6 blocks
    tree.start("ab1x")  # holds ab and 1; x takes the place of a tail
    try:
        return tree.start("pqr")
    except ValueError as error:
        return f"a promise, and then: {error}"


# %%
for kind in (Tree, HoldsOnlyTheEnd):
    print(f"{kind.__name__}: {crowded(kind)}")

# %% [markdown]
# **Leaves first.** Let eviction take a block from any run that nobody holds. Then a run is shortened, and what hangs
# below it moves up: a walk gets there without the tokens that are gone, and finds keys of another text.

# %%
class TakesFromAnyRun(Tree):
    def take(self):
        if self.free:
            return self.free.popleft()
        parts = [part for part in below(self.root) if part.blocks and not part.holders]
        oldest = min(parts, key=lambda part: part.used)
        oldest.tokens.pop()
        return oldest.blocks.pop()


# %%
for kind in (Tree, TakesFromAnyRun):
    tree = kind(6, 1)
    for text in ("abcd", "abxy", "pqr"):
        serve(tree, text)
    print(f"{kind.__name__}: {len(tree.find('axy'))} found for axy, which nobody has asked")

# %% [markdown]
# In the right tree only the `a` is found. The package's tree refuses to remove what isn't an end (see `remove` above).

# %% [markdown]
# **Tired ones come by arrival.** Suppose the longest beginning counted among them as well. Then a later one can be
# first in line, and may not overtake an earlier one that is tired. It can't go, and nobody else is asked. All wait for
# ever:

# %%
class BeginningsOnly(Admission):
    def _in_order(self):
        return sorted(self._queues.waiting, key=lambda one: -self._find(one).num_tokens)


# %%
for kind in (Admission, BeginningsOnly):
    order, _ = play_package(lonely_crowd(30), 16, patience=16, backlog=4, kind=kind)
    print(f"{kind.__name__}: {len(order)} of 32 came in, then there was nothing to do")
assert len(order) < 32

# %% [markdown]
# ## Exercises
#
# Fill in the functions; each is followed by a test that says how far you are.
#
# **1. Where two part** (warm-up). A node has a run, and a new prompt comes along its way. What do they share, and what
# is left of each? Cuts lie between whole blocks.

# %% tags=["exercise"]
def part(run, new, B):
    """run: the tokens of a node, in whole blocks; new: a list of tokens, of any length.

    -> (shared, rest of run, rest of new): lists of tokens, each in whole blocks. What doesn't
    fill a block at the end of `new` is in none of them.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_part(part):
    part = own(part, forbid=[match, split, insert])
    for seed in range(500):
        random = Random(seed)
        B = random.randint(1, 5)
        run = [random.randrange(3) for _ in range(B * random.randint(1, 5))]
        new = [random.randrange(3) for _ in range(random.randint(0, 7))]
        new = run[: random.randint(0, 25)] + new
        whole, at = new[: len(new) // B * B], 0
        while at < min(len(run), len(whole)) and run[at : at + B] == whole[at : at + B]:
            at += B
        right, got = (run[:at], run[at:], whole[at:]), part(run, new, B)
        assert equal(got, right), f"run={run}, new={new}, B={B}: {right}, not {got}"


attempt(test_part, part)

# %% [markdown]
# Costs are counted in what follows: a `Watched` integer notes whenever somebody looks at it.

# %%
from minipaged.teaching.costs import Watched

# %% [markdown]
# **2. Who goes next?** Our `take` looks at every leaf for each block that it evicts. With a hundred thousand leaves
# that is slow. Say for `count` evictions at once which nodes go, in order, without looking at all of them each time.

# %% tags=["exercise"]
def to_evict(parents, used, ends, count):
    """parents: {node: its parent, or None at the top}, a block each, in any order.
    used: {node: when it was last used}; a parent as late as its children, or later. No two
    nodes have the same time unless one is below the other.
    ends: nodes in which running requests end; they hold these nodes and all above them.

    -> a list: always the leaf that nobody holds and that was used longest ago. With its last
    child gone, a node is a leaf. At most `count`; fewer, if no more can go.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_to_evict(to_evict):
    to_evict = own(to_evict, forbid=[Tree, below, path, idle])

    def some_tree(random, n, chain):
        """Requests go down from the root at random, and all on their way get their time."""
        names = random.sample(range(10 * n), n)
        parents = {names[0]: None}
        for at, name in enumerate(names[1:], 1):
            one = names[at - 1] if random.random() < chain else random.choice([None, *parents])
            parents[name] = one
        used, clock = {}, 0
        for name in random.sample(names, n):
            clock += random.randint(1, 3)
            while name is not None:
                used[name], name = clock, parents[name]
        return dict(random.sample([*parents.items()], n)), used

    for seed in range(400):
        random = Random(seed)
        n = random.randint(1, 12)
        parents, used = some_tree(random, n, random.random())
        ends = set(random.sample([*parents], random.choice([0, 0, min(n, 2)])))
        count, left, right = random.randint(0, n + 1), dict(parents), []
        while len(right) < count:
            free = [one for one in left if one not in {*left.values()} | ends]
            if not free:
                break
            right.append(min(free, key=used.get))
            del left[right[-1]]
        got = to_evict(parents, used, ends, count)
        case = f"parents={parents}, used={used}, ends={ends}, count={count}"
        assert equal(got, right), f"{case}: {right}, not {got}"
    for chain in (0, 0.9):
        looks, n = [], 1500
        parents, used = some_tree(Random(1), n, chain)
        used = {name: Watched(time_used, looks) for name, time_used in used.items()}
        assert len(to_evict(parents, used, set(), n)) == n
        most = f"{n} evictions look at times {len(looks)} times: at all leaves for each?"
        assert len(looks) <= 60 * n, most


attempt(test_to_evict, to_evict)

# %% [markdown]
# **3. In depth.** Put a batch into the order of a walk in depth: the request that came first is first; then always that
# one of those left which has the longest beginning in common with the last one. Among equals, who came first. Batches
# are large, so don't compare each request with each other one.

# %% tags=["exercise"]
def in_depth(requests):
    """requests: lists of tokens, as they came. -> their numbers, in the order of the walk."""
    raise NotImplementedError


# %% tags=["test"]
def test_in_depth(in_depth):
    in_depth = own(in_depth, forbid=[longest_first, Tree])

    def common(one, other):
        return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b),
                    min(len(one), len(other)))

    for seed in range(400):
        random = Random(seed)
        words = random.randint(1, 3)
        batch = [[random.randrange(words) for _ in range(random.randint(0, 6))]
                 for _ in range(random.randint(0, 8))]
        right = [0] if batch else []
        while len(right) < len(batch):
            left = [i for i in range(len(batch)) if i not in right]
            right.append(max(left, key=lambda i: common(batch[i], batch[right[-1]])))
        got = in_depth(batch)
        assert equal(got, right), f"{batch}: {right}, not {got}"
    looks, random = [], Random(0)
    batch = [[Watched(bit, looks) for bit in [0] * 12 + random.choices([0, 1], k=8)]
             for _ in range(600)]
    got = in_depth(batch)
    assert sorted(got) == list(range(600)), "600 requests, each once"
    most = f"600 requests of 20 tokens: {len(looks)} looks. Is each compared with each?"
    assert len(looks) <= 100 * 600 * 20, most


attempt(test_in_depth, in_depth)

# %% [markdown]
# **4. A patient queue.** The queue of this chapter, without memory: how much would be found for a request is told when
# it is added, and stays.

# %% tags=["exercise"]
class PatientQueue:
    """add(name, found): it arrives; nobody of this name waits.
    next(): takes out the one that comes in, and -> its name. IndexError if nobody waits.

    Next is the one with the largest `found`; among equals, who arrived first. But who was
    overtaken `patience` times, by some that arrived later, goes before all others; among
    such, who arrived first.
    """

    def __init__(self, patience):
        raise NotImplementedError


# %% tags=["test"]
def test_PatientQueue(PatientQueue):
    PatientQueue = own(PatientQueue, forbid=[next_of, play])
    for seed in range(300):
        random = Random(seed)
        patience = random.choice([0, 1, 2, 3, 6])
        queue, other, waiting, story = PatientQueue(patience), PatientQueue(0), [], []
        names = random.sample(range(100), 40)
        for name in names:
            for _ in range(random.choice([0, 1, 1, 3])):
                if not waiting:
                    continue
                tired = [row for row in waiting if row[2] >= patience]
                first = tired[0] if tired else max(waiting, key=lambda row: row[1])
                for row in waiting[: waiting.index(first)]:
                    row[2] += 1
                waiting.remove(first)
                story.append("next")
                case, got = f"patience {patience}: {', '.join(story)}", queue.next()
                assert equal(got, first[0]), f"{case}: {first[0]}, not {got}"
            found = random.randint(0, 3)
            waiting.append([name, found, 0])
            queue.add(name, found)
            story.append(f"add({name}, {found})")
        for empty in (other, PatientQueue(patience)):
            try:
                empty.next()
            except IndexError:
                continue
            raise AssertionError("nobody waits: IndexError")


attempt(test_PatientQueue, PatientQueue)

# %% [markdown]
# **5. The endless cache** (open). What would a cache find that never gives anything up? Write it for requests such as
# those of the trace. Then take the real one: do you get the 38.2 % of this chapter? (It counts blocks, and you count
# tokens.) And how far from a request is the one that it goes on from?

# %% tags=["exercise"]
def endless(requests, B):
    """requests: (tokens of the prompt, its numbers), in order; a number for every B tokens,
    also for what is left at the end. Equal numbers are equal beginnings.

    -> (tokens found, tokens asked for). Only full blocks can be found, and only those of
    earlier requests. The last token of a prompt is always computed.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_endless(endless):
    endless = own(endless, forbid=[prefixes.asked, prefixes.replay, prefixes.summarize])
    for seed in range(300):
        random = Random(seed)
        B, numbers, requests, texts, right = random.randint(1, 4), {}, [], [], 0
        for _ in range(random.randint(1, 8)):
            text = random.choice([[], *texts])[: random.randint(0, 9)]
            text = text + [random.randrange(2) for _ in range(random.randint(not text, 4))]
            ids = [numbers.setdefault((B, *text[: i + B]), 7 * len(numbers))
                   for i in range(0, len(text), B)]
            full = [tuple(text[:end]) for end in range(B, len(text), B)]
            known = {tuple(one[:end]) for one in texts for end in range(B, len(one) + 1, B)}
            right += B * sum(one in known for one in full)
            requests.append((len(text), ids))
            texts.append(text)
        right = right, sum(map(len, texts))
        got = endless(requests, B)
        assert equal(got, right), f"{requests}, B={B}: {right}, not {got}"
    looks = []
    chat = [(10 * (i + 1), [Watched(j, looks) for j in range(i + 1)]) for i in range(300)]
    assert equal(endless(chat, 10), (sum(10 * i for i in range(300)), sum(n for n, _ in chat)))
    most = f"45,150 numbers are looked at {len(looks)} times"
    assert len(looks) <= 20 * 45_150, most


attempt(test_endless, endless)

# %% [markdown]
# ## What's next
#
# Memory is complete: blocks are handed out, shared, copied, given up, found again, and asked for in the best order.
# Does all that make a server faster, and by how much? [Chapter 15](15_the_experiments.ipynb) does the paper's
# experiments again.
#
# **See it run**: [a tree of prefixes](gallery/README.md#a-tree-of-prefixes) that grows and is shed, step by step.
#
# ## Sources
#
# - Zheng et al., *SGLang: Efficient Execution of Structured Language Model Programs*, NeurIPS 2024: RadixAttention,
#   eviction of leaves, longest prefix first, its theorem, and the remark that it may starve.
# - Morrison, *PATRICIA: Practical Algorithm to Retrieve Information Coded in Alphanumeric*, 1968: the radix tree.
# - Qin et al., *Mooncake: Trading More Storage for Less Computation*, FAST 2025, and its trace of an hour of
#   conversations (github.com/kvcache-ai/Mooncake, Apache 2.0).
# - vLLM, *Automatic Prefix Caching* (design notes): the table that the tree is compared with.
