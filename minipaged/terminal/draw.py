"""Draws the memory as text: the map of blocks, the page tables, the account.

Plain data in, lines of text out; nothing here runs an engine. The same pictures serve the live view
(watch.py), the redrawing of a trace (trace.py) and the chapters. The lines are rich's Text: coloured in a
terminal or a notebook, and `line.plain` says the same without colour. Only ASCII is used.
"""

from collections.abc import Iterable, Iterator

from rich.text import Text

from minipaged.terminal.snapshot import Snapshot, Table, request_of

# Light, since they carry black text. Requests take every third, their sequences the ones behind it.
COLORS = ("turquoise2", "chartreuse3", "khaki1", "orchid", "light_sky_blue1", "light_salmon1",
          "gold1", "plum2", "light_green", "cornflower_blue", "orange1", "cyan1")  # fmt: skip
CACHED = ":"  # a free block that can still be found
SHARED, FREE, HEADING = "bold reverse", "dim", "bold"


def picture(
    snapshot: Snapshot,
    title: str = "",
    events: Iterable[str] = (),
    width: int = 80,
    height: int | None = None,
) -> Text:
    """One moment on one screen: at most `height` lines, or as many as it takes, none longer than `width`.

    Where not everything fits it says how much is left out.
    """
    head = [headline(snapshot, title), *account(snapshot, width), Text()]
    tail = [Text(event if len(event) <= width else event[: width - 3] + "...") for event in events]
    tail = [Text(), *tail] if tail else []
    if height is None:
        pool, tables = block_map(snapshot, width), page_tables(snapshot, width)
    else:
        space = max(2, height - len(head) - len(tail) - 3)  # without the two legends and the gap between
        for_tables = -(-len(snapshot.tables) // 2)  # lines that they need in two columns
        pool = block_map(snapshot, width, rows=max(1, space // 2, space - for_tables))
        tables = page_tables(snapshot, width, rows=max(1, space + 1 - len(pool)))
    lines = [*head, *pool, Text(), *tables, *tail]
    for line in lines:
        line.truncate(width, overflow="crop")
    return Text("\n").join(lines[:height])


def headline(snapshot: Snapshot, title: str) -> Text:
    """The title, and which requests run, wait, and are swapped out."""
    line = Text().append(title, HEADING)
    many = len(snapshot.running + snapshot.waiting + snapshot.swapped) > 12
    for word in ("running", "waiting", "swapped"):
        names = getattr(snapshot, word)
        line.append(f"  {word} ").append(_some(names, 3 if many else len(names)) or "-", HEADING)
    return line


def account(snapshot: Snapshot, width: int = 80) -> list[Text]:
    """The pool as a bar, and its numbers: two lines."""
    usage = snapshot.usage
    words = f"] {usage.used} of {usage.num_blocks} blocks in use, {usage.shared} of them shared"
    words += f", {usage.cached} cached" if usage.cached else ""
    room = max(10, width - len(words) - 1)
    used, shared = (-(-room * count // max(1, usage.num_blocks)) for count in (usage.used, usage.shared))
    bar = Text("[").append("*" * shared, SHARED).append("#" * (used - shared))
    cached = min(room - used, -(-room * usage.cached // max(1, usage.num_blocks)))
    bar.append(CACHED * cached + "." * (room - used - cached), FREE)
    numbers = (
        f"{usage.tokens_stored} tokens, waste {usage.waste_percent:.0f} %, "
        f"sharing saves {usage.blocks_saved_by_sharing} | copied {usage.copies}, "
        f"swapped {usage.swapped_out_blocks} out {usage.swapped_in_blocks} in"
    )
    return [bar.append(words), Text(numbers)]


# --- the map of blocks --------------------------------------------------------------------------------------


def block_map(snapshot: Snapshot, width: int = 80, rows: int | None = None) -> list[Text]:
    """The pool, block by block, under a line that explains it; rows: how many lines there are for the blocks.

    Rows that are wholly free are folded. If that is not enough, one character stands for several blocks.
    """
    holders = snapshot.holders()
    labels = {block: _label(names) for block, names in holders.items()}
    cell = 1 + max([2, *map(len, labels.values())])
    margin = len(str(snapshot.usage.num_blocks)) + 2
    per_row = _tens((width - margin) // cell)
    lines: list[Text] = []
    labels |= dict.fromkeys(snapshot.cached, CACHED)
    for row in _rows(snapshot.usage.num_blocks, per_row, labels):
        line = Text(f"{row.start:>{margin - 1}} ")
        if len(row) > per_row:
            line.append(f"... {len(row)} free blocks, to {row[-1]}", FREE)
        for block in row if len(row) <= per_row else ():
            _put_cell(line, labels.get(block, "."), holders.get(block, []), cell)
        lines.append(line)
    if rows is not None and len(lines) > rows:
        return _coarse_map(snapshot, width, rows)
    return [_map_legend(snapshot, [_label(names) for names in holders.values()]), *lines]


def _rows(total: int, per_row: int, used: Iterable[int]) -> Iterator[range]:
    """The blocks of each row; neighbouring rows without a used block are joined."""
    last = (total - 1) // per_row
    start = 0  # of the rows that were not given out yet
    for row in [*sorted({block // per_row for block in used}), last + 1]:
        free = range(start * per_row, min(row * per_row, total))
        if free:
            yield free
        if row <= last:
            yield range(row * per_row, min((row + 1) * per_row, total))
        start = row + 1


def _map_legend(snapshot: Snapshot, labels: list[str]) -> Text:
    star = min((label for label in labels if "*" in label), default="A*")
    alone = min((label for label in labels if "*" not in label), default="A1")
    sharers = "several" if star == "**" else f"several of {star[:-1]}'s"
    words = f"{alone} held by sequence {alone}, {star} shared by {sharers}, . free"
    if snapshot.cached:
        words = f"{alone} of sequence {alone}, {star} of {sharers}, {CACHED} cached, . free"
    return Text().append("BLOCKS", HEADING).append(f" of {snapshot.usage.block_size} tokens: {words}")


def _put_cell(line: Text, label: str, names: list[str], cell: int) -> None:
    style = FREE if not names else SHARED if len(names) > 1 else f"black on {color(names[0])}"
    line.append(" ").append(label, style).append(" " * (cell - 1 - len(label)))


def _coarse_map(snapshot: Snapshot, width: int, rows: int) -> list[Text]:
    """One character for `each` blocks in a row: a pool that is too large to be drawn block by block."""
    total, holders = snapshot.usage.num_blocks, snapshot.holders()
    cached = set(snapshot.cached)
    margin = len(str(total)) + 2
    per_row = _tens(width - margin)
    each = max(1, -(-total // (rows * per_row)))
    lines = []
    for start in range(0, total, per_row * each):
        line = Text(f"{start:>{margin - 1}} ")
        for first in range(start, min(start + per_row * each, total), each):
            blocks = range(first, min(first + each, total))
            held = [holders[block] for block in blocks if block in holders]
            line.append(*_coarse_cell(held, not cached.isdisjoint(blocks)))
        lines.append(line)
    last = "# of AA or later" if any(len(request_of(table.name)) > 1 for table in snapshot.tables) else ". free"
    last = f"{CACHED} cached, {last}" if cached else last
    words = f", {each} to a sign: A of request A, a some of them shared, + of several, {last}"
    return [Text().append("BLOCKS", HEADING).append(words), *lines]


def _coarse_cell(held: list[list[str]], cached: bool) -> tuple[str, str]:
    requests = {request_of(name) for names in held for name in names}
    if len(requests) != 1:
        return ("+", SHARED) if requests else (CACHED if cached else ".", FREE)
    request = requests.pop()
    letter = request if len(request) == 1 else "#"
    return letter.lower() if any(len(names) > 1 for names in held) else letter, f"black on {color(request)}"


def _label(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    requests = {request_of(name) for name in names}
    return f"{requests.pop()}*" if len(requests) == 1 else "**"


# --- page tables --------------------------------------------------------------------------------------------


def page_tables(snapshot: Snapshot, width: int = 80, rows: int | None = None) -> list[Text]:
    """The page table of each sequence under a line that explains them, in two columns if there are many."""
    size = snapshot.usage.block_size
    legend = Text().append("PAGE TABLES", HEADING)
    legend.append(f" tokens: blocks in order, * shared, (n/{size}) only n slots filled")
    tables, more = snapshot.tables, 0
    columns = 2 if rows is not None and len(tables) > rows and width >= 60 else 1
    if rows is not None and len(tables) > rows * columns:
        more = len(tables) - rows * columns + 1
        tables = tables[:-more]
    shared = {False: _shared(snapshot, False), True: _shared(snapshot, True)}
    column = width // columns
    name_width = max([1, *(len(table.name) for table in tables)])
    cells = [_table_line(table, size, shared[table.swapped], name_width, column - 1) for table in tables]
    if more:
        cells.append(Text(f"and {more} more sequences", FREE))
    height = -(-len(cells) // columns)
    lines = cells[:height]
    for left, right in zip(lines, cells[height:], strict=False):
        left.append(" " * (column - len(left))).append(right)
    return [legend, *lines]


def _table_line(table: Table, size: int, shared: set[int], name_width: int, width: int) -> Text:
    line = Text().append(table.name, f"black on {color(table.name)}")
    line.append(f"{table.num_tokens:>{name_width - len(table.name) + 6}}:")
    line.append(" on the CPU" if table.swapped else "", FREE)
    filled = table.num_tokens - (len(table.blocks) - 1) * size
    words = [f"{block}*" if block in shared else str(block) for block in table.blocks]
    if words and filled < size:
        words[-1] += f"({filled}/{size})"
    for word in _elide(words, width - len(line)):
        line.append(" ").append(word, "bold" if "*" in word else "")
    line.truncate(width, overflow="crop")
    return line


def _shared(snapshot: Snapshot, swapped: bool) -> set[int]:
    return {block for block, names in snapshot.holders(swapped).items() if len(names) > 1}


def _elide(words: list[str], width: int) -> list[str]:
    """All words, if they fit with a space before each; or the first and the last, with the number left out.

    >>> _elide(["10", "11", "12", "13", "14(3/16)"], 20)
    ['10', '..3..', '14(3/16)']
    """
    if sum(len(word) + 1 for word in words) <= width or len(words) < 3:
        return words
    room = width - len(f" ..{len(words)}.. {words[-1]}")
    kept: list[str] = []
    while (room := room - len(words[len(kept)]) - 1) >= 0:
        kept.append(words[len(kept)])
    return [*kept, f"..{len(words) - len(kept) - 1}..", words[-1]]


# --- small things -------------------------------------------------------------------------------------------


def color(name: str) -> str:
    """The colour of a sequence or a request, always the same for the same name.

    >>> color("A1"), color("A2"), color("B1"), color("A")
    ('turquoise2', 'chartreuse3', 'orchid', 'turquoise2')
    """
    request = request_of(name)
    place = 0
    for letter in request:
        place = 26 * place + ord(letter) - ord("A")
    return COLORS[(3 * place + int(name[len(request) :] or 1) - 1) % len(COLORS)]


def _some(names: list[str], most: int) -> str:
    more = [f"+{len(names) - most}"] if len(names) > most else []
    return " ".join([*names[:most], *more])


def _tens(count: int) -> int:
    """As many cells in a row as fit, but a round number, so that blocks are easily counted."""
    return count // 10 * 10 if count >= 10 else max(1, count)
