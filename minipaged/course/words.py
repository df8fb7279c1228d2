"""Strangers' text, made fit to be shown: in a terminal, a table, a file of XML."""

LONGEST = 2000  # characters


def clean(text: object, longest: int = LONGEST) -> str:
    """Its beginning, without characters that command a terminal, or that no file can hold.

    >>> clean("a\\x1b[2Jb\\r\\nc\\ud800")
    'a?[2Jb\\nc?'
    """
    if not isinstance(text, str):
        return f"({type(text).__name__})"
    text = text[:longest].replace("\r\n", "\n")
    return "".join(letter if letter in "\n\t" or letter.isprintable() else "?" for letter in text)
