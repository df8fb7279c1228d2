"""SentencePiece's BPE, from a GGUF file's metadata and from tokenizer.model.

Oracles, in data/sentencepiece: four small models made by the sentencepiece package, what it makes of 100 hostile
texts, and what llama.cpp makes of 60 more with special tokens in them, from GGUF files of the same vocabularies.
And here, the algorithm itself in 20 lines, for any text and any scores.
"""

import json
import struct
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.models.fields import ModelError
from minipaged.models.sentencepiece_file import read_sentencepiece
from minipaged.text.gguf_tokenizer import build_tokenizer
from minipaged.text.sentencepiece import merges_by_score, sentencepiece
from minipaged.text.tokenizer import TokenizerError
from minipaged.text.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Vocabulary

DATA = Path(__file__).parent / "data" / "sentencepiece"
EXPECTED = json.loads((DATA / "expected.json").read_text())
MODELS = ["llama", "mistral", "gemma", "nobytes"]  # with digits apart; user-defined; no space in front; no bytes


def metadata(name, **more):
    """What llama.cpp's converter writes for a tokenizer.model."""
    vocabulary, scores, space_prefix = read_sentencepiece(DATA / f"{name}.model")
    tokens = {"tokens": vocabulary.tokens, "token_type": vocabulary.kinds, "scores": scores}
    given = {"model": "llama", "add_space_prefix": space_prefix} | tokens | more
    return {f"tokenizer.ggml.{key}": value for key, value in given.items() if value is not None}


@pytest.fixture(scope="module")
def tokenizers():
    return {name: build_tokenizer(metadata(name)) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_text_as_sentencepiece_encodes_it(tokenizers, name):
    for text, ids in zip(EXPECTED["texts"], EXPECTED["sentencepiece"][name], strict=True):
        assert tokenizers[name].encode(text, add_special_tokens=False) == ids, text


@pytest.mark.parametrize("name", MODELS[:3])
def test_special_tokens_in_text_as_llama_cpp_takes_them(tokenizers, name):
    ids = EXPECTED["llama.cpp"][name]
    for text, expected in zip(EXPECTED["texts with special tokens"], ids, strict=True):
        assert tokenizers[name].encode(text, add_special_tokens=False) == expected, text


@pytest.mark.parametrize("name", MODELS[:3])
def test_decoding_gives_the_text_back(tokenizers, name):
    for text in EXPECTED["texts"]:
        if "▁" not in text:  # which is a space in disguise
            ids = tokenizers[name].encode(text, add_special_tokens=False)
            assert tokenizers[name].decode(ids, skip_special_tokens=False) == text


def naive(vocabulary, scores, text):
    """Of all neighbours that make a token join those with the highest score, the leftmost first; then bytes."""
    pieces = {t: s for t, s, k in zip(vocabulary.tokens, scores, vocabulary.kinds, strict=True) if k == NORMAL}
    symbols = list(("▁" + text).replace(" ", "▁")) if text else []
    while True:
        pairs = [(-pieces[a + b], at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in pieces]
        if not pairs:
            break
        at = min(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    tokens = [[s] if s in pieces else [f"<0x{byte:02X}>" for byte in s.encode()] for s in symbols]
    return [vocabulary.ids[token] for group in tokens for token in group]


LETTERS = "▁ab"
WORDS = st.lists(st.text(LETTERS, min_size=2, max_size=5), unique=True, max_size=12)


@given(WORDS.flatmap(lambda words: st.tuples(st.just(words), st.permutations(range(len(words))))), st.data())
def test_any_scores_on_any_text(words_and_order, data):
    """Scores that no training would give, where a token's parts may be worth less than the token."""
    words, order = words_and_order
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS, *words]
    kinds = [UNKNOWN] + [BYTE] * 256 + [NORMAL] * (len(words) + 3)
    scores = [0.0] * 257 + [-1e3] * 3 + [-float(rank) for rank in order]
    vocabulary = Vocabulary(tokens, kinds)
    text = data.draw(st.text(" abé", max_size=12))
    expected = naive(vocabulary, scores, text)
    assert sentencepiece(vocabulary, merges_by_score(vocabulary, scores)).encode(text) == expected


def test_what_is_added_before_and_behind():
    plain = build_tokenizer(metadata("llama")).encode("a b", add_special_tokens=False)
    for flags, expected in [
        ({}, [1, *plain]),  # as llama.cpp has it where the file says nothing
        ({"add_bos_token": False}, plain),
        ({"add_eos_token": True}, [1, *plain, 2]),
        ({"add_bos_token": False, "add_eos_token": True, "eos_token_id": 1}, [*plain, 1]),
    ]:
        tokenizer = build_tokenizer(metadata("llama", **flags))
        assert tokenizer.encode("a b") == expected
    assert build_tokenizer(metadata("llama")).special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert build_tokenizer(metadata("llama")).encode("") == [1]
    assert build_tokenizer(metadata("llama", add_space_prefix=None)).encode("a b") == [1, *plain]


def test_kinds_of_tokens():
    tokenizer = build_tokenizer(metadata("mistral"))
    ids = {token: tokenizer.backend.token_to_id(token) for token in ("[INST]", "<|user|>", "<unk>", "<0x41>")}
    assert tokenizer.encode("[INST]<|user|>", add_special_tokens=False) == [ids["[INST]"], ids["<|user|>"]]
    assert tokenizer.decode([ids["[INST]"], ids["<|user|>"], ids["<unk>"], ids["<0x41>"]]) == "<|user|>A"
    assert tokenizer.byte_values == {tokenizer.backend.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
    assert ids["<0x41>"] not in tokenizer.encode("<0x41>")  # a text that looks like a byte is not one
    assert build_tokenizer(metadata("nobytes")).byte_values == {}


def test_without_scores_the_merges_count():
    """Converted from a tokenizer.json: all scores are the same, and its merges are in the file."""
    vocabulary, scores, _ = read_sentencepiece(DATA / "llama.model")
    merges = [" ".join(pair) for pair in merges_by_score(vocabulary, scores)]
    same = [-1000.0] * len(scores)
    tokenizer = build_tokenizer(metadata("llama", scores=same, merges=merges))
    for text, ids in zip(EXPECTED["texts"], EXPECTED["sentencepiece"]["llama"], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids
    with pytest.raises(TokenizerError, match=r"neither scores \(tokenizer.ggml.scores\) nor merges"):
        build_tokenizer(metadata("llama", scores=same))
    with pytest.raises(TokenizerError, match="neither scores"):
        build_tokenizer(metadata("llama", scores=None))


def test_unused_tokens_are_tokens_as_for_llama_cpp():
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab"]
    vocabulary = Vocabulary(tokens, [UNKNOWN] + [BYTE] * 256 + [NORMAL] * 3 + [UNUSED])
    assert sentencepiece(vocabulary, merges_by_score(vocabulary, [0.0] * 261)).encode("ab") == [257, 260]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "t5"}, r"tokenizer.ggml.model='t5' is not supported; gpt2 .* and llama"),
        ({"model": "bert"}, "'bert' is not supported"),
        ({"model": None}, "None is not supported"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces=True is not supported"),
        ({"scores": [0.0, 1.0]}, "700 tokens, but 2 scores"),
        ({"token_type": [1, 1]}, "700 tokens, but 2 token types"),
        ({"bos_token_id": 700}, "the bos token 700 is not one of the 700 tokens"),
        ({"eos_token_id": 10**6}, "the eos token 1000000 is not one of"),
        ({"tokens": None}, "damaged: KeyError: 'tokens'"),
        ({"tokens": ["a"] * 700}, "the token 'a' stands twice"),
    ],
)
def test_refusals(change, reason):
    with pytest.raises(TokenizerError, match=reason):
        build_tokenizer(metadata("llama", **change))


def test_characters_are_never_lost():
    kinds = [NORMAL if kind in (UNKNOWN, BYTE) else kind for kind in metadata("nobytes")["tokenizer.ggml.token_type"]]
    with pytest.raises(TokenizerError, match="neither an unknown token nor one for each byte"):
        build_tokenizer(metadata("nobytes", token_type=kinds))


# tokenizer.model


def varint(value):
    return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])


