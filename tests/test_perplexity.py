"""Perplexity: the plain computation's, whatever the windows; and the table."""

import json
import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from quantized_model import TEXT, make_outliers

from minipaged import LLM
from minipaged.perplexity import METHODS, main
from minipaged.quantization import methods
from minipaged.quantization.methods import WAYS, Way, bits_per_weight
from minipaged.quantization.perplexity import encode, score, windows
from minipaged.quantization.texts import TO_CALIBRATE, TO_MEASURE, read_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_outliers(tmp_path_factory.mktemp("outliers"))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 2)
    return file


@pytest.fixture
def measure(folder, text_file, capsys):
    """measure(*flags): exit status, output, error."""

    def measure(*flags):
        status = main([str(folder), "--text", str(text_file), "--group-size", "32", *flags])
        return status, *capsys.readouterr()

    return measure


@given(st.integers(2, 60), st.integers(2, 20), st.data())
def test_each_token_but_the_first_is_scored_once_and_sees_enough(num_tokens, context, data):
    stride = data.draw(st.integers(1, context - 1))
    cuts = windows(num_tokens, context, stride)
    assert [p for _, first, end in cuts for p in range(first, end)] == [*range(1, num_tokens)]
    for begin, first, end in cuts:
        assert begin < first < end <= begin + context
        assert begin == 0 or first - begin >= context - stride


@pytest.mark.parametrize(("context", "stride"), [(300, 299), (32, 31), (32, 8), (2, 1)])
def test_a_score_is_that_of_transformers(folder, context, stride):
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text, nats = TEXT.strip(), 0.0
    with LLM(str(folder), num_blocks=40, prefix_cache="none") as llm:
        ids, num_bytes = encode(llm.tokenizer, text)
        found = score(llm, text, context, stride)
    for begin, first, end in windows(len(ids), context, stride):
        with torch.no_grad():
            rows = model(torch.tensor([ids[begin:end]])).logits[0].double().log_softmax(-1)
        nats -= sum(float(rows[p - 1 - begin, ids[p]]) for p in range(first, end))
    assert found.nats == pytest.approx(nats, rel=1e-5) and found.num_tokens == len(ids) - 1
    assert found.perplexity == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-4)
    assert num_bytes == found.num_bytes == len(text.encode()) - 1  # all but the first token, which is one letter
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_a_limit_cuts_tokens_and_bytes(folder):
    with LLM(str(folder), num_blocks=40) as llm:
        assert encode(llm.tokenizer, TEXT, 10) == (llm.tokenizer.encode(TEXT)[:10], 9)
        with pytest.raises(ValueError, match="at least two tokens"):
            encode(llm.tokenizer, "C")
    tokenizer, text = methods.open_checkpoint("smollm2").tokenizer(), "The na\u00efve \u2019twas \U0001f433 sea"
    assert encode(tokenizer, text)[1] == len(text.encode()) - len("The")
    assert encode(tokenizer, text, 3)[0] == tokenizer.encode(text)[:3]


def test_the_texts_are_long_and_have_nothing_in_common():
    measured, calibrated = read_text(TO_MEASURE), read_text(TO_CALIBRATE)
    assert len(measured.split()) > 20_000 and len(calibrated.split()) > 10_000
    paragraphs = [{p for p in text.split("\n\n") if len(p) > 60} for text in (measured, calibrated)]
    assert len(paragraphs[0]) > 300 and not paragraphs[0] & paragraphs[1]


