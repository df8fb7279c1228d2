"""The processes that ranks run in, as the system sees them; and what they must not leave behind."""

import functools
import os
import time
from pathlib import Path

import torch.distributed as dist

WORKER = "minipaged.execution.ranks.worker"


def children(parent: int | None = None) -> dict[int, str]:
    """Ranks that a process has started, the dead ones whom nobody has buried among them: pid -> state."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
            state, its = rest.split()[:2]
            known = name.startswith("python") if state == "Z" else WORKER in (folder / "cmdline").read_text()
            if int(its) == (parent or os.getpid()) and known:
                found[int(folder.name)] = state
        except OSError:
            pass
    return found


def is_alive(pid: int) -> bool:
    """A dead one whom nobody has buried isn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone_within(seconds: float, pids) -> bool:
    return until(lambda: not any(map(is_alive, pids)), seconds)


def until(condition, seconds: float) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@functools.cache
def open_what_stays() -> None:
    """The first store of a process opens a pipe for good: libuv's, for signals."""
    dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def open_files() -> dict[str, str]:
    """What this process has open that ranks use: sockets, memory, pipes."""
    open_what_stays()
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.startswith(("socket:", "/memfd:", "pipe:")) or "deleted" in target:
            found[entry.name] = target
    return found
