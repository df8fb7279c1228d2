"""The page at / in a real browser, Chromium without a window: see server/page.html."""

import contextlib
import json
import logging

import pytest
from served import Slow
from tiny_model import make_folder

from minipaged.server.config import ServerConfig
from tests.browser import until

SLOW = 0.03  # seconds that a step takes at least


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a model that never ends by itself."""
    folder = make_folder(tmp_path_factory.mktemp("tiny"))
    for name in ("config.json", "generation_config.json"):
        told = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**told, "eos_token_id": None}))
    (folder / "tokenizer_config.json").write_text("{}")
    return str(folder)


@pytest.fixture(scope="module")
def everything(folder):
    with contextlib.closing(Slow(folder, ServerConfig(("<i>tiny</i>",)))) as served:
        yield served


@pytest.fixture
def served(everything):
    everything.slow = SLOW
    yield everything
    everything.slow = 0.0
    until(lambda: not everything.llm.engine.has_unfinished_requests)


@pytest.fixture
def tab(tabs, served):
    """Opens tabs with the server's page."""

    def open_one(url=served.url, **options):
        page = tabs.open(url, **options)
        page.wait_for_selector("#status.on, dialog[open]")
        return page

    open_one.wrong = tabs.wrong
    return open_one


def ask(page, text, tokens=60, **fields):
    page.fill("#max-tokens", str(tokens))
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))
    page.fill("#say", text)
    page.press("#say", "Enter")


def cells(page, kind):
    """(label, number of holders, "" for one) of each cell of a kind."""
    one = "c => [c.querySelector('b').textContent, c.querySelector('i')?.textContent ?? '']"
    return page.eval_on_selector_all(f"#pool .cell.{kind}", f"cells => cells.map({one})")


def shows(page, selector, text, seconds=10):
    """Wait until it does."""
    until(lambda: text in page.inner_text(selector), seconds)


def test_a_message_streams_and_the_next_one_knows_what_was_said(tab, served):
    page = tab()
    ask(page, "Hello")
    lengths = {until(lambda: len(page.inner_text(".text")))}
    while page.is_visible("#stop"):
        lengths.add(len(page.inner_text(".text")))
    assert len(lengths) > 5, "it grows piece by piece"
    facts = page.inner_text(".facts")
    assert "60 tokens" in facts and "tokens/s" in facts and "first after" in facts and "0 of 11 prompt tokens" in facts
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, "And?", tokens=8)
    first, answer, second = asked.value.post_data_json["messages"]
    assert first["content"] == "Hello" and second["content"] == "And?"
    assert (answer["role"], answer["content"]) == ("assistant", page.text_content(".text >> nth=0"))
    until(lambda: "cached" in page.inner_text(".facts >> nth=1") and page.is_hidden("#stop"))
    assert "0 of" not in page.inner_text(".facts >> nth=1"), "the prefix cache found what was said before"


def test_a_second_tab_joins_the_batch_and_closing_it_frees_its_blocks(tab, served):
    first, second = tab(), tab()
    ask(first, "One", tokens=200)
    first.wait_for_selector("#pool .cell.mine")
    alone = served.num_used
    ask(second, "Two", tokens=200)
    for page in (first, second):
        shows(page, "#num-running", "2")
        shows(page, "#batch", "2 tokens of 2 sequences")
        assert page.locator("#running .chip.mine").count() == 1, "it knows which of them is its own"
    names = {page.inner_text(".answer .chip") for page in (first, second)}
    assert len(names) == 2 and {name for name, _ in cells(first, "held")} >= names
    assert {name for name, _ in cells(first, "mine")} <= {first.inner_text(".answer .chip"), "".join(sorted(names))}
    before = served.num_used
    second.context.close()
    until(lambda: len(served.llm.engine.scheduler.running) == 1, 2)
    assert served.num_used < before and served.num_used >= alone
    shows(first, "#num-running", "1", 3)
    first.click("#stop")
    until(lambda: served.num_used == 0, 2)
    until(lambda: cells(first, "held") == [], 3)
    assert "stopped" in first.inner_text(".answer .head")


def test_samples_share_the_blocks_of_their_prompt(tab, served):
    page = tab()
    ask(page, "x" * 40, tokens=80, n=3)
    page.wait_for_selector("#pool .cell.shared")
    name = page.inner_text(".answer .chip >> nth=0").rstrip("1")
    assert [name, "3"] in cells(page, "shared")
    until(lambda: {f"{name}{i}" for i in (1, 2, 3)} <= {label for label, _ in cells(page, "held:not(.shared)")})
    page.hover("#pool .cell.shared >> nth=0")
    assert f"shared by 3: {name}1, {name}2, {name}3 (yours); 8 of 8 slots filled" in page.inner_text("#detail")
    page.click("label:has-text('go on with it') >> nth=2")
    until(lambda: page.is_hidden("#stop"))
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, "Go on", tokens=4, n=1)
    assert asked.value.post_data_json["messages"][1]["content"] == page.text_content(".text >> nth=2")


