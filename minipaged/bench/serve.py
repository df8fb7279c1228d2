"""Servers under load: python -m minipaged.bench.serve

    python -m minipaged.bench.serve                                   our own server, and the engine without one
    python -m minipaged.bench.serve --clients 32 --repeat 3 --peer vllm --peer-python vllm=X/bin/python
    python -m minipaged.bench.serve --load chat --rate 0.5 1 2 --goodput ttft:1000 tpot:200
    python -m minipaged.bench.serve --trace mooncake.jsonl --scale 16 --requests 100 --speedup 10
    python -m minipaged.bench.serve --tiny --connections 1000
    python -m minipaged.bench.serve --url http://127.0.0.1:8000       a server that runs already

This process is the clients, and nothing else works in it while they do: what its CPU time is, they took from the
servers on the same cores. Reading order: serve_traces.py (what is sent), serve_clients.py and
serve_answers.py (who sends it), serve_servers.py and serve_contest.py (to whom), serve_report.py (figures),
serve_flags.py, and this file (the run).
"""

import argparse
import contextlib
import importlib.util
import json
import resource
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minipaged.bench.contenders import BLOCK_SIZE, Options
from minipaged.bench.environments import find
from minipaged.bench.loads import Dice, Load, make_load
from minipaged.bench.report import machine
from minipaged.bench.serve_answers import Arrivals
from minipaged.bench.serve_contest import Contender, Contest, Offline, Online
from minipaged.bench.serve_flags import CLIENTS, parse
from minipaged.bench.serve_report import print_report, summarize
from minipaged.bench.serve_servers import Recipe, Server, ServerFailed, model_of, ours, vllm, write_tokenizer
from minipaged.bench.serve_traces import BadInput, enlarged, poisson, read_trace
from minipaged.bench.weights import write_folder, write_random
from minipaged.execution.engine_args import EngineArgs
from minipaged.execution.runner import DTYPES, kv_bytes_per_token
from minipaged.models import Checkpoint, ModelConfig, ModelError, open_checkpoint

CONNECTED_IN, CONNECTED_OUT = 16, 128  # tokens of --connections: enough that all are open before the first one ends
MEMORY = 4 << 30  # bytes of keys and values: more only if what runs at a time needs it
WAITING = 1024  # requests in our server's queue, as it is by default: --connections may need more
LABELS = {"minipaged": "minipaged", "server": "the server", "offline": "offline", "vllm": "vLLM"}
Case = tuple[Load, Arrivals]


def main(argv: list[str] | None = None) -> int:
    """Exit status: see the end of --help."""
    args = parse(argv)
    try:
        if importlib.util.find_spec("aiohttp") is None:
            raise BadInput("aiohttp is not installed, and the clients need it: pip install aiohttp")
        with contextlib.ExitStack() as stack:
            report = bench(args, stack)
    except (BadInput, ModelError) as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    print(json.dumps(report, indent=2)) if args.json else print_report(report, LABELS)
    lost = any(column["failed"] for result in report["results"] for column in result["contenders"].values())
    return 1 if report["failed"] or lost else 0


