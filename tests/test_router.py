"""The router in front of real servers: the same answers, and what happens when servers die."""

import asyncio
import contextlib
import json
import random
import signal
import threading
import time

import pytest
from chaos import joined
from raw_http import Wire, ask, events, request, running
from replica_processes import STREAM, chunk, plain, server_processes, standing_in
from tiny_model import make_folder

from minipaged import route
from minipaged.routing.fleet import Fleet
from minipaged.routing.handover import WANTED
from minipaged.routing.policies import make_policy
from minipaged.routing.router import create_router
from minipaged.server.config import ServerConfig
from minipaged.server.running import address, bind, serve

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
SMALL = dict(block_size=4, num_blocks=300, max_num_seqs=4, debug=True)
SHORT = {"prompt": "abc", "max_tokens": 5, "temperature": 0}
LONG = {"prompt": "abc", "max_tokens": 500, "temperature": 0, "ignore_eos": True}


class Routed:
    """A router in a thread."""

    def __init__(self, urls, policy="round_robin", prefill=None, **options):
        self.fleet = Fleet(make_policy(policy), urls, **{"pause": 0.1, **options})
        self.prefill = prefill and Fleet(make_policy(policy), prefill, pause=0.1)
        self.app = create_router(self.fleet, ServerConfig(drain_seconds=2), self.prefill)
        self.house, self.listening = self.app.state.house, bind("127.0.0.1", 0)
        self.url, self.port = address(self.listening), self.listening.getsockname()[1]
        self._thread = threading.Thread(target=serve, args=(self.app, self.listening))
        self._thread.start()

    def wait_for(self, num_live, seconds=10):
        wait_for(lambda: len(self.fleet.policy.live) == num_live, seconds)

    def stop(self):
        self.house.closing = True
        self._thread.join(20)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def routed(urls, *args, num_live=None, **kwargs):
    router = Routed(urls, *args, **kwargs)
    try:
        router.wait_for(len(urls) if num_live is None else num_live)
        if router.prefill:
            wait_for(lambda: len(router.prefill.policy.live) == len(router.prefill.replicas))
        yield router
    finally:
        router.stop()


def wait_for(what, seconds=10):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.005)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 30))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("router"))


@pytest.fixture(scope="module")
def two(folder):
    with running(folder, **SMALL) as a, running(folder, **SMALL) as b:
        yield a, b


def urls_of(places):
    return [place.url.rstrip("/") for place in places]


def told(answer):
    """Without what is new in each answer, or depends on who was asked before."""
    status, _, body = answer
    body.get("usage", {}).pop("prompt_tokens_details", None)
    return status, {key: value for key, value in body.items() if key not in ("id", "created")}


BODIES = [
    (COMPLETE, SHORT), (COMPLETE, SHORT | {"n": 2, "seed": 3, "temperature": 1, "logprobs": 2}),
    (CHAT, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "seed": 1}),
    (COMPLETE, {"prompt": ["ab", [1, 2, 3]], "max_tokens": 2, "seed": 1, "echo": True}),
    (COMPLETE, SHORT | {"n": 0}), (COMPLETE, SHORT | {"model": "gpt-4"}), (COMPLETE, b"{"), (COMPLETE, b"[]"),
    ("/tokenize", {"prompt": "abc"}), ("/detokenize", {"tokens": [1, 2]}), ("/version", None),
    ("/abort", {"request_id": "nobody"}), ("/v1/models/tiny", None), ("/v1/models/other", None),
]  # fmt: skip


def test_it_answers_as_the_servers_do(two):
    async def same(port):
        for path, body in BODIES:
            direct = told(await ask(two[0].port, path, body))
            for _ in two:
                assert told(await ask(port, path, body)) == direct

    with routed(urls_of(two)) as router:
        run(same(router.port))


def data_of(event):
    return b"data: " + json.dumps(event).encode() + b"\n\n"