def test_beams_are_told_at_their_end(tab, served):
    page = tab()
    page.check("#beams")
    ask(page, "Best of", tokens=60, n=3)
    page.wait_for_selector("#pool .cell.shared")
    assert "at their end" in page.inner_text(".facts") and page.is_disabled("#temperature")
    until(lambda: page.is_hidden("#stop"))
    assert page.locator(".answer").count() == 3 and page.inner_text(".text >> nth=2")


def test_who_has_to_wait_is_told_so(tab, folder):
    with contextlib.closing(Slow(folder, ServerConfig(), max_num_seqs=1)) as narrow:
        narrow.slow = SLOW
        first, second = tab(narrow.url), tab(narrow.url)
        ask(first, "One", tokens=200)
        first.wait_for_selector("#running .chip.mine")
        ask(second, "Two", tokens=5)
        shows(second, ".facts", "waits for its turn")
        for page in (first, second):
            shows(page, "#num-waiting", "1")
        first.click("#stop")
        shows(second, ".facts", "5 tokens")


def test_foreign_text_stays_text(tab, served):
    page = tab()
    hostile = "<img src=x onerror=document.title='gone'><script>1</script>"
    ask(page, hostile, tokens=30)
    until(lambda: page.is_hidden("#stop"))
    assert page.text_content(".asked") == hostile and page.locator(".turn img, .turn script").count() == 0
    assert page.text_content("#model") == "<i>tiny</i>" and "tiny" in page.title()


LOOK = """() => {
  const show = View.prototype.show, all = (selector) => [...document.querySelectorAll(selector)];
  window.looks = [];
  View.prototype.show = function (moment) {
    show.call(this, moment);
    const text = (selector, root = document) => root.querySelector(selector).textContent;
    const tables = all("#tables [data-sequence]").map((row) =>
      [row.dataset.sequence, text(".small", row), [...row.querySelectorAll(".entry")].map((one) => +one.textContent)]);
    const of = (pool) => all(`${pool} .cell.held`).map((cell) => [Number(cell.dataset.block), text("i", cell)]);
    window.looks.push({ state: structuredClone(moment.state), tables, pool: of("#pool"), cpu: of("#cpu"),
      used: text("[data-count=used]"), running: text("#num-running") });
  };
}"""


def as_it_is_drawn(state):
    """What `LOOK` has to see of a state that the server told."""
    tables, held = [], {False: {}, True: {}}
    for name, table in state["tables"].items():
        unit = "token" if table["tokens"] == 1 else "tokens"
        words = f"{table['tokens']} {unit}{', on the CPU' if table['swapped'] else ''}"
        tables.append([name, words, table["blocks"]])
        for block in table["blocks"]:
            held[table["swapped"]][block] = held[table["swapped"]].get(block, 0) + 1
    pools = [sorted([block, "" if n == 1 else str(n)] for block, n in held[which].items()) for which in (False, True)]
    running = [one for one in state["requests"].values() if one["state"] == "running"]
    return sorted(tables), *pools, str(state["usage"]["used"]), str(len(running))


def test_what_is_told_is_drawn_step_by_step_while_memory_is_short(tab, folder):
    with contextlib.closing(Slow(folder, ServerConfig(), num_blocks=24, num_cpu_blocks=40)) as small:
        small.slow = 2 * SLOW
        pages = [tab(small.url), tab(small.url)]
        pages[0].evaluate(LOOK)
        for page, n, tokens in zip(pages, (1, 3), (120, 40), strict=True):
            ask(page, "Tell me more", tokens=tokens, n=n)
        pages[0].wait_for_selector("#cpu-pool:visible")
        for page in pages:
            until(lambda page=page: page.is_hidden("#stop"))
        until(lambda: not pages[0].evaluate("looks.at(-1).tables.length"))
        looks = pages[0].evaluate("looks")
        for page in pages:
            page.context.close()  # who looks longer than the server lives has an error
    for look in looks:
        seen = (sorted(look["tables"]), sorted(look["pool"]), sorted(look["cpu"]), look["used"], look["running"])
        assert seen == as_it_is_drawn(look["state"])
    assert {len(look["tables"]) for look in looks} >= {0, 4} and any(look["cpu"] for look in looks)


def test_what_moved_is_seen_for_a_moment(tab, served):
    page = tab()
    ask(page, "x" * 44, tokens=60, n=3)
    page.wait_for_selector(".moves .arrow.copies", state="attached")
    shows(page, "#events", "copied on write")
    until(lambda: page.is_hidden("#stop"))
    until(lambda: page.locator(".moves .arrow, #pool .freed").count() == 0)


