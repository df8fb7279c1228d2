"""The benchmark: its loads, its arithmetic, and a whole run on a tiny model through the real entry point."""

import doctest
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minipaged.bench import __main__ as bench
from minipaged.bench import loads, report, worker
from minipaged.bench.contenders import Options
from minipaged.bench.loads import Load, Run, make_load
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
    assert [("tok/s in" in line) for line in lines[1:]] == [True] * (2 * 2 * 3)  # loads, rounds, contenders
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
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGINT)  # a terminal sends it to all processes: the contenders leave it alone
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


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


def test_a_contender_that_dies_is_told_from_one_that_is_slow(tiny):
    contender = worker.Worker("minipaged", Options(str(tiny), "fp32", 1, 100, 256))
    contender.wait()
    os.kill(contender._process.pid, signal.SIGKILL)  # as the kernel does when memory runs out
    with pytest.raises(worker.ContenderFailed, match=r"minipaged: its process died \(exit code -9\)"):
        contender.run(make_load("batch8", 256, quick=True))
    contender.close()


def test_peak_memory_is_forgotten():
    torch.ones(50_000_000, dtype=torch.uint8)
    high = worker.peak_memory()
    worker.reset_peak_memory()
    assert worker.peak_memory() < high - 20_000_000 or sys.platform != "linux"


def test_docstrings():
    for module in (loads, report):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed
