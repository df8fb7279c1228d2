"""Contenders in processes of their own: `Worker` is the caller's end, `main` is what runs over there.

A contender may live in another environment, under another Python: all that the two ends share is lines of JSON over
the process's standard input and output.

    to it     {"contender": "vllm", "options": {...}}   then a Load for each run
    from it   {"ready": "0.32.0, ..."}                  then a Run for each load

Its last line is {"error": "..."} if it breaks. The input's end is the contender's end.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from minipaged.bench.contenders import LABELS, Options, build
from minipaged.bench.loads import Load, Run, check

ROOT = Path(__file__).parents[2]  # the folder that minipaged is imported from
QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
PATIENCE = 5.0  # seconds for a process to end when asked to


class ContenderFailed(RuntimeError):
    """A contender could not load, or broke; the message says how."""


class Worker:
    """One contender. It starts to load at once; `wait` tells when it has.

    python: the interpreter that has its packages.
    """

    def __init__(self, name: str, options: Options, python: str = sys.executable):
        self.name = name
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [python, "-m", "minipaged.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | QUIET | {"PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C in a terminal is heard by us alone, and what it starts ends with it
        )
        self._send({"contender": name, "options": asdict(options)})

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self) -> str | None:
        """Until it has loaded: what it says about itself. ContenderFailed if it can't."""
        return self._receive()["ready"]

    def run(self, load: Load) -> Run:
        """Run a load. ContenderFailed if it breaks, or yields anything but what was asked for."""
        self._send(asdict(load))
        run = Run(**self._receive())
        try:
            check(load, run)
        except RuntimeError as error:
            raise ContenderFailed(f"{LABELS[self.name]}: {error}") from None
        return run

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # if it died meanwhile, _receive finds that out
            print(json.dumps(message), file=self._process.stdin, flush=True)

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line.endswith("\n"):  # the end, perhaps in the middle of a line
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE)
            code = self._process.poll()
            why = "out of memory?" if code == -signal.SIGKILL else "see what it said above"
            raise ContenderFailed(f"{LABELS[self.name]}: its process died (exit code {code}): {why}")
        try:
            answer = json.loads(line)
        except ValueError:
            raise ContenderFailed(f"{LABELS[self.name]}: its answer is no JSON: {line!r:.100}") from None
        if "error" in answer:
            raise ContenderFailed(f"{LABELS[self.name]}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process and all that it started, whatever they are doing."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):  # none are left; macOS says the latter
                os.killpg(self.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close() if pipe else None


# --- over there ---------------------------------------------------------------------------------------------


def main() -> None:
    """Serve what stands at the other end of standard input and output."""
    with _channel() as (requests, answers):
        try:
            for answer in serve(requests):
                print(json.dumps(answer), file=answers, flush=True)
        except BrokenPipeError:
            pass
        except Exception as error:  # whatever breaks a contender, the others go on, and the reader is told
            text = " ".join(str(error).split())
            print(json.dumps({"error": f"{type(error).__name__}: {text:.300}"}), file=answers, flush=True)


@contextlib.contextmanager
def _channel() -> Iterator[tuple[IO[str], IO[str]]]:
    """Standard input and output, kept from all others: packages like to print, and what they start may read."""
    with os.fdopen(os.dup(0)) as requests, os.fdopen(os.dup(1), "w") as answers, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(2, 1)  # what is printed goes to standard error
        yield requests, answers


def serve(requests: Iterator[str] | IO[str]) -> Iterator[dict[str, Any]]:
    """Lines in, answers out: load the contender, then run the loads that come."""
    task = json.loads(next(requests))
    contender = build(task["contender"], Options(**task["options"]))
    yield {"ready": contender.about}
    for line in requests:
        load = Load(**json.loads(line))
        reset_peak_memory()
        run = contender.run(load)
        run.peak_bytes = peak_memory()
        yield asdict(run)


def reset_peak_memory() -> None:
    """Linux can forget a process's peak; elsewhere it is the peak since its beginning."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The most bytes of main memory that this process held at once."""
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most


if __name__ == "__main__":
    main()
