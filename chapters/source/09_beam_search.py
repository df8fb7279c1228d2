# %% [markdown]
# # 9. Beam search
#
# A model that always takes the likeliest next word need not end up with the likeliest text. Beam search keeps several
# texts at a time, and at every word some of them split and others die. This chapter builds the search, and looks at
# what it does to memory: a tree whose twigs come and go. With blocks that costs next to nothing.
#
# **You need**: page tables that are forked, and copy-on-write ([chapter 5](05_page_tables.ipynb)); [chapter
# 8](08_sampling_and_forks.ipynb) has the simpler case of samples, which fork once. **You get**: a search that agrees
# with brute force, with the package and with transformers, a picture of who shares what, and a count of what it costs
# to do without.

# %% [markdown]
# ## The question
#
# - Which text does a model find likeliest? Why doesn't it find that text by taking the best word each time?
# - If several beginnings are kept, which ones, and how many?
# - Texts end after different numbers of words. How are they compared, and when is it time to stop?
# - Each beginning has keys and values in memory. What happens to them when it splits in three, or dies?

# %% [markdown]
# ## The idea
#
# Keep W beginnings, the **beams**; W is the **width**. In each step every beam offers its best next tokens, all these
# continuations are ranked against each other, and the W best run on. Here W is 3, and a letter is a token:
#
# ```
#   beams of this step     the best continuations     their memory
#
#     1  "a b"  ----+----  1  "a b c"                 keeps the page table of "a b"
#                   +----  3  "a b e"                 forks it: shares all its blocks
#     2  "a d"  -----x                                nothing goes on: freed
#     3  "f g"  ----------  2  "f g h"                keeps the page table of "f g"
# ```
#
# How likely is a text? Its first token has a probability, the second has one given the first, and so on; that of the
# text is their **product**. That soon becomes too small for a computer, so one adds up logarithms. A
# **log-probability** is 0 for what is certain, and negative for all else. The **score** of a beam is the sum over its
# tokens, so it never rises.

# %% [markdown]
# ## Build it
#
# ### The best word is not the best text
#
# A language of two words a text. What comes first has one table, and what follows has a table for each first word:

# %%
import time
from collections import Counter
from functools import cache
from itertools import groupby
from math import exp, log
from random import Random
from types import SimpleNamespace

from minipaged.teaching import attempt, equal, own, plots, show_source

# %%
LANGUAGE = {
    (): {"It": 0.5, "We": 0.4, "Oh": 0.1},
    ("It",): {"rains": 0.4, "snows": 0.35, "hails": 0.25},
    ("We",): {"won": 0.9, "lost": 0.1},
    ("Oh",): {"no": 1.0},
}


# %%
def words(tokens):
    """A model: a tuple of tokens -> {next token: log-probability}."""
    return {word: log(p) for word, p in LANGUAGE[tokens].items()}


# %% [markdown]
# With so few texts we can look at all of them. `END` is a token that ends a text; this language has none.

# %%
END = 0


def all_texts(model, length, score=0.0, tokens=()):
    """(score, tokens) of every text that ends, or that has `length` tokens."""
    for token, logprob in model(tokens).items():
        text = score + logprob, (*tokens, token)
        if token == END or len(text[1]) == length:
            yield text
        else:
            yield from all_texts(model, length, *text)


# %%
for score, text in sorted(all_texts(words, 2), reverse=True):
    print(f"{score:6.2f} = log {exp(score):.3f}  {' '.join(text)}")
assert max(all_texts(words, 2))[1] == ("We", "won")

# %% [markdown]
# Taking the best word each time is called **greedy**: "It", and then "rains". The likeliest text is another one. After
# "It" the probability is spread over three words, and after "We" nearly all of it is on one. When the first word is
# chosen, nobody knows that yet.
#
# ### One step of a search
#
# So don't decide yet. All continuations of all beams are ranked together; of equal scores, that of the better beam
# comes first (Python's `sorted` leaves equals in their order).

# %%
def rank(beams, offers):
    """beams: (score, tokens), best first; offers: for each {token: log-probability}.

    -> all continuations (score, number of its beam, token), best first.
    """
    every = [(score + logprob, parent, token)
             for parent, (score, _) in enumerate(beams)
             for token, logprob in offers[parent].items()]
    return sorted(every, key=lambda one: -one[0])


# %%
def search(model, W, length):
    """-> the W beams after `length` tokens."""
    beams = [(0.0, ())]
    for _ in range(length):
        ranked = rank(beams, [model(tokens) for _, tokens in beams])[:W]
        beams = [(score, (*beams[parent][1], token)) for score, parent, token in ranked]
    return beams


# %%
for W in (1, 2, 3):
    print(f"W = {W}:", [" ".join(text) for _, text in search(words, W, 2)])
assert search(words, 1, 2)[0][1] == ("It", "rains")
assert search(words, 2, 2)[0][1] == ("We", "won")

# %% [markdown]
# With W = 1 it is greedy search. With W = 2 it finds the best text. Does W = 2 always?
#
# **Your turn.** Change the probabilities of the three first words so that W = 2 misses the best text, too.
#
# ### How wide is wide enough?
#
# For that we need many models. This one makes up its log-probabilities from a seed and **all** tokens so far, and says
# the same whenever it is asked:

# %%
def made_up(seed, tokens_of_it=(1, 2, 3, 4)):
    @cache
    def model(tokens):
        random = Random(repr((seed, tokens)))
        logits = {token: random.gauss(0, 1) for token in tokens_of_it}
        total = log(sum(map(exp, logits.values())))
        return {token: logit - total for token, logit in logits.items()}

    return model


# %%
MODELS = [made_up(seed) for seed in range(200)]
WIDTHS = [1, 2, 3, 4, 6, 8, 12, 16]
best = [max(all_texts(model, 5)) for model in MODELS]
found = {W: [search(model, W, 5)[0] for model in MODELS] for W in WIDTHS}
share = {W: sum(a[1] == b[1] for a, b in zip(found[W], best)) / 2 for W in WIDTHS}
print("found by width, %:", share)
assert share[1] < 70 and share[16] > 95

# %%
alt = "A curve that begins at half, rises steeply to a width of 4, and comes near 100 %"
title = "How often is the best of all 1,024 texts found?"
with plots.figure(title, "width W", "% of 200 models", alt=alt) as axes:
    plots.line(axes, WIDTHS, [share[W] for W in WIDTHS], "beam search", at=4, dy=-12)
    axes.set(ylim=(0, 105), xticks=WIDTHS)

