"""Whom rank 0 has beside it. One of them falls silent, fails or dies: all end, and who waits is told which and why."""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Pipe, wait
from typing import IO, Any

from minipaged.execution.ranks.errors import RankError, SumBroken
from minipaged.execution.ranks.link import BEAT_SECONDS, END, ORDER, SAYS, Link
from minipaged.models import ModelError

AS_SUCH: dict[str, type[Exception]] = {  # what is wrong with what the caller gave reaches the caller, while it loads
    kind.__name__: kind for kind in (ModelError, ValueError, OSError, MemoryError)
}
SECONDS_TO_START = 120.0  # a rank that imports and reads may be silent for so long
SECONDS_TO_END = 3.0
SILENCES_IN_A_SUM = 6  # all say that they live, and one does not come to a sum: it may compute, but not for so long


@dataclass
class Member:
    """A rank besides 0. process: None if somebody else started it. complaints: what it wrote to standard error."""

    rank: int
    link: Link
    pid: int
    host: str = ""  # if it is another one
    process: subprocess.Popen | None = None
    complaints: IO[bytes] | None = None
    said: list[dict[str, Any]] = field(default_factory=list)  # and nobody has asked for it yet
    silent: float = 0.0  # seconds
    ready: bool = False  # to compute steps

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid}{self.host and ' on ' + self.host})"

    def fate(self) -> str:
        """Why its link is broken, in words."""
        if self.process is None:
            return "went away"
        try:
            status = self.process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            return "closed its link"
        if status == -signal.SIGKILL:
            return "was killed by signal 9, by somebody or for lack of memory"
        why = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"{why}{self._last_complaint()}"

    def _last_complaint(self) -> str:
        if self.complaints is None:
            return ""
        self.complaints.seek(0)
        lines = [line for line in self.complaints.read().decode(errors="replace").splitlines() if line.strip()]
        fatal = [line for line in lines if line.startswith("Fatal Python error")]
        return f": {(fatal or lines)[-1]:.300}" if lines else ""

    def end_process(self, patience: float) -> None:
        """It has so many seconds to end by itself."""
        if self.process is not None:
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Team:
    """The other ranks, and a thread that watches them. silence: seconds, after which one that says nothing has failed.

    Whoever makes one closes it, whatever happens; only then its threads and processes end.
    """

    def __init__(self, members: list[Member], silence: float):
        self.members, self.silence = members, silence
        self.failure: str | None = None
        self._process = os.getpid()
        self._kind: type[Exception] = RankError  # of the failure
        self._closing = self._closed = False
        self._news = threading.Condition()
        self._wake, self._woken = Pipe()
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._watcher.start()

    def check(self) -> None:
        """RankError if one of them has failed; as long as they load, what it was."""
        if self.failure is not None:
            raise self._kind(self.failure)
        if self._closing:
            raise RankError("the ranks were ended")
        if not self.is_ours:
            raise RankError("the ranks belong to the process that started them, and this one was forked from it")

    @property
    def is_ours(self) -> bool:
        """Not so in a process that was forked from the one that made this."""
        return self._process == os.getpid()

    def check_wait(self, waited: float) -> None:
        """The same, in the middle of a sum for which others have been waited for so many seconds."""
        self.check()
        if waited > SILENCES_IN_A_SUM * self.silence:
            self.fail(f"the ranks are out of step: in {waited:.0f} seconds a sum wasn't brought by all")

    def order(self, order: bytes) -> None:
        for member in self.members:
            self._send(member, ORDER, order)

    def say(self, member: Member, **what: Any) -> None:
        self._send(member, SAYS, json.dumps(what).encode())

    def _send(self, member: Member, kind: bytes, body: bytes) -> None:
        try:
            member.link.send(kind, body)
        except OSError:  # the watcher finds out why
            self._wait_for_a_reason(f"{member} does not listen")
            self.check()

    def hear(self) -> list[dict[str, Any]]:
        """What each of them says next; RankError if one has failed."""
        with self._news:
            while not all(member.said for member in self.members):
                self.check()
                self._news.wait(BEAT_SECONDS)
        return [member.said.pop(0) for member in self.members]

    def fail(self, why: str, kind: type[Exception] = RankError) -> None:
        """All end, for this reason, unless there is one already."""
        with self._news:
            if self._closing or self.failure is not None:
                return
            self.failure, self._kind = why, kind
            self._news.notify_all()
        self._end_all(0)

    def explain(self, error: Exception) -> None:
        """Rank 0's own step has failed, perhaps because of the others. Raises RankError."""
        if isinstance(error, SumBroken):
            self._wait_for_a_reason(f"rank 0: {error}")
        self.fail(f"rank 0, the engine's own process, failed: {type(error).__name__}: {error}")
        raise RankError(self.failure) from error

    def _wait_for_a_reason(self, otherwise: str) -> None:
        end = time.monotonic() + SECONDS_TO_END
        while self.failure is None and time.monotonic() < end:
            time.sleep(0.01)
        self.fail(otherwise)

    def close(self) -> None:
        """Let them end, and see to it that they do. Doing it twice does no harm; broken off, it may be done again."""
        if self._closed:
            return
        with self._news:
            self._closing = True
            self._news.notify_all()
        if self.failure is None:
            for member in self.members:
                with contextlib.suppress(OSError):
                    member.link.send(END, patience=BEAT_SECONDS)
        self._wake.close()
        if threading.current_thread() is not self._watcher:
            self._watcher.join()
        self._end_all(SECONDS_TO_END if self.failure is None else 0)
        for member in self.members:
            member.link.close()
            if member.complaints is not None:
                member.complaints.close()
        self._woken.close()
        self._closed = True

    def _end_all(self, patience: float) -> None:
        """Those elsewhere see their links break. Those that were started here are killed if they don't end."""
        end = time.monotonic() + patience
        for member in self.members:
            if patience == 0:
                member.link.shut()
            member.end_process(max(0.0, end - time.monotonic()))

    # --- the watcher --------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        try:
            self._watch_all()
        except Exception as error:  # whatever it is: else nobody would look after them any more
            self.fail(f"rank 0 can't understand the others: {error!r}")

    def _watch_all(self) -> None:
        before = time.monotonic()
        links: dict[Any, Member] = {member.link.connection: member for member in self.members}
        while self.failure is None and not self._closing:
            ready = wait([*links, self._woken], BEAT_SECONDS)
            now = time.monotonic()
            # Not the time that went by, which may be an hour if this process was stopped itself, but the time in which
            # it could have listened.
            passed, before = min(now - before, BEAT_SECONDS), now
            for connection, member in links.items():
                if connection in ready:
                    self._listen(member)
                else:
                    self._suffer(member, passed)

    def _listen(self, member: Member) -> None:
        member.silent = 0.0
        try:
            kind, body = member.link.receive()
        except (EOFError, OSError):
            if not self._closing:
                self.fail(f"{member} {member.fate()}")
            return
        if kind == SAYS:
            said = json.loads(body)
            if "failed" in said:
                self._complain(member, said["kinds"], said["failed"])
                return
            with self._news:
                member.said.append(said)
                self._news.notify_all()

    def _complain(self, member: Member, kinds: list[str], text: str) -> None:
        """kinds: the names of the error's class, and of those that it is one of."""
        kind = next((AS_SUCH[name] for name in kinds if name in AS_SUCH), None)
        if kind is not None and not member.ready:
            self.fail(f"rank {member.rank}: {text}", kind)
        else:
            self.fail(f"{member} failed: {kinds[0]}: {text}")

    def _suffer(self, member: Member, passed: float) -> None:
        member.silent += passed
        limit = self.silence if member.ready else max(self.silence, SECONDS_TO_START)
        if member.silent > limit:
            self.fail(f"{member} said nothing for {member.silent:.0f} seconds: it hangs, or was stopped")
