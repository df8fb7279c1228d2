"""The page of a run shows at every step what was so: compared with the memory itself, on random schedules."""

import random
from collections import Counter

import pytest

from minipaged.viewer import page as pages
from minipaged.viewer.page import page_of, run_of
from tests.browser import Tabs, api, chromium, needed
from tests.viewed import Recorded, beams_of, compare, happened, shown

pytestmark = needed

SEEDS = (1303, 521, 781, 30, 63, 1499, 1410, 1085, 416, 929)  # of schedules that have, together, all of this:
SEEN = (
    "copies", "swap", "swapped_in", "recompute", "recompute several", "again after a preemption", "chunks of a prompt",
    "forked_samples", "forked_beams", "searches", "found", "recovered", "evicted", "computed twice", "overtaken",
    "guessed", "right", "branches", "winners", "ended in the middle", "ended: stop", "ended: length", "ended: cut",
    "aborted waiting", "aborted running", "aborted swapped", "aborted beams", "resets", "failed steps",
)  # fmt: skip
DONE = ("computed", "admitted", "found", "preempted", "resumed", "finished", "copies", "swap_out", "swap_in", "freed",
        "evicted", "guessed")  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def tabs(browser):
    tabs = Tabs(browser)
    yield tabs
    tabs.close()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    return {seed: Recorded(seed, folder / f"seed-{seed}.jsonl") for seed in SEEDS}


@pytest.fixture
def opened(tabs, tmp_path):
    def open_one(*paths):
        (tmp_path / "page.html").write_text(page_of([run_of(path) for path in paths]), encoding="utf-8")
        return tabs.open(f"file://{tmp_path}/page.html", offline=True)

    yield open_one
    assert tabs.wrong == []


def test_the_schedules_have_every_mechanism(recorded):
    seen, did = Counter(), Counter()
    for run in recorded.values():
        seen.update(run.seen)
        did.update(happened(run.path))
    assert not [name for name in SEEN if not seen[name]] and not [name for name in DONE if not did[name]]
    assert max(len(run.truths) for run in recorded.values()) > 2 * 50, "several keyframes"
    assert {run.given.cache for run in recorded.values()} == {"hash", "radix", "none"}


@pytest.mark.parametrize("seed", SEEDS)
def test_every_step_shows_what_was_so(recorded, opened, seed):
    """One after another, and then in any order."""
    run = recorded[seed]
    page, there = opened(run.path), [*range(len(run.truths))]
    assert page.evaluate("player.last + 1") == len(there)
    places = there + random.Random(seed).sample(there, len(there))
    for place, [seen] in zip(places, shown(page, places), strict=True):
        try:
            compare(seen, run.truths[place], beams_of(run))
        except AssertionError as error:
            error.add_note(f"seed {seed}, place {place}")
            raise


def test_two_runs_show_what_was_so_in_each(recorded, opened):
    """The shorter one stays at its end; in time, each is where it was at that time."""
    runs = [recorded[seed] for seed in (1085, 1303)]
    page, most = opened(*(run.path for run in runs)), max(len(run.truths) for run in runs)
    places = [[min(place, len(run.truths) - 1) for run in runs] for place in range(most)]
    compare_all(shown(page, [*range(most)]), places, runs)
    page.select_option("#mode", "time")
    times = [round(random.Random(0).uniform(0, most / 2), 3) for _ in range(40)]
    places = [[max(0, sum(so["time"] <= time for so in run.truths) - 1) for run in runs] for time in times]
    compare_all(shown(page, times), places, runs)


def compare_all(seen, places, runs):
    for both, there in zip(seen, places, strict=True):
        for one, place, run in zip(both, there, runs, strict=True):
            one["where"] = ""  # the line below speaks of the first
            compare(one, {**run.truths[place], "step": None}, beams_of(run))


# --- a page that shows something else is found out -----------------------------------------------------------------

MUTANTS = [  # (a part of the page, what stands there, what is wrong)
    ("common.js", "if (value === null) delete target[name];", "if (value === null) continue;"),
    ("common.js", "Array.isArray(value)) target[name] = value;", "Array.isArray(value)) target[name] ??= value;"),
    ("common.js", "merge(target[name] ?? {}, value)", "merge({}, value)"),
    ("common.js", "table.tokens - place * size", "table.tokens - (place + 1) * size"),
    ("common.js", "if (Boolean(table.swapped) !== swapped) continue;", ""),
    ("trace.js", "this.state = structuredClone(this.keyframes[keyframe]);", "this.state = this.keyframes[keyframe];"),
    ("trace.js", "this.at = keyframe * KEYFRAME;", "this.at = keyframe * KEYFRAME + 1;"),
    ("trace.js", "this.keyframes.push(structuredClone(this.state))", "this.keyframes.push(this.state)"),
    ("trace.js", "while (this.at < place)", "while (this.at < place - 1)"),
    ("trace.js", "place < this.at || place > this.at + KEYFRAME", "place > this.at + KEYFRAME"),
    ("trace.js", "keep = Math.min(keep, version.keep);", "keep = version.keep;"),
    ("trace.js", "version.add.slice(0, keep - version.keep)", "version.add"),
    ("player.js", "Math.min(this.now, trace.length - 1)", "Math.min(this.now + 1, trace.length - 1)"),
    ("pool.js", "shared: most > 1", "shared: requests.length > 1"),
    ("pool.js", "kept = names.length === 0 && block in cached", "kept = names.length === 0"),
    ("pool.js", "`${filled} of ${this.size} slots filled`", "`${this.size} of ${this.size} slots filled`"),
    ("pool.js", "const key = `${names}|${places}|", "const key = `${names.length}|${places.length}|"),
    ("tables.js", 'holders > 1 ? " shared" : ""', 'holders > 2 ? " shared" : ""'),
    ("tables.js", "const key = `${block}|", "const key = `${1}|"),
    ("tables.js", "row.entries.length = Math.min(row.entries.length, places.length);", ""),
    ("queues.js", "names[state.requests[name].state].push(name)", "names.running.push(name)"),
    ("counts.js", "=> usage.swapped_out_blocks", "=> usage.swapped_in_blocks"),
]  # fmt: skip


def test_a_page_that_shows_something_else_is_found_out(recorded, browser, tmp_path, monkeypatch):
    runs = [recorded[seed] for seed in (1303, 30, 1085)]
    data, most, whole = [run_of(run.path) for run in runs], max(len(run.truths) for run in runs), pages.part
    order, survivors = random.Random(0).sample(range(most), most), []
    for name, right, wrong in MUTANTS:
        assert whole(name).count(right) == 1, f"{name} has changed, and is to be broken in another way: {right}"
        monkeypatch.setattr(pages, "part", lambda one: whole(one).replace(right, wrong) if one == name else whole(one))  # noqa: B023
        (tmp_path / "page.html").write_text(page_of(data), encoding="utf-8")
        page = Tabs(browser).open(f"file://{tmp_path}/page.html")
        if all(is_right(page, order[at : at + 13], runs) for at in range(0, most, 13)):
            survivors.append((name, wrong))
        page.context.close()
    assert survivors == []


def is_right(page, order, runs):
    try:
        compare_all(shown(page, order), [[min(place, len(run.truths) - 1) for run in runs] for place in order], runs)
    except (AssertionError, api.Error):
        return False
    return True
