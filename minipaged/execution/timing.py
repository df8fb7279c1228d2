"""Where a step's time goes, on a CPU and on a GPU.

A GPU runs behind: when `model(...)` returns, its kernels have been queued, and a clock in Python tells how long that
took. To wait for them would cost speed. So marks are put into the GPU's own queue (CUDA events), which cost a few
microseconds, and the time between two of them is read when both have gone by: after some later step, or when somebody
asks.
"""

import time
from collections import deque
from typing import Any, Protocol

import torch

from minipaged.execution.stats import Times


class Clock(Protocol):
    """now: a mark. passed: whether it lies behind. wait: until it does. seconds: between two that do."""

    def now(self) -> Any: ...

    def passed(self, mark: Any) -> bool: ...

    def wait(self, mark: Any) -> None: ...

    def seconds(self, begin: Any, end: Any) -> float: ...


class HostClock:
    """A CPU is done when a function returns."""

    def now(self) -> float:
        return time.perf_counter()

    def passed(self, mark: float) -> bool:
        return True

    def wait(self, mark: float) -> None:
        pass

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class CudaClock:
    """Marks in the current stream. What a GPU waits for between two of them, it counts too."""

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1000  # from milliseconds


class StepTimer:
    """Sums up in `times` what the parts of each step took.

        timer.begin()
        ...                     build the batch
        timer.end("prepare")
        ...                     queue the model's kernels
        timer.end("model")

    A step that breaks is left out from where it broke: the next one begins anew. `settle` before `times` is read.
    """

    def __init__(self, times: Times, device: str = "cpu", clock: Clock | None = None):
        self.times = times
        self.clock = clock or (CudaClock() if device.startswith("cuda") else HostClock())
        self._latest: Any = None
        self._open: deque[tuple[str, Any, Any]] = deque()  # part, its begin and its end, in the order of time

    def begin(self) -> None:
        self._latest = self.clock.now()

    def end(self, part: str) -> None:
        """What was done since `begin`, or since the part before, was `part`, a field of Times."""
        begin, self._latest = self._latest, self.clock.now()
        self._open.append((part, begin, self._latest))
        while self._open and self.clock.passed(self._open[0][2]):
            self._add()

    def settle(self) -> None:
        """Wait until the last part is over: then `times` has them all."""
        while self._open:
            self.clock.wait(self._open[0][2])
            self._add()

    def _add(self) -> None:
        part, begin, end = self._open.popleft()
        setattr(self.times, part, getattr(self.times, part) + self.clock.seconds(begin, end))
