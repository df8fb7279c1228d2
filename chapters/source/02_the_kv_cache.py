# %% [markdown]
# # 2. The KV cache
#
# Chapter 1 sent the whole text through the model for every new token. Nearly all of that work had been done before.
# This chapter finds the two tensors that are worth keeping, keeps them, and counts what that saves and what it costs:
# memory, and a processor that mostly waits.
#
# **You need**: [chapter 1](01_from_weights_to_text.ipynb), or a Llama in your head. **You get**: a decoder that
# computes each token once, the size of its cache in bytes, and the reason why a server wants many sequences at once
# (a **sequence** is one stream of tokens: a prompt and its answer). The rest of the course is about finding room for
# them.

# %% [markdown]
# ## The question
#
# How much of the work of greedy decoding is done twice? To count it we need a model. Here is chapter 1's again, with
# three small functions taken from the package.

# %%
import time
from dataclasses import replace
from itertools import accumulate
from random import Random

import torch
import transformers
from einops import einsum, rearrange
from torch.nn.functional import linear, softmax

from kernels.packed import floats
from kernels.reference import rms_norm, rope, silu_and_mul
from minipaged.models import ModelConfig, open_checkpoint
from minipaged.models.llama import Llama
from minipaged.models.rope import Rope
from minipaged.teaching import attempt, equal, own, plots, show_source

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
rows.clear()
answer = greedy(prompt, 12)
rows_of_greedy = rows.copy()
print(tokenizer.decode(answer))
print("rows in each run:", rows_of_greedy)
print(sum(rows_of_greedy), "rows in all, for a text of", len(answer), "tokens")

# %% [markdown]
# 16 of the 17 tokens had to go through the model. (Why not all 17? Nothing was asked about what follows the last
# one.) All other rows are repetition:

# %%
run, old = range(1, 13), [0, *rows_of_greedy[:-1]]  # the first run has nothing to repeat
new = [n - m for n, m in zip(rows_of_greedy, old)]
with plots.figure(
    "Rows that the model works on", "position in the text", "run", size=(6.8, 3),
    alt="One bar for each of 12 runs. The first computes 5 new rows. Each later one computes "
    "one new row and repeats all before it, so that the repeated part is a growing triangle.",
) as axes:
    axes.barh(run, old, color="#e6e6e6", hatch="//", edgecolor="w")
    axes.barh(run, new, left=old, color=plots.COLORS[0])
    axes.invert_yaxis()
    axes.set_xlim(0, 18)
    axes.grid(visible=False, axis="y")
    axes.text(16.3, 12, "new", va="center", color=plots.COLORS[0], weight="bold")
    axes.text(4.5, 8, "computed again", va="center", ha="center", backgroundcolor="w")


# %% [markdown]
# The repeated part is a triangle, and a triangle's area grows with the square of its side. For a prompt of P tokens
# and n new ones it is
#
# $$ P + (P + 1) + \ldots + (P + n - 1) = nP + \frac{n (n - 1)}{2} \quad\text{rows, of which}\quad P + n - 1
# \quad\text{are new.} $$

# %%
assert sum(rows_of_greedy) == 12 * 5 + 12 * 11 // 2
for n in (10, 100, 1000):
    every, once = n * 100 + n * (n - 1) // 2, 100 + n - 1
    print(f"prompt 100 output {n:4}: {every:7,} rows, not {once:5,}: {every / once:3.0f} times")

# %% [markdown]
# **Your turn.** A chat has a prompt of 1,000 tokens and an answer of 100. How many times as much work is it? Guess,
# then put it in.
#
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
# (In chapter 1 we exchanged the row of " France" behind the layer that reads it, and nobody noticed.) So we keep the
# keys and values: the **KV cache**. A token whose keys and values are kept is a **computed** token.
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
print(f"all {five.numel():,} numbers of the first five tokens agree")


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
first_cache = new_cache(max_len=32)
hidden = forward(prompt, first_cache, num_computed=0)
token = best_token(hidden[-1])
print(list(hidden.shape), "= [T, E] ->", tokenizer.decode([token]))

