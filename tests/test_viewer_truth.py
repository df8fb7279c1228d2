"""The page of a run shows at every step what was so: compared with the memory itself, on random schedules."""

import random
from collections import Counter
from functools import partial

import pytest

from minipaged.viewer import page as pages
from minipaged.viewer.page import page_of, run_of
from tests.browser import Tabs
from tests.viewed import Recorded, beams_of, compare, happened, shown

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
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    return {seed: Recorded(seed, folder / f"seed-{seed}.jsonl") for seed in SEEDS}


@pytest.fixture
def opened(tabs, tmp_path):
    def open_one(*paths):
        (tmp_path / "page.html").write_text(page_of([run_of(path) for path in paths]), encoding="utf-8")
        return tabs.open(f"file://{tmp_path}/page.html", offline=True)

    return open_one


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


def test_texts_are_put_together_from_what_was_new(recorded, opened):
    """Of any sequence, from any other, at any step: more goes on here than in a run."""
    rng, now, lines, said = random.Random(0), {}, [], []
    for place in range(120):
        before, news = dict(now), {}
        for name in rng.sample(["A", "A1", "B"], rng.randint(0, 2)):
            source = rng.choice([name, *before])
            old = before.get(source, [])
            keep, add = rng.randint(0, len(old)), [f"{place}{name}{i} " for i in range(rng.randint(0, 3))]
            news[name] = {**({"from": source} if source != name else {}), "keep": keep, "add": add}
            now[name] = old[:keep] + add
        lines.append({"step": place + 1, "patch": {}, "words": news})
        said.append([now.get(name) for name in ("A", "A1", "B")])
    seen = opened(recorded[63].path).evaluate(
        """(lines) => {
          const trace = new Trace({ header: {}, every: 1, lines });
          return lines.map((_, place) => ["A", "A1", "B"].map((name) => trace.wordsOf(name, place)));
        }""",
        lines,
    )
    assert seen == said


# --- a page that shows something else is found out -----------------------------------------------------------------

MUTANTS = [  # (a part of the page, what stands there, what is wrong)
    ("common.js", "if (value === null) delete target[name];", "if (value === null) continue;"),
    ("common.js", "else target[name] = value;", "else target[name] ??= value;"),
    ("common.js", "merge(isObject(target[name]) ? target[name] : ", "merge(false ? target[name] : "),
    ("common.js", "table.tokens - place * size", "table.tokens - (place + 1) * size"),
    ("common.js", "if (Boolean(table.swapped) !== swapped) continue;", ""),
    ("trace.js", "this.state = copied(this.keyframes[keyframe]);", "this.state = this.keyframes[keyframe];"),
    ("trace.js", "this.at = keyframe * KEYFRAME;", "this.at = keyframe * KEYFRAME + 1;"),
    ("trace.js", "this.keyframes.push(copied(this.state))", "this.keyframes.push(this.state)"),
    ("trace.js", "while (this.at < place)", "while (this.at < place - 1)"),
    ("trace.js", "place < this.at || place > this.at + KEYFRAME", "place > this.at + KEYFRAME"),
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
    whole, runs = pages.part, [recorded[seed] for seed in (1303, 30, 1085)]
    data = [run_of(run.path) for run in runs]
    changed = [(name, right) for name, right, _ in MUTANTS if whole(name).count(right) != 1]
    assert changed == [], "these are to be broken in another way"

    def is_right(run, lines):
        (tmp_path / "page.html").write_text(page_of([lines]), encoding="utf-8")
        page, most = Tabs(browser).open(f"file://{tmp_path}/page.html"), len(run.truths)
        order = random.Random(0).sample(range(most), most)
        try:
            for some in (order[at : at + 20] for at in range(0, most, 20)):
                compare_all(shown(page, some), [[place] for place in some], [run])
        except Exception:  # the page may have failed, too
            return False
        finally:
            page.context.close()
        return True

    survivors = []
    for name, right, wrong in MUTANTS:
        monkeypatch.setattr(pages, "part", partial(broken_part, whole, name, right, wrong))
        if all(map(is_right, runs, data)):
            survivors.append((name, wrong))
    assert survivors == []


def broken_part(whole, name, right, wrong, asked, own):
    return whole(asked, own).replace(right, wrong) if asked == name else whole(asked, own)
