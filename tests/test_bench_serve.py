"""bench.serve: its arithmetic by hand-made examples, and its clients against a small server that can misbehave."""

import asyncio
import doctest
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from minipaged.bench import serve, serve_flags, serve_report, serve_traces
from minipaged.bench.loads import Load, Run, make_load
from minipaged.bench.serve_answers import Answer, Arrivals, Played, Target
from minipaged.bench.serve_clients import Failed, play, read_event
from minipaged.bench.serve_report import figures_of, figures_of_run, is_good, summarize
from minipaged.bench.serve_servers import Recipe, Server, ServerFailed, free_port
from minipaged.bench.serve_traces import BadInput, enlarged, poisson, read_trace

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    "COLUMNS": "80",
}


@pytest.mark.parametrize("module", [serve_flags, serve_report, serve_traces])
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


# --- a server -----------------------------------------------------------------------------------------------------


def next_tokens(prompt: list[int], count: int) -> list[int]:
    return [(sum(prompt) + i * len(prompt)) % 1000 for i in range(count)]


class Fake:
    """A server that answers by arithmetic. trouble: what goes wrong with the n-th request, if anything.

    gate: while it is closed, answers stop after their first token. most: answers under way at once.
    """

    def __init__(self, trouble: Callable[[int], str | None] = lambda number: None, gate: bool = True, ids: bool = True):
        self.trouble, self.ids = trouble, ids
        self.bodies: list[dict[str, Any]] = []
        self.under_way = self.most = 0
        self.gate = threading.Event()
        if gate:
            self.gate.set()
        app = FastAPI()
        app.post("/v1/completions")(self.complete)
        app.get("/health")(lambda: {})
        app.get("/v1/models")(lambda: {"data": [{"id": "fake", "max_model_len": 8192}]})
        self.port = int(free_port())
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="critical", lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> "Fake":
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *why: object) -> None:
        self.gate.set()
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)

    async def complete(self, request: Request):
        number, body = len(self.bodies), await request.json()
        self.bodies.append(body)
        trouble = self.trouble(number)
        if trouble in ("503", "429"):
            return JSONResponse({"error": {"message": "too much", "code": int(trouble)}}, int(trouble))
        return StreamingResponse(self.stream(body, trouble), media_type="text/event-stream")

    async def stream(self, body: dict[str, Any], trouble: str | None):
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            tokens = next_tokens(body["prompt"], body["max_tokens"] - (trouble == "short"))
            yield ": a comment\n\n"
            for number, token in enumerate(tokens):
                while number and not self.gate.is_set():
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0)
                ids = {"token_ids": [token]} if self.ids else {}
                yield self.event(choices=[{"index": 0, "text": "x", "finish_reason": None} | ids])
                if trouble == "dies" and number == 1:
                    raise ConnectionResetError("on purpose")
                if trouble == "ends" and number == 1:
                    return
                if trouble == "says error" and number == 1:
                    yield self.event(error={"message": "a NaN row", "type": "InternalServerError", "code": 500})
                    yield "data: [DONE]\n\n"
                    return
                if trouble == "babbles" and number == 1:
                    yield "data: {not json\n\n"
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(tokens)}
            yield self.event(choices=[], usage=usage | {"prompt_tokens_details": {"cached_tokens": 2}})
            yield "data: [DONE]\n\n"
        finally:
            self.under_way -= 1

    @staticmethod
    def event(**fields: Any) -> str:
        return f"data: {json.dumps({'id': 'cmpl-1', 'object': 'text_completion', **fields})}\n\n"


def load_of(count: int, length: int = 3, wanted: int = 4) -> Load:
    return Load("plain", [[n] * length for n in range(1, count + 1)], [wanted] * count, count)


def send(fake: Fake, load: Load, clients: int | None = None, **arrivals: Any) -> Played:
    how = Arrivals("", clients=clients, **arrivals)
    return play(Target(fake.url, "fake", patience=20), load, how, "salt", lambda text: None)


# --- clients ------------------------------------------------------------------------------------------------------


