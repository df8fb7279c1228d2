"""The flags of what listens: a server, or a router in front of several."""

import argparse

from minipaged.terminal.engine_flags import count

LIMITS: dict[str, tuple[type, float, str]] = {
    "max-body-bytes": (int, 4 * 1024 * 1024, "the longest body of a request"),
    "max-queued-requests": (int, 1024, "who comes when so many wait gets 429"),
    "max-queued-tokens": (int, 1024 * 1024, "the same, in tokens of prompts"),
    "max-queue-seconds": (float, 300, "who waited so long gets 503"),
    "drain-seconds": (float, 30, "how long those under way have to end"),
}


def add_address(parser: argparse.ArgumentParser, port: int) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="0.0.0.0: reachable from other machines (default: 127.0.0.1)")
    add("--port", type=_port, default=port, metavar="N", help=f"0: a free one (default: {port})")


def add_limits(group: argparse._ArgumentGroup, *names: str) -> None:
    for name in names:
        kind, default, words = LIMITS[name]
        least = count if kind is int else _seconds
        group.add_argument(f"--{name}", type=least, default=default, metavar="N", help=f"{words} (default: {default})")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 65535, not {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 < seconds < 1e7:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text!r}")
    return seconds
