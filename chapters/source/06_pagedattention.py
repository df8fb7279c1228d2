# %% [markdown]
# # 6. PagedAttention
#
# Keys and values now lie in blocks, scattered over the pool, and a page table says where. This chapter teaches
# attention to read them there: it goes from block to block, keeps a running maximum and two running sums, and ends
# with the answer of chapter 1.
#
# **You need** chapters 4 and 5: blocks, page tables, slots; and what a softmax is. **You get** your own
# `paged_attention` for whole batches. It agrees with the package's on random inputs, and the real engine
# writes the same text with it.

# %% [markdown]
# ## The question
#
# PyTorch's attention wants the keys of a sequence in a row: one tensor `[n, D]`. After chapter 5 there is no such
# tensor. There is a pool `[N, B, D]`, and a page table that says: the first four tokens are in block 7, the next four
# in block 1.
#
# One way out is to bring them together before each step, and then call what PyTorch has. That is right, and slow
# where it hurts. To compute one token, a model reads the keys and values of all tokens before it. Chapter 2
# showed that this part waits for memory, and that no batch makes it cheaper. A copy reads them, writes them, and reads
# them again.
#
# So: **can attention be computed where the blocks lie, without bringing them together?**

# %% [markdown]
# ## The idea
#
# Attention is a sum over tokens, divided by another sum over tokens. A sum can be taken in pieces, and the pieces may
# lie anywhere:
#
# ```
#                             the pool                       kept of each block
#
#                   0 |         |       |     |         |
#        +--------> 1 | years   | ago   | our | fathers |  -->  sums  --+
#        |          2 |         |       |     |         |               |
#  query +--------> 3 | brought |       |     |         |  -->  sums  --+--> answer
#        |          : |         |       |     |         |               |
#        +--------> 7 | Four    | score | and | seven   |  -->  sums  --+
#
#        page table: 7, 1, 3
# ```
#
# The paper writes it as its Equation 4. $K_j$ and $V_j$ are the keys and values of block $j$ of the sequence, and
# token $i$ looks at blocks $1$ to $\lceil i/B \rceil$:
#
# $$ A_{ij} = \frac{\exp(q_i^\top K_j / \sqrt{d})}{\sum_{t=1}^{\lceil i/B \rceil} \exp(q_i^\top K_t \mathbf{1} /
# \sqrt{d})}, \qquad o_i = \sum_{j=1}^{\lceil i/B \rceil} V_j A_{ij}^\top $$
#
# $A_{ij}$ is a row of B weights, those of the tokens in block $j$. The bold $\mathbf 1$ is a column of B ones: a row
# times $\mathbf 1$ is the sum of the row. To the letter, the formula would add up the scores of a block and take one
# exponential of their sum. What is meant is one exponential for each score, and then the sum, $\exp(q_i^\top K_t /
# \sqrt{d})\,\mathbf 1$: the formula of chapter 1 with brackets around every B tokens.
#
# One difficulty remains. The denominator needs *all* blocks before the first weight is known. The trick that
# removes it is called **online softmax**, and most of this chapter is about it.

# %% [markdown]
# ## Build it
#
# ### Nine tokens in three blocks
#
# We take the paper's Figure 6: blocks of 4 slots, a prompt of 7 tokens in blocks 7 and 1, and two more tokens, the
# second of which opens block 3. The memory manager of chapter 5 does the placing.

# %%
import timeit
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

import kernels
from minipaged.memory import KVCacheManager, blocks_for
from minipaged.teaching import attempt, equal, loads, own, plots, show_source
from minipaged.terminal.slots import physical_view, sheet
from minipaged.terminal.snapshot import Snapshot

_ = torch.set_grad_enabled(False)
torch.set_num_threads(1)  # for tensors as small as ours, more threads only wait for each other

# %%
words = "Four score and seven years ago our fathers brought".split()
n, B, N, D = len(words), 4, 9, 8
memory = KVCacheManager(num_blocks=N, block_size=B, free_order=[7, 1, 3])
memory.allocate(0, num_tokens=7)
memory.append({0: 2})
table = memory.block_table(0)
sheet(physical_view(Snapshot.of(memory), {"A": words}))

# %% [markdown]
# Now the tensors. One head, with random keys, values and query; every slot that belongs to nobody is filled with NaN.
# A NaN spreads through any sum that it gets into, so a wrong read can't go unnoticed.

# %%
torch.manual_seed(1)
k, v = torch.randn(2, n, D)  # in a row, as chapter 1 has them: only to compare with
q = 1.5 * torch.randn(D)  # the query of the newest token, at position 8

k_pool, v_pool = torch.full((2, N, B, D), torch.nan)
slots = memory.slots(0, 0, n)
k_pool.flatten(0, 1)[slots], v_pool.flatten(0, 1)[slots] = k, v
print("slots", slots)


# %% [markdown]
# This is the answer that everything below has to give:

# %%
def ordinary(q, k, v):
    """One query [D] looks at n keys and values [n, D] in a row -> [D]."""
    return torch.softmax(k @ q / D**0.5, -1) @ v


expected = ordinary(q, k, v)


# %% [markdown]
# ### The easy way, and its price
#
# Bringing scattered rows together is called a **gather**. In PyTorch it is an index:

# %%
def gather_first(q, k_pool, v_pool, table, n):
    k = k_pool[table].flatten(0, 1)[:n]  # [M, B, D] -> [M B, D] -> [n, D]: a copy
    v = v_pool[table].flatten(0, 1)[:n]
    return ordinary(q, k, v)


assert torch.allclose(gather_first(q, k_pool, v_pool, table, n), expected, atol=1e-6)
assert k_pool[table].data_ptr() != k_pool[7].data_ptr()  # new memory

# %% [markdown]
# It is right. What does it cost? First in bytes, which are the same on every machine. Sixteen sequences compute one
# token each, with G = 3 heads of keys and values, D = 64, fp32. Keys that lie in a row are read once. In place they are
# read once, too, and 8 bytes of page table with each block. A gather reads them, writes a copy, and then attention
# reads the copy:

# %%
def moved(context, S=16, G=3, D=64, B=16):
    """Bytes that one layer moves for the keys and values of S sequences."""
    kv = 2 * S * G * context * D * 4
    table = 8 * S * blocks_for(context, B)
    return {"in a row": kv, "gather first": 3 * kv, "in place": kv + table}


CONTEXTS = [64, 1024, 4096]
for context in CONTEXTS:
    row = (f" {name} {count / 1e6:6.2f} MB" for name, count in moved(context).items())
    print(f"context {context:4}: ", *row)

# %% [markdown]
# Then in time, on one thread. `sdpa` is PyTorch's own attention. What reads in place here is the package's kernel in
# C++, which we meet again at the end (where there is no compiler, `auto` takes another one, made of PyTorch's calls).

# %%
sdpa = partial(scaled_dot_product_attention, enable_gqa=True)
auto = kernels.load("auto", notice=lambda line: None)


def scattered(context, S=16, G=3, D=64, B=16):
    """Queries [S, 9, D], a cache in disorder, and what the kernel has to know."""
    M = context // B
    tables = torch.randperm(S * M).view(S, M)
    where = torch.arange(S + 1), torch.full((S,), context), tables
    batch = kernels.Batch(torch.empty(0), *where)  # no slot mapping: nothing is written
    return torch.randn(S, 9, D), torch.randn(2, G, S * M, B, D), batch


