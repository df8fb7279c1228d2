"""Servers as processes, so that they can be killed; and servers that behave as a test wants."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
# It ends with whoever started it. Its engine takes a while for each step, so that something can happen meanwhile.
SOURCE = """
import ctypes, signal, sys, time
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
import torch
torch.set_num_threads(1)
from minipaged import AsyncLLM
from minipaged.server.app import create_app
from minipaged.server.config import ServerConfig
from minipaged.server.running import address, bind, serve
folder, port, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
llm = AsyncLLM(folder, block_size=4, num_blocks=300, max_num_seqs=8)
llm.engine.observers.append(lambda *_: time.sleep(pause))
listening = bind("127.0.0.1", port)
print(address(listening), flush=True)
serve(create_app(llm, ServerConfig(model_names=("tiny",))), listening)
llm.shutdown()
"""


class ServerProcess:
    """One server. `start` again after `kill`: at the same address."""

    def __init__(self, folder, pause=0.005):
        self._folder, self._pause, self.port = str(folder), pause, 0
        self.start()

    def start(self):
        arguments = [sys.executable, "-c", SOURCE, self._folder, str(self.port), str(self._pause)]
        self.process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    @property
    def url(self):
        """Waits until it is there."""
        if not self.port:
            self.port = int(self.process.stdout.readline().decode().rsplit(":", 1)[1])
        return f"http://127.0.0.1:{self.port}"

    def running(self):
        """How many requests its engine has."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=20) as answer:
            lines = answer.read().decode().splitlines()
        names = "vllm:num_requests_running", "vllm:num_requests_waiting"
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(names))

    def kill(self, sig=signal.SIGKILL):
        self.process.send_signal(sig)
        if sig == signal.SIGKILL:
            self.process.wait(20)

    def close(self):
        self.process.kill()
        self.process.wait(20)
        self.process.stdout.close()


@contextlib.contextmanager
def server_processes(folder, count, pause=0.005):
    """At once: they take seconds to start."""
    servers = [ServerProcess(folder, pause) for _ in range(count)]
    try:
        for server in servers:
            _ = server.url
        yield servers
    finally:
        for server in servers:
            server.close()


class StandIn:
    """A server that does what `answer(method, path, body, writer)`, a coroutine, does. asked: what came."""

    def __init__(self, answer):
        self._answer, self.asked = answer, []
        self._loop, started = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,))
        self._thread.start()
        started.wait(10)

    def _run(self, started):
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.01))
        self._loop.close()

    async def _serve(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                method, path = (await reader.readuntil(b"\r\n")).decode().split()[:2]
                headers = {}
                while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
                    name, _, value = line.decode("latin-1").partition(":")
                    headers[name.lower()] = value.strip()
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if path == "/health":
                    writer.write(plain(b""))
                else:
                    self.asked.append((method, path, headers, body))
                    await self._answer(method, path, body, writer)
                await writer.drain()
        writer.close()

    def close(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


def plain(body, status="200 OK", **headers):
    """The bytes of an answer."""
    told = {"content-length": len(body), "content-type": "application/json", **headers}
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in told.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data):
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


@contextlib.contextmanager
def standing_in(*answers):
    servers = [StandIn(answer) for answer in answers]
    try:
        yield servers
    finally:
        for server in servers:
            server.close()
