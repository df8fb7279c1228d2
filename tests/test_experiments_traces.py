"""Real traces in a few numbers, and capacities that are priced after they were recorded."""

import json
import random
import statistics
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from minipaged.experiments import hardware, loads, traces
from minipaged.experiments.capacity import Bag, price, record, without_holes
from minipaged.experiments.hardware import SERVERS
from minipaged.experiments.loads import Job, TraceError
from minipaged.experiments.paged import Paged
from minipaged.experiments.simulation import simulate
from minipaged.experiments.systems import Orca, kept
from minipaged.experiments.traces import GROUPS, LEVELS, Summary, summarize

# --- what is kept of a trace ----------------------------------------------------------------------------------------


def azure(tmp_path, requests):
    lines = [f"2023-11-16 18:{15 + int(t // 60):02}:{t % 60:010.7f},{p},{o}" for t, p, o in requests]
    path = tmp_path / "azure.csv"
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    return path


def some_requests(seed, count=4000, minutes=10):
    rng = random.Random(seed)
    times = sorted(rng.uniform(0, 60 * minutes) for _ in range(count))
    drawn = []
    for when in times:
        prompt = max(1, round(rng.lognormvariate(6, 1.1)))
        drawn.append(Job(when, prompt, max(1, round(prompt / 20 + rng.lognormvariate(3, 1)))))
    return drawn


def test_drawn_requests_are_like_those_of_the_trace():
    true = some_requests(1)
    drawn = summarize(true).jobs(10.0, 1000.0, seed=3)
    assert len(drawn) == pytest.approx(10_000, rel=0.05)
    for part in ("prompt", "output"):
        a, b = ([getattr(job, part) for job in jobs] for jobs in (true, drawn))
        assert statistics.mean(b) == pytest.approx(statistics.mean(a), rel=0.06)
        assert np.quantile(b, LEVELS[2:-2]) == pytest.approx(np.quantile(a, LEVELS[2:-2]), rel=0.1, abs=2)
    short = statistics.median(job.prompt for job in true)
    for jobs in (true, drawn):  # long prompts have long answers in both
        high = [job.output for job in jobs if job.prompt > short]
        low = [job.output for job in jobs if job.prompt <= short]
        assert statistics.mean(high) > 1.5 * statistics.mean(low)


def test_requests_come_evenly_or_as_they_came():
    summary = Summary(100, [5] * len(LEVELS), [[7] * len(LEVELS)] * GROUPS, [0, 10, 30, 0])
    even, uneven = summary.jobs(5.0, 400.0), summary.jobs(5.0, 400.0, rhythm=True)
    assert [job[1:] for job in even] == [job[1:] for job in uneven] and {job[1:] for job in even} == {(5, 7)}
    counts = np.bincount([int(job.arrival // 100) for job in uneven], minlength=4)
    assert counts[0] == counts[3] == 0 and counts[2] == pytest.approx(3 * counts[1], rel=0.2)
    assert [job.arrival for job in uneven] == sorted(job.arrival for job in uneven)
    counts = np.bincount([int(job.arrival // 100) for job in even], minlength=4)
    assert min(counts) > 400 and max(counts) < 600
    assert summary.jobs(5.0, 400.0) == even and summary.jobs(5.0, 400.0, seed=1) != even


def test_minutes_are_whole_ones():
    jobs = [Job(when, 1, 1) for when in (30, 31, 89.9, 90, 150, 200)]
    assert summarize(jobs).minutes == [3, 1] and summarize(jobs).requests == 6
    assert summarize(jobs[:4]).minutes == [3]
    with pytest.raises(TraceError, match="3 requests are too few"):
        summarize(jobs[:3])


def test_the_command_reads_both_formats(tmp_path):
    requests = [(0.5, 100, 7), (61.25, 300, 9), (90.0, 200, 3), (130.0, 100, 8)]
    path = azure(tmp_path, requests)
    moon = tmp_path / "moon.jsonl"
    moon.write_text("".join(
        json.dumps({"timestamp": 1e3 * t, "input_length": p, "output_length": o, "hash_ids": [0]}) + "\n"
        for t, p, o in requests
    ))  # fmt: skip
    command = [sys.executable, "-m", "minipaged.experiments.traces", str(path), str(moon)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    first, second = map(json.loads, lines)
    assert first == second and first["requests"] == 4 and first["minutes"] == [1, 2]
    assert first["prompts"][0] == 100 and first["prompts"][-1] == 300
    summary = Summary(**first)
    assert {job.prompt for job in summary.jobs(10, 10)} <= set(range(100, 301))


HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.mark.parametrize(
    "text", ["", "TIMESTAMP,x\n", HEAD, HEAD + "yesterday,1,2\n", HEAD + "2023-11-16 18:15:46.6,0,2\n", "{}\n"]
)
def test_bad_files_are_named(text, tmp_path, capsys):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match="trace.csv"):
        traces.read(path)
    assert traces.main([str(path)]) == 2 and "trace.csv" in capsys.readouterr().err
    assert traces.main([str(tmp_path / "none")]) == 2 and traces.main([]) == 2 and traces.main(["--help"]) == 0


def test_what_is_committed_is_small_and_says_where_it_is_from():
    assert traces.FILE.stat().st_size < 6000
    told = json.loads(traces.FILE.read_text())["traces"]
    assert list(told) == list(traces.known()) == ["azure-conversation", "azure-code", "mooncake"]
    assert all(one["source"] and one["licence"] in ("CC-BY 4.0", "Apache 2.0") for one in told.values())
    for one in traces.known().values():
        assert len(one.answers) == GROUPS and all(len(row) == len(LEVELS) for row in (one.prompts, *one.answers))
        assert all(row == sorted(row) and row[0] >= 1 for row in (one.prompts, *one.answers))
        assert 0.97 * one.requests < sum(one.minutes) <= one.requests


# --- recorded, and priced -------------------------------------------------------------------------------------------


def crowd(seed, count=150):
    return [job._replace(arrival=0.0) for job in loads.jobs("sharegpt", 1.0, 2.0 * count, seed)][:count]


@pytest.mark.parametrize("build", [
    lambda slots: Orca(slots, "max"), lambda slots: Orca(slots, "oracle"), Paged, without_holes,
    lambda slots: Paged(slots, 32, samples=2),
])  # fmt: skip
def test_the_price_is_what_the_clock_says(build, monkeypatch):
    server, jobs = replace(SERVERS["13b"], kv_memory=6000 * SERVERS["13b"].kv_bytes), crowd(1)
    served = record(build(server.num_slots), jobs)
    assert price(served, server) == pytest.approx(simulate(build(server.num_slots), jobs, server).throughput)
    monkeypatch.setattr(hardware, "REACHED_BANDWIDTH", 0.3)
    assert price(served, server) == pytest.approx(simulate(build(server.num_slots), jobs, server).throughput)
    assert price(served, server, attention=2.0) < price(served, server) < price(served, server, host=0.0)


def test_who_never_fits_is_said():
    with pytest.raises(AssertionError, match="2 requests can never fit"):
        record(Orca(1000, "max"), crowd(0, 2))


def test_without_holes_everything_fits_that_the_numbers_allow():
    system, jobs = without_holes(3000), crowd(4)
    for job in jobs:
        system.submit(job)
    while system.plan() is not None:
        free = 3000 - sum(kept(one.job) for _, _, one in system._running)
        assert system._memory.num_free == free
        assert not system._waiting or kept(system._waiting[0]) > free
        system.account().must_be(3000)
        system.finish(1)
    bag = Bag(5)
    assert bag.allocate(6) is None and bag.num_free == 5

