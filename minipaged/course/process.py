"""The process in which a student's code runs, seen from outside: questions, answers, and no more than was granted."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from minipaged.course.assignment import Assignment, Case
from minipaged.course.inside import locks
from minipaged.course.submission import ROOT
from minipaged.course.words import clean

LONGEST_ANSWER = 4 << 20  # bytes
MOST_PRINTED = 64 << 20
KEPT = 4000  # characters of what a student's code prints
CPU_SECONDS = 120
SECONDS_TO_START = 60.0  # until nothing but imports and locks is done
SECONDS_TO_END = 2.0  # once it has closed its end of the pipe
SECONDS_TO_IMPORT = 20.0  # the student's package, with the first question
FILES = ("loop.py", "locks.py", "calls.py", "observe.py")
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom",
          "/proc/cpuinfo", "/proc/meminfo", "/proc/self", "/sys/devices/system/cpu")  # fmt: skip


class Ended(Exception):
    """There is no answer: the message says why, for whoever wrote the code."""


class NotStarted(Exception):
    """No process for a student's code could be made ready, or locked: nothing is known about the code."""


class StudentProcess:
    """One process, for many questions about one tree. folder: an empty one, for the process's own files.

    granted: what else it may read. seconds: of processor time, all in all. streams: its driver talks as it works, and
    there is no `ask`. Used in a `with`; afterwards nothing of it is left but the folder. NotStarted if there is none.
    """

    def __init__(
        self, folder: Path, tree: Path, assignment: Assignment, locked: bool, granted: Iterable[Path] = (),
        seconds: int = CPU_SECONDS, streams: bool = False,
    ):  # fmt: skip
        self._number = 0
        self._inside = folder
        for source in resources.files("minipaged.course.inside").iterdir():
            if source.name in FILES:
                (self._inside / source.name).write_bytes(source.read_bytes())
        settings = {
            "tree": str(tree.resolve()), "files": assignment.files, "locked": locked,
            "imports": assignment.imports, "packages": packages(),
            "memory": assignment.memory, "seconds": seconds if os.name == "posix" else 0, "streams": streams,
            "readable": [str(tree), str(self._inside), *map(str, granted), *readable()], "listable": packages(),
        }  # fmt: skip
        (self._inside / "settings.json").write_text(json.dumps(settings))
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(self._inside / "loop.py"), str(self._inside / "settings.json")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tree, start_new_session=True,
            env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
            | {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ} | assignment.environment,
        )  # fmt: skip
        self._stopping = threading.Lock()
        self._stopped = ""  # why
        self._lines: queue.Queue[bytes] = queue.Queue(maxsize=2)  # nobody fills our memory with answers
        self._printed = b""
        self._readers = [threading.Thread(target=work, daemon=True) for work in (self._read, self._read_printed)]
        for reader in self._readers:
            reader.start()
        if not streams:
            self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        try:
            self._answer(b"", SECONDS_TO_START)
        except Ended as ended:
            raise NotStarted(f"{ended}\n{self.printed}") from None

    def __enter__(self) -> "StudentProcess":
        return self

    def __exit__(self, *args: object) -> None:
        self._end()

    @property
    def printed(self) -> str:
        """The end of what the code has printed."""
        time.sleep(0.02)  # what was printed before the answer may come behind it
        return clean(self._printed.decode(errors="replace"), KEPT)

    def ask(self, driver: str, case: Case, seconds: float) -> dict[str, Any]:
        """{"answer": plain data}, or {"raised": {kind, said, where}}. Ended if there is none."""
        if not self._number:
            seconds += SECONDS_TO_IMPORT
        self._number += 1
        question = {"id": self._number, "driver": driver, "case": case}
        return self._answer(json.dumps(question).encode() + b"\n", seconds)

    def _answer(self, question: bytes, seconds: float) -> dict[str, Any]:
        """Neither reading nor writing waits longer: who doesn't read its questions is ended, too."""
        alarm = threading.Timer(seconds, self._stop, [f"no answer in {seconds:g} seconds"])
        alarm.daemon = True
        alarm.start()
        line = b""
        try:
            with contextlib.suppress(OSError):  # it is dead: reading says so
                self._process.stdin.write(question)  # type: ignore[union-attr]
                self._process.stdin.flush()  # type: ignore[union-attr]
            with contextlib.suppress(queue.Empty):  # where nothing was locked, a child may keep the pipe
                line = self._lines.get(timeout=seconds + 5)
        finally:
            alarm.cancel()
        answer = _understood(line, self._number)
        if answer is None:
            if not line:
                self._wait_for_its_end()
            self._stop("what came back was no answer to the question")
            self._end()
            raise Ended(self._why())
        return answer

    def _wait_for_its_end(self) -> None:
        """It said nothing more, and may be about to end: then it is told as its own doing. It isn't forgotten yet."""
        until = time.monotonic() + SECONDS_TO_END
        while hasattr(os, "waitid") and time.monotonic() < until:
            if self._stopped or os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
                return
            time.sleep(0.01)

    def _why(self) -> str:
        status = self._process.wait()
        if status == -9 and self._stopped:
            return self._stopped
        if status == -9:
            return "the process was killed: it wanted too much memory or time"
        if status < 0:
            return f"the process was ended by signal {-status}"
        return f"your code ended the process, with status {status}"

    def _read(self) -> None:
        line = b"begin"
        while line:
            line = self._process.stdout.readline(LONGEST_ANSWER)  # type: ignore[union-attr]
            self._lines.put(line)

    def _read_printed(self) -> None:
        count = 0
        while more := self._process.stderr.read1(1 << 16):  # type: ignore[union-attr]
            self._printed = (self._printed + more)[-KEPT:]
            count += len(more)
            if count > MOST_PRINTED:
                self._stop(f"more than {MOST_PRINTED >> 20} MB were printed")

    def _stop(self, why: str = "") -> None:
        """Once: afterwards its number may be another's."""
        with self._stopping:
            if self._process.returncode is None:
                self._stopped = self._stopped or why
                with contextlib.suppress(OSError):  # where nothing was locked it may have started others
                    os.killpg(self._process.pid, signal.SIGKILL) if hasattr(os, "killpg") else self._process.kill()

    def _end(self) -> None:
        self._stop()
        self._process.wait()
        until = time.monotonic() + 5
        while any(reader.is_alive() for reader in self._readers) and time.monotonic() < until:
            with contextlib.suppress(queue.Empty):
                self._lines.get(timeout=0.01)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


