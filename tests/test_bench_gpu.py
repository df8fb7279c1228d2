"""The GPU run on a machine without one: every part in small, and what becomes of parts that break or hang."""

import doctest
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from kernels.bench.cells import POINTS, SHAPES
from minipaged import LLM, SamplingParams
from minipaged.bench import decode_profile, gpu, gpu_parts
from minipaged.bench.gpu_parts import Part, read_tests
from minipaged.bench.weights import write_random

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("random") / "tiny"
    write_random("tiny", folder, "fp32")
    return str(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: make gpu")
def test_every_part_in_small(tmp_path, capsys):
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "results")]) == 0
    report = json.loads((tmp_path / "results" / "gpu.json").read_text())
    rows = report["parts"]
    assert list(rows) == ["tests", "kernels", "weights tiny", "engine tiny", "profile"]
    assert {row["outcome"] for row in rows.values()} == {"ok"} and all(row["seconds"] > 0 for row in rows.values())
    tests = rows["tests"]["figures"]
    assert (tests["passed"], tests["failed"], tests["failures"]) == (0, 0, []) and tests["skipped"] > 50
    cells = rows["kernels"]["figures"]["results"]
    assert {row["what"] for row in cells} == {"contiguous", "prefill"}
    assert all(row["seconds"]["ours"] > 0 and row["of_peer"] > 0 for row in cells)
    assert [row["contender"] for row in rows["engine tiny"]["figures"]["results"]] == ["minipaged", "no-graphs"]
    (step,) = rows["profile"]["figures"]["results"]
    assert step["kernels"] > 0 and len(step["top"]) == decode_profile.TOP and not step["graphs"]
    assert report["machine"]["packages"]["torch"] == torch.__version__
    text = (tmp_path / "results" / "gpu.txt").read_text()
    assert capsys.readouterr().out == text and "(no table" not in text
    for words in ("of product", "no CUDA graphs", "longest gap us", "0 passed, 0 failed", "no GPU; "):
        assert words in text
    assert "rootdir" in (tmp_path / "results" / "gpu.log").read_text()


# --- parts that break -----------------------------------------------------------------------------------------------

PARTS = {
    "hangs": "import time, subprocess\nprint(subprocess.Popen(['sleep', '1000']).pid, flush=True)\ntime.sleep(1000)",
    "won't end": "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(1000)",
    "breaks": "import sys\nprint('{\"n\": 1}')\nsys.exit('out of memory')",
    "misses a package": "import no_such_package",
    "says nothing": "",
    "dies": "import os\nprint('{\"n\": 1}')\nos.kill(os.getpid(), 9)",
    "fine": "print('noise')\nprint('{\"n\": 1}')",
}


@pytest.fixture
def chosen(tmp_path, monkeypatch) -> dict[str, Part]:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    found = {}
    for name, source in PARTS.items():
        module = "part_" + "".join(filter(str.isalpha, name))
        (tmp_path / f"{module}.py").write_text(source)
        found[name] = Part([module], 2.0 if name in ("hangs", "won't end") else 60.0, gpu_parts.read_json,
                           lambda figures: [f"n is {figures['n']}"])  # fmt: skip
    return found


def test_what_breaks_costs_nobody_else(tmp_path, chosen):
    began = time.monotonic()
    report = gpu.run(tmp_path / "out", dry=True, chosen=chosen)
    assert time.monotonic() - began < 30
    outcomes = {name: row["outcome"] for name, row in report["parts"].items()}
    assert outcomes == {
        "hangs": "stopped after 2 s", "won't end": "stopped after 2 s", "breaks": "exit status 1",
        "misses a package": "exit status 1", "says nothing": "gave no figures", "dies": "exit status -9", "fine": "ok",
    }  # fmt: skip
    assert {name for name, row in report["parts"].items() if "figures" in row} == {"breaks", "dies", "fine"}
    said = report["parts"]["misses a package"]["said"]
    assert said[-1] == "ModuleNotFoundError: No module named 'no_such_package'"
    assert "said" not in report["parts"]["fine"]
    assert json.loads((tmp_path / "out" / "gpu.json").read_text()) == report
    text = (tmp_path / "out" / "gpu.txt").read_text()
    assert "| ModuleNotFoundError: No module named 'no_such_package'" in text and text.count("n is 1") == 3
    log = (tmp_path / "out" / "gpu.log").read_text()
    child = next(line for line in log.splitlines() if line.isdigit())  # what the first one started
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"  # gone, or nobody has buried it yet


