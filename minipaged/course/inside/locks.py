"""Locks on a process, for good: it reads what it was granted, and nothing else; it writes nothing; it starts no process
and knows no network. By Linux alone, without being root: Landlock for files, seccomp for system calls, limits for the
rest. Nothing but the standard library.

Sources: man landlock(7), seccomp(2), and the kernel's include/uapi/linux/{landlock,seccomp,filter}.h.
"""

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterable

# Of Landlock: rights that can be granted for all below a folder, or for a file.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_FILE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8
TRUNCATE = 1 << 14  # since ABI 3
ALL_OF_ABI_1 = (1 << 13) - 1  # reading, writing, making, removing
NETWORK, SCOPES = (1 << 2) - 1, (1 << 2) - 1  # TCP; signals, and sockets without a name, to who isn't locked in, too
CREATE, ADD, RESTRICT = 444, 445, 446  # system calls: of the same numbers everywhere

NO_NEW_PRIVILEGES, SET_SECCOMP, NOT_DUMPABLE, PARENT_DEATH = 38, 22, 4, 1
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000
CLONE_THREAD = 0x10000
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CALLS = {  # refused: name -> numbers on x86_64 and aarch64; None: there is none
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "io_uring_setup": (425, 425), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kill": (62, 129), "tkill": (200, 130), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "chroot": (161, 51), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219), "setsid": (112, 157),
    "setpgid": (109, 154), "shmget": (29, 194), "memfd_create": (319, 279), "prlimit64": (302, 261),
}  # fmt: skip
CLONE, CLONE3 = (56, 220), (435, 435)


def missing() -> list[str]:
    """Which locks this machine doesn't have, in words."""
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        return [f"locks are for Linux on {' or '.join(ARCHITECTURES)}"]
    found = []
    if _call(CREATE, None, 0, 1) < 1:
        found.append("this kernel has no Landlock (Linux 5.13 or later), or a container forbids it")
    if _libc().prctl(21, 0, 0, 0, 0) < 0:
        found.append("this kernel has no seccomp")
    return found


def lock(readable: Iterable[str], listable: Iterable[str] = ()) -> None:
    """From now on this process reads files only at or below `readable`, and lists folders there and at `listable`.

    OSError if a lock can't be closed; paths that don't exist are left out.
    """
    lock_files(readable, listable)
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
    """A program for the kernel that sees each system call before it is made."""
    column = list(ARCHITECTURES).index(platform.machine())
    refused = sorted(number for numbers in CALLS.values() if (number := numbers[column]) is not None)

    def load(offset: int) -> tuple[int, int, int, int]:
        return 0x20, 0, 0, offset

    def unless_equal(value: int, skip: int) -> tuple[int, int, int, int]:
        return 0x15, 0, skip, value

    def answer(value: int) -> tuple[int, int, int, int]:
        return 0x06, 0, 0, value

    no, unknown = REFUSE | 1, REFUSE | 38  # EPERM; ENOSYS, after which the C library tries the older clone
    program = [load(4), (0x15, 1, 0, ARCHITECTURES[platform.machine()]), answer(KILL), load(0)]
    if column == 0:  # calls of the 32-bit kind on x86_64 have a bit of their own
        program += [(0x35, 0, 1, 0x40000000), answer(KILL)]
    for number in refused:
        program += [unless_equal(number, 1), answer(no)]
    program += [unless_equal(CLONE3[column], 1), answer(unknown)]
    program += [unless_equal(CLONE[column], 4), load(16), (0x45, 0, 1, CLONE_THREAD), answer(ALLOW), answer(no)]
    program += [answer(ALLOW)]
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code)
    header = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    _must(_libc().prctl(SET_SECCOMP, 2, header, 0, 0), "seccomp")


def limit(memory: int, seconds: int, files: int = 256) -> None:
    """Bytes of memory, seconds of processor time, open files; no file is written, and no core is dumped."""
    import resource

    for what, most in (
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_NOFILE, files),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


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
