# %% [markdown]
# # 7. The Triton kernel
#
# A GPU wants hundreds of jobs at once, and each of them must find its own keys. This chapter cuts paged attention into
# such jobs and writes them in Triton, a language for GPU kernels inside Python. The kernels stand on a ladder, and at
# each rung the bytes are counted. They run here on the CPU, under Triton's interpreter, where every line can be stepped
# through: for looking, not for speed.
#
# **You need** [chapter 6](06_pagedattention.ipynb), whose attention this is, and how NumPy or PyTorch broadcasts.
# **You get** a kernel for decode that walks page tables, shares keys between heads and splits long contexts; six
# places where you write a line of it; and an idea of what decides its speed on a GPU. **Nothing of ours has run on a
# GPU yet**: what the text says of one is arithmetic on a data sheet, or the word of a compiler. Triton exists for
# Linux only; elsewhere read the page.

# %% [markdown]
# ## The question
#
# Chapter 6 went through the blocks of a context one by one, in a loop, sequence after sequence. A GPU does not get
# faster that way. NVIDIA's H100 has 132 **multiprocessors**, each a processor of its own, and such a loop keeps at most
# one of them busy. So the work must be cut into jobs that don't wait for each other:
#
# - What is one job, and how many are there?
# - How does a job find its keys, if they lie in blocks all over the pool?
# - What if there are too few jobs: one user, one very long context?

# %% [markdown]
# ## The idea
#
# A **kernel** is a function that is started many times at once. Each start is a **program**. All programs run the
# same code with the same arguments; only their number differs, the **program id**. The ids form a **grid**, and each
# program works out from its id which part of the work is its own. For attention a good grid is one program for each
# sequence and key/value head:
#
# ```
#             g=0    g=1    g=2
#     s=0     0,0    0,1    0,2      each of them: load the queries, walk the page table of s,
#     s=1     1,0    1,1    1,2      load keys and values of head g, write its rows of the output
#
#     in any order, none waits for another
# ```
#
# A program works on **tiles**: arrays whose shape is fixed when the kernel is compiled, and a power of two in every
# direction. Memory is reached by **pointers**: a tensor arrives as the address of its first number, a tile of integers
# is added to it, and `tl.load` fetches what lies at all those addresses. Adding 1 moves a pointer by one *number*,
# however many bytes that is. A **mask** says which addresses are real, since work hardly ever ends where a tile does.
#
# So a page table needs no new machinery. It is loaded like anything else, and what it says becomes part of the next
# address:
#
# ```
#   block size B=4, table of s: 7 1 3, a tile of 8 positions
#
#   position              j                0   1   2   3   4   5   6   7
#   entry of the table    j // B           0   0   0   0   1   1   1   1
#   load it               block            7   7   7   7   1   1   1   1     <- from memory
#   slot                  block*B + j%B   28  29  30  31   4   5   6   7
#   numbers of the slot   slot*D + 0, slot*D + 1, ..., slot*D + D-1
#   load, where mask      k [8, D]                                           <- from memory
# ```

# %% [markdown]
# ## Build it
#
# ### Setting up
#
# The interpreter must be asked for before anything imports Triton; if you forgot, restart the notebook. It runs kernels
# in NumPy, one program after another.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"

# %%
import random
from collections import Counter

import numpy as np
import torch
import triton
import triton.language as tl

from kernels import reference
from minipaged.memory import KVCacheManager, blocks_for
from minipaged.teaching import attempt, equal, own, plots, show_source
from minipaged.teaching.launches import compiled, launched
from minipaged.terminal.slots import physical_view, sheet
from minipaged.terminal.snapshot import Snapshot

# %% [markdown]
# ### A first kernel: add two vectors
#
# Ten numbers, in tiles of four. `@triton.jit` makes a kernel of a function. `tl.constexpr` marks what is known when
# it is compiled, as every tile size must be.

# %%
@triton.jit
def add_kernel(out, x, y, n, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)  # the numbers that are mine
    inside = i < n
    a = tl.load(x + i, mask=inside)
    b = tl.load(y + i, mask=inside)
    tl.store(out + i, a + b, mask=inside)


# %% [markdown]
# A launch names the grid in square brackets, here 3 programs. Nothing is returned: a kernel writes into tensors that
# it is given; ours is two longer than needed. And we look on: `launched` sees every address that a program touches.

# %%
x, y = torch.arange(10.0), 100 * torch.arange(10.0)
out = torch.full((12,), -1.0)
with launched() as seen:
    add_kernel[(3,)](out, x, y, 10, TILE=4)
print(out.tolist())
print(seen.programs, "programs loaded", seen.loaded(x) + seen.loaded(y), "bytes")
assert torch.equal(out[:10], x + y) and (out[10:] == -1).all()  # the mask held

# %% [markdown]
# Three programs of four make twelve. The mask took two away: 80 bytes are twenty numbers.
#
# **Your turn (1 of 6).** One line: number $i$ of ten goes to place $9 - i$. Replace the `raise`, and run the cell.
# (Solutions of all six are in `tests/solutions/ch07.py`.)