def test_the_total_is_kept(tmp_path, chosen, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", 0.5)
    began = time.monotonic()
    report = gpu.run(tmp_path, dry=True, total=2.0, chosen=dict.fromkeys("abc", chosen["won't end"]))
    assert time.monotonic() - began < 6
    outcomes = [row["outcome"] for row in report["parts"].values()]
    assert outcomes[0] == "stopped after 2 s" and outcomes[1:] == ["no time was left"] * 2


def test_what_is_known_is_written_after_each_part(tmp_path, chosen, monkeypatch):
    real, seen = gpu.run_part, []

    def look(*args):
        seen.append(json.loads((tmp_path / "gpu.json").read_text()) if seen else {})
        return real(*args)

    monkeypatch.setattr(gpu, "run_part", look)
    gpu.run(tmp_path, dry=True, chosen={"a": chosen["fine"], "b": chosen["breaks"], "c": chosen["fine"]})
    assert [list(report.get("parts", {})) for report in seen] == [[], ["a"], ["a", "b"]]


def test_counts_of_tests_that_were_stopped():
    text = "tests/a.py::one[a b] PASSED   [ 10%]\ntests/a.py::two SKIPPED (no GPU)  [ 20%]\ntests/a.py::three \n"
    found = read_tests(text + "tests/a.py::four FAILED [ 30%]\n\nFAILED tests/a.py::four - RuntimeError: CUDA\n")
    assert found == {"passed": 1, "failed": 1, "skipped": 1, "failures": ["tests/a.py::four - RuntimeError: CUDA"]}
    found = read_tests("ERROR tests/test_gpu.py - ModuleNotFoundError: No module named 'hypothesis'\n")
    assert (found["failed"], found["passed"]) == (1, 0) and "hypothesis" in found["failures"][0]
    with pytest.raises(ValueError):
        read_tests("No module named pytest")


def test_the_parts_of_a_real_run(tmp_path):
    """They can't run here, but all together must be made for less than 8 minutes, and none may need the network."""
    found = gpu_parts.parts(tmp_path, dry=False)
    assert gpu.TOTAL + gpu.GRACE < 480
    assert (
        sum(found[name].seconds for name in ("tests", "kernels", "weights llama3-1b", "engine llama3-1b", "profile"))
        < 450
    )
    assert all("smollm2" not in part.command for name, part in found.items() if name != "smollm2")
    assert (POINTS.few_batches, POINTS.few_contexts, POINTS.lengths) == (
        (1, 8, 64),
        (1024, 8192, 32768),
        (512, 2048, 8192),
    )
    assert [len(list(POINTS.cells(what, SHAPES["llama3-8b"]))) for what in ("contiguous", "prefill")] == [9, 3]


# --- what it needs --------------------------------------------------------------------------------------------------


def test_random_weights_are_a_checkpoint_like_any_other(random_folder):
    llm = LLM(random_folder, dtype="fp32", num_blocks=20)
    prompt = [3, 1, 4, 1, 5]
    tokens = (
        llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0].outputs[0].token_ids
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(random_folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, 5:].tolist()
    assert list(tokens) == expected


def test_without_gguf_all_but_its_files_can_be_loaded(random_folder, tmp_path):
    """It is one package that a machine with a GPU may lack."""
    (tmp_path / "gguf.py").write_text("raise ModuleNotFoundError('hidden', name='gguf')")
    (tmp_path / "some.gguf").touch()
    source = (
        "import sys\nfrom minipaged import LLM, SamplingParams\nfrom minipaged.bench import __main__\n"
        "print(len(LLM(sys.argv[1], num_blocks=9).generate([[1]], SamplingParams(max_tokens=3))))\n"
        "try: LLM(sys.argv[2])\nexcept ValueError as error: print(error)\n"
    )
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", source, random_folder, str(tmp_path / "some.gguf")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    want = f"1\n{tmp_path / 'some.gguf'}: .gguf files need the package gguf (pip install gguf)\n"
    assert done.stdout == want, done.stderr


def test_a_profile_with_graphs_and_without(random_folder, monkeypatch):
    class Engine(LLM):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.runner.graphs = Stands()

    class Stands:
        def fits(self, batch):
            return False

    monkeypatch.setattr(decode_profile, "LLM", Engine)
    monkeypatch.setattr(decode_profile, "CONTEXT", 16)
    rows = decode_profile.profile_decode(random_folder, [1, 2], 2, "cpu", dtype="fp32")
    assert [(row["batch"], row["graphs"]) for row in rows] == [(1, True), (1, False), (2, True), (2, False)]
    assert all(row["step_ms"] > 0 < row["busy_ms"] for row in rows)
    text = decode_profile.lines(rows)
    assert text[0].split()[:2] == ["graphs", "batch"] and [line.split()[0] for line in text[1:3]] == ["yes", "no"]


def test_docstrings():
    for module in (gpu_parts, decode_profile):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed
