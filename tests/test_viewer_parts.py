"""The parts of the page stand in one scope: what one of them calls its own, no other may."""

import re
from collections import Counter
from pathlib import Path

from minipaged.viewer.page import PARTS

DECLARED = r"^(?:const|let|class|function\*?|async function)\s+"
NAME = re.compile(DECLARED + r"(?:\{([^}]*)\}|\[([^\]]*)\]|([\w$]+))", re.MULTILINE)


def names(text: str) -> list[str]:
    """What is declared at the beginning of a line."""
    found = [one or two or three for one, two, three in NAME.findall(text)]
    return [name.strip() for several in found for name in several.split(",")]


def test_no_name_is_two_parts_own():
    counts = Counter(name for file in PARTS.glob("*.js") for name in names(file.read_text(encoding="utf-8")))
    assert len(counts) > 50 and [name for name, count in counts.items() if count > 1] == []


def test_every_part_is_put_into_the_page():
    body = (PARTS / "replay.html").read_text(encoding="utf-8")
    parts = {file.name for file in PARTS.iterdir()} - {"replay.html"}
    assert parts == set(re.findall(r"^\{\{(.+\..+)\}\}$", body, re.MULTILINE))


def test_parts_can_be_read_in_one_sitting():
    long = {file.name: count for file in PARTS.iterdir() if (count := len(Path(file).read_text().splitlines())) > 250}
    assert long == {}
