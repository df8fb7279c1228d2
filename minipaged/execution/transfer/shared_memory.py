"""Between engines of one machine: a producer's pool lies in memory that has no name, and consumers map it.

Nothing is sent but the file's descriptor, over a Unix socket; whoever has it may read the pool, and not write to it.
Blocks are copied once, from pool to pool. When the last one who has it mapped is gone, so is the memory, however they
went.
"""

import mmap
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
import warnings
from functools import partial

import torch
from torch import Tensor

from minipaged.execution.transfer.connector import Incoming, KVConnector
from minipaged.execution.transfer.link import Give, Lost, is_ours
from minipaged.requests.kv_transfer import KVTransferParams

PREFIX = "@minipaged-"  # a socket's name in Linux's own namespace, where nothing is left behind; elsewhere a file's


class SharedMemoryConnector(KVConnector):
    _file = -1

    def listen(self) -> tuple[socket.socket, str, int]:
        token = secrets.token_hex(16)
        linux = sys.platform.startswith("linux")
        name = PREFIX + token
        if not linux:
            folder = tempfile.mkdtemp()
            name = os.path.join(folder, token)
            self._closers.append(partial(shutil.rmtree, folder, ignore_errors=True))
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listening.bind(_address(name))
        listening.listen(128)
        return listening, name, 0

    def connect(self, source: KVTransferParams) -> socket.socket:
        name = source.remote_host or ""
        if sys.platform.startswith("linux") and not name.startswith(PREFIX):
            raise Lost(f"remote_host={name!r:.80}: is no engine of this machine")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(self.config.timeout_seconds)
            self._connect(sock, name)
            if is_ours(sock):
                return sock
            raise PermissionError(0, "it is another user's")
        except OSError as error:
            sock.close()
            raise Lost(f"engine {source.remote_engine_id} can't be reached: {error.strerror or error}") from None

    def _connect(self, sock: socket.socket, name: str) -> None:
        """Where many connect at once, and nobody was answered yet, Unix sockets say no instead of waiting."""
        until = time.monotonic() + self.config.timeout_seconds
        while True:
            try:
                return sock.connect(_address(name))
            except BlockingIOError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)

    def new_pool(self, num_bytes: int) -> Tensor | None:
        if not self.config.produces:
            return None
        self._file = _new_file()
        self._closers.append(partial(os.close, self._file))
        os.ftruncate(self._file, num_bytes)
        return torch.frombuffer(mmap.mmap(self._file, num_bytes), dtype=torch.uint8)

    def giver(self, pool: Tensor) -> Give:
        readable = self._file
        if os.path.exists("/proc/self/fd"):
            readable = os.open(f"/proc/self/fd/{self._file}", os.O_RDONLY)
            self._closers.append(partial(os.close, readable))

        def give(sock: socket.socket, blocks: list[int]) -> None:
            socket.send_fds(sock, [b"f"], [readable])

        return give

    def take(self, incoming: Incoming, sock: socket.socket, blocks: list[int]) -> None:
        _, files, _, _ = socket.recv_fds(sock, 1, 1)
        if not files:
            raise Lost("the other engine went away")
        try:
            num_bytes = os.fstat(files[0]).st_size
            mapped = mmap.mmap(files[0], num_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        finally:
            os.close(files[0])
        with warnings.catch_warnings():  # that it must not be written to
            warnings.simplefilter("ignore")
            pool = torch.frombuffer(mapped, dtype=torch.uint8)
        here = self._pool.view(torch.uint8).shape
        pool = pool.view(*here[:3], -1, *here[4:])
        if len(blocks) != len(incoming.load.blocks) or not all(0 <= block < pool.shape[3] for block in blocks):
            raise Lost("an answer with other blocks than were asked for")
        incoming.put(pool, blocks)


def _address(name: str) -> str:
    return "\0" + name[1:] if name.startswith("@") else name


def _new_file() -> int:
    """Memory as a file without a name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("minipaged-kv")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
