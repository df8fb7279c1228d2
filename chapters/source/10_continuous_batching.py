# %% [markdown]
# # 10. Continuous batching
#
# Requests come to a server when they like. One wants a word and the next one a page, and nobody knows beforehand. This
# chapter lets them come and go between any two steps, and sees to it that nobody waits for ever, and nobody pays for
# another.
#
# **You need**: computed tokens, and why weights should be read for many rows at once
# ([chapter 2](02_the_kv_cache.ipynb)); page tables and slots ([chapter 5](05_page_tables.ipynb)). **You get**: an
# engine of about a hundred lines that runs the real model, and makes the same plans as the package, block for block;
# and a Ctrl-C at every single line of it, after which all answers are still right.

# %% [markdown]
# ## The question
#
# A server has one model and many requests. The more of them it computes at once, the less each costs. But:
#
# - They come at different times, and end at different times. When may a new one begin?
# - What exactly is computed in one step, and how does the model know what belongs to whom?
# - If not all can run, who goes first, and can somebody wait for ever?
# - What do you notice of your neighbours when one of them leaves, breaks, or somebody presses Ctrl-C?

# %% [markdown]
# ## The idea
#
# A **step** is one run of the model over some tokens. Between two steps nothing is under way: everything that is known
# is which tokens there are, and where their keys and values lie. So the next step may have other company than the last
# one. Who has ended leaves at once, and who waits takes its **seat**, its place in the batch:
#
# ```
#   step        1 2 3 4 5 6 7 8 9                1 2 3 4 5 6 7 8 9
#
#   seat 1      A A A A A A A A D                A A A A A A A A H
#   seat 2      B B . . . . . . E                B B D D D D D G G
#   seat 3      C C C . . . . . F                C C C E E E F F F
#
#               static batching                  continuous batching
# ```
#
# To the left, **static batching**: a batch is put together, and runs until the last of it has ended. To the right,
# **continuous batching**, also called iteration-level scheduling (Orca, 2022). What makes it easy is to keep three
# things apart:
#
# ```
#   plan = schedule()          who computes which tokens, and where they go: integers and lists
#   drawn = execute(plan)      the model, and no decisions
#   update(plan, drawn)        tokens are appended; who has ended leaves
# ```

# %% [markdown]
# ## Build it
#
# ### Why batch at all?
#
# The real model, with n sequences that each compute one token in a step:

# %%
import json
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from zlib import crc32

import torch

from kernels import Batch, poison
from minipaged import LLM, SamplingParams
from minipaged.teaching import attempt, equal, loads, own, plots, show_source

llm = LLM("smollm2", num_blocks=96, prefix_cache="none", device="cpu", max_num_seqs=32,
          max_num_batched_tokens=2048)


