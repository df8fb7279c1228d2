"""A client that can misbehave: HTTP by hand, over a socket, and a server in this process to try it on."""

import asyncio
import contextlib
import json
import socket
import struct
import time

from served import Served

from minipaged import AsyncLLM
from minipaged.server.app import create_app
from minipaged.server.config import ServerConfig


class Place(Served):
    """A server that is seen to be left empty."""

    def left(self):
        """What must be nothing once all clients have gone."""
        llm, engine = self.llm, self.llm.engine
        counts = {
            "requests": len(engine._requests), "readers": len(llm._readers), "waiting": len(llm.waiting),
            "coming": self.house.num_coming, "guests": self.house.num_guests, "texts": len(engine._texts),
            "mail": len(llm._mailbox._waiting) + len(llm._mailbox._told), "inbox": llm._inbox.qsize(),
            "sequences": len(engine.scheduler.running) + len(engine.scheduler.waiting) + len(engine.scheduler.swapped),
        }  # fmt: skip
        return {name: count for name, count in counts.items() if count}

    def wait_until_empty(self, seconds=20):
        until = time.monotonic() + seconds
        while self.left():
            assert time.monotonic() < until, f"left behind: {self.left()}"
            time.sleep(0.01)

        def look():
            usage = self.llm.engine.stats().memory
            self.llm.engine.memory.check()
            assert usage.free == usage.num_blocks and usage.cpu_used == 0, "blocks are lost"

        asyncio.run(asyncio.wait_for(self.llm.call(look), 20))


@contextlib.contextmanager
def running(folder, config=None, **options):
    config = ServerConfig(model_names=("tiny",)) if config is None else config
    place = Place(create_app(AsyncLLM(str(folder), **options), config))
    try:
        yield place
    finally:
        place.close()


class Wire:
    """One connection."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port, small=False):
        """small: its buffer for what comes in is as small as may be."""
        own = socket.socket()
        if small:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        own.setblocking(False)
        await asyncio.get_running_loop().sock_connect(own, ("127.0.0.1", port))
        return cls(*await asyncio.open_connection(sock=own, limit=2**10 if small else 2**20))

    async def send(self, data):
        self.writer.write(data)
        await self.writer.drain()

    async def head(self):
        """(status, headers) of an answer."""
        first = await self.reader.readuntil(b"\r\n")
        headers = {}
        while (line := await self.reader.readuntil(b"\r\n")) != b"\r\n":
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        return int(first.split()[1]), headers

    async def chunk(self):
        """A piece of a chunked body; b"": it is complete."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        data = await self.reader.readexactly(size + 2)
        return data[:-2]

    async def body(self, headers):
        if headers.get("transfer-encoding") != "chunked":
            return await self.reader.readexactly(int(headers.get("content-length", 0)))
        pieces = []
        while piece := await self.chunk():
            pieces.append(piece)
        return b"".join(pieces)

    async def answer(self):
        """(status, headers, body)."""
        status, headers = await self.head()
        return status, headers, await self.body(headers)

    def close(self, rudely=False):
        """rudely: with a reset, as a process that is killed may do it."""
        if rudely:
            own = self.writer.get_extra_info("socket")
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.close()


def request(path, body=None, method=None, headers=None, told_length=None):
    """The bytes of a request. body: JSON, or bytes as they are."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method or ('POST' if body is not None else 'GET')} {path} HTTP/1.1", "Host: here"]
    if body is not None:
        lines += [f"Content-Length: {len(data) if told_length is None else told_length}"]
        lines += ["Content-Type: application/json"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + data


async def ask(port, *args, **kwargs):
    """(status, headers, body) of one request on a connection of its own; JSON is read."""
    wire = await Wire.open(port)
    try:
        await wire.send(request(*args, **kwargs))
        status, headers, body = await wire.answer()
        is_json = headers.get("content-type") == "application/json"
        return status, headers, json.loads(body) if is_json else body
    finally:
        wire.close()


def events(body):
    """What a stream of server-sent events says; the last must be [DONE]."""
    assert body.endswith(b"\n\n")
    lines = [piece.removeprefix(b"data: ") for piece in body.split(b"\n\n")[:-1]]
    assert lines[-1] == b"[DONE]", "the last chunk is lost"
    return [json.loads(line) for line in lines[:-1]]
