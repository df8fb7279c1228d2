"""A server from its first byte to its last: sockets, signals, and the end in good order.

A signal (SIGTERM, Ctrl-C) lets nobody in any more, and waits for those under way, `drain_seconds` at the longest: then
they are told. A second one ends at once.
"""

import asyncio
import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
import threading
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from minipaged.server.manners import Host, log
from minipaged.terminal.command import INTERRUPTED

MOST_HEADER_BYTES = 64 * 1024
# Seconds. The engine's thread gives Python's lock away with each kernel that it starts, and wants it back soon, though
# the event loop is writing to all who read. Python's own 5 ms would hold up the next kernel: 2 % of the speed here.
SWITCH = 1e-4


class PortTaken(OSError):
    """Nothing can be bound there; the message says why."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens on host and port; 0: a free one. PortTaken if it can't be had."""
    if not host:
        raise PortTaken("no host: 127.0.0.1 is this machine, 0.0.0.0 all that reach it")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(4096)
        return listening
    except (OSError, UnicodeError) as error:
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


def serve(app: Starlette, listening: socket.socket) -> None:
    """Until a signal comes. In the main thread. After a second signal, the process ends in here."""
    house: Host = app.state.house
    allow_many_connections()
    sys.setswitchinterval(SWITCH)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # who takes nothing is cut off, even of what was written: Linux does it
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(house.config.send_seconds * 1000))
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=1,
        http=partial(_Connection, house.config.header_seconds),  # type: ignore[arg-type]
    )  # fmt: skip
    server = _Server(config, house)
    if threading.current_thread() is threading.main_thread():
        for sig in (signal.SIGINT, signal.SIGTERM):  # for good: uvicorn does so only while its loop runs
            signal.signal(sig, server.handle_exit)
    server.run(sockets=[listening])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, house: Host):
        super().__init__(config)
        self._house = house
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal. uvicorn calls it in the main thread, in the middle of whatever the event loop does."""
        if self._house.closing:
            os._exit(INTERRUPTED)  # the engine's thread may be in the middle of a long step
        self._house.closing = True

    async def on_tick(self, counter: int) -> bool:
        """uvicorn asks ten times a second whether to end."""
        if self._house.closing and self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        seconds = self._house.config.drain_seconds
        if num := self._house.num_guests:  # who pressed Ctrl-C should see why it goes on
            log.info("ending: %d under way, %g s at the longest; a second signal ends at once", num, seconds)
        await self._empty(seconds)
        if self._house.num_guests:
            await asyncio.to_thread(self._house.shutdown)
            await self._empty(1)
        self.should_exit = True

    async def _empty(self, seconds: float) -> None:
        """Until nobody is under way, or for so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._house.num_guests:
                    await asyncio.sleep(0.05)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # who is cut off now has been told, or is no guest
        await super().shutdown(sockets)


class _Connection(HttpToolsProtocol):
    """uvicorn's, and two things that it lacks: headers must come within `seconds` and must not be too long; and a
    connection can be cut (scope["state"]["drop"])."""

    def __init__(self, seconds: float, **told: Any):
        super().__init__(**told)
        self._seconds, self._num_bytes = seconds, 0
        self._until: asyncio.TimerHandle | None = None  # while headers are awaited

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"]["drop"] = self.transport.abort
        self._await_headers()

    def on_headers_complete(self) -> None:
        self._await_nothing()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._await_nothing()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._until is not None:
            self._num_bytes += len(data)
            if self._num_bytes > MOST_HEADER_BYTES:
                self.transport.abort()

    def _await_headers(self) -> None:
        self._await_nothing()
        self._until, self._num_bytes = self.loop.call_later(self._seconds, self._too_late), 0

    def _too_late(self) -> None:
        if self.flow.read_paused:  # several requests at once, and an earlier one is being answered: no fault of theirs
            self._await_headers()
        else:
            self.transport.abort()

    def _await_nothing(self) -> None:
        if self._until is not None:
            self._until.cancel()
            self._until = None
