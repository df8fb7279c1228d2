"""The simulation of serving systems, compared with naive_serving.py: iteration by iteration, slot by slot."""

import doctest
import json
import math
import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from naive_serving import NaiveFasterTransformer, NaiveOrca, NaivePaged, moments, naive_holes

from minipaged.experiments import buddy, hardware, loads, paged, simulation, systems
from minipaged.experiments.buddy import Buddy, next_power
from minipaged.experiments.hardware import SERVERS
from minipaged.experiments.loads import LENGTHS, LONGEST_ANSWER, LONGEST_PROMPT, Job, TraceError, read_trace
from minipaged.experiments.paged import Paged
from minipaged.experiments.simulation import Outcome, simulate
from minipaged.experiments.systems import Account, FasterTransformer, Orca, Work

SMALL = 32  # takes the place of 2048 where slots are painted


@pytest.mark.parametrize(
    "module", [buddy, hardware, loads, paged, simulation, systems], ids=lambda module: module.__name__.split(".")[-1]
)
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


# --- the buddy allocator ----------------------------------------------------------------------------------------


@given(st.integers(1, 90), st.lists(st.integers(0, 40), max_size=60), st.randoms())
def test_the_buddy_allocator_against_a_painted_row(total, sizes, rng):
    memory, free, held = Buddy(total), [True] * total, []
    for size in sizes:  # 0: one is given back
        holes = naive_holes(free)
        assert memory.holes() == holes and memory.num_free == sum(free)
        if not size:
            give_back(memory, free, held, rng)
        elif piece := memory.allocate(size):
            start, slots = piece
            assert slots / 2 < size <= slots and start % slots == 0
            assert start == holes[min(hole for hole in holes if hole >= size)][0]  # the smallest that will do
            assert free[start : start + slots] == [True] * slots
            free[start : start + slots] = [False] * slots
            held.append(piece)
        else:
            assert not any(hole >= size for hole in holes)
    while held:
        give_back(memory, free, held, rng)
    assert memory.holes() == Buddy(total).holes() and memory.num_free == total


def give_back(memory, free, held, rng):
    if held:
        start, slots = piece = held.pop(rng.randrange(len(held)))
        memory.release(piece)
        free[start : start + slots] = [True] * slots


def test_the_buddy_allocator_stays_whole_over_a_long_time():
    rng, memory, held = random.Random(1), Buddy(1000), []
    for _ in range(20_000):
        if held and rng.random() < 0.5:
            memory.release(held.pop(rng.randrange(len(held))))
        elif piece := memory.allocate(rng.randint(1, 60)):
            held.append(piece)
            assert sum(slots for _, slots in held) + memory.num_free == 1000
    taken = [slot for start, slots in held for slot in range(start, start + slots)]
    assert len(taken) == len(set(taken))
    assert memory.holes() == naive_holes([slot not in taken for slot in range(1000)])
    for piece in held:
        memory.release(piece)
    assert memory.holes() == {8: [992], 32: [960], 64: [896], 128: [768], 256: [512], 512: [0]}


def test_buddy_refuses_an_empty_memory_and_rounds_up():
    with pytest.raises(ValueError, match="total=0: must be at least 1"):
        Buddy(0)
    assert [next_power(n) for n in (1, 2, 3, 4, 5, 1024, 1025)] == [1, 2, 4, 4, 8, 1024, 2048]


# --- loads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", LENGTHS)
def test_loads_have_the_means_of_the_paper_and_keep_the_limits(load):
    found = loads.jobs(load, 10.0, 2500.0, seed=3)
    assert 24_000 < len(found) < 26_000
    prompts, outputs = [job.prompt for job in found], [job.output for job in found]
    assert statistics.mean(prompts) == pytest.approx(LENGTHS[load].prompt, rel=0.02)
    assert statistics.mean(outputs) == pytest.approx(LENGTHS[load].output, rel=0.02)
    assert min(prompts) >= 1 and max(prompts) <= 1024
    assert min(outputs) >= 1 and max(job.prompt + job.output for job in found) <= 2048
    assert abs(statistics.correlation(prompts, outputs)) < 0.05


