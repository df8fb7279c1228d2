"""Contenders in processes of their own: `Worker` is the caller's end, `serve` is what runs over there."""

import contextlib
import multiprocessing
import os
import signal
import sys
from pathlib import Path

from minipaged.bench.contenders import LABELS, Options, build
from minipaged.bench.loads import Load, Run, check


class ContenderFailed(RuntimeError):
    """A contender could not load, or broke; the message says how."""


class Worker:
    """One contender. It starts to load at once; `wait` tells when it has."""

    def __init__(self, name: str, options: Options):
        self.name = name
        context = multiprocessing.get_context("spawn")  # fork would take over half-dead threads
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, name, options), daemon=True)
        with _inherited():
            self._process.start()
        theirs.close()

    def wait(self) -> None:
        """Until it has loaded. ContenderFailed if it can't."""
        self._receive()

    def run(self, load: Load) -> Run:
        """Run a load. ContenderFailed if it breaks, or yields anything but what was asked for."""
        with contextlib.suppress(ConnectionError):  # if it died meanwhile, _receive finds that out
            self._connection.send(load)
        run = self._receive()
        assert run is not None
        try:
            check(load, run)
        except RuntimeError as error:
            raise ContenderFailed(f"{LABELS[self.name]}: {error}") from None
        return run

    def _receive(self) -> Run | None:
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(5)
            code = self._process.exitcode
            raise ContenderFailed(f"{LABELS[self.name]}: its process died (exit code {code}): out of memory?") from None
        if isinstance(answer, str):
            raise ContenderFailed(f"{LABELS[self.name]}: {answer}")
        return answer

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.terminate()
        self._process.join()
        self._connection.close()


@contextlib.contextmanager
def _inherited():
    """What a process that starts now is born with: deaf to Ctrl-C, which the parent hears, and quiet."""
    environment, handler = os.environ.copy(), signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}  # read when they are imported
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        signal.signal(signal.SIGINT, handler)


def serve(connection, name: str, options: Options) -> None:
    """Load the contender, send None; then send a Run for each Load, until the parent goes away."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # standard output is for the results
    try:
        contender = build(name, options)
        connection.send(None)
        while True:
            load = connection.recv()
            reset_peak_memory()
            run = contender.run(load)
            run.peak_bytes = peak_memory()
            connection.send(run)
    except (EOFError, ConnectionError):
        pass
    except Exception as error:  # whatever breaks a contender, the others go on, and the reader is told
        text = " ".join(str(error).split())
        connection.send(f"{type(error).__name__}: {text:.300}")


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
