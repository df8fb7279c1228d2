"""Whatever stands in a trace is shown as text, and the page asks nobody for anything."""

import json
import re

import pytest

from minipaged.viewer import page as pages
from minipaged.viewer.page import page_of, run_of, write_page
from minipaged.viewer.state import apply_patch
from minipaged.viewer.trace import TraceError
from tests.viewed import Recorded

HIT = "window.hit = 1"
TEXTS = [
    f"<img src=x onerror='{HIT}'>", f"</script><script>{HIT}</script>", f"]]><!--<script>{HIT}</script>",
    "a\u2028b\u2029c", "\u202eright to left", "\ud800 half \udfff", "nul \0 byte", "x" * 100_000, "__proto__",
    f"javascript:{HIT}", "{{data}}", "'\"`${hit = 1}\\u003c&lt;&amp;", "e\u0301" * 200, "https://example.com/x.png",
    f"<svg/onload={HIT}>", "-->\n\t\r <style>*{{display:none}}",
]  # fmt: skip
NAMES = ("constructor", "__proto__", f"<img src=x onerror='{HIT}'>", "toString", "", "\u202eA", "A\n", "a", "Ä", "A١")


def hostile(path, names):
    """A trace of which all texts are others. names: of requests, instead of A, B, ..."""
    number = 0

    def text():
        nonlocal number
        number += 1
        return TEXTS[number % len(TEXTS)]

    def named(value):
        found = re.fullmatch(r"([A-F])(\d*)", value) if isinstance(value, str) else None
        return names.get(found[1], found[1]) + found[2] if found else value

    def all_named(value):
        if isinstance(value, dict):
            return {named(name): all_named(one) for name, one in value.items()}
        return [all_named(one) for one in value] if isinstance(value, list) else named(value)

    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines[0] |= {"model": text(), "lesson": text(), "title": TEXTS[1], "settings": {text(): text(), "schedule": text()}}
    for line in lines[1:]:
        line["events"] = [text() for _ in line.get("events", [])] + [text()]
        line["texts"] = {block: text() for block in line.get("texts", {})}
        line.setdefault("did", {}).update(errors={"A": text()})
        for name in line["did"].get("finished", {}):
            line["did"]["finished"][name] = text()
        for new in line.get("words", {}).values():
            new["add"] = [text() for _ in new["add"]]
        for request in line["patch"].get("requests", {}).values():
            if request and "id" in request:
                request["id"] = text()
    return "".join(json.dumps(all_named(line)) + "\n" for line in lines)


LOOK = """() => {
  const names = [...traces[0].requests.keys()];
  for (let place = 0; place < traces[0].length; place++) {
    player.go(place);
    views[0].pick(names[place % names.length]);
    views[0].look(place % traces[0].header.num_blocks);
  }
  const tags = [...document.querySelectorAll("body *")].map((element) => element.tagName.toLowerCase());
  return {
    hit: window.hit, tags: [...new Set(tags)], scripts: document.scripts.length,
    attributes: [...document.querySelectorAll("body *")].flatMap((element) => element.getAttributeNames())
      .filter((name) => /^(on|src$|href$)/.test(name)),
    wide: document.documentElement.scrollWidth - innerWidth,
  };
}"""


def test_texts_of_a_trace_are_text(tabs, tmp_path):
    Recorded(521, tmp_path / "good.jsonl")
    (tmp_path / "run.jsonl").write_text(hostile(tmp_path / "good.jsonl", {}), encoding="utf-8")
    write_page([tmp_path / "run.jsonl"], tmp_path / "run.html")
    page = tabs.open(f"file://{tmp_path}/run.html", offline=True)
    seen = page.evaluate(LOOK)
    assert tabs.wrong == [] and seen["hit"] is None and seen["scripts"] == 2 and seen["attributes"] == []
    assert not {"img", "iframe", "object", "link", "base", "a", "style", "b>"} & set(seen["tags"])
    assert page.text_content(".title") == TEXTS[1] and TEXTS[1] in page.title()
    assert seen["wide"] <= 0, "a text without a space is no wider than the page"


def test_the_name_of_a_file_is_text(tabs, tmp_path):
    """Bytes that are no letters, too."""
    trace = tmp_path / f"<img src=x onerror={HIT}> \udcff {{{{data}}}}.jsonl"
    Recorded(521, trace)
    write_page([trace, trace], tmp_path / "run.html")
    page = tabs.open(f"file://{tmp_path}/run.html", offline=True)
    assert page.text_content(".title") == trace.stem and page.locator("img").count() == 0
    assert tabs.wrong == [] and page.evaluate("window.hit") is None


def test_what_a_page_is_made_of_needs_nobody_and_makes_no_markup():
    for part in pages.PARTS.iterdir():
        source = part.read_text(encoding="utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|Function\(|srcdoc|@import", source
        ), part
        urls = [found[0] for found in re.finditer(r"(?:https?:)?//[a-z0-9-]+\.[a-z][^\s\"'`<)]*", source)]
        assert set(urls) <= {"http://www.w3.org/2000/svg"}, part
        assert part.suffix != ".html" or not re.search(r"\s(?:on[a-z]+|style|src)\s*=", source), "no handlers in markup"
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', (pages.PARTS / "replay.html").read_text("utf-8"))
    allowed = {"'none'", "'unsafe-inline'", "data:"}
    assert all(set(rule.split()[1:]) <= allowed for rule in policy[1].split(";")) and "default-src 'none'" in policy[1]


def test_names_are_names(tmp_path):
    """Letters and numbers: nobody has to ask whether one is __proto__."""
    Recorded(521, tmp_path / "good.jsonl")
    for name in NAMES:
        (tmp_path / "run.jsonl").write_text(hostile(tmp_path / "good.jsonl", {"A": name}), encoding="utf-8")
        with pytest.raises(TraceError, match="line 2: not a step of a trace: KeyError") as refused:
            run_of(tmp_path / "run.jsonl")
        assert "\n" not in str(refused.value)


def test_patches_change_nothing_but_their_target(tabs, tmp_path):
    """What a server tells may be any JSON: RFC 7386, and nothing of JavaScript's own is a part of a state."""
    Recorded(521, tmp_path / "good.jsonl")
    (tmp_path / "run.html").write_text(page_of([run_of(tmp_path / "good.jsonl")]), encoding="utf-8")
    page = tabs.open(f"file://{tmp_path}/run.html")
    patch = (
        '{"__proto__":{"hit":1},"constructor":{"hit":{"a":[1]}},"toString":{"hit":1},"a":{"b":null},"c":[{"d":null}]}'
    )
    for target in ("{}", '{"a":[1],"constructor":7}', '{"a":{"b":1,"e":2}}'):
        both = page.evaluate(
            "(texts) => JSON.stringify(merge(copied(JSON.parse(texts[0])), JSON.parse(texts[1])))", [target, patch]
        )
        assert json.loads(both) == apply_patch(json.loads(target), json.loads(patch))
    assert page.evaluate("[...Object.keys(Object.prototype), ...Object.keys(Object), typeof ({}).hit]") == ["undefined"]
