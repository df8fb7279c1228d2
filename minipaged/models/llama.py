"""The Llama architecture over paged memory; Mistral, Qwen2 and Qwen3 are the same with a flag or two.

Symbols: T tokens in the batch (of any number of sequences, in one row), E hidden
size, H query heads, G key/value heads, D head size, F width of the MLP, V vocabulary.
Nothing here knows about sequences, prefill or decode: only attention looks at
other tokens, and it finds them through the batch's page tables.
"""

import math
from typing import Any

import torch
from torch import Tensor

import kernels
from minipaged.models.config import ModelConfig, ModelError
from minipaged.models.ranks import ALONE, Linear, Ranks, row_parallel, vocab_parallel
from minipaged.models.rope import Rope, RopeConfig


class LlamaLayer:
    """x + attention(norm(x)), then x + mlp(norm(x)), for one of the L layers."""

    def __init__(
        self, config: ModelConfig, layer: int, weights: dict[str, Any], backend: kernels.Backend,
        ranks: Ranks = ALONE,
    ):  # fmt: skip
        def take(name: str) -> Any:
            return weights.pop(f"model.layers.{layer}.{name}")

        def norm(name: str) -> Tensor:
            return take(f"{name}.weight").to(backend.dtype)

        def linear(*names: str, bias: bool) -> Linear:
            """One for all that read the same input."""
            biases = torch.cat([take(f"{name}.bias") for name in names]) if bias else None
            return backend.linear([take(f"{name}.weight") for name in names], biases)

        self.config, self.backend = config, backend
        self.scale = config.attention_scale(layer)
        self.attention_norm = norm("input_layernorm")
        self.kv_scales = kv_scales(weights, f"model.layers.{layer}.self_attn")
        self.qkv = linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", bias=config.qkv_bias)
        self.out = row_parallel(linear("self_attn.o_proj", bias=config.out_bias and ranks.rank == 0), ranks)
        self.mlp_norm = norm("post_attention_layernorm")
        self.gate_up = linear("mlp.gate_proj", "mlp.up_proj", bias=config.mlp_bias)
        self.down = row_parallel(linear("mlp.down_proj", bias=config.mlp_bias and ranks.rank == 0), ranks)
        if config.qk_norm:
            self.q_norm, self.k_norm = norm("self_attn.q_norm"), norm("self_attn.k_norm")

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, layer_cache: Tensor, batch: kernels.Batch
    ) -> Tensor:
        """x [T, E], which may be changed in place; cos and sin [T, D/2]. Returns [T, E]."""
        backend, eps = self.backend, self.config.norm_eps
        attended = self.attention(backend.rms_norm(x, self.attention_norm, eps), cos, sin, layer_cache, batch)
        self.out(attended.flatten(1), add_to=x)
        gate_up = self.gate_up(backend.rms_norm(x, self.mlp_norm, eps))
        return self.down(backend.silu_and_mul(gate_up), add_to=x)

    def attention(
        self, x: Tensor, cos: Tensor, sin: Tensor, layer_cache: Tensor, batch: kernels.Batch
    ) -> Tensor:
        """x [T, E] -> [T, H, D]; writes this step's keys and values into the cache."""
        backend, config = self.backend, self.config
        qkv = self.qkv(x).view(len(x), -1, config.head_size)  # [T, H + 2G, D]
        q, k, v = qkv.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), 1)
        if config.qk_norm:
            q = backend.rms_norm(q, self.q_norm, config.norm_eps)
            k = backend.rms_norm(k, self.k_norm, config.norm_eps)
        q = backend.rope_and_write(q, k, v, cos, sin, layer_cache, batch, self.kv_scales)
        return backend.paged_attention(q, layer_cache, batch, self.scale)


