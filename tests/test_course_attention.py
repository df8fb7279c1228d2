"""Assignment 1: what its judges expect is what transformers computes, and they see every change of an answer."""

import itertools
import json
import random

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import modeling_llama as llama

from kernels import formulas
from minipaged.course import starter
from minipaged.course.assignment import load
from minipaged.course.inside import drive_attention
from minipaged.course.inside.drive_attention import packed, unpacked
from minipaged.course.submission import reference

PARTS = {part.name: part for part in load(1).parts}


def cases(name: str, count: int = 25) -> list[dict]:
    part = PARTS[name]
    return list(itertools.islice(part.cases(random.Random(name)), min(count, part.num_cases)))


def answer(name: str, case: dict) -> dict:
    return getattr(drive_attention, PARTS[name].driver)(case)


@torch.inference_mode()
def test_formulas_are_those_of_transformers():
    x, weight = torch.randn(5, 16), torch.randn(16)
    norm = llama.LlamaRMSNorm(16, eps=0.01)
    norm.weight.data = weight
    torch.testing.assert_close(formulas.rms_norm(x, weight, 0.01), norm(x))
    q, angles = torch.randn(5, 4, 8), torch.randn(5, 4)
    cos, sin = (torch.cat((one, one), -1)[None] for one in (angles.cos(), angles.sin()))
    turned, _ = llama.apply_rotary_pos_emb(q.transpose(0, 1)[None], q.transpose(0, 1)[None], cos, sin)
    torch.testing.assert_close(formulas.rope(q, angles.cos(), angles.sin()), turned[0].transpose(0, 1))


@pytest.mark.parametrize("case", [case for case in cases("frequencies") if case["rope"]["kind"] == "llama3"], ids=str)
def test_stretched_frequencies_are_those_of_transformers(case):
    rope, size = case["rope"], case["head_size"]
    scaling = {"rope_type": "llama3", "rope_theta": rope["theta"], "factor": rope["factor"],
               "low_freq_factor": rope["low_freq_factor"], "high_freq_factor": rope["high_freq_factor"],
               "original_max_position_embeddings": rope["original_max_len"]}  # fmt: skip
    config = transformers.LlamaConfig(
        hidden_size=size, num_attention_heads=1, rope_theta=rope["theta"], rope_scaling=scaling, head_dim=size,
        max_position_embeddings=8 * rope["original_max_len"],
    )  # fmt: skip
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    torch.testing.assert_close(unpacked(answer("frequencies", case)["result"]), expected, rtol=1e-5, atol=0)


@torch.inference_mode()
def test_a_cut_up_batch_gives_the_logits_of_transformers():
    tried = 0
    for case in cases("model"):
        if case["config"]["model_type"] != "llama" or case["dtype"] != "float32":
            continue
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**case["config"])).eval()
        weights = {name: unpacked(value) for name, value in case["weights"].items()}
        assert model.load_state_dict(weights, strict=False).unexpected_keys == []
        found = answer("model", case)["logits"]
        for step, logits in zip(case["steps"], found, strict=True):
            for row, (s, start, count) in zip(unpacked(logits), step, strict=True):
                ids = torch.tensor(case["tokens"][s][: start + count])
                torch.testing.assert_close(row, model(ids[None]).logits[0, -1], rtol=1e-3, atol=1e-4)
        tried += 1
    assert tried > 3


def tensors(value):
    """All tensors of an answer, as the dicts that they are packed in."""
    if isinstance(value, dict) and "numbers" in value:
        yield value
    elif isinstance(value, (dict, list)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from tensors(one)


@pytest.mark.parametrize("name", PARTS)
def test_a_judge_sees_any_number_that_is_wrong(name):
    rng = random.Random(name)
    for case in cases(name, 12):
        right = json.loads(json.dumps(answer(name, case)))
        assert PARTS[name].judge(case, right) is None
        for at in range(len(list(tensors(right)))):
            changed = json.loads(json.dumps(right))
            one = list(tensors(changed))[at]
            tensor = unpacked(one)
            place = rng.randrange(tensor.numel())
            was = float(tensor.flatten()[place])
            tensor.view(-1)[place] = 0.5 if was != was else was + 1 + tensor.nan_to_num(0).abs().max()
            one["numbers"] = packed(tensor)["numbers"]
            assert PARTS[name].judge(case, changed) is not None, case


@pytest.mark.parametrize("name", PARTS)
def test_shapes_and_dtypes_count(name):
    case = cases(name, 1)[0]
    for change in ({"dtype": "float64"}, {"shape": [1, 1, 1, 1, 1, 1]}):
        changed = json.loads(json.dumps(answer(name, case)))
        next(tensors(changed)).update(change)
        assert PARTS[name].judge(case, changed) is not None


@pytest.mark.parametrize("name", PARTS)
def test_simpler_cases_can_be_asked_and_shown(name):
    """However far a case is cut down, it stays one that has an answer without NaN where none belongs."""
    for case in cases(name, 10)[4:]:
        for _ in range(30):
            simpler = list(itertools.islice(PARTS[name].smaller(case), 8))
            assert PARTS[name].judge(case, answer(name, case)) is None
            assert PARTS[name].show(case)
            if not simpler:
                break
            case = random.Random(0).choice(simpler)


def test_a_folder_has_no_other_implementation_until_the_next_assignment_is_started(tmp_path):
    starter.start(1, tmp_path)
    src, first = tmp_path / "src", load(1)
    for path in first.absent:
        assert not (src / path).exists()
    text = "".join(path.read_text() for path in src.rglob("*.py"))
    for told in ("scaled_dot_product_attention", "masked_fill(future", "part[:, block, offset] =", "rsqrt"):
        assert told not in text, told
    starter.start(2, tmp_path)
    for path in (*first.absent, *first.also):
        assert (src / path).exists() and ((src / path).is_dir() or (src / path).read_text() == reference(path)), path
    starter.start(3, tmp_path)  # it cuts some of them anew
