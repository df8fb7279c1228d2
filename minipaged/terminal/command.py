"""What all command lines have in common: how they end, and what they say then."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from minipaged.execution.ranks.errors import RankError

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130  # exit statuses
EPILOG = "Exit status: 0 fine, 2 bad input, 130 interrupted by Ctrl-C, 1 anything else."


class BadInput(ValueError):
    """What the user gave can't be done; the message is for them."""


class CommandFailed(Exception):
    """It went wrong, and not by what the user gave; the message says how."""


class Parser(argparse.ArgumentParser):
    """An error is a BadInput."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (--help tells of all options)")


def run(name: str, work: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Do the work of the command `name`, and return its exit status. What went wrong is said in a line, or a few."""
    try:
        return work() or 0
    except BadInput as error:
        return _say(name, error, BAD_INPUT)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return ignore_closed_pipe()
    except (CommandFailed, RankError) as error:
        return _say(name, error, FAILED)
    except OSError as error:  # a full disk below standard output, say
        _say(name, error, FAILED)
        ignore_closed_pipe()
        return FAILED


def _say(name: str, error: Exception, status: int) -> int:
    for line in str(error).splitlines():
        print(f"{name}: error: {line}", file=sys.stderr)
    return status


def ignore_closed_pipe() -> int:
    """Whoever read our output has gone (`| head`): end quietly, with a shell's exit status for that."""
    with contextlib.suppress(io.UnsupportedOperation):  # it has no file below it
        below = sys.stdout.fileno()
        os.dup2(os.open(os.devnull, os.O_WRONLY), below)  # or Python complains when it flushes at exit
    return 141