# %% [markdown]
# A width that can hold all beginnings misses nothing: before the last token there are 4⁴ = 256 of them here. Much less
# is enough as a rule, but there is no guarantee. A wider search can even find something worse: a beam that a narrow
# one follows to a good end may be crowded out.

# %%
assert all(search(model, 256, 5)[0][1] == text for model, (_, text) in zip(MODELS[:20], best))
pairs = [(found[a][i][0], found[b][i][0])
         for a, b in zip(WIDTHS, WIDTHS[1:]) for i in range(200)]  # fmt: skip
worse = [(narrow, wide) for narrow, wide in pairs if wide < narrow - 1e-9]
print(f"{len(worse)} of {len(pairs)} times the next width finds something worse, as {worse[0]}")

# %% [markdown]
# ### Texts that end
#
# Real texts end at a token that says so (elsewhere *EOS*, end of sequence). A beam that ends leaves the race, and is
# kept beside it. Now texts of different lengths have to be compared, and with nearly every token the sum falls, so it
# favours short ones. What has ended is therefore scored by
#
# $$ \frac{\log p(\text{text})}{\text{length}^{\,\alpha}} $$
#
# with the **length penalty** α. With α = 0 it is the sum, with 1 the mean over the tokens, and the larger it is the
# better long texts do. (The word is misleading, but everyone uses it.)
#
# Three rules make a search of it, the rules of transformers:
#
# - A continuation with `END` ends if it is among the W best of its step. Below that it is dropped, since nothing of
#   that rank would have been kept.
# - The W best continuations without `END` run on. At the longest length everything ends.
# - It stops when W texts have ended, and the best that runs, scored as if it ended now, doesn't beat the worst of
#   them.

# %%
class Search:
    """W beams that run, and the W best texts that have ended: (score, tokens), best first."""

    def __init__(self, W, limit, alpha=1.0, ends=(END,)):
        self.W, self.limit, self.alpha, self.ends = W, limit, alpha, ends
        self.beams, self.ended = [(0.0, ())], []

    def step(self, offers):
        """-> the beams that go on, as (number of the beam before, token)."""
        ranked, length = rank(self.beams, offers), len(self.beams[0][1]) + 1
        full = length == self.limit
        ending = [one for one in ranked[: self.W] if full or one[2] in self.ends]
        going = [one for one in ranked if not full and one[2] not in self.ends]
        texts = [(one[0] / length**self.alpha, self.text(one)) for one in ending]
        self.ended = sorted(self.ended + texts, key=lambda text: -text[0])[: self.W]
        going = going[: self.W] if going and self.hopes(going[0][0], length) else []
        self.beams = [(one[0], self.text(one)) for one in going]
        return [one[1:] for one in going]

    def text(self, continuation):
        _, parent, token = continuation
        return (*self.beams[parent][1], token)

    def hopes(self, score, length):
        few = len(self.ended) < self.W
        return few or score / length**self.alpha > self.ended[-1][0]


# %%
def run(search, model):
    """-> texts that have ended, best first."""
    while search.beams:
        search.step([model(tokens) for _, tokens in search.beams])
    return search.ended


# %%
ending = made_up(7, tokens_of_it=(END, 1, 2, 3))
for alpha in (0, 1, 2):
    print(f"alpha {alpha}:", run(Search(W=3, limit=6, alpha=alpha), ending)[0])

# %% [markdown]
# **Your turn.** What will come out with α = -5? And with 50?
#
# A beam need not offer all its tokens. With one `END`, at most W of all continuations end, one for each beam. So W of
# the best 2W run on, and all of these could come from one beam: **2W offers of each beam are enough**, of the 49,152
# tokens that SmolLM2 knows.
#
# ### A tree in memory
#
# Each beam is a sequence with a page table. When a step has chosen, all that memory needs to know is the list of
# **parents**: beam number i of the next step comes from beam `parents[i]` of this one. The first child of a beam
# takes its page table over, further ones fork it, and who has no child is freed:

# %%
def moves(parents, count):
    """-> (keep {old: new}, fork [(old, new)], free [old]); `count` beams were there."""
    keep, fork = {}, []
    for new, old in enumerate(parents):
        if old in keep:
            fork.append((old, new))
        else:
            keep[old] = new
    return keep, fork, [old for old in range(count) if old not in keep]


# %%
assert moves([0, 2, 0], 3) == ({0: 0, 2: 1}, [(0, 2)], [1])  # as drawn above, from 0

# %% [markdown]
# [Chapter 5](05_page_tables.ipynb) built the memory. The package's has its operations: `fork` copies a page table and
# no block, `free` gives back what nobody else holds, `append` gives slots for more tokens and says which blocks must
# be copied first.

# %%
from minipaged.memory import KVCacheManager, NoSpace


class Beams:
    """The page tables of one request. names: the sequence of each beam, in order."""

    def __init__(self, memory, prompt):
        self.memory, self.names, self.next_name = memory, [0], 1
        memory.allocate(0, prompt)

    def move(self, parents):
        keep, fork, free = moves(parents, len(self.names))
        heirs = {new: self.names[old] for old, new in keep.items()}
        for old, new in fork:
            heirs[new] = self.next_name
            self.memory.fork(self.names[old], self.next_name)
            self.next_name += 1
        self.drop([self.names[old] for old in free])
        self.names = [heirs[new] for new in range(len(parents))]

    def drop(self, names):
        for name in names:
            self.memory.free(name)

    def grow(self, count=1):
        return self.memory.append(dict.fromkeys(self.names, count))

    def tables(self):
        return [self.memory.block_table(name) for name in self.names]


# %% [markdown]
# The order is **fork, free, append**. Forks take no block, so they can't fail. Frees give some back. Only then are
# blocks taken, for all beams in one call: either each gets its slot, or none does and nothing has changed. So a
# request never needs room for more than W beams, whatever happens in a step.
#
# ### Figure 9
#
# The paper's example has four beams of four blocks. They share the prompt, block 0. One leaves after that, the other
# three after their third block:

# %%
def figure_9():
    memory = KVCacheManager(num_blocks=13, block_size=4, free_order=[*range(13)])
    beams = Beams(memory, prompt=4)
    beams.move([0, 0])  # two
    beams.grow(4)
    beams.grow(4)
    beams.move([0, 0, 0, 1])  # four, of which three have one parent
    beams.grow(4)
    return beams


# %%
before = figure_9().tables()
print(before)
assert before == [[0, 1, 3, 5], [0, 1, 3, 6], [0, 1, 3, 7], [0, 2, 4, 8]]

# %% [markdown]
# Then the four best continuations all come from beams 1 and 2. Beams 0 and 3 die, and blocks 2, 4, 5 and 8 with them;
# the new ones write into 9 to 12:

# %%
beams = figure_9()
beams.move([1, 1, 2, 2])
freed = beams.memory.take_freed()
copies = beams.grow(4).copies
after = beams.tables()
print(f"freed: {sorted(freed)}, copied: {copies}, tables: {after}")
assert sorted(freed) == [2, 4, 5, 8] and not copies
assert after == [[0, 1, 3, 6, 9], [0, 1, 3, 6, 10], [0, 1, 3, 7, 11], [0, 1, 3, 7, 12]]


# %% [markdown]
# Each row is a beam, each column a logical block, and a box is a physical block with its number. A box as high as
# several rows is held by several beams; these are dark.

# %%
def icicle(axes, tables, numbers=True):
    """tables: page tables of the beams. Sorted, those that share stand side by side."""
    names = sorted(range(len(tables)), key=lambda i: tables[i])
    for column in range(max(map(len, tables))):
        row = 0
        for block, held in groupby(tables[i][column] for i in names):
            height = len([*held])
            face = plots.KINDS["shared" if height > 1 else "reserved"][0]
            ink = "white" if height > 1 else plots.INK
            middle = row + height / 2
            axes.barh(middle, 0.94, left=column, height=height - 0.1, color=face)
            if numbers:
                axes.text(column + 0.47, middle, block, ha="center", va="center", color=ink)
            row += height
    axes.set(ylim=(len(names), 0), xticks=[], yticks=[i + 0.5 for i in range(len(names))])
    axes.set_yticklabels(f"beam {i}" for i in names)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(visible=False)


# %%
alt = "A trunk of shared blocks that narrows into single ones; afterwards a longer trunk"
titles = "Figure 9: four beams", "Then: four new ones, of beams 1 and 2"
with plots.figures(*titles, size=(8.6, 2.4), alt=alt) as (left, right):
    icicle(left, before)
    icicle(right, after)

# %% [markdown]
# It is a tree on its side: a trunk that all share, branches that some share, and a twig for each. **Your turn.** Which
# parents in `move` would free the most blocks?
#
# ### The real model
#
# Now SmolLM2 searches, in the package's engine. `beam_width` is W, `max_tokens` the limit, `length_penalty` α. With
# `ignore_eos` no text ends before the limit.

# %%
from minipaged import LLM, BeamSearchParams, SamplingParams

# %%
llm = LLM("smollm2", num_blocks=400, block_size=4, prefix_cache="none", device="cpu")


def look_for(prompt, W):
    (out,) = llm.generate(prompt, BeamSearchParams(W, max_tokens=20, ignore_eos=True))
    return out.outputs[0].cumulative_logprob, out.outputs[0].text


# %%
WINTER = "The best thing about winter is"
by_width = {W: look_for(WINTER, W) for W in (1, 2, 4)}
for W, (score, text) in by_width.items():
    print(f"W = {W}: {score:6.2f} {text!r}")
assert by_width[1][0] < by_width[2][0] < by_width[4][0]

# %% [markdown]
# Each is likelier than the one before. A difference of 3 in log-probability is a factor of e³, about 20. Is a likelier
# text a better one? Ask for another sentence, and look wider:

# %%
score, text = look_for("The old man went down to the sea because", 8)
plain = look_for("The old man went down to the sea because", 1)
print(f"W = 8: {score:.2f} {text!r}")
print(f"W = 1: {plain[0]:.2f} {plain[1]!r}")
assert score > plain[0] and text.count("he loved the sea") >= 3

# %% [markdown]
# Likely texts repeat themselves. So beam search serves where the best text is nearly certain, as in translation or in
# speech, and chats are sampled ([chapter 8](08_sampling_and_forks.ipynb)). Here is the length penalty at work, on a
# question with an end:

# %%
question = [{"role": "user", "content": "How many legs has a cat?"}]
for alpha in (0, 1, 2):
    params = BeamSearchParams(4, 24, length_penalty=alpha)
    best_text = llm.chat(question, params)[0].outputs[0]
    print(f"alpha {alpha}: {len(best_text.token_ids):2} tokens, {best_text.text!r}")

# %% [markdown]
# With 0 the shortest answer wins, with 2 a text that doesn't come to its end. The default is 1.
#
# ### Trunk and twigs
#
# Where does the real model's tree branch? An observer of the engine is called after each step. Ours notes the page
# tables, and the **paths**: all output tokens of each beam that runs on.

# %%
def watch(llm, prompt, W, limit):
    """-> outputs, best first; of each step: tables, copies, tokens computed, paths after it."""
    seen = SimpleNamespace(tables=[], copies=[], computed=[], paths=[])

    def look(plan, output):
        seen.tables.append([s.block_table for s in plan.sequences])
        seen.copies.append(len(plan.copies))
        seen.computed.append(plan.num_tokens)
        running = [beam for request in llm.scheduler.running for beam in request.sequences]
        seen.paths.append([tuple(beam.output_token_ids) for beam in running])

    llm.observers.append(look)
    (out,) = llm.generate(prompt, BeamSearchParams(W, limit, ignore_eos=True))
    llm.observers.remove(look)
    seen.paths.pop()  # after the last step nobody runs
    return out.outputs, seen


# %%
KEEPER = "Write a short story about a lighthouse keeper who finds a message in a bottle."
outputs, seen = watch(llm, KEEPER, 4, 32)
tables, paths = seen.tables, seen.paths
for one in outputs:
    print(f"{one.cumulative_logprob:6.2f} {one.text!r}")


# %%
def parents_of(paths):
    """For each step but the first: where each beam comes from."""
    return [[before.index(path[:-1]) for path in now] for before, now in zip(paths, paths[1:])]