def test_what_is_sent_and_what_comes_back():
    load = load_of(3)
    with Fake() as fake:
        played = send(fake, load, clients=2)
    assert [answer.tokens for answer in played.answers] == [next_tokens(p, 4) for p in load.prompts]
    for answer in played.answers:
        assert (answer.failure, answer.num_tokens, answer.prompt_tokens, answer.cached_tokens) == (None, 4, 3, 2)
        assert answer.sent <= answer.times[0] and answer.times == sorted(answer.times)
    for body, prompt in zip(fake.bodies, load.prompts, strict=True):
        assert body == {
            "model": "fake", "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}, "return_token_ids": True, "cache_salt": "salt",
        }  # fmt: skip
    assert played.cpu_seconds > 0 and max(a.times[-1] for a in played.answers) - played.answers[0].sent < played.seconds


def test_a_closed_loop_keeps_as_many_under_way_as_there_are_clients():
    with Fake(gate=False) as fake:
        done: list[Played] = []
        thread = threading.Thread(target=lambda: done.append(send(fake, load_of(9), clients=4)))
        thread.start()
        until(lambda: fake.under_way == 4)
        time.sleep(0.2)  # long enough for a fifth to come, if it were to
        assert (fake.under_way, len(fake.bodies)) == (4, 4)
        fake.gate.set()
        thread.join(20)
    assert fake.most == done[0].most_open == 4
    assert [a.failure for a in done[0].answers] == [None] * 9


def test_in_an_open_loop_requests_come_when_they_are_due_whatever_became_of_the_others():
    times = [0.0, 0.1, 0.2, 0.3, 0.4]
    with Fake(gate=False) as fake:
        done: list[Played] = []
        thread = threading.Thread(target=lambda: done.append(send(fake, load_of(5), times=times)))
        thread.start()
        until(lambda: fake.under_way == 5)  # none of them was answered
        fake.gate.set()
        thread.join(20)
    sent = [answer.sent for answer in done[0].answers]
    assert done[0].most_open == 5
    assert all(now - sent[0] >= due - 0.05 for now, due in zip(sent, times, strict=True))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_conversation_goes_on_from_what_was_said():
    load = Load("talk", [[1, 2], [3], [4]], [3, 3, 3], 1, follows=[None, 0, 1])
    with Fake() as fake:
        played = send(fake, load, clients=8)
    first = [1, 2] + next_tokens([1, 2], 3) + [3]
    second = first + next_tokens(first, 3) + [4]
    assert [body["prompt"] for body in fake.bodies] == [[1, 2], first, second]
    assert played.answers[2].tokens == next_tokens(second, 3)


@pytest.mark.parametrize("trouble", ["503", "no ids"])
def test_a_conversation_that_can_not_go_on_is_a_failure(trouble):
    load = Load("talk", [[1, 2], [3]], [3, 3], 1, follows=[None, 0])
    with Fake(lambda number: trouble, ids=trouble != "no ids") as fake:
        played = send(fake, load, clients=8)
    assert len(fake.bodies) == 1
    assert played.answers[1].failure == "not sent"


def test_the_late_one_is_sent_when_the_first_one_has_its_tokens():
    load = Load("stall", [[1], [2], [3]], [6, 2, 2], 3, late=[0, 0, 3])
    with Fake(gate=False) as fake:
        done: list[Played] = []
        thread = threading.Thread(target=lambda: done.append(send(fake, load, clients=8)))
        thread.start()
        until(lambda: fake.under_way == 2)
        time.sleep(0.2)  # long enough for the third to come, if it were to: the first one has one token
        assert [body["prompt"] for body in fake.bodies] == [[1], [2]]
        fake.gate.set()
        thread.join(20)
    assert fake.bodies[2]["prompt"] == [3] and done[0].answers[2].sent >= done[0].answers[0].times[2]


def test_the_late_one_does_not_wait_for_what_never_comes():
    load = Load("stall", [[1], [2]], [6, 2], 2, late=[0, 3])
    with Fake(lambda number: None if number else "503") as fake:
        assert [a.failure for a in send(fake, load, clients=8).answers] == ["HTTP 503", None]