# %% [markdown]
# Then one token at a time. That is called **decode**. Its input is the token that came out last, and nothing else:

# %%
hidden = forward([token], first_cache, num_computed=len(prompt))
after = best_token(hidden[-1])
print(list(hidden.shape), "= [1, E] ->", repr(tokenizer.decode([after])))
assert [token, after] == answer[5:7]

# %% [markdown]
# One row went in, and yet the model knew what the text is about: it read the rest from the cache. Positions 0 to 5
# are filled now, at every layer, and the others are as they were:

# %%
filled = ~first_cache.isnan().any(-1)  # [L, 2, G, max_len]
assert (filled == filled[0, 0, 0]).all()  # everywhere the same places
print("".join("#" if f else "." for f in filled[0, 0, 0]))


# %% [markdown]
# ### All that it remembers
#
# How much of the past is in there? We fill two caches, with two texts of four tokens, and give both the same fifth
# one, " is". Then we copy a single position, that of the country, from one cache to the other:

# %%
def cached(text):
    cache = new_cache(max_len=8)
    forward(tokenizer.encode(text), cache, 0)
    return cache


def goes_on(cache):
    """The token after four that are computed, and " is"."""
    return tokenizer.decode([best_token(forward(tokenizer.encode(" is"), cache, 4)[-1])])


# %%
france, italy = cached("The capital of France"), cached("The capital of Italy")
print(f"France is{goes_on(france)}, Italy is{goes_on(italy)}")
france[:, :, :, 3] = italy[:, :, :, 3]
print(f"France, with Italy's keys and values at position 3, is{goes_on(france)}")
assert goes_on(france) == goes_on(italy) == " Rome"


# %% [markdown]
# The cache is all that the model knows of the text. Whoever gives it the wrong place gets an answer that is fluent,
# sure, and wrong: remember that in the chapters in which caches lie in pieces, and many share them.
#
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
# **Your turn.** In `generate`, feed the prompt two tokens at a time: what will `rows` be, and will the text change?
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
    size = per_token[name] * context / 1e9
    print(f"{name:12} {per_token[name]:7,} B a token, {size:4.2f} GB for its {context} tokens")

# %% [markdown]
# 819,200 bytes for OPT-13B: the paper's 800 KB. (A popular article gives 1.6 GB for Llama-2-13B at its 4096 tokens; it
# is 3.36.) Llama-3-8B has 32 query heads, and 8 heads for keys and values. Each of these serves four query heads, and
# that makes its cache four times smaller.
#
# The package has the same formula:

# %%
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
# **Your turn.** In fp32 both would be twice as large. Where would the lines cross 1 then? And if only the cache were
# kept in 8 bits?
#
# So the cache becomes the larger part. Why would one want so many sequences at a time? Because of what follows.
#
# ### Why decode waits for memory
#
# Take one product, a weight matrix of $w$ numbers with n rows. It computes: each number of the matrix is multiplied
# and added once for each row, $2 n w$ floating-point operations (**FLOP**). And it moves: the matrix must come from
# memory, $w$ times 4 bytes in fp32. (The rows move too; there are few of them.) Both go on at the same time, and the
# slower one decides:
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
# more. That is the point of this chapter: **the size of the batch decides how fast a server is, and the memory for
# caches decides the size of the batch.** Whoever wastes half of that memory serves half as many at a time.
# [Chapter 3](03_the_memory_wall.ipynb) looks at how much was wasted.
#
# **Your turn.** Put in an H100 with 80 GB (say 50 GB for caches). Does a batch of 2048 tokens each reach the ridge now?

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
    sizes, chunked = random_chunks(len(answer), Random(seed)), new_cache(max_len=24)
    assert torch.allclose(in_chunks(answer, sizes, chunked), whole, atol=1e-3)
    computed = ~chunked.isnan().any(-1)
    assert computed[..., : len(answer)].all() and not computed[..., len(answer) :].any()
    print("chunks", sizes)

