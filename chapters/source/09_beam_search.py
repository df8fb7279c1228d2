# %% [markdown]
# # 9. Beam search
#
# A model that always takes the likeliest next word need not end up with the likeliest text. Beam search keeps several
# texts at a time, and at every word some of them split and others die. This chapter builds the search, and then looks
# at what it does to memory: a tree whose twigs come and go. With blocks that costs next to nothing.
#
# **You need**: page tables that are forked, and copy-on-write ([chapter 5](05_page_tables.ipynb)); chapter 8 has the
# simpler case of samples, which fork once. **You get**: a beam search of your own that agrees with brute force, with
# the package and with transformers; a picture of who shares what; and a count of what it costs to do without.

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
# text is their **product**. Products of many small numbers become too small for a computer, so one adds up their
# logarithms instead. A **log-probability** is 0 for what is certain, and negative for all else. The **score** of a beam
# is the sum over its tokens. It can only fall.

# %% [markdown]
# ## Build it
#
# ### The best word is not the best text
#
# A language of two words a text. What comes first has one table, and what follows has a table for each first word:

# %%
from collections import Counter
from functools import cache
from itertools import groupby
from math import exp, log
from random import Random
from types import SimpleNamespace

from minipaged.teaching import attempt, equal, own, plots, show_source

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


def greedy(model, length):
    """-> (score, tokens): the best token, each time."""
    score, tokens = 0.0, ()
    while len(tokens) < length:
        token, logprob = max(model(tokens).items(), key=lambda pair: pair[1])
        score, tokens = score + logprob, (*tokens, token)
    return score, tokens


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
print("greedy:", greedy(words, 2)[1])
assert max(all_texts(words, 2))[1] == ("We", "won") != greedy(words, 2)[1]

# %% [markdown]
# After "It" the probability is spread over three words, and after "We" nearly all of it is on one. When the first word
# is chosen, nobody knows that yet. Whoever takes "It" can't come back.
#
# ### One step of a search
#
# So don't decide yet, and keep two. All continuations of all beams are ranked together; of equal scores, that of the
# better beam comes first (Python's `sorted` leaves equals in their order).

# %%
def rank(beams, offers):
    """beams: (score, tokens), best first; offers: for each {token: log-probability}.

    -> all continuations (score, number of its beam, token), best first.
    """
    every = [(score + logprob, parent, token)
             for parent, (score, _) in enumerate(beams)
             for token, logprob in offers[parent].items()]
    return sorted(every, key=lambda one: -one[0])


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
assert search(words, 1, 2) == [greedy(words, 2)]
assert search(words, 2, 2)[0][1] == ("We", "won")

# %% [markdown]
# With W = 1 it is greedy search. With W = 2 it finds the best text. Does W = 2 always?
#
# **Your turn.** Change one probability of the first word so that W = 2 misses the best text, too.
#
# ### How wide is wide enough?
#
# To answer that we need many models. This one makes up its log-probabilities from a seed and **all** tokens so far,
# by a random generator that begins with them. So it says the same whenever it is asked:

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
# is enough as a rule, and there is no guarantee. Not even that a wider search is no worse than a narrower one: a beam
# that a narrow search follows to a good end may be crowded out of a wide one.

# %%
assert all(search(model, 256, 5)[0][1] == text for model, (_, text) in zip(MODELS[:20], best))
worse = [(a, b, seed) for a, b in zip(WIDTHS, WIDTHS[1:]) for seed in range(200)
         if found[b][seed][0] < found[a][seed][0] - 1e-9]  # fmt: skip
for narrow, wide, seed in worse[:3]:
    scores = found[narrow][seed][0], found[wide][seed][0]
    print("model %d: W = %d finds %.2f, W = %d" % (seed, narrow, scores[0], wide), "%.2f" % scores[1])
print(len(worse), "of", 200 * (len(WIDTHS) - 1), "times the next width finds something worse")
assert worse

