"""An engine in a process of its own, to which a load is played. Whoever plays takes the times: no clock in there counts.
"""

import contextlib
import json
import os
import queue
import signal
import statistics
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minipaged.course.assignment import Assignment
from minipaged.course.contest_load import Ask
from minipaged.course.process import Ended, StudentProcess

CPU_SECONDS = 3600  # for all rounds
BYTES_PER_TOKEN, BYTES_BESIDE = 256, 1 << 20  # the most that an engine may say in a round
PLAYS_WHILE_STOPPED = "it has talked between its turns"


@dataclass(frozen=True)
class Figures:
    """A turn. tokens: for each request. first: seconds from when it was due to its first token.

    seconds: from the beginning to the last token. blocks: the most in use until then, as the engine says, which nobody
    can check. memory: the most bytes in main memory until then, as the system says; 0: it doesn't say.
    """

    tokens: list[list[int]]
    first: list[float]
    seconds: float
    blocks: int
    memory: int

    @property
    def speed(self) -> float:
        """Tokens of output in a second."""
        return sum(map(len, self.tokens)) / self.seconds

    @property
    def mean_first(self) -> float:
        return statistics.fmean(self.first)

    @property
    def late_first(self) -> float:
        """Nine of ten requests have their first token by then."""
        return sorted(self.first)[-(-9 * len(self.first) // 10) - 1]


@dataclass
class _Turn:
    """What has come so far. begun, arrived: by the parent's clock."""

    asks: list[Ask]
    begun: float
    arrived: list[list[float]]  # for each request, when each of its tokens came
    tokens: list[list[int]]
    open: set[int] = field(default_factory=set)  # asked, and not answered to the end
    num_asked: int = 0

    @classmethod
    def of(cls, asks: list[Ask]) -> "_Turn":
        return cls(asks, time.perf_counter(), [[] for _ in asks], [[] for _ in asks])

    def take(self, when: float, said: Any) -> None:
        """A line of the engine. ValueError if nothing such may come now."""
        number, new, end = said["id"], said["new"], said["end"]
        if number not in self.open or type(end) is not bool or not all(type(token) is int for token in new):
            raise ValueError(f"an answer to request {number!r:.20}, which isn't open")
        if len(self.tokens[number]) + len(new) > self.asks[number].tokens:
            raise ValueError(f"more tokens for request {number} than it asked for")
        self.tokens[number] += new
        self.arrived[number] += [when] * len(new)
        if end:
            if not self.tokens[number]:
                raise ValueError(f"request {number} ended without a token")
            self.open.remove(number)


class EngineProcess(StudentProcess):
    """It runs only while it has its turn: until then, and afterwards, the system has stopped it."""

    def __init__(self, folder: Path, tree: Path, assignment: Assignment, locked: bool, granted: Iterable[Path]):
        self._stamped: queue.Queue[tuple[float, bytes]] = queue.Queue()
        self._may_say = 0  # bytes
        self._too_late = ""
        super().__init__(folder, tree, assignment, locked, granted, CPU_SECONDS, streams=True)

    def open(self, options: dict[str, Any], seconds: float) -> None:
        """Make its engine. Ended if there is none."""
        with self._in_turn(seconds, "no engine"):
            self._send({"open": options})
            self._expect("ready")

    def play(self, number: int, asks: list[Ask], spread: float, seconds: float) -> Figures:
        """A round: its last request comes a little before `spread` seconds. Ended if it isn't answered in `seconds`."""
        with self._in_turn(seconds, "no answer to all requests"):
            self._may_say = BYTES_BESIDE + BYTES_PER_TOKEN * sum(ask.tokens for ask in asks)
            self._send({"round": number})
            turn = _Turn.of(asks)
            while turn.open or turn.num_asked < len(asks):
                self._ask_what_is_due(turn, spread)
                self._hear(turn, spread)
            self._send({"count": True})
            blocks = self._expect("blocks")
        if type(blocks) is not int or not 0 <= blocks < 1 << 40:
            raise Ended("what it says of blocks is no number")
        due = [turn.begun + ask.at * spread for ask in asks]
        first = [arrived[0] - then for arrived, then in zip(turn.arrived, due, strict=True)]
        last = max(arrived[-1] for arrived in turn.arrived)
        return Figures(turn.tokens, first, last - turn.begun, blocks, self._memory())

    def _ask_what_is_due(self, turn: _Turn, spread: float) -> None:
        now = time.perf_counter() - turn.begun
        while turn.num_asked < len(turn.asks) and turn.asks[turn.num_asked].at * spread <= now:
            ask = turn.asks[turn.num_asked]
            turn.open.add(turn.num_asked)
            self._send({"add": turn.num_asked, "text": ask.text, "tokens": ask.tokens})
            turn.num_asked += 1

    def _hear(self, turn: _Turn, spread: float) -> None:
        """What it says next; or nothing, if the next request is due before."""
        wait = None
        if turn.num_asked < len(turn.asks):
            wait = max(0.0, turn.begun + turn.asks[turn.num_asked].at * spread - time.perf_counter())
        try:
            when, line = self._stamped.get(timeout=wait)
        except queue.Empty:
            return
        try:
            turn.take(when, self._read_json(line))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Ended(f"what came was no answer: {error}"[:300]) from None

    def _expect(self, key: str) -> Any:
        said = self._read_json(self._stamped.get()[1])
        if not isinstance(said, dict) or list(said) != [key]:
            raise Ended(f"{key!r} was expected, and something else came")
        return said[key]

    def _read_json(self, line: bytes) -> Any:
        if not line:
            raise Ended(self._too_late or self._why())
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise Ended("what came was no answer") from None

    def _send(self, what: dict[str, Any]) -> None:
        """It may wait, if the pipe is full, until the engine reads; not longer than the turn takes."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it is dead: reading says so
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()

    @contextlib.contextmanager
    def _in_turn(self, seconds: float, what: str) -> Any:
        """It runs; and is killed if its turn takes too long."""

        def end() -> None:
            self._too_late = f"{what} in {seconds:.0f} seconds"
            self._signal(signal.SIGKILL)

        if not self._stamped.empty():
            when, line = self._stamped.get()
            raise Ended(PLAYS_WHILE_STOPPED if line else self._why())
        self._signal(signal.SIGCONT)
        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, number)

    def _read(self) -> None:
        assert self._process.stdout is not None
        line = b"begin"
        while line:
            line = self._process.stdout.readline(1 << 20)
            self._stamped.put((time.perf_counter(), line))
            self._may_say -= len(line)
            if self._may_say < -BYTES_BESIDE:
                self._too_late = "it says far more than it was asked for"
                self._signal(signal.SIGKILL)
                break
        self._stamped.put((time.perf_counter(), b""))

    def _memory(self) -> int:
        try:
            lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        except OSError:
            return 0
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
