"""The recall model's random schedules, traced: after each step a line is written, and what is true is noted beside it.

    python -m tests.traced_recall --seeds 0 10000              look for one whose trace isn't what was
    python -m tests.traced_recall --seeds 0 10000 --transfers  with engines that give blocks to each other

The truth is taken from the scheduler, the memory and what the runner remembers, and not from what writes the trace;
but for the numbers in the names of beams, which are nobody else's.
"""

import argparse
import contextlib
import io
import json
import random
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

from minipaged.requests.request import Request
from minipaged.terminal.snapshot import letters, request_of
from minipaged.viewer.thinning import thinned
from minipaged.viewer.trace import TraceStep, TraceWriter, read_lines
from minipaged.viewer.words import read_on
from tests import recall_transfer
from tests.recall import Run, Scenario, scenario


@dataclass
class Truth:
    """After a step. words: of all that lives, and of samples that ended; texts: of the blocks that can be found."""

    number: int
    state: dict[str, Any]
    did: dict[str, Any]
    num_branches: int
    computed: dict[str, list[int]]  # of sequences that live, or have ended as samples: where, and how many
    arrived: set[str]
    words: dict[str, list[str]]
    texts: dict[str, str]


def decode(token: int) -> str:
    return f"{token} "


class TracedRun(Run):
    """A schedule that leaves a trace in `file`, and `truths`."""

    def __init__(self, given: Scenario, verbose: bool = False, transfers: Any = None):
        super().__init__(given, verbose, transfers)
        self.file = io.StringIO()
        self.writer = TraceWriter(self, self.file, {"model": "recall"}, lambda tokens: "".join(map(decode, tokens)))
        self.truths: list[Truth] = []
        self.added: list[Request] = []
        self.told: set[Request] = set()
        self.ended: set[Request] = set()
        self.evicted: list[int] = []
        self.kept: dict[int, str] = {}
        self.num_drawn = 0

    def add(self, request: Request) -> None:
        super().add(request)
        self.added.append(request)

    def step(self, fails: bool = False) -> None:
        self.evicted, outputs, execute = [], [], self.runner.execute
        with contextlib.ExitStack() as stack:
            if cache := self.memory.cache:
                remove = cache.remove
                evict = lambda block: (self.evicted.append(block), remove(block))  # noqa: E731
                stack.enter_context(mock.patch.object(cache, "remove", evict))
            keep = lambda plan: outputs.append(execute(plan)) or outputs[-1]  # noqa: E731
            stack.enter_context(mock.patch.object(self.runner, "execute", keep))
            super().step(fails)
        if not fails:
            self.writer(self.plans[-1], outputs[-1])
            self.truths.append(self.truth(self.plans[-1], outputs[-1]))

    def truth(self, plan: Any, output: Any) -> Truth:
        names = self.names()
        self.num_drawn += len(output.candidates) + sum(len(row) for rows in output.tokens.values() for row in rows)
        arrived, gone = set(self.added) - self.told, {r for r in self.added if r.finished} - self.ended
        self.told, self.ended = set(self.added), self.ended | gone
        sequences = [seq for r in self.added for seq in r.sequences if not r.search or seq.finish_reason is None]
        words = {names[seq.seq_id]: [*map(decode, seq.tokens(0, len(seq)))] for seq in sequences}
        num_branches = sum(s.branch_of is not None for s in plan.sequences)
        computed = {names[s.seq_id]: [s.start, s.num_own] for s in plan.sequences if s.seq_id in names}
        arrivals = {letters(r.arrival) for r in arrived}
        state, did = self.state(plan, names), self.did(plan, gone)
        return Truth(plan.step, state, did, num_branches, computed, arrivals, words, self.texts())

    def names(self) -> dict[int, str]:
        """Of all sequences; and the names of those that live, and of what is kept, are nobody else's."""
        given, names = self.writer._eye.observer.names, {}
        for request in self.added:
            for seq in request.sequences:
                number = seq.index + 1 if len(request.sequences) > 1 or request.width > 1 else ""
                beam = request.search and request.width > 1 and seq.finish_reason is None
                names[seq.seq_id] = given[seq.seq_id] if beam else f"{letters(request.arrival)}{number}"
                assert request_of(names[seq.seq_id]) == letters(request.arrival)
        kept = [i for i in self.memory.sequences() if i not in names]
        for seq_id in kept:
            self.kept.setdefault(seq_id, f"kept{len(self.kept) + 1}")
        names |= {i: self.kept[i] for i in kept}
        here = [names[i] for i in self.memory.sequences()]
        assert len({*here}) == len(here)
        return names

    def state(self, plan: Any, names: dict[int, str]) -> dict[str, Any]:
        memory, scheduler = self.memory, self.scheduler
        usage = asdict(memory.usage())
        del usage["waste_percent"]
        known = memory.cache.parents() if memory.cache else {}
        queues = {"running": scheduler.running, "waiting": scheduler.waiting, "swapped": scheduler.swapped}
        return {
            "step": {"number": plan.step, "sequences": len(plan.sequences), "tokens": plan.num_tokens},
            "usage": usage,
            "num_drawn": self.num_drawn,
            "num_finished": len(self.ended),
            "num_preemptions": sum(scheduler.num_preemptions.values()),
            "prefixes": {name: vars(scheduler.admission.prefixes)[name] for name in ("queried", "found")},
            "requests": {
                letters(r.arrival): {
                    "id": r.request_id, "state": name, "prompt": len(r.prompt_token_ids), "most": r.max_tokens,
                    "output": sum(len(seq.output_token_ids) for seq in r.sequences),
                    "sequences": sum(seq.finish_reason is None for seq in r.sequences),
                }
                for name, queue in queues.items() for r in queue
            },
            "tables": {
                names[i]: {
                    "tokens": memory.num_tokens(i), "blocks": memory.block_table(i), "swapped": memory.is_swapped(i)
                }
                for i in memory.sequences()
            },
            "cached": {str(block): 1 for block in known if not memory._gpu.allocator.ref_count(block)},
            "index": {str(block): -1 if at is None else at for block, at in known.items()},
        }  # fmt: skip

    def texts(self) -> dict[str, str]:
        known = self.memory.cache.parents() if self.memory.cache else {}
        return {str(block): "".join(decode(token) for token, *_ in self.runner.gpu[block]) for block in known}

    def did(self, plan: Any, gone: set[Request]) -> dict[str, Any]:
        by_id = {r.request_id: letters(r.arrival) for r in self.added}
        did = {name: getattr(plan, name) for name in ("copies", "swap_out", "swap_in", "freed")}
        did["admitted"] = [by_id[i] for i in plan.admitted]
        did["resumed"] = [by_id[i] for i in plan.resumed]
        did["preempted"] = {by_id[i]: how for i, how in plan.preempted}
        did["loading"] = {by_id[load.request_id]: load.blocks for load in plan.loads}
        reasons = {letters(r.arrival): sorted({seq.finish_reason for seq in r.sequences}) for r in gone}
        did["finished"] = {name: ", ".join(words) for name, words in reasons.items()}
        did["evicted"] = sorted(self.evicted)
        return json.loads(json.dumps({name: value for name, value in did.items() if value}))


