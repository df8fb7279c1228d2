"""The head that guesses: its numbers, its files, how it is trained, and how often the packaged one is right."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import make_folder

import kernels
from minipaged.models import load
from minipaged.models.fields import ModelError
from minipaged.models.head import load_head, unpacked
from minipaged.train_head import main

BLOCK = 4
RIGHT = 0.30  # of first guesses, a little below what was measured


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A head for the tiny model, trained for seconds, and what the command said."""
    file = tmp_path_factory.mktemp("head") / "tiny.safetensors"
    assert main(["--model", str(folder), "--out", str(file), "--minutes", "0.12", "--vocabulary", "64"]) == 0
    return file


def batch_of(start: int, end: int) -> kernels.Batch:
    """Positions start to end of one sequence, whose blocks lie backwards."""
    table = torch.arange(9, -1, -1)
    positions = torch.arange(start, end)
    slots = table[positions // BLOCK] * BLOCK + positions % BLOCK
    return kernels.Batch(slots, torch.tensor([0, end - start]), torch.tensor([end]), table[None])


def new_cache(head) -> torch.Tensor:
    return kernels.new_cache(1, 10, BLOCK, head.kv_heads, head.head_size, head.backend.dtype)[0].fill_(torch.nan)


def plain(weights: dict, config, embedding, hidden, token_ids):
    """The same network in the plainest PyTorch: hidden [C, E] before each of token_ids [C] -> guesses [C, E]."""

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights[f"{name}.weight"].float()

    def turned(x):  # [C, heads, D]
        angles = torch.arange(len(x))[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    d, c = config.head_size, len(token_ids)
    x = torch.cat((hidden, norm(embedding[token_ids], "token_norm")), -1) @ weights["fuse.weight"].T
    y = norm(x, "input_layernorm")
    q, k, v = ((y @ weights[f"self_attn.{name}_proj.weight"].T).view(c, -1, d) for name in "qkv")
    k, v = (part.repeat_interleave(config.num_heads // config.num_kv_heads, 1) for part in (turned(k), v))
    scores = torch.einsum("qhd,khd->hqk", turned(q), k) / d**0.5
    scores = scores.masked_fill(torch.ones(c, c).triu(1).bool(), -torch.inf)
    attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
    x = x + attended @ weights["self_attn.o_proj.weight"].T
    y = norm(x, "post_attention_layernorm")
    gate, up = (y @ weights[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return norm(x + torch.nn.functional.silu(gate) * up @ weights["mlp.down_proj.weight"].T, "norm")


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_it_computes_what_plain_pytorch_does(folder, trained, backend):
    try:
        backend = kernels.load(backend)
    except kernels.Unavailable as error:
        pytest.skip(str(error))
    model = load(folder, backend=backend).model
    head, stored = load_head(trained, model, backend), load_file(trained)
    weights = {name: unpacked(stored, name) for name in stored}
    torch.manual_seed(1)
    hidden, token_ids, positions = torch.randn(23, 32), torch.randint(96, (23,)), torch.arange(23)
    expected = plain(weights, head.config, model.embedding, hidden, token_ids)
    whole = head(hidden, token_ids, positions, new_cache(head), batch_of(0, 23))
    assert (whole - expected).abs().max() < 1e-4
    cache = new_cache(head)  # the first ones are only written, the last ones come one by one
    head.write(hidden[:20], token_ids[:20], positions[:20], cache, batch_of(0, 20))
    for i in range(20, 23):
        one = head(hidden[i : i + 1], token_ids[i : i + 1], positions[i : i + 1], cache, batch_of(i, i + 1))
        assert (one[0] - expected[i]).abs().max() < 1e-4
    assert (head.logits(expected) - model.logits(expected)[:, head.token_ids]).abs().max() < 1e-4


def test_training_computes_what_the_head_does(folder, trained):
    from minipaged.training.files import config_like
    from minipaged.training.network import HeadNetwork

    model = load(folder).model
    head, stored = load_head(trained, model, model.backend), load_file(trained)
    network = HeadNetwork(config_like(model.config))
    network.load_state_dict({name: unpacked(stored, name) for name in network.state_dict()})
    hidden, token_ids = torch.randn(9, 32), torch.randint(96, (9,))
    cache = new_cache(head)
    first = head(hidden, token_ids, torch.arange(9), cache, batch_of(0, 9))
    second = head(first[7:8], token_ids[8:], torch.arange(8, 9), cache, batch_of(8, 9))
    with torch.no_grad():
        past: list = []
        guessed = network(hidden[None], model.embedding[token_ids][None], past)
        assert (guessed[0] - first).abs().max() < 1e-4
        shifted = torch.cat((torch.zeros(1, 1, 32), guessed[:, :-1]), 1)
        assert (network(shifted, model.embedding[token_ids][None], past)[0, 8] - second[0]).abs().max() < 1e-4


def test_training_makes_the_loss_smaller_and_says_what_it_reached(folder, tmp_path, capsys):
    from minipaged.llm import LLM
    from minipaged.training.course import Course

    with LLM(str(folder)) as llm:
        report = Course(llm, 0.15, 0, 96, lambda *_: None).run(tmp_path / "a.safetensors", "test")
    losses = report.losses
    assert sum(losses[-5:]) < sum(losses[:5])
    assert report.own and report.held_out and len(report.curve) > 2
    assert report.num_bytes == (tmp_path / "a.safetensors").stat().st_size


def test_other_files_are_refused_by_name(folder, trained, tmp_path):
    from safetensors import safe_open

    model = load(folder).model
    with safe_open(trained, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(trained)
    file = tmp_path / "other.safetensors"

    def refused(words: str, changed: dict, without: str = ""):
        save_file({n: t for n, t in tensors.items() if n != without}, file, metadata | changed)
        with pytest.raises(ModelError, match=words):
            load_head(file, model, model.backend)

    refused("hidden_size 64, and this one has 32", {"hidden_size": "64"})
    refused("vocab_size 97, and this one has 96", {"vocab_size": "97"})
    refused("format", {"format": "something"})
    refused("broken metadata", {"num_heads": "many"})
    refused("fuse.weight", {}, without="fuse.weight")
    refused("token_ids", {}, without="token_ids")
    file.write_bytes(json.dumps({"not": "safetensors"}).encode())
    with pytest.raises(ModelError, match="no head"):
        load_head(file, model, model.backend)
    with pytest.raises(ModelError, match="no head"):
        load_head(tmp_path / "absent.safetensors", model, model.backend)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--out"),
        (["--out", "a.bin"], "safetensors"),
        (["--out", "nowhere/a.safetensors"], "no folder"),
        (["--out", "a.safetensors", "--minutes", "0"], "--minutes"),
        (["--out", "a.safetensors", "--minutes", "nan"], "--minutes"),
        (["--out", "a.safetensors", "--seed", "-1"], "--seed"),
        (["--out", "a.safetensors", "--model", "nowhere.gguf"], "does not exist"),
        (["--out", "a.safetensors", "--what"], "--what"),
    ],
)
def test_wrong_flags_take_one_line(flags, said, capsys):
    assert main(flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0] and lines[0].startswith("minipaged.train_head: error: ")


def test_ctrl_c_leaves_no_file(folder, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("minipaged.training.course.Course._step", interrupted)
    out = tmp_path / "a.safetensors"
    assert main(["--model", str(folder), "--out", str(out), "--minutes", "0.05"]) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_packaged_head_is_small_and_often_right():
    from minipaged.llm import LLM
    from minipaged.training.states import lessons
    from minipaged.training.text import Writer

    file = HEADS / "smollm2.safetensors"
    assert file.stat().st_size < 5_000_000
    with LLM("smollm2") as llm:
        model = llm.executor.runner.model
        texts = lessons(model, Writer(llm).answer(list(HELD_OUT[:6]), 64))
        head = load_head(file, model, model.backend)
        right = total = 0
        for text in texts:
            size, hidden = len(text.token_ids), text.hidden.float()
            before = torch.cat((torch.zeros(1, hidden.shape[1]), hidden[:-1]))
            blocks = -(-size // 16)
            cache = kernels.new_cache(1, blocks, 16, head.kv_heads, head.head_size, torch.float32)[0]
            batch = kernels.Batch(
                torch.arange(size), torch.tensor([0, size]), torch.tensor([size]), torch.arange(blocks)[None]
            )
            guessed = head(before, text.token_ids, torch.arange(size), cache, batch)
            tokens = head.token_ids[head.logits(guessed).argmax(-1)]
            right += int((tokens[text.begin : -1] == text.token_ids[text.begin + 1 :]).sum())
            total += size - 1 - text.begin
    assert right / total >= RIGHT
