"""A model in parts: what each rank has of it, what it reads for that, and that together they compute the same.

Ranks are threads here (thread_ranks.py); the oracle is one process with the whole model.
"""

import doctest
import math
import sys
from dataclasses import replace
from itertools import pairwise

import gguf
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from test_packed import blocks, float8, from_gguf, grouped
from test_quantized_checkpoints import FORMATS, GPT, GPTQ, LLAMA, MADE, SHARED, make, plain_weights, write
from thread_ranks import on_ranks

import kernels
from kernels.packed import Packed, floats, quantize
from minipaged.models import ModelConfig, ModelError, Ranks, load_ends, load_model, open_checkpoint, split
from minipaged.models import gguf as gguf_checkpoint
from minipaged.models.gpt2 import GPT2
from minipaged.models.head import head_of, load_head, output_rows
from minipaged.models.llama import Llama
from minipaged.models.ranks import ALONE, row_parallel, vocab_parallel
from minipaged.models.split import Part, Split, cut, shares

TOKENS = [3, 14, 15, 9, 2, 6, 5, 35]
# Two layers each; heads and groups, and what is special about them.
QWEN2 = LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True, "sliding_window": None}
MODELS = {
    "llama 4 in 2": LLAMA,
    "llama 9 in 3, tied": LLAMA | {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8, "vocab_size": 49,
                                   "tie_word_embeddings": True},
    "llama 6 in 1, all biases": LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 8,
                                         "attention_bias": True, "mlp_bias": True},
    "mistral 8 in 4": LLAMA | {"model_type": "mistral", "num_attention_heads": 8, "num_key_value_heads": 4,
                               "sliding_window": None, "intermediate_size": 90},
    "qwen2 5 in 5": QWEN2 | {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 80},
    "qwen2 4 in 2": QWEN2,
    "qwen3 4 in 2": LLAMA | {"model_type": "qwen3", "head_dim": 16},
    "gpt2 4": GPT | {"vocab_size": 51},
    "gpt2 5, untied": GPT | {"n_head": 5, "n_embd": 40, "n_inner": 100, "tie_word_embeddings": False},
}  # fmt: skip


@pytest.fixture(scope="module", params=["torch", "cpp"])
def backend(request):
    try:
        return kernels.load(request.param)
    except kernels.Unavailable as error:
        pytest.skip(str(error))


