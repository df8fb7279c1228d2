"""How long a decode step takes, beside the time that it takes to read what it must read.

    python -m minipaged.bench.steps [--model smollm2] [--ways file floats int8-products kv-int8] [--batch 1 8 32]
        [--context 256 4096] [--repeat 9] [--threads N] [--json]

Each sequence has `context` tokens and computes one. A step must read all weights that products are made with, and the
keys and values of all sequences: the bound is that many bytes at the speed at which this machine reads, with as many
threads, from memory that no cache holds. It is measured in turns with the steps, and medians are taken.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch

import kernels
from kernels.bench.tables import plain_table
from kernels.cache import codes, is_quantized, raw, scales, slot_size
from kernels.cpp import CppBackend
from kernels.reference import quantize
from minipaged import cache_folder
from minipaged.execution.loading import KV_DTYPES
from minipaged.models import Loaded, load

# Name -> how the weights are loaded, how they are multiplied by, and what the cache holds.
WAYS: dict[str, tuple[str, str, str]] = {
    "file": ("auto", "exact", "fp32"),
    "floats": ("none", "exact", "fp32"),
    "int8-products": ("auto", "int8", "fp32"),
    "int8": ("int8", "exact", "fp32"),
    "int4": ("int4", "exact", "fp32"),
    "kv-int8": ("auto", "exact", "int8"),
    "kv-fp8": ("auto", "exact", "fp8"),
}
BLOCK = 16
READ = 1 << 28  # numbers: a gigabyte, more than the caches hold
MOST = 6 << 30  # bytes of a cache; larger cells are left out


class Reader:
    """Reads a gigabyte: the speed of memory as the threads of PyTorch see it."""

    def __init__(self) -> None:
        self.numbers, self.ones = torch.ones(READ // 1024, 1024), torch.ones(1024)

    def __call__(self) -> float:
        """Bytes a second."""
        began = time.perf_counter()
        torch.mv(self.numbers, self.ones)  # the fastest reader that PyTorch has
        return self.numbers.nbytes / (time.perf_counter() - began)


class Step:
    """A model's decode steps over a cache of its own, filled with numbers that are as good as any."""

    def __init__(self, name: str, loaded: Loaded, kv_dtype: torch.dtype, weight_bytes: int):
        self.name, self.model, self.config = name, loaded.model, loaded.config
        self.kv_dtype, self.weight_bytes = kv_dtype, weight_bytes

    def kv_bytes(self, batch: int, context: int) -> int:
        config, blocks = self.config, batch * -(-context // BLOCK)
        slot = slot_size(config.head_size, self.kv_dtype) * self.kv_dtype.itemsize
        return 2 * config.num_layers * config.num_kv_heads * blocks * BLOCK * slot

    def prepare(self, batch: int, context: int) -> None:
        config, blocks = self.config, -(-context // BLOCK)
        self.cache = kernels.new_cache(
            config.num_layers, batch * blocks, BLOCK, config.num_kv_heads, config.head_size, self.kv_dtype
        )
        if is_quantized(self.cache):
            for layer in self.cache:
                numbers, factors = quantize(torch.randn(codes(layer).shape), self.kv_dtype)
                raw(codes(layer)).copy_(numbers.view(torch.uint8))
                scales(layer).copy_(factors)
        else:
            self.cache.normal_()
        tables = torch.arange(batch * blocks).view(batch, blocks)  # as the engine gives them to long prompts
        last = context - 1
        slots = tables[:, last // BLOCK] * BLOCK + last % BLOCK
        self.batch = kernels.Batch(slots, torch.arange(batch + 1), torch.full((batch,), context), tables)
        self.inputs = torch.arange(batch) + 5, torch.full((batch,), last)

    def __call__(self) -> float:
        """Seconds."""
        began = time.perf_counter()
        self.model.logits(self.model(*self.inputs, self.cache, self.batch)).argmax(-1)
        return time.perf_counter() - began


def make(name: str, model: str) -> Step:
    quantization, products, kv = WAYS[name]
    backend = kernels.load("cpp", folder=cache_folder(), products=products)
    assert isinstance(backend, CppBackend)
    loaded = load(model, backend=backend, quantization=quantization)
    return Step(name, loaded, KV_DTYPES.get(kv, torch.float32), backend.pages.taken)


@torch.inference_mode()
def measure(model: str, ways: list[str], batches: list[int], contexts: list[int], repeat: int) -> list[dict[str, Any]]:
    """A row for each cell and way."""
    reader, contestants = Reader(), [make(name, model) for name in ways]
    rows = []
    for context in contexts:
        for batch in batches:
            fitting = [one for one in contestants if one.kv_bytes(batch, context) <= MOST]
            for one in fitting:
                one.prepare(batch, context)
                one()
            turns = [(reader(), [one() for one in fitting]) for _ in range(repeat)]
            speed = statistics.median(read for read, _ in turns)
            for one, seconds in zip(fitting, zip(*(times for _, times in turns), strict=True), strict=True):
                median, size = statistics.median(seconds), one.weight_bytes + one.kv_bytes(batch, context)
                rows.append({
                    "way": one.name, "batch": batch, "context": context, "seconds": median, "bytes": size,
                    "read_speed": speed, "of_bound": size / speed / median, "tokens_a_second": batch / median,
                })  # fmt: skip
                del one.cache
    return rows


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 fine, 2 bad input, 130 interrupted by Ctrl-C."""
    args = _parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        rows = measure(args.model, args.ways, args.batch, args.context, args.repeat)
    except (ValueError, OSError) as error:
        print(f"minipaged.bench.steps: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(json.dumps(rows, indent=2) if args.json else "\n".join(_report(args.model, rows)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m minipaged.bench.steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["file", "floats"])
    parser.add_argument("--batch", nargs="+", type=_count, default=[1, 8, 32, 64], metavar="N")
    parser.add_argument("--context", nargs="+", type=_count, default=[256, 4096], metavar="N")
    parser.add_argument("--repeat", type=_count, default=9, metavar="N")
    parser.add_argument("--threads", type=_count, metavar="N", help="(default: PyTorch's own choice)")
    parser.add_argument("--json", action="store_true")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return number


def _report(model: str, rows: list[dict[str, Any]]) -> list[str]:
    head = ["weights", "sequences", "context", "ms a step", "tok/s", "MB read", "of the bound"]
    cells = [
        [r["way"], str(r["batch"]), str(r["context"]), f"{1000 * r['seconds']:.1f}", f"{r['tokens_a_second']:.0f}",
         f"{r['bytes'] / 1e6:.0f}", f"{100 * r['of_bound']:.0f} %"] for r in rows
    ]  # fmt: skip
    speed = f"reading {rows[0]['read_speed'] / 1e9:.1f} GB/s" if rows else "all caches are too large"
    return [f"{model}, {torch.get_num_threads()} threads, {speed}", *plain_table([head, *cells])]


if __name__ == "__main__":
    sys.exit(main())
