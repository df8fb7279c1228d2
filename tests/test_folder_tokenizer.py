"""Tokenizers of folders that have no tokenizer.json.

Oracles: transformers on the same vocab.json and merges.txt; for tokenizer.model what the sentencepiece package makes
of it (data/sentencepiece), and the tokenizers package's own steps for what transformers adds to it.
"""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, Qwen2Tokenizer

from minipaged.models.fields import ModelError
from minipaged.models.folder_tokenizer import read_tokenizer

DATA = Path(__file__).parent / "data" / "sentencepiece"
EXPECTED = json.loads((DATA / "expected.json").read_text())
TEXTS = ["", "IT'S 2024  and   we'LL see 123456!!\n\n\n ok", " don't 'tis a.b\tc\r\n  x"]
TEXTS += ["naïveté e\u0301 北京 12 34 🎉"]
END = "<|endoftext|>"


def write(file, value):
    file.write_text(json.dumps(value))


@pytest.fixture(scope="module")
def vocabulary():
    """Of a byte-level BPE that was trained without any rule for words: (vocab.json, merges.txt)."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS * 5, trainer)
    merges = json.loads(backend.to_str())["model"]["merges"]
    ids = backend.get_vocab()
    return ids | {END: len(ids)}, "\n".join(["#version: 0.2", *map(" ".join, merges), ""])


@pytest.fixture
def folder(tmp_path, vocabulary):
    write(tmp_path / "vocab.json", vocabulary[0])
    (tmp_path / "merges.txt").write_text(vocabulary[1])
    return tmp_path


def refused(folder, model_type="gpt2"):
    with pytest.raises(ModelError) as error:
        read_tokenizer(folder, model_type)
    assert str(folder) in str(error.value)
    return str(error.value)


# vocab.json and merges.txt


@pytest.mark.parametrize(
    ("model_type", "settings", "oracle"),
    [
        ("gpt2", {}, GPT2Tokenizer),
        ("qwen2", {}, Qwen2Tokenizer),
        ("qwen3", {"tokenizer_class": None}, Qwen2Tokenizer),
        ("llama", {"tokenizer_class": "GPT2TokenizerFast"}, GPT2Tokenizer),
        ("gpt2", {"tokenizer_class": "Qwen2Tokenizer"}, Qwen2Tokenizer),
    ],
)
def test_text_as_transformers_encodes_it(folder, model_type, settings, oracle):
    theirs = oracle.from_pretrained(folder)
    write(folder / "tokenizer_config.json", settings)
    ours = read_tokenizer(folder, model_type)
    end = f"a{END}b"
    for text in [*TEXTS, *EXPECTED["texts"], *EXPECTED["texts with special tokens"], end, END, "x'S", "?!\n y"]:
        assert ours.encode(text) == theirs(text)["input_ids"], text
    assert ours.decode(ours.encode(end), skip_special_tokens=False) == end
    assert ours.decode(ours.encode(end)) == "ab"
    assert ours.special_tokens["eos_token"] == theirs.eos_token == END
    assert ours.special_tokens.get("bos_token") == theirs.bos_token


def test_added_and_special_tokens(folder, vocabulary):
    size = len(vocabulary[0])
    write(folder / "added_tokens.json", {"<u>": size})
    write(folder / "special_tokens_map.json", {"eos_token": "<old>", "bos_token": {"content": "<b>"}})
    decoder = {size + 1: {"content": "<b>", "special": True}, size + 2: {"content": "<|im_end|>", "special": True}}
    write(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>", "added_tokens_decoder": decoder})
    tokenizer = read_tokenizer(folder, "gpt2")
    assert tokenizer.encode("<|im_end|><u><b>") == [size + 2, size, size + 1]
    assert tokenizer.special_tokens == {"bos_token": "<b>", "eos_token": "<|im_end|>"}
    assert tokenizer.decode([size, size + 1, size + 2, size - 1]) == "<u>"
    assert tokenizer.encode(END) == [size - 1]  # the unknown token still
    write(folder / "tokenizer_config.json", {"add_bos_token": True, "bos_token": END, "eos_token": END})
    assert read_tokenizer(folder, "gpt2").encode("") == [size - 1]


def test_the_chat_template_is_found(folder):
    write(folder / "tokenizer_config.json", {"chat_template": "{{ eos_token }}{{ messages[0].content }}"})
    message = {"role": "user", "content": "hi"}
    assert read_tokenizer(folder, "gpt2").apply_chat_template([message]) == f"{END}hi"


@pytest.mark.parametrize(
    ("settings", "model_type", "reason"),
    [
        ({}, "llama", "don't say how text is cut into words, and llama is none of GPT2Tokenizer, Qwen2Tokenizer"),
        ({"tokenizer_class": "BloomTokenizerFast"}, "gpt2", "and BloomTokenizer is none of"),
        ({"add_prefix_space": True}, "gpt2", "add_prefix_space is not supported without tokenizer.json"),
        ({"add_bos_token": True, "bos_token": None}, "qwen2", "text should get a bos token, but none is named"),
        ({"eos_token": "</s>"}, "gpt2", "eos_token '</s>' is not in the vocabulary"),
        ({"added_tokens_decoder": {"9": {"content": "<x>"}}}, "gpt2", "the added token '<x>' can't have the id 9"),
        ({"added_tokens_decoder": {"900": {"content": "<x>"}}}, "gpt2", "'<x>' can't have the id 900"),
        ({"added_tokens_decoder": {"500": {"content": "<x>", "rstrip": True}}}, "gpt2", "it takes in spaces"),
        ({"added_tokens_decoder": {"x": {}}}, "gpt2", "what belongs to it is damaged"),
    ],
)
def test_refusals(folder, settings, model_type, reason):
    write(folder / "tokenizer_config.json", settings)
    assert reason in refused(folder, model_type)


def test_damaged_files(folder, vocabulary):
    (folder / "merges.txt").write_text("a b\nnope\n")
    assert "damaged" in refused(folder)
    (folder / "merges.txt").write_text(vocabulary[1])
    write(folder / "vocab.json", vocabulary[0] | {END: 7})
    assert "vocab.json: its ids must be 0 to" in refused(folder)
    (folder / "vocab.json").write_text("[]")
    assert "vocab.json does not hold a JSON object" in refused(folder)
    (folder / "merges.txt").unlink()
    assert "has no tokenizer.json, no vocab.json with merges.txt, and no tokenizer.model" in refused(folder)


# tokenizer.model


@pytest.fixture
def sentencepiece_folder(tmp_path):
    def make(name, **settings):
        shutil.copy(DATA / f"{name}.model", tmp_path / "tokenizer.model")
        write(tmp_path / "tokenizer_config.json", settings)
        return tmp_path

    return make


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma", "nobytes"])
def test_tokenizer_model_alone(sentencepiece_folder, name):
    tokenizer = read_tokenizer(sentencepiece_folder(name), "llama")
    for text, ids in zip(EXPECTED["texts"], EXPECTED["sentencepiece"][name], strict=True):
        assert tokenizer.encode(text) == [1, *ids], text
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_settings_of_a_tokenizer_model(sentencepiece_folder):
    def encode(text, **settings):
        return read_tokenizer(sentencepiece_folder("llama", **settings), "llama").encode(text)

    plain = encode("a", add_bos_token=False)
    assert encode("a") == [1, *plain]
    assert encode("a", add_eos_token=True, add_bos_token=False) == [*plain, 2]
    assert encode("a", bos_token="</s>") == [2, *plain]
    assert encode("a", add_prefix_space=False)[1:] != plain
    added = {"700": {"content": "<|im_end|>", "special": True}}
    assert encode("<|im_end|>a", added_tokens_decoder=added) == [1, 700, *plain]
    # transformers' "legacy": after a special token comes another space, or not
    assert encode("a</s>a", legacy=True) == [1, *plain, 2, *plain]
    assert encode("a</s>a", legacy=False) == [1, *plain, 2, *encode("a", add_prefix_space=False)[1:]]


def test_the_unknown_token_stays_what_it_is(sentencepiece_folder):
    """tokenizer_config.json calls it special, as the others; characters without a token still become it."""
    settings = {"unk_token": "<unk>", "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}}}
    tokenizer = read_tokenizer(sentencepiece_folder("nobytes", **settings), "llama")
    assert tokenizer.encode("ﷺa<unk>", add_special_tokens=False).count(0) == 2


def test_other_kinds_of_tokenizer_model(sentencepiece_folder):
    folder = sentencepiece_folder("llama")
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\n")
    assert "tokenizer.model is damaged, or no SentencePiece model" in refused(folder)
    (folder / "tokenizer.model").unlink()
    assert "with sentencepiece or tiktoken installed" in refused(folder)