def test_means_are_those_of_figure_11():
    assert [(LENGTHS[load].prompt, LENGTHS[load].output) for load in ("sharegpt", "alpaca")] == [
        (161.31, 337.99), (19.31, 58.45),
    ]  # fmt: skip


def test_what_sharegpt_has_to_come_is_what_figure_2_says():
    outputs = [job.output for job in loads.jobs("sharegpt", 10.0, 4000.0, seed=5)]
    assert sum(o * o for o in outputs) / sum(outputs) / 2 == pytest.approx(299, rel=0.03)


def test_chats_are_long_and_cut():
    found = loads.jobs("chat", 10.0, 1000.0)
    prompts = [job.prompt for job in found]
    assert max(prompts) == LONGEST_PROMPT and max(job.output for job in found) <= LONGEST_ANSWER
    assert 0.4 < prompts.count(LONGEST_PROMPT) / len(prompts) < 0.8
    alone = sum(prompt < LONGEST_PROMPT for prompt in prompts) / len(prompts)
    assert alone > 1 / 4.5  # at least those that begin a chat


def test_a_seed_says_it_all_and_a_rate_only_hurries():
    slow, fast = loads.jobs("sharegpt", 0.5, 20_000, seed=4), loads.jobs("sharegpt", 8.0, 1250, seed=4)
    assert len(slow) == len(fast) > 2 * loads.CHUNK
    assert [job[1:] for job in slow] == [job[1:] for job in fast]
    assert [job.arrival for job in slow] == pytest.approx([16 * job.arrival for job in fast])
    assert slow == loads.jobs("sharegpt", 0.5, 20_000, seed=4)
    other = loads.jobs("sharegpt", 0.5, 20_000, seed=5)
    assert sum(a[1:] == b[1:] for a, b in zip(slow, other, strict=False)) < len(slow) / 100
    first, second = slow[: loads.CHUNK], slow[loads.CHUNK : 2 * loads.CHUNK]
    assert sum(a[1:] == b[1:] for a, b in zip(first, second, strict=True)) < loads.CHUNK / 100


@pytest.mark.parametrize("rate", [0.5, 20.0])
def test_arrivals_are_a_poisson_process(rate):
    seconds = 20_000 / rate
    times = [job.arrival for job in loads.jobs("alpaca", rate, seconds, seed=2)]
    assert times == sorted(times) and times[0] > 0 and times[-1] <= seconds
    assert len(times) == pytest.approx(20_000, abs=600)
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    assert statistics.mean(gaps) == pytest.approx(1 / rate, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / rate, rel=0.03)
    assert sum(gap > 1 / rate for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), rel=0.03)
    assert abs(statistics.correlation(gaps[1:], gaps[:-1])) < 0.03
    counts = [0] * 200
    for time in times:
        counts[min(199, int(time / seconds * 200))] += 1
    assert statistics.variance(counts) / statistics.mean(counts) == pytest.approx(1, abs=0.35)


