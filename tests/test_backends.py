"""The door to the kernels: who computes, what is said when somebody can't, and that all give the same tokens."""

import os
import re
import stat
import subprocess
import sys
import threading

import pytest
import torch
from tiny_model import make_folder

import kernels
from kernels import cpp_build
from minipaged import LLM, SamplingParams, cache_folder

PROMPTS = [[1 + (5 * i + 3 * k) % 90 for k in range(n)] for i, n in enumerate((1, 5, 9, 20))]
QUICKLY = ("-O0",)  # a build in 3 s, where it doesn't matter how fast the library is; else it takes 25
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def no_triton(tmp_path_factory):
    """A folder that hides the package, as on a machine where it isn't installed."""
    package = tmp_path_factory.mktemp("path") / "triton"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('hidden')")
    return str(package.parent)


def generate(folder, *flags, **environment):
    """The command line with a tiny model, in a process of its own. A variable that is None is unset."""
    variables = {k: v for k, v in (os.environ | environment).items() if v is not None}
    model = ["--model", str(folder), "--raw", "hello", "--max-tokens", "4"]
    command = [sys.executable, "-m", "minipaged.generate", *model]
    return subprocess.run([*command, *flags], env=variables, capture_output=True, text=True)


def test_auto_takes_the_fastest_that_runs_here(tmp_path):
    assert kernels.load("auto").name == "cpp"
    assert kernels.load("auto", dtype=torch.bfloat16).name == "cpp"
    said: list[str] = []
    assert kernels.load("auto", dtype=torch.float16, notice=said.append).name == "torch"
    assert said == ["kernels in C++ compute fp32 and bf16, not float16; PyTorch computes instead"]
    assert kernels.load("torch", folder=tmp_path).name == "torch" and not list(tmp_path.iterdir())


def test_names_and_machines_that_are_not_there():
    with pytest.raises(ValueError, match="kernels='fast': must be one of auto, torch, triton, cpp"):
        kernels.load("fast")
    with pytest.raises(kernels.Unavailable, match="fp32 and bf16, not float16"):
        kernels.load("cpp", dtype=torch.float16)
    with pytest.raises(kernels.Unavailable, match="for a CPU"):
        kernels.load("cpp", device="cuda")
    with pytest.raises(ValueError, match="kernels='fast'"):
        LLM("smollm2", kernels="fast")


def test_the_library_is_built_once_and_said_so(tmp_path):
    said: list[str] = []
    build = lambda: cpp_build.build(tmp_path / "new", said.append, cpp_build.FLAGS + QUICKLY)  # noqa: E731
    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:  # two at the same time do each other no harm
        thread.start()
    for thread in threads:
        thread.join()
    [library] = (tmp_path / "new").iterdir()
    assert said[0].startswith("building the C++ kernels with ") and str(tmp_path) in said[0]
    count = len(said)
    assert build() == library and len(said) == count
    assert cpp_build.load(library).panel_width() > 0


@pytest.mark.parametrize(
    ("compiler", "why"),
    [("/nowhere/c++", "/nowhere/c++ does not run"), ("false", "false failed"), ("true", "true failed: no library")],
)
def test_without_a_compiler_pytorch_serves(tmp_path, monkeypatch, compiler, why):
    monkeypatch.setenv("CXX", compiler)
    said: list[str] = []
    assert kernels.load("auto", folder=tmp_path, notice=said.append).name == "torch"
    assert len(said) in (1, 2) and said[-1].startswith(f"kernels in C++ can't be built: {why}")
    with pytest.raises(kernels.Unavailable, match=re.escape(why)):
        kernels.load("cpp", folder=tmp_path, notice=said.append)
    assert not list(tmp_path.glob("**/*.so"))


