"""An engine in a process of its own, whose clock is outside: it runs while the process runs, and stands while the
system has stopped it. No clock in there counts, and what waits is never late.
"""

import contextlib
import json
import os
import queue
import signal
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipaged.course.assignment import Assignment
from minipaged.course.contest.load import Ask
from minipaged.course.process import Ended, StudentProcess

CPU_SECONDS = 3600  # for all rounds
SLICE = 0.5  # seconds, for which one of two runs before it is the other one's turn
BYTES_PER_TOKEN, BYTES_BESIDE = 256, 1 << 20  # the most that an engine may say in a round


@dataclass(frozen=True)
class Figures:
    """A round. tokens: for each request. first: seconds from when it was due to its first token.

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


class TurnEnded(Ended):
    """An Ended of one of several."""

    def __init__(self, said: str, engine: "EngineProcess"):
        super().__init__(said)
        self.engine = engine


class EngineProcess(StudentProcess):
    """clock: seconds for which it has run. Used in a `with`, as any such process; it begins stopped."""

    def __init__(self, folder: Path, tree: Path, assignment: Assignment, locked: bool, granted: Iterable[Path]):
        self._stamped: queue.Queue[tuple[float, bytes]] = queue.Queue()
        self._may_say = BYTES_BESIDE
        self._unsent = b""
        self._used, self._since = 0.0, 0.0
        super().__init__(folder, tree, assignment, locked, granted, CPU_SECONDS, streams=True)
        self._signal(signal.SIGSTOP)
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)  # one that doesn't read must not stop who plays

    def __enter__(self) -> "EngineProcess":
        return self

    @property
    def clock(self) -> float:
        return self._at(time.perf_counter())

    def _at(self, when: float) -> float:
        return self._used + max(0.0, when - self._since)  # what came when it was stopped already, came just before

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self._since = time.perf_counter()
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)
            self._used = self.clock
            self._since = float("inf")

    def _signal(self, number: int) -> None:
        with contextlib.suppress(OSError):  # it is dead: reading says so
            os.killpg(self._process.pid, number)

    def open(self, options: dict[str, Any], seconds: float) -> None:
        """Make its engine. Ended if there is none in so many seconds."""
        with self.running():
            self.say({"open": options})
            heard = self.hear(seconds)
        if heard is None:
            raise Ended(f"no engine in {seconds:.0f} seconds")
        if heard[1] != {"ready": True}:
            raise Ended("what came was no answer")

    def say(self, what: dict[str, Any]) -> None:
        """It is told as soon as it reads: some of it may be told by `hear`."""
        self._unsent += json.dumps(what).encode() + b"\n"
        self._send()

    def _send(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # the pipe is full, or it is dead
            while self._unsent:
                self._unsent = self._unsent[os.write(self._process.stdin.fileno(), self._unsent) :]

    def hear(self, wait: float) -> tuple[float, Any] | None:
        """When it said something next, by its clock, and what; None if that takes longer. Ended if it has ended."""
        self._send()
        try:
            when, line = self._stamped.get(timeout=max(0.0, min(wait, 0.05) if self._unsent else wait))
        except queue.Empty:
            return None
        if not line:
            raise Ended("it says far more than it was asked for" if self._may_say < 0 else self._why())
        try:
            return self._at(when), json.loads(line)
        except (ValueError, RecursionError):
            raise Ended("what came was no answer") from None

    def may_say(self, tokens: int) -> None:
        """From now on, about so many."""
        self._may_say = BYTES_BESIDE + BYTES_PER_TOKEN * tokens

    def _read(self) -> None:
        assert self._process.stdout is not None
        line = b"begin"
        while line and self._may_say >= 0:
            line = self._process.stdout.readline(BYTES_BESIDE)
            self._may_say -= len(line)
            self._stamped.put((time.perf_counter(), line))
        self._stamped.put((time.perf_counter(), b""))

    @property
    def memory(self) -> int:
        """The most bytes in main memory until now; 0 if the system doesn't say."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return 1024 * int(line.split()[1])
        return 0


class Turn:
    """A round, played to one engine. The last request comes a little before `spread` seconds.

    seconds: for which it may run until all is answered.
    """

    def __init__(self, engine: EngineProcess, number: int, asks: list[Ask], spread: float, seconds: float):
        self.engine, self.asks, self.seconds = engine, asks, seconds
        self.begun = engine.clock
        self.due = [self.begun + ask.at * spread for ask in asks]
        self.tokens: list[list[int]] = [[] for _ in asks]
        self.came: list[list[float]] = [[] for _ in asks]  # when each token came, by the engine's clock
        self.open: set[int] = set()  # asked, and not answered to the end
        self.num_asked = 0
        self.blocks: int | None = None
        self._counting = False
        engine.may_say(sum(ask.tokens for ask in asks))
        engine.say({"round": number})

    def run(self, seconds: float) -> bool:
        """Let it run for so long, or until it is through, and say whether it is. Ended if it never will be."""
        with self.engine.running():
            end = self.engine.clock + seconds
            while self.blocks is None and self.engine.clock < end:
                if self.engine.clock - self.begun > self.seconds:
                    raise Ended(f"{len(self.open)} requests weren't answered in {self.seconds:.0f} seconds")
                self._ask_what_is_due()
                next_due = self.due[self.num_asked] if self.num_asked < len(self.asks) else end
                if heard := self.engine.hear(min(end, next_due) - self.engine.clock):
                    self._take(*heard)
        return self.blocks is not None

    def _ask_what_is_due(self) -> None:
        while self.num_asked < len(self.asks) and self.due[self.num_asked] <= self.engine.clock:
            ask = self.asks[self.num_asked]
            self.open.add(self.num_asked)
            self.engine.say({"add": self.num_asked, "text": ask.text, "tokens": ask.tokens})
            self.num_asked += 1
        if self.num_asked == len(self.asks) and not self.open and not self._counting:
            self._counting = True
            self.engine.say({"count": True})

    def _take(self, when: float, said: Any) -> None:
        try:
            if self._counting:
                self.blocks = _natural(said["blocks"])
                return
            number, new, end = said["id"], said["new"], said["end"]
            if number not in self.open or type(end) is not bool:
                raise ValueError("nothing such was asked")
            self.tokens[number] += map(_natural, new)
            self.came[number] += [when] * len(new)
            if not len(new) <= len(self.tokens[number]) <= self.asks[number].tokens or (end and not self.came[number]):
                raise ValueError(f"request {number} has {len(self.tokens[number])} tokens")
            self.open -= {number} if end else set()
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise Ended(f"what came was no answer: {error!r:.200}") from None

    def figures(self) -> Figures:
        assert self.blocks is not None
        first = [came[0] - due for came, due in zip(self.came, self.due, strict=True)]
        last = max(came[-1] for came in self.came)
        return Figures(self.tokens, first, last - self.begun, self.blocks, self.engine.memory)


def _natural(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 1 << 40:
        raise ValueError(f"{number!r:.40} is no such number")
    return number


def by_turns(turns: list[Turn]) -> list[Figures]:
    """Play all of them, one at a time for a SLICE: whatever else the machine does, it does to all of them.

    TurnEnded says whose ended.
    """
    left = list(turns)
    while left:
        left = [turn for turn in left if not _through(turn)]
    return [turn.figures() for turn in turns]


def _through(turn: Turn) -> bool:
    try:
        return turn.run(SLICE)
    except Ended as ended:
        raise TurnEnded(str(ended), turn.engine) from None
