"""Blocks, page tables and what moves, as the page draws them: moments that are made up, in a real browser."""

import pytest

from minipaged.viewer.page import page_of


@pytest.fixture
def opened(tabs, tmp_path):
    """Opens the page of one moment."""

    def open_one(run, **options):
        (tmp_path / "page.html").write_text(page_of([run]), encoding="utf-8")
        return tabs.open(f"file://{tmp_path}/page.html", offline=True, **options)

    return open_one


def moment(tables, num_blocks=24, block_size=16, did=None, num_cpu_blocks=0, events=(), **state):
    """A run of one step. tables: by sequence, tokens and blocks, and whether it is swapped out."""
    usage = dict.fromkeys(
        ("shared", "free", "cached", "tokens_stored", "blocks_saved_by_sharing", "copies", "swapped_out_blocks",
         "swapped_in_blocks", "evicted", "cpu_used"), 0,
    )  # fmt: skip
    used = {block for _, blocks, *swapped in tables.values() if not any(swapped) for block in blocks}
    usage |= {"num_blocks": num_blocks, "block_size": block_size, "used": len(used), "cpu_total": num_cpu_blocks}
    request = {"id": "", "state": "running", "prompt": 1, "output": 1, "sequences": 1, "most": 9}
    whole = {
        "step": {"number": 1, "sequences": 1, "tokens": 1}, "usage": usage, "num_drawn": 0, "num_finished": 0,
        "num_preemptions": 0, "prefixes": {"queried": 0, "found": 0}, "cached": {}, "index": {},
        "requests": {name.rstrip("0123456789"): request for name in tables},
        "tables": {name: {"tokens": tokens, "blocks": blocks, "swapped": any(swapped)}
                   for name, (tokens, blocks, *swapped) in tables.items()}, **state,
    }  # fmt: skip
    sizes = {"block_size": block_size, "num_blocks": num_blocks, "num_cpu_blocks": num_cpu_blocks}
    words = {name: {"keep": 0, "add": [f" {name}{i}" for i in range(tokens)]} for name, (tokens, *_) in tables.items()}
    line = {"step": 1, "time": 0.5, "patch": whole, "did": did or {}, "words": words, "events": list(events)}
    return {"title": "made up", "header": {"version": 2, "model": "m", **sizes}, "every": 1, "lines": [line]}


def label(page, block, pool="gpu"):
    return page.get_attribute(f".pool.{pool} .cell[data-block='{block}']", "aria-label")


def kinds(page, block):
    return set(page.get_attribute(f".pool.gpu .cell[data-block='{block}']", "class").split()) - {"cell"}


def test_a_cell_says_and_shows_how_many_slots_are_filled(opened):
    """Of B two slots are new and one was a wrong guess."""
    computed = {"A": [36, 1, 0], "B": [18, 1, 2]}
    page = opened(moment({"A": (37, [0, 1, 2]), "B": (20, [3, 4])}, did={"computed": computed}))
    assert label(page, 1) == "Block 1: held by A; 16 of 16 slots filled"
    assert label(page, 2) == "Block 2: held by A; 5 of 16 slots filled; 1 of them in this step"
    back = "1 slot with wrong guesses taken back"
    assert label(page, 4) == f"Block 4: held by B; 4 of 16 slots filled; 2 of them in this step; {back}"
    assert kinds(page, 1) == {"held"} and kinds(page, 4) == {"held", "half", "written", "back"}
    strip = page.eval_on_selector(".cell[data-block='4'] u", "slots => slots.style.getPropertyValue('--strip')")
    assert [float(part.split("%")[0].split()[-1]) for part in strip.split(",")[1:-1]] == [12.5, 25, 25, 31.25], strip
    assert strip.index("--of") < strip.index("--fresh") < strip.index("transparent") < strip.index("--hole")


def test_guesses_of_other_branches_are_not_seen_in_the_memory_that_is_kept(opened):
    """Two rows of three guesses; of the one that is kept two were right."""
    did = {"computed": {"A": [36, 1, 6]}, "guessed": {"A": [6, 2, 5]}, "reached": {"A": 40}}
    page = opened(moment({"A": (39, [0, 1, 2])}, did=did))
    back = "1 slot with wrong guesses taken back"
    assert label(page, 2) == f"Block 2: held by A; 7 of 16 slots filled; 3 of them in this step; {back}"


def test_what_is_reserved_loading_freed_or_cached_looks_like_itself(opened):
    tables = {"A": (5, [0, 1, 2]), "B": (20, [3, 4])}
    page = opened(moment(tables, did={"loading": {"B": [3, 4]}, "freed": [7, 0]}, cached={"8": 1}, index={"8": -1}))
    assert [kinds(page, block) for block in (0, 1, 3, 7, 8, 9)] == [
        {"held", "half", "freed"}, {"held", "half", "reserved"}, {"held", "loading"}, {"freed"}, {"cached"}, set(),
    ]  # fmt: skip
    assert label(page, 7) == "Block 7: free, emptied in this step", "free it may be for longer"
    assert page.locator(".tables [data-sequence=A] .fill").inner_text() == "2 blocks reserved"
    assert page.locator(".tables [data-sequence=B] .fill").inner_text() == "4/16"
    shown = page.eval_on_selector_all(".legend > span", "signs => signs.map((sign) => sign.lastChild.textContent)")
    assert {"reserved for A, empty", "on its way from another engine"} < set(shown)
    assert {"free, can still be found", "emptied in this step"} < set(shown)
    assert not {"shared by 3", "wrong guesses, taken back"} & set(shown), "only what occurs"


