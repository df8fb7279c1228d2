"""Several recall models that give blocks to each other: see recall.py, and scheduling/transfer.py.

One or two producers compute prompts, and a consumer goes on with their blocks, a few of which are copied in each step;
while all of them do what schedules of recall.py do: chunks, caches, forks, beams, swaps, aborts, resets, failures. A
load may fail at any moment. One wrong block, or one that is read before it is whole, and the output is another.

    python -m tests.recall_transfer --seeds 0 10000
"""

import argparse
import random
from collections import Counter
from dataclasses import replace

from minipaged.requests.kv_transfer import KVTransferParams
from minipaged.requests.request import Request
from minipaged.requests.sampling_params import SamplingParams
from minipaged.scheduling.plan import Load, StepOutput, StepPlan
from minipaged.scheduling.transfer import Exports, Transfers
from tests.recall import Run, Scenario, scenario
from tests.recall_model import END, RecallRunner

AWAY = {"kv_transfer_params": {"do_remote_decode": True}}


class Copier:
    """In the place of a connector: copies blocks between runners, `most` in a step; loads fail with a chance."""

    def __init__(
        self, rng: random.Random, places: "dict[str, tuple[Run, Exports]]", failing: float, seen: Counter[str]
    ):
        self.rng, self.places, self.failing, self.seen = rng, places, failing, seen
        self.most = rng.choice([1, 1, 2, 100])
        self.under_way: dict[int, tuple] = {}  # load, export, blocks there, how many are copied

    def carry_on(self, plan: StepPlan, output: StepOutput, gpu: list) -> StepOutput:
        for source in plan.unneeded:
            self.places[source.remote_engine_id][1].end(source.remote_request_id)
        named = {load.number: load for load in plan.loads}
        for number in self.under_way.keys() - named.keys():
            load, export, _, _ = self.under_way.pop(number)
            self.exports(load).unpin(export, False)
            self.seen["broken off"] += 1
        for number, load in named.items():
            if number not in self.under_way:
                first, count = load.first, len(load.blocks)
                pinned = self.exports(load).pin(load.source.remote_request_id, load.digest, first, count)
                if isinstance(pinned, str):
                    output.loaded[number] = pinned
                    continue
                self.under_way[number] = load, *pinned, 0
            self.copy(number, gpu, output)
        return output

    def copy(self, number: int, gpu: list, output: StepOutput) -> None:
        load, export, blocks, copied = self.under_way[number]
        there = self.places[load.source.remote_engine_id][0].runner.gpu
        for place in range(copied, min(copied + self.most, len(blocks))):
            gpu[load.blocks[place]] = there[blocks[place]].copy()
        copied = min(copied + self.most, len(blocks))
        self.under_way[number] = load, export, blocks, copied
        if self.rng.random() < self.failing:
            self.exports(load).unpin(export, False)
            output.loaded[number] = "the wire broke"
        elif copied == len(blocks) and self.rng.random() < 0.7:
            output.loaded[number] = None if self.exports(load).unpin(export, True) else "given up"
            self.seen["given up"] += output.loaded[number] is not None
        if number in output.loaded:
            del self.under_way[number]

    def exports(self, load: Load) -> Exports:
        return self.places[load.source.remote_engine_id][1]


class TakingRunner(RecallRunner):
    copier: Copier

    def execute(self, plan: StepPlan) -> StepOutput:
        return self.copier.carry_on(plan, super().execute(plan), self.gpu)


