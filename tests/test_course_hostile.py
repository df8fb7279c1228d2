"""Strangers' code against the grader: it gets no points, in bounded time, and nothing of it is left."""

import os
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from solutions import hostile

from minipaged.course import process
from minipaged.course.assignment import load
from minipaged.course.checking import FAILS, check
from minipaged.course.inside import calls, locks
from minipaged.course.process import NotStarted, StudentProcess
from minipaged.course.submission import ROOT, Submission, build, reference
from minipaged.course.words import clean

WHY_NOT = "; ".join(process.missing())
NEEDS_LOCKS = pytest.mark.skipif(bool(WHY_NOT), reason=f"strangers' code can't be locked in here: {WHY_NOT}")
WHOLE = load(2)
ASSIGNMENT = replace(WHOLE, parts=(replace(WHOLE.parts[0], seconds=1.5),), memory=1 << 28)
HONEST = {file: reference(file) for file in ASSIGNMENT.files}
PATIENCE = 20.0


# ---- submissions ----------------------------------------------------------------------------------------------------


def processes():
    """Those that run student's code, of this process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"loop.py" in (folder / "cmdline").read_bytes() and str(os.getpid()) in (folder / "stat").read_text():
                found.append(folder.name)
        except OSError:
            continue
    return found


def queues():
    """Of the kernel, that outlive who made them: names and keys."""
    lines = [line for kind in ("msg", "sem", "shm") for line in Path(f"/proc/sysvipc/{kind}").read_text().splitlines()]
    return [line for line in lines if str(0x686F7374) in line], list(Path("/dev/shm").glob("*LEFT*"))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """All of them, side by side, and honest ones between them: what each got, and how long that took."""
    folder = tmp_path_factory.mktemp("hostile")
    victim = folder / "victim"
    victim.write_text("precious")
    (folder / "temporary").mkdir()
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.1)
    before, queues_before = victim.stat(), queues()
    patch = pytest.MonkeyPatch()
    patch.setattr(tempfile, "tempdir", str(folder / "temporary"))
    patch.setattr(process, "SECONDS_TO_IMPORT", 2.0)
    patch.setattr(process, "CPU_SECONDS", 15)
    patch.setattr(process, "MOST_PRINTED", 8 << 20)

    def grade(kind):
        names = {"ROOT": str(ROOT), "PORT": server.getsockname()[1], "VICTIM": str(victim)}
        one = hostile.submission(ASSIGNMENT, hostile.KINDS[kind], **names) if kind else Submission("honest", HONEST)
        begin = time.monotonic()
        return check(one, ASSIGNMENT, "hidden", locked=True, patience=PATIENCE), time.monotonic() - begin

    kinds = [*hostile.KINDS]
    kinds[len(kinds) // 2 : len(kinds) // 2] = [""]
    with ThreadPoolExecutor(6) as pool:  # most of them wait for their time to be up
        found = dict(zip(kinds, pool.map(grade, kinds), strict=True))
    found["the next one"] = grade("")
    after = victim.stat()
    patch.undo()
    with pytest.raises(TimeoutError):
        server.accept()
    server.close()
    assert victim.read_text() == "precious"
    assert (after.st_mode, after.st_mtime, after.st_nlink) == (before.st_mode, before.st_mtime, before.st_nlink)
    assert os.listdir(folder / "temporary") == [] and sorted(os.listdir(folder)) == ["temporary", "victim"]
    assert not processes() and queues() == queues_before
    assert not [thread for thread in threading.enumerate() if "_read" in thread.name and thread.is_alive()]
    return found


@NEEDS_LOCKS
@pytest.mark.parametrize("kind", hostile.KINDS)
def test_a_hostile_submission_gets_nothing(kind, outcomes):
    result, seconds = outcomes[kind]
    [part] = result.parts
    assert result.points == 0 and part.state == FAILS, part
    assert "LEAK" not in part.printed and part.failure.what
    assert "NameError" not in part.printed + part.failure.what and "SyntaxError" not in part.failure.what, "a mistake"
    for text in (part.printed, part.failure.what, part.failure.got):
        assert text == clean(text, 10_000), "it may be shown, and written to files"
    assert seconds < PATIENCE + 40


@NEEDS_LOCKS
@pytest.mark.parametrize("which", ["", "the next one"])
def test_an_honest_one_among_them_gets_all_its_points(which, outcomes):
    assert outcomes[which][0].points == ASSIGNMENT.points, outcomes[which]


def test_the_reference_would_be_enough_if_it_could_be_read():
    """Where nothing is locked these get points: so the locks, and not our mistakes, keep them out."""
    for kind in ("reads the reference", "imports the installed package"):
        one = hostile.submission(ASSIGNMENT, hostile.KINDS[kind], ROOT=str(ROOT), PORT=0, VICTIM="")
        assert check(one, ASSIGNMENT).points == ASSIGNMENT.points, kind


# ---- doors ----------------------------------------------------------------------------------------------------------

DOORS = {
    "reading a file": "open(case['victim']).read()",
    "reading a file through a link of /proc": "open('/proc/self/root' + case['victim']).read()",
    "reading the package": "open(case['root'] + '/minipaged/engine.py').read()",
    "reading the parent's command": "open(f'/proc/{os.getppid()}/cmdline').read()",
    "writing a file": "open(case['victim'], 'a')",
    "writing in its own tree": "open('new', 'w')",
    "making a folder": "os.mkdir('new')",
    "changing a file's mode": "os.chmod(case['victim'], 0)",
    "changing a file's time": "os.utime(case['victim'])",
    "listing a folder": "os.listdir('/')",
    "a socket": "socket.socket()",
    "a pair of sockets": "socket.socketpair()",
    "forking": "os.fork()",
    "another program": "os.execv('/bin/true', ['true'])",
    "another program beside": "os.posix_spawn('/bin/true', ['true'], {})",
    "a file in memory": "os.memfd_create('x')",
    "tracing the parent": "call(ptrace, 16, os.getppid(), 0, 0)",
    "a signal to the parent": "os.kill(os.getppid(), 0)",
    "a signal to its own group": "os.killpg(0, 0)",
    "a signal to a thread of the parent": "call(tgkill, os.getppid(), os.getppid(), 0)",
    "outliving the parent": "call(prctl, 1, 0)",
    "leaving its session": "os.setsid()",
    "a larger limit": "resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
    "a lease on a file": "fcntl.fcntl(os.open(json.__file__, 0), 1024, 1)",
    "signals by a pipe": "fcntl.fcntl(os.pipe()[0], 8, os.getppid())",
    "shared memory": "mmap.mmap(-1, 4096)",
    "priority": "os.setpriority(0, 0, -1)",
    "a queue that stays": "call(msgget, 0x686f7374, 0o1666)",
}
INSIDE = """
import ctypes, fcntl, json, mmap, os, platform, resource, socket
tgkill, ptrace, msgget, prctl = {"x86_64": (234, 101, 68, 157), "aarch64": (131, 117, 186, 167)}[platform.machine()]
def call(*numbers):
    if ctypes.CDLL(None, use_errno=True).syscall(*map(ctypes.c_long, numbers)) < 0:
        raise OSError(ctypes.get_errno(), "refused")
