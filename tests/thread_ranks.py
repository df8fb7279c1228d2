"""Ranks as threads of one process: what each has is summed and put side by side in the order of ranks."""

import threading

import torch

from minipaged.models import Ranks

PATIENCE = 60  # seconds: only a test that is broken waits so long


class Meeting:
    """Where `size` threads lay down what they have; counts how often they met."""

    def __init__(self, size: int):
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self.brought: list = [None] * size
        self.sums = self.gathers = 0


class ThreadRanks(Ranks):
    def __init__(self, meeting: Meeting, rank: int):
        self.meeting, self.rank, self.size = meeting, rank, len(meeting.brought)

    def _all(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.meeting.brought[self.rank] = x.clone()
        self.meeting.barrier.wait()
        brought = list(self.meeting.brought)
        self.meeting.barrier.wait()
        return brought

    def sum(self, x):
        self.meeting.sums += self.rank == 0
        total, *others = self._all(x)
        total = total.clone()
        for other in others:
            total += other
        return total

    def gather(self, x, sizes):
        self.meeting.gathers += self.rank == 0
        brought = self._all(x)
        assert [part.shape[-1] for part in brought] == sizes
        return torch.cat(brought, -1) if self.rank == 0 else torch.full_like(x, torch.nan)


def on_ranks(size: int, work) -> tuple[list, Meeting]:
    """work(ranks) on each of `size` threads: what they returned. What one raises is raised; none goes on waiting."""
    meeting, results, raised = Meeting(size), [None] * size, []

    def run(rank: int) -> None:
        try:
            with torch.inference_mode():
                results[rank] = work(ThreadRanks(meeting, rank))
        except Exception as error:
            raised.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise next((error for error in raised if not isinstance(error, threading.BrokenBarrierError)), raised[0])
    return results, meeting
