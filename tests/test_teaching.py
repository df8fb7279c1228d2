"""What the chapters are made with: plots, sources, exercises, loads, drawings of slots, and the builder itself."""

import copy
import doctest
import io
import json
import statistics
import sys
import tracemalloc
from dataclasses import dataclass, field

import nbformat
import numpy as np
import pytest
import torch
from chapter_builder import build
from exercise_grader import Anything, spoil
from PIL import Image

from kernels.triton_tiles import choose_splits
from minipaged.memory import BlockAllocator, HashCache, KVCacheManager, PageTable, blocks_for
from minipaged.teaching import attempt, checks, costs, counted, equal, loads, own, page, plots, show_source
from minipaged.terminal import draw, slots
from minipaged.terminal.snapshot import Snapshot


@pytest.mark.parametrize("module", [page, checks, costs, loads, slots, draw], ids=lambda module: module.__name__)
def test_doctests(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed


# --- slots ---------------------------------------------------------------------------------------------------


def test_figure_8_word_for_word():
    memory = KVCacheManager(num_blocks=8, block_size=4, free_order=[7, 1, 3])
    memory.allocate(1, 7)
    memory.fork(1, 2)
    memory.append({1: 1})
    words = ["Four", "score", "and", "seven", "years", "ago", "our"]
    snapshot = Snapshot.of(memory, {1: "A1", 2: "A2"})
    texts = {"A1": [*words, "fathers"], "A2": [*words, "never stored"]}
    drawn = slots.sheet(slots.logical_view(snapshot, texts), slots.physical_view(snapshot, texts)).plain
    assert [line.rstrip() for line in drawn.splitlines()] == [
        "LOGICAL blocks, and below them: logical -> physical",
        "A1  | Four score and seven | years ago our fathers |",
        "    | 0 -> 7               | 1 -> 3                |",
        "A2  | Four score and seven | years ago our . |",
        "    | 0 -> 7               | 1 -> 1          |",
        "",
        "PHYSICAL blocks: slots, and who holds them as which logical block",
        "0 | .       .       .       .       | free",
        "1 | years   ago     our     .       | A2[1]",
        "2 | .       .       .       .       | free",
        "3 | years   ago     our     fathers | A1[1]",
        "4 | .       .       .       .       | free",
        "5 | .       .       .       .       | free",
        "6 | .       .       .       .       | free",
        "7 | Four    score   and     seven   | A1[0]  A2[0]  shared",
    ]


def test_odd_tokens_and_cached_blocks():
    memory = KVCacheManager(num_blocks=2, block_size=2, cache=HashCache(2))
    memory.allocate(0, 2, prefix=memory.find([5, 6]))
    text = {"A": ["\n", " "]}
    assert "\\n" in slots.sheet(slots.physical_view(Snapshot.of(memory), text)).plain
    assert "| _ " in slots.sheet(slots.logical_view(Snapshot.of(memory), {"A": [" ", "b"]})).plain
    memory.publish(0, 2, lambda start, count: [5, 6])
    memory.free(0)
    rows = [line.plain.split("| ")[-1] for line in slots.physical_view(Snapshot.of(memory), {})]
    assert sorted(rows[1:]) == ["cached", "free"]


# --- sources and exercises -----------------------------------------------------------------------------------


def test_source_is_the_packages_own():
    shown = show_source(PageTable.slot, PageTable.room, KVCacheManager.fork)
    assert shown.count("# minipaged/memory/page_table.py") == 1 and "# minipaged/memory/kv_manager.py" in shown
    assert "return block * self.block_size + offset" in shown and "def room" in shown
    assert "def choose_splits" in show_source(choose_splits), "seen through functools.cache"
    assert not any(line.startswith(" def") for line in shown.splitlines())
    assert "<pre" in shown._repr_html_() and repr(shown) == shown


def solved(test_error):
    def test_thing(thing):
        if test_error:
            raise test_error

    return test_thing


@pytest.mark.parametrize("error, said", [
    (None, "thing: passed"),
    (AssertionError("3 is too few"), "thing: not right yet: 3 is too few"),
    (AssertionError(), "thing: not right yet"),
    (KeyError("a"), "thing: stopped by KeyError: 'a'"),
    (NotImplementedError("no such operation for this dtype"), "thing: stopped by NotImplementedError: no such"),
])  # fmt: skip
def test_attempt_says_how_it_went(capsys, error, said):
    attempt(solved(error), None)
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith(said)
    assert bool(rest) == (error is not None)
    assert not rest or "raise test_error" in rest[0]


def test_only_our_stub_is_not_solved_yet(capsys):
    def stub(x):
        raise NotImplementedError

    def no_such_operation(x):
        return torch.empty(2, device="meta").to_dense().to("cpu")

    for solution in stub, no_such_operation:
        attempt(lambda solution: solution(1), solution)
    stub_said, first, place = capsys.readouterr().out.splitlines()
    assert stub_said.endswith("not solved yet") and "stopped by" in first
    assert "in no_such_operation" in place and "to_dense" in place


def test_an_error_is_shown_at_the_readers_line(capsys):
    def beyond(x):
        return json.loads("{")  # goes wrong deep in a library

    def wrapped(x):
        try:
            beyond(x)
        except ValueError as error:
            raise RuntimeError("said by a library") from error

    for solution in beyond, wrapped:
        attempt(lambda solution: solution(1), solution)
        first, place = capsys.readouterr().out.splitlines()
        assert "JSONDecodeError" in first and 'json.loads("{")' in place and "in beyond" in place


# --- checks --------------------------------------------------------------------------------------------------

PLAIN = [0, 1, 1.5, True, None, "a", [1, 2], (1, [2.5]), {1: [2]}, {1, 2}, torch.ones(2), torch.ones(2).int()]


def test_what_equals_everything_is_equal_to_nothing():
    everything = Anything()
    for value in PLAIN:
        assert equal(value, copy.deepcopy(value)) and not equal(everything, value)
        assert not equal([everything], [value]) and not equal({1: everything}, {1: value})
    assert not equal({everything}, {1}) and not equal([everything, 2], [1, 2])


def test_values_of_other_kinds_are_not_equal():
    for i, one in enumerate(PLAIN):
        for other in PLAIN[:i]:
            assert not equal(one, other) and not equal(other, one)
    assert equal(1, 1.0) and not equal(1.0, 1), "an integer will do for a float"
    assert equal(np.int64(3), 3) and equal(torch.tensor(3), 3) and equal((1, 2), [1, 2])
    assert equal(1.0, 1.1, 0.2) and not equal(1.0, 1.1) and not equal(float("nan"), 1.0, 0.2)
    assert equal(torch.tensor([1.0, np.nan]), torch.tensor([1.0, np.nan]))
    assert not equal(torch.ones(1, 2), torch.ones(2)) and not equal(torch.ones(2).double(), torch.ones(2))
    assert equal(torch.ones(2) + 1e-6, torch.ones(2), 1e-5)


@pytest.mark.parametrize("argument", [
    [1], {1: 2}, {1}, torch.ones(2), (torch.ones(2), 3), [[1], [2]], {"a": [1]},
])  # fmt: skip
def test_own_arguments_stay_as_they_are(argument):
    def spoils(x):
        thing = x
        while isinstance(thing, tuple) or (isinstance(thing, (list, dict)) and isinstance(next(iter(thing)), list)):
            thing = thing[0]
        assert spoil(thing)
        return 1

    kept = copy.deepcopy(argument)
    with pytest.raises(AssertionError, match="changes its argument x"):
        own(spoils)(argument)
    same = copy.deepcopy(kept)
    assert own(spoils, changes=["x"])(same) == 1
    assert own(lambda x: x)(same) is same


def test_own_calls_nothing_of_the_package():
    def borrowed(n):
        return blocks_for(n, 16)

    def through_the_notebook(n):
        return borrowed(n)

    class Borrowed:
        def __init__(self):
            self.pool = BlockAllocator(4)

        def take(self, count):
            return self.pool.allocate(count)

    with pytest.raises(AssertionError, match="it calls blocks_for: write it yourself"):
        own(through_the_notebook)(3)
    assert own(borrowed, allow=[blocks_for])(17) == 2
    with pytest.raises(AssertionError, match="it calls .*through_the_notebook: write"):
        own(lambda n: through_the_notebook(n), forbid=[through_the_notebook])(3)
    by_way_of = lambda n: through_the_notebook(n)  # noqa: E731
    assert own(lambda n: by_way_of(n), allow=[by_way_of], forbid=[through_the_notebook])(17) == 2
    with pytest.raises(AssertionError, match="BlockAllocator"):
        own(Borrowed)()
    assert len(own(Borrowed, allow=[BlockAllocator])().take(3)) == 3


def test_own_classes_are_still_what_they_were():
    class Mine:
        def __init__(self, first):
            self.rows = [first]

        def add(self, row):
            self.rows.append(row)
            return self.count()

        def count(self):
            return len(self.rows)

        def spoils(self, row):
            row.clear()

    mine = own(Mine)([1])
    assert isinstance(mine, Mine) and mine.add([2]) == 2 and mine.rows == [[1], [2]]
    with pytest.raises(AssertionError, match="changes its argument row"):
        mine.spoils([3])
    with pytest.raises(AssertionError, match="changes its argument row"):
        mine.spoils([3])


def test_own_objects_may_change_themselves():
    @dataclass
    class Record:
        rows: list = field(default_factory=list)

        def add(self, row):
            self.rows.append(row)
            return len(self.rows)

        def spoils(self, row):
            row.clear()

    record = own(Record)()
    assert record.add(1) == 1 and record.add(2) == 2
    with pytest.raises(AssertionError, match="changes its argument row"):
        record.spoils([3])


def test_counted():
    def inner():
        pass

    with counted(inner, blocks_for) as calls:
        for _ in range(3):
            inner()
        blocks_for(3, 16)
    inner()
    assert calls == ["inner"] * 3 + ["blocks_for"]


# --- loads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [loads.SHAREGPT, loads.ALPACA], ids=["ShareGPT", "Alpaca"])
def test_loads_have_the_papers_means(lengths):
    jobs = loads.draw(lengths, 50_000, rate=4.0, seed=3)
    assert statistics.mean(job.prompt for job in jobs) == pytest.approx(lengths.prompt, rel=0.02)
    assert statistics.mean(job.output for job in jobs) == pytest.approx(lengths.output, rel=0.02)
    assert jobs[-1].arrival == pytest.approx(50_000 / 4.0, rel=0.02)
    assert min(min(job.prompt, job.output) for job in jobs) >= 1
    assert max(job.prompt + job.output for job in jobs) <= loads.MAX_LEN
    assert [job.arrival for job in jobs] == sorted(job.arrival for job in jobs)
    assert loads.draw(lengths, 9, 4.0, seed=3) == jobs[:9] != loads.draw(lengths, 9, 4.0, seed=4)


# --- plots ---------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch):
    """The pictures that a notebook would show: (PNG, alt text)."""
    pictures = []
    display = lambda image: pictures.append((image.data, image.alt))  # noqa: E731
    monkeypatch.setattr("IPython.display.display", display)
    return pictures


def draw_everything():
    with plots.figures("lines", "bars", "strips", alt="three plots") as (left, middle, right):
        plots.line(left, [1, 2, 3], [3, 1, 2], "one")
        plots.line(left, [1, 2, 3], [1, 2, 3], "two", dy=4)
        plots.note(left, 2, 2, "here")
        plots.bars(middle, {"ours": {"tokens": 60, "reserved": 39, "external": 1}, "theirs": {"tokens": 100}})
        plots.strips(right, {"memory": [(4, "tokens", "A"), (2, "free", ""), (2, "internal", "")]})
    with plots.figure("matrix", "keys", "queries") as axes:
        plots.matrix(axes, [[1.0, float("nan")], [0.25, 0.75]], ["a", "b"], ["a", "b"], form=".2f")


def test_plots_are_shown_alike_each_time_and_have_words(shown):
    draw_everything()
    draw_everything()
    assert [alt for _, alt in shown] == ["three plots", "matrix"] * 2
    assert shown[:2] == shown[2:], "the same bytes"
    for data, _ in shown:
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
        assert pixels[0, 0] == 255 and pixels.min() < 80, "ink on white paper"


def test_kinds_differ_in_grey():
    """Either by their grey, or by a hatch."""
    def grey(face):
        red, green, blue = (int(face[i : i + 2], 16) for i in (1, 3, 5))
        return 0.3 * red + 0.59 * green + 0.11 * blue

    memory = ["tokens", "shared", "reserved", "internal", "external", "free"]
    dresses = [plots.KINDS[kind] for kind in memory]
    for i, (face, hatch, _) in enumerate(dresses):
        for other, other_hatch, _ in dresses[:i]:
            assert hatch != other_hatch or abs(grey(face) - grey(other)) > 30


def test_a_plot_that_fails_is_not_shown(shown):
    with pytest.raises(ZeroDivisionError), plots.figure("never"):
        raise ZeroDivisionError
    assert not shown


# --- the builder ---------------------------------------------------------------------------------------------


def notebook(*cells):
    """Code cells as (source, output), run."""
    made = nbformat.v4.new_notebook()
    for number, (source, *outputs) in enumerate(cells):
        cell = nbformat.v4.new_code_cell(source, id=f"c00-{number}")
        cell.outputs = [output if isinstance(output, dict) else stream(output) for output in outputs]
        made.cells.append(cell)
    return made


def stream(text, name="stdout"):
    return nbformat.v4.new_output("stream", text=text, name=name)


def png(shade, spot=0):
    data = np.full((60, 60), shade, dtype=np.uint8)
    data[0, :spot] = 255 - shade
    file = io.BytesIO()
    Image.fromarray(data).save(file, format="png")
    return nbformat.v4.new_output("display_data", data={"image/png": build.base64.b64encode(file.getvalue()).decode()})


def test_differences_are_found():
    old = notebook(("a", "1\n"), ("b", png(0)))
    assert list(build.differences(old, copy.deepcopy(old))) == []
    assert len(list(build.differences(old, notebook(("a", "2\n"), ("b", png(0)))))) == 1
    assert len(list(build.differences(old, notebook(("a", "1\n"), ("b", png(200)))))) == 1
    assert len(list(build.differences(old, notebook(("a",), ("b", png(0)))))) == 1
    assert "cells" in next(build.differences(old, notebook(("a2", "1\n"), ("b", png(0)))))
    tagged = copy.deepcopy(old)
    tagged.cells[0].metadata.tags = ["measured"]
    assert "cells" in next(build.differences(old, tagged))
    assert list(build.differences(old, notebook(("a", "1\n"), ("b", png(0, spot=5))))) == [], "a few pixels"


def test_what_differs_by_luck_is_kept_as_it_was():
    old = notebook(("a", "1 s\n"), ("b", png(0)), ("c", "right\n"))
    old.cells[0].metadata.tags = ["measured"]
    new = notebook(("a", "2 s\n"), ("b", png(0, spot=5)), ("c", "wrong\n"))
    new.cells[0].metadata.tags = ["measured"]
    build.keep_luck(old, new)
    kept = [cell.outputs == before.outputs for cell, before in zip(new.cells, old.cells, strict=True)]
    assert kept == [True, True, False]
    anew = notebook(("a", "2 s\n"))
    anew.cells[0].metadata.tags = ["measured"]
    build.keep_luck(old, anew, measure=True)
    assert anew.cells[0].outputs[0].text == "2 s\n"


def test_cells_that_read_the_same_keep_their_own_outputs():
    old = notebook(("step()", png(0)), ("step()", png(255)))
    new = notebook(("step()", png(0, spot=5)), ("step()", png(255, spot=5)))
    build.keep_luck(old, new)
    assert [cell.outputs for cell in new.cells] == [cell.outputs for cell in old.cells]


@pytest.mark.parametrize("output, said", [
    (stream("careful", "stderr"), "writes to stderr"),
    (nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[]), "shows an error: ValueError: no"),
    (stream("saved to /home/ann/x"), "'/home/'"),
    (nbformat.v4.new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {}}), "widget-view"),
])  # fmt: skip
def test_what_must_not_be_shown(output, said):
    with pytest.raises(build.ChapterError, match=said):
        build.look_over(notebook(("a", output)).cells[0])


