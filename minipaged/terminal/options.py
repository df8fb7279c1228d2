"""The flags of `python -m minipaged.generate`."""

import argparse

from minipaged.terminal.command import EPILOG, Parser
from minipaged.terminal.engine_flags import MODEL_HELP, add_memory, add_speculation

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
PROMPTS_FILE_HELP = (
    "more prompts, one a line (-: standard input). If the first line begins with {, each is JSON: "
    '{"prompt": TEXT}, {"messages": [...]} or {"prompt_token_ids": [...]}, where parameters may stand too '
    'that override the flags: "max_tokens": 9; and "cache_salt": TEXT, to share cached prefixes with the same only'
)
TEMPERATURE_HELP = (
    "0: always the likeliest token; above: by chance. The default is 0, and "
    f"{TEMPERATURE} if --n or one of the next four is given"
)
JSON_HELP = (
    "one JSON object for each prompt, with tokens, scores and times; and logprobs where a line of --prompts-file asks "
    'for them, by token id: {"785": {"logprob": -0.1, "rank": 1, "decoded_token": "The"}}'
)
JSON_SCHEMA_HELP = "answers are JSON that fits the schema in this file"
REGEX_HELP = "each answer as a whole matches this regular expression"
HTML_HELP = "write a page that replays the run in any browser, without a network or a server"
TRACE_HELP = "write each step as a JSON line, to be drawn by python -m minipaged.trace FILE"


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags, checked one by one. BadInput if one is wrong; --help ends the program."""
    return _parser().parse_args(argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, allow_abbrev=False, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="with none, one prompt is read from standard input")
    add("--prompts-file", metavar="FILE", help=PROMPTS_FILE_HELP)
    add(
        "--model",
        default="smollm2",
        help=MODEL_HELP,
    )
    form = parser.add_mutually_exclusive_group()
    chat = "a prompt is a message to a chat model: the default if the model has a chat template"
    form.add_argument("--chat", action="store_true", default=None, help=chat)
    form.add_argument("--raw", dest="chat", action="store_false", help="a prompt is text to be continued")
    _add_decoding(parser.add_argument_group("decoding"))
    add_memory(parser.add_argument_group("memory and scheduling"))
    add_speculation(parser.add_argument_group("speculation"))
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


def _add_output(group: argparse._ArgumentGroup) -> None:
    def add(flag: str, words: str) -> None:
        group.add_argument(flag, action="store_true", help=words)

    add("--json", JSON_HELP)
    add("--stats", "end with the account of the memory")
    add("--watch", "show the memory live (where standard error is no terminal: a line for each event)")
    group.add_argument("--trace", metavar="FILE", help=TRACE_HELP)
    group.add_argument("--html", metavar="PAGE", help=HTML_HELP)
    add("--no-color", "no colours (as with NO_COLOR set)")
    add("--debug", "poison freed memory, and check all page tables at every step")
