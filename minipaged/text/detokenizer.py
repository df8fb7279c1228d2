"""Token ids to text while they are generated: whole characters only, nothing lost, nothing doubled.

A token's text depends on its neighbours. A character may be spread over several tokens, and sentencepiece
decoders drop the space before the first token they are given. So a token is never decoded alone, but in a
window: a few tokens whose text is out already, for context, then those that are still pending. What is new
at the end of the window's text is the next piece. (The window is how vLLM and TGI stream, too.)
"""

from collections.abc import Sequence

from minipaged.text.tokenizer import Tokenizer

HALF = "\ufffd"  # what decoders put for bytes that are not (yet) a character
LONG = 16  # tokens; a window beyond this length holds broken text, and is cut


class StreamDecoder:
    """Give it the tokens of one sequence, one by one; it gives back the text that they add.

    The pieces and flush() together are tokenizer.decode(all tokens). With prompt_ids they are the text
    that continues the prompt: of "Hello" and "▁world" then comes " world", with its space.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        tail = [i for i in prompt_ids[-LONG:] if not tokenizer.is_silent(i, skip_special_tokens)]
        self._set_window(tail[-4:], context=len(tail[-4:]))

    def add(self, token_id: int) -> str:
        """The text that this token completes: "" while a character is unfinished. O(1) tokens are decoded."""
        if self._tokenizer.is_silent(token_id, self._skip):
            return ""
        self._ids.append(token_id)
        if token_id in self._tokenizer.byte_ids:
            return ""  # a run of byte tokens is text or garbage as a whole: wait for its end
        text = self._decode(self._ids)
        piece = text.removesuffix(HALF)[len(self._sent) :]  # only the last character can be unfinished
        self._sent += piece
        if not text.endswith(HALF):
            self._set_window(self._ids[self._context :], context=len(self._ids) - self._context)
        elif len(self._ids) > LONG and self._decode(self._ids[:-1]) + self._decode(self._ids[-1:]) == text:
            self._set_window(self._ids[-2:], context=1)  # no character is spread over the last border
        return piece

    def flush(self) -> str:
        """The text that is still held back, at the end of the sequence: broken bytes come out as U+FFFD."""
        piece = self._decode(self._ids)[len(self._sent) :]
        self._sent += piece
        return piece

    def _set_window(self, ids: list[int], context: int) -> None:
        self._ids = ids  # the window
        self._context = context  # how many of its tokens, from the left, have all of their text out
        self._sent = self._decode(ids).removesuffix(HALF)  # its text that is out

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip)
