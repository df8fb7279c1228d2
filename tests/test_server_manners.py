"""How the server behaves to those who ask, to those who misbehave, and when it is told to end."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from raw_http import Wire, ask, events, request, running
from test_async_llm import held
from tiny_model import make_folder

from minipaged.serve import main
from minipaged.server.config import ServerConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = dict(block_size=4, num_blocks=300, max_num_seqs=2, debug=True)
LIMITS = ServerConfig(model_names=("tiny",))
COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
SHORT = {"prompt": "abc", "max_tokens": 3, "temperature": 0}
LONG = {"prompt": "abc", "max_tokens": 500, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("manners"))


def limits(**changes):
    return dataclasses.replace(LIMITS, **changes)


@pytest.fixture(scope="module")
def place(folder):
    """One that does not refuse anybody."""
    with running(folder, LIMITS, **SMALL) as one:
        yield one


@pytest.fixture
def lines(caplog):
    """The lines of the server's log."""
    caplog.set_level(logging.DEBUG, "minipaged.server")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "minipaged.server"]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 30))


def wait_for(what, seconds=10):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.005)


# --- who may ask ----------------------------------------------------------------------------------------------------


def test_the_api_key(folder):
    async def statuses(port):
        async def one(path, key=None, **kwargs):
            headers = {} if key is None else {"Authorization": key}
            return (await ask(port, path, headers=headers, **kwargs))[0]

        for path in (COMPLETE, CHAT, "/tokenize", "/detokenize", "/abort"):
            assert await one(path, body={}) == 401
        for wrong in ("Bearer", "Bearer ", "Bearer secre", "Bearer secrets", "Basic secret", "secret", "Bearer \xff"):
            status, headers, said = await ask(port, "/v1/models", headers={"Authorization": wrong})
            assert status == 401 and headers["www-authenticate"] == "Bearer"
            assert said["error"]["type"] == "AuthenticationError" and "secret" not in said["error"]["message"]
        key = "schlüssel".encode().decode("latin-1")
        for right in ("Bearer secret", "bearer secret", "BEARER  secret ", f"Bearer {key}"):
            lines = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: {right}\r\n\r\n"
            wire = await Wire.open(port)
            await wire.send(lines.encode("latin-1"))
            assert (await wire.answer())[0] == 200, right
            wire.close()
        for free in ("/health", "/version", "/metrics"):
            assert await one(free) == 200
        assert await one("/v1/models", method="OPTIONS") == 405
        assert await one("/%761/models") == 401 and await one("//v1/models") == 404 and await one("/V1/models") == 404
        assert await one(COMPLETE, "Bearer secret", body=SHORT) == 200

    with running(folder, limits(api_keys=("other", "secret", "schlüssel")), **SMALL) as guarded:
        run(statuses(guarded.port))


def test_a_key_is_asked_for_before_the_body_is_read(folder):
    async def one(port):
        wire = await Wire.open(port)
        await wire.send(request(COMPLETE, SHORT, told_length=10**6))
        assert (await wire.answer())[0] == 401
        wire.close()

    with running(folder, limits(api_keys=("secret",)), **SMALL) as guarded:
        run(one(guarded.port))


def test_pages_of_other_origins(folder, place):
    origin = {"Origin": "http://there"}
    asked = origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}

    async def headers_of(port, *args, **kwargs):
        status, headers, _ = await ask(port, *args, **kwargs)
        return status, headers.get("access-control-allow-origin")

    async def both(port):
        return [
            await headers_of(port, COMPLETE, method="OPTIONS", headers=asked),
            await headers_of(port, COMPLETE, SHORT, headers=origin),
            await headers_of(port, COMPLETE, {**SHORT, "n": 0}, headers=origin),
        ]

    assert run(both(place.port)) == [(405, None), (200, None), (400, None)]
    config = limits(allowed_origins=("http://there",), api_keys=("secret",))
    with running(folder, config, **SMALL) as open_to_one:
        told = run(both(open_to_one.port))
        assert told == [(200, "http://there"), (401, "http://there"), (401, "http://there")]  # a page sees why not
        refused = run(headers_of(open_to_one.port, COMPLETE, SHORT, headers={"Origin": "http://else"}))
        assert refused == (401, None)


# --- bodies ---------------------------------------------------------------------------------------------------------


