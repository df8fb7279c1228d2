"""The command of the experiments: figures, files, the cache, and what it says to bad input."""

import gc
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minipaged.experiments import __main__ as command
from minipaged.experiments import runs
from minipaged.experiments.figures import FIGURES
from minipaged.experiments.figures.today import NUMBERS, parts, steep
from minipaged.experiments.hardware import SERVERS
from minipaged.experiments.report import Point, Report, Table, compare
from minipaged.experiments.runs import SYSTEMS, Result, Run, crossing, execute, sweep
from minipaged.experiments.simulation import Durations
from minipaged.experiments.study import Settings, Study
from minipaged.experiments.systems import Work

LINE = '{"prompt": 100, "output": 20}\n'


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    class Short(Study):
        def seconds(self, full):
            return full / 150

    with Short(Settings(folder=tmp_path_factory.mktemp("cache"))) as one:  # nothing is computed twice
        yield one


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure(name, study, tmp_path):
    report = FIGURES[name](study)
    files = report.write(tmp_path)
    assert {file.name for file in files} == {f"{name}.{end}" for end in (
        ("txt", "json", "png", "svg") if report.draw else ("txt", "json")
    )}  # fmt: skip
    text = (tmp_path / f"{name}.txt").read_text()
    assert text == report.text() and report.title in text
    assert max(map(len, text.splitlines())) <= 110
    assert all(table.rows and {len(row) for row in table.rows} == {len(table.header)} for table in report.tables)
    assert json.loads((tmp_path / f"{name}.json").read_text()) == json.loads(json.dumps(report.data))
    assert all(file.stat().st_size > 0 for file in files)


def test_the_same_picture_gives_the_same_bytes(study, tmp_path):
    report = FIGURES["fig19"](study)
    first = [file.read_bytes() for file in report.write(tmp_path)]
    assert first == [file.read_bytes() for file in report.write(tmp_path)]


# --- goals that don't depend on how long a trace is -----------------------------------------------------------------


def test_table_1_to_the_printed_digits():
    assert [f"{SERVERS[name].num_slots / 1000:.1f}K" for name in ("13b", "175b")] == ["15.7K", "60.1K"]


@pytest.fixture(scope="module")
def crowds():
    """Requests that all come at once: what each system can do."""
    return {name: execute(Run(name, "13b", "sharegpt", 1000.0, 0.6), None) for name in SYSTEMS}


def test_the_order_of_the_systems(crowds):
    rates = [crowds[name].throughput for name in SYSTEMS]
    assert rates == sorted(rates)
    assert 1.3 < crowds["paged"].throughput / crowds["oracle"].throughput < 2.7


# --- today: smaller numbers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smaller():
    """Requests that all come at once, on one server with its four sizes of numbers."""
    return {
        load: [execute(Run("paged", name, load, 1000.0, seconds), None) for name in NUMBERS]
        for load, seconds in (("sharegpt", 0.6), ("alpaca", 1.5))
    }


@pytest.mark.parametrize("load", ["sharegpt", "alpaca"])
def test_smaller_numbers_hold_and_take_more(load, smaller):
    """fp16, an 8-bit cache, 4-bit weights, both: each leaves more blocks, and none makes a step longer."""
    fp16, cache, weights, both = (result.throughput for result in smaller[load])
    assert fp16 < min(cache, weights) and max(cache, weights) < both
    if load == "sharegpt":  # short answers wait for arithmetic and for the host, not for memory
        assert cache < weights and both / fp16 > 1.5
    assert [result.num_requests for result in smaller[load]] == 4 * [smaller[load][0].num_requests]


def test_figure_today_begins_with_figure_12(study):
    """In fp16 it is minipaged's own curve there, to the last digit."""
    there, here = FIGURES["fig12"](study).data, FIGURES["today"](study).data
    assert here["13b sharegpt"]["13b"] == there["13b sharegpt"]["paged"]
    assert here["13b sharegpt"]["13b-kv8"] != there["13b sharegpt"]["paged"]


def test_a_wide_step_is_looked_into_where_the_latency_rises():
    def curve(*points):
        return [(rate, Result(latency, 0, 0, 0, {}, 1, 1, 0)) for rate, latency in points]

    assert steep(curve((1.0, 0.02), (2.0, 0.03), (4.0, 0.5), (4.5, 1.2), (6.0, 3.0))) == [2.83]
    assert steep(curve((1.0, 0.02), (1.1, 0.5))) == steep([]) == []


def test_the_parts_of_a_step_are_those_of_the_clock():
    """So many requests, each with so much context, and no prompt: see test_one_request_alone_takes_what_..."""
    full = Result(1, 1, 1, 30.0, {"tokens": 50.0}, 1, 1, 0)
    for name in NUMBERS:
        one, server = parts(name, full), SERVERS[name]
        work = Work(1, 30, 30, 0)
        seconds = Durations(server, 16).first(work, 30) + server.num_slots / 2 * server.context_seconds(16)
        step = max(one["weights"], one["arithmetic"]) + one["cache"] + one["kernels"] + one["host"]
        assert step == pytest.approx(1e3 * seconds)