def trace(tmp_path, *lines):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_traces_are_read(tmp_path):
    timed = trace(tmp_path, {"prompt": 3, "output": 5, "arrival": 0}, "", {"arrival": 1.5, "output": 2047, "prompt": 1})
    assert read_trace(timed) == [Job(0.0, 3, 5), Job(1.5, 1, 2047)]
    untimed = read_trace(trace(tmp_path, {"prompt": 3, "output": 5}, {"prompt": 4, "output": 1}))
    assert [job[1:] for job in untimed] == [(3, 5), (4, 1)] and all(job.arrival < 0 for job in untimed)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: "),
        ("[3, 5]", "line 2: an object"),
        ("null", "line 2: an object"),
        ({"prompt": 3}, "line 2: an object"),
        ({"prompt": 3, "output": 5, "arrivals": 1}, "line 2: unknown arrivals"),
        ({"prompt": 0, "output": 5}, "line 2: prompt must be a number of tokens from 1 on, not 0"),
        ({"prompt": 3, "output": -1}, "line 2: output must be a number of tokens from 1 on, not -1"),
        ({"prompt": 3.0, "output": 5}, "line 2: prompt must be a number of tokens from 1 on, not 3.0"),
        ({"prompt": True, "output": 5}, "line 2: prompt must be"),
        ({"prompt": "3", "output": 5}, 'line 2: prompt must be a number of tokens from 1 on, not "3"'),
        ({"prompt": 2000, "output": 49}, "line 2: prompt and output together have more than 2048"),
        ({"prompt": 3, "output": 5, "arrival": -1}, "line 2: arrival must be a number of seconds, not -1"),
        ({"prompt": 3, "output": 5, "arrival": None}, "line 2: arrival must be a number of seconds, not null"),
        ({"prompt": 3, "output": 5, "arrival": True}, "line 2: arrival must be"),
        ('{"prompt": 3, "output": 5, "arrival": NaN}', "line 2: arrival must be"),
        ('{"prompt": 3, "output": 5, "arrival": Infinity}', "line 2: arrival must be"),
        ({"prompt": 3, "output": 5}, "either all lines or none"),
        ({"prompt": 3, "output": 5, "arrival": 0.5}, "arrivals must not fall"),
    ],
)
def test_a_bad_trace_names_the_line(tmp_path, line, message):
    with pytest.raises(TraceError) as refused:
        read_trace(trace(tmp_path, {"prompt": 3, "output": 5, "arrival": 1}, line))
    assert message in str(refused.value) and "trace.jsonl" in str(refused.value)


def test_a_trace_of_nothing_is_refused(tmp_path):
    with pytest.raises(TraceError, match="no requests"):
        read_trace(trace(tmp_path, "", ""))


# --- hardware ---------------------------------------------------------------------------------------------------


def test_table_1():
    servers = [SERVERS[name] for name in ("13b", "66b", "175b")]
    assert [round(server.num_slots / 1000, 1) for server in servers] == [15.7, 9.6, 60.1]  # the paper prints 9.7K
    assert [server.num_slots for server in servers] == [15_728, 9_557, 60_074]
    assert SERVERS["13b"].kv_bytes == 819_200
    assert [server.weight_bytes / 1e9 for server in servers] == [26, 132, 346]


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
def test_more_work_takes_longer_and_more_gpus_less_long(server):
    doubled = replace(server, num_gpus=2 * server.num_gpus)
    times = [server.matrix_seconds(tokens) for tokens in (1, 64, 128, 256, 512, 1024, 4096)]
    assert times == sorted(times) and times[0] <= times[1] < times[-2] < times[-1]
    assert (times[0] == times[1]) == (server.weight_bits == 16)  # what takes long to read hides the arithmetic
    operations = 2 * (server.weight_bytes / (server.weight_bits / 8)) * 3072  # a product and a sum for each of them
    assert times[-1] - times[-2] == pytest.approx(operations / (server.num_gpus * server.gpu.peak * 0.6))
    reduces = server.layers * 2 * hardware.ALL_REDUCE * (server.num_gpus == 1)
    for tokens, seconds in zip((1, 1024), (times[0], times[-2]), strict=True):
        assert doubled.matrix_seconds(tokens) - reduces < seconds
    for size in (None, 1, 16):
        assert doubled.context_seconds(size) == pytest.approx(server.context_seconds(size) / 2)
    per_token = [server.context_seconds(size) for size in (1, 2, 16, 128, None)]
    assert per_token == sorted(per_token, reverse=True) and len(set(per_token)) == 5
    assert per_token[-1] == pytest.approx(server.kv_bytes / (server.num_gpus * server.gpu.bandwidth * 0.67))


SMALL_NUMBERS = ("13b", "13b-kv8", "13b-w4", "13b-w4-kv8")