# %% [markdown]
# All agree, and each time exactly the computed positions were filled. Next, somebody else's cache. transformers has
# one too, under the name `past_key_values`. We give its Llama our weights and compare the logits *and the contents*:

# %%
fields = {k: v for k, v in checkpoint.config.items() if k != "model_type"}
with torch.device("meta"):  # the shapes alone; the weights come from W
    hf_llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
hf_llama.load_state_dict(W | {"lm_head.weight": embedding}, assign=True)
hf_llama.model.rotary_emb = type(hf_llama.model.rotary_emb)(hf_llama.config)

# %%
past, kept, done = None, new_cache(24), 0
for n in (3, 4, 1, 1, 5, 1, 1, 1):
    chunk = answer[done : done + n]
    theirs = hf_llama(torch.tensor([chunk]), past_key_values=past, use_cache=True)
    mine = forward(chunk, kept, done) @ embedding.T
    assert torch.allclose(mine, theirs.logits[0], atol=1e-3)
    past, done = theirs.past_key_values, done + n
for layer in range(L):
    both = torch.stack([past.layers[layer].keys[0], past.layers[layer].values[0]])
    assert torch.allclose(kept[layer, :, :, :done], both, atol=1e-3)  # [2, G, T, D]
print(f"logits agree at {done} positions, and keys and values in all {L} layers")

# %% [markdown]
# ## The package's version
#
# ### Memory
#
# In our tensor a sequence has its `max_len` places in a row. The package cuts that dimension in two: N **blocks** of B
# places, which it calls **slots**. Its cache is `[L, 2, G, N, B, D]`, and with blocks in a row it is the same memory.
# Here is the attention that reads it, in its plainest form:

# %%
from kernels import Batch, reference

show_source(reference.paged_attention)

# %% [markdown]
# It is our `read` and `attention`, with three things more (`dequantize` and `raw` have nothing to do here: they are for
# caches in eight bits):
#
# - **Many sequences.** All their tokens stand in one row, and `query_start` says where each one's begin. There is no
#   padding: three sequences with 40, 1 and 1 tokens to compute are 42 rows.
# - **`context_lens`** says how many tokens of each count, this step's included. It is our `end`. From it and the number
#   of queries comes the mask: the queries are the *last* ones of the context.
# - **`block_tables`** says which blocks are a sequence's.
#
# `reference.write_kv` is our `write`, except that each token is told its slot: they need not be in a row.
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
torch.manual_seed(0)
for seed in range(500):
    ours, theirs = one_random_step(Random(seed))
    assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5)
print("500 random steps agree")

# %% [markdown]
# ### Who decides how many tokens
#
# The package knows no phases either. Its `Sequence` has `num_computed_tokens`. In each step the **scheduler**, who
# decides what is computed, gives every sequence some of the tokens that it lacks: one for certain, and more as long as
# the step may grow. Here is how it writes that down for the runner, who computes it:

# %%
from minipaged.scheduling.scheduler import Scheduler

show_source(Scheduler._scheduled)

# %% [markdown]
# Read `start` and `count`: they are our `num_computed` and T. A token is drawn only if `last` holds, that is, if after
# this step nothing is missing. (`slots` and `current_table` say where keys and values lie. `search` is for beam search,
# and `targets` for those who want to know how likely their own prompt was.)
#
# Prompt, chunk of a prompt, one more token: all the same lines. So is something that we have not met: if the engine
# takes a sequence's memory away, it sets `num_computed_tokens` to 0, and the sequence computes itself anew as if it had
# just arrived ([chapter 12](12_preemption.ipynb)).
#
# Watch it. Two requests, a short one and a longer one, and at most 8 tokens in a step. An observer is called after each
# step with its plan:

# %%
from minipaged import LLM, SamplingParams

llm = LLM("smollm2", device="cpu", num_blocks=16, prefix_cache="none",
          max_num_seqs=4, max_num_batched_tokens=8)
assert llm.block_bytes == 16 * kv_bytes

# %%
plans = []
llm.observers[:] = [lambda plan, output: plans.append(plan)]
longer = "A cache is a place where one keeps what one would otherwise have to do again, such as"
greedily = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
outputs = llm.generate([text, longer], greedily)

# %%
names = dict(zip([output.request_id for output in outputs], ("short", "longer")))
for step, plan in enumerate(plans, 1):
    words = {"short": "-", "longer": "-"}
    for s in plan.sequences:
        words[names[s.request_id]] = f"{s.start:2} +{len(s.token_ids)}" + " *" * bool(s.draw)
    print(f"step {step}   short: {words['short']:10} longer: {words['longer']}")

# %% [markdown]
# Each entry is `start +count`, and `*` marks where a token is drawn. In the first step the short prompt goes in whole,
# and what is left of the 8 goes to the longer one. Then the short one decodes with one token a step *while* the longer
# one is in prefill: rows that are nearly free are put to use. Is each token computed exactly once, and is it our text?

# %%
for output in outputs:
    mine = [s for plan in plans for s in plan.sequences if s.request_id == output.request_id]
    spans = [(s.start, s.context_len) for s in mine]
    assert [a for a, _ in spans] == [0] + [b for _, b in spans[:-1]]  # without gap or overlap
    expected = generate(output.prompt_token_ids, 6)[0]
    assert output.prompt_token_ids + output.outputs[0].token_ids == expected
    assert spans[-1][1] == len(expected) - 1
    print(f"{len(expected)} tokens, {spans[-1][1]} computed: {output.outputs[0].text!r}")

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
unplaced, _ = generate(prompt, 12)
turn = right_turn
assert unplaced[:6] == answer[:6] and unplaced != answer
print(tokenizer.decode(unplaced))

# %% [markdown]
# **Write first, then read.** A token sees itself: its own key belongs to the context. If decode reads the cache before
# the new keys are in it, each token is blind to itself. We generate so, and then compare the rows:

# %%
right_read = read
read = lambda cache, layer, end: right_read(cache, layer, end - (end > len(prompt)))
text_of_blind, _ = generate(prompt, 12)
blind = in_chunks(answer, [5] + 12 * [1], new_cache(24))
read = right_read

# %%
blind_off = (blind - whole).abs().amax(-1) > 1  # for each position
assert blind_off.tolist() == 5 * [False] + 12 * [True]
print("all rows of decode are off; the text:", "same" if text_of_blind == answer else "other")

# %% [markdown]
# Not a single token of these twelve is different. A test that looks at a text would have passed.

# %% [markdown]
# **Nothing is read beyond what is computed.** Our caches begin as NaN, and no NaN ever came out: that is the proof.
# Suppose we forget `end` and read everything. With NaN behind it we notice at once. With zeros, which look so
# harmless, nobody is told: a key of zeros has a score of 0, and that is a weight like any other.

# %%
right_read = read
read = lambda cache, layer, end: cache[layer]
for filler in (torch.nan, 0.0):
    off = (forward(answer, new_cache(64).fill_(filler), 0) - whole).abs().max()
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
changed = new_cache(32)
_ = forward(before, changed, 0)
_ = forward(now[at : at + 1], changed, at)
stale = forward(now[last:], changed, last)[-1]
again = forward(now[at:], changed, at)[-1]

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
# that begin alike can share what they have in common. [Chapter 13](13_prefix_caching.ipynb) does that between requests.

# %% [markdown]
# ## Exercises
#
# Fill in the functions; each is followed by a test that says how far you are.
#
# **1. How many fit?** (warm-up) A machine has so much memory. Weights go in first, and every sequence must be sure of
# room for its longest text. How many sequences can it promise to serve at a time? If not even the weights fit, none.