# %%
alt = "One thick line of descent; many short grey twigs that end after a few steps"
title = "Who descends from whom? Beam 0 is the best; grey: died before the end"
with plots.figure(title, "step", "beam", size=(8.6, 2.6), alt=alt) as axes:
    for step, parents in enumerate(parents_of(paths), 1):
        for beam, parent in enumerate(parents):
            path = paths[step][beam]
            lives = any(end[: len(path)] == path for end in paths[-1])
            look = (plots.COLORS[0], 2.5) if lives else (plots.GREY, 0.9)
            axes.plot([step, step + 1], [parent, beam], color=look[0], lw=look[1])
    axes.set(yticks=[0, 1, 2, 3], ylim=(3.4, -0.4))

# %% [markdown]
# All that runs at the end comes from one beam not long ago. Before that there is a single line; its alternatives are
# forgotten. The same in blocks, at three moments:

# %%
alt = "Three trees: each has a long dark trunk, and light twigs of a few blocks at its end"
moments = (8, 16, 31)
titles = [f"step {step}" for step in moments]
with plots.drawing(*titles, size=(8.6, 4.2), rows=3) as (picture, rows):
    for axes, step in zip(rows, moments):
        icicle(axes, tables[step], numbers=False)
        axes.set_xlim(0, len(tables[31][0]))
    plots.show(picture, alt)

# %%
used = [len({block for table in step for block in table}) for step in tables]
without = [sum(map(len, step)) for step in tables]
print(f"at the end {used[-1]} blocks instead of {without[-1]}")
assert used[-1] < without[-1] / 2

# %% [markdown]
# How much was copied for that? If beams lie in rows of a tensor [W, length], each fork copies a row. (Transformers
# copies all rows in every step, to bring them in order.) Of blocks only the last is copied, if it isn't full:

# %%
forks = [len(moves(parents, 4)[1]) for parents in parents_of(paths)]
lengths = range(len(llm.tokenizer.encode(KEEPER)) + 1, 1000)  # after each of these steps
in_rows = sum(fork * length for fork, length in zip(forks, lengths))
print(f"tokens copied: {in_rows} in rows, {4 * sum(seen.copies)} in blocks")
assert 4 * sum(seen.copies) < in_rows / 5

# %% [markdown]
# ### Figure 15
#
# The paper asks how many blocks sharing saves, in percent of what there would be without it, for beams 2, 4 and 6
# wide. Its load is Alpaca: short questions, answers of 58 tokens on average, blocks of 16. Here is one question with
# 58 tokens of our model; and the package's experiments, which have Alpaca's lengths and made-up log-probabilities
# ([chapter 15](15_the_experiments.ipynb)):

# %%
from minipaged.experiments import paper
from minipaged.experiments.beams import saving

engine = LLM("smollm2", num_blocks=400, prefix_cache="hash", device="cpu")


def saved_percent(tables):
    """Of all steps together."""
    used = sum(len({block for table in step for block in table}) for step in tables)
    return 100 * (1 - used / sum(len(table) for step in tables for table in step))


# %%
ours = {W: saved_percent(watch(engine, KEEPER, W, 58)[1].tables) for W in (2, 4, 6)}
made = {W: saving("alpaca", "beams", W, 30) for W in (2, 4, 6)}
theirs = paper.SAVED["beams", "alpaca"]
for W in (2, 4, 6):
    print(f"W = {W}: one question {ours[W]:.0f}, simulated {made[W]:.0f}, paper {theirs[W]} %")
assert ours[2] < ours[4] < ours[6]

# %% [markdown]
# Another model, another load, but about the same size, and the same bend. Why? All W share the trunk, so at best 1 -
# 1/W of the blocks is saved, which is 50, 75 and 83 %, and the twigs take their part of that. A longer answer has a
# longer trunk, and twigs of the same length. (The paper's ShareGPT, with answers of 338 tokens, is at 44 to 66 %.)
# Twelve questions to our model give 31, 45 and 50 %: `experiments/divergence.py` has them.
#
# ### What it costs to send beams again
#
# A server without forks can search, too. In each step a client sends every beam as a new prompt, and asks for one
# token with the best alternatives. Here our `Search` does that to the package's engine:

# %%
def resend(engine, prompt, W, limit, salted):
    """-> texts that have ended, best first; tokens that were computed."""
    computed, search = [], Search(W, limit, ends=())
    ask = SamplingParams(temperature=0, max_tokens=1, logprobs=2 * W, ignore_eos=True)
    engine.observers.append(lambda plan, output: computed.append(plan.num_tokens))
    while search.beams:
        texts = [{"prompt_token_ids": [*prompt, *tokens]} for _, tokens in search.beams]
        salt = f"step {len(computed)}" if salted else "one for all"
        outs = engine.generate(texts, ask, cache_salt=salt)
        best = [out.outputs[0].logprobs[0] for out in outs]
        search.step([{token: one.logprob for token, one in row.items()} for row in best])
    engine.observers.pop()
    return search.ended, sum(computed)


# %% [markdown]
# If the server has a prefix cache ([chapter 13](13_prefix_caching.ipynb)), it finds full blocks that begin alike. We
# try it with and without: a request finds only blocks of its own **salt**, a word that it brings, so with another
# salt in each step nothing is found. And then the same search by fork and free:

# %%
prompt = engine.tokenizer.encode(KEEPER)
engine.reset_prefix_cache()
clock = [time.perf_counter()]
slow, computed_slow = resend(engine, prompt, 4, 12, salted=True)
clock.append(time.perf_counter())
cached, computed_cached = resend(engine, prompt, 4, 12, salted=False)
clock.append(time.perf_counter())
engine.reset_prefix_cache()
outs, seen_fast = watch(engine, KEEPER, 4, 12)
clock.append(time.perf_counter())

# %%
def tokens_computed(P, T, W):
    """Tokens computed: sent again, and forked."""
    return P + W * sum(P + t for t in range(1, T)), P + W * (T - 1)


computed_fast = sum(seen_fast.computed)
assert [(one.score, tuple(one.token_ids)) for one in outs] == slow == cached
assert (computed_slow, computed_fast) == tokens_computed(len(prompt), T=12, W=4)
print(f"tokens computed: {computed_slow} sent again, {computed_cached} with a prefix cache,"
      f" {computed_fast} forked")

# %% tags=["measured"]
took = [end - start for start, end in zip(clock, clock[1:])]
print("seconds: {:.2f} sent again, {:.2f} with a prefix cache, {:.2f} forked".format(*took))

