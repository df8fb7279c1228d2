"""Servers as processes: started, waited for until they answer, and ended.

What they say goes into a file, and the end of it to whoever wants to know why one died. On Linux a server ends with
the process that started it, however that one ends; elsewhere, unless that one is killed outright.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from minipaged.bench import peer_vllm
from minipaged.bench.contenders import BLOCK_SIZE, Options
from minipaged.bench.worker import ROOT

PATIENCE = 20.0  # seconds for a server to end when asked to
LOADING = 900.0  # seconds until it answers: vLLM compiles first
HOST = "127.0.0.1"
# A process that is told when its parent ends, and then becomes the server.
LEASH = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class ServerFailed(RuntimeError):
    """A server could not start, or ended; the message says why, as far as it said."""


@dataclass(frozen=True)
class Recipe:
    """How a server is started: its Python, arguments of it (PORT is replaced), and more of an environment."""

    label: str
    python: str
    arguments: list[str]
    environment: dict[str, str]


class Server:
    """One server, which starts at once; `wait` tells when it answers."""

    def __init__(self, recipe: Recipe):
        self.label = recipe.label
        port = free_port()
        self.url = f"http://{HOST}:{port}"
        arguments = [port if argument == "PORT" else argument for argument in recipe.arguments]
        if sys.platform == "linux":
            arguments = ["-c", LEASH, str(os.getpid()), *arguments]
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (until close)
        self._process = subprocess.Popen(
            [recipe.python, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=subprocess.STDOUT,
            env=os.environ | recipe.environment,
            start_new_session=True,  # Ctrl-C in a terminal is heard by us alone, and what it starts ends with it
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, patience: float = LOADING) -> None:
        """Until it answers. ServerFailed if it ends instead, or takes too long."""
        until = time.monotonic() + patience
        while not is_healthy(self.url):
            self.check()
            if time.monotonic() > until:
                raise ServerFailed(f"{self.label}: no answer in {patience:g} s")
            time.sleep(0.1)

    def check(self) -> None:
        """ServerFailed if it ended."""
        code = self._process.poll()
        if code is not None:
            raise ServerFailed(f"{self.label}: it ended (exit code {code}): {self._last_words()}")

    def _last_words(self) -> str:
        size = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, size - 2000))
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else "it said nothing"

    def close(self) -> None:
        """End it and all that it started: it is asked to, asked again, and killed."""
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None or number == signal.SIGKILL:
                with contextlib.suppress(ProcessLookupError, PermissionError):  # none are left; macOS says the latter
                    os.kill(self.pid, number) if number == signal.SIGTERM else os.killpg(self.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(PATIENCE)
        self._said.close()


def ours(options: Options, most_requests: int) -> Recipe:
    """This engine's server, as `options` say; so many may wait in its queue."""
    arguments = [
        "-m", "minipaged.serve", "--model", options.model, "--host", HOST, "--port", "PORT", "--dtype", options.dtype,
        "--num-blocks", str(options.num_blocks), "--max-queued-requests", str(most_requests),
    ]  # fmt: skip
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {"OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": path, "MINIPAGED_API_KEY": ""}
    return Recipe("minipaged", sys.executable, arguments, environment)


def vllm(options: Options, python: str) -> Recipe:
    """vLLM's server, with the settings that peer_vllm.py found best, and as much memory as ours."""
    assert options.num_blocks
    memory = options.num_blocks * BLOCK_SIZE * options.kv_bytes_per_token
    arguments = [
        "-m", "vllm.entrypoints.openai.api_server", "--model", options.model, "--host", HOST, "--port", "PORT",
        "--dtype", peer_vllm.DTYPES[options.dtype], "--load-format", "safetensors",
        "--block-size", str(peer_vllm.VLLM_BLOCK_SIZE), "--kv-cache-memory-bytes", str(memory),
        "--enable-prefix-caching", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log",
        "--uvicorn-log-level", "warning", "--max-model-len", str(options.longest),
    ]  # fmt: skip
    settings = {name: value for name, value in peer_vllm.SETTINGS.items() if "MULTIPROCESSING" not in name}
    settings |= {"OMP_NUM_THREADS": str(options.threads), "VLLM_API_KEY": ""}
    return Recipe("vLLM", python, arguments, settings | {"PYTHONPATH": ""})  # its environment is its own


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return str(probe.getsockname()[1])


def is_healthy(url: str) -> bool:
    try:
        with _get(f"{url}/health", 5) as answer:
            return answer.status == 200
    except (OSError, HTTPException):
        return False


def model_of(url: str) -> str:
    """The name of a server's first model. ServerFailed if none answers, or not as OpenAI's API does."""
    try:
        with _get(f"{url}/v1/models", 30) as answer:
            name = json.load(answer)["data"][0]["id"]
    except urllib.error.HTTPError as error:
        raise ServerFailed(f"{url}: /v1/models answers with HTTP {error.code}") from None
    except OSError as error:
        raise ServerFailed(f"{url}: no server answers there ({getattr(error, 'reason', error)})") from None
    except (HTTPException, ValueError, KeyError, IndexError, TypeError):
        name = None
    if not isinstance(name, str):
        raise ServerFailed(f"{url}: /v1/models does not answer as OpenAI's API does")
    return name


def _get(url: str, patience: float) -> Any:
    key = os.environ.get("OPENAI_API_KEY")
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=patience)


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """So that a peer makes text of its tokens too: the library's own file, and the two lines that point to it."""
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