def _understood(line: bytes, number: int) -> dict[str, Any] | None:
    """None if it is no answer to this question; errors are made fit to be shown."""
    try:
        answer = json.loads(line)
        if answer["id"] == number and len(answer) == 2:
            if "raised" in answer:
                error = answer["raised"]
                return {"raised": {key: clean(error[key], 1000) for key in ("kind", "said", "where")}}
            return {"answer": answer["answer"]}
    except (ValueError, KeyError, TypeError, RecursionError, MemoryError):
        pass
    return None


def packages() -> list[str]:
    """Where what is installed lies."""
    paths = sysconfig.get_paths()
    return sorted({str(Path(paths[name]).resolve()) for name in ("purelib", "platlib")})


def readable() -> list[str]:
    """What every program needs, and the installed packages but for this one."""
    python = [sys.base_prefix, sysconfig.get_paths()["stdlib"], os.path.dirname(os.path.realpath(sys.executable))]
    found = [*SYSTEM, *python]
    ours = ("minipaged", "kernels", "__editable__")
    for folder in map(Path, packages()):
        found += [str(path) for path in folder.iterdir() if not path.name.startswith(ours)]
    return found


def missing() -> list[str]:
    """Why strangers' code can't be locked in here, in words; nothing: it can."""
    found = locks.missing()
    if within := [path for path in readable() if ROOT.is_relative_to(Path(path).resolve())]:
        found.append(f"minipaged lies in {ROOT}, and every program may read {within[0]}: run it from elsewhere")
    return found