def check(run: TracedRun) -> list[TraceStep]:
    """The trace is what was."""
    steps = [*read_lines(iter(run.file.getvalue().splitlines(keepends=True)), "the trace")[1]]
    words: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    for step, truth in zip(steps, run.truths, strict=True):
        assert step.step == truth.number
        assert step.state == truth.state
        assert {name: sorted(value) if name == "evicted" else value for name, value in step.did.items()
                if name not in ("computed", "found", "guessed", "reached", "errors")} == truth.did  # fmt: skip
        computed = step.did.get("computed", {})
        assert {name: computed[name][:2] for name in truth.computed} == truth.computed
        counts = [own + guessed for _, own, guessed in computed.values()]
        assert sum(counts) + truth.num_branches == step.state["step"]["tokens"]
        for name, (start, own, guessed) in computed.items():
            assert ("reached" in step.did and name in step.did["reached"]) == (guessed > 0)
            if guessed:
                right = step.did["guessed"][name][1] if name in step.did.get("guessed", {}) else 0
                row = step.did["reached"][name] - start - own
                assert right <= row <= guessed and (truth.num_branches or row == guessed)
        assert set(step.arrived) == truth.arrived
        words = read_on(words, step.words)
        assert {name: words[name] for name in truth.words} == truth.words
        texts |= step.texts
        assert {block: texts[block] for block in truth.texts} == truth.texts
    check_totals(run, steps)
    return steps


def check_totals(run: TracedRun, steps: list[TraceStep]) -> None:
    """What only the sums say: tokens that were found, guesses that were right."""
    own = [numbers for step in steps for numbers in step.did.get("computed", {}).values()]
    assert all(start >= 0 and count >= 1 and guessed >= 0 for start, count, guessed in own)
    if run.seen["failed steps"]:
        return
    found = sum(sum(step.did.get("found", {}).values()) for step in steps)
    prefixes = run.scheduler.admission.prefixes
    assert found == prefixes.found + prefixes.recovered
    guesses = [numbers for step in steps for numbers in step.did.get("guessed", {}).values()]
    guessed = [sum(numbers) for numbers in zip(*guesses, strict=True)]
    assert guessed[:2] == [run.seen["guessed"], run.seen["right"]] or not run.seen["guessed"]


def check_thinned(run: TracedRun, steps: list[TraceStep], every: int) -> None:
    """Of a thinned trace the states, the words and the texts are those of the steps that are left."""
    words: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    places = [*range(every - 1, len(steps) - 1, every), len(steps) - 1] if steps else []
    for place, step in zip(places, thinned(iter(steps), every), strict=True):
        truth = run.truths[place]
        words, texts = read_on(words, step.words), texts | step.texts
        assert step.step == truth.number and step.state == truth.state
        assert {name: words[name] for name in truth.words} == truth.words
        assert {block: texts[block] for block in truth.texts} == truth.texts


def run(seed: int) -> Counter[str]:
    traced = TracedRun(scenario(seed))
    try:
        seen = traced.run()
        steps = check(traced)
        check_thinned(traced, steps, random.Random(seed).randint(1, len(steps) + 1))
        return seen
    except Exception as error:
        error.add_note(f"replay it: python -m tests.traced_recall --seeds {seed} {seed + 1}")
        raise


def run_transfers(seed: int) -> Counter[str]:
    with mock.patch.object(recall_transfer, "Run", TracedRun):
        trial = recall_transfer.Trial(seed)
    try:
        seen = trial.run()
        for one in [trial.consumer, *(producer for producer, _ in trial.producers.values())]:
            check(one)
        return seen
    except Exception as error:
        error.add_note(f"replay it: python -m tests.traced_recall --transfers --seeds {seed} {seed + 1}")
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description="Trace random schedules on the recall model.")
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "END"), default=(0, 100))
    parser.add_argument("--transfers", action="store_true", help="several engines that give blocks to each other")
    args = parser.parse_args()
    seen: Counter[str] = Counter()
    for seed in range(*args.seeds):
        seen.update((run_transfers if args.transfers else run)(seed))
    print(*(f"{count:10,}  {name}" for name, count in sorted(seen.items())), sep="\n")


if __name__ == "__main__":
    main()
