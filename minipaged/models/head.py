"""A small network that guesses what a model will say next, from the model's own last hidden state.

EAGLE (arXiv:2401.15077): the hidden state f_{n-1} before a token and the token x_n itself say a good deal about the
next state f_n, and that is enough to go on: the guessed state and the token guessed from it give the next guess.

    x   = fuse [f_{n-1}; norm(e(x_n))]
    f_n = norm(layer(x)), one decoder layer as in llama.py, whose attention sees the pairs of all positions before

Guesses are among V' frequent tokens only: the product with a whole vocabulary would cost more than the layer
(arXiv:2502.14856). `python -m minipaged.train_head` makes such heads. E, T, G, N, B, D as in llama.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import kernels
from minipaged.models.config import ModelConfig
from minipaged.models.fields import ModelError
from minipaged.models.llama import Llama, LlamaLayer
from minipaged.models.rope import Rope, RopeConfig

if TYPE_CHECKING:
    from minipaged.models.gpt2 import GPT2

FORMAT = "minipaged head 1"
SIZES = ("hidden_size", "vocab_size", "num_heads", "num_kv_heads", "head_size", "intermediate_size")
NORMS = ("token_norm", "input_layernorm", "post_attention_layernorm", "norm")
HEADS = Path(__file__).with_name("heads")  # those that come with the package


@dataclass
class Ends:
    """What a head needs of a model, of which a whole model is the usual case.

    embedding[ids] gives rows of E; head: the output projection, None if config.tie_word_embeddings.
    """

    config: ModelConfig
    dtype: torch.dtype
    embedding: Any
    head: Callable[..., Tensor] | None


class Head:
    """Guesses the next hidden state, and from it the next token, of the model that it was trained for.

    token_ids [V']: which token each column of `logits` is. kv_heads, head_size: G and D of its cache of one layer.
    weights: by their names in the file, whole numbers, on the model's device.
    """

    def __init__(
        self, config: ModelConfig, weights: dict[str, Tensor], model: "Llama | GPT2 | Ends", backend: kernels.Backend
    ):
        dtype = backend.dtype
        self.config, self.backend, self.embedding = config, backend, model.embedding
        self.kv_heads, self.head_size = config.num_kv_heads, config.head_size
        self.token_ids: Tensor | None = weights["token_ids"].long()
        self.num_tokens = len(weights["token_ids"])
        self.token_norm, self.norm = (weights[f"{name}.weight"].to(dtype) for name in ("token_norm", "norm"))
        self.fuse = backend.linear(weights["fuse.weight"].to(dtype))
        self.layer = LlamaLayer(config, 0, {f"model.layers.0.{n}": w.to(dtype) for n, w in weights.items()}, backend)
        self.head = backend.linear(output_rows(model, self.token_ids).to(dtype))
        self.rope = Rope(config.rope or RopeConfig(), config.head_size, self.token_norm.device)

    @property
    def num_weights(self) -> int:
        """All numbers that a guess reads."""
        shapes = [*tensor_shapes(self.config).values(), (self.num_tokens, self.config.hidden_size)]
        return sum(math.prod(shape) for shape in shapes)

    def __call__(
        self, hidden: Tensor, input_ids: Tensor, positions: Tensor, layer_cache: Tensor, batch: kernels.Batch
    ) -> Tensor:
        """hidden [T, E]: the model's state before each token, zeros before the first; input_ids and positions [T].

        Writes the tokens' keys and values into layer_cache [2, G, N, B, D], and sees those of the positions before.
        Returns the guessed states after each token, [T, E].
        """
        cos, sin = self.rope(positions)
        x = self.layer(self._fused(hidden, input_ids), cos, sin, layer_cache, batch)
        return self.backend.rms_norm(x, self.norm, self.config.norm_eps)

    def write(
        self, hidden: Tensor, input_ids: Tensor, positions: Tensor, layer_cache: Tensor, batch: kernels.Batch
    ) -> None:
        """Only the keys and values, of tokens whose true states the model has computed. Arguments as above."""
        config, layer = self.config, self.layer
        x = self.backend.rms_norm(self._fused(hidden, input_ids), layer.attention_norm, config.norm_eps)
        qkv = layer.qkv(x).view(len(x), -1, config.head_size)
        q, k, v = qkv.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), 1)
        self.backend.rope_and_write(q, k, v, *self.rope(positions), layer_cache, batch)

    def logits(self, hidden: Tensor) -> Tensor:
        """Guessed or true states [R, E] -> [R, V'], fp32: of the tokens in token_ids."""
        return self.head(hidden).float()

    def _fused(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        tokens = self.embedding[input_ids].to(self.backend.dtype)
        tokens = self.backend.rms_norm(tokens, self.token_norm, self.config.norm_eps)
        return self.fuse(torch.cat((hidden.to(tokens.dtype), tokens), 1))


def output_rows(model: "Llama | GPT2 | Ends", token_ids: Tensor, rows: int = 64) -> Tensor:
    """The weights [V', E] of the model's own projection to these tokens, be it packed or tied."""
    if model.config.tie_word_embeddings:
        return model.embedding[token_ids]
    assert model.head is not None
    one_hot = torch.eye(model.config.hidden_size, dtype=model.dtype, device=token_ids.device)
    return torch.cat([model.head(part)[:, token_ids].t() for part in one_hot.split(rows)], 1)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every matrix and norm of a head, by its name in the file; beside them stands token_ids [V']."""
    e, f, d = config.hidden_size, config.intermediate_size, config.head_size
    q, kv = config.num_heads * d, config.num_kv_heads * d
    shapes = {
        "fuse": (e, 2 * e),
        "self_attn.q_proj": (q, e), "self_attn.k_proj": (kv, e),
        "self_attn.v_proj": (kv, e), "self_attn.o_proj": (e, q),
        "mlp.gate_proj": (f, e), "mlp.up_proj": (f, e), "mlp.down_proj": (e, f),
    }  # fmt: skip
    return {f"{name}.weight": shape for name, shape in shapes.items()} | {f"{name}.weight": (e,) for name in NORMS}


def head_config(sizes: dict[str, int], norm_eps: float, rope_theta: float) -> ModelConfig:
    """A Llama of one layer; sizes: those named in SIZES."""
    others: dict[str, Any] = {"architecture": "llama", "num_layers": 1, "max_model_len": 1, "activation": "silu"}
    others |= {"norm_eps": norm_eps, "tie_word_embeddings": True, "rope": RopeConfig(theta=rope_theta)}
    return ModelConfig(**(others | sizes))


def head_of(model_name: str) -> Path:
    """The head that comes with the package for this model; ModelError if there is none."""
    path = HEADS / f"{Path(model_name).name}.safetensors"
    if path.stem != model_name or not path.is_file():
        raise ModelError(
            f"there is no head for {model_name} in the package: train one with python -m minipaged.train_head, and "
            "give its file"
        )
    return path


def load_head(path: str | Path, model: "Llama | GPT2 | Ends", backend: kernels.Backend) -> Head:
    """The head in this file. ModelError if it is none, or one for another model.

    model: a whole one; beside one rank of several, what `minipaged.models.load_ends` gives.
    """
    try:
        with safe_open(path, framework="pt") as file:
            config = _config(file.metadata() or {}, path)
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is no head that can be read: {error}") from None
    for name in ("hidden_size", "vocab_size"):
        ours, its = getattr(model.config, name), getattr(config, name)
        if ours != its:
            raise ModelError(f"{path} is a head for a model of {name} {its}, and this one has {ours}")
    weights = {name: unpacked(stored, name) for name in stored if not name.endswith(".scale")}
    _check(weights, config, path)
    device = model.embedding.device
    return Head(config, {name: weight.to(device) for name, weight in weights.items()}, model, backend)


def unpacked(stored: dict[str, Tensor], name: str) -> Tensor:
    """A tensor as it was: eight-bit rows, times the scale of each, or whatever else is stored."""
    scale = stored.get(f"{name}.scale")
    return stored[name] if scale is None else stored[name].float() * scale.float()[:, None]


def _config(metadata: dict[str, str], path: str | Path) -> ModelConfig:
    if metadata.get("format") != FORMAT:
        raise ModelError(f"{path} is no head: its format is {metadata.get('format')!r}, not {FORMAT!r}")
    try:
        sizes = {name: int(metadata[name]) for name in SIZES}
        return head_config(sizes, float(metadata["norm_eps"]), float(metadata["rope_theta"]))
    except (KeyError, ValueError) as error:
        raise ModelError(f"{path} is a head with broken metadata: {error}") from None


def _check(weights: dict[str, Tensor], config: ModelConfig, path: str | Path) -> None:
    token_ids = weights.get("token_ids")
    if token_ids is None or token_ids.ndim != 1 or not 0 <= token_ids.min() <= token_ids.max() < config.vocab_size:
        raise ModelError(f"{path} is a head whose token_ids are missing or not in the vocabulary")
    for name, shape in tensor_shapes(config).items():
        if name not in weights or tuple(weights[name].shape) != shape:
            raise ModelError(f"{path} is a head whose tensor {name} is missing, or not of shape {list(shape)}")