async def stream_of(port, body, path=COMPLETE):
    """(status, all bytes) of a stream, to its very end."""
    wire = await Wire.open(port)
    try:
        await wire.send(request(path, body | {"stream": True}))
        status, headers, said = await wire.answer()
        return status, said
    finally:
        wire.close()


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_is_the_same_bytes_as_they_come_and_half_an_event_waits_for_the_rest():
    pieces = [b"data: {\"a\": 1}\n\n", b": alive\n\ndata: {\"b", b"\": 2}\n\n", b"data: [DONE]\n\n"]
    go_on = [threading.Event() for _ in pieces]

    async def answer(method, path, body, writer):
        writer.write(STREAM)
        for piece, event in zip(pieces, go_on, strict=True):
            writer.write(chunk(piece))
            await writer.drain()
            await asyncio.to_thread(event.wait, 10)
        writer.write(b"0\r\n\r\n")

    async def read(port):
        wire = await Wire.open(port)
        await wire.send(request(COMPLETE, {"prompt": "a", "stream": True}))
        assert (await wire.head())[1]["content-type"] == "text/event-stream"
        come = []
        for number, event in enumerate(go_on):  # the next one is sent when this one has come
            come.append(await wire.chunk())
            event.set()
            if number == 1:
                assert come == [pieces[0], b": alive\n\n"]
        assert await wire.chunk() == b""
        assert b"".join(come) == b"".join(pieces)
        wire.close()

    with standing_in(answer) as [server], routed([server.url]) as router:
        run(read(router.port))


def test_the_same_stream_as_without_a_router(two):
    async def both(port):
        for path, body in ((COMPLETE, SHORT), (CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4,
                                                      "temperature": 0})):
            status, said = await stream_of(port, body, path)
            _, direct = await stream_of(two[0].port, body, path)
            assert status == 200
            assert joined(events(said), path == CHAT) == joined(events(direct), path == CHAT)

    with routed(urls_of(two)) as router:
        run(both(router.port))


def test_who_leaves_is_aborted_at_once_and_a_slow_reader_holds_up_its_server_only(folder):
    async def leave(port, place, body):
        wire = await Wire.open(port)
        await wire.send(request(COMPLETE, body))
        await asyncio.to_thread(wait_for, lambda: place.left().get("requests"))
        wire.close(rudely=True)
        began = time.monotonic()
        await asyncio.to_thread(place.wait_until_empty)
        return time.monotonic() - began

    async def read_slowly(port):
        wire = await Wire.open(port, small=True)
        await wire.send(request(COMPLETE, LONG | {"stream": True, "max_tokens": 100}))
        await wire.head()
        for _ in range(3):
            await wire.chunk()
        for _ in range(5):
            assert (await ask(port, COMPLETE, SHORT))[0] == 200
        rest = [piece async for piece in chunks(wire)]
        assert rest[-1].endswith(b"data: [DONE]\n\n")
        wire.close()

    with running(folder, **SMALL) as place, routed([place.url.rstrip("/")]) as router:
        assert run(leave(router.port, place, LONG)) < 3
        assert run(leave(router.port, place, LONG | {"stream": True})) < 3
        run(read_slowly(router.port))
        wait_for(lambda: router.fleet.policy.load == {place.url.rstrip("/"): 0})


async def chunks(wire):
    while piece := await wire.chunk():
        yield piece


# --- servers that fail ------------------------------------------------------------------------------------------------


async def dies_at_once(method, path, body, writer):
    writer.transport.abort()


async def dies_in_the_middle(method, path, body, writer):
    said = data_of({"choices": [{"text": "x"}]})
    if json.loads(body).get("stream"):
        writer.write(STREAM + chunk(said + b"data: {\"half"))
    else:
        writer.write(plain(said)[:-3])
    await writer.drain()
    await asyncio.sleep(0.5)  # a reset takes with it what nobody has read yet
    writer.transport.abort()


async def works(method, path, body, writer):
    if json.loads(body).get("stream"):
        writer.write(STREAM + chunk(data_of({"choices": []}) + b"data: [DONE]\n\n") + b"0\r\n\r\n")
    else:
        writer.write(plain(b'{"fine": true}'))


@pytest.mark.parametrize("stream", [False, True])
def test_what_nobody_has_read_of_goes_elsewhere(stream):
    with standing_in(dies_at_once, works) as servers, routed([one.url for one in servers]) as router:
        for _ in range(4):
            status, _, said = run(ask(router.port, COMPLETE, {"prompt": "a", "stream": stream}))
            assert status == 200 and (b"[DONE]" in said if stream else said == {"fine": True})
            router.wait_for(2)
        assert len(servers[0].asked) == router.fleet.num_retries > 0
        assert len(servers[1].asked) == 4, "nothing was sent twice to who answered"


def test_a_half_answer_that_is_no_stream_goes_elsewhere():
    with standing_in(dies_in_the_middle, works) as servers, routed([one.url for one in servers]) as router:
        answers = [run(ask(router.port, COMPLETE, {"prompt": "a"})) for _ in range(2)]
        assert [(status, said) for status, _, said in answers] == [(200, {"fine": True})] * 2
        assert servers[0].asked and len(servers[1].asked) == 2