# %% tags=["exercise"]
def largest_batch(memory, weights, per_token, max_len):
    """memory, weights and per_token in bytes, max_len in tokens, all of them integers that may
    be as large as one likes -> the number of sequences, an int, exact to the byte.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_largest_batch(largest_batch):
    largest_batch = own(largest_batch)

    def check(right, *case):
        got, names = largest_batch(*case), ("memory", "weights", "per_token", "max_len")
        assert equal(got, right), f"{dict(zip(names, case))}: {right:,}, not {got}"

    check(7, 26 * 10**9 + 12 * 2**30, 26 * 10**9, 819_200, 2048)  # the paper's server
    for seed in range(300):
        random = Random(seed)
        size = 10 ** random.choice([1, 3, 12])
        weights, each, length = (random.randint(1, top) for top in (size, size, 99))
        n = random.randint(1, size)
        full = weights + n * each * length
        check(n, full, weights, each, length)
        check(n - 1, full - 1, weights, each, length)
        check(0, random.randint(0, weights), weights, each, length)


attempt(test_largest_batch, largest_batch)

# %% [markdown]
# **2. How long will a step take?** `least_step` was for decode on one machine. Write it for any step: a list of
# sequences, each with the tokens that it computes and its context. Leave the arithmetic of attention out: count its
# reading alone.

# %% tags=["exercise"]
def step_seconds(work, weight_count, per_token, peak, bandwidth, itemsize=2):
    """The least time of a step, in seconds, by the roofline.

    work: a list of (tokens computed, context), one for each sequence; it stays as it is. Each
    computed token needs 2 operations for each of the weight_count numbers; these are read once
    a step, itemsize bytes each. Each sequence's keys and values are read once, per_token bytes
    for each token of its context. Reading goes on beside the arithmetic of the whole step.
    peak: operations/s; bandwidth: bytes/s. An empty step takes no time.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_step_seconds(step_seconds):
    step_seconds = own(step_seconds, forbid=[least_step])
    flops, speed = machines["A100 40GB"]
    a100 = dict(weight_count=13 * 10**9, per_token=819_200, peak=flops, bandwidth=speed)
    for n, context in ((1, 2048), (7, 2048), (30, 512), (122, 128)):
        got, right = step_seconds([(1, context)] * n, **a100), least_step(n, context)
        assert equal(got, right, 1e-9), f"{n} sequences of {context}: {right}, not {got}"
    decided = set()
    for seed in range(300):
        random = Random(seed)
        work = []
        for _ in range(random.randint(0, 5)):
            context = random.randint(1, 999)
            work.append((random.choice([1, random.randint(1, context)]), context))
        case = dict(weight_count=random.randint(1, 9999), per_token=random.randint(1, 99),
                    peak=random.randint(1, 999), bandwidth=random.randint(1, 99))
        size = random.choice([None, 1, 2, 4])
        case |= {} if size is None else dict(itemsize=size)
        arithmetic = 2 * sum(n for n, _ in work) * case["weight_count"] / case["peak"]
        read = case["weight_count"] * (size or 2) + case["per_token"] * sum(c for _, c in work)
        right = max(arithmetic, read / case["bandwidth"]) if work else 0.0
        got = step_seconds(list(work), **case)
        assert equal(got, right, 1e-9), f"work={work}, {case}: {right}, not {got}"
        decided.add(right == arithmetic)
    assert len(decided) == 2  # both of them decide in some of the cases


attempt(test_step_seconds, step_seconds)

# %% [markdown]
# The next two keep tensors. Where they keep them is up to you: in one tensor or several, in lists, dicts or modules.
# The tests find them all, and count the memory that they hold on to (a slice holds all of what it was cut from).

# %%
import gc
import types

import numpy as np