def gather(cache, tables):
    return cache[:, :, tables].flatten(3, 4).transpose(1, 2)  # [2, S, G, context, D], a copy


def rows_attention(q, kv):
    return sdpa(q[:, :, None], *kv, scale=0.125)[:, :, 0]


# %%
def three_ways(context):
    q, cache, batch = scattered(context)
    in_a_row = gather(cache, batch.block_tables).contiguous()
    return {"in a row": lambda: rows_attention(q, in_a_row),
            "gather first": lambda: rows_attention(q, gather(cache, batch.block_tables)),
            "in place": lambda: auto.paged_attention(q, cache, batch, 0.125)}  # fmt: skip


def milliseconds(function, times=9):
    """The best of so many times."""
    return 1e3 * min(timeit.repeat(function, number=1, repeat=times))


row, copied, in_place = (way() for way in three_ways(1024).values())
assert torch.allclose(row, copied, atol=1e-5) and torch.allclose(row, in_place, atol=1e-5)

# %% tags=["measured"]
taken = [{name: milliseconds(way) for name, way in three_ways(n).items()} for n in CONTEXTS]
for context, one in zip(CONTEXTS, taken):
    print(f"context {context:4}: ", *(f" {name} {ms:6.2f} ms" for name, ms in one.items()))

# %% tags=["measured"]
alt = "Rising with the context; gathering first is far above the other two, which are close"
with plots.figure("One layer, one token each", "context", "ms", alt=alt) as axes:
    for name, dy in (("in a row", 7), ("gather first", 0), ("in place", -7)):
        plots.line(axes, CONTEXTS, [one[name] for one in taken], name, dy=dy)
    plots.logarithmic(axes)
    axes.set_xscale("log", base=2)
    axes.set_xticks(CONTEXTS, CONTEXTS)

# %% [markdown]
# Gathering does all that "in a row" does, and makes a copy before. So it can't win; how much it loses is the machine's
# business. A small copy may stay in a cache near the processor, where its second reading is cheap. A large one does
# not, and memory for it has to be found first. And the blocks themselves? What lies scattered need not take longer to
# read than what lies in a row.
#
# The copy wants room, too. For one of the 40 layers of the paper's OPT-13B and 2048 tokens it is 42 MB, for every
# sequence in the batch, out of the memory that the blocks could use.
#
# **Your turn.** In bf16 a number takes two bytes. Which of the printed megabytes change, and by how much? Does
# "three times" stay?
#
# ### Eq. 4, block by block
#
# First a helper: which blocks does a sequence of n tokens use, and how many slots of each are filled?

# %%
def filled(table, n):
    """[(physical block, its filled slots), ...], in the order of the sequence."""
    used = table[: blocks_for(n, B)]
    return [(block, min(B, n - j * B)) for j, block in enumerate(used)]


print(*(filled(table, tokens) for tokens in (7, 8, 9)), sep="\n")


# %% [markdown]
# Only the last block can be partly filled. Now the formula, in two **passes** over the blocks: the first makes the
# exponentials and their sum, the second weighs the values.

# %%
def two_passes(q, k_pool, v_pool, table, n):
    blocks = filled(table, n)
    e = [torch.exp(k_pool[block, :c] @ q / D**0.5) for block, c in blocks]
    total = sum(piece.sum() for piece in e)
    return sum(piece / total @ v_pool[block, :c] for piece, (block, c) in zip(e, blocks))


assert torch.allclose(two_passes(q, k_pool, v_pool, table, n), expected, atol=1e-6)
assert k_pool[7, :4].data_ptr() == k_pool.data_ptr() + 7 * B * D * 4  # in place

# %% [markdown]
# Nothing was brought together: `k_pool[block, :c]` is a *view*, the pool's own memory, as the last line shows.
#
# And the $\mathbf 1$? To the letter it would be the exponential of a sum, which is a product of exponentials. Then the
# weights would not add up to 1:

# %%
e = [torch.exp(k_pool[block, :c] @ q / D**0.5) for block, c in filled(table, n)]
meant, letter = sum(piece.sum() for piece in e), sum(piece.prod() for piece in e)
for name, total in (("as meant", meant), ("to the letter", letter)):
    print(f"{name}: the weights are {sum((piece / total).sum() for piece in e):.2f} together")

# %% [markdown]
# ### Two troubles
#
# **The exponentials wait.** Between the passes all of them must be kept, or be computed again by reading the keys
# again. For one query that is n numbers. A step can also compute a *chunk* of a prompt, hundreds of tokens at once.
# Then it is n numbers for each of these, in each head: 512 new tokens on a context of 8192 make four million. (The
# first kernel of vLLM did it so, for one query at a time: it kept a sequence's scores in a small memory inside the
# GPU.)
#
# **They overflow.** An exponential grows fast, and floating point ends:

# %%
print("fp32: are e^88, e^89 finite?", torch.tensor([88.0, 89]).exp().isfinite().tolist())
print("fp16: are e^11, e^12?", torch.tensor([11.0, 12]).exp().half().isfinite().tolist())
loud = 60 * q  # a query with large scores
print("two passes:", two_passes(loud, k_pool, v_pool, table, n).tolist()[:3], "...")
assert ordinary(loud, k, v).isfinite().all()

# %% [markdown]
# `inf / inf` is NaN. The ordinary softmax survives because it first subtracts the largest score $m$ from all scores.
# That changes nothing, since the factor $e^{-m}$ stands above and below the fraction:
#
# $$ \frac{e^{s_j}}{\sum_t e^{s_t}} = \frac{e^{s_j - m}}{\sum_t e^{s_t - m}} $$
#
# Now every exponent is at most 0, so nothing overflows; one of them is exactly 0, so the sum is at least 1. But the
# largest of *all* scores is again known only after all blocks. That would be a third pass.
#
# ### Online softmax: one pass
#
# Go on with the largest score *so far*, and put right what was summed when a larger one comes. Three things are
# kept, together called the **state**:
#
# $$ m = \max_j s_j \qquad z = \sum_j e^{s_j - m} \qquad o = \sum_j e^{s_j - m}\, v_j $$
#
# where $j$ goes over the tokens seen so far. A new block with scores $s_j$ makes of it
#
# $$ m' = \max(m, \max_j s_j) \qquad z' = e^{m - m'} z + \sum_j e^{s_j - m'} \qquad o' = e^{m - m'} o + \sum_j e^{s_j -
# m'} v_j $$
#
# Why is that right? Every term in the old $z$ was $e^{s-m}$, and it should be $e^{s-m'}$. The two differ by the factor
# $e^{m-m'}$, *the same for all terms*, so the whole sum can be corrected at once. The same holds for $o$. If $m$ did
# not grow, the factor is 1. At the end the answer is $o / z$.

# %%
class State(NamedTuple):
    """What attention knows of the keys that a query has seen."""

    m: Tensor  # [...] their largest score
    z: Tensor  # [...] the sum of exp(score - m)
    o: Tensor  # [..., D] the sum of exp(score - m) * value


def start(*shape, D):
    """The state of a query that has seen nothing."""
    return State(torch.full(shape, -torch.inf), torch.zeros(shape), torch.zeros(*shape, D))