def message(*fields):
    """(number, value) -> the bytes of a protocol buffer."""
    parts = []
    for number, value in fields:
        if isinstance(value, float):
            parts.append(varint(number << 3 | 5) + struct.pack("<f", value))
        elif isinstance(value, int):
            parts.append(varint(number << 3) + varint(value))
        else:
            parts.append(varint(number << 3 | 2) + varint(len(value)) + value)
    return b"".join(parts)


def model(trainer=((3, 2),), normalizer=((4, 0),)):
    pieces = [message((1, b"<unk>"), (2, 0.0), (3, 2)), message((1, "▁a".encode()), (2, -1.5))]
    return message(*((1, piece) for piece in pieces), (2, message(*trainer)), (3, message(*normalizer)))


def test_the_file_is_read(tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(model(trainer=[(3, 2), (41, 2**64 - 1), (42, 1), (99, b"x"), (98, 1.0)]))
    vocabulary, scores, space_prefix = read_sentencepiece(file)
    assert (vocabulary.tokens, vocabulary.kinds, scores) == (["<unk>", "▁a"], [UNKNOWN, NORMAL], [0.0, -1.5])
    assert (vocabulary.bos_id, vocabulary.eos_id, space_prefix) == (None, 1, True)
    vocabulary, _, space_prefix = read_sentencepiece(DATA / "gemma.model")
    assert (vocabulary.kinds[1], vocabulary.bos_id, vocabulary.eos_id, space_prefix) == (CONTROL, 1, 2, False)
    assert read_sentencepiece(DATA / "mistral.model").vocabulary.of_kind(USER_DEFINED) == ["<|user|>", "\n\n"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (model(trainer=[(3, 1)]), "model_type=unigram is not supported, only bpe is"),
        (model(trainer=[]), "model_type=unigram"),
        (model(trainer=[(3, 4)]), "model_type=char"),
        (model(normalizer=[(4, 0), (2, b"map")]), "only text that stays as it is"),
        (model(normalizer=[]), "only text that stays as it is"),
        (model(normalizer=[(4, 0), (5, 0)]), "only text that stays as it is"),
        (b"", "damaged, or no SentencePiece model"),
        (b"IQ== 0\nIg== 1\n", "damaged, or no SentencePiece model"),  # Llama 3's tokenizer.model: tiktoken's
        (model()[:-1], "damaged, or no SentencePiece model: it ends within field"),
        (b"\x80" * 50, "damaged, or no SentencePiece model"),
    ],
)
def test_other_files_are_refused(tmp_path, data, reason):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(data)
    with pytest.raises(ModelError, match=reason):
        read_sentencepiece(file)


@given(st.binary(max_size=200), st.integers(0, 400))
def test_any_bytes_are_read_or_refused(tmp_path_factory, junk, at):
    file = tmp_path_factory.getbasetemp() / "junk.model"
    data = (DATA / "nobytes.model").read_bytes()
    file.write_bytes(data[:at] + junk + data[at + len(junk) :])
    try:
        read_sentencepiece(file)
    except ModelError as error:
        assert str(file) in str(error)