def test_lines_lead_from_page_tables_to_blocks_where_there_is_room_and_a_phone_begins_with_the_chat(tab, served):
    wide, phone = tab(viewport={"width": 1920, "height": 900}), tab(viewport={"width": 360, "height": 740})
    ask(wide, "Hello", tokens=400)
    counts = "document.querySelectorAll('.moves .line').length / document.querySelectorAll('#tables .entry').length"
    until(lambda: wide.evaluate(counts) == 1)
    phone.wait_for_selector("#pool .cell.held")
    assert not phone.is_visible("#tables") and phone.locator(".moves .line").count() == 0
    top = "element => element.getBoundingClientRect().top"
    tops = [phone.eval_on_selector(part, top) for part in ("#chat", "#pool", "#running", "#page-tables")]
    assert tops == sorted(tops)
    phone.click("#page-tables summary")
    phone.wait_for_selector("#tables .entry")
    wide.click("#stop")


def test_what_the_server_says_no_to_is_said_in_words_and_the_text_is_not_lost(tab, served):
    page = tab()
    ask(page, "Hello", n=0)
    shows(page, "[role=alert]", "n=0")
    assert page.input_value("#say") == "Hello"
    assert page.is_enabled("#send")
    assert len(tab.wrong) == 1 and "400" in tab.wrong.pop()  # the browser says so itself


def test_all_goes_by_keyboard(tab, served):
    page = tab()
    page.focus("#say")
    page.keyboard.type("two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    page.keyboard.press("Enter")
    page.wait_for_selector("#pool .cell.mine")
    assert page.text_content(".asked") == "two\nlines"
    page.focus("#pool")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    columns = int(page.eval_on_selector("#pool", "pool => pool.style.getPropertyValue('--columns')"))
    assert page.inner_text("#detail").startswith(f"Block {columns + 1}:")
    assert page.get_attribute("#pool", "aria-activedescendant") == f"pool-{columns + 1}"
    page.keyboard.press("Escape")
    until(lambda: page.locator("#pool .here").count() == 0)
    assert page.is_visible("#stop"), "it ended the look at a block, and not the answer"
    page.focus("#running button")
    page.keyboard.press("Enter")
    page.wait_for_selector("#pool.picking .cell.picked")
    page.keyboard.press("Escape")
    page.wait_for_selector("#stop", state="hidden")


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen_by_day_and_night(tab, served, width, scheme):
    page = tab(color_scheme=scheme, viewport={"width": width, "height": 740})
    ask(page, "w" * 300, tokens=60, n=4)
    page.wait_for_selector("#pool .cell.shared")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for part in ("#turns", "#engine"):
        assert page.eval_on_selector(part, "e => e.scrollWidth <= e.clientWidth")
    outside = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
    assert page.evaluate(f"{outside}.map(e => e.id || e.className)") == []
    light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(c => c > 128)")
    assert light is (scheme == "light")


def test_a_pool_beyond_what_can_be_drawn_is_summed_up(tab, folder):
    with contextlib.closing(Slow(folder, ServerConfig(), num_blocks=5000)) as large:
        page = tab(large.url)
        page.wait_for_selector("#bar")
        assert "5000 blocks are too many to show each" in page.inner_text("#bar") and page.is_hidden("#pool")
        assert "--num-blocks 512 shows them all" in page.inner_text("#bar")


def test_a_key_is_asked_for_and_kept_for_the_tab(tab, folder):
    with contextlib.closing(Slow(folder, ServerConfig(api_keys=("sesame",)))) as locked:
        page = tab(locked.url)
        for key in ("wrong", "sesame"):
            page.fill("#key", key)
            page.keyboard.press("Enter")
            if key == "wrong":
                page.wait_for_selector("#key-wrong")
        page.wait_for_selector("#status.on")
        assert page.is_hidden("#ask-key") and page.evaluate("sessionStorage.getItem('key')") == "sesame"
        ask(page, "Hello", tokens=5)
        shows(page, ".facts", "5 tokens")
        page.reload()
        page.wait_for_selector("#status.on")
        page.evaluate("sessionStorage.clear()")
        ask(page, "Hello", tokens=5)
        page.wait_for_selector("dialog[open]")
        page.keyboard.press("Escape")
        shows(page, "[role=alert]", "API key")
        assert {*tab.wrong} == {"Failed to load resource: the server responded with a status of 401 (Unauthorized)"}
        tab.wrong.clear()


def test_a_hidden_tab_does_not_look(tab, served):
    before, page = len(served.llm.engine.observers), tab()
    for hidden, number in ((True, before), (False, before + 1)):
        seen = f"{{value: {str(hidden).lower()}, configurable: true}}"
        page.evaluate(f"Object.defineProperty(document, 'hidden', {seen})")
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        until(lambda number=number: len(served.llm.engine.observers) == number)
    page.wait_for_selector("#status.on")


def test_an_open_page_does_not_hold_the_server_up(tab, folder, caplog):
    with contextlib.closing(Slow(folder, ServerConfig())) as ending, caplog.at_level(logging.INFO):
        page = tab(ending.url)
        ask(page, "Hello", tokens=5)
        shows(page, ".facts", "5 tokens")
        assert ending.stop() < 3
        assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.WARNING]
        page.wait_for_selector("#status:not(.on)")
        ask(page, "Anybody?")
        shows(page, "[role=alert]", "can't be reached")
        tab.wrong.clear()  # refused connections
