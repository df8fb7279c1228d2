"""An engine in a process of its own, that can be killed at any moment: for tests of what is left then."""

import contextlib
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from minipaged import LLM

START = multiprocessing.get_context("forkserver")  # it has imported all, and computed nothing: a process in 50 ms
START.set_forkserver_preload(["tests.engine_process"])
LIMIT = 30.0  # seconds, for anything


@dataclass
class Ended:
    """What came of a request."""

    outputs: list[tuple[list[int], str | None]]
    error: str | None
    transferred: int
    kv_transfer_params: dict[str, Any] | None


def live(pipe, folder: str, options: dict[str, Any], slow: float) -> None:
    """The process: step, and do what is asked between steps. slow: seconds that a step takes at least."""
    torch.set_num_threads(1)
    with LLM(folder, **options) as llm:
        llm.observers.append(lambda *_: time.sleep(slow))
        pipe.send("ready")
        while True:
            while pipe.poll(0 if llm.has_unfinished_requests else None):
                what, *given = pipe.recv()
                if what == "close":
                    return
                pipe.send(("said", do(llm, what, *given)))
            for output in llm.step():
                if output.finished:
                    outputs = [(one.token_ids, one.finish_reason) for one in output.outputs]
                    told = output.error, output.metrics.num_transferred_tokens, output.kv_transfer_params
                    pipe.send(("ended", output.request_id, Ended(outputs, *told)))


def do(llm: LLM, what: str, *given: Any) -> Any:
    if what == "add":
        return llm.add_request(*given)
    if what == "abort":
        llm.abort(*given)
        return given[0]
    if what == "reset":
        return llm.reset_prefix_cache()
    if what == "interrupt":  # as if a step had been broken off
        llm._start_over()
        return None
    stats = llm.stats()
    llm.memory.check()
    return stats.memory.used + stats.memory.cpu_used, stats.transfers


@dataclass
class Engine:
    """Seen from the test. It ends with the `with`, however that ends."""

    folder: Any
    options: dict[str, Any]
    slow: float = 0.0
    ended: dict[str, Ended] = field(default_factory=dict)

    def __enter__(self):
        self.pipe, theirs = START.Pipe()
        self.process = START.Process(target=live, args=(theirs, str(self.folder), self.options, self.slow), daemon=True)
        self.process.start()
        theirs.close()
        return self

    def wait_until_ready(self):
        assert self.pipe.poll(LIMIT), "it does not begin"
        assert self.pipe.recv() == "ready"
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self, sig=signal.SIGKILL):
        if self.process.is_alive():
            os.kill(self.process.pid, sig)
            if sig in (signal.SIGSTOP, signal.SIGCONT):
                return
        self.process.join(LIMIT)
        assert not self.process.is_alive()
        self.pipe.close()

    def close(self):
        """In good order."""
        self.pipe.send(("close",))
        self.process.join(LIMIT)
        assert self.process.exitcode == 0

    def ask(self, *what):
        self.pipe.send(what)
        while True:
            kind, *said = self._next()
            if kind == "said":
                return said[0]
            self.ended[said[0]] = said[1]

    def wait_for(self, request_id: str) -> Ended:
        while request_id not in self.ended:
            _, name, end = self._next()
            self.ended[name] = end
        return self.ended.pop(request_id)

    def look(self):
        """What has ended meanwhile; EOFError if it is dead."""
        while self.pipe.poll(0):
            _, name, end = self._next()
            self.ended[name] = end
        return self.ended

    def _next(self):
        assert self.pipe.poll(LIMIT), "it hangs"
        return self.pipe.recv()

    def generate(self, request_id, prompt, params) -> Ended:
        self.ask("add", prompt, params, request_id)
        return self.wait_for(request_id)

    @property
    def used(self) -> int:
        return self.ask("stats")[0]

    def wait_until_empty(self) -> None:
        """No block is in use, of whatever kind."""
        until = time.monotonic() + LIMIT
        while used := self.used:
            assert time.monotonic() < until, f"{used} blocks are still in use"
            time.sleep(0.01)


@contextlib.contextmanager
def engines(folder, *options: dict[str, Any], slow: float = 0.0):
    """They begin side by side."""
    with contextlib.ExitStack() as stack:
        begun = [stack.enter_context(Engine(folder, one, slow)) for one in options]
        yield [engine.wait_until_ready() for engine in begun]