# %%
def add_block(state, scores, values):
    """The state of one query; scores [c] and values [c, D] of other keys -> the state of all.

    Or of R queries in each of G groups: scores [G, R, c], values [G, c, D].
    """
    m = torch.maximum(state.m, scores.amax(-1))
    shrink = torch.exp(state.m - m)
    e = torch.exp(scores - m[..., None])
    return State(m, state.z * shrink + e.sum(-1), state.o * shrink[..., None] + e @ values)


# %% [markdown]
# At the start $m = -\infty$, and $e^{-\infty - m'} = 0$: what was not there counts for nothing. (Why not begin with
# $m = 0$? If all scores were near -200, all $e^{s - 0}$ would be 0 in fp32, and so would $z$.) Step by step:

# %%
state = start(D=D)
for block, c in filled(table, n):
    old, scores = state, k_pool[block, :c] @ q / D**0.5
    state = add_block(old, scores, v_pool[block, :c])
    shrink = torch.exp(old.m - state.m)
    print(f"block {block}: largest score {scores.max():5.2f}, m = {state.m:.2f}, "
          f"old sums times {shrink:.2f}, z = {state.z:.2f}")  # fmt: skip

assert torch.allclose(state.o / state.z, expected, atol=1e-6)

# %% [markdown]
# In block 1 a larger score appears: what came from block 7 is scaled down. Block 3 brings none, and the old sums stay
# as they are.
#
# **Your turn.** Walk through the blocks from the last to the first. Which of the numbers in the last line stay what
# they are, and how often is something scaled down?
#
# Watch the weights that each token *would* have, if the sequence ended there:

# %%
s = k @ q / D**0.5
so_far = torch.full((3, n), torch.nan)
for j, end in enumerate((4, 8, 9)):
    so_far[j, :end] = torch.softmax(s[:end], -1)
after = [f"after block {block}" for block in table]
alt = "After block 7 four tokens share the weight; after block 1 eight, and the old have less."
with plots.figure("Weights so far", size=(7.4, 2.2), alt=alt) as axes:
    plots.matrix(axes, so_far.tolist(), after, words, form=".2f")

# %% [markdown]
# Up to rounding, each row sums to 1, and within a row the *ratios* between old tokens are those of the row above:
# newcomers make the old weights smaller, all by the same factor.
#
# ### PagedAttention
#
# Put together: one pass over the page table, one block at a time, nothing gathered, nothing kept but the state.

# %%
def attend_one(q, k_pool, v_pool, table, n, add=add_block):
    """One query [D], one head, pools [N, B, D], a sequence of n tokens -> [D]."""
    state = start(D=D)
    for block, c in filled(table, n):
        scores = k_pool[block, :c] @ q / D**0.5
        state = add(state, scores, v_pool[block, :c])
    return state.o / state.z


for query in (q, loud):
    got = attend_one(query, k_pool, v_pool, table, n)
    assert torch.allclose(got, ordinary(query, k, v), atol=1e-6)
print("equal, in spite of", int(k_pool.isnan()[..., 0].sum()), "poisoned slots in the pool")

# %% [markdown]
# That is PagedAttention. What follows makes it fit for work.
#
# ### The empty slots of the last block
#
# `:c` cuts off the empty slots. A kernel on a GPU would rather do the same work on every block, all B slots of it, and
# **mask** what must not count: give it the score $-\infty$, and so the weight 0. With plain numbers that would do. Here
# is block 3, with one token and three empty slots:

# %%
scores = k_pool[3] @ q / D**0.5
empty = torch.arange(B) >= 1
weights = torch.softmax(scores.masked_fill(empty, -torch.inf), -1)
print("scores ", [f"{x:.2f}" for x in scores])
print("weights", weights.tolist())
print("answer ", (weights @ v_pool[3]).tolist()[:3], "...")

# %% [markdown]
# The weights are right, and the answer is still NaN: $0 \cdot \mathrm{NaN} = \mathrm{NaN}$. A weight of zero does not
# silence what it weighs. The values have to be masked as well, or not be read at all:

# %%
values = torch.where(empty[:, None], 0.0, v_pool[3])
assert torch.equal(weights @ values, v_pool[3, 0])  # one token takes all the weight

# %% [markdown]
# Is that only a matter of our NaNs? An empty slot of a real pool holds whatever was there before, and that can be
# the `inf` or NaN of somebody's overflow. Then the answer depends on who used the block last.
#
# ### Heads, groups, and several queries at once
#
# The package's cache for one layer is `[2, G, N, B, D]`: keys and values, G heads of them. Each serves R = H / G query
# heads. And a sequence may bring t queries in one step: the tokens of its prompt, or a chunk of them. They are the
# *last* t positions of its context, since their own keys and values were just written.
#
# The pool is read in one place, and a block is added in one place. Both are arguments, so that we can watch the one
# and spoil the other later:

# %%
def read_block(cache, block, count):
    """Keys and values [2, G, count, D] of the first slots of a physical block: a view."""
    return cache[:, :, block, :count]


