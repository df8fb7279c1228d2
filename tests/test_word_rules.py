"""The rules that cut text into words, by their names in GGUF files: each equal to an oracle, word for word.

Oracles: the pre-tokenizers that transformers builds for the models, those that stand in the models' own
tokenizer.json files (written here with the tokenizers package's own steps), and else llama.cpp's expressions, run
by the regex package.
"""

import random
import unicodedata

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, pre_tokenizers
from transformers.models.cohere.tokenization_cohere import CohereTokenizer
from transformers.models.gpt2.tokenization_gpt2 import GPT2Tokenizer
from transformers.models.gpt_neox.tokenization_gpt_neox import GPTNeoXTokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from minipaged.text.gguf_tokenizer import build_tokenizer
from minipaged.text.tokenizer import TokenizerError
from minipaged.text.word_rules import WORD_RULES

PIECES = [
    *[" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " \n", "a", "ab", "The", "THE", "tHe", " the", "IT'S", "we'LL"],
    *["don't", "'s", "'RE", "'", "3", "12", "345", "6789", " 12", " 345", "1,234.5", "½", "²", "٣٤", "Ⅷ", "!", "..."],
    *["$", "+", "=", "<tag>", "^", "~", "|", "`", "_", "snake_case", "//", "-", "—", "“q”", "。", "，", "！", "～"],
    *["北京", "東京", "まで", "カナ", "한국", "é", "e\u0301", "\u0301", "n\u0303o", "Ǆ", "ǅ", "ἶ", "\u1f7d", "\u1fd3"],
    *["Ი", "а", "привет", "ПРИВЕТ", "مرحبا", "हिन्दी", "ก่อน", "🎉", "👍🏽", "\u200d", "\xa0", "\u2003", "\u3000"],
    *["!\n/", "a'll", "\x85", "\u9fa6", "\ufeff", "\x00", "ﬁ", "ａＡ", "𝒜", "𐐀", "ª", "ʰ", "aB", "XMLHttp", "\u4e00"],
]
KINDS = ("Lu", "Ll", "Lt", "Lm", "Mn", "Nl", "Po")
TEXTS = st.lists(st.sampled_from(PIECES) | st.characters(exclude_categories=["Cs", "Cc", "Cn"]), max_size=12)


def hugging_face(tokenizer_class):
    backend = tokenizer_class().backend_tokenizer
    return lambda text: words(backend, text)


def steps(*pre):
    sequence = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(p), "isolated") if isinstance(p, str) else p
                                        for p in pre])  # fmt: skip
    return lambda text: [word for word, _ in sequence.pre_tokenize_str(text)]


def words(backend, text):
    normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal)]


