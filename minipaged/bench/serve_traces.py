"""What is sent to a server: loads of the bench, as many requests as are wanted, and traces of real services.

A trace has times and lengths, no text. Two forms are read, told apart by their first line:

    Mooncake, JSON lines   {"timestamp": 12, "input_length": 700, "output_length": 20, "hash_ids": [0, 5]}
                           milliseconds; one id for each 512 tokens of the prompt, equal ids are equal tokens
    Azure, CSV             TIMESTAMP,ContextTokens,GeneratedTokens
                           2023-11-16 18:17:03.97,4808,10

Prompts are random tokens of these lengths; where ids are equal, the same ones.
"""

import csv
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path

from minipaged.bench.loads import SEED, Dice, Load

BLOCK = 512  # tokens that an id of hash_ids stands for
AZURE = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


class BadInput(ValueError):
    """What was asked for can't be done; the message says why, of a trace with its line, and what would be right."""


@dataclass(frozen=True)
class Entry:
    """A request of a trace. time: seconds. ids: one for each BLOCK tokens of the prompt, or empty."""

    time: float
    input_length: int
    output_length: int
    ids: list[int]


def read_trace(
    path: Path, vocab_size: int, count: int | None = None, scale: float = 1.0, speedup: float = 1.0
) -> tuple[Load, list[float]]:
    """A trace's first `count` requests, and when each is sent, in seconds after the first one.

    scale: lengths are divided by it, and so are the tokens that an id stands for. speedup: times are.
    """
    entries = list(islice(_entries(path), count))
    if not entries:
        raise BadInput(f"{path}: there is no request in it")
    prompts = [_prompt(entry, f"{path.name} {number}", vocab_size, scale) for number, entry in enumerate(entries)]
    outputs = [_scaled(entry.output_length, scale) for entry in entries]
    began = min(entry.time for entry in entries)
    return Load(path.stem, prompts, outputs, len(prompts)), [(entry.time - began) / speedup for entry in entries]


def _scaled(length: int, scale: float) -> int:
    return max(1, round(length / scale))


def _prompt(entry: Entry, name: str, vocab_size: int, scale: float) -> list[int]:
    length = _scaled(entry.input_length, scale)
    if not entry.ids:
        return Dice(f"{name} {SEED}", vocab_size, 1).tokens(length)
    tokens: list[int] = []
    for place, name_of_block in enumerate(entry.ids, 1):
        until = min(length, round(place * BLOCK / scale))
        tokens += Dice(f"block {name_of_block} {SEED}", vocab_size, 1).tokens(max(0, until - len(tokens)))
    return tokens


def _entries(path: Path) -> Iterator[Entry]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            first = file.readline()
            file.seek(0)
            read = _mooncake if first.lstrip().startswith("{") else _azure
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        entry = read(line, number)
                    except (ValueError, KeyError, TypeError) as error:
                        why = f"there is no {error}" if isinstance(error, KeyError) else str(error)
                        raise BadInput(f"{path}, line {number}: {why}") from None
                    if entry:
                        yield entry
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: that is no text, but a trace is .jsonl (Mooncake) or .csv (Azure)") from None


def _mooncake(line: str, number: int) -> Entry:
    try:
        fields = json.loads(line)
    except ValueError:
        raise ValueError(f"{line.strip()!r:.60} is no JSON") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{line.strip()!r:.60} is no JSON object")
    ids = fields["hash_ids"]
    length, output = _length("input_length", fields["input_length"]), _length("output_length", fields["output_length"])
    if not isinstance(ids, list) or len(ids) != -(-length // BLOCK):
        raise ValueError(f"hash_ids must be a list with an id for each {BLOCK} of the {length} tokens")
    time = fields["timestamp"]
    if not isinstance(time, int | float) or isinstance(time, bool):
        raise ValueError(f"timestamp must be a number of milliseconds, not {time!r:.40}")
    return Entry(time / 1000, length, output, ids)


def _azure(line: str, number: int) -> Entry | None:
    [cells] = csv.reader([line.strip().removeprefix("\ufeff")])
    if number == 1:
        if cells != AZURE:
            raise ValueError(f"{line.strip()!r:.60} is neither JSON (Mooncake) nor {','.join(AZURE)} (Azure)")
        return None
    if len(cells) != len(AZURE):
        raise ValueError(f"{line.strip()!r:.60} must be {','.join(AZURE)}")
    context, generated = (int(cell) if cell.isdecimal() else cell for cell in cells[1:])
    time = datetime.fromisoformat(cells[0]).timestamp()
    return Entry(time, _length(AZURE[1], context), _length(AZURE[2], generated), [])


def _length(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be a number of tokens, not {value!r:.40}")
    return value


def enlarged(load: Load, count: int, vocab_size: int) -> Load:
    """The first `count` requests of a load that is repeated for ever, each time with other tokens.

    In the second copy every token is the next one of the vocabulary, and so on: what was shared is shared, but
    nothing between copies.

    >>> load = enlarged(Load("a", [[7], [8]], [1, 2], 2, follows=[None, 0]), 5, 10)
    >>> load.prompts, load.outputs, load.follows
    ([[7], [8], [8], [9], [9]], [1, 2, 1, 2, 1], [None, 0, None, 2, None])
    """
    size = len(load.prompts)
    numbers = [divmod(number, size) for number in range(count)]
    return replace(
        load,
        prompts=[[(token + copy) % vocab_size for token in load.prompts[own]] for copy, own in numbers],
        outputs=[load.outputs[own] for _, own in numbers],
        follows=[None if (f := load.follows[own]) is None else f + copy * size for copy, own in numbers]
        if load.follows else [],
        late=[load.late[own] for _, own in numbers] if load.late else [],
    )  # fmt: skip


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """When requests arrive that know nothing of each other, `rate` a second: the gaps are exponential."""
    dice, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        now += dice.expovariate(rate)
        times.append(now)
    return times