# %% [markdown]
# ### Texts that end
#
# Real texts end at a token that says so. A beam that ends leaves the race, and is kept beside it. Now texts of
# different lengths have to be compared, and each token more makes the sum fall: short ones would always win. So what
# has ended is scored by
#
# $$ \frac{\log p(\text{text})}{\text{length}^{\,\alpha}} $$
#
# with the **length penalty** α. With α = 0 it is the sum, with 1 the mean over the tokens, and the larger it is the
# better long texts do. (The word is misleading, but everyone uses it.)
#
# Three rules make a search of it, the rules of transformers:
#
# - A continuation with `END` ends if it is among the W best of its step. Below that it is dropped, since nothing of that
#   rank would have been kept.
# - The W best continuations without `END` run on. At the longest length everything ends.
# - It stops when W texts have ended, and the best that runs, scored as if it ended now, doesn't beat the worst of them.

# %%
class Search:
    """W beams that run, and the W best texts that have ended: (score, tokens), best first."""

    def __init__(self, W, limit, alpha=1.0, ends=(END,)):
        self.W, self.limit, self.alpha, self.ends = W, limit, alpha, ends
        self.beams, self.ended = [(0.0, ())], []

    def step(self, offers):
        """-> the beams that go on, as (number of the beam before, token)."""
        ranked, length = rank(self.beams, offers), len(self.beams[0][1]) + 1
        ending = [one for one in ranked[: self.W] if one[2] in self.ends or length == self.limit]
        going = [one for one in ranked if one[2] not in self.ends and length < self.limit]
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


ending = made_up(7, tokens_of_it=(END, 1, 2, 3))
for alpha in (0, 1, 2):
    print(f"alpha {alpha}:", run(Search(W=3, limit=6, alpha=alpha), ending)[0])

# %% [markdown]
# **Your turn.** What will come out with α = -5? And with 50?
#
# A beam need not offer all its tokens. With one `END`, at most W of all continuations end, one for each beam. So W of
# the best 2W run on, and all of these could come from one beam: **2W offers of each beam are enough**, of 49,152.
#
# ### A tree in memory
#
# Now the keys and values. Each beam is a sequence with a page table. When a step has chosen, all that memory needs to
# know is the list of **parents**: beam number i of the next step comes from beam `parents[i]` of this one. The first
# child of a beam takes its page table over, further ones fork it, and who has no child is freed:

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


print(moves([0, 2, 0], 3))
assert moves([0, 2, 0], 3) == ({0: 0, 2: 1}, [(0, 2)], [1])  # as drawn above, from 0

# %% [markdown]
# Chapter 5 built the memory, and the package's has the same operations: `fork` copies a page table and no block, `free`
# gives back what nobody else holds, `append` gives each sequence slots for more tokens, and says which blocks have to
# be copied before they are written.

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
        for old in free:
            self.memory.free(self.names[old])
        self.names = [heirs[new] for new in range(len(parents))]

    def grow(self, count=1):
        return self.memory.append({name: count for name in self.names})

    def tables(self):
        return [self.memory.block_table(name) for name in self.names]


# %% [markdown]
# The order is **fork, free, append**. Forks take no block, so they can't fail. Frees give some back. Only then are
# blocks taken, for all beams in one call: either each gets its slot, or none does and nothing has changed. So a request
# never needs room for more than W beams, whatever happens in a step.
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
assert [table[-1] for table in after] == [9, 10, 11, 12]


# %% [markdown]
# A picture shows it better. Each row is a beam, each column a logical block, and a box is a physical block with its
# number. A box as high as several rows is held by several beams; these are dark.

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
    axes.grid(visible=False)


# %%
alt = "A trunk of shared blocks that narrows into single ones; afterwards a longer trunk"
titles = "Figure 9: four beams", "four new ones, of beams 1 and 2"
with plots.figures(*titles, size=(8.6, 2.4), alt=alt) as (left, right):
    icicle(left, before)
    icicle(right, after)

# %% [markdown]
# It is a tree that lies on its side: a trunk that all share, branches that some share, and a twig for each.
#
# ### The real model
#
# Now SmolLM2 searches, in the package's engine. Its parameters have our names or nearly: `beam_width`, `max_tokens`,
# `length_penalty`. With `ignore_eos` no text ends early, so that all that we count is as long as we say.

# %%
from minipaged import LLM, BeamSearchParams, SamplingParams

llm = LLM("smollm2", num_blocks=400, block_size=4, prefix_cache="none", device="cpu")


def look_for(prompt, W, limit=20):
    (out,) = llm.generate(prompt, BeamSearchParams(W, limit, ignore_eos=True))
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
# What is likely is what repeats itself. So beam search serves where the best text is nearly certain, as in translation
# or in speech, and chats are sampled (chapter 8). Here is the length penalty at work, on a question with an end:

# %%
question = [{"role": "user", "content": "How many legs has a cat?"}]
for alpha in (0, 1, 2):
    params = BeamSearchParams(4, 24, length_penalty=alpha)
    best_text = llm.chat(question, params)[0].outputs[0]
    print(f"alpha {alpha}: {len(best_text.token_ids):2} tokens, {best_text.text!r}")

# %% [markdown]
# With 0 the shortest answer wins, with 2 a text that doesn't come to its end. 1 is the default of most engines, this
# one too.
#
# ### Trunk and twigs
#
# Where does the real model's tree branch? We look at each step of a search: the page tables with which it computes, and
# the **paths**, all output tokens of each beam that runs on.

# %%
def watch(llm, prompt, W, limit):
    """-> outputs, best first; of each step: page tables, blocks copied, and paths after it."""
    seen = SimpleNamespace(tables=[], copies=[], paths=[])

    def look(plan, output):
        seen.tables.append([s.block_table for s in plan.sequences])
        seen.copies.append(len(plan.copies))
        running = [beam for request in llm.scheduler.running for beam in request.sequences]
        seen.paths.append([tuple(beam.output_token_ids) for beam in running])

    llm.observers.append(look)
    (out,) = llm.generate(prompt, BeamSearchParams(W, limit, ignore_eos=True))
    llm.observers.remove(look)
    seen.paths.pop()  # after the last step nobody runs
    return out.outputs, seen


KEEPER = "Write a short story about a lighthouse keeper who finds a message in a bottle."
outputs, seen = watch(llm, KEEPER, 4, 32)
tables, paths = seen.tables, seen.paths
for one in outputs:
    print(f"{one.cumulative_logprob:6.2f} {one.text!r}")


# %%
def parents_of(paths):
    """For each step but the first: where each beam comes from."""
    return [[before.index(path[:-1]) for path in now] for before, now in zip(paths, paths[1:])]


alt = "One thick line of descent; many short grey twigs that end after a few steps"
title = "Who descends from whom? Grey: died before the end"
with plots.figure(title, "step", "rank of the beam", size=(8.6, 2.6), alt=alt) as axes:
    for step, parents in enumerate(parents_of(paths), 1):
        for rank_now, parent in enumerate(parents):
            path = paths[step][rank_now]
            lives = any(end[: len(path)] == path for end in paths[-1])
            look = (plots.COLORS[0], 2.5) if lives else (plots.GREY, 0.9)
            axes.plot([step, step + 1], [parent + 1, rank_now + 1], color=look[0], lw=look[1])
    axes.set(yticks=[1, 2, 3, 4], ylim=(4.4, 0.6))

# %% [markdown]
# All that runs at the end comes from one beam not long ago. Before that there is a single line: the trunk is decided,
# and its alternatives are forgotten. The same in blocks, at three moments:

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
alt = "Without sharing blocks rise four times as steeply; with it, they rise slowly"
with plots.figure("Blocks of four beams", "step", "blocks of 4", size=(6.8, 2.8), alt=alt) as axes:
    plots.line(axes, range(32), without, "if nobody shared", at=20, dy=10)
    plots.line(axes, range(32), used, "really used", at=20, dy=-12)
print(f"at the end {used[-1]} blocks instead of {without[-1]}")
assert used[-1] < without[-1] / 2

# %% [markdown]
# How much was copied for that? If beams lie in rows of their own, as in a tensor [W, length], a fork copies a row. Many
# programs copy all W rows in every step, to bring them in order. Blocks copy the last one, if it isn't full:

# %%
forks = [len(moves(parents, 4)[1]) for parents in parents_of(paths)]
lengths = range(len(llm.tokenizer.encode(KEEPER)) + 1, 1000)  # after each of these steps
every_row = sum(4 * length for _, length in zip(forks, lengths))
forked_rows = sum(fork * length for fork, length in zip(forks, lengths))
blocks = sum(seen.copies)
print(f"{sum(forks)} forks; tokens copied: {every_row} if all rows are in each step, "
      f"{forked_rows} if forked rows are, {4 * blocks} in {blocks} blocks")
assert 4 * blocks < forked_rows / 5 < every_row / 10

