"""The timeline and the plots of a run's page, in a browser: what they draw is what was, and pointing goes there."""

import json

import pytest

from minipaged.terminal.snapshot import request_of
from minipaged.viewer.page import page_of, run_of
from tests.browser import until
from tests.viewed import Recorded

SEEDS = (63, 1085, 1410)  # of schedules with chunks, drafts, and both ways to make way
USAGE = {"block_size": 4, "num_blocks": 8, "free": 8, "used": 0, "shared": 0, "tokens_stored": 0,
         "tokens_logical": 0, "blocks_saved_by_sharing": 0, "cpu_total": 0, "cpu_used": 0, "peak_used": 0,
         "copies": 0, "swapped_out_blocks": 0, "swapped_in_blocks": 0}  # fmt: skip
SIZES = {"block_size": 4, "num_blocks": 8, "num_cpu_blocks": 0}
READ = """() => {
  const past = pastOf(traces[0]), lanes = [...past.lanes.values()];
  const kinds = lanes.map((lane) => [lane.name, lane.spans.flatMap(({ kind, from, to }) =>
    Array.from({ length: to - from }, (_, i) => [from + i, kind]))]);
  const marks = lanes.map((lane) => [lane.name, lane.marks.map(({ kind, place }) => [place, kind])]);
  const numbers = Object.entries(past.series).map(([name, all]) => [name, [...all]]);
  return { kinds, marks, numbers: Object.fromEntries(numbers) };
}"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    return {seed: Recorded(seed, folder / f"seed-{seed}.jsonl") for seed in SEEDS}


@pytest.fixture
def opened(tabs, tmp_path):
    def open_one(*paths, **options):
        (tmp_path / "page.html").write_text(page_of([run_of(path) for path in paths]), encoding="utf-8")
        page = tabs.open(f"file://{tmp_path}/page.html", offline=True, **options)
        until(lambda: page.evaluate("views[0].parts.find((part) => part instanceof Timeline).scale > 0"))
        return page

    return open_one


def without(path, out, *fields):
    """The trace without some fields of its steps."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [{name: value for name, value in line.items() if name not in fields} for line in lines]
    out.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return out


def computed_by(run):
    """The requests that computed something, for each step; of those that are known."""
    told = [json.loads(line).get("did", {}).get("computed", {}) for line in run.path.read_text().splitlines()[1:]]
    return [{request_of(name) for name in computed} - {"?"} for computed in told]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_lane_says_in_which_queue_a_request_was_at_every_step(opened, recorded, seed):
    run = recorded[seed]
    told = opened(run.path).evaluate(READ)
    computed, letter = computed_by(run), {"waiting": "W", "swapped": "S", "running": "I"}
    kinds = {name: dict(map(tuple, spans)) for name, spans in told["kinds"]}
    for place, truth in enumerate(run.truths):
        states = {name: which for which, queue in truth["queues"].items() for name, *_ in queue}
        at = {name: spans[place] for name, spans in kinds.items() if place in spans}
        assert set(at) == set(states) | computed[place], place
        for name, kind in at.items():
            assert kind in "PDR" if name in computed[place] else kind == letter[states[name]], (place, name)
    assert {kind for spans in kinds.values() for kind in spans.values()} >= {"W", "P", "D"}


@pytest.mark.parametrize("seed", SEEDS)
def test_numbers_of_the_plots_are_those_of_the_memory(opened, recorded, seed):
    run = recorded[seed]
    numbers = opened(run.path).evaluate(READ)["numbers"]
    for name in ("used", "shared", "cached", "found", "tokens"):
        assert numbers[name] == [int(truth["counts"][name]) for truth in run.truths], name
    for which in ("running", "waiting", "swapped"):
        assert numbers[f"in {which}"] == [len(truth["queues"][which]) for truth in run.truths], which