# %%
def decode_seconds(n):
    """Of the fastest step in which n sequences compute one token each."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for _ in range(n):
        llm.add_request("Tell me about the sea.", params)
    llm.step()  # the prompts
    clock = [time.perf_counter()]
    while llm.has_unfinished_requests:
        llm.step()
        clock.append(time.perf_counter())
    return min(b - a for a, b in zip(clock, clock[1:]))


# %% tags=["measured"]
for n in (1, 2, 4, 8, 16, 32):
    took = decode_seconds(n)
    print(f"{n:2} sequences: {1000 * took:4.0f} ms a step, {n / took:4.0f} tokens a second")

# %% [markdown]
# A step reads every weight once, whoever is in it. Alone, one token pays for all of that; in company the bill is
# shared. What is left for each is its own arithmetic, and its own keys and values, which nobody shares. So a server
# wants its seats full.
#
# ### A sequence has no phases
#
# First comes the prompt (prefill), then one token after the other (decode). It is tempting to make two kinds of work of
# that. We need only two facts about a sequence: its tokens, and how many of them are **computed**, so that their keys
# and values are in memory. All others are to do. For a new prompt that is all of it, later it is the newest token:

# %%
B = 16  # slots in a block


class Seq:
    """Tokens, of which the first `computed` have keys and values; `end`: its most tokens."""

    def __init__(self, name, prompt, max_tokens):
        self.name, self.tokens = name, list(prompt)
        self.prompt, self.end = len(prompt), len(prompt) + max_tokens
        self.computed, self.table = 0, []  # and its page table, chapter 5

    def missing(self):
        """Blocks that it lacks for its tokens."""
        return -(-len(self.tokens) // B) - len(self.table)


# %% [markdown]
# ### The plan
#
# A plan says what each sequence computes in one step: which tokens, from which position on, into which slots, and
# where its past lies. It is plain data. It can be printed, kept, compared, and carried out tomorrow:

# %%
@dataclass
class Row:
    """What one sequence computes in a step."""

    request_id: str
    token_ids: list  # all that it has not computed
    start: int  # the position of the first of them
    slots: list  # where their keys and values go
    block_table: list


def row_of(seq):
    positions = range(seq.computed, len(seq.tokens))
    slots = [seq.table[p // B] * B + p % B for p in positions]
    return Row(seq.name, seq.tokens[seq.computed:], seq.computed, slots, seq.table.copy())


# %%
old, young, new = Seq("old", range(100, 118), 9), Seq("young", [5, 6], 9), Seq("new", [7, 8], 9)
old.computed, old.table = 17, [2, 0]
young.computed, young.table = 1, [5]
new.table = [1]
example = [row_of(seq) for seq in (old, young, new)]
print(*example, sep="\n")

# %% [markdown]
# Two decode, and one begins. `row_of` doesn't ask which is which.
#
# ### The flat batch
#
# How do they go through the model together? The classic way is a rectangle: a row for each sequence, a column for each
# token of the longest, and the rest filled up with tokens that mean nothing, the **padding**. Here it would be 3 by 2,
# with four tokens in six places. But all layers except attention look at each token by itself. So all tokens can stand
# in one row, the **flat batch**:
#
# ```
#   input_ids     117 | 6 | 7 8            T = 4 tokens
#   positions      17 | 1 | 0 1
#   query_start     0   1   2     4        sequence s has the places query_start[s] to query_start[s + 1] - 1
# ```
#
# Attention needs to know whose past a token may look at. That is what `query_start`, `context_lens` (how many tokens
# each has by now) and `block_tables` are for. No token is padding. Only the tables are filled up to one width, since a
# tensor is a rectangle, and nobody reads what stands there.

# %%
def flatten(plan):
    """All tokens of a step in one row, as tensors."""
    counts = [len(row.token_ids) for row in plan]
    M = max(len(row.block_table) for row in plan)
    lists = dict(
        input_ids=[token for row in plan for token in row.token_ids],
        positions=[row.start + i for row, n in zip(plan, counts) for i in range(n)],
        slot_mapping=[slot for row in plan for slot in row.slots],
        query_start=[0, *accumulate(counts)],
        context_lens=[row.start + n for row, n in zip(plan, counts)],
        block_tables=[row.block_table + [0] * (M - len(row.block_table)) for row in plan],
    )
    return {name: torch.tensor(values) for name, values in lists.items()}


print({name: tensor.tolist() for name, tensor in flatten(example).items()})

# %% [markdown]
# **Your turn.** Let `young` have computed nothing yet: change `young.computed` to 0 in the cell above the picture, and
# say before you run both cells again which of the six will change.
#
# ### Execute
#
# The model takes the row as it is. It writes keys and values into the slots, attends through the tables, and gives one
# vector for each of the T tokens. Of these, only the last of each sequence is worth logits: it says what comes next.

# %%
model = llm.executor.runner.model


class Real:
    """The model with 96 blocks of memory. A plan -> the best token behind each sequence."""

    def __init__(self):  # NaN at first, so that nobody reads unseen what isn't written
        self.cache = torch.full_like(llm.executor.runner.cache, torch.nan)

    def lay_out(self, plan):
        return flatten(plan)

    @torch.inference_mode()
    def __call__(self, plan):
        flat = self.lay_out(plan)
        input_ids, positions = flat.pop("input_ids"), flat.pop("positions")
        hidden = model(input_ids, positions, self.cache, Batch(**flat))  # [T, E]
        self.logits = model.logits(hidden[flat["query_start"][1:] - 1])  # [S, V]
        return self.logits.argmax(-1).tolist()


# %% [markdown]
# ### Come and go
#
# `schedule` gives everyone who runs a slot for its next token, lets others in, and writes the plan. `update` appends
# what was drawn. Blocks come from a list of free ones ([chapter 4](04_blocks.ipynb)). First the door:

# %%
class Door:
    """Who waits, who runs, who has ended, and free blocks."""

    def __init__(self, seats, blocks, waiting, stop_ids=()):
        self.seats, self.blocks, self.stop_ids = seats, blocks, stop_ids
        self.waiting, self.running, self.ended = [*waiting], [], []
        self.free = deque(range(blocks))

    def grow(self, seq):
        seq.table += [self.free.popleft() for _ in range(seq.missing())]

    def enter(self, seq):
        """-> whether there is a seat and room."""
        if len(self.running) == self.seats or seq.missing() > len(self.free):
            return False
        self.waiting.remove(seq)
        self.running.append(seq)
        self.grow(seq)
        return True

    def let_in(self):
        while self.waiting and self.enter(self.waiting[0]):
            pass

    def leave(self, seq):
        self.running.remove(seq)
        self.free.extend(reversed(seq.table))
        self.ended.append(seq)


# %%
class Server(Door):
    def schedule(self):
        for seq in self.running:
            self.grow(seq)
        self.let_in()
        return [row_of(seq) for seq in self.running]

    def update(self, plan, drawn):
        for seq, row, token in zip(self.running.copy(), plan, drawn):
            seq.computed += len(row.token_ids)
            seq.tokens.append(token)
            if token in self.stop_ids or len(seq.tokens) == seq.end:
                self.leave(seq)

    def step(self, execute):
        """execute(plan) -> a token for each sequence."""
        plan = self.schedule()
        drawn = execute(plan)
        self.update(plan, drawn)
        return plan


def serve(server, execute, most=500):
    """Until all have ended. -> plans"""
    plans = []
    while (server.waiting or server.running) and len(plans) < most:
        plans.append(server.step(execute))
    return plans


# %% [markdown]
# That is continuous batching. (What if `grow` finds no block free? See [chapter 12](12_preemption.ipynb).) The static
# server differs in one line: nobody comes in while anybody runs.

# %%
class Static(Server):
    def let_in(self):
        if not self.running:
            super().let_in()


# %% [markdown]
# ### Ten questions, four seats
#
# For the real model. An answer is over when the model says so, or after 40 tokens:

# %%
QUESTIONS = [
    "Name a big animal.", "Name a color.", "What is the capital of France?", "What is 2 + 2?",
    "Translate 'cat' into French.", "Name three fruits.", "Tell me a story about the sea.",
    "Write a poem about rain.", "Is the sky blue?", "Say hello.",
]
tokenizer = llm.get_tokenizer()
chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
prompts = [tokenizer.encode(tokenizer.apply_chat_template(chat), False) for chat in chats]


def run(kind):
    """-> plans, the answers' tokens, seconds."""
    seqs = [Seq(str(i), prompt, 40) for i, prompt in enumerate(prompts)]
    server, began = kind(4, 96, seqs, llm.config.eos_token_ids), time.perf_counter()
    plans = serve(server, Real())
    seconds = time.perf_counter() - began
    return plans, {seq.name: seq.tokens[seq.prompt:] for seq in server.ended}, seconds


# %%
static_plans, static_answers, static_seconds = run(Static)
plans, answers, seconds = run(Server)
assert answers == static_answers
for i, question in enumerate(QUESTIONS):
    tokens = answers[str(i)]
    print(f"{i} {question:32} {len(tokens):2} tokens: {tokenizer.decode(tokens)[:32]!r}")

# %% [markdown]
# The same answers, to the token. Only the company was another one. Who sat where?

# %%
def gantt(axes, plans):
    """A bar for each request, in the first seat that is free when it comes."""
    steps, free_from = {}, [0] * 4
    for step, plan in enumerate(plans):
        for row in plan:
            steps.setdefault(row.request_id, []).append(step)
    axes.barh(range(1, 5), len(plans), 0.8, color="#eeeeee", hatch="xx", edgecolor=plots.GREY)
    for name, (first, *_, last) in steps.items():
        seat = next(seat for seat in range(4) if free_from[seat] <= first)
        free_from[seat] = last + 1
        axes.barh(seat + 1, last + 1 - first, 0.8, first, color=plots.COLORS[0], edgecolor="w")
        axes.text((first + last + 1) / 2, seat + 1, name, color="w", ha="center", va="center")
    axes.set(xlim=(0, len(static_plans)), ylim=(4.6, 0.4), yticks=[1, 2, 3, 4])
    plots.label(axes, "step", "seat")


# %%
alt = "Left, three batches; nearly half of the seats stay empty. Right ten bars without gaps"
with plots.figures("Static: all wait for the longest", "Joining: a free seat is taken",
                   size=(8.6, 2.3), alt=alt) as (left, right):
    gantt(left, static_plans)
    gantt(right, plans)

# %%
total = sum(map(len, answers.values()))
for name, its in (("static", static_plans), ("joining", plans)):
    used = total / (4 * len(its))
    print(f"{name:7}: {total} tokens in {len(its)} steps, {used:.0%} of all seats in use")
assert len(plans) < 0.7 * len(static_plans)

# %% tags=["measured"]
print(f"static: {static_seconds:.1f} s, joining: {seconds:.1f} s")

# %% [markdown]
# Look at where 4 and 5 begin: those who come later begin sooner, too. The end is empty because nobody waits any more.
#
# And the rectangle? Whenever somebody comes in beside others, it would have as many columns as the new prompt has
# tokens, for everyone:

# %%
flat = sum(len(row.token_ids) for plan in plans for row in plan)
padded = sum(len(plan) * max(len(row.token_ids) for row in plan) for plan in plans)
print(f"{flat} tokens in flat batches; in rectangles there would have been {padded} places")
assert padded > 1.5 * flat

# %% [markdown]
# ### More seats make it worse
#
# Is it that bad in general? Count it without a model, for answers as long as those of Alpaca, the paper's load of
# short instructions. All wait from the start.

# %%
def share_used(outputs, seats, static):
    """Of all seats in all steps, the share that computes a token."""
    waiting, running, steps = deque(outputs), [], 0
    while waiting or running:
        if not (static and running):
            while waiting and len(running) < seats:
                running.append(waiting.popleft())
        running, steps = [left - 1 for left in running if left > 1], steps + 1
    return sum(outputs) / (seats * steps)


# %%
SEATS = [1, 2, 4, 8, 16, 32, 64]
outputs = [job.output for job in loads.draw(loads.ALPACA, 8000, rate=1.0)]
alt = "Joining stays near 100 % up to 64 seats; static falls, below 40 % from 8 seats on"
with plots.figure("Seats in use", "seats", "%", size=(6.8, 2.8), alt=alt) as axes:
    for name, dy in (("joining", -12), ("static", 12)):
        used = [100 * share_used(outputs, n, name == "static") for n in SEATS]
        plots.line(axes, SEATS, used, name, at=3, dy=dy)
    axes.set(ylim=(0, 105), xscale="log", xticks=SEATS, xticklabels=SEATS)
    axes.minorticks_off()
assert used == sorted(used, reverse=True) and used[3] < 40

# %% [markdown]
# In a static batch a seat is in use for the mean of the lengths, out of the longest of its batch. The more seats, the
# longer the longest. So just what makes a batch cheap, its size, makes a static one wasteful.
#
# ### A toy model
#
# The real model is slow. Here is a **toy** that is just as easy to upset: a slot holds a token, and the next token
# follows from all that is read through the page table. One wrong slot, and it says something else.

