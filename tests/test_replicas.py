"""Replicas on Ray, as a command: killed, they come back; and nothing is left when it ends. Each start takes seconds."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from raw_http import ask, events
from test_router import stream_of, wait_for
from tiny_model import make_folder

from minipaged.routing.policies import make_policy
from minipaged.routing.replicas import Crew, Engine
from minipaged.serve import main
from minipaged.server.config import ServerConfig
from minipaged.terminal.command import BadInput

ROOT = Path(__file__).parents[1]
COMPLETE = "/v1/completions"
URLS = [f"http://127.0.0.1:{port}" for port in (1, 2, 3)]  # where nobody answers
LONG = {"prompt": "abc", "max_tokens": 2000, "temperature": 0, "ignore_eos": True}
SHORT = {"prompt": "abc", "max_tokens": 5, "temperature": 0}


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


class Command:
    """`serve --replicas` in a process group of its own. said: the lines of its standard error."""

    def __init__(self, folder, *flags):
        arguments = [sys.executable, "-m", "minipaged.serve", str(folder), "--replicas", "2", "--port", "0",
                     "--num-blocks", "300", "--drain-seconds", "20", *flags]  # fmt: skip
        self.said, self.port = [], 0
        self.process = subprocess.Popen(
            arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"is served at http://127.0.0.1:(\d+)", line):
                self.port = int(found[1])

    def wait(self):
        wait_for(lambda: self.port or self.process.poll() is not None, 120)
        assert self.port, self.said
        self.wait_for(2)

    def health(self):
        return run(ask(self.port, "/health"))[2]

    def wait_for(self, num_live, seconds=60):
        wait_for(lambda: self.health()["live"] == num_live, seconds)

    def family(self):
        """(pid, name) of all processes of Ray's that belong to it: they have its folder, or are its children's."""
        found, children = [], {}
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                pid, name, _, parent = re.match(r"(\d+) \((.*)\) (.) (\d+)", status.read_text()).groups()
                children.setdefault(int(parent), []).append((int(pid), name))
        stack = [self.process.pid]
        while stack:
            for pid, name in children.get(stack.pop(), ()):
                found.append((pid, name))
                stack.append(pid)
        return found

    def engines(self):
        return [pid for pid, name in self.family() if name.startswith("ray::Engine")]

    def close(self):
        family = self.family()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        for pid, _ in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._reader.join(10)
        self.process.stderr.close()


def is_there(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("replicas"))


def test_without_ray_a_sentence_says_what_to_install(folder, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([str(folder), "--replicas", "2", "--port", "0"]) == 2
    assert "pip install 'ray>=2.50'" in capsys.readouterr().err
    assert main([str(folder), "--ray-address", "auto"]) == 2
    assert "only with --replicas" in capsys.readouterr().err
    assert main([str(folder), "--replicas", "0"]) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_two_replicas_one_is_killed_and_comes_back_and_nothing_is_left(folder):
    """One start of Ray for all of it: it takes longer than the rest."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray>=2.50'")
    command = Command(folder)
    try:
        command.wait()
        assert any("2 replicas of" in line for line in command.said)
        answers = [run(ask(command.port, COMPLETE, SHORT))[2]["choices"] for _ in range(3)]
        assert answers[0] == answers[1] == answers[2]

        async def killed():
            streams = [asyncio.create_task(stream_of(command.port, LONG | {"prompt": text})) for text in "abcd"]
            answered = [asyncio.create_task(ask(command.port, COMPLETE, LONG | {"prompt": text})) for text in "ab"]
            await asyncio.sleep(0.5)
            os.kill(command.engines()[0], signal.SIGKILL)
            return await asyncio.gather(*streams), await asyncio.gather(*answered)

        streams, answered = run(killed())
        ends = ["error" in events(said)[-1] for status, said in streams if status == 200]
        assert len(ends) == 4 and True in ends and False in ends, "some were with the one that died"
        assert [(status, said["usage"]["completion_tokens"]) for status, _, said in answered] == [(200, 2000)] * 2
        wait_for(lambda: command.health()["live"] == 2 and len(command.engines()) == 2, 60)
        assert command.health()["of"] == 2
        assert run(ask(command.port, COMPLETE, SHORT))[2]["choices"] == answers[0]
        assert not any("(raylet)" in line for line in command.said), "Ray says nothing"

        family = command.family()
        assert len(family) > 3
        asked = threading.Thread(target=lambda: ends.append(run(ask(command.port, COMPLETE, LONG))[0]))
        asked.start()
        wait_for(lambda: any(one["outstanding"] for one in command.health()["replicas"]))
        os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does it: all of them hear it
        asked.join(30)
        assert ends[-1] == 200, "who is under way may end"
        assert command.process.wait(30) == 0
        wait_for(lambda: not any(is_there(pid) for pid, _ in family), 20)
    finally:
        command.close()
    assert not list(Path("/tmp").glob(f"ray-{command.process.pid}-*"))


