"""Where a decode step's time goes: the kernels, how many are launched, and how long the device waits between them.

    python -m minipaged.bench.decode_profile --model FOLDER [--batch 1 8 64] [--steps 20] [--json]

With CUDA graphs and without. How long a step takes is measured first, without the profiler, which slows launches down;
what the device does in it is then read from the profiler's trace. On a CPU operators stand for kernels: that shows
that it works.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from kernels.bench.tables import plain_table
from minipaged.llm import LLM
from minipaged.requests.sampling_params import SamplingParams

CONTEXT = 512  # tokens of each prompt
WARMUP = 5  # steps
TOP = 8  # kernels
ON_DEVICE = {"cuda": ("kernel", "gpu_memcpy", "gpu_memset"), "cpu": ("cpu_op",)}  # categories of the trace
LAUNCHES = ("LaunchKernel", "GraphLaunch")  # in names of calls of the runtime and the driver
Event = dict[str, Any]


def profile_decode(model: str, batches: list[int], steps: int, device: str, **settings: Any) -> list[dict[str, Any]]:
    """A row for each batch, with graphs and without, where there are any."""
    blocks = max(batches) * (-(-(CONTEXT + _most_tokens(steps)) // 16) + 2) + 16
    llm = LLM(model, device=device, num_blocks=blocks, num_cpu_blocks=0, prefix_cache="none",
              max_num_seqs=max(batches), **settings)  # fmt: skip
    graphs = llm.executor.runner.graphs
    rows = []
    for batch in batches:
        for using in [graphs, None] if graphs else [None]:
            llm.executor.runner.graphs = using
            rows.append({"batch": batch, "graphs": using is not None} | _measure(llm, batch, steps))
    return rows


def _most_tokens(steps: int) -> int:
    """Of an output: the first has many when the last gets its first."""
    return CONTEXT // 2 + WARMUP + 2 * steps


def _measure(llm: LLM, batch: int, steps: int) -> dict[str, Any]:
    params = SamplingParams(temperature=0.0, max_tokens=_most_tokens(steps), ignore_eos=True)
    vocab, device = llm.config.vocab_size, llm.executor.runner.device
    names = [llm.add_request([(7 * i + k) % vocab for k in range(CONTEXT)], params) for i in range(batch)]
    try:
        started: set[str] = set()
        while len(started) < batch:
            started |= {output.request_id for output in llm.step()}
        for _ in range(WARMUP):
            llm.step()
        _wait(device)
        began = time.perf_counter()
        for _ in range(steps):
            llm.step()
        _wait(device)
        seconds = time.perf_counter() - began
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
        with profile(activities=activities) as profiler:
            for _ in range(steps):
                llm.step()
            _wait(device)
    finally:
        for name in names:
            llm.abort(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    row = {"step_ms": 1000 * seconds / steps} | read_trace(events, steps, ON_DEVICE[device])
    return row | {"idle": max(0.0, 1 - row["busy_ms"] / row["step_ms"])}


def read_trace(events: list[Event], steps: int, categories: tuple[str, ...], top: int = TOP) -> dict[str, Any]:
    """What a step does, of a trace of several. Times in the trace are microseconds.

    busy_ms: while anything runs on the device. gaps_ms, longest_gap_us: between two things that run, and nothing does.

    >>> names = [
    ...     ("kernel", "a", 0, 10),
    ...     ("kernel", "b", 5, 10),
    ...     ("cuda_runtime", "cudaLaunchKernel", 0, 1),
    ...     ("kernel", "a", 20, 30),
    ... ]
    >>> events = [{"cat": c, "name": n, "ts": t, "dur": d} for c, n, t, d in names]
    >>> row = read_trace(events, 1, ("kernel",))
    >>> row["kernels"], row["launches"], row["busy_ms"], row["gaps_ms"], row["longest_gap_us"]
    (3.0, 1.0, 0.045, 0.005, 5.0)
    >>> row["top"][0]
    {'name': 'a', 'count': 2.0, 'ms': 0.04, 'share': 0.8}
    """
    device = [event for event in events if event.get("cat") in categories and "dur" in event]
    spans = sorted((float(event["ts"]), float(event["ts"]) + float(event["dur"])) for event in device)
    busy, gaps, until = 0.0, [0.0], spans[0][0] if spans else 0.0
    for begin, end in spans:
        if begin > until:
            gaps.append(begin - until)
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    calls = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    sums: dict[str, list[float]] = defaultdict(list)
    for event in device:
        sums[event["name"]].append(float(event["dur"]))
    total = sum(map(sum, sums.values()))
    longest = sorted(sums, key=lambda name: -sum(sums[name]))[:top]
    return {
        "kernels": len(device) / steps,
        "launches": sum(any(word in call["name"] for word in LAUNCHES) for call in calls) / steps,
        "busy_ms": busy / 1000 / steps,
        "gaps_ms": sum(gaps) / 1000 / steps,
        "longest_gap_us": max(gaps),
        "top": [
            {"name": name[:70], "count": len(sums[name]) / steps, "ms": sum(sums[name]) / 1000 / steps,
             "share": sum(sums[name]) / total}
            for name in longest
        ],
    }  # fmt: skip


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """For eyes: a table, and under it what takes longest in each row."""
    head = ["graphs", "batch", "step ms", "busy ms", "idle %", "kernels", "launches", "gaps ms", "longest gap us"]
    table = [head]
    for row in rows:
        figures = [row["step_ms"], row["busy_ms"], 100 * row["idle"], row["kernels"], row["launches"], row["gaps_ms"]]
        cells = [*(f"{figure:.2f}" for figure in figures), f"{row['longest_gap_us']:.0f}"]
        table.append(["yes" if row["graphs"] else "no", str(row["batch"]), *cells])
    text = plain_table(table)
    for row in rows:
        text.append(f"batch {row['batch']}, {'with' if row['graphs'] else 'without'} graphs, per step:")
        text += [
            f"  {100 * k['share']:5.1f} %  {k['ms']:8.3f} ms  {k['count']:6.1f} x  {k['name']}" for k in row["top"]
        ]
    return text


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m minipaged.bench.decode_profile", description=__doc__,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = flags.add_argument
    add("--model", default="smollm2", help="see python -m minipaged.bench --help")
    add("--batch", type=int, nargs="+", default=[1, 8, 64], metavar="N", help="sequences (default: 1 8 64)")
    add("--steps", type=int, default=20, metavar="N", help="that are measured (default: 20)")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    add("--json", action="store_true", help="print JSON")
    args = flags.parse_args()
    rows = profile_decode(args.model, args.batch, args.steps, args.device, dtype=args.dtype)
    print(
        json.dumps({"steps": args.steps, "context": CONTEXT, "results": rows}) if args.json else "\n".join(lines(rows))
    )


if __name__ == "__main__":
    main()
