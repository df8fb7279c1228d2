# %% [markdown]
# # 7. The Triton kernel
#
# A GPU wants thousands of small jobs at once, and each of them must find its own keys. This chapter cuts paged
# attention into such jobs and writes them in Triton, a language for GPU kernels inside Python. The kernels start small
# and grow. All of them run here on the CPU, under Triton's interpreter, where every line can be stepped through. It is
# slow: for looking, not for speed.
#
# **You need**: paged attention (chapter 6), and how NumPy or PyTorch broadcasts. **You get**: a kernel for decode
# that walks page tables, shares keys between heads and splits long contexts, and an idea of what decides its speed
# on a GPU. **No figure in this chapter was measured on a GPU.** Where one is meant, it is arithmetic on a data sheet,
# and the text says so. Triton exists for Linux only; elsewhere read the page as it stands.

# %% [markdown]
# ## The question
#
# Chapter 6 went through the blocks of a context one by one, in a loop, sequence after sequence. A GPU does not get
# faster that way. An H100 has 132 **multiprocessors**, each a processor of its own, and a loop that visits one block
# at a time keeps at most one of them busy. So the work must be cut into jobs that don't wait for each other:
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
#             head g=0      g=1        g=2
#           +----------+----------+----------+
#  seq. s=0 | program  | program  | program  |      each of them: load its queries,
#           |   0, 0   |   0, 1   |   0, 2   |      walk the page table of s,
#           +----------+----------+----------+      load keys and values of head g,
#  seq. s=1 | program  | program  | program  |      write its rows of the output
#           |   1, 0   |   1, 1   |   1, 2   |
#           +----------+----------+----------+      in any order, none waits for another
# ```
#
# A program works on **tiles**: arrays whose shape is fixed when the kernel is compiled, and a power of two in every
# direction. Memory is reached by **pointers**: a tensor arrives as the address of its first number, a tile of integers
# is added to it, and `tl.load` fetches what lies at all those addresses. Adding 1 moves a pointer by one *number*,
# however many bytes that is. A **mask** says which addresses are real, since the work hardly ever ends where a tile
# does.
#
# So a page table needs no new machinery. The table is loaded like anything else, and what it says becomes part of the
# next address:
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
# The interpreter must be asked for before anything imports Triton. (If a kernel complains that there are no "active
# drivers", it was too late: restart the notebook.) It runs kernels in NumPy, one program after another.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"
try:
    import triton
    import triton.language as tl
except ImportError:
    raise ImportError("pip install triton; not on Linux: read the page as it stands") from None

# %%
import random

import torch

from kernels import reference
from minipaged.memory import KVCacheManager, blocks_for
from minipaged.teaching import attempt, plots, show_source
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
# it is given. Ours is two longer than needed, so that we see what a program must leave alone.

# %%
x, y = torch.arange(10.0), 100 * torch.arange(10.0)
out = torch.full((12,), -1.0)
add_kernel[(3,)](out, x, y, 10, TILE=4)
print(out.tolist())
assert torch.equal(out[:10], x + y) and (out[10:] == -1).all()  # the mask held


# %% [markdown]
# Three programs of four make twelve; the mask took two away.
#
# ### A tile has sums and maxima: softmax
#
# One program a row. What does a masked place hold? Whatever we say with `other` (anything at all if we say nothing),
# and it takes part in all that follows. For a softmax it must weigh nothing, so it is minus infinity, whose
# exponential is 0:

# %%
@triton.jit
def softmax_kernel(out, x, n, OTHER: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0)
    j = tl.arange(0, TILE)
    scores = tl.load(x + row * n + j, mask=j < n, other=OTHER)
    e = tl.exp(scores - tl.max(scores, 0))
    tl.store(out + row * n + j, e / tl.sum(e, 0), mask=j < n)


# %%
torch.manual_seed(0)
x = torch.randn(4, 6)
right, wrong = torch.empty(2, 4, 6)  # two outputs
softmax_kernel[(4,)](right, x, 6, OTHER=float("-inf"), TILE=8)
softmax_kernel[(4,)](wrong, x, 6, OTHER=0.0, TILE=8)
assert torch.allclose(right, x.softmax(-1))
print("other = -inf, sums of the rows:", [f"{row.sum():.2f}" for row in right])
print("other = 0,    sums of the rows:", [f"{row.sum():.2f}" for row in wrong])

# %% [markdown]
# With 0 two places that don't exist take their share of every row, and nothing fails. Most mistakes in kernels are of
# this kind: a plausible wrong number. So from here on all memory that no program may use is filled with NaN.
#
# ### Through the table
#
# Two sequences with 9 and 6 tokens, those of Figures 6 and 7 in the paper, in a pool of N=8 blocks of B=4 slots:

# %%
B, N = 4, 8
memory = KVCacheManager(num_blocks=N, block_size=B, free_order=[7, 1, 3, 5, 2])
contexts = [9, 6]
for s, context in enumerate(contexts):
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
D = 16
tables, lens = tables_of(memory, S=2), torch.tensor(contexts, dtype=torch.int32)
cache = stored(tables, contexts, N, B, G=1, D=D)
keys, values = cache[:, 0]  # [N, B, D] each: one head
M = tables.shape[1]
print(tables.tolist(), " contexts", lens.tolist(), f" M={M}")
print("slots that hold a key:", int(keys.isfinite().all(-1).sum()), "of", N * B)


# %% [markdown]
# Now a kernel that brings the keys of a sequence into a row again. A program for each sequence and logical block: it
# loads one entry of the table, and from it builds a [B, D] tile of addresses. `[:, None]` makes a column and `[None,
# :]` a row, and a column plus a row is a tile, as in NumPy. Under the interpreter a kernel is Python, so `print` works
# in the middle of it, and so does `breakpoint()`. (On a GPU there is `tl.device_print`, and its lines come in whatever
# order the programs happen to run.)

# %%
@triton.jit
def gather_kernel(out, keys, tables, lens, M, B: tl.constexpr, D: tl.constexpr):
    s, logical = tl.program_id(0), tl.program_id(1)
    physical = tl.load(tables + s * M + logical).to(tl.int64)
    print("sequence", s, "logical", logical, "-> physical", physical)
    offset, d = tl.arange(0, B), tl.arange(0, D)
    position = logical * B + offset
    inside = (position < tl.load(lens + s))[:, None]
    numbers = (physical * B + offset)[:, None] * D + d[None, :]  # [B, D]
    k = tl.load(keys + numbers, mask=inside)
    tl.store(out + (s * M * B + position)[:, None] * D + d[None, :], k, mask=inside)