# %% [markdown]
# ### Figure 15
#
# The paper asks how many blocks sharing saves, in percent of what there would be without it, for beams 2, 4 and 6 wide.
# Its load is Alpaca: short questions, answers of 58 tokens on average, blocks of 16. Here is the same for one question
# and 58 tokens of our model, and from the package's experiments, whose load has Alpaca's lengths, and where the
# log-probabilities are made up, so that no model is needed ([chapter 15](15_the_experiments.ipynb)):

# %%
from minipaged.experiments import paper
from minipaged.experiments.beams import saving

engine = LLM("smollm2", num_blocks=400, prefix_cache="hash", device="cpu")


def saved_percent(tables):
    """Of all steps together."""
    used = sum(len({block for table in step for block in table}) for step in tables)
    return 100 * (1 - used / sum(len(table) for step in tables for table in step))


ours = {W: saved_percent(watch(engine, KEEPER, W, 58)[1].tables) for W in (2, 4, 6)}
made = {W: saving("alpaca", "beams", W, 60) for W in (2, 4, 6)}
theirs = paper.SAVED["beams", "alpaca"]
for W in (2, 4, 6):
    print(f"W = {W}: this question {ours[W]:.0f} %, experiments {made[W]:.0f} %, paper {theirs[W]}")
assert ours[2] < ours[4] < ours[6]

# %%
alt = "Three rising lines that flatten from 4 to 6 beams; ours, the experiments', the paper's"
title = "Blocks saved by sharing"
with plots.figure(title, "width W", "%", size=(6.8, 3), alt=alt) as axes:
    plots.line(axes, [2, 4, 6], [made[W] for W in made], "experiments", dy=4)
    plots.line(axes, [2, 4, 6], [theirs[W] for W in theirs], "paper", dy=0)
    plots.line(axes, [2, 4, 6], [ours[W] for W in ours], "this question", dy=0)
    axes.set(ylim=(0, 70), xticks=[2, 4, 6])

# %% [markdown]
# One question is one question, and another model on another load; but the size is the same, and so is the bend. It can
# be understood: the trunk is shared by all W, and W copies of it would be W times as much. So at best 1 - 1/W of all
# blocks is saved, 50, 75 and 83 %, and the twigs take their part of that. A longer answer has a longer trunk, and twigs
# of the same length: then more is saved. (The paper's ShareGPT, with answers of 338 tokens, is at 44 to 66 %.)
#
# ### What it costs to send beams again
#
# A server without forks can search, too. In each step a client sends every beam as a new prompt, and asks for one token
# with the best alternatives. Our `Search` does it in a few lines, with the package's engine as the model:

# %%
def resend(engine, prompt, W, limit, salted):
    """-> texts that have ended, best first; tokens that were computed."""
    computed, search, asked = [], Search(W, limit, ends=()), 0
    ask = SamplingParams(temperature=0, max_tokens=1, logprobs=2 * W, ignore_eos=True)
    engine.observers.append(lambda plan, output: computed.append(plan.num_tokens))
    while search.beams:
        offers = []
        for _, tokens in search.beams:
            asked += 1
            salt = f"{salted}{asked}" if salted else "known"
            text = {"prompt_token_ids": [*prompt, *tokens]}
            (out,) = engine.generate(text, ask, cache_salt=salt)
            best = out.outputs[0].logprobs[0]
            offers.append({token: one.logprob for token, one in best.items()})
        search.step(offers)
    engine.observers.pop()
    return search.ended, sum(computed)


# %% [markdown]
# Nothing is kept between two requests unless the server has a prefix cache (chapter 13): it finds full blocks that begin
# alike. We try both, without it by giving each request a salt of its own, so that nobody finds anything. And the same
# search by fork and free:

# %%
prompt = engine.tokenizer.encode(KEEPER)
slow, computed_slow = resend(engine, prompt, 4, 12, salted="first ")
cached, computed_cached = resend(engine, prompt, 4, 12, salted="")


def forked(engine, prompt, W, limit):
    computed = []
    engine.observers.append(lambda plan, output: computed.append(plan.num_tokens))
    ask = BeamSearchParams(W, limit, ignore_eos=True)
    (out,) = engine.generate({"prompt_token_ids": prompt}, ask, cache_salt="forked")
    engine.observers.pop()
    return [(one.score, tuple(one.token_ids)) for one in out.outputs], sum(computed)


