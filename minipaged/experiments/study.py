"""Running what the figures ask for: in parallel, with a progress bar, and stopped cleanly by Ctrl-C."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
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

    load: instead of a figure's own one, a file with a trace (Figures 2, 12 and 13).
    """

    quick: bool = False
    seed: int = 0
    workers: int = 1
    folder: Path | None = None
    trace: Path | None = None


class Study:
    """Answers `results` and `sweeps`, the two questions that figures ask. Use as a context manager."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.num_runs = 0  # that were asked for, whether they were computed or read
        if settings.folder:
            settings.folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Study:
        self._pool = multiprocessing.Pool(self.settings.workers, _leave_interrupts_to_the_parent)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._pool.terminate()
        self._pool.join()

    def seconds(self, full: float) -> float:
        """How long a trace is: the paper's length, or a part of it."""
        return full / 15 if self.settings.quick else full

    def results(self, title: str, runs: Iterable[Run]) -> list[Result]:
        return self._drive(title, [_once(run) for run in runs], 1)

    def sweeps(self, title: str, runs: Iterable[Run]) -> list[Points]:
        """For each run the points from little load to too much; its own rate does not matter."""
        return self._drive(title, [sweep(run) for run in runs], 6)

    def each(self, title: str, function: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> list[Any]:
        """[function(*item) for item in items], on all processors. A function of a module, so that it can be sent."""
        return self._drive(title, [_once((function, item)) for item in items], 1)

    def _drive(self, title: str, asking: list[Generator[Any, Any, Any]], usual: int) -> list[Any]:
        """Feed generators with the results of what they yield, as these come. usual: how many each is going to want."""
        answers: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        returned: list[Any] = [None] * len(asking)
        asked = [0] * len(asking)

        def step(index: int, send: Any) -> None:
            try:
                wanted = asking[index].send(send)
            except StopIteration as end:
                returned[index], asked[index] = end.value, -1
                return
            asked[index] += 1
            self.num_runs += 1
            function, arguments = wanted if isinstance(wanted, tuple) else (execute, (wanted, self.settings.folder))
            self._pool.apply_async(
                function, arguments,
                callback=lambda result: answers.put((index, result, None)),
                error_callback=lambda error: answers.put((index, None, error)),
            )  # fmt: skip

        with progress(title) as advance:
            done = 0
            for index in range(len(asking)):
                step(index, None)
            while any(count > 0 for count in asked):
                advance(done, done + sum(max(usual - count + 1, 1) for count in asked if count > 0))
                index, result, error = answers.get()
                if error:
                    raise error
                done += 1
                step(index, result)
        return returned


def _once(wanted: Any) -> Generator[Any, Any, Any]:
    return (yield wanted)


def _leave_interrupts_to_the_parent() -> None:
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
