# %% [markdown]
# # 1. From weights to text
#
# A language model on disk is a list of named matrices. A server turns text into numbers, sends the numbers
# through the matrices, and turns what comes out into text again. This chapter builds that path in plain PyTorch:
# first the Llama architecture with real weights, then GPT-2. Every later chapter makes it faster or lets more
# people share it; none changes what it computes.
#
# **You need**: Python, PyTorch, and what a matrix product is. **You get**: a function `llama(tokens)` that you
# can read in one screen, and that agrees with the package and with Hugging Face's transformers.

# %% [markdown]
# ## The question
#
# What exactly must be computed to get one more word? Everything in this course follows from the answer: which
# numbers are needed again at the next word (chapter 2), how much memory they take (chapter 3), and where they may
# lie (chapters 4 to 7). So we start with a model in which nothing is hidden.

# %% [markdown]
# ## The idea
#
# A text is cut into **tokens**, and each token is a number. The model looks at all tokens so far and gives a
# **logit**, a score, to every token that could come next. Take the best one, append it, and start again:
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
# What heads and the MLP are comes below.

# %% [markdown]
# ## Build it
#
# ### The weights
#
# `smollm2` is SmolLM2-135M-Instruct, a real chat model, small enough for a laptop. The package fetches it once and
# keeps it.

# %%
import torch
from einops import einsum, rearrange, repeat
from torch.nn.functional import gelu, layer_norm, silu, softmax

from kernels.packed import floats
from minipaged.models import ModelConfig, load, open_checkpoint
from minipaged.teaching import attempt, plots, show_source

_ = torch.set_grad_enabled(False)  # we only run the model, and never train it

# %%
checkpoint = open_checkpoint("smollm2")
config = ModelConfig.from_hf(checkpoint.config)
L, E, V = config.num_layers, config.hidden_size, config.vocab_size
H, G, D, F = config.num_heads, config.num_kv_heads, config.head_size, config.intermediate_size
print(f"L={L} layers, E={E}, H={H} query heads, G={G} key/value heads, D={D}, F={F}, V={V}")

# %% [markdown]
# The file keeps most weights in 4 bits; `floats` makes fp32 of them. Here are all the tensors of one layer, and
# those outside the layers:

# %%
from minipaged.models.llama import Llama

stored = checkpoint.names(Llama.tensor_shapes(config))  # name in the file -> our name
W = {name: floats(checkpoint.tensor(key, torch.float32)) for key, name in stored.items()}
for name, tensor in W.items():
    if "layers." not in name or "layers.0." in name:
        print(f"{name:45} {list(tensor.shape)}")

# %%
parts = {"embedding": "embed", "attention": "self_attn", "MLP": "mlp", "norms": "norm"}
count = {
    part: sum(w.numel() for name, w in W.items() if key in name)
    for part, key in parts.items()
}
print(f"{sum(count.values()):,} numbers in all")
assert sum(count.values()) == sum(w.numel() for w in W.values())  # each counted once

# %%
with plots.figure("Where the weights are", x="million numbers", size=(6.8, 1.9)) as axes:
    axes.barh(list(parts), [n / 1e6 for n in count.values()], color=plots.COLORS[0])
    for row, n in enumerate(count.values()):
        axes.text(n / 1e6 + 1, row, f"{n / 1e6:.2f}", va="center")
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
# A token is often a word with the space before it. Rare words fall into several pieces, so the number of tokens
# is not the number of words:

# %%
print([tokenizer.decode([t]) for t in tokenizer.encode(" PagedAttention")])

# %% [markdown]
# ### Tokens to rows of numbers
#
# The embedding is a table with a row for each token. Looking up is indexing:

# %%
x = W["model.embed_tokens.weight"][tokens]
print(x.shape, "= [T, E]")


# %% [markdown]
# ### Norm
#
# Before each piece of work the rows are brought to a common length: divide by the root of the mean square, then
# scale each of the E columns by a learned weight. `norm_eps` keeps the division away from zero.

# %%
def rms_norm(x, weight):
    mean_square = x.pow(2).mean(-1, keepdim=True)
    return x * torch.rsqrt(mean_square + config.norm_eps) * weight


y = rms_norm(x, W["model.layers.0.input_layernorm.weight"])
print("root mean square before:", [f"{v:.2f}" for v in x.pow(2).mean(-1).sqrt()])
ones = rms_norm(x, torch.ones(E))
print("and after, weights left out:", [f"{v:.2f}" for v in ones.pow(2).mean(-1).sqrt()])

