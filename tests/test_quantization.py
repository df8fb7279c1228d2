"""Quantizing: each method against its definition, the files against the format's, and what is refused."""

import doctest
import itertools
import json

import pytest
import torch
import transformers
from quantized_model import TEXT, make_outliers, read_back
from safetensors.torch import load_file
from tiny_model import make_folder

from minipaged.models import open_checkpoint
from minipaged.models.rope import Rope
from minipaged.quantization import gptq as gptq_module
from minipaged.quantization import methods, perplexity, writing
from minipaged.quantization import texts as texts_module
from minipaged.quantization.awq import awq_layer, best_scales, fold
from minipaged.quantization.gptq import gptq, gptq_layer, loss
from minipaged.quantization.layers import MATRICES, READERS, Recorder, Seen, run_layer
from minipaged.quantization.methods import grid_for
from minipaged.quantization.rtn import Grid, rtn, rtn_layer
from minipaged.quantization.whole import METHODS, Source, quantize
from minipaged.quantization.writing import _config, _write_tokenizer
from minipaged.quantize import main
from minipaged.text.tokenizer import Tokenizer

GRIDS = [Grid(bits, size, symmetric) for bits in (3, 4, 8) for size in (16, -1) for symmetric in (True, False)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_outliers(tmp_path_factory.mktemp("outliers"))


@pytest.fixture(scope="module")
def source(folder):
    return Source(open_checkpoint(folder), Grid(group_size=32))


@pytest.fixture(scope="module")
def texts(source):
    ids = source.checkpoint.tokenizer().encode(TEXT * 12)
    return [ids[begin : begin + 128] for begin in range(0, 1024, 128)]


@pytest.fixture(scope="module")
def seen(source, texts):
    """What the first layer reads."""
    embedding, recorder = source.others()["model.embed_tokens.weight"], Recorder()
    rope = Rope(source.config.rope, source.config.head_size, torch.device("cpu"))
    for ids in texts:
        run_layer(embedding[ids], source.layer(0), source.config, *rope(torch.arange(len(ids))), recorder)
    return recorder.seen()


def inputs(tokens=400, width=64, seed=0):
    """Inputs that go together, a few of them large: [tokens, width]."""
    torch.manual_seed(seed)
    x = torch.randn(tokens, 12) @ torch.randn(12, width) + 0.3 * torch.randn(tokens, width)
    x[:, ::13] *= 8
    return x


# --- the methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_is_the_formula_and_wrong_by_half_a_step_at_most(grid):
    torch.manual_seed(0)
    weight = torch.randn(5, 48) * torch.logspace(-3, 1, 5)[:, None]
    weight[3, 16:32] = weight[3, 16:32].abs()  # a group that zero is not inside of
    weight[4, :16] = 0
    packed = rtn(weight, grid)
    got, size = packed.dequantize(), packed.group_size
    assert size == (48 if grid.group_size == -1 else 16) and packed.codes.max() <= 2**grid.bits - 1
    for o, g in itertools.product(range(5), range(48 // size)):
        group = weight[o, g * size : (g + 1) * size].double()
        if grid.symmetric:
            scale, zero = group.abs().max() * 2 / (2**grid.bits - 1), 2 ** (grid.bits - 1)
        else:
            scale = (group.max().clamp(min=0) - group.min().clamp(max=0)) / (2**grid.bits - 1)
            zero = int(packed.zero[o, g])
        assert float(packed.scale[o, g]) == pytest.approx(float(scale), rel=1e-3, abs=1e-7)
        step = packed.scale[o, g].double()
        codes = packed.codes[o, g * size : (g + 1) * size].double()
        assert torch.equal(((codes - zero) * step).float(), got[o, g * size : (g + 1) * size])
        wrong, inside = (group - (codes - zero) * step).abs(), (codes > 0) & (codes < 2**grid.bits - 1)
        assert not inside.any() or wrong[inside].max() <= 0.501 * step
        # At the ends there is what rounding the scale and the zero point moved them by, besides.
        assert wrong.max() <= step * (0.6 if grid.symmetric else 1.1) + 1e-7


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gptq_of_inputs_that_do_not_go_together_is_rounding(grid):
    torch.manual_seed(0)
    weight = torch.randn(5, 48)
    found = gptq(weight, torch.diag(torch.rand(48) + 0.1), grid)
    assert torch.equal(found.dequantize(), rtn(weight, grid).dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_is_its_definition(monkeypatch, symmetric):
    """Round a column, then move the others to where the loss is least: solved anew each time, in fp64."""
    monkeypatch.setattr(gptq_module, "BLOCK", 10)
    grid = Grid(4, 16, symmetric, torch.float32)
    x = inputs(width=48).double()
    torch.manual_seed(2)
    weight = torch.randn(6, 48)
    damped = x.T @ x / len(x)
    found = gptq(weight, damped.float(), grid)
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    order = (x.T @ x).diagonal().argsort(descending=True).tolist()
    left, zero = weight.double(), found.zeros() if not symmetric else torch.full((6, 3), 8)
    for place, j in enumerate(order):
        scale, z = found.scale[:, j // 16].double(), zero[:, j // 16].double()
        code = ((left[:, j] / scale).round() + z).clamp(0, 15)
        assert torch.equal(code.to(torch.uint8), found.codes[:, j]), f"column {j}"
        error, rest = left[:, j] - (code - z) * scale, order[place + 1 :]
        if rest:  # d/dw of the loss is 0: H_rr (move) = -error H_rj
            inner = damped[rest][:, rest]
            left[:, rest] += torch.linalg.solve(inner, damped[rest][:, [j]] @ error[None]).T


@pytest.mark.parametrize(("bits", "symmetric"), [(3, True), (3, False), (4, True), (4, False)])
def test_gptq_and_awq_lose_less_than_rounding_also_on_inputs_not_seen(bits, symmetric):
    grid = Grid(bits, 32, symmetric)
    seen, other = inputs(seed=0)[:300], inputs(seed=0)[300:]
    moment = seen.T @ seen / len(seen)
    weight = torch.randn(40, 64)
    scales = best_scales(weight, Seen(moment, seen.abs().mean(0)), grid)
    rounded = {
        "rtn": rtn(weight, grid).dequantize(),
        "gptq": gptq(weight, moment, grid).dequantize(),
        "awq": rtn(weight * scales, grid).dequantize() / scales,
    }
    lost = {name: float(((weight - w) @ other.T).pow(2).sum()) for name, w in rounded.items()}
    assert lost["gptq"] < 0.5 * lost["rtn"] and lost["awq"] < 0.8 * lost["rtn"]
    mean = float(((weight - rounded["rtn"]) @ seen.T).pow(2).mean(1).sum())
    assert float(loss(weight, rounded["rtn"], moment).sum()) == pytest.approx(mean, rel=1e-4)


def test_what_is_read_is_summed_up_over_all_that_is_shown():
    x, recorder = inputs(), Recorder()
    for piece in x.split([100, 299, 1]):
        recorder("out", piece)
    seen = recorder.seen()["out"]
    assert torch.allclose(seen.moment.double(), x.T.double() @ x.double() / 400, rtol=1e-4, atol=1e-3)
    assert torch.allclose(seen.magnitude, x.abs().mean(0), rtol=1e-5)
    halved, scales = seen.divided(torch.full((64,), 2.0)), torch.rand(64) + 0.5
    assert torch.equal(halved.moment, seen.moment / 4) and torch.equal(halved.magnitude, seen.magnitude / 2)
    y = x / scales
    assert torch.allclose(seen.divided(scales).moment, y.T @ y / 400, rtol=1e-3, atol=1e-2)


def test_inputs_that_are_dead_or_few_are_no_trouble():
    weight, x = torch.randn(8, 32), torch.randn(3, 32)
    x[:, 5] = 0
    for moment in (x.T @ x / 3, torch.zeros(32, 32)):
        assert gptq(weight, moment, Grid(4, 16)).dequantize().isfinite().all()
    with pytest.raises(ValueError, match="overflows on the calibration text"):
        gptq(weight, torch.full((32, 32), float("nan")), Grid(4, 16))


def test_a_layer_is_the_models_layer(folder, source, texts):
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(texts[:1]), output_hidden_states=True).hidden_states
    x = source.others()["model.embed_tokens.weight"][texts[0]]
    turn = Rope(source.config.rope, source.config.head_size, torch.device("cpu"))(torch.arange(len(x)))
    assert (run_layer(x, source.layer(0), source.config, *turn) - expected[1][0]).abs().max() < 1e-4


@pytest.mark.parametrize("name", READERS)
def test_folding_scales_changes_nothing_in_floats(source, texts, name):
    config = source.config
    x = source.others()["model.embed_tokens.weight"][texts[0]]
    turn = Rope(config.rope, config.head_size, torch.device("cpu"))(torch.arange(len(x)))
    weights = source.layer(1)
    expected, before = run_layer(x, weights, config, *turn), {n: t.clone() for n, t in weights.items()}
    scales = torch.rand(weights[READERS[name][0]].shape[1]) + 0.5
    if name == "out":  # query heads that share a head of v share its scales
        scales = scales.view(config.num_kv_heads, -1, config.head_size)[:, :1].expand(-1, 3, -1).flatten()
    fold(name, scales, weights, config)
    assert not torch.equal(weights[READERS[name][0]], before[READERS[name][0]])
    assert (run_layer(x, weights, config, *turn) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_layer_loses_less_by_gptq_and_awq(source, texts, seen):
    grid = Grid(4, 32)
    weights, config = source.layer(0), source.config
    x = source.others()["model.embed_tokens.weight"][texts[0]]
    turn = Rope(config.rope, config.head_size, torch.device("cpu"))(torch.arange(len(x)))
    exact, lost = run_layer(x, weights, config, *turn), {}
    for method in (rtn_layer, gptq_layer, awq_layer):
        mine = dict(weights)
        packs = method(mine, dict(seen), config, grid)
        assert [*packs] == MATRICES or {*packs} == {*MATRICES}
        rounded = mine | {name: packed.dequantize() for name, packed in packs.items()}
        lost[method] = float((run_layer(x, rounded, config, *turn) - exact).pow(2).mean())
    assert lost[gptq_layer] < 0.8 * lost[rtn_layer] and lost[awq_layer] < 0.9 * lost[rtn_layer]


# --- the files --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 6)
    return file


def run(folder, out, text_file, *flags):
    return main([str(folder), str(out), "--calibration", str(text_file), "--calibration-tokens", "300", *flags])


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("rtn", ["--group-size", "32"]),
        ("rtn", ["--group-size", "-1", "--asymmetric", "--bits", "8"]),
        ("gptq", ["--group-size", "32", "--asymmetric"]),
        ("awq", ["--group-size", "32", "--asymmetric"]),
        ("awq", ["--group-size", "-1", "--bits", "8"]),
    ],
)
def test_files_hold_what_was_computed_to_the_bit(folder, tmp_path, text_file, method, flags):
    assert run(folder, tmp_path / "out", text_file, "--method", method, *flags) == 0
    bits, size = (8 if "8" in flags else 4), int(flags[1])
    grid = grid_for(open_checkpoint(folder), bits, size, "--asymmetric" not in flags)
    ids = open_checkpoint(folder).tokenizer().encode(TEXT * 6)[:300]
    computed = quantize(Source(open_checkpoint(folder), grid), method, grid, [ids])
    found = read_back(tmp_path / "out")
    assert found.keys() == computed.keys()
    for name, tensor in computed.items():
        expected = tensor.to(torch.float16).float() if isinstance(tensor, torch.Tensor) else tensor.dequantize()
        assert torch.equal(found[name], expected), name
    original, far = load_file(folder / "model.safetensors"), 0.03 if bits == 8 else 0.25
    if method != "awq":
        for name, tensor in found.items():
            assert (tensor - original[name]).norm() < far * original[name].norm(), name
    assert {f.name for f in (tmp_path / "out").iterdir()} >= {"tokenizer.json", "chat_template.jinja"}
    assert all(f.stat().st_mode & 0o044 == 0o044 for f in (tmp_path / "out").iterdir())


def logits_of(folder, weights, ids):
    """transformers on these weights."""
    config = transformers.LlamaConfig.from_pretrained(folder)
    config.quantization_config = None
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("flags", [["--method", "gptq"], ["--method", "awq", "--asymmetric"]])
def test_transformers_reads_them(folder, tmp_path, text_file, flags):
    pytest.importorskip("compressed_tensors")
    assert run(folder, tmp_path / "out", text_file, "--group-size", "32", *flags) == 0
    how = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, quantization_config=how
    )
    found, expected = model.state_dict(), read_back(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():  # it multiplies in the scale's own sixteen bits
        assert torch.equal(found[name], tensor.to(torch.float16).float()), name


@pytest.mark.parametrize("flags", [["--method", "gptq"], ["--method", "awq", "--asymmetric"], ["--bits", "8"]])
def test_the_engine_reads_them(folder, tmp_path, text_file, flags):
    from minipaged import LLM, SamplingParams

    assert run(folder, tmp_path / "out", text_file, "--group-size", "32", *flags) == 0
    ids = [1, 2, 3, 4]
    rows = logits_of(tmp_path / "out", read_back(tmp_path / "out"), ids).log_softmax(-1)
    with LLM(str(tmp_path / "out"), num_blocks=20) as llm:
        [output] = llm.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=0))
    for row, token, told in zip(rows, ids[1:], output.prompt_logprobs[1:], strict=False):
        assert told[token].logprob == pytest.approx(float(row[token]), abs=1e-3)


def test_a_gguf_files_config_and_tokenizer_become_those_of_a_folder(tmp_path):
    checkpoint, grid = open_checkpoint("smollm2"), Grid()
    config = _config(checkpoint, grid)
    assert config["architectures"] == ["LlamaForCausalLM"] and config["num_hidden_layers"] == 30
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    assert transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 100000
    _write_tokenizer(tmp_path, checkpoint)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), checkpoint.tokenizer()
    text = "What costs $3.50 in Nantucket?\n\n  It\u2019s 1,234 whales."
    messages = [{"role": "user", "content": text}]
    assert theirs(text).input_ids == ours.encode(text)
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == ours.apply_chat_template(messages)
    assert isinstance(ours, Tokenizer) and theirs.eos_token_id in open_checkpoint("smollm2").config["eos_token_id"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["{model}"], "OUT"),
        (["{model}", "{model}"], "exists already: nothing is overwritten"),
        (["{model}", "{new}/below"], "no folder"),
        (["{model}", "{new}", "--bits", "3"], "--bits"),
        (["{model}", "{new}", "--group-size", "48"], "--group-size"),
        (["{model}", "{new}", "--group-size", "64"], "96 columns, which can't be divided so; 32, -1 (a whole row)"),
        (["{model}", "{new}", "--method", "best"], "--method"),
        (["{model}", "{new}", "--group-size", "32", "--calibration", "{new}"], "No such file"),
        (["{model}", "{new}", "--calibration-tokens", "0"], "--calibration-tokens"),
        (["{new}.gguf", "{new}"], "does not exist"),
    ],
)
def test_bad_input_takes_one_line_and_changes_nothing(folder, tmp_path, capsys, flags, said):
    before = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
    assert main([flag.format(model=folder, new=tmp_path / "new") for flag in flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0] and lines[0].startswith("minipaged.quantize: error: ")
    assert not list(tmp_path.iterdir()) and before == {f: f.stat().st_mtime_ns for f in folder.iterdir()}


def test_other_architectures_and_quantized_models_are_refused(folder, tmp_path, text_file, capsys):
    assert run(folder, tmp_path / "out", text_file, "--group-size", "32", "--method", "rtn") == 0
    assert run(tmp_path / "out", tmp_path / "again", text_file, "--group-size", "32") == 2
    assert "quantized already (compressed-tensors)" in capsys.readouterr().err
    make_folder(tmp_path / "gpt2")
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    assert run(tmp_path / "gpt2", tmp_path / "again", text_file, "--group-size", "32") == 2
    assert "only models of Llama's kind" in capsys.readouterr().err


@pytest.mark.parametrize("breaks", [KeyboardInterrupt, OSError("disk full")])
@pytest.mark.parametrize("where", ["methods.quantize_model", "writing._write_tokenizer"])
def test_broken_off_it_leaves_nothing(folder, tmp_path, text_file, capsys, monkeypatch, breaks, where):
    def stop(*_):
        raise breaks

    monkeypatch.setattr(f"minipaged.quantization.{where}", stop)
    status = run(folder, tmp_path / "out", text_file, "--group-size", "32", "--method", "rtn")
    assert status == (130 if breaks is KeyboardInterrupt else 1)
    assert "Traceback" not in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_all_methods_are_offered():
    from minipaged import quantize as door
    from minipaged.quantization import rtn as grid

    assert [*door.METHODS] == [*METHODS]
    assert door.WIDTHS == grid.WIDTHS and door.GROUP_SIZES == grid.GROUP_SIZES
    assert door.CALIBRATION_TOKENS == methods.CALIBRATION_TOKENS


@pytest.mark.parametrize("module", [perplexity, texts_module, writing])
def test_the_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed
