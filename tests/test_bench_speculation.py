"""The benchmark of speculation: loads of real text, variants that guess, and vLLM's n-grams beside them."""

import ast
import json
import sys
from pathlib import Path

import pytest
from test_bench import fake_vllm, made_up, options, tiny  # noqa: F401 (fixtures)

from minipaged.bench import __main__ as bench
from minipaged.bench import acceptance, environments, peer_vllm, report, texts
from minipaged.bench.contenders import PEERS, build, why_not
from minipaged.bench.flags import parser
from minipaged.bench.loads import QUOTING, WRITTEN, Load, check, make_load, of_bytes
from minipaged.execution import executor
from minipaged.execution.speculative_config import SpeculativeConfig
from minipaged.models import open_checkpoint
from minipaged.text.tokenizer import Tokenizer
from minipaged.train_head import main as train_head

# --- loads ----------------------------------------------------------------------------------------------------------


def test_quotes_and_questions_are_what_they_say():
    quoting, quoting8, talk1 = (make_load(name, 500) for name in ("quoting", "quoting8", "talk1"))
    assert quoting.prompts == quoting8.prompts and quoting.outputs == quoting8.outputs
    assert len(quoting.prompts) == 8 and all(64 <= wanted <= 200 for wanted in quoting.outputs)
    assert (quoting.one_by_one, quoting.batch_size, quoting.num_sequences) == (True, 1, 1)
    assert (quoting8.one_by_one, quoting8.batch_size, quoting8.num_sequences) == (False, 8, 8)
    assert talk1.one_by_one and all(64 <= wanted <= 128 for wanted in talk1.outputs)
    assert all(load.at_once and load == make_load(load.name, 500) for load in (quoting, quoting8, talk1))


def test_the_code_among_the_quotes_is_code():
    source = texts.CODE.removeprefix("```python\n").removesuffix("```")
    assert [node.name for node in ast.parse(source).body] == ["step", "generate"]
    json.loads(texts.PEOPLE)


