"""Byte-level BPE, the tokenizer of GPT-2 and of most models since: text is cut into words, the bytes of a word
are letters of an alphabet of 256, and a list of merges, in order, makes tokens of them.
"""

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from minipaged.text.tokenizer import Tokenizer
from minipaged.text.vocabulary import Vocabulary
from minipaged.text.word_rules import WordRule


def byte_level(vocabulary: Vocabulary, merges: list[str], rule: WordRule) -> Tokenizer:
    """merges: pairs of tokens with a space between, the first to be merged first."""
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    backend = Backend(models.BPE(vocabulary.ids, pairs, ignore_merges=rule.whole))
    backend.normalizer = rule.normalizer()
    backend.pre_tokenizer = rule.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return vocabulary.tokenizer(backend)
