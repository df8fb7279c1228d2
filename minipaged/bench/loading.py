"""How long loading takes, beside reading and dequantizing the same file with the gguf package alone.

python -m minipaged.bench.loading [--dtype fp32] [--repeat 3]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import gguf

from minipaged.execution.runner import DTYPES
from minipaged.models import load
from minipaged.models.fetch import fetch_smollm2


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m minipaged.bench.loading", description=__doc__)
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; medians are reported (default: 3)")
    args = parser.parse_args()
    path = fetch_smollm2()

    def alone() -> Any:
        return [gguf.dequantize(raw.data, raw.tensor_type) for raw in gguf.GGUFReader(path).tensors]

    rounds = [(seconds(lambda: load("smollm2", DTYPES[args.dtype])), seconds(alone)) for _ in range(args.repeat)]
    ours, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(f"smollm2, {args.dtype}: minipaged {ours:.2f} s, gguf package alone {theirs:.2f} s, {ours / theirs:.2f}x")


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