def expressions(*patterns):
    """llama.cpp's way: each expression cuts what the one before has left into matches and gaps."""
    white = [regex.compile(p.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")) for p in patterns]

    def cut(text):
        parts = [text]
        for pattern in white:  # Python's \s has four control characters more
            parts = [piece for part in parts for piece in matches_and_gaps(pattern, part) if piece]
        return [word for part in parts for word, _ in to_bytes.pre_tokenize_str(part)]

    return cut


def matches_and_gaps(pattern, text):
    at = 0
    for match in pattern.finditer(text):
        yield from (text[at : match.start()], match.group())
        at = match.end()
    yield text[at:]


to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
gpt2_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
digits = pre_tokenizers.Digits(individual_digits=True)

APOSTROPHE = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UP, LOW = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = (
    APOSTROPHE + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In files that passed through an editor three of these letters are often composed ones, which can't be.
CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄ"
    "ῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    "𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
CJK = "[一-龥ࠀ-一가-\ud7ff]+"
ORACLES = {
    "gpt-2": hugging_face(GPT2Tokenizer),
    "mpt": hugging_face(GPTNeoXTokenizer),
    "command-r": hugging_face(CohereTokenizer),
    "qwen2": hugging_face(Qwen2Tokenizer),
    "qwen35": hugging_face(Qwen3_5Tokenizer),
    "smollm": steps(digits, gpt2_words),
    "falcon": steps(
        pre_tokenizers.Punctuation("contiguous"),
        gpt2_words,
        pre_tokenizers.Digits(individual_digits=False),
        "[0-9][0-9][0-9]",
    ),
    "deepseek-llm": steps(
        "[\r\n]", rf"\s?[{CASED}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", CJK, digits, to_bytes
    ),
    "deepseek-coder": steps("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, digits, to_bytes),
    "deepseek-v3": expressions(
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "default": expressions(r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "llama-bpe": expressions(LLAMA3),
    "smaug-bpe": expressions(LLAMA3),
    "megrez": expressions(LLAMA3.replace("{1,3}", "")),
    "tekken": expressions(
        rf"[^\r\n\p{{L}}\p{{N}}]?{UP}*{LOW}+|[^\r\n\p{{L}}\p{{N}}]?{UP}+{LOW}*|\p{{N}}|{SIGNS}"
    ),
    "gpt-4o": expressions(
        rf"[^\r\n\p{{L}}\p{{N}}]?{UP}*{LOW}+{APOSTROPHE}?|[^\r\n\p{{L}}\p{{N}}]?{UP}+{LOW}*{APOSTROPHE}?"
        rf"|\p{{N}}{{1,3}}|{SIGNS}"
    ),
}
SAME = {
    **dict.fromkeys(["starcoder", "refact", "minerva-7b"], "smollm"),
    **dict.fromkeys(["llama3", "llama-v3", "falcon3", "pixtral"], "llama-bpe"),
    **{"mellum": "gpt-2", "olmo": "mpt", "deepseek-r1-qwen": "qwen2", "llama4": "gpt-4o"},
}


def tokenizer(name, tokens=(), merges=(), **more):
    """A byte-level tokenizer with this rule; without merges it has a token for each byte."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *tokens]
    given = {"model": "gpt2", "pre": name, "tokens": tokens, "merges": list(merges)}
    given |= {"token_type": [1] * len(tokens)} | more
    return build_tokenizer({f"tokenizer.ggml.{key}": value for key, value in given.items() if value is not None})


@pytest.fixture(scope="module")
def backends():
    return {name: tokenizer(name).backend for name in WORD_RULES}


def test_every_name_has_an_oracle():
    assert {*ORACLES, *SAME} == {*WORD_RULES}


@pytest.mark.parametrize("name", ORACLES)
def test_words_of_all_pieces_in_any_order_equal_the_oracle(backends, name):
    dice, pieces = random.Random(name), PIECES.copy()
    for _ in range(60):
        dice.shuffle(pieces)
        text = "".join(pieces)
        assert words(backends[name], text) == ORACLES[name](text)


@pytest.mark.parametrize("name", ["deepseek-llm", "tekken", "qwen35"])
def test_every_character_is_in_its_class(backends, name):
    """Beside letters on both sides: what is none of them cuts the word."""
    text = "\n".join(f"a{chr(code)}Z" for code in range(0x21, 0x1FFFF) if unicodedata.category(chr(code)) in KINDS)
    assert words(backends[name], text) == ORACLES[name](text)


@pytest.mark.parametrize("name", ORACLES)
@settings(max_examples=60)
@given(TEXTS)
def test_words_equal_the_oracle(backends, name, pieces):
    text = "".join(pieces)
    assert words(backends[name], text) == ORACLES[name](text)


@pytest.mark.parametrize("name", SAME)
def test_names_for_the_same_rule(name):
    assert WORD_RULES[name] == WORD_RULES[SAME[name]]


@pytest.mark.parametrize("name", WORD_RULES)
def test_no_text_is_lost(backends, name):
    text = unicodedata.normalize("NFC", "".join(PIECES))
    assert decoders.ByteLevel().decode(words(backends[name], text)) == text


def test_a_word_that_is_a_token_is_taken_whole():
    """By some rules: there are tokens of Llama 3 that its merges don't reach."""
    whole = {name for name in WORD_RULES if len(tokenizer(name, tokens=["hello"]).encode("hello")) == 1}
    assert whole == {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"}
    assert tokenizer("gpt-2", tokens=["he"], merges=["h e"]).encode("hello")[0] == 256


def test_who_begins_with_a_special_token_unasked():
    """Early files of Llama 3 say nothing of it; llama.cpp adds it."""
    special = {"tokens": ["<s>"], "bos_token_id": 256}
    begins = {name for name in WORD_RULES if tokenizer(name, **special).encode("") == [256]}
    assert begins == {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"}
    assert tokenizer("llama-bpe", **special, add_bos_token=False).encode("") == []
    assert tokenizer("llama-bpe").encode("") == []  # there is none
    assert tokenizer("gpt-2", **special, add_bos_token=True).encode("") == [256]


def test_a_file_without_a_name_is_read_by_the_default_and_says_so():
    with pytest.warns(UserWarning, match="has no tokenizer.ggml.pre"):
        unnamed = tokenizer(None)
    for text in ("a+b 1234567", "IT'S  `x`"):
        assert words(unnamed.backend, text) == ORACLES["default"](text)


@pytest.mark.parametrize("name", ["jina-v9", "", "kimi-k2", 3])
def test_unknown_names_are_refused(name):
    with pytest.raises(TokenizerError, match=r"tokenizer.ggml.pre=.* is not known, only gpt-2, mellum, .*; try the"):
        tokenizer(name)


def test_tokens_that_end_text_are_special_whatever_their_kind():
    """llama.cpp takes them for control tokens, too, by their texts."""
    made = tokenizer("gpt-2", tokens=["<|im_end|>", "", "<u>"], eos_token_id=256, token_type=[1] * 258 + [4])
    assert made.encode("a<|im_end|>") == [*made.encode("a"), 256]
    assert (made.special_ids, made.special_tokens) == ({256}, {"eos_token": "<|im_end|>"})
    assert made.decode([256, 258]) == "<u>"
    assert made.backend.id_to_token(257) == "[EMPTY_257]"
    assert tokenizer("gpt-2", tokens=["<e>"], eot_token_id=256, token_type=None).special_ids == {256}