@pytest.mark.parametrize(
    ("trouble", "failure", "said"),
    [
        ("503", "HTTP 503", "too much"),
        ("429", "HTTP 429", "too much"),
        ("dies", "broken off", ""),
        ("ends", "broken off", "before [DONE]"),
        ("short", "wrong length", "3 tokens instead of 4"),
        ("says error", "error 500", "a NaN row"),
        ("babbles", "no sense", "{not json"),
    ],
)
def test_what_goes_wrong_is_counted_and_the_others_go_on(trouble, failure, said):
    with Fake(lambda number: trouble if number in (1, 3) else None) as fake:
        played = send(fake, load_of(6), clients=1)
    figures = figures_of(played, {})
    assert (figures["completed"], figures["failed"], figures["failures"]) == (4, 2, {failure: 2})
    assert said in figures["said"][failure]
    assert figures["total_output_tokens"] == 16
    assert played.most_open == 1


def test_nobody_at_the_port():
    played = play(Target(f"http://127.0.0.1:{free_port()}", "m"), load_of(2), Arrivals("", 2), "s", lambda text: None)
    assert [a.failure for a in played.answers] == ["can't connect"] * 2
    figures = figures_of(played, {"ttft": 1.0})
    assert (figures["completed"], figures["request_goodput"], figures["median_ttft_ms"]) == (0, 0, None)


def test_a_server_that_says_nothing_is_given_up():
    with Fake(gate=False) as fake:
        target = Target(fake.url, "fake", patience=0.2)
        played = play(target, load_of(1), Arrivals("", 1), "s", lambda text: None)
    assert (played.answers[0].failure, played.answers[0].said) == ("timed out", "nothing came in 0.2 s")


def test_a_server_without_token_ids_is_counted_by_its_usage():
    with Fake(ids=False) as fake:
        [answer] = send(fake, load_of(1), clients=1).answers
    assert (answer.failure, answer.num_tokens, answer.tokens) == (None, 4, [])


def test_an_event_may_bring_several_tokens_or_none():
    answer = Answer()
    read_event(answer, b'{"choices": [{"index": 0, "text": "", "token_ids": []}]}', 1.0)
    read_event(answer, b'{"choices": [{"index": 0, "text": "ab", "token_ids": [5, 6]}]}', 2.0)
    read_event(answer, b'{"choices": [{"index": 0, "text": "", "token_ids": [7]}]}', 3.0)
    assert (answer.tokens, answer.num_tokens, answer.times) == ([5, 6, 7], 3, [2.0, 3.0])
    with pytest.raises(Failed):
        read_event(answer, b"[]", 4.0)


# --- figures ------------------------------------------------------------------------------------------------------


def answer(sent: float, *times: float, tokens: int | None = None) -> Answer:
    return Answer(sent, list(times), [1] * len(times), len(times) if tokens is None else tokens, 10)


def test_latencies_by_hand():
    answers = [answer(0.0, 1.0, 1.5, 3.0), answer(1.0, 1.25)]
    figures = figures_of(Played(answers, 4.0, 0.5, 2), {})
    assert (figures["request_throughput"], figures["output_throughput"]) == (0.5, 1.0)
    assert figures["total_token_throughput"] == 24 / 4
    assert figures["mean_ttft_ms"] == pytest.approx((1000 + 250) / 2)
    assert (figures["median_tpot_ms"], figures["p99_tpot_ms"]) == (1000, 1000)  # of one token there is none
    assert (figures["mean_itl_ms"], figures["median_itl_ms"]) == (1000, 1000)  # 500 and 1500
    assert figures["p90_itl_ms"] == pytest.approx(1400)
    assert figures["median_e2el_ms"] == pytest.approx((3000 + 250) / 2)
    assert figures["p90_e2el_ms"] == pytest.approx(250 + 0.9 * 2750)
    assert figures["client_cpu"] == 0.125


def test_percentiles_of_a_hundred_and_one():
    seconds = [n / 1000 for n in range(101)]
    random.Random(0).shuffle(seconds)
    figures = figures_of(Played([answer(0.0, s) for s in seconds], 1.0, 0.0, 1), {})
    assert [figures[f"{kind}_ttft_ms"] for kind in ("mean", "median", "p90", "p99")] == pytest.approx([50, 50, 90, 99])


