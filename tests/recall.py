"""The recall model: scheduler and memory put to the test on random schedules, with a model that only remembers.

`run(seed)` makes up a schedule (arrivals, samples, beams, stops, aborts, prompts that begin like others or go on
where others ended, tenants, caches, chunks, a pool as small as can be), steps through it with the runner of
recall_model.py in the place of the real one, checks every plan on its way, and compares every output with what it
should be. A seed that fails says how to see it happen:

    python -m tests.recall --seed 123 --verbose
    python -m tests.recall --seeds 0 1000000          look for one that fails
"""

import argparse
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from minipaged.memory import PREFIX_CACHES, Allocated, KVCacheManager
from minipaged.requests.beam_search_params import BeamSearchParams
from minipaged.requests.request import Request, RequestRefused
from minipaged.requests.sampling_params import SamplingParams
from minipaged.requests.sequence import Sequence
from minipaged.scheduling import queues
from minipaged.scheduling.admission import SCHEDULES
from minipaged.scheduling.plan import StepOutput, StepPlan
from minipaged.scheduling.scheduler import Scheduler
from minipaged.scheduling.speculation import Speculation
from minipaged.scheduling.transfer import Transfers
from minipaged.scheduling.undo import Note
from tests.recall_model import CUT, END, STOP, WORD, Drafter, RecallRunner, expected, expected_search

# --- a random schedule ----------------------------------------------------------------------------------------


@dataclass
class Scenario:
    """Everything that a schedule is made of, drawn from one seed."""

    memory: dict[str, Any]
    cache: str
    scheduler: dict[str, Any]
    requests: list[Request]
    arrivals: list[int]  # the step before which each request is added
    aborts: dict[int, list[Request]] = field(default_factory=dict)  # by the step before which it happens
    doomed: list[Request] = field(default_factory=list)  # aborted as soon as they are swapped out
    resets: list[int] = field(default_factory=list)  # steps before which the prefix cache is reset
    failures: list[int] = field(default_factory=list)  # steps in which the runner fails
    patience: int = 16
    drafter: Drafter | None = None
    guesses: dict[str, Any] | None = None  # how speculation is set up; None: there is none
    runner_guesses: bool = False  # else the scheduler asks


def random_prompt(rng: random.Random, length: int, earlier: list[Request]) -> list[int]:
    """New words; or an earlier prompt, or a part of it, or with its answer as in the next turn of a chat, and words."""
    words = [rng.randint(WORD, 1_000_000) for _ in range(length)]
    if not earlier or rng.random() < 0.3:
        return words
    like = rng.choice(earlier)
    begin = like.prompt_token_ids
    match rng.choice(["same", "same and more", "a part", "next turn"]):
        case "same":
            return begin
        case "a part":
            begin = begin[: rng.randint(1, len(begin))]
        case "next turn" if not like.search:
            begin = begin + expected(like)[0][0]
    return (begin + words[: rng.randint(1, length)])[: 3 * length + 8]


def random_request(rng: random.Random, index: int, longest: int, widest: int, earlier: list[Request]) -> Request:
    length = rng.randint(1, rng.choice([4, longest]))
    limit = rng.choice([rng.randint(1, 4), rng.randint(1, longest), longest])
    stops = rng.choice([None, [STOP], [STOP, 77]])
    common: dict[str, Any] = {"max_tokens": limit, "stop_token_ids": stops, "ignore_eos": rng.random() < 0.5}
    params: SamplingParams | BeamSearchParams
    if rng.random() < 0.3:
        early = rng.choice([False, True, "never"])
        params = BeamSearchParams(rng.randint(1, widest), **common, early_stopping=early)
    else:
        n = rng.choice([1, rng.randint(1, widest)])
        params = SamplingParams(n=n, **common, min_tokens=rng.choice([0, 0, rng.randint(0, limit)]))
    prompt = random_prompt(rng, length, earlier)
    salt = rng.choice([None, None, None, "a", "b"])
    seed = rng.getrandbits(31)
    return Request(f"r{index}", index, prompt, params, limit, frozenset({END}), seed, cache_salt=salt)


