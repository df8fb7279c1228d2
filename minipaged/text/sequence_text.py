"""The text of a sequence while it grows, and where it ends."""

from minipaged.requests.sampling_params import SamplingParams
from minipaged.text.detokenizer import StreamDecoder
from minipaged.text.tokenizer import Tokenizer


class SequenceText:
    """The text of one sequence: streamed token by token, and cut where a stop string is complete."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int], params: SamplingParams):
        self._decoder = StreamDecoder(tokenizer, prompt_token_ids, params.skip_special_tokens)
        self._stops = params.stop_strings
        self._keep_stop = params.include_stop_str_in_output
        self._text = ""
        self.num_tokens = 0

    def add(self, token_id: int, silent: bool = False, check_stops: bool = True) -> str | None:
        """Add a token, without its text if silent. Returns the stop string that it completed: the text ends there.

        Where one token completes several, the one that ends first counts, and of those the longest: so the cut
        does not depend on where the borders between tokens happen to lie.
        """
        self.num_tokens += 1
        old = len(self._text)
        self._text += "" if silent else self._decoder.add(token_id)
        found = []
        for stop in self._stops if check_stops else ():
            start = self._text.find(stop, max(0, old - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        if not found:
            return None
        end, start, stop = min(found)
        self._text = self._text[: end if self._keep_stop else start]
        return stop

    def finish(self) -> None:
        """Nothing comes any more: give out what was held back for a character that might have become whole."""
        self._text += self._decoder.flush()

    def shown(self, finished: bool) -> str:
        """The text so far, without an ending that may turn out to be the beginning of a stop string."""
        return self._text[: self.shown_length(finished)]

    def shown_length(self, finished: bool) -> int:
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(0 if finished else min(longest, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-length:]) for stop in self._stops):
                return len(self._text) - length
        return len(self._text)

    def start(self, length: int) -> str:
        """Its first characters; what was shown once stays."""
        return self._text[:length]
