"""Rank 0 starts the others, as processes on its own machine.

Not with multiprocessing: that imports the caller's script anew in each of them, and a notebook has none. All that they
share with us is handed over as open descriptors: one end of a socket, and memory. Nothing of it has a name, so nothing
is left however anybody ends.
"""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kernels import say
from kernels.cpp_build import BuildFailed
from minipaged.execution.ranks.link import Link
from minipaged.execution.ranks.sums import DistributedRanks, SharedRanks, shared_memory
from minipaged.execution.ranks.team import Member, Team
from minipaged.models import Ranks

ROOT = Path(__file__).parents[3]  # where minipaged lies


def start_here(
    size: int, silence: float, device: str, threads: int, args: dict[str, Any], notice: Callable[[str], None] = say
) -> tuple[Team, Ranks]:
    """Ranks 1 .. size - 1, who load their part now; and rank 0's way to add up with them.

    threads: that each may use. args: for each, those that worker.TOLD names. ValueError if there aren't enough GPUs.
    """
    if device == "cuda" and size > torch.cuda.device_count():
        raise ValueError(f"tensor_parallel_size={size}: there are {torch.cuda.device_count()} GPUs here")
    memory = _memory(size, notice) if device != "cuda" else -1
    store, port = (None, 0) if memory >= 0 else _store()
    try:
        members = [_start(rank, memory) for rank in range(1, size)]
        team = Team(members, silence)
        try:
            for member in members:
                team.say(member, rank=member.rank, size=size, threads=threads, args=args, port=port)
            if memory >= 0:
                return team, SharedRanks(memory, 0, size, team.check_wait)
            assert store is not None
            return team, DistributedRanks(store, 0, size, device)
        except BaseException:
            team.close()
            raise
    finally:
        if memory >= 0:
            os.close(memory)


def _memory(size: int, notice: Callable[[str], None]) -> int:
    try:
        return shared_memory(size)
    except (BuildFailed, OSError) as error:
        notice(f"ranks add up through gloo, which is slower: {error}")
        return -1


def _store() -> tuple[dist.Store, int]:
    """Where gloo's ranks find each other: on a free port that only this machine can reach."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        store = dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )
    return store, port


def _start(rank: int, memory: int) -> Member:
    link, theirs = Link.pair()
    complaints = tempfile.TemporaryFile()  # noqa: SIM115 (the team closes it); it has no name either
    with theirs:
        handed = [theirs.fileno(), *([memory] if memory >= 0 else [])]
        command = [sys.executable, "-P", "-m", "minipaged.execution.ranks.worker", str(theirs.fileno()), str(memory)]
        process = subprocess.Popen(
            command, env=_environment(), pass_fds=handed, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=complaints, start_new_session=True,  # a Ctrl-C in the terminal is for rank 0 alone
        )  # fmt: skip
    return Member(rank, link, process.pid, process=process, complaints=complaints)


def _environment() -> dict[str, str]:
    """It finds what we found."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
