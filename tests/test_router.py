"""The router in front of real servers: the same answers, and what happens when servers die."""

import asyncio
import contextlib
import threading
import time

import pytest
from raw_http import ask, running
from tiny_model import make_folder

from minipaged.server.config import ServerConfig
from minipaged.server.fleet import Fleet
from minipaged.server.router import create_router
from minipaged.server.routing import make_policy
from minipaged.server.running import address, bind, serve

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
SMALL = dict(block_size=4, num_blocks=300, max_num_seqs=4, debug=True)
SHORT = {"prompt": "abc", "max_tokens": 5, "temperature": 0}
LONG = {"prompt": "abc", "max_tokens": 500, "temperature": 0, "ignore_eos": True}


class Routed:
    """A router in a thread."""

    def __init__(self, urls, policy="round_robin", config=None, **options):
        self.fleet = Fleet(make_policy(policy), urls, **{"pause": 0.1, **options})
        self.app = create_router(self.fleet, config or ServerConfig(drain_seconds=5))
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