def test_time_per_output_token_counts_tokens_not_events():
    figures = figures_of(Played([answer(0.0, 1.0, 3.0, tokens=5)], 4.0, 0.0, 1), {})
    assert (figures["mean_tpot_ms"], figures["mean_itl_ms"]) == (500, 2000)


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 1000}, [True, False]),
        ({"tpot": 1000}, [True, True]),
        ({"tpot": 999}, [False, True]),  # one token: 0
        ({"e2el": 2999, "ttft": 5000}, [False, True]),
        ({"ttft": 1000, "tpot": 1000, "e2el": 3000}, [True, False]),
    ],
)
def test_goodput_by_hand(limits, good):
    answers = [answer(0.0, 1.0, 1.5, 3.0), answer(0.0, 2.0)]
    assert [is_good(one, limits) for one in answers] == good
    failed = Answer(failure="HTTP 503")
    assert figures_of(Played([*answers, failed], 2.0, 0.0, 1), limits)["request_goodput"] == sum(good) / 2


def test_over_the_rounds():
    def played(seconds: float, *more: Answer) -> dict[str, Any]:
        return figures_of(Played([answer(0.0, 1.0, 2.0), *more], seconds, 0.0, 1), {})

    load = load_of(1, length=10, wanted=2)
    offline = [figures_of_run(load, Run([[1, 1]], seconds, [0.5], 0)) for seconds in (0.5, 1.0, 2.0)]
    rounds = {"minipaged": [played(1.0), played(4.0), played(5.0)], "offline": offline,
              "vllm": [played(4.0, Answer(failure="HTTP 503", said="a")), played(4.0)]}  # fmt: skip
    tokens = {"minipaged": [[1, 1], []], "offline": [[1, 1], [2]], "vllm": [[1, 2], [2]]}
    columns = summarize(rounds, tokens, "minipaged")
    assert columns["minipaged"]["output_throughput"] == 0.5  # of 2, 0.5 and 0.4
    assert columns["offline"]["output_throughput"] == 2
    assert columns["offline"]["ratio"] == 0.4  # the median of 2/4, 0.5/2 and 0.4/1
    assert columns["vllm"]["ratio"] == (4 + 1) / 2
    assert columns["minipaged"]["ratio"] is None
    assert summarize(rounds, tokens, "minipaged", closed=False)["vllm"]["ratio"] is None
    assert [columns[name]["same_tokens"] for name in columns] == [1, None, 1]
    both_failed = {"minipaged": [[1], []], "vllm": [[1], []]}
    online = {name: rounds[name] for name in both_failed}
    assert summarize(online, both_failed, "minipaged")["vllm"]["same_tokens"] == 1
    assert (columns["vllm"]["failed"], columns["vllm"]["failures"]) == (1, {"HTTP 503": 1})
    assert columns["offline"]["total_input_tokens"] == 10


# --- what is sent -------------------------------------------------------------------------------------------------


def test_poisson_arrivals():
    times = poisson(2.0, 4000, seed=1)
    assert times == poisson(2.0, 4000, seed=1) != poisson(2.0, 4000, seed=2)
    gaps = [now - then for then, now in zip([0.0, *times], times, strict=False)]
    assert min(gaps) > 0
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.5, rel=0.05)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(0.25, rel=0.1)  # exponential


MOONCAKE = [
    {"timestamp": 1000, "input_length": 1100, "output_length": 50, "hash_ids": [0, 1, 2]},
    {"timestamp": 1500, "input_length": 1030, "output_length": 0, "hash_ids": [0, 1, 3]},
    {"timestamp": 3000, "input_length": 512, "output_length": 8, "hash_ids": [4]},
]
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,40,10\n2023-11-16 18:17:05.4799600,9,0\n"


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_trace_with_prefixes(tmp_path):
    load, times = read_trace(write(tmp_path / "chat.jsonl", *MOONCAKE), 5000)
    assert (load.name, times, load.outputs) == ("chat", [0.0, 0.5, 2.0], [50, 1, 8])
    one, two, three = load.prompts
    assert [len(one), len(two), len(three)] == [1100, 1030, 512]
    assert one[:1024] == two[:1024] and one[1024:1030] != two[1024:]
    assert one[:512] != three and one[:512] != one[512:1024]
    assert max(map(max, load.prompts)) < 5000
    assert load.at_once


