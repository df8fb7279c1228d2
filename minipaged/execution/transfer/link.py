"""How two engines talk about blocks: messages, and who answers them.

    here                                              there
    {hello: what both must have, begin: a name, ..} ->
                                    <- {blocks: their numbers}, which are pinned from now on; or {why: not}
                       ... the bytes, as the transport has it ...
    {done: true}                                   ->
                                    <- {good: whether they were the same all the time}

What was read counts only after `good`. A connection is for one prompt, and whatever was pinned for it is free again
when it ends, however it ends. Messages are JSON with their length before them; nothing is ever unpickled.
"""

import contextlib
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from minipaged.scheduling.transfer import Exports

VERSION = 1
LONGEST = 1 << 24  # bytes of a message
Message = dict[str, Any]
Give = Callable[[socket.socket, list[int]], None]  # the transport: sends the bytes of these blocks


class Lost(Exception):
    """The blocks can't be had; the message says why."""


def send(sock: socket.socket, message: Message) -> None:
    data = json.dumps(message).encode()
    sock.sendall(struct.pack(">I", len(data)) + data)


def receive(sock: socket.socket) -> Message:
    """Exactly one message: what comes behind it is left for whoever reads next."""
    length = struct.unpack(">I", receive_bytes(sock, 4))[0]
    if length > LONGEST:
        raise Lost(f"a message of {length} bytes: that is no engine")
    message = json.loads(receive_bytes(sock, length))
    if not isinstance(message, dict):
        raise Lost("an answer that is no JSON object: that is no engine")
    return message


def receive_bytes(sock: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = sock.recv(min(count, 1 << 16))
        if not part:
            raise Lost("the other engine went away")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def difference(ours: Message, theirs: Any) -> str | None:
    """What keeps two engines from sharing blocks, in words.

    >>> difference({"block_size": 16, "dtype": "float32"}, {"block_size": 8, "dtype": "float32"})
    'block_size is 16 there and 8 here'
    """
    if not isinstance(theirs, dict):
        return "a hello that says nothing"
    for name in dict.fromkeys([*ours, *theirs]):
        if ours.get(name) != theirs.get(name):
            return f"{name} is {ours.get(name)} there and {theirs.get(name)!s:.200} here"
    return None


def is_ours(sock: socket.socket) -> bool:
    """Whether somebody on the same machine is the same user, or root. Abstract sockets have no permissions."""
    if sock.family != socket.AF_UNIX or not sys.platform.startswith("linux"):
        return True
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid in (0, os.getuid())


def at_once(sock: socket.socket) -> None:
    """Two messages in a row: the second one would wait for an acknowledgement of the first, 40 ms."""
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Listener:
    """Answers those who want blocks, each in a thread of its own. It knows no more of its engine than `exports`.

    hello: what both engines must have. timeout, lease: seconds, see KVTransferConfig.
    """

    def __init__(
        self, listening: socket.socket, exports: Exports, hello: Message, give: Give, timeout: float, lease: float
    ):
        self._listening, self._exports, self._hello, self._give = listening, exports, hello, give
        self._timeout, self._lease = timeout, lease
        self._open: set[socket.socket] = set()
        self._closed = False
        self._threads = [threading.Thread(target=self._run, name="kv listener", daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        """Nobody is answered any more; who is just being answered finds the connection closed."""
        self._closed = True
        for sock in [self._listening, *self._open]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(1)

    def _run(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._listening.accept()
            except OSError:  # it was closed; or there are too many open files, which passes
                time.sleep(0.05)
                continue
            self._open.add(sock)
            thread = threading.Thread(target=self._answer_all, args=[sock], name="kv sender", daemon=True)
            self._threads = [one for one in self._threads if one.is_alive()] + [thread]
            thread.start()

    def _answer_all(self, sock: socket.socket) -> None:
        try:
            if is_ours(sock):
                at_once(sock)
                sock.settimeout(self._timeout)
                self._answer(sock, receive(sock))
        except Exception:  # whatever it was, it is the end of this connection, and of nothing else
            pass
        finally:
            sock.close()
            self._open.discard(sock)

    def _answer(self, sock: socket.socket, asked: Message) -> None:
        if "unneeded" in asked:
            return self._exports.end(str(asked["unneeded"]))
        if why := difference(self._hello, asked.get("hello")):
            return send(sock, {"why": why})
        pinned = self._exports.pin(str(asked["begin"]), asked["digest"], int(asked["first"]), int(asked["count"]))
        if isinstance(pinned, str):
            return send(sock, {"why": pinned})
        (export, blocks), done = pinned, False
        try:
            send(sock, {"blocks": blocks})
            self._give(sock, blocks)
            sock.settimeout(self._lease)
            done = receive(sock).get("done") is True
        finally:
            good = self._exports.unpin(export, done)
        send(sock, {"good": good})
