"""A server from its first byte to its last: sockets, signals, and the end in good order.

A signal (SIGTERM, Ctrl-C) lets nobody in any more, and waits for those under way, `drain_seconds` at the longest. A
second one ends at once.
"""

import asyncio
import contextlib
import importlib
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from minipaged.server.manners import House


class PortTaken(OSError):
    """Nothing can be bound there; the message says why."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens on host and port; 0: a free one. PortTaken if it can't be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(4096)
        return listening
    except (OSError, OverflowError) as error:
        listening.close()
        raise PortTaken(f"{host}:{port}: {getattr(error, 'strerror', None) or error}") from None


def address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def allow_many_connections() -> None:
    """Each takes a file descriptor, and a process has 1,024 by default: take as many as it may have."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows
        resource = importlib.import_module("resource")
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Until a signal comes. In the main thread."""
    house: House = app.state.house
    allow_many_connections()
    config = uvicorn.Config(app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=1)
    _Server(config, house).run(sockets=[listening])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, house: House):
        super().__init__(config)
        self._house = house
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal. uvicorn calls it in the main thread, in the middle of whatever the event loop does."""
        if self._house.closing:
            self.should_exit = self.force_exit = True
        self._house.closing = True

    async def on_tick(self, counter: int) -> bool:
        """uvicorn asks ten times a second whether to end."""
        if self._house.closing and self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(self._house.config.drain_seconds):
                while self._house.num_guests:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            pass
        self.should_exit = True
