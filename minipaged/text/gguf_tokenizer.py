"""Builds a tokenizer from a GGUF file's metadata. Vocabulary and merges are given there, but the rule by
which text is cut into words, which no merge crosses, is only named.
"""

from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from minipaged.text.tokenizer import Tokenizer, TokenizerError

CONTROL, USER_DEFINED = 3, 4  # token types that are matched whole; control tokens are special, too
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> expressions that cut text into words, each what the one before has left.
WORDS = {
    "gpt-2": [GPT2_WORDS],
    "smollm": [r"\p{N}", GPT2_WORDS],
    "llama-bpe": [LLAMA3_WORDS],
    "qwen2": [LLAMA3_WORDS.replace("{1,3}", "")],
}


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer that the metadata describes. TokenizerError names what is unknown."""
    kind, words = (str(metadata.get(f"tokenizer.ggml.{key}")) for key in ("model", "pre"))
    if kind != "gpt2" or words not in WORDS:
        raise TokenizerError(
            f"tokenizer.ggml.model={kind:.60} with pre={words:.60} is not supported, only gpt2 with "
            f"{', '.join(WORDS)}; try the model's folder in Hugging Face layout"
        )
    try:
        return _build({key.removeprefix("tokenizer."): value for key, value in metadata.items()}, words)
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"its tokenizer is damaged: {type(error).__name__}: {error}") from error


def _build(metadata: dict[str, Any], words: str) -> Tokenizer:
    tokens = metadata["ggml.tokens"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata["ggml.merges"]]
    backend = Backend(models.BPE(vocabulary, merges, ignore_merges=words == "llama-bpe"))
    if words == "qwen2":
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in WORDS[words]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()

    kinds = zip(tokens, metadata["ggml.token_type"], strict=True)
    whole = [(token, kind == CONTROL) for token, kind in kinds if kind in (CONTROL, USER_DEFINED)]
    backend.add_tokens([AddedToken(token, normalized=False, special=control) for token, control in whole])
    ids = {name: metadata.get(f"ggml.{name}_id") for name in ("bos_token", "eos_token")}
    special = {name: tokens[i] for name, i in ids.items() if i is not None}
    bos, eos = ([special[name]] if metadata.get(f"ggml.add_{name}") else [] for name in ids)
    backend.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A", *eos], special_tokens=[(token, vocabulary[token]) for token in bos + eos]
    )
    return Tokenizer(backend, metadata.get("chat_template"), special)
