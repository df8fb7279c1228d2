"""Blocks that come from another engine: the half of vLLM's KVConnector that moves bytes.

Each load has a thread that talks to the other engine, and never touches the pool. What it brings lies outside: in the
other engine's own memory, which is mapped here, or in a buffer. From there the engine's thread copies it, so much in a
step at the most: whoever is in that step doesn't wait long. So a load that the plan no longer names ends at once, and
no block is written after it was freed.
"""

import os
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from kernels import say
from minipaged.execution.transfer.config import KVTransferConfig
from minipaged.execution.transfer.link import VERSION, Give, Listener, Lost, Message, at_once, receive, send
from minipaged.requests.kv_transfer import KVTransferParams
from minipaged.scheduling.plan import Load, StepOutput, StepPlan
from minipaged.scheduling.transfer import Exports, Transfers

WAIT = 0.05  # seconds, at the longest, that a step waits which has nothing to compute


class Incoming:
    """A load under way. Its thread puts pieces in; the engine's takes them out."""

    def __init__(self, load: Load, news: threading.Condition):
        self.load, self._news = load, news
        self.pieces: deque[tuple[Tensor, int]] = deque()  # a pool [L, 2, G, N, B, D], as bytes, and a block of it
        self.num_written = 0
        self.ended = self._stopped = False
        self.error: str | None = None  # why it came to nothing

    def run(self, fetch: Callable[["Incoming"], None]) -> None:
        """The thread's life."""
        error, whose = None, self.load.source.remote_engine_id
        try:
            fetch(self)
        except Lost as reason:
            error = str(reason)
        except TimeoutError:
            error = f"engine {whose} did not answer in time"
        except Exception as reason:  # what sockets and gloo say; and what an engine that lies may bring about
            error = f"engine {whose}: {reason!r:.300}"
        with self._news:
            self.ended, self.error = True, error
            self._news.notify_all()

    def put(self, pool: Tensor, blocks: Iterable[int]) -> None:
        pool = pool.view(torch.uint8)
        self.pieces.extend((pool, block) for block in blocks)
        with self._news:
            self._news.notify_all()
        self.must_be_wanted()

    def must_be_wanted(self) -> None:
        if self._stopped:
            raise Lost("nobody wants it any more")

    def wait_until_written(self, seconds: float) -> None:
        with self._news:
            written = self._news.wait_for(lambda: self._stopped or self.num_written == len(self.load.blocks), seconds)
        if self._stopped or not written:
            raise Lost("it was not copied in time")

    def write(self, pool: Tensor, most: int) -> int:
        """Copy at most so many blocks of what has come; in the engine's thread. Returns how many.

        One by one: to gather them first takes new memory, and seven times as long.
        """
        begun = self.num_written
        while self.pieces and self.num_written < begun + most:
            source, block = self.pieces.popleft()
            pool[:, :, :, self.load.blocks[self.num_written]] = source[:, :, :, block]
            self.num_written += 1
        if self.num_written == len(self.load.blocks):
            with self._news:
                self._news.notify_all()
        return self.num_written - begun

    def stop(self) -> None:
        """Its thread ends when it sees it: whoever is cut off in the middle of a word waits for the rest of it."""
        with self._news:
            self._stopped = True
            self._news.notify_all()