def test_a_stream_that_has_begun_ends_with_an_error_that_says_so():
    with standing_in(dies_in_the_middle, works) as servers, routed([one.url for one in servers]) as router:
        answers = [run(stream_of(router.port, {"prompt": "a"})) for _ in range(2)]  # at least one from the first
        status, said = max(answers, key=lambda answer: len(events(answer[1])))
        first, last = events(said)
        assert status == 200 and first["choices"][0]["text"] == "x"
        assert last["error"]["code"] == 502 and "lost in the middle" in last["error"]["message"]
        assert router.fleet.num_broken == len(servers[0].asked) == 2 - len(servers[1].asked), "none went elsewhere"


def test_a_request_that_ends_its_servers_does_not_end_all_of_them():
    with standing_in(*[dies_at_once] * 5) as servers, routed([one.url for one in servers]) as router:
        status, _, said = run(ask(router.port, COMPLETE, {"prompt": "a"}))
        assert status == 502 and "2 replicas were lost" in said["error"]["message"]
        assert sum(len(server.asked) for server in servers) == 2


def refuses(status):
    async def answer(method, path, body, writer):
        writer.write(plain(b'{"error": {"message": "full"}}', status, Retry_After="7"))

    return answer


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
def test_who_has_no_room_is_passed_over_and_if_all_have_none_the_client_is_told(status):
    with standing_in(refuses(status), works) as servers, routed([one.url for one in servers]) as router:
        assert [run(ask(router.port, COMPLETE, {"prompt": "a"}))[0] for _ in range(3)] == [200] * 3
    with standing_in(*[refuses(status)] * 2) as servers, routed([one.url for one in servers]) as router:
        found, headers, said = run(ask(router.port, COMPLETE, {"prompt": "a"}))
        assert (found, headers["retry-after"], said["error"]["message"]) == (int(status[:3]), "7", "full")
        assert [len(server.asked) for server in servers] == [1, 1]


def test_nobody_there(folder):
    listening = bind("127.0.0.1", 0)  # a port where nobody answers
    url = address(listening)
    listening.close()
    with routed([url], num_live=0) as router:
        status, headers, said = run(ask(router.port, COMPLETE, SHORT))
        assert status == 503 and headers["retry-after"] == "1" and "none of 1" in said["error"]["message"]
        status, _, said = run(ask(router.port, "/health"))
        assert status == 503 and said["live"] == 0 and "refused" in said["replicas"][0]["why"]
        assert run(ask(router.port, "/abort", {"request_id": "x"}))[0] == 503


def test_keys_headers_and_queries_are_passed_on_and_those_of_a_connection_are_not():
    async def answer(method, path, body, writer):
        writer.write(plain(b"{}", X_Own="mine", Connection="keep-alive", X_Request_Id="theirs"))

    with standing_in(answer) as [server], routed([server.url]) as router:
        given = {"Authorization": "Bearer k", "Connection": "x-hop", "X-Hop": "1", "X-Request-Id": "ours"}
        status, headers, _ = run(ask(router.port, "/v1/a%2Fb?x=%20y", {"prompt": "a"}, headers=given))
        assert (status, headers["x-own"], headers["x-request-id"]) == (200, "mine", "ours")
        [(method, path, got, body)] = server.asked
        assert (method, path, body) == ("POST", "/v1/a%2Fb?x=%20y", b'{"prompt": "a"}')
        assert got["authorization"] == "Bearer k" and got["x-request-id"] == "ours" and "x-hop" not in got
        assert run(ask(router.port, "/elsewhere"))[0] == 404 and len(server.asked) == 1


def test_its_own_routes(two):
    with routed(urls_of(two), "prefix") as router:
        long = SHORT | {"prompt": "a" * 200}
        for _ in range(3):
            assert run(ask(router.port, COMPLETE, long))[0] == 200
        status, _, said = run(ask(router.port, "/health"))
        assert status == 200 and said["live"] == 2 and said["replicas"][0]["outstanding"] == 0
        told = run(ask(router.port, "/metrics"))[2].decode()
        assert 'router_pieces_total{role=""} 9.0' in told and 'router_pieces_found_total{role=""} 6.0' in told
        assert told.count('status="200"} 3.0') == 1, "all went to who has it"
        page = run(ask(router.port, "/"))[2].decode()
        assert all(url in page for url in urls_of(two)) and page.startswith("2 of 2")
        too_long = run(ask(router.port, COMPLETE, b"x" * (4 * 2**20 + 1)))
        assert too_long[0] == 413


# --- one computes prompts, another one goes on ------------------------------------------------------------------------

