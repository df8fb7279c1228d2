"""How well a model foresees a text: the plainest measure of what quantization lost.

Each token is scored by the engine, teacher-forced: whatever the model would have said, it is told what the text says.
Of n tokens with probabilities p

    nats per token    - sum(ln p) / n
    perplexity        exp of that: how many tokens, equally likely, it hesitates between
    bits per byte     - sum(log2 p) / bytes of those tokens' text: models with other tokenizers can be compared

A text longer than the model's context is cut into windows. A window begins with a token that is not scored in it; all
but the text's first are scored exactly once, in the first window that reaches them. With a stride less than a
window, windows overlap, and a token sees at least context - stride others before it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from minipaged.llm import LLM
from minipaged.requests.sampling_params import SamplingParams
from minipaged.text.tokenizer import Tokenizer

Tell = Callable[[int, int], None]  # windows done, windows in all


@dataclass
class Score:
    """nats: the sum of -ln p. num_tokens: that were scored. num_bytes: of their text in UTF-8."""

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def per_token(self) -> float:
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.per_token)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes


def windows(num_tokens: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, first scored, end) of each window: all tokens but the first are scored once.

    >>> windows(8, 4, 3)
    [(0, 1, 4), (3, 4, 7), (6, 7, 8)]
    >>> windows(8, 4, 2)
    [(0, 1, 4), (2, 4, 6), (4, 6, 8)]
    """
    found, scored = [], 1
    for begin in range(0, num_tokens, stride):
        end = min(begin + context, num_tokens)
        if scored < end:
            found.append((begin, scored, end))
        scored = max(scored, end)
    return found


def encode(tokenizer: Tokenizer, text: str, limit: int | None = None) -> tuple[list[int], int]:
    """The text's tokens, the first `limit` of them; and the bytes of all but the first. ValueError if there is but one.

    A token that the tokenizer puts before all texts is the first, and then all of the text is scored.
    """
    encoding = tokenizer.backend.encode(text)
    ids, spans = encoding.ids[:limit], encoding.offsets[:limit]
    if len(ids) < 2:
        raise ValueError("the text must have at least two tokens: the first one can't be foreseen")
    return ids, len(text[spans[0][1] : spans[-1][1]].encode())


def score(
    llm: LLM, text: str, context: int, stride: int, limit: int | None = None, tell: Tell = lambda *_: None
) -> Score:
    """The model on a text. context: tokens of a window. limit: how many tokens of the text are read.

    ValueError if a window is longer than the model sees, or the engine has nothing to say of a token.
    """
    ids, num_bytes = encode(llm.tokenizer, text, limit)
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    cuts, nats = windows(len(ids), context, stride), 0.0
    for number, (begin, first, end) in enumerate(cuts):
        tell(number, len(cuts))
        [output] = llm.generate([{"prompt_token_ids": ids[begin:end]}], params)
        if output.error:
            raise ValueError(output.error)
        told = output.prompt_logprobs or []
        for position in range(first, end):
            known = told[position - begin]
            assert known is not None
            nats -= known[ids[position]].logprob
    tell(len(cuts), len(cuts))
    return Score(nats, len(ids) - 1, num_bytes)
