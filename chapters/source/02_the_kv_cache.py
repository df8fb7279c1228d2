# %% [markdown]
# # 2. The KV cache
#
# Chapter 1 sent the whole text through the model for every new token. Nearly all of that work had been done before.
# This chapter finds the two tensors that are worth keeping, keeps them, and counts what that saves and what it costs:
# memory, and a processor that mostly waits.
#
# **You need**: [chapter 1](01_from_weights_to_text.ipynb), or a Llama in your head. **You get**: a decoder that
# computes each token once, the size of its cache in bytes, and the reason why a server wants many sequences at once:
# the rest of the course is about finding room for them.

# %% [markdown]
# ## The question
#
# How much of the work of greedy decoding is done twice? To count it we need a model. Here is chapter 1's again, with
# three small functions taken from the package.

# %%
import time
from itertools import accumulate
from random import Random

import torch
from einops import einsum, rearrange
from torch.nn.functional import linear, softmax

from kernels.packed import floats
from kernels.reference import rms_norm, rope, silu_and_mul
from minipaged.models import ModelConfig, open_checkpoint
from minipaged.models.llama import Llama
from minipaged.models.rope import Rope
from minipaged.teaching import attempt, plots, show_source

_ = torch.set_grad_enabled(False)
torch.set_num_threads(1)  # what we time then depends less on what else the machine does

# %%
checkpoint = open_checkpoint("smollm2")
config, tokenizer = ModelConfig.from_hf(checkpoint.config), checkpoint.tokenizer()
L, E, V = config.num_layers, config.hidden_size, config.vocab_size
H, G, D = config.num_heads, config.num_kv_heads, config.head_size
stored = checkpoint.names(Llama.tensor_shapes(config))
W = {name: floats(checkpoint.tensor(key, torch.float32)) for key, name in stored.items()}
embedding, turn = W["model.embed_tokens.weight"], Rope(config.rope, D, torch.device("cpu"))
print(f"L={L} layers, E={E}, H={H} query heads, G={G} key/value heads, D={D}, V={V}")


# %% [markdown]
# A layer is three steps: make queries, keys and values; attend; finish. Keys and values come heads first,
# `[G, T, D]`, which is how we are going to keep them.

# %%
def weight(layer, name):
    return W[f"model.layers.{layer}.{name}.weight"]


def queries_keys_values(x, layer, positions):
    """Rows x [T, E] -> q [T, H, D], k and v [G, T, D]; q and k turned to their positions."""
    x = rms_norm(x, weight(layer, "input_layernorm"), config.norm_eps)
    w = (weight(layer, f"self_attn.{name}_proj") for name in "qkv")
    q, k, v = (rearrange(x @ one.T, "t (h d) -> t h d", d=D) for one in w)
    cos, sin = turn(positions)
    return rope(q, cos, sin), rope(k, cos, sin).transpose(0, 1), v.transpose(0, 1)


# %% [markdown]
# One thing is new here. Chapter 1 had as many queries as keys. Now there may be fewer: **T** queries, those of the
# *last* T of **C** tokens, and C is called the **context**. With T = C it is chapter 1's attention.

# %%
def attention(q, k, v):
    """q [T, H, D], of the last T of C tokens; k and v [G, C, D], of all of them -> [T, H D]."""
    T, C = len(q), k.shape[1]
    q = rearrange(q, "t (g r) d -> g r t d", g=len(k))
    scores = einsum(q, k, "g r t d, g c d -> g r t c") / q.shape[-1] ** 0.5
    future = torch.ones(T, C, dtype=torch.bool).triu(C - T + 1)
    weights = softmax(scores.masked_fill(future, -torch.inf), -1)
    return rearrange(einsum(weights, v, "g r t c, g c d -> g r t d"), "g r t d -> t (g r d)")


# %% [markdown]
# The rest of a layer looks at no other token:

# %%
def finish(x, o, layer):
    """The rows x [T, E] and attention's answers o [T, H D] -> the rows after this layer."""
    x = x + o @ weight(layer, "self_attn.o_proj").T
    y = rms_norm(x, weight(layer, "post_attention_layernorm"), config.norm_eps)
    gate, up = (y @ weight(layer, f"mlp.{name}_proj").T for name in ("gate", "up"))
    return x + silu_and_mul(torch.cat([gate, up], -1)) @ weight(layer, "mlp.down_proj").T


# %% [markdown]
# And the model, which writes down how many rows it works on each time it runs. A row is one token's E numbers on their
# way through all layers.

# %%
rows = []


def llama(tokens):
    """Token ids [T] -> rows [T, E] after the last norm."""
    rows.append(len(tokens))
    positions, x = torch.arange(len(tokens)), embedding[tokens]
    for layer in range(L):
        q, k, v = queries_keys_values(x, layer, positions)
        x = finish(x, attention(q, k, v), layer)
    return rms_norm(x, W["model.norm.weight"], config.norm_eps)


# %%
def best_token(hidden):
    """One row [E] -> the token with the largest logit."""
    return int((hidden @ embedding.T).argmax())


# %%
def greedy(tokens, steps):
    tokens = list(tokens)
    for _ in range(steps):
        tokens.append(best_token(llama(tokens)[-1]))
    return tokens


# %%
text = "The capital of France is"
prompt = tokenizer.encode(text)
answer = greedy(prompt, 12)
print(tokenizer.decode(answer))
print("rows in each run:", rows)
print(sum(rows), "rows in all, for a text of", len(answer), "tokens")

# %% [markdown]
# 16 of the 17 tokens had to go through the model. (Why not all 17? Nothing was asked about what follows the last
# one.) All other rows are repetition:

