"""Reads the header of a GGUF file, llama.cpp's format: everything but the weights themselves.

    "GGUF" | version u32 | number of tensors u64 | number of metadata entries u64
    metadata:  key, type, value                          of every entry
    tensors:   name, dimensions, type, offset            of every tensor
    padding to general.alignment (32), then the tensors' bytes

Numbers are little-endian, a string is a u64 length and UTF-8, an array is an element type, a u64 count and the
elements. The gguf package has a reader, too; it takes seconds for a vocabulary of 49,152 tokens, which is 30
times as long, and a damaged count can make it run for ever. Here each length is checked before it is used.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from minipaged.models.config import ModelError

# The value types, as struct has them.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass
class TensorInfo:
    """Where a tensor lies in the file. Its bytes are rows, one for each index of all but the last dimension."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # as PyTorch has it; the file has the innermost dimension first
    row_bytes: int
    start: int  # of its first byte

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape[:-1]) * self.row_bytes


def read_header(data: memoryview, path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The metadata and the tensors. Raises ModelError naming the file, and the tensor that is cut off or broken."""
    cursor = _Cursor(data, path)
    if bytes(cursor.take(4)) != b"GGUF" or cursor.scalar("I") not in (2, 3):
        raise ModelError(f"{path} is not a GGUF file of version 2 or 3")
    tensor_count, metadata_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = dict(cursor.entry() for _ in range(metadata_count))
    tensors = dict(cursor.tensor() for _ in range(tensor_count))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or len(tensors) < tensor_count:
        raise ModelError(f"{path} is damaged: its alignment is {alignment!r:.60}, or it has a tensor twice")
    for name, info in tensors.items():
        info.start += -(-cursor.at // alignment) * alignment
        if info.end > len(data):
            raise ModelError(f"{path} is truncated: it ends before the end of tensor {name}; fetch or copy it again")
    return metadata, tensors


class _Cursor:
    """Reads one thing after another."""

    def __init__(self, data: memoryview, path: Path):
        self.data, self.path, self.at = data, path, 0

    def take(self, size: int) -> memoryview:
        start = self.at
        self.at += size
        if self.at > len(self.data):
            raise ModelError(f"{self.path} is truncated or damaged: it ends inside its header")
        return self.data[start : self.at]

    def scalar(self, code: str) -> Any:
        return self.scalars(code, 1)[0]

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def string(self) -> str:
        size = int.from_bytes(self.take(8), "little")
        return str(self.take(size), "utf-8", "replace")

    def entry(self) -> tuple[str, Any]:
        """One metadata entry: key and value."""
        return self.string(), self.value(self.scalar("I"))

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.scalar("I"), self.scalar("Q")
            if kind in SCALARS:
                return list(self.scalars(SCALARS[kind], count))
            if kind == STRING:
                return [self.string() for _ in range(count)]
        raise ModelError(f"{self.path} is damaged: its metadata holds a value of type {kind}")

    def tensor(self) -> tuple[str, TensorInfo]:
        name, shape = self.string(), self.scalars("Q", self.scalar("I"))[::-1]
        kind, offset = self.scalar("I"), self.scalar("Q")
        block, block_bytes = GGML_QUANT_SIZES.get(kind, (1, 0))  # weights in a block, and its bytes
        if not block_bytes or not shape or shape[-1] % block:
            raise ModelError(f"{self.path} is damaged: tensor {name} has type {kind} and shape {shape}")
        return name, TensorInfo(GGMLQuantizationType(kind), shape, shape[-1] // block * block_bytes, offset)
