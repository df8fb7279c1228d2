"""The parts of a GPU run: what each does, how long it may take, and how what it says is read. See gpu.py."""

import contextlib
import importlib.util
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipaged import cache_folder

TESTS = ["test_gpu.py", "test_decode_graphs.py", "test_timing.py", "test_triton.py"]
SLOW_TEST = "tests/test_triton.py::test_attention_equals_the_reference"  # compiles a kernel for each of 200 examples
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
Figures = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """command: after `python -m`. seconds: at the most. read: what its standard output says. show: that, for eyes."""

    command: list[str]
    seconds: float
    read: Callable[[str], Figures]
    show: Callable[[Figures], list[str]]


# --- what there is to do --------------------------------------------------------------------------------------------


def parts(folder: Path, dry: bool) -> dict[str, Part]:
    """In the order of their importance; weights before what needs them."""
    device = "cpu" if dry else "cuda"
    shapes = ("tiny",) if dry else ("llama3-1b", "llama3-8b")
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") and not dry else []
    tests = ["pytest", *(f"tests/{name}" for name in (TESTS[:1] if dry else TESTS)), "-vv", "--tb=line", "-p",
             "no:cacheprovider", "--deselect", SLOW_TEST, *workers]  # fmt: skip
    cells = ["--smoke", "--model", "smollm2", "--kernels", "triton", "--dtype", "fp32"]
    cells = cells if dry else ["--points", "--model", "llama3-8b", "--limit", "75"]
    kernels = ["kernels.bench", "--json", "--device", device, "--what", "contiguous", "prefill", *cells]
    found = {
        "tests": Part(tests, 140, read_tests, show_tests),
        "kernels": Part(kernels, 95, read_json, show_kernels),
    }
    for shape in shapes:
        model = str(folder / shape)
        make = ["minipaged.bench.weights", shape, model, "--device", device]
        found[f"weights {shape}"] = Part(make, 45, lambda text: {}, lambda figures: [])
        found[f"engine {shape}"] = Part(_engine(model, device, "bf16"), 80, read_json, show_engine)
        if shape == shapes[0]:
            steps = ["--steps", "2", "--batch", "2", "--dtype", "fp32"] if dry else ["--steps", "20"]
            profile = ["minipaged.bench.decode_profile", "--json", "--model", model, "--device", device, *steps]
            found["profile"] = Part(profile, 60, read_json, show_profile)
    if not dry and (cache_folder() / SMOLLM2).is_file() and importlib.util.find_spec("gguf"):
        found["smollm2"] = Part(_engine("smollm2", device, "bf16"), 45, read_json, show_engine)
    return found


def _engine(model: str, device: str, dtype: str) -> list[str]:
    some = ["--quick", "--load", "batch1", "--kernels", "torch", "--threads", "1"]
    load = some if device == "cpu" else ["--load", "batch1", "batch8", "batch64"]
    return ["minipaged.bench", "--json", "--model", model, "--device", device, "--dtype", dtype, "--peer", "no-graphs",
            *load]  # fmt: skip


# --- what the parts say ---------------------------------------------------------------------------------------------


def read_json(text: str) -> Figures:
    """The object in a text; what packages print before it is skipped. ValueError if there is none.

    >>> read_json('profiler_start\\n{"a": 1}\\n')
    {'a': 1}
    """
    begin = re.search(r"^\{", text, re.MULTILINE)
    return json.JSONDecoder().raw_decode(text[begin.start() :] if begin else "")[0]


def read_tests(text: str) -> Figures:
    """Counts of tests, also if pytest was stopped, and a line for each failure.

    >>> read_tests("t.py::a PASSED [ 50%]\\n[gw1] [100%] FAILED t.py::b\\nFAILED t.py::b - assert 1 == 2\\n")
    {'passed': 1, 'failed': 1, 'skipped': 0, 'failures': ['t.py::b - assert 1 == 2']}
    """
    lines, word = text.splitlines(), r"^\[gw\d+\] \[ *\d+%\] (\w+) |::.* (PASSED|FAILED|ERROR|SKIPPED)\b.*\[ *\d+%\]$"
    words = [match[1] or match[2] for match in (re.search(word, line) for line in lines) if match]
    words += ["ERROR"] * sum(line.startswith("ERROR ") and "::" not in line for line in lines)  # a file with no tests
    told = [line.split(" ", 1)[1][:300] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    failed = words.count("FAILED") + words.count("ERROR")
    if not words:
        raise ValueError("no test ran")
    return {"passed": words.count("PASSED"), "failed": failed, "skipped": words.count("SKIPPED"), "failures": told}


def show_tests(figures: Figures) -> list[str]:
    counts = ", ".join(f"{figures[word]} {word}" for word in ("passed", "failed", "skipped"))
    return [counts, *(f"  {line}" for line in figures["failures"])]


def show_kernels(figures: Figures) -> list[str]:
    from kernels.bench.tables import print_report

    return _printed(print_report, figures)


def show_engine(figures: Figures) -> list[str]:
    from minipaged.bench.report import print_report

    return _printed(print_report, figures)


def show_profile(figures: Figures) -> list[str]:
    from minipaged.bench.decode_profile import lines

    return lines(figures["results"])


def _printed(draw: Callable[[Figures], None], figures: Figures) -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        draw(figures)
    return text.getvalue().splitlines()
