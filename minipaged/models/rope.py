"""Rotary position embedding (RoFormer, arXiv:2104.09864) and the ways of stretching it to longer contexts.

Pair i of a head of size D turns by ``position * theta^(-2i/D)``. The scalings
change only these D/2 frequencies (and, in YaRN, the length of the vectors).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minipaged.models.fields import Fields

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """theta, and how it is stretched; each field matters only to the kinds named beside it."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0  # linear, dynamic, llama3, yarn
    original_max_len: int = 0  # llama3, yarn: positions seen in pretraining
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # yarn: scales cos and sin

    @classmethod
    def from_hf(cls, config: Fields, max_len: int) -> "RopeConfig":
        """From ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` (before).

        max_len: the config's max_position_embeddings.
        """
        name = "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"
        rope = Fields(config.values.get(name) or {}, f"{name}.")
        _refuse_unknown(rope)
        kind = rope.choice("rope_type", rope.choice("type", "default", KINDS), KINDS)
        theta = float(rope.number("rope_theta", config.number("rope_theta", 10000.0, low=2), low=2))
        original = config.integer(
            "original_max_position_embeddings", rope.integer("original_max_position_embeddings", max_len)
        )
        if kind in ("linear", "dynamic"):
            return cls(kind, theta, rope.number("factor"))
        if kind == "llama3":
            low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
            if high <= low:
                raise rope.error("high_freq_factor", f"must be above low_freq_factor={low}")
            return cls(kind, theta, rope.number("factor"), original, low, high)
        if kind == "yarn":
            return cls(
                kind,
                theta,
                rope.number("factor", max_len / original),
                original,
                beta_fast=rope.number("beta_fast", 32.0),
                beta_slow=rope.number("beta_slow", 1.0),
                truncate=rope.flag("truncate", True),
                attention_factor=_yarn_attention_factor(rope, max_len / original),
            )
        return cls(kind, theta)

    def stretched_len(self, max_len: int) -> int:
        """The longest context. YaRN configs may state the original length as max_position_embeddings."""
        return max(max_len, int(self.factor * self.original_max_len)) if self.kind == "yarn" else max_len


# What a rope dict may hold; "finetuned" is only a remark.
KNOWN_KEYS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor",
    "high_freq_factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim",
    "partial_rotary_factor", "finetuned",
}  # fmt: skip


def _refuse_unknown(rope: Fields) -> None:
    if rope.number("partial_rotary_factor", 1) != 1:
        raise rope.error("partial_rotary_factor", "is not supported; it must be 1")
    for key, value in rope.values.items():
        if key not in KNOWN_KEYS and value is not None:
            raise rope.error(key, "is not known, and may change the output")


def _yarn_attention_factor(rope: Fields, default_factor: float) -> float:
    """YaRN (arXiv:2309.00071), section 3.4: longer contexts want colder attention, 0.1 ln(s) + 1."""
    factor = rope.number("factor", default_factor)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    above, below = rope.number("mscale", None, low=0), rope.number("mscale_all_dim", None, low=0)
    return rope.number("attention_factor", mscale(above) / mscale(below) if above and below else mscale(1.0))


def inverse_frequencies(rope: RopeConfig, head_size: int) -> Tensor:
    """Radians per position of each of the D/2 pairs, fp32.

    >>> inverse_frequencies(RopeConfig(theta=100.0), 4)
    tensor([1.0000, 0.1000])
    """
    frequencies = 1.0 / rope.theta ** (torch.arange(0, head_size, 2).float() / head_size)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    if rope.kind == "yarn":
        return _yarn(rope, frequencies, head_size)
    # "dynamic" raises theta for a sequence that outgrows max_position_embeddings. All its keys would have to
    # be turned anew, and they stand in the cache, turned already. max_model_len ends before that.
    return frequencies


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1: slow pairs are divided by factor, fast ones left alone, those between blended."""
    turns = rope.original_max_len * frequencies / (2 * math.pi)  # full turns within the original context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / rope.factor


def _yarn(rope: RopeConfig, frequencies: Tensor, head_size: int) -> Tensor:
    """YaRN, section 3.2: the same blend as Llama 3.1's, linear in the index of the pair."""

    def pair(turns: float) -> float:  # the (fractional) pair that turns so often in the original context
        return head_size / 2 * math.log(rope.original_max_len / (turns * 2 * math.pi), rope.theta)

    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_size - 1)
    width = last - first or 0.001  # no division by zero
    stretch = ((torch.arange(head_size // 2) - first) / width).clamp(0, 1)
    return stretch * frequencies / rope.factor + (1 - stretch) * frequencies


class Rope:
    """positions [T] -> cos and sin [T, D/2], fp32, both times `attention_factor`.

    Computed anew for each step's tokens: once for all layers that costs nothing beside them, while a table of
    all positions takes half a gigabyte for a context of a million tokens.
    """

    def __init__(self, config: RopeConfig, head_size: int, device: torch.device):
        self.frequencies = inverse_frequencies(config, head_size).to(device)
        self.attention_factor = config.attention_factor

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None] * self.frequencies
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
