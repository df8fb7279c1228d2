"""By what two engines know that they have the same weights, though neither reads those of the other."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

PIECES, BYTES = 256, 4096  # of each file: a megabyte, whatever its size


def fingerprint(files: Iterable[Path]) -> str:
    """Of the sizes of files, and of pieces of them that lie evenly: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in files:
        last = max(0, (size := file.stat().st_size) - BYTES)
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as data:
            for piece in range(PIECES):
                data.seek(last * piece // (PIECES - 1))
                digest.update(data.read(BYTES))
    return digest.hexdigest()[:16]
