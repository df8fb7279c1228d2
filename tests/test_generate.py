"""The command line: good runs, every refusal, pipes, Ctrl-C."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from tiny_model import make_folder

from minipaged import LLM, SamplingParams, generate
from minipaged.generate import main
from minipaged.requests.beam_search_params import BeamSearchParams
from minipaged.requests.request import RequestMetrics
from minipaged.terminal.engine_flags import parse_bytes
from minipaged.terminal.options import HINTS
from minipaged.terminal.prompts import Job
from minipaged.terminal.report import Results
from minipaged.text.outputs import CompletionOutput, RequestOutput
from minipaged.text.texts import Texts
from minipaged.viewer.trace import read_trace

POOL = ["--num-blocks", "40", "--block-size", "4", "--max-num-seqs", "16", "--max-tokens", "8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("chat")))


@pytest.fixture(scope="module")
def raw_model(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("raw"), template=None))


@pytest.fixture(scope="module")
def llm(model):
    return LLM(model, num_blocks=200, block_size=4)


@pytest.fixture
def run(model, capsys, monkeypatch):
    """The command line in this process: run(*argv) -> (exit status, standard output, standard error)."""

    def call(*argv, stdin=None, pool=POOL):
        file = io.TextIOWrapper(io.BytesIO((stdin or "").encode()))
        monkeypatch.setattr("sys.stdin", file)
        status = main(["--model", model, *pool, *argv])
        return status, *capsys.readouterr()

    return call


def said(text):
    return [{"role": "user", "content": text}]


def texts(llm, prompts, params):
    return [[one.text for one in output.outputs] for output in llm.generate(prompts, params)]


# --- good runs ----------------------------------------------------------------------------------------------


def test_a_prompt_is_answered_and_nothing_else_said(run, llm):
    [[text]] = texts(llm, [said("hello")], SamplingParams(temperature=0, max_tokens=12))
    assert run("hello", "--max-tokens", "12") == (0, text + "\n", "")


def test_chat_is_the_default_and_raw_is_not_chat(run, llm):
    [[text]] = texts(llm, ["hello"], SamplingParams(temperature=0, max_tokens=12))
    assert run("hello", "--max-tokens", "12", "--raw")[1] == text + "\n"
    assert run("hello", "--max-tokens", "12")[1] == run("hello", "--max-tokens", "12", "--chat")[1] != text + "\n"


def test_a_model_without_template_takes_prompts_as_they_are(run, raw_model):
    assert run("hello", "--model", raw_model)[0] == 0
    status, out, err = run("hello", "--model", raw_model, "--chat")
    assert (status, out) == (2, "") and "no chat template; use --raw" in err


def test_a_single_answer_is_streamed(run, monkeypatch):
    class Recorder(io.StringIO):
        states = []

        def flush(self):
            self.states.append(self.getvalue())

    out = Recorder()
    monkeypatch.setattr("sys.stdout", out)
    assert run("hello", "--max-tokens", "12")[0] == 0
    lengths = [len(state) for state in out.states]
    assert lengths == sorted(lengths) and len(set(lengths)) >= 12
    assert out.states[-1] == out.getvalue() and out.getvalue().count("\n") == 1


def test_several_answers_stand_in_order_under_headers(run, llm, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("second\n\n   \nthird prompt\n")
    prompts = ["a first prompt that is long", "second", "third prompt"]
    params = SamplingParams(n=2, temperature=0.8, seed=3, max_tokens=5)
    expected = ""
    for number, (prompt, samples) in enumerate(zip(prompts, texts(llm, list(map(said, prompts)), params), strict=True)):
        for sample, text in enumerate(samples, 1):
            name = "ABC"[number]
            expected += f"=== {name}{sample} (prompt {number + 1}, sample {sample}): {prompt}\n{text}\n"
    argv = [prompts[0], "--prompts-file", str(file), "--n", "2", "--seed", "3", "--max-tokens", "5"]
    assert run(*argv) == (0, expected, "")


def test_order_holds_when_later_prompts_finish_first(run):
    lines = [json.dumps({"prompt": "x", "max_tokens": count}) for count in (20, 2, 9)]
    out = run("--prompts-file", "-", "--json", stdin="\n".join(lines))[1]
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["request_id"] for answer in answers] == ["0", "1", "2"]
    assert [len(answer["outputs"][0]["token_ids"]) for answer in answers] == [20, 2, 9]


def test_beams_come_with_their_scores(run, llm):
    params = BeamSearchParams(beam_width=3, max_tokens=6, length_penalty=0.5)
    [output] = llm.generate([said("hello")], params)
    expected = "".join(
        f"=== A (prompt 1, beam {i} with score {one.score:.3f}): hello\n{one.text}\n"
        for i, one in enumerate(output.outputs, 1)
    )
    flags = ["--beam-width", "3", "--max-tokens", "6", "--length-penalty", "0.5"]
    assert run("hello", *flags) == (0, expected, "")
    best = run("hello", *flags, "--n", "1")[1]
    assert best == output.outputs[0].text + "\n"


def test_json_holds_the_request(run, llm):
    params = SamplingParams(n=2, temperature=0.8, seed=1, max_tokens=7)
    [output] = llm.generate([said("hello")], params)
    status, out, err = run("hello", "--n", "2", "--seed", "1", "--max-tokens", "7", "--json")
    answer = json.loads(out)
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert answer["prompt"] == output.prompt and answer["prompt_token_ids"] == output.prompt_token_ids
    for given, one in zip(answer["outputs"], output.outputs, strict=True):
        keys = ("index", "text", "token_ids", "finish_reason", "stop_reason", "cumulative_logprob", "score")
        assert given == {key: getattr(one, key) for key in keys}
    metrics = answer["metrics"]
    assert metrics["num_preemptions"] == 0
    assert 0 <= metrics["queue_time"] < metrics["time_to_first_token"] and metrics["time_per_output_token"] > 0


def test_lines_of_json_override_the_flags(run, llm, tmp_path):
    ids = llm.tokenizer.encode("abc")
    lines = [
        {"prompt": "abc", "max_tokens": 3},
        {"messages": said("abc"), "n": 2, "temperature": 1.0, "seed": 5},
        {"prompt_token_ids": ids, "beam_width": 2, "seed": None, "stop": None},
        {"prompt_token_ids": ids, "temperature": 0, "logprobs": 1},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\ufeff" + "\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    status, out, _ = run("--prompts-file", str(file), "--json", "--max-tokens", "6", "--seed", "1", "--stop", "@@")
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [len(answer["outputs"]) for answer in answers] == [1, 2, 2, 1]
    assert [len(answer["outputs"][0]["token_ids"]) for answer in answers] == [3, 6, 6, 6]
    assert [answer["prompt"] for answer in answers] == ["<user>abc", "<user>abc", None, None]
    assert "logprobs" in answers[3]["outputs"][0] and "logprobs" not in answers[0]["outputs"][0]
    [[expected]] = texts(llm, [ids], SamplingParams(temperature=0, max_tokens=6))
    assert answers[3]["outputs"][0]["text"] == expected


def test_prompt_from_standard_input(run):
    assert run("--max-tokens", "9", stdin="hello\n") == run("hello", "--max-tokens", "9")
    assert run("hello", "--max-tokens", "9", stdin="not this")[1] == run("hello", "--max-tokens", "9")[1]


def test_chance_is_taken_when_asked_for(run):
    greedy = run("hello", "--max-tokens", "30")[1]
    drawn = run("hello", "--max-tokens", "30", "--seed", "7")[1]
    assert drawn != greedy and drawn == run("hello", "--max-tokens", "30", "--seed", "7", "--temperature", "0.8")[1]
    assert greedy == run("hello", "--max-tokens", "30", "--seed", "7", "--temperature", "0")[1]


def test_stop_ends_the_answer(run):
    text = run("hello", "--max-tokens", "30")[1]
    stop = text[10:12]
    assert run("hello", "--max-tokens", "30", "--stop", "no such", "--stop", stop)[1] == text[: text.index(stop)] + "\n"


def test_scarce_memory_changes_no_answer(run):
    flags = ["one", "two", "three", "--n", "3", "--seed", "2", "--max-tokens", "24"]
    plenty = run(*flags, pool=["--num-blocks", "500"])[1]
    for how in ("auto", "recompute", "swap"):
        pool = ["--num-blocks", "26", "--block-size", "4", "--preemption", how]
        status, out, err = run(*flags, "--debug", "--stats", pool=pool)
        assert (status, out) == (0, plenty)
        assert "preemptions" in err and "0 by recompute, 0 by swap" not in err


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("2GB", 2 * 10**9), ("512MiB", 2**29), ("1.5 gib", 3 * 2**29), ("3k", 3000), ("7B", 7)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


def test_a_terminal_is_not_told_what_to_do():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    text = "red:\x1b[31m bell:\a tab:\t é \x9b"
    output = RequestOutput("0", "", [1], [CompletionOutput(0, text, [2])], True, RequestMetrics())
    for file, shown in ((Terminal(), "red:\ufffd[31m bell:\ufffd tab:\t é \ufffd\n"), (io.StringIO(), text + "\n")):
        results = Results([Job("a", SamplingParams(), "prompt 1")], file, as_json=False, streaming=True)
        results.add(output)
        results.close()
        assert file.getvalue() == shown


def test_size_in_bytes(run, llm):
    argv = ["hello", "--max-tokens", "2", "--stats"]
    pool = ["--block-size", "4", "--kv-cache-memory", f"{10 * llm.block_bytes}"]
    assert "10 blocks of 4 tokens" in run(*argv, pool=pool)[2]


def test_stats_give_the_account(run):
    line = json.dumps({"prompt": "hello", "n": 2, "max_tokens": 9, "ignore_eos": True})
    status, out, err = run("--prompts-file", "-", "--stats", "--prefix-cache", "none", stdin=line)
    rows = dict(line.strip(" -").split("  ", 1) for line in err.splitlines()[1:])
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    # <user>hello: 11 tokens, 8 of them in 2 full blocks that stay shared. The most blocks are first in use
    # when both samples have 17 tokens: 2 blocks for both, 3 for each, 8 + 2 * 9 tokens in 8 * 4 slots.
    assert status == 0 and err.startswith("memory account\n")
    assert rows["pool"].startswith("40 blocks of 4 tokens, ")
    assert rows["most in use"].startswith("8 blocks, 20.0 %, ")
    assert rows["stored in them"] == "26 tokens"
    assert rows["waste"].startswith("18.8 %")
    assert rows["shared"] == "2 blocks; without sharing 2 more in use"
    assert rows["if contiguous"].endswith("256.0 times as much")  # 2 x 4096 tokens instead of 32
    assert rows["copied on write"] == "1 blocks" and rows["in use now"] == "0 blocks"
    assert rows["tokens"] == "11 of prompts, 18 of outputs" and rows["steps"] == "9"
    assert float(rows["speed"].split()[0].replace(",", "")) > 0


def test_speculation_changes_no_answer_and_gives_its_account(run, tmp_path, model):
    prompts = ["a dog, a cat, a dog, a cat,", "x=1; x=2; x=1; x=2;"]
    _, wanted, _ = run(*prompts, "--max-tokens", "30")
    trace = tmp_path / "trace.jsonl"
    flags = ["--speculate", "draft", "--speculative-model", model, "--num-speculative-tokens", "3"]
    for how in (["--speculate", "ngram"], flags):
        status, out, error = run(*prompts, "--max-tokens", "30", "--stats", "--trace", str(trace), *how)
        assert (status, out) == (0, wanted)
        assert re.search(r"speculation +\d+ of \d+ guessed tokens were right, \d+\.\d %\n", error)
        assert re.search(r"- drafts +\d+, with \d+\.\d\d tokens each\n", error)
    assert "speculation" not in run(*prompts, "--stats")[2]
    lines = map(json.loads, run(*prompts, "--json", "--speculate", "ngram")[1].splitlines())
    assert all({"num_drafts", "num_draft_tokens", "num_accepted_tokens"} <= one["metrics"].keys() for one in lines)


def test_what_is_guessed_is_told(run, model):
    flags = ["--speculate", "draft", "--speculative-model", model, "--num-speculative-tokens", "3", "--watch"]
    error = run("a dog, a cat", "--max-tokens", "30", *flags)[2]
    assert "guessed for" not in error, "a draft as large as its model is never worth it"
    error = run("a dog, a cat, a dog, a cat, a dog,", "--max-tokens", "40", "--speculate", "ngram", "--watch")[2]
    assert re.search(r"guessed for A \d+, \d+ right, \d+ slots? taken back", error)


def test_beams_say_once_that_nothing_is_guessed(run):
    status, _, error = run("a", "b", "--beam-width", "2", "--speculate", "ngram")
    assert status == 0 and error.count("beam search runs without speculation") == 1


def test_watch_without_a_terminal_writes_events(run):
    lines = "\n".join(json.dumps({"prompt": text, "n": 2, "ignore_eos": True}) for text in ("one", "two"))
    argv = ["--prompts-file", "-", "--max-tokens", "16", "--watch", "--prefix-cache", "none"]
    status, out, err = run(*argv, stdin=lines, pool=["--num-blocks", "12", "--block-size", "4"])
    assert status == 0 and "\x1b" not in out + err
    assert err.splitlines()[0] == "step 1: A B admitted [6 of 12 blocks in use]"
    assert "step 2: 2 copied on write: A1 2->6, B1 5->7 [8 of 12 blocks in use]" in err.splitlines()
    assert any("swapped out to make room: " in line for line in err.splitlines())
    assert err.splitlines()[-1].endswith("B finished [0 of 12 blocks in use]")
    assert all(line.startswith("step ") for line in err.splitlines())


ALIKE = [
    {"prompt": "one and two"},
    {"prompt": "one and three"},
    {"prompt": "one and two", "cache_salt": "me"},
    {"prompt": "one and two", "cache_salt": "me"},
    {"prompt": "one and two", "prompt_logprobs": 1},
]


@pytest.mark.parametrize("cache", ["none", "hash", "radix"])
def test_prompts_that_begin_alike_share(run, cache):
    """<user>one and two: 17 tokens in blocks of 4. One prompt runs after the other."""
    flags = ["--prefix-cache", cache, "--max-num-seqs", "1", "--prompts-file", "-", "--json", "--stats"]
    status, out, err = run(*flags, stdin="\n".join(map(json.dumps, ALIKE)))
    answers = [json.loads(line) for line in out.splitlines()]
    found = [0, 12, 0, 16, 0] if cache != "none" else [0] * 5
    assert status == 0 and [answer["metrics"]["num_cached_tokens"] for answer in answers] == found
    assert len({answers[i]["outputs"][0]["text"] for i in (0, 2, 3, 4)}) == 1
    assert len(answers[4]["prompt_logprobs"]) == 17 and "prompt_logprobs" not in answers[0]
    rows = dict(line.strip(" -").split("  ", 1) for line in err.splitlines() if line.startswith("  "))
    if cache == "none":
        assert rows["prefix cache"].strip() == "off" and rows["tokens"].strip().startswith("87 of prompts, ")
    else:  # the last prompt did not look
        assert rows["prefix cache"].strip() == "28 of 70 prompt tokens found, 40.0 %; 0 blocks evicted"
        assert re.search(r"0 blocks, \d+ more can be found again", rows["in use now"])
    tree = [line for line in err.splitlines() if "-- " in line]
    assert bool(tree) == (cache == "radix")
    if tree:
        assert "<user>one" in tree[0] and tree[1].startswith("|   |-- ") and tree[-1].startswith("`-- ")
        assert all(len(line) <= 80 for line in tree)


def test_watch_tells_what_was_found(run):
    lines = "\n".join(map(json.dumps, ALIKE[:2]))
    flags = ["--max-num-seqs", "1", "--prompts-file", "-", "--watch"]
    assert "B (12 tokens found) admitted" in run(*flags, stdin=lines)[2]
    assert "found" not in run(*flags, "--prefix-cache", "none", stdin=lines)[2]


# --- the page of a run --------------------------------------------------------------------------------------


def replayed(page):
    """What a page was made of: the one run in it."""
    [data] = re.findall(r'<script id="data" type="application/json">(.*)</script>', page.read_text(encoding="utf-8"))
    [one] = json.loads(data)["runs"]
    return one


def test_a_page_of_the_run_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    page, trace = tmp_path / "one.html", tmp_path / "two.jsonl"
    alone = run("one", "two", "--html", str(page))
    assert alone == run("one", "two") == run("one", "two", "--html", str(tmp_path / "b.html"), "--trace", str(trace))
    assert replayed(page)["title"] == "one" and replayed(tmp_path / "b.html")["title"] == "two"
    assert [line["step"] for line in replayed(page)["lines"]] == list(range(1, 9))
    assert list(read_trace(trace)[1])[-1].state["step"] == {"number": 8, "sequences": 2, "tokens": 2}
    assert not list((tmp_path / "temporary").iterdir()), "the trace that nobody asked for is removed"


def test_a_page_tells_of_a_request_that_failed(run, tmp_path, monkeypatch):
    def broken(self, request, answer=Texts.answer):
        if request.request_id == "1" and request.num_output_tokens == 3:
            raise RuntimeError("no such text")
        return answer(self, request)

    monkeypatch.setattr(Texts, "answer", broken)
    page = tmp_path / "page.html"
    status, _, error = run("one", "two", "--html", str(page))
    lines = replayed(page)["lines"]
    assert status == 1 and "no such text" in error
    assert lines[2]["did"]["finished"] == {"B": "error"} and lines[-1]["step"] == 8


def test_a_refused_run_leaves_the_old_page_alone_and_no_new_one(run, tmp_path):
    old, new = tmp_path / "old.html", tmp_path / "new.html"
    old.write_text("precious\n")
    for page in (old, new):
        assert run("hi", "--html", str(page), "--max-tokens", "900")[0] == 2
    assert old.read_text() == "precious\n" and not new.exists()
    assert run("hi", "--html", str(new), "--trace", str(new))[0] == 2 and not new.exists()


def test_whoever_breaks_off_while_the_model_loads_leaves_no_empty_page(run, tmp_path, monkeypatch):
    """Then the program ends at once, and nobody tidies up."""
    page, load, there = tmp_path / "page.html", generate.load, []
    monkeypatch.setattr(generate, "load", lambda *args: there.append(page.exists()) or load(*args))
    assert run("hi", "--html", str(page))[0] == 0 and page.exists() and there == [False]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_page_that_finds_no_room_is_told_of_in_a_line(run):
    status, out, error = run("hi", "--html", "/dev/full")
    assert status == 1 and out
    assert error == "minipaged.generate: error: cannot write the page /dev/full: No space left on device\n"


# --- refusals -----------------------------------------------------------------------------------------------

REFUSED = {
    "unknown flag": (["hi", "--foo"], "--foo"),
    "no number": (["hi", "--max-tokens", "many"], "--max-tokens: invalid int value: 'many'"),
    "temperature": (["hi", "--temperature", "-1"], "temperature=-1.0: must be a finite number >= 0"),
    "not a number": (["hi", "--temperature", "nan"], "temperature=nan: must be"),
    "top_p": (["hi", "--top-p", "1.5"], "top_p=1.5: must be a number > 0 and <= 1"),
    "n": (["hi", "--n", "0"], "n=0: must be an integer >= 1"),
    "greedy n": (["hi", "--n", "2", "--temperature", "0"], "n=2: n must be 1 when using greedy"),
    "beam width": (["hi", "--beam-width", "0"], "beam_width=0: must be an integer >= 1"),
    "beams by chance": (["hi", "--beam-width", "2", "--top-p", "0.5"], "top_p: not together with beam_width"),
    "penalty alone": (["hi", "--length-penalty", "2"], "length_penalty: only together with beam_width"),
    "empty stop": (["hi", "--stop", ""], "stop=['']: must be"),
    "blocks": (["hi", "--num-blocks", "0"], "--num-blocks: must be an integer of at least 1, not '0'"),
    "bytes": (["hi", "--kv-cache-memory", "5 miles"], "'5 miles' is no size: write 512MiB"),
    "preemption": (["hi", "--preemption", "magic"], "invalid choice: 'magic' (choose from"),
    "prefix cache": (["hi", "--prefix-cache", "tree"], "invalid choice: 'tree' (choose from"),
    "schedule": (["hi", "--schedule", "lifo"], "invalid choice: 'lifo' (choose from"),
    "who guesses": (["hi", "--speculate", "magic"], "invalid choice: 'magic' (choose from"),
    "nobody guesses": (["hi", "--num-branches", "2"], "--num-branches: needs --speculate ngram or draft or head"),
    "many guesses": (
        ["hi", "--speculate", "ngram", "--num-speculative-tokens", "99"], "num_speculative_tokens=99: must be an"
    ),
    "draft of nothing": (["hi", "--speculate", "draft"], "method 'draft' needs a model"),
    "draft that is not there": (
        ["hi", "--speculate", "draft", "--speculative-model", "/no/such"], "/no/such does not exist"
    ),
    "model of an n-gram": (
        ["hi", "--speculate", "ngram", "--speculative-model", "x"], "model is for draft and head, not for ngram"
    ),
    "no head": (["hi", "--speculate", "head"], "there is no head for"),
    "no budget": (["hi", "--max-num-batched-tokens", "0"], "must be an integer of at least 1, not '0'"),
    "budget": (
        ["hi", "--max-num-batched-tokens", "8"],
        "max_num_batched_tokens=8: must be at least max_num_seqs",
    ),
    "device": (["hi", "--device", "cuda"], "PyTorch sees no GPU"),
    "model": (["hi", "--model", "no/such/model.gguf"], "no/such/model.gguf does not exist"),
    "empty prompt": (["hi", ""], "prompt 2: prompt must be a text that is not empty"),
    "no Unicode": (["\udcff"], "prompt 1: prompt is not valid Unicode"),
    "no prompt": (["--json"], "there is no prompt: give one"),
    "no prompts file": (["--prompts-file", "no-such-file"], "cannot read no-such-file: No such file"),
    "trace": (["hi", "--trace", "no/such/folder/t"], "cannot write the trace no/such/folder/t: No such file"),
    "page": (["hi", "--html", "no/such/folder/p"], "cannot write the page no/such/folder/p: No such file"),
    "page that is a folder": (["hi", "--html", "."], "cannot write the page .: Is a directory"),
    "page without a name": (["hi", "--html", ""], "cannot write the page : No such file"),
    "trace that is a pipe": (["hi", "--trace", "/dev/null", "--html", "/dev/null"], "be another file, and no pipe"),
    "too wide": (
        ["hi", "--n", "17"],
        "prompt 1: the request wants 17 sequences at once, but max_num_seqs is 16",
    ),
    "too long": (["hi", "--max-tokens", "500"], "prompt 1: the request can need 127 blocks (8 prompt tok"),
}


@pytest.mark.parametrize(("argv", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_in_one_line(run, argv, message):
    if argv[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert message in err and err.startswith("minipaged.generate: error: ") and err.count("\n") == 1


BAD_LINES = {
    '{"prompt": "a"': "line 2: not JSON: ",
    "[1]": 'line 2: must be an object such as {"prompt": "Hello"}',
    '{"text": "a"}': "line 2: must have just one of prompt, messages, prompt_token_ids; has []",
    '{"prompt": "a", "messages": []}': "must have just one of",
    '{"prompt": ["a"]}': "line 2: prompt must be a text that is not empty",
    '{"prompt": "\\ud800"}': "line 2: prompt is not valid Unicode",
    '{"messages": ["a"]}': 'line 2: messages must be a list of {"role": TEXT, "content": TEXT}',
    '{"messages": [{"role": "user"}]}': "line 2: chat message 0 must be",
    '{"prompt_token_ids": [1.5]}': "line 2: prompt_token_ids must be a list of integers",
    '{"prompt_token_ids": [9999]}': "line 2: token id 9999 in the prompt: must be an integer from 0 to 95",
    '{"prompt": "a", "max-tokens": 3}': "line 2: unknown: max-tokens; it may have allowed_token_ids, ",
    '{"prompt": "a", "max_tokens": "3"}': "line 2: max_tokens='3': must be",
    '{"prompt": "a", "n": 99}': "line 2: the request wants 99 sequences",
    '{"prompt": "a", "max_tokens": 900}': "line 2: the request can need",
    '{"prompt": "a", "cache_salt": ""}': "line 2: cache_salt must be a text that is not empty",
    '{"prompt": "a", "cache_salt": 5}': "line 2: cache_salt must be a text that is not empty",
    "[" * 100_000: "line 2: not JSON",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_and_nothing_runs(run, tmp_path, line, message):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + '\n{"prompt": "fine too"}\n')
    status, out, err = run("--prompts-file", str(file))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"{file}, line 2: " in err and message in err


def test_all_bad_lines_are_named(run, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": "a", "max_tokens": i % 2}) for i in range(30)))
    err = run("--prompts-file", str(file))[2].splitlines()
    assert len(err) == 11 and "line 1: max_tokens=0: must be" in err[0] and err[-1].endswith("and 5 more")
    file.write_bytes(b"caf\xe9\n")
    assert "is not UTF-8 text" in run("--prompts-file", str(file))[2]
    file.write_text(" \n\n")
    assert "has no prompts: write one a line" in run("--prompts-file", str(file))[2]


def test_a_refused_run_leaves_the_old_trace_alone(run, tmp_path):
    file = tmp_path / "trace"
    file.write_text("precious\n")
    assert run("hi", "--trace", str(file), "--max-tokens", "900")[0] == 2
    assert file.read_text() == "precious\n"


# --- a process of its own -----------------------------------------------------------------------------------


def start(*argv, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
    return subprocess.Popen([sys.executable, "-m", "minipaged.generate", *argv], text=True, env=environment, **pipes)


def finish(process, text=None):
    out, err = process.communicate(text, timeout=60)
    return process.returncode, out, err


def test_no_arguments_tell_what_to_try():
    assert finish(start()) == (0, HINTS + "\n", "")
    assert HINTS.count("\n") < 14 and max(map(len, HINTS.splitlines())) < 80


def test_what_is_told_to_try_works(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("one\ntwo\n")
    examples = re.findall(r"minipaged\.generate (.+)", HINTS.replace("\\\n", ""))
    assert len(examples) == 7
    for example in examples:
        short = [] if "--num-blocks" in example else ["--max-tokens", "9"]
        status, out, err = run(*shlex.split(example), *short, pool=[])
        assert (status, bool(out)) == (0, True), err


def test_help_and_refusals_do_not_wait_for_pytorch():
    code = "import sys, minipaged.generate as g; g.main(['a', '--n', '0']); print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "n=0: must be" in done.stderr and done.stdout == "False\n"


def test_pipes(model, run):
    process = start("--model", model, *POOL, "--max-tokens", "9", "--stats", stdin=subprocess.PIPE)
    status, out, err = finish(process, "hello\n")
    assert (status, out) == (0, run("hello", "--max-tokens", "9")[1])
    assert err.startswith("memory account\n") and "\x1b" not in out + err


def test_ctrl_c_prints_what_was_finished(model):
    lines = "\n".join(json.dumps({"prompt": "a", "max_tokens": count}) for count in (2, 4000, 2))
    process = start("--model", model, "--prompts-file", "-", "--num-blocks", "500", stdin=subprocess.PIPE)
    process.stdin.write(lines)
    process.stdin.close()
    first = process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.stdout.read(), process.stderr.read()
    assert process.wait(60) == 130
    assert first.startswith("=== A") and "=== C" in out and "=== B" not in out
    assert err == "interrupted: 2 of 3 prompts were finished\n"


def test_ctrl_c_leaves_a_page_of_what_happened(model, tmp_path):
    page = tmp_path / "page.html"
    lines = "\n".join(json.dumps({"prompt": "a", "max_tokens": count}) for count in (2, 4000))
    flags = ["--model", model, "--prompts-file", "-", "--num-blocks", "500", "--html", str(page)]
    process = start(*flags, stdin=subprocess.PIPE)
    process.stdin.write(lines)
    process.stdin.close()
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert (process.stderr.read(), process.wait(60)) == ("interrupted: 1 of 2 prompts were finished\n", 130)
    lines = replayed(page)["lines"]
    assert lines[1]["did"]["finished"] == {"A": "length"} and "B" in lines[0]["patch"]["requests"]


def test_ctrl_c_while_loading(model):
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc to know when PyTorch is being loaded")
    process = start("hello", "--model", model, *POOL)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert finish(process) == (130, "", "interrupted\n")


def test_a_closed_pipe_is_quiet(model):
    process = start("hello", "you", "--n", "4", "--model", model, *POOL)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 141)