def test_a_table_of_methods(measure, tmp_path, monkeypatch):
    monkeypatch.setitem(WAYS, "gptq", Way({"quantization": "none"}))  # the third is the first again: the same row
    status, out, err = measure("--methods", "fp32", "int8", "gptq", "--context", "64", "--json", str(tmp_path / "j"))
    assert status == 0 and not err
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["method", "bits/weight"] and lines[-1] == "209 tokens, 209 bytes"
    assert all(len(line) <= 80 for line in lines) and "\x1b" not in out
    fp32, int8, again = (line.split() for line in lines[1:4])
    assert fp32[:2] == ["fp32", "32.00"] and again[2:5] == fp32[2:5] and fp32[5:7] == ["+0.00", "%"]
    assert 8 < float(int8[1]) < 9 and int8[2] != fp32[2] and abs(float(int8[5])) < 3
    rows = json.loads((tmp_path / "j").read_text())
    assert [row["method"] for row in rows] == ["fp32", "int8", "gptq"]
    assert rows[0]["perplexity"] == pytest.approx(math.exp(rows[0]["nats_per_token"]))


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_methods_that_write_a_model_first(measure, method):
    status, out, err = measure("--methods", method, "--limit-tokens", "60")
    assert status == 0 and float(out.splitlines()[1].split()[1]) == 4.5  # and 16 bits of scale for 32


WRONG = "seed=-1: must be None or an integer of at least 0"


def test_what_can_not_be_run_is_left_out_or_refused_if_it_was_named(measure, monkeypatch):
    for name in METHODS:
        monkeypatch.setitem(WAYS, name, Way({"quantization": "none"} if name == "fp32" else {"seed": -1}))
    status, out, err = measure("--limit-tokens", "9")
    assert status == 0 and len(out.splitlines()) == 3
    assert err.splitlines() == [f"{name} is left out: {WRONG}" for name in METHODS[1:]]
    status, out, err = measure("--limit-tokens", "9", "--methods", "fp32", "awq")
    assert status == 2 and len(out.splitlines()) == 3  # what was measured is not lost
    assert err == f"minipaged.perplexity: error: awq: {WRONG}\n"


def test_bits_of_a_weight(folder, monkeypatch):
    checkpoint = methods.open_checkpoint(folder)
    assert bits_per_weight(checkpoint, "auto") == bits_per_weight(checkpoint, "none") == 32
    rows = [96, 32, 32, 96, 128, 128, 96]
    weights = 96 * (96 + 32 + 32 + 96 + 128 + 128) + 128 * 96
    assert 8 + 8 * sum(rows) / weights < bits_per_weight(checkpoint, "int8") < 8 + 64 * sum(rows) / weights


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--context", "1"], "--context 1: must be at least 2"),
        (["--context", "5000"], "--context 5000: this model can be given at most 4095"),
        (["--context", "20", "--stride", "20"], "--stride 20: must be less than --context, 20"),
        (["--stride", "0"], "--stride 0"),
        (["--limit-tokens", "1"], "--limit-tokens 1"),
        (["--methods", "int3"], "--methods"),
        (["--json", "nowhere/rows.json"], "--json nowhere/rows.json"),
        (["--text", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--what"], "--what"),
    ],
)
def test_bad_input_takes_one_line(measure, flags, said):
    status, out, err = measure(*flags)
    assert status == 2 and not out and len(err.splitlines()) == 1
    assert said in err and err.startswith("minipaged.perplexity: error: ")


def test_texts_that_are_none_and_models_that_there_are_not(measure, tmp_path, capsys):
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    (tmp_path / "b").write_text(" \n")
    assert measure("--text", str(tmp_path / "a"))[2].endswith("a is no text in UTF-8: invalid start byte at byte 0\n")
    assert measure("--text", str(tmp_path / "b"))[2].endswith("b is empty\n")
    assert main(["nowhere.gguf"]) == 2 and "does not exist" in capsys.readouterr().err


def test_ctrl_c_prints_what_there_is(measure, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("minipaged.quantization.methods.quantize_model", interrupted)
    status, out, err = measure("--limit-tokens", "9", "--methods", "fp32", "rtn")
    assert status == 130 and err == "interrupted\n" and len(out.splitlines()) == 3


def test_the_door_knows_all_ways():
    assert {*METHODS} == {*WAYS}