def test_a_body_that_is_too_long(folder):
    async def one(port):
        big = {"prompt": "x" * 5000}
        status, _, said = await ask(port, COMPLETE, big)
        assert status == 413 and "2000 bytes" in said["error"]["message"]
        wire = await Wire.open(port)  # it does not say how long it is
        head = f"POST {COMPLETE} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        await wire.send(head + (b"3e8\r\n" + b"x" * 1000 + b"\r\n") * 3)
        assert (await wire.answer())[0] == 413
        wire.close()
        assert (await ask(port, "/tokenize", big))[0] == 413
        assert (await ask(port, COMPLETE, SHORT | {"user": "x" * 1900}))[0] == 200
        wire = await Wire.open(port)  # after a refusal the connection can still be used
        await wire.send(request(COMPLETE, big) + request(COMPLETE, SHORT))
        assert [(await wire.answer())[0] for _ in range(2)] == [413, 200]
        wire.close()

    with running(folder, limits(max_body_bytes=2000), **SMALL) as strict:
        run(one(strict.port))


def test_half_a_body_and_half_of_the_headers(folder, lines):
    async def one(port):
        wire = await Wire.open(port)
        began = time.monotonic()
        await wire.send(request(COMPLETE, SHORT)[:-3])
        status, headers, said = await wire.answer()
        assert status == 408 and 0.2 < time.monotonic() - began < 5 and headers["connection"] == "close"
        assert b"within 0.3 s" in said and await wire.reader.read() == b""
        for half in (b"", b"POST /v1/comple", b"GET /health HTTP/1.1\r\nX-Y: "):  # uvicorn alone would wait for ever
            wire = await Wire.open(port)
            await wire.send(half)
            assert await asyncio.wait_for(wire.reader.read(), 5) == b""
        wire = await Wire.open(port)
        with contextlib.suppress(ConnectionError):
            await wire.send(b"GET /health HTTP/1.1\r\n" + b"X-Header: y\r\n" * 10_000)
            assert not await wire.reader.read()
        wire = await Wire.open(port)  # the second one on a connection
        await wire.send(request("/health"))
        assert (await wire.answer())[0] == 200
        await wire.send(b"GET /heal")
        assert await asyncio.wait_for(wire.reader.read(), 5) == b""

    with running(folder, limits(body_seconds=0.3, header_seconds=0.3), **SMALL) as strict:
        run(one(strict.port))
        strict.wait_until_empty()
    assert re.search(r"POST /v1/completions 408 0\.\d+s$", lines()[0])


def test_expect_100_continue(place):
    async def one():
        wire, data = await Wire.open(place.port), request(COMPLETE, SHORT, headers={"Expect": "100-continue"})
        head, body = data.split(b"\r\n\r\n")
        await wire.send(head + b"\r\n\r\n")
        assert (await wire.head())[0] == 100
        await wire.send(body)
        assert (await wire.answer())[0] == 200
        wire.close()

    run(one())


# --- too many -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def busy(folder, **config):
    """A server whose engine stands still: whoever comes waits."""
    with running(folder, limits(**config), **SMALL) as one, held(one.llm):
        yield one


async def begun(one, *bodies):
    """Requests that wait in the queue, with their connections."""
    wires = []
    for body in bodies:
        waiting = len(one.llm.waiting)
        wires.append(await Wire.open(one.port))
        await wires[-1].send(request(COMPLETE, body))
        await asyncio.to_thread(wait_for, lambda known=waiting: len(one.llm.waiting) > known)
    return wires


def test_a_queue_that_is_full(folder, lines):
    async def asks(one):
        wires = await begun(one, SHORT, SHORT | {"stream": True})
        for path, body in ((COMPLETE, SHORT), (CHAT, {"messages": []}), (COMPLETE, b"no JSON at all")):
            status, headers, said = await ask(one.port, path, body)
            assert status == 429 and headers["retry-after"] == "1" and said["error"]["type"] == "RateLimitError"
            assert "2 requests wait already, and 2 may" in said["error"]["message"]
        wire = await Wire.open(one.port)  # nor is its body waited for
        await wire.send(request(COMPLETE, SHORT, told_length=1000))
        assert (await wire.answer())[0] == 429
        assert (await ask(one.port, "/health"))[0] == 200 and (await ask(one.port, "/v1/models"))[0] == 200
        for one_of_them in (wire, *wires):
            one_of_them.close(rudely=True)

    with busy(folder, max_queued_requests=2) as one:
        run(asks(one))


