# %% [markdown]
# # 1. From weights to text
#
# A language model on disk is a list of named matrices. A server turns text into numbers, sends the numbers
# through the matrices, and turns what comes out into text again. This chapter builds that path in plain PyTorch:
# first the Llama architecture with real weights, then GPT-2. Later chapters make it faster or let more people share
# it; what the model computes stays the same.
#
# **You need**: Python, PyTorch, and what a matrix product is. **You get**: a function `llama(tokens)` that fits on
# one screen with all its parts, that agrees with the package and with Hugging Face's transformers, and the one layer
# of thirty in which "France" becomes "Paris".

# %% [markdown]
# ## The question
#
# What exactly must be computed to get one more word? Everything in this course follows from the answer: which
# numbers are needed again at the next word ([chapter 2](02_the_kv_cache.ipynb)), how much memory they take
# ([chapter 3](03_the_memory_wall.ipynb)), and where they may lie (from [chapter 4](04_blocks.ipynb) on). So we start
# with a model in which nothing is hidden.

# %% [markdown]
# ## The idea
#
# A text is cut into **tokens**, pieces of words, and each has its number in a fixed list, the **vocabulary**. The
# model looks at all tokens so far and gives a **logit**, a score, to every token that could come next. Take the best
# one, append it, and start again:
#
# ```
#  "The capital of France is"
#        |  tokenizer
#  [504, 3575, 282, 4649, 314]            T tokens
#        |  embedding: one row of E numbers for each token
#     x [T, E]
#        |  L layers; each adds to x
#        |     x = x + attention(norm(x))      tokens look at the tokens before them
#        |     x = x + mlp(norm(x))            each token is worked on alone
#     x [T, E]
#        |  norm, and a product with the vocabulary
#  logits [T, V]  ->  the last row's largest: " Paris"  ->  append it, and again
# ```
#
# The symbols are the same in the whole course:
#
# | | | | |
# |---|---|---|---|
# | **T** tokens | **L** layers | **E** hidden size | **V** vocabulary |
# | **H** query heads | **G** key/value heads | **D** head size | **F** width of the MLP |
#
# "Hidden size" is how many numbers a token has on its way through the layers. What norms, heads and the MLP are
# comes below.

# %% [markdown]
# ## Build it
#
# ### The weights
#
# `smollm2` is SmolLM2-135M-Instruct, a real chat model, small enough for a laptop. The package fetches it once and
# keeps it.

# %%
import tempfile
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
import transformers
from einops import einsum, rearrange, repeat
from torch.nn.functional import gelu, layer_norm, silu, softmax

from kernels.packed import floats
from minipaged.models import ModelConfig, ModelError, load, load_model, open_checkpoint
from minipaged.models.llama import Llama
from minipaged.teaching import attempt, equal, own, plots, show_source

_ = torch.set_grad_enabled(False)  # we only run the model, and never train it

# %%
checkpoint = open_checkpoint("smollm2")
config = ModelConfig.from_hf(checkpoint.config)
L, E, V = config.num_layers, config.hidden_size, config.vocab_size
H, G, D, F = config.num_heads, config.num_kv_heads, config.head_size, config.intermediate_size
print(f"L={L} layers, E={E}, H={H} query heads, G={G} key/value heads, D={D}, F={F}, V={V}")

# %% [markdown]
# The file keeps most weights in 4 bits each, with a scale for every 32 of them; `floats` makes fp32 of them. Here are
# all tensors of one layer, and those outside the layers:

# %%
stored = checkpoint.names(Llama.tensor_shapes(config))  # name in the file -> our name
W = {name: floats(checkpoint.tensor(key, torch.float32)) for key, name in stored.items()}
for name, tensor in W.items():
    if "layers." not in name or "layers.0." in name:
        print(f"{name:46} {list(tensor.shape)}")


# %% [markdown]
# We use them by shorter names:

# %%
embedding = W["model.embed_tokens.weight"]


def weight(layer, name):
    return W[f"model.layers.{layer}.{name}.weight"]


# %% [markdown]
# A matrix is stored as [out, in], so that `x @ w.T` sends rows of "in" numbers to rows of "out" numbers. Where do the
# weights go?

# %%
parts = {"embedding": "embed", "attention": "self_attn", "MLP": "mlp", "norms": "norm"}
count = {
    part: sum(w.numel() for name, w in W.items() if key in name)
    for part, key in parts.items()
}
print(f"{sum(count.values()):,} numbers in all")
assert sum(count.values()) == sum(w.numel() for w in W.values())  # each counted once

# %%
alt = "Of 134 million numbers 80 are in MLPs, 28 in the embedding, 27 in attention"
with plots.figure("Where the weights are", "million numbers", size=(6.8, 1.9), alt=alt) as axes:
    axes.barh(list(parts), [n / 1e6 for n in count.values()], color=plots.COLORS[0])
    for row, n in enumerate(count.values()):
        axes.text(n / 1e6 + 1, row, f"{n / 1e6:.2f}", va="center")
    axes.set_xlim(0, 92)
    axes.invert_yaxis()

# %% [markdown]
# There is no matrix for the way back from numbers to tokens: this model uses its embedding twice. It is *tied*.
#
# ### Text to tokens