class Trial:
    """One schedule of several engines."""

    def __init__(self, seed: int, verbose: bool = False):
        self.rng, self.clock, self.num_added = random.Random(f"transfer {seed}"), 0, 0
        self.seen: Counter[str] = Counter()
        here = scenario(3 * seed)
        size = here.memory["block_size"]
        self.producers: dict[str, tuple[Run, Exports]] = {}
        self.pending: list[tuple[int, Run, Request]] = []
        self.waiting: dict[Request, tuple[Run, Request]] = {}  # on a producer: who goes on with it
        lease = self.rng.choice([3, 40, 400])
        for name in ["a", "b"][: self.rng.randint(1, 2)]:
            exports = Exports(lease, lambda: self.clock)
            place = KVTransferParams(remote_engine_id=name, remote_host="there", remote_port=1)
            given = self.fitting(scenario(3 * seed + len(self.producers) + 1), size, here.requests)
            self.producers[name] = Run(given, verbose, Transfers(exports, place)), exports
        self.recompute = self.rng.random() < 0.8
        self.consumer = Run(here, verbose, Transfers(takes=True, recompute=self.recompute))
        memory = here.memory
        self.consumer.runner = TakingRunner(memory["num_blocks"], size, memory["num_cpu_blocks"], here.drafter)
        failing = self.rng.choice([0, 0, 0.02, 0.3])
        self.copier = self.consumer.runner.copier = Copier(self.rng, self.producers, failing, self.seen)
        self.plan_arrivals()

    def fitting(self, given: Scenario, size: int, theirs: list[Request]) -> Scenario:
        """A producer that has blocks of the same size, and room for each of the prompts."""
        need = max(r.most_blocks(size) for r in [*given.requests, *theirs]) + 1
        blocks = need + self.rng.choice([0, 1, need])
        cpu = min(blocks, given.memory["num_cpu_blocks"])
        memory = {"num_blocks": blocks, "block_size": size, "num_cpu_blocks": cpu, "free_order": None}
        kept = [request for request in given.requests if self.rng.random() < 0.4]
        if given.drafter:
            given.drafter.requests = kept
        aborts = {when: [r for r in those if r in kept] for when, those in given.aborts.items()}
        return replace(given, memory=memory, requests=kept, aborts=aborts, doomed=[])

    def plan_arrivals(self) -> None:
        for producer, _ in self.producers.values():
            self.pending += [(self.rng.randint(0, 20), producer, r) for r in producer.given.requests]
        for request, arrival in zip(self.consumer.given.requests, self.consumer.given.arrivals, strict=True):
            if self.rng.random() < 0.3:
                self.pending.append((arrival, self.consumer, request))
                continue
            producer, _ = self.rng.choice([*self.producers.values()])
            params = SamplingParams(max_tokens=1, extra_args=AWAY)
            salt, seed = request.cache_salt, request.seed
            eos = frozenset({END})
            first = Request(
                f"{request.request_id} first", 100 + request.arrival, request.prompt_token_ids, params, 1, eos, seed,
                cache_salt=salt,
            )  # fmt: skip
            producer.given.requests.append(first)
            self.waiting[first] = self.consumer, request
            self.pending.append((arrival, producer, first))
            if self.rng.random() < 0.1:
                producer.given.aborts.setdefault(arrival + self.rng.randint(0, 9), []).append(first)
        self.pending.sort(key=lambda one: one[0])

    def run(self) -> Counter[str]:
        engines = [self.consumer, *(producer for producer, _ in self.producers.values())]
        while self.pending or self.waiting or any(engine.scheduler.has_unfinished for engine in engines):
            self.clock += 1
            while self.pending and self.pending[0][0] <= self.clock:
                _, engine, request = self.pending.pop(0)
                self.add(engine, request)
            self.hand_over()
            for engine in engines:
                if self.rng.random() < 0.7:
                    self.step(engine)
            assert self.clock < 5_000, "it goes on and on"
        for engine in engines:
            engine.seen["steps"] = max(1, engine.seen["steps"])
        self.clock += 1_000
        self.tell_all_unneeded()
        for producer, _ in self.producers.values():
            producer.scheduler.transfers.free_ended(producer.memory)
        for engine in engines:
            engine.check_end()
            self.seen.update(engine.seen)
        self.seen.update(vars(self.consumer.scheduler.transfers.counts))
        for producer, _ in self.producers.values():
            self.seen["num_exports"] += producer.scheduler.transfers.counts.num_exports
        return self.seen

    def step(self, engine: Run) -> None:
        given = engine.given
        for request in given.aborts.pop(self.clock, []):
            engine.abort(request)
            engine.scheduler.transfers.abort(request.request_id)
        for request in [r for r in given.doomed if r in engine.scheduler.swapped]:
            engine.abort(request)
        for request in [r for r in engine.scheduler.running if r.load and self.rng.random() < 0.02]:
            self.seen["aborted loading"] += 1
            engine.abort(request)
        if self.clock in given.resets:
            engine.memory.reset_prefix_cache()
            engine.outdated |= set(engine.memory.sequences())
        read = any(export.pins for _, exports in self.producers.values() for export in exports._by_name.values())
        fails = self.clock in given.failures or (read and engine is not self.consumer and self.rng.random() < 0.15)
        loading = {r.request_id for r in engine.scheduler.running if r.load}
        if engine.scheduler.has_unfinished:
            engine.step(fails)
            self.seen["preempted loading"] += sum(name in loading for name, _ in engine.plans[-1].preempted)
        elif fails:  # an idle one, whose blocks are being read
            engine.scheduler.start_over([])
            engine.runner.execute(StepPlan(0, freed=engine.memory.take_freed()))
            self.seen["failed idle"] += 1

    def hand_over(self) -> None:
        """A prompt that is computed: its blocks go on. If it was aborted, or is too short, another one computes it."""
        for first in [first for first in self.waiting if first.sequences and first.finished]:
            engine, request = self.waiting.pop(first)
            request.kv_transfer = KVTransferParams.of(first.kv_transfer_told)
            if request.kv_transfer and self.rng.random() < 0.05:  # a client that lies
                request.prompt_token_ids = [10**7, *request.prompt_token_ids[1:]]
                self.seen["lies"] += 1
            self.add(engine, request)

    def add(self, engine: Run, request: Request) -> None:
        request.arrival = self.num_added = self.num_added + 1
        engine.add(request)

    def tell_all_unneeded(self) -> None:
        plan = StepPlan(0)
        self.consumer.scheduler.transfers.build_connector_meta(plan, [])
        self.copier.carry_on(plan, StepOutput(), [])
        assert not self.copier.under_way
        for _, exports in self.producers.values():
            assert not any(export.pins for export in exports._by_name.values())


def run(seed: int, verbose: bool = False) -> Counter[str]:
    try:
        return Trial(seed, verbose).run()
    except Exception as error:
        error.add_note(f"replay it: python -m tests.recall_transfer --seeds {seed} {seed + 1} --verbose")
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description="Run random schedules of engines that give blocks to each other.")
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "END"), default=(0, 100))
    parser.add_argument("--verbose", action="store_true", help="print every plan")
    args = parser.parse_args()
    seen: Counter[str] = Counter()
    for seed in range(*args.seeds):
        seen.update(run(seed, args.verbose))
    for name, count in sorted(seen.items()):
        print(f"{count:10,}  {name}")


if __name__ == "__main__":
    main()
