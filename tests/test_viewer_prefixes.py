"""What the page shows of what can be found again, of texts, and of words: compared with the memory, at every step."""

import random
from collections import Counter

import pytest

from minipaged.viewer.page import page_of, run_of
from tests.viewed import Recorded, beamless, beams_of

SEEDS = (1303, 521, 781, 30, 63, 416)  # together they have hashes and a tree, hits, evictions, beams and swaps
INDEX = """(places) => places.map((place) => {
  player.go(place);
  const all = (root, selector, read) => [...root.querySelectorAll(selector)].map(read);
  const rows = all(document, ".prefixes .run-row", (row) => all(row, ".link", (link) =>
    ({ block: Number(link.dataset.block), kinds: [...link.classList], label: link.getAttribute("aria-label") })));
  return { rows, told: document.querySelector(".prefixes p").textContent };
})"""
TEXTS = """(places) => places.map((place) => {
  player.go(place);
  const all = (root, selector, read) => [...root.querySelectorAll(selector)].map(read);
  const page = (page) => ({ number: page.querySelector(".number").textContent,
    tokens: all(page, ".token", (token) => [token.textContent, [...token.classList]]) });
  const stretch = (one) => ({ common: one.classList.contains("common"), name: one.querySelector(".chip").textContent,
    folded: one.querySelector(".fold") !== null, pages: all(one, ".page", page) });
  const picked = (name) => { pick(name); return all(document, ".stretch", stretch); };
  return Object.keys(views[0].moment.state.requests).map(picked);
})"""