def test_small_numbers_leave_room():
    """From OPT's config: 40 layers of 12 x 5120^2 weights and an embedding, which stays in fp16."""
    plain, cache, weights, both = (SERVERS[name] for name in SMALL_NUMBERS)
    embedding = 50_272 * 5_120
    groups = (13e9 - embedding) / 128
    size = groups * (128 * 4 + 16 + 4) / 8 + 2 * embedding
    assert weights.weight_bytes == both.weight_bytes == pytest.approx(size)
    assert weights.weight_bytes + weights.kv_memory == pytest.approx(26e9 + 12 * hardware.GIB, abs=1)
    assert 4.25 < weights.weight_bits < 4.5 and cache.weight_bytes == plain.weight_bytes
    assert cache.kv_bytes == both.kv_bytes == 2 * 40 * 40 * (128 + 4)
    assert weights.kv_bytes == plain.kv_bytes == 2 * 40 * 40 * 128 * 2
    assert [server.num_slots // 16 for server in (plain, cache, weights, both)] == [983, 1906, 2422, 4697]


def test_small_numbers_are_read_faster_and_multiplied_as_fast():
    plain, cache, weights, both = (SERVERS[name] for name in SMALL_NUMBERS)
    assert weights.reading_seconds() / plain.reading_seconds() == pytest.approx(weights.weight_bits / 16)
    assert weights.matrix_seconds(1) < plain.matrix_seconds(1) == cache.matrix_seconds(1)
    for tokens in (200, 1024):  # arithmetic is in fp16
        times = {server.matrix_seconds(tokens) for server in (plain, cache)}
        assert len(times) == 1 and both.matrix_seconds(tokens) == pytest.approx(times.pop())
    assert cache.context_seconds(None) / plain.context_seconds(None) == pytest.approx(132 / 256)
    assert cache.block_seconds(16) == plain.block_seconds(16)  # it waits as often
    moved = [server.swap_seconds(10, 16) for server in (plain, cache)]
    assert moved[0] - moved[1] == pytest.approx(10 * 16 * (plain.kv_bytes - cache.kv_bytes) / hardware.PCIE)


def test_where_arithmetic_begins_to_count_is_what_the_figure_says():
    from minipaged.experiments.figures.today import NOTES

    last = [max(n for n in range(1, 400) if SERVERS[name].matrix_seconds(n) == SERVERS[name].matrix_seconds(1))
            for name in ("13b", "13b-w4")]  # fmt: skip
    assert f"up to {last[0]} tokens a step, in four bits up to {last[1]}:" in " ".join(NOTES)


def test_weights_are_read_in_less_time_than_the_data_sheet_allows():
    for server in SERVERS.values():
        assert server.matrix_seconds(1) > server.weight_bytes / (server.num_gpus * server.gpu.bandwidth)
    assert 0.02 < SERVERS["13b"].matrix_seconds(1) < 0.04


def test_moving_larger_blocks_takes_less_time_for_the_same_tokens():
    server = SERVERS["13b"]
    times = [server.swap_seconds(1024 // size, size) for size in (1, 4, 16, 64, 256)]
    assert times == sorted(times, reverse=True)
    assert times[-1] > 1024 * server.kv_bytes / hardware.PCIE
    assert server.swap_seconds(6, 16) == pytest.approx(3 * server.swap_seconds(2, 16))
    more = server.swap_seconds(1, 32) - server.swap_seconds(1, 16)  # to start the copies takes as long
    assert more == pytest.approx(16 * server.kv_bytes / hardware.PCIE)
    assert server.swap_seconds(1, 16) > 2 * server.layers * 1e-6 + more
    shared = SERVERS["175b"]  # among eight
    more = shared.swap_seconds(1, 32) - shared.swap_seconds(1, 16)
    assert more == pytest.approx(16 * shared.kv_bytes / 8 / hardware.PCIE)


# --- systems against the naive ones ------------------------------------------------------------------------------


def come(draw, job, most=10):
    """Requests whose `arrival` is an iteration."""
    now, found = 0, []
    for _ in range(draw(st.integers(1, most))):
        now += draw(st.sampled_from([0, 0, 0, 1, 1, 2, 5, 20]))
        found.append(Job(now, *draw(job)))
    return found


@st.composite
def contiguous_loads(draw):
    lengths = st.integers(1, 16).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, SMALL - n)))
    return draw(st.integers(SMALL, 150)), come(draw, lengths)


