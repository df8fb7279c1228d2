"""Goodput: engines under one clock against a scheduler that is asked for every token; the search; the figure."""

import doctest
import json
import math
import random
import re
import statistics
import sys
from dataclasses import replace

import pytest

from minipaged.experiments import __main__ as command
from minipaged.experiments import goodput
from minipaged.experiments.cluster import Cluster, Layout
from minipaged.experiments.figures import splits
from minipaged.experiments.figures.splits import Best, pays
from minipaged.experiments.goodput import RATIO, Found, Hopeless, Limits, Trial, arrivals, read_lengths, search
from minipaged.experiments.hardware import SERVERS
from minipaged.experiments.loads import Job, TraceError
from minipaged.experiments.machine import Machine
from minipaged.experiments.paged import NO_LIMIT
from minipaged.experiments.serving import BLOCK, MAX_SEQS, Ask
from minipaged.experiments.study import Settings, Study
from minipaged.memory import KVCacheManager
from minipaged.requests.request import Request
from minipaged.requests.sampling_params import SampledToken, SamplingParams
from minipaged.scheduling.plan import StepOutput
from minipaged.scheduling.scheduler import Scheduler

figure = sys.modules["minipaged.experiments.figures.goodput"]  # the package's own name is the function
MACHINE = Machine(SERVERS["llama"])


def with_blocks(num_blocks, **options):
    server = MACHINE.server
    return Machine(replace(server, kv_memory=num_blocks * BLOCK * server.kv_bytes), **options)


def some_jobs(seed, count, rate, prompt, output):
    rng, now, jobs = random.Random(seed), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        jobs.append(Job(now, *(max(1, round(rng.lognormvariate(math.log(mean), 1))) for mean in (prompt, output))))
    return jobs