# %% [markdown]
# The same four texts with the same scores, to the last bit. So `Search` is right for the real model, too. And the
# counts are the same on every machine: P + W (T - 1) for P tokens of prompt and T of output, against P + W times the
# sum of P + t, which grows with the square of T. For 64 tokens and 64 more:

# %%
again, once = tokens_computed(P=64, T=64, W=4)
print(f"{again} against {once} tokens: {again / once:.0f} times as many")

# %% [markdown]
# A prefix cache saves most of it. It finds full blocks only, so each beam computes the tokens of its last block in
# each step, and there is a whole request for every token. The README has a run of the bench with eight such searches
# on two cores: transformers, whose beams lie in rows, made 2.3 times fewer tokens a second than this engine, and vLLM,
# which sends each beam again and has a prefix cache, 7.6 times fewer. All three found the same texts.
#
# ## Check it
#
# **Against brute force.** All texts of small models are scored, with ends and length penalties. A search as wide as
# there are texts must find the best of all:

# %%
checked = 0
for seed in range(40):
    model = made_up(seed, tokens_of_it=(END, 1, 2, 3))
    for alpha in (-1, 0, 0.5, 1, 2):
        texts = [(score / len(text)**alpha, text) for score, text in all_texts(model, 4)]
        expected = sorted(texts, reverse=True)[:5]
        assert run(Search(W=200, limit=4, alpha=alpha), model)[:5] == expected
        checked += len(texts)
print(checked, "texts scored, and the five best found each time")

# %% [markdown]
# **What each beam reads.** Searches in small pools, with words in the slots. A copy is carried out before anybody
# writes, freed blocks are filled with junk, and each beam must read its own tokens, from the first to the last. When
# there is no room, nothing may have changed:

# %%
def live(random, B, seen):
    W, prompt = random.randint(1, 5), random.randint(1, 6)
    search, model = Search(W, limit=12, ends=()), made_up(random.random())
    memory = KVCacheManager(random.randint(6, 30), B)
    beams = Beams(memory, prompt)
    slots = dict.fromkeys(memory.slots(0, 0, prompt), 9)
    while search.beams:
        moved = search.step([model(tokens) for _, tokens in search.beams])
        beams.move([parent for parent, _ in moved])
        for block in memory.take_freed():
            slots.update(dict.fromkeys(range(block * B, block * B + B), "junk"))
        before = beams.tables(), memory.num_free
        grown = beams.grow()
        if isinstance(grown, NoSpace):
            seen["no room"] += 1
            assert (beams.tables(), memory.num_free) == before
            return
        for source, target in grown.copies:
            slots.update({target * B + i: slots.get(source * B + i, "junk") for i in range(B)})
        for name, (_, tokens) in zip(beams.names, search.beams):
            length = prompt + len(tokens)
            slots[memory.slots(name, length - 1, 1)[0]] = tokens[-1]
            read = [slots[slot] for slot in memory.slots(name, 0, length)]
            assert read == [9] * prompt + [*tokens]
        seen["steps"] += 1
        seen["copies"] += len(grown.copies)
        memory.check()


# %%
seen_lives = Counter()
for seed in range(300):
    random = Random(seed)
    live(random, random.randint(1, 4), seen_lives)
print(dict(seen_lives))
assert len(seen_lives) == 3 and min(seen_lives.values()) > 30

# %% [markdown]
# **Against transformers**, on the real model's weights (loaded as in [chapter 2](02_the_kv_cache.ipynb)). Two prompts,
# three length penalties, and texts that end where the model says so:

# %%
import torch
import transformers

from kernels.packed import floats
from minipaged.models import ModelConfig, open_checkpoint
from minipaged.models.llama import Llama

checkpoint = open_checkpoint("smollm2")
stored = checkpoint.names(Llama.tensor_shapes(ModelConfig.from_hf(checkpoint.config)))
weights = {name: floats(checkpoint.tensor(key, torch.float32)) for key, name in stored.items()}
weights["lm_head.weight"] = weights["model.embed_tokens.weight"]

# %%
fields = {k: v for k, v in checkpoint.config.items() if k != "model_type"}
with torch.device("meta"):  # the shapes alone; the weights come next
    hf_llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
hf_llama.load_state_dict(weights, assign=True)
hf_llama.model.rotary_emb = type(hf_llama.model.rotary_emb)(hf_llama.config)
hf_llama.generation_config = transformers.GenerationConfig()


# %%
def theirs_of(tokens, alpha):
    """-> (score, tokens) of their best four, of up to 10 tokens."""
    ids, (end,) = torch.tensor([tokens]), llm.config.eos_token_ids
    out = hf_llama.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=4, num_return_sequences=4,
        max_new_tokens=10, length_penalty=alpha, eos_token_id=end, pad_token_id=0,
        do_sample=False, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    counts = (out.beam_indices >= 0).sum(1)
    rows = [row[len(tokens) :][:n].tolist() for row, n in zip(out.sequences, counts)]
    return [*zip(out.sequences_scores.tolist(), rows)]


# %%
ends = set()
for ask, text, alpha in [(llm.chat, question, 0.0), (llm.chat, question, 1.0),
                         (llm.generate, WINTER, 2.0)]:  # fmt: skip
    (out,) = ask(text, BeamSearchParams(4, 10, length_penalty=alpha))
    theirs4 = theirs_of(out.prompt_token_ids, alpha)
    assert [one.token_ids for one in out.outputs] == [tokens for _, tokens in theirs4]
    gaps = [abs(one.score - score) for one, (score, _) in zip(out.outputs, theirs4)]
    assert max(gaps) < 1e-3
    ends |= {one.finish_reason for one in out.outputs}
    print(f"alpha {alpha}: the same, of", [len(one.token_ids) for one in out.outputs], "tokens")
assert ends == {"stop", "length"}

# %% [markdown]
# ## The package's version
#
# ### The search
#
# One file knows what a beam search is, and no tensor. Its step is ours:

# %%
from minipaged.decoding import beam_search
from minipaged.decoding.beam_search import BeamSearch

show_source(BeamSearch.advance, BeamSearch._rank, BeamSearch._finish, BeamSearch._can_improve)

