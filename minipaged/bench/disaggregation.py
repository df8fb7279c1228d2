"""Prompts in one engine and tokens in another, beside one engine that does both, on the same cores.

    python -m minipaged.bench.disaggregation [--model smollm2] [--loads stall poisson] [--rate 0.25] [--requests 24]
        [--repeat 1] [--cores 2] [--connector SharedMemoryConnector] [--quick] [--json]

    chunked    one engine with all cores; long prompts are computed in pieces beside the tokens of others
    whole      the same, and prompts are computed whole
    split      two engines with half of the cores each: one computes prompts, the other one goes on

The load `stall` has eight answers under way when a long prompt comes; in `poisson` prompts of many lengths come at
random times. Every engine is a process of its own. What is told: the seconds between two tokens of an answer, to the
first token (with `split`, of the engine that goes on: nobody sees the other one's), and tokens a second. All must give
the same tokens.
"""

import argparse
import json
import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from kernels.bench.tables import plain_table
from minipaged.bench.loads import SEED, Load, make_load
from minipaged.bench.progress import Progress

AWAY = {"do_remote_decode": True}
PROMPTS, ANSWERS = (16, 768), (16, 64)  # tokens, in the load of random times
BLOCK = 16
LIMIT = 600.0  # seconds without a word from anybody
WAYS = ("chunked", "whole", "split")


# --- an engine, in a process of its own -------------------------------------------------------------------------------


def work(options: dict[str, Any], threads: int) -> None:
    """Reads requests from standard input, a line each; writes a line for each token, with the time."""
    import torch

    from minipaged.llm import LLM
    from minipaged.requests.sampling_params import SamplingParams

    torch.set_num_threads(threads)
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()
    with LLM(**options) as llm:
        threading.Thread(target=_read, args=[asked], daemon=True).start()
        _tell({"ready": True})
        while True:
            while not asked.empty() or not llm.has_unfinished_requests:
                if not (line := asked.get()):
                    return
                one = json.loads(line)
                if one.get("reset"):
                    llm.reset_prefix_cache()
                    continue
                extra = {"kv_transfer_params": one["kv_transfer_params"]}
                llm.add_request(one["prompt"], SamplingParams(
                    temperature=0.0, max_tokens=one["max_tokens"], ignore_eos=True, extra_args=extra
                ), one["id"])  # fmt: skip
            for output in llm.step():
                [answer] = output.outputs
                end = {"tokens": answer.token_ids, "kv_transfer_params": output.kv_transfer_params}
                count = {"id": output.request_id, "count": answer.num_tokens, "time": time.monotonic()}
                _tell(count | (end if output.finished else {}))


