"""How far it is: a bar in a terminal, else a line now and then. To standard error, and only if it takes a while."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PATIENCE = 2.0  # seconds until there is a bar
LINES_EVERY = 20.0  # seconds, where there is no terminal


class Shown:
    """To be used in a `with`; `doing(what)` is called with how much of it is done, and how much there is."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.began = self.said = time.monotonic()
        self.task = self.bar.add_task("", total=None)

    def __enter__(self) -> "Shown":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def doing(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self._tell(what, done, total)

    def _tell(self, what: str, done: int, total: int) -> None:
        self.bar.update(self.task, description=what, completed=done, total=total)
        now = time.monotonic()
        if self.console.is_terminal and now - self.began > PATIENCE:
            self.bar.start()
        elif now - self.said > LINES_EVERY:
            self.said = now
            self.console.print(f"{what}: {done} of {total}", soft_wrap=True)