def scenario(seed: int) -> Scenario:
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 3, 4, 8, 16])
    harsh = rng.random() < 0.4  # wide requests that all want the smallest pool, and steps that can do little
    longest, widest = (12, rng.randint(2, 4)) if harsh else (rng.choice([6, 12, 24]), rng.choice([1, 2, 4, 6]))
    number = 6 if harsh else rng.choice([1, 4, 8])
    requests: list[Request] = []
    for index in range(number):
        requests.append(random_request(rng, index, longest, widest, requests))
    spread = rng.choice([0, 3, 20])
    arrivals = sorted(rng.randint(0, spread) for _ in requests)
    need = max(r.most_blocks(block_size) for r in requests)
    num_blocks = need + (rng.choice([0, 0, 1, rng.randint(0, need), 4 * need]) if not harsh else 0)
    max_num_seqs = max(r.width for r in requests) + rng.choice([0, 4, 16] if not harsh else [6])
    result = Scenario(
        memory={
            "num_blocks": num_blocks,
            "block_size": block_size,
            "num_cpu_blocks": rng.choice([0, rng.randint(0, num_blocks), num_blocks, 3 * num_blocks]),
            "free_order": rng.sample(range(num_blocks), num_blocks),
        },
        cache=rng.choice(list(PREFIX_CACHES)),
        scheduler={
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_seqs + rng.choice([0, 1, 4] if harsh else [0, 1, 4, 16, 60]),
            "preemption": rng.choice(["auto", "recompute", "swap"]),
            "watermark": 0.0 if harsh else rng.choice([0.0, 0.01, 0.2, 0.7]),
            "schedule": rng.choice(SCHEDULES),
            "chunked_prefill": rng.random() < 0.7,
        },
        requests=requests,
        arrivals=arrivals,
    )
    for request, arrival in zip(requests, arrivals, strict=True):
        if rng.random() < 0.2:
            result.aborts.setdefault(arrival + rng.randint(0, 25), []).append(request)
        elif rng.random() < 0.25:
            result.doomed.append(request)
    if rng.random() < 0.2:
        result.resets = [rng.randint(1, 15) for _ in range(rng.choice([2, 10]))]
    if rng.random() < 0.1:
        result.failures = [rng.randint(1, 20) for _ in range(3)]
    result.patience = rng.choice([0, 1, 2, 16])
    if rng.random() < 0.6:
        result.drafter = Drafter(rng.choice([0, 0.5, 0.8, 1, 1]), random.Random(seed), requests)
        result.runner_guesses = rng.random() < 0.4
        result.guesses = {
            "num_speculative_tokens": rng.randint(1, 8),
            "num_branches": rng.choice([1, 1, 2, 3, 4]),
            "free_rows": rng.choice([4, 24, 1000]),
            "cost": rng.choice([0, 0.1]),
            "adaptive": rng.random() < 0.5,
        }
        result.scheduler["max_num_batched_tokens"] += rng.choice([0, 0, 5, 40])
    return result


# --- running it -----------------------------------------------------------------------------------------------