def test_whose_body_is_on_its_way_counts(folder):
    async def asks(port):
        wire = await Wire.open(port)
        await wire.send(request(COMPLETE, SHORT)[:-1])
        await asyncio.sleep(0.1)
        assert (await ask(port, COMPLETE, SHORT))[0] == 429
        wire.close()
        await asyncio.sleep(0.1)
        assert (await ask(port, COMPLETE, SHORT))[0] == 200

    with running(folder, limits(max_queued_requests=1), **SMALL) as one:
        run(asks(one.port))


def test_too_many_tokens_wait(folder):
    async def asks(one):
        wires = await begun(one, {"prompt": "x" * 50})
        status, headers, said = await ask(one.port, COMPLETE, {"prompt": "x" * 31})
        assert status == 429 and headers["retry-after"] == "1" and "50 tokens" in said["error"]["message"]
        wires += await begun(one, {"prompt": "x" * 30})
        assert (await ask(one.port, COMPLETE, {"prompt": "x"}))[0] == 429
        for wire in wires:
            wire.writer.transport.abort()
        await asyncio.to_thread(wait_for, lambda: not one.house.num_guests)

    with busy(folder, max_queued_tokens=80) as one:
        run(asks(one))


def test_a_list_is_let_in_whole_when_nobody_waits(folder):
    with running(folder, limits(max_queued_requests=2, max_queued_tokens=5), **SMALL) as one:
        status, _, said = run(ask(one.port, COMPLETE, SHORT | {"prompt": ["abc"] * 5}))
        assert status == 200 and len(said["choices"]) == 5


@pytest.mark.parametrize("stream", [False, True])
def test_who_waited_too_long(folder, stream):
    async def asks(one):
        status, headers, said = await ask(one.port, COMPLETE, SHORT | {"stream": stream})
        assert status == 503 and headers["retry-after"] == "1" and "waited for 0.2 s" in said["error"]["message"]

    with busy(folder, max_queue_seconds=0.2) as one:
        run(asks(one))
        assert one.house.num_queued == 0


# --- who goes away --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("rudely", [False, True])
def test_who_leaves_while_it_runs_is_aborted_within_one_step(place, lines, stream, rudely):
    async def leaves():
        wire = await Wire.open(place.port)
        await wire.send(request(COMPLETE, LONG | {"stream": stream}, headers={"x-request-id": "mine"}))
        await asyncio.to_thread(wait_for, lambda: place.llm._readers and not place.llm.waiting)
        if stream:
            assert (await wire.head())[0] == 200
            await wire.chunk()
        wire.close(rudely)

    ended = []
    with pytest.MonkeyPatch.context() as patch:
        end, totals = place.llm._end, place.llm.engine
        patch.setattr(place.llm, "_abort", lambda s, f=place.llm._abort: (ended.append(totals.totals.num_steps), f(s)))
        patch.setattr(place.llm, "_end", lambda s: (end(s), ended.append(totals.totals.num_steps)))
        run(leaves())
        wait_for(lambda: len(ended) == 2)
    place.wait_until_empty()
    assert ended[1] - ended[0] <= 1, "steps from the news to the abort"
    wait_for(lambda: [line for line in lines() if line.startswith("mine POST /v1/completions 499 ")])


def test_who_leaves_in_the_queue(folder, lines):
    async def leaves(one):
        [wire] = await begun(one, SHORT)
        wire.close()
        await asyncio.to_thread(wait_for, lambda: not one.house.num_guests)

    with busy(folder) as one:
        run(leaves(one))
        steps = one.llm.engine.totals.num_steps
    assert one.llm.engine.totals.num_steps == steps and " 499 " in lines()[0] and not one.left()


def test_who_leaves_in_its_body_or_in_its_prompt(folder, lines):
    async def leaves(one):
        wire = await Wire.open(one.port)
        await wire.send(request(COMPLETE, SHORT)[:-1])
        await asyncio.sleep(0.05)
        wire.close()
        wire = await Wire.open(one.port)
        await wire.send(request(COMPLETE, LONG | {"prompt": "x" * 500, "max_tokens": 1}))
        await asyncio.to_thread(wait_for, lambda: one.llm.engine.totals.num_steps)
        wire.close()

    with running(folder, LIMITS, **SMALL, max_num_batched_tokens=2) as one:
        run(leaves(one))
        one.wait_until_empty()
        assert one.llm.engine.totals.num_steps < 250, "the prompt was computed to its end"
    assert [line.split()[3] for line in lines()] == ["499", "499"]