PLACE = {"do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": "e", "remote_block_ids": [3, 1],
         "remote_host": "h", "remote_port": 1, "remote_request_id": "r", "tp_size": 1}  # fmt: skip


async def keeps_its_blocks(method, path, body, writer):
    said = {"id": "cmpl-7", "choices": [], "kv_transfer_params": PLACE}
    writer.write(plain(json.dumps({} if path == "/abort" else said).encode()))


def bodies_of(server):
    return [json.loads(body) for _, _, _, body in server.asked]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_computed_by_one_and_another_one_goes_on(stream):
    given = {"prompt": "a", "max_tokens": 9, "min_tokens": 3, "n": 2, "logprobs": 1, "seed": 4, "cache_salt": "s"}
    given |= {"stream": stream, "structured_outputs": {"regex": "a"}}
    chat = {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 9, "stream": stream}
    with (
        standing_in(keeps_its_blocks, works) as [first, second],
        routed([second.url], prefill=[first.url]) as router,
    ):
        for path, body in ((COMPLETE, given), (CHAT, chat)):
            status, _, said = run(ask(router.port, path, body))
            assert status == 200 and (b"[DONE]" in said if stream else said == {"fine": True})
        wanted = {"max_tokens": 1, "kv_transfer_params": WANTED}
        assert bodies_of(first) == [
            {"prompt": "a", "seed": 4, "cache_salt": "s"} | wanted, {"messages": chat["messages"]} | wanted
        ]  # fmt: skip
        assert bodies_of(second) == [given | {"kv_transfer_params": PLACE}, chat | {"kv_transfer_params": PLACE}]
        assert [one[1] for one in first.asked] == [COMPLETE, CHAT]
        assert run(ask(router.port, "/tokenize", {"prompt": "x"}))[0] == 200 and len(first.asked) == 2
        assert router.prefill.policy.load == {first.url: 0} and router.fleet.policy.load == {second.url: 0}
        assert run(ask(router.port, "/health"))[2]["replicas"][1]["role"] == "prefill"


@pytest.mark.parametrize("more", [
    {"prompt": ["a", "b"]}, {"prompt_logprobs": 1}, {"echo": True}
])  # fmt: skip
def test_what_can_t_be_handed_over_is_computed_by_the_second_one(more):
    with (
        standing_in(keeps_its_blocks, works) as [first, second],
        routed([second.url], prefill=[first.url]) as router,
    ):
        assert run(ask(router.port, COMPLETE, {"prompt": "a"} | more))[0] == 200
        assert first.asked == [] and bodies_of(second)[0] == {"prompt": "a"} | more


def test_a_client_does_not_say_where_keys_and_values_are():
    with standing_in(works, works) as [first, second], routed([second.url], prefill=[first.url]) as router:
        status, _, said = run(ask(router.port, COMPLETE, {"prompt": "a", "kv_transfer_params": PLACE}))
        assert status == 400 and said["error"]["param"] == "kv_transfer_params"
        assert first.asked == second.asked == []


@pytest.mark.parametrize("fails", [dies_at_once, works, refuses("503 Service Unavailable")])
def test_if_the_first_one_fails_the_second_one_computes_all(fails):
    """Also if it only doesn't say where the keys and values are."""
    with standing_in(fails, works) as [first, second], routed([second.url], prefill=[first.url]) as router:
        assert run(ask(router.port, COMPLETE, {"prompt": "a"}))[0] == 200
        assert len(first.asked) == 1 and bodies_of(second) == [{"prompt": "a"}]


def test_who_goes_on_after_another_one_may_have_taken_the_blocks_does_not_ask_for_them():
    with (
        standing_in(keeps_its_blocks, dies_at_once, works) as [first, second, third],
        routed([second.url, third.url], prefill=[first.url]) as router,
    ):
        for _ in range(2):
            assert run(ask(router.port, COMPLETE, {"prompt": "a"}))[0] == 200
            router.wait_for(2)
        num_lost = len(second.asked)
        assert num_lost and sorted(map(len, bodies_of(third))) == [1] * num_lost + [2] * (2 - num_lost)


@pytest.mark.parametrize("second", [refuses("400 Bad Request"), refuses("503 Service Unavailable"), dies_at_once])
def test_what_nobody_comes_for_need_not_be_kept(second):
    with (
        standing_in(keeps_its_blocks, second) as [first, other],
        routed([other.url], prefill=[first.url]) as router,
    ):
        assert run(ask(router.port, COMPLETE, {"prompt": "a"}))[0] in (400, 503, 502)
        wait_for(lambda: len(first.asked) == 2)
        assert (first.asked[1][1], bodies_of(first)[1]) == ("/abort", {"request_id": "cmpl-7"})
        wait_for(lambda: router.prefill.policy.load == {first.url: 0})


