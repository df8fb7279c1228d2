"""What the command line is asked to answer: prompts and files of prompts, made into jobs for the engine.

Everything that can be wrong without knowing the model is found here, before anything is loaded.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from minipaged.requests.beam_search_params import BeamSearchParams
from minipaged.requests.sampling_params import SamplingParams
from minipaged.terminal.command import BadInput
from minipaged.terminal.options import MAX_TOKENS, TEMPERATURE

T = TypeVar("T")
R = TypeVar("R")
DECODING_FLAGS = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop"),
    *("n", "beam_width", "length_penalty"),
)
Asked = tuple[dict[str, Any], str]  # what a line of JSON may hold, and how the user knows it
CHANCE = ("top_p", "top_k", "min_p", "seed")  # who gives one of these wants a temperature above 0
SAMPLING_KEYS = {field.name for field in fields(SamplingParams)} - {"output_kind"}  # it prints whole outputs
BEAM_KEYS = {field.name for field in fields(BeamSearchParams)}
PROMPT_KINDS: dict[str, tuple[type, str]] = {  # what a line of JSON calls it: type of its items, and in words
    "prompt": (str, "a text that is not empty"),
    "messages": (dict, 'a list of {"role": TEXT, "content": TEXT}, not empty'),
    "prompt_token_ids": (int, "a list of integers, not empty"),
}


class NoPrompt(BadInput):
    """There is nothing to do."""


@dataclass(frozen=True)
class Job:
    """One prompt. where: how the user knows it, for errors."""

    prompt: str | list[int] | list[dict[str, Any]]
    params: SamplingParams | BeamSearchParams
    where: str
    cache_salt: str | None = None

    @property
    def title(self) -> str:
        """A line of at most 50 characters by which the prompt is recognised."""
        text = self.prompt
        if not isinstance(text, str):
            last = text[-1]
            text = str(last.get("content", "")) if isinstance(last, dict) else f"token ids {text}"
        text = " ".join(text.split())
        return text if len(text) <= 50 else text[:47] + "..."

    @property
    def is_single(self) -> bool:
        """Whether one text grows from it token by token."""
        return isinstance(self.params, SamplingParams) and self.params.n == 1


def read_jobs(args: argparse.Namespace) -> list[Job]:
    """All prompts with their parameters. BadInput names every bad one."""
    flags = {key: getattr(args, key) for key in DECODING_FLAGS} | {"structured_outputs": _form(args)}
    make_params(flags)  # what is wrong with the flags is said once, not for each prompt
    asked: list[Asked] = [({"prompt": text}, f"prompt {i}") for i, text in enumerate(args.prompts, 1)]
    if args.prompts_file is not None:
        asked += _read_file(args.prompts_file)
    elif not asked and sys.stdin is not None and not sys.stdin.isatty():
        text = _read("-").rstrip("\r\n")
        asked = [({"prompt": text}, "the prompt from standard input")] if text else []
    if not asked:
        raise NoPrompt("there is no prompt: give one, or --prompts-file, or one on standard input")
    return for_each(asked, lambda one: _job(*one, flags))


def _form(args: argparse.Namespace) -> dict[str, str] | None:
    if args.json_schema is not None:
        return {"json": _read(args.json_schema)}
    return None if args.regex is None else {"regex": args.regex}


def for_each(items: Iterable[T], action: Callable[[T], R]) -> list[R]:
    """What `action` gave for each item; or BadInput with all that was wrong, a line for each, ten at most."""
    results, errors = [], []
    for item in items:
        try:
            results.append(action(item))
        except BadInput as error:
            errors.append(str(error))
    if errors:
        more = [f"and {len(errors) - 10} more"] if len(errors) > 10 else []
        raise BadInput("\n".join([*errors[:10], *more]))
    return results


def make_params(options: dict[str, Any]) -> SamplingParams | BeamSearchParams:
    """The parameters of a request: of beam search if there is a beam_width. BadInput if they are wrong."""
    given = {key: value for key, value in options.items() if value is not None}
    options = {"max_tokens": MAX_TOKENS, **given}
    try:
        if "beam_width" in options:
            if wrong := ", ".join(options.keys() - BEAM_KEYS):
                raise BadInput(f"{wrong}: not together with beam_width, which leaves nothing to chance")
            return BeamSearchParams(**options)
        if wrong := ", ".join(options.keys() - SAMPLING_KEYS):
            raise BadInput(f"{wrong}: only together with beam_width")
        by_chance = options.get("n", 1) != 1 or any(key in options for key in CHANCE)
        return SamplingParams(**{"temperature": TEMPERATURE if by_chance else 0.0, **options})
    except ValueError as error:
        raise BadInput(str(error)) from None


def _job(asked: dict[str, Any], where: str, flags: dict[str, Any]) -> Job:
    """A job from what a line of JSON may hold: a prompt, and parameters that override the flags."""
    given = {key: asked[key] for key in PROMPT_KINDS if key in asked}
    own = {key: value for key, value in asked.items() if key not in PROMPT_KINDS}
    salt = own.pop("cache_salt", None)
    try:
        if len(given) != 1:
            raise BadInput(f"must have just one of {', '.join(PROMPT_KINDS)}; has {list(given)}")
        if unknown := ", ".join(sorted(own.keys() - SAMPLING_KEYS - BEAM_KEYS)):
            known = ", ".join(sorted(SAMPLING_KEYS | BEAM_KEYS | {"cache_salt"}))
            raise BadInput(f"unknown: {unknown}; it may have {known}")
        [(key, prompt)] = given.items()
        kind, right = PROMPT_KINDS[key]
        container = str if kind is str else list
        if not (isinstance(prompt, container) and prompt and all(type(item) is kind for item in prompt)):
            raise BadInput(f"{key} must be {right}")
        if not _is_unicode(prompt):
            raise BadInput(f"{key} is not valid Unicode (half a surrogate pair, or not UTF-8)")
        if salt is not None and not (isinstance(salt, str) and salt):
            raise BadInput("cache_salt must be a text that is not empty")
        return Job(prompt, make_params({**flags, **own}), where, salt)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None


def _is_unicode(prompt: Any) -> bool:
    try:
        json.dumps(prompt, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_file(path: str) -> list[Asked]:
    """What each line asks for, and its place. Empty lines don't count."""
    name = "standard input" if path == "-" else path
    numbered = enumerate(_read(path).split("\n"), 1)
    lines = [(line.strip(), f"{name}, line {number}") for number, line in numbered if line.strip()]
    if not lines:
        raise BadInput(f"{name} has no prompts: write one a line")
    if lines[0][0].startswith("{"):
        return for_each(lines, lambda line: (_parse_json(*line), line[1]))
    return [({"prompt": line}, where) for line, where in lines]


def _parse_json(line: str, where: str) -> dict[str, Any]:
    try:
        asked = json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = "since the file begins with {, each line must be a JSON object"
        raise BadInput(f"{where}: not JSON: {error} ({hint})") from None
    if not isinstance(asked, dict):
        raise BadInput(f'{where}: must be an object such as {{"prompt": "Hello"}}')
    return asked


def _read(path: str) -> str:
    """The text of a file, or of standard input if path is -."""
    name = "standard input" if path == "-" else path
    if path == "-" and sys.stdin is None:
        raise BadInput("there is no standard input")
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise BadInput(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{name} is not UTF-8 text: {error}") from None