def test_a_trace_made_small(tmp_path):
    load, times = read_trace(write(tmp_path / "chat.jsonl", *MOONCAKE), 5000, count=2, scale=10.0, speedup=5.0)
    one, two = load.prompts
    assert (len(one), len(two), load.outputs, times) == (110, 103, [5, 1], [0.0, 0.1])
    assert one[:102] == two[:102] and one[102] != two[102]  # two ids: 1024 tokens


def test_a_trace_without_prefixes(tmp_path):
    load, times = read_trace(write(tmp_path / "code.csv", AZURE), 5000)
    assert ([len(prompt) for prompt in load.prompts], load.outputs) == ([40, 9], [10, 1])
    assert times == pytest.approx([0.0, 1.5])
    assert load.prompts[0][:9] != load.prompts[1]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "there is no request"),
        (["TIMESTAMP,ContextTokens,GeneratedTokens"], "there is no request"),
        (["a,b,c", "1,2,3"], "line 1: 'a,b,c' is neither JSON (Mooncake) nor TIMESTAMP,"),
        ([AZURE + "2023-11-16 18:17:03,4"], "line 4: '2023-11-16 18:17:03,4' must be TIMESTAMP,"),
        ([AZURE + "2023-11-16 18:17:03,4,x"], "line 4: GeneratedTokens must be a number of tokens, not 'x'"),
        ([AZURE + "2023-11-16 18:17:03,-4,1"], "line 4: ContextTokens must be a number of tokens, not '-4'"),
        ([AZURE + "yesterday,4,1"], "line 4: Invalid isoformat string: 'yesterday'"),
        ([*MOONCAKE, "{"], "line 4: '{' is no JSON"),
        ([*MOONCAKE, "[1]"], "line 4: '[1]' is no JSON object"),
        ([MOONCAKE[0] | {"hash_ids": [0]}], "line 1: hash_ids must be a list with an id for each 512 of the 1100"),
        ([MOONCAKE[0] | {"input_length": 1.5}], "line 1: input_length must be a number of tokens, not 1.5"),
        ([MOONCAKE[0] | {"timestamp": None}], "line 1: timestamp must be a number of milliseconds, not None"),
        ([{"timestamp": 1}], "line 1: there is no 'hash_ids'"),
    ],
)
def test_a_trace_that_can_not_be_read(tmp_path, lines, said):
    with pytest.raises(BadInput) as caught:
        read_trace(write(tmp_path / "t", *lines), 100)
    assert said in str(caught.value) and str(tmp_path / "t") in str(caught.value)


def test_a_load_repeated():
    load = make_load("chat", 1000, quick=True)
    more = enlarged(load, 100, 1000)
    assert enlarged(load, len(load.prompts), 1000) == load
    assert len(more.prompts) == len(more.outputs) == len(more.follows) == 100
    assert more.longest == load.longest
    assert more.prompts[48] == [(token + 1) % 1000 for token in load.prompts[0]]
    assert more.follows[48 + 8] == 48


# --- the command --------------------------------------------------------------------------------------------------


def command(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "minipaged.bench.serve", *map(str, args)]
    return subprocess.run(call, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, **options)