def door(case):
    try: return [True, repr(eval(case["code"]))]
    except (OSError, ValueError) as error: return [False, str(error)]
def able(case):
    import concurrent.futures, tempfile, threading
    assert list(concurrent.futures.ThreadPoolExecutor(3).map(abs, [-1, -2])) == [1, 2]
    assert open(__file__).read() and os.listdir(".") and os.pipe() and resource.getrlimit(resource.RLIMIT_DATA)
    return True
"""


@pytest.fixture(scope="module")
def inside(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doors")
    (folder / "victim").write_text("precious")
    (folder / "inside").mkdir()
    build(folder / "tree", ASSIGNMENT, {}, (), {})
    (folder / "tree/driver.py").write_text(INSIDE)
    with StudentProcess(folder / "inside", folder / "tree", ASSIGNMENT, locked=True) as one:
        yield lambda driver, code: one.ask(
            driver, {"code": code, "victim": str(folder / "victim"), "root": str(ROOT)}, 20
        )  # fmt: skip


@NEEDS_LOCKS
@pytest.mark.parametrize("door", DOORS)
def test_a_door_is_locked(door, inside):
    answer = inside("door", DOORS[door])["answer"]
    assert answer[0] is False, answer


@NEEDS_LOCKS
def test_what_honest_code_does_is_not_locked(inside):
    assert inside("able", "") == {"answer": True}


def test_what_is_missing_is_said_in_words(monkeypatch):
    monkeypatch.setattr(locks.platform, "machine", lambda: "mips")
    assert process.missing()[0] == "locks are for Linux on x86_64 or aarch64"
    monkeypatch.setattr(locks.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(locks.sys, "platform", "linux")
    monkeypatch.setattr(locks, "_call", lambda *numbers: -1)
    monkeypatch.setattr(locks, "_libc", lambda: type("Libc", (), {"prctl": lambda *numbers: -1}))
    assert [line.split("(")[0].strip() for line in locks.missing()] == [
        "this kernel has no Landlock", "this kernel has no seccomp",
    ]  # fmt: skip
    monkeypatch.setattr(process, "readable", lambda: [str(ROOT.parent)])
    assert "every program may read" in process.missing()[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="locks are for Linux")
def test_where_a_lock_can_not_be_closed_nothing_runs(tmp_path, monkeypatch):
    """And nobody gets 0 points for it."""
    monkeypatch.setattr(process, "FILES", ("loop.py", "locks.py", "observe.py"))  # without calls.py
    ran = {file: "print('ran')\n" + source for file, source in HONEST.items()}
    with pytest.raises(NotStarted, match="calls") as caught:
        check(Submission("unlocked", ran), ASSIGNMENT, locked=True)
    assert "ran\n" not in str(caught.value)


def test_no_call_is_allowed_twice_or_by_mistake():
    for column, machine in enumerate(calls.ARCHITECTURES):
        numbers = [pair[column] for pair in calls.ALLOWED.values() if pair[column] is not None]
        asked = (calls.MMAP, calls.CLONE, calls.TGKILL, calls.FCNTL, calls.IOCTL, calls.PRLIMIT, calls.PRCTL)
        assert len({*numbers, *(pair[column] for pair in asked)}) == len(numbers) + len(asked)
        assert len(calls.program(machine, 1)) % 8 == 0 and len(calls.program(machine, 1)) // 8 <= 4096