# %% [markdown]
# A running beam is a `Beam`, what goes on is a `Continuation`, and a text that has ended is a `Hypothesis`, which says
# why. `num_candidates` is our 2W, or more if several tokens may end a text. `num_wanted` is how many of the W the user
# wants back (`n`), and `hypotheses` gives them. What it does more:
#
# - It refuses candidates that don't fit or hold a NaN, before anything has changed.
# - `early_stopping` chooses among three ways to stop, which are those of transformers. Ours is `False`. With `True` it
#   stops as soon as W texts have ended. With `"never"` it goes on as long as any running beam **could** still win: if
#   α is positive, by getting as long as allowed and losing nothing more.

# %% [markdown]
# Random models, widths, limits and penalties: the same beams in each step, to the last bit, and the same texts at the
# end. Ours gets all tokens as offers, the package the best `num_candidates` alone:

# %%
def compare(random):
    W, limit, alpha = random.randint(1, 6), random.randint(1, 8), random.uniform(-2, 2)
    model = made_up(random.random(), tokens_of_it=range(random.randint(2, 8)))
    mine = Search(W, limit, alpha)
    package = BeamSearch(BeamSearchParams(W, length_penalty=alpha), limit, [END])
    steps = 0
    while mine.beams:
        offers = [model(tokens) for _, tokens in mine.beams]
        best = [sorted(one.items(), key=lambda pair: -pair[1]) for one in offers]
        went_on = package.advance([one[: package.num_candidates] for one in best])
        parents = [parent for parent, _ in mine.step(offers)]
        assert [(beam.score, beam.token_ids) for beam in package.running] == mine.beams
        plan = beam_search.memory_moves(went_on, len(offers))
        keep, fork, free = moves(parents, len(offers))
        assert (dict(plan.keep), plan.fork, plan.free) == (keep, fork, free)
        steps += 1
    ended = [(text.score, text.token_ids) for text in package.hypotheses()]
    assert package.done and ended == mine.ended
    return steps


# %%
print(sum(compare(Random(seed)) for seed in range(500)), "steps, and no difference")

# %% [markdown]
# ### What it does to memory
#
# `memory_moves` is our `moves`, and its answer `MemoryMoves` says in which order to carry it out:

# %%
show_source(beam_search.memory_moves)

# %% [markdown]
# `growth.py` carries it out, where all sequences of the engine grow, fork and end. `LiveSequences` are those that
# have not ended, by their id. `grow` is told what came out of the model; a request with a search takes `_grow_beams`:

# %%
from minipaged.scheduling.growth import LiveSequences

show_source(LiveSequences.grow, LiveSequences._grow_beams, LiveSequences._fork)

# %% [markdown]
# Fork, keep, free, and only then the new tokens. If any beam has no candidates yet, as after a preemption (see
# below), nothing happens. If the logits of one are broken, all of them end: **beams are nothing without each other**.
# [Chapter 8](08_sampling_and_forks.ipynb) has the other way, `_append`, for samples.

# %%
show_source(LiveSequences.add, LiveSequences.new_id, LiveSequences.end,
            LiveSequences.start_over)  # fmt: skip

# %% [markdown]
# `add` gives a sequence its id, which nobody had before (`new_id`); `end` frees its memory at once, on whichever side
# it is; `start_over` is for a step that was broken off in the middle, after which all is computed again. So the id
# tells what happened to a beam: who is kept keeps it, and a fork has a new one. The real engine beside our `Beams`, on
# the same search: the same ids, and the same page tables to the block number:

# %%
def side_by_side(limit=16, W=4):
    ids, options = [], dict(num_blocks=60, block_size=4)
    with LLM("smollm2", prefix_cache="none", device="cpu", **options) as small:
        small.observers.append(lambda plan, _: ids.append([s.seq_id for s in plan.sequences]))
        _, seen = watch(small, KEEPER, W, limit)
    memory = KVCacheManager(**options)
    beams = Beams(memory, prompt=len(llm.tokenizer.encode(KEEPER)))
    for step, parents in enumerate([[0] * W, *parents_of(seen.paths)]):
        assert (ids[step], seen.tables[step]) == (beams.names, beams.tables())
        beams.move(parents)
        assert len(beams.grow().copies) == seen.copies[step + 1]
    return ids


# %%
for step, names in enumerate(side_by_side()[:7]):
    print(f"step {step}: sequences {names}")

# %% [markdown]
# ### All or nothing
#
# Forks and frees of a step can't fail. What can fail is the `append` of the next step: the scheduler asks for one slot
# for each beam in a single call, and if that is refused, somebody gives way, with all beams of a request ([chapter
# 12](12_preemption.ipynb)). How many blocks a search can need at the worst is known when it comes: the full blocks of
# the prompt once, and all the rest W times. A request that can't fit by that count is refused at once.

# %%
from minipaged.requests.request import Request

show_source(Request.most_blocks)

# %%
worst = Request("", 0, llm.tokenizer.encode(KEEPER), BeamSearchParams(4, 32), 32).most_blocks(4)
print(f"at the worst {worst} blocks of 4; the search above had {used[-1]} at the end")
assert max(used) <= worst

# %% [markdown]
# ### After a preemption
#
# Say that the blocks of who gave way are dropped, and computed again later. What it shared came from forks in the
# right moments, and these are gone. If each beam computed all its tokens, the prompt would be there W times, and the
# request would need more than its worst case. So the first beam computes the prompt, and the others fork it:

# %%
from minipaged.scheduling import preemption

show_source(Request.target, preemption.share_rebuilt_prompt)

# %% [markdown]
# `target` has the second half. Beams are ranked together, so none may be a token ahead: nobody computes its last token
# until all can. Two searches in a pool of 17 blocks; the second has to give way once:

# %%
from minipaged.experiments.divergence import PROMPTS

PAIR = [" ".join(PROMPTS[i : i + 3]) for i in (0, 3)]


def squeezed(mode, blocks):
    """-> all texts; for each step of the second request (tokens computed, different blocks)."""
    rows = []

    def look(plan, output):
        mine = [s for s in plan.sequences if s.request_id == "1"]
        held = {block for s in mine for block in s.block_table}
        rows.append(([len(s.token_ids) for s in mine], len(held)))

    with LLM("smollm2", num_blocks=blocks, num_cpu_blocks=40, prefix_cache="none",
             device="cpu", preemption=mode) as small:  # fmt: skip
        small.observers.append(look)
        outs = small.generate(PAIR, BeamSearchParams(4, 24, ignore_eos=True))
    return [one.token_ids for out in outs for one in out.outputs], rows