# %%
run, old = range(1, 13), [0, *rows[:-1]]  # the first run has nothing to repeat
with plots.figure(
    "Rows that the model works on", "position in the text", "run", size=(6.8, 3),
    alt="One bar for each of 12 runs. The first computes 5 new rows. Each later one computes "
    "one new row and repeats all before it, so that the repeated part is a growing triangle.",
) as axes:
    axes.barh(run, old, color="#e6e6e6", hatch="//", edgecolor="w")
    axes.barh(run, [n - m for n, m in zip(rows, old)], left=old, color=plots.COLORS[0])
    axes.invert_yaxis()
    axes.text(rows[-1] + 0.3, 12, "new", va="center", color=plots.COLORS[0], weight="bold")
    axes.text(4.5, 8, "computed again", va="center", ha="center", backgroundcolor="w")


# %% [markdown]
# The repeated part is a triangle, and a triangle's area grows with the square of its side. For a prompt of P tokens
# and n new ones it is
#
# $$ P + (P + 1) + \ldots + (P + n - 1) = nP + \frac{n (n - 1)}{2} \quad\text{rows, of which}\quad P + n - 1
# \quad\text{are new.} $$

# %%
assert sum(rows) == 12 * 5 + 12 * 11 // 2
for n in (10, 100, 1000):
    every, once = n * 100 + n * (n - 1) // 2, 100 + n - 1
    print(f"prompt 100 output {n:4}: {every:7,} rows, not {once:5,}: {every / once:3.0f} times")

# %% [markdown]
# So the question is: can each row be computed once? It is not obvious that it can. A new token looks back at all old
# ones, at every layer. What does it look at, and does that stay as it was?

# %% [markdown]
# ## The idea
#
# The causal mask lets no token see what comes after it. So nothing in the row of an old token, at any layer, can
# change when a new token is appended. And there is only one place at which rows of different tokens meet: attention,
# where the new token's *query* is multiplied with the *keys* of all tokens, and their *values* are summed up.
#
# ```
#              old tokens                 new token
#         The capital of France is          Paris
#
#  x        .    .    .    .    .              x       computed: one row
#  q        .    .    .    .    .              q
#  k        k    k    k    k    k              k ----> kept, for those to come
#  v        v    v    v    v    v              v ---->
#           |    |    |    |    |              |
#           +----+----+----+----+--------------+
#                          |
#             attention(q, all k, all v)               and so in each of the L layers
# ```
#
# Of an old token, this is asked for again:
#
# | of an old token | again? | why |
# |---|---|---|
# | key and value, at every layer | **yes** | every later query meets them |
# | query | no | it has asked its question |
# | its row `x` between the layers | no | it served to make q, k, v, and the row of the next layer |
# | logits | no | the token that follows it is known |
#
# So we keep the keys and values: the **KV cache**. A token whose keys and values are kept is a **computed** token.
#
# Is it true that they stay as they were? Compute them with five tokens, and again with six:

# %%
def all_keys_values(tokens):
    """Keys and values of all layers: [L, 2, G, T, D]."""
    positions, x, found = torch.arange(len(tokens)), embedding[tokens], []
    for layer in range(L):
        q, k, v = queries_keys_values(x, layer, positions)
        found.append(torch.stack([k, v]))
        x = finish(x, attention(q, k, v), layer)
    return torch.stack(found)


# %%
five, six = all_keys_values(answer[:5]), all_keys_values(answer[:6])
print("five tokens:", list(five.shape), " six:", list(six.shape))
assert torch.allclose(six[:, :, :, :5], five, atol=1e-4)
print(f"all {five.numel():,} numbers of the first five tokens are the same")


# %% [markdown]
# ## Build it
#
# ### A place for keys and values
#
# The cache is one tensor with room for `max_len` tokens, and beside it we remember one number: how many tokens are
# computed. It begins filled with NaN, which spoils everything that it touches: should we ever read a place that nobody
# has written, we will know.

# %%
def new_cache(max_len):
    return torch.full((L, 2, G, max_len, D), torch.nan)


# %%
def write(cache, layer, k, v, start):
    """Keys and values [G, T, D] of the tokens at positions start, start + 1, ..."""
    end = start + k.shape[1]
    cache[layer, 0, :, start:end], cache[layer, 1, :, start:end] = k, v


def read(cache, layer, end):
    """Keys and values [2, G, end, D] of all tokens before position `end`."""
    return cache[layer, :, :, :end]


# %% [markdown]
# ### The model with a cache
#
# Now the model takes only the tokens that are not computed yet, and `num_computed`, from which it knows their
# positions. Compare it with `llama`: new are the positions, and the two lines with `write` and `read`.

# %%
def forward(tokens, cache, num_computed):
    """T token ids, which follow num_computed others -> rows [T, E] after the last norm."""
    rows.append(len(tokens))
    end = num_computed + len(tokens)
    positions, x = torch.arange(num_computed, end), embedding[tokens]
    for layer in range(L):
        q, k, v = queries_keys_values(x, layer, positions)
        write(cache, layer, k, v, num_computed)
        keys, values = read(cache, layer, end)
        x = finish(x, attention(q, keys, values), layer)
    return rms_norm(x, W["model.norm.weight"], config.norm_eps)


# %% [markdown]
# First the whole prompt goes in at once. That is called **prefill**, because it fills the cache:

# %%
cache = new_cache(max_len=32)
hidden = forward(prompt, cache, num_computed=0)
token = best_token(hidden[-1])
print(list(hidden.shape), "= [T, E] ->", tokenizer.decode([token]))

# %% [markdown]
# Then one token at a time. That is called **decode**. Its input is the token that came out last, and nothing else:

# %%
hidden = forward([token], cache, num_computed=len(prompt))
after = best_token(hidden[-1])
print(list(hidden.shape), "= [1, E] ->", repr(tokenizer.decode([after])))
assert [token, after] == answer[5:7]

# %% [markdown]
# One row went in, and yet the model knew what the text is about: it read the rest from the cache. Positions 0 to 5
# are filled now, at every layer, and the others are as they were:

# %%
filled = ~cache.isnan().any(-1)  # [L, 2, G, max_len]
assert (filled == filled[0, 0, 0]).all()  # everywhere the same places
print("".join("#" if f else "." for f in filled[0, 0, 0]))


# %% [markdown]
# ### No phases
#
# Are prefill and decode two procedures? We have written one. It computes whatever is not computed yet: at first that
# is the prompt, and from then on the newest token.