def test_figure_19_crosses_between_16_and_32():
    from minipaged.experiments.figures.blocks import costs

    one = costs()
    assert one["swap"][16] > one["recompute"][16] and one["swap"][32] < one["recompute"][32]


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_is_read_the_second_time(tmp_path, monkeypatch):
    run = Run("oracle", "13b", "alpaca", 5.0, 20.0)
    first = execute(run, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "simulate", None)
        assert execute(run, tmp_path) == first
        with pytest.raises(TypeError):  # any other input is another run
            execute(Run("oracle", "13b", "alpaca", 5.0, 20.0, seed=1), tmp_path)
        patch.setattr(runs, "_source", lambda: "another")
        with pytest.raises(TypeError):  # and so is any other code
            execute(run, tmp_path)
    assert execute(run, None) == first and len(list(tmp_path.iterdir())) == 1
    (kept,) = tmp_path.iterdir()
    kept.write_text(kept.read_text()[:50])
    assert execute(run, tmp_path) == first == execute(run, tmp_path)


def test_a_trace_is_known_by_what_is_in_it(tmp_path):
    trace, folder = tmp_path / "trace.jsonl", tmp_path / "cache"
    folder.mkdir()
    results = []
    for output in (20, 40):
        trace.write_text(f'{{"prompt": 100, "output": {output}}}\n')
        results.append(execute(Run("paged", "13b", str(trace), 2.0, 30.0), folder))
    assert results[0] != results[1] and len(list(folder.iterdir())) == 2


def test_a_sweep_ends_behind_the_wall():
    def answer(run):
        latency = 0.1 if run.rate < 5 else 3.0
        return Result(latency, 0, 0, 0, {}, 5.0, 1, 0)

    asking = sweep(Run("paged", "13b", "sharegpt", 0, 60.0))
    wanted = [next(asking)]
    with pytest.raises(StopIteration) as end:
        while True:
            wanted.append(asking.send(answer(wanted[-1])))
    assert [run.rate for run in wanted[1:]] == [2.0, 3.5, 4.5, 5.0, 4.84] and wanted[0].rate == 1000.0
    assert [rate for rate, _ in end.value.value] == [2.0, 3.5, 4.5, 4.84, 5.0]


def test_crossing():
    assert crossing([(1.0, 0.1), (2.0, 0.5), (4.0, 2.0), (5.0, 1.0)]) == pytest.approx(3.0)
    assert math.isnan(crossing([(1.0, 0.1), (2.0, 0.5)])) and math.isnan(crossing([(1.0, 2.0)]))


# --- tables ----------------------------------------------------------------------------------------------------------


def test_deviations_and_goals():
    near, far, free = Point("a", 110, 100, "said", 15), Point("b", 80, 100, "read", 15), Point("c", 1, 2, "read")
    assert [point.met for point in (near, far, free)] == [True, False, None]
    assert Point("d", math.nan, 100, "read", 15).met is False
    assert Point("e", 90.0, 96.3, "printed", 5, relative=False).met is False
    assert compare("T", [near, far, free]).rows == [
        ["a", "110.00", "100.00", "(said)", "+10.0 %", "15 %", "met"],
        ["b", "80.00", "100.00", "(read)", "-20.0 %", "15 %", "missed"],
        ["c", "1.00", "2.00", "(read)", "-50.0 %", "", ""],
    ]


def test_a_table_as_text_and_on_a_terminal(capsys):
    from rich.console import Console

    table = Table("Title", ["", "a", "long"], [["row", "1", "2"], ["x", "10", "met"]])
    assert table.text() == "Title\n      a  long\nrow   1     2\nx    10   met"
    report = Report("r", "Report", {}, [table], ["a [note]"])
    Report.show(report, Console(width=80))
    assert capsys.readouterr().out == "=== Report\n\nTitle\n      a  long\nrow   1     2\nx    10   met\n\na [note]\n\n"
    Report.show(report, Console(width=80, force_terminal=True))
    shown = capsys.readouterr().out
    assert "\x1b[32m met" in shown and "a [note]" in shown


# --- the command line ------------------------------------------------------------------------------------------------