# %%
@triton.jit
def reverse_kernel(out, x, n, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    a = tl.load(x + i, mask=i < n)
    # store it
    raise NotImplementedError


def test_reverse(kernel):
    room = torch.full((20,), -1.0)
    kernel[(3,)](room[5:15], torch.arange(10.0), 10, TILE=4)
    right = room.tolist() == [-1] * 5 + [9, 8, 7, 6, 5, 4, 3, 2, 1, 0] + [-1] * 5
    assert right, f"the memory holds {room.int().tolist()}"


attempt(test_reverse, reverse_kernel)

# %% [markdown]
# ### What a masked place holds
#
# Whatever we say with `other` (anything at all if we say nothing), and it takes part in all that follows. Here is a
# softmax, a program for each row of 6 numbers, in tiles of 8. `tl.sum` and `tl.max` are told an axis. Something is
# wrong:

# %%
@triton.jit
def softmax_kernel(out, x, n, TILE: tl.constexpr):
    row, j = tl.program_id(0), tl.arange(0, TILE)
    scores = tl.load(x + row * n + j, mask=j < n, other=0.0)
    e = tl.exp(scores - tl.max(scores, 0))
    tl.store(out + row * n + j, e / tl.sum(e, 0), mask=j < n)


def test_softmax(kernel):
    x, got = torch.arange(-24.0, 0).view(4, 6) / 8, torch.empty(4, 6)
    kernel[(4,)](got, x, 6, TILE=8)
    right = torch.allclose(got, x.softmax(-1))
    assert right, f"rows sum to {[round(s, 2) for s in got.sum(1).tolist()]}"


attempt(test_softmax, softmax_kernel)

# %% [markdown]
# **Your turn (2 of 6).** Two places that don't exist take their share of every row, and no error says so. Change one
# number in the kernel, so that they weigh nothing.
#
# Most mistakes in kernels are of this kind. So from here on all memory that no program may use is filled with NaN.
#
# ### Through the table
#
# Two sequences with 9 and 6 tokens in a pool of N=8 blocks of B=4 slots. The words are the paper's (Figures 5-8), and
# so are the numbers of the blocks:

# %%
B, N = 4, 8
memory = KVCacheManager(num_blocks=N, block_size=B, free_order=[7, 1, 3, 5, 2])
for s, context in enumerate([9, 6]):
    memory.allocate(s, context)
words = {"A": "Four score and seven years ago our fathers brought".split(),
         "B": "It was the best of times".split()}
sheet(physical_view(Snapshot.of(memory), words))


# %% [markdown]
# The kernel sees numbers only: tables [S, M] and contexts [S]. M is the length of the longest table; shorter ones are
# filled up with -1, which must never be used as a block. `stored` makes a pool of random keys and values with NaN in
# every slot that holds no token.

# %%
def tables_of(memory, S):
    tables = [torch.tensor(memory.block_table(s), dtype=torch.int32) for s in range(S)]
    return torch.nn.utils.rnn.pad_sequence(tables, batch_first=True, padding_value=-1)


# %%
def stored(tables, contexts, N, B, G, D, dtype=torch.float32):
    """cache [2, G, N, B, D]: random where a token is, NaN elsewhere."""
    cache = torch.full((2, G, N, B, D), torch.nan, dtype=dtype)
    for table, context in zip(tables, contexts):
        j = torch.arange(context)
        cache[:, :, table[j // B], j % B] = torch.randn(2, G, context, D).to(dtype)
    return cache


# %%
torch.manual_seed(0)
D = 16
tables, lens = tables_of(memory, S=2), torch.tensor([9, 6], dtype=torch.int32)
keys = stored(tables, [9, 6], N, B, G=1, D=D)[0, 0]  # [N, B, D]: one head
M = tables.shape[1]
print(tables.tolist(), " contexts", lens.tolist(), f" M={M}")


# %% [markdown]
# Now a kernel that brings the keys of a sequence into a row again, with a program for each sequence and logical block.
# It loads one entry of the table, and from it builds a [B, D] tile of addresses. `[:, None]` makes a column and
# `[None, :]` a row, and a column plus a row is a tile, as in NumPy. Under the interpreter a kernel is Python, so
# `print` works in the middle of it, and so does `breakpoint()`.

# %%
@triton.jit
def gather_kernel(out, keys, tables, lens, M, B: tl.constexpr, D: tl.constexpr):
    s, logical = tl.program_id(0), tl.program_id(1)
    physical = tl.load(tables + s * M + logical).to(tl.int64)  # 64 bits: see below
    print("sequence", s, "logical", logical, "-> physical", physical)
    offset, d = tl.arange(0, B), tl.arange(0, D)
    position = logical * B + offset
    inside = (position < tl.load(lens + s))[:, None]
    numbers = (physical * B + offset)[:, None] * D + d[None, :]  # [B, D]
    k = tl.load(keys + numbers, mask=inside)
    tl.store(out + (s * M * B + position)[:, None] * D + d[None, :], k, mask=inside)


# %%
rows = torch.full((2, M * B, D), torch.nan)
with launched() as seen:
    gather_kernel[(2, M)](rows, keys, tables, lens, M, B=B, D=D)
print("read", seen.loaded(keys), "bytes of keys, written", seen.stored(rows))

# %%
positions = torch.arange(9)
assert torch.equal(rows[0, :9], keys[tables[0, positions // B], positions % B])
assert rows[0, 9:].isnan().all()  # nothing was written behind the context

# %% [markdown]
# The last program met the -1. It computed addresses before the pool, and loaded nothing from them: the mask guards the
# addresses, not only the numbers.
#
# This is the foot of the ladder. Attention must then read the 960 bytes once more, so they move three times.
#
# ### A tile is not a block
#
# Here a tile is a block, as in the paper's kernel, where a group of threads reads one block at a time (section 5.1).
# That ties together two sizes that have little to do with each other. The block size is for the memory: small wastes
# little. The tile is for the processor: it should hold enough keys to keep it busy, and it must be a power of two, so
# a block size of 12 could not be used at all.
#
# So from here on a tile is `BLOCK_N` *positions*. (Triton's habit is to call tile sizes BLOCK; they are not our
# blocks.) Each position looks up its own entry of the table, and a tile may hold many blocks or a part of one.
#
# **Your turn (3 of 6).** Two lines, the heart of this chapter: the slots of the first 16 positions of sequence `s`. No
# entry may be loaded for a position behind the context.

# %%
@triton.jit
def slots_kernel(out, tables, lens, M, B: tl.constexpr, BLOCK_N: tl.constexpr):
    s, j = tl.program_id(0), tl.arange(0, BLOCK_N)
    inside = j < tl.load(lens + s)
    # block = ...
    # slot = ...
    raise NotImplementedError
    tl.store(out + s * BLOCK_N + j, slot, mask=inside)


def test_slots(kernel):
    got = torch.full((2, 16), -1, dtype=torch.int32)
    with launched() as seen:
        kernel[(2,)](got, tables, lens, M, B=B, BLOCK_N=16)
    right = got[0, :9].tolist() == memory.slots(0, 0, 9) and got[1, 0] == 5 * B
    assert right, f"A: {got[0].tolist()}, B: {got[1].tolist()}"
    assert seen.loaded(tables) == 4 * 15, "15 positions, so 15 entries are to be loaded"


attempt(test_slots, slots_kernel)

# %% [markdown]
# ### First rung: a program for each query head
#
# No copy: the attention itself walks the table, a tile of keys at a time. It keeps the state of chapter 6: `m`, the
# largest score so far, `z`, the sum of the exponentials, and `o`, the sum of the values with the exponentials as
# weights. A tile of scores $s_j$ and values $V_j$ changes them to
#
# $$ m' = \max(m, \max_j s_j), \quad p_j = e^{s_j - m'}, \quad z' = e^{m - m'} z + \sum_j p_j, \quad
# o' = e^{m - m'} o + \sum_j p_j V_j $$
#
# and the answer is $o / z$. Before the first key `m` must lie below every score; we take $-10^{38}$. A kernel may call
# other functions with `@triton.jit`, so the rule gets one of its own, and so does loading: what lies outside is 0.

# %%
@triton.jit
def load_rows(pointers, inside):
    """[n, D] numbers; 0 in the rows that are not inside."""
    return tl.load(pointers, mask=inside[:, None], other=0.0)


# %%
@triton.jit
def absorb(m, z, o, scores, v):
    """Scores [n] and values [n, D] of a tile join m, z and o [D]."""
    m_new = tl.maximum(m, tl.max(scores, 0))
    p, shrink = tl.exp(scores - m_new), tl.exp(m - m_new)
    return m_new, z * shrink + tl.sum(p, 0), o * shrink + tl.sum(p[:, None] * v, 0)


# %% [markdown]
# The cache of a layer is [2, G, N, B, D]: keys and values, key/value heads, blocks, slots, numbers. How far apart two
# heads lie is its **stride** in that direction; PyTorch knows it, and we pass it on. `tl.num_programs` tells how large
# the grid is.

# %%
@triton.jit
def head_kernel(out, q, cache, tables, lens, M, scale, stride_kv, stride_g,
                R: tl.constexpr, B: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """One query head of one sequence: out and q [S, H, D], R = H / G. Grid: S, H."""
    s, h, d = tl.program_id(0), tl.program_id(1), tl.arange(0, D)
    context, row = tl.load(lens + s), (s * tl.num_programs(1) + h) * D + d
    query = tl.load(q + row)
    keys = cache + (h // R).to(tl.int64) * stride_g
    m, z, o = -1.0e38, 0.0, tl.zeros([D], tl.float32)
    for first in range(0, context, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        inside = j < context
        block = tl.load(tables + s * M + j // B, mask=inside, other=0).to(tl.int64)
        numbers = (block * B + j % B)[:, None] * D + d[None, :]
        k = load_rows(keys + numbers, inside)
        v = load_rows(keys + stride_kv + numbers, inside)
        scores = tl.sum(query[None, :] * k, 1) * scale
        m, z, o = absorb(m, z, o, tl.where(inside, scores, float("-inf")), v)
    tl.store(out + row, o / z)


# %% [markdown]
# To compare with, the package's reference, which brings all keys into a row; and tables as scattered as can be.

# %%
def plain(q, cache, tables, contexts):
    """Decode by PyTorch: q [S, H, D], cache [2, G, N, B, D] -> [S, H, D]."""
    lens = torch.as_tensor(contexts)
    starts = torch.arange(len(lens) + 1)  # one query a sequence
    return reference.paged_attention(q, cache, starts, lens, tables, q.shape[-1] ** -0.5)


# %%
def batch_of(contexts, B, H, G, D, dtype=torch.float32):
    """q, cache, tables, contexts: every sequence's blocks lie anywhere in the pool."""
    N = sum(blocks_for(context, B) for context in contexts) + 3
    memory = KVCacheManager(N, B, free_order=torch.randperm(N).tolist())
    for s, context in enumerate(contexts):
        memory.allocate(s, context)
    tables, q = tables_of(memory, len(contexts)), torch.randn(len(contexts), H, D).to(dtype)
    return q, stored(tables, contexts, N, B, G, D, dtype), tables, contexts


# %%
def by_heads(q, cache, tables, contexts, BLOCK_N=16):
    (S, H, D), (_, G, _, B, _) = q.shape, cache.shape
    out, lens = torch.full_like(q, torch.nan), torch.tensor(contexts, dtype=torch.int32)
    head_kernel[(S, H)](out, q, cache, tables, lens, tables.shape[1], D**-0.5,
                        *cache.stride()[:2], R=H // G, B=B, D=D, BLOCK_N=BLOCK_N)
    return out


# %% [markdown]
# Now a batch for the whole ladder: two sequences, 8 query heads over 2 key/value heads, and NaN in every slot that
# holds no token. How often does each byte of their keys and values come from the pool?

# %%
def watch(decode, q, cache, tables, contexts, **options):
    """(programs of each launch, how often each byte of the cache is read), and a check."""
    with launched() as seen:
        got = decode(q, cache, tables, contexts, **options)
    tolerance = 1e-5 if q.dtype == torch.float32 else 3e-3
    assert torch.allclose(got, plain(q, cache, tables, contexts), atol=tolerance)
    there = sum(contexts) * 2 * cache.shape[1] * cache.shape[4] * cache.itemsize
    return [int(np.prod(grid)) for grid in seen.grids], seen.loaded(cache) / there


# %%
rung_batch = batch_of([60, 23], B=4, H=8, G=2, D=16)
print(watch(by_heads, *rung_batch))

# %% [markdown]
# No copy any more. But with grouped-query attention R = H/G = 4 query heads use the same keys, and each of the 16
# programs loads them for itself. (A GPU's cache may soften that.)
#
# ### Second rung: a program for each group
#
# So one program takes all R heads, and keys are loaded once for all of them. The queries become a tile of rows, and the
# products a matrix product, `tl.dot`. On a GPU that is what **tensor cores** do, the units for products of small
# matrices. They take 16 rows at a time, so we pad R to 16; rows that are no heads are 0, and cost little, because the
# program waits for its keys anyway. And a direction that is summed must have at least 16 numbers, in fp32 8: else the
# compiler refuses, which the interpreter does not. So a tile needs 16 keys, over which the values are summed.
#
# What a tile does to `m`, `z` and `o` is the same rule for a row of each. (`"ieee"` keeps the 23 bits behind the point
# of fp32; a GPU would otherwise keep 10 of them.)

# %%
@triton.jit
def absorb_rows(m, z, o, scores, v):
    """Scores [ROWS, n] and values [n, D] join m, z [ROWS] and o [ROWS, D]."""
    m_new = tl.maximum(m, tl.max(scores, 1))
    p, shrink = tl.exp(scores - m_new[:, None]), tl.exp(m - m_new)
    weighted = tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return m_new, z * shrink + tl.sum(p, 1), o * shrink[:, None] + weighted


# %%
NONE = tl.constexpr(-1.0e38)  # m before the first key; kernels may use global constants


@triton.jit
def attend(queries, keys, values, table, begin, end, scale,
           B: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Queries [ROWS, D] over positions begin .. end - 1 -> m, z [ROWS] and o [ROWS, D]."""
    d = tl.arange(0, D)
    m = tl.full([ROWS], NONE, tl.float32)
    z, o = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, D], tl.float32)
    for first in range(begin, end, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        inside = j < end
        block = tl.load(table + j // B, mask=inside, other=0).to(tl.int64)
        numbers = (block * B + j % B)[:, None] * D + d[None, :]
        k = load_rows(keys + numbers, inside)
        v = load_rows(values + numbers, inside)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        m, z, o = absorb_rows(m, z, o, scores, v)
    return m, z, o


# %% [markdown]
# It is the loop of the first rung, for R queries at once, and from `begin` to `end`, for a reason that comes now.
#
# ### Third rung: cut the context, too
#
# S sequences and G heads make S·G programs. With one user and G=8 that is 8, and 124 of 132 multiprocessors have
# nothing to do, however long the context is. The cure is **split-KV**, also known as flash-decoding: cut the context
# as well. Each program takes a part of the positions, and leaves its own m, z and o in memory. A second kernel
# **merges** them, by the same rule:
#
# $$ m = \max_i m_i, \qquad \text{answer} = \frac{\sum_i e^{m_i - m}\, o_i}{\sum_i e^{m_i - m}\, z_i} $$
#
# **Your turn (4 of 6).** Two lines, from the formula. One program merges the two parts of one query:

# %%
@triton.jit
def merge_two_kernel(out, part_m, part_z, part_o, D: tl.constexpr):
    i, d = tl.arange(0, 2), tl.arange(0, D)
    m, z = tl.load(part_m + i), tl.load(part_z + i)  # [2]
    o = tl.load(part_o + i[:, None] * D + d[None, :])  # [2, D]
    # weight = ...
    # answer = ...
    raise NotImplementedError
    tl.store(out + d, answer)


def test_merge_two(kernel):
    s, v, got = 9 * torch.randn(5), torch.randn(5, D), torch.empty(D)
    m = torch.stack([s[:2].max(), s[2:].max()])
    e = (s - m[[0, 0, 1, 1, 1]]).exp()
    z, o = (torch.stack([x[:2].sum(0), x[2:].sum(0)]) for x in (e, e[:, None] * v))
    kernel[(1,)](got, m, z, o, D=D)
    assert torch.allclose(got, s.softmax(0) @ v, atol=1e-5), "not the answer"


attempt(test_merge_two, merge_two_kernel)

# %% [markdown]
# Now both kernels. The grid of the first gets a third direction, the number of the split:

# %%
@triton.jit
def split_kernel(part_m, part_z, part_o, q, cache, tables, lens, M, scale, stride_kv, stride_g,
                 R: tl.constexpr, B: tl.constexpr, D: tl.constexpr,
                 ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """One part of the context of one sequence, for one group. Grid: S, G, splits."""
    s, g, i = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    G, splits = tl.num_programs(1), tl.num_programs(2)
    row, d = tl.arange(0, ROWS), tl.arange(0, D)
    head, real = s * G * R + g * R + row, row < R  # head: which row of q [S * H, D]
    queries = tl.load(q + head[:, None] * D + d[None, :], mask=real[:, None], other=0.0)
    context = tl.load(lens + s)
    share = tl.cdiv(tl.cdiv(context, BLOCK_N), splits) * BLOCK_N  # whole tiles
    begin = tl.minimum(i * share, context)
    end = tl.minimum(begin + share, context)
    keys = cache + g.to(tl.int64) * stride_g
    m, z, o = attend(queries, keys, keys + stride_kv, tables + s * M, begin, end,
                     scale, B, D, ROWS, BLOCK_N)
    place = head * splits + i
    tl.store(part_m + place, m, mask=real)
    tl.store(part_z + place, z, mask=real)
    tl.store(part_o + place[:, None] * D + d[None, :], o, mask=real[:, None])


# %%
@triton.jit
def merge_kernel(out, part_m, part_z, part_o, SPLITS: tl.constexpr, D: tl.constexpr):
    """One query head of one sequence. Grid: S * H."""
    place, d = tl.program_id(0) * SPLITS + tl.arange(0, SPLITS), tl.arange(0, D)
    m, z = tl.load(part_m + place), tl.load(part_z + place)
    o = tl.load(part_o + place[:, None] * D + d[None, :])  # [SPLITS, D]
    weight = tl.exp(m - tl.max(m, 0))
    total = tl.sum(weight * z, 0)
    answer = tl.sum(weight[:, None] * o, 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + tl.program_id(0) * D + d, answer.to(out.dtype.element_ty))


# %% [markdown]
# A part without keys has z = 0 and o = 0 and adds nothing. For a sequence of no tokens all is 0, and `tl.where` keeps
# the division from making NaN of it. Now the function that a caller sees:

# %%
def paged_decode(q, cache, tables, contexts, splits=1, BLOCK_N=16):
    """One query a sequence, q [S, H, D] -> out [S, H, D]; splits are a power of two."""
    (S, H, D), (_, G, _, B, _) = q.shape, cache.shape
    lens = torch.as_tensor(contexts, dtype=torch.int32)
    part_m, part_z = torch.full((2, S, H, splits), torch.nan)
    part_o, out = torch.full((S, H, splits, D), torch.nan), torch.full_like(q, torch.nan)
    split_kernel[(S, G, splits)](
        part_m, part_z, part_o, q, cache, tables, lens, tables.shape[1], D**-0.5,
        *cache.stride()[:2], R=H // G, B=B, D=D,
        ROWS=max(16, triton.next_power_of_2(H // G)), BLOCK_N=BLOCK_N)
    merge_kernel[(S * H,)](out, part_m, part_z, part_o, SPLITS=splits, D=D)
    return out


# %%
for splits in (1, 4):
    print(f"{splits} split(s):", watch(paged_decode, *rung_batch, splits=splits))

# %% [markdown]
# One split is the second rung: 4 programs, and every byte once. (The 16 are those that merge.) Four splits are the
# third. A context of 23 has two tiles of 16, so two of its four splits take one tile each, and two take nothing.
#
# **Your turn (5 of 6).** Three sequences of 10 tokens, 12 query heads over 3 key/value heads of D=16, in fp32, 2
# splits: how many programs of `split_kernel`, and how many bytes do they load from the cache? Put your numbers for the
# zeros.

# %%
your_programs, your_bytes = 0, 0


def test_guess(programs, loaded):
    guessed = batch_of([10, 10, 10], B=4, H=12, G=3, D=16)
    with launched() as seen:
        paged_decode(*guessed, splits=2)
    right = bool(programs == np.prod(seen.grids[0])), loaded == seen.loaded(guessed[1])
    assert all(right), f"programs, bytes: {right}"


attempt(test_guess, your_programs, your_bytes)

# %% [markdown]
# ### The ladder
#
# One layer of Llama-3-8B (32 query heads, 8 key/value heads, D=128, fp16), in numbers. The bytes follow the counts
# above. The last column says how many tiles of 64 keys the busiest program goes through, one after another:

# %%
def ladder(S, context, H=32, G=8, D=128, itemsize=2, splits=32):
    """{rung: (programs, bytes moved, tiles one after another)}."""
    kv, tiles = S * context * 2 * G * D * itemsize, -(-context // 64)
    parts = S * H * splits * (D + 2) * 4  # m, z and o in fp32
    return {
        "0 gather first": (S * -(-context // 16), 3 * kv, tiles),
        "1 a program a head": (S * H, H // G * kv, tiles),
        "2 a program a group": (S * G, kv, tiles),
        "3 32 splits": (S * G * splits, kv + 2 * parts, -(-tiles // splits)),
    }


# %%
for S, context in [(1, 8192), (64, 1024)]:
    print(f"{S} x {context} tokens: programs, MB, tiles")
    for rung, (programs, moved, rounds) in ladder(S, context).items():
        print(f"{rung:20} {programs:12,} {moved / 1e6:7,.0f} {rounds:6}")

# %% [markdown]
# - **0 to 1** saves the copy and the room for it. In bytes it is a loss as soon as more than three heads share keys.
# - **1 to 2** makes up for it: each byte comes once, and no kernel that looks at all keys can do with fewer.
# - **2 to 3** costs some bytes, and turns one user's 8 programs into 256. For 64 users there were enough without.
# - The package adds a rung: tiles of *queries*, so that a prompt reads its keys once for many of them.

# %% [markdown]
# ### What the GPU does with it
#
# This section is arithmetic on NVIDIA's papers about the H100 (SXM), and the word of a compiler. Nothing of it was run.
#
# ```
#   memory                  80 GB, 3.35 TB/s       weights, cache, page tables
#   132 multiprocessors, in each:
#     shared memory         228 KB                 tiles on their way
#     registers             65,536 of 4 bytes      what is computed with: m, z, o, scores
#     places for warps      64
# ```
#
# **Threads come in warps.** A program runs on one multiprocessor, and stays there. Its tiles are shared out among
# threads, in groups of 32 that go in step: a **warp**. A launch says how many a program gets (`num_warps`, else 4).
# Which thread holds which number is the compiler's affair.
#
# **Decode waits for memory.** Each number that comes from the cache is used by R heads and then dropped: two operations
# for each of them, 4 for a byte in fp16 and R = 4. In the time of a byte an H100 can do 989 TFLOP/s / 3.35 TB/s = 295.
# So the tensor cores idle, and all that counts is how fast bytes come. That makes a bound that no kernel can beat: 34
# MB a layer, as above, in 10 microseconds.
#
# **Bytes must be on their way all the time.** A load takes a while, say 700 nanoseconds (our guess: no data sheet has
# it). For 3.35 TB a second, 2.3 MB must then be on their way at any moment, 18 KB for each multiprocessor; a tile of 64
# keys of 128 numbers has 16 KB. A program that asks for a tile, waits, computes, and asks for the next one can't keep
# that up. Two things help:
#
# - **Stages**: the compiler asks for tiles some rounds before they are needed, and puts them into shared memory
#   (`num_stages`). More stages are more bytes on their way, and more shared memory.
# - **Several programs** on each multiprocessor: while one waits, another one computes. How many fit (the **occupancy**)
#   is decided by what runs out first: registers, shared memory, or places for warps.
#
# Triton can compile for a GPU that is not there, and NVIDIA's assembler, which comes with it, says what a program
# takes. The interpreter must be off for that, so `compiled` starts a Python of its own. What fits is then a division:

# %%
LAUNCH = """
half = torch.float16
q, cache = blank(32, 32, 128, dtype=half), blank(2, 8, 1000, 16, 128, dtype=half)
parts = [blank(10**6, dtype=torch.float32)] * 3
split_kernel[32, 8, 4](*parts, q, cache, blank(32, 512), blank(32), 512, 0.1,
                       *cache.stride()[:2], R=4, B=16, D=128, ROWS=16, num_warps=4, {})
"""
THEIRS = """
from kernels.triton_attention import paged_attention
for queries in (1, 500):
    q = blank(4 * queries, 32, 128, dtype=half)
    paged_attention(q, cache, blank(5), blank(4), blank(4, 64), 0.1, queries, 1000, 1)
"""
mine = [load_rows, absorb_rows, attend, split_kernel]
tries = [f"BLOCK_N=64, num_stages={stages}" for stages in (1, 3, 5)]

# %% tags=["measured"]
built = compiled(mine, "".join(map(LAUNCH.format, tries)) + THEIRS, {"NONE": -1e38})
print("compiled by Triton", triton.__version__, "for an H100, not run:")
for name, kernel in zip([*tries, "the package, decode", "the package, prefill"], built):
    print(f"{name:24}", kernel.usage())

# %% [markdown]
# On this page registers decide in the first row: 4 warps of 32 threads with 128 each (they come in eights) go 4 times
# into 65,536. With five stages it is shared memory: 71 KB, and 1 that the system wants, go 3 times into 228. The
# package's decode kernel has five, too, and three of its programs fit; its plan counts on two on each of 132
# multiprocessors (below). Its prefill has 8 warps and tiles of 128 rows, and fits once. (Another Triton takes other
# registers: 3.6, in bf16, 126 for decode and 189 for prefill. 3 and 1 fit there, too.)
#
# **Spilled** registers, those for which there was no room, would go to memory, which is what we wait for anyway. There
# are none. With such numbers one begins when a GPU can be had. They are no proof of speed: `python -m kernels.bench`
# measures the package's kernels on a GPU of yours.

# %%
assert all(kernel.stack == 0 for kernel in built)  # nothing spilled

# %% [markdown]
# **Your turn (6 of 6).** The interpreter runs tiles of 4 keys; the compiler (K is the summed direction) says why not.
# Find sizes for tiles of 128 keys of which three programs fit. (Some seconds each time.)

# %% tags=["measured"]
your_sizes = "BLOCK_N=4, num_stages=3"


def test_sizes(sizes):
    [kernel] = compiled(mine, LAUNCH.format(sizes), {"NONE": -1e38})
    assert "BLOCK_N=128" in sizes and kernel.fits >= 3, kernel.usage()


attempt(test_sizes, your_sizes)

# %% [markdown]
# ### Two layouts of a cache
#
# Memory gives its bytes in **sectors** of 32. Load one number and its whole sector comes. Threads of a warp whose
# numbers lie side by side share sectors, and the loads are **coalesced**. Our cache is [2, G, N, B, D]: a pool for
# each head, in which a block of one head is B·D numbers in one run. vLLM's FlashAttention backend has [2, N, B, G, D]:
# a block keeps all heads together. What do the usual errands touch, for Llama-3-8B in fp16?

# %%
def touched(places, itemsize=2):
    """Runs of numbers side by side, and 32-byte sectors."""
    places = places.flatten().sort().values
    return int((places.diff() != 1).sum()) + 1, len((places * itemsize // 32).unique())


def layouts(G=8, N=100, B=16, D=128):
    """Each number's place, as [2, G, N, B, D]."""
    places = torch.arange(2 * G * N * B * D)
    return {"ours": places.view(2, G, N, B, D),
            "vLLM's": places.view(2, N, B, G, D).permute(0, 3, 1, 2, 4)}


# %%
for name, place in layouts().items():
    errands = {"64 keys of a head": place[0, 0, [7, 93, 12, 40]],
               "a new token": place[:, :, 7, 0], "a block to copy": place[:, :, 7]}
    for errand, numbers in errands.items():
        print("{:7} {:18} {:4} runs, {:5} sectors".format(name, errand, *touched(numbers)))
alone = layouts(N=200, B=1)["ours"][0, 0, torch.randperm(200)[:64]]
print("ours    64 keys, B = 1:    {:4} runs, {:5} sectors".format(*touched(alone)))

# %% [markdown]
# The sectors are the same, since a slot of 128 numbers is 8 whole ones. What differs is in how many pieces they come.
# Ours is made for reading: long runs of one head, and to cut the heads over several GPUs is to cut a first
# dimension. vLLM's is made for moving: a block of a layer is two pieces instead of 2·G, which counts when blocks are
# copied, swapped, or sent to another machine. And a block's place doesn't depend on the size of the pool there; we
# multiply heads by N·B·D, which asks for large integers (see below).
#
# And **why not blocks of one token**? The last line says that even they cost no sector more. (If a head were no whole
# number of sectors, they would.) So in our kernel it isn't the loads that speak against small blocks. All the reasons,
# here and in other chapters, in one sentence: where a tile *is* a block, as in the paper's kernel, each block is a wait
# (first for its number, then for its contents: the part that [chapter 15](15_the_experiments.ipynb) models) and little
# work for the warps that read it; and in every kernel, ours too, tables grow, an entry for each token to be kept and
# sent at each step, while copies and swaps move in short pieces. [Chapter 6](06_pagedattention.ipynb) put it all into
# one price for starting a block, and weighed it against the waste of large ones.
#
# ## Check it
#
# Random shapes, tables and block sizes, one or several heads to a group, fp32 and fp16, NaN in every slot outside the
# contexts, any number of splits, also more than there are tiles. The package's own tests (`tests/test_triton.py`) draw
# more, and use a GPU where there is one.

# %%
def random_batch(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    pick = random.Random(seed)
    contexts = [pick.randint(1, 40) for _ in range(pick.randint(1, 2))]
    B, D = pick.choice([1, 2, 3, 7, 16, 64]), pick.choice([16, 32])
    H, G = pick.choice([(1, 1), (3, 1), (2, 2), (20, 1)])
    return batch_of(contexts, B, H, G, D, dtype)


# %%
for seed in range(10):
    batch = random_batch(seed, (torch.float32, torch.float16)[seed % 2])
    _, times = watch(paged_decode, *batch, splits=(1, 2, 4)[seed % 3])
    assert times == 1
print("10 random batches: right, and every key and value is read once")

# %% [markdown]
# What this can't show: speed, and bf16, which the interpreter computes wrongly, so the package refuses it here.
#
# ## The package's version
#
# The package's kernel computes decode, prefill and any mix of them. Its heart is the loop that you know:

# %%
from kernels import triton_attention, triton_tiles

show_source(triton_attention._attend)

# %% [markdown]
# What is more, and why:
#
# - **Powers of two.** $e^x = 2^{x \log_2 e}$, and the hardware computes powers of two. So $\log_2 e$ goes into the
#   scale (`scale_log2`), which costs nothing.
# - **`D_PAD`.** A head size like 80 is no power of two; tiles are padded, and the mask covers the padding.
# - **`MASKED`.** In a prefill a tile holds queries at many positions, and none may look ahead. Keys that all of them
#   may see need no mask, so the loop runs twice: without masks, and with. (Decode has the second only.)
# - **`SCALED`.** Keys and values may lie there in eight bits, with a scale for each.
#
# The kernel around it has strides for everything, and merges as ours does. In a flat batch some sequences bring one
# query, others hundreds. A tile takes TILE_Q queries of *one* sequence, and those of sequence s begin at number
# `query_start[s] // TILE_Q + s`: room for every tile, and at times for one too many, which ends at once. A program
# finds its s by bisection (`_find_queries`), so no list need be made or sent.
#
# ### How many splits?
#
# More splits are not always better. Programs run in **waves**: if 264 are planned for at a time (two on each of 132
# multiprocessors), 265 take about as long as 528. So the package takes the smallest number of splits that fills the
# waves within a tenth of the best. With one user and G=8:

# %%
def full(splits, programs=8, places=2 * 132):
    waves = programs * splits / places
    return waves / np.ceil(waves)


chosen = triton_tiles.choose_splits(8, 32768, 132)
choices = np.arange(1, 129)
assert chosen == choices[full(choices) >= 0.9 * full(choices).max()][0]

# %%
alt = ("A saw: the share of places in use rises to 100 % at 33 splits and falls to half at 34; "
       "the next teeth are less deep. 30, just before the first point, is chosen.")
title = "How full the waves are: 8 programs, split"
with plots.figure(title, "splits", "places in use, %", alt=alt) as axes:
    axes.plot(choices, 100 * full(choices), color=plots.COLORS[0])
    plots.note(axes, chosen, 100 * full(chosen), f"chosen: {chosen}", dx=-40, dy=-30)

# %% [markdown]
# And what is not in a kernel, but in the way it is called:
#
# - **Nobody waits.** A Python `if` on a number that a GPU has computed would stop everything until it arrives. The
#   launch uses only what the CPU knows anyway. So a step can also be recorded once and replayed as a **CUDA graph**.
#   Recorded steps have fixed sizes, so they bring sequences of 0 tokens that fill them up.
# - **Fixed tiles, no autotuning.** `choose_tiles` decides from the shapes, so what the tests compile is what runs.
#
# ### They agree
#
# Ours and the package's on random decode batches. The package's takes any strides, so we give it the same cache once
# more in vLLM's layout, and get the same bits.

# %%
def package_attention(q, cache, tables, contexts, counts):
    """The package's kernel for counts[s] queries of each sequence s."""
    starts, lens = torch.tensor([0, *counts]).cumsum(0), torch.as_tensor(contexts)
    sizes = q.shape[2] ** -0.5, max(counts), max(contexts)
    return triton_attention.paged_attention(q, cache, starts, lens, tables, *sizes)


# %%
for seed in range(100, 105):
    batch = random_batch(seed)
    theirs = package_attention(*batch, counts=[1] * len(batch[0]))
    assert torch.allclose(paged_decode(*batch), theirs, atol=1e-5)
    moved = batch[1].permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4)  # vLLM's
    batch = batch[0], moved, *batch[2:]
    assert torch.equal(theirs, package_attention(*batch, counts=[1] * len(batch[0])))
print("5 random batches: ours and theirs agree, and both layouts to the bit")

# %% [markdown]
# ### And the engine
#
# The whole engine, too, runs under the interpreter. We leave the model of chapter 1 only its first two layers. It talks
# nonsense, but it must be the same nonsense with every backend.

# %%
from minipaged import LLM, SamplingParams


def nonsense(kernels):
    """Two samples of a prompt and an answer to another -> (token ids, the engine)."""
    llm = LLM("smollm2", kernels=kernels, device="cpu", dtype="float32", block_size=4,
              num_blocks=16, debug=True)
    llm.executor.runner.model.layers = llm.executor.runner.model.layers[:2]
    llm.executor.runner.cache = llm.executor.runner.cache[:2]
    params = [SamplingParams(n=2, max_tokens=3, seed=1, ignore_eos=True),
              SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)]
    outputs = llm.generate([[5, 6, 7, 8, 9, 10], [40, 41, 42]], params)
    return [sample.token_ids for output in outputs for sample in output.outputs], llm


# %%
with launched() as seen:
    by_triton, llm = nonsense("triton")
by_torch, _ = nonsense("torch")
assert by_triton == by_torch and by_triton[0] != by_triton[1]
assert llm.stats().memory.copies == seen.kernels.count("_copy_kernel") == 1
print(llm.stats().num_steps, "steps of 2 layers:", dict(Counter(seen.kernels)))

# %% [markdown]
# The same tokens. (Sequences of one query have a launch of their own, with tiles made for decode, and a step that may
# have both kinds, as the first one, launches attention twice in each layer.) Two samples shared the block in which
# their prompt ends. Before the first of them wrote into it, it got a copy, made by a kernel, too. `debug=True` fills
# freed blocks with NaN, so a stale read would have shown.
#
# ## What must hold, and what breaks if it doesn't
#
# **What lies outside is never loaded.** Its weight is 0, so why mind? Because free slots hold anything, the NaN of a
# debug run or what others left there, and 0 · NaN is NaN. Here `load_rows` without its mask:

# %%
@triton.jit
def load_all_rows(pointers, inside):
    return tl.load(pointers)


# %%
last_batch = torch.randn(2, 6, D), stored(tables, [9, 6], N, B, 2, D), tables, [9, 6]
whole = paged_decode(*last_batch)
masked, load_rows = load_rows, load_all_rows
broken = paged_decode(*last_batch)
load_rows = masked
assert whole.isfinite().all() and broken.isnan().any()
print(f"NaN without the mask: {broken.isnan().float().mean():.0%} of the answer")

# %% [markdown]
# **Addresses have 64 bits.** Tables hold 32-bit integers, and Triton multiplies what it is given. A pool of 64 GiB for
# GPT-2 (12 layers, 12 heads, D=64, fp16) has 2.9 billion numbers in each layer, and an integer of 32 bits ends at 2.1
# billion. Where do the values of head 11 begin?

# %%
blocks = 2**36 // (2 * 12 * 12 * 16 * 64 * 2)  # N
stride_g = blocks * 16 * 64  # numbers from one head to the next
narrow = torch.tensor(12 + 11, dtype=torch.int32) * stride_g
print(f"at number {23 * stride_g:,}; in 32 bits at {narrow:,}")
assert 23 * stride_g > 2**31 > 0 > narrow

# %% [markdown]
# A negative address: some 3 GB before the pool, in somebody else's memory. Tests with small pools never see it.
#
# **`m` starts at a finite number.** With minus infinity all goes well until some row has no key at all, such as a
# sequence of 0 tokens that only fills up a recorded step. Then $m_i - m$ is $-\infty - (-\infty)$:

# %%
nobody = *last_batch[:3], [9, 0]  # the second sequence has no tokens
fine = paged_decode(*nobody, splits=2)
finite, NONE = NONE, tl.constexpr(float("-inf"))
with np.errstate(invalid="ignore"):
    broken = paged_decode(*nobody, splits=2)
NONE = finite
assert fine[0].equal(broken[0]) and (fine[1] == 0).all() and broken[1].isnan().all()


# %% [markdown]
# **No two programs write to the same place.** And here the interpreter lies to you. Sixteen programs count themselves:
# each reads the total, adds 1, and writes it back.

# %%
@triton.jit
def count_kernel(total):
    tl.store(total, tl.load(total) + 1)


total = torch.zeros(1, dtype=torch.int32)
with launched() as seen:
    count_kernel[(16,)](total)
print("total:", total.item(), " places that programs fight for:", seen.races())

# %% [markdown]
# Sixteen is "right", since the interpreter runs one program after another. A GPU runs them at once. If all of them read
# before any has written, each writes 1; it may be anything up to 16, and another number the next time. This is a
# **race**. `launched` knows all addresses, and found the place that one program writes and others use. `tl.atomic_add`
# reads, adds and writes in one step that nobody can come between, and that helps for whole numbers. Floats it adds in
# whatever order programs come, and rounds differently each time. So our splits don't add into one output. Each writes
# to a place of its own, and the next launch, which begins when all of them are done, merges them:

# %%
with launched() as seen:
    paged_decode(*last_batch, splits=4)
assert seen.races() == 0

# %% [markdown]
# **Tables are right before the launch.** A kernel does not check an entry. A block that does not exist is an address
# like any other. Here the pool is a part of a larger tensor, and next to it lies what belongs to someone else:

# %%
building = torch.full((2, 2, N + 1, B, D), 9.0)  # block 8 is not in the pool
building[:, :, :N] = last_batch[1]
bad = tables.clone()
bad[1, 1] = N
stolen = paged_decode(last_batch[0], building[:, :, :N], bad, [9, 6])
assert stolen.isfinite().all() and not torch.allclose(stolen[1], whole[1], atol=0.1)
print(f"no error, no NaN; sequence B got values up to {stolen[1].max():.1f}")


# %% [markdown]
# It read its neighbour's numbers. Further away there would have been a crash, or another user's text. In the engine
# nobody but the memory manager writes tables, and with `debug=True` the runner looks at all of them before every step.
#
# ## Exercises
#
# Each is followed by a test. Where it is about a kernel, write the kernel above the function that launches it. The
# tests look on with `launched`: PyTorch may make tensors and small numbers, but what is in the pool is read and
# written by your kernels, and nothing of the package is called. An error inside a kernel is shown at your own line.
#
# **1. Addresses of a tile** (warm-up). In PyTorch, no kernel: the integers that a program adds to its pointer.

# %% tags=["exercise"]
def tile_numbers(table, first, context, B, D, BLOCK_N):
    """Where the tile of the positions first .. first + BLOCK_N - 1 lies in keys [N, B, D].

    table: int32, the entries that `context` positions need, and no more.
    Returns two tensors: numbers [BLOCK_N, D], int64, those of slot 0 of block 0 for a position
    outside the context; and inside [BLOCK_N], bool, which positions are in it.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_tile_numbers(tile_numbers):
    tile_numbers = own(tile_numbers)
    for seed in range(80):
        pick = random.Random(seed)
        context, B, D = pick.randint(1, 60), pick.choice([1, 3, 16]), pick.choice([16, 128])
        first, BLOCK_N = pick.randrange(context), pick.choice([1, 2, 8, 32])
        blocks = [pick.randrange(3_000_000) for _ in range(-(-context // B))]
        table = torch.tensor(blocks, dtype=torch.int32)
        numbers, inside = tile_numbers(table, first, context, B, D, BLOCK_N)
        tile = range(first, first + BLOCK_N)
        where = f"positions {first} to {tile[-1]} of {context}, B={B}, D={D}"
        right = torch.tensor([j < context for j in tile])
        assert equal(inside, right), f"{where}: inside should be {right}, not {inside}"
        slots = [blocks[j // B] * B + j % B if j < context else 0 for j in tile]
        right = torch.tensor(slots)[:, None] * D + torch.arange(D)
        said = f"{where}: numbers should be\n{right[:, :3]} ..., not\n{numbers}"
        assert equal(numbers, right), said


attempt(test_tile_numbers, tile_numbers)

# %% [markdown]
# **2. Write the new keys.** The other half of every step: the keys and values of T new tokens go to their slots, all
# heads, in one launch. A slot is `block * B + offset`; that of a token which should leave nothing is -1. The pool may
# be a part of a larger tensor, so use its strides. Write what belongs to a token, and nothing else.

# %% tags=["exercise"]
def write_kv(k, v, cache, slots):
    """k and v [T, G, D] into cache [2, G, N, B, D] at slots [T], int32; -1 writes nothing.

    k and v are in one piece; so is each block of one head. G * D is a power of two.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_write_kv(write_kv):
    write_kv = own(write_kv, changes=["cache"])
    for seed in range(8):
        torch.manual_seed(seed)
        pick = random.Random(seed)
        G, B, D, T = pick.choice([1, 2, 4]), pick.randint(1, 5), pick.choice([8, 16]), 1 + seed
        k, v = torch.randn(2, T, G, D).to((torch.float32, torch.float16)[seed % 2])
        some = pick.sample(range(7 * B), min(T, 7 * B))
        slots = [-1 if pick.random() < 0.3 else slot for slot in some] + [-1] * (T - len(some))
        slots[0] = (0, 7 * B - 1)[seed % 2]  # the first and the last one, too
        slots = [s if slots.index(s) == t else -1 for t, s in enumerate(slots)]
        building = torch.full((2, G + 2, 9, B, D), torch.nan, dtype=k.dtype)
        right = building.clone()
        for t, slot in enumerate(slots):
            if slot >= 0:
                right[:, 1:-1, 1 + slot // B, slot % B] = torch.stack([k[t], v[t]])
        with launched() as seen:  # the pool: blocks 1 to 7, all heads but the outer two
            write_kv(k, v, building[:, 1:-1, 1:8], torch.tensor(slots, dtype=torch.int32))
        where = f"{G=}, {B=}, {D=}, {slots=}"
        assert len(seen.kernels) == 1, f"{len(seen.kernels)} launches, not one"
        written, fine = torch.isfinite(building), torch.isfinite(right)
        assert (written >= fine).all(), f"{where}: something is not written"
        assert (written <= fine).all(), f"{where}: something else is written, too"
        assert equal(building, right), f"{where}: other numbers than k and v have there"
        stored, wanted = seen.stored(building), fine.sum() * k.itemsize
        said = f"{where}: the kernel stores {stored} bytes in the pool, not {wanted}"
        assert stored == wanted, said
        assert seen.loaded(building) == 0, f"{where}: the pool need not be read"


attempt(test_write_kv, write_kv)

# %% [markdown]
# **3. Copy blocks, in no order.** Copy-on-write ([chapter 5](05_page_tables.ipynb)) copies several blocks in one
# launch. A block may be the source of one pair and the target of another, and then its *old* contents are meant. One
# program a pair is a race. Cut the work so that no program reads what another writes, and make no copy on the side.
# (On a GPU the threads of a program need a `tl.debug_barrier()` between its loads and its stores, too.)

# %% tags=["exercise"]
def copy_blocks(cache, source, target):
    """Copy block source[i] of cache [2, G, N, B, D] to block target[i], in all heads.

    source and target [C], int32, 1 <= C <= 16; targets are distinct, source[i] is another
    block than target[i]. The cache is in one piece, and B * D may be any number. Every source
    counts as it was before. One launch, which loads the numbers of each source once for each
    of its targets, and stores each once.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_copy_blocks(copy_blocks):
    copy_blocks = own(copy_blocks, changes=["cache"])
    up, down = [0, 1, 2, 3, 4], [1, 2, 3, 4, 5]
    pairs = [([3], [0]), (up, down), (down, up), (up, down[:4] + [0]), (up[::-1], down[::-1])]
    for seed in range(5):
        pick = random.Random(seed)
        C = pick.choice([1, 3, 16])
        target = pick.sample(range(18), C)
        pairs.append(([(t + pick.randint(1, 17)) % 18 for t in target], target))
    for seed, (source, target) in enumerate(pairs):
        torch.manual_seed(seed)
        G, B, D = 1 + seed % 3, (3, 1, 4, 5)[seed % 4], (8, 16, 5)[seed % 3]
        cache = torch.randn(2, G, 18, B, D).to((torch.float32, torch.float16)[seed % 2])
        right = cache.clone()
        right[:, :, target] = cache[:, :, source]
        with launched() as seen:
            copy_blocks(cache, *torch.tensor([source, target], dtype=torch.int32))
        where = f"{source} -> {target}, {G=}, {B=}, {D=}"
        assert len(seen.kernels) == 1, f"{len(seen.kernels)} launches, not one"
        assert equal(cache, right), f"{where}: the blocks are not what they should be"
        races = f"{where}: two programs fight for {seen.races()} places"
        assert seen.races() == 0, races
        moved, wanted = (seen.loaded(cache), seen.stored(cache)), right[:, :, source].nbytes
        said = f"{where}: loads and stores {moved} bytes of the cache, not {wanted} each"
        assert moved == (wanted, wanted), said


attempt(test_copy_blocks, copy_blocks)

# %% [markdown]
# **4. Any batch** (open). Write a kernel for the flat batch, in which a sequence brings any number of queries, the last
# ones of its context, and none looks further than its own position. To give `paged_decode` a sequence for each query
# would read the keys anew for every one. So take tiles of queries: what 8 queries in a row of
# a sequence need is read once. (`load_rows` and `absorb_rows` can stay.) Then go on: splits, and no masks where all may
# see.

# %% tags=["exercise"]
def mixed_attention(q, cache, query_start, contexts, tables):
    """q [T, H, D], cache [2, G, N, B, D] -> out [T, H, D], written by a kernel; fp32.

    Sequence s has the queries query_start[s] .. query_start[s + 1] - 1, maybe none; contexts
    [S] and query_start [S + 1] are lists, tables [S, M] is int32, -1 behind its end. H / G is
    at most 4, D a power of two. As reference.paged_attention with the scale 1 / sqrt(D).
    At most 3 launches. For a sequence of n queries at most ceil(n / 8) times its context is
    loaded from the cache, for all its heads together: keys and values, and nothing outside.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_mixed_attention(mixed_attention):
    mixed_attention = own(mixed_attention)
    batches = [([9], [9], (6, 2), 16, 4), ([5, 20], [1, 1], (4, 1), 32, 1),
               ([20, 7, 12], [10, 1, 0], (2, 2), 16, 3),
               ([12, 11, 1], [0, 6, 1], (3, 1), 32, 16)]
    for seed, (contexts, counts, (H, G), D, B) in enumerate(batches):
        torch.manual_seed(seed)
        _, cache, tables, contexts = batch_of(contexts, B, H, G, D)
        q, starts = torch.randn(sum(counts), H, D), np.cumsum([0, *counts]).tolist()
        lens = torch.tensor(contexts)
        right = reference.paged_attention(q, cache, torch.tensor(starts), lens, tables, D**-0.5)
        with launched() as seen:
            got = mixed_attention(q, cache, starts, contexts, tables)
        where = f"{counts} queries of contexts {contexts}"
        assert equal(got, right, 1e-4), f"{where}: not what the reference says"
        assert len(seen.kernels) <= 3, f"{where}: {len(seen.kernels)} launches"
        assert seen.stored(got) >= got.nbytes, f"{where}: the answer is not written by a kernel"
        token, loaded = 2 * G * D * cache.itemsize, seen.loaded(cache)
        least = sum(context * token for context, n in zip(contexts, counts) if n)
        most = sum(-(-n // 8) * context * token for context, n in zip(contexts, counts))
        said = f"{where}: right, but loads {loaded} bytes of the cache, not {least} to {most}"
        assert least <= loaded <= most, said


attempt(test_mixed_attention, mixed_attention)

# %% [markdown]
# ## What's next
#
# The memory and the attention that reads it are there. What remains is to use them: sharing blocks between sequences
# ([chapter 8](08_sampling_and_forks.ipynb)), deciding who runs in the next step
# ([chapter 10](10_continuous_batching.ipynb)), and the engine around it all.
#
# ## Sources
#
# - Tillet, Kung and Cox, *Triton: An Intermediate Language and Compiler for Tiled Neural Network Computations*, 2019.
# - Rush, *Triton-Puzzles*: kernels to be completed line by line.
# - Milakov and Gimelshein, *Online normalizer calculation for softmax*, 2018.
# - Dao, Fu, Ermon, Rudra and Ré, *FlashAttention*, 2022: attention in tiles, never all scores at once.
# - Dao, Haziza, Massa and Sizov, *Flash-Decoding for long-context inference*, 2023: splitting the context.
# - Kwon et al., *Efficient Memory Management for Large Language Model Serving with PagedAttention*, SOSP 2023: Figures
#   5-8 and 18, kernels (section 5.1).
# - vLLM 0.9, `FlashAttentionBackend.get_kv_cache_shape`.
# - NVIDIA, *H100 Tensor Core GPU Datasheet*, *H100 Tensor Core GPU Architecture*, and *CUDA C++ Best Practices Guide*
#   (coalesced loads, occupancy).