# %%
def attend(q, cache, table, context, scale, read=read_block, add=add_block):
    """q [t, H, D], the last t of `context` positions -> [t, H, D]."""
    (t, H, D), (_, G, _, B, _) = q.shape, cache.shape
    q = rearrange(scale * q, "t (g r) d -> g (t r) d", g=G)
    position = repeat(torch.arange(context - t, context), "t -> (t r) 1", r=H // G)
    state = start(G, t * H // G, D=D)
    for j, block in enumerate(table[: blocks_for(context, B)]):
        K, V = read(cache, block, min(B, context - j * B))
        here = j * B + torch.arange(K.shape[1])  # the positions of the tokens in this block
        scores = (q @ K.mT).masked_fill(here > position, -torch.inf)  # [G, t R, c]
        state = add(state, scores, V)
    return rearrange(state.o / state.z[..., None], "g (t r) d -> t (g r) d", t=t)


# %% [markdown]
# The loop is the same. Two things are new. All queries of a group stand in one matrix, so a block is read once for all
# of them. And there is the **causal mask** of chapter 1, cut into blocks: `here > position`. For three queries at the
# end of our nine tokens it looks like this (`#` seen, `.` not):

# %%
for position in (6, 7, 8):
    marks = ["#" if j <= position else "." for j in range(n)]
    print(f"position {position}: ", *("".join(marks[j : j + B]) for j in range(0, n, B)))

# %% [markdown]
# Full blocks far back need no mask at all; only those near the end do (exercise 3).
#
# **Your turn.** Draw the same for B = 3. Which blocks need a mask then? And which if only position 8 asks?
#
# Note how a position is found: it is `j * B + offset`, with the *logical* number `j`. The physical number `block` says
# where to read, and nothing else.
#
# ### A whole batch
#
# In a step the engine computes tokens of many sequences, and their queries stand in one row, without padding:
#
# ```
#   q [T, H, D]   | A A A A A A A | B | C C C |
#   query_start     0               7   8       11    one more than sequences
#   context_lens    7               20  9             with this step's tokens
#
#   A: a prompt of 7.  B: one more token, after 19.  C: a chunk of 3, after 6.
#   block_tables [S, M]: one row for each sequence; behind its last block stands anything
# ```
#
# A prompt, a chunk of one, a single token: all the same to us, only with other numbers.

# %%
def paged_attention(q, cache, query_start, context_lens, block_tables, scale, **parts):
    """q [T, H, D] of S sequences; block_tables [S, M]; parts: see attend -> [T, H, D]."""
    out = torch.empty_like(q)
    for s, context in enumerate(context_lens.tolist()):
        mine = slice(query_start[s], query_start[s + 1])
        out[mine] = attend(q[mine], cache, block_tables[s].tolist(), context, scale, **parts)
    return out


# %% [markdown]
# ### The order does not matter
#
# A sum may be taken in any order, and in groups. So two states, of any two sets of keys, can be **merged**:

# %%
def merge(a, b):
    """The state of all keys of two states that have none in common."""
    m = torch.maximum(a.m, b.m)
    x, y = torch.exp(a.m - m), torch.exp(b.m - m)
    return State(m, a.z * x + b.z * y, a.o * x[..., None] + b.o * y[..., None])


# %% [markdown]
# `add_block` was nothing but a merge with the state of one block. Take a sequence of 64 blocks, shuffle them, deal them
# out to four workers, and merge what they bring in two different ways:

# %%
torch.manual_seed(2)
long_k, long_v = torch.randn(2, 64, B, D)
long_answer = ordinary(q, long_k.flatten(0, 1), long_v.flatten(0, 1))


def work(blocks):
    state = start(D=D)
    for j in blocks.tolist():
        state = add_block(state, long_k[j] @ q / D**0.5, long_v[j])
    return state


# %%
a, b, c, d = (work(blocks) for blocks in torch.randperm(64).chunk(4))
assert not torch.allclose(a.o / a.z, long_answer, atol=1e-2)  # each alone knows only a part
for one in (merge(merge(merge(a, b), c), d), merge(merge(d, b), merge(c, a))):
    assert torch.allclose(one.o / one.z, long_answer, atol=1e-6)

# %% [markdown]
# Any order and any grouping gives the same answer.
#
# Chapter 7 lives on this. A GPU has thousands of threads, and a single long sequence must keep them all busy: its
# blocks are dealt out to many workers, and their states are merged at the end.
#
# ## Check it
#
# ### Random batches
#
# Random sizes, scrambled page tables, contexts that end exactly with a block or have a single token, and NaN in
# every slot that belongs to nobody. First where everything lies:

# %%
def random_layout(g):
    """(H, G, D, B), contexts, how many tokens each computes, and a page table for each."""
    pick = lambda *choices: choices[torch.randint(len(choices), (), generator=g)]
    up_to = lambda most: 1 + int(torch.randint(most, (), generator=g))
    H, G = pick((1, 1), (4, 4), (6, 2), (9, 3), (5, 1))
    D, B = pick(4, 8, 64), pick(1, 2, 3, 4, 8, 16)
    contexts = [pick(1, B, 3 * B, up_to(40)) for _ in range(up_to(4))]
    counts = [pick(1, context, up_to(context)) for context in contexts]
    needed = [blocks_for(context, B) for context in contexts]
    order = torch.randperm(sum(needed) + 3, generator=g)  # three blocks are left over
    return (H, G, D, B), contexts, counts, order.split([*needed, 3])[:-1]


# %% [markdown]
# Then the numbers: keys and values in a row for the textbook, and the same ones in the pool. The rows of `block_tables`
# are filled up with 0, which is somebody's block.

# %%
def random_batch(seed):
    """The arguments of paged_attention, and keys and values [2, G, context, D] in a row."""
    g = torch.Generator().manual_seed(seed)
    (H, G, D, B), contexts, counts, tables = random_layout(g)
    in_a_row = [torch.randn(2, G, context, D, generator=g) for context in contexts]
    cache = torch.full((2, G, sum(map(len, tables)) + 3, B, D), torch.nan)
    for table, kv in zip(tables, in_a_row):
        position = torch.arange(kv.shape[2])
        cache[:, :, table[position // B], position % B] = kv
    q = 2 * torch.randn(sum(counts), H, D, generator=g)
    starts, tables = torch.tensor([0, *counts]).cumsum(0), pad_sequence(tables, True)
    return (q, cache, starts, torch.tensor(contexts), tables, D**-0.5), in_a_row


# %%
def textbook(q, starts, in_a_row, scale):
    """PyTorch's own attention on the same, sequence by sequence, nothing paged."""
    out = []
    for mine, (k, v) in zip(q.split(starts.diff().tolist()), in_a_row):
        t, context = len(mine), k.shape[1]
        mask = torch.arange(context) <= torch.arange(context - t, context)[:, None]
        out.append(sdpa(mine.transpose(0, 1), k, v, mask, scale=scale).transpose(0, 1))
    return torch.cat(out)


# %% [markdown]
# "The answers agree" is half of a check. The other half: the poison was really there, and each block that a sequence
# has was read once, and no other.

# %%
def check(seed):
    """Compare one batch; then say what was special about it."""
    (q, cache, starts, contexts, tables, scale), in_a_row = random_batch(seed)
    visited, owned, B = [], [], cache.shape[3]

    def watched(cache, block, count):
        visited.append(block)
        return read_block(cache, block, count)

    got = paged_attention(q, cache, starts, contexts, tables, scale, read=watched)
    assert torch.allclose(got, textbook(q, starts, in_a_row, scale), atol=2e-5)
    for table, context in zip(tables.tolist(), contexts.tolist()):
        owned += table[: blocks_for(context, B)]
    assert visited == owned and len(owned) == sum(-(-contexts // B))
    filled_slots = int((~cache[0, 0, :, :, 0].isnan()).sum())
    assert filled_slots == contexts.sum() < cache[0, 0, :, :, 0].numel()
    return {"a partly filled block": bool((contexts % B > 0).any()),
            "a block filled to the end": bool((contexts % B == 0).any()),
            "several queries of one sequence": bool((starts.diff() > 1).any())}  # fmt: skip


# %%
found = [check(seed) for seed in range(300)]
for special in found[0]:
    print(f"{sum(one[special] for one in found)} of {len(found)} batches have {special}")

# %% [markdown]
# All 300 equal the textbook, and no poison ever reached an answer.
#
# ### On the real model
#
# The strongest check is the engine itself. Its layers call `backend.paged_attention`; for a while we put ours there,
# and let three requests run: side by side, with a prompt that takes several steps since a step computes 12 tokens at
# most, and with `debug=True`, which fills freed blocks with NaN just as we did.

# %%
from unittest.mock import patch

from minipaged import LLM, SamplingParams

small = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 3, "max_num_batched_tokens": 12}
llm = LLM("smollm2", device="cpu", kernels="torch", debug=True, prefix_cache="none", **small)


def greedy(max_tokens):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


# %%
def with_ours(prompts, params, **parts):
    """-> the engine's outputs with our attention; the tokens of each sequence, call by call."""
    calls = []

    def ours(q, layer_cache, batch, scale):
        calls.append(batch.query_start.diff().tolist())
        where = batch.query_start, batch.context_lens, batch.block_tables
        return paged_attention(q, layer_cache, *where, scale, **parts)

    with patch.object(llm.executor.runner.backend, "paged_attention", ours):
        return llm.generate(prompts, params), calls


# %%
prompts = ["The capital of France is", "Twinkle, twinkle, little star, how I wonder",
           "1, 2, 3, 4, 5,"]  # fmt: skip
standard, before = llm.generate(prompts, greedy(7)), llm.stats().num_steps
again, calls = with_ours(prompts, greedy(7))
for a, b in zip(standard, again):
    assert a.outputs[0].token_ids == b.outputs[0].token_ids
    print(repr(b.prompt + b.outputs[0].text))
steps, layers = llm.stats().num_steps - before, llm.config.num_layers
assert len(calls) == steps * layers
print(f"{len(calls)} calls of ours = {steps} steps, {layers} layers; tokens of each sequence:")
print(*calls[::layers])

# %% [markdown]
# The same tokens, one by one, with the attention that you built. The last line shows the steps: `[1, 5, 6]` is one new
# token of the first request beside the rest of the second prompt and the beginning of the third.
#
# ## The package's version
#
# ### The reference
#
# The package keeps one version that is allowed to be slow and not allowed to be clever. All others are tested against
# it:

# %%
from kernels import reference

show_source(reference.paged_attention)

# %% [markdown]
# You may be surprised: it *gathers*, `cache[:, :, blocks]`, and takes an ordinary softmax. That is its job. It says
# what the right answer is in the fewest words, and shares no trick with what it checks.
#
# ### In plain PyTorch
#
# `TorchBackend` runs where there is nothing but PyTorch. A Python loop over blocks would be far too slow, so it looks
# for calls that do much at once. One of them reads in place: `embedding_bag` takes rows of a table, given by their
# numbers, and adds them up with weights. Take the pool for the table, slots for the numbers, and it is $\sum_j a_j v_j$
# without a copy:

# %%
shares = torch.softmax(k @ q / D**0.5, -1)
rows, numbers = v_pool.flatten(0, 1), torch.tensor([slots])  # [N B, D], [1, n]
bag = partial(torch.nn.functional.embedding_bag, mode="sum")
answer = bag(numbers, rows, per_sample_weights=shares[None])[0]
assert torch.allclose(answer, expected, atol=1e-6)

# %% [markdown]
# For keys there is no such call: PyTorch has no product that follows a table. So they are gathered, but only for a few
# sequences at a time, so that the copy is still in the processor's cache when the product reads it. What is the same in
# all layers (which slots, which mask) is prepared once a step. What lies beyond the context is not even read, because
# of our $0 \cdot \mathrm{NaN}$. All this stands in `kernels/torch_attention.py`, in 170 lines.
#
# ### In C++
#
# With a compiler at hand, the engine uses the C++ of `kernels/cpu` on a CPU. There the loop of this chapter stands as
# it is. This is its online softmax, read from the file as it is now:

# %%
cpp = Path(kernels.__file__).with_name("cpu").joinpath("attention.cpp").read_text()
begin = cpp.index("// Softmax over a row's scores")
print(cpp[begin : cpp.index("\n}\n", begin) + 2])

# %% [markdown]
# `top` is our $m$, `total` is $z$, `out` is $o$, and `shrink` has the same name. What it adds:
#
# - **Vectors.** A `V` is 4, 8 or 16 floats, depending on the machine, and one instruction works on all of them.
# - **If `shrink` is 1, `out` is left alone.** $m$ rarely grows: with scores in random order, block j holds a
#   new record with probability 1/j, and that makes about 5 records in 64 blocks.
# - **Steps of 64 keys, not of one block.** The function around it walks the page table to find 64 keys, whichever
#   blocks they lie in, and writes them, transposed, to a small buffer that stays in the processor's cache. So the
#   number of steps does not depend on B.
# - **fp32 inside.** Keys and values may be kept in 16 bits, to take half the room; $m$, $z$ and $o$ never are.
# - **Threads.** Each takes a few queries of one sequence with all heads of a group, so that a block is read once for
#   all of them. Every 1,024 keys are summed up by themselves and merged as above, so a long context can be shared out.
# - **Ahead of time.** While one step is computed, the keys and values of the next are already called from memory.
#
# ### All of them agree
#
# Our batches of random sizes go to every backend that this machine has: yours, the reference, plain PyTorch, and C++
# where there is a compiler (`auto` falls back to PyTorch where there is none).

# %%
plain = kernels.load("torch")
for seed in range(1000, 1300):
    (Q, pool, *where, scale), _ = random_batch(seed)
    yours = paged_attention(Q, pool, *where, scale)
    theirs = [reference.paged_attention(Q, pool, *where, scale)]
    for backend in (plain, auto):
        batch = kernels.Batch(torch.empty(0), *where)  # no slot mapping: nothing is written
        theirs.append(backend.paged_attention(Q, pool, batch, scale))
    assert yours.isfinite().all()
    assert all(torch.allclose(yours, other, atol=2e-5) for other in theirs)
print("300 random batches: all give what yours gives")

# %% [markdown]
# ### How large should a block be?
#
# So far B was any number. The answers do not depend on it, the costs do. First the waste: on average the last block of
# a sequence is half empty. `loads` has requests with the mean lengths of the paper's two data sets, long conversations
# (ShareGPT) and short instructions (Alpaca). We catch each in the middle of its answer:

# %%
def halfway(lengths):
    return [job.prompt + job.output // 2 for job in loads.draw(lengths, 3000, rate=1.0)]


def waste(lens, B):
    """The share of slots that are empty."""
    return 1 - sum(lens) / sum(B * blocks_for(n, B) for n in lens)


# %%
running = {"ShareGPT": halfway(loads.SHAREGPT), "Alpaca": halfway(loads.ALPACA)}
for name, lens in running.items():
    shares = ", ".join(f"{waste(lens, size):.0%} of B={size}" for size in (16, 32, 128))
    print(f"{name:8} {sum(lens) / len(lens):3.0f} tokens; empty: {shares}")

# %% [markdown]
# Waste hits short sequences: an Alpaca request leaves most of a block of 128 empty. Empty slots mean fewer
# sequences in the batch, and chapter 2 showed that the batch decides how fast a server is. Large blocks are also harder
# to share, since only whole blocks are found again. A shared prefix of 80 tokens, one of the two that the paper tries,
# is five blocks of 16, one of 64 with a rest, and not even one of 128.
#
# So why not B = 1? No waste, everything shared. But each block has a price of its own, in four coins:
#
# - **Entries.** Python keeps an entry for each block and hands it to the device at each step, and each of the many
#   workers that read the sequence there reads it ([chapter 7](07_the_triton_kernel.ipynb)).
# - **Waiting.** The block's number must be there before its contents can be asked for, and then these take their time,
#   too. A larger block has more to ask for at once ([chapter 15](15_the_experiments.ipynb) reckons with that).
# - **Idle hands.** In the paper's kernel a group of 32 threads, a *warp*, reads a block. If there is little in it, they
#   have little to do (section 7.2).
# - **Short runs.** What lies side by side is read faster than what doesn't. That counts on a CPU; on a GPU only for
#   odd sizes of D (chapter 7 counts it).
#
# All four grow with the number of blocks, so one number may stand for them. Suppose that a block costs as much as
# reading $a$ slots, and that work is done on whole blocks, empty slots and all. For a sequence of n tokens that is
#
# $$ \lceil n/B \rceil \cdot (a + B) \;\approx\; n + a\,\frac{n}{B} + \frac{a + B}{2} $$
#
# The middle term falls with B and the last one rises, so their sum is a **U**. It is lowest at $B = \sqrt{2 a n}$. We
# draw it with $a = 4$, a number of ours.

# %%
def cost(lens, B, a=4):
    """Slots' worth of work for each token of context."""
    return sum(blocks_for(n, B) * (a + B) for n in lens) / sum(lens)


sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256]
alt = "Waste grows with B, faster for Alpaca. Cost is a U, lowest from 16 to 64."
curves = (lambda lens, B: 100 * waste(lens, B), cost)

# %%
with plots.figures("Empty slots", "Work for a token", size=(7.8, 3.2), alt=alt) as pair:
    for axes, y, curve in zip(pair, ("% of all slots", "slots (a = 4)"), curves):
        plots.label(axes, "block size B", y)
        for name, lens in running.items():
            plots.line(axes, sizes, [curve(lens, B) for B in sizes], name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, sizes)

# %% [markdown]
# The formula puts the bottom at $\sqrt{2 \cdot 4 \cdot 331} \approx 51$ for ShareGPT and at $\sqrt{2 \cdot 4 \cdot 49}
# \approx 20$ for Alpaca: longer sequences want larger blocks, but only as the square root.
#
# **Your turn.** Where is the bottom for $a = 0$, and where for $a = 40$? Say it before you draw it.
#
# The paper measured the real thing (its Figure 18b): latency over B is a U. ShareGPT does best with 16 to 128, Alpaca
# with 16 and 32, and larger blocks are much worse for it. **16** is the smallest that is good for both, and it is the
# default of the paper and of this package.
#
# And on a CPU? 16 sequences of 1024 tokens in blocks of every size, on one thread. The package takes them all;
# your loop takes one.

# %%
def in_blocks_of(B):
    """Nanoseconds for a token of context: (the package, your loop)."""
    q, cache, batch = scattered(1024, B=B)
    one = torch.tensor([0, 1]), torch.tensor([1024]), batch.block_tables[:1]
    package = milliseconds(lambda: auto.paged_attention(q, cache, batch, 0.125), times=30)
    yours = milliseconds(lambda: paged_attention(q[:1], cache, *one, 0.125), times=3)
    return 1e6 * package / (16 * 1024), 1e6 * yours / 1024


# %% tags=["measured"]
package, loop = zip(*map(in_blocks_of, sizes))

# %% tags=["measured"]
alt = "On a log scale your loop's time falls steeply with B; the package's is far below."
with plots.figure("Time for a token of context", "block size B", "ns", alt=alt) as axes:
    plots.line(axes, sizes, loop, "your loop")
    plots.line(axes, sizes, package, "the package")
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sizes, sizes)
    axes.minorticks_off()

# %% [markdown]
# (Mind the scale of the time axis: each line is ten times the one below.) On the machine that made this page your loop
# shows the left arm of the U in the extreme: it pays for the *number of blocks*, since each is a round of Python, and
# B = 256 does in four rounds what B = 1 does in 1024. The package is far below and bends far less, since it takes 64
# keys at a time whatever B is. It does gain from larger blocks: values that lie side by side are read in one piece.
#
# What can this not show? The idle hands of a GPU. Nor the right arm of the U: that comes from empty slots, and our 1024
# tokens fill all their blocks.
#
# ## What must hold, and what breaks if it doesn't
#
# **Nothing beyond the context is read.** Not the empty slots of the last block, not the table's entries behind it. Read
# the last block whole, and see what comes:

# %%
def careless(q, k_pool, v_pool, table, n):
    state = start(D=D)
    for block, _ in filled(table, n):
        state = add_block(state, k_pool[block] @ q / D**0.5, v_pool[block])
    return state.o / state.z


poisoned = careless(q, k_pool, v_pool, table, n)
stale = careless(q, k_pool.nan_to_num(0.3), v_pool.nan_to_num(0.3), table, n)
assert poisoned.isnan().all() and stale.isfinite().all()
assert not torch.allclose(stale, expected, atol=0.02)
print("with poison: NaN. With old numbers in the slots: finite, plausible, and wrong")

# %% [markdown]
# The second is what happens without a debug mode. Three tokens that nobody wrote took part, and no one is told.
#
# **When m grows, z and o shrink.** Forget it, and the result depends on where the largest score stands:

# %%
def no_shrink(state, scores, values):
    m = torch.maximum(state.m, scores.amax(-1))
    e = torch.exp(scores - m[..., None])
    return State(m, state.z + e.sum(-1), state.o + e @ values)


# %%
for name, order in (("first", s.argsort(descending=True)), ("last", s.argsort())):
    pools = torch.full((2, N, B, D), torch.nan)
    pools.flatten(1, 2)[:, slots] = torch.stack([k, v])[:, order]
    got = attend_one(q, *pools, table, n, add=no_shrink)
    right = torch.allclose(got, expected, atol=1e-5)
    print(f"largest score {name}: {'right' if right else 'wrong'}")
    assert right == (name == "first")

# %% [markdown]
# If the first block holds the largest score, $m$ never grows, and the mistake can't be seen. A test in which that is so
# by chance (a single block, say) passes. And the real model? It gets the mistake in all its layers:

# %%
prompts = ["1, 2, 3, 4, 5,", "Once upon a time there was a little girl who lived in a small "
           "house at the edge of the forest. Every morning she"]  # fmt: skip
whole = llm.generate(prompts, greedy(10))
broken, _ = with_ours(prompts, greedy(10), add=no_shrink)
for a, b in zip(whole, broken):
    print(f"right: {a.outputs[0].text!r}\nwrong: {b.outputs[0].text!r}")
assert [a.outputs[0].text == b.outputs[0].text for a, b in zip(whole, broken)] == [True, False]

# %% [markdown]
# Fluent, and nobody who reads it would look for a mistake in the attention. (Trained models give much of the weight to
# the very first tokens, whatever these say, the *attention sinks*. Where the largest score stands in the first block,
# nothing goes wrong at all.) Only whoever compares with the right tokens finds out.
#
# **A block of which a query sees nothing must leave its state alone.** With the blocks in order, every query sees
# position 0 in the first one, and $m$ is finite from then on. Read the same blocks from the end, which should not
# matter:

# %%
def backwards(position, add=add_block):
    """The answer of `q` at this position, the blocks read from the last to the first."""
    state = start(D=D)
    for j in (2, 1, 0):
        K, V = k[j * B : j * B + B], v[j * B : j * B + B]
        unseen = j * B + torch.arange(len(K)) > position
        state = add(state, (K @ q / D**0.5).masked_fill(unseen, -torch.inf), V)
    return state.o / state.z


assert torch.allclose(backwards(8), expected, atol=1e-6)
print("at position 6:", backwards(6).tolist()[:3], "...")

# %% [markdown]
# Position 8 sees all, and it goes well. Position 6 sees nothing of the last block: all scores are $-\infty$, so $m' =
# -\infty$, and $-\infty - (-\infty)$ is NaN. The remedy is one line: nothing seen yet means that there is nothing to
# subtract.

# %%
def add_any_block(state, scores, values):
    m = torch.maximum(state.m, scores.amax(-1))
    safe = torch.where(m == -torch.inf, 0.0, m)
    shrink, e = torch.exp(state.m - safe), torch.exp(scores - safe[..., None])
    return State(m, state.z * shrink + e.sum(-1), state.o * shrink[..., None] + e @ values)


assert torch.allclose(backwards(6, add=add_any_block), ordinary(q, k[:7], v[:7]), atol=1e-6)

# %% [markdown]
# It matters as soon as blocks are dealt out to workers, for a worker may get only blocks that its query must not
# see.
#
# **Merging takes m, z and o, not finished answers.** The mean of two answers is wrong, for it does not know how
# much weight stood behind each:

# %%
halves = [(k[:4], v[:4]), (k[4:], v[4:])]
mean = sum(ordinary(q, *half) for half in halves) / 2
states = [add_block(start(D=D), K @ q / D**0.5, V) for K, V in halves]
both = merge(*states)
share = [f"{x.z * torch.exp(x.m - both.m) / both.z:.0%}" for x in states]
print("of the whole weight, the halves hold", share)
assert torch.allclose(both.o / both.z, expected, atol=1e-6)
assert not torch.allclose(mean, expected, atol=0.05)

# %% [markdown]
# **Logical numbers give positions, physical numbers give places.** The order of visits is free, but how many slots of
# a block are filled depends on its place *in the sequence*. Suppose someone sorts the table, so that the pool is read
# from left to right:

# %%
word_pool = [["?"] * B for _ in range(N)]
for word, slot in zip(words, slots):
    word_pool[slot // B][slot % B] = word
for order in (table, sorted(table)):
    print(order, *(" ".join(word_pool[block][:c]) for block, c in filled(order, n)))
assert attend_one(q, k_pool, v_pool, sorted(table), n).isnan().all()

# %% [markdown]
# Three empty slots are read, and three words are lost. Without poison, again, nobody would know. (To sort is fine if
# each block keeps its logical number beside it.)
#
# ## Exercises
#
# Fill in the functions; each is followed by a test that says how far you are. What was built above may be used, the
# package not (but for `blocks_for`); and what a function is given belongs to its caller, and stays as it is. Memory is
# counted in what follows, wherever it is kept:

# %%
import gc
import tracemalloc


def memory_held():
    """Bytes of all tensors that exist, and of what Python took since tracemalloc.start()."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter)]
    storages = [x.untyped_storage() for x in tensors if x.layout == torch.strided]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(sizes.values()) + tracemalloc.get_traced_memory()[0]


# %% [markdown]
# **1. The logarithm of a sum, piece by piece** (warm-up). $\log \sum_j e^{s_j}$, the *log-sum-exp*, is the softmax's
# denominator in a form that does not overflow. Compute it in one pass over pieces, keeping a few numbers, however many
# pieces there are.

# %% tags=["exercise"]
def running_lse(pieces):
    """pieces: an iterator over fp32 tensors [c], c >= 1, had only once -> log-sum-exp, a float.

    Scores lie between -20,000 and 20,000. Some may be -inf, and so may whole pieces, but not
    all. The answer may be off by a ten-thousandth.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_running_lse(running_lse):
    running_lse = own(running_lse, allow=[blocks_for])
    g = torch.Generator().manual_seed(0)
    for case in range(300):
        count, factor = int(torch.randint(1, 8, (), generator=g)), 10 ** (case % 4)
        level = float(torch.randint(-10_000, 10_000, (), generator=g)) * (case % 3 == 1)
        sizes = torch.randint(1, 7, (count,), generator=g).tolist()
        pieces = [level + factor * torch.randn(size, generator=g) for size in sizes]
        if case % 2 == 0:
            place = int(torch.randint(count + 1, (), generator=g))
            pieces.insert(place, torch.full((3,), -torch.inf))
            pieces[-1] = torch.cat([pieces[-1], torch.tensor([-torch.inf])])
        want = torch.cat(pieces).double().logsumexp(-1).item()
        got = running_lse(iter(pieces))
        assert equal(got, want, tolerance=1e-4), f"{got} for {pieces}, should be {want}"
    held = []

    def long():
        for i in range(4000):
            if i in (10, 3999):
                held.append(memory_held())
            yield 10 * torch.randn(20, generator=g)

    tracemalloc.start()
    try:
        running_lse(long())
    finally:
        tracemalloc.stop()
    kept = held[1] - held[0]
    assert kept < 50_000, f"4000 pieces of 20 numbers, and {kept:,} bytes are kept"


attempt(test_running_lse, running_lse)

# %% [markdown]
# **2. Merge finished answers.** Averaging them was wrong. But if each worker hands in its answer *and* its log-sum-exp
# $\ell = m + \log z$, nothing is lost, and it is one number less. GPU kernels hand over their parts in this form.

# %% tags=["exercise"]
def merge_answers(o_a, lse_a, o_b, lse_b):
    """Two answers o [..., D], each divided by its z, and their lse [...] -> (o, lse) of both.

    [...] is any shape, [] as well. lse may be large, or -inf for a worker that saw nothing
    (its o is 0; it is never so with both, for the same query).
    """
    raise NotImplementedError


# %% tags=["test"]
def test_merge_answers(merge_answers):
    merge_answers = own(merge_answers, allow=[blocks_for])
    g = torch.Generator().manual_seed(0)
    shapes = [(), (1,), (3,), (4, 4), (2, 3), (3, 1, 2), (2, 2, 2, 2)]
    for case in range(140):
        shape, width = shapes[case % 7], int(torch.randint(1, 6, (), generator=g))
        n, level = 1 + int(torch.randint(12, (), generator=g)), (0, 5000, -5000)[case % 3]
        scores = level + torch.randn(*shape, n, generator=g) * (1, 10, 300)[case // 7 % 3]
        values = torch.randn(*shape, n, width, generator=g)
        first = torch.rand(*shape, n, generator=g) < (case % 5) / 4  # who sees which keys
        parts = []
        for seen in (first, ~first):
            masked = scores.masked_fill(~seen, -torch.inf)
            lse = masked.logsumexp(-1)
            weights = masked.softmax(-1).nan_to_num(0)  # nothing seen: 0
            parts += [(weights[..., None, :] @ values)[..., 0, :], lse]
        o = (scores.softmax(-1)[..., None, :] @ values)[..., 0, :]
        lse = scores.logsumexp(-1)
        for order in (parts, parts[2:] + parts[:2]):
            got_o, got_lse = merge_answers(*(x.clone() for x in order))
            what = f"o of shape {[*o.shape]}, lse {[x.tolist() for x in order[1::2]]}"
            assert equal(got_o, o, tolerance=1e-3), f"{what}: o is {o}, not {got_o}"
            assert equal(got_lse, lse, tolerance=1e-4), f"{what}: lse is {lse}, not {got_lse}"


attempt(test_merge_answers, merge_answers)

# %% [markdown]
# **3. Which blocks need a mask?** A kernel has a fast loop without a mask and a slow one with it. Of a chunk with t
# queries at the end of a context, which logical blocks hold a slot that at least one query must not see? (An empty
# slot of the last block is one that nobody may see.)

# %% tags=["exercise"]
def blocks_to_mask(context, t, B):
    """Queries at positions context - t .. context - 1, 1 <= t <= context.

    -> list or range of logical blocks, in order. No search through positions or blocks:
    contexts are long.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_blocks_to_mask(blocks_to_mask):
    import sys

    ran = []

    def count(frame, event, _):
        ran.extend([event] * (event == "line"))
        assert len(ran) < 1000, "1,000 lines run for a context of 50,000: is there a search?"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        blocks_to_mask(50_000, 20, 16)
    finally:
        sys.settrace(before)
    blocks_to_mask = own(blocks_to_mask, allow=[blocks_for])
    for B in (1, 2, 3, 4, 16):
        for context in range(1, 36):
            for t in range(1, context + 1):
                first_query = context - t  # it sees least
                want = [j for j in range(-(-context // B))
                        if any(slot > first_query for slot in range(j * B, j * B + B))]
                got = blocks_to_mask(context, t, B)
                assert equal(got, want), f"context {context}, t {t}, B {B}: {want}, not {got}"
    got = blocks_to_mask(10**12, 20, 16)
    assert equal(got, [62499999998, 62499999999]), f"context 10**12, t 20, B 16: not {got}"


attempt(test_blocks_to_mask, blocks_to_mask)

# %% [markdown]
# **4. A sliding window.** Some models let a token see only the last `window` positions, itself included. Blocks that
# lie wholly before the window need not be read, and a server gives them away: to others, who write there. Read what
# is needed and nothing else.

# %% tags=["exercise"]
def windowed_attention(q, read, table, n, window, B):
    """One query [D] at position n - 1 sees the last `window` of n positions -> [D], fp32.

    read(block) -> keys and values [B, D] of a physical block, once for each that is needed.
    table: logical -> physical, one entry for each block of the n positions; of a block that
    was given away it is -1, or what it was. Slots outside of the window hold anything, NaN or
    plausible numbers. Divide scores by sqrt(D).
    """
    raise NotImplementedError


# %% tags=["test"]
def test_windowed_attention(windowed_attention):
    windowed_attention = own(windowed_attention, allow=[blocks_for])
    g = torch.Generator().manual_seed(0)
    up_to = lambda most: 1 + int(torch.randint(most, (), generator=g))
    for case in range(200):
        B, n, window, D = up_to(6), up_to(40), up_to(25), up_to(9)
        (k, v), q = torch.randn(2, n, D, generator=g), torch.randn(D, generator=g)
        first, M = max(0, n - window), blocks_for(n, B)
        blocks = (torch.randperm(M, generator=g) + 3).tolist()
        pool = torch.full((2, M + 3, B, D), torch.nan)
        if case % 4:
            pool = (1 + case % 3) * torch.randn(2, M + 3, B, D, generator=g)
        for position in range(first if case % 4 < 2 else 0, n):  # old ones may still be there
            block, offset = blocks[position // B], position % B
            pool[0, block, offset], pool[1, block, offset] = k[position], v[position]
        gone = [-1] * (first // B) if case % 3 else blocks[: first // B]
        table, seen, before = gone + blocks[first // B :], [], pool.clone()

        def read(block, pool=pool, seen=seen):
            seen.append(int(block))
            return pool[0, block], pool[1, block]

        got = windowed_attention(q, read, table, n, window, B)
        want = torch.softmax(k[first:] @ q / D**0.5, -1) @ v[first:]
        where = f"n {n}, window {window}, B {B}"
        needed = blocks[first // B :]
        assert sorted(seen) == sorted(needed), f"{where}: {needed} is needed, {seen} was read"
        assert equal(got, want, tolerance=1e-4), f"{where}: {want}, not {got}"
        assert equal(pool, before), f"{where}: the pool has changed"


attempt(test_windowed_attention, windowed_attention)

# %% [markdown]
# **5. Smaller keys and values** (open). Fewer bytes for each token: more tokens in memory, and less to read. Keep the
# pool in int8, one byte for a number, with a scale for each block: $x \approx \text{scale} \cdot x_8$. Why for each
# block, and not one for the whole pool? Then go on: a scale for each slot, keys and values apart, 4 bits.

# %% tags=["exercise"]
class Int8Pool:
    """One head's keys and values in int8, kept in whatever form you like.

    All that an object keeps (anywhere) is at most a third of the bytes that it was given. What
    it was given is its caller's, who writes other things there afterwards.
    """

    def __init__(self, k_pool, v_pool):
        """k_pool, v_pool: [N, B, D], fp32; empty slots hold 0."""
        raise NotImplementedError

    def attention(self, q, table, n):
        """One query [D], scores divided by sqrt(D), over n tokens in the blocks of `table`,
        a list of exactly so many as they need -> [D], fp32, off by 0.05 at most.
        """
        raise NotImplementedError


# %% tags=["test"]
def test_Int8Pool(Int8Pool):
    Int8Pool = own(Int8Pool, allow=[blocks_for])
    g = torch.Generator().manual_seed(0)
    up_to = lambda most: 1 + int(torch.randint(most, (), generator=g))
    pairs = []
    for case in range(12):
        N, B, D, loud = 40, 20 + up_to(9), 90 + up_to(30), (1, 1000)[case % 2]
        pools = torch.zeros(2, N, B, D)
        n, order = up_to(300), torch.randperm(N, generator=g).tolist()
        table, rows = order[: blocks_for(n, B)], torch.randn(2, n, D, generator=g)
        for position in range(n):
            pools[:, table[position // B], position % B] = rows[:, position]
        pools[:, order[-1]] = loud * torch.randn(2, B, D, generator=g)  # somebody else's
        q = torch.randn(D, generator=g)
        if case > 0:
            small = Int8Pool(*pools)
        else:
            tracemalloc.start()
            try:
                before = memory_held()
                small = Int8Pool(*pools)
                kept = memory_held() - before
            finally:
                tracemalloc.stop()
            assert kept <= pools.nbytes / 3, f"it keeps {kept:,} bytes of {pools.nbytes:,}"
        pools.fill_(7)
        pairs.append((small, q, table, n, torch.softmax(rows[0] @ q / D**0.5, -1) @ rows[1]))
    for small, q, table, n, want in pairs:
        got = small.attention(q, table, n)
        case = f"{n} tokens, blocks {table}"
        assert equal(got, want, tolerance=0.05), f"{case}: {want}, not {got}"


attempt(test_Int8Pool, Int8Pool)

# %% [markdown]
# ## What's next
#
# The algorithm is done, and it is right. In Python it is also slow. [Chapter 7](07_the_triton_kernel.ipynb) writes it
# as a GPU kernel: which piece of the work goes to which program, why keys are read by tiles, and how a single long
# sequence is dealt out and merged.
#
# ## Sources
#
# - Kwon et al., *Efficient Memory Management for Large Language Model Serving with PagedAttention*, SOSP 2023: section
#   4.1 and Equation 4; Figure 6; the kernel in section 5.1; block sizes in section 7.2 and Figure 18b.
# - Milakov and Gimelshein, *Online normalizer calculation for softmax*, 2018: the running maximum and sum.
# - Rabe and Staats, *Self-attention Does Not Need O(n²) Memory*, 2021; Dao et al., *FlashAttention*, 2022: attention in
#   pieces, with the values' sum carried along.
# - Xiao et al., *Efficient Streaming Language Models with Attention Sinks*, 2023: the weight of the first tokens.
# - vLLM's documentation, *Paged Attention*: its first kernel, step by step.
# - Dao et al., *Flash-Decoding for long-context inference*, 2023: one sequence dealt out to many workers, and merged.
