"""The flags of the command line."""

import argparse
import re
from typing import Any, NoReturn

from minipaged.execution.engine_args import KV_CACHE_DTYPES, PRODUCTS, QUANTIZATIONS, bytes_of
from minipaged.execution.speculative_config import METHODS, NUM_SPECULATIVE_TOKENS
from minipaged.memory import PREFIX_CACHES
from minipaged.scheduling.admission import SCHEDULES
from minipaged.scheduling.preemption import MODES

PROGRAM = "python -m minipaged.generate"
HINTS = """\
minipaged answers prompts with a language model whose memory is paged. Try:

  python -m minipaged.generate "What is the capital of France?"
  python -m minipaged.generate --raw "Once upon a time" --seed 1
  python -m minipaged.generate "A name for a cat?" --n 3 --stats
  python -m minipaged.generate "A name for a cat?" --beam-width 4
  python -m minipaged.generate "Tell a story." "What is love?" --n 3 \\
      --max-tokens 60 --num-blocks 20 --watch
  python -m minipaged.generate "Name a colour." "Name a fruit." --stats \\
      --max-num-seqs 1 --prefix-cache radix
  python -m minipaged.generate --prompts-file prompts.txt --json
  echo "Say hello" | python -m minipaged.generate

The default model, smollm2 (93 MB), is fetched once. --help names all options."""

MAX_TOKENS = 256
TEMPERATURE = 0.8  # where chance is asked for

DESCRIPTION = (
    "Answer prompts. A single answer is streamed; of several, each is printed when it is ready, in order. "
    "Results go to standard output, all else to standard error."
)
EPILOG = "Exit status: 0 fine, 2 bad input, 130 interrupted by Ctrl-C, 1 anything else."
PROMPTS_FILE_HELP = (
    "more prompts, one a line (-: standard input). If the first line begins with {, each is JSON: "
    '{"prompt": TEXT}, {"messages": [...]} or {"prompt_token_ids": [...]}, where parameters may stand too '
    'that override the flags: "max_tokens": 9; and "cache_salt": TEXT, to share cached prefixes with the same only'
)
TEMPERATURE_HELP = (
    "0: always the likeliest token; above: by chance. The default is 0, and "
    f"{TEMPERATURE} if --n or one of the next four is given"
)
PREFIX_CACHE_HELP = (
    "how prompts find what others computed before them: by a table of hashes, a radix tree, or not at all "
    "(default: hash)"
)
SCHEDULE_HELP = (
    "who comes in first: fcfs, who came first; prefix, who has the longest beginning in memory already (default: fcfs)"
)
PREEMPTION_HELP = (
    "how a request makes room when memory runs out: recompute drops it, to be computed again; swap moves it "
    "to CPU memory; auto swaps if it has several sequences"
)
KERNELS_HELP = "who computes: auto is triton on a GPU, and cpp on a CPU where there is a compiler; torch needs neither"
QUANTIZATION_HELP = (
    "auto: weights stay in the small numbers of the file, where there are kernels for them; none: they become floats; "
    "int8, int4: they are rounded to 8 or 4 bits when they are loaded"
)
PRODUCTS_HELP = (
    "with weights in small numbers: exact, the same as with the floats that they stand for; int8 rounds activations "
    "to 8 bits, too, which is faster on a CPU (default: exact)"
)
KV_CACHE_DTYPE_HELP = "keys and values in eight bits, for four times the blocks of fp32 (default: auto, as --dtype)"
JSON_HELP = (
    "one JSON object for each prompt, with tokens, scores and times; and logprobs where a line of --prompts-file asks "
    'for them, by token id: {"785": {"logprob": -0.1, "rank": 1, "decoded_token": "The"}}'
)
SPECULATE_HELP = (
    "have tokens guessed, which the model checks several at a time; the answers stay the same. ngram: what followed "
    "the same tokens before, for answers that repeat their prompt; draft: a smaller model with the same vocabulary; "
    "head: a small network on the model's own state, trained by python -m minipaged.train_head"
)
SPECULATIVE_MODEL_HELP = "of draft, a model; of head, a file (default: the one that stands in the package)"
BRANCHES_HELP = "rows of guesses for a sequence at a time, which begin differently (default: 1)"
JSON_SCHEMA_HELP = "answers are JSON that fits the schema in this file"
REGEX_HELP = "each answer as a whole matches this regular expression"
TRACE_HELP = "write each step as a JSON line, to be drawn by python -m minipaged.trace FILE"


