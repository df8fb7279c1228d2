"""The controls of a run's page, in a real browser: player, keys, link, search, two runs. See viewer/page/."""

import re

import pytest
from tiny_model import make_folder

from minipaged import LLM, SamplingParams
from minipaged.viewer.page import page_of, run_of
from minipaged.viewer.trace import TraceWriter
from tests.browser import until
from tests.viewed import Recorded


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs, of 23 and of 68 steps; each step takes half a second."""
    folder = tmp_path_factory.mktemp("traces")
    return {name: Recorded(seed, folder / f"{name}.jsonl") for name, seed in (("short", 521), ("long", 1085))}


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    """The page of some of the runs, by their names."""
    folder, done = tmp_path_factory.mktemp("pages"), {}

    def write(*names):
        if names not in done:
            done[names] = folder / f"{'-'.join(names)}.html"
            done[names].write_text(page_of([run_of(runs[name].path) for name in names]), encoding="utf-8")
        return f"file://{done[names]}"

    return write


@pytest.fixture
def opened(tabs, written):
    """Opens pages."""

    def open_one(*names, link="", **options):
        page = tabs.open(written(*names or ("short",)) + link, **{"offline": True, **options})
        until(lambda: page.evaluate("typeof player === 'object'"))
        return page

    return open_one


def place(page):
    return page.evaluate("player.now")


def link(page):
    """What the link says when the page was left alone for a moment, however long it takes to draw."""
    page.wait_for_timeout(300)
    page.evaluate("new Promise((done) => setTimeout(done, 2 * SOON))")
    return page.evaluate("location.hash")


def picked(page):
    pressed = "[...document.querySelectorAll('.queue li button[aria-pressed=true]')]"
    shown = page.evaluate(f"{pressed}.map((button) => button.closest('li').dataset.request)")
    names = page.evaluate("views.map((view) => view.picked)")
    assert len(set(names)) == 1 and set(shown) <= {names[0]}, "all runs show it"
    return names[0]


# --- player ---------------------------------------------------------------------------------------------------------


def test_buttons_go_to_a_step_and_end_at_both_ends(opened):
    page = opened()
    end = page.evaluate("player.last")
    assert place(page) == 0 and page.is_disabled("#back") and page.is_disabled("#first")
    for button, there in (("next", 1), ("next", 2), ("back", 1), ("last", end), ("back", end - 1), ("first", 0)):
        page.click(f"#{button}")
        assert place(page) == there and page.input_value("#step") == str(there), button
    page.click("#last")
    assert page.is_disabled("#next") and page.is_disabled("#last") and not page.is_disabled("#back")
    assert page.text_content("#where").startswith(f"step {end + 1} of {end + 1}")
    assert page.get_attribute("#step", "aria-valuetext") == page.text_content("#where")


def test_the_slider_goes_where_it_is_drawn(opened):
    page = opened("long")
    box = page.locator("#step").bounding_box()
    seen = []
    page.mouse.move(box["x"] + 8, box["y"] + box["height"] / 2)
    page.mouse.down()
    for part in (0.3, 0.8, 0.5):
        page.mouse.move(box["x"] + part * box["width"], box["y"] + box["height"] / 2, steps=4)
        seen.append(place(page) / page.evaluate("player.last"))
    page.mouse.up()
    assert seen == pytest.approx([0.3, 0.8, 0.5], abs=0.05)
    before = place(page)
    page.press("#step", "ArrowRight")
    assert place(page) == before + 1, "one step, not two: the slider moves, and the page doesn't besides"
    page.press("#step", "Home")
    assert place(page) == 0


def test_play_goes_on_by_the_clock_and_stops_at_the_end(opened):
    page = opened(fake_clock=True)
    page.click("#play")
    assert page.text_content("#play") == "Pause"
    page.clock.run_for(1050)
    assert place(page) == 4, "steps in a second, at speed 1"
    page.select_option("#speed", "0.5")
    page.clock.run_for(1000)
    assert place(page) == 6
    page.click("#play")
    page.clock.run_for(3000)
    assert place(page) == 6 and page.text_content("#play") == "Play"
    page.select_option("#speed", "16")
    page.click("#play")
    page.clock.run_for(2000)
    assert place(page) == page.evaluate("player.last") and page.text_content("#play") == "Play"
    page.click("#play")
    assert place(page) == 0, "from the beginning again"
    page.clock.run_for(100)
    page.click("#next")
    assert page.text_content("#play") == "Pause" and place(page) > 1, "it goes on from where one jumps to"


def test_pause_and_play_at_once_is_not_faster(opened):
    page = opened("long", fake_clock=True)
    page.evaluate("""() => {
      for (let i = 0; i < 9; i++) player.toggle();
      const tick = player.tick;
      player.ticks = 0;
      player.tick = (now) => { player.ticks++; tick.call(player, now); };
    }""")
    page.clock.run_for(1000)
    assert place(page) in (3, 4) and page.evaluate("player.ticks") < 70


@pytest.mark.parametrize("names", [("short",), ("short", "long"), ("long", "short")])
def test_as_it_was_takes_the_time_that_it_took(opened, names):
    page = opened(*names, fake_clock=True)
    page.select_option("#speed", "0")
    page.click("#play")
    page.clock.run_for(3100)
    assert place(page) in (6, 7), "half a second each"
    page.clock.run_for(40000)
    assert place(page) == page.evaluate("player.last") and page.text_content("#play") == "Play"


# --- keys -----------------------------------------------------------------------------------------------------------


def test_keys_move(opened):
    page = opened(fake_clock=True)
    end = page.evaluate("player.last")
    for key, there in (
        ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("PageDown", 11), ("PageUp", 1), ("End", end),
        ("ArrowRight", end), ("Home", 0), ("ArrowLeft", 0),
    ):  # fmt: skip
        page.keyboard.press(key)
        assert place(page) == there, key
    page.keyboard.press(" ")
    assert page.text_content("#play") == "Pause"
    page.keyboard.press(" ")
    assert page.text_content("#play") == "Play"
    for keys, speed in (("+", "2"), ("+++++++", "0"), ("-", "16"), ("--------", "0.25")):
        for key in keys:
            page.keyboard.press(key)
        assert page.input_value("#speed") == speed and page.evaluate("player.speed") == float(speed)
    for key in ("Control+ArrowRight", "Alt+ArrowRight", "Meta+ArrowRight"):
        page.keyboard.press(key)
    assert place(page) == 0, "the browser's own keys are its own"


def test_keys_are_letters_where_one_types(opened):
    page = opened()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search" and page.input_value("#search") == ""
    page.keyboard.type("a /+- b")
    for key in ("Home", "ArrowRight", "End", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.input_value("#search") == "a /+- b" and place(page) == 0
    assert page.text_content("#play") == "Play" and page.input_value("#speed") == "1"
    page.focus("#speed")
    page.keyboard.press("ArrowDown")
    assert place(page) == 0 and page.input_value("#speed") == "2"


def test_keys_work_where_the_slider_or_a_button_was_used(opened):
    """The slider has its arrows itself, a button its space; all other keys do what they do elsewhere."""
    page = opened()
    page.focus("#step")
    page.keyboard.press(" ")
    assert page.text_content("#play") == "Pause"
    page.keyboard.press(" ")
    page.keyboard.press("+")
    page.keyboard.press("/")
    assert page.input_value("#speed") == "2" and page.evaluate("document.activeElement.id") == "search"
    page.focus("#next")
    page.keyboard.press(" ")
    assert place(page) == 1 and page.text_content("#play") == "Play"
    page.keyboard.press("ArrowRight")
    assert place(page) == 2


# --- link -----------------------------------------------------------------------------------------------------------


def test_the_link_holds_step_and_request(opened):
    page = opened(link="#step=9&request=B")
    assert place(page) == 8 and picked(page) == "B"
    page.keyboard.press("ArrowRight")
    assert link(page) == "#step=10&request=B"
    page.reload()
    assert place(page) == 9 and picked(page) == "B"
    page.keyboard.press("Escape")
    assert picked(page) == "" and link(page) == "#step=10"
    page.evaluate("location.hash = '#step=3&request=A'")
    until(lambda: page.evaluate("player.now === 2"))
    assert picked(page) == "A"
    page.click("#play")
    page.click("#play")
    assert link(page) == f"#step={place(page) + 1}&request=A"


@pytest.mark.parametrize("nonsense", [
    "#step=abc", "#step=-5", "#step=1e999", "#step=", "#step=NaN&request=<b>", "#time=1e5", "#request=__proto__",
    "#%E0%A4%A", "#step=0&step=4", "#<img src=x onerror=alert(1)>", "#step=0.4&request=constructor", "#" + "x" * 5000,
])  # fmt: skip
def test_nonsense_in_a_link_is_the_beginning(opened, nonsense):
    page = opened(link=nonsense)
    assert place(page) == 0 and picked(page) == "" and link(page) == "#step=1"


def test_behind_the_end_is_the_end(opened):
    page = opened(link="#step=99999")
    assert place(page) == page.evaluate("player.last")


def test_the_link_is_not_written_at_every_step(opened):
    """Browsers forbid that after a hundred times in half a minute."""
    page = opened("long")
    page.evaluate("""() => {
      window.written = 0;
      const replace = history.replaceState;
      history.replaceState = function (...given) { written++; return replace.apply(this, given); };
      for (let place = 0; place < 60; place++) player.go(place);
    }""")
    assert link(page) == "#step=60" and page.evaluate("written") == 1
    assert page.text_content("#told").startswith("step 60 of 68")


# --- search, and who stands out -------------------------------------------------------------------------------------


def test_search_finds_names_ids_and_words(opened, runs):
    page = opened()

    def ask(text):
        page.fill("#search", text)
        page.press("#search", "Enter")
        return page.text_content("#found")

    came = page.evaluate("Object.fromEntries([...traces[0].requests].map(([name, { place }]) => [name, place]))")
    assert ask("c") == "C: 1 of 1" and (picked(page), place(page)) == ("C", came["C"])
    assert ask("r3") == "D: 1 of 1" and (picked(page), place(page)) == ("D", came["D"])
    texts = [(name[0], text) for so in runs["short"].truths for name, text in so["texts"]]
    by_word = {
        word: {name for name, text in texts if word in text.split()} for _, said in texts for word in said.split()
    }
    word, [name] = next((word, names) for word, names in by_word.items() if len(names) == 1)
    assert ask(word.upper()) == f"{name}: 1 of 1" and picked(page) == name
    assert ask("nobody says that") == "no such request" and picked(page) == name, "and all stays as it was"
    page.fill("#search", "n")
    assert page.text_content("#found") == ""
    first, hits = ask("w").split(": 1 of ")
    assert int(hits) > 1
    page.press("#search", "Enter")
    second = page.text_content("#found")
    assert second.endswith(f": 2 of {hits}") and picked(page) == second.split(":")[0] != first
    for _ in range(int(hits) - 1):
        page.press("#search", "Enter")
    assert page.text_content("#found") == f"{first}: 1 of {hits}", "round and round"
    page.fill("#search", "   ")
    page.press("#search", "Enter")
    assert picked(page) == first


def test_a_request_stands_out_by_click_and_by_key(opened):
    page = opened(link="#step=6")
    first, second = page.eval_on_selector_all(
        ".queue li[data-request]", "rows => rows.map((row) => row.dataset.request)"
    )[:2]
    page.click(f".queue li[data-request={first}] button")
    assert picked(page) == first and link(page) == f"#step=6&request={first}"
    page.focus(f".queue li[data-request={second}] button")
    page.keyboard.press("Enter")
    assert picked(page) == second and page.text_content("#play") == "Play"
    page.keyboard.press(" ")
    assert picked(page) == "" and page.text_content("#play") == "Play", "the same again: nobody does"
    held = page.eval_on_selector_all(".pool.gpu .cell.picked", "cells => cells.length")
    page.focus(f".queue li[data-request={first}] button")
    page.keyboard.press("Enter")
    assert held == 0 < page.eval_on_selector_all(".pool.gpu .cell.picked", "cells => cells.length")
    page.keyboard.press("ArrowRight")
    assert picked(page) == first and place(page) == 6


def test_keys_move_in_the_pool(opened):
    page = opened(link="#step=6")
    page.focus(".pool.gpu")
    for key, block in (
        ("ArrowRight", 0),
        ("ArrowRight", 1),
        ("End", 44),
        ("ArrowRight", 44),
        ("Home", 0),
        ("ArrowLeft", 0),
    ):
        page.keyboard.press(key)
        active = page.get_attribute(".pool.gpu", "aria-activedescendant")
        assert page.evaluate("views[0].here") == {"block": block, "swapped": False} and place(page) == 5, key
        assert page.get_attribute(f"#{active}", "data-block") == str(block)
    columns = page.evaluate(
        "getComputedStyle(document.querySelector('.pool.gpu')).gridTemplateColumns.split(' ').length"
    )
    page.keyboard.press("ArrowDown")
    assert page.evaluate("views[0].here.block") == columns


# --- two runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("short", "long"), ("long", "short")])
def test_two_runs_go_in_step_to_the_end_of_the_longer(opened, runs, names):
    page = opened(*names)
    assert page.is_visible("#mode") and page.eval_on_selector_all(".run", "all => all.length") == 2
    ends = [len(runs[name].truths) - 1 for name in names]
    assert page.evaluate("player.last") == max(ends)
    page.keyboard.press("End")
    assert page.evaluate("player.places") == ends
    assert page.text_content("#where").startswith(f"step {max(ends) + 1} of {max(ends) + 1}")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert link(page) == f"#step={max(ends) - 1}"
    page.reload()
    assert place(page) == max(ends) - 2


def test_two_runs_go_in_time(opened):
    page = opened("long", "short", link="#step=5")
    page.evaluate("for (const line of traces[1].lines) line.time = line.time * 0.8 - 0.1")  # 0.3, 0.7, 1.1, ...
    page.select_option("#mode", "time")
    assert page.evaluate("[player.now, ...player.places]") == [2.5, 4, 5]
    assert page.text_content("#where").startswith("2.50 s") and link(page) == "#time=2.5"
    times = [page.evaluate("player.now")]
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowLeft", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
        times.append(page.evaluate("player.now"))
    assert times == pytest.approx([2.5, 2.7, 3.0, 3.1, 3.0, 2.7, 2.5, 2.3]), "no moment is left out, in no direction"
    page.keyboard.press("End")
    assert place(page) == 34 and page.is_disabled("#next")
    page.select_option("#mode", "step")
    assert place(page) == 67
    page.reload()
    page.goto(page.url.split("#")[0] + "#time=3.2")
    until(lambda: page.evaluate("player.inTime"))
    assert page.input_value("#mode") == "time" and page.evaluate("player.places") == [5, 5]


def test_a_request_stands_out_in_both_runs(opened):
    page = opened("long", "short", link="#step=6")
    page.locator(".run").nth(1).locator(".queue li button").first.click()
    name = picked(page)
    for run in page.locator(".run").all():
        assert re.search(rf"\b{name}\b", run.locator(".pool.gpu").text_content() or "") is None or (
            run.locator(".pool.gpu .cell.picked").count()
        )
    assert link(page) == f"#step=6&request={name}"
    for number in (1, 2, 1):  # there is one in each run
        page.fill("#search", "c")
        page.press("#search", "Enter")
        assert page.text_content("#found") == f"C: {number} of 2" and picked(page) == "C"


# --- the window -------------------------------------------------------------------------------------------------------

FITS = """() => {
  const clipped = (element) => {
    for (let one = element.parentElement; one && one !== document.body; one = one.parentElement) {
      const { overflowX, clipPath } = getComputedStyle(one);
      if (overflowX !== "visible" || clipPath !== "none") return true;
    }
    return false;
  };
  const wrong = [], { clientWidth: wide, scrollWidth } = document.documentElement;
  if (scrollWidth > wide) wrong.push("the page scrolls to the side");
  for (const element of document.querySelectorAll("body *:not(.unseen, template, script, option)")) {
    const { left, right, width, height, bottom } = element.getBoundingClientRect();
    if (!width || !height) continue;
    const who = `${element.tagName}.${element.getAttribute("class")} ${element.id} ${element.textContent.slice(0, 30)}`;
    if ((right > wide + 1 || left < -1) && !clipped(element)) wrong.push(`outside: ${who}`);
    if (element.matches("button, select, input") && (height < 24 || width < 24)) wrong.push(`too small: ${who}`);
    if (element.matches("#controls *") && bottom > innerHeight + 1) wrong.push(`not to be reached: ${who}`);
    if (element.closest(".cell, li[title]") || !element.matches("h2, h3, p, button, dt, dd, li, select")) continue;
    if (element.scrollWidth > element.clientWidth + 1 && element.clientWidth) wrong.push(`cut: ${who}`);
  }
  return wrong;
}"""


@pytest.mark.parametrize("names", [("long",), ("short", "long")])
def test_it_fits_into_any_window(opened, names):
    """Of the tokens in slots only the beginning is seen: the text below has them whole."""
    page, columns = opened(*names, link="#step=20&request=E"), []
    for width in (360, 560, 768, 1000, 1280, 1920, 2560):
        page.set_viewport_size({"width": width, "height": 740})
        page.wait_for_timeout(150)
        assert page.evaluate(FITS) == [], width
        columns.append(page.evaluate("views[0].parts.find((part) => part instanceof Pool).columns"))
    assert min(columns) >= 4 and len(set(columns)) > 1 and all(number % 4 == 0 for number in columns)


def test_who_wants_no_motion_gets_none(opened):
    page = opened("long", reduced_motion="reduce")
    for _ in range(30):
        page.keyboard.press("ArrowRight")
        moving = page.evaluate("document.getAnimations().filter((one) => one.playState === 'running').length")
        assert moving == 0


def test_what_stands_below_stays_where_it_is(opened):
    page = opened("long")

    def tops():
        for number in (0, 15, 30, 45, 67):
            page.evaluate(f"player.go({number})")
            page.wait_for_timeout(100)
            yield page.evaluate("document.querySelector('.timeline').getBoundingClientRect().top + scrollY")

    first = [*tops()]
    assert first == sorted(first) and len({*tops()}) == 1, "panels only grow"
    page.set_viewport_size({"width": 1600, "height": 800})
    page.wait_for_timeout(200)
    assert next(tops()) < first[-1], "and begin anew in another window"


def test_a_window_that_was_narrow_leaves_nothing_behind(opened):
    """Rows of page tables that are out of sight have the heights of when they were seen."""
    page = opened("long", link="#step=45", viewport={"width": 360, "height": 2000})
    heights = "[...document.querySelectorAll('.panel')].map((panel) => panel.getBoundingClientRect().height)"
    page.wait_for_timeout(200)
    before = page.evaluate(heights)
    for width in (100, 360):
        page.set_viewport_size({"width": width, "height": 2000})
        page.wait_for_timeout(200)
    assert page.evaluate(heights) == before


def test_a_click_in_the_timeline_goes_there_and_a_drag_follows(opened):
    page = opened("long")
    page.evaluate("document.querySelector('.timeline .field').scrollIntoView({ block: 'center' })")
    box = page.locator(".timeline .field").bounding_box()

    def at(part):
        return box["x"] + part * box["width"], box["y"] + box["height"] / 2

    page.mouse.click(*at(0.5))
    assert place(page) == pytest.approx(34, abs=1)
    page.mouse.down()
    page.mouse.move(*at(0.25), steps=3)
    assert place(page) == pytest.approx(17, abs=1)
    page.mouse.up()
    page.mouse.move(*at(0.9))
    assert place(page) == pytest.approx(17, abs=1), "it was let go"
    page.keyboard.press("ArrowRight")
    assert link(page) == f"#step={place(page) + 1}"


def test_a_page_is_not_large(tmp_path):
    """Of a run with as many sequences as in the README's example. What a step costs is what changed in it."""
    folder = make_folder(tmp_path / "model")
    llm = LLM(str(folder), num_blocks=20)
    for number, prompt in enumerate(
        ("What is the capital of France?", "One sentence about the sea.", "Why is it blue?")
    ):
        llm.add_request(prompt, SamplingParams(n=3, max_tokens=64, seed=number, ignore_eos=True))
    with open(tmp_path / "run.jsonl", "w", encoding="utf-8") as file:
        llm.observers.append(TraceWriter.of(llm, file))
        while llm.has_unfinished_requests:
            llm.step()
    run = run_of(tmp_path / "run.jsonl")
    whole, without = len(page_of([run]).encode()), len(page_of([{**run, "lines": []}]).encode())
    assert without < 300_000 and (whole - without) / len(run["lines"]) < 1500, "3 MB are enough for 1,800 such steps"
