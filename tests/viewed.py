"""Runs of the recall model that are traced, with what was true after each step; and what a page shows of them."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from minipaged.requests.request import Request
from minipaged.scheduling.plan import StepOutput, StepPlan
from minipaged.terminal.snapshot import letters
from minipaged.viewer.trace import TraceWriter
from tests.recall import Run, scenario

Facts = dict[str, Any]


class Recorded(Run):
    """A schedule that writes a trace. truths: what was so after each of its steps, by the memory's own account.

    A step takes half a second of a clock that else stands.
    """

    def __init__(self, seed: int, path: Path, **header: Any):
        super().__init__(scenario(seed))
        self.path, self.now, self.truths = path, 0.0, list[Facts]()
        self._output: StepOutput | None = None
        with open(path, "w", encoding="utf-8") as file:
            header = {"model": "recall", "block_bytes": 1, "max_model_len": 100, "settings": {}, **header}
            self._writer = TraceWriter(self, file, header, text, seconds=lambda: 0.25, clock=lambda: self.now)  # type: ignore[arg-type]
            self.run()

    def add(self, request: Request) -> None:
        request.metrics.arrival_time = self.now
        super().add(request)

    def step(self, fails: bool = False) -> None:
        """Of a step that failed a trace says nothing, as with an engine."""
        execute, outputs = self.runner.execute, list[StepOutput]()
        self.runner.execute = lambda plan: outputs.append(execute(plan)) or outputs[-1]  # type: ignore[func-returns-value,method-assign]
        super().step(fails)
        self.runner.execute = execute  # type: ignore[method-assign]
        self.now += 0.5
        if not fails:
            self._writer(self.plans[-1], outputs[-1])
            self.truths.append(truth(self, self.plans[-1]))


def text(tokens: list[int]) -> str:
    return "".join(map(word, tokens))


def word(token: int) -> str:
    return f" w{token}"


# --- what is so ---------------------------------------------------------------------------------------------------


def truth(run: Recorded, plan: StepPlan) -> Facts:
    """From the memory, its reference counts, and the scheduler's queues; nothing of it comes from a trace."""
    memory, scheduler = run.memory, run.scheduler
    queues = {which: getattr(scheduler, which) for which in ("running", "waiting", "swapped")}
    names = {seq.seq_id: name_of(one, seq.index) for queue in queues.values() for one in queue for seq in one.live}
    tables = [(names[i], memory.num_tokens(i), memory.block_table(i), memory.is_swapped(i)) for i in memory.sequences()]
    texts = [(names[i], "".join(map(word, tokens_of(run, i)))) for i in memory.sequences()]
    pools = {False: memory._gpu.allocator, True: memory._cpu.allocator}
    size, usage = memory.block_size, memory.usage()
    slots = usage.used * size
    return {
        "step": plan.step,
        "time": run.now,
        "tables": sorted(tables),
        "texts": sorted(texts),
        "gpu": [cell(block, tables, size, False) for block in range(memory.num_blocks)],
        "cpu": [cell(block, tables, size, True) for block in range(pools[True].num_blocks)],
        "references": [[pool.ref_count(block) for block in range(pool.num_blocks)] for pool in pools.values()],
        "cached": memory.idle_blocks(),
        "queues": {which: [about(one) for one in queue] for which, queue in queues.items()},
        "counts": {
            **{name: str(getattr(usage, name)) for name in USED},
            "waste": f"{100 * (slots - usage.tokens_stored) / slots if slots else 0:.2f} %",
            "preemptions": str(sum(scheduler.num_preemptions.values())),
            "found": str(scheduler.admission.prefixes.found),
            "tokens": str(plan.num_tokens),
        },
        "freed": sorted(set(plan.freed)),
    }


USED = ("used", "shared", "cached", "tokens_stored", "blocks_saved_by_sharing", "copies", "swapped_out_blocks",
        "swapped_in_blocks", "evicted")  # fmt: skip


def tokens_of(run: Run, seq_id: int) -> list[int]:
    seq = run.scheduler.sequences[seq_id]
    return seq.tokens(0, len(seq))


def name_of(request: Request, index: int) -> str:
    """A sample is named by its place; a beam's name says only whose it is: "B*"."""
    several = max(len(request.sequences), request.width) > 1
    return letters(request.arrival) + ("" if not several else "*" if request.search else str(index + 1))


def about(request: Request) -> tuple[str, int, int]:
    return letters(request.arrival), len(request.prompt_token_ids), request.num_output_tokens


def cell(block: int, tables: list[tuple[str, int, list[int], bool]], size: int, swapped: bool) -> tuple[list[str], int]:
    """Who holds a block, and how many of its slots are filled."""
    mine = [(name, tokens, blocks.index(block)) for name, tokens, blocks, where in tables
            if where == swapped and block in blocks]  # fmt: skip
    filled = {min(size, max(0, tokens - place * size)) for _, tokens, place in mine}
    return sorted(name for name, *_ in mine), max(filled, default=0)


# --- what is shown ------------------------------------------------------------------------------------------------

