"""The contenders of bench.serve, in turns: servers over sockets, and the engine without one."""

import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from minipaged.bench.contenders import Options
from minipaged.bench.loads import Load
from minipaged.bench.progress import Progress
from minipaged.bench.serve_answers import Arrivals, Target
from minipaged.bench.serve_report import Figures, figures_of, figures_of_run
from minipaged.bench.serve_servers import Server, ServerFailed, model_of
from minipaged.bench.worker import ContenderFailed, Worker
from minipaged.execution.engine_args import EngineArgs

Tokens = list[list[int]]
Say = Callable[[str], None]


class Contender(Protocol):
    def wait(self) -> None: ...

    def run(self, load: Load, arrivals: Arrivals, say: Say) -> tuple[Figures, Tokens]: ...

    def close(self) -> None: ...


class Online:
    """A server, asked over sockets. server: its process, if it is ours to start and end. limits: see is_good."""

    def __init__(self, url: str, patience: float, limits: dict[str, float], server: Server | None = None):
        self.url, self.patience, self.limits, self.server = url, patience, limits, server

    def wait(self) -> None:
        if self.server:
            self.server.wait()
        self.target = Target(self.url, model_of(self.url), self.patience)

    def run(self, load: Load, arrivals: Arrivals, say: Say) -> tuple[Figures, Tokens]:
        from minipaged.bench.serve_clients import play  # by now it is known that its package is installed

        played = play(self.target, load, arrivals, secrets.token_hex(8), say)
        if self.server:
            self.server.check()
        return figures_of(played, self.limits), [[] if a.failure else a.tokens for a in played.answers]

    def close(self) -> None:
        if self.server:
            self.server.close()


class Offline:
    """The engine, given all requests at once; it runs as many at a time as there are clients."""

    def __init__(self, options: Options):
        self.options = options
        self._worker: Worker | None = None
        self._seqs = 0

    def wait(self) -> None:
        pass  # it is started when it is known how many are to run at a time

    def run(self, load: Load, arrivals: Arrivals, say: Say) -> tuple[Figures, Tokens]:
        seqs = min(arrivals.clients or EngineArgs.max_num_seqs, EngineArgs.max_num_seqs)
        if self._worker is None or seqs != self._seqs:
            self.close()
            self._seqs = seqs
            self._worker = Worker("minipaged", replace(self.options, engine={"max_num_seqs": seqs}))
            self._worker.wait()
        run = self._worker.run(load)
        return figures_of_run(load, run), run.tokens

    def close(self) -> None:
        if self._worker:
            self._worker.close()
            self._worker = None


class Contest:
    """One that fails is out of it, the others go on. failed: {"vllm": why}."""

    def __init__(self, contenders: dict[str, Contender], labels: dict[str, str], say: Say):
        self.contenders, self.labels, self.say = contenders, labels, say
        self.failed: dict[str, str] = {}

    def wait(self) -> None:
        """Until all are there."""
        began = time.monotonic()
        self.say(f"loading {', '.join(self.labels[name] for name in self.contenders)}")
        for name in list(self.contenders):
            self._guard(name, lambda one: one.wait())
        self.say(f"ready after {time.monotonic() - began:.0f} s")

    def run(
        self, load: Load, arrivals: Arrivals, repeat: int
    ) -> tuple[dict[str, list[Figures]], dict[str, Tokens]]:
        """Figures of all rounds, and the tokens of the first, by contender."""
        rounds: dict[str, list[Figures]] = {name: [] for name in self.contenders}
        tokens: dict[str, Tokens] = {}
        warm = Arrivals(arrivals.label, arrivals.clients or 8)
        for name in list(rounds):
            self._guard(name, lambda one: one.run(load.warmup(), warm, lambda text: None))
        for number in range(1, repeat + 1):
            for name in [name for name in rounds if name in self.contenders]:  # what is compared ran side by side
                what = f"{load.name}, {arrivals.label}, round {number} of {repeat}: {self.labels[name]}"
                progress = Progress(what)
                done = self._guard(name, lambda one: one.run(load, arrivals, progress.tell))  # noqa: B023
                progress.close()
                if done is not None:
                    rounds[name].append(done[0])
                    tokens.setdefault(name, done[1])
                    self.say(f"{what}: {done[0]['output_throughput']:.1f} tok/s in {done[0]['duration']:.1f} s")
        return {name: runs for name, runs in rounds.items() if runs}, tokens

    def _guard(self, name: str, action: Callable[[Contender], Any]) -> Any:
        if name not in self.contenders:
            return None
        try:
            return action(self.contenders[name])
        except (ServerFailed, ContenderFailed) as error:
            self.say(f"failed: {error}")
            self.failed[name] = str(error)
            self.contenders.pop(name).close()
            return None
