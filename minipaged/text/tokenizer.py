"""Text to token ids and back.

Works on a ``tokenizers.Tokenizer``, be it from a ``tokenizer.json`` or built by us: see vocabulary.py.
"""

from collections.abc import Sequence

import tokenizers

from minipaged.text.chat_template import ChatTemplate, Message, check_text

LONG = 10_000  # characters: beyond it other threads are let run meanwhile, which only encode_batch does


class TokenizerError(ValueError):
    """A tokenizer that can't be built from what a checkpoint has; the message says what is wrong."""


class Tokenizer:
    """A tokenizer and the model's chat template.

    backend: the tokenizers.Tokenizer that does the work.
    chat_template: jinja source or None.
    special_tokens: names that a template may use, such as {"bos_token": "<s>"}.

    eos_token_ids, the tokens that end an answer, come from the model's config: load() sets them.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: str | None = None,
        special_tokens: dict[str, str] | None = None,
    ):
        backend.no_truncation()  # some tokenizer.json files cut at 512 tokens, or pad to them
        backend.no_padding()
        self.backend = backend
        self.chat_template = chat_template
        self.special_tokens = special_tokens or {}
        self._template = None if chat_template is None else ChatTemplate(chat_template, self.special_tokens)
        self.eos_token_ids: tuple[int, ...] = ()
        self.special_ids = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        # Sentencepiece's byte fallback: token id -> byte, of <0x00> to <0xFF>, which the decoder joins to characters.
        fallback = backend.decoder is not None and b"ByteFallback" in backend.decoder.__getstate__()
        ids = {backend.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256 if fallback else 0)}
        self.byte_values = {token_id: byte for token_id, byte in ids.items() if token_id is not None}

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's V may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text. add_special_tokens adds what the tokenizer itself asks for: often a
        beginning-of-text token, often nothing. Rendered chat messages are encoded without: their
        template has written every special token already. Raises ValueError for a lone surrogate.
        """
        check_text(text, "the text")
        if len(text) > LONG:
            [encoding] = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        else:
            encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        return encoding.ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def is_silent(self, token_id: int, skip_special_tokens: bool = True) -> bool:
        """Whether decode() passes over this token: unknown ids, and special ones if they are skipped."""
        skipped = skip_special_tokens and token_id in self.special_ids
        return skipped or self.backend.id_to_token(token_id) is None

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, as transformers renders it.

        messages: [{"role": "user", "content": "Hello"}, ...], oldest first.
        add_generation_prompt: end with the opening of the assistant's next answer.
        Raises ValueError if there is no template, if messages are malformed, or if the template fails.
        """
        if self._template is None:
            raise ValueError("this model has no chat template: give it plain text instead of messages")
        return self._template.render(messages, add_generation_prompt)
