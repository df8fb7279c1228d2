"""Small tokenizers of the common kinds, and what their tokens say, byte by byte."""

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from minipaged.text.tokenizer import Tokenizer

LETTERS = bytes_to_unicode()  # byte -> the letter that stands for it in GPT-2's vocabulary
BYTES = {letter: byte for byte, letter in LETTERS.items()}


def metaspace_tokenizer() -> Tokenizer:
    """A tokenizer as Llama 2 has it: ▁ for spaces, one of them before the text; bytes for the unknown."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += list("▁abcdehlorw,.é") + ["▁h", "he", "▁he", "ll", "llo", "▁w", "or", "▁wor", "ld", "▁▁"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "h"), ("▁h", "e"), ("h", "e"), ("l", "l"), ("ll", "o"), ("▁", "w"), ("o", "r")]
    merges += [("▁w", "or"), ("l", "d"), ("▁", "▁")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(to_text)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in pieces[:3]])
    return Tokenizer(backend)


def byte_tokenizer(*more: bytes) -> Tokenizer:
    """Byte-level, with one token for each byte, those of more after them, and no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet += ["".join(LETTERS[byte] for byte in data) for data in more]
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """The tokens of single bytes, in either kind of tokenizer."""
    names = [f"<0x{byte:02X}>" if tokenizer.byte_values else LETTERS[byte] for byte in data]
    return [tokenizer.backend.token_to_id(name) for name in names]


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """What a token that is not special stands for."""
    name = tokenizer.backend.id_to_token(token_id)
    if not tokenizer.byte_values:
        return bytes(BYTES[letter] for letter in name)
    return bytes([int(name[3:5], 16)]) if name.startswith("<0x") else name.replace("▁", " ").encode()


def whole_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The whole characters of a text that is UTF-8, but for its end. Special tokens are passed over."""
    told = [i for i in ids if i not in tokenizer.special_ids]
    text = b"".join(token_bytes(tokenizer, i) for i in told).decode("utf-8", "ignore")
    return text.removeprefix(" ") if tokenizer.byte_values else text