class BadInput(ValueError):
    """What the user gave can't be done; the message is for them."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (--help tells of all options)")


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags, checked one by one. BadInput if one is wrong; --help ends the program."""
    return _parser().parse_args(argv)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, allow_abbrev=False, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="with none, one prompt is read from standard input")
    add("--prompts-file", metavar="FILE", help=PROMPTS_FILE_HELP)
    add(
        "--model",
        default="smollm2",
        help="smollm2, a folder in Hugging Face layout, a .gguf file or a hub id",
    )
    form = parser.add_mutually_exclusive_group()
    chat = "a prompt is a message to a chat model: the default if the model has a chat template"
    form.add_argument("--chat", action="store_true", default=None, help=chat)
    form.add_argument("--raw", dest="chat", action="store_false", help="a prompt is text to be continued")
    _add_decoding(parser.add_argument_group("decoding"))
    _add_memory(parser.add_argument_group("memory and scheduling"))
    _add_speculation(parser.add_argument_group("speculation"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_decoding(group: argparse._ArgumentGroup) -> None:
    def add(flag: str, kind: type, metavar: str, words: str) -> None:
        group.add_argument(flag, type=kind, metavar=metavar, help=words)

    add("--max-tokens", int, "N", f"the longest answer in tokens (default: {MAX_TOKENS})")
    add("--temperature", float, "T", TEMPERATURE_HELP)
    add("--top-p", float, "P", "draw from the likeliest tokens that hold this probability")
    add("--top-k", int, "K", "draw from the K likeliest tokens")
    add("--min-p", float, "P", "leave out tokens less likely than P times the likeliest")
    add("--seed", int, "N", "draw the same tokens again at the next run")
    add(
        "--n",
        int,
        "N",
        "samples of each prompt; with --beam-width: how many of the best beams (default: all)",
    )
    add("--beam-width", int, "W", "beam search with W beams instead of drawing by chance")
    add("--length-penalty", float, "X", "beam search: above 0 favours long answers (default: 1)")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    form = group.add_mutually_exclusive_group()
    form.add_argument("--json-schema", metavar="FILE", help=JSON_SCHEMA_HELP)
    form.add_argument("--regex", metavar="REGEX", help=REGEX_HELP)


def _add_memory(group: argparse._ArgumentGroup) -> None:
    def add(flag: str, default: int, words: str) -> None:
        group.add_argument(flag, type=_count, default=default, metavar="N", help=f"{words} (default: {default})")

    add("--block-size", 16, "tokens in a block")
    size = group.add_mutually_exclusive_group()
    blocks = "blocks in the pool (default: as many as fit into a quarter of the free memory)"
    size.add_argument("--num-blocks", type=_count, metavar="N", help=blocks)
    memory = "the size of the pool instead, such as 512MiB or 2GB"
    size.add_argument("--kv-cache-memory", type=parse_bytes, metavar="SIZE", help=memory)
    add("--max-num-seqs", 64, "sequences that run at a time")
    budget = "tokens in a step: what does not fit is computed in the next ones "
    budget += "(default: 512, on a GPU 2048, or --max-num-seqs if that is more)"
    group.add_argument("--max-num-batched-tokens", type=_count, metavar="N", help=budget)
    whole = "let a prompt wait for a step that has room for it, instead of computing it in pieces"
    group.add_argument("--no-chunked-prefill", dest="chunked_prefill", action="store_false", help=whole)
    caches = tuple(PREFIX_CACHES)
    group.add_argument("--prefix-cache", choices=caches, default="hash", help=PREFIX_CACHE_HELP)
    group.add_argument("--schedule", choices=SCHEDULES, default="fcfs", help=SCHEDULE_HELP)
    group.add_argument("--preemption", choices=MODES, default="auto", help=PREEMPTION_HELP)
    dtypes = ("auto", "fp32", "bf16", "fp16")
    group.add_argument("--dtype", choices=dtypes, default="auto", help="auto: fp32, on a GPU bf16")
    group.add_argument("--quantization", choices=QUANTIZATIONS, default="auto", help=QUANTIZATION_HELP)
    group.add_argument("--products", choices=PRODUCTS, default="exact", help=PRODUCTS_HELP)
    group.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help=KV_CACHE_DTYPE_HELP)
    devices = ("auto", "cpu", "cuda")
    group.add_argument("--device", choices=devices, default="auto", help="auto: the GPU, if there is one")
    backends = ("auto", "torch", "triton", "cpp")
    group.add_argument("--kernels", choices=backends, default="auto", help=KERNELS_HELP)


def _add_speculation(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--speculate", choices=METHODS, help=SPECULATE_HELP)
    group.add_argument("--speculative-model", metavar="MODEL", help=SPECULATIVE_MODEL_HELP)
    most = ", ".join(f"{method} {count}" for method, count in NUM_SPECULATIVE_TOKENS.items())
    words = f"the most guesses in a row (default: {most})"
    group.add_argument("--num-speculative-tokens", type=_count, metavar="N", help=words)
    group.add_argument("--num-branches", type=_count, metavar="N", help=BRANCHES_HELP)


def speculative_config(args: argparse.Namespace) -> dict[str, Any] | None:
    """What these flags say together. BadInput if one is given, and nothing is guessed."""
    names = {"speculative_model": "model", "num_speculative_tokens": "num_speculative_tokens",
             "num_branches": "num_branches"}  # fmt: skip
    given = {key: getattr(args, name) for name, key in names.items() if getattr(args, name) is not None}
    if args.speculate is None:
        for name, key in names.items():
            if key in given:
                raise BadInput(f"--{name.replace('_', '-')}: needs --speculate {' or '.join(METHODS)}")
        return None
    return {"method": args.speculate, **given}


def _add_output(group: argparse._ArgumentGroup) -> None:
    def add(flag: str, words: str) -> None:
        group.add_argument(flag, action="store_true", help=words)

    add("--json", JSON_HELP)
    add("--stats", "end with the account of the memory")
    add("--watch", "show the memory live (where standard error is no terminal: a line for each event)")
    group.add_argument("--trace", metavar="FILE", help=TRACE_HELP)
    add("--no-color", "no colours (as with NO_COLOR set)")
    add("--debug", "poison freed memory, and check all page tables at every step")


def _count(text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {text!r}")
    return int(text)


def parse_bytes(text: str) -> int:
    try:
        return bytes_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
