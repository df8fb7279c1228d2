"""All that a GPU is needed for, in one command of eight minutes: tests, kernels, the engine, a profile of its steps.

    python -m minipaged.bench.gpu [--out results/gpu]        or: make gpu [OUT=folder]
    python -m minipaged.bench.gpu --dry-run                  every part in small, on a CPU: shows that it works

Needs no network and installs nothing: weights are random ones, in the shape of real models. Each part is a process of
its own with a budget of seconds; whatever breaks or hangs in it, the others go on, and after each part all that is
known so far is written: gpu.json, gpu.txt (for eyes), gpu.log (what the parts said). This file imports nothing but the
standard library by itself, so that a package that is missing breaks no more than the parts that need it.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from minipaged.bench.gpu_parts import Part, parts

TOTAL = 455.0  # seconds, of the eight minutes: ending and writing take some, too
LEAST = 15.0  # seconds: what has less left than this is not begun
GRACE = 8.0  # seconds for a part to end when it is told to
ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "jinja2", "numpy", "pytest", "pytest-xdist",
            "hypothesis", "rich", "gguf", "accelerate")  # fmt: skip
ROOM = 24 << 30  # bytes that the largest weights need


def run(out: Path, dry: bool, total: float = TOTAL, chosen: dict[str, Part] | None = None) -> dict[str, Any]:
    """All parts, one after another; the report, as it is written after each of them. chosen: for tests."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    report: dict[str, Any] = {"dry_run": dry, "machine": machine(), "parts": {}}
    with tempfile.TemporaryDirectory(prefix="minipaged-gpu-", dir=_room()) as folder, open(out / "gpu.log", "w") as log:
        todo = parts(Path(folder), dry) if chosen is None else chosen
        for name, part in todo.items():
            left = total - (time.monotonic() - began)
            print(f"{name} (at most {min(part.seconds, left):.0f} s)", file=sys.stderr, flush=True)
            row = run_part(part, min(part.seconds, left), log, dry) if left > LEAST else {"outcome": "no time was left"}
            report["parts"][name] = row
            report["seconds"] = time.monotonic() - began
            (out / "gpu.json").write_text(json.dumps(report, indent=1))
            (out / "gpu.txt").write_text("\n".join(show(report, todo)) + "\n")
            print(f"{name}: {row['outcome']}, {row.get('seconds', 0):.0f} s", file=sys.stderr, flush=True)
    return report


def run_part(part: Part, seconds: float, log: IO[str], dry: bool) -> dict[str, Any]:
    """outcome: "ok", or what went wrong; figures: what was found out all the same; said: the last lines of errors."""
    small = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if dry else {}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | small | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    began, outcome = time.monotonic(), "ok"
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen([sys.executable, "-m", *part.command], cwd=ROOT, env=env, stdout=stdout,
                                   stderr=stderr, start_new_session=True)  # fmt: skip
        with _ended(process):
            try:
                status = process.wait(seconds)
                outcome = "ok" if status == 0 else f"exit status {status}"
            except subprocess.TimeoutExpired:
                outcome = f"stopped after {seconds:.0f} s"
        stdout.seek(0)
        stderr.seek(0)
        text, said = stdout.read(), stderr.read()
    log.write(f"===== {' '.join(part.command)}\n{said}\n{text}\n")
    log.flush()
    row: dict[str, Any] = {"outcome": outcome, "seconds": round(time.monotonic() - began, 1)}
    try:
        row["figures"] = part.read(text)
    except ValueError:
        row["outcome"] = outcome if outcome != "ok" else "gave no figures"
    return row if row["outcome"] == "ok" else row | {"said": said.splitlines()[-12:]}


def _room() -> str | None:
    """A folder in memory for the weights, where there is one that holds them: 16 GB are written and read at once."""
    with contextlib.suppress(OSError):
        if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > ROOM:
            return "/dev/shm"
    return None


@contextlib.contextmanager
def _ended(process: subprocess.Popen) -> Iterator[None]:
    """It and all that it started are gone after this, first by a word (some report then), then by force."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def machine() -> dict[str, Any]:
    ask = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        gpu = None
    return {
        "gpu, driver, memory": gpu,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def show(report: dict[str, Any], todo: dict[str, Part]) -> list[str]:
    info = report["machine"]
    versions = ", ".join(f"{name} {version or 'MISSING'}" for name, version in info["packages"].items())
    lines = [f"{info['gpu, driver, memory'] or 'no GPU'}; {info['cores']} cores; {info['system']}",
             f"Python {info['python']}, {versions}", f"{report['seconds']:.0f} s in all", ""]  # fmt: skip
    for name, row in report["parts"].items():
        lines += [f"===== {name}: {row['outcome']}, {row.get('seconds', 0)} s: {' '.join(todo[name].command)}"]
        try:
            lines += todo[name].show(row["figures"]) if "figures" in row else []
        except Exception as error:  # a table that can't be drawn should not cost the others
            lines += [f"(no table: {type(error).__name__}: {error})"]
        lines += [*(f"| {line}" for line in row.get("said", ())), ""]
    return lines


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 all parts are fine, 1 one is not, 130 interrupted by Ctrl-C."""
    flags = argparse.ArgumentParser(prog="python -m minipaged.bench.gpu", description=__doc__,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    flags.add_argument("--out", type=Path, default=Path("results/gpu"), help="a folder (default: results/gpu)")
    flags.add_argument("--dry-run", action="store_true", help="every part in small, on a CPU; the figures mean nothing")
    args = flags.parse_args(argv)
    try:
        report = run(args.out, args.dry_run)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print((args.out / "gpu.txt").read_text(), end="")
    return int(any(row["outcome"] != "ok" for row in report["parts"].values()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: processes and weights go with us
    sys.exit(main())