# --- without Ray: what an actor does, and how a crew mends itself -----------------------------------------------------


def test_an_engine_serves_until_it_is_stopped_and_says_why_it_can_t(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # put back at the end
    engine, config = Engine(1), ServerConfig(model_names=("tiny",))
    (tmp_path / "config.json").write_text("{}")
    assert list(engine.start(str(tmp_path), {}, config, "127.0.0.1")) == ["error"]
    told = engine.start(str(folder), {"num_blocks": 50}, config, "127.0.0.1")
    port = int(told["url"].rsplit(":", 1)[1])
    assert run(ask(port, COMPLETE, SHORT))[0] == 200 and os.environ["OMP_NUM_THREADS"] == "1"
    engine.stop()
    engine.wait()
    with pytest.raises(ConnectionError):
        run(ask(port, COMPLETE, SHORT))


class FakeRay:
    """What of Ray a crew uses. Each engine is a stand-in server. plan: what becomes of each start: its URL, or why not.

    ends: by URL, when it dies.
    """

    def __init__(self, plan, resources):
        self.plan, self.cluster_resources, self.ends, self.num_stopped = list(plan), lambda: resources, {}, 0
        self.started = []

    def remote(self, actor):
        return self

    def options(self, **options):
        self.started.append(options)
        return SimpleNamespace(remote=lambda threads: FakeActor(self))

    def get(self, told):
        return told


class FakeActor:
    def __init__(self, ray):
        self.start = SimpleNamespace(remote=lambda *told: Told(ray.plan.pop(0), self))
        self.wait, self.stop = SimpleNamespace(remote=self._wait), SimpleNamespace(remote=self._stop)
        self._ray = ray

    async def _wait(self):
        await self._ray.ends.setdefault(self.url, asyncio.Event()).wait()
        raise RuntimeError("it died")

    async def _stop(self):
        self._ray.num_stopped += 1


class Told(dict):
    """A dict that can be waited for, as a reference of Ray's can."""

    def __init__(self, told, actor):
        super().__init__({"url": told} if told.startswith("http") else {"error": told})
        actor.url = told

    def __await__(self):
        if self.get("error") == "dies":
            raise RuntimeError("it died while it was loading")
        return dict(self)
        yield


def crew_of(plan, monkeypatch, count=2, resources=None, options=None):
    ray = FakeRay(plan, resources or {"CPU": 8.0})
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr("minipaged.routing.replicas.BACKOFF", (0.01, 0.04))
    return ray, lambda: Crew(make_policy("round_robin"), count, "model", options or {}, ServerConfig())


def test_who_dies_is_started_again_however_often_that_takes(monkeypatch):
    async def life(ray, crew):
        await crew.open()
        await asyncio.sleep(0.01)
        assert sorted(crew.replicas) == URLS[:2]
        ray.ends.setdefault(URLS[0], asyncio.Event()).set()
        while URLS[2] not in crew.replicas:
            await asyncio.sleep(0.01)
        assert sorted(crew.replicas) == URLS[1:] and crew.size == 2 and ray.plan == []
        await crew.close()
        assert ray.num_stopped == 2 and crew.replicas == {}

    ray, make = crew_of([*URLS[:2], "no memory", "dies", URLS[2]], monkeypatch)
    crew = make()
    crew.start()
    assert crew.threads == 4 and ray.started[0]["num_gpus"] == 0
    run(life(ray, crew))


def test_if_one_can_t_start_at_the_beginning_it_is_the_user_who_is_told(monkeypatch):
    with pytest.raises(BadInput, match="no memory"):
        crew_of([URLS[0], "no memory"], monkeypatch)[1]().start()


def test_each_has_its_share_of_the_cores_and_a_gpu_if_there_are_any(monkeypatch):
    assert crew_of([], monkeypatch, 3)[1]().threads == 2
    assert crew_of([], monkeypatch, 30)[1]().threads == 1
    with pytest.raises(BadInput, match="--replicas 2: each needs a GPU, and there are 1; --device cpu"):
        crew_of([], monkeypatch, resources={"CPU": 8.0, "GPU": 1.0})[1]()
    crew_of([], monkeypatch, resources={"CPU": 8.0, "GPU": 1.0}, options={"device": "cpu"})[1]()
    ray, make = crew_of(URLS[:2], monkeypatch, resources={"CPU": 8.0, "GPU": 2.0})
    make().start()
    assert ray.started[0]["num_gpus"] == 1
