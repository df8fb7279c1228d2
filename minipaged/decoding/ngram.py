"""N-grams: guess that what came after the last few tokens before will come after them again (prompt lookup).

A summary, an edit of a text or of code, an answer that quotes: all say again what stands in the prompt. So the last
n tokens are looked up in everything before them, and what followed there is the guess. It costs no model.

    ... the | cat sat on | the mat . And then the | cat sat on | ?          guess: the mat .

Of the lengths from prompt_lookup_max down to prompt_lookup_min the longest that is found counts, and of several
places the earliest, as in vLLM. The idea is Saxena's prompt lookup decoding (2023).
"""

from collections.abc import Iterator
from itertools import islice
from weakref import WeakKeyDictionary

from minipaged.requests.sequence import Sequence

MOST = 64  # places that are looked at for different guesses


class NgramProposer:
    """Tokens are kept as the characters of a text, so that Python's own search, which is quick, looks them up.

    >>> ngram = NgramProposer(prompt_lookup_min=1, prompt_lookup_max=3)
    >>> ngram.propose(Sequence([5, 6, 7, 8, 5, 6]), 3)
    [[7, 8, 5]]
    >>> ngram.propose(Sequence([1, 1, 1, 1]), 4)
    [[1]]
    """

    def __init__(self, prompt_lookup_min: int, prompt_lookup_max: int):
        self.prompt_lookup_min, self.prompt_lookup_max = prompt_lookup_min, prompt_lookup_max
        self._texts: WeakKeyDictionary[Sequence, str] = WeakKeyDictionary()

    def propose(self, seq: Sequence, count: int, num_branches: int = 1) -> list[list[int]]:
        """At most num_branches guesses of at most `count` tokens, the likeliest first; all begin differently."""
        text = self._text(seq)
        found: dict[str, list[int]] = {}  # by their first letter
        places = _places(text, self.prompt_lookup_min, self.prompt_lookup_max)
        for end in islice(places, 1 if num_branches == 1 else MOST):
            found.setdefault(text[end], [ord(letter) for letter in text[end : end + count]])
            if len(found) == num_branches:
                break
        return list(found.values())

    def _text(self, seq: Sequence) -> str:
        """All tokens so far. Only the new ones are turned into letters, unless some were taken back."""
        known = self._texts.get(seq, "")
        if len(known) > len(seq):
            known = ""
        text = known + "".join(map(chr, seq.tokens(len(known), len(seq) - len(known))))
        self._texts[seq] = text
        return text

    def forget(self) -> None:
        """Sequences may go on differently from what was seen of them."""
        self._texts.clear()


def _places(text: str, shortest: int, longest: int) -> Iterator[int]:
    """Where to go on: behind earlier places of the last letters of the text, the best first."""
    for length in range(min(longest, len(text) - 1), shortest - 1, -1):
        suffix = text[-length:]
        at = text.find(suffix)
        while at + length < len(text):
            yield at + length
            at = text.find(suffix, at + 1)
