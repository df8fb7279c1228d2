"""The GPT-2 architecture over paged memory: learned positions, LayerNorm, biases everywhere.

Symbols as in llama.py, with one kind of heads: T tokens in the batch, E hidden size,
H heads, D head size, F width of the MLP, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

import kernels
from minipaged.models.config import ACTIVATIONS, ModelConfig
from minipaged.models.ranks import ALONE, Linear, Ranks, row_parallel, vocab_parallel


def _norm(weights: dict[str, Any], name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return weights.pop(f"{name}.weight").to(dtype), weights.pop(f"{name}.bias").to(dtype)


class GPT2Layer:
    """x + attention(norm(x)), then x + mlp(norm(x)), for one of the L layers."""

    def __init__(
        self, config: ModelConfig, layer: int, weights: dict[str, Any], backend: kernels.Backend, ranks: Ranks
    ):
        def linear(name: str, bias: bool = True) -> Linear:
            weight = weights.pop(f"{prefix}.{name}.weight")  # Hugging Face's Conv1D: [in, out]
            return backend.linear(weight.t().contiguous(), weights.pop(f"{prefix}.{name}.bias") if bias else None)

        prefix = f"transformer.h.{layer}"
        self.config, self.backend, dtype = config, backend, backend.dtype
        self.scale = config.attention_scale(layer)
        self.activation = ACTIVATIONS[config.activation]
        self.attention_norm = _norm(weights, f"{prefix}.ln_1", dtype)
        self.mlp_norm = _norm(weights, f"{prefix}.ln_2", dtype)
        first = ranks.rank == 0
        self.qkv, self.out = linear("attn.c_attn"), row_parallel(linear("attn.c_proj", bias=first), ranks)
        self.up, self.down = linear("mlp.c_fc"), row_parallel(linear("mlp.c_proj", bias=first), ranks)

    def __call__(self, x: Tensor, layer_cache: Tensor, batch: kernels.Batch) -> Tensor:
        """x [T, E], changed in place. Returns x."""
        shape, eps = x.shape[-1:], self.config.norm_eps
        attended = self.attention(layer_norm(x, shape, *self.attention_norm, eps), layer_cache, batch)
        self.out(attended.flatten(1), add_to=x)
        up = self.up(layer_norm(x, shape, *self.mlp_norm, eps))
        return self.down(self.backend.pointwise(self.activation, up), add_to=x)

    def attention(self, x: Tensor, layer_cache: Tensor, batch: kernels.Batch) -> Tensor:
        """x [T, E] -> [T, H, D]; writes this step's keys and values into the cache."""
        q, k, v = self.qkv(x).view(len(x), 3, self.config.num_heads, -1).unbind(1)  # each [T, H, D]
        self.backend.write_kv(k, v, layer_cache, batch)
        return self.backend.paged_attention(q, layer_cache, batch, self.scale)


class GPT2:
    """A decoder of L layers between the embeddings (token + position) and a projection to the vocabulary.

    weights: the tensors of tensor_shapes(config); each is taken out of the dict as it is used.
    ranks: those that compute it together; config and weights are this rank's own then, see split.py.
    """

    packed = False  # whether products are made with small numbers

    def __init__(
        self, config: ModelConfig, weights: dict[str, Any], backend: kernels.Backend, ranks: Ranks = ALONE
    ):
        self.config, self.backend, self.dtype = config, backend, backend.dtype
        embedding = weights.pop("transformer.wte.weight")  # [V, E]
        self.position_embedding = weights.pop("transformer.wpe.weight")  # [max_model_len, E]
        self.layers = [GPT2Layer(config, layer, weights, backend, ranks) for layer in range(config.num_layers)]
        self.norm = _norm(weights, "transformer.ln_f", self.dtype)
        tied = config.tie_word_embeddings
        head = backend.linear(embedding if tied else weights.pop("lm_head.weight"))
        embedding = backend.embedding(embedding, head if tied else None)
        self.embedding, self.head = vocab_parallel(embedding, head, config.vocab_size, ranks)

    def __call__(self, input_ids: Tensor, positions: Tensor, cache: Tensor, batch: kernels.Batch) -> Tensor:
        """input_ids and positions [T], cache [L, 2, H, N, B, D] -> hidden [T, E], after the final norm."""
        x = self.embedding[input_ids].to(self.dtype) + self.position_embedding[positions]
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, layer_cache, batch)
        return layer_norm(x, x.shape[-1:], *self.norm, self.config.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, E], only the rows that are wanted -> [R, V], fp32. Of several ranks only 0 has them."""
        return self.head(hidden).float()

    @staticmethod
    def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Every tensor that the model needs, by its Hugging Face name."""
        e, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
        linears = {"attn.c_attn": (e, 3 * e), "attn.c_proj": (e, e), "mlp.c_fc": (e, f), "mlp.c_proj": (f, e)}
        norms = {"ln_1": (e,), "ln_2": (e,)}
        shapes: dict[str, tuple[int, ...]] = {
            "transformer.wte.weight": (v, e),
            "transformer.wpe.weight": (config.max_model_len, e),
            "transformer.ln_f.weight": (e,),
            "transformer.ln_f.bias": (e,),
        }
        for layer in range(config.num_layers):
            for name, shape in (norms | linears).items():
                shapes[f"transformer.h.{layer}.{name}.weight"] = shape
                shapes[f"transformer.h.{layer}.{name}.bias"] = shape[-1:]
        return shapes if config.tie_word_embeddings else shapes | {"lm_head.weight": (v, e)}
