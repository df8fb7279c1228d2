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
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from minipaged.course.assignment import Assignment, Case
from minipaged.course.inside import locks
from minipaged.course.submission import ROOT

LONGEST_ANSWER = 32 << 20  # bytes
KEPT = 4000  # characters of what a student's code prints
CPU_SECONDS = 120
SECONDS_TO_START = 60.0
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom",
          "/proc/cpuinfo", "/proc/meminfo", "/proc/self", "/sys/devices/system/cpu")  # fmt: skip


class Ended(Exception):
    """There is no answer: the message says why, for whoever wrote the code."""


class StudentProcess:
    """One process, for many questions about one tree. folder: an empty one, for the process's own files.

    granted: what else it may read. seconds: of processor time, all in all. streams: its driver talks as it works, and
    there is no `ask`. Used in a `with`; afterwards nothing of it is left but the folder.
    """

    def __init__(
        self, folder: Path, tree: Path, assignment: Assignment, locked: bool, granted: Iterable[Path] = (),
        seconds: int = CPU_SECONDS, streams: bool = False,
    ):  # fmt: skip
        self._number, self._seconds = 0, seconds
        self._inside = folder
        for source in resources.files("minipaged.course.inside").iterdir():
            if source.name in ("loop.py", "locks.py", "observe.py"):
                (self._inside / source.name).write_bytes(source.read_bytes())
        settings = {
            "tree": str(tree.resolve()), "imports": assignment.imports, "packages": packages(), "locked": locked,
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
        self._lines: queue.Queue[bytes] = queue.Queue()
        self._printed = b""
        self._readers = [threading.Thread(target=work, daemon=True) for work in (self._read, self._read_printed)]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> "StudentProcess":
        return self

    def __exit__(self, *args: object) -> None:
        self._kill()

    @property
    def printed(self) -> str:
        """The end of what the code has printed."""
        return self._printed.decode(errors="replace")

    def ask(self, driver: str, case: Case, seconds: float) -> dict[str, Any]:
        """{"answer": plain data}, or {"raised": {kind, said, where}}. Ended if there is none."""
        first, self._number = self._number == 0, self._number + 1
        question = {"id": self._number, "driver": driver, "case": case}
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it is dead: reading says so
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        try:
            line = self._lines.get(timeout=seconds + SECONDS_TO_START * first)
        except queue.Empty:
            self._kill()
            raise Ended(f"no answer in {seconds:g} seconds") from None
        try:
            answer = json.loads(line)
            if answer["id"] == self._number and ("answer" in answer) != ("raised" in answer):
                return dict(answer)
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        self._kill()
        raise Ended(self._why() if not line else "what came back was no answer to the question")

    def _why(self) -> str:
        status = self._process.wait()
        if status == -9:
            return "the process was killed: it wanted too much memory or time"
        if status == -24:
            return f"more than {self._seconds} seconds of processor time were used"
        if status < 0:
            return f"the process was ended by signal {-status}"
        return f"your code ended the process, with status {status}"

    def _read(self) -> None:
        assert self._process.stdout is not None
        line = b"begin"
        while line:
            line = self._process.stdout.readline(LONGEST_ANSWER)
            self._lines.put(line)

    def _read_printed(self) -> None:
        assert self._process.stderr is not None
        while more := self._process.stderr.read1(1 << 16):  # type: ignore[attr-defined]
            self._printed = (self._printed + more)[-KEPT:]

    def _kill(self) -> None:
        with contextlib.suppress(OSError):  # where nothing was locked it may have started others
            os.killpg(self._process.pid, signal.SIGKILL) if hasattr(os, "killpg") else self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join(5)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


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
