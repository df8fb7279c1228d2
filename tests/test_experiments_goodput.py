"""Goodput: engines under one clock against a scheduler that is asked for every token; the search; the figure."""

import math
import random
from dataclasses import replace

import pytest

from minipaged.experiments.cluster import Cluster, Layout
from minipaged.experiments.hardware import SERVERS
from minipaged.experiments.loads import Job
from minipaged.experiments.machine import Machine
from minipaged.experiments.serving import BLOCK, MAX_SEQS
from minipaged.memory import KVCacheManager
from minipaged.requests.request import Request
from minipaged.requests.sampling_params import SampledToken, SamplingParams
from minipaged.scheduling.plan import StepOutput
from minipaged.scheduling.scheduler import Scheduler

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