# %%
engine.reset_prefix_cache()
fast, computed_fast = forked(engine, prompt, 4, 12)
assert fast == slow == cached
P, T, W = len(prompt), 12, 4
assert computed_fast == P + W * (T - 1)
assert computed_slow == P + W * sum(P + t for t in range(1, T))
print(f"tokens computed: {computed_slow} sent again, {computed_cached} with a prefix cache,"
      f" {computed_fast} forked")

# %% [markdown]
# The same four texts with the same scores, to the last bit. So Search is right for the real model, too, and these counts
# are the same on every machine. With P tokens of prompt and T of output it is P + W (T - 1) against P + W times the sum
# of P + t: the second grows with the square of T. For 64 tokens and 64 more:

# %%
P, T, W = 64, 64, 4
again, once = P + W * sum(P + t for t in range(1, T)), P + W * (T - 1)
print(f"{again} against {once} tokens: {again / once:.0f} times as many")

# %% [markdown]
# A prefix cache saves most of it. It finds full blocks only, so the tokens of the last block are computed in each step
# for each beam, and there is a whole request for every token: read, queued, looked up, ranked, answered. The README has
# a run of the package's bench with eight such searches, on two cores: transformers, which keeps its beams in rows, made
# 2.3 times fewer tokens a second than this engine, and vLLM, which sends each beam again with a prefix cache, 7.6 times
# fewer. All three found the same texts.
#
# ## Check it
#
# **Against brute force.** All texts of small models are scored, with ends and length penalties. A search that is wide
# enough, and that never stops early, must find the best of all:

# %%
class Patient(Search):
    def hopes(self, score, length):
        return True


checked = 0
for seed in range(40):
    model = made_up(seed, tokens_of_it=(END, 1, 2, 3))
    for alpha in (-1, 0, 0.5, 1, 2):
        texts = [(score / len(text)**alpha, text) for score, text in all_texts(model, 4)]
        expected = sorted(texts, reverse=True)[:5]
        assert run(Patient(W=200, limit=4, alpha=alpha), model)[:5] == expected
        checked += len(texts)
print(checked, "texts scored, and the five best found each time")

# %% [markdown]
# **What each beam reads.** Searches in small pools, with words in the slots. A copy is carried out before anybody writes,
# freed blocks are filled with junk, and each beam must read its own tokens, from the first to the last. When there is no
# room, nothing may have changed:

# %%
def live(random, B, seen):
    W, prompt = random.randint(1, 5), random.randint(1, 6)
    search, model = Search(W, limit=12, ends=()), made_up(random.random())
    memory = KVCacheManager(random.randint(6, 30), B)
    if prompt > memory.num_blocks * B:
        return
    beams, slots = Beams(memory, prompt), {}
    slots.update({slot: 9 for slot in memory.slots(0, 0, prompt)})
    while search.beams:
        moved = search.step([model(tokens) for _, tokens in search.beams])
        beams.move([parent for parent, _ in moved])
        for block in memory.take_freed():
            slots.update({block * B + i: "junk" for i in range(B)})
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
# **Against transformers**, with the weights of the real model in its Llama, as in [chapter 1](01_from_weights_to_text.ipynb).
# Three prompts, three length penalties, and texts that end where the model says so:

# %%
import torch
import transformers

from kernels.packed import floats
from minipaged.models import ModelConfig, open_checkpoint
from minipaged.models.llama import Llama

checkpoint = open_checkpoint("smollm2")
stored = checkpoint.names(Llama.tensor_shapes(ModelConfig.from_hf(checkpoint.config)))
weights = {name: floats(checkpoint.tensor(key, torch.float32)) for key, name in stored.items()}
fields = {k: v for k, v in checkpoint.config.items() if k != "model_type"}
with torch.device("meta"):  # the shapes alone
    hf_llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
hf_llama.load_state_dict(weights, assign=True)
hf_llama.model.rotary_emb = type(hf_llama.model.rotary_emb)(hf_llama.config)
hf_llama.generation_config = transformers.GenerationConfig()


# %%
def theirs_of(tokens, W, limit, alpha):
    """-> (score, tokens) of their W best."""
    ids, (end,) = torch.tensor([tokens]), llm.config.eos_token_ids
    out = hf_llama.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=W, num_return_sequences=W,
        max_new_tokens=limit, length_penalty=alpha, eos_token_id=end, pad_token_id=0,
        do_sample=False, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    counts = (out.beam_indices >= 0).sum(1)
    rows = [row[len(tokens) :][:n].tolist() for row, n in zip(out.sequences, counts)]
    return [*zip(out.sequences_scores.tolist(), rows)]


