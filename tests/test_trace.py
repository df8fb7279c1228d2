"""The trace of a run: what was written is what was, and can be drawn again."""

import inspect
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tiny_model import make_folder

import minipaged.viewer
from minipaged import LLM, BeamSearchParams, SamplingParams
from minipaged.generate import main as generate
from minipaged.terminal.draw import picture
from minipaged.terminal.snapshot import request_of
from minipaged.trace import main
from minipaged.viewer.page import page_of, run_of
from minipaged.viewer.state import Eye
from minipaged.viewer.thinning import condensed, thinned
from minipaged.viewer.trace import TraceError, TraceWriter, read_lines, read_trace
from minipaged.viewer.words import read_on

OLD = Path(__file__).parent / "data" / "trace_version_1.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def traced(model, tmp_path_factory):
    """A trace of a run with samples, beams and too little memory; and what was true after each step."""
    path, truth = tmp_path_factory.mktemp("trace") / "run.jsonl", []
    llm = LLM(model, num_blocks=24, block_size=4)
    for number in range(4):
        params = SamplingParams(n=1 + number % 3, max_tokens=18, seed=number, ignore_eos=True)
        llm.add_request(f"prompt {number}", params)
    llm.add_request("search", BeamSearchParams(beam_width=3, max_tokens=12, ignore_eos=True))

    def remember(plan, output):
        memory, scheduler = llm.memory, llm.scheduler
        tables = sorted((memory.num_tokens(i), memory.block_table(i), memory.is_swapped(i)) for i in memory.sequences())
        queues = [[request.arrival for request in queue] for queue in (scheduler.running, scheduler.waiting)]
        counts = [memory._gpu.allocator.ref_count(block) for block in range(24)]
        truth.append((plan, output, tables, queues, counts, memory.usage()))

    with open(path, "w") as file:
        llm.observers += [TraceWriter.of(llm, file), remember]
        while llm.has_unfinished_requests:
            llm.step()
    return path, truth


def test_the_trace_holds_what_was(traced, model):
    path, truth = traced
    header, steps = read_trace(path)
    assert {key: header[key] for key in ("model", "block_size", "num_blocks", "version")} == {
        "model": model, "block_size": 4, "num_blocks": 24, "version": 2,
    }  # fmt: skip
    for step, (plan, _, tables, queues, counts, usage) in zip(steps, truth, strict=True):
        assert step.step == plan.step
        assert step.state["step"] == {"number": plan.step, "sequences": len(plan.sequences), "tokens": plan.num_tokens}
        assert sorted((t.num_tokens, t.blocks, t.swapped) for t in step.memory.tables) == tables
        assert [[ord(name) - 65 for name in names] for names in (step.memory.running, step.memory.waiting)] == queues
        holders = step.memory.holders()
        assert [len(holders.get(block, [])) for block in range(24)] == counts
        assert step.memory.usage == usage


def test_the_trace_tells_all_that_moved(traced):
    path, truth = traced
    events = [event for step in read_trace(path)[1] for event in step.events]
    plans = [plan for plan, *_ in truth]
    assert sum(event.endswith("finished") for event in events) and plans[-1].step == len(plans)
    copies = [event for event in events if " copied on write: " in event]
    assert [int(event.split()[0]) for event in copies] == [len(plan.copies) for plan in plans if plan.copies]
    swaps = [event for event in events if " swapped out to make room: " in event]
    drops = [event for event in events if " dropped to make room" in event]
    assert len(swaps) == sum(any(how == "swap" for _, how in plan.preempted) for plan in plans) > 0
    assert len(drops) == sum(any(how == "recompute" for _, how in plan.preempted) for plan in plans) > 0
    for plan, event in zip([plan for plan in plans if plan.copies], copies, strict=True):
        for (source, target), words in zip(plan.copies, event.split(": ")[1].split(", "), strict=True):
            [writer] = [s for s in plan.sequences if target in s.block_table]
            name, move = words.split()
            assert move == f"{source}->{target}" and request_of(name) == "ABCDE"[int(writer.request_id)]


