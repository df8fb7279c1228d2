"""The command line `python -m minipaged.serve`: OpenAI's API over HTTP, and a page to see it work. See server/."""

import argparse
import logging
import os
import signal
import socket
import sys
import textwrap
from contextlib import closing
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from minipaged.routing.policies import POLICIES, make_policy
from minipaged.terminal.command import EPILOG, INTERRUPTED, BadInput, Parser, run
from minipaged.terminal.engine_flags import MODEL_HELP, add_memory, add_speculation, count, engine_options
from minipaged.terminal.loading import end_as_rank, load
from minipaged.terminal.server_flags import LIMITS, add_address, add_limits
from minipaged.terminal.watch import waiting

if TYPE_CHECKING:  # PyTorch takes seconds to import: not for --help, nor to say that a flag is wrong
    from minipaged.async_llm import AsyncLLM
    from minipaged.server.config import ServerConfig

PROGRAM = "python -m minipaged.serve"
DESCRIPTION = (
    "Serve a model over HTTP, by OpenAI's API; and show, at /, a chat and the memory that it takes. Ctrl-C or SIGTERM "
    "lets those under way end; a second one ends at once."
)
EXAMPLES = """\
one model on two machines (on the other one the same, with --node-rank 1):
  torchrun --nnodes 2 --nproc-per-node 1 --node-rank 0 \\
      --master-addr 10.0.0.1 --master-port 29500 \\
      -m minipaged.serve --tensor-parallel-size 2 --host 0.0.0.0

prompts on one machine, all other tokens on another one (there kv_consumer, and
no kv_ip), and a router:
  python -m minipaged.serve --host 0.0.0.0 --kv-transfer-config \\
      '{"kv_connector": "TorchDistributedConnector",
        "kv_role": "kv_producer", "kv_ip": "10.0.0.1"}'
  python -m minipaged.route \\
      --prefill http://10.0.0.1:8000 --decode http://10.0.0.2:8000

replicas on the machines of a Ray cluster (with RAY_AUTH_MODE=disabled, or one
token, on all of them):
  ray start --head --port 6379        # on the others: --address 10.0.0.1:6379
  python -m minipaged.serve --replicas 4 --ray-address auto --host 0.0.0.0

"""
EPILOG_OF_SERVE = textwrap.fill(EPILOG.replace("by Ctrl-C", "by Ctrl-C before it served"), 79)


def main(argv: list[str] | None = None) -> int:
    return run("minipaged.serve", lambda: _serve(_parse(argv)))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    args = _parser().parse_args(argv)
    args.model = args.model or args.given or "smollm2"
    return args


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM, allow_abbrev=False, description=textwrap.fill(DESCRIPTION, 79), epilog=EXAMPLES + EPILOG_OF_SERVE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group()
    model.add_argument("given", nargs="?", metavar="MODEL", help=f"{MODEL_HELP} (default: smollm2)")
    model.add_argument("--model", help="the same")
    add("--served-model-name", nargs="+", metavar="NAME", help="what clients call it (default: as --model)")
    add_address(parser, 8000)
    _add_manners(parser.add_argument_group("manners"))
    _add_replicas(parser.add_argument_group("replicas"))
    add_memory(parser.add_argument_group("memory and scheduling"))
    add_speculation(parser.add_argument_group("speculation"))
    add("--debug", action="store_true", help="poison freed memory, and check all page tables at every step")
    return parser


def _add_manners(group: argparse._ArgumentGroup) -> None:
    keys = "who asks must have it; may be repeated (default: MINIPAGED_API_KEY, if that is set)"
    group.add_argument("--api-key", action="append", metavar="KEY", help=keys)
    origins = "pages from there may ask, too (CORS); * for all; may be repeated (default: none)"
    group.add_argument("--allowed-origin", action="append", metavar="URL", help=origins)
    add_limits(group, *LIMITS)
    group.add_argument("--log-text", action="store_true", help="log what is asked and answered, too")
    group.add_argument("--no-page", dest="page", action="store_false", help="show none at /")


