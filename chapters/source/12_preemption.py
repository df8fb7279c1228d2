# %% [markdown]
# # 12. Preemption
#
# A server lets requests in because there is room for their prompts. Then they grow, and one day the pool is full while
# everyone wants one block more. Nobody did anything wrong, and somebody has to give way. This chapter builds it, shows
# why it should be the latest, and measures the two ways of giving way against each other.
#
# **You need**: page tables that grow block by block ([chapter 5](05_page_tables.ipynb)), and the idea of continuous
# batching ([chapter 10](10_continuous_batching.ipynb)): requests come and go between steps, first come, first served.
# **You get**: a scheduler of integers that agrees with the package's step by step, and an answer in bytes a second to
# "swap or recompute?".

# %% [markdown]
# ## The question
#
# Chapter 5 took a block only when one was needed. That is why so many requests fit, and it is also a promise that can't
# be kept: six stories of which each will need six blocks can begin in a pool of twenty. So:
#
# - What happens when no block is free, and everyone needs one?
# - Who gives way, and what of its work is lost?
# - Should what it has be moved away, or thrown away and computed again?
# - How can this be made rare?

# %% [markdown]
# ## The idea
#
# Somebody gives up **all** its blocks at once, and waits until there is room for it again. That is **preemption**.
# All, because half a context is of no use: attention reads every key in every step (the paper's all-or-nothing rule).
# Nothing that was said is lost by it. The tokens are known; only their keys and values are gone, and there are two
# ways to get them back:
#
# - **Recompute.** Throw them away. Later the prompt and all tokens so far are computed again, as one long prompt.
# - **Swap.** Copy the blocks to another memory, large and far away: CPU memory for a GPU. Later copy them back.
#
# ```
#   waiting --admit--> running --finish-->
#      ^                |   ^
#      +--- recompute --+   +-- swap in --+
#                       +--- swap out --> swapped
# ```
#
# Three queues, each in the order of arrival, and a request is in exactly one of them. To whoever asked it is a pause in
# the stream of words, and the words are the same.

# %% [markdown]
# ## Build it
#
# ### A server that gets stuck
#
# We work on integers: a job is a name and three numbers, and blocks have 16 slots. `length` counts the tokens that
# are known, so the job needs blocks for all of them, and each step adds one.

# %%
from collections import Counter
from random import Random

import torch

from minipaged.teaching import attempt, equal, own, plots, show_source


class Job:
    def __init__(self, name, prompt, output):
        self.name, self.length, self.end = name, prompt, prompt + output
        self.computed = self.blocks = 0


