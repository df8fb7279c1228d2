"""Reads a Hugging Face ``config.json`` into the few numbers that the models need.

Everything that would change the output is either carried into ModelConfig or
refused by name: a model that runs, but computes something else than it was
trained to, is worse than one that doesn't load.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minipaged.models.fields import Fields, ModelError
from minipaged.models.rope import RopeConfig

__all__ = ["ACTIVATIONS", "ModelConfig", "ModelError"]

LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3")
# What transformers takes where a config.json lacks the key (null is something else), and what it takes is not ours.
ABSENT: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": {"sliding_window": 4096, "num_key_value_heads": 32},
    "qwen3": {"sliding_window": 4096, "num_key_value_heads": 32, "head_dim": 128},
}
MAX_LAYERS = 10_000  # far above any model: a broken config must not make us list a billion tensors


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# GPT-2's activation_function, by the names of Hugging Face. Llama's is always silu.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class ModelConfig:
    """What a model is made of.

    >>> sizes = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
    >>> config = ModelConfig.from_hf({"model_type": "gpt2"} | sizes)
    >>> config.head_size, config.intermediate_size, config.tie_word_embeddings
    (64, 3072, True)
    """

    architecture: str  # "llama" or "gpt2"
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    max_model_len: int  # positions that it can tell apart, and all see each other: prompt and output together
    norm_eps: float
    tie_word_embeddings: bool
    activation: str
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    rope: RopeConfig | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3: every head of q and k is normalised before rope
    scale_attention: bool = True
    scale_by_layer: bool = False

    def attention_scale(self, layer: int) -> float:
        """The factor on q . k in a layer, counted from 0: 1/sqrt(D), unless GPT-2's options change it."""
        scale = self.head_size**-0.5 if self.scale_attention else 1.0
        return scale / (layer + 1) if self.scale_by_layer else scale

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ModelConfig":
        """Parse the dict of a ``config.json``. ModelError names the field that is wrong or unsupported."""
        model_type = Fields(config).choice("model_type", ..., ("gpt2", *LLAMA_FAMILY))
        fields = Fields(ABSENT.get(model_type, {}) | config)
        _refuse_unsupported(fields)
        return cls(**(_gpt2(fields) if model_type == "gpt2" else _llama(fields, model_type)))


# A model_type fixes the code that transformers runs, which ignores the fields it doesn't know; so do we.
# But a field with one of these words in its name changes the output of some relative of Llama or GPT-2, and
# a checkpoint that sets it was made by code that reads it. It is refused unless its value means "off".
_UNSUPPORTED = re.compile(
    "quantization|softcap|multiplier|expert|moe|sparse|partial_rotary|rotary_pct|rotary_dim|alibi|mrope|nope|"
    "no_rope|rope_interleaved|rope_ratio|rope_local|qk_norm|clip_qkv|logit_scale|logits_scaling|residual_scale|"
    "scale_emb|scale_depth|mup_|attention_chunk|cross_attention|encoder_decoder|parallel_residual|"
    "parallel_attn|pruned_heads|mamba|ssm_|conv_"
)


def _refuse_unsupported(fields: Fields) -> None:
    for name, value in fields.values.items():
        off = not value or (type(value) in (int, float) and value == 1)  # a factor of 1 changes nothing
        if _UNSUPPORTED.search(name) and not off:
            raise fields.error(name, "would change the output and is not supported")


def _window(fields: Fields, model_type: str, max_len: int) -> int:
    """The longest context in which every position still sees all before it. There a window is no window."""
    layer_types = fields.values.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise fields.error("layer_types", "is not supported; only a list of 'full_attention' is")
    qwen = model_type.startswith("qwen")  # has a switch for it, and obeys layer_types
    active = fields.flag("use_sliding_window", False) and not layer_types if qwen else True
    window = fields.integer("sliding_window", max_len)
    return min(max_len, window) if active else max_len


def _common(fields: Fields) -> dict[str, Any]:
    vocab_size = fields.integer("vocab_size")
    bos, eos = (_token_ids(fields, name, vocab_size) for name in ("bos_token_id", "eos_token_id"))
    return {"vocab_size": vocab_size, "eos_token_ids": eos, "bos_token_id": bos[0] if bos else None}


def _token_ids(fields: Fields, name: str, vocab_size: int) -> tuple[int, ...]:
    """Ids beyond the vocabulary are left out, with a warning: the model can't say them."""
    ids = fields.token_ids(name)
    if beyond := [i for i in ids if i >= vocab_size]:
        warnings.warn(
            f"model config: {name} {beyond} is left out: the vocabulary has only {vocab_size} tokens", stacklevel=2
        )
    return tuple(i for i in ids if i < vocab_size)


def _multiple(fields: Fields, name: str, of: str) -> int:
    """How many times the field ``of`` fits into the field ``name``."""
    value, divisor = fields.integer(name), fields.integer(of)
    if value % divisor:
        raise fields.error(name, f"must be a multiple of {of}={divisor}")
    return value // divisor


def _gpt2(fields: Fields) -> dict[str, Any]:
    hidden_size, num_heads = fields.integer("n_embd"), fields.integer("n_head")
    return _common(fields) | {
        "architecture": "gpt2",
        "hidden_size": hidden_size,
        "num_layers": fields.integer("n_layer", high=MAX_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_size": _multiple(fields, "n_embd", of="n_head"),
        "intermediate_size": fields.integer("n_inner", 4 * hidden_size),
        "max_model_len": fields.integer("n_positions"),
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", True),
        "activation": fields.choice("activation_function", "gelu_new", tuple(ACTIVATIONS)),
        "scale_attention": fields.flag("scale_attn_weights", True),
        "scale_by_layer": fields.flag("scale_attn_by_inverse_layer_idx", False),
    }


def _llama(fields: Fields, model_type: str) -> dict[str, Any]:
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("num_attention_heads", f"must be a multiple of num_key_value_heads={num_kv_heads}")
    head_size = fields.integer("head_dim", None) or _multiple(fields, "hidden_size", of="num_attention_heads")
    if head_size % 2:
        raise fields.error("head_dim", f"gives heads of size {head_size}; rope needs an even size")
    max_positions = fields.integer("max_position_embeddings")
    rope = RopeConfig.from_hf(fields, max_positions)
    max_len = _window(fields, model_type, rope.stretched_len(max_positions))
    attention_bias = fields.flag("attention_bias", False)
    return _common(fields) | {
        "architecture": "llama",
        "hidden_size": fields.integer("hidden_size"),
        "num_layers": fields.integer("num_hidden_layers", high=MAX_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_size": head_size,
        "intermediate_size": fields.integer("intermediate_size"),
        "max_model_len": max_len,
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", False),
        "activation": fields.choice("hidden_act", "silu", ("silu", "swish")),
        "rope": rope,
        "qkv_bias": attention_bias or model_type == "qwen2",  # Qwen2 has it always, on q, k and v only
        "out_bias": attention_bias and model_type != "qwen2",
        "mlp_bias": fields.flag("mlp_bias", False),
        "qk_norm": model_type == "qwen3",
    }
