"""The trace of a run: what was written is what was, and can be drawn again."""

import pytest
from tiny_model import make_folder

from minipaged import LLM, BeamSearchParams, SamplingParams
from minipaged.generate import main as generate
from minipaged.terminal.draw import picture
from minipaged.terminal.snapshot import request_of
from minipaged.trace import main
from minipaged.viewer.trace import TraceError, TraceWriter, read_trace


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
    assert f"there is no step 999: the last is {len(truth)}" in capsys.readouterr().err


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
