"""Reads a model's quantization_config; refuses by name what would change the numbers and is not known here.

It lies in config.json (or, from older tools, in quantize_config.json beside it). Lists of layers that were left alone
(ignore, modules_to_not_convert) need no reading: such a layer has a plain weight, which is used as it is.
"""

import re
from pathlib import Path
from typing import Any, TypeAlias

from minipaged.models.fields import Fields, ModelError
from minipaged.models.folder_tokenizer import read_json
from minipaged.models.quantized.awq import AWQ
from minipaged.models.quantized.compressed_tensors import STRATEGIES, CompressedTensors, Scheme
from minipaged.models.quantized.fp8 import FP8
from minipaged.models.quantized.gptq import GPTQ

Method: TypeAlias = GPTQ | AWQ | FP8 | CompressedTensors

METHODS = ("gptq", "awq", "compressed-tensors", "fp8")
LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
MAX_GROUP = 2**20
# Settings with one of these words make a checkpoint mean something else, unless their value means "off".
_UNSUPPORTED = re.compile("marlin|dynamic$|extra_config|rotation|hadamard|transform|adapter|lora_|sparsity|codebook")


def read_method(config: dict[str, Any], folder: Path) -> Method | None:
    """How the weights of the folder are stored; None if plainly. Takes quantization_config out of config."""
    found = config.pop("quantization_config", None)
    older = config.pop("compression_config", None)  # what compressed-tensors called it first
    values = found or older
    if not values:
        values = read_json(folder / "quantize_config.json", missing_ok=True)
        values = {"quant_method": "gptq"} | values if values else None
    if not values:
        return None
    fields = Fields(values, "quantization_config.")
    method = fields.choice("quant_method", ..., METHODS)
    if config.get("model_type") == "gpt2" and method != "gptq":
        raise fields.error("quant_method", "is not supported for GPT-2, whose weights lie across; gptq is")
    _refuse_unsupported(fields)
    if method == "gptq":
        return _gptq(fields, across=config.get("model_type") == "gpt2")
    return _awq(fields) if method == "awq" else _fp8(fields) if method == "fp8" else _compressed(fields)


def _refuse_unsupported(fields: Fields) -> None:
    for name, value in fields.values.items():
        # GPTQModel's dynamic: rules that begin with -: leave layers alone, which their plain weights say, too
        skips = name == "dynamic" and isinstance(value, dict) and all(rule.startswith("-:") for rule in value)
        dense = name == "sparsity_config" and isinstance(value, dict) and value.get("format") == "dense"
        if value and _UNSUPPORTED.search(name) and not skips and not dense:
            raise fields.error(name, "would change the output and is not supported")


def _group_size(fields: Fields) -> int:
    if (size := fields.integer("group_size", low=-1, high=MAX_GROUP)) == 0:
        raise fields.error("group_size", "must be -1, for one group, or at least 1")
    return size


def _formats(fields: Fields, known: tuple[str, ...], names: tuple[str, ...]) -> str:
    """What the fields of these names say, which must be one of known and the same; the first if they are absent."""
    said = {fields.choice(name, None, known) for name in names} - {None}
    if len(said) > 1:
        raise fields.error(names[0], f"contradicts {names[1]}={fields.values[names[1]]!r}")
    return said.pop() if said else known[0]


def _gptq(fields: Fields, across: bool) -> GPTQ:
    bits = fields.integer("bits")
    if bits not in (2, 3, 4, 8):
        raise fields.error("bits", "must be 2, 3, 4 or 8")
    fields.choice("pack_dtype", "int32", ("int32",))
    form = _formats(fields, ("gptq", "gptq_v2"), ("checkpoint_format", "format"))
    return GPTQ(bits, _group_size(fields), form == "gptq", fields.flag("desc_act", False), across)


def _awq(fields: Fields) -> AWQ:
    if fields.integer("bits") != 4:
        raise fields.error("bits", "must be 4")
    version = fields.values.get("version")
    if isinstance(version, str):
        fields.values["version"] = version.lower()  # AutoAWQ wrote it either way
    _formats(fields, ("gemm",), ("version", "checkpoint_format"))
    _formats(fields, ("gemm",), ("version", "format"))
    return AWQ(_group_size(fields))


