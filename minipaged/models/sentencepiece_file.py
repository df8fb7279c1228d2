"""Reads SentencePiece's own file, tokenizer.model: a protocol buffer, of which we need three messages.

    ModelProto      1: SentencePiece, one for each token      2: TrainerSpec      3: NormalizerSpec
    SentencePiece   1: piece, a string      2: score, a float      3: type
    TrainerSpec     3: model_type (1 unigram, 2 BPE)          41: bos_id          42: eos_id
    NormalizerSpec  2: precompiled_charsmap, empty for "identity"      3: add_dummy_prefix
                    4: remove_extra_whitespaces                        5: escape_whitespaces

Source: sentencepiece_model.proto of SentencePiece, and the encoding of protocol buffers: each field is a varint
``number * 8 + wire type``, then a varint (0), eight bytes (1), a varint length and so many bytes (2), or four (5).
"""

import struct
from pathlib import Path
from typing import Any, NamedTuple

from minipaged.models.fields import ModelError
from minipaged.text.vocabulary import NORMAL, Vocabulary

UNIGRAM, BPE = 1, 2
KINDS = {UNIGRAM: "unigram", BPE: "bpe", 3: "word", 4: "char"}


class SentencePieceFile(NamedTuple):
    vocabulary: Vocabulary
    scores: list[float]
    space_prefix: bool  # a space is put before the text


def read_sentencepiece(file: Path) -> SentencePieceFile:
    """ModelError for a damaged file, and for one whose way to make tokens is not ours."""
    try:
        model = _message(memoryview(file.read_bytes()))
        pieces = [_message(piece) for piece in model[1]]
        trainer, normalizer = (_message(b"".join(model.get(number, []))) for number in (2, 3))
        kind = _last(trainer, 3, UNIGRAM)
        if kind != BPE:
            raise ModelError(f"{file}: SentencePiece model_type={KINDS.get(kind, kind)} is not supported, only bpe is")
        _check_normalizer(file, normalizer)
        tokens = [bytes(_last(piece, 1, b"")).decode() for piece in pieces]
        ids = (_id(_last(trainer, 41, 1)), _id(_last(trainer, 42, 2)))
        vocabulary = Vocabulary(tokens, [_last(piece, 3, NORMAL) for piece in pieces], *ids)
        return SentencePieceFile(vocabulary, [_float(piece) for piece in pieces], bool(_last(normalizer, 3, True)))
    except (LookupError, ValueError, TypeError, struct.error) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file} is damaged, or no SentencePiece model: {error}") from error


def _check_normalizer(file: Path, normalizer: dict[int, list[Any]]) -> None:
    if _last(normalizer, 2, b"") or _last(normalizer, 4, True) or not _last(normalizer, 5, True):
        raise ModelError(
            f"{file}: only text that stays as it is is supported (normalization identity, spaces escaped and "
            "not removed)"
        )


def _message(data: Any) -> dict[int, list[Any]]:
    """Field number -> its values: integers, or the bytes of strings, messages and fixed-size numbers."""
    fields: dict[int, list[Any]] = {}
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        value: Any
        if key & 7 == 0:
            value, at = _varint(data, at)
        else:
            size, at = _varint(data, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = data[at : at + size], at + size
            if at > len(data):
                raise ValueError(f"it ends within field {key >> 3}")
        fields.setdefault(key >> 3, []).append(value)
    return fields


def _varint(data: Any, at: int) -> tuple[int, int]:
    """Seven bits a byte, the low ones first; the eighth says that more follow."""
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _last(fields: dict[int, list[Any]], number: int, default: Any) -> Any:
    return fields.get(number, [default])[-1]


def _float(piece: dict[int, list[Any]]) -> float:
    return struct.unpack("<f", _last(piece, 2, bytes(4)))[0]


def _id(value: int) -> int | None:
    return value if value < 1 << 31 else None  # -1, for none, is a varint of 64 bits