def states(model, tokens):
    """Hidden states of a prompt and of two steps behind it, and their logits: what a rank computes."""
    config, table = model.config, torch.tensor([[2, 0, 1]])
    cache = kernels.new_cache(config.num_layers, 3, 8, config.num_kv_heads, config.head_size, torch.float32)
    hidden = []
    for begin, end in pairwise([0, len(tokens) - 2, len(tokens) - 1, len(tokens)]):
        positions = torch.arange(begin, end)
        slots = table[0][positions // 8] * 8 + positions % 8
        batch = kernels.Batch(slots, torch.tensor([0, end - begin]), torch.tensor([end]), table)
        hidden.append(model(torch.tensor(tokens[begin:end]), positions, cache, batch))
    return torch.cat(hidden), model.logits(torch.cat(hidden))


def compare(path, size, backend, quantization="auto", tokens=TOKENS, tolerance=1e-4):
    """All ranks against one process; returns the ranks' models."""

    def work(ranks):
        _, model = load_model(open_checkpoint(path), backend=backend, quantization=quantization, ranks=ranks)
        return model, *states(model, tokens)

    [(_, hidden, logits)], _ = on_ranks(1, work)
    results, meeting = on_ranks(size, work)
    models = [model for model, _, _ in results]
    torch.testing.assert_close(results[0][2], logits, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(results[0][1], hidden, atol=tolerance, rtol=tolerance)
    assert all(torch.equal(ours, results[0][1]) for _, ours, _ in results), "the same bits on all ranks"
    layers = models[0].config.num_layers
    assert (meeting.sums, meeting.gathers) == (3 * (2 * layers + 1), 1)  # of three steps: two a layer, one embedding
    return models


# Who has what


def test_doctests():
    assert doctest.testmod(split).failed == 0 and doctest.testmod(split).attempted >= 8


def config_of(heads, groups, mlp=96, vocab=48, gpt2=False):
    sizes = {"num_attention_heads": heads, "num_key_value_heads": groups, "intermediate_size": mlp, "vocab_size": vocab}
    if gpt2:
        return ModelConfig.from_hf(GPT | {"n_head": heads, "n_embd": 8 * heads, "n_inner": mlp, "vocab_size": vocab})
    return ModelConfig.from_hf(LLAMA | sizes | {"head_dim": 8})


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 400), st.integers(1, 400), st.integers(1, 80))
def test_every_rank_has_something_and_all_have_all(groups, of_a_group, mlp, vocab, size):
    config = config_of(groups * of_a_group, groups, mlp, vocab)
    if size > min(config.num_heads, mlp, vocab):
        with pytest.raises(ModelError, match=f"at most {min(config.num_heads, mlp, vocab)} ranks"):
            Split(config, 0, size)
        return
    ranks = [Split(config, rank, size) for rank in range(size)]
    for what, total in (("heads", config.num_heads), ("mlp", mlp), ("vocabulary", vocab)):
        own = [getattr(rank, what) for rank in ranks]
        assert all(own) and [i for share in own for i in share] == [*range(total)], what
    for rank in ranks:
        assert {head // of_a_group for head in rank.heads} == {*rank.groups}
        assert len(rank.heads) % len(rank.groups) == 0
        assert (len(rank.groups) == 1) if size >= groups else (len(rank.heads) == len(rank.groups) * of_a_group)
        assert rank.local.num_heads == len(rank.heads) and rank.local.vocab_size == vocab
    counts = [len(rank.heads) for rank in ranks]
    assert max(counts) - min(counts) <= (of_a_group if size < groups else 1 + of_a_group // (size // groups))


@given(st.integers(1, 20000), st.integers(1, 12))
def test_shares_are_even_and_in_whole_units(total, size):
    assume(total >= size)
    lengths = [len(share) for share in shares(total, size)]
    assert max(lengths) - min(lengths) <= max(1, total / size / 8) or max(lengths) - min(lengths) == 32
    if total % 32 == 0 and total >= 32 * size:
        assert all(length % 32 == 0 for length in lengths)
    assert lengths == sorted(lengths, reverse=True)


def test_shares_keep_groups_whole_where_that_costs_little():
    assert [len(s) for s in shares(1536, 2)] == [768, 768]
    assert [len(s) for s in shares(1536, 9)] == [192] * 3 + [160] * 6
    assert [len(s) for s in shares(14336, 4)] == [3584] * 4
    assert [len(s) for s in shares(11008, 2)] == [22 * 256, 21 * 256]  # of 256: groups of a K-quant


def test_too_many_ranks_are_refused_with_the_numbers(tmp_path):
    folder = write(tmp_path / "m", LLAMA, plain_weights())

    with pytest.raises(ModelError) as error:
        load_model(open_checkpoint(folder), ranks=alone_as(0, 10))
    assert str(error.value) == (
        "tensor_parallel_size=10 is too large: the model has 4 query heads in 2 groups, an MLP 96 wide and 48 tokens; "
        "at most 4 ranks have something of each"
    )
    with pytest.raises(ModelError, match="rank 2 of 2: ranks are counted from 0"):
        Split(config_of(4, 2), 2, 2)


@pytest.mark.parametrize("config", [config_of(9, 3), config_of(8, 8, gpt2=True)])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_parts_have_the_shapes_that_the_local_model_takes(config, size):
    """And together all of each tensor, keys and values perhaps several times; a bias behind a sum once."""
    architecture = GPT2 if config.architecture == "gpt2" else Llama
    covered = {name: torch.zeros(shape, dtype=torch.int) for name, shape in architecture.tensor_shapes(config).items()}
    for rank in range(size):
        part_of = Split(config, rank, size)
        for name, counts in covered.items():
            part = part_of.part(name)
            if part_of.keeps(name):
                counts += 1 if part is None else mask_of(part, counts.shape)
    for name, counts in covered.items():
        [least, most] = [int(counts.min()), int(counts.max())]
        if "norm" in name or ".ln_" in name or "wpe" in name:
            assert least == most == size
        elif "k_proj" in name or "v_proj" in name:
            assert least >= 1 and (most == 1 or size > config.num_kv_heads)
        else:
            assert least == most == 1, name


def mask_of(part, shape):
    mask = torch.zeros(shape, dtype=torch.int)
    for own in part.ranges:
        mask.narrow(part.axis, own.start, len(own)).fill_(1)
    return mask


# Columns of small numbers


def scattered(packed):
    order = torch.randperm(packed.codes.shape[1], generator=torch.Generator().manual_seed(1))
    return replace(packed, order=order)


PACKED = {
    **{kind: from_gguf(kind, 5, 512) for kind in ("Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")},
    "groups of 64, zeros": grouped(5, 512, 4, 64, True, True), "groups of 128": grouped(5, 512, 8, 128, False, False),
    "rows": grouped(5, 512, 8, 512, True, True), "fp8": float8(5, 512), "in order": scattered(float8(5, 512)),
    "groups in order": scattered(grouped(5, 512, 4, 64, True, True)),
    "int4": quantize(torch.randn(5, 512, generator=torch.Generator().manual_seed(0)), 4),
}  # fmt: skip


@given(
    st.sampled_from([*PACKED]), st.integers(0, 511), st.integers(1, 512), st.booleans(), st.sampled_from([1, 32, 256])
)
def test_columns_are_those_of_a_matrix_to_the_bit(name, begin, end, across, unit):
    begin, end = begin // unit * unit, -(-end // unit) * unit
    assume(begin < end)
    packed = replace(PACKED[name], across=across)
    part = packed.columns(begin, end)
    whole = packed.dequantize()
    expected = whole[begin:end] if across else whole[:, begin:end]
    assert part.shape == expected.shape and torch.equal(floats(part), expected)
    assert isinstance(part, Packed) or "groups in order" in name
    assert torch.equal(floats(cut(packed, Part(0 if across else 1, (range(begin, end),)))), expected)
    if isinstance(part, Packed):
        assert stored_bytes([part]) <= part.codes.numel() * (1 + 3 * 4 / math.gcd(16, part.group_size) + 8)
        size = packed.group_size
        in_one = begin // size == (end - 1) // size  # then one scale a row is enough
        assert part.group_size == (end - begin if in_one else math.gcd(size, begin, end)) or packed.order is not None
        assert (part.outer is not None) == (packed.outer is not None and begin % 256 == end % 256 == 0)


def test_groups_that_are_cut_into_equal_pieces_stay_small_numbers():
    """desc_act: of each group of 4, columns 0 to 7 hold two. And where they don't: floats."""
    codes = torch.randint(0, 16, (3, 16), dtype=torch.uint8)
    order = torch.tensor([0, 8, 1, 9, 10, 2, 11, 3, 12, 4, 5, 13, 6, 7, 14, 15])
    packed = Packed(codes, 4, torch.rand(3, 4), 8, order=order)
    part = packed.columns(0, 8)
    assert isinstance(part, Packed) and part.group_size == 2
    assert torch.equal(part.dequantize(), packed.dequantize()[:, :8])
    assert isinstance(packed.columns(0, 7), torch.Tensor)


def stored_bytes(weights):
    """Of all that lies behind these tensors, each storage counted once."""
    tensors = []
    for weight in weights:
        if isinstance(weight, Packed):
            weight._each(lambda tensor: tensors.append(tensor) or tensor)
        else:
            tensors.append(weight)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


# The same numbers


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_ranks_compute_what_one_process_does(tmp_path, backend, name, size):
    config = MODELS[name]
    compare(write(tmp_path / "m", config, plain_weights(config)), size, backend)


@pytest.mark.parametrize(("name", "size"), [("llama 9 in 3, tied", 9), ("llama 6 in 1, all biases", 5)])
def test_groups_are_repeated_when_there_are_more_ranks(tmp_path, name, size):
    config = MODELS[name]
    models = compare(write(tmp_path / "m", config, plain_weights(config)), size, kernels.TorchBackend())
    assert {model.config.num_kv_heads for model in models} == {1}
    assert sum(model.config.num_heads for model in models) == config["num_attention_heads"]


@pytest.mark.parametrize("name", ["llama 9 in 3, tied", "qwen2 4 in 2", "gpt2 4"])
def test_in_bf16_too(tmp_path, name):
    folder = write(tmp_path / "m", MODELS[name], plain_weights(MODELS[name]))

    def work(ranks):
        backend = kernels.load("torch", dtype=torch.bfloat16)
        _, model = load_model(open_checkpoint(folder), torch.bfloat16, backend=backend, ranks=ranks)
        return states(model, TOKENS)[0]

    [whole], _ = on_ranks(1, work)
    results, _ = on_ranks(3, work)
    assert all(torch.equal(hidden, results[0]) and hidden.dtype == whole.dtype for hidden in results)
    assert (results[0] - whole).norm() < 0.03 * whole.norm()


def test_alone_nothing_is_there(tmp_path):
    """No wrapper, and the dict that the checkpoint gave: what one process does is what it did."""
    linear, rows = object(), object()
    assert row_parallel(linear, ALONE) is linear and vocab_parallel(rows, linear, 48, ALONE) == (rows, linear)
    config = ModelConfig.from_hf(LLAMA)
    assert Split(config).local == config
    assert all(Split(config).part(name) is None and Split(config).keeps(name) for name in Llama.tensor_shapes(config))
    whole, model = load_model(open_checkpoint(write(tmp_path / "m", LLAMA, plain_weights())))
    assert whole == model.config


# Files of others


@pytest.mark.parametrize("form", FORMATS)
def test_quantized_models_in_parts(tmp_path, form):
    """Slices are slices of the whole to the bit, and together they compute what one process does."""
    folder, _ = make(tmp_path / "m", FORMATS[form])
    check_slices(open_checkpoint(folder), Llama)
    compare(folder, 2, kernels.load("cpp"))


@pytest.mark.parametrize("form", [GPTQ(), GPTQ(8, 16), GPTQ(3), GPTQ(order="scattered", symmetric=False)])
def test_slices_of_matrices_that_lie_across(tmp_path, form):
    folder, _ = make(tmp_path / "m", form, GPT)
    check_slices(open_checkpoint(folder), GPT2)


WIDE = LLAMA | {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4,
                "head_dim": 64, "vocab_size": 100}  # fmt: skip
WIDE_GPT = GPT | {"n_embd": 256, "n_head": 8, "n_inner": 768, "vocab_size": 101}
KINDS = ["F16", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [WIDE, WIDE_GPT], ids=["llama", "gpt2"])
def test_slices_of_gguf_files(tmp_path, kind, config):
    check_slices(open_checkpoint(make_gguf(tmp_path / "m.gguf", config, kind)), architecture_of(config))


def architecture_of(config):
    return GPT2 if config["model_type"] == "gpt2" else Llama


def check_slices(checkpoint, architecture):
    """Every part of every tensor, of 2 and 3 ranks, to the bit; and small numbers where the whole has them."""
    config = ModelConfig.from_hf(checkpoint.config)
    for stored, name in checkpoint.names(architecture.tensor_shapes(config)).items():
        whole = checkpoint.tensor(stored, torch.float32)
        for size in (2, 3):
            for part in (Split(config, rank, size).part(name) for rank in range(size)):
                if part is not None:
                    own = checkpoint.tensor(stored, torch.float32, part)
                    assert torch.equal(floats(own), floats(cut(floats(whole), part))), (name, part)
                    assert isinstance(own, Packed) == isinstance(whole, Packed) or whole.order is not None, name


def make_gguf(path, config, kind):
    """Small random weights of this kind, if their rows are whole blocks of it; else Q8_0. No tokenizer."""
    keys = gguf_checkpoint.GPT2_KEYS if config["model_type"] == "gpt2" else gguf_checkpoint.LLAMA_KEYS
    writer, name = gguf.GGUFWriter(path, config["model_type"]), config["model_type"]
    for key, field in keys.items():
        if field in config:
            writer.add_uint32(f"{name}.{key}", config[field])
    writer.add_float32(f"{name}.attention.layer_norm{'' if name == 'gpt2' else '_rms'}_epsilon", 1e-5)
    table = gguf.get_tensor_name_map(gguf_checkpoint.ARCHITECTURES[name], 2)
    for seed, (tensor, weight) in enumerate(plain_weights(config).items()):
        type_, weight = gguf.GGMLQuantizationType.F32, weight.t() if ".c_" in tensor else weight
        data = weight.contiguous().numpy() / 4
        if weight.dim() == 2:
            type_ = gguf.GGMLQuantizationType[kind if weight.shape[1] % 256 == 0 or "K" not in kind else "Q8_0"]
            scale = {"F16": None, "Q4_1": 0.01, "Q5_0": 0.01, "Q8_0": 1e-3, "Q4_K": 1e-4, "Q6_K": 1e-4}[type_.name]
            data = blocks(type_.name, *weight.shape, seed, scale) if scale else gguf.quants.quantize(data, type_)
        writer.add_tensor(table.get_name(tensor, (".weight", ".bias")), data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SIZES = [("F16", 3), ("Q4_1", 2), ("Q5_0", 3), ("Q4_K", 2), ("Q4_K", 3), ("Q6_K", 3)]


@pytest.mark.parametrize(("kind", "size"), SIZES)
@pytest.mark.parametrize("config", [WIDE, WIDE_GPT], ids=["llama", "gpt2"])
def test_gguf_models_in_parts(tmp_path, config, kind, size):
    compare(make_gguf(tmp_path / "m.gguf", config, kind), size, kernels.load("cpp"))


@pytest.mark.parametrize("form", ["awq", "gptq 4 asymmetric", "packed 8", "fp8 rows"])
def test_a_quantized_output_projection_in_parts(tmp_path, form):
    """Its parts end where no word of its zero points does."""
    config = LLAMA | {"vocab_size": 56}
    parts = FORMATS[form].pack(plain_weights(config)["lm_head.weight"])[1]

    def change(stored):
        del stored["lm_head.weight"]
        stored.update({f"lm_head.{part}": tensor for part, tensor in parts.items()})

    folder, _ = make(tmp_path / "m", FORMATS[form], config, change)
    check_slices(open_checkpoint(folder), Llama)
    compare(folder, 3, kernels.load("cpp"))


def test_of_several_ranks_one_says_what_became_of_weights(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(kernels, "say", said.append)
    folder, _ = make(tmp_path / "m", FORMATS["gptq 4 desc_act"])
    compare(folder, 2, kernels.load("cpp"))
    assert said == ["GPTQ weights are turned into fp32: their groups are no equal pieces of a row"]


@pytest.mark.parametrize("name", MADE)
def test_checkpoints_that_others_made_in_parts(name):
    models = compare(SHARED / name, 3, kernels.load("cpp"))
    assert all(model.packed == (name != "tiny") for model in models)
    check_slices(open_checkpoint(SHARED / name), Llama)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama 4 in 2", "mistral 8 in 4", "gpt2 4"])
def test_weights_are_rounded_to_the_codes_of_one_process(tmp_path, caught, name, quantization):
    config, backend = MODELS[name], kernels.load("cpp")
    folder = write(tmp_path / "m", config, plain_weights(config))
    load_model(open_checkpoint(folder), backend=backend, quantization=quantization)
    whole = caught.pop(0)
    compare(folder, 2, backend, quantization)
    assert len(caught) == 3  # compare loads the whole model once more
    for rank, weights in caught[1:]:
        part_of = Split(ModelConfig.from_hf(config), rank, 2)
        for tensor, own in weights.items():
            part = part_of.part(tensor)
            expected = whole[1][tensor] if part is None else cut(floats(whole[1][tensor]), part)
            assert torch.equal(floats(own), floats(expected)), tensor
            assert isinstance(own, Packed) == isinstance(whole[1][tensor], Packed)


@pytest.fixture
def caught(monkeypatch):
    """The weights that models are made of, as they are read: (rank, name -> tensor), in the order of loading."""
    module, found = sys.modules["minipaged.models"], []
    read = module.read_weights

    def catch(*arguments):
        weights = read(*arguments)
        found.append((arguments[-2].rank, dict(weights)))
        return weights

    monkeypatch.setattr(module, "read_weights", catch)
    return found


# What is read, and what is kept


class Counting:
    """A safetensors file that counts the numbers that are asked of it."""

    def __init__(self, file):
        self.file, self.asked = file, 0

    def get_tensor(self, name):
        self.asked += (tensor := self.file.get_tensor(name)).numel()
        return tensor

    def get_slice(self, name):
        self.name = name
        return self

    def __getitem__(self, which):
        self.asked += (tensor := self.file.get_slice(self.name)[which]).numel()
        return tensor


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", ["llama 9 in 3, tied", "llama 6 in 1, all biases", "gpt2 5, untied"])
def test_a_rank_reads_its_part_of_a_folder_and_no_more(tmp_path, caught, name, size):
    config = ModelConfig.from_hf(MODELS[name])
    shapes = architecture_of(MODELS[name]).tensor_shapes(config)
    total = sum(map(math.prod, shapes.values()))
    for rank in range(size):
        checkpoint = open_checkpoint(write(tmp_path / "m", MODELS[name], plain_weights(MODELS[name])))
        [file] = {*checkpoint._files.values()}
        checkpoint._files = dict.fromkeys(checkpoint._files, counting := Counting(file))
        load_model(checkpoint, backend=kernels.TorchBackend(), ranks=alone_as(rank, size))
        weights = caught.pop()[1]
        assert counting.asked == sum(tensor.numel() for tensor in weights.values())
        assert stored_bytes(weights.values()) == 4 * counting.asked
        assert counting.asked <= total * (1 / size + 0.2)  # tiny models, uneven heads: the real one is below


def alone_as(rank, size):
    """One of several ranks, whose others never come: for loading alone."""
    ranks = Ranks()
    ranks.rank, ranks.size = rank, size
    return ranks


@pytest.mark.parametrize("form", ["gptq 4 asymmetric", "gptq 4 desc_act", "gptq 8", "awq", "packed 4 asymmetric",
                                  "int8", "ct fp8", "fp8 rows", "int8 groups", "packed 8"])  # fmt: skip
def test_codes_are_read_by_slices_where_the_format_allows_it(tmp_path, caught, form):
    """Heads of 16 and groups of 32: the cuts through `out` aren't on groups' ends, those through the MLP are."""
    config = LLAMA | {"intermediate_size": 128, "hidden_size": 128, "head_dim": 32}
    folder, _ = make(tmp_path / "m", FORMATS[form], config)
    asked, kept = [], []
    for size in (1, 2):
        for rank in range(size):
            checkpoint = open_checkpoint(folder)
            [file] = {*checkpoint._files.values()}
            checkpoint._files = dict.fromkeys(checkpoint._files, counting := Counting(file))
            load_model(checkpoint, backend=Keeping(), ranks=alone_as(rank, size))
            asked.append(counting.asked)
            kept.append(stored_bytes(caught.pop()[1].values()))
    assert all(part < 0.57 * kept[0] for part in kept[1:]) or "desc_act" in form
    assert all(part < (0.8 if "desc_act" in form else 0.57) * asked[0] for part in asked[1:])


class Keeping(kernels.TorchBackend):
    """Takes small numbers as they are."""

    def packs(self, weight):
        return True


def test_a_rank_reads_its_part_of_the_real_gguf(caught, monkeypatch):
    found, read, apart, decode = [], [], gguf_checkpoint.take_apart, gguf.dequantize

    def counting_apart(kind, rows):
        packed = apart(kind, rows)
        read.append(rows.nbytes if packed else 0)  # what stays unknown is dequantized
        return packed

    monkeypatch.setattr(gguf_checkpoint, "take_apart", counting_apart)
    monkeypatch.setattr(gguf, "dequantize", lambda rows, kind: read.append(rows.nbytes) or decode(rows, kind))
    for size in (1, 2):
        for rank in range(size):
            read.clear()
            load_model(open_checkpoint("smollm2"), backend=Keeping(), ranks=alone_as(rank, size))
            found.append((sum(read), stored_bytes(caught.pop()[1].values())))
    whole, first, second = found
    for i in range(2):
        assert first[i] + second[i] < whole[i] * 1.002  # norms
        assert second[i] < first[i] < whole[i] * 0.55  # 6 heads of 9


# The real one


def test_the_real_model_goes_on_with_the_same_tokens():
    prompt = [504, 3575, 282, 4649, 314]  # The capital of France is

    def greedy(ranks):
        _, model = load_model(open_checkpoint("smollm2"), backend=kernels.load("cpp"), ranks=ranks)
        config, table = model.config, torch.tensor([[1, 0]])
        cache = kernels.new_cache(config.num_layers, 2, 16, config.num_kv_heads, config.head_size, torch.float32)
        tokens, computed, all_logits = list(prompt), 0, []
        while len(tokens) < len(prompt) + 8:
            positions = torch.arange(computed, len(tokens))
            slots = table[0][positions // 16] * 16 + positions % 16
            counts = torch.tensor([0, len(positions)]), torch.tensor([len(tokens)])
            hidden = model(torch.tensor(tokens[computed:]), positions, cache, kernels.Batch(slots, *counts, table))
            all_logits.append(model.logits(hidden[-1:]))
            computed = len(tokens)
            drawn = all_logits[-1].argmax(1)  # rank 0 tells the others
            tokens.append(int(ranks.sum(drawn if ranks.rank == 0 else torch.zeros_like(drawn))))
        return tokens, torch.cat(all_logits)

    with torch.inference_mode():
        tokens, logits = greedy(ALONE)
    for size in (2, 3):
        results, _ = on_ranks(size, greedy)
        assert all(ours == tokens for ours, _ in results)
        assert (results[0][1] - logits).abs().max() < 1e-3, "of logits of about 20"


# The head that guesses


@pytest.mark.parametrize("name", ["llama 4 in 2", "qwen2 4 in 2", "gpt2 5, untied"])
@pytest.mark.parametrize("quantization", ["auto", "int8"])
def test_both_ends_whole_beside_a_rank(tmp_path, backend, name, quantization):
    folder = write(tmp_path / "m", MODELS[name], plain_weights(MODELS[name]))
    ends = load_ends(folder, torch.float32, "cpu", backend, quantization)
    _, model = load_model(open_checkpoint(folder), backend=backend, quantization=quantization)
    ids = torch.tensor([5, 0, 47])
    assert ends.config == model.config and ends.dtype == model.dtype
    assert torch.equal(ends.embedding[ids], model.embedding[ids])
    assert torch.equal(output_rows(ends, ids), output_rows(model, ids))


def test_the_real_head_needs_only_the_ends():
    backend = kernels.load("cpp")
    _, model = load_model(open_checkpoint("smollm2"), backend=backend)
    ends = load_ends("smollm2", torch.float32, "cpu", backend)
    ours, theirs = (load_head(head_of("smollm2"), what, backend) for what in (ends, model))
    states = torch.randn(3, 576)
    assert torch.equal(ours.logits(states), theirs.logits(states))
    assert torch.equal(ours._fused(states, torch.tensor([1, 2, 3])), theirs._fused(states, torch.tensor([1, 2, 3])))
