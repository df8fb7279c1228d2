"""The text of a sequence while it grows, and where it ends."""

from minipaged.requests.sampling_params import SamplingParams
from minipaged.text.detokenizer import StreamDecoder
from minipaged.text.tokenizer import Tokenizer

MANY = 64  # pieces are joined at the latest when there are so many


class SequenceText:
    """The text of one sequence: streamed token by token, and cut where a stop string is complete.

    A token costs what it adds, however long the text is: pieces are joined when somebody reads them, and stop
    strings are looked for at the end only.

    It may be read in one thread while it grows in another: pieces are only ever appended to a list, and where they
    are joined or cut there is a new list.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int], params: SamplingParams):
        self._decoder = StreamDecoder(tokenizer, prompt_token_ids, params.skip_special_tokens)
        self._stops = params.stop_strings
        self._keep_stop = params.include_stop_str_in_output
        self._reach = max(map(len, self._stops), default=1) - 1  # a stop string may begin so far back
        self._pieces: list[str] = []
        self._length = 0  # of all pieces together
        self._end = ""  # the last characters, as far as _reach
        self.num_tokens = 0

    def add(self, token_id: int, silent: bool = False, check_stops: bool = True) -> str | None:
        """Add a token, without its text if silent. Returns the stop string that it completed: the text ends there.

        Where one token completes several, the one that ends first counts, and of those the longest: so the cut
        does not depend on where the borders between tokens happen to lie.
        """
        self.num_tokens += 1
        piece = "" if silent else self._decoder.add(token_id)
        known, near = len(self._end), self._end + piece
        self._append(piece)
        found = []
        for stop in self._stops if check_stops else ():
            start = near.find(stop, max(0, known - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        if not found:
            return None
        end, start, stop = min(found)
        text = self.part(0, self._length - len(near) + (end if self._keep_stop else start))
        self._pieces, self._length = [text], len(text)
        return stop

    def finish(self) -> None:
        """Nothing comes any more: give out what was held back for a character that might have become whole."""
        self._append(self._decoder.flush())

    def shown(self, finished: bool) -> str:
        """The text so far, without an ending that may turn out to be the beginning of a stop string."""
        return self.part(0, self.shown_length(finished))

    def shown_length(self, finished: bool) -> int:
        for at in range(0 if not finished else len(self._end), len(self._end)):
            rest = self._end[at:]
            if any(len(stop) > len(rest) and stop.startswith(rest) for stop in self._stops):
                return self._length - len(rest)
        return self._length

    def part(self, begin: int, end: int) -> str:
        """Some of its characters; what was shown once stays. What lies before them costs nothing."""
        pieces = self._pieces.copy()
        at, found = sum(map(len, pieces)), []
        while pieces and at > begin:
            found.append(pieces.pop())
            at -= len(found[-1])
        return "".join(reversed(found))[max(0, begin - at) : end - at]

    def _append(self, piece: str) -> None:
        if piece:
            if len(self._pieces) == MANY:
                self._pieces = ["".join(self._pieces)]
            self._pieces.append(piece)
            self._length += len(piece)
            self._end = (self._end + piece)[-self._reach :] if self._reach else ""
