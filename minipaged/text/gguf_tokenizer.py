"""Builds a tokenizer from a GGUF file's metadata, with llama.cpp's defaults for what they leave out."""

import warnings
from typing import Any

from minipaged.text.byte_level import byte_level
from minipaged.text.sentencepiece import merges_by_score, sentencepiece
from minipaged.text.tokenizer import Tokenizer, TokenizerError
from minipaged.text.vocabulary import CONTROL, NORMAL, Vocabulary
from minipaged.text.word_rules import WORD_RULES

INSTEAD = "try the model's folder in Hugging Face layout"


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer that the metadata describes. TokenizerError names what is unknown, wrong or damaged."""
    kind = metadata.get("tokenizer.ggml.model")
    build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(str(kind))
    if build is None:
        raise TokenizerError(
            f"tokenizer.ggml.model={kind!r:.60} is not supported; gpt2 (byte-level BPE) and llama (SentencePiece's "
            f"BPE) are; {INSTEAD}"
        )
    try:
        return build({key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()})
    except TokenizerError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"its tokenizer is damaged: {type(error).__name__}: {error}") from error


def _byte_level(metadata: dict[str, Any]) -> Tokenizer:
    name = metadata.get("pre")
    if name is None:
        warnings.warn(
            "this GGUF file has no tokenizer.ggml.pre, which names the rule that cuts text into words: "
            "llama.cpp's default is used, and may not be the model's own",
            stacklevel=2,
        )
    rule = WORD_RULES.get("default" if name is None else str(name))
    if rule is None:
        raise TokenizerError(f"tokenizer.ggml.pre={name!r:.60} is not known, only {', '.join(WORD_RULES)}; {INSTEAD}")
    return byte_level(_vocabulary(metadata, add_bos=rule.add_bos), metadata["merges"], rule)


def _sentencepiece(metadata: dict[str, Any]) -> Tokenizer:
    if metadata.get("remove_extra_whitespaces"):
        raise TokenizerError(f"tokenizer.ggml.remove_extra_whitespaces=True is not supported; {INSTEAD}")
    vocabulary = _vocabulary({"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} | metadata, add_bos=True)
    scores, merges = metadata.get("scores", []), metadata.get("merges")
    if len(set(scores)) > 1:
        pairs = merges_by_score(vocabulary, scores)
    elif merges:  # converted from a tokenizer.json, which has no scores
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    else:
        raise TokenizerError(f"it has neither scores (tokenizer.ggml.scores) nor merges to go by; {INSTEAD}")
    return sentencepiece(vocabulary, pairs, metadata.get("add_space_prefix", True))


def _vocabulary(metadata: dict[str, Any], add_bos: bool) -> Vocabulary:
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(metadata["tokens"])]
    kinds = list(metadata.get("token_type") or [NORMAL] * len(tokens))
    for name in ("eos_token_id", "eot_token_id", "eom_token_id"):  # some files call them normal tokens
        if metadata.get(name) is not None and metadata[name] < len(kinds):
            kinds[metadata[name]] = CONTROL
    return Vocabulary(
        tokens,
        kinds,
        metadata.get("bos_token_id"),
        metadata.get("eos_token_id"),
        metadata.get("add_bos_token", add_bos and metadata.get("bos_token_id") is not None),
        metadata.get("add_eos_token", False),
        metadata.get("tokenizer.chat_template"),
    )
