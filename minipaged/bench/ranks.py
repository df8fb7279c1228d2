"""What it costs to be several processes: decode steps of one process beside those of ranks, and what ranks exchange.

    python -m minipaged.bench.ranks [--model smollm2] [--ranks 2] [--batch 1 32] [--steps 10] [--turns 5] [--json]

One process has as many threads as there are ranks, and each rank has one: the same cores. All are measured in turns.
On a GPU there is only nccl, and this measures nothing.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kernels.bench.tables import plain_table
from kernels.cpp_build import BuildFailed
from minipaged.bench.progress import Progress
from minipaged.execution.ranks import starting
from minipaged.llm import LLM
from minipaged.models import ModelError
from minipaged.requests.sampling_params import SamplingParams

CONTEXT, WARMUP = 64, 3  # tokens of each prompt; steps
SPARE = 64  # tokens: those of whoever was first, until the last one has begun
NOTES = """\
step: milliseconds of a decode step, the median. times: beside one process, as long; the median of turns.
sums: how many in a step, of them gathered logits included; their milliseconds, in which a rank also waits for the
others; and the bytes that rank 0 brings. order: bytes that each other rank is told of a step."""


@dataclass
class Traffic:
    """What rank 0 exchanges, as long as `counting` is on."""

    counting: bool = False
    sums: int = 0
    seconds: float = 0.0
    brought: int = 0
    orders: int = 0
    ordered: int = 0

    def watch(self, llm: LLM) -> "Traffic":
        assert llm.executor._ranks is not None
        ranks, team = llm.executor._ranks.ranks, llm.executor._ranks.team
        tell = team.order

        def told(order: bytes) -> None:
            self.orders += self.counting
            self.ordered += self.counting * len(order)
            tell(order)

        for name in ("sum", "gather"):
            setattr(ranks, name, self._timed(getattr(ranks, name)))
        team.order = told  # type: ignore[method-assign]
        return self

    def _timed(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(x: Tensor, *others: Any) -> Tensor:
            began, size = time.perf_counter(), x.nbytes
            y = call(x, *others)
            if self.counting:
                self.sums, self.brought = self.sums + 1, self.brought + size
                self.seconds += time.perf_counter() - began
            return y

        return timed

    def per_step(self) -> dict[str, float]:
        """And count anew."""
        names = {"sums": self.sums, "sums_ms": 1000 * self.seconds, "brought": self.brought, "order": self.ordered}
        found = {name: count / self.orders for name, count in names.items()}
        vars(self).update(vars(Traffic()))
        return found


def measure(model: str, size: int, batches: list[int], steps: int, turns: int) -> list[dict[str, Any]]:
    """A row for each batch and each way."""
    torch.set_num_threads(size)
    most = max(batches)
    options = {"max_num_seqs": most, "num_blocks": most * (-(-(CONTEXT + WARMUP + steps + SPARE) // 16) + 1),
               "num_cpu_blocks": 0, "prefix_cache": "none", "dtype": "fp32", "device": "cpu"}  # fmt: skip
    with contextlib.ExitStack() as stack:
        alone = stack.enter_context(LLM(model, **options))
        shared = stack.enter_context(LLM(model, tensor_parallel_size=size, **options))
        with through_gloo():
            gloo = stack.enter_context(LLM(model, tensor_parallel_size=size, **options))
        ways = {"one process": alone, "shared memory": shared, "gloo": gloo}
        traffics = {name: Traffic().watch(llm) for name, llm in ways.items() if llm is not alone}
        return [row for batch in batches for row in _compare(ways, traffics, batch, steps, turns)]


@contextlib.contextmanager
def through_gloo() -> Iterator[None]:
    """Ranks that are started in here add up as they do where there is no compiler."""

    def fails(size: int) -> int:
        raise BuildFailed("for comparison")

    with mock.patch.object(starting, "shared_memory", fails):
        yield


def _compare(
    ways: dict[str, LLM], traffics: dict[str, Traffic], batch: int, steps: int, turns: int
) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    rows = {name: {"batch": batch, "way": name} for name in ways}
    progress = Progress(f"{batch} sequence{'s' * (batch > 1)}")
    for turn in range(1, turns + 1):
        for name, llm in ways.items():
            progress.tell(f"turn {turn} of {turns}, {name}")
            seconds[name] += [_decode(llm, batch, steps, traffics.get(name, Traffic()))]
    progress.close()
    alone, reference = ways["one process"], seconds["one process"]
    for name, row in rows.items():
        row["step_ms"] = 1000 * statistics.median(seconds[name])
        row["times"] = statistics.median(one / other for one, other in zip(seconds[name], reference, strict=True))
        if traffic := traffics.get(name):
            row |= traffic.per_step() | {"difference": largest_difference(alone, ways[name], batch)}
    return list(rows.values())


def _decode(llm: LLM, batch: int, steps: int, traffic: Traffic) -> float:
    """Seconds of a decode step of so many sequences. What it exchanges is counted; what came before is not."""
    params = SamplingParams(temperature=0.0, max_tokens=WARMUP + steps + SPARE, ignore_eos=True)
    names = [llm.add_request(prompt, params) for prompt in _prompts(llm, batch)]
    try:
        started: set[str] = set()
        while len(started) < batch:
            started |= {output.request_id for output in llm.step()}
        for _ in range(WARMUP):
            llm.step()
        traffic.counting = True
        began = time.perf_counter()
        for _ in range(steps):
            llm.step()
        return (time.perf_counter() - began) / steps
    finally:
        traffic.counting = False
        for name in names:
            llm.abort(name)


def _prompts(llm: LLM, batch: int) -> list[list[int]]:
    return [[(7 * i + k) % llm.config.vocab_size for k in range(CONTEXT)] for i in range(batch)]


def largest_difference(one: LLM, other: LLM, batch: int) -> float:
    """Between their logits of the same prompts and the same tokens after them, as long as these are the same."""
    (tokens, logits), (its_tokens, its_logits) = (_logits(llm, batch) for llm in (one, other))
    if tokens != its_tokens:
        raise ModelError("ranks and one process chose other tokens")
    return max(float((a - b).abs().max()) for a, b in zip(logits, its_logits, strict=True))


def _logits(llm: LLM, batch: int) -> tuple[list[list[int]], list[Tensor]]:
    model, found = llm.executor.runner.model, []
    compute = model.logits

    def kept(hidden: Tensor) -> Tensor:
        found.append(compute(hidden))
        return found[-1]

    with mock.patch.object(model, "logits", kept):
        outputs = llm.generate(_prompts(llm, batch), SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
    return [output.outputs[0].token_ids for output in outputs], found


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Its first line is the head."""
    columns = {
        "step ms": ("step_ms", "{:.1f}", 1), "times": ("times", "{:.2f}", 1), "sums": ("sums", "{:.0f}", 1),
        "their ms": ("sums_ms", "{:.2f}", 1), "KB": ("brought", "{:.0f}", 1000), "order": ("order", "{:.0f}", 1),
        "logits differ": ("difference", "{:.1e}", 1),
    }  # fmt: skip
    lines = [["way", "sequences", *columns]]
    for row in rows:
        cells = [form.format(row[key] / unit) if key in row else "-" for key, form, unit in columns.values()]
        lines.append([row["way"], str(row["batch"]), *cells])
    return lines


