"""Replicas on Ray: an actor for each engine, which is a server as any other; and a fleet of them that mends itself.

Ray starts processes, on this machine or on those of a cluster, and says when one has died. Requests don't go through
it: the router talks HTTP to the servers.
"""

import asyncio
import contextlib
import importlib
import importlib.util
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from minipaged.routing.fleet import Fleet
from minipaged.routing.policies import Policy
from minipaged.server.config import ServerConfig
from minipaged.terminal.command import BadInput, CommandFailed

log = logging.getLogger("minipaged.router")

BACKOFF = 1.0, 30.0  # seconds until an engine that has died is started again: at first, and at the most
STOPPING = 10.0  # seconds for an engine to end by itself
INSTALL = "--replicas needs Ray: pip install 'ray>=2.50'"
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "0"}


class Engine:
    """In a process of Ray's: an engine and its server. threads: that it computes with."""

    def __init__(self, threads: int):
        os.environ["OMP_NUM_THREADS"] = str(threads)  # Ray has an opinion of its own, and PyTorch isn't loaded yet

    def start(self, model: str, options: dict[str, Any], config: ServerConfig, host: str) -> dict[str, str]:
        """Loads the model, and serves it on a free port. {"url": ...}, or {"error": ...} if that can't be."""
        from rich.console import Console

        from minipaged.server.running import PortTaken, address, bind, serve
        from minipaged.terminal.loading import load

        try:
            llm = load("AsyncLLM", model, options, Console(quiet=True))
            listening = bind(host or node_address(), 0)
        except (BadInput, PortTaken) as error:
            return {"error": str(error)}
        from minipaged.server.app import create_app

        self._llm, app = llm, create_app(llm, config)
        self._house, self._thread = app.state.house, threading.Thread(target=serve, args=(app, listening))
        self._thread.start()
        return {"url": address(listening)}

    def wait(self) -> None:
        """Until its server has ended."""
        self._thread.join()

    def stop(self) -> None:
        """Whoever is under way may end, for `drain_seconds`."""
        self._house.closing = True
        self._thread.join()
        self._llm.shutdown()


def node_address() -> str:
    import ray

    return ray.util.get_node_ip_address()


@contextlib.contextmanager
def ray_running(address: str | None) -> Iterator[None]:
    """Ray: that of a cluster, or a small one of our own, of which nothing is left at the end.

    BadInput, CommandFailed if there is none.
    """
    if importlib.util.find_spec("ray") is None:
        raise BadInput(INSTALL)
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    import ray

    # A path of its own, which must be short: sockets have their names in it.
    short = "/tmp" if os.path.isdir("/tmp") else None
    folder = None if address else tempfile.mkdtemp(prefix=f"ray-{os.getpid()}-", dir=short)
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 80 << 20, "_temp_dir": folder}
    try:
        given = {} if address else own
        try:
            ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **given)
        except Exception as error:  # of many kinds, down to the plain one
            if address:
                raise BadInput(f"--ray-address {address}: no Ray can be had there: {_first_line(error)}") from None
            raise CommandFailed(f"Ray does not start: {_first_line(error)}") from None
        with contextlib.suppress(Exception):  # of a death it says much; what is to be said of it we say, in a line
            logs = importlib.import_module("ray._private.ray_logging")
            logs.global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
        yield
    finally:
        ray.shutdown()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


class Crew(Fleet):
    """A fleet of engines on Ray, of which each that dies is started again. model, options: of each engine.

    local: they are on this machine, and nobody else's business; else each listens where other machines reach it.
    """

    def __init__(self, policy: Policy, count: int, model: str, options: dict[str, Any], config: ServerConfig,
                 local: bool = True):  # fmt: skip
        super().__init__(policy)
        self.size = count
        self._host = "127.0.0.1" if local else ""
        self._asked = model, options, replace(config, drain_seconds=min(STOPPING, config.drain_seconds))
        self.threads, self._gpus = _shares(count, options)
        self._engines: dict[str, Any] = {}  # by URL
        self._keepers: list[asyncio.Task[None]] = []
        self._closing = False

    def start(self) -> None:
        """All of them, until they serve. BadInput if one can't. Before the event loop runs."""
        import ray

        engines = [self._new() for _ in range(self.size)]
        for engine, told in zip(engines, ray.get([self._start(engine) for engine in engines]), strict=True):
            if "error" in told:
                raise BadInput(told["error"])
            self._engines[told["url"]] = engine

    async def open(self) -> None:
        self._keepers = [asyncio.create_task(self._keep(url)) for url in list(self._engines)]

    async def close(self) -> None:
        self._closing = True
        for keeper in self._keepers:
            keeper.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOPPING):
                await asyncio.gather(*(engine.stop.remote() for engine in self._engines.values()),
                                     return_exceptions=True)  # fmt: skip
        await super().close()

    def _new(self) -> Any:
        import ray

        actor = ray.remote(Engine).options(  # its methods: stop while wait waits
            num_cpus=0, num_gpus=self._gpus, max_concurrency=4, scheduling_strategy="SPREAD"
        )
        return actor.remote(self.threads)

    def _start(self, engine: Any) -> Any:
        return engine.start.remote(*self._asked, self._host)

    async def _keep(self, url: str) -> None:
        """One of them: it serves; and when it has died, another one is started, and so on."""
        pause = BACKOFF[0]
        while True:
            began = time.monotonic()
            self.add(url)
            why = await _end_of(self._engines[url])
            del self._engines[url]
            await self.remove(url)
            pause = BACKOFF[0] if time.monotonic() - began > BACKOFF[1] else pause
            log.info("%s has ended (%s): another one starts in %g s", url, why, pause)
            url, pause = await self._another(pause)

    async def _another(self, pause: float) -> tuple[str, float]:
        """(the URL of a new one, seconds to wait before the next one), however often it takes."""
        while True:
            await asyncio.sleep(pause)
            pause = min(2 * pause, BACKOFF[1])
            engine = self._new()
            try:
                told = await self._start(engine)
            except Exception as error:  # Ray's, of whatever kind: it died while it was loading, say
                told = {"error": _first_line(error)}
            if "url" in told:
                self._engines[told["url"]] = engine
                return told["url"], pause
            log.info("a replica can't start, and tries again in %g s: %s", pause, told["error"])


async def _end_of(engine: Any) -> str:
    """Why, when it has ended."""
    try:
        await engine.wait.remote()
    except Exception as error:  # Ray's: its process is gone, or its machine
        return _first_line(error)
    return "it was asked to"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _shares(count: int, options: dict[str, Any]) -> tuple[int, int]:
    """(threads, GPUs) of each engine. BadInput if there are GPUs, and not enough."""
    import ray

    has = ray.cluster_resources()
    gpus = int(has.get("GPU", 0)) if options.get("device") != "cpu" else 0
    if 0 < gpus < count:
        raise BadInput(f"--replicas {count}: each needs a GPU, and there are {gpus}; --device cpu needs none")
    return max(1, int(has.get("CPU", 1)) // count), 1 if gpus else 0
