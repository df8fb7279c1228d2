# %% [markdown]
# # 11. Chunked prefill
#
# Eight people chat with a server, and each gets a word every few hundredths of a second. Then a ninth pastes a whole
# document. This chapter shows what happens to the eight, why one number bounds their wait, and why the document may
# be cut into pieces of any size without changing a single bit of its answer.
#
# **You need**: the plan and the flat batch of [chapter 10](10_continuous_batching.ipynb), continuous batching, and the
# cost of a step from [chapter 2](02_the_kv_cache.ipynb). **You get**: the longest gap as a function of one number, a
# planner of one short function that agrees with the package's, and the way in which guesses (speculation) use what is
# left.

# %% [markdown]
# ## The question
#
# In continuous batching requests join and leave between steps. A step ends for everyone at the same time, so it takes
# as long as all of its work together. A sequence that decodes brings one token to a step. A new prompt brings all of
# its tokens at once. So:
#
# - How long do those who decode wait while a long prompt is computed?
# - Can a prompt be computed in pieces, and is the answer really the same?
# - What do the pieces cost, and who should get how much of a step?

# %% [markdown]
# ## The idea
#
# Give each step a **budget**: the most tokens that it may compute. Everyone who decodes gets one token of it. What is
# left goes to prompts, and a prompt that doesn't fit is cut. The first piece, or **chunk**, is computed now, the rest
# in the next steps, each time beside the tokens of the others. This is **chunked prefill** (SARATHI, 2023).
#
# ```
#                 a step computes at most 8 tokens
#
#   without   | a b c | P P P P P P P P P P P P P P a b c | a b c |
#                      '--- a, b and c wait for all of P --'
#
#   with      | a b c | a b c P P P P P | a b c P P P P P | a b c P P P P | a b c |
# ```
#
# Why may a prompt be cut at all? Because of the causal mask. The keys and values of a token depend on the tokens before
# it, and on nothing behind it. If those before are in the cache already, the next ones can be computed when they are
# wanted. For the model a chunk is nothing new: some tokens that attend to a cache, as in every step before.

# %% [markdown]
# ## Build it
#
# ### The wait
#
# The real model, eight chats, and a document of some 600 tokens. The document comes when all chats are under way. With
# a budget of 1024 tokens it fits into a single step.

# %%
import time
from collections import Counter
from itertools import count
from random import Random

import torch

from minipaged import LLM, SamplingParams
from minipaged.teaching import attempt, equal, own, plots, show_source

CHATS = ["Tell me about the sea.", "What is a train?", "Name three colors.", "Who was Newton?",
         "What is bread?", "How do birds fly?", "What is music?", "Why is the sky blue?"]
DOCUMENT = "The quick brown fox jumps over the lazy dog. " * 60
greedy = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
short = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)


def engine(budget, **options):
    return LLM("smollm2", num_blocks=160, prefix_cache="none", device="cpu", max_num_seqs=12,
               max_num_batched_tokens=budget, **options)


# %% [markdown]
# `story` plays it once. An observer keeps the plan of every step. It ends when the document has its first token.

# %%
def story(budget):
    """-> plans, seconds of each step since the document came, and its name."""
    with engine(budget) as llm:
        plans, seconds, said = [], [], []
        llm.observers.append(lambda plan, output: plans.append(plan))
        for text in CHATS:
            llm.add_request(text, greedy)
        while sum(plan.num_tokens == 8 for plan in plans) < 4:  # all eight decode
            llm.step()
        name = llm.add_request(DOCUMENT, short)
        while name not in said:
            began = time.perf_counter()
            said = [output.request_id for output in llm.step()]
            seconds.append(time.perf_counter() - began)
    return plans, seconds, name


plans, whole_seconds, document = story(budget=1024)
print("tokens in each step:", [plan.num_tokens for plan in plans])
prompt_tokens = plans[-1].num_tokens - 8
print(f"the document has {prompt_tokens} tokens")

# %% [markdown]
# The chats' prompts came in the first step, then eight tokens a step, one for each. And then a step of over 600.

# %% tags=["measured"]
print(f"the step with the document took {whole_seconds[-1]:.2f} s")

# %% [markdown]
# For that long, eight people saw nothing. Now with a budget of 64:

# %%
chunked_plans, chunked_seconds, document = story(budget=64)
print("tokens in each step:", [plan.num_tokens for plan in chunked_plans])
chunks = [len(s.token_ids) for plan in chunked_plans for s in plan.sequences
          if s.request_id == document]
print("chunks of the document:", chunks)
assert sum(chunks) == prompt_tokens and max(chunks) == 64 - 8
assert all(plan.num_tokens <= 64 for plan in chunked_plans)

# %% tags=["measured"]
print(f"the longest of these steps took {max(chunked_seconds):.2f} s,")
print(f"all {len(chunked_seconds)} together {sum(chunked_seconds):.2f} s")

# %% [markdown]
# No step has more than 64 tokens, and in each of them every chat got its token. The picture shows who brought how many:

