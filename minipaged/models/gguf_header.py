"""Reads a GGUF file, llama.cpp's format, up to the point where its tensors can be dequantized.

    "GGUF" | version u32 | number of tensors u64 | number of metadata entries u64
    metadata:  key, type, value                          of every entry
    tensors:   name, dimensions, type, offset            of every tensor
    padding to general.alignment (32), then the tensors' bytes

Numbers are little-endian; a string is a u64 length and UTF-8; an array is an element type, a u64 count and
the elements. The gguf package has a reader, too, but it takes seconds for a vocabulary of 49,152 tokens, 30
times as long, and a damaged count makes it run for ever. Here the end of the file stops everything.
"""

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from minipaged.models.config import ModelError
from minipaged.models.split import Part

# The value types, as struct has them.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class RawTensor(NamedTuple):
    """A tensor as the file has it: shape as in PyTorch, and bytes [*shape[:-1], bytes in a row]."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    rows: np.ndarray

    def part(self, part: Part) -> tuple["RawTensor", Part | None]:
        """As little of the file as holds this part, and what is to be cut out of that: blocks of a row are whole."""
        if part.axis < len(self.shape) - 1:
            rows = np.concatenate([self.rows[own.start : own.stop] for own in part.ranges])
            return RawTensor(self.kind, (len(rows), *self.shape[1:]), rows), None
        block, size = GGML_QUANT_SIZES[self.kind]
        pieces, inner, read = [], [], 0
        for own in part.ranges:
            first, last = own.start // block, -(-own.stop // block)
            pieces.append(self.rows[..., first * size : last * size])
            inner.append(range(read + own.start - first * block, read + own.stop - first * block))
            read += (last - first) * block
        raw = RawTensor(self.kind, (*self.shape[:-1], read), np.concatenate(pieces, -1))
        return raw, None if sum(map(len, inner)) == read else Part(part.axis, tuple(inner))


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    """Metadata and tensors, which are views of the file. ModelError names what is truncated or damaged."""
    where = "its header"
    try:
        data = np.asarray(np.memmap(path, np.uint8, mode="r"))
        cursor = _Cursor(data.data)
        if cursor.take("4sI") not in ((b"GGUF", 2), (b"GGUF", 3)):
            raise ValueError("it is not GGUF of version 2 or 3")
        tensor_count, metadata_count = cursor.take("QQ")
        metadata = dict(cursor.entry() for _ in range(metadata_count))
        places = [cursor.tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        start = -(-cursor.at // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in places:
            where = f"tensor {name}"
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]  # weights in a block, its bytes
            if shape[-1] % block:
                raise ValueError(f"its rows of {shape[-1]} weights are not whole blocks of {block}")
            row_bytes = shape[-1] // block * block_bytes
            rows = np.ndarray((*shape[:-1], row_bytes), np.uint8, data, start + offset)
            tensors[name] = RawTensor(GGMLQuantizationType(kind), shape, rows)
    except (struct.error, ValueError, TypeError, ArithmeticError, LookupError) as error:
        raise ModelError(f"{path} is truncated, damaged or no GGUF file: {where}: {error}") from error
    return metadata, tensors


class _Cursor:
    """Reads one thing after another. Raises struct.error at the end of the data."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def take(self, codes: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{codes}", self.data, self.at)
        self.at += struct.calcsize(f"<{codes}")
        return values

    def string(self) -> str:
        (size,) = self.take("Q")
        return self.take(f"{size}s")[0].decode("utf-8", "replace")

    def entry(self) -> tuple[str, Any]:
        """A metadata entry: key and value."""
        key, (kind,) = self.string(), self.take("I")
        if kind != ARRAY:
            return key, self.string() if kind == STRING else self.take(SCALARS[kind])[0]
        kind, count = self.take("IQ")
        if kind == STRING:
            return key, [self.string() for _ in range(count)]
        return key, list(self.take(f"{count}{SCALARS[kind]}"))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor's name, shape (the innermost dimension comes first in the file), type and offset."""
        name, (dimensions,) = self.string(), self.take("I")
        shape = self.take(f"{dimensions}Q")[::-1]
        return name, shape, *self.take("IQ")