def test_who_leaves_after_the_last_token(place, lines):
    async def leaves():
        wire = await Wire.open(place.port)
        await wire.send(request(COMPLETE, SHORT | {"stream": True}))
        assert (await wire.head())[0] == 200
        while b'"length"' not in await wire.chunk():
            pass
        wire.close()

    run(leaves())
    place.wait_until_empty()


def test_a_slow_reader_holds_no_memory_and_is_cut(folder, lines):
    """Megabytes that nobody reads: the blocks are free long before, and after a while it is left."""
    body = {"prompt": "a", "max_tokens": 300, "n": 2, "logprobs": 20, "stream": True, "ignore_eos": True}

    async def reads_nothing(one):
        wire = await Wire.open(one.port, small=True)
        await wire.send(request(COMPLETE, body))
        assert (await wire.head())[0] == 200
        await asyncio.to_thread(wait_for, lambda: one.llm.engine.totals.num_finished, 30)
        usage = (await one.llm.stats()).memory
        assert usage.free == usage.num_blocks and one.house.num_guests == 1  # it is still being written to
        await asyncio.to_thread(wait_for, lambda: not one.house.num_guests)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError, TimeoutError)):  # cut, and not ended
            async with asyncio.timeout(5):
                while await wire.chunk():
                    pass

    with running(folder, limits(send_seconds=3), block_size=16, num_blocks=200) as one:
        one.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        asyncio.run(asyncio.wait_for(reads_nothing(one), 60))
        one.wait_until_empty()
    assert len(lines()) == 1 and " 499 " in lines()[0]


def test_a_slow_reader_who_does_read_gets_all(place):
    async def reads():
        wire = await Wire.open(place.port, small=True)
        await wire.send(request(COMPLETE, LONG | {"stream": True}))
        pieces, _ = [], await wire.head()
        while piece := await wire.chunk():
            pieces.append(piece)
            await asyncio.sleep(0.001)
        return "".join(event["choices"][0]["text"] for event in events(b"".join(pieces)))

    assert run(reads()) == run(ask(place.port, COMPLETE, LONG))[2]["choices"][0]["text"]


# --- the log --------------------------------------------------------------------------------------------------------


def test_one_line_a_request_with_its_id_and_without_its_text(place, lines):
    async def asks():
        mine = {"x-request-id": "my-7"}
        _, headers, said = await ask(place.port, COMPLETE, SHORT | {"prompt": "secret"}, headers=mine)
        assert headers["x-request-id"] == "my-7"
        _, headers, _ = await ask(place.port, CHAT, {"messages": [{"role": "user", "content": "secret"}], "n": 0})
        assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])
        _, wrong, _ = await ask(place.port, "/x%0a%0dy", headers={"x-request-id": "a\tb c\xe4" + "d" * 300})
        assert wrong["x-request-id"] == "abc" + "d" * 197
        await ask(place.port, COMPLETE, SHORT | {"request_id": "mine;7", "stream": True})
        return said

    said = run(asks())
    wait_for(lambda: len(lines()) == 4)
    first, second, third, fourth = lines()
    tail = rf"id={said['id']} prompt=6 output=3 end=length"
    assert re.fullmatch(rf"my-7 POST /v1/completions 200 \d+\.\d+s {tail}", first)
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32} POST /v1/chat/completions 400 \d+\.\d+s", second)
    assert third.startswith("abcddd") and r" GET /x\u000a\u000dy 404 " in third
    assert " id=mine;7 " in fourth
    assert not any("secret" in line for line in lines())


def test_text_is_logged_if_that_is_asked_for(folder, lines):
    with running(folder, limits(log_text=True), **SMALL) as one:
        run(ask(one.port, COMPLETE, SHORT | {"prompt": "a secret"}))
    assert "asked='a secret'" in lines()[0] and "answered=[" in lines()[0]


def test_a_mistake_of_ours_is_a_500_that_is_logged(folder, lines, monkeypatch):
    monkeypatch.setattr("minipaged.server.generation.Job.whole", lambda self: 1 / 0)
    with running(folder, LIMITS, **SMALL) as one:
        status, headers, said = run(ask(one.port, COMPLETE, SHORT, headers={"x-request-id": "mine"}))
        assert status == 500 and said["error"]["type"] == "InternalServerError" and headers["x-request-id"] == "mine"
        assert not one.house.num_guests
    assert lines()[0] == "mine" and lines()[1].startswith("mine POST /v1/completions 500 ")