# %%
def generate(tokens, steps):
    """Greedy, with a cache -> all tokens, and the cache."""
    tokens, cache, num_computed = list(tokens), new_cache(len(tokens) + steps), 0
    for _ in range(steps):
        hidden = forward(tokens[num_computed:], cache, num_computed)
        num_computed = len(tokens)
        tokens.append(best_token(hidden[-1]))
    return tokens, cache


# %%
rows.clear()
cached_answer, cache = generate(prompt, 12)
assert cached_answer == answer
assert rows == [5] + 11 * [1] and sum(rows) == len(answer) - 1
print("the same text; rows in each run:", rows, "together", sum(rows))

# %% [markdown]
# Each row is computed once. And since nothing in `forward` says how many tokens must come in, it can be any number: a
# long prompt may be cut into **chunks**. That is why `attention` shifts its mask by C - T: the queries of a chunk are
# the last T of the context, each sees all keys before it, and none sees a later token of the same chunk.
#
# ### What it saves
#
# Not only rows but time. We take a text of random tokens, and compute a token at several places of it, with and
# without the cache.

# %%
def seconds(action, *arguments, tries=2):
    """The best of a few tries: much makes a program slower than it is, nothing faster."""
    times = []
    for _ in range(tries):
        began = time.perf_counter()
        action(*arguments)
        times.append(time.perf_counter() - began)
    return min(times)


# %%
torch.manual_seed(0)
long = torch.randint(V, (257,)).tolist()
long_cache = new_cache(len(long))
_ = forward(long, long_cache, 0)

# %% tags=["measured"]
places = [16, 64, 128, 256]
without = [1e3 * seconds(llama, long[: c + 1], tries=1) for c in places]
with_cache = [1e3 * seconds(forward, [long[c]], long_cache, c) for c in places]
with plots.figure(
    "Time for one more token", "tokens before it", "ms",
    alt="Without a cache the time for a token climbs steadily with the tokens before it; with "
    "one it stays near the bottom and nearly flat.",
) as axes:
    plots.line(axes, places, without, "without cache")
    plots.line(axes, places, with_cache, "with cache")
    axes.set_ylim(0)

# %% [markdown]
# Without a cache, a token costs more the longer the text is. With it, it costs about the same everywhere. Not exactly:
# its query still meets every key, so attention grows with the context. But in texts as short as these that is a small
# part of the work.
#
# ### What it costs: bytes per token
#
# Keys and values (2), for each of L layers, G heads, and D numbers of some bytes each:
#
# $$ \text{bytes per token} = 2 \cdot L \cdot G \cdot D \cdot \text{bytes of a number} $$

# %%
kv_bytes = 2 * L * G * D * 4
assert kv_bytes * cache.shape[3] == cache.nbytes  # what our tensor really takes
print(f"{kv_bytes:,} bytes for each token in fp32, or {kv_bytes / 1024:.0f} KiB")

# %% [markdown]
# A token is one number, and what the model keeps about it takes 45 KiB. Here are larger models with 16 bits for a
# number, in the shapes that they are published with:

# %%
models = {  # L, G, D, longest context, parameters
    "SmolLM2-135M": (30, 3, 64, 8192, 0.135e9),
    "OPT-13B": (40, 40, 128, 2048, 13.0e9),
    "Llama-2-13B": (40, 40, 128, 4096, 13.0e9),
    "Llama-3-8B": (32, 8, 128, 8192, 8.03e9),
}
per_token = {name: 2 * c[0] * c[1] * c[2] * 2 for name, c in models.items()}
for name, (_, _, _, context, _) in models.items():
    whole = per_token[name] * context / 1e9
    print(f"{name:12} {per_token[name]:7,} B a token, {whole:4.2f} GB for its {context} tokens")

# %% [markdown]
# 819,200 bytes for OPT-13B: the paper's 800 KB. (A popular article gives 1.6 GB for Llama-2-13B at its 4096 tokens; it
# is 3.36.) Llama-3-8B has 32 query heads, and 8 heads for keys and values. Each of these serves four query heads, and
# that makes its cache four times smaller.
#
# The package has the same formula:

# %%
from dataclasses import replace

from minipaged.execution.runner import kv_bytes_per_token

for name, shape in models.items():
    layers, kv_heads, size = shape[:3]
    other = replace(config, num_layers=layers, num_kv_heads=kv_heads, head_size=size)
    assert kv_bytes_per_token(other, torch.float16) == per_token[name]
show_source(kv_bytes_per_token)

# %% [markdown]
# Is that much? One sequence's cache is small beside the weights. But the weights are there once, and a server has many
# sequences:

# %%
counts = [1, 2, 4, 8, 16, 32, 64, 128]
with plots.figure(
    "Caches of n sequences of 2048 tokens", "sequences", "times the weights",
    alt="Cache size divided by weight size against the number of sequences, both axes "
    "logarithmic. SmolLM2-135M's caches outweigh it from about 6 sequences on, Llama-2-13B's "
    "from about 15, Llama-3-8B's from about 60.",
) as axes:
    for name in ("SmolLM2-135M", "Llama-2-13B", "Llama-3-8B"):
        share = 2048 * per_token[name] / (2 * models[name][-1])  # of one sequence
        plots.line(axes, counts, [n * share for n in counts], name)
        print(f"{name:12} the weights take as much as {1 / share:2.0f} sequences")
    axes.axhline(1, color=plots.INK, linewidth=0.8)
    axes.text(1, 1.15, "as much as the weights", fontsize=9)
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(counts, counts)
    axes.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
    axes.minorticks_off()