# --- processes that are killed ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(two):
    """What the servers say, by prompt."""
    async def all_():
        return {text: await ask(two[0].port, COMPLETE, wish(text)) for text in TEXTS}

    return {text: said["choices"][0]["text"] for text, (_, _, said) in run(all_()).items()}


TEXTS = ["Once upon a time", "abcabcabc", "zq", "7 7 7"]


def wish(text):
    return {"prompt": text, "max_tokens": 30, "temperature": 0, "ignore_eos": True}


async def one_wish(port, answers, rng, counts):
    """Whatever happens: the whole answer, or a beginning of it and an error that says so."""
    text, stream = rng.choice(TEXTS), rng.random() < 0.6
    if not stream:
        status, _, said = await ask(port, COMPLETE, wish(text))
        assert status in (200, 502, 503), said
        if status == 200:
            assert said["choices"][0]["text"] == answers[text]
        counts[status] += 1
        return
    status, said = await stream_of(port, wish(text))
    if status != 200:
        assert status in (502, 503), said
        counts[status] += 1
        return
    told = events(said)
    got = "".join(one["choices"][0]["text"] for one in told if "choices" in one)
    if "error" in told[-1]:
        assert answers[text].startswith(got) and got != "" and "lost" in told[-1]["error"]["message"]
        counts["broken"] += 1
    else:
        assert got == answers[text]
        counts["streamed"] += 1


def test_killed_at_random_moments_nothing_is_lost_unsaid_and_nothing_comes_twice(folder, answers, pytestconfig):
    """One of two is always there: what isn't streamed gets its answer."""
    rng, counts = random.Random(0), dict.fromkeys([200, 502, 503, "broken", "streamed"], 0)
    examples = pytestconfig.getoption("--router-examples")

    async def crowd(port, number):
        gate = asyncio.Semaphore(8)

        async def guest():
            async with gate:
                await one_wish(port, answers, rng, counts)

        async with asyncio.timeout(60):
            await asyncio.gather(*(guest() for _ in range(number)))

    with server_processes(folder, 2, pause=0.002) as servers, routed([server.url for server in servers]) as router:
        for round_ in range(examples):
            victim, sig = servers[round_ % 2], rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            timer = threading.Timer(rng.uniform(0.05, 0.3), victim.kill, [sig])
            timer.start()
            asyncio.run(crowd(router.port, 30))
            timer.join()
            victim.kill()
            victim.start()
            router.wait_for(2, 60)
        assert all(load == 0 for load in router.fleet.policy.load.values())
        assert all(server.running() == 0 for server in servers)
    assert counts[502] == counts[503] == 0 and counts[200] and counts["streamed"], counts
    if examples > 2:
        assert counts["broken"] and router.fleet.num_retries, counts


def test_a_server_that_hangs_is_found_and_what_waits_for_it_is_helped_elsewhere(folder, answers):
    async def scene(server, other, router):
        asked = asyncio.create_task(ask(router.port, COMPLETE, LONG))
        stream = asyncio.create_task(stream_of(router.port, LONG))
        await asyncio.to_thread(wait_for, lambda: server.running() == 2)
        await asyncio.sleep(0.2)  # the stream has begun
        server.kill(signal.SIGSTOP)
        router.house.loop.call_soon_threadsafe(router.fleet.add, other.url)  # from now on there is another one
        return await asked, await stream

    with (
        server_processes(folder, 1, pause=0.02) as [server], standing_in(works) as [other],
        routed([server.url], hang=1.0) as router,
    ):  # fmt: skip
        (status, _, said), (_, streamed) = run(scene(server, other, router))
        assert status == 200 and said == {"fine": True}
        assert "lost in the middle" in events(streamed)[-1]["error"]["message"]
        server.kill(signal.SIGCONT)
        router.wait_for(2)
        wait_for(lambda: server.running() == 0)  # it sees that nobody is there any more


def test_help_fits_into_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        route.main(["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize(("flags", "said"), [
    ([], "give the URLs of servers"),
    (["ftp://x"], "must be a URL such as http://10.0.0.1:8000, not 'ftp://x'"),
    (["http://x", "--prefill", "http://y"], "give the URLs of servers; or some with --prefill, and some with --decode"),
])  # fmt: skip
def test_wrong_flags(capsys, flags, said):
    assert route.main(flags) == 2
    assert said in " ".join(capsys.readouterr().err.split())
