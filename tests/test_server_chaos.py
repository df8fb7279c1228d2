"""Thousands of requests, whose clients do whatever clients do: nothing is lost, nothing left.

MINIPAGED_CHAOS=100000 asks so many (2,000 by default).
"""

import asyncio
import contextlib
import ctypes
import gc
import os
import time
from collections import Counter

import pytest
from chaos import Crowd, draw_wishes
from raw_http import ask, running
from tiny_model import make_folder

from minipaged.server.answers import Answer
from minipaged.server.config import ServerConfig
from minipaged.server.generation import Job
from minipaged.server.manners import Visit
from minipaged.text.stream import Stream

COUNT = int(os.environ.get("MINIPAGED_CHAOS", "2000"))
LIMITS = ServerConfig(
    model_names=("tiny",), max_body_bytes=20_000, body_seconds=0.4, send_seconds=5.0, max_queued_requests=26,
    max_queued_tokens=600, max_queue_seconds=4.0,
)  # fmt: skip
SMALL = dict(block_size=4, num_blocks=32, num_cpu_blocks=24, watermark=0.0, debug=True)
GUESSING = {"method": "ngram", "prompt_lookup_min": 1, "num_branches": 2, "num_speculative_tokens": 3}
ENGINES = {
    "hash": dict(prefix_cache="hash", max_num_seqs=8, preemption="swap"),
    "radix": dict(prefix_cache="radix", max_num_seqs=16, max_num_batched_tokens=24, schedule="prefix"),
    "guessing": dict(prefix_cache="hash", max_num_seqs=6, speculative_config=GUESSING),
    "none": dict(prefix_cache="none", max_num_seqs=4, preemption="recompute"),
}  # fmt: skip
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("chaos"))


@pytest.fixture(scope="module")
def wishes(folder):
    return draw_wishes(folder, 300)


def resident() -> int:
    """Bytes of memory that this process has: the server, and its clients."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_nothing_is_left(place):
    place.wait_until_empty()
    until = time.monotonic() + 10
    while sum(kept().values()) > 4:  # connections whose end was not seen yet
        assert time.monotonic() < until, f"kept: {kept()}"
        time.sleep(0.05)


def kept() -> Counter[str]:
    gc.collect()
    return Counter(type(one).__name__ for one in gc.get_objects() if type(one) in (Stream, Answer, Job, Visit))


def check_tenants_do_not_share(place, number):
    """What one of them computed is found again by itself, and by nobody else."""

    async def cached(salt):
        body = {"prompt": f"{number} is a number that nobody asked for", "max_tokens": 1, "cache_salt": salt}
        status, _, said = await ask(place.port, "/v1/completions", body)
        assert status == 200, said
        return said["usage"]["prompt_tokens_details"]["cached_tokens"]

    async def all_of_them():
        return [await cached(salt) for salt in ("a", "b", "a")]

    first, other, again = asyncio.run(all_of_them())
    assert first == other == 0, "a tenant found what another one computed"
    assert again > 0 or place.llm.engine.prefix_cache == "none"


def run_chaos(folder, wishes, name, count, say=lambda line: None):
    size, seed = min(1000, max(50, count // 6)), list(ENGINES).index(name)
    with running(folder, LIMITS, **SMALL | ENGINES[name]) as place:
        crowd, began, sizes = Crowd(place, wishes, seed), time.monotonic(), []
        for number in range(-(-count // size)):
            asyncio.run(crowd.batch(size, at_once=(24, 64)[number % 2]))  # more than may wait, now and then
            check_nothing_is_left(place)
            check_tenants_do_not_share(place, number)
            sizes.append(resident())
            stats, warm = asyncio.run(place.llm.stats()), sizes[len(sizes) // 3]
            say(
                f"{name}: {crowd._number} requests in {time.monotonic() - began:.0f} s, {stats.num_steps} steps, "
                f"preempted {stats.num_preemptions}, memory {warm / MEGABYTE:.0f} -> {sizes[-1] / MEGABYTE:.0f} MiB, "
                f"{dict(sorted(crowd.counts.items()))}"
            )  # fmt: skip
    assert sizes[-1] - warm < 12 * MEGABYTE, f"memory grows: {[size // MEGABYTE for size in sizes]} MiB"
    return crowd, stats


@pytest.mark.parametrize("name", ENGINES)
def test_chaos(folder, wishes, name, capsys):
    def say(line):
        with capsys.disabled():
            print(f"\n{line}", flush=True)

    crowd, stats = run_chaos(folder, wishes, name, COUNT // 4, say if COUNT > 10_000 else print)
    counts = crowd.counts
    assert counts["completed"] > COUNT // 60 and counts["left"] > COUNT // 60 and counts["failed alone"] > COUNT // 600
    assert all(counts[f"refused {status}"] for status in (400, 408, 429))
    assert counts["aborted by another"] and sum(stats.num_preemptions.values()) > 0