def show(lines: list[list[str]]) -> None:
    if not sys.stdout.isatty():
        print("\n".join([*plain_table(lines), "", NOTES]))
        return
    from rich.console import Console
    from rich.table import Table

    drawn = Table(lines[0][0])
    for name in lines[0][1:]:
        drawn.add_column(name, justify="right")
    for before, line in zip(lines, lines[1:], strict=False):
        if before is not lines[0] and before[1] != line[1]:
            drawn.add_section()
        drawn.add_row(*line)
    Console().print(drawn)
    print(NOTES)


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m minipaged.bench.ranks", description=__doc__,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = flags.add_argument
    add("--model", default="smollm2", help="see python -m minipaged.bench --help")
    add("--ranks", type=int, default=2, metavar="N", help="(default: 2)")
    add("--batch", type=int, nargs="+", default=[1, 32], metavar="N", help="sequences (default: 1 32)")
    add("--steps", type=int, default=10, metavar="N", help="in a turn (default: 10)")
    add("--turns", type=int, default=5, metavar="N", help="of each (default: 5)")
    add("--json", action="store_true", help="print JSON")
    args = flags.parse_args()
    if args.ranks < 2 or min(*args.batch, args.steps, args.turns) < 1:
        flags.error("--ranks: at least 2; --batch, --steps and --turns: at least 1")
    rows = measure(args.model, args.ranks, args.batch, args.steps, args.turns)
    print(json.dumps(rows)) if args.json else show(table(rows))


if __name__ == "__main__":
    main()
