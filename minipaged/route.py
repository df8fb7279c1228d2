"""The command line `python -m minipaged.route`: one address for many servers. See routing/router.py."""

import argparse
import logging
import os
import sys
import textwrap
from contextlib import closing
from urllib.parse import urlsplit

from minipaged.routing.policies import POLICIES, make_policy
from minipaged.terminal.command import EPILOG, INTERRUPTED, BadInput, Parser, run
from minipaged.terminal.server_flags import add_address, add_limits

PROGRAM = "python -m minipaged.route"
DESCRIPTION = (
    "A router: whoever asks it is answered by one of the servers, ours or others with OpenAI's API. Who dies gets "
    "nothing until it lives again; what it had not begun to answer goes elsewhere, and a stream that it was in the "
    "middle of ends with an error. Servers that don't answer yet are waited for."
)
EXAMPLES = """\
on several machines:
  on each:   python -m minipaged.serve --host 0.0.0.0 --port 8000
  on one:    python -m minipaged.route --host 0.0.0.0 --port 8080 \\
                 http://10.0.0.1:8000 http://10.0.0.2:8000

prompts on one machine, all other tokens on another one (the servers need
--kv-transfer-config):
  on one:    python -m minipaged.route \\
                 --prefill http://10.0.0.1:8000 --decode http://10.0.0.2:8000

"""
POLICY_HELP = (
    "who gets a request: round_robin, one after the other; least_loaded, who has the fewest under way; prefix, who "
    "was sent the longest part of its beginning, unless too busy; consistent_hash, by its beginning alone "
    "(default: prefix). --decode servers are chosen by load in any case"
)


def main(argv: list[str] | None = None) -> int:
    return run("minipaged.route", lambda: _route(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM, allow_abbrev=False, description=textwrap.fill(DESCRIPTION, 79), epilog=EXAMPLES + EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("urls", nargs="*", type=_url, metavar="URL", help="a server, such as http://10.0.0.1:8000")
    add("--prefill", nargs="+", type=_url, metavar="URL", help="instead: servers that compute prompts, and keep them")
    add("--decode", nargs="+", type=_url, metavar="URL", help="servers that go on with them: with --prefill")
    add("--policy", choices=POLICIES, default="prefix", metavar="NAME", help=POLICY_HELP)
    add_address(parser, 8080)
    add_limits(parser.add_argument_group("manners"), "max-body-bytes", "drain-seconds")
    return parser


def _check(args: argparse.Namespace) -> None:
    """BadInput if it isn't clear who should do what."""
    if bool(args.prefill) != bool(args.decode) or bool(args.urls) == bool(args.decode):
        raise BadInput("give the URLs of servers; or some with --prefill, and some with --decode")
    for urls in (args.urls, args.prefill or [], args.decode or []):
        if twice := next((url for url in urls if urls.count(url) > 1), None):
            raise BadInput(f"{twice}: it stands there twice")


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        right = parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment)
        right = right and (parts.port is None or parts.port > 0)
    except ValueError:
        right = False
    if not right:
        raise argparse.ArgumentTypeError(f"must be a URL such as http://10.0.0.1:8000, not {text!r}")
    return text.rstrip("/").removesuffix("/v1")


def _route(args: argparse.Namespace) -> None:
    _check(args)
    try:
        from minipaged.routing.fleet import Fleet
        from minipaged.routing.router import create_router
        from minipaged.server.config import ServerConfig
        from minipaged.server.running import PortTaken, address, bind, serve
    except ModuleNotFoundError as error:
        raise BadInput(f"the package {error.name} is missing: pip install -r requirements.txt") from None

    try:
        listening = bind(args.host, args.port)
    except PortTaken as error:
        raise BadInput(f"{error}: choose another --port or --host") from None
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    config = ServerConfig(max_body_bytes=args.max_body_bytes, drain_seconds=args.drain_seconds)
    with closing(listening):
        answering = args.urls or args.decode
        prefill = Fleet(make_policy(args.policy), args.prefill) if args.prefill else None
        # Who goes on with what another one computed needs nothing in its memory.
        fleet = Fleet(make_policy("least_loaded" if prefill else args.policy), answering)
        app = create_router(fleet, config, prefill)
        num = len(answering) + len(args.prefill or ())
        print(f"{num} servers are reached at {address(listening)}", file=sys.stderr, flush=True)
        serve(app, listening)


if __name__ == "__main__":
    status = main()
    if status == INTERRUPTED:  # Python's own end makes another status of it when C code was interrupted
        os._exit(status)
    sys.exit(status)
