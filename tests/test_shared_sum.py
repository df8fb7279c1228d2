"""Processes add up through shared memory: exactly, in the order of ranks, thousands of times without a barrier."""

import mmap
import os
import random
import signal
import tempfile
import threading
import time

import pytest
import torch
from cpp_builds import library

from kernels.cpp_build import load
from kernels.cpp_sum import SLOT, SharedSum, memory_size

SIZES = [1, 3, 15, 16, 17, 576, 4097, SLOT // 4, SLOT // 4 + 1, SLOT + 123]


@pytest.fixture(scope="module")
def cpp(request):
    return load(library("cpp", request.config.getoption("--sanitize")))


def alive(waited):
    pass


def shared(cpp, size):
    file = tempfile.TemporaryFile()  # noqa: SIM115 (its users close it)
    os.ftruncate(file.fileno(), memory_size(cpp, size))
    return file


def piece(number, rank, dtype):
    """What a rank brings to a sum: anybody can say it."""
    rng = torch.Generator().manual_seed(1000 * number + rank)
    count = random.Random(number).choice(SIZES if number % 50 == 0 else SIZES[:7])
    return (torch.randn(count, generator=rng) * 10 ** random.Random(number).uniform(-3, 3)).to(dtype)


def ordered(pieces):
    total = pieces[0].float()
    for one in pieces[1:]:
        total = total + one.float()
    return total.to(pieces[0].dtype)


def add_all(cpp, file, rank, size, sums, dtype, check=alive):
    """A rank's part in many sums. AssertionError if one isn't what it must be, to the last bit."""
    ranks = SharedSum(cpp, mmap.mmap(file.fileno(), 0), rank, size, check)
    for number in range(sums):
        got = ranks.sum(piece(number, rank, dtype))
        assert torch.equal(got, ordered([piece(number, r, dtype) for r in range(size)])), f"sum {number}"


def forked(work, size):
    """Run work(rank) in as many processes, of which this is rank 0: [exit statuses of the others]."""
    pids = []
    try:
        for rank in range(1, size):
            if (pid := os.fork()) == 0:
                try:
                    torch.set_num_threads(1)
                    work(rank)
                    os._exit(0)
                except BaseException as error:
                    os.write(2, f"rank {rank}: {error!r}\n".encode())
                    os._exit(1)
            pids.append(pid)
        work(0)
        return [os.waitstatus_to_exitcode(os.waitpid(pids.pop(0), 0)[1]) for _ in list(pids)]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


class Stuck(Exception):
    pass


def not_longer_than(seconds):
    end = time.monotonic() + seconds

    def check(waited):
        if time.monotonic() > end:
            raise Stuck

    return check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_those_in_the_order_of_ranks_bit_for_bit(cpp, dtype):
    with shared(cpp, 3) as file:
        done = forked(lambda rank: add_all(cpp, file, rank, 3, 700, dtype, not_longer_than(60)), 3)
    assert done == [0, 0]


def test_thousands_of_sums_in_a_row_and_none_reads_what_belongs_to_another(cpp):
    """No work between them, so that whoever is fast would overwrite what somebody slow still reads."""

    def work(rank):
        ranks = SharedSum(cpp, mmap.mmap(file.fileno(), 0), rank, 3, not_longer_than(60))
        for number in range(6000):
            x = torch.full((1000,), float(number + rank))
            if (number + rank) % 500 == 0:
                time.sleep(0.001)
            assert ranks.sum(x)[[0, 500, 999]].tolist() == [3 * number + 3] * 3, number

    with shared(cpp, 3) as file:
        assert forked(work, 3) == [0, 0]


def test_what_ranks_have_is_gathered_side_by_side(cpp):
    sizes, rows = [500, 700, 1], [0, 1, 7, 300]

    def part(rank, count):
        return 1e6 * rank + torch.arange(count * sizes[rank], dtype=torch.float32).view(count, sizes[rank])

    def work(rank):
        ranks = SharedSum(cpp, mmap.mmap(file.fileno(), 0), rank, 3, not_longer_than(60))
        for count in rows:
            got = ranks.gather(part(rank, count), sizes)
            assert rank or torch.equal(got, torch.cat([part(r, count) for r in range(3)], 1))
            assert ranks.sum(torch.ones(3)).tolist() == [3, 3, 3]  # they still count alike

    with shared(cpp, 3) as file:
        assert forked(work, 3) == [0, 0]


def test_who_waits_looks_now_and_then_whether_the_others_live(cpp):
    looks = []

    def check(waited):
        looks.append(waited)
        if len(looks) == 5:
            raise Stuck

    with shared(cpp, 2) as file, pytest.raises(Stuck):
        SharedSum(cpp, mmap.mmap(file.fileno(), 0), 0, 2, check).sum(torch.ones(5))
    assert looks == pytest.approx([0.005, 0.01, 0.015, 0.02, 0.025])


def test_python_goes_on_meanwhile(cpp):
    with shared(cpp, 2) as file:
        ranks = [SharedSum(cpp, mmap.mmap(file.fileno(), 0), rank, 2, not_longer_than(30)) for rank in range(2)]
        got = []
        thread = threading.Thread(target=lambda: got.append(ranks[1].sum(torch.ones(5))))
        thread.start()
        time.sleep(0.05)
        assert ranks[0].sum(torch.ones(5)).tolist() == [2] * 5
        thread.join()
    assert got[0].tolist() == [2] * 5


def test_too_little_memory_is_refused(cpp):
    with shared(cpp, 2) as file, pytest.raises(ValueError, match="3 ranks share"):
        SharedSum(cpp, mmap.mmap(file.fileno(), 0), 0, 3, alive)