# %%
rows = torch.full((2, M * B, D), torch.nan)
gather_kernel[(2, M)](rows, keys, tables, lens, M, B=B, D=D)

# %% [markdown]
# The last program met the -1. It computed addresses before the start of the pool, and loaded nothing from them, for
# all its positions lie outside the context. The mask guards the addresses, not only the numbers.

# %%
for s, context in enumerate(contexts):
    j = torch.arange(context)
    assert torch.equal(rows[s, :context], keys[tables[s, j // B], j % B])
    assert rows[s, context:].isnan().all()  # nothing was written behind the context
print("both sequences stand in a row again")

# %% [markdown]
# `.to(tl.int64)` is there for large pools; what happens without it is shown further down.
#
# ### A tile is not a block
#
# Here a tile is a block. So it is in the paper's kernel, where a group of threads reads one block at a time (section
# 5.1). That ties together two sizes that have little to do with each other. The block size is for the memory: small
# wastes little. The tile is for the processor: it should hold enough keys to keep it busy, and it must be a power of
# two. A block size of 12 would not even start:

# %%
try:
    gather_kernel[(2, 1)](rows, keys, tables, lens, M, B=12, D=D)
except Exception as error:
    print(error)

# %% [markdown]
# So from here on a tile is `BLOCK_N` *positions*, as in the picture at the beginning. (Triton's habit is to call tile
# sizes BLOCK; they are not our blocks.) Each position looks up its own entry of the table. A tile may hold many blocks
# or a part of one.
#
# ### Attention, one tile at a time
#
# Copying all keys into a row, only to read them once, would be a waste. So the attention itself walks the table. It
# holds one tile of keys at a time, and keeps three things: `m`, the largest score so far, `z`, the sum of the
# exponentials, and `o`, the sum of the values with the exponentials as weights. A tile of scores $s_j$ and values $V_j$
# changes them to
#
# $$ m' = \max(m, \max_j s_j), \quad p_j = e^{s_j - m'}, \quad z' = e^{m - m'} z + \sum_j p_j, \quad
# o' = e^{m - m'} o + \sum_j p_j V_j $$
#
# and the answer is $o / z$: the **online softmax** of chapter 6. Before the first key `m` must lie below every score.
# We take $-10^{38}$ and not minus infinity, since $-\infty - (-\infty)$ is not a number.
#
# A kernel may call other functions with `@triton.jit`, so this rule gets a function of its own. Loading gets one too:
# what lies outside is 0.

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


# %%
@triton.jit
def tile_kernel(out, q, keys, values, tables, lens, M, scale,
                B: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """One query, one head: out and q [S, D], keys and values [N, B, D]."""
    s = tl.program_id(0)
    context = tl.load(lens + s)
    d = tl.arange(0, D)
    query = tl.load(q + s * D + d)
    m, z, o = -1.0e38, 0.0, tl.zeros([D], tl.float32)
    for first in range(0, context, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        inside = j < context
        block = tl.load(tables + s * M + j // B, mask=inside, other=0).to(tl.int64)
        numbers = (block * B + j % B)[:, None] * D + d[None, :]
        k = load_rows(keys + numbers, inside)
        v = load_rows(values + numbers, inside)
        scores = tl.sum(query[None, :] * k, 1) * scale
        m, z, o = absorb(m, z, o, tl.where(inside, scores, float("-inf")), v)
    tl.store(out + s * D + d, o / z)


# %% [markdown]
# One program for each sequence. The product of the query with all keys of a tile is written out as a product of tiles
# and a sum. To compare with, the package's reference, which brings all keys into a row; and tables that are as
# scattered as can be, for several block sizes:

# %%
def plain(q, cache, tables, contexts):
    """Decode by PyTorch: q [S, H, D], cache [2, G, N, B, D] -> [S, H, D]."""
    lens = torch.as_tensor(contexts)
    starts = torch.arange(len(lens) + 1)  # one query a sequence
    return reference.paged_attention(q, cache, starts, lens, tables, q.shape[-1] ** -0.5)


# %%
def scrambled(contexts, B):
    """Tables over a pool in which every sequence's blocks lie anywhere: (tables, N)."""
    counts = [blocks_for(context, B) for context in contexts]
    N = sum(counts) + 3
    memory = KVCacheManager(N, B, free_order=torch.randperm(N).tolist())
    for s, context in enumerate(contexts):
        memory.allocate(s, context)
    return tables_of(memory, len(contexts)), N


# %%
q = torch.randn(2, 1, D)
for size in (1, 3, 4, 12, 64):
    some, count = scrambled(contexts, size)
    pool = stored(some, contexts, count, size, G=1, D=D)
    out = torch.full((2, 1, D), torch.nan)
    tile_kernel[(2,)](out, q, *pool[:, 0], some, lens, some.shape[1], D**-0.5,
                      B=size, D=D, BLOCK_N=8)
    assert torch.allclose(out, plain(q, pool, some, contexts), atol=1e-5)
    print(f"B={size:2}: tables {some.tolist()}")


# %% [markdown]
# Any block size, one kernel, and NaN in every slot that holds no token. The price is one table entry loaded for each
# position instead of one for each block. They are neighbours in memory, mostly even the same number, so it is small.
#
# ### Heads that share keys
#
# Now all heads. The cache of a layer is [2, G, N, B, D]: keys and values, key/value heads, blocks, slots, numbers.
# With grouped-query attention R = H/G query heads use the same keys. If each had a program of its own, each would load
# them again. So one program takes all R, and keys are loaded once for all of them. The queries become a tile of rows,
# and the products a matrix product, `tl.dot`. On a GPU that is what **tensor cores** do, the units for products of
# small matrices. They work on 16 rows at a time, so we pad R to 16. The rows that are no heads are 0; they cost little,
# because the program waits for its keys anyway.
#
# What a tile does to `m`, `z` and `o` is the same rule for a row of each. (`input_precision="ieee"` keeps the numbers
# of fp32 whole; a GPU would otherwise shorten them to TF32, which has 10 bits behind the point instead of 23.)

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
    z = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, D], tl.float32)
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
# The kernel around it finds what belongs to (s, g). How far apart two heads lie in the cache is its **stride**;
# PyTorch knows it, and we pass it on. `tl.num_programs` tells how large the grid is.

# %%
@triton.jit
def grouped_kernel(out, q, cache, tables, lens, M, scale, stride_kv, stride_g,
                   R: tl.constexpr, B: tl.constexpr, D: tl.constexpr,
                   ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """All R heads of a group in one program. Grid: S, G."""
    s, g, G = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, d = tl.arange(0, ROWS), tl.arange(0, D)
    numbers = (s * G * R + g * R + row)[:, None] * D + d[None, :]  # rows of q and out
    queries = tl.load(q + numbers, mask=(row < R)[:, None], other=0.0)
    keys = cache + g.to(tl.int64) * stride_g
    m, z, o = attend(queries, keys, keys + stride_kv, tables + s * M, 0, tl.load(lens + s),
                     scale, B, D, ROWS, BLOCK_N)
    answer = (o / z[:, None]).to(out.dtype.element_ty)
    tl.store(out + numbers, answer, mask=(row < R)[:, None])


# %%
H, G = 6, 2
cache = stored(tables, contexts, N, B, G, D)
q = torch.randn(2, H, D)
out = torch.full_like(q, torch.nan)
grouped_kernel[(2, G)](out, q, cache, tables, lens, M, D**-0.5, *cache.stride()[:2],
                       R=H // G, B=B, D=D, ROWS=16, BLOCK_N=16)
assert torch.allclose(out, plain(q, cache, tables, contexts), atol=1e-5)
print(f"{2 * G} programs, {H // G} query heads in each: equal")


# %% [markdown]
# ### Splitting the context
#
# S sequences and G heads make S·G programs. With many users that is plenty. With one user and G=8 it is 8, and 124 of
# 132 multiprocessors have nothing to do, however long the context is. The cure is **split-KV**, also known as
# flash-decoding: cut the context as well. Each program takes a part of the positions, and leaves its own m, z
# and o in memory. A second kernel **merges** them. The rule for that is the online softmax once more, with splits in
# place of tiles:
#
# $$ m = \max_i m_i, \qquad \text{answer} = \frac{\sum_i e^{m_i - m}\, o_i}{\sum_i e^{m_i - m}\, z_i} $$
#
# The grid gets a third direction. To see what ran, each program also counts its visit and notes its range. It
# counts with `tl.atomic_add`: reading, adding and writing in one step that no other program can come between.

# %%
@triton.jit
def split_kernel(part_m, part_z, part_o, visits, ranges, q, cache, tables, lens, M, scale,
                 stride_kv, stride_g, R: tl.constexpr, B: tl.constexpr, D: tl.constexpr,
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
    me = (s * G + g) * splits + i
    tl.atomic_add(visits + me, 1)
    tl.store(ranges + me * 2, begin)
    tl.store(ranges + me * 2 + 1, end)


# %%
@triton.jit
def merge_kernel(out, part_m, part_z, part_o, SPLITS: tl.constexpr, D: tl.constexpr):
    """One query head of one sequence. Grid: S * H."""
    place = tl.program_id(0) * SPLITS + tl.arange(0, SPLITS)
    d = tl.arange(0, D)
    m, z = tl.load(part_m + place), tl.load(part_z + place)
    o = tl.load(part_o + place[:, None] * D + d[None, :])  # [SPLITS, D]
    weight = tl.exp(m - tl.max(m, 0))
    total = tl.sum(weight * z, 0)
    answer = tl.sum(weight[:, None] * o, 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + tl.program_id(0) * D + d, answer.to(out.dtype.element_ty))


# %% [markdown]
# A part without keys has z = 0 and o = 0 and adds nothing. If a sequence has no tokens at all, everything is 0, and
# `tl.where` keeps the division from making NaN of it. Now the function that a caller sees:

# %%
def paged_decode(q, cache, tables, contexts, splits=1, BLOCK_N=16):
    """q [S, H, D], cache [2, G, N, B, D], tables [S, M], contexts [S] -> out, visits, ranges.

    One query a sequence. splits, BLOCK_N and D are powers of two.
    """
    (S, H, D), (_, G, _, B, _) = q.shape, cache.shape
    R, M = H // G, tables.shape[1]
    lens = torch.as_tensor(contexts, dtype=torch.int32)
    ROWS = max(16, triton.next_power_of_2(R))
    part_m, part_z = torch.full((2, S, H, splits), torch.nan)
    part_o = torch.full((S, H, splits, D), torch.nan)
    visits = torch.zeros(S, G, splits, dtype=torch.int32)
    ranges = torch.full((S, G, splits, 2), -1, dtype=torch.int32)
    split_kernel[(S, G, splits)](
        part_m, part_z, part_o, visits, ranges, q, cache, tables, lens, M, D**-0.5,
        *cache.stride()[:2], R=R, B=B, D=D, ROWS=ROWS, BLOCK_N=BLOCK_N)
    out = torch.full_like(q, torch.nan)
    merge_kernel[(S * H,)](out, part_m, part_z, part_o, SPLITS=splits, D=D)
    return out, visits, ranges


# %%
expected = plain(q, cache, tables, contexts)
for splits in (1, 2, 4):
    out, visits, ranges = paged_decode(q, cache, tables, contexts, splits, BLOCK_N=4)
    assert torch.allclose(out, expected, atol=1e-5)
    assert (visits == 1).all()  # every (sequence, head, split) ran, and ran once
    lengths = (ranges[..., 1] - ranges[..., 0]).sum(-1)
    assert (lengths == lens[:, None]).all()  # together they took the whole context
    print(f"splits={splits}: {visits.numel():2} programs, A cut into {ranges[0, 0].tolist()}")

# %% [markdown]
# A context of 9 makes three tiles of 4. Four splits take one tile each, and the last one nothing. Here is who took
# what, for a longer context and a shorter one:

# %%
longer = [60, 23]
some, count = scrambled(longer, B)
pool = stored(some, longer, count, B, G, D)
out, visits, ranges = paged_decode(q, pool, some, longer, splits=4, BLOCK_N=8)
assert torch.allclose(out, plain(q, pool, some, longer), atol=1e-5) and (visits == 1).all()

# %%
kinds = ["tokens", "other", "third", "shared"]
rows = {}
for name, parts in zip("AB", ranges[:, 0].tolist()):
    taken = [(end - begin, kinds[i], f"split {i}") for i, (begin, end) in enumerate(parts)]
    rows[f"sequence {name}"] = [part for part in taken if part[0]]
alt = "A's 60 positions in parts of 16, 16, 16 and 12; B's 23 in three parts of 8, 8 and 7."
title = "Who reads which positions (head 0, 4 splits)"
with plots.figure(title, "position", size=(6.8, 1.7), alt=alt) as axes:
    plots.strips(axes, rows, kinds=False)

# %% [markdown]
# ### What the GPU does with it
#
# Everything from here to "Did it compile?" is arithmetic, on NVIDIA's data sheet of the H100 (SXM) and its architecture
# paper: 132 multiprocessors, 3.35 TB/s from memory, 989 TFLOP/s in fp16 or bf16.
#
# **A program runs on one multiprocessor**, and stays there. Its tiles are shared out among threads, in groups of 32
# that go in step, called **warps**. You never write a thread in Triton: which one holds which number is the compiler's
# affair.
#
# **Decode waits for memory.** Each number that comes from the cache is used R times and then dropped. A key takes 2·D
# operations for each of R heads, and a value as many. Both together are 4·D bytes in fp16:

# %%
PROCESSORS, BANDWIDTH, ARITHMETIC = 132, 3.35e12, 989e12
R = 4  # Llama-3-8B: 32 query heads, 8 key/value heads
per_byte = R * 4 * D / (4 * D)
print(f"decode: {per_byte:.0f} operations for each byte that is read")
print(f"H100:   {ARITHMETIC / BANDWIDTH:.0f} operations in the time of a byte")

# %% [markdown]
# So the tensor cores idle, and all that counts is how fast bytes come. They can't come faster than the memory gives
# them, and this makes a bound that no kernel can beat: bytes to read, divided by the bandwidth. For the keys and
# values of Llama-3-8B (32 layers, G=8, D=128) in fp16, and its 8 billion weights beside them:

# %%
import numpy as np

per_token = 2 * 32 * 8 * 128 * 2  # bytes: keys and values, layers, heads, numbers, fp16
lengths = np.array([512, 1024, 2048, 4096, 8192, 16384, 32768])
weights = np.full(len(lengths), 8e9 * 2)

# %%
title = "One decode step of Llama-3-8B on an H100: a bound, not a measurement"
alt = ("Least milliseconds over the context, both logarithmic: rising lines for 1, 8 and 32 "
       "sequences, a flat one at 4.8 for the weights. S=8 crosses it near 15,000.")
with plots.figure(title, "context, tokens", "milliseconds, at least", alt=alt) as axes:
    for S in (1, 8, 32):
        read = S * per_token * lengths
        plots.line(axes, lengths, 1000 * read / BANDWIDTH, f"S={S}, KV")
    plots.line(axes, lengths, 1000 * weights / BANDWIDTH, "all weights", marker="")
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
    axes.minorticks_off()

# %% [markdown]
# The weights are read once a step for everyone, keys and values for each sequence. With many users and long contexts
# the cache is the larger part, and this kernel is what the step waits for.
#
# **Enough programs.** One multiprocessor alone can't fetch all that the memory gives, so all of them should have work.
# With G=8 it takes 17 sequences, which make 136 programs. Fewer leave some idle, and split-KV is what gives
# them work: 17 splits of one long context are as many programs. With many more sequences there is nothing to gain, and
# the second kernel would be a loss.
#
# **Neighbours in one piece.** Memory gives its bytes in **sectors** of 32. Load one number and its whole sector comes.
# Threads of a warp whose numbers lie side by side share sectors, and the loads are **coalesced**. Does paging spoil
# that? In our cache [2, G, N, B, D] a block of one head is B·D numbers in one run. We can count: every sector that a
# tile of 64 keys touches in a scrambled pool, beside those that its bytes would fill.

# %%
def sectors(B, D, tile=64):
    """32-byte sectors that a tile touches in a scrambled pool, and how few would do."""
    table = torch.randperm(100 * tile)[: blocks_for(tile, B)]
    j = torch.arange(tile)
    numbers = (table[j // B] * B + j % B)[:, None] * D + torch.arange(D)
    return len((numbers * 2 // 32).unique()), tile * D * 2 // 32


# %%
for size, head_size in [(1, 64), (16, 64), (1, 20), (16, 20)]:
    touched, least = sectors(size, head_size)
    print(f"B={size:2}, D={head_size}: {touched} sectors touched, {least} would do")

# %% [markdown]
# With D=64 scrambled blocks cost not one sector more, whatever B is. With an awkward size like D=20 a slot is no whole
# number of sectors, and at B=1 much of what comes belongs to strangers. Most models have 64 or 128. So it is not the
# loads of keys that speak against B=1. It is the tables: an entry for every token, to be kept and sent by Python at
# each step and to be read by every program. Chapter 6 weighs that against the waste of large blocks.
#
# ### Did it compile?
#
# The interpreter accepts things that the compiler would not. It needs no GPU to find out: Triton can compile for one
# that is not there, down to **PTX**, NVIDIA's assembly language. The interpreter must be off, so this takes a Python of
# its own. (`aligned` says which pointers and strides are multiples of 16; a launch would find that out by itself.)

# %%
import inspect

parts = [load_rows, absorb_rows, attend, grouped_kernel]
COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

pointers = dict(out="*fp16", q="*fp16", cache="*fp16", tables="*i32", lens="*i32")
counts = dict(M="i32", scale="fp32", stride_kv="i64", stride_g="i64")
sizes = dict(R=4, B=16, D=128, ROWS=16, BLOCK_N=64)
aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 7, 8)}
signature = pointers | counts | dict.fromkeys(sizes, "constexpr")
source = ASTSource(grouped_kernel, signature, sizes, aligned)
print(triton.compile(source, GPUTarget("cuda", 90, 32)).asm["ptx"])
"""
script = "import triton\nimport triton.language as tl\nNONE = tl.constexpr(-1.0e38)\n"
script += "".join(inspect.getsource(kernel.fn) for kernel in parts) + COMPILE

# %%
import re
import subprocess
import sys
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    Path(folder, "mine.py").write_text(script)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = folder
    command = [sys.executable, str(Path(folder, "mine.py"))]
    kept = dict(capture_output=True, text=True, check=True)
    ptx = subprocess.run(command, env=environment, **kept).stdout

# %%
finds = {
    "compiled for an H100": r"\.target sm_90",
    "products on tensor cores, fp16": r"mma\.sync\S*\.f16\.f16",
    "exponentials in hardware": r"ex2\.approx",
    "16 bytes to a load, on the way ahead of time": r"cp\.async\S* [^;]*\b(16|0x10)\b",
}
for what, pattern in finds.items():
    print(f"{what:45} {bool(re.search(pattern, ptx))}")

# %% [markdown]
# Keys are even asked for some iterations before they are needed (`cp.async`), and none of this is in our source: the
# compiler did it. That it compiles is no proof that it is fast. `python -m kernels.bench` measures the package's
# kernels on a GPU of yours.
#
# ## Check it
#
# One example proves little. So: random shapes, tables and block sizes, one or several heads to a group, fp32 and fp16,
# NaN in every slot outside the contexts, any number of splits, also more than there are tiles. Cases are few and
# contexts short, for the interpreter's sake. The package's own tests (`tests/test_triton.py`) draw more, and use a GPU
# where there is one.

# %%
def random_case(seed, dtype=torch.float32):
    """(q, cache, tables, contexts) of a small random batch."""
    torch.manual_seed(seed)
    pick = random.Random(seed)
    contexts = [pick.randint(1, 40) for _ in range(pick.randint(1, 2))]
    B, D = pick.choice([1, 2, 3, 7, 16, 64]), pick.choice([16, 32])
    H, G = pick.choice([(1, 1), (3, 1), (2, 2), (20, 1)])
    tables, N = scrambled(contexts, B)
    cache = stored(tables, contexts, N, B, G, D, dtype)
    return torch.randn(len(contexts), H, D).to(dtype), cache, tables, contexts


# %%
seen = set()
for seed in range(12):
    dtype = (torch.float32, torch.float16)[seed % 2]
    case = q, cache, tables, contexts = random_case(seed, dtype)
    splits = random.Random(seed).choice([1, 2, 4])
    out, visits, ranges = paged_decode(*case, splits, BLOCK_N=16)
    assert torch.allclose(out, plain(*case), atol=1e-5 if dtype == torch.float32 else 3e-3)
    assert (visits == 1).all()
    empty = (ranges[..., 0] == ranges[..., 1]).any()
    seen.add(f"{splits} splits" + (", some of them empty" if empty else ""))
print("12 random cases agree; among them:", *sorted(seen), sep="\n  ")

# %% [markdown]
# And does such a comparison see a single wrong slot? We spoil one value of one head, somewhere in the middle of a
# context. The rows of exactly that sequence and group must be lost:

# %%
pool, q = stored(some, longer, count, B, G, D), torch.randn(2, H, D)
pool[1, 1, some[0, 37 // B], 37 % B] = torch.nan  # sequence 0, position 37, head 1
out, _, _ = paged_decode(q, pool, some, longer, splits=4)
for s, lost in enumerate(out.isnan().all(-1)):
    print(f"sequence {s}: lost heads {lost.nonzero().flatten().tolist()}")
assert out[0, 3:].isnan().all() and out[0, :3].isfinite().all() and out[1].isfinite().all()

# %% [markdown]
# What can a check under the interpreter not show? Speed; races between programs (see below); and bf16, which this
# interpreter computes wrongly, so the package refuses it here.
#
# ## The package's version
#
# The package's kernel computes decode, prefill and any mix of them. Its heart is the loop that you have written:

# %%
from kernels import triton_attention, triton_cache, triton_tiles

show_source(triton_attention._attend)

# %% [markdown]
# What is more, and why:
#
# - **Powers of two.** $e^x = 2^{x \log_2 e}$, and the hardware computes powers of two. So $\log_2 e$ goes into the
#   scale (`scale_log2`), which costs nothing, and `exp2` is used throughout.
# - **`D_PAD`.** A head size like 80 is no power of two; tiles are padded, and the mask covers the padding.
# - **`MASKED`.** In a prefill a tile holds queries at many positions, and none may look ahead. Keys that every query of
#   the tile may see need no mask at all, so the loop runs twice: without masks, and with. `MASKED` is a
#   constant when the kernel is compiled, and each of the two contains only what it needs. (Decode has the second only.)
# - **`SCALED`.** Keys and values may lie there in eight bits, with a scale for each: products are multiplied by the
#   keys' scales, and values by theirs.
# - **`tl.dot(p, v, o * shrink)`** adds the product to what `o` holds already, as tensor cores do anyway.
#
# The kernel around it has strides for everything, and its merging is the one that you know.
#
# ### Whose queries are these?
#
# In the flat batch the queries of all sequences stand in one row, and some bring one query, others hundreds. A tile
# takes TILE_Q queries of *one* sequence, with R heads each: row r is head r % R of query r // R. How does a program
# learn from its id whose tile it has? Going through all sequences would take time, and a list made beforehand would
# have to be sent each step. The trick: let the tiles of sequence s begin at number `query_start[s] // TILE_Q + s`. That
# leaves room for every tile, and at times for one too many, which ends at once. In Python:

# %%
def tiles(query_start, TILE_Q):
    """(s, its first query in the tile, how many of them) for each program."""
    S = len(query_start) - 1
    for tile in range(query_start[-1] // TILE_Q + S):
        s = max(s for s in range(S) if query_start[s] // TILE_Q + s <= tile)
        first = (tile - s - query_start[s] // TILE_Q) * TILE_Q
        yield s, first, max(0, min(TILE_Q, query_start[s + 1] - query_start[s] - first))


for row in tiles([0, 1, 7, 8, 17], TILE_Q=4):  # 1, 6, 1 and 9 queries
    print(row, end=" ")

# %% [markdown]
# (The fifth, of the third sequence, is the one too many: it has 0 queries.) Does it always hold?

# %%
for trial in range(300):
    pick = random.Random(trial)
    counts = [pick.randint(0, 20) for _ in range(pick.randint(1, 8))]
    starts, TILE_Q = np.cumsum([0, *counts]).tolist(), pick.randint(1, 8)
    taken = [(s, first + k) for s, first, n in tiles(starts, TILE_Q) for k in range(n)]
    assert sorted(taken) == [(s, k) for s, n in enumerate(counts) for k in range(n)]
print("300 random batches: each query in exactly one tile")

# %% [markdown]
# The package finds that `max` by bisection, a dozen loads for 4096 sequences:

# %%
show_source(triton_attention._find_queries)

# %% [markdown]
# ### How many splits?
#
# More splits are not always better. Programs run in **waves**: if 264 fit at a time (two on each of 132
# multiprocessors), 265 take about as long as 528. So the package looks at how full the waves are, and takes the
# smallest number of splits that comes within a tenth of the best. With one user and G=8:

# %%
def full(splits, programs=8, places=2 * PROCESSORS):
    waves = programs * splits / places
    return waves / np.ceil(waves)


chosen = triton_tiles.choose_splits(8, 32768, PROCESSORS)
choices = np.arange(1, 129)
assert chosen == choices[full(choices) >= 0.9 * full(choices).max()][0]

# %%
alt = ("A saw: the share of places in use rises to 100 % at 33 splits and falls to half at 34; "
       "the next teeth are less deep. 30, just before the first point, is chosen.")
title = "How full the waves are: 8 programs, split"
with plots.figure(title, "splits", "places in use, %", alt=alt) as axes:
    axes.plot(choices, 100 * full(choices), color=plots.COLORS[0])
    plots.note(axes, chosen, 100 * full(chosen), f"chosen: {chosen}", dx=-40, dy=-30)

# %%
show_source(triton_tiles.choose_splits)

# %% [markdown]
# And what is not in the source of a kernel, but in the way it is called:
#
# - **Nobody waits.** A Python `if` on a number that a GPU has computed would stop everything until it arrives. The
#   launch uses only what the CPU knows anyway: shapes, and two maxima that come with the batch. So a step can
#   also be recorded once and replayed as a **CUDA graph**. Recorded steps have fixed sizes, so they bring sequences
#   of 0 tokens that fill them up.
# - **`do_not_specialize`.** Triton compiles a kernel anew when an integer is 1 or a multiple of 16, for better
#   code. For a number that changes in every step, such as the count of sequences, that would mean compiling in the
#   middle of an answer.
# - **Fixed tiles, no autotuning.** `choose_tiles` decides from the shapes, so what the tests compile is what runs.
#
# ### They agree
#
# First ours and the package's, on random decode batches:

# %%
def package_attention(q, cache, tables, contexts, counts, splits=None):
    """The package's kernel for counts[s] queries of each sequence s."""
    starts, lens = torch.tensor([0, *counts]).cumsum(0), torch.as_tensor(contexts)
    sizes = q.shape[2] ** -0.5, max(counts), max(contexts), splits
    return triton_attention.paged_attention(q, cache, starts, lens, tables, *sizes)


# %%
for seed in range(100, 110):
    case = random_case(seed)
    splits = random.Random(seed).choice([1, 2])
    mine, visits, _ = paged_decode(*case, splits)
    theirs = package_attention(*case, counts=[1] * len(case[3]), splits=splits)
    assert torch.allclose(mine, theirs, atol=1e-5) and (visits == 1).all()
print("10 random batches: the same")

# %% [markdown]
# Then a batch that ours can't do: 1 query over 21 tokens, a whole prompt of 9, and the last 5 of 30.

# %%
torch.manual_seed(7)
contexts, counts = [21, 9, 30], [1, 9, 5]
tables, N = scrambled(contexts, B)
cache = stored(tables, contexts, N, B, G=2, D=16)
q = torch.randn(sum(counts), 6, 16)
starts, lens = torch.tensor([0, *counts]).cumsum(0), torch.tensor(contexts)
expected = reference.paged_attention(q, cache, starts, lens, tables, 0.25)
theirs = package_attention(q, cache, tables, contexts, counts)
assert torch.allclose(theirs, expected, atol=1e-5)
print("decode, prefill and a chunk in one batch: the same as the reference")

# %% [markdown]
# ### And the engine
#
# The whole engine runs under the interpreter as well, but with a real model every token takes long. Here we leave the
# model of chapter 1 only its first two layers. It talks nonsense, but it must be the same nonsense with every backend.

# %%
from minipaged import LLM, SamplingParams


def nonsense(kernels):
    """Two samples of a prompt and one of another -> (token ids, the engine)."""
    llm = LLM("smollm2", kernels=kernels, device="cpu", dtype="float32", block_size=4,
              num_blocks=16, debug=True)
    llm.executor.runner.model.layers = llm.executor.runner.model.layers[:2]
    llm.executor.runner.cache = llm.executor.runner.cache[:2]
    params = [SamplingParams(n=2, max_tokens=4, seed=1, ignore_eos=True),
              SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)]
    outputs = llm.generate([[5, 6, 7, 8, 9, 10], [40, 41, 42]], params)
    return [sample.token_ids for output in outputs for sample in output.outputs], llm


# %%
from unittest import mock

modules = triton_attention, triton_cache
attention, copying = (mock.Mock(wraps=module._launch) for module in modules)  # both counted
with mock.patch.object(modules[0], "_launch", attention), \
     mock.patch.object(modules[1], "_launch", copying):
    by_triton, llm = nonsense("triton")
by_torch, _ = nonsense("torch")
assert by_triton == by_torch and by_triton[0] != by_triton[1]
assert llm.stats().memory.copies == copying.call_count == 1  # a block was copied, by a kernel
steps = llm.stats().num_steps
print(attention.call_count, "launches of attention in", steps, "steps of 2 layers")

# %% [markdown]
# (Sequences of one query have a launch of their own, with tiles made for decode. So a step that may have both kinds, as
# the first one here, launches twice in each layer.)
#
# Two samples shared the block in which their prompt ends. Before the first of them wrote into it, it got a copy, and
# that copy was made by a kernel, too. `debug=True` fills freed blocks with NaN, so a stale read would have shown.
#
# ## What must hold, and what breaks if it doesn't
#
# **What lies outside is never loaded.** Its weight is 0, so why mind? Because free slots hold anything, the NaN of a
# debug run or what others left there, and 0 · NaN is NaN. Here `load_rows` without its mask:

# %%
tables, contexts, N = tables_of(memory, S=2), [9, 6], 8
cache, q = stored(tables, contexts, N, B, G, D), torch.randn(2, H, D)
whole, _, _ = paged_decode(q, cache, tables, contexts)
masked = load_rows


@triton.jit
def load_rows(pointers, inside):
    return tl.load(pointers)


# %%
broken, _, _ = paged_decode(q, cache, tables, contexts)
load_rows = masked
assert whole.isfinite().all() and broken.isnan().any()
print(f"NaN without the mask: {broken.isnan().float().mean():.0%} of the answer")

# %% [markdown]
# **Addresses have 64 bits.** Tables hold 32-bit integers, and Triton multiplies what it is given. A pool of 64 GiB for
# GPT-2 (12 layers, 12 heads, D=64, fp16) has 2.9 billion numbers in each layer. An integer of 32 bits ends at 2.1
# billion:

# %%
@triton.jit
def product_kernel(out, table, stride):
    head = tl.load(table)
    tl.store(out, head * stride)
    tl.store(out + 1, head.to(tl.int64) * stride)


# %%
blocks = 2**36 // (2 * 12 * 12 * 16 * 64 * 2)  # N
stride_g = blocks * 16 * 64  # numbers from one head to the next
products = torch.zeros(2, dtype=torch.int64)
product_kernel[(1,)](products, torch.tensor([12 + 11], dtype=torch.int32), stride_g)
print(f"the values of head 11 begin at number {products[1]:,}; in 32 bits at {products[0]:,}")
assert products[1] == 23 * stride_g > 2**31 > 0 > products[0]

# %% [markdown]
# A negative address: some 3 GB before the pool, in somebody else's memory. Tests with small pools never see it. The
# package's tests use a pool of 100,000 blocks, of which only those that are touched take memory.
#
# **`m` starts at a finite number.** With minus infinity all goes well until some row has no key at all, such as a
# sequence of 0 tokens that only fills up a recorded step. Then $m_i - m$ is $-\infty - (-\infty)$:

# %%
finite, NONE = NONE, tl.constexpr(float("-inf"))
with np.errstate(invalid="ignore"):
    broken, _, _ = paged_decode(q, cache, tables, [9, 0], splits=2)
NONE = finite
fine, _, _ = paged_decode(q, cache, tables, [9, 0], splits=2)
assert broken[0].isfinite().all() and broken[1].isnan().all()
assert fine[0].equal(broken[0]) and (fine[1] == 0).all()
print("a sequence of no tokens: NaN with -inf, 0 with", f"{finite.value:.0e}")


# %% [markdown]
# **No two programs write to the same place.** And here the interpreter lies to you. Sixteen programs count themselves:
# each reads the total, adds 1, and writes it back.

# %%
@triton.jit
def count_kernel(total):
    tl.store(total, tl.load(total) + 1)


total = torch.zeros(1, dtype=torch.int32)
count_kernel[(16,)](total)
print("one after another:", total.item())


# %% [markdown]
# Sixteen, which is "right". But the interpreter runs one program after another, and a GPU runs them at once. If all of
# them read before any has written, each writes 1. A tile shows it, since all its loads come before all its stores. Here
# the sixteen are the places of one tile:

# %%
@triton.jit
def at_once_kernel(total, ATOMIC: tl.constexpr):
    place = total + tl.zeros([16], tl.int32)  # sixteen times the same address
    if ATOMIC:
        tl.atomic_add(place, 1)
    else:
        tl.store(place, tl.load(place) + 1)


for atomic in (False, True):
    at_once_kernel[(1,)](total.zero_(), ATOMIC=atomic)
    print("all at once:", total.item(), "with atomic_add" if atomic else "")

# %% [markdown]
# This is a **race**. A GPU may give anything from 1 to 16, and another number the next time; the interpreter always
# gave 16. `atomic_add` would help for whole numbers. For sums of floats it adds in whatever order programs come, and
# rounds differently each time. So our splits don't add into one output. Each writes to a place of its own, and the
# next launch, which begins when all of them are done, merges them.
#
# **Tables are right before the launch.** A kernel does not check an entry. A block that does not exist is an address
# like any other. Here the pool is a part of a larger tensor, and next to it lies what belongs to someone else:

# %%
building = torch.full((2, G, N + 1, B, D), 9.0)  # block 8 is not in the pool
building[:, :, :N] = cache
bad = tables.clone()
bad[1, 1] = N
stolen, _, _ = paged_decode(q, building[:, :, :N], bad, contexts)
assert stolen.isfinite().all() and not torch.allclose(stolen[1], whole[1], atol=0.1)
print(f"no error, no NaN; sequence B got values up to {stolen[1].max():.1f}")


# %% [markdown]
# It read its neighbour's numbers. Further away there would have been a crash, or another user's text. In the engine
# nobody but the memory manager writes tables. With `debug=True` its `check()` runs after every step, and before
# every step the runner looks at all tables, on the CPU, where they are made:

# %%
from types import SimpleNamespace

wrong = SimpleNamespace(seq_id=1, block_table=[5, 16])
try:
    llm.executor.runner.batches._check([wrong])
except IndexError as error:
    print(error)

# %% [markdown]
# ## Exercises
#
# Each is followed by a test. Where it is about a kernel, write the kernel above the function; what is tested is the
# function that launches it.
#
# **1. Addresses of a tile** (warm-up). In PyTorch, no kernel: the integers that a program adds to its pointer.

# %% tags=["exercise"]
def tile_numbers(table, first, context, B, D, BLOCK_N):
    """Where the tile of the positions first .. first + BLOCK_N - 1 lies in keys [N, B, D].

    table: int32, the entries that `context` positions need, and no more.
    Returns numbers [BLOCK_N, D], int64, those of slot 0 of block 0 for a position outside
    the context; and inside [BLOCK_N], bool, which positions are in it.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_tile_numbers(tile_numbers):
    for seed in range(50):
        pick = random.Random(seed)
        context, B, D = pick.randint(1, 60), pick.choice([1, 3, 16]), pick.choice([16, 128])
        blocks = [pick.randrange(3_000_000) for _ in range(blocks_for(context, B))]
        first = pick.randrange(0, context, 8)
        table = torch.tensor(blocks, dtype=torch.int32)
        numbers, inside = tile_numbers(table, first, context, B, D, 8)
        assert inside.tolist() == [j < context for j in range(first, first + 8)], "inside"
        assert numbers.shape == (8, D) and numbers.dtype == torch.int64, "shape and dtype"
        for j, row in zip(range(first, first + 8), numbers.tolist()):
            slot = blocks[j // B] * B + j % B if j < context else 0
            right = list(range(slot * D, slot * D + D))
            assert row == right, f"position {j} of {context}, B={B}, D={D}"


attempt(test_tile_numbers, tile_numbers)

# %% [markdown]
# **2. Write the new keys.** The other half of every step: the keys and values of T new tokens go to their slots, all
# heads. A slot is `block * B + offset`; that of a token which should leave nothing is -1. The cache may be a part of a
# larger tensor, so use its strides.

# %% tags=["exercise"]
def write_kv(k, v, cache, slots):
    """k and v [T, G, D] into cache [2, G, N, B, D] at slots [T], int32; -1 writes nothing.

    k and v are in one piece; so is each block of one head. G * D is a power of two.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_write_kv(write_kv):
    for G, B, D in [(1, 4, 16), (2, 3, 16), (4, 1, 8)]:
        k, v = torch.randn(2, 4, G, D)
        building = torch.full((2, G, 9, B, D), torch.nan)  # the pool is its blocks 1 to 7
        expected = building.clone()
        slots = torch.tensor([2, -1, 7 * B - 1, 0], dtype=torch.int32)
        reference.write_kv(k, v, expected[:, :, 1:8], slots)
        write_kv(k, v, building[:, :, 1:8], slots)
        right = torch.equal(building.nan_to_num(99), expected.nan_to_num(99))
        more = building.isfinite().sum() > expected.isfinite().sum()
        assert right, f"written {'elsewhere, too' if more else 'wrongly'}: G={G}, B={B}"


attempt(test_write_kv, write_kv)

# %% [markdown]
# **3. Copy blocks, in no order.** Copy-on-write and defragmenting copy several blocks in one launch. A block may be
# the source of one pair and the target of another, and then its *old* contents are meant. One program a pair is a
# race, and even the interpreter can show this one. Cut the work so that no program reads what another writes. (On a
# GPU the threads of a program need a `tl.debug_barrier()` between its loads and its stores, too.)

# %% tags=["exercise"]
def copy_blocks(cache, source, target):
    """Copy block source[i] of cache [2, G, N, B, D] to block target[i], in all heads.

    source and target [C], int32, C <= 16; targets are distinct. The cache is in one piece,
    and B * D may be any number. Every source counts as it was before. One launch.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_copy_blocks(copy_blocks):
    low, high, ring = [0, 1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 0]
    back = low[::-1], high[::-1]
    cases = [([3], [0]), (low, ring), (ring, low), (low, high), back, (high, low)]
    for source, target in cases:
        cache = torch.randn(2, 2, 6, 3, 8)
        expected = cache.clone()
        expected[:, :, target] = cache[:, :, source]
        pairs = torch.tensor([source, target], dtype=torch.int32)
        copy_blocks(cache, *pairs)
        assert torch.equal(cache, expected), f"{source} -> {target}"


attempt(test_copy_blocks, copy_blocks)

# %% [markdown]
# **4. Any batch** (open). Our kernels take one query a sequence. Write one for the flat batch, in which a sequence
# brings as many queries as it likes, the last ones of its context. The simple way: a program for each query and head
# g, which looks no further than its own position. It reads the keys again for each query. The real thing: tiles of
# queries, as the package has them.

# %% tags=["exercise"]
def mixed_attention(q, cache, query_start, contexts, tables):
    """q [T, H, D] -> out [T, H, D], as reference.paged_attention with the scale 1 / sqrt(D).

    query_start (S + 1 numbers) and contexts (S): lists. Some sequences may bring no queries.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_mixed_attention(mixed_attention):
    batches = [([9], [9]), ([5, 20], [1, 1]), ([20, 7, 12], [5, 1, 0]), ([12, 11], [0, 6])]
    for seed, (contexts, counts) in enumerate(batches):
        torch.manual_seed(seed)
        tables, N = scrambled(contexts, 4)
        cache = stored(tables, contexts, N, 4, G=2, D=16)
        q = torch.randn(sum(counts), 6, 16)
        starts = np.cumsum([0, *counts]).tolist()
        lens = torch.tensor(contexts)
        expected = reference.paged_attention(q, cache, torch.tensor(starts), lens, tables, 0.25)
        got = mixed_attention(q, cache, starts, contexts, tables)
        assert torch.allclose(got, expected, atol=1e-5), f"{counts=}, {contexts=}"


attempt(test_mixed_attention, mixed_attention)

# %% [markdown]
# ## What's next
#
# Chapters 4 to 7 built the memory and the attention that reads it: blocks, page tables,
# [PagedAttention](06_pagedattention.ipynb), and its kernel. What remains is to use it: sharing blocks between
# sequences, deciding who runs in the next step, and the engine around it all. The map in the
# [README](../README.md) shows where each of these lives in the package.
#
# ## Sources
#
# - Tillet, Kung and Cox, *Triton: An Intermediate Language and Compiler for Tiled Neural Network Computations*, 2019.
# - Milakov and Gimelshein, *Online normalizer calculation for softmax*, 2018.
# - Dao, Fu, Ermon, Rudra and Ré, *FlashAttention*, 2022: attention in tiles, never all scores at once.
# - Dao, Haziza, Massa and Sizov, *Flash-Decoding for long-context inference*, 2023: splitting the context.
# - Kwon et al., *Efficient Memory Management for Large Language Model Serving with PagedAttention*, SOSP 2023: its
#   kernels (section 5.1), and block sizes (Figure 18).
# - NVIDIA, *H100 Tensor Core GPU Datasheet*, and *H100 Tensor Core GPU Architecture*: multiprocessors, bandwidth,
#   arithmetic. *CUDA C++ Best Practices Guide*: coalesced loads, sectors of 32 bytes.