def _add_replicas(group: argparse._ArgumentGroup) -> None:
    def add(flag: str, words: str, **how: Any) -> None:
        group.add_argument(flag, help=words, **how)

    add("--replicas", "so many engines on Ray, each a process with its share of the cores, and a router in front of "
        "them; all flags are for each of them", type=count, metavar="N")  # fmt: skip
    add("--routing", "which of them gets a request: see --policy of minipaged.route (default: prefix)",
        choices=POLICIES, default="prefix", metavar="NAME")  # fmt: skip
    add("--ray-address", "of a cluster, from one of its machines: after `ray start --head --port 6379` on one, and "
        "`ray start --address HOST:6379` on the others, it is auto. Each must have this package, and the model by the "
        "same name (default: a Ray of its own, on this machine)", metavar="HOST:PORT")  # fmt: skip


def _serve(args: argparse.Namespace) -> None:
    options, interrupts = engine_options(args), _interrupts()
    if args.ray_address and not args.replicas:
        raise BadInput("--ray-address: only with --replicas N")
    end_as_rank(args.model, options)
    try:
        from minipaged.server.running import PortTaken, address, bind
    except ModuleNotFoundError as error:
        raise BadInput(f"the package {error.name} is missing: pip install -r requirements.txt") from None
    try:
        listening = bind(args.host, args.port)
    except PortTaken as error:
        raise BadInput(f"{error}: choose another --port or --host") from None
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with closing(listening):
        if args.replicas:
            _serve_replicas(args, options, listening)
            return
        llm: AsyncLLM = load("AsyncLLM", args.model, options, Console(stderr=True, highlight=False))
        try:
            from minipaged.server.app import create_app
            from minipaged.server.running import serve

            app = create_app(llm, _config(args))
            if interrupts:
                raise KeyboardInterrupt
            print(_told(llm, args.page), file=sys.stderr)
            print(f"{args.model} is served at {address(listening)}", file=sys.stderr, flush=True)
            serve(app, listening)
        finally:
            llm.shutdown()


def _serve_replicas(args: argparse.Namespace, options: dict[str, Any], listening: socket.socket) -> None:
    from minipaged.routing.replicas import Crew, ray_running
    from minipaged.routing.router import create_router
    from minipaged.server.running import address, serve

    config, console = _config(args), Console(stderr=True, highlight=False)
    with ray_running(args.ray_address):
        crew = Crew(make_policy(args.routing), args.replicas, args.model, options, config, not args.ray_address)
        with waiting(console, f"loading {args.model}, {args.replicas} times"):
            crew.start()
        each = f"{crew.threads} thread{'s' if crew.threads > 1 else ''}"
        print(f"{args.replicas} replicas of {each} each, by {args.routing}; OpenAI's API at /v1", file=sys.stderr)
        print(f"{args.model} is served at {address(listening)}", file=sys.stderr, flush=True)
        serve(create_router(crew, config), listening)


def _told(llm: "AsyncLLM", page: bool) -> str:
    """What is asked first of a server that has started."""
    memory, longest = llm.engine.memory, llm.engine.max_model_len
    longest = min(longest, memory.num_blocks * memory.block_size)
    blocks = f"{memory.num_blocks:,} block{'s' if memory.num_blocks > 1 else ''} of {memory.block_size} tokens"
    where = "OpenAI's API at /v1, a page at /" if page else "OpenAI's API at /v1"
    return f"{blocks}, at most {longest:,} tokens a request; {where}"


def _interrupts() -> list[int]:
    """Fills with the Ctrl-Cs that come: an import in the middle of which one comes may swallow it."""
    came: list[int] = []

    def interrupt(sig: int, frame: FrameType | None) -> None:
        came.append(sig)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    return came


def _config(args: argparse.Namespace) -> "ServerConfig":
    from minipaged.server.config import ServerConfig

    keys = args.api_key or [key for key in [os.environ.get("MINIPAGED_API_KEY")] if key]
    names = args.served_model_name or [args.model]
    limits = {name: getattr(args, name) for name in (
        "max_body_bytes", "max_queued_requests", "max_queued_tokens", "max_queue_seconds", "drain_seconds", "log_text",
        "page",
    )}  # fmt: skip
    return ServerConfig(tuple(names), tuple(keys), tuple(args.allowed_origin or ()), **limits)


if __name__ == "__main__":
    status = main()
    if status == INTERRUPTED:  # Python's own end makes another status of it when C code was interrupted
        os._exit(status)
    sys.exit(status)
