"""The models against transformers: the same weights give the same logits, through scrambled pages."""

import functools
import json
import math
import random
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from torch import Tensor

import kernels
from minipaged.models import load
from minipaged.models.config import ModelConfig
from minipaged.models.fetch import fetch_smollm2
from minipaged.models.gpt2 import GPT2
from minipaged.models.llama import Llama

TOLERANCE = 1e-4
LENGTHS = (11, 1, 6, 22)  # tokens of the four sequences in a batch
PLANS = (  # how many tokens of each to compute in each step
    [(8, 1, 3, 19), (1, 0, 1, 1), (1, 0, 1, 1), (1, 0, 1, 1)],  # prefill, then decode
    [(5, 0, 1, 7), (1, 0, 2, 0), (4, 1, 0, 2), (0, 0, 1, 9), (1, 0, 2, 4)],  # chunks beside decodes
)
BLOCK_SIZE = 4


class Paged:
    """Runs a model over paged memory by hand: what the engine does, without an engine.

    The blocks of the sequences are scattered over a pool that is larger than they need and full of NaN, so
    that a read from a wrong place shows.
    """

    def __init__(self, model, sequences: list[list[int]], dtype=torch.float32):
        config = model.config
        self.model, self.sequences, self.computed = model, sequences, [0] * len(sequences)
        self.logits: list[list[Tensor]] = [[] for _ in sequences]
        need = [math.ceil(len(tokens) / BLOCK_SIZE) for tokens in sequences]
        free = random.Random(0).sample(range(2 * sum(need)), sum(need))
        self.tables = [[free.pop() for _ in range(count)] for count in need]
        shape = (config.num_layers, 2 * sum(need), BLOCK_SIZE, config.num_kv_heads, config.head_size)
        self.cache = kernels.new_cache(*shape, dtype).fill_(math.nan)

    def step(self, counts: tuple[int, ...]) -> None:
        """Compute the next counts[s] tokens of each sequence s, in one flat batch."""
        ids, positions, slots, query_start, context_lens, tables = [], [], [], [0], [], []
        active = [s for s, count in enumerate(counts) if count]
        for s in active:
            span = range(self.computed[s], self.computed[s] + counts[s])
            ids += [self.sequences[s][p] for p in span]
            positions += span
            slots += [self.tables[s][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in span]
            query_start.append(len(ids))
            context_lens.append(span.stop)
            tables.append(self.tables[s] + [0] * (max(map(len, self.tables)) - len(self.tables[s])))
            self.computed[s] = span.stop
        batch = kernels.Batch(*(torch.tensor(x) for x in (slots, query_start, context_lens, tables)))
        hidden = self.model(torch.tensor(ids), torch.tensor(positions), self.cache, batch)
        rows = self.model.logits(hidden)
        for s, part in zip(active, rows.split([counts[s] for s in active]), strict=True):
            self.logits[s].append(part)

    def run(self, plan) -> list[Tensor]:
        """Compute everything, step by step; returns the logits [len, V] of each sequence."""
        for counts in plan:
            self.step(counts)
        return [torch.cat(parts) for parts in self.logits]


def oracle(config: transformers.PreTrainedConfig):
    """A transformers model whose every parameter matters: biases and norms too."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name or ".ln_" in name else 0.0, 0.15)
    return model


@pytest.fixture(params=["torch", "cpp"])
def backend(request):
    """A function dtype -> backend; skips where there is no C++ compiler."""

    def make(dtype=torch.float32):
        try:
            return kernels.load(request.param, "cpu", dtype)
        except kernels.Unavailable as error:
            pytest.skip(str(error))

    return make


def ours(model, backend, dtype=torch.float32):
    """Our model with the weights of a transformers model, its config through JSON as a checkpoint has it."""
    config = ModelConfig.from_hf(json.loads(model.config.to_json_string()))
    architecture = {"llama": Llama, "gpt2": GPT2}[config.architecture]
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]  # not stored in a checkpoint
    assert {name: tuple(w.shape) for name, w in weights.items()} == architecture.tensor_shapes(config)
    built = architecture(config, weights, backend)
    assert not weights  # each tensor was taken out as it was used
    return built


def sequences_for(vocab_size: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in LENGTHS]


@torch.no_grad()
def assert_same_logits(model, reference) -> None:
    sequences = sequences_for(model.config.vocab_size)
    expected = [reference(torch.tensor([tokens])).logits[0] for tokens in sequences]
    assert max(logits.std() for logits in expected) > 0.5  # or else the tolerance would mean nothing
    for plan in PLANS:
        for got, want in zip(Paged(model, sequences).run(plan), expected, strict=True):
            torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMAS = {
    "9 heads over 3": {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3},
    "5 heads over 1": {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1},
    "as many kv heads as heads": {"num_key_value_heads": 4},
    "kv heads left out": {"num_key_value_heads": None},
    "head size of its own": {"head_dim": 20},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "one layer, other eps": {"num_hidden_layers": 1, "rms_norm_eps": 1e-2},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 333.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    "llama3": {
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "yarn": {"head_dim": 32, "rope_parameters": YARN},
    "yarn, attention factor": {"rope_parameters": YARN | {"attention_factor": 1.7}},
    "yarn, mscale": {"rope_parameters": YARN | {"mscale": 1.5, "mscale_all_dim": 0.7}},
    "yarn, betas": {"rope_parameters": YARN | {"beta_fast": 4, "beta_slow": 0.5, "truncate": False}},
}  # fmt: skip


@pytest.mark.parametrize("change", LLAMAS.values(), ids=LLAMAS.keys())
def test_llama(change, backend):
    reference = oracle(transformers.LlamaConfig(**(SIZES | change)))
    assert_same_logits(ours(reference, backend()), reference)


RELATIVES = {
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=None, head_dim=16),
    "mistral, window never left": transformers.MistralConfig(**SIZES, sliding_window=max(LENGTHS)),
    "qwen2": transformers.Qwen2Config(**SIZES, sliding_window=8),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
    "qwen3, bias": transformers.Qwen3Config(
        **SIZES, head_dim=16, attention_bias=True, tie_word_embeddings=True
    ),
}


@pytest.mark.parametrize("config", RELATIVES.values(), ids=RELATIVES.keys())
def test_relatives_of_llama(config, backend):
    reference = oracle(config)
    assert_same_logits(ours(reference, backend()), reference)


GPT2S = {
    "plain": {},
    "one head": {"n_head": 1},
    "untied": {"tie_word_embeddings": False},
    "scale by layer": {"scale_attn_by_inverse_layer_idx": True},
    "no scale": {"scale_attn_weights": False},
    "fp32 attention": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    "n_inner": {"n_inner": 50},
    "eps": {"layer_norm_epsilon": 1e-2},
    **{name: {"activation_function": name} for name in ("gelu", "relu", "silu", "tanh", "gelu_pytorch_tanh")},
}


@pytest.mark.parametrize("change", GPT2S.values(), ids=GPT2S.keys())
def test_gpt2(change, backend):
    sizes = {"vocab_size": 89, "n_positions": 64, "n_embd": 40, "n_layer": 3, "n_head": 5}
    reference = oracle(transformers.GPT2Config(**(sizes | change)))
    assert_same_logits(ours(reference, backend()), reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [
    transformers.LlamaConfig(**SIZES, attention_bias=True),
    transformers.GPT2Config(vocab_size=89, n_positions=64, n_embd=40, n_layer=2, n_head=5),
], ids=["llama", "gpt2"])  # fmt: skip
@torch.no_grad()
def test_half_precision_is_roughly_right(config, dtype, backend):
    reference = oracle(config)
    model = ours(reference, backend(dtype), dtype)
    sequences = sequences_for(model.config.vocab_size)
    for got, tokens in zip(Paged(model, sequences, dtype).run(PLANS[1]), sequences, strict=True):
        want = reference(torch.tensor([tokens])).logits[0]
        assert got.dtype == torch.float32
        assert (got - want).norm() / want.norm() < (0.03 if dtype == torch.bfloat16 else 0.005)


PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="session")
def smollm2_in_transformers():
    """The real model, its weights as transformers reads them from the GGUF file. Takes 10 s."""
    file = fetch_smollm2()
    config = json.loads((Path(__file__).parent / "data" / "model_configs.json").read_text())
    config = transformers.LlamaConfig(**config["SmolLM2-135M-Instruct"]["config"])
    with pytest.MonkeyPatch.context() as patch:  # else transformers builds this table 400 times over
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        return transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, config=config, dtype=torch.float32
        ).eval()


@torch.no_grad()
def test_the_real_model(smollm2_in_transformers, backend):
    loaded = load("smollm2", backend=backend())
    prompt = loaded.tokenizer.encode(PROMPT)
    text = smollm2_in_transformers.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False)[
        0
    ].tolist()
    expected = smollm2_in_transformers(torch.tensor([text])).logits[0]
    # the prompt at once beside a chunk of another sequence, then single tokens beside chunks
    plan = [(len(prompt), 4), *[(1, 3)] * 5, *[(1, 0)] * (len(text) - len(prompt) - 5)]
    got, other = Paged(loaded.model, [text, text[:19]]).run(plan)
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=1e-5)  # logits reach 36 here
    torch.testing.assert_close(other, expected[:19], atol=TOLERANCE, rtol=1e-5)
    assert got[len(prompt) - 1 : -1].argmax(-1).tolist() == text[len(prompt) :]
    assert loaded.tokenizer.decode(text[len(prompt) :]).startswith("The capital of France is Paris.")