def test_no_compiler_at_all(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    said: list[str] = []
    assert kernels.load("auto", folder=tmp_path, notice=said.append).name == "torch"
    assert len(said) == 1 and "no C++ compiler (c++, g++, clang++ or $CXX); PyTorch computes instead" in said[0]


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "kernels").write_text("a file, where a folder should be")
    said: list[str] = []
    assert kernels.load("auto", folder=tmp_path, notice=said.append).name == "torch"
    assert "cannot write to" in said[-1] and "MINIPAGED_CACHE" in said[-1]


def test_a_library_that_is_damaged_is_no_traceback(tmp_path):
    library = tmp_path / "kernels" / cpp_build.build(cache_folder() / "kernels", print).name
    library.parent.mkdir()
    library.write_bytes(b"not a library")
    said: list[str] = []
    assert kernels.load("auto", folder=tmp_path, notice=said.append).name == "torch"
    assert len(said) == 1 and "building" not in said[0]


def test_a_library_that_is_named_needs_no_compiler(tmp_path, monkeypatch):
    library = cpp_build.build(tmp_path / "kernels", print)
    monkeypatch.setenv("MINIPAGED_LIBRARY", str(library))
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert kernels.load("cpp", folder=tmp_path / "empty").name == "cpp"
    assert not (tmp_path / "empty").exists()


def test_all_backends_give_the_same_tokens(folder):
    pytest.importorskip("triton", reason="Triton is not installed")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set")
    answers = {}
    for name in ("torch", "cpp", "triton"):
        llm = LLM(str(folder), device="cpu", kernels=name, block_size=4, num_blocks=12, debug=True, preemption="swap")
        outputs = llm.generate(PROMPTS, [GREEDY] * 4)
        outputs += llm.generate(PROMPTS[2], SamplingParams(n=3, seed=1, max_tokens=4))
        answers[name] = [[one.token_ids for one in output.outputs] for output in outputs]
        usage = llm.stats().memory
        assert llm.executor.runner.backend.name == name and usage.copies > 0 and usage.swapped_in_blocks > 0
    assert answers["torch"] == answers["cpp"] == answers["triton"]


def test_the_command_line_with_triton(folder, no_triton):
    done = generate(folder, "--kernels", "triton", TRITON_INTERPRET=None)
    if not torch.cuda.is_available():
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.strip() == (
            "minipaged.generate: error: kernels in Triton need a GPU, or its interpreter (set TRITON_INTERPRET=1)"
        )
    expected = generate(folder, "--kernels", "torch", PYTHONPATH=no_triton + os.pathsep + os.getcwd())
    assert expected.returncode == 0 and len(expected.stdout) > 4  # without Triton, all else works
    done = generate(folder, "--kernels", "triton", PYTHONPATH=no_triton + os.pathsep + os.getcwd())
    assert done.returncode == 2 and "need the package triton (pip install triton; Linux only)" in done.stderr
    pytest.importorskip("triton", reason="Triton is not installed")
    interpreted = generate(folder, "--kernels", "triton", "--device", "cpu", TRITON_INTERPRET="1")
    assert (interpreted.returncode, interpreted.stdout) == (0, expected.stdout), interpreted.stderr
    done = generate(folder, "--kernels", "triton", "--device", "cpu", "--dtype", "bf16", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "Triton's interpreter computes bf16 wrongly" in done.stderr


def test_the_command_line_says_when_it_builds(folder, tmp_path):
    compiler = tmp_path / "quick-c++"
    compiler.write_text(f'#!/bin/sh\nexec c++ "$@" {" ".join(QUICKLY)}\n')
    compiler.chmod(0o700)
    variables = {"MINIPAGED_CACHE": str(tmp_path), "CXX": str(compiler)}
    done = generate(folder, **variables)
    assert done.returncode == 0 and done.stderr.startswith("minipaged: building the C++ kernels with ")
    again = generate(folder, **variables)
    assert (again.returncode, again.stderr, again.stdout) == (0, "", done.stdout)
    [library] = (tmp_path / "kernels").iterdir()
    assert stat.S_ISREG(library.stat().st_mode)
    assert generate(folder, CXX="/nowhere/c++", MINIPAGED_CACHE=str(tmp_path)).stdout == done.stdout