def test_who_made_way_is_marked_where_it_did(opened, recorded):
    seen = set()
    for run in recorded.values():
        told = opened(run.path).evaluate(READ)["marks"]
        marks = {(name, place, kind) for name, own in told for place, kind in own}
        lines = [json.loads(line).get("did", {}) for line in run.path.read_text().splitlines()[1:]]
        happened = set()
        for place, did in enumerate(lines):
            happened |= {(name, place, how) for name, how in did.get("preempted", {}).items()}
            happened |= {(name, place, "resumed") for name in did.get("resumed", ())}
        assert {mark for mark in marks if mark[2] in ("swap", "recompute", "resumed")} == happened
        seen |= {kind for *_, kind in marks}
    assert seen >= {"swap", "recompute", "resumed", "end"}


def test_a_recompute_is_no_prefill_and_ends_where_the_request_had_been(opened, tmp_path):
    """Eight tokens of a prompt of ten were computed; all is dropped, and comes back in chunks of five."""
    step = {"number": 1, "sequences": 1, "tokens": 8}
    first = {"step": step, "usage": USAGE, "num_preemptions": 0, "tables": {}, "cached": {}}
    began = {"id": "a", "state": "running", "prompt": 10, "output": 0}
    states = [began, {"state": "waiting"}, {"state": "running"}, {}, {}]
    did = [{"computed": {"A": [0, 8, 0]}}, {"preempted": {"A": "recompute"}}, {"computed": {"A": [0, 5, 0]}},
           {"computed": {"A": [5, 4, 0]}}, {"computed": {"A": [9, 1, 0]}}]  # fmt: skip
    lines = [{"format": "minipaged trace", "version": 2, "model": "m", **SIZES}]
    for number, (state, done) in enumerate(zip(states, did, strict=True), 1):
        patch = {"requests": {"A": state}} | (first if number == 1 else {})
        lines.append({"step": number, "did": done, "patch": patch})
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = opened(tmp_path / "t.jsonl")
    assert page.evaluate(READ)["kinds"] == [["A", [[0, "P"], [1, "W"], [2, "R"], [3, "R"], [4, "P"]]]]
    label = page.get_attribute(".timeline [role=option]", "aria-label")
    assert "prefill 8 tokens" in label and "recompute 9 tokens in 2 chunks, steps 3 to 4" in label


def at_x(page, place, number=0):
    """Where in the window a step stands, in the middle of the first lane."""
    return page.evaluate(
        """([place, number]) => {
          const line = views[number].parts.find((part) => part instanceof Timeline);
          line.field.scrollIntoView({ block: "center" });
          const { left, top } = line.field.getBoundingClientRect(), past = line.past;
          return [left + (axis.from(past, place) + axis.to(past, place)) / 2 * line.scale, top + 10];
        }""",
        [place, number],
    )


@pytest.mark.parametrize("mode", ["step", "time"])
def test_a_click_goes_to_the_step_and_a_drag_to_all_between(opened, recorded, mode):
    page = opened(recorded[1085].path)
    page.click(f".timeline button:text-is('{'steps' if mode == 'step' else 'seconds'}')")
    for place in (0, 7, 30, page.evaluate("player.last")):
        page.mouse.click(*at_x(page, place))
        assert page.evaluate("player.now") == place
    page.mouse.move(*at_x(page, 10))
    page.mouse.down()
    page.mouse.move(*at_x(page, 20), steps=5)
    page.mouse.up()
    assert page.evaluate("player.now") == 20
    page.mouse.move(*at_x(page, 40))
    assert page.evaluate("player.now") == 20, "it is no drag any more"


def test_the_cursor_stands_on_the_step_in_all_of_them(opened, recorded):
    page = opened(recorded[1085].path)
    for mode in ("step", "time"):
        page.evaluate("(mode) => axis.set(mode)", mode)
        page.evaluate("player.go(33)")
        wrong = page.evaluate("""() => [...document.querySelectorAll(".timeline .field, .plot .field")].map((field) => {
          const own = field.getBoundingClientRect(), cursor = field.querySelector(".cursor").getBoundingClientRect();
          const end = axis.to(pastOf(traces[0]), 33) / axis.end * own.width;
          return Math.abs(cursor.right - own.left - end);
        }).filter((off) => off > 2.5)""")
        assert wrong == []