def kv_scales(weights: dict[str, Tensor], name: str) -> tuple[float, float] | None:
    """A checkpoint's own scales of keys and values, `k_scale` and `v_scale`, for a cache in fp8; None if it has none.

    Takes both out of the dict. ModelError if one is missing or is no scale.
    """
    found = [weights.pop(f"{name}.{kind}", None) for kind in ("k_scale", "v_scale")]
    if found == [None, None]:
        return None
    scales = [0.0 if scale is None or scale.numel() != 1 else float(scale) for scale in found]
    for kind, scale in zip(("k_scale", "v_scale"), scales, strict=True):
        if not 0 < scale < math.inf:
            raise ModelError(f"{name}.{kind}: it must be there and be one positive number, as its pair")
    return scales[0], scales[1]


class Llama:
    """A decoder of L layers between an embedding and a projection to the vocabulary.

    weights: the tensors of tensor_shapes(config), matrices also as `kernels.Packed`. Each is taken out of the dict as
    it is used, so that no second copy of the model stays in memory.
    ranks: those that compute it together; config and weights are this rank's own then, see split.py.
    """

    packed = False  # whether products are made with small numbers

    def __init__(
        self, config: ModelConfig, weights: dict[str, Any], backend: kernels.Backend, ranks: Ranks = ALONE
    ):
        self.config, self.backend, self.dtype = config, backend, backend.dtype
        embedding = weights.pop("model.embed_tokens.weight")  # [V, E]
        self.layers = [LlamaLayer(config, layer, weights, backend, ranks) for layer in range(config.num_layers)]
        self.norm = weights.pop("model.norm.weight").to(self.dtype)
        tied = config.tie_word_embeddings
        head = backend.linear(embedding if tied else weights.pop("lm_head.weight"))
        embedding = backend.embedding(embedding, head if tied else None)
        self.embedding, self.head = vocab_parallel(embedding, head, config.vocab_size, ranks)
        self.rope = Rope(config.rope or RopeConfig(), config.head_size, self.norm.device)

    def __call__(self, input_ids: Tensor, positions: Tensor, cache: Tensor, batch: kernels.Batch) -> Tensor:
        """input_ids and positions [T], cache [L, 2, G, N, B, D] -> hidden [T, E], after the final norm."""
        x = self.embedding[input_ids].to(self.dtype)
        cos, sin = self.rope(positions)
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, cos, sin, layer_cache, batch)
        return self.backend.rms_norm(x, self.norm, self.config.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, E], only the rows that are wanted -> [R, V], fp32. Of several ranks only 0 has them."""
        return self.head(hidden).float()

    @staticmethod
    def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Every tensor that the model needs, by its Hugging Face name."""
        e, f, d = config.hidden_size, config.intermediate_size, config.head_size
        q, kv = config.num_heads * d, config.num_kv_heads * d
        linears = {  # name: (out, in, bias)
            "self_attn.q_proj": (q, e, config.qkv_bias),
            "self_attn.k_proj": (kv, e, config.qkv_bias),
            "self_attn.v_proj": (kv, e, config.qkv_bias),
            "self_attn.o_proj": (e, q, config.out_bias),
            "mlp.gate_proj": (f, e, config.mlp_bias),
            "mlp.up_proj": (f, e, config.mlp_bias),
            "mlp.down_proj": (e, f, config.mlp_bias),
        }
        norms = {"input_layernorm": e, "post_attention_layernorm": e}
        if config.qk_norm:
            norms |= {"self_attn.q_norm": d, "self_attn.k_norm": d}
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, e)}
        for layer in range(config.num_layers):
            prefix = f"model.layers.{layer}"
            shapes |= {f"{prefix}.{name}.weight": (size,) for name, size in norms.items()}
            shapes |= {f"{prefix}.{name}.weight": (out, into) for name, (out, into, _) in linears.items()}
            shapes |= {f"{prefix}.{name}.bias": (out,) for name, (out, _, bias) in linears.items() if bias}
        shapes["model.norm.weight"] = (e,)
        return shapes if config.tie_word_embeddings else shapes | {"lm_head.weight": (config.vocab_size, e)}
