"""Running what the figures ask for: in parallel, with a progress bar, and stopped cleanly by Ctrl-C."""

from __future__ import annotations

import gc
import multiprocessing
import queue
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from minipaged.experiments.runs import Points, Result, Run, execute, sweep


@dataclass(frozen=True)
class Settings:
    """What the user chose. quick: traces of a fifteenth. folder: where results are kept; None: nowhere.

    trace: a file with requests, instead of a figure's own (Figures 2, 12 and 13).
    """

    quick: bool = False
    seed: int | None = None
    workers: int = 1
    folder: Path | None = None
    trace: Path | None = None


class Study:
    """Answers `results` and `sweeps`, the two questions that figures ask. Use as a context manager."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.seed = settings.seed or 0

    def __enter__(self) -> Study:
        self._pool = ProcessPoolExecutor(self.settings.workers, initializer=_begin)
        with _interrupts_later():
            self._pool.submit(int)  # starts all workers
        return self

    def __exit__(self, *exception: Any) -> None:
        self._pool.shutdown(wait=exception[0] is None, cancel_futures=True)
        for worker in multiprocessing.active_children():  # what they were at is of no use any more
            worker.terminate()

    def seconds(self, full: float) -> float:
        """How long a trace is: the paper's length, or a part of it."""
        return full / 15 if self.settings.quick else full

    def goal(self, allowed: float) -> float | None:
        """How far a number may be off: it is said of whole traces only."""
        return None if self.settings.quick else allowed

    def results(self, title: str, runs: Iterable[Run]) -> list[Result]:
        return self._drive(title, [_once(run) for run in runs], 1)

    def sweeps(self, title: str, runs: Iterable[Run]) -> list[Points]:
        """For each run the points from little load to too much; its own rate does not matter."""
        return self._drive(title, [sweep(run, coarse=self.settings.quick) for run in runs], 6)

    def each(self, title: str, function: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> list[Any]:
        """[function(*item) for item in items], on all processors. A function of a module, so that it can be sent."""
        return self._drive(title, [_once((function, item)) for item in items], 1)

    def _drive(self, title: str, asking: list[Generator[Any, Any, Any]], usual: int) -> list[Any]:
        """Feed generators with the results of what they yield, as these come. usual: how many each is going to want."""
        answers: queue.SimpleQueue[tuple[int, Future[Any]]] = queue.SimpleQueue()
        returned: list[Any] = [None] * len(asking)
        asked = [0] * len(asking)

        def step(index: int, send: Any) -> None:
            try:
                wanted = asking[index].send(send)
            except StopIteration as end:
                returned[index], asked[index] = end.value, -1
                return
            asked[index] += 1
            function, arguments = wanted if isinstance(wanted, tuple) else (execute, (wanted, self.settings.folder))
            self._pool.submit(function, *arguments).add_done_callback(lambda future: answers.put((index, future)))

        with progress(title) as advance:
            done = 0
            for index in range(len(asking)):
                step(index, None)
            while any(count > 0 for count in asked):
                advance(done, done + sum(max(usual - count + 1, 1) for count in asked if count > 0))
                index, future = answers.get()
                done += 1
                step(index, future.result())
        return returned


def _once(wanted: Any) -> Generator[Any, Any, Any]:
    return (yield wanted)


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Python loses a Ctrl-C that comes while it forks, so it waits until that is done."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _begin() -> None:
    """In a new worker: leave interrupts to the parent, and what the parent left lying about, too.

    A worker is a fork. If it collected the parent's garbage, a model's say, that might wait for ever for threads that
    only the parent has.
    """
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # this is how it ends them


@contextmanager
def progress(title: str) -> Iterator[Callable[..., None]]:
    """A bar on standard error, if that is a terminal. Yields a function (done, of, and a new title or none)."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} of {task.total}"))
    bar = Progress(
        *columns, TimeElapsedColumn(), console=Console(file=sys.stderr), transient=True, disable=not sys.stderr.isatty()
    )
    with bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, now=title: bar.update(task, completed=done, total=total, description=now)
