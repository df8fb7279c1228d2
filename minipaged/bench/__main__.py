"""The run: flags in, contenders in turns, a report out."""

import argparse
import contextlib
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import kernels
from minipaged import cache_folder
from minipaged.bench.contenders import BLOCK_SIZE, LABELS, PEERS, VARIANTS, Options, why_not
from minipaged.bench.environments import LODGERS, find
from minipaged.bench.flags import parser
from minipaged.bench.loads import WRITTEN, Encode, Load, Run, make_load, of_bytes
from minipaged.bench.report import machine, print_report, summarize
from minipaged.bench.weights import write_folder
from minipaged.bench.worker import ContenderFailed, Worker
from minipaged.execution.engine_args import EngineArgs
from minipaged.execution.runner import DTYPES, kv_bytes_per_token, resolve
from minipaged.models import Checkpoint, ModelConfig, ModelError, open_checkpoint
from minipaged.models.head import head_of
from minipaged.text.tokenizer import Tokenizer


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 fine, 1 a contender failed, 2 bad input, 130 interrupted by Ctrl-C."""
    args = parser().parse_args(argv)
    try:
        report = bench(args)
    except ModelError as error:
        _say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    print(json.dumps(report, indent=2)) if args.json else print_report(report)
    return 1 if report["failed"] else 0


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Run what the flags ask for. ModelError if there is no such model, or it is too small for a load."""
    checkpoint = open_checkpoint(args.model)
    config = ModelConfig.from_hf(checkpoint.config)
    encode = encoder(checkpoint.tokenizer()) if any(name in WRITTEN for name in args.load) else of_bytes
    loads = [make_load(name, config.vocab_size, args.quick, encode) for name in args.load]
    for load in loads:
        if load.longest > config.max_model_len:
            raise ModelError(
                f"load {load.name} needs {load.longest} positions, and the model has {config.max_model_len}"
            )
    device, engine = _device(args), _engine(args)
    pythons, left_out = _peers(args, loads, checkpoint.path.suffix == ".gguf")
    threads = args.threads or torch.get_num_threads()
    report: dict[str, Any] = {
        "model": args.model,
        "quick": args.quick,
        "machine": machine(threads),
        "about": {},
        "left_out": left_out,
        "failed": {},
        "results": [],
    }
    for dtype in args.dtype:
        with _models(checkpoint, dtype, [name for name in ("vllm", "vllm-ngram") if name in pythons]) as models:
            options = {
                name: Options(
                    model=args.model if name == "head" else models.get(name, str(checkpoint.path)),
                    dtype=dtype,
                    threads=threads,
                    kv_bytes_per_token=kv_bytes_per_token(config, DTYPES[dtype]),
                    num_blocks=args.num_blocks,
                    kv_cache_memory=args.kv_cache_memory,
                    device=device,
                    kernels=args.kernels,
                    engine=engine,
                    **_sizes([load for load in loads if not why_not(name, load)]),
                )
                for name in pythons
            }
            contest = Contest(dtype, args.repeat)
            report["results"] += contest.run(options, pythons, loads)
        report["failed"] |= contest.failed
        report["about"] |= contest.about
    return report