# %%
calm_outs = engine.generate(PAIR, BeamSearchParams(4, 24, ignore_eos=True))
calm = [one.token_ids for out in calm_outs for one in out.outputs]
for mode in ("recompute", "swap"):
    texts, rows = squeezed(mode, 17)
    assert texts == calm
    away = [step for step, (tokens, _) in enumerate(rows) if not tokens]
    print(f"{mode}: held {rows[away[0] - 1][1]} blocks before, then away for {len(away)} steps")
    for tokens, held in rows[away[-1] + 1 :][:2]:
        print(f"    computes {tokens}, holds {held}")

# %% [markdown]
# The texts are the same. Whoever was **swapped** (copied to another memory and back) comes back as it went: a block
# that was shared moves once, and stays shared. Whoever is recomputed shares its prompt again, and of its answers
# nothing: the trunk is there four times, unless a prefix cache still has it. That is why `preemption="auto"` swaps a
# request with several sequences.
#
# ## What must hold, and what breaks if it doesn't
#
# **What is ranked together is of one kind.** Logits of two beams can't be compared: each row of them may be shifted by
# any number and means the same. Only the softmax over all tokens brings them to one scale. Take the logits instead:

# %%
def shifted(model, by):
    """The same model; its scores are moved by something that depends on the beam."""
    return lambda tokens: {t: x + by * len(set(tokens)) for t, x in model(tokens).items()}


right = [search(model, 4, 5)[0] for model in MODELS[:100]]
wrong = [search(shifted(model, 3), 4, 5)[0] for model in MODELS[:100]]
same = sum(a[1] == b[1] for a, b in zip(right, wrong))
print(f"scores shifted for each beam: {same} of 100 searches end with the same text")
assert same < 60

# %% [markdown]
# **Fork before the tokens.** A child begins with what its parent had, and not with what the parent gets now. If the
# first child has its token already, the second takes it for its own past:

# %%
memory = KVCacheManager(num_blocks=4, block_size=4)
memory.allocate(0, num_tokens=7)
memory.append({0: 1})  # the first child's token
memory.fork(0, 1)
print("the second child begins with", memory.num_tokens(1), "tokens instead of 7")
assert memory.num_tokens(1) == 8

# %% [markdown]
# **Free before you append.** The dead hold blocks that the living are about to need. Free them afterwards, and the
# same search wants more memory:

# %%
class LateBeams(Beams):
    late = ()

    def drop(self, names):
        self.late = names

    def grow(self, count=1):
        grown = super().grow(count)
        super().drop(self.late)
        return grown


def most(kind, model, B):
    """Blocks in use at the worst moment of a search, 4 beams wide."""
    memory, some = KVCacheManager(num_blocks=200, block_size=B), Search(4, 30, ends=())
    beams = kind(memory, prompt=3)
    while some.beams:
        parents = [parent for parent, _ in some.step([model(text) for _, text in some.beams])]
        beams.move(parents)
        beams.grow()
    return memory.usage().peak_used


# %%
for B in (1, 4, 16):
    right = sum(most(Beams, model, B) for model in MODELS[:30]) / 30
    wrong = sum(most(LateBeams, model, B) for model in MODELS[:30]) / 30
    print(f"B = {B:2}: at its worst {right:.1f} blocks; {wrong:.1f} if the dead are freed late")
    assert right < wrong

# %% [markdown]
# ## Exercises
#
# Fill in the functions; each is followed by a test that says how far you are.
#
# **1. Who survives?** (warm-up). One step, without ends. Mind the ties: of equal scores, the continuation of the
# better beam comes first, and of one beam that which stands first in its offers.

# %% tags=["exercise"]
def survivors(scores, offers, W):
    """scores: of the beams, best first. offers: for each a list of (token, log-probability),
    in any order. -> the W best continuations, best first, as (number of the beam, token);
    all of them if there are fewer.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_survivors(survivors):
    survivors = own(survivors, forbid=[rank, search, Search])
    for seed in range(400):
        random = Random(seed)
        W, size = random.randint(1, 6), random.randint(1, 5)
        count = random.randint(1, 6)
        scores = sorted((-random.randint(0, 6) / 2 for _ in range(count)), reverse=True)
        some = random.sample(range(90), size)
        offers = [[(token, -random.randint(0, 8) / 2) for token in random.sample(some, size)]
                  for beam in range(count)]  # fmt: skip
        every = [(scores[i] + offers[i][j][1], -i, -j)
                 for i in range(count) for j in range(size)]  # fmt: skip
        right = [(-i, offers[-i][-j][0]) for _, i, j in sorted(every, reverse=True)[:W]]
        got = survivors(scores, offers, W)
        assert equal(got, right), f"scores={scores}, offers={offers}, W={W}: {right}, not {got}"


attempt(test_survivors, survivors)

# %% [markdown]
# **2. In rows.** A server without blocks keeps W beams in the rows 0 to W - 1 of a tensor. After a step, each new beam
# needs a row that holds what its parent had. Rows may be in any order, and only a copy of a row costs something.
# Copies are carried out one after the other. Make as few as possible.

# %% tags=["exercise"]
def row_plan(parents):
    """parents: for each of W new beams, the row of the beam that it comes from.

    -> (rows, copies): for each new beam a row of its own; and a list of (from row, to row).
    """
    raise NotImplementedError


# %% tags=["test"]
def test_row_plan(row_plan):
    row_plan = own(row_plan, forbid=[moves])
    for seed in range(400):
        random = Random(seed)
        W = random.randint(1, 8)
        some = random.sample(range(W), random.randint(1, W))
        parents = [random.choice(some) for _ in range(W)]
        got = row_plan(parents)
        case = f"parents={parents}: {got}"
        assert isinstance(got, (tuple, list)) and len(got) == 2, f"{case} is not (rows, copies)"
        rows, copies = got
        assert equal(sorted(rows), [*range(W)]), f"{case}: each new beam needs a row of its own"
        held = [*range(W)]
        for source, target in copies:
            held[target] = held[source]
        read = [held[row] for row in rows]
        assert equal(read, parents), f"{case}: the new beams read what {read} had"
        few = W - len(set(parents))
        assert len(copies) == few, f"{case}: {len(copies)} copies, and {few} are enough"


attempt(test_row_plan, row_plan)

# %% [markdown]
# **3. How many blocks?** Given what W beams have said, how many different blocks do they hold, when all their tokens
# have a slot? Two beams share a block if they agree in all tokens up to its end. Look at each token a few times only,
# however long the beams are; `Watched` integers note whenever somebody looks at them.

# %%
from minipaged.teaching.costs import Watched


# %% tags=["exercise"]
def blocks_held(prompt, paths, B):
    """prompt: how many tokens all begin with. paths: the output tokens of each beam, lists of
    one length, no two of them equal. -> the number of different blocks of B slots.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_blocks_held(blocks_held):
    blocks_held = own(blocks_held)
    for seed in range(400):
        random = Random(seed)
        W, B, prompt = random.randint(1, 6), random.randint(1, 5), random.randint(1, 9)
        length = random.randint(3, 9)
        paths = []
        while len(paths) < W:
            begin = random.choice(paths)[: random.randrange(length)] if paths else []
            path = begin + [random.randrange(3) for _ in range(length - len(begin))]
            paths += [path] if path not in paths else []
        random.shuffle(paths)
        right = 0
        for end in range(B, prompt + length + B, B):
            right += len({tuple(path[: max(0, end - prompt)]) for path in paths})
        got = blocks_held(prompt, paths, B)
        assert equal(got, right), f"{prompt=}, {paths=}, {B=}: {right}, not {got}"
    ends = [250 + 9 * beam for beam in range(5)]
    looks = []
    long = [[Watched(i if i < end else -1, looks) for i in range(300)] for end in ends]
    got = blocks_held(20, long, 1)
    assert equal(got, 20 + 300 + 50 + 41 + 32 + 23), f"5 beams of 300 tokens: 466, not {got}"
    assert len(looks) <= 10 * 1500, f"1,500 tokens were looked at {len(looks)} times"


