"""The flags of bench.serve, and what of them does not go together."""

import argparse
from pathlib import Path

from minipaged.bench.environments import how_to_install, peer_python
from minipaged.bench.loads import MAKERS
from minipaged.bench.serve_report import LIMITABLE

LOADS = [name for name in MAKERS if name != "beams"]
CLIENTS = [1, 8, 32]
DESCRIPTION = """\
Send loads to servers with OpenAI's API, over sockets. Without --url it starts minipaged's own server, and the engine
without a server beside it; they take turns. The table goes to standard output, progress to standard error."""
EPILOG = f"""\
vLLM is run where it is installed, best in an environment of its own:
  {how_to_install("vllm")}
A key for a server that wants one is read from OPENAI_API_KEY.
Exit status: 0 fine, 1 a server or a request failed, 2 bad input, 130 interrupted by Ctrl-C."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """SystemExit with status 2 if the flags are wrong."""
    flags = _parser()
    args = flags.parse_args(argv)
    if args.trace is None:
        for name in ("scale", "speedup"):
            if getattr(args, name) is not None:
                flags.error(f"--{name} is for a --trace")
    elif args.speedup is not None and (args.clients or args.rate):
        flags.error("--speedup is for a trace's own times: without --clients and --rate")
    if args.connections and (args.clients or args.rate or args.requests):
        flags.error("--connections says how many clients and requests there are: without --clients, --rate, --requests")
    if args.url and args.peer:
        flags.error("--peer vllm is started beside minipaged's own server: without --url")
    if args.url and args.num_blocks:
        flags.error("--num-blocks is for a server that is started here: without --url")
    if args.peer_python and (not args.peer or dict(args.peer_python).keys() != {"vllm"}):
        flags.error("--peer-python is for --peer vllm, and no other")
    args.goodput = dict(args.goodput)
    args.offline = not args.url if args.offline is None else args.offline
    return args


def _parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        "python -m minipaged.bench.serve", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = flags.add_argument
    add("--url", type=_url, help="a server that runs already, such as http://127.0.0.1:8000")
    model = flags.add_mutually_exclusive_group().add_argument
    model("--model", default="smollm2",
          help="smollm2 (the default), a folder in Hugging Face layout, a .gguf file, or a hub id; with --url it must "
          "be the server's: prompts are of its tokens")  # fmt: skip
    model("--tiny", action="store_true", help="a tiny model with random weights, made for the run")
    add("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="(default: fp32)")
    asked = flags.add_mutually_exclusive_group().add_argument
    asked("--load", nargs="+", choices=LOADS, default=["mixed"], metavar="LOAD",
          help=f"of {', '.join(LOADS)}: see python -m minipaged.bench --help (default: mixed)")  # fmt: skip
    asked("--trace", type=Path, metavar="FILE", help="times and lengths of a real service: Mooncake's .jsonl (with "
          "shared prefixes), or Azure's .csv; sent at its own times, if nothing else is said")  # fmt: skip
    asked("--connections", type=_count, metavar="N", help="N requests, all at once: is any refused, or lost?")
    add("--requests", type=_count, metavar="N",
        help="the first N of a trace, or of a load that is repeated with other tokens (default: once)")  # fmt: skip
    add("--scale", type=_positive, metavar="X", help="divide the lengths of a trace by X")
    add("--speedup", type=_positive, metavar="X", help="divide the times of a trace by X")
    when = flags.add_mutually_exclusive_group().add_argument
    when("--clients", nargs="+", type=_count, metavar="N",
         help="so many clients, each of which sends its next request when its last is answered (default: "
         f"{' '.join(map(str, CLIENTS))})")  # fmt: skip
    when("--rate", nargs="+", type=_positive, metavar="R",
         help="or R requests a second, whatever becomes of them (Poisson arrivals)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of the arrivals (default: 0)")
    add("--goodput", nargs="+", type=_limit, default=[], metavar="NAME:MS",
        help="count the requests that meet all of these, of ttft:MS tpot:MS e2el:MS")  # fmt: skip
    add("--peer", nargs="*", choices=["vllm"], default=[], metavar="PEER", help="vllm: its server beside ours")
    add("--peer-python", type=peer_python, action="append", default=[], metavar="NAME=PATH",
        help="the Python that has vLLM (default: this one)")  # fmt: skip
    add("--offline", action=argparse.BooleanOptionalAction,
        help="the engine without a server beside it, whose tokens are compared (default: unless --url)")  # fmt: skip
    add("--repeat", type=_count, default=1, metavar="N", help="rounds; medians are reported (default: 1)")
    add("--threads", type=_count, metavar="N", help="for each that is started (default: PyTorch's own choice)")
    add("--num-blocks", type=_count, metavar="N", help="the pool of each, in blocks of 16 tokens (default: enough for "
        "all requests, or at least for those that run at a time)")  # fmt: skip
    add("--timeout", type=_positive, default=600.0, metavar="S", help="seconds without a byte before a request is "
        "given up (default: 600)")  # fmt: skip
    add("--quick", action="store_true", help="loads with an eighth of the tokens, to try it out")
    add("--json", action="store_true", help="print JSON, with more figures than the table")
    return flags


def _url(text: str) -> str:
    """
    >>> _url("http://127.0.0.1:8000/v1/")
    'http://127.0.0.1:8000'
    """
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} must begin with http:// or https://")
    return text.rstrip("/").removesuffix("/v1")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _limit(text: str) -> tuple[str, float]:
    """
    >>> _limit("ttft:500")
    ('ttft', 500.0)
    """
    name, _, limit = text.partition(":")
    if name not in LIMITABLE:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:MS, with a NAME of {', '.join(LIMITABLE)}")
    return name, _positive(limit)