# %%
class Toy:
    def __init__(self):
        self.stored = {}

    def __call__(self, plan):
        for row in plan:
            self.stored |= zip(row.slots, row.token_ids)
        return [self.next(row, row.start + len(row.token_ids)) for row in plan]

    def next(self, row, count):
        read = [self.stored.get(row.block_table[p // B] * B + p % B) for p in range(count)]
        return crc32(repr(read).encode()) % 1000


# %% [markdown]
# ### Who goes first?
#
# Let memory be the limit. If the first who waits finds no room, a later one might, who needs less. In ours the later
# one waits, too, and memory lies idle meanwhile. Should it pass?

# %%
class Passing(Server):
    def let_in(self):
        for seq in self.waiting.copy():
            self.enter(seq)


# %% [markdown]
# The pool has 12 blocks. Every second step somebody comes who holds 4 of them for 6 steps, so there is work for all 12.
# In step 5 one comes who wants 10.

# %%
def wait_of_large(kind, others):
    """-> steps that it waits, share of the memory used in the meantime."""
    server, toy, large, used = kind(4, 12, []), Toy(), Seq("large", [0] * 150, 6), []
    comes = {2 * i: [Seq(f"small {i}", [0] * 56, 6)] for i in range(others)} | {5: [large]}
    while not large.computed:
        server.waiting += comes.get(len(used), [])
        used.append(sum(len(row.block_table) for row in server.step(toy)) / 12)
    wait = len(used) - 6
    return wait, sum(used[5:-1]) / wait


for others in (10, 50, 100, 200):
    (wait, used), (passed, more) = (wait_of_large(kind, others) for kind in (Server, Passing))
    print(f"{others:3} others. In order: it waits {wait} steps, memory is {used:.0%} full. "
          f"If they pass: {passed:3} steps, {more:.0%}")
assert wait < 10 and passed > 390

# %% [markdown]
# If small ones may pass, the large one waits until no more of them come. If they never stop, it waits for ever: it
# **starves**. Nobody has decided that; it is what "whoever fits" means for those who are large.
#
# In the order of arrival its wait has nothing to do with those who come later. If the first who waits can't come in, it
# is because of those who run. Each of them ends, since each has a limit on its tokens, and then there is room. So the
# next one is first, and at last my turn comes. One thing is needed for it: whoever would not fit even into the empty
# pool is refused when it asks. And it has a price, which stands in the table as well.
#
# **Your turn.** Let the small ones come every third step: write `3 * i`. Then 4 blocks are always free. Does the large
# one still starve? (Exercise 3 builds something between the two doors.)
#
# ### The same bits in any company
#
# Who else is in the batch must not matter to an answer. Above, the tokens were the same, but tokens hide small
# differences. So compare all logits, to the last bit: one question alone, and among others who come and go.

# %%
def logits_among(company, who=6):
    """Logits [steps, V] of one question while some others are served, too."""
    seqs = [Seq(i, prompts[i], 16) for i in sorted({who, *company})]
    server, real, rows = Server(4, 96, seqs), Real(), []
    while all(seq.name != who for seq in server.ended):
        plan = server.step(real)
        rows += [row for row, part in zip(real.logits, plan) if part.request_id == who]
    return torch.stack(rows)


alone = logits_among([])
for company in ([5], [2, 3, 4, 5], range(10)):
    assert torch.equal(logits_among(company), alone)
print(f"{alone.numel():,} logits in {len(alone)} steps: equal to the bit, alone or not")

# %% [markdown]
# This doesn't come by itself. A matrix product adds up hundreds of numbers, and rounds after each. Fast libraries
# choose the order by the shape of the whole product, so one row may come out otherwise among 32. Here is PyTorch's own:

# %% tags=["measured"]
x, w = torch.randn(32, 576), torch.randn(1536, 576)
print(f"{((x @ w.T)[0] != x[0] @ w.T).sum()} of 1536 numbers differ")

# %% [markdown]
# (If yours says 0, your library took the same order in both.) The package's kernels for the CPU add up each row in an
# order that depends on that row alone. So the same question gets the same answer on a busy day, too. And whoever
# builds an engine has the sharpest of tests: there is no tolerance in which a wrong slot could hide.
#
# ### Broken off
#
# Somebody presses Ctrl-C. Python raises KeyboardInterrupt at whatever line it is: between two tokens that are appended,
# or between taking a block and noting it. Afterwards the server's lists may contradict each other. We could repair each
# case. It is much simpler to give up everything that can be made again. Only the tokens that were said can't. All else,
# tables, blocks, queues, keys and values, follows from them: set `computed` to 0, and the next step computes it anew.
# There are no phases, so nobody even has to know that something happened.

# %%
class Whole(Server):
    def step(self, execute):
        notes = {seq: len(seq.tokens) for seq in [*self.running, *self.waiting]}
        try:
            return super().step(execute)
        except BaseException:
            self.start_over(notes)
            raise

    def start_over(self, notes):
        """Of those who hadn't ended only the tokens count, as they were. Memory is given up."""
        for seq, length in notes.items():
            del seq.tokens[length:]
            seq.computed, seq.table = 0, []
        ended = [seq for seq in self.ended if seq not in notes]
        self.__init__(self.seats, self.blocks, notes, self.stop_ids)
        self.ended = ended


# %% [markdown]
# Is it enough? Let us try every line. `interrupted` raises KeyboardInterrupt before the n-th line that is run in a
# module: in this notebook, whose name is `__main__`, or in the package later on.

# %%
def interrupted(module, after, function, *args):
    """-> (its result or None, lines of the module that were run)."""
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        if not frame.f_globals.get("__name__", "").startswith(module):
            return None
        lines += event == "line"
        if event == "line" and lines == after:
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        return function(*args), lines
    except KeyboardInterrupt:
        return None, lines
    finally:
        sys.settrace(None)


# %%
def broken_off(kind, after):
    """Three requests, a Ctrl-C before line number `after`, and on. -> answers, lines"""
    server, toy = kind(2, 8, [Seq(n, range(n), 5) for n in (15, 3, 20)]), Toy()
    _, lines = interrupted("__main__", after, serve, server, toy)
    try:
        serve(server, toy)
    except Exception as error:
        return error, lines
    return {seq.name: seq.tokens for seq in server.ended}, lines


wrong = {}
for kind in (Server, Whole):
    right, lines = broken_off(kind, 0)
    wrong[kind] = sum(broken_off(kind, after)[0] != right for after in range(1, lines + 1))
assert wrong[Server] > 0 == wrong[Whole]

# %% tags=["measured"]
print(f"broken off at each of some {lines} lines; wrong answers afterwards:", [*wrong.values()])

# %% [markdown]
# Without notes (the first number) most lines are harmless, and some are not: the kind of fault that shows up once a
# month. With notes it is right after every line. One hole is left: a second Ctrl-C may come during `start_over`. The
# package's version closes it.

# %% [markdown]
# ## Check it
#
# Random requests, seats and pools. All must come in in their order, and each once. At the end each has the tokens that
# it has alone, in a server of its own.

# %%
def random_load(random):
    """-> seqs, seats, blocks. If memory is scarce, nobody outgrows its first blocks."""
    scarce, seats, seqs = random.random() < 0.5, random.randint(1, 6), []
    for name in range(random.randint(1, 12)):
        prompt = [random.randrange(99) for _ in range(random.randint(1, 60))]
        most = random.randint(1, -len(prompt) % B + 1 if scarce else 30)
        seqs.append(Seq(str(name), prompt, most))
    return seqs, seats, random.randint(4, 10) if scarce else 6 * seats


def live(random, seen):
    seqs, seats, blocks = random_load(random)
    server, toy, came = Server(seats, blocks, seqs), Toy(), []
    while server.waiting or server.running:
        plan = server.step(toy)
        came += [row.request_id for row in plan if row.start == 0]
        seen["no seat"] += len(plan) == seats and bool(server.waiting)
        seen["no room"] += len(plan) < seats and bool(server.waiting)
    assert came == [seq.name for seq in seqs], "first come, first served, and each once"
    for seq in seqs:
        alone = Server(1, 10, [Seq(0, seq.tokens[: seq.prompt], seq.end - seq.prompt)])
        serve(alone, Toy())
        assert alone.ended[0].tokens == seq.tokens


# %%
seen = Counter()
for seed in range(200):
    live(Random(seed), seen)
print(dict(seen))
assert len(seen) == 2 and min(seen.values()) > 100

# %% [markdown]
# ## The package's version
#
# ### The plan
#
# The fields of our `Row` are there under the same names. Behind them stands what other chapters need: what is to be
# drawn, beams, and guesses of the next tokens (speculation, [chapter 8](08_sampling_and_forks.ipynb)).

# %%
from minipaged.scheduling.plan import ScheduledSequence, Step, StepOutput, StepPlan

show_source(ScheduledSequence)

# %% [markdown]
# `draw` is None if nothing is to be drawn. `num_own` and `draft_token_ids` tell certain tokens from guessed ones. A
# step has more than sequences: memory may have to be moved first (chapter 12), and whoever watches wants to know who
# came, gave way, and came back:

# %%
show_source(StepPlan)

# %% [markdown]
# `loads` (each a `Load`) and `unneeded` are for blocks that come from other engines
# ([chapter 13](13_prefix_caching.ipynb)). What came of a step is as plain. Tokens are lists of lists, because one
# prompt may get several samples, and one sequence several tokens:

# %%
show_source(StepOutput)

# %% [markdown]
# While a plan is being made it is a `Step`. Its `counts_of`, `grant` and `take` are about the budget of a step
# ([chapter 11](11_chunked_prefill.ipynb)), and a `Booked` row is one of guesses. `add_copies` collects what
# copy-on-write wants copied ([chapter 5](05_page_tables.ipynb)). All is copied at once, so a copy of a copy is made
# from the first source:

# %%
show_source(Step.add_copies)

# %% [markdown]
# A plan in which two decode and a third comes in, as `to_json` writes it to a file:

# %%
greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
recorded = []
llm.observers.append(lambda plan, output: recorded.append((plan, output)))
for name, text in (("a", "The sea is"), ("b", "Once upon a time"), ("c", "Two and two are")):
    llm.add_request(text, greedy, request_id=name)
    llm.step()
while llm.has_unfinished_requests:
    llm.step()
llm.observers.pop()
FIELDS = "request_id", "token_ids", "start", "slots", "block_table"
for s in recorded[2][0].to_json()["sequences"]:
    print({name: s[name] for name in (*FIELDS, "draw")})

# %% [markdown]
# Since a plan is data, somebody else can carry it out. The package's plans go as text to **our** flat batch. It must
# draw what the package drew:

# %%
real, same = Real(), 0
for package_plan, output in recorded:
    sequences = json.loads(json.dumps(package_plan.to_json()))["sequences"]
    drawn = real([Row(*(s[name] for name in FIELDS)) for s in sequences])
    assert drawn == [output.tokens[s["seq_id"]][0][0].token_id for s in sequences]
    same += len(drawn)
print(f"{len(recorded)} plans as text, carried out by us: the same {same} tokens")

# %% [markdown]
# ### The queues
#
# A request is in exactly one of three lists. The third is for those who had to give way and whose blocks were moved
# out (chapter 12):

# %%
from minipaged.scheduling import queues

show_source(queues.Queues, queues.arrival, queues.put)

# %% [markdown]
# Each is in the order of arrival: `put` inserts where a request's number says. So one who had to give way
# comes back to its old place.
#
# ### The scheduler: who comes and who leaves
#
# A `Request` has its sequences, one or several. `add` asks `check` first, and lets it wait:

# %%
from minipaged.scheduling.scheduler import Scheduler

show_source(Scheduler.add, Scheduler.check)

# %% [markdown]
# This is the "refused when it asks" from above, for seats as well as for blocks, in the worst case: the longest answer
# that was asked for.
#
# The ways out are all one: who is finished leaves whichever queue it is in, and its blocks are free at once. `abort` is
# for a client who went away; `finish` ends a single sequence, for instance at a stop word:

# %%
show_source(Scheduler.abort, Scheduler.fail, Scheduler.finish, Scheduler._leave_if_finished)

# %% [markdown]
# `has_unfinished` says whether there is anything to do. `schedule` makes the plan in our order: who runs gets its
# slots, then others come in, then the rows are written. It is shown in chapter 11, because most of its lines are about
# a budget of tokens, and so are guesses (`speculation.py`). `ready` are those who can compute, `num_live_seqs` counts
# their sequences. `num_promised_seqs` counts seats that are taken: a request for three samples has one sequence while
# its prompt is computed, and three seats from the beginning.
#
# The rows are our `row_of`, with a number of tokens that may be smaller than all that is to do:

# %%
show_source(Scheduler._scheduled)

# %% [markdown]
# `last` is the rule of no phases in one line: a token is drawn if this step reaches the end of what is known, be that
# the end of a prompt or a token that was drawn a moment ago.
#
# ### Letting in
#
# The door is a file of its own:

# %%
from minipaged.scheduling.admission import PATIENCE, Admission

assert PATIENCE == 16
show_source(Admission.let_in, Admission._has_to_wait)

# %% [markdown]
# `room` are the free seats. With `schedule="fcfs"` (first come, first served; the default) `_in_order` gives those who
# wait and those who are swapped out, together, in the order of arrival. `_admit` takes blocks for one who waits,
# `_resume` brings one back. Both answer False if there is no room, with some blocks kept free for those who grow
# (chapter 12). The `return` behind them is what fairness comes from: if one can't come in, nobody behind it is asked.
#
# There are two exceptions, and both have an end:
#
# - `_has_to_wait`, under any order. A prompt that doesn't fit into one step is **long**. If other long ones have taken
#   all that long ones may have of this step, it has to wait, and shorter ones pass it: the `continue`. Once those long
#   ones are through, it goes on (chapter 11).
# - `_may_overtake`, under `schedule="prefix"` alone. There, requests whose beginning is in memory come first ([chapter
#   14](14_radixattention.ipynb)), so somebody could be passed again and again. Each counts how often it was. As soon as
#   one was passed `PATIENCE` = 16 times, nobody passes it any more.
#
# ### Learning what came of it
#
# `update` is ours, for more kinds of sequences. What was computed is counted, and may be found by others from now on
# (chapter 13). Then each request grows by what was drawn for it, and leaves if it is finished:

# %%
show_source(Scheduler.update)

# %% [markdown]
# ### Step by step, the same
#
# The random loads, in which nobody has to give way, through our server and through the package's scheduler, with the
# toy. Every plan must be the same: who, which tokens, from where on, into which slots, and the page table. And the
# package's flat batch (`FlatBatches.of`, chapter 5) must be our `flatten`:

# %%
from minipaged.execution.flat_batch import FlatBatches
from minipaged.memory import KVCacheManager
from minipaged.requests.request import Request
from minipaged.requests.sampling_params import SampledToken

batches = FlatBatches(num_blocks=96, block_size=B, device="cpu", debug=True)


def package_of(seqs, seats, blocks):
    scheduler = Scheduler(KVCacheManager(blocks, B), seats, 10_000, watermark=0.0)
    for i, seq in enumerate(seqs):
        most = SamplingParams(max_tokens=seq.end - seq.prompt)
        scheduler.add(Request(seq.name, i, seq.tokens.copy(), most, most.max_tokens))
    return scheduler


# %%
def compare(random, seen):
    seqs, seats, blocks = random_load(random)
    scheduler, theirs = package_of(seqs, seats, blocks), Toy()
    server, ours = Server(seats, blocks, seqs), Toy()
    while scheduler.has_unfinished:
        plan = scheduler.schedule()
        rows = [Row(*(getattr(s, name) for name in FIELDS)) for s in plan.sequences]
        input_ids, positions, batch = batches.of(plan.sequences)
        tensors = dict(vars(batch), input_ids=input_ids, positions=positions)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in flatten(rows).items())
        drawn = zip(plan.sequences, theirs(rows))
        assert server.step(ours) == rows
        tokens = {s.seq_id: [[SampledToken(token)]] for s, token in drawn}
        scheduler.update(plan, StepOutput(tokens=tokens))
        seen["steps"] += 1
        seen["rows"] += len(rows)


# %%
seen = Counter()
for seed in range(100):
    compare(Random(seed), seen)
print(f"{seen['steps']} steps with {seen['rows']} rows: equal, and so are their tensors")

# %% [markdown]
# The real engine, with four seats: as many steps as ours, and the same tokens.

# %%
most = SamplingParams(temperature=0, max_tokens=40)
with LLM("smollm2", num_blocks=96, prefix_cache="none", device="cpu", max_num_seqs=4,
         max_num_batched_tokens=2048) as engine:
    outs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], most)
    assert engine.stats().num_steps == len(plans)