# %% [markdown]
# ### Queries, keys, values
#
# Three products make three things of each token: a **query** (what it looks for), a **key** (what it can be found
# by) and a **value** (what it has to say). Each is cut into heads of D numbers. Llama models have fewer heads for
# keys and values than for queries; here each key/value head serves three query heads. That is *grouped-query
# attention*. Chapter 2 keeps keys and values in memory, and this makes them three times smaller.

# %%
layer0 = "model.layers.0.self_attn."
q = rearrange(y @ W[layer0 + "q_proj.weight"].T, "t (h d) -> t h d", h=H)
k = rearrange(y @ W[layer0 + "k_proj.weight"].T, "t (g d) -> t g d", g=G)
v = rearrange(y @ W[layer0 + "v_proj.weight"].T, "t (g d) -> t g d", g=G)
print("q", list(q.shape), " k", list(k.shape), " v", list(v.shape))


# %% [markdown]
# ### Positions
#
# So far a token does not know where it stands. Llama turns queries and keys by an angle that grows with the
# position (**rope**, rotary position embedding). Column `i` is paired with column `i + D/2`; each pair is a point in
# a plane, and it turns at its own speed, the first ones fast, the last ones slowly.

# %%
def rope(x, positions):
    speed = config.rope.theta ** -(torch.arange(0, D, 2) / D)  # [D/2], radians a position
    angle = rearrange(positions, "t -> t 1 1") * speed  # [T, 1, D/2]
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


# %% [markdown]
# Why turn them? A product of two turned vectors depends on the *difference* of their angles only. So what a query
# makes of a key depends on how far apart they are, and not on where in the text they stand:

# %%
one_q, one_k = q[:1, :1], k[:1, :1]
for i, j in [(7, 3), (107, 103), (7, 5)]:
    score = (rope(one_q, torch.tensor([i])) * rope(one_k, torch.tensor([j]))).sum()
    print(f"query at {i:3}, key at {j:3}, {i - j} apart: {score:8.3f}")

# %%
apart = torch.arange(0, 64)
turned = rope(repeat(one_k, "1 1 d -> t 1 d", t=64), apart)[:, 0]  # [64, D]
with plots.figure("The first number of three pairs", "position", "value") as axes:
    for pair in (0, 4, 12):
        plots.line(axes, apart, turned[:, pair], f"pair {pair}")

# %% [markdown]
# ### Attention
#
# Each query is multiplied with all keys. The products, divided by $\sqrt{D}$ so that they stay moderate, become
# weights by a softmax, and the answer is the values' sum with these weights:
#
# $$ a_{ij} = \frac{\exp(q_i \cdot k_j / \sqrt{D})}{\sum_{t \le i} \exp(q_i \cdot k_t / \sqrt{D})},
# \qquad o_i = \sum_{j \le i} a_{ij} v_j $$
#
# Only $j \le i$ counts: a token sees itself and those before it. That is the **causal mask**, and it is the reason
# why a server can remember anything at all, as the next chapter shows.