class Run:
    """One schedule, step by step. Counts what happened in `seen`."""

    def __init__(self, given: Scenario, verbose: bool = False, transfers: Transfers | None = None):
        self.given, self.verbose = given, verbose
        index = PREFIX_CACHES[given.cache]
        cache = index(given.memory["block_size"]) if index else None
        self.memory = KVCacheManager(**given.memory, cache=cache)
        speculation = None
        if given.guesses:
            speculation = Speculation(**given.guesses, proposer=None if given.runner_guesses else given.drafter)
        self.scheduler = Scheduler(self.memory, **given.scheduler, speculation=speculation, transfers=transfers)
        self.scheduler.admission.patience = given.patience
        sizes = (given.memory["num_blocks"], given.memory["block_size"], given.memory["num_cpu_blocks"])
        self.runner = RecallRunner(*sizes, given.drafter)
        self.seen: Counter[str] = Counter()
        self.aborted: set[str] = set()
        self.failed: set[str] = set()  # whose blocks could not be had from another engine: they ended, or
        self.came_back: set[str] = set()  # wait to be computed here
        self.tenants: dict[int, str | None] = {}  # whose tokens were written to a block, by salt
        self.plans: list[StepPlan] = []
        self.outdated: set[int] = set()  # sequences whose tokens were computed before a reset

    def run(self) -> Counter[str]:
        pending = list(zip(self.given.arrivals, self.given.requests, strict=True))
        work = sum(len(r.prompt_token_ids) + r.width * r.max_tokens for r in self.given.requests)
        clock = 0
        while pending or self.scheduler.has_unfinished:
            while pending and pending[0][0] <= clock:
                self.add(pending.pop(0)[1])
            for request in self.given.aborts.pop(clock, []):
                self.abort(request)
            for request in [r for r in self.given.doomed if r in self.scheduler.swapped]:
                self.abort(request)
            if clock in self.given.resets:
                self.memory.reset_prefix_cache()
                self.seen["resets"] += 1
                self.outdated |= set(self.memory.sequences())
            if self.scheduler.has_unfinished:
                self.step(fails=clock in self.given.failures)
            clock += 1
            assert self.seen["steps"] <= 20 * work + 100, "it goes on and on"
        self.check_end()
        return self.seen

    def add(self, request: Request) -> None:
        self.refuse(request)
        self.scheduler.add(request)
        self.say(f"add {request.request_id}: {len(request.prompt_token_ids)} prompt tokens, {request.params}")

    def refuse(self, like: Request) -> None:
        """A request that needs one block, or one sequence, too many is refused, and nothing else happens."""
        spare = self.memory.num_blocks - like.most_blocks(self.memory.block_size) + 1
        more = like.prompt_token_ids + [WORD] * spare * self.memory.block_size
        beams = BeamSearchParams(self.scheduler.max_num_seqs + 1, max_tokens=1)
        for prompt, params in ((more, like.params), (like.prompt_token_ids, beams)):
            try:
                self.scheduler.add(Request("refused", like.arrival, prompt, params, like.max_tokens))
            except RequestRefused:
                self.seen["refused"] += 1
            else:
                raise AssertionError(f"a request that can never fit was not refused: {params}")

    def abort(self, request: Request) -> None:
        queues = ("waiting", "running", "swapped")
        where = [name for name in queues if request in getattr(self.scheduler, name)]
        ids = {seq.seq_id for seq in request.sequences}
        self.scheduler.abort(request)
        self.say(f"abort {request.request_id}, {where}")
        if where:
            self.aborted.add(request.request_id)
            self.seen[f"aborted {where[0]}"] += 1
            self.seen["aborted beams"] += bool(request.search) and len(ids) > 1
        assert not ids & set(self.memory.sequences()), "an aborted request still holds memory"
        assert not any(request in getattr(self.scheduler, name) for name in queues)
        self.memory.check()

    def step(self, fails: bool = False) -> None:
        plan = self.scheduler.schedule()
        self.plans.append(plan)
        self.say(show(plan))
        check_plan(plan, self)
        self.check_tenants(plan)
        if fails:
            return self.fail(plan)
        output = self.runner.execute(plan)
        self.check_free_blocks()
        live = {s.seq_id for r in self.given.requests for s in r.live}
        tables = {s.seq_id: s.block_table for s in plan.sequences if s.branch_of is None}
        tables = {i: table for i, table in tables.items() if i not in output.winners}
        changed = self.scheduler.update(plan, output)
        for seq_id in tables.keys() & set(self.memory.sequences()):
            self.seen["computed twice"] += self.memory.block_table(seq_id)[: len(tables[seq_id])] != tables[seq_id]
        self.memory.check()
        self.outdated &= set(self.memory.sequences())
        self.count(plan, live)
        self.count_guesses(plan, output)
        failed = {r.request_id for r in changed if r.error}
        self.failed |= failed
        self.came_back |= {load.request_id for load in plan.loads if output.loaded.get(load.number)}
        assert {r.request_id for r in changed} - failed == {
            s.request_id for s in plan.sequences if s.seq_id in output.tokens or s.seq_id in output.candidates
        }
        for request in changed:
            for seq in request.sequences if not request.search else ():
                self.cut(request, seq)
        self.memory.check()

    def cut(self, request: Request, seq: Sequence) -> None:
        """The engine's part: a stop string ends a sequence, though there may be more tokens behind it."""
        tokens = seq.output_token_ids
        if CUT not in tokens or (seq.finish_reason and tokens.index(CUT) == len(tokens) - 1):
            return
        del tokens[tokens.index(CUT) + 1 :]
        if seq.finish_reason is None:
            self.scheduler.finish(request, seq, "cut")
        seq.finish_reason = "cut"
        self.seen["cut"] += 1

    def fail(self, plan: StepPlan) -> None:
        """The step is broken off, and nobody knows where: before its end, or when all tokens were appended."""
        notes = [Note.of(request) for request in self.scheduler.running]
        unfinished = [request for queue in self.scheduler.queues.lists() for request in queue]
        if plan.step % 2:
            self.runner.execute(StepPlan(plan.step, freed=plan.freed))
        else:
            self.scheduler.update(plan, self.runner.execute(plan))
        for note in notes:
            note.restore()
        for _ in range(1 + plan.step % 3):  # breaking off again does no harm
            self.scheduler.start_over(unfinished)
        self.seen["failed steps"] += 1
        self.memory.check()
        assert not self.memory.sequences() and self.scheduler.waiting == sorted(unfinished, key=queues.arrival)
        self.outdated.clear()

    def check_free_blocks(self) -> None:
        """What was freed was poisoned, so that nobody can read it unnoticed; what can be found was not."""
        here = [seq_id for seq_id in self.memory.sequences() if not self.memory.is_swapped(seq_id)]
        held = {block for seq_id in here for block in self.memory.block_table(seq_id)}
        known = self.memory.cache.parents() if self.memory.cache else {}
        for block, entries in enumerate(self.runner.gpu):
            written = [isinstance(entry, tuple) for entry in entries]
            assert block in held or block in known or not any(written), f"free block {block} is no poison"
            assert block not in known or all(written), f"block {block} can be found, and is not written"
        self.outdated &= set(self.memory.sequences())  # the others ended, or begin anew
        for seq_id in self.outdated.intersection(here):
            assert not known.keys() & self.memory.block_table(seq_id), "from before a reset, and can be found"

    def check_tenants(self, plan: StepPlan) -> None:
        """Nobody reads a block that was written for another salt."""
        salts = {r.request_id: r.cache_salt for r in self.given.requests}
        size = self.memory.block_size
        moved = {target for pairs in (plan.swap_in, plan.copies) for _, target in pairs}
        self.tenants.update({block: salts[load.request_id] for load in plan.loads for block in load.blocks})
        for request in self.scheduler.running:
            for seq in request.live if moved else ():
                mine = moved.intersection(self.memory.block_table(seq.seq_id) if seq.in_memory else ())
                self.tenants.update(dict.fromkeys(mine, request.cache_salt))
        for s in plan.sequences:
            self.tenants.update(dict.fromkeys(moved.intersection(s.block_table), salts[s.request_id]))
        self.tenants.update({slot // size: salts[s.request_id] for s in plan.sequences for slot in s.slots})
        for s in plan.sequences:
            for block in s.block_table:
                assert self.tenants.get(block, salts[s.request_id]) == salts[s.request_id], f"{s} reads another's"

    def count(self, plan: StepPlan, before: set[int]) -> None:
        seen, by_id = self.seen, {r.request_id: r for r in self.given.requests}
        seen.update(steps=1, tokens=plan.num_tokens, copies=len(plan.copies))
        prefixes, evicted = self.scheduler.admission.prefixes, self.memory.usage().evicted
        seen.update(found=prefixes.found - seen["found"], recovered=prefixes.recovered - seen["recovered"])
        seen.update(evicted=evicted - seen["evicted"])
        seen["overtaken"] = sum(r.num_overtaken for r in self.given.requests)
        seen.update(swapped_out=len(plan.swap_out), swapped_in=len(plan.swap_in), resumed=len(plan.resumed))
        for request_id, mode in plan.preempted:
            seen[mode] += 1
            seen["recompute several"] += mode == "recompute" and len(by_id[request_id].sequences) > 1
            seen["swap space exhausted"] += mode == "recompute" and self.scheduler.preemption == "swap"
        for s in plan.sequences:
            prompt = len(by_id[s.request_id].prompt_token_ids)
            seen["chunks of a prompt"] += s.context_len < prompt
            seen["again after a preemption"] += s.context_len > prompt and s.num_own > 1
        born = {s.seq_id: bool(r.search) for r in self.given.requests for s in r.live if s.seq_id not in before}
        seen.update(forked_samples=list(born.values()).count(False), forked_beams=list(born.values()).count(True))

    def count_guesses(self, plan: StepPlan, output: StepOutput) -> None:
        branches = [s for s in plan.sequences if s.branch_of is not None]
        taken = {seq_id: len(rows[0]) - 1 for seq_id, rows in output.tokens.items()}
        self.seen.update(guessed=sum(map(len, output.drafts.values())), right=sum(taken.values()))
        self.seen.update(branches=len(branches), winners=len(output.winners))
        self.seen["all right"] += sum(taken.get(i, 0) == len(guess) for i, guess in output.drafts.items())
        live = {s.seq_id for r in self.given.requests for s in r.live}
        self.seen["ended in the middle"] += sum(
            len(rows[0]) > 1 and i not in live and i in output.drafts for i, rows in output.tokens.items()
        )
        for seq_id in live.intersection(output.tokens):
            seq = self.scheduler.sequences[seq_id]
            assert self.memory.num_tokens(seq_id) == seq.num_computed_tokens == len(seq) - 1, "not all was taken back"

    def check_end(self) -> None:
        usage = self.memory.usage()
        assert not self.memory.sequences() and usage.free == usage.num_blocks and usage.cpu_used == 0
        whole = self.memory.allocate(-1, usage.num_blocks * self.memory.block_size)
        assert isinstance(whole, Allocated) and not self.memory.cache, "what is cached can't be taken"
        assert not len(self.scheduler.sequences), "the scheduler keeps ended sequences"
        self.seen["whole pool used"] += usage.peak_used == usage.num_blocks
        hits, made_way = self.seen["found"] + self.seen["recovered"], self.seen["swap"] + self.seen["recompute"]
        self.seen["hits, evictions and preemptions"] += bool(hits and made_way and self.seen["evicted"])
        for request in self.given.requests:
            assert request.finished, f"{request.request_id} did not finish"
            name, wanted = request.request_id, expected(request)
            if name in self.failed:
                assert outputs(request.sequences) == [([], "error")]
            elif name in self.aborted:
                check_aborted(request, wanted)
            elif request.search:
                assert request.search.done
                assert request.search.hypotheses() == expected_search(request).hypotheses(), name
                self.seen["searches"] += 1
            else:
                assert outputs(request.sequences) == wanted, name
                self.seen.update(f"ended: {reason}" for _, reason in wanted)

    def say(self, text: str) -> None:
        if self.verbose:
            print(text)


def outputs(sequences: list[Sequence]) -> list[tuple[list[int], str | None]]:
    assert [seq.index for seq in sequences] == list(range(len(sequences)))
    return [(seq.output_token_ids, seq.finish_reason) for seq in sequences]


def check_aborted(request: Request, wanted: list[tuple[list[int], str | None]]) -> None:
    """Up to its abort a request gave what it should."""
    if request.search:
        assert {seq.finish_reason for seq in request.sequences} == {"abort"}
        return
    for (tokens, reason), (whole, end) in zip(outputs(request.sequences), wanted, strict=False):
        assert tokens == whole[: len(tokens)] and reason in ("abort", end), request.request_id


def check_plan(plan: StepPlan, run: Run) -> None:
    """What must hold for every plan, whatever the schedule."""
    scheduler, memory = run.scheduler, run.memory
    memory.check()
    waits = plan.loads or scheduler.transfers.exports
    assert plan.sequences or waits, "a step that computes nothing, though there is work"
    assert plan.num_tokens <= scheduler.max_num_batched_tokens
    assert sum(len(r.live) for r in scheduler.running) <= scheduler.max_num_seqs
    written = [slot for s in plan.sequences for slot in s.slots]
    assert len(set(written)) == len(written), "a slot is written twice"
    for s in plan.sequences:
        size = memory.block_size
        own = [s.block_table[p // size] * size + p % size for p in range(s.start, s.context_len + s.num_to_draft)]
        assert s.token_ids and s.slots == own, "a sequence writes where it does not read"
    check_moves(plan)
    check_loads(plan, run)
    longest = {r.request_id: len(r.prompt_token_ids) + r.max_tokens - 1 for r in run.given.requests}
    assert all(s.context_len + s.num_to_draft <= longest[s.request_id] for s in plan.sequences), "behind the end"
    arrival = {r.request_id: r.arrival for r in run.given.requests}
    computing = {arrival[s.request_id] for s in plan.sequences}
    for request_id, _ in plan.preempted:
        assert arrival[request_id] > max(computing, default=-1), "preempted, while a later arrival goes on"
    assert not (plan.preempted and (plan.admitted or plan.resumed)), "preempted for a newcomer"
    running, others = scheduler.running, [*scheduler.waiting, *scheduler.swapped]
    assert all(r.num_overtaken <= scheduler.admission.patience for r in run.given.requests), "overtaken too often"
    if scheduler.admission.schedule == "fcfs":
        short = scheduler.max_num_batched_tokens if scheduler.chunked_prefill else 1 << 60
        passed = [r for r in others if running and r.arrival < running[-1].arrival]
        passed = [r for r in passed if r.request_id not in run.came_back]
        assert all(r in scheduler.waiting and r.target(r.live[0]) > short for r in passed), "a short one was overtaken"
        run.seen["long ones that were overtaken"] += len(passed)
    for queue in (scheduler.waiting, scheduler.running, scheduler.swapped):
        assert queue == sorted(queue, key=lambda r: r.arrival)


def check_loads(plan: StepPlan, run: Run) -> None:
    """Who is loading holds its blocks alone, and nobody finds them."""
    running = {r.request_id: r for r in run.scheduler.running}
    coming = [block for load in plan.loads for block in load.blocks]
    here = [i for i in run.memory.sequences() if not run.memory.is_swapped(i)]
    held = Counter(block for i in here for block in run.memory.block_table(i))
    known = run.memory.cache.parents() if run.memory.cache else {}
    assert all(held[block] == 1 and block not in known for block in coming), "blocks that come are another's too"
    assert {load.request_id for load in plan.loads} == {name for name, r in running.items() if r.load}
    assert not {load.request_id for load in plan.loads} & {s.request_id for s in plan.sequences}, "it is loading"
    size = run.memory.block_size
    assert not {*coming} & {slot // size for s in plan.sequences for slot in s.slots}, "written twice"


def check_moves(plan: StepPlan) -> None:
    targets = [target for pairs in (plan.swap_in, plan.copies) for _, target in pairs]
    assert len(set(targets)) == len(targets), "two moves to one block"
    assert len({target for _, target in plan.swap_out}) == len(plan.swap_out)
    assert not {source for source, _ in plan.copies} & {target for _, target in plan.copies}
    new = {target for _, target in plan.copies}
    users = [s.seq_id for s in plan.sequences for block in s.block_table if block in new]
    assert len(users) == len(set(users)) == len(new), "a copy is one sequence's, and its only one"


# --- seeing it ------------------------------------------------------------------------------------------------


def show(plan: StepPlan) -> str:
    parts = [f"step {plan.step}:"]
    for name in ("preempted", "resumed", "admitted", "swap_out", "freed", "swap_in", "copies"):
        if value := getattr(plan, name):
            parts.append(f"{name} {value}")
    lines = [
        f"    {s.request_id} seq {s.seq_id}: {len(s.token_ids)} at {s.start}, table {s.block_table}"
        f"{', draw ' + str(s.draw.num_draws) if s.draw else ''}{', beam' if s.num_candidates else ''}"
        for s in plan.sequences
    ]
    return "\n".join([" ".join(parts), *lines])


def run(seed: int, verbose: bool = False) -> Counter[str]:
    """Run the schedule of a seed, and count what happened; AssertionError with a way to replay it if it fails."""
    given = scenario(seed)
    if verbose:
        print(f"memory {given.memory}, cache {given.cache}\nscheduler {given.scheduler}")
    try:
        return Run(given, verbose).run()
    except Exception as error:
        error.add_note(f"replay it: python -m tests.recall --seed {seed} --verbose")
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description="Run random schedules on the recall model.")
    parser.add_argument("--seed", type=int, help="run this one")
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "END"), help="run all of these")
    parser.add_argument("--verbose", action="store_true", help="print every plan")
    args = parser.parse_args()
    first, end = args.seeds or (args.seed or 0, (args.seed or 0) + 1)
    seen: Counter[str] = Counter()
    for seed in range(first, end):
        seen.update(run(seed, args.verbose))
    for name, count in sorted(seen.items()):
        print(f"{count:10,}  {name}")


if __name__ == "__main__":
    main()