assert {str(i): out.outputs[0].token_ids for i, out in enumerate(outs)} == answers
print(f"{len(plans)} steps, {total} tokens: the same")

# %% [markdown]
# ### Whole, whatever happens
#
# A step of the engine is our three lines, with clocks between them. The rest is for the case that it is broken off:

# %%
from minipaged.engine import LLMEngine

show_source(LLMEngine._compute)

# %% [markdown]
# `_unfinished` is what has to be done first of all when somebody uses the engine the next time. In a step it is three
# things, one after the other, each set by a single assignment:
#
# - Until `update` begins no token was appended: `_start_over`, memory is given up.
# - During `update` some requests may have a new token and some not: `_take_back`, what was appended is taken back, and
#   then it starts over.
# - When all answers are made, the step counts: `_deliver`, they have to reach those who asked.
#
# Ours repaired at once, in an `except`, and a second Ctrl-C could hit that. Here it is only written down, and done by
# the next call; if that one is broken off too, by the one after it. So whatever stands in `_unfinished` must be fit to
# be done twice.
#
# What is taken back is in a note for each request of the step. It is our length and a little more: samples that were
# forked in the step vanish, ends are no ends, and the state of a beam search and the times are as they were:

# %%
from minipaged.scheduling.undo import Note

show_source(Note.of, Note.restore)