def token_by_token(machine, jobs, budget, chunked=True, received=False):
    """One engine, asked at every step: when the first and the last token of each answer are there.

    received: the keys and values of all but the last token of a prompt are there when it arrives.
    """
    memory = KVCacheManager(machine.server.num_slots // BLOCK, BLOCK)
    scheduler = Scheduler(memory, min(MAX_SEQS, budget), budget, "recompute", chunked_prefill=chunked)
    coming, answering, again, times = list(enumerate(jobs)), {}, set(), {}
    now, preempted = 0.0, 0
    while coming or scheduler.has_unfinished:
        if not scheduler.has_unfinished:
            now = max(now, coming[0][1].arrival)
        while coming and coming[0][1].arrival <= now:
            number, job = coming.pop(0)
            scheduler.add(Request(str(number), number, [0] * job.prompt, SamplingParams(), job.output + 1))
        plan = scheduler.schedule()
        preempted += len(plan.preempted)
        for name, _ in plan.preempted:
            answering.pop(name, None)
            again.add(name)
        tokens = context = pairs = 0
        for s in plan.sequences:
            n, start = len(s.token_ids), s.start
            if received and s.request_id not in answering and s.request_id not in again:
                n, start = 1, start + n - 1
            tokens, context = tokens + n, context + start
            pairs += 0 if s.request_id in answering else n * (2 * start + n) // 2
        now += machine.seconds(tokens, len(plan.sequences), context, pairs)
        drawn = [s for s in plan.sequences if s.draw]
        scheduler.update(plan, StepOutput({s.seq_id: [[SampledToken(0)]] for s in drawn}))
        memory.check()
        for s in drawn:
            seq, job = scheduler.sequences[s.seq_id], jobs[int(s.request_id)]
            answering[s.request_id] = seq
            times.setdefault(s.request_id, [now, now])[1] = now
            if len(seq.output_token_ids) == job.output:
                (request,) = (r for r in scheduler.running if r.request_id == s.request_id)
                scheduler.finish(request, seq, "length")
                del answering[s.request_id]
    return [tuple(times[str(number)]) for number in range(len(jobs))], preempted


@pytest.mark.parametrize(
    ("budget", "chunked", "num_blocks", "prompt", "output"),
    [(256, True, 3000, 300, 60), (300, True, 3000, 900, 100), (2**17, False, 3000, 400, 80), (256, True, 30, 200, 200),
     (2**17, False, 30, 200, 200), (512, False, 3000, 300, 100)],
)  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
def test_an_engine_is_the_scheduler_asked_for_every_token(budget, chunked, num_blocks, prompt, output, seed):
    machine = with_blocks(num_blocks)
    jobs = some_jobs(seed, 60, 12.0 if num_blocks > 100 else 4.0, prompt, output)
    jobs = [job._replace(prompt=min(job.prompt, 3000), output=min(job.output, 1000)) for job in jobs]
    wanted, preempted = token_by_token(machine, jobs, budget, chunked)
    found = Cluster(Layout(together=1, budget=budget, chunked=chunked), machine).run(jobs)
    assert [(ask.first, ask.last) for ask in found] == [pytest.approx(one, rel=1e-9) for one in wanted]
    assert (preempted > 0) == (num_blocks == 30)


@pytest.mark.parametrize("num_blocks", [3000, 20])
@pytest.mark.parametrize("seed", range(2))
def test_a_split_is_two_engines_and_a_link(num_blocks, seed):
    """The rest of each answer, by a scheduler that is asked for every token, and gets prompts as they arrive."""
    prompts, rest = with_blocks(3000, link=5e9), with_blocks(num_blocks, link=5e9)
    jobs = some_jobs(seed, 40, 6.0, 300, 150)
    jobs = [job._replace(prompt=min(job.prompt, 2000), output=2 + min(job.output, 600)) for job in jobs]
    cluster = Cluster(Layout(prompts=1, rest=1, budget=512), prompts)
    cluster.backs = Layout(prompts=1, rest=1).build(rest)[1]
    found = cluster.run(jobs)
    firsts, _ = token_by_token(prompts, [job._replace(output=1) for job in jobs], 512)
    assert [ask.first for ask in found] == [pytest.approx(first, rel=1e-9) for first, _ in firsts]
    arrivals, free = {}, 0.0
    for ask in sorted(found, key=lambda ask: (ask.first, ask.job.arrival)):  # one after another over the link
        free = max(free, ask.first) + 1e-4 + ask.job.prompt * 131_072 / 5e9
        arrivals[id(ask)] = Job(free, ask.job.prompt + 1, ask.job.output - 1)
    order = sorted(found, key=lambda ask: arrivals[id(ask)].arrival)
    wanted, preempted = token_by_token(rest, [arrivals[id(ask)] for ask in order], NO_LIMIT, received=True)
    assert [ask.last for ask in order] == [pytest.approx(last, rel=1e-9) for _, last in wanted]
    assert (preempted > 0) == (num_blocks == 20)


def test_one_request_alone_takes_what_the_data_sheet_says():
    server, prompt = MACHINE.server, 3000
    (ask,) = Cluster(Layout(together=1, budget=2000), MACHINE).run([Job(5.0, prompt, 3)])
    peak, bandwidth = 0.6 * 989e12, 0.67 * 3350e9
    fixed, reading = 1e-3 + 10e-6, 16.1e9 / bandwidth
    chunks = [2000 * 16.1e9 / peak, 1000 * 16.1e9 / peak]  # two bytes a parameter, two operations
    pairs = (2000**2 / 2 + 1000 * (2000 + 500)) * 4 * 32 * 32 * 128 / peak
    read = server.context_seconds(16)
    first = 2 * fixed + sum(chunks) + pairs + 2000 * read
    assert ask.ttft == pytest.approx(first)
    assert ask.tpot == pytest.approx(fixed + reading + (3000 + 3001) / 2 * read)
    slow = replace(MACHINE, overlap=False)
    (other,) = Cluster(Layout(together=1, budget=2000), slow).run([Job(5.0, prompt, 3)])
    assert other.ttft - ask.ttft == pytest.approx(2 * reading)
    (moved,) = Cluster(Layout(prompts=1, rest=1, budget=2000), replace(MACHINE, link=1e9)).run([Job(5.0, prompt, 3)])
    assert moved.ttft == pytest.approx(ask.ttft)
    anew = prompt * 4 * 32 * 32 * 128 / peak  # of its own first token the products with all keys are counted
    assert moved.last - ask.last == pytest.approx(1e-4 + prompt * server.kv_bytes / 1e9 + anew)


def test_requests_go_to_the_engine_with_the_shortest_prompts():
    jobs = [Job(0.0, prompt, 2) for prompt in (1000, 100, 100, 700, 200)]
    cluster = Cluster(Layout(together=2, budget=256), MACHINE)
    order = []
    for engine in cluster.fronts:
        engine.submit = lambda ask, engine=engine, submit=engine.submit: (order.append(engine), submit(ask))
    cluster.run(jobs)
    assert [cluster.fronts.index(engine) for engine in order] == [0, 1, 1, 1, 1]
    assert [engine.load for engine in cluster.fronts] == [0, 0]


def test_who_can_never_fit_is_refused():
    with pytest.raises(ValueError, match="the pool has 4"):
        Cluster(Layout(together=1), with_blocks(4)).run([Job(0.0, 4 * BLOCK, 2)])


# --- limits and the search ------------------------------------------------------------------------------------------


def test_both_limits_count():
    asks = [Ask(Job(1.0, 10, 11), 1.0 + ttft, 1.0 + ttft + 10 * tpot) for ttft, tpot in
            ((0.1, 0.01), (0.3, 0.01), (0.1, 0.03), (0.2, 0.02))]  # fmt: skip
    assert Limits(0.25, 0.025).kept(asks) == 0.5 and Limits(1, 1).kept(asks) == 1 and Limits(1, 1).kept([]) == 0
    assert Ask(Job(1.0, 10, 1), 2.0, 2.0).tpot == 0


class Made(Trial):
    """Its tokens take as many milliseconds as it gets requests a second, but none at rates within `odd`."""

    odd = (0.0, 0.0)

    def asks(self, rate, limits):
        self.asked.append(rate)
        low, high = self.odd
        return [Ask(Job(0.0, 1, 2), 0.1, 0.1 + (0.0 if low < rate < high else rate / 1000))]


def made(odd=(0.0, 0.0)):
    trial = Made("code", Layout(together=1), MACHINE)
    for name, value in (("asked", []), ("odd", odd)):
        object.__setattr__(trial, name, value)
    return trial


def test_the_search_finds_the_highest_rate_of_each_limit():
    trial, highest = made(), (20.0, 4.0, 2.0)
    found = search(trial, [Limits(1.0, rate / 1000) for rate in (*highest, 1e-6)])
    for rate, limit in zip(found.rates, highest, strict=False):
        assert rate <= limit < rate * RATIO * (1 + 1e-9)
    assert found.rates[3] == 0 and found.runs == len(trial.asked) < 25


def test_the_highest_rate_counts_that_was_tried():
    """The first limit has 1.55 a second tried, at which all tokens come at once; so the second looks above it."""
    found = search(made(odd=(1.4, 1.7)), [Limits(1.0, 0.02), Limits(1.0, 0.0001)])
    assert 1.7 / RATIO < found.rates[1] < 1.7


@pytest.mark.parametrize("layout", [Layout(together=2), Layout(prompts=1, rest=1)])
def test_faster_requests_miss_more(layout):
    trial, limits = Trial("code", layout, MACHINE, 1, 1.0, 300), Limits(0.5, 0.02)
    shares = [limits.kept(trial.asks(rate, Limits(1e9, 1e9))) for rate in (1, 4, 8, 16, 32, 64)]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.95 and shares[-1] < 0.5


def test_a_run_that_is_given_up_changes_nothing(monkeypatch):
    trial = Trial("code", Layout(together=2, budget=512), MACHINE, 0, 1.0, 60)
    limits = [Limits(0.3, 0.02), Limits(0.3, 0.012)]
    found = search(trial, limits)
    monkeypatch.setattr(Hopeless, "__call__", lambda self, ask: False)
    assert search(trial, limits) == found and found.rates[0] > found.rates[1] > 0


def test_a_run_is_hopeless_once_too_many_have_missed_a_limit():
    jobs = [Job(float(i), 10, 3) for i in range(12)]
    hopeless = Hopeless(Limits(0.5, 0.1), jobs[1:11])  # of ten one may

    def told(place, first, last=0.0):
        return hopeless(Ask(jobs[place], place + first, place + last if last else 0.0))

    assert not told(1, 0.6) and not told(1, 0.6, 1.0) and not told(2, 0.4) and not told(2, 0.4, 0.5)
    assert not told(0, 9.0) and not told(11, 9.0)  # these don't count
    assert told(3, 0.4, 0.7) and hopeless.certain


def test_a_search_is_kept_by_all_its_inputs(tmp_path, monkeypatch):
    trial, limits = Trial("code", Layout(together=1), MACHINE, 0, 0.1, 20), [Limits(0.3, 0.02)]
    first = search(trial, limits, tmp_path)
    monkeypatch.setattr(goodput, "_search", None)
    assert search(trial, limits, tmp_path) == first
    for other in (replace(trial, seed=1), replace(trial, machine=replace(MACHINE, link=1.0))):
        with pytest.raises(TypeError):
            search(other, limits, tmp_path)


def test_loads_have_their_means_and_are_the_same_at_every_rate():
    slow, fast = arrivals("conversation", 1.0, 4000, 3), arrivals("conversation", 4.0, 4000, 3)
    assert [job[1:] for job in slow] == [job[1:] for job in fast] and slow[-1].arrival == 4 * fast[-1].arrival
    assert statistics.mean(job.prompt for job in slow) == pytest.approx(1155, rel=0.05)
    assert statistics.mean(job.output for job in slow) == pytest.approx(211, rel=0.05)
    assert slow[-1].arrival == pytest.approx(4000, rel=0.05)
    assert arrivals("code", 1.0, 10, 3) == arrivals("code", 1.0, 20, 3)[:10]


# --- the figure -----------------------------------------------------------------------------------------------------

CSV = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,374,44\n2023-11-16 18:15:50,4808,10\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "line 1: columns ContextTokens and GeneratedTokens are wanted, not none"),
        (b"a,b\n1,2\n", "line 1: columns ContextTokens and GeneratedTokens are wanted, not a, b"),
        (b"\xff\xfe", "is no text"),
        (CSV.splitlines()[0].encode(), "no requests"),
        (CSV.encode() + b"x,0,4\n", "line 4: tokens from 1 to 32768 are wanted, not 0, 4"),
        (CSV.encode() + b"x,12\n", "line 4: tokens"),
    ],
)  # fmt: skip
def test_a_bad_trace_is_named_by_its_line(content, words, tmp_path, capsys):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(TraceError, match=re.escape(words)):
        read_lengths(tmp_path / "t.csv")
    with pytest.raises(SystemExit) as end:
        command.main(["goodput", "--trace", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out")])
    assert end.value.code == 2 and words in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.fixture
def small(monkeypatch):
    for name, value in dict(TPOT=(0.1, 0.02), LINKS=(450e9, 1e7), LENGTHS=(500, 2000), SECONDS=0.1, COUNT=8,
                            TTFT={"conversation": 0.5, "code": 0.5, "long": 2}).items():  # fmt: skip
        monkeypatch.setattr(figure, name, value)


def test_the_figure(small, tmp_path):
    with Study(Settings(workers=1)) as study:
        report = figure.goodput(study)
    assert {file.suffix for file in report.write(tmp_path)} == {".txt", ".json", ".png", ".svg"}
    assert max(map(len, report.text().splitlines())) <= 110
    assert [table.title.split(":")[0] for table in report.tables] == [
        "conversation", "code", "long", "By mean prompt", "By link, conversation", "Constants turned",
    ]  # fmt: skip
    split = report.data["by link"]["split"]
    assert split[1]["rates"] < split[0]["rates"]  # a slow link
    text = report.text()
    assert "code: Splitting pays, by TPOT limit: against whole prompts" in text and "nan" not in text
    json.dumps(report.data)


def test_the_figure_of_a_trace(small, tmp_path, capsys, monkeypatch):
    (tmp_path / "azure.csv").write_text(CSV)
    monkeypatch.chdir(tmp_path)
    assert command.main(["goodput", "--trace", "azure.csv", "--quick", "--no-cache", "--jobs", "1"]) == 0
    assert "azure.csv: requests a second for each GPU, TTFT 0.5 s" in capsys.readouterr().out
    assert (tmp_path / "results" / "goodput.png").stat().st_size


def test_where_splitting_pays_is_computed():
    def curve(*rates):
        return [Best(Layout(together=1), [rate]) for rate in rates]

    curves = {"whole": curve(4, 2, 1, 0), "chunks": curve(4, 4, 4, 4), "split": curve(2, 2, 4, 1)}
    assert pays("limit", [80.0, 40.0, 20.0, 10.0], curves, "{:.3g} ms") == (
        "Splitting pays, by limit: against whole prompts from 40 ms to 10 ms (at most the others take none); "
        "against the best chunks nowhere (at most 1.00x at 20 ms)."
    )
    assert doctest.testmod(splits).failed == 0


def test_of_several_layouts_the_best_mean_counts():
    one, two = Layout(prompts=1, rest=3), Layout(prompts=2, rest=2)
    found = {one: [Found([1.0, 5.0], 1), Found([3.0, 1.0], 1)], two: [Found([2.5, 2.0], 1)] * 2}
    assert figure.best(found, 0) == Best(two, [2.5, 2.5]) and figure.best(found, 1) == Best(one, [5.0, 1.0])
