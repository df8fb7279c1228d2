"""What the contenders are asked, and what a run of it gives.

`mixed` is the load that batching by the step was invented for (Orca; paper, section 2): requests of very
different lengths, where a padded batch waits for its longest. In the others all requests are alike, which is
the best that can happen to a padded batch.
"""

import random
from dataclasses import dataclass, replace
from itertools import zip_longest

SEED = 0
MIXED, SHORTEST, LONGEST = 32, 8, 256  # requests; tokens in, and out
FIXED = {"batch1": 1, "batch8": 8, "batch32": 32, "batch64": 64}  # requests
FIXED_LENGTH = 64  # tokens in, and out
NAMES = ("mixed", *FIXED)
QUICK = 8  # a quick load's lengths are divided by this


@dataclass(frozen=True)
class Load:
    """Requests that all arrive at the same moment, in this order.

    prompts: token ids. outputs: how many tokens each request wants; end-of-text does not end it.
    batch_size: how many requests at a time a static batch takes.
    """

    name: str
    prompts: list[list[int]]
    outputs: list[int]
    batch_size: int

    @property
    def num_output_tokens(self) -> int:
        return sum(self.outputs)

    @property
    def longest(self) -> int:
        """Positions that the longest request takes, prompt and output together."""
        return max(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each request, prompt and output together."""
        return [len(p) + n for p, n in zip(self.prompts, self.outputs, strict=True)]

    def blocks(self, block_size: int) -> int:
        """Blocks for all requests at once, at their full lengths."""
        return sum(-(-length // block_size) for length in self.lengths)

    def warmup(self) -> "Load":
        """As many requests, cut short: what is made once (threads, buffers, kernels) is made in this."""
        prompts = [prompt[:16] for prompt in self.prompts]
        return replace(self, prompts=prompts, outputs=[min(n, 4) for n in self.outputs])


@dataclass
class Run:
    """What a contender did with a load.

    tokens: each request's output. seconds: from the first request to the last token.
    first_token: for each request, seconds from its arrival to its first token; empty if nobody can tell.
    kv_bytes: memory for keys and values, see the contender.
    peak_bytes: the most that its process held at once during the run: weights, keys and values, code, all.
    times: where the seconds went, if the contender can tell.
    """

    tokens: list[list[int]]
    seconds: float
    first_token: list[float]
    kv_bytes: int
    peak_bytes: int = 0
    times: dict[str, float] | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of useful output: what a padded batch computes beyond a request's own length doesn't count."""
        return sum(map(len, self.tokens)) / self.seconds


def make_load(name: str, vocab_size: int, quick: bool = False) -> Load:
    """A load of NAMES, of random tokens; the same at each call.

    >>> load = make_load("batch8", 1000)
    >>> len(load.prompts), len(load.prompts[0]), load.outputs[0], load.blocks(16)
    (8, 64, 64, 64)
    """
    rng = random.Random(f"{name} {SEED}")
    divisor = QUICK if quick else 1
    if name == "mixed":
        span = SHORTEST, max(SHORTEST, LONGEST // divisor)
        lengths = [(rng.randint(*span), rng.randint(*span)) for _ in range(MIXED)]
    else:
        lengths = [(FIXED_LENGTH // divisor, FIXED_LENGTH // divisor)] * FIXED[name]
    prompts = [[rng.randrange(vocab_size) for _ in range(size)] for size, _ in lengths]
    return Load(name, prompts, [size for _, size in lengths], batch_size=len(lengths))


def check(load: Load, run: Run) -> None:
    """RuntimeError if a request got more or less than it wanted: then speeds can't be compared."""
    got = [len(tokens) for tokens in run.tokens]
    wrong = sum(a != b for a, b in zip_longest(got, load.outputs))
    if wrong:
        raise RuntimeError(f"load {load.name}: wrong number of tokens for {wrong} of {len(load.outputs)} requests")


def agreement(one: Run, other: Run) -> int:
    """How many requests got the same tokens from both."""
    return sum(a == b for a, b in zip(one.tokens, other.tokens, strict=True))
