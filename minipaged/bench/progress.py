"""What a bench says meanwhile, to standard error."""

import shutil
import sys
import time


class Progress:
    """A line that changes, on a terminal; in a pipe, one every half a minute."""

    def __init__(self, what: str):
        self.what, self._told = what, time.monotonic()

    def tell(self, text: str) -> None:
        if sys.stderr.isatty():
            line = f"{self.what}: {text}"[: shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._told >= 30:
            self._told = time.monotonic()
            print(f"{self.what}: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