# %% [markdown]
# No word of blocks, tables or queues. Those are given up, and everyone computes again from its tokens:

# %%
show_source(Scheduler.start_over)

# %% [markdown]
# Now the real engine, with four requests. Up to a dozen steps are broken off at random lines of the package:

# %%
random = Random(1)


def answers_with(breaks):
    """Of the first 4 questions, with so many Ctrl-C. -> answers, steps that were broken off"""
    names = [llm.add_request({"prompt_token_ids": prompt}, greedy) for prompt in prompts[:4]]
    done, broken = {}, 0
    while len(done) < 4:
        after = random.randint(1, 3000) if broken < breaks else 0
        outs, lines = interrupted("minipaged", after, llm.step)
        broken += lines == after
        done |= {out.request_id: out.outputs[0].token_ids for out in outs or () if out.finished}
    return [done[name] for name in names], broken


undisturbed, _ = answers_with(breaks=0)
disturbed, broken = answers_with(breaks=12)
assert disturbed == undisturbed and broken > 5
print("broken off again and again, and the same", sum(map(len, disturbed)), "tokens")

# %% [markdown]
# ### Nobody pays for another
#
# Two more accidents. A client goes away (`abort`). And somebody's keys and values turn to NaN, by a
# broken chip or a bug. A request whose logits are NaN can't go on, but it should take nobody with it:

# %%
def four_with(accident):
    """Four questions; after three steps something happens to the second. -> what they got"""
    names = [llm.add_request({"prompt_token_ids": prompt}, greedy) for prompt in prompts[:4]]
    for _ in range(3):
        llm.step()
    accident(names[1], llm.scheduler.running[1].sequences[0].seq_id)
    outs = {}
    while llm.has_unfinished_requests:
        outs |= {out.request_id: (out.outputs[0].token_ids, out.error) for out in llm.step()}
    return [outs.get(name, "gone") for name in names]


def bad_chip(name, seq_id):
    poison(llm.executor.runner.cache, llm.memory.block_table(seq_id)[:1])  # NaN


quiet = four_with(lambda name, seq_id: None)
for accident in (lambda name, seq_id: llm.abort(name), bad_chip):
    outs = four_with(accident)
    print("the second:", outs[1])
    assert outs[0] == quiet[0] and outs[2:] == quiet[2:], "the others notice nothing"
assert llm.stats().memory.free == 96

# %% [markdown]
# The NaN stays in its row: attention reads only a sequence's own blocks, everything else looks at one token at a time,
# and each row of logits is judged by itself. So a `StepOutput` has `errors` beside `tokens`, and only those sequences
# end. Their blocks go back into the pool, NaN and all; whoever gets them writes a slot before it reads it.

# %% [markdown]
# ## What must hold, and what breaks if it doesn't
#
# **Nobody passes, or not for ever.** Else the large one starves: that was `Passing`.
#
# **A position is a place in the sequence, not in the row. And each reads its own past.** Two questions, answered three
# times: rightly, with places in the row for positions, and with two page tables mixed up.

# %%
class ByRow(Real):
    def lay_out(self, plan):
        flat = super().lay_out(plan)
        return flat | dict(positions=torch.arange(len(flat["positions"])))


class MixedUp(Real):
    def lay_out(self, plan):
        flat = super().lay_out(plan)
        return flat | dict(block_tables=flat["block_tables"].flip(0))