def test_a_block_is_told_about_where_one_points(opened):
    page = opened(moment({"A1": (20, [3, 4]), "A2": (18, [3, 5])}, index={"3": -1, "4": 3}))
    page.hover(".pool.gpu .cell[data-block='4']")
    told = page.inner_text(".detail")
    assert told.startswith("Block 4: held by A1; 4 of 16 slots filled") and "what follows block 3" in told
    assert "position 19 \u2192 logical block 1, offset 3 \u2192 physical block 4 \u2192 slot 67" in told
    tokens = page.eval_on_selector_all(".slots-told li", "slots => slots.slice(0, 5).map((slot) => slot.textContent)")
    assert tokens == ["\u00b7A116", "\u00b7A117", "\u00b7A118", "\u00b7A119", ""]
    assert page.locator(".entry.here").all_inner_texts() == ["4"]
    page.hover(".tables [data-sequence=A2] .entry >> nth=0")
    assert page.inner_text(".detail").startswith("Block 3: shared by 2: A1, A2")
    assert "A1's block 0" in page.inner_text(".detail") and "A2's block 0" in page.inner_text(".detail")
    assert kinds(page, 3) == {"held", "shared", "here"}
    page.click(".tables [data-sequence=A2] .entry >> nth=1")
    page.hover("h1")
    page.hover(".pool.gpu .cell[data-block='9']")
    assert page.inner_text(".detail").startswith("Block 5:"), "a click keeps it"
    page.click(".pool.gpu .cell[data-block='9']")
    page.click(".pool.gpu .cell[data-block='9']")
    page.hover("h1")
    assert page.locator(".cell.here, .entry.here").count() == 0


def test_tokens_that_would_turn_the_page_around_are_named(opened):
    run = moment({"A": (4, [0])}, cached={"5": 1}, index={"5": -1})
    run["lines"][0] |= {"words": {"A": {"keep": 0, "add": ["<b>", "\u202e", "\n", ""]}}, "texts": {"5": "<i>\u202e"}}
    page = opened(run)
    told = page.eval_on_selector_all(".slots-told li", "slots => slots.slice(0, 4).map((slot) => slot.textContent)")
    assert told == ["<b>", "\u2039202e\u203a", "\u21b5", "\u2205"]
    page.hover(".cell[data-block='5']")
    assert page.inner_text(".quoted") == "<i>\u2039202e\u203a"


def test_keys_move_over_tables_and_pool(opened):
    page = opened(moment({"A": (40, [0, 1, 2]), "B": (20, [5, 6])}))
    assert page.locator(".tables [tabindex='0']").count() == 1, "one stop of Tab"
    page.focus(".tables [tabindex='0']")
    for key, there in (
        ("ArrowRight", "0"), ("ArrowRight", "1"), ("End", "2"), ("ArrowDown", "6"), ("Home", "B"), ("ArrowUp", "A"),
    ):  # fmt: skip
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.textContent") == there, key
        if there.isdigit():
            assert page.inner_text(".detail").startswith(f"Block {there}:")
    assert page.locator(".tables [tabindex='0']").count() == 1
    page.keyboard.press("Enter")
    assert page.evaluate("views[0].picked") == "A" and page.evaluate("player.now") == 0
    page.focus(".pool.gpu")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert page.inner_text(".detail").startswith("Block 1:")
    page.keyboard.press("Escape")
    assert page.locator(".cell.here").count() == 0


def test_a_large_pool_and_a_long_table_are_drawn_in_part_and_say_so(opened):
    tables = {"A": (16 * 900, [*range(100, 1000)]), "B1": (32, [3000, 3001]), "B2": (30, [3000, 3002])}
    page = opened(moment(tables, num_blocks=6000))
    assert page.locator(".pool.gpu .cell").count() == 2000
    assert "Each cell stands for 3 blocks" in page.inner_text(".memory")
    assert label(page, 99) == "Blocks 99 to 101: 2 held by A; 32 of 48 slots filled"
    assert label(page, 3000) == "Blocks 3000 to 3002: 3 held by B; 46 of 48 slots filled"
    assert page.inner_text(".cell[data-block='3000'] b") == "b" and label(page, 0) == "Blocks 0 to 2: free"
    row = page.locator(".tables [data-sequence=A]")
    assert row.locator(".entry").count() == 56 and row.locator(".gap").inner_text() == "\u2026 844 more \u2026"
    assert row.get_attribute("data-count") == "900" and row.locator(".entry").last.inner_text() == "999"
    page.hover(".cell[data-block='3000']")
    assert page.locator(".entry.here").all_inner_texts() == ["3000", "3000"]