def _read(asked: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        asked.put(line)
    asked.put("")


def _tell(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


class Engine:
    """Seen from the client."""

    def __init__(self, options: dict[str, Any], threads: int, news: "queue.SimpleQueue[Any]"):
        told = json.dumps({"options": options, "threads": threads})
        command = [sys.executable, "-m", "minipaged.bench.disaggregation", "--worker", told]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._news = news
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._news.put((self, json.loads(line)))
        self._news.put((self, None))

    def ask(self, **message: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


# --- who asks ---------------------------------------------------------------------------------------------------------


@dataclass
class Timed:
    """A load, and when each of its requests is sent, in seconds after the first; those of `load.late` by that."""

    load: Load
    due: list[float]


@dataclass
class Seen:
    """What a client saw. sent, times: by request; of each token, the moment."""

    sent: list[float]
    times: list[list[float]]
    tokens: list[list[int]]

    @property
    def gaps(self) -> list[float]:
        return [b - a for times in self.times for a, b in zip(times, times[1:], strict=False)]

    @property
    def first(self) -> list[float]:
        return [times[0] - sent for times, sent in zip(self.times, self.sent, strict=True)]

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.tokens)) / (max(times[-1] for times in self.times) - min(self.sent))


@dataclass
class Contender:
    """One engine, or one for prompts and one to go on."""

    news: "queue.SimpleQueue[Any]" = field(default_factory=queue.SimpleQueue)
    engines: list[Engine] = field(default_factory=list)

    def wait_until_ready(self) -> None:
        for _ in self.engines:
            self._hear()

    def _hear(self, seconds: float = LIMIT) -> tuple[Engine, dict[str, Any]]:
        engine, message = self.news.get(timeout=max(0.0, seconds))
        if message is None:
            raise RuntimeError("an engine has ended; what it said stands above")
        return engine, message

    def run(self, timed: Timed) -> Seen:
        load, count = timed.load, len(timed.load.prompts)
        for engine in self.engines:
            engine.ask(reset=True)
        seen = Seen([0.0] * count, [[] for _ in range(count)], [[] for _ in range(count)])
        late = load.late or [0] * count
        waiting = sorted((due, number) for number, due in enumerate(timed.due) if not late[number])
        behind = {number for number in range(count) if late[number]}
        began, left = time.monotonic(), count
        while left:
            while waiting and began + waiting[0][0] <= time.monotonic():
                self._send(waiting.pop(0)[1], load, seen)
            until = began + waiting[0][0] - time.monotonic() if waiting else LIMIT
            try:
                engine, told = self._hear(until)
            except queue.Empty:
                if not waiting:
                    raise RuntimeError(f"no word for {LIMIT:g} s") from None
                continue
            number = int(told["id"])
            if engine is not self.engines[-1]:
                self._go_on(number, load, told)
                continue
            seen.times[number].append(told["time"])
            for one in [one for one in behind if number == 0 and told["count"] >= late[one]]:
                behind.remove(one)
                self._send(one, load, seen)
            if "tokens" in told:
                seen.tokens[number], left = told["tokens"], left - 1
        return seen

    def _send(self, number: int, load: Load, seen: Seen) -> None:
        seen.sent[number] = time.monotonic()
        split = len(self.engines) > 1
        self.engines[0].ask(
            id=str(number), prompt=load.prompts[number], max_tokens=1 if split else load.outputs[number],
            kv_transfer_params=AWAY if split else None,
        )  # fmt: skip

    def _go_on(self, number: int, load: Load, told: dict[str, Any]) -> None:
        where = told["kv_transfer_params"]
        self.engines[-1].ask(
            id=str(number), prompt=load.prompts[number], max_tokens=load.outputs[number], kv_transfer_params=where
        )


@contextmanager
def contender(way: str, args: argparse.Namespace, blocks: int, longest: int) -> Iterator[Contender]:
    common = {"model": args.model, "dtype": args.dtype, "num_blocks": blocks, "block_size": BLOCK, "num_cpu_blocks": 0}
    whole = {"chunked_prefill": False, "max_num_batched_tokens": longest + 64}
    if way == "split":
        threads = max(1, args.cores // 2)
        config, roles = {"kv_connector": args.connector}, ("kv_producer", "kv_consumer")
        configs: list[dict[str, Any]] = [{"kv_transfer_config": {**config, "kv_role": role}} for role in roles]
        configs[0] |= whole
    else:
        threads, configs = args.cores, [whole if way == "whole" else {}]
    made = Contender()
    with ExitStack() as stack:
        for own in configs:
            made.engines.append(Engine(common | own, threads, made.news))
            stack.callback(made.engines[-1].end)
        made.wait_until_ready()
        yield made


# --- what comes of it -------------------------------------------------------------------------------------------------


def poisson(vocab_size: int, count: int, rate: float, divisor: int) -> Timed:
    """Prompts and answers of random lengths, at random times: `rate` of them in a second, on average."""
    rng, due = random.Random(f"poisson {SEED}"), [0.0]
    sizes = [(rng.randint(*PROMPTS) // divisor + 1, rng.randint(*ANSWERS) // divisor + 1) for _ in range(count)]
    while len(due) < count:
        due.append(due[-1] + rng.expovariate(rate))
    prompts = [[rng.randrange(vocab_size) for _ in range(size)] for size, _ in sizes]
    return Timed(Load("poisson", prompts, [size for _, size in sizes], count), due)


def timed_load(name: str, args: argparse.Namespace) -> Timed:
    if name == "poisson":
        return poisson(args.vocab_size, args.requests, args.rate, 8 if args.quick else 1)
    load = make_load(name, args.vocab_size, args.quick)
    return Timed(load, [0.0] * len(load.prompts))


def percentile(numbers: list[float], share: float) -> float:
    """The smallest of which at least this share is not larger.

    >>> percentile([4, 1, 3, 2], 0.5), percentile([4, 1, 3, 2], 0.99)
    (2, 4)
    """
    ordered = sorted(numbers)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def summary(load: str, way: str, runs: list[Seen]) -> dict[str, Any]:
    """Of all runs together; seconds."""
    gaps, first = [gap for run in runs for gap in run.gaps], [one for run in runs for one in run.first]
    told = {f"{name}_p{share}": percentile(numbers, share / 100)
            for name, numbers in (("gap", gaps), ("first", first)) for share in (50, 99)}  # fmt: skip
    speed = sum(run.tokens_per_second for run in runs) / len(runs)
    return {"load": load, "engines": way, **told, "tokens_per_second": speed}


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All loads, and all ways in turns. RuntimeError if they don't give the same tokens."""
    loads = {name: timed_load(name, args) for name in args.loads}
    blocks = max(timed.load.blocks(BLOCK) for timed in loads.values()) + 8
    longest = max(len(prompt) for timed in loads.values() for prompt in timed.load.prompts)
    found = []
    with ExitStack() as stack:
        engines = {way: stack.enter_context(contender(way, args, blocks, longest)) for way in WAYS}
        for name, timed in loads.items():
            runs: dict[str, list[Seen]] = {way: [] for way in WAYS}
            for way in WAYS:
                engines[way].run(Timed(timed.load.warmup(), [0.0] * len(timed.due)))
            for number in range(1, args.repeat + 1):
                for way in WAYS:
                    progress = Progress(f"{name}, round {number} of {args.repeat}, {way}")
                    progress.tell("running")
                    runs[way].append(engines[way].run(timed))
                    progress.close()
            tokens = [run.tokens for way in WAYS for run in runs[way]]
            if any(one != tokens[0] for one in tokens):
                raise RuntimeError(f"load {name}: the engines don't give the same tokens")
            found += [summary(name, way, runs[way]) for way in WAYS]
    return found


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    if args.worker:
        told = json.loads(args.worker)
        work(told["options"], told["threads"])
        return 0
    found = compare(args)
    if args.json:
        print(json.dumps(found))
        return 0
    head = ["load", "engines", "gap p50 ms", "gap p99 ms", "first p50 s", "first p99 s", "tok/s"]
    rows = [[
        row["load"], row["engines"], f"{1000 * row['gap_p50']:.0f}", f"{1000 * row['gap_p99']:.0f}",
        f"{row['first_p50']:.2f}", f"{row['first_p99']:.2f}", f"{row['tokens_per_second']:.1f}",
    ] for row in found]  # fmt: skip
    print("\n".join(plain_table([head, *rows])))
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    program, (about, *_) = "python -m minipaged.bench.disaggregation", (__doc__ or "").split("\n")
    parser = argparse.ArgumentParser(prog=program, description=about)
    add = parser.add_argument
    add("--model", default="smollm2")
    add("--dtype", default="fp32", help="fp32, in which all give the same tokens (default), or bf16")
    add("--vocab-size", type=int, default=49152, help="random tokens are below it (default: smollm2's)")
    add("--loads", nargs="+", choices=("stall", "poisson"), default=["stall", "poisson"])
    add("--rate", type=float, default=0.25, help="of poisson: requests a second (default: 0.25)")
    add("--requests", type=int, default=24, help="of poisson (default: 24)")
    add("--repeat", type=int, default=1, help="runs of each, in turns (default: 1)")
    add("--cores", type=int, default=2, help="that an engine alone has (default: 2)")
    add("--connector", default="SharedMemoryConnector", choices=("SharedMemoryConnector", "TorchDistributedConnector"))
    add("--quick", action="store_true", help="lengths are divided by 8")
    add("--json", action="store_true")
    add("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