# %%
def bars(axes, plans, name):
    own_tokens = [sum(len(s.token_ids) for s in plan.sequences if s.request_id == name)
                  for plan in plans]
    others = [plan.num_tokens - n for plan, n in zip(plans, own_tokens)]
    steps = range(1, len(plans) + 1)
    axes.bar(steps, others, color=plots.COLORS[0])
    axes.bar(steps, own_tokens, bottom=others, color=plots.COLORS[1], hatch="//")
    axes.set(xlabel="step", ylabel="tokens", xticks=steps[:: 1 + len(steps) // 10])


alt = "Left: one bar of over 600 tokens. Right: ten of 64 and one of 49, 8 of each the chats'"
titles = "Budget 1024", "Budget 64 (hatched: the document)"
with plots.figures(*titles, size=(8.6, 3), alt=alt) as (left, right):
    bars(left, plans, document)
    bars(right, chunked_plans, document)


# %% [markdown]
# ### Why a cut changes nothing
#
# Attention of one head in a few lines. `start` is the position of the first query. A query at position i sees the
# keys up to i, whichever step they came from:

# %%
def attend(q, k, v, start):
    """q [n, D], k and v [start + n, D] -> [n, D]."""
    n, total = len(q), len(k)
    hidden = torch.arange(total)[None, :] > start + torch.arange(n)[:, None]
    scores = (q @ k.T / q.shape[1] ** 0.5).masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v


def in_chunks(q, k, v, sizes):
    """The same queries, cut: each chunk sees what is in the cache so far, itself included."""
    parts, start = [], 0
    for size in sizes:
        end = start + size
        parts.append(attend(q[start:end], k[:end], v[:end], start))
        start = end
    return torch.cat(parts)


# %%
torch.manual_seed(0)
q, k, v = torch.randn(3, 20, 8, dtype=torch.float64)
whole = attend(q, k, v, 0)
for sizes in [20], [7, 13], [1] * 20, [19, 1]:
    assert torch.allclose(in_chunks(q, k, v, sizes), whole)
print("20 tokens in 1, 2 or 20 chunks: the same answer")

# %% [markdown]
# And layer by layer it stays true. The output of a token in layer 1 is its input in layer 2, and none of it depends
# on what comes behind. So the whole model can be cut at any token.
#
# That is mathematics. A processor adds up rounded numbers, and another order of adding gives other last digits. The
# engine promises more: **the same bits**. Its kernels add up a row in an order that depends on nothing but the row.
# Here are the log-probabilities of 12 tokens, to the last bit, for a prompt that is cut in many ways, with
# and without company:

# %%
def answer(budget, company):
    """Tokens and log-probabilities of one request; `company`: how many chats run beside it."""
    with engine(budget) as llm:
        for text in CHATS[:company]:
            llm.add_request(text, greedy)
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3)
        name, last = llm.add_request(DOCUMENT[:900] + "And then", params), None
        while last is None or not last.finished:
            last = next((out for out in llm.step() if out.request_id == name), last)
    row = last.outputs[0]
    return row.token_ids, [{t: lp.logprob for t, lp in place.items()} for place in row.logprobs]


alone = answer(1024, 0)
for budget, company in [(12, 0), (33, 3), (64, 8), (100, 8), (1024, 8)]:
    assert answer(budget, company) == alone
print(f"{len(alone[0])} tokens, {sum(map(len, alone[1]))} log-probabilities: equal to the bit")

# %% [markdown]
# That is a hard test for a scheduler. A wrong position, a token left out or computed twice changes what later tokens
# attend to, and with it the last digits, long before it changes a word.
#
# ### Who gets how much
#
# Now the plan. Every sequence that runs has some tokens to do: a chat one, a prompt under way all that is left of it.
# First everyone gets one. Then what is left of the budget goes to those who have more to do, in the order of arrival.
# At last new prompts may come in, as long as anything is left:

# %%
def share_out(todos, waiting, budget):
    """-> tokens for each that runs, and for each of those who wait as far as they come in."""
    spare = budget - len(todos)
    counts = []
    for todo in todos:
        more = min(todo - 1, spare)
        spare -= more
        counts.append(1 + more)
    newcomers = []
    for todo in waiting:
        if spare < 1:
            break
        newcomers.append(min(todo, spare))
        spare -= newcomers[-1]
    return counts, newcomers


print(share_out([1, 1, 1], [], 8))  # three chats
print(share_out([1, 1, 1], [14], 8))  # and a prompt of 14: a chunk of 5
print(share_out([1, 1, 1, 9], [], 8))  # its second step
print(share_out([1, 1, 1, 4], [3, 6], 8))  # its last; a new one gets the rest

# %% [markdown]
# **Your turn.** Which budget does it take for the prompt of 14 to be through in two steps, beside three chats? Change
# the number, and run the cell:

# %%
your_budget = 8
first = share_out([1, 1, 1], [14], your_budget)[1][0]
second = share_out([1, 1, 1, 14 - first], [], your_budget)[0][-1] if first < 14 else 0
print(f"budget {your_budget}: chunks of {first} and {second}, {14 - first - second} left")


# %% [markdown]
# (It is 10: two chunks of 7.) The same function runs a whole story on integers, without a model:

# %%
def steps_of_story(prompt, chats, budget):
    """Tokens of each step, from the coming of the prompt to its first token."""
    (chunk,) = share_out([1] * chats, [prompt], budget)[1]
    steps, left = [chats + chunk], prompt - chunk
    while left:
        counts, _ = share_out([1] * chats + [left], [], budget)
        steps.append(sum(counts))
        left -= counts[-1]
    return steps


for budget, real in [(64, chunked_plans), (1024, plans)]:
    mine = steps_of_story(prompt_tokens, 8, budget)
    assert mine == [plan.num_tokens for plan in real][-len(mine) :]
print("the same steps as those of the real engine")

# %% [markdown]
# ### The longest gap, as a function of the budget
#
# Two people look at the same number. A chatter wants a small budget, so that steps are short. Who sent the document
# wants a large one, so that there are few of them. What a step of T tokens costs is known from chapter 2: up to some
# T it costs the reading of the weights, beyond that it grows with T. With a cost of max(16, T), in units of a token,
# both waits can be computed:

# %%
BUDGETS = [9, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024]
costs = {b: [max(16, T) for T in steps_of_story(prompt_tokens, 8, b)] for b in BUDGETS}
alt = "The longest gap is flat, then rises with the budget; the first token falls, then is flat"
with plots.figure("Two waits, in a simple model", "budget", "cost of tokens", alt=alt) as axes:
    gaps, firsts = ([kind(costs[b]) for b in BUDGETS] for kind in (max, sum))
    plots.line(axes, BUDGETS, gaps, "longest gap of a chat", at=7, dy=-8)
    plots.line(axes, BUDGETS, firsts, "first token of the document", at=5, dy=10)
    axes.set(xscale="log", yscale="log")

# %% [markdown]
# Below 16 a smaller budget shortens no step, because the weights have to be read anyway. It only makes more steps.
# Beyond that the longest gap is the budget, and the first token soon hardly falls any more: it can't come before all
# of the prompt was computed. So there is a wide valley in the middle, with much shorter gaps for a little more wait.
#
# **Your turn.** An A100 computes 312 trillion operations while it reads some 1.6 trillion bytes (NVIDIA's data
# sheet). A weight of 2 bytes means 2 operations for each token, so there a step costs the reading of the weights up
# to T = 200. Set it to 200. Below which of these budgets does nobody gain anything any more?

# %%
your_weights = 16
for b in BUDGETS:
    yours = [max(your_weights, T) for T in steps_of_story(prompt_tokens, 8, b)]
    print(f"budget {b:4}: longest gap {max(yours):4}, first token after {sum(yours):6}")

# %% [markdown]
# (Below 128, the largest under 200: the gap stays the same, and the document only comes later. So on a fast chip
# budgets are larger.)
#
# Is the real model like that? Six budgets, measured on the machine that made this page:

# %% tags=["measured"]
MEASURED = [16, 32, 64, 128, 256, 1024]
timed = {budget: story(budget)[1] for budget in MEASURED}
for budget, seconds in timed.items():
    print(f"budget {budget:4}: {len(seconds):3} steps, longest gap {max(seconds):5.2f} s, "
          f"first token of the document after {sum(seconds):5.2f} s")

# %% tags=["measured"]
alt = "Measured: the longest gap rises with the budget, the document's first token comes sooner"
with plots.figure("Two waits, measured", "budget", "seconds", alt=alt) as axes:
    gaps, firsts = ([kind(seconds) for seconds in timed.values()] for kind in (max, sum))
    plots.line(axes, MEASURED, gaps, "longest gap of a chat", at=3, dy=-10)
    plots.line(axes, MEASURED, firsts, "first token of the document", at=2, dy=10)
    axes.set(xscale="log", yscale="log", xticks=MEASURED, xticklabels=MEASURED)
    axes.minorticks_off()

# %% [markdown]
# The same two lines, in seconds. Where to stand between them is a choice, and engines leave it to whoever runs
# them: it is `max_num_batched_tokens` in ours and in vLLM. The Sarathi-Serve paper chooses it from the longest gap
# that is still allowed, and exercise 2 does just that.
#
# ### What a cut costs
#
# Cutting is not free, even if no value changes. Each chunk is a step, and a step reads all weights. Each chunk also
# reads the keys and values of all tokens before it:

# %%
def reads(prompt, chats, budget):
    """-> times that the weights are read, and keys read from the cache for the prompt."""
    steps = steps_of_story(prompt, chats, budget)
    done, keys = 0, 0
    for T in steps:
        done += T - chats
        keys += done  # this chunk's queries need all keys up to its end, read once
    return len(steps), keys


for budget in (12, 64, 256, 1024):
    weights, keys = reads(prompt_tokens, 8, budget)
    print(f"budget {budget:4}: weights {weights:4} times, {keys:6} keys")

# %% [markdown]
# For chunks of c tokens and a prompt of P it is about P/c readings of the weights, and P²/2c keys, as
# long as c is much less than P. In the whole prompt each key is read once. The queries and keys that are multiplied
# are the same in all cases: what is cut is the reading, not the arithmetic. And the weights would be read anyway: the
# chats need them in each step. A chunk in the same step rides along. That is why the SARATHI paper calls it
# piggybacking.
#
# ### Short ones behind a long one
#
# First come, first served has a weakness. The document is long, and whoever asks a short question just after it waits
# until all of its chunks are through, since they take what the chats leave:

# %%
def questions(budget, prompts):
    """Prompts that all come at once -> the step in which each gets its first token."""
    left, first, step = list(prompts), {}, 0
    running = []
    while len(first) < len(prompts):
        step += 1
        waiting = [i for i in range(len(left)) if i not in running and i not in first]
        busy = [i for i in running if i not in first]
        chatting = [1] * len(first)
        todos = chatting + [left[i] for i in busy]
        counts, new = share_out(todos, [left[i] for i in waiting], budget)
        given = [*zip(busy, counts[len(chatting):]), *zip(waiting, new)]
        running += [i for i, _ in given if i not in running]
        for i, tokens in given:
            left[i] -= tokens
            if left[i] == 0:
                first[i] = step
    return [first[i] for i in range(len(prompts))]


print("first tokens in step", questions(64, [2000, 10, 12]))

# %% [markdown]
# Thirty-two steps for ten tokens. The package cares for this: a prompt is **long** if what is left of it doesn't fit
# into one step. Long ones leave to the short ones what these need, but never more than half. So a short question
# is through at once, and the long one keeps at least half. With the real scheduler, and no model:

# %%
from minipaged.memory import KVCacheManager
from minipaged.requests.request import Request
from minipaged.requests.sampling_params import SampledToken
from minipaged.scheduling.plan import StepOutput
from minipaged.scheduling.scheduler import Scheduler


def scheduler_for(prompts, budget, **options):
    scheduler = Scheduler(KVCacheManager(2000, 16), 32, budget, watermark=0.0, **options)
    for i, prompt in enumerate(prompts):
        scheduler.add(Request(str(i), i, [1] * prompt, SamplingParams(max_tokens=500), 500))
    return scheduler


def one_step(scheduler):
    """Plan, pretend that the model said token 7 to everyone, and go on. -> the plan"""
    plan = scheduler.schedule()
    said = {s.seq_id: [[SampledToken(7)]] for s in plan.sequences if s.draw}
    scheduler.update(plan, StepOutput(tokens=said))
    return plan


# %%
def first_tokens(scheduler, count):
    """The step in which each of `count` requests gets its first token."""
    first = {}
    while len(first) < count:
        plan = one_step(scheduler)
        for s in plan.sequences:
            if s.draw:
                first.setdefault(int(s.request_id), plan.step)
    return [first[i] for i in range(count)]


print("first tokens in step", first_tokens(scheduler_for([2000, 10, 12], 64), 3))

# %% [markdown]
# The two short ones are through in the first step, and the document needs one step more. What if short ones keep
# coming? One in each step, of `size` tokens, and each is gone when it has its first token:

# %%
def beside_a_stream(size):
    """-> the step in which a prompt of 2000 tokens is through, with a budget of 64."""
    scheduler, once = scheduler_for([2000], 64), SamplingParams(max_tokens=1)
    for step in count(1):
        scheduler.add(Request(str(step), step, [1] * size, once, 1))
        if any(s.draw and s.request_id == "0" for s in one_step(scheduler).sequences):
            return step


for size in (1, 16, 64):
    print(f"short ones of {size:2}: the document is through in step {beside_a_stream(size)}")
assert beside_a_stream(64) <= 2 * 32

# %% [markdown]
# Its own half moves it on: at worst it takes twice as long. (Short ones that stay, as chats, take a token each
# besides, as all chats do.)
#
# **Your turn.** In which step is it through beside short ones of 24? And of 48? Predict both, then change the number:

# %%
your_size = 16
print(f"short ones of {your_size}: step {beside_a_stream(your_size)}")

# %% [markdown]
# (24 leave 40 of each step, so 50 steps. 48 would leave 16, but it keeps 32: 62 steps, since the last part of it is
# short itself.)

# %% [markdown]
# ## Check it
#
# Random steps: chats, prompts, budgets. The counts must respect the budget, everyone must get one, and nothing may be
# left over while somebody could use it. `seen` tells whether all cases came up.

# %%
def check_share(random, seen):
    todos = [random.choice([1, 1, random.randint(2, 40)]) for _ in range(random.randint(0, 6))]
    waiting = [random.randint(1, 40) for _ in range(random.randint(0, 4))]
    budget = len(todos) + random.randint(0, 40)
    counts, newcomers = share_out(todos, waiting, budget)
    used = sum(counts) + sum(newcomers)
    assert used <= budget and all(1 <= c <= todo for c, todo in zip(counts, todos, strict=True))
    rest = sum(todos) + sum(waiting) - used
    assert used == budget or rest == 0, "nothing is left over that somebody could use"
    seen["cut a running one"] += any(c < todo for c, todo in zip(counts, todos))
    seen["cut a newcomer"] += any(n < todo for n, todo in zip(newcomers, waiting))
    seen["somebody waits"] += len(newcomers) < len(waiting)
    seen["all done at once"] += rest == 0


# %%
seen = Counter()
for seed in range(3000):
    check_share(Random(seed), seen)
print(dict(seen))
assert len(seen) == 4 and min(seen.values()) > 300

# %% [markdown]
# And random stories. At the end each chat had one token a step, and each token of the prompt was computed once:

# %%
for seed in range(300):
    random = Random(seed)
    prompt, chats, room = random.randint(1, 300), random.randint(0, 9), random.randint(1, 50)
    steps = steps_of_story(prompt, chats, chats + room)
    assert sum(steps) == prompt + chats * len(steps) and max(steps) <= chats + room

# %% [markdown]
# ## The package's version
#
# What `share_out` does for a running request is `Step.counts_of`. `request.target(seq)` is how many tokens it should
# have computed, and `num_computed_tokens` how many it has. There is no word of prefill or decode: a chat has one token
# to do, a prompt many, and the line is the same.

# %%
from minipaged.scheduling.plan import Step

show_source(Step.counts_of, Step.take)

# %% [markdown]
# `spare` is what is nobody's yet. The scheduler has taken one for each that runs out of it before anything else
# happens. `grant` is the rule for long prompts, with the half that is theirs at least:

# %%
show_source(Step.grant, Step._is_long)

# %% [markdown]
# And this is the step. Who runs goes first, then guesses (below), then newcomers. If memory runs out on the way,
# somebody is preempted, which is [chapter 12](12_preemption.ipynb):

# %%
show_source(Scheduler.schedule, Scheduler._continue_running)


# %% [markdown]
# Do both agree? Random loads through the package's scheduler. Each step is planned by ours as well, from what the
# scheduler's requests have left to do. Prompts are short here, so that the rule for long ones doesn't come in:

# %%
def todo_of(request):
    seq = request.live[0]
    return request.target(seq) - seq.num_computed_tokens


def compare(random, seen):
    budget = random.randint(32, 64)
    prompts = [random.randint(1, 32) for _ in range(random.randint(1, 12))]
    scheduler = scheduler_for(prompts, budget)
    for _ in range(random.randint(2, 12)):
        running = [todo_of(request) for request in scheduler.running]
        waiting = [todo_of(request) for request in scheduler.waiting]
        counts, newcomers = share_out(running, waiting, budget)
        plan = one_step(scheduler)
        assert [len(s.token_ids) for s in plan.sequences] == counts + newcomers
        seen["steps"] += 1
        seen["chunks"] += sum(1 for s in plan.sequences if not s.draw)


# %%
seen = Counter()
for seed in range(150):
    compare(Random(seed), seen)
print(f"{seen['steps']} steps planned alike, with {seen['chunks']} chunks that end no prompt")
assert seen["chunks"] > 100

# %% [markdown]
# `chunked_prefill=False` switches it off, and then a prompt waits for a step that has room for all of it. The tokens
# are the same, as every switch must leave them:

# %%
with engine(64, chunked_prefill=False) as llm:
    plain = llm.generate(CHATS[:4], greedy)
with engine(16) as llm:
    cut = llm.generate(CHATS[:4], greedy)
assert [o.outputs[0].token_ids for o in plain] == [o.outputs[0].token_ids for o in cut]
print("with and without: the same", sum(len(o.outputs[0].token_ids) for o in cut), "tokens")

# %% [markdown]
# ### Guesses fill what is left
#
# A sequence that decodes may bring more than one token, too. If somebody cheap **guesses** its next tokens, they can
# be computed behind its own, as a chunk whose tokens are not certain yet. The model then says at each position what
# it would have said. Guesses that were right are kept, the others are taken back. This is **speculative decoding**,
# and for the scheduler it is a use for tokens of the budget that nobody needs:

# %%
from minipaged.scheduling.speculation import Speculation, with_guesses

show_source(Speculation.count)

# %% [markdown]
# The docstring has the reasoning: a decode step waits for the weights, so a few rows more cost little, as long as not
# many sequences run. `Speculation.wishes` asks a `Proposer` what it would guess (`propose`; `forget` makes it start
# over), as a `Wish` for each sequence. Its tokens are set aside before prompts take them, and `book` gives them slots
# once everyone has the token that is sure: a `Booked` row each. `with_guesses` puts them into the plan, behind the
# sequence's own:

# %%
show_source(with_guesses)

# %% [markdown]
# Here the proposer looks for the last words in the text so far, and guesses what followed them there (n-grams). The
# prompt is one that repeats itself:

# %%
repeats = "one two three four five six seven eight nine ten " * 3 + "one two"
guessed = dict(method="ngram", num_speculative_tokens=6)
with engine(64, speculative_config=guessed) as llm:
    rows = []
    llm.observers.append(lambda plan, output: rows.extend(
        (s.num_own, s.num_drafts, len(output.tokens[s.seq_id][0])) for s in plan.sequences))
    (fast,) = llm.generate(repeats, greedy)
    counts = llm.stats().speculation
with engine(64) as llm:
    (slow,) = llm.generate(repeats, greedy)
assert fast.outputs[0].token_ids == slow.outputs[0].token_ids
print("own, guessed, got:", rows[:8])

# %%
print(f"{counts.num_draft_tokens} tokens guessed in {counts.num_drafts} steps,")
print(f"{counts.num_accepted_tokens} right ({counts.acceptance_rate:.0%}), "
      f"so {counts.mean_acceptance_length:.1f} tokens for each such step")
print(f"{len(rows)} steps instead of {len(slow.outputs[0].token_ids)}")
assert len(rows) < len(slow.outputs[0].token_ids) / 2

# %% [markdown]
# `counts` are `SpeculationCounts`, with vLLM's names; `acceptance_rate_per_pos` says how often the first guess was
# right, the second, and so on. After the step `settle` lets each sequence go on with the memory of the guess that
# was right, and `learn` remembers how often that happens, so that `count` guesses less where it doesn't pay.
# `start_over` is for a step that was broken off. The plan's part of it is `num_own`, `num_drafts` and
# `draft_token_ids`; the rest of speculation is a story of its own, told in the file's docstring.

# %% [markdown]
# ## What must hold, and what breaks if it doesn't
#
# **Only the last chunk has something to say.** Each chunk ends in logits, but in the middle of a prompt they answer
# a question that nobody asked. So the plan draws only where a prompt ends:

# %%
draws = [s.draw is not None for plan in chunked_plans for s in plan.sequences
         if s.request_id == document]
print("draws of the document:", draws)
assert draws == [False] * (len(draws) - 1) + [True]

# %% [markdown]
# What if it drew after each? Here is what the model says where a text was cut, and where it ends:

# %%
text = "Paris is the capital of France. Berlin is the capital of"
with engine(64) as llm:
    cut_short, complete = llm.generate([text[:23], text], short)
print("after a chunk:", repr(cut_short.outputs[0].text))
print("at the end:   ", repr(complete.outputs[0].text))
assert cut_short.outputs[0].token_ids != complete.outputs[0].token_ids

# %% [markdown]
# **A chunk begins where the last one ended.** Leave token 7 out, and compute it never. Then its key and its value are
# missing, for all tokens behind it:

# %%
keys, values = (torch.cat([rows[:7], rows[8:]]) for rows in (k, v))
gap = attend(q[8:], keys, values, start=7)
print(f"the last token is off by {(gap[-1] - whole[-1]).abs().max():.2f}")
assert not torch.allclose(gap, whole[8:], atol=0.01)


# %% [markdown]
# **Everyone who runs is sure of a token.** Give prompts the budget first, and chats what is left. This was the
# rule of vLLM's first releases, and it looks harmless until prompts keep coming:

# %%
def prompts_first(todos, waiting, budget):
    """-> tokens for each that runs: those with much to do take all they can."""
    counts = [0] * len(todos)
    for i in sorted(range(len(todos)), key=lambda i: -todos[i]):
        counts[i] = min(todos[i], budget)
        budget -= counts[i]
    return counts


stalls = 0
for _ in range(20):  # in each step, a prompt of 100 is under way beside three chats
    stalls += prompts_first([1, 1, 1, 100], [], 64)[0] == 0
print(f"in {stalls} of 20 steps the first chat got nothing")
assert stalls == 20 and share_out([1, 1, 1, 100], [], 64)[0][0] == 1

# %% [markdown]
# **The budget is at least the number of sequences.** Otherwise the rule above can't hold. The engine refuses
# such a pair of numbers before it starts:

# %%
try:
    Scheduler(KVCacheManager(10, 16), max_num_seqs=64, max_num_batched_tokens=32)
except ValueError as error:
    print(error)

# %% [markdown]
# **Memory is taken as it is needed.** A chunk takes blocks for its own tokens, not for the whole prompt. That sounds
# like a gift, but it has a trap: two long prompts that each have half of the memory, and both need more. So an
# admission leaves room for the rest of its prompt, unless it is alone (`_keep_free`, chapter 12). And who comes
# first goes on first, so the second waits or gives way.

# %% [markdown]
# ## Exercises
#
# Fill in the functions; each is followed by a test that says how far you are. Costs are counted as lines of Python that
# run, so that a loop over 10^15 tokens is told so, and doesn't run for ever.

# %%
from statistics import linear_regression

from minipaged.teaching.costs import patient

# %% [markdown]
# **1. The chunks** (warm-up). A prompt is computed beside `running` chats, each of which needs one token a step. The
# step's budget is `budget`. In how many steps is the prompt through, and how large is its last chunk? Find it
# by arithmetic: prompts may have 10^15 tokens.

# %% tags=["exercise"]
def chunks_of(prompt, running, budget):
    """-> (steps, tokens of the last chunk). prompt >= 1.

    ValueError if the chats leave nothing of the budget.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_chunks_of(chunks_of):
    chunks_of = own(patient(chunks_of), forbid=[share_out, steps_of_story])
    for seed in range(300):
        random = Random(seed)
        prompt, running, room = (random.randint(*r) for r in [(1, 50), (0, 9), (1, 12)])
        sizes = [min(room, prompt - done) for done in range(0, prompt, room)]
        case = f"prompt={prompt}, running={running}, budget={running + room}"
        got, expected = chunks_of(prompt, running, running + room), (len(sizes), sizes[-1])
        assert equal(got, expected), f"{case}: {expected}, not {got}"
    for seed in range(20):
        random = Random(seed)
        steps, room = random.randint(10**11, 10**12), random.randint(1, 999)
        prompt, last = (steps - 1) * room, random.randint(1, room)
        got, expected = chunks_of(prompt + last, 7, 7 + room), (steps, last)
        case = f"prompt={prompt + last}, running=7, budget={7 + room}"
        assert equal(got, expected), f"{case}: {expected}, not {got}"
    for running, budget in [(8, 8), (9, 8), (0, 0)]:
        try:
            chunks_of(5, running, budget)
        except ValueError:
            continue
        raise AssertionError(f"running={running}, budget={budget}: no ValueError")


attempt(test_chunks_of, chunks_of)

# %% [markdown]
# **2. A budget for a promise.** Nobody shall wait longer than `limit` seconds for the next token. `seconds(T)` runs a
# step of T tokens, with T from 1 to `most`, and says how long it took; it never falls as T grows. Running steps costs
# time, so ask it at most 45 times, for budgets up to a million.

# %% tags=["exercise"]
def budget_for(limit, seconds, most):
    """The largest budget from 1 to `most` whose step takes at most `limit`.

    0 if even one token takes longer.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_budget_for(budget_for):
    budget_for = own(budget_for)

    def clock(asked, base, slope, jump, most):
        def seconds(T):
            asked.append(T)
            assert 1 <= T <= most, f"it asks for a step of {T} tokens, of 1 to {most}"
            assert len(asked) <= 45, "it runs more than 45 steps to find out"
            return base + slope * T + (jump <= T)  # at some T it falls out of the cache

        return seconds

    for seed in range(200):
        random = Random(seed)
        most = random.choice([1, 2, random.randint(3, 100), 10**6])
        base, slope = random.random(), random.choice([0, 0.01, 1])
        jump = random.choice([most, random.randint(1, most)])
        beyond = [-0.5, 0, slope, slope * jump, slope * most + 1, random.random()]
        limit = base + random.choice(beyond)
        low, high = 0, most
        while low < high:  # the same question, answered without asking
            middle = (low + high + 1) // 2
            fits = base + slope * middle + (jump <= middle) <= limit
            low, high = (middle, high) if fits else (low, middle - 1)
        got = budget_for(limit, clock([], base, slope, jump, most), most)
        case = f"{base:.2f} + {slope} T, 1 more from {jump} on; limit {limit:.2f}, most {most}"
        assert equal(got, low), f"{case}: {low}, not {got}"


attempt(test_budget_for, budget_for)

# %% [markdown]
# **3. Equal parts.** Our rule is first come, first served: the first prompt takes what the chats leave. Make it fair
# instead. Everyone gets one. Then all who have more to do share what is left equally. Who needs less than its part
# gives the rest to the others. What can't be divided goes to the earlier ones, one token each. (This is called
# max-min fairness.) Budgets may be huge, so don't deal out tokens one by one.

# %% tags=["exercise"]
def fair_share(todos, budget):
    """todos: at least 1 each; budget >= len(todos). -> tokens for each, in the same order."""
    raise NotImplementedError


# %% tags=["test"]
def test_fair_share(fair_share):
    fair_share = own(patient(fair_share), forbid=[share_out])

    def dealt(todos, budget):
        counts = [1] * len(todos)
        spare = budget - len(todos)
        while spare and counts != todos:
            for i, todo in enumerate(todos):  # one round
                if counts[i] < todo and spare:
                    counts[i], spare = counts[i] + 1, spare - 1
        return counts

    for seed in range(300):
        random = Random(seed)
        todos = [random.choice([1, random.randint(1, 30)]) for _ in range(random.randint(0, 7))]
        budget = len(todos) + random.randint(0, 60)
        got, expected = fair_share(todos, budget), dealt(todos, budget)
        assert equal(got, expected), f"todos={todos}, budget={budget}: {expected}, not {got}"
    for seed in range(20):  # too large to deal out: what must hold of the answer
        random = Random(seed)
        todos = [random.choice([1, random.randint(1, 10**12)]) for _ in range(5)]
        budget = random.randint(5, sum(todos))
        got, case = [*map(int, fair_share(todos, budget))], f"todos={todos}, budget={budget}"
        assert sum(got) == budget and len(got) == 5, f"{case}: {got} are {sum(got)} together"
        assert all(1 <= c <= todo for c, todo in zip(got, todos)), f"{case}: {got}"
        level = min([c for c, todo in zip(got, todos) if c < todo], default=max(got))
        last = [c for c, todo in zip(got, todos) if todo > level]  # they share the last round
        assert max(got) <= level + 1 and last == sorted(last)[::-1], f"{case}: {got} isn't fair"


attempt(test_fair_share, fair_share)

# %% [markdown]
# **4. Keeping pace** (open). A machine is not always equally fast: others use it, or it gets hot. Build a controller
# that sees how long each step took, and sets the budget of the next one so that it takes `limit` seconds at most. Take
# the time of T tokens as a straight line, a + b T, and let old steps count no more. What would you do about noise?

# %% tags=["exercise"]
class Pace:
    """seen(tokens, seconds): a step is over. budget(): the most tokens for the next one.

    Only the newest 8 steps count. If they have two sizes or more, budget() is the largest
    whole T, from `smallest` to `largest`, with a + b T <= limit on the line that fits them
    best (least squares); if b <= 0 on it, `largest`. With fewer sizes it is `smallest`.
    A difference of one token is forgiven where the line meets the limit just there.
    """

    def __init__(self, limit, smallest, largest):
        raise NotImplementedError


# %% tags=["test"]
def test_Pace(Pace):
    Pace = own(Pace)

    def close(got, a, b, limit, case):
        right = max(8, min(512, int((limit - a) // b)))
        near = any(equal(got, right + d) for d in (-1, 0, 1))
        assert near, f"{case}: {right}, not {got}"

    for seed in range(60):
        random = Random(seed)
        a, b = random.uniform(0, 0.05), random.uniform(0.0005, 0.01)
        limit = random.uniform(0.06, 2)
        pace, idle = Pace(limit, 8, 512), Pace(limit, 8, 512)
        assert equal(pace.budget(), 8), "before anything was seen: smallest"
        for _ in range(5):
            pace.seen(100, a + b * 100)
        assert equal(pace.budget(), 8), "all steps had one size: smallest"
        slow = random.choice([1, 3])
        for turn, factor in enumerate([1, slow]):
            for T in random.sample(range(8, 513), 8):
                pace.seen(T, factor * (a + b * T))
            case = f"a={a:.3f}, b={b:.4f}, {turn=}"
            close(pace.budget(), factor * a, factor * b, limit, case)
        assert equal(idle.budget(), 8), "two controllers share what they have seen"
    flat = Pace(1.0, 8, 512)
    for T in (10, 20, 30):
        flat.seen(T, 0.5 - T / 1000)
    assert equal(flat.budget(), 512), "larger steps were faster: largest"
    for seed in range(40):
        random, loose = Random(seed), Pace(1.0, 8, 512)
        sizes = random.sample(range(8, 513), 12)
        steps = [(T, T / 250 + random.uniform(0, 0.4)) for T in sizes]
        for T, s in steps:
            loose.seen(T, s)
        b, a = linear_regression(*zip(*steps[-8:]))
        close(loose.budget(), a, b, 1.0, f"the last 8 of {steps}")
        close(loose.budget(), a, b, 1.0, "asked a second time")
    noisy = Pace(1.0, 8, 512)
    for T, error in [(100, 0.1), (100, -0.1), (200, 0.1), (200, -0.1), (300, 0.1), (300, -0.1)]:
        noisy.seen(T, T / 250 + error)
    close(noisy.budget(), 0.0, 1 / 250, 1.0, "noise of 0.1 s, up and down")


attempt(test_Pace, Pace)

# %% [markdown]
# ## What's next
#
# A step has room for so many tokens, and the pool for so many blocks. The budget can be kept by cutting. Memory
# can't: sequences grow, and one day the pool is full while everyone wants one block more. Who gives way then, and what
# becomes of what it had? That is [chapter 12](12_preemption.ipynb), preemption.
#
# **See it run**: [a long prompt in pieces](gallery/README.md#a-long-prompt-in-pieces), as recorded.
#
# ## Sources
#
# - Agrawal et al., *SARATHI: Efficient LLM Inference by Piggybacking Decodes with Chunked Prefills*, 2023, and
#   *Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve*, 2024: chunks, and how to choose a budget.
# - Yu et al., *Orca*, 2022: scheduling step by step, and batching tokens instead of sequences.
# - vLLM: `max_num_batched_tokens`, `enable_chunked_prefill`; decodes first, then prompts under way, then new ones.
# - Leviathan, Kalman and Matias, *Fast Inference from Transformers via Speculative Decoding*, 2023.