attempt(test_blocks_held, blocks_held)

# %% [markdown]
# **4. Can it still win?** The rule by which we stop is a guess: a beam that loses now might win later. Write the one
# that is certain. A beam has `length` tokens and the log-probability `score`. Its text will have at least one token
# more, and at most `limit` in all, and each of them adds something from minus infinity to 0, 0 included.

# %% tags=["exercise"]
def could_win(score, length, limit, alpha, worst):
    """-> whether there is a text that it could become which scores above `worst`.

    A text's score is its log-probability / tokens ** alpha; alpha may be negative.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_could_win(could_win):
    could_win = own(could_win, forbid=[BeamSearch])
    said = Counter()
    for seed in range(600):
        random = Random(seed)
        limit, alpha = random.randint(2, 30), random.choice([-2, -1, 0, 0.5, 1, 2])
        length = random.randint(1, limit - 1)
        score = random.choice([0.0, -random.randint(1, 40) / 4])
        best = max(score / tokens**alpha for tokens in range(length + 1, limit + 1))
        near = score / random.randint(1, limit) ** alpha
        exact = alpha == 0 or (alpha in (1, 2) and limit in (2, 4, 8, 16))  # no rounding
        worst = random.choice([best - 0.01, best + 0.01, near - 0.01] + [best] * 2 * exact)
        got = could_win(score, length, limit, alpha, worst)
        case = f"{score=}, {length=}, {limit=}, {alpha=}, {worst=}"
        assert equal(got, best > worst), f"{case}: it can reach {best}, so not {got}"
        said[best > worst] += 1
    assert min(said.values()) > 100


attempt(test_could_win, could_win)

# %% [markdown]
# **5. A search that is certain** (open). Beam search may miss the best text. Write one that can't, and that asks no
# more than it must: the model may be asked only about beginnings that are likelier than the best text, and about none
# of them twice. (A score never rises. What does that say about all texts with a given beginning?) Then count:
# how often does it ask where beam search asks W times a step? What does it need that no server could promise?

# %% tags=["exercise"]
def likeliest(model, limit):
    """model(tokens): a tuple of tokens -> {next token: log-probability}. A text ends with END,
    or when it has `limit` tokens. -> (log-probability, tokens) of the likeliest text of all.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_likeliest(likeliest):
    likeliest = own(likeliest, forbid=[all_texts, search, rank, Search, BeamSearch])
    for seed in range(60):
        random = Random(seed)
        limit, first = random.randint(1, 5), random.choice([END, 1])
        model, asked = made_up(random.random(), range(first, first + random.randint(2, 4))), []
        best = max(all_texts(model, limit))

        def ask(tokens, model=model, asked=asked, best=best, limit=limit):
            assert isinstance(tokens, tuple), f"the model takes a tuple, not {tokens!r}"
            assert tokens not in asked, f"asked about {tokens} twice"
            assert END not in tokens and len(tokens) < limit, f"{tokens} has ended"
            asked.append(tokens)
            score = 0.0
            for place, token in enumerate(tokens):
                score += model(tokens[:place])[token]
            why = f"{tokens} has {score:.3f}, the best text {best[0]:.3f}: why ask about it?"
            assert score > best[0], why
            return dict(model(tokens))

        got = likeliest(ask, limit)
        assert equal(got, best, 1e-9), f"model {seed}, {limit=}: {best}, not {got}"


attempt(test_likeliest, likeliest)

# %% [markdown]
# ## What's next
#
# All beams of a request grow in the same step, and so do all requests of a server. When one of them ends, should the
# others wait for a new one to begin? [Chapter 10](10_continuous_batching.ipynb) lets requests come and go between
# steps.
#
# **See it run**: [four beams, step by step](gallery/README.md#beam-search-four-beams), as recorded.
#
# ## Sources
#
# - Kwon et al., *Efficient Memory Management for Large Language Model Serving with PagedAttention*, 2023: section 4.4
#   (Figures 8 and 9), Figure 15.
# - Lowerre, *The Harpy Speech Recognition System*, 1976: beam search.
# - Wolf et al., *Transformers*: `GenerationMixin._beam_search`, whose rules for ends, penalties and stopping these
#   are.
# - Wu et al., *Google's Neural Machine Translation System*, 2016: length penalties.
# - Holtzman et al., *The Curious Case of Neural Text Degeneration*, 2020: the likeliest text repeats itself.
# - Stahlberg and Byrne, *On NMT Search Errors and Model Errors: Cat Got Your Tongue?*, 2019: exercise 5 on real
#   models, whose likeliest text is often the empty one.