def test_pieces_of_a_character_are_one_with_the_last_of_them(model, tmp_path):
    """Tokens are bytes here: of four, three say nothing, wherever steps cut; what a block holds is read as a whole."""
    data = "I \U0001f600, \u00e9!".encode()
    prompt = [sorted(set(data)).index(byte) for byte in data]

    def decode(tokens):
        return bytes((sorted(set(data)) + [120] * 96)[token] for token in tokens).decode("utf-8", "replace")

    for chunk in (1, 3, 64):
        path, words, texts = tmp_path / f"{chunk}.jsonl", {}, {}
        llm = LLM(model, num_blocks=16, block_size=8, max_num_seqs=1, max_num_batched_tokens=chunk)
        with llm, open(path, "w") as file:
            llm.observers.append(TraceWriter(llm, file, {"model": model}, decode))
            llm.generate({"prompt_token_ids": prompt}, SamplingParams(max_tokens=3))
        for step in read_trace(path)[1]:
            words, texts = read_on(words, step.words), texts | step.texts
        assert words["A"][:6] == ["I", " ", *"\ufffd\ufffd\ufffd", "\U0001f600"] and texts["0"] == "I \U0001f600, "
        assert words["A"][8:11] == ["\ufffd", "\u00e9", "!"]


def test_it_is_drawn_again(traced, model, capsys):
    path, _ = traced
    steps = list(read_trace(path)[1])
    assert main([str(path), "--step", "7", "--no-color"]) == 0
    title = f"{model}, step 7"
    expected = picture(steps[6].memory, title, steps[6].events).plain.rstrip()
    assert capsys.readouterr().out.rstrip() == expected
    assert main([str(path)]) == 0
    assert capsys.readouterr().out.count("PAGE TABLES") == len(steps)
    assert main([str(path), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(steps) and lines[0].startswith("step     1:")
    assert all(f"{step.memory.usage.used:5} blocks in use" in line for step, line in zip(steps, lines, strict=True))


def test_the_command_line_writes_it(model, tmp_path, capsys):
    path = tmp_path / "run.jsonl"
    path.write_text("an old trace, and a long one\n" * 1000)
    flags = ["--model", model, "--num-blocks", "30", "--block-size", "4", "--max-tokens", "9"]
    assert generate(["hello", *flags]) == generate(["hello", *flags, "--trace", str(path)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    header, steps = read_trace(path)
    assert first == second and header["num_blocks"] == 30
    assert [step.step for step in steps] == list(range(1, 10))


def test_what_is_no_trace_is_refused(traced, tmp_path, capsys):
    path, truth = traced
    lines = path.read_text().splitlines(keepends=True)
    file = tmp_path / "t"

    def refused(text):
        file.write_text(text)
        assert main([str(file)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("minipaged.trace: error: ") and error.count("\n") == 1
        return error

    assert "is not a trace" in refused("")
    assert "is not a trace" in refused("[]\n")
    assert "not JSON" in refused("hello\n")
    assert "is a trace of version 9" in refused(lines[0].replace('"version":2', '"version":9'))
    assert "line 3: not JSON" in refused("".join([*lines[:2], "{\n", *lines[2:]]))
    assert "line 3: not a step of a trace" in refused("".join([*lines[:2], '{"step":3}\n']))
    assert main([str(tmp_path / "none")]) == 2 and "cannot read" in capsys.readouterr().err
    assert main([str(path), "--step", "999"]) == 2
    assert f"has no step 999: the last is {len(truth)}" in capsys.readouterr().err


def test_a_cut_last_line_is_left_out(traced, tmp_path):
    path, truth = traced
    file = tmp_path / "t"
    file.write_text(path.read_text()[:-40])
    assert len(list(read_trace(file)[1])) == len(truth) - 1


def test_a_trace_that_can_not_be_written_ends_the_run(model, capsys):
    class Full:
        name = "trace"

        def write(self, text):
            raise OSError(28, "No space left on device")

    llm = LLM(model, num_blocks=8)
    with pytest.raises(TraceError, match="cannot write the trace trace: .*No space left"):
        TraceWriter.of(llm, Full())


# --- version 1 ----------------------------------------------------------------------------------------------------


def test_a_trace_of_version_1_is_drawn_as_it_was(capsys):
    """The file was written, and the text drawn, by the last program that knew of no other version."""
    drawing = (OLD.with_suffix(".txt")).read_text()
    assert main([str(OLD), "--list", "--no-color"]) == main([str(OLD), "--step", "7", "--no-color"]) == 0
    assert capsys.readouterr().out == drawing


def test_a_trace_of_version_1_becomes_a_page(tmp_path):
    assert main([str(OLD), "--html", str(tmp_path / "p.html"), "--perfetto", str(tmp_path / "p.json")]) == 0
    page = run_of(OLD)
    assert page["header"]["version"] == 1 and len(page["lines"]) == 18 and page["every"] == 1
    steps = [*read_trace(OLD)[1]]
    assert steps[6].did["swap_out"] == [[4, 0], [7, 1], [2, 2], [8, 3]] and steps[8].did["finished"] == {"A": ""}
    events = json.loads((tmp_path / "p.json").read_text())["traceEvents"]
    assert any("a step is a millisecond" in event["args"].get("name", "") for event in events)
    spans = [(event["tid"], event["name"]) for event in events if event["ph"] == "X" and event["cat"] == "request"]
    assert sorted(spans, key=lambda span: span[0]) == [
        (2, "running"), (3, "running"), (3, "swapped"), (3, "running"), (4, "queue"), (4, "running")
    ]  # fmt: skip


# --- pages --------------------------------------------------------------------------------------------------------


def data_in(page):
    return json.loads(page.read_text().split('<script id="data" type="application/json">')[1].split("</script>")[0])


def test_a_page_has_the_runs_in_it(traced, tmp_path):
    path, truth = traced
    page = tmp_path / "run.html"
    assert main([str(path), str(OLD), "--html", str(page), "--step", "5"]) == 0
    one, other = data_in(page)["runs"]
    assert (one["title"], other["title"]) == (path.stem, OLD.stem)
    lines = (json.dumps(line) for line in [one["header"], *one["lines"]])
    header, steps = read_lines(lines, "a page")
    assert header == {**read_trace(path)[0], "open_at": 5}
    assert [*steps] == [*read_trace(path)[1]]


def test_a_long_run_is_thinned_out(traced, tmp_path):
    """What a step of a page says is what all of those did that it stands for."""
    steps = [*read_trace(traced[0])[1]]
    for most in (2, 4, 10, 1000):
        kept, every = condensed(iter(steps), most)
        assert len(kept) <= most and (len(kept) - 1) * every < len(steps) <= len(kept) * every
        assert kept == [*thinned(iter(steps), every)]
        assert sum(len(step.did.get("copies", ())) for step in kept) == sum(len(s.did.get("copies", ())) for s in steps)
        assert kept[-1].state == steps[-1].state
        assert [event for step in kept for event in step.events] == [event for step in steps for event in step.events]


def test_hostile_text_stays_text(tmp_path):
    lines = OLD.read_text().splitlines()
    evil = "</script><script>alert(1)</script><!--\u2028\ud800"
    header = {**json.loads(lines[0]), "title": evil, "model": evil}
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([json.dumps(header), *lines[1:]]))
    page = tmp_path / "page.html"
    assert main([str(bad), "--html", str(page), "--perfetto", str(tmp_path / "out.json")]) == 0
    assert data_in(page)["runs"][0]["title"] == evil
    assert page.read_text().count("</script>") == page_of([]).count("</script>")


# --- the timeline ---------------------------------------------------------------------------------------------------


def test_the_timeline_of_a_run(traced, tmp_path):
    path, truth = traced
    out = tmp_path / "out.json"
    assert main([str(path), "--perfetto", str(out)]) == 0
    events = json.loads(out.read_text())["traceEvents"]
    steps, plans = [*read_trace(path)[1]], [plan for plan, *_ in truth]
    assert {event["ph"] for event in events} == {"M", "X", "C", "i"}
    for event in events:  # what the format asks for
        assert isinstance(event["name"], str) and event["pid"] == 1 and event["tid"] in range(1, 7)
        assert event["ph"] == "M" or event["ts"] >= 0
        assert event.get("dur", 0) >= 0 and event.get("s", "t") == "t"
        assert event["ph"] != "C" or all(isinstance(value, (int, float)) for value in event["args"].values())
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert [names[tid][:2] for tid in sorted(names)] == ["th", "A:", "B:", "C:", "D:", "E:"]
    spans = {}
    for event in events:
        if event["ph"] == "X":
            spans.setdefault(event["tid"], []).append(event)
    for of_thread in spans.values():
        for one, other in zip(of_thread, of_thread[1:], strict=False):
            assert one["ts"] + one["dur"] <= other["ts"] + 0.002  # microseconds, rounded
    assert [event["name"] for event in spans[1]] == [f"step {step.step}" for step in steps]
    kinds = [event["name"] for tid in range(2, 7) for event in spans[tid]]
    preempted = [how for plan in plans for _, how in plan.preempted]
    assert kinds.count("swapped") == preempted.count("swap") > 0
    assert kinds.count("queue") == 5 + preempted.count("recompute") and kinds.count("recompute") > 0
    tokens = [event["args"]["tokens"] for tid in range(2, 7) for event in spans[tid] if "tokens" in event["args"]]
    assert sum(tokens) == sum(plan.num_tokens for plan in plans)
    instants = [event["name"] for event in events if event["ph"] == "i"]
    assert len([name for name in instants if name.startswith("finished")]) == 5
    assert len([name for name in instants if name.endswith("make room")]) == len(preempted)
    used = [event["args"]["value"] for event in events if event["name"] == "blocks used"]
    assert used == [usage.used for *_, usage in truth]


def test_a_request_whose_prompt_comes_in_chunks(model, tmp_path):
    path, out = tmp_path / "t", tmp_path / "out.json"
    llm = LLM(model, num_blocks=24, block_size=4, max_num_seqs=1, max_num_batched_tokens=8, prefix_cache="none")
    llm.add_request([5] * 20, SamplingParams(max_tokens=4, ignore_eos=True))
    with open(path, "w") as file:
        llm.observers.append(TraceWriter.of(llm, file))
        while llm.has_unfinished_requests:
            llm.step()
    assert main([str(path), "--perfetto", str(out)]) == 0
    events = json.loads(out.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X" and event["tid"] == 2]
    assert [(span["name"], span["args"].get("from"), span["args"].get("to")) for span in spans] == [
        ("queue", None, None), ("prefill", 0, 8), ("prefill", 8, 16), ("prefill", 16, 20), ("decode", 20, 23),
    ]  # fmt: skip
    total = sum(span["dur"] for span in spans)
    steps = [*read_trace(path)[1]]
    assert total <= 1e6 * (steps[-1].time - steps[0].arrived["A"]) + 1


def test_two_runs_are_two_processes(traced, tmp_path):
    out = tmp_path / "out.json"
    assert main([str(traced[0]), str(OLD), "--perfetto", str(out)]) == 0
    assert {event["pid"] for event in json.loads(out.read_text())["traceEvents"]} == {1, 2}


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["a", "b"], "one FILE; or two with --html or --perfetto"),
        (["a", "b", "c", "--html", "p"], "at most two files"),
        (["a", "--html", "p", "--list"], "--list is for the terminal"),
        (["a", "--perfetto", "p", "--step", "3"], "--step says where a page opens"),
        (["a", "--step", "x"], "invalid int value"),
        (["a", "--page", "x"], "unrecognized arguments: --page"),
        ([], "required: FILE"),
    ],
)
def test_flags_that_do_not_fit(flags, said, capsys):
    assert main(flags) == 2 and said in capsys.readouterr().err


def test_what_can_not_be_read_or_written(traced, tmp_path, capsys):
    path = str(traced[0])

    def refused(*args):
        assert main([*map(str, args)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("minipaged.trace: error: ") and error.count("\n") == 1
        return error

    page = tmp_path / "page.html"
    page.write_text("an old page")
    (tmp_path / "empty").touch()
    (tmp_path / "header").write_text(Path(path).read_text().split("\n")[0] + "\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for option in ("--html", "--perfetto"):
        assert "Is a directory" in refused(tmp_path, option, page)
        assert "No such file" in refused(tmp_path / "none", option, page)
        assert "is not a trace" in refused(tmp_path / "empty", option, page)
        assert "has no steps" in refused(tmp_path / "header", option, page)
        assert "no text in UTF-8" in refused(tmp_path / "bytes", option, page)
        assert "No such file or directory" in refused(path, option, tmp_path / "no" / "page")
        assert "Is a directory" in refused(path, option, tmp_path)
        assert "is the trace itself" in refused(path, option, path)
        assert "Is a directory" in refused(path, tmp_path, option, page)
    assert "can't both be" in refused(path, "--html", page, "--perfetto", tmp_path / "no" / ".." / "page.html")
    assert "has no step 999: the last is" in refused(path, "--html", page, "--step", "999")
    assert page.read_text() == "an old page"


def test_foreign_lines_are_no_steps(traced, tmp_path, capsys):
    lines = traced[0].read_text().splitlines(keepends=True)
    file = tmp_path / "t"
    for change, said in [
        ({"step": "seven"}, "step can't be 'seven'"), ({"events": [3]}, "events are sentences"),
        ({"time": []}, "time can't be"), ({"words": 3}, "words can't be 3"), ({"time": math.nan}, "NaN is no number"),
        ({"patch": {"usage": None}}, "usage"), ({"patch": {"tables": {"A": 3}}}, "not a step"), ({"patch": 3}, "not a"),
    ]:  # fmt: skip
        for options in ([], ["--html", str(tmp_path / "p")]):
            file.write_text("".join([*lines[:4], json.dumps({**json.loads(lines[4]), **change}) + "\n", *lines[5:]]))
            assert main([str(file), *options]) == 2
            error = capsys.readouterr().err
            assert said in error and "line 5" in error and error.count("\n") == 1
    file.write_text('{"format": "minipaged trace", "version": 2}\n')
    assert main([str(file)]) == 2 and "its header says no model" in capsys.readouterr().err


def test_who_has_read_enough_ends_it(traced, tmp_path):
    """As in `| head`: neither a traceback nor a word."""
    command = [sys.executable, "-m", "minipaged.trace", str(traced[0])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1])
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=60) == 141


def test_ctrl_c_ends_it(traced, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("minipaged.viewer.trace._check", interrupted)
    assert main([str(traced[0])]) == main([str(traced[0]), "--html", str(tmp_path / "p")]) == 130
    assert not (tmp_path / "p").exists()


def test_a_bar_says_how_far_it_is(traced, monkeypatch, tmp_path):
    """To whoever looks, if it takes its time."""
    monkeypatch.setattr("minipaged.trace.PATIENCE", -1)
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
        monkeypatch.setattr("minipaged.trace.Console", lambda console=console, **_: console)
        assert main([str(traced[0]), "--html", str(tmp_path / "p")]) == 0
        assert ("reading" in console.file.getvalue()) == terminal


# --- the format, as TRACE.md tells it -----------------------------------------------------------------------------

TELLS = Path(minipaged.viewer.__file__).with_name("TRACE.md").read_text(encoding="utf-8")
BY_NAME = {"requests", "tables", "cached", "index", "arrived", "words", "texts", "computed", "found", "preempted",
           "finished", "guessed", "loading", "errors"}  # fmt: skip


def keys(value, inside=""):
    """All names of fields, but not those of sequences and blocks."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if inside not in BY_NAME:
                yield name
            yield from keys(inner, "" if inside in BY_NAME else name)


def test_all_that_is_written_is_documented(traced):
    prose = re.sub("```.*?```", "", TELLS, flags=re.DOTALL)
    documented = set(re.findall(r"`(\w+)`", prose)) | {"from", "keep", "add"}
    lines = traced[0].read_text().splitlines()
    written = {key for line in lines for key in keys(json.loads(line))}
    assert len(written) > 60 and written - documented == set()
    observed = inspect.getsource(Eye.did)
    assert set(re.findall(r'^ +"(\w+)": ', observed, re.MULTILINE)) - documented == set()


def test_the_example_is_what_is_written(model, tmp_path):
    """The same run with another model: the same keys and moves, if not the same words."""
    example = [json.loads(line) for line in TELLS.split("```json\n")[1].split("```")[0].splitlines()]
    path = tmp_path / "t"
    llm = LLM(model, num_blocks=8, block_size=4)
    llm.add_request([5, 6, 7, 8, 9, 10], SamplingParams(n=2, seed=1, max_tokens=4, ignore_eos=True, temperature=9.0))
    with open(path, "w") as file:
        llm.observers.append(TraceWriter.of(llm, file))
        while llm.has_unfinished_requests:
            llm.step()
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [shape(line) for line in written] == [shape(line) for line in example]
    assert [line["patch"] for line in written[1:]] == [line["patch"] for line in example[1:]]
    assert [line["did"] for line in written[1:]] == [line["did"] for line in example[1:]]
    assert [*read_lines(iter(TELLS.split("```json\n")[1].split("```")[0].splitlines()), "TRACE.md")[1]]


def shape(value):
    """The names of all fields, in their order."""
    return {name: shape(inner) for name, inner in value.items()} if isinstance(value, dict) else type(value).__name__
