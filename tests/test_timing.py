"""Where a step's time goes: sums on a CPU, and on a GPU that runs behind (played here by a queue)."""

import time

import pytest
import torch

from minipaged.execution.stats import Times
from minipaged.execution.timing import CudaClock, HostClock, StepTimer


class LateClock:
    """A GPU: marks stand in its queue, `done` of them have gone by, and each knows its time once it has."""

    def __init__(self):
        self.marks = self.done = self.waits = 0

    def now(self):
        self.marks += 1
        return self.marks

    def passed(self, mark):
        return mark <= self.done

    def wait(self, mark):
        self.waits += mark > self.done
        self.done = max(self.done, mark)

    def seconds(self, begin, end):
        assert end <= self.done, "read before it has gone by"
        return float(end * end - begin * begin)


def one_step(timer):
    timer.begin()
    for part in ("prepare", "model", "sample"):
        timer.end(part)


def test_a_gpu_is_not_waited_for_until_somebody_asks():
    clock = LateClock()
    timer = StepTimer(Times(), clock=clock)
    one_step(timer)
    assert timer.times == Times() and clock.waits == 0
    clock.done = 2
    one_step(timer)  # by now the first part of the first step is known
    assert timer.times == Times(prepare=4 - 1) and clock.waits == 0
    timer.settle()
    assert timer.times == Times(prepare=4 - 1 + 36 - 25, model=9 - 4 + 49 - 36, sample=16 - 9 + 64 - 49)
    waits = clock.waits
    timer.settle()
    assert clock.waits == waits  # nothing is left


def test_what_has_gone_by_is_not_kept():
    clock = LateClock()
    timer = StepTimer(Times(), clock=clock)
    for _ in range(100):
        one_step(timer)
        clock.done = clock.marks  # a step that draws waits for the GPU itself
    assert len(timer._open) <= 3


def test_a_step_that_breaks_counts_to_where_it_broke():
    clock = LateClock()
    timer = StepTimer(Times(), clock=clock)
    timer.begin()
    timer.end("prepare")
    one_step(timer)  # the model raised, and the next step begins
    timer.settle()
    assert timer.times == Times(prepare=4 - 1 + 16 - 9, model=25 - 16, sample=36 - 25)


def test_on_a_cpu():
    timer = StepTimer(Times())
    assert isinstance(timer.clock, HostClock)
    timer.begin()
    time.sleep(0.02)
    timer.end("model")
    assert 0.02 <= timer.times.model < 1.0 and not timer._open


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    timer = StepTimer(Times(), "cuda")
    assert isinstance(timer.clock, CudaClock)
    timer.begin()
    torch.cuda._sleep(200_000_000)  # cycles: some 0.1 s
    began = time.perf_counter()
    timer.end("model")
    assert time.perf_counter() - began < 0.05 and timer.times.model == 0
    timer.settle()
    assert 0.05 < timer.times.model < 1.0
