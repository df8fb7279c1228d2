"""Which system calls a locked process may make: a program for the kernel, which looks at each before it is made.

What isn't named here is refused. So nothing is started, nothing is connected, nobody else is signalled, nothing that
outlives the process is made (queues, semaphores, keys), and no mode, owner or time of a file is changed, which Landlock
doesn't see. What Python, numpy and torch need to compute is there.

Sources: man seccomp(2), the kernel's include/uapi/linux/{seccomp,filter}.h, asm/unistd_64.h, asm-generic/unistd.h.
"""

import errno
import struct

Line = tuple[int, int, int, int]  # code, lines to skip if true, if false, value

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000
NEWER = 424  # calls from here on are asked for by new C libraries, which can do without
ALLOWED = {  # numbers on x86_64 and aarch64; None: there is none
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "preadv": (295, 69),
    "close": (3, 57), "lseek": (8, 62), "open": (2, None), "openat": (257, 56), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17), "chdir": (80, 49),
    "fchdir": (81, 50), "getdents": (78, None), "getdents64": (217, 61), "statfs": (137, 43), "fstatfs": (138, 44),
    "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59),
    "close_range": (436, 436), "eventfd2": (290, 19), "poll": (7, None), "ppoll": (271, 73), "select": (23, None),
    "pselect6": (270, 72), "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None),
    "epoll_pwait": (281, 22), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "brk": (12, 214),
    "madvise": (28, 233), "get_mempolicy": (239, 236), "futex": (202, 98), "set_robust_list": (273, 99),
    "set_tid_address": (218, 96), "rseq": (334, 293), "membarrier": (324, 283), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "sched_setaffinity": (203, 122), "sched_getparam": (143, 121),
    "sched_getscheduler": (145, 120), "sched_get_priority_max": (146, 125), "sched_get_priority_min": (147, 126),
    "getcpu": (309, 168), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132),
    "pause": (34, None), "restart_syscall": (219, 128), "alarm": (37, None), "getitimer": (36, 102),
    "setitimer": (38, 103), "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getresuid": (118, 148), "getresgid": (120, 150),
    "getgroups": (115, 158), "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156),
    "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179), "uname": (63, 160), "getrandom": (318, 278),
    "arch_prctl": (158, None), "wait4": (61, 260), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
MMAP, CLONE, TGKILL, FCNTL, IOCTL, PRLIMIT = (9, 222), (56, 220), (234, 131), (72, 25), (16, 29), (302, 261)
PRCTL, END_WITH_PARENT = (157, 167), 1  # who ends with its parent stays so
CLONE3 = 435  # hides its flags where no program sees them; without it, the C library tries clone
THREAD = 0x10000  # of clone: no process
SHARED_OF_NO_FILE, GROWS_DOWN = 0x21, 0x100  # of mmap: memory that no limit counts
DUPLICATE, FLAGS, DUPLICATE_CLOSED = (0,), (1, 2, 3, 4), (1030, 1032)  # of fcntl: no leases, no signals to others
HANDLES = (0x5450, 0x5451, 0x5401, 0x541B, 0x5421, 0x5413)  # of ioctl: closing on exec, is it a terminal, how large


def program(machine: str, process: int) -> bytes:
    """For the kernel; process: the only one that may be sent a signal."""
    column = list(ARCHITECTURES).index(machine)
    lines = [_load(4), (0x15, 1, 0, ARCHITECTURES[machine]), _answer(KILL), _load(0)]
    if machine == "x86_64":  # calls of the 32-bit kind have a bit of their own
        lines += [(0x35, 0, 1, 0x40000000), _answer(KILL)]
    for numbers in ALLOWED.values():
        if (number := numbers[column]) is not None:
            lines += [_unless(number, 1), _answer(ALLOW)]
    no = REFUSE | errno.EPERM
    lines += _one_of(FCNTL[column], 1, (*DUPLICATE, *FLAGS, *DUPLICATE_CLOSED), no)
    lines += _one_of(IOCTL[column], 1, HANDLES, REFUSE | errno.ENOTTY)
    lines += _one_of(TGKILL[column], 0, (process,), no)
    lines += _when(PRCTL[column], [_argument(0), _unless(END_WITH_PARENT, 1), _answer(no), _answer(ALLOW)])
    lines += _when(CLONE[column], [_argument(0), (0x45, 0, 1, THREAD), _answer(ALLOW), _answer(no)])
    lines += _when(PRLIMIT[column], [  # to look, not to set
        _argument(2), _unless(0, 3), _argument(2, upper=True), _unless(0, 1), _answer(ALLOW), _answer(no),
    ])  # fmt: skip
    lines += _when(MMAP[column], [
        _argument(3), (0x54, 0, 0, SHARED_OF_NO_FILE), _unless(SHARED_OF_NO_FILE, 1), _answer(no),
        _argument(3), (0x45, 0, 1, GROWS_DOWN), _answer(no), _answer(ALLOW),
    ])  # fmt: skip
    lines += [(0x35, 0, 1, NEWER), _answer(REFUSE | errno.ENOSYS), _answer(no)]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def _load(offset: int) -> Line:
    """From what the kernel shows: the call's number, the architecture, an address, six arguments."""
    return 0x20, 0, 0, offset


def _argument(index: int, upper: bool = False) -> Line:
    """One half of it: both architectures are little-endian."""
    return _load(16 + 8 * index + 4 * upper)


def _answer(value: int) -> Line:
    return 0x06, 0, 0, value


def _unless(value: int, skip: int) -> Line:
    """Skip lines if what was loaded is another value."""
    return 0x15, 0, skip, value


def _when(number: int, lines: list[Line]) -> list[Line]:
    """For one call; the last of the lines answers."""
    return [_unless(number, len(lines)), *lines]


def _one_of(number: int, argument: int, values: tuple[int, ...], otherwise: int) -> list[Line]:
    """A call, if this argument is one of the values."""
    checks = [line for value in values for line in (_unless(value, 1), _answer(ALLOW))]
    return _when(number, [_argument(argument), *checks, _answer(otherwise)])