def _fp8(fields: Fields) -> FP8:
    fields.choice("activation_scheme", "dynamic", ("dynamic", "static"))
    fields.choice("fmt", "e4m3", ("e4m3", "float8_e4m3fn"))
    return FP8(_block(fields, "weight_block_size"))


def _block(fields: Fields, name: str, needed: bool = False) -> tuple[int, int] | None:
    value = fields.values.get(name)
    if value is None and not needed:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and 0 < n < MAX_GROUP for n in value):
        raise fields.error(name, "must be two numbers of at least 1, such as [128, 128]")
    return value[0], value[1]


def _compressed(fields: Fields) -> CompressedTensors:
    fields.choice("quantization_status", "compressed", ("compressed",))
    _check_kv_cache(fields)
    groups = Fields(fields.values.get("config_groups"), fields.prefix + "config_groups.")
    schemes = [_scheme(fields, Fields(values, f"{groups.prefix}{name}.")) for name, values in groups.values.items()]
    if not schemes:
        raise fields.error("config_groups", "names no layers; what is quantized, and how?")
    return CompressedTensors(tuple(schemes))


def _check_kv_cache(fields: Fields) -> None:
    """Scales for an FP8 cache come with the weights; the engine decides what its cache is."""
    if fields.values.get("kv_cache_scheme") is not None:
        cache = Fields(fields.values["kv_cache_scheme"], fields.prefix + "kv_cache_scheme.")
        cache.choice("type", "float", ("float",))
        cache.choice("strategy", "tensor", ("tensor",))
        cache.integer("num_bits", 8, low=8, high=8)


def _scheme(fields: Fields, group: Fields) -> Scheme:
    targets = group.values.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise group.error("targets", "must be a list of names")
    for target in targets:
        _check_pattern(group, target)
    if group.values.get("output_activations"):
        raise group.error("output_activations", "would change the output and is not supported")
    holder = group if group.values.get("format") else fields
    layout = holder.choice("format", ..., LAYOUTS)
    weights = Fields(group.values.get("weights"), group.prefix + "weights.")
    packed, is_float = layout == "pack-quantized", weights.choice("type", "int", ("int", "float")) == "float"
    bits = weights.integer("num_bits", 8)
    if bits not in ((4, 8) if packed else (8,)) or (packed and is_float):
        raise weights.error("num_bits", f"of type {'float' if is_float else 'int'} is not supported in {layout}")
    if layout in LAYOUTS[1:3] and is_float != (layout == "float-quantized"):
        raise weights.error("type", f"contradicts format {layout}")
    return _layout_of(weights, tuple(targets), packed, is_float, bits)


def _layout_of(weights: Fields, targets: tuple[str, ...], packed: bool, is_float: bool, bits: int) -> Scheme:
    strategy = weights.choice("strategy", ..., STRATEGIES)
    symmetric = weights.flag("symmetric", True)
    if (packed or not symmetric) and strategy == "block":
        raise weights.error("strategy", "is supported for symmetric weights of a byte each, only")
    if is_float and (not symmetric or strategy == "group"):
        raise weights.error("strategy", "of asymmetric or grouped FP8 is not supported")
    if weights.values.get("dynamic"):
        raise weights.error("dynamic", "is not supported for weights")
    size = _group_size(weights) if strategy == "group" else -1
    if strategy == "group" and size == -1:
        raise weights.error("group_size", "must be at least 1 for strategy group")
    order = weights.values.get("actorder")  # weight, static: only the tool's own way to them
    if order not in (None, False, True, "group", "dynamic", "weight", "static"):
        raise weights.error("actorder", "must be group, weight or null")
    scattered = order in (True, "group", "dynamic") and strategy == "group"
    block = _block(weights, "block_structure", needed=True) if strategy == "block" else None
    return Scheme(targets, packed, is_float, bits, strategy, size, symmetric, scattered, block)


def _check_pattern(group: Fields, target: str) -> None:
    try:
        re.compile(target.removeprefix("re:"))
    except re.error as error:
        raise ModelError(f"model config: {group.prefix}targets: {target!r:.60} is no regular expression") from error
