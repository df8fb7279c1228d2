"""What two ranks say to each other: plain bytes and JSON over a socket, in the same words on one machine and on two."""

import contextlib
import json
import os
import socket
import threading
from multiprocessing.connection import Connection
from typing import Any

BEAT_SECONDS = 0.5  # so often a rank says that it lives
ORDER, SAYS, BEAT, END = b"o", b"s", b"b", b"e"  # a step, see orders.py; JSON; "I live"; "that was all"


class Link:
    """One end. Several threads may speak; one listens. Once the other end is gone: EOFError or OSError."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self._speaking = threading.Lock()

    @classmethod
    def pair(cls) -> tuple["Link", socket.socket]:
        """A link, and the socket of the other end, for another process."""
        ours, theirs = socket.socketpair()
        return cls(Connection(ours.detach())), theirs

    def send(self, kind: bytes, body: bytes = b"") -> None:
        with self._speaking:
            self.connection.send_bytes(kind + body)

    def say(self, **what: Any) -> None:
        self.send(SAYS, json.dumps(what).encode())

    def receive(self) -> tuple[bytes, bytes]:
        """The kind of a message, and its body."""
        message = self.connection.recv_bytes()
        return message[:1], message[1:]

    def shut(self) -> None:
        """The other end hears no more, and learns it. Other threads may be listening here."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.connection.fileno())) as same:
            same.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.close()
