"""BPE as SentencePiece has it: the tokenizer of Llama 2, Mistral and their kin.

Text is one long word, with ▁ for its spaces and one more of them in front. There are no merges but scores: of all
neighbours that together are a token, those with the highest score are joined first. What is left and is no token
becomes its UTF-8 bytes, which are the tokens <0x00> to <0xFF>.
"""

import re
from collections.abc import Iterator

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from minipaged.text.tokenizer import Tokenizer, TokenizerError
from minipaged.text.vocabulary import NORMAL, UNKNOWN, UNUSED, Vocabulary

SPACE = "▁"  # U+2581
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
Pair = tuple[str, str]


def sentencepiece(
    vocabulary: Vocabulary, merges: list[Pair], space_prefix: bool = True, prefix_once: bool = False
) -> Tokenizer:
    """merges: pairs of tokens, the first to be merged first; see merges_by_score.

    space_prefix: a space is put before the text and behind every special token in it; prefix_once: only before
    the text, and only if it doesn't begin with one (transformers calls the first way legacy).
    """
    fallback = any(BYTE_TOKEN.fullmatch(token) for token in vocabulary.tokens)
    unknown = next(iter(vocabulary.of_kind(UNKNOWN)), None)
    if unknown is None and not all(f"<0x{byte:02X}>" in vocabulary.ids for byte in range(256)):
        raise TokenizerError("there is neither an unknown token nor one for each byte: characters would be lost")
    backend = Backend(models.BPE(vocabulary.ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback))
    if prefix_once:
        scheme = "first" if space_prefix else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    else:
        prepend = [normalizers.Prepend(SPACE)] if space_prefix else []
        backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    to_text = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(to_text)
    return vocabulary.tokenizer(backend)


def merges_by_score(vocabulary: Vocabulary, scores: list[float]) -> list[Pair]:
    """Every way to put a token together from two, the highest score first.

    One token's own ways have one score, and the leftmost in the text should win. That can't be said in a list;
    but as such tokens grow from the left, those with the longer left part come first.

    >>> vocabulary = Vocabulary(["a", "b", "ab", "bb", "abb"], [1] * 5)
    >>> merges_by_score(vocabulary, [0, 0, -1, -3, -2])
    [('a', 'b'), ('ab', 'b'), ('a', 'bb'), ('b', 'b')]
    """
    if len(scores) != len(vocabulary.tokens):
        raise TokenizerError(f"there are {len(vocabulary.tokens)} tokens, but {len(scores)} scores")
    # Unused tokens are as good as normal ones to llama.cpp and transformers, though not to SentencePiece.
    pieces = {token for token in vocabulary.of_kind(NORMAL, UNUSED) if not BYTE_TOKEN.fullmatch(token)}
    order = sorted(pieces, key=lambda token: (-scores[vocabulary.ids[token]], vocabulary.ids[token]))
    return [pair for token in order for pair in _splits(token) if pieces.issuperset(pair)]


def _splits(token: str) -> Iterator[Pair]:
    return ((token[:at], token[at:]) for at in range(len(token) - 1, 0, -1))