def test_lanes_are_chosen_and_picked_by_keyboard_while_arrows_move_in_time(opened, recorded):
    page = opened(recorded[1085].path)
    page.focus(".timeline [role=listbox]")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("player.now") == 1
    chosen = page.get_attribute(".timeline [role=listbox]", "aria-activedescendant")
    assert page.text_content(f"#{chosen}") == "B" and page.is_visible(".timeline .here")
    page.keyboard.press("Enter")
    selected = ".timeline [aria-selected=true]"
    assert page.evaluate("views[0].picked") == "B" and page.text_content(selected) == "B"
    page.keyboard.press("Escape")
    assert page.evaluate("views[0].picked") == "" and page.locator(selected).count() == 0


def test_zoom_keeps_what_is_under_the_pointer(opened, recorded):
    page = opened(recorded[1085].path)
    before = at_x(page, 33)
    page.mouse.move(*before)
    page.keyboard.down("Control")
    for _ in range(4):
        page.mouse.wheel(0, -100)
        page.wait_for_timeout(50)
    page.keyboard.up("Control")
    wide = page.evaluate("views[0].parts.find((part) => part instanceof Timeline).zoom")
    assert wide > 1.5 and abs(at_x(page, 33)[0] - before[0]) < 12
    page.click(".timeline [aria-label='show all of the time']")
    assert page.evaluate("views[0].parts.find((part) => part instanceof Timeline).zoom") == 1


def test_two_runs_have_the_same_scales(opened, recorded):
    page = opened(recorded[63].path, recorded[1085].path)
    page.select_option("#mode", "time")
    assert page.evaluate("axis.mode") == "time"
    one, other = (page.locator(".run").nth(number) for number in (0, 1))
    assert one.locator(".ticks span").all_text_contents()[1] == other.locator(".ticks span").all_text_contents()[1]
    scales = page.evaluate("views.map((view) => view.parts.find((part) => part instanceof Timeline).scale)")
    assert scales[0] == scales[1]
    tops = one.locator(".plot .top").all_text_contents()
    assert tops == other.locator(".plot .top").all_text_contents() and len(tops) >= 5


def test_a_trace_without_times_is_drawn_in_steps(opened, recorded, tmp_path):
    page = opened(without(recorded[1085].path, tmp_path / "bare.jsonl", "time", "seconds", "arrived", "words", "texts"))
    assert page.locator(".timeline button:text-is('seconds')").count() == 0
    page.evaluate("axis.set('time')")
    assert page.evaluate("axis.mode") == "step"
    page.evaluate("player.go(9)")
    assert "in the step" in page.text_content(".plot:has-text('output tokens') .value")


@pytest.mark.parametrize("width", [360, 1280, 2560])
def test_nothing_stands_outside_of_the_page(opened, recorded, width):
    page = opened(recorded[1085].path, viewport={"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    over = page.evaluate("""() => [...document.querySelectorAll(".timeline, .plot")].filter((one) =>
      one.getBoundingClientRect().right > one.closest(".panel").getBoundingClientRect().right).length""")
    assert over == 0


def test_pointing_says_in_words_what_a_request_did_in_the_step(opened, recorded):
    page = opened(recorded[1085].path)
    page.mouse.move(*at_x(page, 0))
    told = page.locator(".timeline .here")
    assert told.is_visible() and told.locator("div").first.text_content().startswith("A in step 1")
    page.mouse.move(5, 5)
    assert not told.is_visible()


def test_a_run_without_requests_has_an_empty_timeline(opened, tmp_path):
    step = {"number": 1, "sequences": 0, "tokens": 0}
    patch = {"step": step, "usage": USAGE, "num_preemptions": 0, "tables": {}, "cached": {}, "requests": {}}
    lines = [{"format": "minipaged trace", "version": 2, "model": "m", **SIZES}, {"step": 1, "patch": patch}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = opened(tmp_path / "t.jsonl")
    page.focus(".timeline [role=listbox]")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.evaluate("views[0].picked") == ""
