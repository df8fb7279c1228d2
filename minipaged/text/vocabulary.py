"""What every tokenizer that we build ourselves is made of, and what all have in common: see byte_level.py and
sentencepiece.py for the two kinds."""

from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from minipaged.text.tokenizer import Tokenizer, TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds, as SentencePiece and GGUF number them


@dataclass
class Vocabulary:
    """Tokens and their kinds, by id. Special ids are None where there is no such token.

    Tokens of the kinds control, unknown and user-defined are found in text before anything else, and taken
    whole; decode() may skip the first two. Raises TokenizerError for what can't be.
    """

    tokens: list[str]
    kinds: list[int]
    bos_id: int | None = None
    eos_id: int | None = None
    add_bos: bool = False  # text begins with the beginning-of-text token
    add_eos: bool = False
    chat_template: str | None = None

    def __post_init__(self) -> None:
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.kinds) != len(self.tokens):
            raise TokenizerError(f"there are {len(self.tokens)} tokens, but {len(self.kinds)} token types")
        if len(self.ids) != len(self.tokens):
            twice = next(token for i, token in enumerate(self.tokens) if self.ids[token] != i)
            raise TokenizerError(f"the token {twice!r:.60} stands twice in the vocabulary")
        for name, i, added in (("bos", self.bos_id, self.add_bos), ("eos", self.eos_id, self.add_eos)):
            if i is not None and not 0 <= i < len(self.tokens):
                raise TokenizerError(f"the {name} token {i} is not one of the {len(self.tokens)} tokens")
            if i is None and added:
                raise TokenizerError(f"text should get a {name} token, but none is named")

    def of_kind(self, *kinds: int) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.kinds, strict=True) if kind in kinds]

    def tokenizer(self, backend: Backend) -> Tokenizer:
        """The finished tokenizer. backend: with model, normalizer, pre-tokenizer and decoder, and no more."""
        special = {self.tokens[i] for i in (self.bos_id, self.eos_id) if i is not None}
        special |= {*self.of_kind(UNKNOWN, CONTROL)}
        backend.add_tokens(_whole(self.of_kind(USER_DEFINED), special))
        backend.add_special_tokens(_whole(sorted(special, key=self.ids.__getitem__), special))
        named = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        names = {name: self.tokens[i] for name, i in named.items() if i is not None}
        bos, eos = ([names[name]] if add else [] for name, add in zip(named, (self.add_bos, self.add_eos), strict=True))
        backend.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos], special_tokens=[(token, self.ids[token]) for token in {*bos, *eos}]
        )
        return Tokenizer(backend, self.chat_template, names)


def _whole(tokens: Iterable[str], special: set[str]) -> list[AddedToken]:
    return [AddedToken(token, normalized=False, special=token in special) for token in tokens]
