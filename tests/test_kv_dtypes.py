"""Keys and values in eight bits, in the whole engine: how near they are, what they take, and who says what.

That nothing else changes the answers within one of them, test_same_bits.py shows, and the kernels' tests the rest.
"""

import pytest
import torch
from test_same_bits import alone, backend_for, make_model
from tiny_model import make_folder

import kernels
from kernels.cache import scales
from minipaged import LLM, BeamSearchParams, SamplingParams
from minipaged.execution import loading
from minipaged.generate import main
from minipaged.models import ModelError, load_model, open_checkpoint
from minipaged.models.llama import Llama

KINDS = ["int8", "fp8"]
PROMPTS = [[(7 * i + 3 * k * k) % 95 for k in range(n)] for i, n in enumerate((1, 9, 30, 40))]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def make(folder):
    return lambda kv="auto", **settings: LLM(
        folder, kv_cache_dtype=kv, **{"block_size": 4, "num_blocks": 200, "debug": True, **settings}
    )


def tokens(outputs):
    return [[one.token_ids for one in output.outputs] for output in outputs]


@pytest.mark.parametrize("kv", KINDS)
def test_every_byte_is_counted(make, kv):
    """Of each token 2 layers, keys and values, 2 heads: 8 codes and a scale, where fp32 has 8 numbers."""
    token = 2 * 2 * 2 * (8 + 4)
    llm = make(kv, num_blocks=None, kv_cache_memory=50 * 4 * token + 3)
    runner = llm.executor.runner
    assert llm.stats().block_bytes == 4 * token and llm.memory.num_blocks == 50
    assert runner.cache.nbytes == 50 * 4 * token == runner.cpu_cache.nbytes
    assert scales(runner.cache).isnan().all()  # new memory is poison
    assert make().stats().block_bytes == 4 * 2 * 2 * 2 * 8 * 4


@pytest.mark.parametrize("kv", KINDS)
def test_poison_shows_blocks_that_were_not_moved(make, monkeypatch, kv):
    llm = make(kv, num_blocks=20, preemption="swap", watermark=0)
    params = SamplingParams(n=2, seed=1, max_tokens=20)
    assert not any(output.error for output in llm.generate(PROMPTS, params))
    usage = llm.stats().memory
    assert usage.copies > 0 and usage.swapped_in_blocks > 0
    monkeypatch.setattr(llm.executor.runner.backend, "move_blocks", lambda *args: None)
    assert any("NaN" in (output.error or "") for output in llm.generate(PROMPTS, params))


@pytest.mark.parametrize("name", ["cpp", "torch"])
@pytest.mark.parametrize("kv", KINDS)
def test_answers_are_near_those_of_whole_numbers(make, kv, name):
    """What the prompts' own tokens get, on either backend: a model of random weights is a hard case."""
    backend_for(torch.float32)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)

    def logprobs(kind):
        rows = [row for output in make(kind, kernels=name).generate(PROMPTS, params) for row in output.prompt_logprobs]
        return torch.tensor([next(iter(row.values())).logprob for row in rows if row])

    lost = (logprobs(kv) - logprobs("auto")).abs()
    assert 0 < lost.mean() < {"int8": 0.02, "fp8": 0.15}[kv]


@pytest.mark.parametrize("kv", KINDS)
def test_speculation_and_beams_go_on_as_before(make, kv):
    """Guesses change nothing, and beams fork blocks of either size to the same end."""
    backend_for(torch.float32)
    roomy = make(kv)
    guessing = make(kv, speculative_config={"method": "ngram", "num_speculative_tokens": 4})
    repeated = [prompt * 2 for prompt in PROMPTS]
    assert tokens(guessing.generate(repeated, GREEDY)) == tokens(roomy.generate(repeated, GREEDY))
    assert guessing.stats().speculation.num_accepted_tokens > 0
    params = BeamSearchParams(beam_width=3, max_tokens=12, ignore_eos=True)
    expected = tokens(roomy.generate(PROMPTS, params))
    for settings in ({"block_size": 1}, {"num_blocks": 45, "watermark": 0.0, "preemption": "recompute"}):
        assert tokens(make(kv, **settings).generate(PROMPTS, params)) == expected