def held(thing):
    """{address: all the memory of a tensor or array that it keeps, flat}; how many numbers."""
    memories, loose, seen, todo = {}, 0, set(), [thing]
    for kind in type(thing).__mro__:
        if kind.__module__ == "__main__":
            todo += [value for name, value in vars(kind).items() if name[:2] != "__"]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, (type, types.ModuleType, types.CodeType)):
            continue
        seen.add(id(one))
        if isinstance(one, np.ndarray) and one.dtype.kind in "biuf":
            one = torch.from_numpy(one)
        if isinstance(one, torch.Tensor):
            memory = one.new_empty(0).set_(one.untyped_storage())
            memories[memory.data_ptr()] = memory
        elif isinstance(one, types.FunctionType):
            todo += one.__closure__ or ()
        else:
            loose += type(one) is float
            todo += gc.get_referents(one)
    return memories, loose + sum(len(memory) for memory in memories.values())


# %% [markdown]
# **3. A cache with a way back.** Write our cache as a class that looks after its own number, refuses what does not fit,
# and can forget its latest tokens. Its memory is taken once, at the start, and nobody else's is in it. (Who needs to
# forget? *Speculative decoding* does: rows are nearly free, so it sends a few guessed tokens along with the newest one,
# and takes back those that turn out wrong.)

# %% tags=["exercise"]
class KVCache:
    """Keys and values (float32) of up to max_len tokens: 2 L G max_len D numbers, and no more
    than 16 others. All memory is taken in __init__.

    len(cache)            how many tokens are in it
    cache.append(k, v)    of T >= 1 more tokens: k and v [L, G, T, D]. Writes these and nothing
                          else. ValueError, and no change, if they don't fit
    cache.read(layer)     keys, values: a pair of [G, len, D], views of the memory, no copies
    cache.truncate(n)     keep the first n tokens; ValueError if there are fewer, or if n < 0.
                          Writes no keys or values: what is forgotten just lies there
    """

    def __init__(self, L, G, max_len, D):
        raise NotImplementedError