# %%
tokenizer = checkpoint.tokenizer()
text = "The capital of France is"
tokens = tokenizer.encode(text)
print(tokens)
print([tokenizer.decode([token]) for token in tokens])

# %% [markdown]
# A token is often a word with the space before it. The vocabulary was made before the model was trained, from what is
# frequent in many texts. Rare words fall into several pieces, so the number of tokens is not the number of words:

# %%
print([tokenizer.decode([t]) for t in tokenizer.encode(" PagedAttention")])

# %% [markdown]
# **Your turn.** How many tokens are `" Paris"`, `"Paris"`, `"PARIS"`, and `" 1234567"`? Say it first, then look.
#
# ### Tokens to rows of numbers
#
# The **embedding** is a table with a row for each token. Looking up is indexing:

# %%
x = embedding[tokens]
print(list(x.shape), "= [T, E]")


# %% [markdown]
# ### Norm
#
# Before each piece of work the rows are brought to a common length: divide by the root of the mean square, then
# scale each of the E columns by a learned weight. `norm_eps` keeps the division away from zero.

# %%
def rms_norm(x, weight):
    mean_square = x.pow(2).mean(-1, keepdim=True)
    return x * torch.rsqrt(mean_square + config.norm_eps) * weight


ones = rms_norm(x, torch.ones(E))
print("root mean square before:", [f"{v:.2f}" for v in x.pow(2).mean(-1).sqrt()])
print("and after, weights left out:", [f"{v:.2f}" for v in ones.pow(2).mean(-1).sqrt()])


# %% [markdown]
# ### Queries, keys, values
#
# Three products make three things of each token: a **query** (what it looks for), a **key** (what it can be found
# by) and a **value** (what it has to say). Each is cut into **heads** of D numbers, and each head attends on its own.
#
# Tensors are cut and turned with `einops`, whose patterns name each dimension: `"t (h d) -> t h d"` cuts a row into h
# pieces of d numbers. In its `einsum`, a letter that is missing behind the arrow is summed over.

# %%
def queries_keys_values(x, layer):
    """Rows x [T, E], normed -> q [T, H, D], k and v [T, G, D]."""
    w = [weight(layer, f"self_attn.{name}_proj") for name in "qkv"]
    return [rearrange(x @ one.T, "t (h d) -> t h d", d=D) for one in w]


q, k, v = queries_keys_values(rms_norm(x, weight(0, "input_layernorm")), layer=0)
print("q", list(q.shape), " k", list(k.shape), " v", list(v.shape))


# %% [markdown]
# There are fewer heads for keys and values than for queries: each key/value head serves three query heads. That is
# **grouped-query attention**; most newer models have it. A server keeps keys and values in memory, as the next
# chapter shows, and so they take a third of the room.
#
# ### Positions
#
# So far a token does not know where it stands. Llama turns queries and keys by an angle that grows with the
# position (**rope**, rotary position embedding). Column `i` is paired with column `i + D/2`; each pair is a point in
# a plane, and it turns at its own speed, the first ones fast, the last ones slowly.

# %%
def rope(x, positions):
    """x [T, heads, D], turned to the positions [T]."""
    speed = config.rope.theta ** -(torch.arange(0, D, 2) / D)  # [D/2], radians a position
    angle = rearrange(positions, "t -> t 1 1") * speed  # [T, 1, D/2]
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


# %%
apart = torch.arange(0, 64)
turned = rope(repeat(k[0, :1], "1 d -> t 1 d", t=64), apart)[:, 0]  # one key, 64 positions
alt = "Waves: pair 0 swings ten times in 64 positions, pair 4 two and a half times, 12 hardly"
with plots.figure("The first number of three pairs", "position", "value", alt=alt) as axes:
    for pair in (0, 4, 12):
        plots.line(axes, apart, turned[:, pair], f"pair {pair}")


# %% [markdown]
# Why turn them? A product of two turned vectors depends on the *difference* of their angles only. So what a query
# makes of a key depends on how far apart they are, and not on where in the text they stand:

# %%
def score(i, j):
    """Head 0's query of the first token as if it stood at position i, its key as if at j."""
    turned_q, turned_k = (rope(z[:1, :1], torch.tensor([at])) for z, at in ((q, i), (k, j)))
    return float((turned_q * turned_k).sum())


for i, j in [(7, 3), (107, 103), (7, 5)]:
    print(f"query at {i:3}, key at {j:3}, {i - j} apart: {score(i, j):8.3f}")
assert abs(score(7, 3) - score(107, 103)) < 1e-3 < abs(score(7, 3) - score(7, 5))

# %% [markdown]
# ### Attention
#
# Each query is multiplied with all keys. The products, the **scores**, are divided by $\sqrt{D}$ so that they stay
# moderate. They become weights by a softmax, and the answer is the sum of the values with these weights:
#
# $$ a_{ij} = \frac{\exp(q_i \cdot k_j / \sqrt{D})}{\sum_{t \le i} \exp(q_i \cdot k_t / \sqrt{D})},
# \qquad o_i = \sum_{j \le i} a_{ij} v_j $$
#
# Only $j \le i$ counts: a token sees itself and those before it. That is the **causal mask**, and it is the reason
# why a server can remember anything at all, as the next chapter shows.