def run_main(capsys, *arguments):
    try:
        code = command.main(list(map(str, arguments)))
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["fig3"], "no figure fig3; there are table1, fig2"),
        (["--jobs", "0"], "0 is not a number from 1 on"),
        (["--jobs", "two"], "two is not a number from 1 on"),
        (["--seed", "-1"], "-1 is not a number from 0 on"),
        (["--trace", "."], "Is a directory"),
        (["--trace", "missing.jsonl"], "missing.jsonl"),
        (["--quik"], "unrecognized arguments: --quik"),
    ],
)
def test_bad_input_is_named(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_main(capsys, *arguments)
    assert code == 2 and words in err and "Traceback" not in err and not out
    assert not list(tmp_path.iterdir())


def test_a_bad_trace_is_named_by_its_line(capsys, tmp_path):
    trace = tmp_path / "t.jsonl"
    trace.write_text(LINE + '{"prompt": 0, "output": 3}\n')
    code, out, err = run_main(capsys, "fig2", "--trace", trace, "--out", tmp_path / "out")
    assert code == 2 and "line 2: prompt must be a number of tokens from 1 on, not 0" in err
    trace.write_text(LINE)
    code, out, err = run_main(capsys, "fig18", "--trace", trace, "--out", tmp_path / "out")
    assert code == 2 and "--trace is for fig2, fig12, fig13, goodput, routing, not for fig18" in err


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "no requests"),
        (b"\xff\xfe\x00", "is no text"),
        (b'{"prompt": 9, "output": 9, "arrival": 0}', "arrivals are all 0"),
        (b'{"prompt": 9, "output": 9, "arrival": 1' + b"0" * 400 + b"}", "line 1"),
        (b"[" * 100_000, "line 1"),
        (b'{"prompt": 2000, "output": 49}', "more than 2048 tokens"),
        (b'{"prompt": 9}', "is wanted, not"),
        (b'{"prompt": 9, "output": 9, "priority": 1}', "unknown priority"),
    ],
)
def test_odd_traces(content, words, capsys, tmp_path):
    trace = tmp_path / "t.jsonl"
    trace.write_bytes(content)
    code, out, err = run_main(capsys, "fig2", "--trace", trace, "--out", tmp_path / "out")
    assert code == 2 and words in err and not out


def test_a_folder_that_stands_where_a_file_goes(capsys, tmp_path):
    (tmp_path / "table1.txt").mkdir()
    code, out, err = run_main(capsys, "table1", "--out", tmp_path)
    assert code == 2 and "table1.txt" in err


def test_without_a_place_to_keep_results(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIPAGED_CACHE", str(tmp_path / "file"))
    code, out, err = run_main(capsys, "table1", "--out", tmp_path)
    assert code == 0 and "15.7K" in out


def test_workers_leave_the_garbage_of_their_parent_alone(tmp_path):
    """A model that is collected in a fork may wait for threads that a fork has not."""
    parent, found = os.getpid(), tmp_path / "collected"

    class Model:
        def __del__(self):
            if os.getpid() != parent:
                found.touch()

    gc.disable()
    try:
        model = Model()
        model.itself = model
        del model
        with Study(Settings()) as study:
            study.each("", gc.collect, [(), ()])
    finally:
        gc.enable()
    assert not found.exists()


def test_a_process_that_is_killed_is_told(tmp_path):
    line = [sys.executable, "-m", "minipaged.experiments", "fig12", "--no-cache", "--jobs", "1", "--out", str(tmp_path)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("no /proc to find the worker in")
    while not children.read_text().split():
        time.sleep(0.1)
    time.sleep(1)
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "a process was killed" in err and "Traceback" not in err


def test_quick_says_so_and_has_no_goals(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(Study, "seconds", lambda self, full: full / 150)
    code, out, err = run_main(capsys, "fig2", "--quick", "--out", tmp_path, "--no-cache")
    assert code == 0 and "(quick)" in out and "goal" not in out


def test_names_that_mean_something_elsewhere(capsys, tmp_path, monkeypatch):
    """A trace may be called like a load, and a file is known by its contents."""
    monkeypatch.chdir(tmp_path)
    shares = []
    for line in (LINE, '{"prompt": 500, "output": 1000}\n'):
        (tmp_path / "sharegpt").write_text(line)
        assert run_main(capsys, "fig2", "--trace", "sharegpt")[0] == 0
        shares.append((tmp_path / "results" / "fig2.json").read_text())
    assert shares[0] != shares[1]


def test_out_must_be_a_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, err = run_main(capsys, "table1", "--out", tmp_path / "file")
    assert code == 2 and "--out" in err and "file" in err


def test_a_trace_of_ones_own(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(Study, "seconds", lambda self, full: full / 150)
    trace = tmp_path / "mine.jsonl"
    trace.write_text(LINE * 3)
    figures = ("fig2", "fig12", "fig13")
    code, out, err = run_main(capsys, *figures, "--trace", trace, "--out", tmp_path / "out", "--no-cache")
    assert code == 0 and "OPT-13B, mine.jsonl" in out and "paper" not in out
    assert (tmp_path / "out" / "fig12.svg").exists()


def test_ctrl_c_ends_it_cleanly(tmp_path):
    line = [sys.executable, "-m", "minipaged.experiments", "fig12", "--no-cache", "--out", str(tmp_path)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    time.sleep(6)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == "\ninterrupted; what was finished is kept\n" and not out