texts = {}
for kind in (Real, ByRow, MixedUp):
    server = Server(2, 96, [Seq(i, prompts[i], 9) for i in (3, 6)])
    serve(server, kind(), most=8)
    texts[kind] = [tokenizer.decode(seq.tokens[seq.prompt:]) for seq in server.running]
    print(f"{kind.__name__:7}:", texts[kind])
assert texts[Real] != texts[ByRow] and texts[Real] != texts[MixedUp]

# %% [markdown]
# With tables mixed up nothing crashes, and the user who asked for a sum reads of a story.
#
# **What can never fit is refused when it is asked for.** Our server checks nothing. Somebody wants more than the pool
# has, stands first at the door, and nobody behind it gets in, ever:

# %%
hopeless = [Seq("too large", range(200), 5), Seq("small", range(3), 5)]
plans_of_stuck = serve(Server(4, 8, hopeless), Toy(), most=50)
print("rows in", len(plans_of_stuck), "steps:", sum(map(len, plans_of_stuck)))
try:
    package_of(hopeless, 4, 8)
except ValueError as error:
    print(error)

# %% [markdown]
# ## Exercises
#
# Fill in the functions; each is followed by a test that says how far you are.
#
# **1. Laid out in a row** (warm-up). Of each sequence you know three numbers: how many tokens it has, how many of them
# are computed, and how many it computes in this step (at least one, and perhaps not all that is to do). Say how they
# stand in the flat batch, and which of the T rows are worth logits: those behind which a new token is drawn.

# %% tags=["exercise"]
def laid_out(sequences):
    """sequences: [(tokens, computed, now), ...] -> (positions, query_start, rows), as lists."""
    raise NotImplementedError


# %% tags=["test"]
def test_laid_out(laid_out):
    laid_out = own(laid_out, forbid=[flatten, row_of])
    for seed in range(300):
        random, sequences = Random(seed), []
        for _ in range(random.randint(0, 6)):
            computed = random.choice([0, random.randint(1, 40)])
            now, later = random.choice([1, random.randint(1, 9)]), random.choice([0, 0, 1, 7])
            sequences.append((computed + now + later, computed, now))
        ends = [0, *accumulate(now for _, _, now in sequences)]
        places = [p for _, computed, now in sequences for p in range(computed, computed + now)]
        rows = [end - 1 for end, (all_of_it, computed, now) in zip(ends[1:], sequences)
                if computed + now == all_of_it]
        got = laid_out(sequences)
        assert isinstance(got, (tuple, list)) and len(got) == 3, f"three lists, not {got}"
        rights = dict(positions=places, query_start=ends, rows=rows)
        for its, (name, right) in zip(got, rights.items()):
            assert equal(its, right), f"{sequences}: {name} {right}, not {its}"


attempt(test_laid_out, laid_out)

# %% [markdown]
# **2. How many steps?** All requests wait from the start, in this order, and each computes as many steps as its answer
# has tokens. Count the steps until all are done, for static batches (as many as there are seats, when all before have
# ended) and for continuous batching. Answers may have a billion tokens, so don't play it step by step.

# %% tags=["exercise"]
def steps_needed(outputs, seats):
    """outputs: tokens of each answer, at least 1. -> (static, continuous)."""
    raise NotImplementedError


# %% tags=["test"]
def test_steps_needed(steps_needed):
    steps_needed = own(steps_needed, forbid=[share_used, Server, Static])

    def played(outputs, seats, static):
        waiting, running, steps = deque(outputs), [], 0
        while waiting or running:
            if not (static and running):
                while waiting and len(running) < seats:
                    running.append(waiting.popleft())
            few = min(running)  # so many steps until the next one ends
            running, steps = [left - few for left in running if left > few], steps + few
        return steps

    for seed in range(300):
        random = Random(seed)
        longest = 12 if seed < 150 else 10**9
        outputs = [random.randint(1, longest) for _ in range(random.randint(0, 15))]
        seats, kept = random.randint(1, 6), [*outputs]
        right = played(outputs, seats, True), played(outputs, seats, False)
        got, lines = interrupted("__main__", 10_000, steps_needed, outputs, seats)
        case = f"outputs={kept}, seats={seats}"
        assert lines < 10_000, f"{case}: after 10,000 lines of your code still no answer"
        assert equal(got, right), f"{case}: {right}, not {got}"


attempt(test_steps_needed, steps_needed)

# %% [markdown]
# **3. A door with patience.** If nobody may pass, memory lies idle; if everyone may, somebody starves. Build what is
# between. Each time the door opens, all who wait are asked in the order in which they came. Whoever needs no more than
# what is still free comes in. It has then passed everyone who came before it and still waits. Nobody is ever passed
# more than `patience` times: if one who fits would do that, the door closes.

# %% tags=["exercise"]
class PatientDoor:
    """add(name, blocks): it waits from now on; names are different.
    open(free): so many blocks are free. -> list of the names that come in, in this order.
    waiting(): -> list of the names that wait, in the order in which they came.
    """

    def __init__(self, patience):
        raise NotImplementedError