# %%
def attention_weights(q, k):
    """q [T, H, D], k [T, G, D] -> [H, T, T]: how much query i listens to key j."""
    k = repeat(k, "t g d -> t (g r) d", r=q.shape[1] // k.shape[1])  # one for each query head
    scores = einsum(q, k, "i h d, j h d -> h i j") / q.shape[-1] ** 0.5
    future = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
    return softmax(scores.masked_fill(future, -torch.inf), -1)


def attention(q, k, v):
    """q [T, H, D], k and v [T, G, D] -> [T, H, D]."""
    v = repeat(v, "t g d -> t (g r) d", r=q.shape[1] // v.shape[1])
    return einsum(attention_weights(q, k), v, "h i j, j h d -> i h d")


# %%
positions = torch.arange(len(tokens))
weights = attention_weights(rope(q, positions), rope(k, positions))
assert torch.allclose(weights.sum(-1), torch.ones(H, len(tokens)))  # they are shares of one
assert (weights.triu(1) == 0).all()  # and nothing comes from the future
print(list(weights.shape), "= [H, T, T]")

# %%
shown = weights[4].masked_fill(torch.ones(5, 5).triu(1).bool(), torch.nan)
names = [tokenizer.decode([token]).strip() for token in tokens]
title = "Who listens to whom (layer 0, head 4)"
alt = "A triangle of weights; each row adds up to 1. 'of' listens to itself, 'France' to 'of'"
with plots.figure(title, "keys", "queries", size=(4.6, 3.6), alt=alt) as axes:
    plots.matrix(axes, shown.tolist(), names, names, form=".2f")


# %% [markdown]
# Each row adds up to 1. The first token can only listen to itself; "France" mostly listens to "of" here. What a head
# is good for, nobody told it: that was learned.
#
# **Your turn.** Look at other heads, `weights[0]` to `weights[8]`. Which one looks back to the first token?
#
# ### The rest of a layer
#
# The heads' answers are laid side by side and mixed by one more product:

# %%
def attend(x, layer, positions):
    """The attention of one layer, with its four products: [T, E] -> [T, E]."""
    q, k, v = queries_keys_values(x, layer)
    o = attention(rope(q, positions), rope(k, positions), v)
    return rearrange(o, "t h d -> t (h d)") @ weight(layer, "self_attn.o_proj").T


# %% [markdown]
# Then comes the **MLP** (multi-layer perceptron), in which every token is on its own. Two products go up to width F, a
# third one down again. One of the first two is a gate: `silu(z)` is `z * sigmoid(z)`, nearly 0 for negative z and
# nearly z for positive. What it is multiplied with is let through or held back.

# %%
def mlp(x, layer):
    """[T, E] -> [T, E]."""
    gate = x @ weight(layer, "mlp.gate_proj").T
    up = x @ weight(layer, "mlp.up_proj").T
    return (silu(gate) * up) @ weight(layer, "mlp.down_proj").T


# %% [markdown]
# ### The whole model
#
# Both halves of a layer are *added* to `x`. Nothing overwrites it, and every layer can use what any layer before has
# written. At the end, a norm, and the product of each row with the rows of all tokens: the more alike, the larger the
# logit.

# %%
def layers(x, first, last):
    """Rows x [T, E] through the layers first, ..., last - 1."""
    positions = torch.arange(len(x))
    for layer in range(first, last):
        x = x + attend(rms_norm(x, weight(layer, "input_layernorm")), layer, positions)
        x = x + mlp(rms_norm(x, weight(layer, "post_attention_layernorm")), layer)
    return x


def forecast(x):
    """Rows [T, E] -> logits [T, V]."""
    return rms_norm(x, W["model.norm.weight"]) @ embedding.T


def llama(tokens):
    """Token ids [T] -> logits [T, V]."""
    return forecast(layers(embedding[tokens], 0, L))


# %%
logits = llama(tokens)
print(list(logits.shape), "= [T, V]")

# %% [markdown]
# One row for every token of the input. Each is a forecast of what follows *that* token. A softmax makes chances of it:

# %%
for i, row in enumerate(softmax(logits, -1)):
    chance, token = row.max(-1)
    print(f"{tokenizer.decode(tokens[: i + 1]):25} {chance:4.0%} {tokenizer.decode([token])!r}")

# %% [markdown]
# To continue the text we need the last row only. Here is more of it:

# %%
best = softmax(logits[-1], -1).topk(5)
for chance, token in zip(best.values, best.indices):
    print(f"{chance:6.1%}  {tokenizer.decode([token])!r}")


# %% [markdown]
# **Your turn.** Take another country. Does it know the capitals of small ones?
#
# ### Greedy decoding
#
# Always taking the best token is called **greedy**. It leaves nothing to luck, so it is what we compare with: two
# programs that are both right give the same tokens, unless two logits are so close that rounding decides. (Servers
# mostly draw the next token by its chance: that is *sampling*.)

# %%
def greedy(tokens, steps):
    tokens = list(tokens)
    for _ in range(steps):
        tokens.append(int(llama(tokens)[-1].argmax()))
    return tokens


answer = greedy(tokens, 12)
print(tokenizer.decode(answer))


# %% [markdown]
# The first word is right. Then the text just goes on, since nobody told it to stop. Look at the
# loop once more: at every step the whole text goes through the model again, though only its last token
# is new. Chapter 2 is about that.
#
# ### Where does the answer come from?
#
# The last row is made of the token " is" and says " Paris". So what is in the row of " France" must have come over,
# and attention is the only place where rows meet. In which of the 30 layers did it happen? An exchange will tell. We
# run two texts side by side, stop before some layer, put the row of " Italy" in the place of the row of " France", and
# let the layers that remain go on. If the answer is " Rome" then, the last row had not yet got to know the country; if
# it is " Paris", it had.

# %%
def chances_after_swap(one, two, at):
    """A swap before each layer, and behind the last: chances [L + 1, V] of the next token."""
    x, y, found = embedding[one], embedding[two], []
    for layer in range(L + 1):
        swapped = x.clone()
        swapped[at] = y[at]
        found.append(softmax(forecast(layers(swapped, layer, L)[-1]), -1))
        x, y = (layers(z, layer, min(layer + 1, L)) for z in (x, y))
    return torch.stack(found)


# %%
italy = tokenizer.encode("The capital of Italy is")
paris, rome = (tokenizer.encode(word)[0] for word in (" Paris", " Rome"))
at = tokens.index(tokenizer.encode(" France")[0])
assert [a == b for a, b in zip(tokens, italy)] == [i != at for i in range(len(tokens))]
after_swap = chances_after_swap(tokens, italy, at)

# %%
alt = "Swapped before layer 23 or earlier, Rome has about 40 % and Paris 0; later, Paris 77 %"
title = "The row of France is exchanged for that of Italy"
with plots.figure(title, "exchanged before layer", "chance of the next token", alt=alt) as axes:
    plots.line(axes, range(L + 1), after_swap[:, rome], "Rome", at=6, dy=12)
    plots.line(axes, range(L + 1), after_swap[:, paris], "Paris", at=25, dy=12)
    axes.set_ylim(0, 1)

# %% [markdown]
# One single layer carries it over. Up to there " Italy" decides, although the text says "France" to whoever reads it;
# behind it the row has been read, and nobody asks for it any more. Which layer, and which of its heads looked at
# " France"?

# %%
italian = after_swap[:, rome] > after_swap[:, paris]
carrier = int(italian.sum()) - 1
assert italian[: carrier + 1].all()  # there is one change, and no way back
x_there = rms_norm(layers(embedding[tokens], 0, carrier), weight(carrier, "input_layernorm"))
q_there, k_there, _ = queries_keys_values(x_there, carrier)
looks = attention_weights(rope(q_there, positions), rope(k_there, positions))[:, -1, at]  # [H]
print(f"layer {carrier}; its heads' weight on France:", [f"{w:.2f}" for w in looks])
assert looks.max() > 0.8

# %% [markdown]
# One head gives it nine tenths of its weight. Keep this in mind for the whole course: later tokens learn about earlier
# ones through their keys and values, layer by layer, and **through nothing else**.
#
# **Your turn.** Exchange the row of the last token, `at=4`, in place of that of " France". Where do you expect the
# curves to cross, and which one is up on the left?
#
# ### Chat
#
# A chat model is the same model. It was trained on conversations written in a fixed form, so we write our question in
# that form, and let it go on. The form comes with the model, as a **chat template**:

# %%
messages = [{"role": "user", "content": "What is the capital of France?"}]
prompt = tokenizer.apply_chat_template(messages)
print(prompt)

# %% [markdown]
# `<|im_start|>` and `<|im_end|>` look like text, but each is one token, with a meaning that was trained:

# %%
asked = tokenizer.encode(prompt, add_special_tokens=False)  # the template has them all
print([tokenizer.decode([token], skip_special_tokens=False) for token in asked[:3]])
replied = greedy(asked, 8)[len(asked):]
print(tokenizer.decode(replied, skip_special_tokens=False))
assert replied[-1] in config.eos_token_ids

# %% [markdown]
# The last token is the mark that ends an answer ("eos", end of sequence). A server stops there; our loop would just go
# on.
#
# ### GPT-2
#
# The older architecture does the same things with other parts:
#
# | | Llama | GPT-2 |
# |---|---|---|
# | position | turns queries and keys (rope) | a learned row for each position, added at the start |
# | norm | root mean square | LayerNorm: takes the mean away first, and has a bias |
# | heads | fewer for keys and values | as many as for queries |
# | MLP | SiLU with a gate | GELU, a curve much like SiLU, without a gate |
# | products | no bias | a bias in every layer's, matrices stored as [in, out] |
#
# We make a small GPT-2 with random weights in the format of the real one, so that nothing has to be downloaded. (With
# a network, `transformers.GPT2LMHeadModel.from_pretrained("gpt2").eval()` is the real one: 12 heads, 12 layers.)

# %%
transformers.utils.logging.disable_progress_bar()
torch.manual_seed(0)
gpt2_config = transformers.GPT2Config(
    n_embd=48, n_layer=3, n_head=4, n_positions=64, vocab_size=300,
    initializer_range=0.3, bos_token_id=0, eos_token_id=0,
)
hf_gpt2 = transformers.GPT2LMHeadModel(gpt2_config).eval()
W2 = {name.removeprefix("transformer."): w for name, w in hf_gpt2.state_dict().items()}


# %%
def with_bias(x, name):
    return x @ W2[name + ".weight"] + W2[name + ".bias"]


def gpt2_norm(x, name):
    return layer_norm(x, x.shape[-1:], W2[name + ".weight"], W2[name + ".bias"])


def gpt2_attend(x, at):
    """One product makes queries, keys and values; they have the same number of heads."""
    qkv = with_bias(x, at + "attn.c_attn")
    q, k, v = rearrange(qkv, "t (three h d) -> three t h d", three=3, h=gpt2_config.n_head)
    return with_bias(rearrange(attention(q, k, v), "t h d -> t (h d)"), at + "attn.c_proj")


# %%
def gpt2(tokens):
    """Token ids [T] -> logits [T, V]."""
    x = W2["wte.weight"][tokens] + W2["wpe.weight"][: len(tokens)]
    for layer in range(gpt2_config.n_layer):
        at = f"h.{layer}."
        x = x + gpt2_attend(gpt2_norm(x, at + "ln_1"), at)
        up = with_bias(gpt2_norm(x, at + "ln_2"), at + "mlp.c_fc")
        x = x + with_bias(gelu(up, approximate="tanh"), at + "mlp.c_proj")
    return gpt2_norm(x, "ln_f") @ W2["wte.weight"].T


print(list(gpt2([7, 1, 288]).shape), "= [T, V]")

# %% [markdown]
# `attention` serves both: with as many heads for keys as for queries, r is 1.

# %% [markdown]
# ## Check it
#
# Is it right? "The text looks fine" is a weak test: a model with a wrong scale or a wrong rope often still writes
# fine sentences, as we will see. So we compare all logits with those of a program that we did not write, Hugging
# Face's transformers. The weights carry the names that it uses, so they go straight in:

# %%
hf_fields = {k: v for k, v in checkpoint.config.items() if k != "model_type"}
with torch.device("meta"):  # the shapes alone; the weights come from W
    hf_llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf_fields)).eval()
