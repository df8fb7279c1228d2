"""The hidden load: who asks what, and when. It is drawn from a seed that students don't have; its kinds they know."""

import random
from dataclasses import dataclass
from functools import cache

from minipaged.quantization.texts import TO_CALIBRATE, TO_MEASURE, read_text


@dataclass(frozen=True)
class Ask:
    """A request. at: when it comes, from 0 (the beginning) to 1. tokens: the most that are answered."""

    at: float
    kind: str
    text: str
    tokens: int


@dataclass(frozen=True)
class Sizes:
    """How large the load is, and the engine that both get.

    requests: in a round. scale: of all texts and answers. num_blocks: of the pool, which is too small for all at once.
    """

    requests: int = 24
    scale: float = 1.0
    num_blocks: int = 160
    max_model_len: int = 1024


@dataclass(frozen=True)
class Kind:
    """share: of all requests. words: of the passage, from the fewest to the most; tokens: of the answer, too."""

    share: float
    ask: str
    words: tuple[int, int]
    tokens: tuple[int, int]
    shared: bool = False  # whether it begins with the passage that all such requests of a round have


KINDS = {
    "story": Kind(0.35, "Go on with this story: ", (20, 60), (32, 96)),
    "question": Kind(0.30, " Answer in one sentence: who speaks here, and of what? ", (8, 24), (16, 48), shared=True),
    "again": Kind(0.20, "Repeat the following text, word for word: ", (30, 60), (48, 96)),
    "long": Kind(0.15, "What is the following text about? ", (150, 250), (4, 12)),
}
SHARED_WORDS = 120


def draw(seed: str, round_number: int, sizes: Sizes) -> list[Ask]:
    """A round's requests, as they come: at chance times, as strangers do. No two rounds have a prompt in common."""
    rng = random.Random(f"contest {seed} {round_number}")
    common = passage(rng, _scaled(SHARED_WORDS, sizes))
    gaps = [0.0, *(rng.expovariate(1) for _ in range(sizes.requests))]  # the last one is the time after the last
    kinds = _kinds(rng, sizes.requests)
    asks, now = [], 0.0
    for gap, name in zip(gaps, kinds, strict=False):
        now += gap
        kind = KINDS[name]
        words, tokens = (_scaled(rng.randint(*span), sizes) for span in (kind.words, kind.tokens))
        text = (common if kind.shared else "") + kind.ask + passage(rng, words)
        asks.append(Ask(now / sum(gaps), name, text, tokens))
    return asks


def passage(rng: random.Random, count: int) -> str:
    """So many words in a row, from anywhere in the book."""
    words = _words()
    begin = rng.randrange(len(words) - count)
    return " ".join(words[begin : begin + count])


def _kinds(rng: random.Random, count: int) -> list[str]:
    """Each by its share, as near as whole numbers allow, so that rounds are alike; in any order."""
    names, shares = list(KINDS), [kind.share for kind in KINDS.values()]
    found = [name for name, share in zip(names, shares, strict=True) for _ in range(int(share * count))]
    found += rng.choices(names, shares, k=count - len(found))
    rng.shuffle(found)
    return found


def _scaled(size: int, sizes: Sizes) -> int:
    return max(1, round(size * sizes.scale))


@cache
def _words() -> list[str]:
    """Of a real book, with no sign in them that a small tokenizer may not have."""
    text = read_text(TO_CALIBRATE) + read_text(TO_MEASURE)
    return text.replace("\u2014", " - ").encode("ascii", "ignore").decode().split()