# %% [markdown]
# So the cache becomes the larger part. Why would one want so many sequences at a time? Because of what follows.
#
# ### Why decode waits for memory
#
# Take one product, a weight matrix of $w$ numbers with n rows. It computes: each number of the matrix is multiplied
# and added once for each row, $2 n w$ operations (FLOP). And it moves: the matrix must come from memory, $w$ times 4
# bytes in fp32. (The rows move too; there are few of them.) Both go on at the same time, and the slower one decides:
#
# $$ \text{time} \ge \max\left( \frac{2 n w}{\text{FLOP/s}},\ \frac{4 w}{\text{bytes/s}} \right) $$
#
# FLOP per byte moved is the **arithmetic intensity** of some work: here $n/2$. If it is low, the processor waits for
# memory. The picture of this is the **roofline**: to the left, a slope on which memory decides; to the right, a flat
# roof where arithmetic does; and a **ridge** between them. First, this machine's two numbers, for one of its cores:

# %% tags=["measured"]
big = torch.ones(64 * 2**20)  # 256 MiB: too large to stay in the processor's own caches
bandwidth = big.nbytes / seconds(big.sum, tries=8)
square = torch.ones(1024, 1024)
peak = 2 * 1024**3 / seconds(torch.matmul, square, square, tries=8)
print(f"{bandwidth / 1e9:.0f} GB/s of memory read, {peak / 1e9:.0f} GFLOP/s in a large product")
print(f"ridge at {peak / bandwidth:.0f} FLOP per byte, that is {2 * peak / bandwidth:.0f} rows")

# %% [markdown]
# Your numbers will differ, and a graphics processor's are far larger. What is alike everywhere is that
# several operations could be done in the time in which one byte comes in.
#
# Now the real thing: all products of one step, with the weights of all layers and of the vocabulary, for a batch of n
# rows. A **batch** is the rows that go through the model together; in decode each sequence brings one.

# %%
matrices = [w for w in W.values() if w.dim() == 2]  # all but the norms
total = sum(w.numel() for w in matrices)
batches = [1, 2, 4, 8, 16, 32, 64, 128]
inputs = {(n, w.shape[1]): torch.ones(n, w.shape[1]) for n in batches for w in matrices}


# %%
def products(n):
    """All products of a step with n rows."""
    for w in matrices:
        linear(inputs[n, w.shape[1]], w)


# %% tags=["measured"]
took = {n: seconds(products, n) for n in batches}
roof = {n: max(4 * total / bandwidth, 2 * n * total / peak) for n in batches}
with plots.figures(
    "Work done, GFLOP/s", "Time of a step, ms", size=(7.6, 3.4),
    alt="Left, the roofline: GFLOP/s against rows in the batch, rising as memory allows, "
    "then flat at the peak; the measured points follow below it. Right: the time of a step, "
    "flat for small batches and proportional to the batch for large ones.",
) as (left, right):
    for times, name, dy, color in ((roof, "roof", -7, "k"), (took, "measured", 7, "#0072b2")):
        work = [2 * n * total / times[n] / 1e9 for n in batches]
        plots.line(left, batches, work, "", color=color)
        plots.line(right, batches, [1e3 * times[n] for n in batches], name, dy=dy, color=color)
    for axes in (left, right):
        axes.set_xlabel("rows in the batch")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_major_formatter("{x:.0f}")

# %% [markdown]
# By the roof, a step with several rows takes no longer than a step with one, since the weights must come in anyway:
# **batching is free until it isn't**. Past the ridge each row costs its arithmetic, and time grows with the batch. A
# real machine bends more softly. For a few rows PyTorch lays the weights out anew at each call, which takes time too;
# the package does that once, in `kernels/linear.py`. Still, on the machine that made this page eight rows take far less
# than eight times as long as one.
#
# So one sequence alone is the worst case: the processor waits nearly all the time. A prompt is another matter. Its
# hundred tokens are a hundred rows, so prefill is well over the ridge, where decode is far below it.
#
# ### The one part that a batch does not help
#
# The weights are the same for all sequences. The caches are not: each sequence reads its own. For one token of context
# and one key/value head, attention reads a key and a value, $2 D$ numbers, and does with each of the $H/G$ queries that
# share them $2 D$ operations for the score and $2 D$ for the sum:
#
# $$ \text{intensity} = \frac{4 D \cdot H/G}{2 D \cdot \text{bytes of a number}}
# = \frac{2}{\text{bytes of a number}} \cdot \frac{H}{G} $$
#
# There is no n in it. However many sequences are in the batch, and however long they are, it stays where it is: in 16
# bits at 1 for OPT-13B, which has as many heads for keys as for queries, at 3 for smollm2 and at 4 for Llama-3-8B.

# %% [markdown]
# A look at both kinds of work on this machine, in a step of 1 and of 8 sequences of 1024 tokens each:

# %%
caches = torch.ones(L, 2, 8, G, 1024, D)
queries = torch.ones(8, G, H // G, D)


def attention_of(n):
    """The attention of all layers, for one token of each of n sequences."""
    for keys, values in caches[:, :, :n]:  # [n, G, 1024, D]
        softmax(queries[:n] @ keys.transpose(-1, -2), -1) @ values


# %% tags=["measured"]
one, eight = seconds(attention_of, 1, tries=5), seconds(attention_of, 8)
print(f"products:  1 sequence {1e3 * took[1]:3.0f} ms, 8 sequences {1e3 * took[8]:3.0f} ms")
print(f"attention: 1 sequence {1e3 * one:3.0f} ms, 8 sequences {1e3 * eight:3.0f} ms")

# %% [markdown]
# The weights of the products are read once for all. Attention does everything once for each sequence: it gains nothing.
# And in another sense it is the cache that ends it all: every sequence needs *room* for it.
#
# ### Where the batch ends
#
# Now the numbers of a server. The paper's is an A100 with 40 GB, of which OPT-13B's weights take 26 GB and its cache
# 12 GB (GiB, that is: Table 1 has 15.7 thousand slots). NVIDIA's data sheets give 312 TFLOP/s in 16 bits and 1555 GB/s
# for it, 989 TFLOP/s and 3350 GB/s for the H100 SXM. From here on we calculate, nothing is measured:

# %%
machines = {"A100 40GB": (312e12, 1555e9), "H100 SXM": (989e12, 3350e9)}
for name, (flops, speed) in machines.items():
    print(f"{name}: ridge at {flops / speed:.0f} FLOP per byte, in 16 bits as many rows")

slots = 12 * 2**30 // per_token["OPT-13B"]
print(f"room for {slots:,} tokens: {slots // 2048} sequences of 2048")


# %% [markdown]
# The arithmetic would be in full use with 200 sequences, and there is room for 7 of full length. How long does a step
# take at the least, with n sequences of so many tokens each?

# %%
def least_step(n, context):
    """Seconds for OPT-13B on an A100, n sequences, from the roofline; NaN where memory ends."""
    flops, speed = machines["A100 40GB"]
    read = 26e9 + n * context * per_token["OPT-13B"]
    return max(2 * 13e9 * n / flops, read / speed) if n * context <= slots else torch.nan


# %%
for context in (512, 2048):
    n = slots // context
    used = 2 * 13e9 * n / least_step(n, context) / machines["A100 40GB"][0]
    print(f"{n:2} sequences of {context:4}: at the best {used:.0%} of the arithmetic is used")

# %%
numbers = list(range(1, 401))
with plots.figure(
    "The least time of a step, OPT-13B on an A100 40GB", "sequences", "ms",
    alt="With products alone, flat at 17 ms up to 200 sequences, then rising. With 2048 tokens "
    "each the curve rises steeply and ends at 7 sequences, with 512 at 30, with 128 at 122: "
    "all three end where the memory is full, left of the ridge.",
) as axes:
    for context, name in ((2048, "2048 tokens"), (512, "512"), (128, "128"), (0, "no cache")):
        times = [1e3 * least_step(n, context) for n in numbers]
        last = slots // context - 1 if context else 399
        plots.line(axes, numbers, times, name, at=last, dy=8)
        axes.scatter(numbers[last], times[last], color=axes.lines[-1].get_color())
    axes.set(xscale="log", ylim=(0, 45), xticks=[1, 7, 30, 122, 200, 400])
    axes.set_xticklabels([1, 7, 30, 122, 200, 400])
    axes.minorticks_off()

# %% [markdown]
# The curves with a cache end where it fills the memory, and that is before the ridge, where the products begin to cost
# more. That is the point of this
# chapter: **the size of the batch decides how fast a server is, and the memory for caches decides the size of the
# batch.** Whoever wastes half of that memory serves half as many at a time. Chapter 3 looks at how much was wasted.

# %% [markdown]
# ## Check it
#
# A cache that is wrong in one place may still give fine text. So we compare all rows, and we vary how they come: a
# text cut into random chunks must give, at each position, what `llama` gives for the whole text.

# %%
def random_chunks(count, random):
    """Sizes of chunks, together `count`."""
    cuts = sorted(random.sample(range(1, count), random.randint(1, count - 1)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, count])]


def in_chunks(tokens, sizes, cache):
    ends = accumulate(sizes)
    return torch.cat([forward(tokens[e - n : e], cache, e - n) for n, e in zip(sizes, ends)])


# %%
whole = llama(answer)
for seed in range(3):
    sizes, cache = random_chunks(len(answer), Random(seed)), new_cache(max_len=24)
    assert torch.allclose(in_chunks(answer, sizes, cache), whole, atol=1e-3)
    computed = ~cache.isnan().any(-1)
    assert computed[..., : len(answer)].all() and not computed[..., len(answer) :].any()
    print("chunks", sizes)

# %% [markdown]
# All agree, and each time exactly the computed positions were filled. Next, somebody else's cache. transformers has
# one too, under the name `past_key_values`. We give its Llama our weights and compare the logits *and the contents*:

# %%
import transformers

fields = {k: v for k, v in checkpoint.config.items() if k != "model_type"}
with torch.device("meta"):  # the shapes alone; the weights come from W
    hf_llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
hf_llama.load_state_dict(W | {"lm_head.weight": embedding}, assign=True)
hf_llama.model.rotary_emb = type(hf_llama.model.rotary_emb)(hf_llama.config)

# %%
past, cache, done = None, new_cache(24), 0
for n in (3, 4, 1, 1, 5, 1, 1, 1):
    chunk = answer[done : done + n]
    theirs = hf_llama(torch.tensor([chunk]), past_key_values=past, use_cache=True)
    mine = forward(chunk, cache, done) @ embedding.T
    assert torch.allclose(mine, theirs.logits[0], atol=1e-3)
    past, done = theirs.past_key_values, done + n
print("the same logits at", done, "positions")

# %%
for layer in range(L):
    keys, values = past.layers[layer].keys[0], past.layers[layer].values[0]  # [G, T, D]
    assert keys.shape == (G, done, D)
    assert torch.allclose(cache[layer, 0, :, :done], keys, atol=1e-3)
    assert torch.allclose(cache[layer, 1, :, :done], values, atol=1e-3)
print("and the same keys and values in all", L, "layers")

# %% [markdown]
# ## The package's version
#
# ### Memory
#
# In our tensor a sequence has its `max_len` places in a row. The package cuts that dimension in two: N blocks of B
# places, called **slots**. Nothing else is different, and with blocks in a row it is the same memory.

# %%
import kernels
from kernels import Batch, reference

show_source(kernels.new_cache, reference.write_kv, reference.paged_attention)

# %% [markdown]
# `write_kv` is our `write`, except that each token is told its slot: they need not be in a row. (Where it speaks of
# codes, scales and `quantize`: the package can keep numbers in eight bits, too. Here it doesn't.) `paged_attention` is
# our `read` and `attention`, with two things more:
#
# - **Many sequences.** All their tokens stand in one row, and `query_start` says where each one's begin. There is no
#   padding: three sequences with 40, 1 and 1 tokens to compute are 42 rows.
# - **`context_lens`** says how many tokens of each count, this step's included. It is our `end`. From it and the number
#   of queries comes the mask: the queries are the *last* ones of the context.
#
# Why would one cut the memory into blocks? That takes chapters 3 and 4 to answer; until then our blocks are in a row.
# Do both do the same? On random shapes, contexts and chunks:

# %%
def in_a_row(start, count, M):
    """The Batch of one sequence that computes `count` tokens, with M blocks in a row."""
    return Batch(
        slot_mapping=torch.arange(start, start + count),
        query_start=torch.tensor([0, count]),
        context_lens=torch.tensor([start + count]),
        block_tables=torch.arange(M)[None],
    )


# %%
def one_random_step(random):
    """A sequence of random shape, a random part of it computed before -> our rows, theirs."""
    G, D, r, B = (random.choice(sizes) for sizes in ((1, 2, 3), (4, 8), (1, 2, 4), (1, 4, 16)))
    start, count, M = random.randint(0, 40), random.randint(1, 12), -(-52 // B)
    q, (k, v) = torch.randn(count, G * r, D), torch.randn(2, G, count, D)
    ours = torch.randn(1, 2, G, M * B, D)  # behind `start` lies what others left
    theirs = ours[0].clone().view(2, G, M, B, D)
    batch = in_a_row(start, count, M)
    write(ours, 0, k, v, start)
    reference.write_kv(k.transpose(0, 1), v.transpose(0, 1), theirs, batch.slot_mapping)
    tables = batch.query_start, batch.context_lens, batch.block_tables
    expected = reference.paged_attention(q, theirs, *tables, D**-0.5)
    return attention(q, *read(ours, 0, start + count)), expected.flatten(1)


# %%
random = Random(0)
torch.manual_seed(0)
for _ in range(500):
    ours, theirs = one_random_step(random)
    assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5)
print("500 random steps agree")

# %% [markdown]
# ### Who decides how many tokens
#
# The package knows no phases either. Its `Sequence` has `num_computed_tokens`, and in each step the scheduler gives
# every sequence some of the tokens that are missing: one for certain, more if the step's budget allows.

# %%
from minipaged.scheduling.plan import Step
from minipaged.scheduling.scheduler import Scheduler

show_source(Step.counts_of, Scheduler._scheduled)

# %% [markdown]
# (`grant` says what the budget allows: a very long prompt leaves some of it to others.)
#
# Read `start` and `count` in `_scheduled`: they are our `num_computed` and T. A token is drawn only if `last` holds,
# that is, if after this step nothing is missing. Prompt, chunk of a prompt, one more token: all the same lines. So is
# something that we have not met: if the engine takes a sequence's memory away, it sets `num_computed_tokens` to 0, and
# the sequence computes itself anew as if it had just arrived.
#
# Watch it. Two requests, a short one and a longer one, and at most 8 tokens in a step. An observer is called after each
# step with its plan:

# %%
from minipaged import LLM, SamplingParams

llm = LLM("smollm2", device="cpu", num_blocks=16, max_num_seqs=4, max_num_batched_tokens=8)
assert llm.block_bytes == 16 * kv_bytes

# %%
plans = []
llm.observers.append(lambda plan, output: plans.append(plan))
longer = "A cache is a place where one keeps what one would otherwise have to do again, such as"
greedily = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
outputs = llm.generate([text, longer], greedily)

# %%
for plan in plans:
    words = {}
    for s in plan.sequences:
        words[s.request_id] = f"{s.start:2} +{len(s.token_ids)}" + " *" * bool(s.draw)
    print(f"step {plan.step}   short: {words.get('0', '-'):10} longer: {words.get('1', '-')}")

# %% [markdown]
# Each entry is `start +count`, and `*` marks where a token is drawn. In the first step the short prompt goes in whole,
# and what is left of the 8 goes to the longer one. Then the short one decodes with one token a step *while* the longer
# one is in prefill: rows that are nearly free are put to use. Is each token computed exactly once, and is it our text?

# %%
for name, output in zip(("0", "1"), outputs):
    mine = [s for plan in plans for s in plan.sequences if s.request_id == name]
    spans = [(s.start, s.context_len) for s in mine]
    assert [a for a, _ in spans] == [0] + [b for _, b in spans[:-1]]  # without gap or overlap
    expected = generate(output.prompt_token_ids, 6)[0]
    assert output.prompt_token_ids + output.outputs[0].token_ids == expected
    assert spans[-1][1] == len(expected) - 1
    print(f"{len(expected)} tokens, {spans[-1][1]} computed: {output.outputs[0].text!r}")

# %% [markdown]
# Last, all rows of the whole model: the package's, in random chunks, beside our `llama` without a cache.

# %%
model = llm.executor.runner.model


def package_in_chunks(tokens, sizes, M=2, B=16):
    pool = kernels.new_cache(L, M, B, G, D, torch.float32).fill_(torch.nan)
    parts = []
    for n, end in zip(sizes, accumulate(sizes)):
        ids, positions = torch.tensor(tokens[end - n : end]), torch.arange(end - n, end)
        parts.append(model(ids, positions, pool, in_a_row(end - n, n, M)))
    return torch.cat(parts)


# %%
for seed in range(3):
    sizes = random_chunks(len(answer), Random(seed))
    assert torch.allclose(package_in_chunks(answer, sizes), whole, atol=1e-3)
print("the same rows, however the text is cut")

# %% [markdown]
# ## What must hold, and what breaks if it doesn't
#
# **No token sees the future.** Without it, there is nothing to keep. To see that, we take the mask away: each query is
# given alone, and so counts as the last, and sees all keys. Then a sixth token changes the keys of the first five, at
# every layer but the first:

# %%
causal = attention
attention = lambda q, k, v: torch.cat([causal(q[i : i + 1], k, v) for i in range(len(q))])
five, six = all_keys_values(answer[:5]), all_keys_values(answer[:6])
attention = causal
same = [torch.allclose(six[layer, :, :, :5], five[layer], atol=1e-4) for layer in range(L)]
assert same == [True] + [False] * (L - 1)
print("layers whose keys and values stay as they were:", same.count(True), "of", L)

# %% [markdown]
# That is why models that see both ways, as BERT does, have no KV cache.
#
# **Positions go on where they stopped.** `forward` counts from `num_computed`. A token in decode comes alone, and
# whoever numbers what comes in calls it number 0. The prompt is then right, the first token too, and after it:

# %%
right_turn = turn
turn = lambda positions: right_turn(positions - positions[0])  # each call begins at 0
wrong, _ = generate(prompt, 12)
turn = right_turn
assert wrong[:6] == answer[:6] and wrong != answer
print(tokenizer.decode(wrong))

# %% [markdown]
# **Write first, then read.** A token sees itself: its own key belongs to the context. If decode reads the cache before
# the new keys are in it, each token is blind to itself. We generate so, and then
# compare the rows:

# %%
right_read = read
read = lambda cache, layer, end: right_read(cache, layer, end - (end > len(prompt)))
text_of_wrong, _ = generate(prompt, 12)
wrong = in_chunks(answer, [5] + 12 * [1], new_cache(24))
read = right_read

# %%
off = (wrong - whole).abs().amax(-1) > 1  # for each position
assert off.tolist() == 5 * [False] + 12 * [True]
print("all rows of decode are off; the text:", "same" if text_of_wrong == answer else "other")

# %% [markdown]
# Not a single token of these twelve is different. A test that looks at a text would have passed.

# %% [markdown]
# **Nothing is read beyond what is computed.** Our caches begin as NaN, and no NaN ever came out: that is the proof.
# Suppose we forget `end` and read everything. With NaN behind it we notice at once. With zeros, which look so
# harmless, nobody is told: a key of zeros has a score of 0, and that is a weight like any other.

# %%
read = lambda cache, layer, end: cache[layer]
for filler in (torch.nan, 0.0):
    wrong = forward(answer, new_cache(64).fill_(filler), 0)
    off = (wrong - whole).abs().max()
    assert off.isnan() or off > 1
    print(f"filled with {filler}:", "NaN comes out" if off.isnan() else "wrong, and silent")
read = right_read

# %% [markdown]
# The engine does the same for its tests: `LLM(debug=True)` begins with NaN in its whole pool, and fills each block with
# it when it is freed.
#
# **What is kept belongs to these tokens, from the first to the last.** If a token changes, everything computed *from
# it on* is stale: the keys and values of later tokens were made of rows that had seen the old one. We exchange a word,
# first its own keys and values only, then computing on from it as one must:

# %%
question = "In {}, as you know, the capital is"
before, now = (tokenizer.encode(question.format(c)) for c in ("France", "Italy"))
at, last = before.index(tokenizer.encode(" France")[0]), len(now) - 1
cache = new_cache(32)
_ = forward(before, cache, 0)
_ = forward(now[at : at + 1], cache, at)
stale = forward(now[last:], cache, last)[-1]
again = forward(now[at:], cache, at)[-1]

# %%
for name, hidden in (("one word", stale), ("from there on", again)):
    right = torch.allclose(hidden, llama(now)[-1], atol=1e-2)
    print(f"{name:14}{tokenizer.decode([best_token(hidden)])}:", "right" if right else "wrong")
    assert right == (hidden is again)

# %% [markdown]
# The first is the worst kind of wrong: its text looks right, and its numbers are not. Some other question shows it.
#
# The right way shows something useful. To go *back* nothing has to be cleared: we set `num_computed` to a smaller
# number, and what lies behind it is written over. And the tokens before the change were not computed again: two texts
# that begin alike can share what they have in common. Much later, the prefix cache will do that between requests.

# %% [markdown]
# ## Exercises
#
# **1. How many fit?** (warm-up) A machine has so much memory. Weights go in first, and every sequence must be sure of
# room for its longest text. How many sequences can it promise to serve at a time?

# %% tags=["exercise"]
def largest_batch(memory, weights, per_token, max_len):
    """memory, weights and per_token in bytes, max_len in tokens -> sequences: an int >= 0."""
    raise NotImplementedError


# %% tags=["test"]
def test_largest_batch(largest_batch):
    gib = 2**30
    paper = largest_batch(26 * 10**9 + 12 * gib, 26 * 10**9, 819_200, 2048)
    assert paper == 7, "the paper's server"
    assert largest_batch(1000, 400, 6, 100) == 1, "exactly one fits"
    assert largest_batch(999, 400, 6, 100) == 0, "a byte is missing, so none fits"
    assert largest_batch(1000, 2000, 6, 100) == 0, "not even the weights fit"
    exact = largest_batch(10**18 - 1, 0, 1, 10)
    assert exact == 10**17 - 1 and isinstance(exact, int), "bytes are counted in integers"


attempt(test_largest_batch, largest_batch)

# %% [markdown]
# **2. How long will a step take?** `least_step` was for decode on one machine. Write it for any step: a list of
# sequences, each with the tokens that it computes and its context. Leave the arithmetic of attention out: count its
# reading alone.