# %%
def attention_weights(q, k):
    """q [T, H, D], k [T, G, D] -> [H, T, T]: how much query i listens to key j."""
    k = repeat(k, "t g d -> t (g r) d", r=H // G)  # each key head serves H/G query heads
    scores = einsum(q, k, "i h d, j h d -> h i j") / D**0.5
    future = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
    return softmax(scores.masked_fill(future, -torch.inf), -1)


def attention(q, k, v):
    v = repeat(v, "t g d -> t (g r) d", r=H // G)
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
with plots.figure(title, "keys", "queries", size=(4.6, 3.6)) as axes:
    plots.matrix(axes, shown.tolist(), names, names, form=".2f")


# %% [markdown]
# ### The rest of a layer
#
# The heads' answers are laid side by side and mixed by one more product. Then comes the **MLP** (multi-layer
# perceptron), in which every token is on its own: two products up to width F, one of which opens and closes the other
# like a gate, and one down.

# %%
def mlp(x, layer):
    gate = x @ W[f"model.layers.{layer}.mlp.gate_proj.weight"].T
    up = x @ W[f"model.layers.{layer}.mlp.up_proj.weight"].T
    return (silu(gate) * up) @ W[f"model.layers.{layer}.mlp.down_proj.weight"].T


# %% [markdown]
# Both halves are *added* to `x`. Nothing overwrites it, and every layer can use what any layer before has written.

# %%
def attend(x, layer, positions):
    """The attention of one layer, with its four products: [T, E] -> [T, E]."""
    w = {name: W[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkvo"}
    q = rearrange(x @ w["q"].T, "t (h d) -> t h d", h=H)
    k = rearrange(x @ w["k"].T, "t (g d) -> t g d", g=G)
    v = rearrange(x @ w["v"].T, "t (g d) -> t g d", g=G)
    o = attention(rope(q, positions), rope(k, positions), v)
    return rearrange(o, "t h d -> t (h d)") @ w["o"].T


# %% [markdown]
# ### The whole model

# %%
def llama(tokens):
    """Token ids [T] -> logits [T, V]."""
    positions = torch.arange(len(tokens))
    x = W["model.embed_tokens.weight"][tokens]
    for layer in range(L):
        norms = f"model.layers.{layer}."
        x = x + attend(rms_norm(x, W[norms + "input_layernorm.weight"]), layer, positions)
        x = x + mlp(rms_norm(x, W[norms + "post_attention_layernorm.weight"]), layer)
    return rms_norm(x, W["model.norm.weight"]) @ W["model.embed_tokens.weight"].T


logits = llama(tokens)
print(list(logits.shape), "= [T, V]")

# %% [markdown]
# One row for every token of the input. Each row is a forecast of what follows *that* token; to continue the text we
# need the last one only. What does it say?

# %%
chances = softmax(logits[-1], -1)
best = chances.topk(5)
for chance, token in zip(best.values, best.indices):
    print(f"{chance:6.1%}  {tokenizer.decode([token])!r}")

# %% [markdown]
# ### Greedy decoding
#
# Always taking the best token is called **greedy**. It leaves nothing to luck, so it is what we compare with: two
# programs that are both right give the same tokens, unless two logits are so close that rounding decides.

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
# ### Chat
#
# A chat model is the same model. It was trained on conversations written in a fixed form, so we write our question in
# that form, and let it go on:

# %%
messages = [{"role": "user", "content": "What is the capital of France?"}]
prompt = tokenizer.apply_chat_template(messages)
print(prompt)

# %%
asked = tokenizer.encode(prompt, add_special_tokens=False)
replied = greedy(asked, 8)[len(asked):]
print(tokenizer.decode(replied, skip_special_tokens=False))
assert replied[-1] in config.eos_token_ids

# %% [markdown]
# The last token is the mark that ends an answer. A server stops there; our loop would just go on.
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
# | MLP | SiLU with a gate | GELU |
# | products | no bias | a bias in every layer's, matrices stored the other way round |
#
# We make a small GPT-2 with random weights in the format of the real one, so that nothing has to be downloaded. (With
# a network, `transformers.GPT2LMHeadModel.from_pretrained("gpt2").eval()` is the real one: 12 heads, 12 layers.)

# %%
import tempfile

import transformers

transformers.utils.logging.disable_progress_bar()
torch.manual_seed(0)
hf_config = transformers.GPT2Config(
    n_embd=48, n_layer=3, n_head=4, n_positions=64, vocab_size=300,
    initializer_range=0.3, bos_token_id=0, eos_token_id=0,
)
hf_gpt2 = transformers.GPT2LMHeadModel(hf_config).eval()
W2 = dict(hf_gpt2.state_dict())


# %%
def gpt2(tokens, W, heads, layers):
    """Token ids [T] -> logits [T, V]."""

    def linear(x, name):
        return x @ W[name + ".weight"] + W[name + ".bias"]

    def norm(x, name):
        return layer_norm(x, x.shape[-1:], W[name + ".weight"], W[name + ".bias"])

    x = W["transformer.wte.weight"][tokens] + W["transformer.wpe.weight"][: len(tokens)]
    for layer in range(layers):
        at = f"transformer.h.{layer}."
        qkv = linear(norm(x, at + "ln_1"), at + "attn.c_attn")
        q, k, v = rearrange(qkv, "t (three h d) -> three h t d", three=3, h=heads)
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        scores = einsum(q, k, "h i d, h j d -> h i j") / q.shape[-1] ** 0.5
        o = softmax(scores.masked_fill(future, -torch.inf), -1) @ v
        x = x + linear(rearrange(o, "h t d -> t (h d)"), at + "attn.c_proj")
        up = linear(norm(x, at + "ln_2"), at + "mlp.c_fc")
        x = x + linear(gelu(up, approximate="tanh"), at + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ W["transformer.wte.weight"].T


gpt2_tokens = torch.randint(300, (20,)).tolist()
print(list(gpt2(gpt2_tokens, W2, heads=4, layers=3).shape), "= [T, V]")

# %% [markdown]
# ## Check it
#
# Is it right? "The text looks fine" is a weak test: a model with a wrong scale or a wrong rope often still writes
# fine sentences. We compare all logits, with two programs that we did not write in this notebook.
#
# **transformers**, with the same weights. They carry the names that transformers uses, so they go straight in:

# %%
hf_fields = {k: v for k, v in checkpoint.config.items() if k != "model_type"}
with torch.device("meta"):  # the shapes alone; the weights come from W
    hf_llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf_fields)).eval()
hf_llama.load_state_dict(W | {"lm_head.weight": W["model.embed_tokens.weight"]}, assign=True)
# rope's speeds are no weights: they are computed anew
hf_llama.model.rotary_emb = type(hf_llama.model.rotary_emb)(hf_llama.config)
expected = hf_llama(torch.tensor([answer])).logits[0]

# %%
mine = llama(answer)
assert torch.allclose(mine, expected, atol=1e-3)
print(f"all {mine.numel():,} logits agree; they reach {expected.abs().max():.0f}")

# %%
expected_gpt2 = hf_gpt2(torch.tensor([gpt2_tokens])).logits[0]
assert torch.allclose(gpt2(gpt2_tokens, W2, heads=4, layers=3), expected_gpt2, atol=1e-4)
assert expected_gpt2.std() > 1  # not all alike: agreeing on nothing would be easy
print("GPT-2 agrees as well")

# %% [markdown]
# **The package.** Its model keeps keys and values in a pool of blocks. For now we hand it a pool with blocks in a row
# and ask for all logits of one sequence; what these tables mean is the matter of chapters 4 to 6.

# %%
from kernels import Batch, new_cache
from minipaged.memory import blocks_for


def package_logits(model, tokens, block_size=16):
    count, blocks = len(tokens), blocks_for(len(tokens), block_size)
    heads = model.config.num_kv_heads, model.config.head_size
    cache = new_cache(model.config.num_layers, blocks, block_size, *heads, torch.float32)
    cache.zero_()
    batch = Batch(
        slot_mapping=torch.arange(count), query_start=torch.tensor([0, count]),
        context_lens=torch.tensor([count]), block_tables=torch.arange(blocks)[None],
    )
    hidden = model(torch.tensor(tokens), torch.arange(count), cache, batch)
    return model.logits(hidden), cache


# %%
package = load("smollm2")
from_package, cache = package_logits(package.model, answer)
assert torch.allclose(mine, from_package, atol=1e-3)
keys = cache[:, 0].flatten(2, 3)[:, :, : len(answer)]  # [L, G, T, D]
assert (keys.abs().sum(-1) > 0).all()  # every layer really stored a key for every token
print("logits agree, and keys of", list(keys.shape), "= [L, G, T, D] are stored")

# %%
from minipaged.models import load_model

with tempfile.TemporaryDirectory() as folder:  # the same GPT-2, by way of a real checkpoint
    hf_gpt2.save_pretrained(folder)
    _, package_gpt2 = load_model(open_checkpoint(folder))
from_package, _ = package_logits(package_gpt2, gpt2_tokens)
assert torch.allclose(from_package, expected_gpt2, atol=1e-4)
print("GPT-2 agrees with the package")

# %% [markdown]
# One text each is not much of a proof. Random tokens, of random lengths, are texts that nobody thought of. Some of them
# make the model magnify its roundings in fp32, so the bound is wider here; the mistakes below are off by whole numbers.

# %%
for _ in range(10):
    some = torch.randint(V, (torch.randint(1, 30, ()),)).tolist()
    assert torch.allclose(llama(some), package_logits(package.model, some)[0], atol=0.2)
    few = [token % 300 for token in some]  # GPT-2's vocabulary is small
    theirs = package_logits(package_gpt2, few)[0]
    assert torch.allclose(gpt2(few, W2, heads=4, layers=3), theirs, atol=1e-4)
print("10 random texts: both models agree with the package's")

# %% [markdown]
# And greedy decoding with the whole engine, memory, scheduler and all:

# %%
from minipaged import LLM, SamplingParams

llm = LLM("smollm2", device="cpu", num_blocks=16)
(output,) = llm.generate([text], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
assert output.outputs[0].token_ids == answer[len(tokens):]
assert llm.stats().memory.peak_used > 0  # it did use its blocks
print(output.outputs[0].text)

# %% [markdown]
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
# - **q, k and v come from one product**, and so do gate and up: one large product is mostly faster than three small
#   ones.
# - **Keys and values are written into `layer_cache`**, and attention reads them from there: those of this step and
#   those of all steps before.
# - **`backend` does the arithmetic.** The plain one is what you have just written. Others do the same in C++ or in
#   Triton (chapter 7):

# %%
from kernels import reference

show_source(reference.rms_norm, reference.rope, reference.silu_and_mul)

# %% [markdown]
# And loading, which we skipped: every name and shape is checked before the first tensor is read, so a wrong file ends
# in a sentence and not in a wrong answer.

# %%
from minipaged.models.checkpoint import check_tensors

show_source(check_tensors)

# %% [markdown]
# ## What must hold, and what breaks if it doesn't
#
# **A token never sees the future.** If we change the last token, nothing before it may change. This is what lets a
# server keep the numbers of old tokens. Here it holds:

# %%
other = [*answer[:-1], 1000]
changed = (llama(other) - mine).abs().max(-1).values  # for each position
assert (changed[:-1] < 1e-4).all() and changed[-1] > 1
print("only the last row of logits changed")

# %% [markdown]
# **Each token keeps its own position.** If they are counted wrongly, by even one for a part of the tokens, distances
# are wrong. A shift of *all* of them changes nothing, since rope sees only differences, so a test that shifts
# everything finds nothing. And without any positions at all:

# %%
right_rope = rope
rope = lambda x, positions: right_rope(x, positions + 100)
assert torch.allclose(llama(answer), mine, atol=1e-2)  # all shifted: the same
rope = lambda x, positions: x
without = greedy(tokens, 12)
rope = right_rope
assert without != answer
print(tokenizer.decode(without))

# %% [markdown]
# **The scores are divided by √D.** Without it the softmax gives nearly all its weight to a few tokens. The text may
# still look like text, and that is the trap: only a comparison of logits shows it for certain.

# %%
right_weights = attention_weights
attention_weights = lambda q, k: right_weights(q * D**0.5, k)
wrong = llama(answer)
attention_weights = right_weights
print(f"logits are off by up to {(wrong - mine).abs().max():.0f}")
print(f"best next token: {tokenizer.decode([wrong[len(tokens) - 1].argmax()])!r}")
assert (wrong - mine).abs().max() > 1

# %% [markdown]
# ## Exercises
#
# Fill in the functions; each is followed by a test that says how far you are.
#
# **1. Count before you load** (warm-up). How many numbers does a model with this config have? Use the config only.

# %% tags=["exercise"]
def count_weights(config):
    """config: a Llama's ModelConfig, without biases -> how many numbers its tensors hold."""
    raise NotImplementedError


# %% tags=["test"]
def test_count_weights(count_weights):
    from dataclasses import replace

    assert count_weights(config) == sum(w.numel() for w in W.values())
    other = replace(
        config, num_layers=7, num_kv_heads=1, head_size=48, vocab_size=999,
        tie_word_embeddings=False,
    )
    shapes = [torch.Size(shape) for shape in Llama.tensor_shapes(other).values()]
    assert count_weights(other) == sum(shape.numel() for shape in shapes), f"for {other}"


attempt(test_count_weights, count_weights)

# %% [markdown]
# **2. How surprised is it?** The *perplexity* of a text is $\exp$ of the mean of $-\log p$ over its tokens, each $p$
# being the chance that the model gave to the token that did come. The first token has no forecast.

# %% tags=["exercise"]
def perplexity(tokens, logits):
    """tokens [T], a list; logits [T, V], as llama(tokens) gives them -> a float, 1 or more."""
    raise NotImplementedError


# %% tags=["test"]
def test_perplexity(perplexity):
    good = tokenizer.encode("The quick brown fox jumps over the lazy dog.")
    mixed = good[::-1]
    for some in (good, mixed):
        loss = hf_llama(torch.tensor([some]), labels=torch.tensor([some])).loss
        assert abs(perplexity(some, llama(some)) / loss.exp() - 1) < 1e-3


attempt(test_perplexity, perplexity)

# %% [markdown]
# **3. Heads without copies.** `attention` repeats keys and values, so that each query head has its own. Do it without
# `repeat`: give the queries a group dimension, and let `einsum` do the rest.

# %% tags=["exercise"]
def grouped_attention(q, k, v):
    """q [T, H, D], k and v [T, G, D] -> [T, H, D]: what `attention` gives, without repeat."""
    raise NotImplementedError


# %% tags=["test"]
def test_grouped_attention(grouped_attention):
    import unittest.mock

    torch.manual_seed(1)
    q, k, v = torch.randn(6, H, D), torch.randn(6, G, D), torch.randn(6, G, D)
    expected = attention(q, k, v)

    def forbidden(*_, **__):
        raise AssertionError("do it without repeat, and without attention")

    without = dict(repeat=forbidden, attention=forbidden)
    with unittest.mock.patch.dict(grouped_attention.__globals__, without):
        got = grouped_attention(q, k, v)
    assert got.shape == expected.shape and torch.allclose(got, expected, atol=1e-5)


attempt(test_grouped_attention, grouped_attention)

# %% [markdown]
# **4. Stop in time.** Write a greedy decoder that ends with the mark of the end, and never gives more than it was
# asked for. It should work for any model that maps tokens to logits.

# %% tags=["exercise"]
def greedy_until(model, tokens, max_tokens, end):
    """The new tokens only, at most max_tokens. A token of `end` is the last, and is included.

    model: a function from a list of T tokens to logits [T, V]; called once for each new token.
    end: the ids of the tokens that end an answer, a tuple; it may be empty.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_greedy_until(greedy_until):
    calls = []

    def count_up(tokens):  # a model that always says: the next number
        calls.append(len(tokens))
        return torch.nn.functional.one_hot(torch.tensor(tokens) + 1, 100).float()

    start = [3, 4, 5]
    assert greedy_until(count_up, start, 4, ()) == [6, 7, 8, 9]
    assert calls == [3, 4, 5, 6], "one call for each new token"
    assert start == [3, 4, 5], "the prompt stays as it is"
    assert greedy_until(count_up, start, 50, (8, 7)) == [6, 7]
    assert greedy_until(count_up, start, 0, ()) == []
    assert greedy_until(llama, asked, 20, config.eos_token_ids) == replied


attempt(test_greedy_until, greedy_until)

# %% [markdown]
# **5. What does it think on the way?** (open). `x` has the same shape after every layer. Send it through the last norm
# and the vocabulary after each of them, and look at the best token: when does " Paris" appear, and what was it before?
# Try other sentences. This is known as the *logit lens*.

# %% tags=["exercise"]
def logit_lens(tokens):
    """Token ids [T] -> L token ids: what each layer says comes after the last token."""
    raise NotImplementedError


# %% tags=["test"]
def test_logit_lens(logit_lens):
    states = hf_llama(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    norm, head = hf_llama.model.norm, hf_llama.lm_head
    best = [head(norm(state[0, -1])).argmax().item() for state in states[1:-1]]
    seen = logit_lens(tokens)
    assert seen[:-1] == best, "transformers says otherwise"
    assert len(seen) == L and seen[-1] == answer[len(tokens)], "the last gives the answer"


attempt(test_logit_lens, logit_lens)

# %% [markdown]
# ## What's next
#
# `greedy` computes the whole text anew for each token. [Chapter 2](02_the_kv_cache.ipynb) measures what that costs, and
# finds the two tensors that are worth keeping.
#
# ## Sources
#
# - Vaswani et al., *Attention Is All You Need*, 2017: attention, heads, the scale.
# - Radford et al., *Language Models are Unsupervised Multitask Learners*, 2019: GPT-2.
# - Su et al., *RoFormer: Enhanced Transformer with Rotary Position Embedding*, 2021: rope.
# - Zhang and Sennrich, *Root Mean Square Layer Normalization*, 2019. Shazeer, *GLU Variants Improve Transformer*, 2020:
#   the gated MLP. Ainslie et al., *GQA*, 2023: fewer key/value heads.
# - Touvron et al., *LLaMA*, 2023: these parts together. Allal et al., *SmolLM2*, 2025: the model of this course.