def test_unknown_chapters_are_named(capsys):
    assert build.main(["99"]) == 2
    said = capsys.readouterr().err
    assert "no chapter '99'" in said and "01_from_weights_to_text" in said
    with pytest.raises(SystemExit) as exit_:
        build.main(["--no-such-flag"])
    assert exit_.value.code == 2


def test_whoever_looks_at_a_number_is_counted():
    for look in (lambda n: n == 3, hash, str, lambda n: n + 1, lambda n: sorted([n, n]),
                 lambda n: n.to_bytes(8, "big"), lambda n: f"{n}", lambda n: {n: 1}):  # fmt: skip
        looks = []
        look(costs.Watched(3, looks))
        assert looks, look
    looks = []
    [costs.Watched(3, looks)].copy()
    assert not looks


def test_what_runs_too_long_is_broken_off():
    def total(n):
        return sum(i for i in range(n))

    before = sys.gettrace()
    assert costs.patient(total, 1000)(10) == 45
    with pytest.raises(AssertionError, match="after 1000 lines it is still at work"):
        costs.patient(total, 1000)(10**15)
    assert sys.gettrace() is before


def test_memory_that_a_call_needs_on_the_way():
    answer, room = costs.bytes_taken(lambda: len([0] * 100_000))
    assert answer == 100_000 and 800_000 <= room < 900_000
    assert costs.bytes_taken(lambda: 5)[1] < 1000 and not tracemalloc.is_tracing()


@pytest.mark.parametrize("source, said", [
    ("1 / 0", "c00-7 fails.*ZeroDivisionError"),
    ("import os; os._exit(1)", "c00-7 does not end well"),
])  # fmt: skip
def test_a_cell_that_fails_is_named(source, said):
    cell = nbformat.v4.new_code_cell(source, id="c00-7")
    with pytest.raises(build.ChapterError, match=f"(?s){said}"):
        build.run(nbformat.v4.new_notebook(cells=[cell]))


def test_cells_that_cannot_be_run_again_are_named():
    sources = "jobs = [1]", "jobs.pop()", "print(1)"
    cells = [nbformat.v4.new_code_cell(source, id=f"c00-{i}") for i, source in enumerate(sources)]
    book = nbformat.v4.new_notebook(cells=cells)
    with pytest.raises(build.ChapterError, match="1 cells fail: c00-1; the first: cell c00-1 fails:\njobs.pop"):
        build.run(book, again=1)
    assert book.cells[2].outputs[0].text == "1\n" and build.run(book).cells == book.cells
