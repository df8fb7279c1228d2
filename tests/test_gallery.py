"""The gallery: its pages are what today's parts make of the runs in them, and each shows its lesson."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_model import make_folder

from minipaged import LLM
from minipaged.experiments import __main__ as command
from minipaged.experiments import gallery, gallery_pictures
from minipaged.experiments.gallery_pictures import NAMES
from minipaged.experiments.gallery_runs import RUNS, Ask, likeliest
from minipaged.viewer.page import page_of
from minipaged.viewer.trace import read_trace

FOLDER = Path(__file__).parents[1] / "chapters" / "gallery"
AGAIN = "run `make gallery`, which draws the pages again, and look at them"

each_run = pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)


def traces_in(page, folder):
    """(header, steps) of each run in a page, read as the traces that they were."""
    for number, data in enumerate(gallery.data_of(page)):
        file = folder / f"{number}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in [data["header"], *data["lines"]]))
        header, steps = read_trace(file)
        yield header, list(steps)


# --- what is committed ------------------------------------------------------------------------------------------


@each_run
def test_pages_are_made_of_todays_parts(run):
    page = FOLDER / f"{run.name}.html"
    same = page_of(gallery.data_of(page)) == page.read_text(encoding="utf-8")
    assert same, AGAIN  # what differs would fill pages
    assert page.stat().st_size < 300_000


def test_the_index_is_todays():
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == gallery.index(), AGAIN
    files = {f"{run.name}.{end}" for run in RUNS for end in ("html", "png")}
    assert {file.name for file in FOLDER.iterdir()} == {"README.md", *files}
    for run in RUNS:
        assert (FOLDER / f"../{run.chapter}.ipynb").exists()
        picture = (FOLDER / f"{run.name}.png").read_bytes()
        assert int.from_bytes(picture[16:20]) == 1280 and len(picture) < 150_000


def test_chapters_link_to_what_is_there():
    titles = {re.sub(r"[^a-z -]", "", run.title.lower()).replace(" ", "-"): run.chapter for run in RUNS}
    sources, link = (FOLDER / "../source").resolve().glob("[0-9]*.py"), r"gallery/README.md#([a-z-]+)"
    links = {(title, file.stem) for file in sources for title in re.findall(link, file.read_text())}
    assert links == {*titles.items()}


@each_run
def test_a_page_is_small_and_opens_where_its_lesson_is_seen(run, tmp_path):
    (header, steps), *beside = traces_in(FOLDER / f"{run.name}.html", tmp_path)
    assert (header["title"], header["lesson"]) == (run.title, run.lesson), "record it anew"
    assert 16 <= header["num_blocks"] == run.options["num_blocks"] <= 64 and 30 <= len(steps) <= 120
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))
    assert all(step.words for step in steps[:-1]) and all(step.seconds for step in steps)
    best = max(steps, key=run.shown)
    assert header["open_at"] == best.step and run.shown(best) > 0
    assert bool(beside) == bool(run.jobs)
    assert steps[-1].state["requests"] == {}


def at_its_best(name, folder):
    traces = list(traces_in(FOLDER / f"{name}.html", folder))
    return traces[0][1][traces[0][0]["open_at"] - 1], *(steps for _, steps in traces)


def test_samples_share_and_copy(tmp_path):
    step, _ = at_its_best("fork", tmp_path)
    first, second, third = (table.blocks for table in step.memory.tables)
    assert first[:-1] == second[:-1] == third[:-1] and len({first[-1], second[-1], third[-1]}) == 3
    assert len(step.did["copies"]) == 2


def test_beams_share_in_several_ways(tmp_path):
    step, _ = at_its_best("beams", tmp_path)
    numbers = {len(names) for names in step.memory.holders().values()}
    assert {1, 4} < numbers and step.did["copies"]


def test_who_was_swapped_out_comes_back(tmp_path):
    step, steps = at_its_best("swap", tmp_path)
    assert step.did["preempted"] == {"C": "swap"} and step.memory.swapped == ["C"]
    later = [other for other in steps if other.step > step.step and other.did.get("resumed") == ["C"]]
    assert len(later) == 1 and len(later[0].did["swap_in"]) == len(step.did["swap_out"])
    assert {"C": "length"} in [other.did.get("finished") for other in steps]


def test_beginnings_are_found_in_a_tree_that_has_branches(tmp_path):
    step, _ = at_its_best("prefixes", tmp_path)
    parents = list(step.state["index"].values())
    assert max(parents.count(block) for block in set(parents)) > 1, "a block that several follow"
    assert sum(step.did["found"].values()) >= 48 and step.state["usage"]["evicted"] > 0


def test_others_get_their_token_beside_each_piece(tmp_path):
    step, steps = at_its_best("chunks", tmp_path)
    assert sorted(own for _, own, _ in step.did["computed"].values()) == [1, 1, 16]
    pieces = [other.did["computed"]["C"][1] for other in steps if other.did["computed"].get("C", [0, 1])[1] > 1]
    assert len(pieces) > 5 and set(pieces[:-1]) == {16}


def test_half_of_a_contiguous_memory_is_free_and_somebody_waits(tmp_path):
    step, _, paged = at_its_best("fragments", tmp_path)
    held = {block for table in step.memory.tables for block in table.blocks}
    holes = "".join(" " if block in held else "." for block in range(32)).split()
    assert [len(hole) for hole in holes] == [8, 8] and step.memory.waiting == ["E"]
    assert paged[step.step - 1].memory.running == ["B", "D", "E"], "and from paged memory it runs"


# --- making it ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path_factory, monkeypatch):
    """Two runs of a tiny model: one of its own, and one from contiguous memory."""
    folder = str(make_folder(tmp_path_factory.mktemp("tiny")))
    asks = [Ask("late", likeliest(3), after=2), Ask("hello", likeliest(5))]
    one = replace(RUNS[0], options={"num_blocks": 40}, asks=asks, shown=lambda step: len(step.did.get("finished", ())))
    monkeypatch.setattr(gallery, "RUNS", (one, RUNS[-1]))
    monkeypatch.setattr(gallery, "engine", lambda run: LLM(folder, **run.options))


def test_it_is_recorded_and_drawn_again(small, tmp_path, capsys):
    out = tmp_path / "new" / "gallery"
    assert command.main(["gallery", "--out", str(out)]) == 0
    files = {file.name: file.read_bytes() for file in out.iterdir()}
    assert set(files) == {"README.md", "fork.html", "fragments.html"}
    assert f"{out / 'fork.html'}, {out / 'fragments.html'}" in capsys.readouterr().err
    [(header, steps)] = traces_in(out / "fork.html", tmp_path)
    assert [step.memory.running for step in steps] == [["A"], ["A"], ["A", "B"], ["A", "B"], []], "who comes when"
    assert header["open_at"] == 5
    (contiguous, _), (paged, _) = traces_in(out / "fragments.html", tmp_path)
    assert [one["settings"]["memory"] for one in (contiguous, paged)] == ["contiguous", "paged"]

    (out / "fork.html").write_text((out / "fork.html").read_text().replace("<main", "<br><main"))
    assert command.main(["gallery", "--out", str(out), "--redraw"]) == 0
    assert {file.name: file.read_bytes() for file in out.iterdir()} == files, "recorded once, the same times too"


@pytest.mark.skipif(not any(map(shutil.which, NAMES)), reason=f"pictures are made by one of {', '.join(NAMES)}")
def test_pictures(small, tmp_path):
    pytest.importorskip("playwright", reason="pictures are made with playwright: pip install playwright")
    assert command.main(["gallery", "--out", str(tmp_path), "--pictures"]) == 0
    for name in ("fork", "fragments"):
        picture = (tmp_path / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and int.from_bytes(picture[16:20]) == 1280 and len(picture) < 150_000


@pytest.mark.skipif(not any(map(shutil.which, NAMES)), reason=f"pictures are made by one of {', '.join(NAMES)}")
def test_there_is_no_picture_of_a_page_that_is_broken(tmp_path):
    pytest.importorskip("playwright", reason="pictures are made with playwright: pip install playwright")
    (tmp_path / "page.html").write_text("<script>nothing.at.all</script>")
    says = pytest.raises(ValueError, match="page.html doesn't work: nothing is not defined")
    with gallery_pictures.browser() as chromium, says:
        gallery_pictures.picture(chromium, tmp_path / "page.html", 900)
    assert not (tmp_path / "page.png").exists()


def refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    return error.splitlines()[-1]


def test_what_can_not_be_done_is_said(small, tmp_path, capsys, monkeypatch):
    out = ["--out", str(tmp_path)]
    assert "cannot read" in (error := refused(["gallery", "--redraw", *out], capsys)) and "fork.html" in error
    (tmp_path / "fork.html").write_text("<html>")
    assert "is no page of a run" in refused(["gallery", "--redraw", *out], capsys)
    monkeypatch.setattr(gallery_pictures.shutil, "which", lambda name: None)
    assert "by a browser, one of chromium, " in refused(["gallery", "--pictures", *out], capsys)
    assert "--pictures is for gallery, not for fig2" in refused(["fig2", "--pictures", *out], capsys)
    assert "--redraw is for gallery, not for live" in refused(["live", "--redraw", *out], capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["fork.html"], "and nothing is written"
