"""What the engine asks of the hardware: tensors in, tensors out. Imports nothing of minipaged.

    reference.py         each kernel in the plainest PyTorch that is right; all others are tested against it
    formulas.py          what a layer computes beside its products: norm, rotation, attention over a row
    cache.py             the memory for keys and values, in eight bits too
    torch_backend.py     the backend that needs nothing but PyTorch,
    torch_attention.py     its paged attention, fast on a CPU,
    linear.py              its products with weights packed for the machine
    packed.py            weights in small numbers, as quantized models have them
    triton_backend.py    the backend for a GPU (or Triton's interpreter),
    triton_attention.py    its paged attention,
    triton_cache.py        its cache writes, block copies and moves,
    triton_packed.py       its product with packed weights,
    triton_tiles.py        and how it cuts the work
    cpp.py               the backend for a CPU,
    cpp_packed.py          its products with small numbers,
    huge_pages.py          where its weights lie,
    cpp_sum.py             its sums over several processes,
    cpp_build.py           how its C++ is built,
    cpu/                   and the C++ (begin with vectors.h)
    bench/               python -m kernels.bench: how fast they are

This file is the door: callers say what they want, and `load` who does it.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from kernels.batch import Batch
from kernels.cache import new_cache, poison, slot_size
from kernels.packed import Packed, Weight
from kernels.torch_backend import TorchBackend

__all__ = [
    "BACKENDS", "PRODUCTS", "Backend", "Batch", "Packed", "TorchBackend", "Unavailable", "Weight", "load", "new_cache",
    "poison", "slot_size",
]  # fmt: skip

Backend = TorchBackend  # all others extend it
BACKENDS = ("auto", "torch", "triton", "cpp")
PRODUCTS = ("exact", "int8")


class Unavailable(ValueError):
    """A backend was asked for by name that can't run here; the message says why."""


def say(line: str) -> None:
    print(f"minipaged: {line}", file=sys.stderr, flush=True)


def load(
    name: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    folder: Path | None = None,
    notice: Callable[[str], None] = say,
    same_bits: bool | None = None,
    products: str = "exact",
) -> Backend:
    """A backend for weights and a cache of `dtype` on `device`.

    name: torch, triton, cpp; or auto: triton on a GPU, cpp on a CPU, and torch where these can't be had, which
    `notice` is told in a line.
    folder: where built libraries are kept; by default MINIPAGED_CACHE or ~/.cache/minipaged.
    same_bits: take only a backend whose `same_bits` is true: a row's numbers don't depend on who else is in the batch.
    By default if MINIPAGED_SAME_BITS is 1. It slows down bf16 on a CPU that has bf16 products, and nothing else.
    products: with weights that stay in small numbers, where a backend has them: "exact", in floats, or "int8", with
    activations rounded to 8 bits (cpp only, faster).
    Raises Unavailable if it was asked for by name and can't be had, or can't keep that promise; ValueError if there is
    no such name.
    """
    if same_bits is None:
        same_bits = os.environ.get("MINIPAGED_SAME_BITS", "0") == "1"
    if products not in PRODUCTS:
        raise ValueError(f"products={products!r}: must be one of {', '.join(PRODUCTS)}")
    backend = _find(name, device, dtype, folder, notice, same_bits, products)
    if products == "int8" and backend.name != "cpp":
        raise Unavailable(f"products='int8' are for kernels 'cpp', on a CPU; {backend.name!r} has exact ones only")
    if same_bits and not backend.same_bits:
        raise Unavailable(
            f"kernels {backend.name!r} can't give the same bits in any company (same_bits, MINIPAGED_SAME_BITS=1): "
            "only 'cpp' can, on a CPU"
        )
    return backend


def _find(
    name: str, device: torch.device | str, dtype: torch.dtype, folder: Path | None, notice: Callable[[str], None],
    same_bits: bool, products: str,
) -> Backend:  # fmt: skip
    if name not in BACKENDS:
        raise ValueError(f"kernels={name!r}: must be one of {', '.join(BACKENDS)}")
    on_cpu = torch.device(device).type == "cpu"
    wanted = name if name != "auto" else "cpp" if on_cpu else "triton"
    try:
        if wanted == "cpp":
            return _cpp(on_cpu, dtype, folder, notice, same_bits, products)
        if wanted == "triton":
            return _triton(device, dtype)
    except Unavailable as error:
        if name != "auto":
            raise
        notice(f"{error}; PyTorch computes instead")
    return TorchBackend(device, dtype)


def _cpp(
    on_cpu: bool, dtype: torch.dtype, folder: Path | None, notice: Callable[[str], None], same_bits: bool,
    products: str,
) -> Backend:  # fmt: skip
    try:
        from kernels.cpp import CppBackend
        from kernels.cpp_build import BuildFailed, build
    except ImportError:  # a tree that was cut for the course
        raise Unavailable("kernels in C++ are not there") from None
    if not on_cpu:
        raise Unavailable("kernels in C++ are for a CPU")
    if dtype not in (torch.float32, torch.bfloat16):
        raise Unavailable(f"kernels in C++ compute fp32 and bf16, not {str(dtype).removeprefix('torch.')}")
    folder = folder or Path(os.environ.get("MINIPAGED_CACHE") or "~/.cache/minipaged").expanduser()
    try:
        return CppBackend(dtype, build(folder / "kernels", notice), same_bits, products)
    except (BuildFailed, OSError) as error:
        raise Unavailable(f"kernels in C++ can't be built: {error}") from None


def _triton(device: torch.device | str, dtype: torch.dtype) -> Backend:
    try:
        from kernels.triton_backend import TritonBackend, why_not
    except ImportError:
        raise Unavailable("kernels in Triton need the package triton (pip install triton; Linux only)") from None
    if reason := why_not(device, dtype):
        raise Unavailable(reason)
    return TritonBackend(device, dtype)