hf_llama.load_state_dict(W | {"lm_head.weight": embedding}, assign=True)
# rope's speeds are no weights: they are computed anew
hf_llama.model.rotary_emb = type(hf_llama.model.rotary_emb)(hf_llama.config)


# %%
def logits_of(hf_model):
    return lambda tokens: hf_model(torch.tensor([tokens])).logits[0]


mine = llama(answer)
expected = logits_of(hf_llama)(answer)
assert torch.allclose(mine, expected, atol=1e-3)
print(f"all {mine.numel():,} logits agree; they reach {expected.abs().max():.0f}")


# %% [markdown]
# One text is not much of a proof. Random tokens, of random lengths, are texts that nobody thought of. The two programs
# add in another order, so they round differently, and some of these texts magnify that; hence the wide bound of 0.2.

# %%
def random_tokens(seed, vocabulary):
    random = Random(seed)
    return [random.randrange(vocabulary) for _ in range(random.randint(1, 30))]


def farthest(ours, theirs, vocabulary, texts):
    """The largest difference of any two logits, over random texts."""
    some = [random_tokens(seed, vocabulary) for seed in range(texts)]
    return max(float((ours(tokens) - theirs(tokens)).abs().max()) for tokens in some)


# %%
off = farthest(llama, logits_of(hf_llama), V, texts=8)
off_gpt2 = farthest(gpt2, logits_of(hf_gpt2), 300, texts=50)
assert off < 0.2 and off_gpt2 < 1e-3
print("Llama and GPT-2: all logits of random texts agree, but for roundings")

