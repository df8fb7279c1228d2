"""Locks on a process, for good: it reads what it was granted, and nothing else; it writes nothing; it starts no process
and knows no network. By Linux alone, without being root: Landlock for files, seccomp for system calls, limits for the
rest. Nothing but the standard library.

Sources: man landlock(7), seccomp(2), capabilities(7), getrlimit(2), and the kernel's include/uapi/linux/landlock.h.
"""

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterable

ARCHITECTURES = ("x86_64", "aarch64")

# Of Landlock: rights that can be granted for all below a folder, or for a file.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_FILE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8
TRUNCATE = 1 << 14  # since ABI 3
ALL_OF_ABI_1 = (1 << 13) - 1  # reading, writing, making, removing
NETWORK, SCOPES = (1 << 2) - 1, (1 << 2) - 1  # TCP; signals, and sockets without a name, to who isn't locked in, too
CREATE, ADD, RESTRICT = 444, 445, 446  # system calls: of the same numbers everywhere

NO_NEW_PRIVILEGES, GET_SECCOMP, NOT_DUMPABLE, PARENT_DEATH = 38, 21, 4, 1
SECCOMP, SET_CAPABILITIES = {"x86_64": 317, "aarch64": 277}, {"x86_64": 126, "aarch64": 91}
FILTER, ALL_THREADS = 1, 1
THREADS = 512  # and processes that a user may have beyond those that are there


def missing() -> list[str]:
    """Which locks this machine doesn't have, in words."""
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        return [f"locks are for Linux on {' or '.join(ARCHITECTURES)}"]
    found = []
    if _call(CREATE, None, 0, 1) < 1:
        found.append("this kernel has no Landlock (Linux 5.13 or later), or a container forbids it")
    if _libc().prctl(GET_SECCOMP, 0, 0, 0, 0) < 0:
        found.append("this kernel has no seccomp")
    return found


def lock(readable: Iterable[str], listable: Iterable[str] = ()) -> None:
    """From now on this process reads files only at or below `readable`, and lists folders there and at `listable`.

    OSError if a lock can't be closed; paths that don't exist are left out.
    """
    if others := len(os.listdir("/proc/self/task")) - 1:  # Landlock is for the thread that asks, and its children
        raise OSError(f"{others} threads run already, and would stay outside")
    lock_files(readable, listable)
    nobody = struct.pack("=II", 0x20080522, 0), bytes(24)  # what root may do beyond others, it may not from now on
    _must(_call(SET_CAPABILITIES[platform.machine()], *nobody), "capset")
    _lock_calls()


def lock_files(readable: Iterable[str], listable: Iterable[str] = (), writable: Iterable[str] = ()) -> None:
    """The lock on files alone, for programs that start others, which then have it too. writable: folders."""
    _libc().prctl(NOT_DUMPABLE, 0, 0, 0, 0)
    if _libc().prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "no_new_privs")
    abi = _call(CREATE, None, 0, 1)
    handled = ALL_OF_ABI_1 | (abi >= 2) << 13 | (abi >= 3) << 14 | (abi >= 5) << 15
    rules = struct.pack("=QQQ", handled, NETWORK if abi >= 4 else 0, SCOPES if abi >= 6 else 0)
    ruleset = _call(CREATE, rules, 24 if abi >= 6 else 16 if abi >= 4 else 8, 0)
    _must(ruleset, "landlock_create_ruleset")
    reading = EXECUTE | READ_FILE | READ_DIR
    writing = reading | WRITE_FILE | REMOVE_FILE | MAKE_FILE | (TRUNCATE if abi >= 3 else 0)
    for paths, rights in (readable, reading), (listable, READ_DIR), (writable, writing):
        for path in paths:
            _grant(ruleset, path, rights)
    _must(_call(RESTRICT, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def _grant(ruleset: int, path: str, rights: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not os.path.isdir(path):
        rights &= ~READ_DIR
    _must(_call(ADD, ruleset, 1, struct.pack("=Qi", rights, handle), 0), f"landlock_add_rule for {path}")
    os.close(handle)


def _lock_calls() -> None:
    import calls  # beside this file, where this runs

    code = calls.program(platform.machine(), os.getpid())
    buffer = ctypes.create_string_buffer(code)
    header = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    status = _call(SECCOMP[platform.machine()], FILTER, ALL_THREADS, header)
    if status:
        raise OSError(ctypes.get_errno(), "seccomp")


def limit(memory: int, seconds: int, files: int = 256) -> None:
    """Bytes of memory, seconds of processor time, open files; no file is written, and no core is dumped."""
    import resource

    limits = {
        resource.RLIMIT_DATA: memory, resource.RLIMIT_CPU: seconds, resource.RLIMIT_NOFILE: files,
        resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0,
    }  # fmt: skip
    if sys.platform == "linux":
        limits[resource.RLIMIT_NPROC] = _threads_of_this_user() + THREADS
    for what, most in limits.items():
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def _threads_of_this_user() -> int:
    """Those that the limit counts. Root's are not limited."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:  # gone meanwhile
            continue
    return count


def end_with_parent() -> None:
    """Where the system can: a process that is stopped would wait for ever for one that is gone."""
    if sys.platform == "linux":
        _libc().prctl(PARENT_DEATH, 9, 0, 0, 0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    as_c = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return int(_libc().syscall(ctypes.c_long(number), *as_c))


def _must(status: int, what: str) -> None:
    if status < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