# %% tags=["exercise"]
def step_seconds(work, weight_count, per_token, peak, bandwidth, itemsize=2):
    """The least time of a step, in seconds, by the roofline.

    work: (tokens computed, context) of each sequence. Each computed token needs 2 operations
    for each of the weight_count numbers; these are read once a step, itemsize bytes each. Each
    sequence's keys and values are read once, per_token bytes for each token of its context.
    peak: operations/s; bandwidth: bytes/s. An empty step takes no time.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_step_seconds(step_seconds):
    flops, speed = machines["A100 40GB"]
    a100 = dict(weight_count=13 * 10**9, per_token=819_200, peak=flops, bandwidth=speed)

    def close(a, b):
        return abs(a - b) < 1e-9 * abs(b)

    assert step_seconds([], **a100) == 0, "nothing to do"
    for n, context in ((1, 2048), (7, 2048), (30, 512), (122, 128)):
        got = step_seconds([(1, context)] * n, **a100)
        assert close(got, least_step(n, context)), "as least_step"
    different = step_seconds([(1, 10), (1, 30)], **a100)
    assert close(different, (26e9 + 40 * 819_200) / speed), "contexts may differ"
    prompt = step_seconds([(500, 500)], **a100)
    assert close(prompt, 2 * 13e9 * 500 / flops), "a prompt is arithmetic"
    chunk = step_seconds([(100, 1000)] + [(1, 100)] * 5, **a100)
    assert close(chunk, (26e9 + 1500 * 819_200) / speed), "a cache is read once a step"
    assert close(step_seconds([(1, 0)], **a100, itemsize=4), 52e9 / speed), "itemsize counts"


attempt(test_step_seconds, step_seconds)

# %% [markdown]
# **3. A cache with a way back.** Write our cache as a class that looks after its own number, refuses what does not fit,
# and can forget its latest tokens. Its memory is taken once, at the start. (Who needs to forget? *Speculative decoding*
# does: rows are free, so it sends a few guessed tokens along with the newest one, and rolls back those that turn out
# wrong.)

# %% tags=["exercise"]
class KVCache:
    """Keys and values of up to max_len tokens.

    len(cache)            how many tokens are in it
    cache.append(kv)      kv [L, 2, G, T, D] of T more; ValueError, and no change, if too many
    cache.read()          [L, 2, G, len, D], a view of the cache's memory, not a copy
    cache.truncate(n)     keep the first n tokens; ValueError if there are fewer, or if n < 0
    """

    def __init__(self, L, G, max_len, D):
        raise NotImplementedError


# %% tags=["test"]
def test_KVCache(KVCache):
    def refused(action, argument):
        try:
            action(argument)
        except ValueError:
            return True
        return False

    for seed in range(30):
        torch.manual_seed(seed)
        random, model = Random(seed), torch.empty(2, 2, 3, 0, 4)
        cache, places = KVCache(2, 3, 16, 4), set()
        for _ in range(40):
            n = random.randint(-1, 17)
            if random.random() < 0.6:
                kv = torch.randn(2, 2, 3, random.randint(1, 6), 4)
                fits = model.shape[3] + kv.shape[3] <= 16
                assert refused(cache.append, kv) != fits, "ValueError just if it doesn't fit"
                model = torch.cat([model, kv], 3) if fits else model
            else:
                inside = 0 <= n <= model.shape[3]
                assert refused(cache.truncate, n) != inside, "ValueError if n is not 0 .. len"
                model = model[:, :, :, :n] if inside else model
            assert len(cache) == model.shape[3], "len"
            assert torch.equal(cache.read(), model), "what was appended, and not forgotten"
            places |= {cache.read().data_ptr()} if len(cache) else set()
            assert len(places) <= 1, "a view of one and the same memory"


attempt(test_KVCache, KVCache)

# %% [markdown]
# **4. A window** (open). Some models let a token see only the last few tokens, however long the text is: 4096 of them
# in Mistral 7B. Older keys and values are never asked for again, and their places can be used anew: position p goes
# to place p modulo the window, a **ring**. Build it for one layer. Does the order of the keys in memory matter to
# attention? Why do positions not get mixed up? Then try it in `forward`: what becomes of smollm2, which was not
# trained with a window, when the first tokens leave it?

# %% tags=["exercise"]
class WindowCache:
    """Keys and values of the last `window` tokens of one layer, in memory that never grows.

    step(q, k, v): q [H, D], k and v [G, D] of the next token, turned already -> [H, D], its
    attention over the last `window` tokens, itself included (over all, while there are fewer).
    Query head h reads key/value head h // (H/G).
    """

    def __init__(self, window, G, D):
        raise NotImplementedError


# %% tags=["test"]
def test_WindowCache(WindowCache):
    torch.manual_seed(0)
    for window, G, r in ((1, 1, 1), (4, 2, 3), (5, 3, 1), (16, 1, 4), (50, 2, 2)):
        q, k, v = torch.randn(40, G * r, 8), torch.randn(40, G, 8), torch.randn(40, G, 8)
        scores = einsum(q, k.repeat_interleave(r, 1), "i h d, j h d -> h i j") / 8**0.5
        seen = torch.ones(40, 40).tril().triu(1 - window).bool()
        weights = softmax(scores.masked_fill(~seen, -torch.inf), -1)
        expected = einsum(weights, v.repeat_interleave(r, 1), "h i j, j h d -> i h d")
        cache = WindowCache(window, G, 8)
        for t in range(40):
            got = cache.step(q[t], k[t], v[t])
            assert got.shape == expected[t].shape, "one answer [H, D]"
            assert torch.allclose(got, expected[t], atol=1e-5), f"window {window}, token {t}"
            kept = [x for x in vars(cache).values() if isinstance(x, torch.Tensor)]
            assert kept, "keys and values are kept in tensors of the object"
            room = sum(x.numel() for x in kept)
            assert room <= 2 * window * G * 8, "room for the window, and no more"


attempt(test_WindowCache, WindowCache)

# %% [markdown]
# ## What's next
#
# A server is as fast as its batch is large, and the batch is as large as the memory for caches allows. In this chapter
# a sequence took `max_len` places at the start, though nobody knew whether it would fill them.
# [Chapter 3](03_the_memory_wall.ipynb) counts how much of such memory ever holds a token.
#
# ## Sources
#
# - Kwon et al., *Efficient Memory Management for Large Language Model Serving with PagedAttention*, 2023: OPT-13B's
#   800 KB a token, its weights and its cache on an A100 (Table 1).
# - Pope et al., *Efficiently Scaling Transformer Inference*, 2022: what prefill and decode cost, and the cache's part
#   in it. Shazeer, *Fast Transformer Decoding*, 2019: decode waits for keys and values, so let heads share them.
# - Williams, Waterman and Patterson, *Roofline*, 2009. NVIDIA's data sheets of the A100 and H100: peak and bandwidth.
# - Agrawal et al., *Sarathi-Serve*, 2024: chunks of prompts in the free rows of decode steps.
# - Leviathan et al., *Fast Inference from Transformers via Speculative Decoding*, 2022. Jiang et al., *Mistral 7B*,
#   2023: a sliding window, and its ring.
# - Zhang et al., *OPT*, 2022; Touvron et al., *Llama 2*, 2023; *The Llama 3 Herd of Models*, 2024: the shapes.