def test_vllms_names_are_understood(make):
    for name, ours in {"fp8_e4m3": "fp8", "fp8_per_token_head": "fp8", "int8_per_token_head": "int8"}.items():
        assert make(name).executor._args.kv_cache_dtype == ours


@pytest.mark.parametrize(
    "name, message",
    [
        ("fp8_e5m2", "kv_cache_dtype='fp8_e5m2': two bits of mantissa are too few; take fp8"),
        ("bfloat16", "kv_cache_dtype='bfloat16': keys and values have the model's dtype"),
        ("nvfp4", "kv_cache_dtype='nvfp4': must be one of auto, int8, fp8"),
    ],
)
def test_others_are_refused_by_name(make, name, message):
    with pytest.raises(ValueError, match=message):
        make(name)


def test_a_backend_may_refuse(make, monkeypatch):
    monkeypatch.setattr(kernels.Backend, "why_no_cache", lambda self, dtype: "not on this machine")
    with pytest.raises(ValueError, match="kv_cache_dtype='fp8': not on this machine"):
        make("fp8")
    assert set(loading.KV_DTYPES) == set(KINDS)


def test_the_command_line(folder, capsys):
    arguments = ["--model", folder, "--raw", "ab", "--max-tokens", "3", "--kv-cache-dtype"]
    assert main([*arguments, "int8"]) == 0
    assert main([*arguments, "fp4"]) == 2
    assert "invalid choice: 'fp4'" in capsys.readouterr().err


# ---- scales of a checkpoint --------------------------------------------------------------------------------------


def scaled(values):
    """The small model with a scale of its own for keys and for values of layer 1, as far as they are given."""
    model = make_model("wide llama", torch.float32)
    weights = {name: torch.ones(shape) for name, shape in Llama.tensor_shapes(model.config).items()}
    weights |= {f"model.layers.1.self_attn.{kind}": value for kind, value in values.items()}
    return Llama(model.config, weights, model.backend), weights


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_a_checkpoints_scales_are_taken_in_fp8(kind):
    model, left = scaled({"k_scale": torch.tensor([0.25]), "v_scale": torch.tensor(0.5)})
    assert not left and [layer.kv_scales for layer in model.layers] == [None, (0.25, 0.5)]
    cache = kernels.new_cache(2, 2, 4, 3, 64, kind)
    batch = kernels.Batch(*map(torch.tensor, ([0, 1, 2], [0, 3], [3], [[0, 1]])))
    model(torch.tensor([5, 6, 7]), torch.arange(3), cache, batch)
    found = scales(cache)[1, :, :, 0, :3]
    assert (found[0] == 0.25).all() == (found[1] == 0.5).all() == (kind != torch.int8)


@pytest.mark.parametrize("wrong", [torch.tensor([0.0]), torch.tensor([torch.nan]), torch.tensor([1.0, 2.0]), None])
def test_a_wrong_scale_is_refused_by_name(wrong):
    values = {"k_scale": torch.tensor([0.25]), "v_scale": wrong}
    with pytest.raises(ModelError, match=r"model\.layers\.1\.self_attn\.v_scale"):
        scaled({kind: value for kind, value in values.items() if value is not None})


def test_a_real_model_hardly_notices():
    """Kullback-Leibler divergence of its next tokens from those with keys and values in fp32."""
    try:
        checkpoint = open_checkpoint("smollm2")
    except (ValueError, OSError) as error:
        pytest.skip(str(error))
    _, model = load_model(checkpoint, backend=backend_for(torch.float32))
    text = checkpoint.tokenizer().encode("Paging came from the Atlas computer, built in Manchester around 1960. " * 3)
    exact = alone(model, torch.float32, text).log_softmax(-1)
    for kind, most in ((torch.int8, 0.002), (torch.float8_e4m3fn, 0.01)):
        found = alone(model, kind, text).log_softmax(-1)
        assert 0 < (exact.exp() * (exact - found)).sum(-1).mean() < most