def test_the_whole_run_against_a_server_that_runs(capsys):
    args = ["--tiny", "--quick", "--load", "batch8", "--clients", "2", "--repeat", "2", "--goodput", "e2el:60000"]
    with Fake() as fake:
        assert serve.main(["--url", f"{fake.url}/v1/", *args, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert serve.main(["--url", fake.url, *args]) == 0
        lines = capsys.readouterr().out.splitlines()
    [result] = report["results"]
    column = result["contenders"]["server"]
    assert (result["load"], result["arrivals"], result["requests"]) == ("batch8", "2 clients", 8)
    assert (column["completed"], column["failed"], column["most_open_connections"]) == (8, 0, 2)
    assert len(column["rounds"]) == 2 and column["request_goodput"] == column["request_throughput"] > 0
    salts = {body["cache_salt"] for body in fake.bodies}
    assert len(salts) == 2 * (1 + 2)  # the warm-up's, and each round's
    assert lines[2:4] == ["batch8, 2 clients, 8 requests", " " * 35 + "the server"]
    assert any(line.startswith("Median TTFT (ms)") for line in lines)
    assert max(map(len, lines[1:])) <= 80


def test_failures_are_told_and_end_in_one(capsys):
    with Fake(lambda number: "503" if number > 8 else None) as fake:
        args = ["--tiny", "--quick", "--load", "batch8", "--clients", "8"]
        assert serve.main(["--url", fake.url, *args]) == 1
    out = capsys.readouterr().out
    assert "the server, batch8, 8 clients: 7 failed: HTTP 503: " in out and "too much" in out


def test_the_whole_run_with_servers_of_its_own():
    args = ("--tiny", "--quick", "--load", "batch8", "chat", "--clients", 8, "--threads", 1)
    done = command(*args, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for result, name in zip(report["results"], ("batch8", "chat"), strict=True):
        count = len(make_load(name, 512, quick=True).prompts)
        assert (result["load"], result["requests"], list(result["contenders"])) == (
            name, count, ["minipaged", "offline"]
        )  # fmt: skip
        ours, offline = result["contenders"].values()
        assert (ours["completed"], ours["same_tokens"], offline["same_tokens"]) == (count, count, None)
        assert ours["total_input_tokens"] == offline["total_input_tokens"]
        assert ours["total_output_tokens"] == offline["total_output_tokens"]
        assert offline["ratio"] == pytest.approx(ours["output_throughput"] / offline["output_throughput"])
    assert ours["cached_tokens"] > 0.5 * ours["total_input_tokens"]  # the last one is chat
    assert report["left_out"] == report["failed"] == {}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_leaves_no_server_behind():
    args = ("--tiny", "--load", "mixed", "--requests", 5000, "--threads", 1)
    running = subprocess.Popen(
        [sys.executable, "-m", "minipaged.bench.serve", *map(str, args)], env=ENVIRONMENT, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert running.stderr
    line = running.stderr.readline()
    assert line == "loading minipaged, offline\n"
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    until(lambda: bool(children.read_text()))
    [server] = map(int, children.read_text().split())
    assert running.stderr.readline().startswith("ready after ")
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert (running.returncode, err.splitlines()[-1]) == (130, "interrupted")
    assert not is_alive(server)


def test_a_server_that_dies_is_out_and_the_others_go_on(monkeypatch, capsys):
    dies = Recipe("minipaged", sys.executable, ["-c", "raise SystemExit('no room')"], {})
    monkeypatch.setattr(serve, "ours", lambda options, waiting: dies)
    monkeypatch.setattr(serve, "find", lambda peers, pythons, is_gguf: ({}, dict.fromkeys(peers, "not here")))
    args = ["--tiny", "--quick", "--load", "batch8", "--clients", "8", "--threads", "1", "--peer", "vllm"]
    assert serve.main([*args, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["failed"] == {"minipaged": "minipaged: it ended (exit code 1): no room"}
    [result] = report["results"]
    assert list(result["contenders"]) == ["offline"]
    assert report["left_out"] == {"vllm": "not here"}
    serve.print_report(report, serve.LABELS)
    out = capsys.readouterr().out
    assert "minipaged: it ended (exit code 1): no room" in out and "vLLM: not here" in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--load", "mixd"], "argument --load: invalid choice: 'mixd'"),
        (["--clients", "0"], "'0' is not a number from 1 on"),
        (["--rate", "-1"], "'-1' is not a number above 0"),
        (["--clients", "1", "--rate", "1"], "not allowed with argument --clients"),
        (["--goodput", "ttfb:3"], "'ttfb:3' is not NAME:MS, with a NAME of ttft, tpot, e2el"),
        (["--scale", "2"], "--scale is for a --trace"),
        (["--trace", "x", "--speedup", "2", "--clients", "1"], "--speedup is for a trace's own times"),
        (["--connections", "5", "--clients", "1"], "--connections says how many clients"),
        (["--url", "127.0.0.1:8000"], "'127.0.0.1:8000' must begin with http://"),
        (["--url", "http://h", "--peer", "vllm"], "without --url"),
        (["--peer-python", "vllm=x"], "--peer-python is for --peer vllm"),
    ],
)
def test_wrong_flags(args, said, capsys):
    with pytest.raises(SystemExit) as caught:
        serve.main(args)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def bad_input(capsys, *args: object) -> str:
    assert serve.main([*map(str, args)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1
    return err


def test_bad_input_is_said_in_one_sentence(tmp_path, capsys):
    port = free_port()
    assert f"http://127.0.0.1:{port}: no server answers there" in bad_input(capsys, "--url", f"http://127.0.0.1:{port}")
    trace = write(tmp_path / "chat.jsonl", *MOONCAKE, "{")
    assert f"{trace}, line 4: " in bad_input(capsys, "--tiny", "--trace", trace)
    assert f"{tmp_path}/none: No such file" in bad_input(capsys, "--tiny", "--trace", tmp_path / "none")
    long = write(tmp_path / "long.jsonl", {"timestamp": 0, "input_length": 20000, "output_length": 9,
                                           "hash_ids": list(range(40))})  # fmt: skip
    assert "needs 20009 positions, and the model has 8192: --scale 3 would do" in bad_input(
        capsys, "--tiny", "--trace", long
    )
    assert "no server answers" not in bad_input(capsys, "--model", tmp_path / "nothing")


def test_something_else_at_the_port(capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def answer_once() -> None:
            with listener.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"220 smtp.example.org\r\n")

        threading.Thread(target=answer_once, daemon=True).start()
        port = listener.getsockname()[1]
        assert "does not answer as OpenAI's API does" in bad_input(capsys, "--url", f"http://127.0.0.1:{port}")


# --- servers ------------------------------------------------------------------------------------------------------

WEB = """\
import http.server, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_is_started_waited_for_and_ended():
    server = Server(Recipe("web", sys.executable, ["-c", WEB, "PORT"], {}))
    try:
        server.wait()
        server.check()
    finally:
        server.close()
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_a_server_that_can_not_start_says_why():
    server = Server(Recipe("web", sys.executable, ["-c", "raise SystemExit('no such model')"], {}))
    try:
        with pytest.raises(ServerFailed, match=r"web: it ended \(exit code 1\): no such model"):
            server.wait()
    finally:
        server.close()


def test_a_server_that_does_not_hear_is_killed(monkeypatch):
    monkeypatch.setattr("minipaged.bench.serve_servers.PATIENCE", 0.2)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WEB
    server = Server(Recipe("web", sys.executable, ["-c", deaf, "PORT"], {}))
    server.wait()
    server.close()
    assert server._process.returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells a process that its parent ended")
def test_a_server_ends_with_who_started_it():
    script = (
        "import sys, time\nfrom minipaged.bench.serve_servers import Recipe, Server\n"
        f"server = Server(Recipe('web', sys.executable, ['-c', {WEB!r}, 'PORT'], {{}}))\n"
        "server.wait()\nprint(server.pid, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until(lambda: not is_alive(pid))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c():
    with Fake(gate=False) as fake:
        args = ("--url", fake.url, "--tiny", "--quick", "--load", "batch8")
        running = subprocess.Popen(
            [sys.executable, "-m", "minipaged.bench.serve", *args], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
        )
        until(lambda: fake.under_way > 0)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=30)
    assert (running.returncode, err.splitlines()[-1]) == (130, "interrupted")
    assert "Traceback" not in err


def test_too_many_connections(monkeypatch, capsys):
    monkeypatch.setattr(serve.resource, "getrlimit", lambda what: (1000, 1000))
    said = bad_input(capsys, "--tiny", "--connections", 900)
    assert "900 connections need 1100 open files, and the system allows 1000: see ulimit -Hn" in said


def test_a_machine_without_aiohttp(monkeypatch, capsys):
    monkeypatch.setattr(serve, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    assert "pip install aiohttp" in bad_input(capsys, "--tiny")