class Indexed(Recorded):
    """known, found, evicted: after each step that is traced, what the memory knows; what the step did, by its plan."""

    def run(self):
        self.known, self.found, self.evicted = [], [], []
        self._removed: set[int] = set()
        if self.memory.cache is not None:
            remove = self.memory.cache.remove
            self.memory.cache.remove = lambda block: (remove(block), self._removed.add(block))
        return super().run()

    def step(self, fails=False):
        self._removed.clear()
        super().step(fails)
        if not fails:
            plan, cache, size = self.plans[-1], self.memory.cache, self.memory.block_size
            new = [s for s in plan.sequences if s.request_id in plan.admitted and s.seq_id in self.memory.sequences()]
            self.known.append({} if cache is None else cache.parents())
            self.found.append({block for s in new for block in s.block_table[: s.start // size]})
            self.evicted.append({*self._removed})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    return {seed: Indexed(seed, folder / f"{seed}.jsonl") for seed in SEEDS}


@pytest.fixture
def opened(tabs, tmp_path):
    def open_one(run, **options):
        (tmp_path / "page.html").write_text(page_of([run]), encoding="utf-8")
        return tabs.open(f"file://{tmp_path}/page.html", offline=True, **options)

    return open_one


def page_for(opened, run):
    made = run_of(run.path)
    made["header"]["settings"]["prefix_cache"] = run.given.cache
    return opened(made)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_tree_is_what_the_memory_knows_at_every_step(recorded, opened, seed):
    run = recorded[seed]
    page, there = page_for(opened, run), [*range(len(run.known))]
    places = there + random.Random(seed).sample(there, len(there))
    for place, shown in zip(places, page.evaluate(INDEX, places), strict=True):
        links = [link for row in shown["rows"] for link in row]
        live = {link["block"]: link for link in links if "gone" not in link["kinds"]}
        kind = {which: {block for block, link in live.items() if which in link["kinds"]} for which in ("found", "held")}
        gone = {link["block"]: parent_in(link["label"]) for link in links if "gone" in link["kinds"]}
        assert len(live) + len(gone) == len(links), "no block stands there twice"
        assert {block: parent_in(link["label"]) for block, link in live.items()} == run.known[place], (seed, place)
        before = run.known[place - 1] if place else {}
        assert gone == {block: before[block] for block in run.evicted[place] & before.keys()}, (seed, place)
        assert kind["found"] == run.found[place] & live.keys(), (seed, place)
        held = {block for _, _, blocks, swapped in run.truths[place]["tables"] if not swapped for block in blocks}
        assert kind["held"] == held & live.keys()
        check_rows(shown["rows"], run.given.cache == "hash")
        assert ("Nothing can be found" in shown["told"] or "is off" in shown["told"]) == (not links)


def test_without_a_trace_it_is_the_same(recorded, opened):
    """A page that only hears of states, as the server's does, remembers the one before; and looking changes nothing."""
    run = recorded[SEEDS[0]]
    page = page_for(opened, run)
    kinds = """() => {
      const element = make("div"), live = new Prefixes(views[0], element), told = [];
      const look = (link) => `${link.dataset.key} ${link.className}`;
      const read = (root) => [...root.querySelectorAll(".link")].map(look).sort().join();
      for (let place = 0; place < traces[0].length; place++) {
        player.go(place);
        const { state, did } = views[0].moment, moment = { state: structuredClone(state), did };
        live.update(moment);
        live.update(moment);
        told.push([read(element), read(views[0].find(".prefixes"))]);
      }
      return told;
    }"""
    told = page.evaluate(kinds)
    told = told[1:]  # before the first, it knows of none
    assert [one for one, _ in told] == [other for _, other in told] and any("gone" in one for one, _ in told)


def parent_in(label):
    return int(label.split("follows block ")[1].split(",")[0]) if "follows block" in label else None


def check_rows(rows, chains):
    """Within a row each block follows the one before it; rows of a tree begin at a root, or where something parts."""
    gone = any("gone" in link["kinds"] for row in rows for link in row)  # then a number may stand for two
    children = Counter(parent_in(link["label"]) for row in rows for link in row)
    for row in rows:
        for before, link in zip(row, row[1:], strict=False):
            assert parent_in(link["label"]) == before["block"]
            assert chains or gone or children[before["block"]] == 1
        parent = parent_in(row[0]["label"])
        assert chains or gone or parent is None or children[parent] > 1


@pytest.mark.parametrize("seed", SEEDS)
def test_texts_are_what_was_said_and_stand_in_their_blocks(recorded, opened, seed):
    run, beams = recorded[seed], beams_of(recorded[seed])
    places, seen = [*range(seed % 3, len(run.truths), 3)], 0
    for place, shown in zip(places, page_for(opened, run).evaluate(TEXTS, places), strict=True):
        so, told, folded = run.truths[place], [], set()
        for stretches in shown:
            common = stretches[0]["pages"] if stretches and stretches[0]["common"] else []
            for one in stretches[1:] if common else stretches:
                name, pages = beamless(one["name"], beams), common + one["pages"]
                tokens = [token for page in pages for token in page["tokens"]]
                computed = len(tokens) - sum("todo" in kinds for _, kinds in tokens)
                numbers = [int(page["number"]) for page in pages if page["number"]]
                told.append((name, computed, numbers, "".join(text for text, _ in tokens)))
                folded |= {name} if one["folded"] or stretches[0]["folded"] else set()
        said = {(name, text) for name, text in so["texts"]}
        for name, computed, blocks, _ in so["tables"]:
            mine = [one for one in told if one[:3] == (name, computed, blocks) and (name, one[3]) in said]
            assert mine or name in folded, (seed, place, name)
            seen += name not in folded
    assert seen > 10


def test_the_same_words_in_other_blocks_are_not_shown_as_shared(opened):
    """Two samples may say the same: what stands twice in memory stands twice in the picture."""
    words, tables = [f" {i}" for i in range(12)], {"A1": [0, 1, 2], "A2": [0, 3, 4]}
    usage = {"block_size": 4, "num_blocks": 8, "used": 5, "tokens_stored": 19, "cpu_total": 0}
    state = {
        "step": {"number": 1, "tokens": 2}, "usage": usage, "num_preemptions": 0, "cached": {}, "index": {},
        "requests": {"A": {"id": "0", "state": "running", "prompt": 4, "output": 16, "sequences": 2}},
        "tables": {name: {"tokens": 11, "blocks": blocks, "swapped": False} for name, blocks in tables.items()},
    }  # fmt: skip
    line = {"step": 1, "time": 1, "words": {name: {"keep": 0, "add": words} for name in tables}, "patch": state}
    header = {"version": 2, "block_size": 4, "num_blocks": 8, "num_cpu_blocks": 0, "model": "none", "settings": {}}
    page = opened({"title": "by hand", "header": header, "every": 1, "lines": [line]})
    shown = page.evaluate(TEXTS, [0])[0][0]
    numbers = [[page["number"] for page in stretch["pages"]] for stretch in shown]
    assert numbers == [["0"], ["1", "2"], ["3", "4"]]


def test_a_word_is_explained_to_mouse_keyboard_and_screen_readers(recorded, opened):
    """WCAG 1.4.13: what appears can be pointed at, goes away with Escape, and stays until then."""
    page = page_for(opened, recorded[SEEDS[0]])
    word, tip = page.locator(".counts dt").first, page.locator(".word-tip")
    described = "(one) => document.getElementById(one.getAttribute('aria-describedby'))"
    assert page.evaluate(f"[...document.querySelectorAll('.word')].every({described})")
    word.focus()
    assert tip.is_visible() and "page table" in tip.text_content()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == "shared" and "several sequences" in tip.text_content()
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    page.evaluate("document.activeElement.blur()")
    page.hover("[data-word='page table']")
    box = tip.bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    page.wait_for_timeout(300)
    assert tip.is_visible()
    page.mouse.move(0, 0)
    tip.wait_for(state="hidden")
    page.click("#words summary")
    assert page.locator("#words dt").count() > 40 and page.locator("#words dd").first.is_visible()


HOSTILE = ("<script>x()</script>", "<img src=x onerror=x()>", "\u202eabc", "e" + "\u0301" * 300, "x" * 10_000, "\ufffd",
           "\x00\x07\x9b", "\u0634\u0644\u0648\u05dd", "\n\n", "   ", "", "<|im_start|>")  # fmt: skip


BOXES = """[...document.querySelectorAll(".stretches .token, .says")].filter((one) => one.offsetParent)
  .map((one) => [one.getBoundingClientRect().right, one.offsetHeight])"""


def test_hostile_texts_stay_texts_and_stay_inside(recorded, opened):
    made = run_of(recorded[SEEDS[0]].path)
    for line in made["lines"]:
        for news in line.get("words", {}).values():
            news["add"] = [random.Random(token).choice(HOSTILE) for token in news["add"]]
        line["texts"] = {block: HOSTILE[i % len(HOSTILE)] for i, block in enumerate(line.get("texts", {}))}
    page = opened(made, viewport={"width": 360, "height": 800})
    for place in range(0, len(made["lines"]), 7):
        page.evaluate("(place) => player.go(place)", place)
        assert page.locator("main :is(script, img)").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        boxes = page.evaluate(BOXES)
        assert all(right <= 360 and height < 400 for right, height in boxes)
    assert "\u202e" not in page.inner_text(".text") + page.inner_text(".prefixes")