# %% [markdown]
# A real mistake is off by whole numbers: see "What must hold".
#
# ## The package's version
#
# Here is the layer that you built, as the engine has it, read from the package as it is now:

# %%
from minipaged.models.llama import LlamaLayer

show_source(LlamaLayer.__call__, LlamaLayer.attention)

# %% [markdown]
# What is different, and why:
#
# - **T counts tokens of many sequences at once.** The rows of different requests stand one below the other. All
#   products treat every row alike and need not know; only attention has to, and `batch` tells it.
# - **q, k and v come from one product**, and so do gate and up: the rows are read once, and there is one call instead
#   of three. `add_to=x` adds in the same go.
# - **Keys and values are written into `layer_cache`**, and attention reads them from there: those of this step and
#   those of all steps before. Rope and writing are one call, because a turned key is needed nowhere else.
# - **`backend` does the arithmetic.** The plain one is what you have just written. Others do the same in C++ or in
#   Triton ([chapter 7](07_the_triton_kernel.ipynb)).
# - `qk_norm` is one more norm, which Qwen3 has; `kv_scales` are for keys and values that are kept in eight bits.

# %%
from kernels import reference

show_source(reference.rms_norm, reference.rope, reference.silu_and_mul)

# %% [markdown]
# The norm is taken in fp32 even if everything else is in 16 bits, and `cos` and `sin` come in from outside, computed
# once for all layers.
#
# Do both agree? The model wants memory for keys and values, in a pool of blocks. For now we hand it one with blocks in
# a row; what these tables mean is the matter of chapters 4 to 6.

# %%
from kernels import Batch, new_cache
from minipaged.memory import blocks_for


