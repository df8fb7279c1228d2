"""How time is taken, and what the machine is.

What is compared is timed in turns, stretch by stretch, so that a machine that speeds up or slows down does so for
all alike. A stretch is many calls on end, between two readings of the clock, and nothing waits for the GPU in it.
"""

import gc
import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Tensor]
STRETCH = {"cuda": 0.02, "cpu": 0.03}  # seconds: far above what reading the clock costs
COPIED = {"cuda": 1 << 30, "cpu": 128 << 20}  # bytes, larger than any cache
MULTIPLIED = {"cuda": 8192, "cpu": 1024}  # rows and columns of matrices that keep all units busy
SHARE = {"cuda": 0.85, "cpu": 0.5}  # of the free memory, for one cell: kernels and peers need some of their own


class WrongKernel(RuntimeError):
    """A kernel's result differs from the reference's, so its speed is of no interest."""


@dataclass(frozen=True)
class Contender:
    """calls: made one after another, each with its own inputs; together these are too large for a cache.

    in_graph: on a GPU, the calls are captured in a CUDA graph, as the engine does for a step, and its replays are
    timed: what starting kernels from Python costs is left out. Code that waits for the GPU can't be captured.
    """

    calls: list[Call]
    in_graph: bool = True

    def once(self) -> None:
        for call in self.calls:
            call()


@dataclass(frozen=True)
class Times:
    """Seconds of one call, for each stretch.

    >>> times = Times([1.0, 1.1, 4.0])
    >>> times.median, round(times.spread, 2)
    (1.1, 2.73)
    """

    seconds: list[float]
    in_graph: bool = False

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """From the fastest to the slowest, as a part of the median. Smaller differences than this are noise."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def measure(
    contenders: dict[str, Contender], device: torch.device, rounds: int, seconds: float | None = None
) -> dict[str, Times]:
    """Time all contenders in turns. seconds: how long a stretch takes about."""
    clock = gpu_clock if device.type == "cuda" else wall_clock
    seconds = seconds or STRETCH[device.type]
    passes = {name: _prepare(contender, device) for name, contender in contenders.items()}
    repeats = {name: max(round(seconds / max(clock(run)(), 1e-9)), 1) for name, run in passes.items()}
    stretches: dict[str, list[Callable[[], float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in passes.items():
            stretches[name].append(clock(lambda run=run, n=repeats[name]: [run() for _ in range(n)]))  # type: ignore[misc]
    return {
        name: Times(
            [read() / repeats[name] / len(contender.calls) for read in stretches[name]], passes[name] != contender.once
        )
        for name, contender in contenders.items()
    }


def _prepare(contender: Contender, device: torch.device) -> Callable[[], object]:
    """Warm up (compile, allocate); then what makes all calls once."""
    if device.type != "cuda":
        contender.once()
        return contender.once
    side = torch.cuda.Stream(device)  # what is to be captured must have run on a stream of its own before
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        contender.once()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    if not contender.in_graph:
        return contender.once
    before, graph = torch.cuda.current_stream(device), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            contender.once()
    except RuntimeError:  # something in it can't be captured; it can be timed all the same
        torch.cuda.set_stream(before)
        return contender.once
    graph.replay()  # the first replay uploads the graph
    torch.cuda.synchronize(device)
    return graph.replay


def wall_clock(work: Callable[[], object]) -> Callable[[], float]:
    """Do the work. Returns a function that tells the seconds it took."""
    begin = perf_counter()
    work()
    seconds = perf_counter() - begin
    return lambda: seconds


def gpu_clock(work: Callable[[], object]) -> Callable[[], float]:
    """The same on a GPU: only queue the work, and two marks around it; who asks for the seconds waits for them."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()

    def seconds() -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000  # from milliseconds

    return seconds


def copy_contender(device: torch.device, size: int | None = None) -> tuple[Contender, int]:
    """A copy from memory to memory on the device, and the bytes that it moves: all are read and written once."""
    size = size or COPIED[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Contender([lambda: target.copy_(source)]), 2 * size


def product_contender(device: torch.device, dtype: torch.dtype, size: int | None = None) -> tuple[Contender, int]:
    """A product of two square matrices, and its operations. Of random numbers: zeros are multiplied faster."""
    size = size or MULTIPLIED[device.type]
    left, right = torch.empty(2, size, size, dtype=dtype, device=device).normal_()
    out = torch.empty_like(left)
    return Contender([lambda: torch.mm(left, right, out=out)]), 2 * size**3


# --- the machine --------------------------------------------------------------------------------------------


def cache_bytes(device: torch.device) -> int:
    """The last cache before memory, 32 MiB where nobody tells."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 32 << 20
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.removesuffix("K")) << 10
    except (OSError, ValueError):
        return 32 << 20


def free_bytes(device: torch.device) -> int:
    """How much memory one cell may take."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(SHARE["cuda"] * torch.cuda.mem_get_info(device)[0])
    kib = _fields("/proc/meminfo").get("MemAvailable", "").removesuffix(" kB")
    free = int(kib) << 10 if kib else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(SHARE["cpu"] * free)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    info: dict[str, Any] = {
        "device": device.type,
        "cpu": _fields("/proc/cpuinfo").get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        info |= {"gpu": gpu.name, "memory_bytes": gpu.total_memory, "multiprocessors": gpu.multi_processor_count}
        info |= {"cuda": torch.version.cuda, "capability": f"{gpu.major}.{gpu.minor}"}
    return info


def _fields(file: str) -> dict[str, str]:
    """The first of each `name: value` in a file of the Linux kernel; nothing elsewhere."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