# %% tags=["test"]
def test_PatientDoor(PatientDoor):
    PatientDoor = own(PatientDoor, forbid=[Door, Server, Passing])
    for seed in range(150):
        random = Random(seed)
        two = [(PatientDoor(patience), patience, {}, Counter(), [])
               for patience in random.sample([0, 1, 2, 5], 2)]
        for _ in range(8 + seed // 3):
            door, patience, waits, passed, story = random.choice(two)
            case = f"one of two doors, patience={patience}"
            if random.random() < 0.6:
                name, blocks = f"r{len(story)}", random.choice([1, 2, 3, 9])
                waits[name] = blocks
                door.add(name, blocks)
                story.append(f"add({name}, {blocks})")
                assert equal(door.waiting(), [*waits]), f"{case}, {story}: {[*waits]} wait"
                continue
            free = random.choice([0, 2, 4, random.randint(0, 12)])
            left, right = free, []
            for name in [*waits]:
                if waits[name] > left:
                    continue
                before = [*waits][: [*waits].index(name)]
                if any(passed[one] == patience for one in before):
                    break
                passed.update(before)
                left -= waits.pop(name)
                right.append(name)
            got = door.open(free)
            story.append(f"open({free})")
            case = f"{case}, {' '.join(story)}"
            assert equal(got, right), f"{case}: {right}, not {got}"
            assert equal(door.waiting(), [*waits]), f"{case}: {[*waits]} wait"


attempt(test_PatientDoor, PatientDoor)

# %% [markdown]
# **4. Your scheduler** (open). Write the whole of it, without blocks: who waits, who runs, plans, ends, Ctrl-C. The
# test carries your plans out with a model of integers, whose memory holds what was computed of each request, and
# nothing else: a token left out or computed twice makes it say something else. `start_over` may come at any time,
# between `schedule` and `update` as well; that update then never comes. What would you add so that a request of three
# samples takes three seats?

# %% tags=["exercise"]
class Scheduler10:
    """At most `seats` run; first come, first served.

    add(name, prompt, max_tokens): it waits. prompt: a list, not empty. Names are texts or
        numbers, and different.
    schedule(): -> [(name, start, token_ids), ...], of all who run and who come in now, in the
        order in which they came: all tokens that aren't computed, and the first's position.
    update(drawn): {name: token} for everyone in the last plan; the dict is the caller's. Who
        has max_tokens of them ends. -> {name: its max_tokens tokens}, of those who end now.
    abort(name): it is gone at once, and its seat is free. KeyError if it is not
        there, or not any more.
    start_over(): the model's memory is lost. Everyone who hasn't ended keeps its tokens, waits
        at its old place, and computes all of them again when it runs.
    A plan that was handed out never changes any more.
    """

    def __init__(self, seats):
        raise NotImplementedError


# %% tags=["test"]
def test_Scheduler10(Scheduler10):
    Scheduler10 = own(Scheduler10, forbid=[Server, Door, Static, Whole, row_of])

    def said(name, tokens):
        return crc32(repr((name, tokens)).encode()) % 1000

    def answer(name, prompt, most):
        tokens = [*prompt]
        for _ in range(most):
            tokens.append(said(name, tokens))
        return tokens[len(prompt) :]

    class Story:
        """One scheduler, and what must be true of it."""

        def __init__(self, seats):
            self.mine, self.seats, self.plans = Scheduler10(seats), seats, []
            self.asked, self.running, self.waiting = {}, [], []  # by name; names in order
            self.got, self.memory = {}, {}  # answers so far; tokens in the model's memory
            self.told = []

        def add(self, name, prompt, most):
            self.told.append(f"add({name}, {prompt}, {most})")
            self.asked[name] = prompt, [*prompt], most
            self.waiting.append(name)
            self.got[name] = []
            self.mine.add(name, prompt, most)

        def plan(self):
            self.told.append("schedule()")
            free = self.seats - len(self.running)
            self.running += self.waiting[:free]
            del self.waiting[:free]
            right = []
            for name in self.running:
                tokens = self.asked[name][1] + self.got[name]
                start = len(self.memory.setdefault(name, []))
                right.append((name, start, tokens[start:]))
            plan = self.mine.schedule()
            assert equal(plan, right), f"{self}: {right}, not {plan}"
            self.plans.append((plan, right))
            return right

        def update(self, plan):
            drawn, ends = {}, {}
            for name, _, tokens in plan:
                self.memory[name] += tokens
                drawn[name] = said(name, self.memory[name])
                self.got[name].append(drawn[name])
                _, prompt, most = self.asked[name]
                if len(self.got[name]) == most:
                    ends[name] = answer(name, prompt, most)
                    self.running.remove(name)
                    assert ends[name] == self.got[name]
            self.told.append(f"update({drawn})")
            got = self.mine.update(drawn)
            drawn.clear()
            assert equal(got, ends), f"{self}: {ends} end, not {got}"

        def abort(self, name):
            self.told.append(f"abort({name})")
            self.mine.abort(name)
            (self.running if name in self.running else self.waiting).remove(name)
            del self.memory[name], self.got[name]

        def start_over(self):
            self.told.append("start_over()")
            self.mine.start_over()
            self.waiting = self.running + self.waiting
            self.running, self.memory = [], {}

        def __str__(self):
            return f"one of two schedulers, seats={self.seats}; " + " ".join(self.told)

    for seed in range(120):
        random = Random(seed)
        two = [Story(random.randint(1, 4)) for _ in range(2)]
        for _ in range(6 + seed // 2):
            story = random.choice(two)
            here = story.running + story.waiting
            event = random.random()
            if event < 0.3 or not here:
                prompt = [random.randrange(50) for _ in range(random.randint(1, 5))]
                name = random.choice([f"r{len(story.asked)}", len(story.asked)])
                story.add(name, prompt, random.choice([1, random.randint(1, 6)]))
            elif event < 0.38:
                name = random.choice(here)
                story.memory.setdefault(name, [])
                story.abort(name)
            elif event < 0.46:
                if random.random() < 0.5:
                    story.plan()
                story.start_over()
            else:
                story.update(story.plan())
        for story in two:
            for name in {"nobody", *story.asked} - {*story.running, *story.waiting}:
                try:
                    story.mine.abort(name)
                except KeyError:
                    continue
                raise AssertionError(f"{story}: {name!r} is not there; abort: no KeyError")
            for plan, right in story.plans:
                assert equal(plan, right), f"{story}: a plan has changed since, to {plan}"
            for name, (prompt, kept, _) in story.asked.items():
                assert prompt == kept, f"the prompt of {name}, its caller's, was changed"


attempt(test_Scheduler10, Scheduler10)

# %% [markdown]
# ## What's next
#
# Everyone in a step waits until all of it is done. If a newcomer brings a book for a prompt, all who chat wait for the
# book. In chapter 11 a step gets a size, and prompts are cut: [chunked prefill](11_chunked_prefill.ipynb).
#
# ## Sources
#
# - Yu et al., *Orca: A Distributed Serving System for Transformer-Based Generative Models*, 2022: scheduling iteration
#   by iteration, and the flat batch ("selective batching").
# - Kwon et al., *Efficient Memory Management for Large Language Model Serving with PagedAttention*, 2023, section 4.5:
#   first come, first served. Its baseline FasterTransformer has static batches.
# - vLLM: `num_computed_tokens` instead of phases, and plans that go to the workers as plain data.
# - He et al., *Defeating Nondeterminism in LLM Inference*, Thinking Machines Lab, 2025: why a batch changes bits, and
#   kernels in which it doesn't.