def package_logits(model, tokens, block_size=16):
    count, blocks, shape = len(tokens), blocks_for(len(tokens), block_size), model.config
    cache = new_cache(shape.num_layers, blocks, block_size, shape.num_kv_heads, shape.head_size,
                      torch.float32).zero_()
    batch = Batch(
        slot_mapping=torch.arange(count), query_start=torch.tensor([0, count]),
        context_lens=torch.tensor([count]), block_tables=torch.arange(blocks)[None],
    )
    return model.logits(model(torch.tensor(tokens), torch.arange(count), cache, batch))


# %%
package = load("smollm2")
with tempfile.TemporaryDirectory() as folder:  # the same GPT-2, by way of a real checkpoint
    hf_gpt2.save_pretrained(folder)
    _, package_gpt2 = load_model(open_checkpoint(folder))

off = farthest(llama, lambda tokens: package_logits(package.model, tokens), V, texts=8)
off_gpt2 = farthest(gpt2, lambda tokens: package_logits(package_gpt2, tokens), 300, texts=50)
assert off < 0.2 and off_gpt2 < 1e-3
print("Llama and GPT-2: the package agrees, too")

# %% [markdown]
# And greedy decoding with the whole engine, memory, scheduler and all, token by token:

# %%
from minipaged import LLM, SamplingParams

with LLM("smollm2", device="cpu", num_blocks=16) as llm:
    greedily = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    (output,) = llm.generate([text], greedily)
assert output.outputs[0].token_ids == answer[len(tokens):]
print(output.outputs[0].text)

# %% [markdown]
# Loading we took from the package from the start. It does one thing that our `W = ...` doesn't: every name and shape is
# checked before the first tensor is read, so a wrong file ends in a sentence and not in a wrong answer. Say that a
# config speaks of other tokens, and of a matrix of its own for the way back:

# %%
from minipaged.models.checkpoint import check_tensors

wrong_config = replace(config, vocab_size=50000, tie_word_embeddings=False)
found = {name: tuple(w.shape) for name, w in W.items()}
try:
    check_tensors(Llama.tensor_shapes(wrong_config), found, Path("model.gguf"))
except ModelError as error:
    print(*str(error).split(": ", 1), sep=":\n    ")

# %% [markdown]
# ## What must hold, and what breaks if it doesn't
#
# **A token never sees the future.** If we change the last token, nothing before it may change. This is what lets a
# server keep the numbers of old tokens. Here it holds, and without the mask it doesn't:

# %%
other = [*answer[:-1], 1000]
changed = (llama(other) - mine).abs().amax(-1) > 1e-3  # for each position
assert changed.tolist() == [False] * (len(answer) - 1) + [True]
print("rows of logits that change with the last token:", int(changed.sum()))