def need(job):
    """Blocks that it lacks for all its tokens."""
    return -(-job.length // 16) - job.blocks


# %%
class Server:
    """Jobs that wait, jobs that run, and free blocks."""

    def __init__(self, jobs, blocks):
        self.waiting = [Job(name, *sizes) for name, sizes in enumerate(jobs)]
        self.running, self.free = [], blocks

    def take(self, job):
        self.free -= need(job)
        job.blocks += need(job)

    def leave(self, job):
        """It gives all its blocks back."""
        self.running.remove(job)
        self.free += job.blocks
        job.blocks = job.computed = 0

    def compute(self, jobs):
        """One token more for each. -> tokens computed: all that were known and not computed."""
        tokens = sum(job.length - job.computed for job in jobs)
        for job in jobs:
            job.computed, job.length = job.length, job.length + 1
            if job.length == job.end:
                self.leave(job)
        return tokens


# %% [markdown]
# The first server lets jobs in, in their order, as long as all their tokens fit. A job that can't have a block waits
# for the next step. Nobody ever gives way:

# %%
class Stubborn(Server):
    def admit(self, keep_free=0):
        let_in = []
        while self.waiting:
            job, kept = self.waiting[0], keep_free if self.running else 0
            if need(job) + kept > self.free:
                break
            self.running.append(self.waiting.pop(0))
            self.take(job)
            let_in.append(job.name)
        return let_in

    def step(self):
        before, ready = self.running.copy(), []
        for job in before:
            if need(job) <= self.free:
                self.take(job)
                ready.append(job)
        self.admit()
        return self.compute(ready + [job for job in self.running if job not in before])


# %% [markdown]
# Six jobs of 14 tokens, which will have 70 tokens more, in a pool of 20 blocks:

# %%
SIX = [(14, 70)] * 6
stuck = Stubborn(SIX, blocks=20)
computed = [stuck.step() for _ in range(80)]
print(f"tokens in each step: {computed[:5]} ..., from step 50 on: {computed[49:55]}")
print(f"{len(stuck.running)} jobs run, {stuck.free} blocks are free, each holds",
      [job.blocks for job in stuck.running])
assert computed[50] > 0 == sum(computed[51:]) and len(stuck.running) == 6

# %% [markdown]
# From step 52 on nothing happens any more, for ever. Each waits for a block that another one holds, and none will end
# before it gets one. This is a **deadlock**, and its cure is known from operating systems: take from somebody what
# it has.


# %% [markdown]
# ### Giving way
#
# The change is one loop. When a job needs a block and none is free, `pick` names a victim, which leaves and waits
# again at its place in the order of arrival. If the victim is the job itself, then so be it. In a step in
# which somebody gave way, nobody is let in.

# %%
def latest(running, asking):
    return running[-1]


class Yielding(Stubborn):
    def __init__(self, jobs, blocks, keep_free=0, pick=latest):
        super().__init__(jobs, blocks)
        self.keep_free, self.pick = keep_free, pick

    def make_room(self, job):
        """-> names of those who gave way for it, perhaps itself at last."""
        gave_way = []
        while job in self.running and need(job) > self.free:
            victim = self.pick(self.running, job)
            self.leave(victim)
            self.waiting = sorted([*self.waiting, victim], key=lambda job: job.name)
            gave_way.append(victim.name)
        return gave_way

    def step(self):
        """-> who gave way, who came in, tokens computed."""
        gave_way, let_in = [], []
        for job in self.running.copy():
            gave_way += self.make_room(job)
            if job in self.running:
                self.take(job)
        if not gave_way:
            let_in = self.admit(self.keep_free)
            self.running.sort(key=lambda job: job.name)
        return gave_way, let_in, self.compute(self.running.copy())


# %%
def lengths(server):
    return {job.name: job.length for job in server.waiting + server.running}


def play(server):
    """Until all is done. -> for each step (gave_way, let_in, tokens, who computed)."""
    history = []
    while before := lengths(server):
        moved, after = server.step(), lengths(server)
        history.append((*moved, {name for name in before if before[name] != after.get(name)}))
    return history


# %%
history = play(Yielding(SIX, blocks=20))
for step, (gave_way, let_in, tokens, _) in enumerate(history, 1):
    if gave_way or let_in:
        print(f"step {step:3}: {tokens:3} tokens; gave way {gave_way}, came in {let_in}")
ever = sum(prompt + output - 1 for prompt, output in SIX)
again = sum(row[2] for row in history) - ever
print(f"{len(history)} steps; {again} of {ever + again} tokens were computed a second time")


# %% [markdown]
# All six get to their end. Who gave way came back when the others had ended, and its first step was a long one: all
# its tokens again.

# %%
def gantt(axes, history, names):
    for name in range(names):
        for step, (gave_way, _, _, ran) in enumerate(history):
            if name in ran:
                axes.barh(name, 1, left=step, height=0.7, color=plots.COLORS[0])
            if name in gave_way:
                axes.plot(step + 0.5, name, "x", color=plots.COLORS[1])
    axes.set(ylim=(names - 0.4, -0.6), yticks=range(names), xlabel="step", ylabel="job")


alt = "Six bars. The last three stop at a cross, and go on when the others are done"
with plots.figure("Who computes when; x: gives way", size=(6.8, 2.4), alt=alt) as axes:
    gantt(axes, history, 6)

# %% [markdown]
# **Your turn.** How many blocks must the pool have so that nobody gives way? And how many of them give way if it has
# six, just enough for one job? Predict both. (With fewer than six no job could ever end.)

# %%
your_blocks = 20
yours = play(Yielding(SIX, blocks=your_blocks))
print(f"{your_blocks} blocks: {len(yours)} steps, {sum(len(row[0]) for row in yours)} gave way")

# %% [markdown]
# (36: the jobs are alike, so all want their sixth block at the same time. With six blocks somebody gives way eight
# times, though the jobs run nearly one by one: a newcomer needs only one block to come in.)

# %% [markdown]
# ### Who should it be?
#
# The latest to arrive, says the paper. That is fair: who came first is served first. But is it also cheap? Others
# have ideas, too: the earliest, the one with most blocks, because that makes most room, or anyone. Here is a load of
# 60 jobs of all sizes, ten times with other numbers:

# %%
def load(seed, count=60):
    random = Random(seed)
    return [(random.randint(10, 200), random.randint(10, 300)) for _ in range(count)]


POLICIES = {
    "latest": latest,
    "earliest": lambda running, asking: running[0],
    "largest": lambda running, asking: max(running, key=lambda job: job.blocks),
    "anyone": lambda running, asking: Random(asking.length).choice(running),
}


# %%
def compare(pick, seeds=range(10)):
    """-> steps, share of tokens computed again, steps of the first job for each token of it."""
    steps = tokens = wanted = first = own_steps = 0
    for seed in seeds:
        jobs = load(seed)
        history = play(Yielding(jobs, 100, pick=pick))
        steps, tokens = steps + len(history), tokens + sum(row[2] for row in history)
        wanted += sum(prompt + output - 1 for prompt, output in jobs)
        first += 1 + max(i for i, row in enumerate(history) if 0 in row[3])
        own_steps += jobs[0][1]
    return steps, tokens / wanted - 1, first / own_steps


# %%
results = {name: compare(pick) for name, pick in POLICIES.items()}
print("gives way    steps  computed again  the first job takes")
for name, (steps, share, first) in results.items():
    print(f"{name:10} {steps:7} {share:14.0%} {first:12.2f} x its own")

# %% [markdown]
# The latest wins in every column. It has computed least, as a rule, so it loses least. And the first job never
# gives way to anyone: it goes on in each step, as if it were alone. So it ends, then the second is the first, and so
# on. **Nobody starves.** With any other rule in this table that argument is gone.

# %%
for steps, share, _ in results.values():
    assert results["latest"][0] <= steps and results["latest"][1] <= share
assert results["latest"][2] == 1


# %% [markdown]
# ### Fewer of them: the watermark
#
# A job that is let in when one block is free will force somebody out in the next step, probably itself. So an
# admission leaves some blocks free, for those who already run and grow. This is the **watermark**:

# %%
def with_watermark(keep_free):
    history = play(Yielding(load(0, 200), 200, keep_free=keep_free))
    wanted = sum(prompt + output - 1 for prompt, output in load(0, 200))
    times, tokens = sum(len(row[0]) for row in history), sum(row[2] for row in history)
    return len(history), times, tokens / wanted - 1


MARKS = [0, 2, 5, 10, 20, 40, 60, 80, 100]
marks = {mark: with_watermark(mark) for mark in MARKS}
for mark, (steps, times, share) in marks.items():
    print(f"keep {mark:3} of 200: {steps} steps, {times:3} preemptions, {share:4.0%} again")

# %% [markdown]
# A small watermark removes many preemptions and costs next to no steps. A large one removes them all, and leaves
# memory empty that somebody could have used: the steps rise. In the limit it is the reservation of
# [chapter 3](03_the_memory_wall.ipynb). The package keeps 1 % free unless told otherwise; vLLM had the same 1 % in its
# first release.

# %%
assert marks[0][1] > marks[10][1] > marks[60][1] == 0 and marks[100][0] > 1.5 * marks[0][0]

# %% [markdown]
# **Your turn.** Which share of a pool of 50 blocks would you keep free for jobs that are all alike, with a prompt
# of 30 tokens and 100 more? Try some numbers, and look at steps and preemptions:

# %%
your_mark = 0
alike = play(Yielding([(30, 100)] * 40, 50, keep_free=your_mark))
print(f"keep {your_mark}: {len(alike)} steps, {sum(len(row[0]) for row in alike)} preemptions")

# %% [markdown]
# (Two blocks give the fewest steps, 483. More make preemptions rarer, but twenty don't end them: jobs that are alike
# want their next blocks all at once.)


# %% [markdown]
# ### Swapping
#
# Now the other way. The blocks move to a second pool, and the page table moves with them. What has to be copied is
# told as pairs (from, to), as for copy-on-write. There is one thing to take care of: sequences that were forked share
# blocks. They go together (the paper's **sequence group**: all sequences of one request), a block that they share
# moves once, and stays shared over there:

# %%
def move(tables, free):
    """tables: of a group, by name. free: of the other pool. -> (pairs, new tables), or None."""
    sources = list(dict.fromkeys(block for table in tables.values() for block in table))
    if len(sources) > len(free):
        return None
    places = dict(zip(sources, free))
    there = {name: [places[block] for block in table] for name, table in tables.items()}
    return [*places.items()], there


# %%
samples = {"A1": [7, 1, 3], "A2": [7, 1, 5], "A3": [7, 1, 2]}
pairs, away = move(samples, free=[0, 1, 2, 3, 4, 5])
print("moved:", pairs)
print("there:", away)
assert len(pairs) == 5 and move(samples, free=[0, 1, 2, 3]) is None

# %% [markdown]
# Five blocks move instead of nine. One by one, each sample would take the prompt's blocks with it, and come back with
# a copy of its own: three times the memory for the prompt, and perhaps no room any more. That is why a request is
# preempted whole.
#
# ### Swap or recompute?
#
# Both cost time, and both in proportion to the tokens, so what counts is the ratio. Let us measure it with the real
# model. Recomputing n tokens is a prefill of n tokens. Swapping them is copying their blocks there and back:

# %%
import time

from minipaged import LLM, SamplingParams

llm = LLM("smollm2", num_blocks=80, num_cpu_blocks=80, prefix_cache="none", device="cpu",
          preemption="swap")
runner = llm.executor.runner
once = SamplingParams(temperature=0, max_tokens=1)


# %%
def recompute_seconds(n):
    llm.add_request({"prompt_token_ids": [300] * n}, once)
    began = time.perf_counter()
    llm.step()
    return time.perf_counter() - began


def swap_seconds(n):
    (pool, other), blocks = runner.pools[0], torch.arange(-(-n // 16))
    began = time.perf_counter()
    runner.backend.move_blocks(pool, other, blocks, blocks)
    runner.backend.move_blocks(other, pool, blocks, blocks)
    return time.perf_counter() - began


# %%
def median(function, n, times=5):
    return sorted(function(n) for _ in range(times))[times // 2]


# %% tags=["measured"]
print("tokens   recompute    swap out and in")
for n in (16, 64, 256, 1024):
    slow, fast = median(recompute_seconds, n, 3), median(swap_seconds, n)
    print(f"{n:6} {1000 * slow:8.0f} ms {1000 * fast:10.2f} ms    {slow / fast:4.0f} x")

# %% [markdown]
# Here swapping wins by far, at every length: there is no slow link between the pools. "GPU" and CPU memory are the
# same chips, so the copy runs at the speed of memory, while the arithmetic of a prefill is slow. Where would they
# cross? That is a question of the link. Let a token's keys and values have K bytes, and let its recomputation take c
# seconds. It has to go there and back, so with a link of W bytes a second both are equal at
#
# $$ \frac{2K}{W} = c, \qquad W = \frac{2K}{c} $$

# %% tags=["measured"]
K = llm.block_bytes / 16
c = median(recompute_seconds, 512, 3) / 512
print(f"K = {K:.0f} bytes, c = {1000 * c:.2f} ms: equal at {2 * K / c / 1e6:.0f} MB a second")


# %% [markdown]
# So for this model on this machine, recomputing would pay only if the other memory were as slow as a hard disk (some
# 200 MB a second), or slower. Now the paper's machine, by the same formula: OPT-13B has K = 819,200 bytes. A token
# costs about two operations for each weight, and an A100 does at most 312 trillion a second (NVIDIA's data sheet):

# %%
def crossing(bytes_per_token, weights, operations_per_second):
    """Bytes a second of a link at which swapping and recomputing take the same time."""
    return 2 * bytes_per_token / (2 * weights / operations_per_second)


for share in (1.0, 0.5):
    gigabytes = crossing(819_200, 13e9, share * 312e12) / 1e9
    print(f"at {share:.0%} of the A100's arithmetic: {gigabytes:.0f} GB a second")

# %% [markdown]
# The A100's link to CPU memory is PCIe 4.0, with 32 GB a second at its best (its specification). That is about where
# they cross. So on that machine the details decide, and this is what the paper found: recomputing costs the same for
# every block size. Swapping is slow for small blocks, since a link moves many small pieces slowly. Between blocks of
# 16 and 32 tokens the curves cross. Recomputation is never more than 20 % above swapping (paper, Figure 19).
#
# **Your turn.** Llama 3 8B has 8 key/value heads of 128 in 32 layers, so a token has 2 x 32 x 8 x 128 numbers of two
# bytes: 131,072 bytes, for 8 billion weights. Which way pays for it on the same machine?

# %%
your_bytes, your_weights = 819_200, 13e9
print(f"equal at {crossing(your_bytes, your_weights, 312e12) / 1e9:.0f} GB a second")

# %% [markdown]
# (Equal at 5 GB a second, far below what the link carries: swapping. Query heads that share keys and values make a
# token light to carry, and hardly lighter to compute.)
#
# Two more things count. A recomputed request rides along with those who decode, as a chunk ([chapter
# 11](11_chunked_prefill.ipynb)), while a swap makes a step wait. And with a [prefix cache](13_prefix_caching.ipynb)
# some of what was thrown away can often still be found, so that recomputing costs less than it seems.

# %% [markdown]
# ## Check it
#
# Random loads in random pools, with random watermarks. In each step the blocks must add up, nobody may run twice or be
# lost, the order of arrival must hold, and the first who runs must move on. In the end everyone has all its tokens.

# %%
def check(server, jobs, blocks, ran, first):
    running = [job.name for job in server.running]
    waiting = [job.name for job in server.waiting]
    assert running == sorted(running) and waiting == sorted(waiting)
    assert not {*running} & {*waiting}
    assert sum(job.blocks for job in server.running) == blocks - server.free <= blocks
    assert all(job.blocks == 0 for job in server.waiting)
    assert first is None or first in ran, "the first of those who ran moves on"


def live(random, seen):
    blocks, count = random.randint(7, 15), random.randint(1, 12)
    some = random.choice([[10], range(1, 41)])  # alike, they want a block in the same step
    jobs = [(random.choice(some), random.randint(1, 60)) for _ in range(count)]
    server = Yielding(jobs, blocks, keep_free=random.choice([0, 0, 1, 3]))
    done = Counter()
    while lengths(server):
        first = server.running[0].name if server.running else None
        before = lengths(server)
        gave_way, let_in, _ = server.step()
        after = lengths(server)
        ran = {name for name in before if before[name] != after.get(name)}
        check(server, jobs, blocks, ran, first)
        seen["gave way"] += len(gave_way)
        seen["several at once"] += len(gave_way) > 1
        seen["came back"] += sum(done[name] > 0 for name in let_in)
        done.update(ran)
    assert done == {name: output for name, (_, output) in enumerate(jobs)}


# %%
seen = Counter()
for seed in range(500):
    live(Random(seed), seen)
print(dict(seen))
assert len(seen) == 3 and min(seen.values()) > 30

# %% [markdown]
# ## The package's version
#
# The loop is the same as ours, with memory that is asked instead of a number of free blocks:

# %%
from minipaged.scheduling.scheduler import Scheduler

show_source(Scheduler._continue_running, Scheduler._preempt)

# %% [markdown]
# `self.running.pop()` is the rule "the latest". What a victim does is a file of its own:

# %%
from minipaged.scheduling import preemption

show_source(preemption.preempt)

# %% [markdown]
# In the mode `auto` a request with several sequences is swapped, because their sharing is worth keeping, and one
# with a single sequence is computed again. That is the rule of vLLM's first release. If the CPU pool is full, a swap
# becomes a recomputation. The answer is `Preempted`, with the mode and the moves.
#
# Moving is our `move`, with counts of references, and with one thing more: blocks that a prefix cache still finds need
# not be moved (`found`).

# %%
from minipaged.memory import KVCacheManager, swapping

show_source(swapping.move)

# %% [markdown]
# Three samples in both, to the block number:

# %%
manager = KVCacheManager(num_blocks=8, block_size=4, num_cpu_blocks=8, free_order=[7, 1, 3, 5])
manager.allocate(1, num_tokens=7)
for sample in (2, 3):
    manager.fork(1, sample)
manager.append({1: 1, 2: 1, 3: 1})
tables = {seq: manager.block_table(seq) for seq in (1, 2, 3)}
swapped = manager.swap_out([1, 2, 3])
assert (swapped.moves, {s: manager.block_table(s) for s in tables}) == move(tables, range(8))
assert all(manager.is_swapped(seq) for seq in tables) and manager.num_free == 8
back = manager.swap_in([1, 2, 3])
print("out:", swapped.moves, " in:", back.moves)

# %% [markdown]
# Coming back is an admission. Everyone who waits or is swapped out is asked in the order of arrival, and the first who
# doesn't fit ends it: nobody passes. `_keep_free` is the watermark, and more: the blocks that a request is going to
# need soon, so that it isn't thrown out at once. A request that is alone may have everything.

# %%
from minipaged.scheduling.admission import Admission

show_source(Admission._keep_free, Admission._resume)

# %% [markdown]
# ### Step by step, the same
#
# The package's scheduler on our jobs, with no model: whatever it plans, we say token 7. Each step must have the same
# victims, the same newcomers, and as many tokens.

# %%
from math import ceil

from minipaged.requests.request import Request
from minipaged.requests.sampling_params import SampledToken
from minipaged.scheduling.plan import StepOutput


def package(jobs, blocks, watermark=0.0, mode="recompute", n=1, cpu_blocks=0):
    """-> its plans."""
    scheduler = Scheduler(KVCacheManager(blocks, 16, cpu_blocks), 64, 10_000, mode, watermark)
    for name, (prompt, output) in enumerate(jobs):
        params = SamplingParams(n=n, max_tokens=output)
        scheduler.add(Request(str(name), name, [1] * prompt, params, output))
    plans = []
    while scheduler.has_unfinished:
        plans.append(scheduler.schedule())
        drawn = {s.seq_id: [[SampledToken(7)]] * s.draw.num_draws
                 for s in plans[-1].sequences if s.draw}
        scheduler.update(plans[-1], StepOutput(tokens=drawn))
        scheduler.memory.check()
    return plans


# %%
seen = Counter()
for seed in range(40):
    random = Random(seed)
    blocks, mark = random.randint(33, 80), random.choice([0, 0.05, 0.1])
    jobs = load(seed, count=20)
    theirs = [([int(name) for name, _ in plan.preempted], [int(name) for name in plan.admitted],
               plan.num_tokens) for plan in package(jobs, blocks, mark)]
    ours = [row[:3] for row in play(Yielding(jobs, blocks, keep_free=ceil(mark * blocks)))]
    assert ours == theirs
    seen["steps"] += len(ours)
    seen["preemptions"] += sum(len(row[0]) for row in ours)
print(f"{seen['steps']} steps with {seen['preemptions']} preemptions: the same")
assert seen["preemptions"] > 200

# %% [markdown]
# ### The real engine, with twenty blocks
#
# Six requests for the real model, 70 tokens each, in a pool of 20 blocks. Then the same with 200 blocks, where nobody
# ever has to give way. The answers must be the same, token for token, and so must the log-probabilities of the two
# likeliest tokens at each place, to the last bit:

# %%
TEXTS = ["Tell me a story about the sea.", "What is a train?", "Name three colors.",
         "Who was Newton?", "What is bread?", "How do birds fly?"]


def serve(blocks, mode, n=1, tokens=70):
    """-> all answers, with log-probabilities; plans; the account of memory at each step."""
    with LLM("smollm2", num_blocks=blocks, num_cpu_blocks=40, prefix_cache="none", device="cpu",
             preemption=mode) as llm:
        plans, usage = [], []
        llm.observers.append(lambda plan, output: plans.append(plan))
        llm.observers.append(lambda plan, output: usage.append(llm.memory.usage()))
        params = SamplingParams(n=n, temperature=float(n > 1), seed=1, max_tokens=tokens,
                                ignore_eos=True, logprobs=2)
        outputs = llm.generate(TEXTS, params)
    said = [(one.token_ids, one.logprobs) for out in outputs for one in out.outputs]
    return said, plans, usage


# %%
answers, plenty, _ = serve(200, "recompute")
runs = {mode: serve(20, mode) for mode in ("recompute", "swap")}
for mode, (said, plans, _) in runs.items():
    assert said == answers
    victims = [(plan.step, name) for plan in plans for name, _ in plan.preempted]
    computed = sum(plan.num_tokens for plan in plans)
    print(f"{mode:9}: {len(plans)} steps, {computed} tokens computed; gave way {victims}")
computed = sum(plan.num_tokens for plan in plenty)
print(f"200 blocks: {len(plenty)} steps, {computed} tokens computed")
assert sum(plan.num_tokens for plan in runs["swap"][1]) == computed

# %% [markdown]
# The same answers in all three. Who was swapped out computed nothing again, and who was recomputed did. Either way,
# what the model says after the pause is what it would have said without it, bit for bit.
#
# The account of memory, step by step, comes from `memory.usage()`, whose source is `accounting.py`:

# %%
alt = "Blocks in use rise to 20 and stay near it; the CPU pool has up to 7, until two come back"
title = "A pool of 20, with swapping"
with plots.figure(title, "step", "blocks", size=(6.8, 2.8), alt=alt) as axes:
    usage = runs["swap"][2]
    steps = range(1, len(usage) + 1)
    plots.line(axes, steps, [u.used for u in usage], "in use", at=29, dy=9)
    plots.line(axes, steps, [u.cpu_used for u in usage], "in CPU memory", at=10, dy=9)

# %%
from minipaged.memory import accounting

show_source(accounting.measure)

# %% [markdown]
# `Counters` counts blocks that were copied and moved since the beginning, and a `Pool` is an allocator with the page
# tables of those who live there; there are two, one for each memory. `check_pool` derives all counts anew from the page
# tables and compares; the engine's `debug=True` calls it in every step.

# %%
show_source(accounting.check_pool)

# %% [markdown]
# ### Groups
#
# Three samples of each prompt. They share their prompt's full blocks, and give way together. After a recomputation
# the first sample rebuilds the prompt, the others fork it, and so they share it as before:

# %%
show_source(preemption.share_rebuilt_prompt)

# %%
grouped = {mode: serve(24, mode, n=3, tokens=40) for mode in ("recompute", "swap")}
plenty = serve(200, "recompute", n=3, tokens=40)
for mode, (said, plans, _) in grouped.items():
    assert said == plenty[0]
    times = sum(len(plan.preempted) for plan in plans)
    moved = sum(len(plan.swap_out) for plan in plans)
    print(f"{mode:9}: {times} times a group gave way, {moved} blocks moved")
assert sum(len(plan.swap_out) for plan in grouped["swap"][1]) > 0

# %% [markdown]
# ## What must hold, and what breaks if it doesn't
#
# **Who gives way gives all.** Suppose a victim gives just the one block that is wanted. A context with a block missing
# is of no use, so it wants one back at once. Then two jobs can take it from each other for ever:

# %%
holds = {"A": 3, "B": 3}  # a pool of 6, and with fewer than 4 neither can go on
for step in range(1, 4):
    for taker, giver in [("A", "B"), ("B", "A")]:
        holds[taker], holds[giver] = holds[taker] + 1, holds[giver] - 1
        print(f"step {step}: {taker} takes one of {giver}'s: {holds}")
    assert max(holds.values()) < 4  # nobody has what it needs, and two blocks' keys are gone

# %% [markdown]
# **The first is never a victim.** Let the earliest give way instead, and let small jobs pass who waits for memory. Then
# the first job is thrown out, and its many blocks are never free at the same time as long as small jobs keep coming.
# Its wait grows with the number of others, and that has no limit:

# %%
class Passing(Yielding):
    def admit(self, keep_free=0):
        let_in = []
        for job in self.waiting.copy():
            if need(job) <= self.free:
                self.waiting.remove(job)
                self.running.append(job)
                self.take(job)
                let_in.append(job.name)
        return let_in


def first_ends(kind, others, **options):
    """The step in which a large first job ends."""
    crowd = [(100, 60)] + [(16, 10 + 7 * i % 25) for i in range(others)]
    history = play(kind(crowd, 14, **options))
    return 1 + max(step for step, row in enumerate(history) if 0 in row[3])


for others in (50, 100, 200, 400):
    bad = first_ends(Passing, others, pick=POLICIES["earliest"])
    print(f"{others} others: the first job ends at step {first_ends(Yielding, others)}, "
          f"or at {bad} if it may be a victim, and passed")
assert first_ends(Yielding, 400) == 60 < bad / 10

# %% [markdown]
# **The order of memory moves.** A block that is swapped out in a step may be given to another sequence in the same
# step. So contents go out first, then freed blocks may be poisoned, then others come in, then copies are made, and only
# then new tokens are written. Here is what happens if somebody writes first:

# %%
pool, away = {5: "A's keys"}, {}
pool[5] = "B's keys"  # block 5 was given to B in this step, and B writes
away[0] = pool[5]  # and then A's block is swapped out
print("A comes back with", away[0])
assert away[0] != "A's keys"

# %% [markdown]
# **Who runs takes first, then others come in.** A newcomer that comes in first takes a block that somebody who runs
# wants in the same step, and then it is itself the latest, and thrown out. It costs some preemptions more:

# %%
class Eager(Yielding):
    def step(self):
        let_in = self.admit(self.keep_free)  # before those who run have what they need
        gave_way, more, tokens = super().step()
        return gave_way, let_in + more, tokens


# %%
times = {}
for kind in (Yielding, Eager):
    histories = [play(kind(load(seed), 100)) for seed in range(4)]
    times[kind] = sum(len(row[0]) for history in histories for row in history)
    print(f"{kind.__name__:8}: {times[kind]} times somebody gave way")
assert times[Eager] > times[Yielding]

# %% [markdown]
# And in a step in which somebody gave way nobody comes in at all. In our server that saves just the question: the first
# who waits is then the victim itself, which wants as many blocks as it left, or more, and some of those are taken.

# %% [markdown]
# **What can never fit is refused at once.** A request that needs more blocks than the pool has would give way to itself
# for ever. So it is told so when it is added, with the numbers:

# %%
try:
    package([(100, 300)], blocks=20)
except ValueError as error:
    print(error)

# %% [markdown]
# ## Exercises
#
# Fill in the functions; each is followed by a test that says how far you are. Where a cost is promised, it is counted
# in lines of Python that run, so that a loop over a billion tokens is told so, and doesn't run for ever.

# %%
from minipaged.teaching.costs import patient

# %% [markdown]
# **1. Who gives way?** (warm-up). Sequences run in the order of arrival. Each holds some blocks, shares none, and wants
# some more in this step. They are asked in turn. As long as one can't have what it wants, the latest who still runs
# gives up all it holds, be it the one who asks. Who gave way is not asked any more.

# %% tags=["exercise"]
def who_gives_way(held, wants, free):
    """held, wants: blocks of each, in the order of arrival; free: blocks that nobody has.

    -> (their places in the lists, in the order in which they give way; blocks free then)
    """
    raise NotImplementedError


# %% tags=["test"]
def test_who_gives_way(who_gives_way):
    who_gives_way = own(who_gives_way, forbid=[Server, Stubborn, Yielding])
    for seed in range(400):
        random = Random(seed)
        n = random.randint(1, 7)
        held = [random.randint(1, 5) for _ in range(n)]
        wants = [random.choice([0, 0, 1, random.randint(1, 4)]) for _ in range(n)]
        free = random.randint(0, 4)
        left, runs, gone = free, list(range(n)), []
        for i in range(n):
            while i in runs and wants[i] > left:
                gone.append(runs.pop())
                left += held[gone[-1]]
            left -= wants[i] if i in runs else 0
        got, case = who_gives_way(held, wants, free), f"held={held}, wants={wants}, free={free}"
        assert equal(got, (gone, left)), f"{case}: {(gone, left)}, not {got}"


attempt(test_who_gives_way, who_gives_way)

# %% [markdown]
# **2. Move a group.** Write the package's move: all or nothing, shared blocks once, and what the other pool finds
# already (`found`: block here -> block there) is not moved. The page tables that you are given belong to somebody else.

# %% tags=["exercise"]
def move_group(tables, free, found):
    """tables: {name: [block, ...]}; free: blocks of the other pool, in order of handing out.

    found: {block here: block there}, and perhaps also of blocks that the group doesn't hold.
    -> (moves {block here: block there}, tables over there), or None if `free` is too short.
    Targets are the first blocks of `free`, each source has one, in any order among them.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_move_group(move_group):
    move_group = own(move_group, forbid=[move])
    for seed in range(300):
        random = Random(seed)
        prompt = random.sample(range(40), random.randint(0, 3))
        rest = random.sample(range(40, 90), 12)
        tables = {f"s{i}": prompt + [rest.pop() for _ in range(random.randint(0, 3))]
                  for i in range(random.randint(1, 4))}
        sources = {block for table in tables.values() for block in table}
        there = random.sample(range(100), 40)
        known = random.sample(sorted(sources), random.randint(0, len(sources)))
        known += random.sample(range(90, 100), random.randint(0, 2))  # what others hold
        found = {block: there.pop() for block in random.choice([[], known])}
        needed = len(sources - {*found})
        free = there[: max(0, needed + random.randint(-1, 2))]
        got = move_group(tables, free, found)
        case = f"tables={tables}, free={free}, found={found}"
        if needed > len(free):
            assert got is None, f"{case}: {needed} blocks are needed, so None, not {got}"
            continue
        pair = isinstance(got, (tuple, list)) and len(got) == 2
        assert pair, f"{case}: (moves, tables), not {got}"
        moves, new = got
        assert isinstance(moves, dict), f"{case}: moves as a dict, not {moves}"
        assert equal(set(moves), sources - {*found}), f"{case}: sources of {moves}"
        assert equal(sorted(moves.values()), sorted(free[:needed])), f"{case}: targets {moves}"
        places = moves | found
        right = {name: [places[block] for block in table] for name, table in tables.items()}
        assert equal(new, right), f"{case}: tables {right}, not {new}"
        assert all(new[name] is not tables[name] for name in tables), "tables of their own"


attempt(test_move_group, move_group)

# %% [markdown]
# **3. Swap or recompute?** Make the estimate that a scheduler could make for each victim. Recomputing n tokens takes
# `seconds_per_token` for each that the prefix cache has not kept. Swapping moves whole blocks, there and back: each
# block costs `latency` seconds to begin with, and its bytes at the speed of the link.

# %% tags=["exercise"]
def cheaper(tokens, kept, B, seconds_per_token, bytes_per_token, link, latency):
    """-> ("swap" or "recompute", seconds of it); at a tie, "recompute". link: bytes a second.

    tokens: that are computed; the first `kept` of them are found again when it comes back,
    so that they are not computed again. A swap moves all blocks, whatever was kept.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_cheaper(cheaper):
    cheaper = own(cheaper, forbid=[crossing])
    for seed in range(400):
        random = Random(seed)
        B, tokens = random.choice([1, 4, 16, 50]), random.randint(1, 300)
        kept = random.choice([0, tokens // B * B // 2])
        each, size = random.choice([0.0, random.random()]), random.randint(1, 1000)
        link, latency = random.uniform(500, 50_000), random.choice([0.0, random.random()])
        slow = 2 * ceil(tokens / B) * (latency + B * size / link)
        again = (tokens - kept) * each
        right = ("swap", slow) if slow < again else ("recompute", again)
        got = cheaper(tokens, kept, B, each, size, link, latency)
        case = f"{tokens=}, {kept=}, {B=}, {each=:.2f}, {size=}, {link=:.0f}, {latency=:.2f}"
        assert equal(got, right, 1e-9), f"{case}: {right}, not {got}"
    tie = cheaper(16, 0, 16, 2.0, 100, 100.0, 0.0)
    assert equal(tie, ("recompute", 32.0), 1e-9), f"a tie: {tie}"


attempt(test_cheaper, cheaper)

# %% [markdown]
# **4. Never in the first place** (open). If the length of every answer were known, a server could let somebody in only
# if nobody ever had to give way. Each job gets one token a step and gives all its blocks back with its last one. Say
# whether a newcomer fits. Answers may have a billion tokens. What would you do where the lengths are not known?

# %% tags=["exercise"]
def fits_for_good(jobs, newcomer, blocks, B):
    """jobs, newcomer: (tokens that have a slot now, tokens that have one in its last step).

    In each step each job gets a slot for one token more; after the step in which it has all
    of them it gives its blocks back. All start now. -> bool: the pool never overflows.
    """
    raise NotImplementedError


# %% tags=["test"]
def test_fits_for_good(fits_for_good):
    fits_for_good = own(patient(fits_for_good, 500_000), forbid=[Server, Stubborn, Yielding])
    answers = Counter()
    for seed in range(400):
        random = Random(seed)
        B, everyone = random.choice([1, 2, 4, 16]), []
        for _ in range(random.randint(1, 6)):
            now = random.randint(1, 20)
            everyone.append((now, now + random.randint(0, 20)))
        peak = max(sum(ceil((now + t) / B) for now, end in everyone if now + t <= end)
                   for t in range(21))
        blocks = peak + random.randint(-2, 1)
        *jobs, newcomer = everyone
        got = fits_for_good(jobs, newcomer, blocks, B)
        case = f"jobs={jobs}, newcomer={newcomer}, {blocks} blocks of {B}"
        right = peak <= blocks
        assert equal(got, right), f"{case}: {peak} are needed, so {right}, not {got}"
        answers[got] += 1
    far = [(i, 10**9 + i) for i in range(1, 200)]
    for blocks, right in [(200 * 10**9 // 16, False), (200 * 10**9 // 16 + 10**4, True)]:
        assert equal(fits_for_good(far, (1, 10**9 + 1), blocks, 16), right), "a billion tokens"
    for blocks, right in [(2 * 10**9 // 16 - 1, False), (2 * 10**9 // 16, True)]:
        got = fits_for_good([(1, 10**9)], (1, 2 * 10**9), blocks, 16)
        assert equal(got, right), f"one ends at 10^9 tokens, one at twice as many, {blocks=}"


attempt(test_fits_for_good, fits_for_good)

# %% [markdown]
# ## What's next
#
# Until now, what a request had computed was gone when it ended. But the next one may begin with the same words, and
# blocks that are free still hold what they held. [Chapter 13](13_prefix_caching.ipynb) lets them be found again.
#
# **See it run**: [a request makes way and comes back](gallery/README.md#too-little-memory-for-all), step by step.
#
# ## Sources
#
# - Kwon et al., *Efficient Memory Management for Large Language Model Serving with PagedAttention*, 2023: section 4.5
#   (all or nothing, sequence groups, swapping and recomputation) and Figure 19.
# - vLLM's first release: the watermark of 1 %, and "one sequence: recompute, several: swap".
# - NVIDIA, *A100 Tensor Core GPU* data sheet: 312 TFLOPS in bf16. PCI-SIG: PCI Express 4.0, 16 lanes, 32 GB a second.
# - Coffman, Elphick and Shoshani, *System Deadlocks*, 1971; Dijkstra's banker is the ancestor of exercise 4.