class KVConnector:
    """What all ways to move blocks have in common. Method names that vLLM has mean the same there.

    model: what both engines must have in common, besides what their pools show.
    """

    def __init__(self, config: KVTransferConfig, model: Message):
        self.config, self._model = config, model
        self.exports = Exports(config.lease_seconds) if config.produces else None
        self._news = self.exports.news if self.exports is not None else threading.Condition()
        self._incoming: dict[int, Incoming] = {}
        self._last_error: str | None = None
        self._closers: list[Callable[[], object]] = []  # the last one first
        self._process = os.getpid()
        self._close = weakref.finalize(self, _close_all, self._closers, self._process)
        self._listening: socket.socket | None = None
        self._place = KVTransferParams()
        if config.produces:
            self._listening, host, port = self.listen()
            self._closers.append(self._listening.close)
            self._place = KVTransferParams(
                remote_engine_id=config.engine_id, remote_host=host, remote_port=port, tp_size=1
            )

    # --- what a transport has of its own --------------------------------------------------------------------------

    def listen(self) -> tuple[socket.socket, str, int]:
        """Where others can ask for blocks: a socket, and what they are told of it. ValueError if there is no such."""
        raise NotImplementedError

    def connect(self, source: KVTransferParams) -> socket.socket:
        """To where another engine listens."""
        raise NotImplementedError

    def new_pool(self, num_bytes: int) -> Tensor | None:
        """Memory for the pool of a producer, as bytes; None: any will do."""
        return None

    def giver(self, pool: Tensor) -> Give:
        """What sends the bytes of blocks of this pool. It must not hold on to the connector."""
        raise NotImplementedError

    def take(self, incoming: Incoming, sock: socket.socket, blocks: list[int]) -> None:
        """Put all of these blocks of the other engine into `incoming`, in their order. In a thread of its own."""
        raise NotImplementedError

    # --- from the first step to the last --------------------------------------------------------------------------

    def register_kv_caches(self, pool: Tensor) -> None:
        """The pool [L, 2, G, N, B, D]; from now on others are answered."""
        self._pool = pool
        layout = str([*pool.shape[:3], *pool.shape[4:]])
        own = {"block_size": pool.shape[4], "kv_cache_dtype": str(pool.dtype), "layout": layout}
        self._hello = {"version": VERSION, "kv_connector": self.config.kv_connector, **self._model, **own}
        self._block_bytes = pool[:, :, :, 0].numel() * pool.itemsize
        if self._listening is not None and self.exports is not None:
            seconds = self.config.timeout_seconds, self.config.lease_seconds
            listener = Listener(self._listening, self.exports, self._hello, self.giver(pool), *seconds)
            self._closers.append(listener.close)

    def transfers(self) -> Transfers:
        """The scheduler's half."""
        recompute = self.config.kv_load_failure_policy == "recompute"
        return Transfers(self.exports, self._place, self.config.consumes, recompute)

    def carry_on(self, plan: StepPlan, output: StepOutput) -> StepOutput:
        """A step's part of all loads, when what it had to compute is computed. Says which of them have ended."""
        self.start_load_kv(plan)
        most, raw = max(1, self.config.bytes_per_step // self._block_bytes), self._pool.view(torch.uint8)
        for incoming in self._incoming.values():
            most -= incoming.write(raw, most)
        output.loaded.update(self.get_finished())
        if not plan.sequences and not output.loaded:
            with self._news:
                self._news.wait_for(self._has_news, WAIT)
        return output

    def start_load_kv(self, plan: StepPlan) -> None:
        """Begin what is new in the plan, and break off what isn't there any more."""
        named = {load.number for load in plan.loads}
        for number in self._incoming.keys() - named:
            self._incoming.pop(number).stop()
        for load in plan.loads:
            if load.number not in self._incoming:
                incoming = self._incoming[load.number] = Incoming(load, self._news)
                threading.Thread(target=incoming.run, args=[self._fetch], name="kv receiver", daemon=True).start()
        if plan.unneeded:
            threading.Thread(target=self._tell_unneeded, args=[plan.unneeded], name="kv notes", daemon=True).start()

    def get_finished(self) -> dict[int, str | None]:
        ended = {number: one.error for number, one in self._incoming.items() if one.ended}
        for number, error in ended.items():
            del self._incoming[number]
            if error and error != self._last_error:
                self._last_error = error
                say(f"a prompt that another engine computed can't be had: {error}")
        return ended

    def close(self) -> None:
        while self._incoming:
            self._incoming.popitem()[1].stop()
        self._close()
        _close_all(self._closers, self._process)  # what is left if that was broken off before
        self.__dict__.pop("_pool", None)

    def _has_news(self) -> bool:
        exports = self.exports is not None and self.exports.has_ended()
        return exports or any(one.pieces or one.ended for one in self._incoming.values())

    # --- in threads of their own ----------------------------------------------------------------------------------

    def _fetch(self, incoming: Incoming) -> None:
        """Lost, or whatever the network says, if it comes to nothing."""
        load, name = incoming.load, incoming.load.source.remote_request_id
        with self.connect(load.source) as sock:
            incoming.must_be_wanted()
            at_once(sock)
            sock.settimeout(self.config.timeout_seconds)
            count = len(load.blocks)
            wanted = {"begin": name, "digest": load.digest, "first": load.first, "count": count}
            send(sock, {"hello": self._hello, **wanted})
            answer = receive(sock)
            if "why" in answer:
                raise Lost(str(answer["why"]))
            self.take(incoming, sock, [int(block) for block in answer["blocks"]])
            incoming.wait_until_written(self.config.lease_seconds)
            send(sock, {"done": True})
            if receive(sock).get("good") is not True:
                raise Lost("the other engine gave its memory up meanwhile")

    def _tell_unneeded(self, sources: list[KVTransferParams]) -> None:
        for source in sources:
            try:
                with self.connect(source) as sock:
                    sock.settimeout(self.config.timeout_seconds)
                    send(sock, {"unneeded": source.remote_request_id})
            except Exception:  # then its time ends
                pass


def _close_all(closers: list[Callable[[], object]], process: int) -> None:
    while closers and os.getpid() == process:  # who was forked from it shares its sockets, and must not end them
        closers.pop()()