def _peers(args: argparse.Namespace, loads: list[Load], is_gguf: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Each contender's Python, in the order of the turns; and who is left out here, with the reason."""
    told = dict(args.peer_python)
    for name in told:
        if name not in [LODGERS.get(peer, peer) for peer in args.peer]:
            raise ModelError(f"--peer-python {name}=...: --peer does not ask for {name}")
    peers, left_out = find([name for name in PEERS if name in args.peer], told, is_gguf)
    for name in list(peers):
        barred = {load.name: reason for load in loads if (reason := why_not(name, load))}
        if barred:
            reasons = {reason: [load for load in barred if barred[load] == reason] for reason in barred.values()}
            left_out[name] = "; ".join(f"of {', '.join(names)}: {reason}" for reason, names in reasons.items())
        if len(barred) == len(loads):
            del peers[name]
    own = [name for name in VARIANTS if name == "minipaged" or name in args.peer]
    if "head" in own:
        try:
            head_of(args.model)
        except ModelError as error:
            left_out["head"] = str(error)
            own.remove("head")
    for name, reason in left_out.items():
        _say(f"left out: {LABELS[name]}: {reason}")
    return dict.fromkeys(own, sys.executable) | peers, left_out


def _engine(args: argparse.Namespace) -> dict[str, Any]:
    """Settings for minipaged and its variants. ModelError if it would refuse them."""
    tokens, least = args.max_num_batched_tokens, EngineArgs.max_num_seqs
    if tokens is not None and tokens < least:
        raise ModelError(f"--max-num-batched-tokens {tokens}: must be at least {least}, a token for each sequence")
    names = ("max_num_batched_tokens", "quantization", "products", "kv_cache_dtype")
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def encoder(tokenizer: Tokenizer) -> Encode:
    """What a user says, in the model's chat template if it has one."""

    def encode(text: str) -> list[int]:
        if tokenizer.has_chat_template:
            return tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": text}]), False)
        return tokenizer.encode(text)

    return encode


def _sizes(loads: list[Load]) -> dict[str, int]:
    """What a contender must have room for, of the loads that it is asked for."""
    return {
        "most_blocks": max(load.blocks(BLOCK_SIZE) for load in loads),
        "most_requests": max(load.num_sequences for load in loads),
        "longest": max(load.longest for load in loads),
    }


def _device(args: argparse.Namespace) -> str:
    """The device, and ModelError if it or the kernels can't be had there: better now than in a contender."""
    try:
        dtypes = [resolve(dtype, args.device) for dtype in args.dtype]
        for dtype, device in dtypes:
            kernels.load(args.kernels, device, dtype, cache_folder(), notice=_say)
    except ValueError as error:
        raise ModelError(str(error)) from None
    return dtypes[0][1]


@contextlib.contextmanager
def _models(checkpoint: Checkpoint, dtype: str, vllm: list[str]) -> Iterator[dict[str, str]]:
    """Who can't read the model as it is, and what it is given instead, while the context lasts."""
    if not vllm or checkpoint.path.suffix != ".gguf":
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="minipaged-bench-") as folder:
        write_folder(checkpoint, dtype, Path(folder))
        yield dict.fromkeys(vllm, folder)


class Contest:
    """The contenders in one dtype. One that fails is out of it; the others go on.

    failed: {"static fp32": why}. about: what contenders say of themselves.
    """

    def __init__(self, dtype: str, rounds: int):
        self.dtype, self.rounds = dtype, rounds
        self.failed: dict[str, str] = {}
        self.about: dict[str, str] = {}
        self.workers: dict[str, Worker] = {}

    def run(self, options: dict[str, Options], pythons: dict[str, str], loads: list[Load]) -> list[dict[str, Any]]:
        """The rows. options and pythons: by contender, in the order of the turns."""
        _say(f"{self.dtype}: loading {', '.join(LABELS[name] for name in options)}")
        try:
            for name in options:
                self.workers[name] = Worker(name, options[name], pythons[name])
            for name in list(self.workers):
                about = self._guard(name, lambda worker: worker.wait())
                self.about |= {name: about} if about else {}
            rows = []
            for load in loads:
                rows += summarize(load, self.dtype, self._rounds(load))
            return rows
        finally:
            for worker in self.workers.values():
                worker.close()

    def _rounds(self, load: Load) -> dict[str, list[Run]]:
        runs: dict[str, list[Run]] = {name: [] for name in self.workers if not why_not(name, load)}
        for name in list(runs):
            self._guard(name, lambda worker: worker.run(load.warmup()))
        for number in range(1, self.rounds + 1):
            for name in [name for name in runs if name in self.workers]:  # in turns: what is compared ran side by side
                run = self._guard(name, lambda worker: worker.run(load))
                if run is not None:
                    runs[name].append(run)
                    _say(
                        f"{self.dtype} {load.name}, round {number} of {self.rounds}: {LABELS[name]}: "
                        f"{run.tokens_per_second:.1f} tok/s in {run.seconds:.1f} s"
                    )
        return runs

    def _guard(self, name: str, action):
        try:
            return action(self.workers[name])
        except ContenderFailed as error:
            _say(f"failed: {error}")
            self.failed[f"{name} {self.dtype}"] = str(error)
            self.workers.pop(name).close()
            return None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: processes and temporary files go with us
    sys.exit(main())