def test_steps_that_fail_are_told_as_a_status_or_as_an_event(folder, monkeypatch):
    async def asks(one):
        return await asyncio.gather(*[ask(one.port, COMPLETE, LONG | {"stream": stream}) for stream in (False, True)])

    def fails(plan):
        raise RuntimeError("the device fell asleep")

    with running(folder, LIMITS, **SMALL) as one:
        monkeypatch.setattr(one.llm.engine.executor, "execute", fails)
        for status, _, said in run(asks(one)):
            assert status == 500 and "fell asleep" in said["error"]["message"]
        assert run(ask(one.port, "/health"))[0] == 503
        monkeypatch.undo()
        assert run(ask(one.port, COMPLETE, SHORT))[0] == 200 and run(ask(one.port, "/health"))[0] == 200

        async def breaks():
            wire = await Wire.open(one.port)
            await wire.send(request(COMPLETE, LONG | {"stream": True}))
            _, headers = await wire.head()
            pieces = [await wire.chunk()]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(one.llm.engine.executor, "execute", fails)
                pieces.append(await wire.body(headers))
            return events(b"".join(pieces))

        assert "fell asleep" in run(breaks())[-1]["error"]["message"]


# --- the command line -----------------------------------------------------------------------------------------------


def command(*flags, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    return subprocess.Popen(
        [sys.executable, "-m", "minipaged.serve", *map(str, flags)], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def ends(process, seconds=30):
    """(exit status, what it said)."""
    try:
        out, error = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert "Traceback" not in error and not out, error
    return process.returncode, error


@contextlib.contextmanager
def served(folder, *flags):
    """A server of its own, and its port."""
    process = command("--model", folder, "--port", 0, "--num-blocks", 300, "--block-size", 4, *flags)
    try:
        said = ""
        while "is served at" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        yield process, int(said.rsplit(":", 1)[1])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def is_free(port):
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
            return True
        except OSError:
            return False


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_those_under_way_end_and_new_ones_are_refused(folder, sent):
    async def asks(process, port):
        wires = []
        for stream in (False, True):
            wires.append(await Wire.open(port))
            await wires[-1].send(request(COMPLETE, LONG | {"max_tokens": 1100, "stream": stream}))
        head = await wires[1].head()
        late = await Wire.open(port)
        process.send_signal(sent)
        await asyncio.sleep(0.05)
        await late.send(request(COMPLETE, SHORT))
        status, headers, said = await late.answer()
        assert status == 503 and headers["retry-after"] == "30" and b"about to end" in said
        whole = await wires[0].answer()
        assert whole[0] == 200 and b'"completion_tokens":1100' in whole[2]
        told = events(await wires[1].body(head[1]))
        assert told[-1]["choices"][0]["finish_reason"] == "length"

    with served(folder) as (process, port):
        run(asks(process, port))
        status, said = ends(process)
        assert status == 0 and is_free(port)
        lines = said.splitlines()
        [ending] = [line for line in lines if "ending" in line]
        assert ending.endswith("ending: 2 under way, 30 s at the longest; a second signal ends at once")
        assert [line.split()[4] for line in lines if line != ending] == ["503", "200", "200"], said


def test_after_a_while_those_under_way_are_told(folder):
    async def asks(process, port):
        wires = [await Wire.open(port) for _ in range(4)]
        for number, wire in enumerate(wires):
            await wire.send(request(COMPLETE, LONG | {"max_tokens": 1190, "stream": number % 2 == 1, "n": 1}))
        head = await wires[3].head()
        process.send_signal(signal.SIGTERM)
        answers = [await wire.answer() for wire in wires[:3]]
        answers.append((*head, await wires[3].body(head[1])))
        return answers

    with served(folder, "--drain-seconds", 0.1, "--max-num-seqs", 4, "--max-num-batched-tokens", 4) as (process, port):
        for status, _, body in run(asks(process, port)):
            assert (status == 503 or status == 200) and b"the engine was shut down" in body
        status, said = ends(process)
        assert status == 0 and is_free(port) and len(said.splitlines()) == 5, said


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(folder, sent):
    async def asks(process, port):
        wire = await Wire.open(port)
        await wire.send(request(COMPLETE, LONG | {"max_tokens": 1190, "stream": True}))
        await wire.head()
        process.send_signal(sent)
        await asyncio.sleep(0.05)
        began = time.monotonic()
        process.send_signal(sent)
        await wire.reader.read()
        assert time.monotonic() - began < 2

    with served(folder) as (process, port):
        run(asks(process, port))
        status, said = ends(process)
        assert status == 130 and (not said or "ending" in said) and is_free(port)


def test_it_ends_though_connections_are_open(folder):
    with served(folder) as (process, port), socket.create_connection(("127.0.0.1", port)) as idle:
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.recv(15) == b"HTTP/1.1 200 OK"
        process.send_signal(signal.SIGTERM)
        assert ends(process) == (0, "")


def test_ctrl_c_while_it_loads(folder):
    """Whatever is being imported then. It holds its port before it loads."""
    for seconds in (0, 0.3, 0.6, 1.0):
        port = free_port()
        process = command("--model", folder, "--port", port)
        wait_for(lambda port=port: not is_free(port), 30)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        status, said = ends(process)
        assert (status == 130 and said.strip().endswith("interrupted")) or (status == 0 and "is served at" in said)


def test_what_can_not_be_is_said_in_a_sentence(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    (tmp_path / "config.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = {
            ("--port", port): f"127.0.0.1:{port}: Address already in use: choose another --port or --host",
            ("--host", "no.such.host.invalid"): "no.such.host.invalid:8000: ",
            ("--host", ""): "no host",
            ("--host", "x" * 300): "choose another --port or --host",
            ("--port", 99999): "must be an integer from 0 to 65535, not '99999'",
            ("--max-queue-seconds", 0): "must be a number of seconds above 0, not '0'",
            ("--max-body-bytes", "1k"): "must be an integer of at least 1, not '1k'",
            ("one", "--model", "another"): "argument --model: not allowed with argument MODEL",
            ("--modle", "x"): "unrecognized arguments: --modle",
            ("--port", 0, "--model", tmp_path / "nowhere"): "nowhere",
            ("--port", 0, tmp_path): "has no model.safetensors",
            ("--port", 0, "--model", folder, "--num-blocks", 10**12): "",
        }
        for flags, words in cases.items():
            assert main([str(flag) for flag in flags]) == 2
            [error] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
            assert error.startswith("minipaged.serve: error: ") and words in error, (words, error)
        status, said = ends(command("--port", port))
        assert status == 2 and said.count("\n") == 1


def test_help_fits_into_80_columns():
    process = command("--help")
    out, error = process.communicate(timeout=30)
    assert process.returncode == 0 and not error and max(map(len, out.splitlines())) <= 80
    for flag in ("--api-key", "--allowed-origin", "--drain-seconds", "--log-text", "--max-queued-tokens"):
        assert flag in out


API = "OpenAI's API at /v1"


@pytest.mark.parametrize("flags, told", [
    (["--num-blocks", 1], f"1 block of 4 tokens, at most 4 tokens a request; {API}, a page at /"),
    (["--num-blocks", 1000, "--max-model-len", 9, "--no-page"],
     f"1,000 blocks of 4 tokens, at most 9 tokens a request; {API}"),
])  # fmt: skip
def test_it_says_what_it_has_and_where_that_is(folder, flags, told):
    process = command("--model", folder, "--port", 0, "--block-size", 4, *flags)
    try:
        assert process.stderr.readline() == told + "\n"
        assert re.fullmatch(r".* is served at http://127\.0\.0\.1:\d+\n", process.stderr.readline())
    finally:
        process.kill()
        process.communicate()


def test_help_tells_limits_to_the_last_digit():
    out, _ = command("--help").communicate(timeout=30)
    assert "(default: 4194304)" in out and "e+0" not in out


def test_the_log_has_the_id_that_the_answer_has(place, lines):
    _, headers, said = run(ask(place.port, COMPLETE, SHORT))
    wait_for(lambda: len(lines()) == 1)
    assert said["id"] == "cmpl-" + headers["x-request-id"]
    assert re.fullmatch(rf"{said['id']} POST /v1/completions 200 \d+\.\d+s prompt=3 output=3 end=length", lines()[0])


def test_two_that_come_with_the_same_name_have_answers_of_their_own(place):
    async def asks():
        one = ask(place.port, COMPLETE, LONG, headers={"x-request-id": "same"})
        other = ask(place.port, COMPLETE, LONG, headers={"x-request-id": "same"})
        return await asyncio.gather(one, other)

    (status, _, said), (status_too, _, said_too) = run(asks())
    assert status == status_too == 200 and said["id"] != said_too["id"]
