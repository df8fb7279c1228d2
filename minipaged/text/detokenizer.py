"""Token ids to text while they are generated: whole characters only, nothing lost, nothing doubled.

A token's text depends on its neighbours. A character may be spread over several tokens, and sentencepiece
decoders drop the space before the first token they are given. So a token is never decoded alone, but in a
window: a few tokens whose text is out already, for context, then those that are still pending. What is new
at the end of the window's text is the next piece. (The window is how vLLM and TGI stream, too.)
"""

import codecs
from collections.abc import Sequence

from minipaged.text.tokenizer import Tokenizer

HALF = "\ufffd"  # what decoders put for bytes that are not (yet) a character
LONG = 16  # tokens; a window beyond this length holds broken text, and is cut
ENOUGH = 4  # tokens; a character has no more bytes, so their text ends as the whole text does


class StreamDecoder:
    """Give it the tokens of one sequence, one by one; it gives back the text that they add.

    The pieces and flush() together are tokenizer.decode(all tokens), but for one case. A run of byte tokens that
    is not UTF-8 as a whole is U+FFFD for every byte in decode(), which knows only at the run's end. What is out
    can't be taken back, so here a whole character stays one, and only bytes that are part of none become U+FFFD.

    With prompt_ids the pieces are what decode(prompt and output) has beyond decode(prompt): of "Hello" and
    "▁world" comes " world", with its space. A character belongs to the side that writes its last byte: one that
    the prompt leaves half and the output makes whole comes out whole. Bytes of the prompt that stay broken are
    the prompt's, and never come out.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._bytes = tokenizer.byte_values  # not empty: every unfinished character is in _run, none in the window
        self._stand_in = [i for i, byte in self._bytes.items() if 0x20 < byte < 0x7F][:1]  # for a broken byte
        self._ids: list[int] = []  # the window
        self._context = 0  # how many of its tokens, from the left, are for context only
        self._sent = ""  # its text that is out
        self._run: list[int] = []  # byte tokens that begin a character
        self._broken = 0  # how many of them are out as U+FFFD
        for token_id in self._last(prompt_ids):
            self.add(token_id)
        self.flush()

    def add(self, token_id: int) -> str:
        """The text that this token completes: "" while a character is unfinished. O(1) tokens are decoded."""
        if self._tokenizer.is_silent(token_id, self._skip):
            return ""
        if token_id not in self._bytes:
            return self._end_run() + self._extend([token_id])
        self._run.append(token_id)
        return self._read_run()

    def flush(self) -> str:
        """The text that is still held back, at the end of the sequence: broken bytes come out as U+FFFD.

        They count as out then. If tokens follow all the same and make them a character, it comes out whole.
        """
        text = self._decode(self._ids)
        piece = self._beyond(text) + HALF * (len(self._run) - self._broken)
        self._sent, self._broken = text, len(self._run)
        return piece

    def _extend(self, ids: list[int]) -> str:
        """Add tokens that stand together to the window: what is new in its text, up to its last whole character."""
        self._ids += ids
        text = self._decode(self._ids)
        unfinished = not self._bytes and text.endswith(HALF)
        whole = text.removesuffix(HALF) if unfinished else text
        piece = self._beyond(whole)
        self._sent = whole if piece else self._sent
        if not unfinished:
            self._move(self._context)
        elif len(self._ids) > LONG:
            pending = len(text) - len(self._sent)
            self._move(len(self._ids) - ENOUGH)
            self._sent = self._sent[: len(self._sent) - pending]
        return piece

    def _beyond(self, text: str) -> str:
        """The part of the window's text that is not out; a U+FFFD that is out may have become a character."""
        mended = self._sent.endswith(HALF) and not text.startswith(self._sent)
        return text[len(self._sent) - mended :]

    def _move(self, start: int) -> None:
        """Let the window begin at its token number start. All text of the others is taken to be out."""
        self._ids = self._ids[start:]
        self._context, self._sent = len(self._ids), self._decode(self._ids)

    def _read_run(self) -> str:
        """The characters that the run has so far; its first byte is broken where they can't become one."""
        piece = ""
        while self._run:
            data = bytes(self._bytes[i] for i in self._run)
            try:
                character, _ = codecs.utf_8_decode(data, "strict", False)
            except UnicodeDecodeError:
                piece += self._break_byte()
                continue
            if not character:
                break
            piece += self._extend(self._run)
            self._run, self._broken = [], 0
        return piece

    def _end_run(self) -> str:
        return "".join(self._break_byte() for _ in self._run.copy())

    def _break_byte(self) -> str:
        """U+FFFD for the run's first byte, unless it is out. In the window, where it would break the characters
        beside it, another byte stands for it.
        """
        del self._run[0]
        piece = self._extend(self._stand_in)[:-1] if self._stand_in else ""
        if self._broken:
            self._broken -= 1
            return piece
        return piece + HALF

    def _last(self, ids: Sequence[int]) -> list[int]:
        """The last tokens that have a text: ENOUGH of them, if there are so many."""
        found: list[int] = []
        for token_id in reversed(ids):
            if not self._tokenizer.is_silent(token_id, self._skip):
                found.append(token_id)
            if len(found) == ENOUGH:
                break
        return found[::-1]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip)
