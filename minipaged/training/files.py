"""Where a head begins, and how it is kept: eight-bit rows with a scale each, in a safetensors file."""

import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minipaged.models import Model, ModelConfig
from minipaged.models.head import FORMAT, SIZES, head_config, output_rows, unpacked
from minipaged.training.network import HeadNetwork
from minipaged.training.states import Lesson

NORM_EPS = 1e-5
RIDGE = 0.01  # of the mean square of the inputs
MAX_LESSONS = 400  # that the first guess is computed from


class Frozen:
    """What a head takes from its model: embedding [V, E], and the projection [V', E] to the tokens token_ids [V']."""

    def __init__(self, model: Model, token_ids: Tensor):
        self.embedding = model.embedding[torch.arange(model.config.vocab_size, device=token_ids.device)].float().cpu()
        self.token_ids = token_ids
        rows = output_rows(model, token_ids.to(model.embedding.device)).float().cpu()
        self.output = rows.bfloat16()
        self.columns = torch.full((len(self.embedding),), -1)  # token -> its place in token_ids, or -1
        self.columns[token_ids] = torch.arange(len(token_ids))


def frequent_tokens(texts: list[Lesson], vocab_size: int, count: int) -> Tensor:
    """The `count` tokens that answers hold most often, in ascending order. Of equally rare ones those with low ids:
    a tokenizer learns frequent pairs first."""
    seen = torch.bincount(torch.cat([t.token_ids[t.begin :] for t in texts]), minlength=vocab_size)
    return seen.sort(descending=True, stable=True).indices[:count].sort().values


def config_like(config: ModelConfig) -> ModelConfig:
    """A head's sizes are those of a layer of its model."""
    theta = config.rope.theta if config.rope else 10000.0
    return head_config({name: getattr(config, name) for name in SIZES}, NORM_EPS, theta)


@torch.no_grad()
def new_network(config: ModelConfig, frozen: Frozen, texts: list[Lesson]) -> HeadNetwork:
    """A network that begins as the best linear guess of the next state; its layer adds little yet.

    Linear regression of f_n, as long as the final norm makes it, on (f_{n-1}, norm(e(x_n))).
    """
    network = HeadNetwork(config)
    e = config.hidden_size
    square, product = torch.zeros(2 * e, 2 * e), torch.zeros(2 * e, e)
    for text in texts[:MAX_LESSONS]:
        hidden = text.hidden.float()
        x = torch.cat((hidden[:-1], network.token_norm(frozen.embedding[text.token_ids[1:]])), 1)
        square += x.T @ x
        product += x.T @ hidden[1:]
    square.diagonal().add_(RIDGE * square.diagonal().mean() + 1e-6)
    solution = torch.linalg.solve(square, product).T
    length = torch.cat([t.hidden for t in texts[:MAX_LESSONS]]).float().pow(2).mean(0).sqrt()  # of each dimension
    network.norm.weight.copy_(length)
    network.fuse.weight.copy_(solution / length[:, None])
    for last in (network.self_attn["o_proj"], network.mlp["down_proj"]):
        last.get_parameter("weight").mul_(0.1)
    return network


def save(network: HeadNetwork, token_ids: Tensor, path: Path, made_by: str) -> None:
    """Write a file for models/head.py, whole or not at all."""
    tensors: dict[str, Tensor] = {"token_ids": token_ids.int()}
    tensors |= _packed(network)
    config = network.config
    theta = config.rope.theta if config.rope else 10000.0
    metadata = {"format": FORMAT, "norm_eps": repr(config.norm_eps), "rope_theta": repr(theta), "made_by": made_by}
    metadata |= {name: str(getattr(config, name)) for name in SIZES}
    part = path.with_name(f"{path.name}.part")
    try:
        save_file(tensors, part, metadata)
        part.chmod(0o644)  # the library lets nobody else read it
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def rounded(network: HeadNetwork) -> HeadNetwork:
    """The network as its file will have it: to be judged by."""
    other, stored = HeadNetwork(network.config), _packed(network)
    other.load_state_dict({name: unpacked(stored, name) for name in network.state_dict()})
    return other


def _packed(network: HeadNetwork) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    for name, weight in network.state_dict().items():
        if weight.ndim == 1:
            stored[name] = weight.half()
        else:
            scale = weight.abs().amax(1).clamp(min=1e-8) / 127
            stored |= {name: (weight / scale[:, None]).round().to(torch.int8), f"{name}.scale": scale}
    return stored