@pytest.mark.parametrize("name", WRITTEN)
def test_quick_ones_are_shorter(name):
    whole, quick = make_load(name, 500), make_load(name, 500, quick=True)
    assert quick.outputs == [wanted // 8 for wanted in whole.outputs]
    if name in QUOTING:
        assert all(len(b) < len(a) / 2 for a, b in zip(whole.prompts, quick.prompts, strict=True))


def test_texts_are_put_into_the_models_words(tiny):  # noqa: F811
    plain = open_checkpoint(tiny).tokenizer()
    encode = bench.encoder(plain)
    load = make_load("quoting", 256, False, encode)
    assert plain.decode(load.prompts[0]) == texts.QUOTES[0].ask + texts.QUOTES[0].about
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<answer>{% endif %}"
    chat = bench.encoder(Tokenizer(plain.backend, template))
    talk = make_load("talk1", 256, False, chat)
    assert plain.decode(talk.prompts[0]) == f"<user>{texts.QUESTIONS[0].ask}<answer>"
    assert of_bytes("é") == [195, 169]


# --- one after the other --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["minipaged", "ngram", "static"])
def test_one_after_the_other(tiny, name):  # noqa: F811
    load = make_load("talk1", 256, quick=True)
    contender = build(name, options(tiny, load))
    most = [0]
    if name != "static":
        contender.llm.observers.append(lambda plan, output: most.append(len(plan.sequences)))
    run = contender.run(load)
    check(load, run)
    assert max(most) <= 1
    assert len(run.first_token) == len(load.prompts) and sum(run.first_token) < run.seconds


def test_who_can_be_asked():
    loads = {name: make_load(name, 256, quick=True) for name in ("batch8", "quoting", "quoting8", "talk1")}
    may = {name: [load for load in loads if why_not(name, loads[load]) is None] for name in ("head", "ngram", *PEERS)}
    assert may["ngram"] == may["head"] == may["static"] == may["vllm"] == list(loads)
    assert may["continuous"] == may["llama.cpp"] == ["batch8", "quoting8"]
    assert may["vllm-ngram"] == ["quoting", "quoting8"]


# --- who guesses ----------------------------------------------------------------------------------------------------


def test_guesses_change_how_many_steps_and_no_token(tiny, capsys):  # noqa: F811
    args = ["--model", tiny, "--quick", "--load", *WRITTEN, "--threads", 1, "--repeat", 2, "--json"]
    assert bench.main([*map(str, args), "--peer", "ngram", "head"]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    why = data["left_out"].pop("head")
    assert why.startswith("there is no head for ") and f"left out: minipaged, a head's guesses: {why}" in err
    assert data["left_out"] == data["failed"] == {}
    rows = {(row["load"], row["contender"]): row for row in data["results"]}
    assert list(rows) == [(load, name) for load in WRITTEN for name in ("minipaged", "ngram")]
    for load in WRITTEN:
        plain, guessing = rows[load, "minipaged"], rows[load, "ngram"]
        assert guessing["same_tokens"] == guessing["requests"]
        assert guessing["guessed"] >= guessing["guessed_right"] >= 0 < guessing["speedup"]
        tokens, right = guessing["output_tokens"], guessing["guessed_right"]
        assert guessing["tokens_per_step"] == tokens / (tokens - right)
        assert plain["guessed"] is plain["guessed_right"] is plain["tokens_per_step"] is plain["speedup"] is None
    assert sum(row["guessed"] or 0 for row in rows.values()) > 0
    assert data["about"]["ngram"].endswith(", at most 16 guesses in a row")


def test_a_head_is_asked_in_the_same_way(tmp_path, monkeypatch, tiny):  # noqa: F811
    file = tmp_path / "tiny.safetensors"
    assert train_head(["--model", str(tiny), "--out", str(file), "--minutes", "0.05", "--vocabulary", "64"]) == 0
    monkeypatch.setattr(executor, "head_of", lambda name: file)
    load = make_load("quoting8", 256, quick=True)
    plain, head = (build(name, options(tiny, load)).run(load) for name in ("minipaged", "head"))
    assert head.tokens == plain.tokens and plain.guesses is None
    assert head.guesses[0] > 0


def test_what_the_table_says_of_guesses():
    load = Load("quoting", [[1], [1]], [4, 4], 1, one_by_one=True)
    same = [[1, 2, 3, 4]] * 2
    runs = {
        "minipaged": [made_up(same, 4.0), made_up(same, 8.0)],
        "ngram": [made_up(same, 2.0, guesses=(10, 4)), made_up(same, 2.0, guesses=(10, 4))],
        "static": [made_up(same, 8.0), made_up(same, 8.0)],
    }
    rows = report.summarize(load, "fp32", runs)
    names = ("guessed", "right", "a step", "speed is")
    assert set(names) <= set(report.columns(rows)) and not set(names) & set(report.columns([rows[0], rows[2]]))
    cells = [[report.COLUMNS[name](row) for name in names] for row in rows]
    assert cells == [["", "", "", ""], ["10", "40", "2.00", "3.00x"], ["", "", "", ""]]
    silent = report.summarize(load, "fp32", {"ngram": [made_up(same, 1.0, guesses=(0, 0))]})
    assert [report.COLUMNS[name](silent[0]) for name in names] == ["0", "", "1.00", ""]


# --- vLLM -----------------------------------------------------------------------------------------------------------

METRICS = """
    made = 0

    def get_metrics(self):
        LLM.made += 1
        counts = {"spec_decode_num_draft_tokens": 10 * LLM.made, "spec_decode_num_accepted_tokens": LLM.made, "x": 5}
        return [Made(name=f"vllm:{name}", value=count) for name, count in counts.items()]
"""


def test_vllm_guesses_too(tiny, fake_vllm, capsys):  # noqa: F811
    source = (fake_vllm / "__init__.py").read_text().replace("self.empty = False", "pass")  # what it knows, it may use
    (fake_vllm / "__init__.py").write_text(source + METRICS)
    args = ["--model", tiny, "--quick", "--load", "quoting", "batch8", "--threads", 1, "--json"]
    args += ["--peer", "vllm-ngram", "--peer-python", f"vllm={fake_vllm / 'python'}"]
    assert bench.main(list(map(str, args))) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["left_out"] == {"vllm-ngram": "of batch8: its guesses are for answers that quote"}
    row = next(row for row in data["results"] if row["contender"] == "vllm-ngram")
    assert (row["load"], row["guessed"], row["guessed_right"]) == ("quoting", 10, 1)
    made, *calls = [json.loads(line) for line in (fake_vllm / "asked").read_text().splitlines()]
    assert made["settings"]["speculative_config"] == peer_vllm.GUESSES
    assert made["settings"]["max_num_seqs"] == 1
    load = make_load("quoting", 256, True, bench.encoder(open_checkpoint(tiny).tokenizer()))
    assert [prompts for prompts, _ in calls[-8:]] == [[{"prompt_token_ids": prompt}] for prompt in load.prompts]


def test_vllm_looks_up_the_same_lengths_as_this_engine():
    ours = SpeculativeConfig.of({"method": "ngram"})
    assert {name: getattr(ours, name) for name in peer_vllm.GUESSES} == peer_vllm.GUESSES | {
        "num_speculative_tokens": ours.num_speculative_tokens
    }


# --- flags ----------------------------------------------------------------------------------------------------------


def test_vllms_guesses_live_where_vllm_does(fake_vllm, capsys):  # noqa: F811
    python = str(fake_vllm / "python")
    found, left_out = environments.find(["vllm", "vllm-ngram"], {"vllm": python}, False)
    assert found == {"vllm": python, "vllm-ngram": python} and not left_out
    _, left_out = environments.find(["vllm-ngram"], {}, False)
    assert left_out["vllm-ngram"].endswith("then --peer-python vllm=X/bin/python)") or "vllm" in sys.modules
    args = parser().parse_args(["--peer", "ngram", "--peer-python", "vllm=python"])
    with pytest.raises(bench.ModelError, match="--peer does not ask for vllm"):
        bench._peers(args, [], False)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--load", "quote"], "invalid choice: 'quote'"),
        (["--peer", "n-gram"], "invalid choice: 'n-gram'"),
        (["--peer", "vllm-ngram", "--peer-python", "vllm-ngram=python"], "'vllm-ngram=python' is not NAME=PATH"),
    ],
)
def test_bad_flags(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(args)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_model_without_a_tokenizer_can_be_asked_of_random_tokens_only(tiny, tmp_path, capsys):  # noqa: F811
    for file in Path(tiny).iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).symlink_to(file)
    assert bench.main(["--model", str(tmp_path), "--load", "quoting"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")


def test_acceptance_is_told_for_every_rule(tiny, tmp_path, capsys):  # noqa: F811
    flags = ["--model", str(tiny), "--speculate", "draft", "--speculative-model", str(tiny)]
    assert acceptance.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 1 + 9 + 6
    numbers = {line[:50].strip(): tuple(map(float, line[50:].split())) for line in lines[1:]}
    assert numbers["temperature 1.0: draw, probabilistic"][0] > 3.9, "the model itself is always right"
    assert numbers["temperature 1.0: draw, greedy"] < numbers["temperature 1.0: rejection"]
    assert acceptance.main(["--speculate", "draft", "--speculative-model", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
