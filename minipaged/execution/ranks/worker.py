"""What ranks 1, 2, ... do: load their part of the model, then compute what rank 0 orders, until it says END.

Rank 0 starts this file as a process, or else torchrun has started all, and the constructor of the engine ends up here.
"""

import contextlib
import faulthandler
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from minipaged.execution.ranks.errors import SumBroken
from minipaged.execution.ranks.link import BEAT, BEAT_SECONDS, END, SAYS, Link

if TYPE_CHECKING:  # PyTorch takes seconds to import, in which nothing would be heard from us
    from minipaged.models import Ranks

TOLD = (  # of the engine's options
    "model", "dtype", "quantization", "products", "device", "kernels", "block_size", "kv_cache_dtype", "debug",
)  # fmt: skip
SECONDS_FOR_A_REASON = 1.0

Inbox = queue.SimpleQueue[tuple[bytes, bytes]]


def main() -> None:
    """link, memory: descriptors that were handed over; memory -1: sums go through gloo."""
    link, memory = (int(text) for text in sys.argv[1:])
    faulthandler.enable()
    os._exit(serve(Link(Connection(link)), lambda told: _local_ranks(told, memory), os.getppid()))


def serve(link: Link, make_ranks: Callable[[dict[str, Any]], "Ranks"], parent: int | None = None) -> int:
    """Be a rank until the end: the exit status. If rank 0 goes away, so does this process, whatever it is doing.

    parent: the process that is rank 0's, if that is known.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what a Ctrl-C means
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(link, inbox, parent), name="listener", daemon=True).start()
    try:
        _work(link, inbox, make_ranks)
        return 0
    except BaseException as error:
        if isinstance(error, SumBroken):  # others may know better why: the first reason that rank 0 hears counts
            time.sleep(SECONDS_FOR_A_REASON)
        kind, text = type(error).__name__, " ".join(str(error).split()) or "no more is known"
        with contextlib.suppress(OSError):
            link.say(failed=f"{text:.2000}", kind=kind)
        return 1


def _listen(link: Link, inbox: Inbox, parent: int | None) -> None:
    beat = 0.0
    try:
        while parent in (None, os.getppid()):
            if link.connection.poll(BEAT_SECONDS):
                inbox.put(message := link.receive())
                if message[0] == END:
                    return
            if time.monotonic() - beat >= BEAT_SECONDS:
                link.send(BEAT)
                beat = time.monotonic()
    except (EOFError, OSError):
        pass
    os._exit(1)


def _work(link: Link, inbox: Inbox, make_ranks: Callable[[dict[str, Any]], "Ranks"]) -> None:
    told = _told(inbox)
    import torch

    from minipaged.execution.engine_args import EngineArgs
    from minipaged.execution.loading import open_model
    from minipaged.execution.pool_size import free_memory
    from minipaged.execution.ranks.orders import OrderReader
    from minipaged.execution.runner import ModelRunner

    if told["threads"]:
        torch.set_num_threads(told["threads"])
    args = EngineArgs(**told["args"])
    opened = open_model(args, make_ranks(told), notice=lambda line: None)
    link.say(block_bytes=opened.block_bytes, free=free_memory(opened.device), place=place(opened.device))
    blocks = _told(inbox)
    runner = ModelRunner(
        opened.loaded.model, blocks["num_blocks"], args.block_size, blocks["num_cpu_blocks"], opened.kv_dtype,
        opened.device, args.debug,
    )  # fmt: skip
    reader = OrderReader(args.block_size)
    link.say(ready=True)
    while (message := inbox.get())[0] != END:
        runner.follow(reader.read(message[1]))


def place(device: str) -> str:
    """Whose memory this rank takes: the machine's, or its GPU's."""
    if device != "cuda":
        return socket.gethostname()
    import torch

    return f"{socket.gethostname()}, GPU {torch.cuda.current_device()}"


def _told(inbox: Inbox) -> dict[str, Any]:
    kind, body = inbox.get()
    if kind != SAYS:
        raise SystemExit(0)
    return json.loads(body)


def _local_ranks(told: dict[str, Any], memory: int) -> "Ranks":
    import torch

    from minipaged.execution.ranks.sums import DistributedRanks, SharedRanks

    if memory >= 0:
        return SharedRanks(memory, told["rank"], told["size"], check=lambda waited: None)
    if told["args"]["device"] == "cuda":
        torch.cuda.set_device(told["rank"])
    store = torch.distributed.TCPStore("127.0.0.1", told["port"], is_master=False)
    return DistributedRanks(store, told["rank"], told["size"], told["args"]["device"])


if __name__ == "__main__":
    main()
