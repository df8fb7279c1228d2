"""Between machines: the bytes go through torch.distributed, point to point, by gloo.

For each prompt the two engines make a process group of two, and drop it afterwards (a millisecond or two): so neither
has to know the other before, and one that dies takes nothing along. The producer gathers blocks from its pool in
pieces, and sends them in their order; the consumer puts each where its engine's thread copies it from.
"""

import math
import socket
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minipaged.execution.transfer.connector import Incoming, KVConnector
from minipaged.execution.transfer.link import Give, Lost, receive, send
from minipaged.requests.kv_transfer import KVTransferParams

PIECE = 8 << 20  # bytes that are sent at a time
PRODUCER, CONSUMER = 0, 1  # ranks


class TorchDistributedConnector(KVConnector):
    def listen(self) -> tuple[socket.socket, str, int]:
        where = self.config.kv_ip, self.config.kv_port
        try:
            listening = socket.create_server(where, family=_family(where[0]), backlog=128)
        except OSError as error:
            raise ValueError(
                f"kv_transfer_config: kv_ip={where[0]!r}, kv_port={where[1]}: can't listen there: {error.strerror}"
            ) from None
        return listening, where[0], listening.getsockname()[1]

    def connect(self, source: KVTransferParams) -> socket.socket:
        where = source.remote_host or "", source.remote_port or 0
        try:
            return socket.create_connection(where, self.config.timeout_seconds)
        except OSError as error:
            why = error.strerror or error
            raise Lost(f"engine {source.remote_engine_id} at {where[0]}:{where[1]} can't be reached: {why}") from None

    def giver(self, pool: Tensor) -> Give:
        return partial(_give, pool, timedelta(seconds=self.config.timeout_seconds))

    def take(self, incoming: Incoming, sock: socket.socket, blocks: list[int]) -> None:
        size, timeout = max(1, int(receive(sock)["blocks_of_a_piece"])), timedelta(seconds=self.config.timeout_seconds)
        store = Rendezvous(sock)
        group = _group(store, CONSUMER, timeout)
        shape, wanted = self._pool.shape, len(incoming.load.blocks)
        for begin in range(0, wanted, size):
            count = min(size, wanted - begin)
            part = torch.empty((*shape[:3], count, *shape[4:]), dtype=self._pool.dtype)
            group.recv([part.view(torch.uint8).flatten()], PRODUCER, 0).wait(timeout)
            incoming.put(part, range(count))


def _give(pool: Tensor, timeout: timedelta, sock: socket.socket, blocks: list[int]) -> None:
    """Send blocks of a pool [L, 2, G, N, B, D], whatever the engine's thread does meanwhile: they are pinned."""
    size = max(1, PIECE // (math.prod([*pool.shape[:3], *pool.shape[4:]]) * pool.itemsize))
    send(sock, {"blocks_of_a_piece": size})
    store = Rendezvous(sock)
    group = _group(store, PRODUCER, timeout)
    raw = pool.view(torch.uint8)
    for begin in range(0, len(blocks), size):
        part = raw[:, :, :, blocks[begin : begin + size]]
        group.send([part.cpu().flatten()], CONSUMER, 0).wait(timeout)


class Rendezvous(dist.Store):
    """Where the two members of a group tell each other where they are: over the connection that they have.

    (torch.distributed's TCPStore is a server of its own, and waits without a limit for one that is stopped.)
    """

    def __init__(self, sock: socket.socket):
        super().__init__()
        self.sock = sock
        self._known: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        self._known[key] = value
        send(self.sock, {"key": key, "value": value.hex()})

    def get(self, key: str) -> bytes:
        while key not in self._known:
            told = receive(self.sock)
            self._known[str(told["key"])] = bytes.fromhex(told["value"])
        return self._known[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)


def _group(store: Rendezvous, rank: int, timeout: timedelta) -> Any:
    """Both members, over the network that the connection came over. The store has to live as long."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=store.sock.getsockname()[0])]
    options._timeout = timeout
    return gloo(store, rank, 2, options)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
