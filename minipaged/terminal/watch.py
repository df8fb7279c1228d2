"""What is shown while an engine runs: nothing, a line of progress, or the memory itself (`--watch`).

display = Watch(llm, console)
with display:
    ...  # llm.step() again and again
"""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from minipaged.terminal.draw import picture
from minipaged.terminal.snapshot import Observer

if TYPE_CHECKING:  # PyTorch is not needed to wait for PyTorch
    from minipaged.llm import LLM
    from minipaged.scheduling.plan import StepOutput, StepPlan

FRAME_SECONDS = 0.08  # between two drawings; steps may be faster
NUM_EVENTS = 3  # lines for what happened last
PATIENCE = 2.0  # seconds before a wait is explained


class Display:
    """Shows nothing. While it is entered, it is told of every step, and results are printed through it."""

    def __init__(self, llm: "LLM", console: Console):
        self._llm, self._console = llm, console
        self._began = time.monotonic()
        self._drawn = -math.inf
        self._live = Live(console=console, auto_refresh=False, redirect_stdout=False)

    def __enter__(self) -> "Display":
        self._llm.observers.append(self._after_step)
        return self

    def __exit__(self, *_: object) -> None:
        self._llm.observers.remove(self._after_step)
        self._live.stop()

    def print(self, flush: Callable[[], None]) -> None:
        """Print results by calling `flush`, now or, where it would spoil the picture, not yet."""
        flush()

    def _after_step(self, plan: "StepPlan", _: "StepOutput") -> None:
        pass

    def _draw(self, text: Text) -> None:
        self._live.start()
        self._live.update(text, refresh=True)
        self._drawn = time.monotonic()

    def _is_time(self) -> bool:
        return time.monotonic() - self._drawn > FRAME_SECONDS

    def _speed(self) -> str:
        return f"{self._llm.stats().num_output_tokens / (time.monotonic() - self._began):.0f} tokens/s"


class ProgressLine(Display):
    """One line that is drawn over again and again, and leaves nothing behind."""

    def __init__(self, llm: "LLM", console: Console):
        super().__init__(llm, console)
        self._live.transient = True

    def _after_step(self, plan: "StepPlan", _: "StepOutput") -> None:
        if self._is_time():
            stats = self._llm.stats()
            counts = {"finished": stats.num_finished, "running": stats.num_running}
            counts |= {"waiting": stats.num_waiting, "swapped out": stats.num_swapped}
            words = [f"{count} {word}" for word, count in counts.items() if count or word == "finished"]
            self._draw(Text(", ".join([*words, self._speed()])))

    def print(self, flush: Callable[[], None]) -> None:
        self._live.stop()
        flush()


class EventLines(Display):
    """What happens to the memory, a line for each thing: for a file or a pipe."""

    def __init__(self, llm: "LLM", console: Console):
        super().__init__(llm, console)
        self._observer = Observer(llm)

    def _after_step(self, plan: "StepPlan", output: "StepOutput") -> None:
        usage = self._llm.memory.usage()
        for event in self._observer.follow(plan, output):
            where = f"{usage.used} of {usage.num_blocks} blocks in use"
            print(f"step {plan.step}: {event} [{where}]", file=self._console.file)


class Watch(Display):
    """The memory, drawn after each step as far as the eye can follow. Lists the last events below."""

    def __init__(self, llm: "LLM", console: Console):
        super().__init__(llm, console)
        self._observer = Observer(llm)
        self._events: deque[str] = deque(maxlen=NUM_EVENTS)
        self._step = 0
        self._tallest = 0  # frame so far: shrinking again would make the screen jump

    def __exit__(self, *details: object) -> None:
        self._draw(self.frame())
        super().__exit__(*details)

    def _after_step(self, plan: "StepPlan", output: "StepOutput") -> None:
        self._step = plan.step
        self._events.extend(f"step {plan.step}: {event}" for event in self._observer.follow(plan, output))
        if self._is_time():
            text = self.frame()
            lines = text.plain.count("\n")
            self._tallest = max(self._tallest, lines)
            self._draw(text.append("\n" * (self._tallest - lines)))

    def frame(self) -> Text:
        """What the screen shows now: as much as fits, and a line left for the shell's prompt."""
        width, height = self._console.size
        title = f"step {self._step}, {self._speed()}"
        return picture(self._observer.snapshot(), title, self._events, width, max(1, height - 1))

    def print(self, flush: Callable[[], None]) -> None:
        if not sys.stdout.isatty():  # else they are printed below the last picture
            flush()


def can_draw(console: Console) -> bool:
    """Whether lines on this console can be drawn over: not in a file or a pipe."""
    return console.file.isatty() and console.is_terminal and not console.is_dumb_terminal


@contextlib.contextmanager
def waiting(console: Console, words: str) -> Iterator[None]:
    """Say what we are waiting for, and for how long, once it takes longer than PATIENCE.

    Ctrl-C ends the program at once. It can't be an exception here: a library that is being imported may swallow
    it, and PyTorch's C++ part aborts.
    """

    def leave(*_: object) -> None:
        console.show_cursor()
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)

    columns = SpinnerColumn(), TextColumn(words), TimeElapsedColumn()
    progress = Progress(*columns, console=console, transient=True, redirect_stdout=False)
    progress.add_task(words)
    timer = threading.Timer(PATIENCE, progress.start)
    with _on_interrupt(leave):
        if can_draw(console):
            timer.start()
        try:
            yield
        finally:
            timer.cancel()
            if timer.ident is not None:
                timer.join()
                progress.stop()


@contextlib.contextmanager
def note_interrupts() -> Iterator[list[int]]:
    """A list that stays empty until Ctrl-C. Only a second one, if nobody heeds the first, is an exception.

    An exception at just any place could leave the terminal or the engine in a state that nobody thought of.
    """
    interrupts: list[int] = []

    def note(signum: int, _: object) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(signum)

    with _on_interrupt(note):
        yield interrupts


@contextlib.contextmanager
def _on_interrupt(action: Callable[..., None]) -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, action)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is action:
            signal.signal(signal.SIGINT, before)
