"""Quantized checkpoints of others: packed here from each format's definition, bit by bit; read; and compared.

Files that their tools made lie outside the repository (../shared/quantized); where they are there, they are read, too.
"""

import copy
import doctest
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import kernels
from kernels import reference
from kernels.packed import Packed
from minipaged import LLM, SamplingParams
from minipaged.models import ModelConfig, ModelError, load_model, open_checkpoint
from minipaged.models.gpt2 import GPT2
from minipaged.models.llama import Llama
from minipaged.models.quantized import fp8, read_method
from minipaged.models.quantized import words as words_of_bits

SHARED = Path(__file__).parents[2] / "shared" / "quantized"
LLAMA = {
    "model_type": "llama", "vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
GPT = {"model_type": "gpt2", "vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]  # which of its eight columns each four bits of a word hold


def words(codes, bits):
    """Codes [rows, n] as one long number a row, lowest first, cut into int32."""
    rows = [sum(code << bits * i for i, code in enumerate(row)) for row in codes.tolist()]
    size = -(-codes.shape[1] * bits // 32) * 4
    data = b"".join(row.to_bytes(size, "little") for row in rows)
    return torch.from_numpy(np.frombuffer(data, np.int32).reshape(len(rows), -1).copy())


@dataclass
class Quantized:
    """W [out, in] rounded to the nearest code: what any format is packed from, and what must come back."""

    codes: torch.Tensor  # [out, in]
    scale: torch.Tensor  # [out, groups]
    zero: torch.Tensor  # [out, groups]
    group: torch.Tensor  # [in]

    @property
    def exact(self):
        return self.scale.double()[:, self.group] * (self.codes - self.zero[:, self.group]).double()


def quantize(weight, bits, group, symmetric=True, dtype=torch.float16):
    """Each group from its least to its largest weight, 0 among them; symmetric: as far down as up."""
    groups = int(group.max()) + 1
    w, top = weight.double(), (1 << bits) - 1
    low, high = (torch.zeros(len(w), groups, dtype=torch.float64) for _ in range(2))
    low = low.scatter_reduce(1, group.expand(len(w), -1), w, "amin")
    high = high.scatter_reduce(1, group.expand(len(w), -1), w, "amax")
    if symmetric:
        high = torch.maximum(-low, high)
        scale = (high * 2 / top).to(dtype)
        zero = torch.full_like(low, 1 << bits - 1).long()
    else:
        scale = ((high - low) / top).to(dtype)
        zero = (-low / scale.double()).round().clamp(0, top).long()
    codes = (w / scale.double()[:, group] + zero[:, group]).round().clamp(0, top).long()
    return Quantized(codes, scale, zero, group)


@dataclass
class GPTQ:
    bits: int = 4
    size: int = 32
    symmetric: bool = True
    v2: bool = False
    order: str = "none"  # none: no g_idx; plain, scattered (equal groups), uneven

    def config(self):
        form = {"checkpoint_format": "gptq_v2"} if self.v2 else {}
        return form | {"quant_method": "gptq", "bits": self.bits, "group_size": self.size, "sym": self.symmetric,
                       "desc_act": self.order in ("scattered", "uneven")}  # fmt: skip

    def pack(self, weight):
        group = groups_of(weight, self.size, self.order)
        q = quantize(weight, self.bits, group, self.symmetric)
        stored = q.zero if self.v2 else q.zero - 1 & (1 << self.bits) - 1
        parts = {"qweight": words(q.codes, self.bits).t().contiguous(), "qzeros": words(stored.t(), self.bits),
                 "scales": q.scale.t().contiguous()}  # fmt: skip
        return q, parts if self.order == "none" else parts | {"g_idx": group.int()}


def groups_of(weight, size, order):
    columns = weight.shape[1]
    group = torch.arange(columns) // (columns if size == -1 else size)
    random = torch.Generator().manual_seed(columns)
    if order == "scattered":
        return group[torch.randperm(columns, generator=random)]
    if order == "uneven":
        group = torch.randint(int(group.max()) + 1, (columns,), generator=random)
        group[:2] = torch.tensor([0, columns // size - 1])
    return group


@dataclass
class AWQ:
    size: int = 32
    symmetric: bool = False

    def config(self):
        return {"quant_method": "awq", "bits": 4, "group_size": self.size, "zero_point": not self.symmetric,
                "version": "gemm", "modules_to_not_convert": ["lm_head"]}  # fmt: skip

    def pack(self, weight):
        q = quantize(weight, 4, groups_of(weight, self.size, "none"), self.symmetric)
        mixed = [t.t().reshape(t.shape[1], -1, 8)[..., AWQ_COLUMNS].flatten(1) for t in (q.codes, q.zero)]
        return q, {"qweight": words(mixed[0], 4), "qzeros": words(mixed[1], 4), "scales": q.scale.t().contiguous()}


@dataclass
class Compressed:
    layout: str = "pack-quantized"
    bits: int = 4
    strategy: str = "group"
    symmetric: bool = True
    actorder: str | None = None
    targets: list = field(default_factory=lambda: ["Linear"])

    def config(self):
        kind = "float" if self.layout == "float-quantized" else "int"
        weights = {"num_bits": self.bits, "type": kind, "strategy": self.strategy, "symmetric": self.symmetric,
                   "group_size": 32 if self.strategy == "group" else None, "actorder": self.actorder,
                   "block_structure": [32, 48] if self.strategy == "block" else None, "dynamic": False}  # fmt: skip
        inputs = None if self.layout == "pack-quantized" else {"dynamic": True, "strategy": "token"}
        group = {"targets": self.targets, "weights": weights, "input_activations": inputs}
        return {"quant_method": "compressed-tensors", "format": self.layout, "ignore": ["lm_head"],
                "quantization_status": "compressed", "config_groups": {"group_0": group}}  # fmt: skip

    def pack(self, weight):
        if self.layout == "float-quantized":
            return pack_fp8(weight, self.strategy, "weight_scale", (32, 48))
        order = "scattered" if self.actorder == "group" else "none"
        group = groups_of(weight, 32 if self.strategy == "group" else -1, order)
        q = quantize(weight, self.bits, group, self.symmetric)
        if self.strategy == "tensor":
            flat = quantize(weight.reshape(1, -1), self.bits, torch.zeros(weight.numel()).long(), self.symmetric)
            one = flat.scale.expand(len(weight), 1), flat.zero.expand(len(weight), 1)
            q = Quantized(flat.codes.view_as(weight), *one, group)
        half = 1 << self.bits - 1
        scale = q.scale[:1, 0] if self.strategy == "tensor" else q.scale
        parts = {"weight_scale": scale.contiguous()}
        if self.layout == "pack-quantized":
            parts |= {"weight_packed": words(q.codes, self.bits), "weight_shape": torch.tensor(weight.shape)}
            zero = words(q.zero.t(), self.bits).t().contiguous()
        else:
            parts |= {"weight": (q.codes - half).to(torch.int8)}
            zero = (q.zero - half).to(torch.int8)
        if not self.symmetric:
            plain = (q.zero[:1, 0] - half).to(torch.int8)
            parts["weight_zero_point"] = plain if self.strategy == "tensor" else zero
        return q, parts | ({"weight_g_idx": group.int()} if self.actorder == "group" else {})


@dataclass
class FP8:
    block: tuple | None = None
    strategy: str = "tensor"
    inverse: bool = False

    def config(self):
        size = list(self.block) if self.block else None
        return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": size}

    def pack(self, weight):
        name = "weight_scale_inv" if self.block or self.inverse else "weight_scale"
        return pack_fp8(weight, "block" if self.block else self.strategy, name, self.block)


@dataclass
class Floats:
    exact: torch.Tensor
    scale: torch.Tensor  # [out, in]


def pack_fp8(weight, strategy, name, block):
    rows, columns = {"tensor": weight.shape, "channel": (1, weight.shape[1]), "block": block}[strategy]
    tall, wide = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    scale = torch.empty(tall, wide)
    for i in range(tall):
        for j in range(wide):
            part = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scale[i, j] = part.abs().max() / 448
    spread = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: weight.shape[0], : weight.shape[1]]
    codes = (weight / spread).to(torch.float8_e4m3fn)
    stored = scale.reshape(1) if strategy == "tensor" else scale
    return Floats((codes.float() * spread).double(), spread), {"weight": codes, name: stored}


FORMATS = {
    "gptq 4": GPTQ(), "gptq 4 v2": GPTQ(v2=True, symmetric=False), "gptq 4 rows": GPTQ(size=-1, order="plain"),
    "gptq 4 asymmetric": GPTQ(symmetric=False), "gptq 4 desc_act": GPTQ(order="scattered", symmetric=False),
    "gptq 4 uneven": GPTQ(order="uneven", symmetric=False), "gptq 2": GPTQ(2, 16), "gptq 3": GPTQ(3, symmetric=False),
    "gptq 3 desc_act": GPTQ(3, v2=True, order="scattered"), "gptq 8": GPTQ(8), "gptq 4 odd groups": GPTQ(size=40),
    "gptq 8 v2": GPTQ(8, v2=True, symmetric=False), "awq": AWQ(), "awq symmetric rows": AWQ(-1, True),
    "packed 4": Compressed(), "packed 4 asymmetric": Compressed(symmetric=False),
    "packed 4 rows": Compressed(strategy="channel", symmetric=False), "packed 8": Compressed(bits=8, symmetric=False),
    "packed 4 actorder": Compressed(actorder="group"), "packed 4 static": Compressed(actorder="static"),
    "packed 4 one scale": Compressed(strategy="tensor", symmetric=False),
    "int8": Compressed("int-quantized", 8, "channel"), "int8 tensor": Compressed("int-quantized", 8, "tensor"),
    "int8 groups": Compressed("int-quantized", 8, "group", symmetric=False),
    "ct fp8": Compressed("float-quantized", 8, "tensor"), "ct fp8 rows": Compressed("float-quantized", 8, "channel"),
    "ct fp8 blocks": Compressed("float-quantized", 8, "block"),
    "by name": Compressed(targets=["re:.*self_attn.*", "re:.*mlp.*"]),
    "fp8": FP8(), "fp8 rows": FP8(strategy="channel"), "fp8 blocks": FP8((32, 40)), "fp8 inverse": FP8(inverse=True),
}  # fmt: skip
FLOATS = {"gptq 4 uneven", "gptq 4 odd groups", "ct fp8 blocks", "fp8 blocks"}  # no Packed has such groups


def is_linear(name):
    return name.endswith("proj.weight") or ".c_" in name and name.endswith(".weight")


def plain_weights(config=LLAMA):
    random = torch.Generator().manual_seed(0)
    architecture = GPT2 if config["model_type"] == "gpt2" else Llama
    shapes = architecture.tensor_shapes(ModelConfig.from_hf(config))
    return {name: torch.randn(shape, generator=random) / 4 for name, shape in shapes.items()}


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def make(folder, form, config=LLAMA, change=None):
    """A folder in this format, and what its weights are. change: called with all tensors before they are written."""
    weights, stored, exact = plain_weights(config), {}, {}
    for name, weight in weights.items():
        if not is_linear(name):
            stored[name] = exact[name] = weight
            continue
        across = config["model_type"] == "gpt2"
        exact[name], parts = form.pack(weight.t() if across else weight)
        stored |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()}
    if change:
        change(stored)
    return write(folder, config | {"quantization_config": form.config()}, stored), exact


@torch.no_grad()
def logits(model, tokens):
    config, count = model.config, len(tokens)
    cache = kernels.new_cache(config.num_layers, 1, 64, config.num_kv_heads, config.head_size, torch.float32)
    where = torch.arange(count), torch.tensor([0, count]), torch.tensor([count]), torch.tensor([[0]])
    ids = torch.tensor(tokens)
    return model.logits(model(ids, torch.arange(count), cache, kernels.Batch(*where)))


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(kernels, "say", lines.append)
    return lines


def test_three_bits_as_another_tool_packs_them():
    """What AutoGPTQ's packing loop makes of these codes; and eight of four bits, lowest first."""
    three = torch.tensor([0x91550308, 0xC9E399A7, 0xEB5C74A2]).to(torch.int32)
    assert words_of_bits.unpack(three, 3).tolist() == [(i * i + i // 5) % 8 for i in range(32)]
    assert words_of_bits.unpack(torch.tensor([0x76543210], dtype=torch.int32), 4).tolist() == list(range(8))


def test_doctests():
    assert doctest.testmod(words_of_bits).failed == doctest.testmod(fp8).failed == 0


@pytest.mark.parametrize("form", FORMATS)
def test_weights_come_back_to_the_bit(tmp_path, form):
    """As the definition has them in fp64; and from the weights they were made of, half a step away at most."""
    folder, exact = make(tmp_path / "m", FORMATS[form])
    checkpoint, plain = open_checkpoint(folder), plain_weights()
    for name, of in exact.items():
        weight = checkpoint.tensor(name, torch.float32)
        assert isinstance(weight, Packed) == (is_linear(name) and form not in FLOATS)
        if not is_linear(name):
            continue
        weight = weight.dequantize() if isinstance(weight, Packed) else weight
        assert torch.equal(weight.double(), of.exact), name
        error = (weight.double() - plain[name].double()).abs()
        if isinstance(of, Floats):  # three bits behind the point; below the normal numbers, of 2^-9
            assert (error <= torch.maximum(plain[name].abs() * 2**-4, of.scale * 2**-10) * 1.0001).all()
        else:  # half a step, and as scales are rounded to fp16, 2^-11 of what lies between first and last
            assert (error <= of.scale.double()[:, of.group] * (0.5 + of.codes.max() * 2**-11)).all()


@pytest.mark.parametrize("form", FORMATS)
def test_a_model_in_cpp_computes_the_same_bits_from_packed_weights(tmp_path, form):
    folder, exact = make(tmp_path / "m", FORMATS[form])
    floats = {name: of.exact.float() if is_linear(name) else of for name, of in exact.items()}
    models = [load_model(open_checkpoint(path), backend=kernels.load("cpp"))[1]
              for path in (folder, write(tmp_path / "plain", LLAMA, floats))]  # fmt: skip
    ours, theirs = (logits(model, [3, 14, 15, 9, 2]) for model in models)
    if "act" in form:  # columns in another order: so are the sums
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    else:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("form", FORMATS)
def test_a_model_computes_what_its_weights_in_floats_compute(tmp_path, form, said):
    folder, exact = make(tmp_path / "m", FORMATS[form])
    floats = {name: of.exact.float() if is_linear(name) else of for name, of in exact.items()}
    models = [load_model(open_checkpoint(path), backend=kernels.TorchBackend())[1]
              for path in (folder, write(tmp_path / "plain", LLAMA, floats))]  # fmt: skip
    assert torch.equal(*(logits(model, [3, 14, 15, 9, 2]) for model in models))
    assert len(said) == 1 and " weights are turned into fp32: " in said[0]
    why = "their groups are no equal pieces of a row" if form in FLOATS else "kernels 'torch' don't multiply from"
    assert why in said[0]


def test_gpt2_lies_across(tmp_path, said):
    folder, exact = make(tmp_path / "m", GPTQ(order="scattered", symmetric=False), GPT)
    floats = {name: of.exact.float().t() if is_linear(name) else of for name, of in exact.items()}
    models = [load_model(open_checkpoint(path), backend=kernels.TorchBackend())[1]
              for path in (folder, write(tmp_path / "plain", GPT, floats))]  # fmt: skip
    assert torch.equal(*(logits(model, [3, 14, 15]) for model in models))
    assert said == ["GPTQ weights are turned into fp32: kernels 'torch' don't multiply from packed ones"]
    with pytest.raises(ModelError, match="quant_method='awq' is not supported for GPT-2"):
        open_checkpoint(write(tmp_path / "awq", GPT | {"quantization_config": AWQ().config()}, floats))


def test_a_backend_that_multiplies_from_them_gets_them_packed(tmp_path, said):
    taken = []

    class Packing(kernels.TorchBackend):
        def packs(self, weight):
            return weight.bits == 4

        def linear(self, weight, bias=None):
            taken.append(weight)
            return lambda x, add_to=None: reference.packed_linear(x, weight, bias)

    folder, _ = make(tmp_path / "m", GPTQ(), GPT)
    load_model(open_checkpoint(folder), torch.bfloat16, backend=Packing())
    assert [isinstance(weight, Packed) for weight in taken] == [True] * 8 + [False] and not said  # the last: the head
    assert all(weight.zero == 8 and weight.scale.dtype == torch.float16 for weight in taken[:-1])
    folder, _ = make(tmp_path / "m", GPTQ(8), GPT)
    taken.clear()
    load_model(open_checkpoint(folder), torch.bfloat16, backend=Packing())
    assert {weight.dtype for weight in taken} == {torch.bfloat16}
    assert said == ["GPTQ weights are turned into bf16: kernels 'torch' don't multiply from packed ones"]


def test_layers_left_alone_are_used_as_they_are_and_a_head_may_be_quantized(tmp_path, said):
    form = AWQ()
    head, parts = form.pack(plain_weights()["lm_head.weight"])

    def change(stored):
        name = "model.layers.1.mlp.up_proj"
        for part in ("qweight", "qzeros", "scales"):
            del stored[f"{name}.{part}"]
        stored[f"{name}.weight"] = plain_weights()[f"{name}.weight"]
        del stored["lm_head.weight"]
        stored.update({f"lm_head.{part}": tensor for part, tensor in parts.items()})

    folder, exact = make(tmp_path / "m", form, change=change)
    floats = {name: of.exact.float() if is_linear(name) else of for name, of in exact.items()}
    floats["model.layers.1.mlp.up_proj.weight"] = plain_weights()["model.layers.1.mlp.up_proj.weight"]
    floats["lm_head.weight"] = head.exact.float()
    models = [load_model(open_checkpoint(path), backend=kernels.TorchBackend())[1]
              for path in (folder, write(tmp_path / "plain", LLAMA, floats))]  # fmt: skip
    assert torch.equal(*(logits(model, [3, 14, 15]) for model in models))


def test_the_config_may_lie_beside_it(tmp_path):
    """AutoGPTQ's quantize_config.json, which does not name its method; and an empty sparsity or dynamic is none."""
    folder, exact = make(tmp_path / "m", GPTQ(symmetric=False))
    (folder / "config.json").write_text(json.dumps(LLAMA))
    values = GPTQ(symmetric=False).config() | {"dynamic": {"-:.*down.*": {}}}
    del values["quant_method"]
    (folder / "quantize_config.json").write_text(json.dumps(values))
    name = "model.layers.0.mlp.down_proj.weight"
    weight = open_checkpoint(folder).tensor(name, torch.float32)
    assert torch.equal(weight.dequantize().double(), exact[name].exact)


def test_scales_of_a_cache_come_with_the_weights(tmp_path, said):
    scales = {f"model.layers.{n}.self_attn.{kind}_scale": torch.tensor([0.3]) for n in range(2) for kind in "kv"}
    folder, _ = make(tmp_path / "m", FP8(), change=lambda stored: stored.update(scales))
    load_model(open_checkpoint(folder), torch.bfloat16, backend=kernels.TorchBackend())
    other = {"model.layers.0.self_attn.k_scale": torch.ones(4)}
    folder, _ = make(tmp_path / "m", FP8(), change=lambda stored: stored.update(other))
    with pytest.raises(ModelError, match=r"not known to the model: model.layers.0.self_attn.k_scale"):
        load_model(open_checkpoint(folder))


CT, GROUP = Compressed().config(), Compressed().config()["config_groups"]["group_0"]


def ct(**changes):
    return CT | {"config_groups": {"group_0": GROUP | {"weights": GROUP["weights"] | changes}}}


REFUSED = [  # quantization_config, what the error says
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method='bitsandbytes' must be one of gptq, awq"),
    ({"load_in_8bit": True}, "quantization_config.quant_method is missing"),
    ({"quant_method": "hqq"}, "quant_method='hqq'"),
    ({"quant_method": "mxfp4"}, "quant_method='mxfp4'"),
    ([1], "quantization_config must be a JSON object"),
    (GPTQ().config() | {"is_marlin_format": True}, "is_marlin_format=True"),
    (GPTQ().config() | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin' must be one of gptq, gptq_v2"),
    (GPTQ().config() | {"checkpoint_format": "gptq_p"}, "checkpoint_format='gptq_p'"),
    (GPTQ().config() | {"checkpoint_format": "gptq", "format": "gptq_v2"}, "contradicts format='gptq_v2'"),
    (GPTQ().config() | {"bits": 5}, "bits=5 must be 2, 3, 4 or 8"),
    (GPTQ().config() | {"bits": "4"}, "bits='4' must be an integer"),
    (GPTQ().config() | {"group_size": 0}, "group_size=0 must be -1"),
    (GPTQ().config() | {"group_size": -2}, "group_size=-2"),
    (GPTQ().config() | {"pack_dtype": "int64"}, "pack_dtype='int64'"),
    (GPTQ().config() | {"desc_act": "yes"}, "desc_act='yes' must be true or false"),
    (GPTQ().config() | {"dynamic": {"+:.*mlp.*": {"bits": 8}}}, "dynamic="),
    (GPTQ().config() | {"rotation": "hadamard"}, "rotation='hadamard'"),
    (AWQ().config() | {"version": "gemv"}, "version='gemv' must be one of gemm"),
    (AWQ().config() | {"version": "marlin"}, "version='marlin'"),
    (AWQ().config() | {"bits": 8}, "bits=8 must be 4"),
    (FP8().config() | {"weight_block_size": [128, 0]}, "weight_block_size=[128, 0] must be two numbers"),
    (FP8().config() | {"fmt": "e5m2"}, "fmt='e5m2'"),
    (CT | {"format": "marlin-24"}, "format='marlin-24'"),
    (CT | {"format": "nvfp4-pack-quantized"}, "format='nvfp4-pack-quantized'"),
    (CT | {"quantization_status": "frozen"}, "quantization_status='frozen'"),
    (CT | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config="),
    (CT | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config="),
    (CT | {"kv_cache_scheme": {"type": "int", "num_bits": 8}}, "kv_cache_scheme.type='int'"),
    (CT | {"config_groups": {}}, "config_groups={} names no layers"),
    (CT | {"config_groups": {"a": GROUP | {"targets": "Linear"}}}, "config_groups.a.targets='Linear' must be a list"),
    (CT | {"config_groups": {"a": GROUP | {"targets": ["re:("]}}}, "'re:(' is no regular expression"),
    (CT | {"config_groups": {"a": GROUP | {"output_activations": {"num_bits": 8}}}}, "output_activations="),
    (ct(num_bits=3), "weights.num_bits=3"),
    (ct(type="float"), "weights.num_bits=4 of type float"),
    (ct(strategy="tensor_group"), "weights.strategy='tensor_group'"),
    (ct(group_size=0), "weights.group_size=0"),
    (ct(group_size=-1), "weights.group_size=-1 must be at least 1"),
    (ct(actorder="random"), "weights.actorder='random'"),
    (ct(dynamic=True), "weights.dynamic=True"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_is_not_known_is_refused_by_name_before_weights_are_opened(tmp_path, values, message):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": values}))
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ModelError) as refusal:
        open_checkpoint(tmp_path)
    assert message in str(refusal.value)


X = "model.layers.1.self_attn.k_proj"


def lacks(part):
    return lambda stored: stored.pop(f"{X}.{part}")


def has(part, value):
    def change(stored):
        tensor = stored.get(f"{X}.{part}")
        stored[f"{X}.{part}"] = value(tensor) if callable(value) else value

    return change


def spoiled(number):
    return lambda tensor: torch.cat((tensor.flatten()[:-1], torch.tensor([number]).to(tensor.dtype))).view(tensor.shape)


MALFORMED = [  # format, what is done to layer X, what the error says; known from headers alone
    (GPTQ(), lacks("scales"), f"{X}.scales is missing, although the layer is quantized: it has qweight, qzeros"),
    (GPTQ(), lacks("qweight"), f"{X}.qweight is missing"),
    (GPTQ(), lacks("qzeros"), f"{X}.qzeros is missing"),
    (GPTQ(order="scattered"), lacks("g_idx"), f"{X}.g_idx is missing"),
    (GPTQ(), has("weight", torch.ones(32, 64)), f"{X}.weight is there twice"),
    (GPTQ(), has("scales", torch.ones(3, 32).half()), f"{X}.scales is (3, 32) and should be (2, 32)"),
    (GPTQ(), has("scales", torch.ones(2, 32).int()), f"{X}.scales is I32 and should be F16 or BF16 or F32"),
    (GPTQ(), has("scales", torch.ones(0, 32).half()), f"{X}.scales is (0, 32): empty"),
    (GPTQ(), has("qzeros", torch.ones(2, 8).int()), f"{X}.qzeros is (2, 8) and should be (2, 4)"),
    (GPTQ(), has("qweight", lambda q: q.float()), f"{X}.qweight is F32 and should be I32"),
    (GPTQ(), has("qweight", lambda q: q[0]), f"{X}.qweight is (32,) and should have 2 dimensions"),
    (GPTQ(), has("qweight", lambda q: q[:4]), f"{X}.scales is (2, 32) and should be (1, 32)"),
    (GPTQ(3), has("qweight", lambda q: q[:5]), f"{X}.qweight is (5, 32): no whole number of 3-bit codes"),
    (GPTQ(3), has("qweight", lambda q: q[:, :16]), f"{X}.qzeros can't hold 16 zero points of 3 bits"),
    (GPTQ(order="plain"), has("g_idx", torch.zeros(63).int()), f"{X}.g_idx is (63,) and should be (64,)"),
    (AWQ(), lacks("qzeros"), f"{X}.qzeros is missing"),
    (AWQ(), has("scales", torch.ones(2, 64).half()), f"{X}.scales is (2, 64) and should be (2, 32)"),
    (AWQ(), has("qweight", lambda q: q[:50]), "50 inputs are no whole number of groups of 32"),
    (Compressed(), lacks("weight_scale"), f"{X}.weight_scale is missing"),
    (Compressed(), lacks("weight_packed"), f"{X}.weight_packed is missing"),
    (Compressed(), lacks("weight_shape"), f"{X}.weight_shape is missing"),
    (Compressed(), has("weight", torch.ones(32, 64)), f"{X}.weight is there twice"),
    (Compressed(), has("weight_shape", torch.tensor([32, 96])), "weight_packed is (32, 8) and should be (32, 12)"),
    (Compressed(), has("weight_shape", torch.tensor([32, -1])), f"{X}.weight_shape says (32, -1)"),
    (Compressed(), has("weight_scale", torch.ones(32, 1)), f"{X}.weight_scale is (32, 1) and should be (32, 2)"),
    (Compressed(symmetric=False), lacks("weight_zero_point"), f"{X}.weight_zero_point is missing"),
    (Compressed(actorder="group"), lacks("weight_g_idx"), f"{X}.weight_g_idx is missing"),
    (replace(Compressed(), targets=["re:.*mlp"]), lambda stored: None, "none of config_groups names its layer"),
    (Compressed("int-quantized", 8, "channel"), has("weight", lambda w: w.view(torch.float8_e4m3fn)), "should be I8"),
    (Compressed("int-quantized", 8, "channel"), lacks("weight"), f"{X}.weight is missing"),
    (FP8(), lacks("weight_scale"), f"{X}.weight_scale is missing"),
    (FP8(), has("weight", lambda w: w.view(torch.uint8).view(torch.float8_e5m2)), "is F8_E5M2 and should be F8_E4M3"),
    (FP8((32, 40)), has("weight_scale_inv", torch.ones(2, 1)), f"{X}.weight_scale_inv is (2, 1) and should be (1, 2)"),
    (FP8(strategy="channel"), has("weight_scale", torch.ones(31, 1)), f"{X}.weight_scale is (31, 1) and should be"),
    (GPTQ(), lambda s: s.update({"model.embed_tokens.qweight": torch.ones(8, 48).int()}), "quantized embeddings"),
]


@pytest.mark.parametrize(("form", "change", "message"), MALFORMED, ids=[message[-40:] for *_, message in MALFORMED])
def test_malformed_layers_are_refused_by_name_before_weights_are_read(tmp_path, form, change, message):
    folder, _ = make(tmp_path / "m", form, change=change)
    with pytest.raises(ModelError) as refusal:
        open_checkpoint(folder)
    assert message in str(refusal.value)


WHOLE = [  # as above, known once its names and shapes are compared with the model's
    (GPTQ(), lambda s: [s.pop(f"{X}.{part}") for part in ("qweight", "qzeros", "scales")], f"missing: {X}.weight"),
    (FP8(), has("weight", lambda w: w[:, :32]), f"{X}.weight is (32, 32) and should be (32, 64)"),
]
READ = [  # as above, known once the tensor is read
    (GPTQ(), has("scales", spoiled(float("nan"))), f"{X}.scales holds NaN or infinity"),
    (AWQ(), has("scales", spoiled(float("inf"))), f"{X}.scales holds NaN or infinity"),
    (Compressed(), has("weight_scale", spoiled(float("nan"))), f"{X}.weight_scale holds NaN"),
    (FP8(), has("weight_scale", spoiled(float("nan"))), f"{X}.weight_scale holds NaN"),
    (FP8((32, 40)), has("weight_scale_inv", spoiled(float("inf"))), f"{X}.weight_scale_inv holds NaN"),
    (FP8(), has("weight", lambda w: w.view(torch.uint8).fill_(255).view(w.dtype)), f"{X}.weight holds NaN"),
    (GPTQ(order="plain"), has("g_idx", spoiled(2)), f"{X}.g_idx names groups from 0 to 2, and there are 0 to 1"),
    (GPTQ(order="plain"), has("g_idx", spoiled(-1)), f"{X}.g_idx names groups from -1 to 1"),
    (Compressed(actorder="group"), has("weight_g_idx", spoiled(9)), f"{X}.weight_g_idx names groups from 0 to 9"),
]


@pytest.mark.parametrize(("form", "change", "message"), WHOLE + READ, ids=[m[-40:] for *_, m in WHOLE + READ])
def test_malformed_contents_are_refused_by_name(tmp_path, form, change, message):
    folder, _ = make(tmp_path / "m", form, change=change)
    with pytest.raises(ModelError) as refusal:
        load_model(open_checkpoint(folder), backend=kernels.TorchBackend())
    assert message in str(refusal.value)


def test_zero_points_wrap(tmp_path):
    """A zero point of 0 is stored as -1, all ones: it comes back as 0, not as 2^bits."""
    form = GPTQ(symmetric=False)
    folder, _ = make(tmp_path / "m", form, change=has("qzeros", torch.full((2, 4), -1, dtype=torch.int32)))
    assert open_checkpoint(folder).tensor(f"{X}.weight", torch.float32).zero == 0


MADE = json.loads((SHARED / "expected.json").read_text())["checkpoints"] if SHARED.is_dir() else []


@pytest.mark.parametrize("name", MADE)
def test_checkpoints_that_others_made(name, said):
    known = json.loads((SHARED / "expected.json").read_text())
    expected, prompt = known["checkpoints"][name], known["prompt"]
    ours, plain = open_checkpoint(SHARED / name), load_file(SHARED / "tiny" / "model.safetensors")
    errors = [0.0]
    for stored in ours.layers:
        weight = ours.tensor(stored, torch.float32)
        errors.append(float((weight.dequantize() - plain[stored]).norm() / plain[stored].norm()))
    assert max(errors) == pytest.approx(expected["relative_error_of_weights"], abs=6e-5)
    model = load_model(ours, backend=kernels.TorchBackend())[1]
    assert logits(model, prompt)[-1, :8].tolist() == pytest.approx(expected["logits"], abs=2e-5)
    llm = LLM(str(SHARED / name), dtype="float32", device="cpu", kernels="torch", num_blocks=8)
    params = SamplingParams(temperature=0, max_tokens=len(expected["greedy"]), ignore_eos=True)
    answer = llm.generate({"prompt_token_ids": prompt}, params)[0]
    assert answer.outputs[0].token_ids == expected["greedy"]
    assert (name == "tiny") == (not said) == (not ours.layers)


JSON = [None, True, False, -1, 0, 1, 4, 10**400, math.nan, "", "gptq", "group", [], [1], [[1]], {}, {"a": 1}]


@given(st.data())
def test_any_quantization_config_is_read_or_refused(data):
    known = [form.config() for form in FORMATS.values()]
    values = copy.deepcopy(data.draw(st.sampled_from(known)))
    group = values.get("config_groups", {}).get("group_0")
    places = [values, group, group["weights"]] if group else [values]
    for place in data.draw(st.lists(st.sampled_from(range(len(places))), max_size=3)):
        places[place][data.draw(st.sampled_from(sorted(places[place])))] = data.draw(st.sampled_from(JSON))
    try:
        read_method(LLAMA | {"quantization_config": values}, Path("nowhere"))
    except ModelError as error:
        assert str(error).startswith("model config: quantization_config")


@pytest.mark.parametrize("shape", ["LLAMA", "GPT"])
def test_triton_multiplies_from_them(tmp_path, said, shape):
    pytest.importorskip("triton", reason="Triton is not installed")
    try:
        backend = kernels.load("triton", "cpu")
    except kernels.Unavailable as error:
        pytest.skip(str(error))
    backend.packs = lambda weight: True  # as on a GPU
    folder, _ = make(tmp_path / "m", GPTQ(order="scattered", symmetric=False, size=16), globals()[shape])
    one, other = (load_model(open_checkpoint(folder), backend=b)[1] for b in (backend, kernels.TorchBackend()))
    assert one.layers[0].qkv.codes.dtype == torch.uint8 and len(said) == 1  # of the other
    torch.testing.assert_close(logits(one, [3, 14, 15]), logits(other, [3, 14, 15]), rtol=1e-4, atol=1e-4)