# %%
right_weights = attention_weights
attention_weights = lambda q, k: softmax(
    einsum(q, repeat(k, "t g d -> t (g r) d", r=H // G), "i h d, j h d -> h i j") / D**0.5, -1)
seeing = (llama(other) - llama(answer)).abs().amax(-1) > 1e-3
attention_weights = right_weights
assert seeing.all()
print("without the mask:", int(seeing.sum()), "of", len(answer))

# %% [markdown]
# **Each token keeps its own position.** If they are counted wrongly, by even one for a part of the tokens, distances
# are wrong. A shift of *all* of them changes nothing, since rope sees only differences; so a test that shifts
# everything finds nothing.

# %%
right_rope = rope
shifts = {"all by 100": torch.full((17,), 100), "the last 8 by one": torch.arange(17) > 8}
shifted = {}
for name, shift in shifts.items():
    rope = lambda x, positions, shift=shift: right_rope(x, positions + shift)
    shifted[name] = float((llama(answer) - mine).abs().max())
rope = lambda x, positions: x
without = greedy(tokens, 12)
rope = right_rope

# %%
assert shifted["all by 100"] < 1e-2 and shifted["the last 8 by one"] > 1
print("shifted, logits are off by:", {name: f"{most:.0f}" for name, most in shifted.items()})
assert without != answer
print("without any positions:", tokenizer.decode(without))

# %% [markdown]
# **The scores are divided by √D.** Without it the softmax gives nearly all its weight to a few tokens. The text still
# looks like text, and that is the trap: a comparison of logits shows it for certain.

# %%
right_weights = attention_weights
attention_weights = lambda q, k: right_weights(q * D**0.5, k)
wrong, text_of_wrong = llama(answer), greedy(tokens, 12)
attention_weights = right_weights
assert (wrong - mine).abs().max() > 1
print(f"logits are off by up to {(wrong - mine).abs().max():.0f}")
print(tokenizer.decode(text_of_wrong))

# %% [markdown]
# ## Exercises
#
# Fill in the functions; each is followed by a test that says how far you are.
#
# **1. Count before you load** (warm-up). How many numbers does a model with this config have? It should be known before
# a single one is read, also for a model that would not fit into memory.

# %% tags=["exercise"]
def count_weights(config):
    """config: a Llama's ModelConfig, without biases and without qk_norm -> int.

    Reads num_layers, hidden_size, num_heads, num_kv_heads, head_size (which need not be
    hidden_size / num_heads), intermediate_size, vocab_size, tie_word_embeddings.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_count_weights(count_weights):
    count_weights = own(count_weights)
    for seed in range(100):
        random = Random(seed)
        groups = random.randint(1, 9)
        sizes = dict(num_kv_heads=groups, num_heads=groups * random.randint(1, 9))
        for name in "num_layers hidden_size head_size intermediate_size vocab_size".split():
            sizes[name] = random.randint(1, 999)
        sizes["tie_word_embeddings"] = random.random() < 0.5
        shapes = Llama.tensor_shapes(replace(config, **sizes)).values()
        right = sum(torch.Size(shape).numel() for shape in shapes)
        got = count_weights(replace(config, **sizes))
        assert equal(got, right), f"{sizes}: {right:,}, not {got}"
    llama_405b = replace(
        config, num_layers=126, hidden_size=16384, num_heads=128, num_kv_heads=8, head_size=128,
        intermediate_size=53248, vocab_size=128256, tie_word_embeddings=False,
    )
    got = count_weights(llama_405b)
    assert equal(got, 405_853_388_800), f"Llama-3.1-405B has 405,853,388,800, not {got}"


attempt(test_count_weights, count_weights)

# %% [markdown]
# **2. How surprised is it?** The *perplexity* of a text is $\exp$ of the mean of $-\log p$ over its tokens, each $p$
# being the chance that the model gave to the token that did come. The first token has no forecast. A model that always
# wavers between ten tokens has a perplexity of 10. (Then try it: a sentence, and the same words in another order.)

# %% tags=["exercise"]
def perplexity(tokens, logits):
    """tokens: a list of T >= 2; logits [T, V], as llama(tokens) gives them -> a float.

    Logits may be hundreds apart, and a chance be as small as 1e-60: right to 0.01 % even then.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_perplexity(perplexity):
    perplexity = own(perplexity)

    def check(tokens, logits, case):
        right = 0.0
        for row, token in zip(logits.double(), tokens[1:]):
            right += float(row.logsumexp(0) - row[token]) / (len(tokens) - 1)
        right = float(torch.tensor(right).double().exp())
        got = perplexity(tokens, logits)
        assert equal(got, right, 1e-4), f"{case}: {right:.6g}, not {got}"

    for seed in range(60):
        generator, random = torch.Generator().manual_seed(seed), Random(seed)
        T, size, scale = random.randint(2, 9), random.randint(2, 30), random.choice([0, 1, 9])
        logits = scale * torch.randn(T, size, generator=generator) + random.randint(-99, 99)
        some = [random.randrange(size) for _ in range(T)]
        check(some, logits, f"seed {seed}, T={T}, V={size}")
    far = torch.tensor([[0.0, 150.0], [0.0, -150.0], [9.0, 9.0], [0.0, 0.0], [1.0, 2.0]])
    check([1, 0, 0, 1, 1], far, f"tokens [1, 0, 0, 1, 1], logits {far.tolist()}")
    check(answer, mine, "the answer above")


attempt(test_perplexity, perplexity)

# %% [markdown]
# **3. Heads without copies.** `attention` repeats keys and values, so that each query head has its own, and that is
# memory to write and to read again. Do it without: no tensor may hold the keys or the values several times over,
# neither one that you make nor one that PyTorch makes on the way. Give the queries a group dimension, and let
# `einsum` do the rest, or take one head after the other. (A trap: where the leading dimensions of two factors differ,
# `@` spreads the smaller factor out, and that is a copy, too.)

# %% tags=["exercise"]
def grouped_attention(q, k, v):
    """q [T, H, D], k and v [T, G, D], of any sizes, H a multiple of G -> [T, H, D].

    What `attention` gives, made of products and a softmax: PyTorch's own attention functions
    may not be called.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_grouped_attention(grouped_attention):
    from torch.utils._python_dispatch import TorchDispatchMode

    grouped_attention = own(grouped_attention, forbid=[attention, attention_weights, repeat])

    def is_repeated(tensor):
        """Whether most of its numbers stand in it more than once."""
        for dim in (d for d in range(tensor.ndim) if tensor.stride(d) == 0):
            tensor = tensor.narrow(dim, 0, 1)  # spread out, but not in memory
        times = tensor[tensor.isfinite()].unique(return_counts=True)[1]
        return len(times) >= 8 and bool(times.float().quantile(0.5) > 1)

    class Watch(TorchDispatchMode):
        """Looks at all that PyTorch computes, if it has so many numbers or more."""

        def __init__(self, case, size):
            super().__init__()
            self.case, self.size = case, size

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            got, name = op(*args, **(kwargs or {})), op.name().removeprefix("aten::")
            assert "attention" not in name, f"it calls {name}: write it yourself"
            if not op.is_view and "empty" not in name:
                for part in [got] if op._schema.is_mutable else [got, *args]:
                    floats = isinstance(part, torch.Tensor) and part.is_floating_point()
                    copies = floats and part.numel() >= self.size and is_repeated(part)
                    told = f"in a tensor of {name} most numbers stand more than once"
                    assert not copies, f"{self.case}: {told}"
            return got

    for seed in range(40):
        random, generator = Random(seed), torch.Generator().manual_seed(seed)
        T, size = random.randint(1, 9), random.choice([4, 6, 8])
        groups, share = random.randint(1, 4), random.randint(1, 4)
        q = 3 * torch.randn(T, groups * share, size, generator=generator)
        k, v = torch.randn(2, T, groups, size, generator=generator)
        spread = (x.repeat_interleave(share, 1).transpose(0, 1) for x in (k, v))
        right = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1), *spread, is_causal=True).transpose(0, 1)
        case = f"T={T}, H={groups * share}, G={groups}, D={size}"
        with Watch(case, q.numel() if T > 3 else 10**9):
            got = grouped_attention(q, k, v)
        assert isinstance(got, torch.Tensor) and got.shape == q.shape, f"{case}: not [T, H, D]"
        off = (got - right).abs().max()
        assert off < 1e-5, f"{case}: off by {off}"


attempt(test_grouped_attention, grouped_attention)

# %% [markdown]
# **4. Stop in time.** Write a greedy decoder that ends with the mark of the end, and never gives more than it was
# asked for. It should work for any model that maps tokens to logits.

# %% tags=["exercise"]
def greedy_until(model, tokens, max_tokens, end):
    """-> the new tokens only, a list, at most max_tokens. A new token of `end` is the last one.

    model: a function from a list of T tokens to logits [T, V]; called with all tokens so far,
    once for each new token and not again.
    tokens: the prompt, a list, which may contain tokens of `end` and stays as it is.
    end: the ids of the tokens that end an answer, a tuple; it may be empty.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_greedy_until(greedy_until):
    greedy_until = own(greedy_until, forbid=[greedy, llama])

    def a_model(follows, seen):
        def model(tokens):
            seen.append([int(token) for token in tokens])
            logits = torch.full((len(tokens), 12), -9.0)
            logits[-1, (follows[seen[-1][-1]] + len(tokens)) % 12] = -3  # the other rows lie
            logits[:-1, follows[seen[-1][0]]] = -1
            return logits

        return model

    for seed in range(200):
        random, seen = Random(seed), []
        follows = [random.randrange(12) for _ in range(12)]
        tokens = [random.randrange(12) for _ in range(random.randint(1, 5))]
        most, end = random.randint(0, 12), tuple(random.sample(range(12), random.randint(0, 3)))
        right = []
        while len(right) < most and not (right and right[-1] in end):
            all_tokens = tokens + right
            right.append((follows[all_tokens[-1]] + len(all_tokens)) % 12)
        got = greedy_until(a_model(follows, seen), tokens, most, end)
        case = f"prompt {tokens}, max_tokens={most}, end={end}"
        assert equal(got, right), f"{case}: {right}, not {got}"
        calls = [tokens + right[:i] for i in range(len(right))]
        assert seen == calls, f"{case}: the model should be called with {calls}, not {seen}"


attempt(test_greedy_until, greedy_until)

# %% [markdown]
# **5. What does it think on the way?** (open). `x` has the same shape after every layer. Send it through the last norm
# and the vocabulary after each of them, and look at the best token: when does " Paris" appear, and what was it before?
# Does that fit to the layer in which the fact came over? Try other sentences. This is known as the *logit lens*.

# %% tags=["exercise"]
def logit_lens(tokens):
    """A list of token ids -> L token ids: what each layer, the first to the last, says comes
    after the last token. Use what was built above, and not transformers' model.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_logit_lens(logit_lens):
    inner = hf_llama.model
    logit_lens = own(logit_lens, forbid=[type(inner).forward, greedy])
    texts = [tokens, random_tokens(1, V), random_tokens(4, V), tokenizer.encode("One")]
    for some in texts:
        states = hf_llama(torch.tensor([some]), output_hidden_states=True).hidden_states
        rows = [inner.norm(state[0, -1]) for state in states[1:-1]] + [states[-1][0, -1]]
        seen = logit_lens(some)
        case = f"{tokenizer.decode(some)[:40]!r}: "
        assert isinstance(seen, (list, tuple)) and len(seen) == L, f"{case}one for each layer"
        for layer, (token, row) in enumerate(zip(seen, rows)):
            theirs = row @ embedding.T
            best = int(theirs.argmax())
            number = any(equal(token, at) for at in {best, *theirs.topk(3).indices.tolist()})
            close = number and theirs[int(token)] > theirs[best] - 0.2  # rounding may decide
            assert close, f"{case}layer {layer} says {best}, not {token}"


attempt(test_logit_lens, logit_lens)

# %% [markdown]
# ## What's next
#
# `greedy` computes the whole text anew for each token. [Chapter 2](02_the_kv_cache.ipynb) measures what that costs, and
# finds the two tensors that are worth keeping: you have seen why, when " Italy" stood in for " France".
#
# ## Sources
#
# - Vaswani et al., *Attention Is All You Need*, 2017: attention, heads, the scale.
# - Radford et al., *Language Models are Unsupervised Multitask Learners*, 2019: GPT-2.
# - Su et al., *RoFormer: Enhanced Transformer with Rotary Position Embedding*, 2021: rope.
# - Zhang and Sennrich, *Root Mean Square Layer Normalization*, 2019. Shazeer, *GLU Variants Improve Transformer*, 2020:
#   the gated MLP. Ainslie et al., *GQA*, 2023: fewer key/value heads.
# - Touvron et al., *LLaMA*, 2023: these parts together. Allal et al., *SmolLM2*, 2025: the model of this course.
# - Meng et al., *Locating and Editing Factual Associations in GPT*, 2022: exchanging rows to see where a fact is.
#   nostalgebraist, *interpreting GPT: the logit lens*, 2020.
# - *The Llama 3 Herd of Models*, 2024: the shape of the 405B model.