READ = """(places) => {
  const all = (root, selector) => [...root.querySelectorAll(selector)];
  const texts = (root, selector) => all(root, selector).map((element) => element.textContent);
  const tables = (run) => all(run, ".tables [data-sequence]").map((row) => ({
    name: row.dataset.sequence, about: texts(row, ".small")[0], blocks: texts(row, ".entry"),
    shared: all(row, ".entry").map((entry) => entry.classList.contains("shared")),
  }));
  const cells = (run, which) => all(run, `.pool.${which} .cell[data-block]`).map((cell) => ({
    block: Number(cell.dataset.block), kinds: [...cell.classList], label: cell.getAttribute("aria-label"),
  }));
  const queue = (run, which) => ({
    number: texts(run, `.queue.${which} .number`)[0],
    rows: all(run, `.queue.${which} li[data-request]`).map((row) => [row.dataset.request, row.textContent]),
  });
  const counts = (run) => all(run, ".counts [data-count]").map((value) => [value.dataset.count, value.textContent]);
  const said = (number) => Object.keys(views[number].moment.state.tables).map((name) =>
    [name, views[number].moment.wordsOf(name).join("")]);
  const read = (run, number) => ({
    where: document.getElementById("where").textContent,
    tables: tables(run), texts: said(number), gpu: cells(run, "gpu"), cpu: cells(run, "cpu"),
    queues: { running: queue(run, "running"), waiting: queue(run, "waiting"), swapped: queue(run, "swapped") },
    counts: Object.fromEntries(counts(run)),
  });
  return places.map((place) => { player.go(place); return all(document, ".run").map(read); });
}"""


def shown(page: Any, places: list[int]) -> list[list[Facts]]:
    """What the page shows at these places, one after another: for each a list, one for each of its runs."""
    return page.evaluate(READ, places)


def beamless(name: str, beams: set[str]) -> str:
    """
    >>> beamless("B12", {"B"}), beamless("A1", {"B"}), beamless("B", {"B"})
    ('B*', 'A1', 'B')
    """
    request = name.rstrip("0123456789")
    return f"{request}*" if request in beams and name != request else name


def compare(seen: Facts, so: Facts, beams: set[str]) -> None:
    """AssertionError if the page shows anything but what is so. beams: the requests that search."""
    assert so["step"] is None or seen["where"].startswith(f"step {so['step']} of "), seen["where"]
    assert len({row["name"] for row in seen["tables"]}) == len(seen["tables"]), "two tables have one name"
    assert sorted(table_in(row, beams) for row in seen["tables"]) == so["tables"]
    assert sorted((beamless(name, beams), text) for name, text in seen["texts"]) == so["texts"]
    for which, swapped in (("gpu", False), ("cpu", True)):
        compare_cells(seen, so, which, swapped, beams)
    assert [cell["block"] for cell in seen["gpu"] if "cached" in cell["kinds"]] == sorted(so["cached"])
    free = {block for block, (names, _) in enumerate(so["gpu"]) if not names}
    freed = {cell["block"] for cell in seen["gpu"] if "freed" in cell["kinds"]}
    assert freed & free == free.intersection(so["freed"])
    for which, requests in so["queues"].items():
        rows = [(name, *map(int, re.search(r"(\d+) \+ (\d+) tokens", text).groups()))  # type: ignore[union-attr]
                for name, text in seen["queues"][which]["rows"]]  # fmt: skip
        assert (int(seen["queues"][which]["number"]), rows) == (len(requests), requests)
    shown, real = ({name: counts.get(name) for name in so["counts"]} for counts in (seen["counts"], so["counts"]))
    wastes = [float(counts.pop("waste").removesuffix(" %")) for counts in (shown, real)]
    assert shown == real and abs(wastes[0] - wastes[1]) <= 0.051, "halves are rounded up, or to even numbers"


def table_in(row: Facts, beams: set[str]) -> tuple[str, int, list[int], bool]:
    tokens, _, where = row["about"].partition(",")
    assert where in ("", " on the CPU"), where
    return beamless(row["name"], beams), int(tokens.split()[0]), [*map(int, row["blocks"])], where != ""


def compare_cells(seen: Facts, so: Facts, which: str, swapped: bool, beams: set[str]) -> None:
    cells, references = seen[which], so["references"][swapped]
    assert [cell["block"] for cell in cells] == [*range(len(so[which]))]
    tables = [row for row in seen["tables"] if (", on the CPU" in row["about"]) == swapped]
    for cell, (holders, filled), number in zip(cells, so[which], references, strict=True):
        block, names = cell["block"], holders_in(cell["label"])
        assert sorted(names) == sorted(row["name"] for row in tables if str(block) in row["blocks"]), "cells and tables"
        assert sorted(beamless(name, beams) for name in names) == holders and len(names) == number, cell
        slots = re.search(r"(\d+) of (\d+) slots filled", cell["label"])
        assert (int(slots[1]) if slots else 0) == filled, cell
        kinds = {kind: kind in cell["kinds"] for kind in ("held", "shared")}
        assert kinds == {"held": number > 0, "shared": number > 1}, cell
    for row in tables:
        assert row["shared"] == [references[int(block)] > 1 for block in row["blocks"]], row


def holders_in(label: str) -> list[str]:
    """
    >>> holders_in("Block 3: shared by 2: A1, A2; 4 of 4 slots filled"), holders_in("Block 3: free")
    (['A1', 'A2'], [])
    """
    found = re.search(r"(?:held by|shared by \d+:) ([A-Z]+\d*(?:, [A-Z]+\d*)*)", label)
    return found[1].split(", ") if found else []


def beams_of(run: Run) -> set[str]:
    return {letters(request.arrival) for request in run.given.requests if request.search}


def happened(path: Path) -> Counter[str]:
    """How often a trace tells of each thing that a step can do."""
    lines = path.read_text("utf-8").splitlines()[1:]
    return Counter(name for line in lines for name in json.loads(line).get("did", {}))