# %% tags=["test"]
def test_KVCache(KVCache):
    KVCache = own(KVCache)

    def refused(action, *arguments):
        try:
            action(*arguments)
        except ValueError:
            return True
        return False

    def check(cache, right, memories, case):
        count, size = right.shape[3], len(cache)
        assert equal(size, count), f"{case}: {count} tokens, not {size}"
        for layer in range(len(right)):
            keys, values = cache.read(layer)
            for got, expected in zip((keys, values), right[layer]):
                assert equal(got, expected), f"{case}: layer {layer} is not what was appended"
                kept = [m for at, m in memories.items() if 0 <= got.data_ptr() - at < m.nbytes]
                told = f"{case}: read() makes a copy, or memory is taken anew"
                assert kept or not got.numel(), told

    for seed in range(25):
        random, generator = Random(seed), torch.Generator().manual_seed(seed)
        L, G, most, D = (random.randint(1, top) for top in (3, 3, 20, 8))
        cache, other = KVCache(L, G, most, D), KVCache(L, G, most, D)
        memories, count = held(cache)
        room = 2 * L * G * most * D
        case = f"KVCache({L}, {G}, {most}, {D})"
        assert count <= room + 16, f"{case}: it holds {count} numbers, where {room} are enough"
        for memory in memories.values():
            if memory.is_floating_point() and len(memory) >= G * most * D:
                memory.normal_(generator=generator)  # what nobody has written yet is anything
        right, empty = torch.empty(L, 2, G, 0, D), torch.empty(L, 2, G, 0, D)
        for _ in range(30):
            before = {at: memory.clone() for at, memory in memories.items()}
            n, T = random.randint(-1, most + 1), random.randint(1, max(1, most // 3))
            full = right.shape[3]
            if random.random() < 0.6:
                kv = torch.randn(2, L, G, T, D, generator=generator)
                fits, what = full + T <= most, f"{case}: append {T} to {full}"
                said = refused(cache.append, *kv.clone())
                right = torch.cat([right, kv.transpose(0, 1)], 3) if fits else right
                may_write = kv.numel() if fits else 0
            else:
                fits, what = 0 <= n <= full, f"{case}: truncate({n}) of {full}"
                said, may_write = refused(cache.truncate, n), 0
                right = right[:, :, :, :n] if fits else right
            assert said != fits, f"{what}: {'a' if said else 'no'} ValueError"
            check(cache, right, memories, what)
            wrote = sum(int((m != before[at]).sum()) for at, m in memories.items()
                        if m.is_floating_point())
            assert wrote <= may_write + 16, f"{what}: wrote {wrote} numbers, not {may_write}"
        check(other, empty, memories, f"{case}: another one, which should be empty")
        kv = torch.randn(2, L, G, most, D, generator=generator)
        other.append(*kv)
        check(cache, right, memories, f"{case}, after another one was filled")
        assert held(cache)[1] <= room + 16, f"{case}: it has grown"


attempt(test_KVCache, KVCache)

# %% [markdown]
# **4. A window** (open). Some models let a token see only the last few tokens, however long the text is: 4096 of them
# in Mistral 7B. Older keys and values are never asked for again, and their places can be used anew: position p goes
# to place p modulo the window, a **ring**. Build it for one layer. Does the order of the keys in memory matter to
# attention? Why do positions not get mixed up? Then try it in `forward`: what becomes of smollm2, which was not
# trained with a window, when the first tokens leave it?

# %% tags=["exercise"]
class WindowCache:
    """Keys and values of the last `window` tokens of one layer, in memory that never grows:
    after each step it holds at most 2 window G D numbers, and 2 window + 16 others.

    step(q, k, v): q [H, D], k and v [G, D] of the next token, turned already -> [H, D], its
    attention over the last `window` tokens, itself included (over all, while there are fewer).
    Query head h reads key/value head h // (H/G). k and v are new tensors at each call, which
    may be kept; they are not to be changed.
    """

    def __init__(self, window, G, D):
        raise NotImplementedError


# %% tags=["test"]
def test_WindowCache(WindowCache):
    WindowCache = own(WindowCache)

    class Case:
        def __init__(self, sizes, numbers, T=30):
            random, generator = Random(sizes), torch.Generator().manual_seed(numbers)
            window, G, r = (random.randint(1, top) for top in (12, 4, 4))
            D = random.choice([4, 6, 8])
            self.q, self.k, self.v = (
                2 * torch.randn(T, heads, D, generator=generator) for heads in (G * r, G, G))
            keys, values = (x.repeat_interleave(r, 1).transpose(0, 1) for x in (self.k, self.v))
            seen = torch.ones(T, T).tril().triu(1 - window).bool()
            self.right = torch.nn.functional.scaled_dot_product_attention(
                self.q.transpose(0, 1), keys, values, attn_mask=seen).transpose(0, 1)
            self.cache, self.room = WindowCache(window, G, D), 2 * window * (G * D + 1) + 16
            self.name = f"window {window}, H={G * r}, G={G}, D={D}"

        def step(self, t):
            got = self.cache.step(*(x[t].clone() for x in (self.q, self.k, self.v)))
            right = self.right[t]
            shaped = isinstance(got, torch.Tensor) and got.shape == right.shape
            assert shaped, f"{self.name}: an answer is [H, D]"
            off, count = (got - right).abs().max(), held(self.cache)[1]
            assert off < 1e-5, f"{self.name}: token number {t} is off by {off}"
            assert count <= self.room, f"{self.name}: it holds {count} numbers at token {t}"

    for seed in range(12):
        a, b = Case(seed, 2 * seed), Case(seed, 2 * seed + 1)
        for t in range(30):
            a.step(t)  # two of them at a time
            b.step(t)


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
