"""torchrun has started all ranks, on one machine or several, each with the same command: here they find each other.

    torchrun --nproc-per-node 2 -m minipaged.generate --tensor-parallel-size 2 "Hello"

    torchrun --nnodes 2 --nproc-per-node 1 --node-rank 0 --master-addr A --master-port 29500 -m minipaged.serve ...
    torchrun --nnodes 2 --nproc-per-node 1 --node-rank 1 --master-addr A --master-port 29500 -m minipaged.serve ...

Rank 0 goes on as the engine. The others are ranks from here on, and end the process when rank 0's engine is closed.
They find rank 0's port, and a key that only they know, in torchrun's store; sums go through gloo, on GPUs nccl.
What is sent isn't encrypted, by neither: the network between the machines must be one's own.
"""

import json
import os
import secrets
import socket
import struct
import sys
import threading
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from minipaged.execution.ranks import worker
from minipaged.execution.ranks.link import Link
from minipaged.execution.ranks.sums import DistributedRanks
from minipaged.execution.ranks.team import Member, Team
from minipaged.models import Ranks

SECONDS_TO_MEET = 300
SECONDS_TO_SAY_WHO = 5  # for whoever connects: a stranger may say nothing


def meet(size: int, silence: float, device: str, args: dict[str, Any]) -> tuple[Team, Ranks]:
    """On rank 0: the others, and its way to add up with them. On the others: never returns. Arguments: see start_here.

    ValueError if they have met before: whoever has been a rank has ended.
    """
    store, rank, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=SECONDS_TO_MEET)))
    store = dist.PrefixStore("minipaged", store)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if rank:
        _be_a_rank(store, rank, size, device)
    if store.add("engines", 1) > 1:
        raise ValueError(f"tensor_parallel_size={size}: torchrun's other processes belong to the first engine, only")
    team = Team(_wait_for_all(store, size), silence)
    try:
        for member in team.members:
            team.say(member, threads=None, args=args)
        return team, DistributedRanks(store, 0, size, device)
    except BaseException:
        team.close()
        raise


def _wait_for_all(store: "dist.Store", size: int) -> list[Member]:
    """ValueError if somebody does not come."""
    key = secrets.token_hex(16)
    near = os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1", "::1")
    members: list[Member] = []
    with socket.create_server(("127.0.0.1" if near else "", 0)) as listening:
        listening.settimeout(SECONDS_TO_MEET)
        store.set("link", json.dumps({"port": listening.getsockname()[1], "key": key}))
        while len(members) < size - 1:
            try:
                link = _linked(listening.accept()[0])
            except TimeoutError:
                raise ValueError(f"torchrun: of {size} ranks only {len(members) + 1} came") from None
            try:
                _wait_at_most(link, SECONDS_TO_SAY_WHO)
                deliver_challenge(link.connection, key.encode())
                answer_challenge(link.connection, key.encode())
                member = Member(link=link, **json.loads(link.receive()[1]))
                _wait_at_most(link, 0)
                members.append(member)
            except (OSError, EOFError, ValueError, AuthenticationError):  # a stranger, or one that has died
                link.close()
    return sorted(members, key=lambda member: member.rank)


def _be_a_rank(store: "dist.Store", rank: int, size: int, device: str) -> NoReturn:
    found = json.loads(store.get("link"))
    link = _linked(socket.create_connection((os.environ["MASTER_ADDR"], found["port"])))
    _introduce(link, found["key"], rank)
    status = worker.serve(link, lambda told: DistributedRanks(store, rank, size, device))
    if threading.current_thread() is not threading.main_thread():
        os._exit(status)  # where sys.exit would end only the thread
    sys.exit(status)


def _introduce(link: Link, key: str, rank: int) -> None:
    answer_challenge(link.connection, key.encode())
    deliver_challenge(link.connection, key.encode())
    link.say(rank=rank, pid=os.getpid(), host=socket.gethostname())


def _wait_at_most(link: Link, seconds: int) -> None:
    """For what the other end says: then OSError. 0: for ever."""
    with socket.socket(fileno=os.dup(link.connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))


def _linked(connected: socket.socket) -> Link:
    connected.settimeout(None)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Link(Connection(connected.detach()))