def bench(args: argparse.Namespace, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Run what the flags ask for. stack: keeps what is started and written until the end."""
    if args.url:
        _must_answer(args.url)
    checkpoint = _checkpoint(args, stack)
    config = ModelConfig.from_hf(checkpoint.config)
    cases = cases_of(args, config)
    _allow_connections(max(arrivals.clients or len(load.prompts) for load, arrivals in cases))
    options = _options(args, checkpoint, config, cases)
    contenders, left_out = _contenders(args, options, checkpoint, stack)
    contest = Contest(contenders, LABELS, say)
    contest.wait()
    results = []
    for load, arrivals in cases:
        rounds, tokens = contest.run(load, arrivals, args.repeat)
        columns = summarize(rounds, tokens, "server" if args.url else "minipaged", arrivals.clients is not None)
        results.append({
            "load": load.name, "arrivals": arrivals.label, "requests": len(load.prompts), "contenders": columns
        })  # fmt: skip
    return {
        "model": "a tiny model" if args.tiny else args.model, "url": args.url, "machine": machine(options.threads),
        "left_out": left_out, "failed": contest.failed, "results": results,
    }  # fmt: skip


def _must_answer(url: str) -> None:
    try:
        model_of(url)
    except ServerFailed as error:
        raise BadInput(str(error)) from None


# --- what is asked ----------------------------------------------------------------------------------------------------


def cases_of(args: argparse.Namespace, config: ModelConfig) -> list[Case]:
    """Every load with every way of arriving. BadInput if the model is too small for one."""
    cases: list[Case] = []
    for load, times in _loads(args, config.vocab_size):
        if load.longest > config.max_model_len:
            least = -(-load.longest // config.max_model_len)
            hint = f": --scale {least * (args.scale or 1):g} would do" if args.trace else ""
            raise BadInput(
                f"load {load.name} needs {load.longest} positions, and the model has {config.max_model_len}{hint}"
            )
        cases += [(load, arrivals) for arrivals in _arrivals(args, load, times)]
    return cases


def _loads(args: argparse.Namespace, vocab_size: int) -> list[tuple[Load, list[float]]]:
    """And the times of each, if it has any of its own."""
    if args.trace:
        return [read_trace(args.trace, vocab_size, args.requests, args.scale or 1.0, args.speedup or 1.0)]
    if args.connections:
        dice, count = Dice("connections", vocab_size, 1), args.connections
        prompts = [dice.tokens(CONNECTED_IN) for _ in range(count)]
        return [(Load("connections", prompts, [CONNECTED_OUT] * count, count), [])]
    loads = [make_load(name, vocab_size, args.quick) for name in args.load]
    return [(enlarged(load, args.requests or len(load.prompts), vocab_size), []) for load in loads]


def _arrivals(args: argparse.Namespace, load: Load, times: list[float]) -> list[Arrivals]:
    count = len(load.prompts)
    if args.rate:
        return [Arrivals(f"{rate:g} req/s", times=poisson(rate, count, args.seed)) for rate in args.rate]
    if times and not args.clients:
        return [Arrivals("its own times", times=times)]
    clients = [args.connections] if args.connections else args.clients or CLIENTS
    return [Arrivals("1 client" if n == 1 else f"{n} clients", clients=n) for n in clients]


def _allow_connections(count: int) -> None:
    """BadInput if the system doesn't let us, and the server that we start, have so many open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 200
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise BadInput(f"{count} connections need {needed} open files, and the system allows {hard}: see ulimit -Hn")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


# --- who is asked -----------------------------------------------------------------------------------------------------


def _checkpoint(args: argparse.Namespace, stack: contextlib.ExitStack) -> Checkpoint:
    if not args.tiny:
        return open_checkpoint(args.model)
    folder = _folder(stack)
    write_random("tiny", folder, args.dtype)
    return open_checkpoint(str(folder))


def _folder(stack: contextlib.ExitStack) -> Path:
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="minipaged-bench-")))


def _options(args: argparse.Namespace, checkpoint: Checkpoint, config: ModelConfig, cases: list[Case]) -> Options:
    """What all that are started are told. Their pools are of the same size."""
    per_token = kv_bytes_per_token(config, DTYPES[args.dtype])
    running = EngineArgs.max_num_seqs
    loads = [load for load, _ in cases]
    longest = max(load.longest for load in loads)
    least = max(_blocks(load, running) for load in loads)
    every = max(_blocks(load, len(load.prompts)) for load in loads)
    blocks = max(least, min(every, MEMORY // (per_token * BLOCK_SIZE)))
    return Options(
        model=str(checkpoint.path), dtype=args.dtype, threads=args.threads or torch.get_num_threads(),
        most_blocks=blocks, kv_bytes_per_token=per_token, most_requests=running, longest=longest,
        num_blocks=args.num_blocks or int(1.02 * blocks) + 2, device="cpu",
    )  # fmt: skip


def _blocks(load: Load, running: int) -> int:
    """Enough for so many of the longest requests at a time."""
    longest = sorted((length for length in load.lengths), reverse=True)[:running]
    return sum(-(-length // BLOCK_SIZE) for length in longest)


def _contenders(
    args: argparse.Namespace, options: Options, checkpoint: Checkpoint, stack: contextlib.ExitStack
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Everybody, in the order of the turns; servers load at once. And who is left out, with the reason."""
    if args.url:
        contenders: dict[str, Contender] = {"server": Online(args.url, args.timeout, args.goodput)}
    else:
        contenders = {"minipaged": _started(ours(options, max(WAITING, args.connections or 0)), args, stack)}
    if args.offline:
        contenders["offline"] = Offline(options)
        stack.callback(contenders["offline"].close)
    found, left_out = find(args.peer, dict(args.peer_python), checkpoint.path.suffix == ".gguf")
    for name, python in found.items():
        contenders[name] = _started(vllm(_in_floats(options, checkpoint, stack), python), args, stack)
    return contenders, left_out


def _started(recipe: Recipe, args: argparse.Namespace, stack: contextlib.ExitStack) -> Online:
    server = Server(recipe)
    stack.callback(server.close)
    return Online(server.url, args.timeout, args.goodput, server)


def _in_floats(options: Options, checkpoint: Checkpoint, stack: contextlib.ExitStack) -> Options:
    """For who can't read a .gguf file: the same weights, and the same tokenizer."""
    if checkpoint.path.suffix != ".gguf":
        return options
    folder = _folder(stack)
    write_folder(checkpoint, options.dtype, folder)
    write_tokenizer(checkpoint.tokenizer(), folder)
    return replace(options, model=str(folder))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: processes and temporary files go with us
    sys.exit(main())