# %%
ends = set()
for text, alpha in [(question, 0.0), (question, 1.0), (WINTER, 1.0), (KEEPER, 2.0)]:
    ask = BeamSearchParams(4, 16, length_penalty=alpha)
    (out,) = llm.generate([text] if isinstance(text, list) else text, ask)
    theirs4 = theirs_of(out.prompt_token_ids, 4, 16, alpha)
    assert [one.token_ids for one in out.outputs] == [tokens for _, tokens in theirs4]
    gaps = [abs(one.score - score) for one, (score, _) in zip(out.outputs, theirs4)]
    assert max(gaps) < 1e-3
    ends |= {one.finish_reason for one in out.outputs}
    print(f"alpha {alpha}: the same 4 texts, of {[len(one.token_ids) for one in out.outputs]} tokens")
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
# A running beam is a `Beam`, what goes on is a `Continuation`, and a text that has ended is a `Hypothesis`, which also
# says why it ended. `num_candidates` is our 2W, or more if there are several stop tokens: each beam could end by any of
# them. `num_wanted` is how many of the W the user wants back (`n`), and `hypotheses` gives them. What it does more:
#
# - It refuses candidates that don't fit or hold a NaN, before anything has changed.
# - `early_stopping` chooses among three ways to stop, which are those of transformers. Ours is `False`. With `True` it
#   stops as soon as W texts have ended. With `"never"` it goes on as long as any running beam **could** still win: if α
#   is positive, by getting as long as allowed and losing nothing more.
#
# Two texts of score -1 have ended, and a beam of log-probability -2.2 and length 2 could run on, to ten tokens:

# %%
def two_have_ended(early_stopping):
    params = BeamSearchParams(2, early_stopping=early_stopping)
    two = BeamSearch(params, max_tokens=10, eos_token_ids=[0])
    two.advance([[(5, -1.0), (6, -1.0), (7, -8.0)]])
    two.advance([[(0, -1.0), (5, -1.2)], [(0, -1.0), (5, -9.0)]])
    return two


for early in (True, False, "never"):
    ended = two_have_ended(early)
    print(f"{early!s:6}", "stops" if ended.done else "goes on", [h.score for h in ended.finished])
print(f"-2.2 is {-2.2 / 2:.2f} a token now; ten tokens of the same sum would be {-2.2 / 10:.2f}")

# %% [markdown]
# Do both searches agree? Random models, widths, limits and penalties: the same beams in each step, to the last bit, and
# the same texts at the end. Both get all tokens as offers, and the package also the best `num_candidates` alone:

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
    assert package.done and [h[1::-1] for h in package.hypotheses()] == mine.ended
    return steps


print(sum(compare(Random(seed)) for seed in range(500)), "steps, and no difference")

# %% [markdown]
# ### What it does to memory
#
# `memory_moves` is our `moves`, and its answer `MemoryMoves` says in which order to carry it out:

# %%
show_source(beam_search.memory_moves)

# %% [markdown]
# Carried out it is where all sequences of the engine grow, fork and end, when the tokens of a step are known. This is
# `growth.py`, and `LiveSequences` are all sequences that have not ended, by their id. `grow` is told what came out of
# the model. A request with a search goes the second way:

# %%
from minipaged.scheduling.growth import LiveSequences

show_source(LiveSequences.grow, LiveSequences._grow_beams, LiveSequences._fork)

# %% [markdown]
# Fork, keep, free, and only then the new tokens. If any beam has no candidates yet, nothing happens. (After a preemption
# they compute at different speeds; see below.) If the logits of one are broken, all of them end: **beams are nothing
# without each other**. Chapter 8 has the other way, `_append`, for samples.

# %%
show_source(LiveSequences.add, LiveSequences.new_id, LiveSequences.end, LiveSequences.start_over)

# %% [markdown]
# `add` gives a sequence its id, which nobody had before (`new_id`); `end` frees its memory at once, on whichever side
# it is; `start_over` is for a step that was broken off in the middle, after which all is computed again. So the id tells
# what happened to a beam: who is kept keeps it, and a fork has a new one. The real engine beside our `Beams`, on the
# same search: the same ids, and the same page tables to the block number:

# %%
def side_by_side(limit=24, W=4):
    ids, seen_ids = [], []
    with LLM("smollm2", num_blocks=60, block_size=4, prefix_cache="none", device="cpu") as small:
        small.observers.append(lambda plan, _: ids.append([s.seq_id for s in plan.sequences]))
        _, seen = watch(small, KEEPER, W, limit)
    memory = KVCacheManager(num_blocks=60, block_size=4)
    beams = Beams(memory, prompt=len(llm.tokenizer.encode(KEEPER)))
    for step, parents in enumerate([[0] * W, *parents_of(seen.paths)]):
        assert (ids[step], seen.tables[step]) == (beams.names, beams.tables())
        beams.move(parents)
        copies = len(beams.grow().copies)
        assert copies == seen.copies[step + 1]
    return ids


for step, names in enumerate(side_by_side()[:7]):
    print(f"step {step}: sequences {names}")

# %% [markdown]
# ### All or nothing
#
# Forks and frees of a step can't fail. What can is the `append` of the next step: the scheduler asks for one slot for
# each beam in a single call, and if that is refused, somebody gives way, with all beams of a request (chapter 12). How
# many blocks a search can need at the worst is known when it comes: the full blocks of the prompt once, and all the
# rest W times. A request that can't fit by that count is refused at once.

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
# Say the victim's blocks are dropped and computed again. What it had shared was a result of its history, of forks in
# the right moments, and that is gone. Each beam has all its tokens, but if each computed all of them, the prompt would
# be there W times, and the request would need more than its worst case. So the first beam computes the prompt, and the
# others fork it:

# %%
from minipaged.scheduling import preemption

show_source(Request.target, preemption.share_rebuilt_prompt)

# %% [markdown]
# `target` has the second half. Beams are ranked together, so none may be a token ahead: nobody computes its last token
# until all can. Two searches in a pool of 18 blocks, where the second has to give way once, by recomputation and by
# swapping:

# %%
from minipaged.experiments.divergence import PROMPTS

PAIR = [" ".join(PROMPTS[i : i + 3]) for i in (0, 3)]


def squeezed(mode, blocks):
    """-> all texts; for each step of the second request (tokens computed, blocks, unshared)."""
    rows, ways = [], []

    def look(plan, output):
        tables = [s.block_table for s in plan.sequences if s.request_id == "1"]
        tokens = [len(s.token_ids) for s in plan.sequences if s.request_id == "1"]
        held = len({block for table in tables for block in table})
        rows.append((tokens, held, sum(map(len, tables))))
        ways.extend(plan.preempted)

    with LLM("smollm2", num_blocks=blocks, num_cpu_blocks=40, prefix_cache="none",
             device="cpu", preemption=mode) as small:  # fmt: skip
        small.observers.append(look)
        outs = small.generate(PAIR, BeamSearchParams(4, 32, ignore_eos=True))
    return [one.token_ids for out in outs for one in out.outputs], rows, ways


# %%
calm, _, ways = squeezed("auto", 100)
assert not ways
for mode in ("recompute", "swap"):
    texts, rows, ways = squeezed(mode, 18)
    assert texts == calm and ways == [("1", mode)]
    gone = [i for i, (tokens, _, _) in enumerate(rows) if not tokens]
    back = [(tokens, held, of) for tokens, held, of in rows[gone[-1] + 1 :]]
    print(f"{mode}: before it held {rows[gone[0] - 1][1]} blocks instead of {rows[gone[0] - 1][2]};"
          " when it comes back")
    for tokens, held, of in back[:2]:
        print(f"   computes {tokens}, holds {held} instead of {of}")

# %% [markdown]
# The texts are the same. Whoever was swapped comes back as it went: a block that was shared moves once, and stays shared.
# Whoever is recomputed shares its prompt again, and of its answers nothing: the trunk is there four times. With a prefix
# cache the trunk's full blocks may be found again, as long as nobody needed them. That is why `preemption="auto"` swaps
# a request with several sequences.
#
# ## What must hold, and what breaks if it doesn't
#
# **What is ranked together is of one kind.** Logits of two beams can't be compared: each row of them may be shifted by
# any number and means the same. Only the softmax over all tokens brings them to one scale. Take the logits instead:

# %%
def shifted(model, by):
    """The same model; its scores are moved by something that depends on the beam."""
    return lambda tokens: {token: x + by * len(set(tokens)) for token, x in model(tokens).items()}


right = [search(model, 4, 5)[0] for model in MODELS[:100]]
wrong = [search(shifted(model, 3), 4, 5)[0] for model in MODELS[:100]]
same = sum(a[1] == b[1] for a, b in zip(right, wrong))
print(f"with scores that are shifted for each beam, {same} of 100 searches end with the same text")
assert same < 60

# %% [markdown]
# **Fork before the tokens.** A child begins with what its parent had, and not with what the parent gets now. If the
# first child has already written its token, the second reads it as its own past:

# %%
def two_children(fork_first):
    """Parent "a", children "a b" and "a c". -> what the second reads."""
    memory, slots = KVCacheManager(num_blocks=4, block_size=4), ["."] * 16
    memory.allocate(0, num_tokens=1)
    slots[memory.slots(0, 0, 1)[0]] = "a"
    if fork_first:
        memory.fork(0, 1)
    for name, token in ((0, "b"), (1, "c")):
        if name == 1 and not fork_first:
            memory.fork(0, 1)
        for source, target in memory.append({name: 1}).copies:
            slots[4 * target : 4 * target + 4] = slots[4 * source : 4 * source + 4]
        slots[memory.slots(name, memory.num_tokens(name) - 1, 1)[0]] = token
    return "".join(slots[slot] for slot in memory.slots(1, 0, memory.num_tokens(1)))


print("fork first:", two_children(True), "  token first:", two_children(False))
assert two_children(True) == "ac" != two_children(False)

# %% [markdown]
# **Free before you append.** The dead hold blocks that the living are about to need. Free them afterwards, and the same
# search wants more memory than W beams ever have:

# %%
class LateBeams(Beams):
    def move(self, parents):
        heirs = {}
        for new, old in enumerate(parents):
            heirs[new] = self.next_name = self.next_name + 1
            self.memory.fork(self.names[old], heirs[new])
        self.late, self.names = self.names, [*heirs.values()]

    def grow(self, count=1):
        grown = super().grow(count)
        for name in self.late:
            self.memory.free(name)
        return grown


def most(kind, B):
    """Blocks in use at the worst moment of a search."""
    memory = KVCacheManager(num_blocks=500, block_size=B)
    beams = kind(memory, prompt=3)
    for parents in [[0] * 4, *parents_of(paths)]:
        beams.move(parents)
        beams.grow()
    return memory.usage().peak_used


for B in (1, 4, 16):
    print(f"B = {B:2}: {most(Beams, B)} blocks, {most(LateBeams, B)} if the dead are freed late")
assert all(most(LateBeams, B) > most(Beams, B) for B in (1, 4, 16))

# %% [markdown]
# **2W offers of each beam.** With W offers, a beam whose best tokens all end, or whose siblings are all bad, leaves too
# few that run. How often is a step short of beams, though there are enough tokens?

# %%
def short_steps(count):
    """Steps with fewer than 3 beams, if each offers its `count` best of 8 tokens."""
    short = 0
    for seed in range(100):
        some, model = Search(3, limit=6, alpha=3), made_up(seed, range(8))
        while some.beams:
            rows = [sorted(model(tokens).items(), key=lambda x: -x[1]) for _, tokens in some.beams]
            some.step([dict(row[:count]) for row in rows])
            short += 0 < len(some.beams) < 3
    return short


print(f"offers of each beam: 3: short in {short_steps(3)} steps, 6: in {short_steps(6)}")
assert short_steps(3) > 0 == short_steps(6)

# %% [markdown]
# **Don't stop at the first end.** Then it is greedy again in the one thing that matters. How often does the text that
# ends first have the best score of what the same search finds by going on?

# %%
class Hasty(Search):
    def hopes(self, score, length):
        return not self.ended


pairs = [[run(kind(4, 8), made_up(seed, range(5)))[0][0] for kind in (Hasty, Search)]
         for seed in range(200)]  # fmt: skip
missed = sum(hasty < patient for hasty, patient in pairs)
print(f"{missed} of 200 searches would have found something better")
assert missed > 20 and all(hasty <= patient for hasty, patient in pairs)
