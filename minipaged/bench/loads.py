"""What the contenders are asked, and what a run of it gives.

`mixed` is the load that batching by the step was invented for (Orca; paper, section 2): requests of very
different lengths, where a padded batch waits for its longest. In `batchN` all requests are alike, which is
the best that can happen to a padded batch.

The others are asked for by name. `few-shot` and `chat` repeat themselves, as what people send does: many short
questions behind one long prefix, and conversations, where each turn says again all that was said before. `stall`
has a long prompt arrive while others are being answered. `beams` is beam search: every step may fork sequences, and
drop others.

`quoting`, `quoting8` and `talk1` are real text, see texts.py: what can be guessed of an answer depends on what it says.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from minipaged.bench.texts import QUESTIONS as ASKED
from minipaged.bench.texts import QUOTES, Text

Encode = Callable[[str], list[int]]

SEED = 0
MIXED, SHORTEST, LONGEST = 32, 8, 256  # requests; tokens in, and out
FIXED = {"batch1": 1, "batch8": 8, "batch32": 32, "batch64": 64}  # requests
FIXED_LENGTH = 64  # tokens in, and out
QUESTIONS, PREFIX, QUESTION, ANSWER = 64, 341, (8, 40), (8, 24)  # requests; tokens: shared, each one's own, out
TALKS, TURNS, SYSTEM, MESSAGE, REPLY = 8, 6, 200, (20, 60), (32, 96)  # conversations, turns; tokens, as above
STEADY, STEADY_IN, STEADY_OUT = 8, 32, 96  # requests; tokens
SEARCHES, BEAMS = 8, 4  # requests; beams of each
LATE_IN, LATE_OUT, LATE_AFTER = 2000, 16, 16  # tokens of the late one; tokens that the first one has by then
QUICK = 8  # a quick load's lengths are divided by this


@dataclass(frozen=True)
class Load:
    """Requests, in this order. They all arrive at the same moment, but for what `follows` and `late` say.

    prompts: token ids. outputs: how many tokens each request wants; end-of-text does not end it.
    batch_size: how many requests at a time a static batch takes.
    follows: for each request, the number of the one whose conversation it continues, or None; or empty: none does.
        It is sent when that one is complete, and its prompt is that one's prompt and output, and then its own.
    late: for each request, how many output tokens the first one must have before it is sent; or empty: none.
    one_by_one: each request is sent when the one before it is complete.
    beam_width: above 1, each request is a beam search. It gives so many outputs, best first; in a Run they stand one
        behind the other. Scores are log-probabilities over tokens, which are as many in all.
    """

    name: str
    prompts: list[list[int]]
    outputs: list[int]
    batch_size: int
    follows: list[int | None] = field(default_factory=list)
    late: list[int] = field(default_factory=list)
    beam_width: int = 1
    one_by_one: bool = False

    @property
    def at_once(self) -> bool:
        """Whether none has to wait for what another one got."""
        return not self.follows and not self.late

    @property
    def num_output_tokens(self) -> int:
        return sum(self.outputs) * self.beam_width

    @property
    def num_sequences(self) -> int:
        """That may run at a time."""
        return 1 if self.one_by_one else len(self.ends) * self.beam_width

    @property
    def longest(self) -> int:
        """Positions that the longest request takes, prompt and output together."""
        return max(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each request, prompt and output together, and all that it continues.

        >>> Load("chat", [[1, 2], [3], [4]], [10, 10, 10], 3, follows=[None, None, 0]).lengths
        [12, 11, 23]
        """
        lengths: list[int] = []
        for prompt, wanted, before in zip(self.prompts, self.outputs, self.sources, strict=True):
            lengths.append((0 if before is None else lengths[before]) + len(prompt) + wanted)
        return lengths

    @property
    def sources(self) -> list[int | None]:
        """For each request, the one that it continues, or None."""
        return self.follows or [None] * len(self.prompts)

    @property
    def ends(self) -> list[int]:
        """The requests that no other one continues: so many can run at a time."""
        return sorted(set(range(len(self.prompts))) - set(self.follows))

    def blocks(self, block_size: int) -> int:
        """Blocks for all requests at once, at their full lengths; a conversation's are those of its last turn.

        Beams share some of theirs: these are enough in any case.
        """
        lengths = self.lengths
        return sum(-(-lengths[number] // block_size) for number in self.ends) * self.beam_width

    def warmup(self) -> "Load":
        """As many requests, cut short: what is made once (threads, buffers, kernels) is made in this."""
        prompts = [prompt[:16] for prompt in self.prompts]
        outputs, late = [min(n, 4) for n in self.outputs], [min(n, 2) for n in self.late]
        return replace(self, prompts=prompts, outputs=outputs, late=late)


@dataclass
class Run:
    """What a contender did with a load.

    tokens: each request's output, or outputs. seconds: from the first request to the last token.
    first_token: for each request, seconds from its arrival to its first token; empty if nobody can tell.
    kv_bytes: memory for keys and values, see the contender.
    peak_bytes: the most that its process held at once during the run: weights, keys and values, code, all.
    times: where the seconds went, if the contender can tell.
    guesses: how many tokens were guessed, and how many of these were right, if the contender can tell.
    found: the share of all prompt tokens that a prefix cache had, if the contender can tell.
    longest_gap: the most seconds between two tokens of one output that followed each other; None if nobody can tell.
    """

    tokens: list[list[int]]
    seconds: float
    first_token: list[float]
    kv_bytes: int
    peak_bytes: int = 0
    times: dict[str, float] | None = None
    found: float | None = None
    longest_gap: float | None = None
    guesses: tuple[int, int] | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of useful output: what a padded batch computes beyond a request's own length doesn't count."""
        return sum(map(len, self.tokens)) / self.seconds


class Dice:
    """Random tokens and lengths, the same at each call: lengths are divided by `divisor`."""

    def __init__(self, seed: str, vocab_size: int, divisor: int):
        self._random, self._vocab_size, self.divisor = random.Random(seed), vocab_size, divisor

    def size(self, length: int) -> int:
        return max(1, length // self.divisor)

    def between(self, span: tuple[int, int]) -> int:
        return self._random.randint(*map(self.size, span))

    def tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._vocab_size) for _ in range(count)]


def of_bytes(text: str) -> list[int]:
    """Stands for a tokenizer: a text's bytes are its tokens."""
    return list(text.encode())


def make_load(name: str, vocab_size: int, quick: bool = False, encode: Encode = of_bytes) -> Load:
    """A load of NAMES, the same at each call: of random tokens; those of WRITTEN are texts.

    encode: from what a user says to the token ids that a model is given.

    >>> load = make_load("batch8", 1000)
    >>> len(load.prompts), len(load.prompts[0]), load.outputs[0], load.blocks(16)
    (8, 64, 64, 64)
    """
    divisor = QUICK if quick else 1
    if name in WRITTEN:
        return _written(name, divisor, encode)
    return MAKERS[name](name, Dice(f"{name} {SEED}", vocab_size, divisor))


def _mixed(name: str, dice: Dice) -> Load:
    span = SHORTEST * dice.divisor, max(SHORTEST * dice.divisor, LONGEST)  # the shortest are never cut
    return _plain(name, dice, [(dice.between(span), dice.between(span)) for _ in range(MIXED)])


def _batch(name: str, dice: Dice) -> Load:
    return _plain(name, dice, [(dice.size(FIXED_LENGTH), dice.size(FIXED_LENGTH))] * FIXED[name])


def _plain(name: str, dice: Dice, lengths: list[tuple[int, int]]) -> Load:
    return Load(name, [dice.tokens(size) for size, _ in lengths], [size for _, size in lengths], len(lengths))


def _few_shot(name: str, dice: Dice) -> Load:
    prefix = dice.tokens(dice.size(PREFIX))
    prompts = [prefix + dice.tokens(dice.between(QUESTION)) for _ in range(QUESTIONS)]
    return Load(name, prompts, [dice.between(ANSWER) for _ in prompts], QUESTIONS)


def _chat(name: str, dice: Dice) -> Load:
    """First the first turns of all conversations, then the second turns, and so on."""
    system = dice.tokens(dice.size(SYSTEM))
    messages = [dice.tokens(dice.between(MESSAGE)) for _ in range(TURNS * TALKS)]
    prompts = [system + message for message in messages[:TALKS]] + messages[TALKS:]
    follows = [None] * TALKS + list(range(len(prompts) - TALKS))
    return Load(name, prompts, [dice.between(REPLY) for _ in prompts], TALKS, follows)


def _stall(name: str, dice: Dice) -> Load:
    prompts = [dice.tokens(dice.size(STEADY_IN)) for _ in range(STEADY)] + [dice.tokens(dice.size(LATE_IN))]
    outputs = [dice.size(STEADY_OUT)] * STEADY + [dice.size(LATE_OUT)]
    return Load(name, prompts, outputs, len(prompts), late=[0] * STEADY + [dice.size(LATE_AFTER)])


def _beams(name: str, dice: Dice) -> Load:
    lengths = [(dice.size(FIXED_LENGTH), dice.size(FIXED_LENGTH))] * SEARCHES
    return replace(_plain(name, dice, lengths), beam_width=BEAMS)


def _written(name: str, divisor: int, encode: Encode) -> Load:
    """Quick ones are about the beginning of their texts, and their answers are cut."""
    texts = WRITTEN[name]
    prompts = [encode(text.ask + text.about[: len(text.about) // divisor]) for text in texts]
    outputs = [max(1, text.answer // divisor) for text in texts]
    one_by_one = name not in AT_ONCE
    return Load(name, prompts, outputs, 1 if one_by_one else len(texts), one_by_one=one_by_one)


MAKERS: dict[str, Callable[[str, Dice], Load]] = {
    "mixed": _mixed,
    **dict.fromkeys(FIXED, _batch),
    "few-shot": _few_shot,
    "chat": _chat,
    "stall": _stall,
    "beams": _beams,
}
WRITTEN: dict[str, list[Text]] = {"quoting": QUOTES, "quoting8": QUOTES, "talk1": ASKED}
QUOTING, AT_ONCE = ("quoting", "quoting8"), ("quoting8",)
NAMES = (*MAKERS, *WRITTEN)
DEFAULT_NAMES = ("mixed", *FIXED)


def check(load: Load, run: Run) -> None:
    """RuntimeError if a request got more or less than it wanted: then speeds can't be compared."""
    got = [len(tokens) for tokens in run.tokens]
    wrong = sum(a != b for a, b in zip_longest(got, [wanted * load.beam_width for wanted in load.outputs]))
    if wrong:
        raise RuntimeError(f"load {load.name}: wrong number of tokens for {wrong} of {len(load.outputs)} requests")


def agreement(one: Run, other: Run) -> int:
    """How many requests got the same tokens from both: of all their beams, in the same order."""
    return sum(a == b for a, b in zip(one.tokens, other.tokens, strict=True))