def test_a_block_that_was_clicked_stays_when_a_request_is_picked(opened):
    page = opened(moment({"A": (20, [3, 4]), "B": (20, [5, 6])}))
    page.click(".pool.gpu .cell[data-block='4']")
    page.click(".queue.running button >> nth=1")
    page.hover(".pool.gpu .cell[data-block='6']")
    assert page.evaluate("views[0].picked") == "B" and page.inner_text(".detail").startswith("Block 4:")


def test_of_a_large_pool_that_is_hardly_used_what_is_used_is_drawn_one_by_one(opened):
    did = {"swap_out": [[60, 40]], "freed": [3]}
    page = opened(moment({"A": (20, [0, 70]), "B": (3, [40], True)}, 6000, did=did, num_cpu_blocks=6000))
    assert page.locator(".pool.gpu .cell").count() == 96 and page.locator(".pool.cpu .cell").count() == 56
    assert label(page, 70) == "Block 70: held by A; 4 of 16 slots filled" and "B" in label(page, 40, "cpu")
    told = page.inner_text(".memory")
    assert "6000 blocks of 16 tokens" in told.replace(",", "")
    assert "Blocks 96 to 5,999 are free in the whole run, and not drawn." in told
    assert "Blocks 56 to 5,999 are free" in told
    page.focus(".pool.gpu")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("End")
    assert page.inner_text(".detail").startswith("Block 95:")
    assert opened(moment({"A": (20, [0, 70])}, 512)).locator(".pool.gpu .cell").count() == 512


def test_the_pool_of_the_cpu_is_seen_where_somebody_was_swapped_out(opened):
    page = opened(moment({"A": (20, [3, 4])}, num_cpu_blocks=40))
    assert not page.is_visible(".pool.cpu")
    assert "24 blocks of 16 tokens; 40 of the CPU, never used" in page.inner_text(".memory")
    page = opened(moment({"A": (20, [3, 4], True)}, num_cpu_blocks=40))
    assert page.is_visible(".pool.cpu") and "never used" not in page.inner_text(".memory")


def test_who_listens_hears_what_a_step_did_once_and_not_while_it_plays(opened):
    page = opened(moment({"A": (20, [3, 4])}, did={"evicted": [8], "computed": {"A": [18, 2, 0]}},
                         events=["A swapped in: 2 blocks, 6->3 7->4"]))  # fmt: skip
    page.wait_for_selector("#told:not(:empty)", state="attached")
    said = "A swapped in: 2 blocks, 6 to 3, 7 to 4. evicted: can't be found any more, 1 block: 8. computed: A 2 tokens"
    assert page.text_content("#told").startswith(f"step 1 of 1, 0.50 s. {said}")
    assert page.get_attribute("#where", "aria-live") == "off", "an <output> would be read at every step"


MOVED = {"copies": [[3, 4]], "swap_out": [[8, 0], [9, 1]], "evicted": [8], "found": {"A": 16},
         "guessed": {"A": [4, 3, 1]}}  # fmt: skip


@pytest.mark.parametrize("width", [1280, 760])
def test_movements_are_drawn_and_lines_where_the_tables_stand_beside_the_pool(opened, width):
    tables = {"A": (20, [3, 4]), "B": (20, [5, 6]), "C": (30, [0, 1], True)}
    page = opened(moment(tables, did=MOVED, num_cpu_blocks=4), viewport={"width": width, "height": 900})
    page.wait_for_selector(".moves .arrow", state="attached")
    labels = page.eval_on_selector_all(".moves text", "texts => texts.map((text) => text.textContent)")
    assert labels == ["A found 16 tokens", "copied on write", "2 swapped out", "evicted", "+3 \u22121"]
    assert page.locator(".moves path.line").count() == (6 if width == 1280 else 0)
    ends = page.evaluate("""() => {
      const cell = document.querySelector(".pool.gpu .cell[data-block='4']").getBoundingClientRect();
      const arrow = document.querySelector(".moves path.arrow.copies").getBoundingClientRect();
      return arrow.right > cell.left && arrow.right < cell.right && arrow.bottom > cell.top;
    }""")
    assert ends, "the arrow ends at the copy"


def test_it_fits_every_screen(opened):
    tables = {f"{name}{i}": (150, [*range(10)]) for name in "ABCDEFGH" for i in (1, 2)}
    for width in (360, 768, 2560):
        run = moment(tables, did=MOVED, num_blocks=300, num_cpu_blocks=40)
        page = opened(run, viewport={"width": width, "height": 800})
        page.wait_for_timeout(100)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        within = "panels => panels.every((panel) => panel.scrollWidth <= panel.clientWidth)"
        assert page.eval_on_selector_all(".panel", within)
