"""Builds a tokenizer from a GGUF file's metadata: vocabulary, merges, and the names of rules that are only known
by name, among them how text is split into words before any merge.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from minipaged.models.config import ModelError
from minipaged.models.tokenizer import Tokenizer

Metadata = dict[str, Any]
CONTROL, USER_DEFINED = 3, 4  # token types: matched whole in the text; control tokens are special, too

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> the regular expression that cuts text into words; None: GPT-2's, which ByteLevel has itself.
WORDS = {
    "gpt-2": None,
    "smollm": None,  # after every digit is set apart
    "llama-bpe": _LLAMA3,
    "qwen2": _LLAMA3.replace("{1,3}", ""),
}


def build_tokenizer(metadata: Metadata, path: Path) -> Tokenizer:
    """The tokenizer that the metadata describes. Raises ModelError naming what is unknown or missing."""
    kind = metadata.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise ModelError(f"{path}: tokenizer.ggml.model={kind!r:.60} is not supported; known are {list(builders)}")
    try:
        backend = builders[kind](metadata)
        _add_special_tokens(backend, metadata)
        tokens = metadata["tokenizer.ggml.tokens"]
        special = {f"{name}_token": metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        named = {name: tokens[i] for name, i in special.items() if i is not None}
        return Tokenizer(backend, metadata.get("tokenizer.chat_template"), named)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    except Exception as error:  # damaged metadata, and tokenizers raises bare Exception
        raise ModelError(f"{path}: its tokenizer can't be built: {type(error).__name__}: {error}") from error


def _byte_level(metadata: Metadata) -> Backend:
    """Byte-level BPE: tokens and merges are given, the way of cutting text into words by name."""
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in WORDS:
        raise ModelError(f"tokenizer.ggml.pre={pre!r:.60} is not supported; known are {', '.join(WORDS)}")
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Backend(BPE(_vocabulary(metadata), merges, ignore_merges=pre == "llama-bpe"))
    pattern = WORDS[pre]
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    if pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    if pattern is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Metadata) -> Backend:
    """Sentencepiece BPE: spaces are written ▁, unknown characters as bytes, and the scores order the merges."""
    vocabulary = _vocabulary(metadata)
    scores = dict(zip(vocabulary, metadata["tokenizer.ggml.scores"], strict=True))
    pairs = [(token[:i], token[i:]) for token in vocabulary for i in range(1, len(token))]
    merges = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
    merges.sort(key=lambda pair: (scores["".join(pair)], len(pair[0]), len(pair[1])), reverse=True)
    backend = Backend(BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    decode: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        decode.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = replace
    backend.decoder = decoders.Sequence(decode)
    return backend


def _vocabulary(metadata: Metadata) -> dict[str, int]:
    return {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}


def _add_special_tokens(backend: Backend, metadata: Metadata) -> None:
    """Control and user-defined tokens, and those that every text begins or ends with."""
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    whole = [(token, kind) for token, kind in zip(tokens, kinds, strict=False) if kind in (CONTROL, USER_DEFINED)]
    backend.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL) for token, kind in whole])
    default = metadata["tokenizer.ggml.model"] == "llama"  # llama.cpp's, where the file says nothing
    ids = {}
    if metadata.get("tokenizer.ggml.add_bos_token", default):
        ids["bos"] = metadata["tokenizer.ggml.bos_token_id"]
    if metadata.get("tokenizer.ggml.add_eos_token", False):
        ids["eos"] = metadata["tokenizer.ggml.eos_token_id"]
    if ids:
        template = [f"{tokens[ids['bos']]}"] * ("bos" in ids) + ["$A"] + [f"{tokens[ids['eos']]}"] * ("eos" in ids)
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(tokens[i], i) for i in ids.values()]
        )