def must_agree(fast, naive, jobs, but=()):
    """The same in every iteration, and every request is answered. Returns what happened."""
    expected, found = moments(naive, jobs), moments(fast, jobs)
    for number, (one, other) in enumerate(zip(expected, found, strict=False)):
        differ = [name for name, value in vars(one).items() if vars(other)[name] != value and name not in but]
        both = {name: (vars(one)[name], vars(other)[name]) for name in differ}
        assert not differ, f"iteration {number}, (naive, fast): {both}"
    assert len(expected) == len(found)
    assert sorted(job for one in found for job in one.done) == sorted(jobs)
    return expected


@pytest.mark.parametrize("reserve", ["max", "pow2", "oracle"])
@given(case=contiguous_loads(), samples=st.integers(1, 3))
def test_orca_is_as_the_naive_one(reserve, case, samples):
    num_slots, jobs = case
    num_slots = max(num_slots, samples * SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(systems, "LONGEST", SMALL)
        must_agree(Orca(num_slots, reserve, samples), NaiveOrca(num_slots, reserve, samples), jobs)


@given(case=contiguous_loads())
def test_faster_transformer_is_as_the_naive_one(case):
    num_slots, jobs = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(systems, "LONGEST", SMALL)
        must_agree(FasterTransformer(num_slots), NaiveFasterTransformer(num_slots), jobs)


@st.composite
def paged_loads(draw, prefixes, samples):
    """A memory that is too small as a rule, and requests of which each fits alone."""
    size, prefix, samples = draw(st.sampled_from([1, 2, 3, 4, 8, 16])), draw(prefixes), draw(samples)
    lengths = st.tuples(st.integers(1, 3 * size + 5).map(lambda n: prefix + n), st.integers(1, 6 * size + 6))
    jobs = come(draw, lengths)
    most = max(most_blocks(job, size, samples) for job in jobs)
    num_slots = (most + draw(st.sampled_from([0, 0, 1, 2, 5, 20, 120]))) * size + draw(st.integers(0, size - 1))
    modes = ["auto", "swap"] + ["recompute"] * (samples == 1)
    settings = {"block_size": size, "samples": samples, "prefix": prefix, "preemption": draw(st.sampled_from(modes))}
    return {"num_slots": num_slots, **settings}, jobs


def most_blocks(job, size, samples):
    shared = job.prompt // size
    return shared + samples * (math.ceil((job.prompt + job.output) / size) - shared)


@settings(max_examples=250)
@given(paged_loads(st.just(0), st.sampled_from([1, 1, 2, 3, 4])))
def test_paging_is_as_the_naive_one(case):
    arguments, jobs = case
    must_agree(Paged(**arguments), NaivePaged(**arguments), jobs)


# Blocks are published before they are full, so who was swapped out finds its last block, and moves one less.
@settings(max_examples=200)
@given(paged_loads(st.sampled_from([1, 5, 16, 17]), st.sampled_from([1, 1, 2, 3])))
@example(({"num_slots": 10, "block_size": 1, "samples": 2, "prefix": 1}, [Job(0, 2, 3)]))
@example(({"num_slots": 30, "block_size": 4, "prefix": 17}, [Job(0, 18, 2), Job(0, 20, 2)]))
@example(({"num_slots": 54, "block_size": 3, "prefix": 17}, [Job(0, 21, 18), Job(0, 21, 2), Job(7, 23, 11)]))
def test_paging_with_a_shared_prefix_is_as_the_naive_one(case):
    arguments, jobs = case
    must_agree(Paged(**arguments), NaivePaged(**arguments), jobs, but=["moved_blocks"])


def test_the_loads_above_reach_what_they_are_for():
    """Preemption by either means, often and far from the beginning, and returns."""
    rng, seen = random.Random(0), {"swap": 0, "recompute": 0}
    for mode in ("swap", "recompute"):
        for _ in range(20):
            jobs = [Job(i, rng.randint(1, 12), rng.randint(1, 30)) for i in range(8)]
            arguments = {"num_slots": 4 * rng.randint(12, 16), "block_size": 4, "preemption": mode}
            history = must_agree(Paged(**arguments), NaivePaged(**arguments), jobs)
            seen[mode] += history[-1].preemptions[mode]
    assert seen["swap"] > 40 and seen["recompute"] > 40


# --- the clock --------------------------------------------------------------------------------------------------


class OneByOne:
    """A system that plans one iteration at a time."""

    def __init__(self, system):
        self.system = system

    def __getattr__(self, name):
        return getattr(self.system, name)

    def plan(self):
        work = self.system.plan()
        return work and replace(work, iterations=1)


SERVER = SERVERS["13b"]


def small_server(num_slots):
    return replace(SERVER, kv_memory=num_slots * SERVER.kv_bytes)


SYSTEMS = {
    "ft": FasterTransformer,
    "max": lambda slots: Orca(slots, "max"),
    "pow2": lambda slots: Orca(slots, "pow2"),
    "oracle": lambda slots: Orca(slots, "oracle", 2),
    "paged": Paged,
    "samples": lambda slots: Paged(slots, samples=3),
    "swap": lambda slots: Paged(slots, 8, preemption="swap"),
    "prefix": lambda slots: Paged(slots, prefix=40),
}
MANY = [Job(job.arrival, job.prompt + 40, job.output) for job in loads.jobs("alpaca", 8.0, 40.0, seed=6)]


def must_be_alike(one: Outcome, other: Outcome):
    assert one.num_iterations == other.num_iterations
    assert one.ends == pytest.approx(other.ends, rel=1e-9)
    assert sorted(one.latencies) == pytest.approx(sorted(other.latencies), rel=1e-9)


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("num_slots", [2100, 20_000])
def test_strides_take_as_long_as_their_iterations(name, num_slots):
    """Where it is crowded, and where it is not; in the latter case the means agree too."""
    server = small_server(num_slots)
    strides = simulate(SYSTEMS[name](num_slots), MANY, server)
    steps = simulate(OneByOne(SYSTEMS[name](num_slots)), MANY, server)
    must_be_alike(strides, steps)
    assert len(strides.latencies) == len(MANY) and sum(strides.shares.values()) == pytest.approx(100)
    if num_slots == 20_000 and name not in ("ft", "max"):
        assert strides.mean_batch == pytest.approx(steps.mean_batch, rel=1e-9)
        assert strides.shares == pytest.approx(steps.shares, rel=1e-4)  # later iterations of a stride are longer


@pytest.mark.parametrize("samples", [1, 3])
def test_the_clock_agrees_with_one_token_at_a_time(samples):
    jobs = loads.jobs("alpaca", 4.0, 15.0, seed=8)
    server = small_server(1200)
    must_be_alike(
        simulate(Paged(1200, samples=samples), jobs, server), simulate(NaivePaged(1200, 16, samples), jobs, server)
    )


def test_one_request_alone_takes_what_the_roofline_says():
    job, size = Job(3.0, 100, 5), 16
    outcome = simulate(Paged(SERVER.num_slots), [job, Job(1000.0, 1, 1)], SERVER)
    matrices = SERVER.matrix_seconds(100) + 4 * SERVER.matrix_seconds(1)
    reading = SERVER.context_seconds(size) * (101 + 102 + 103 + 104)  # a prompt reads what it has just made
    seconds = matrices + reading + 5 * hardware.HOST_PER_REQUEST
    assert outcome.latencies[0] == pytest.approx(seconds / 5) and outcome.num_iterations == 6


def test_a_request_that_comes_during_a_stride_joins_at_the_next_iteration():
    step = SERVER.matrix_seconds(1) + hardware.HOST_PER_REQUEST  # a bit less than an iteration
    jobs = [Job(0.0, 1, 1000), Job(20.5 * step, 1, 1)]
    plans = []

    class Noted(OneByOne):
        def plan(self):
            plans.append(self.system.plan())
            return plans[-1]

    outcome = simulate(Noted(Orca(SERVER.num_slots, "oracle")), jobs, SERVER)
    assert [work.sequences for work in plans[:3]] == [1, 1, 2]
    assert outcome.latencies[0] < 2 * step  # what is left of the iteration under way, and its own


class Watched:
    """A system whose requests are told apart, and must have had an iteration for each token."""

    def __init__(self, system):
        self.system, self.clock = system, 0
        self.came, self.done = {}, []

    def __getattr__(self, name):
        return getattr(self.system, name)

    def submit(self, job):
        self.came[job] = self.clock
        self.system.submit(job)

    def finish(self, iterations):
        self.clock += iterations
        done = self.system.finish(iterations)
        assert all(self.clock - self.came[job] >= job.output for job in done)
        self.done += done
        return done


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("num_slots", [2100, 20_000])
def test_every_request_is_done_once_and_none_before_it_can_be(name, num_slots):
    system = Watched(SYSTEMS[name](num_slots))
    outcome = simulate(system, MANY, small_server(num_slots))
    assert sorted(system.done) == MANY and len(set(MANY)) == len(MANY)
    assert system.clock == outcome.num_iterations and system.num_running == system.num_waiting == 0
    step = SERVER.matrix_seconds(1) + hardware.HOST_PER_REQUEST
    assert min(outcome.latencies) > step and outcome.ends[-1] > MANY[-1].arrival


@given(st.floats(1e-4, 50), st.floats(1e-3, 0.1), st.just(0.0) | st.floats(1e-9, 1e-4))
def test_until_is_the_first_that_is_enough(seconds, first, growth):
    k, whole = simulation.until(seconds, first, growth), lambda k: k * first + growth * k * (k - 1) / 2
    assert k >= 1 and whole(k) >= seconds * (1 - 1e-6)
    assert k == 1 or whole(k - 1) < seconds * (1 + 1e-6)


def test_an_account_that_does_not_add_up_stops_the_simulation():
    class Lost(Orca):
        def account(self):
            right = super().account()
            return replace(right, external=right.external - (self.num_running > 3))

    with pytest.raises(AssertionError, match="15728 slots, but the account says"):
        simulate(Lost(SERVER.num_slots, "oracle"), MANY, SERVER)
    with pytest.raises(AssertionError):
        Account(5, -1, 0, 4).must_be(8)
    Account(5, 1, 0, 2).must_be(8)


class Fixed:
    """One job after the other, in iterations that are all as long."""

    block_size, num_waiting, num_running = None, 0, 1

    def __init__(self, moved_blocks=0):
        self.jobs, self.moved_blocks = [], moved_blocks

    def submit(self, job):
        self.jobs.append(job)

    def plan(self):
        return Work(self.jobs[0].output, 1, 1, 0, moved_blocks=self.moved_blocks) if self.jobs else None

    def finish(self, iterations):
        assert iterations == self.jobs[0].output
        return [self.jobs.pop(0)]

    def account(self):
        return Account(8, 0, 0, 0) if self.jobs[0].output == 1 else Account(0, 4, 2, 2)


def test_means_are_weighted_by_time():
    outcome = simulate(Fixed(), [Job(0.0, 1, 1), Job(0.0, 1, 3), Job(99.0, 1, 1)], small_server(8))
    assert outcome.mean_batch == pytest.approx(1)
    assert outcome.shares == pytest.approx({"tokens": 40, "reserved": 30, "internal": 15, "external": 15})


def test_blocks_are_moved_once_in_a_stride():
    [plain], [moving] = [simulate(Fixed(moved), [Job(0.0, 1, 50)], small_server(8)).latencies for moved in (0, 7)]
    assert 50 * (moving - plain) == pytest.approx(SERVER.swap_seconds(7, 1))
