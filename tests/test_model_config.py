"""Configs: those of real checkpoints are read right, and what we can't compute is refused by name."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minipaged.models.config import ModelConfig, ModelError
from minipaged.models.gpt2 import GPT2
from minipaged.models.llama import Llama
from minipaged.models.rope import Rope, inverse_frequencies

# config.json as the hub has it, and the number of parameters that the model is known to have
REAL = json.loads((Path(__file__).parent / "data" / "model_configs.json").read_text())
GPT, LLAMA, LLAMA32 = (
    REAL[name]["config"] for name in ("gpt2", "SmolLM2-135M-Instruct", "Llama-3.2-1B-Instruct")
)
MISTRAL, QWEN = (REAL[name]["config"] for name in ("Mistral-7B-v0.3", "Qwen2.5-0.5B"))
LLAMA3 = LLAMA32["rope_scaling"]


@pytest.mark.parametrize("name", REAL)
def test_real_configs_are_accepted(name):
    hub = REAL[name]["config"]
    config = ModelConfig.from_hf(hub)
    architecture = {"llama": Llama, "gpt2": GPT2}[config.architecture]
    assert sum(map(math.prod, architecture.tensor_shapes(config).values())) == REAL[name]["parameters"]
    eos = hub["eos_token_id"]
    assert config.eos_token_ids == (tuple(eos) if isinstance(eos, list) else (eos,))
    assert config.bos_token_id == hub["bos_token_id"]
    # transformers 5 writes the same config in another style
    rewritten = transformers.AutoConfig.for_model(**json.loads(json.dumps(hub)))
    assert ModelConfig.from_hf(json.loads(rewritten.to_json_string())) == config


ROPES = {
    "no scaling": {"rope_theta": 1e6, "rope_scaling": None},
    "llama3": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "linear, older still": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "qwen's yarn": {
        "rope_theta": 1e6,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "yarn, nothing else said": {"rope_scaling": {"rope_type": "yarn", "factor": 16.0}},
    "yarn, original length outside": {
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192},
    },
    "yarn, a factor below 1": {"rope_scaling": {"type": "yarn", "factor": 0.5}},
    "yarn, all pairs stretched": {
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6},
    },
    "yarn, narrow": {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 1}},
}


@pytest.mark.parametrize("change", ROPES.values(), ids=ROPES.keys())
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rope_equals_transformers(change, head_dim):
    config = LLAMA | change | {"head_dim": head_dim, "max_position_embeddings": 32768}
    rope = ModelConfig.from_hf(json.loads(json.dumps(config))).rope
    reference = LlamaRotaryEmbedding(transformers.LlamaConfig(**json.loads(json.dumps(config))))
    torch.testing.assert_close(inverse_frequencies(rope, head_dim), reference.inv_freq, atol=0, rtol=1e-6)
    positions = torch.tensor([0, 1, 7, 1000, 32767])
    cos, sin = reference(torch.zeros(1), positions[None])
    got_cos, got_sin = Rope(rope, head_dim, torch.device("cpu"))(positions)
    half = head_dim // 2  # transformers repeats it
    torch.testing.assert_close(got_cos, cos[0, :, :half], atol=5e-3, rtol=0)  # large angles: fp32 is coarse
    torch.testing.assert_close(got_sin[:3], sin[0, :3, :half], atol=1e-6, rtol=0)


def test_yarn_extends_the_context_and_the_others_do_not():
    def max_model_len(**rope_scaling):
        return ModelConfig.from_hf(LLAMA | {"rope_scaling": rope_scaling}).max_model_len

    assert max_model_len(type="yarn", factor=4.0, original_max_position_embeddings=8192) == 32768
    assert max_model_len(type="yarn", factor=4.0, original_max_position_embeddings=2048) == 8192
    assert max_model_len(type="dynamic", factor=4.0) == 8192
    assert max_model_len(type="linear", factor=4.0) == 8192


def without(config, name):
    return {key: value for key, value in config.items() if key != name}


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (MISTRAL | {"sliding_window": 4096}, 4096),
        (MISTRAL | {"sliding_window": 4096, "layer_types": ["full_attention"] * 32}, 4096),
        (MISTRAL | {"sliding_window": 10**6}, 32768),
        (MISTRAL | {"sliding_window": None}, 32768),
        (without(MISTRAL, "sliding_window"), 4096),
        (QWEN | {"use_sliding_window": True, "sliding_window": 2048}, 2048),
        (QWEN | {"use_sliding_window": False, "sliding_window": 2048}, 32768),
        (without(QWEN, "sliding_window") | {"use_sliding_window": True}, 4096),
        (LLAMA | {"sliding_window": 1024}, 1024),
    ],
)
def test_the_context_ends_where_a_window_would_begin(config, longest):
    """Up to there a window changes nothing; see test_models.py for the logits."""
    assert ModelConfig.from_hf(config).max_model_len == longest


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_key_that_is_absent_means_what_it_means_to_transformers(model_type):
    sizes = {"vocab_size": 100, "hidden_size": 2048, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 32, "max_position_embeddings": 8192, "model_type": model_type}
    theirs = transformers.AutoConfig.for_model(**sizes)
    ours = ModelConfig.from_hf(sizes)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_size == (getattr(theirs, "head_dim", None) or 2048 // 32)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope.kind == theirs.rope_parameters["rope_type"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.max_model_len == min(8192, getattr(theirs, "sliding_window", None) or 8192)
    assert ours.activation == theirs.hidden_act
    assert ours.out_bias == getattr(theirs, "attention_bias", False)
    assert ours.mlp_bias == getattr(theirs, "mlp_bias", False)
    null = {"sliding_window": None}  # null is not absent
    null |= {} if model_type == "mistral" else {"num_key_value_heads": None}
    null |= {} if model_type == "qwen3" else {"head_dim": None}
    theirs = transformers.AutoConfig.for_model(**sizes | null)
    ours = ModelConfig.from_hf(sizes | null)
    assert (ours.num_kv_heads, ours.max_model_len) == (theirs.num_key_value_heads, 8192)


def test_an_absent_key_of_gpt2_means_what_it_means_to_transformers():
    sizes = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "model_type": "gpt2"}
    theirs = transformers.AutoConfig.for_model(**sizes)
    written = {name: value for name, value in theirs.to_dict().items() if name not in ("bos_token_id", "eos_token_id")}
    assert ModelConfig.from_hf(sizes) == ModelConfig.from_hf(written)


REFUSED = [
    (LLAMA, {"model_type": "granite"}, "model_type"),
    (LLAMA, {"model_type": ["llama"]}, "model_type"),
    (LLAMA, {"model_type": None}, "model_type is missing"),
    (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu' must be one of silu"),
    (LLAMA, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    (LLAMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    (LLAMA, {"embedding_multiplier": 12.0}, "embedding_multiplier"),
    (LLAMA, {"num_local_experts": 8}, "num_local_experts"),
    (LLAMA, {"rope_interleaved": True}, "rope_interleaved"),
    (LLAMA, {"no_rope_layers": [1, 1, 0]}, "no_rope_layers"),
    (LLAMA, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    (LLAMA, {"layer_types": "full_attention"}, "layer_types"),
    (MISTRAL, {"sliding_window": 0}, "sliding_window=0 must be an integer from 1"),
    (LLAMA, {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling.rope_type='longrope'"),
    (LLAMA, {"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_scaling.type='su'"),
    (LLAMA, {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor=0 must be a number from"),
    (LLAMA, {"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
    (LLAMA, {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor=1.0 must be above"),
    (LLAMA, {"rope_scaling": {"type": "default", "mrope_section": [16, 24]}}, "rope_scaling.mrope_section"),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0, "theta": 1e6}}, "rope_scaling.theta"),
    (LLAMA, {"rope_scaling": "linear"}, "rope_scaling must be a JSON object"),
    (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.25}}, "rope_parameters.partial_rotary_factor"),
    (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters.full_attention"),
    (LLAMA, {"rope_theta": 1}, "rope_theta=1 must be a number from 2 to"),
    (LLAMA, {"hidden_size": None}, "hidden_size is missing"),
    (LLAMA, {"hidden_size": "576"}, "hidden_size='576' must be an integer"),
    (LLAMA, {"hidden_size": -576}, "hidden_size=-576 must be an integer"),
    (LLAMA, {"hidden_size": 576.0}, "hidden_size=576.0 must be an integer"),
    (LLAMA, {"num_hidden_layers": True}, "num_hidden_layers=True must be an integer"),
    (LLAMA, {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be an integer from 1 to"),
    (
        LLAMA,
        {"num_attention_heads": 10, "num_key_value_heads": 5},
        "hidden_size=576 must be a multiple of num_att",
    ),
    (LLAMA, {"num_key_value_heads": 2}, "num_attention_heads=9 must be a multiple of num_key_value_heads=2"),
    (LLAMA, {"head_dim": 33}, "head_dim=33"),
    (LLAMA, {"max_position_embeddings": 0}, "max_position_embeddings=0"),
    (LLAMA, {"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    (LLAMA, {"rms_norm_eps": math.nan}, "rms_norm_eps=nan"),
    (LLAMA, {"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    (LLAMA, {"attention_bias": 1}, "attention_bias"),
    (LLAMA, {"eos_token_id": [2, "x"]}, "eos_token_id"),
    (LLAMA, {"bos_token_id": -1}, "bos_token_id"),
    (QWEN, {"use_mrope": True}, "use_mrope"),
    (GPT, {"activation_function": "quick_gelu"}, "activation_function='quick_gelu'"),
    (GPT, {"add_cross_attention": True}, "add_cross_attention"),
    (GPT, {"pruned_heads": {"0": [1]}}, "pruned_heads"),
    (GPT, {"n_head": 7}, "n_embd=768 must be a multiple of n_head=7"),
    (GPT, {"n_inner": "x"}, "n_inner"),
    (GPT, {"n_positions": None}, "n_positions is missing"),
    (GPT, {"scale_attn_weights": "yes"}, "scale_attn_weights"),
]


@pytest.mark.parametrize(("good", "change", "message"), REFUSED, ids=[str(case[1])[:60] for case in REFUSED])
def test_refused_by_name(good, change, message):
    with pytest.raises(ModelError) as refusal:
        ModelConfig.from_hf(good | change)
    assert message in str(refusal.value)


HARMLESS = [
    (LLAMA, {"partial_rotary_factor": 1.0}),
    (LLAMA, {"pretraining_tp": 2}),
    (LLAMA, {"rope_scaling": {}}),
    (LLAMA, {"rope_scaling": {"rope_type": "default", "type": "default", "rope_theta": 100000}}),
    (LLAMA, {"quantization_config": None, "unsloth_version": "2025.1", "auto_map": {"AutoModel": "x.y"}}),
    (LLAMA, {"sliding_window": 8192, "layer_types": ["full_attention"] * 30}),
    (QWEN, {"sliding_window": 128}),
    (QWEN, {"sliding_window": 128, "use_sliding_window": None}),
    (QWEN, {"sliding_window": 128, "use_sliding_window": True, "layer_types": ["full_attention"] * 24}),
    (QWEN, {"attention_bias": True}),  # Qwen2 does not read it
    (GPT, {"add_cross_attention": False, "tie_encoder_decoder": False, "n_inner": None}),
]


@pytest.mark.parametrize(("good", "change"), HARMLESS, ids=[str(change)[:60] for _, change in HARMLESS])
def test_what_changes_nothing_is_no_reason_to_refuse(good, change):
    assert ModelConfig.from_hf(good | change) == ModelConfig.from_hf(good)


@pytest.mark.parametrize("config", [None, [], "llama", 3])
def test_a_config_must_be_an_object(config):
    with pytest.raises(ModelError, match="model config must be a JSON object"):
        ModelConfig.from_hf(config)


JSON = st.sampled_from(
    [None, True, False, -1, 0, 1, 2, 3, 10**400, math.nan, math.inf, "", "silu", [], [1], {}]
)
JSON |= st.floats() | st.integers()
KINDS = st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn"])
ROPE_KEYS = (
    "rope_theta low_freq_factor high_freq_factor original_max_position_embeddings beta_fast beta_slow "
    "attention_factor mscale mscale_all_dim truncate partial_rotary_factor"
)
ROPE_DICT = st.fixed_dictionaries(
    {"rope_type": KINDS, "factor": st.floats(0) | JSON},
    optional={name: st.integers(1, 100) | JSON for name in ROPE_KEYS.split()},
)


@given(st.data())
def test_any_json_is_parsed_or_refused(data):
    config = dict(data.draw(st.sampled_from([model["config"] for model in REAL.values()])))
    for name in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=2)):
        config[name] = data.draw(JSON)
    if data.draw(st.booleans()):
        config["rope_scaling"] = data.draw(ROPE_DICT)
    try:
        parsed = ModelConfig.from_hf(config)
    except ModelError as error:
        assert str(error).startswith("model config")
        return
    if parsed.rope and parsed.head_size < 1000:
        assert inverse_frequencies(parsed.rope, parsed.head_size).isfinite().all()
