"""Outputs of a form, in the whole engine: each is of its form, and the same tokens in any company."""

import json
import random
import re
import threading
from collections import Counter

import jsonschema
import pytest
from tiny_model import make_folder

from minipaged import LLM, SamplingParams, StructuredOutputsParams
from minipaged.decoding.grammar import Matcher
from minipaged.generate import main

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": -20, "maximum": 99},
        "b": {"type": "array", "items": {"enum": ["x", True, None]}, "maxItems": 3},
        "c": {"type": "string", "pattern": "^[a-c]{1,3}$"},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}


def is_json(text):
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


def balanced(text):
    return text.count("[") == text.count("]") == text.index("a") if "a" in text else False


FORMS = {
    "regex": ({"regex": r"[a-f]{2,5}x|(ab)+\d"}, re.compile(r"[a-f]{2,5}x|(ab)+\d").fullmatch),
    "choice": ({"choice": ["yes", "no", "yes, but", 'a "b"']}, ["yes", "no", "yes, but", 'a "b"'].__contains__),
    "json": ({"json": SCHEMA, "disable_any_whitespace": True}, is_json),
    "spaced": ({"json": SCHEMA, "whitespace_pattern": " ?"}, is_json),
    "any json": ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
    "gbnf": ({"grammar": 'root ::= "a" | "[" root "]"'}, balanced),
    "lark": ({"grammar": 'start: WORD ("," WORD)*\nWORD: /[a-z]{2}/'}, re.compile("[a-z]{2}(,[a-z]{2})*").fullmatch),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("forms")))


@pytest.fixture(scope="module")
def alone(folder):
    return LLM(folder, block_size=4, num_blocks=400, prefix_cache="none")


@pytest.mark.parametrize("form", FORMS)
def test_every_output_that_ends_is_of_its_form(alone, form):
    asked, right = FORMS[form]
    params = [SamplingParams(seed=seed, max_tokens=60, structured_outputs=asked) for seed in range(200)]
    outputs = alone.generate([[5, 6, 7 + seed % 9] for seed in range(200)], params)
    ends = [output.outputs[0].text for output in outputs if output.outputs[0].finish_reason == "stop"]
    assert {output.outputs[0].finish_reason for output in outputs} <= {"stop", "length"}
    assert all(map(right, ends)) and len(ends) > 50 and len({*ends}) >= 4
    for output in outputs:  # the model's own end, and nothing behind it
        tokens = output.outputs[0].token_ids
        assert 95 not in tokens[:-1] and (tokens[-1] == 95) == (output.outputs[0].finish_reason == "stop")


# ---- the same tokens in any company ---------------------------------------------------------------------------------


def wishes(count, seed=0):
    """Prompts and parameters: two of three have a form."""
    rng, forms = random.Random(seed), list(FORMS.values())
    for number in range(count):
        prompt = [rng.choice([5, 6])] * rng.randint(1, 9) + [rng.randint(4, 60) for _ in range(rng.randint(1, 12))]
        form = rng.choice(forms)[0] if number % 3 else None
        temperature, n = rng.choice([(0, 1), (1, 1), (1, 1), (1.5, 3)])
        yield prompt, SamplingParams(
            temperature=temperature, n=n, seed=number, max_tokens=rng.randint(1, 40), structured_outputs=form,
            logprobs=rng.choice([None, 2]), top_k=rng.choice([0, 5]), min_p=rng.choice([0, 0.01]),
        )  # fmt: skip


def told(output):
    return [(o.text, o.token_ids, o.finish_reason, str(o.logprobs)) for o in output.outputs], output.error


ENGINES = {
    "a crowd": dict(num_blocks=1000),
    "recomputing": dict(num_blocks=44, preemption="recompute", watermark=0.0),
    "swapping": dict(num_blocks=44, preemption="swap", watermark=0.0),
    "chunks": dict(num_blocks=300, max_num_batched_tokens=17, max_num_seqs=16),
    "no chunks": dict(num_blocks=300, chunked_prefill=False),
    "hash": dict(num_blocks=120, prefix_cache="hash"),
    "radix": dict(num_blocks=120, prefix_cache="radix", schedule="prefix"),
    "ngram": dict(num_blocks=300, speculative_config={"method": "ngram", "prompt_lookup_min": 1, "adaptive": False,
                                                      "num_speculative_tokens": 4, "num_branches": 2}),
    "draft": dict(num_blocks=300, speculative_config={"method": "draft", "num_speculative_tokens": 3,
                                                      "num_branches": 2, "adaptive": False}),
    "draft, swapping": dict(num_blocks=60, preemption="swap", watermark=0.0,
                            speculative_config={"method": "draft", "num_speculative_tokens": 3, "adaptive": False}),
}  # fmt: skip


@pytest.fixture(scope="module")
def wanted(alone):
    """Each answered alone."""
    return [told(alone.generate([prompt], params)[0]) for prompt, params in wishes(60)]


@pytest.mark.parametrize("name", ENGINES)
def test_the_same_tokens_as_alone(folder, wanted, name):
    options = {"max_num_seqs": 32, "prefix_cache": "none"} | ENGINES[name]
    if options.get("speculative_config", {}).get("method") == "draft":
        options["speculative_config"] = options["speculative_config"] | {"model": folder}
    llm = LLM(folder, block_size=4, debug=True, **options)
    prompts, params = zip(*wishes(60), strict=True)
    assert [told(output) for output in llm.generate(list(prompts), list(params))] == wanted
    stats = llm.stats()
    if "preemption" in options:
        assert stats.num_preemptions[options["preemption"]] > 5
    if "speculative_config" in options:
        assert stats.speculation.num_accepted_tokens > 20
    assert not llm.executor.runner.masks._matchers or len(llm.executor.runner.masks._matchers) <= 32


def test_the_others_get_what_they_get_without_a_form_beside_them(folder, wanted):
    llm = LLM(folder, block_size=4, num_blocks=300, prefix_cache="none", max_num_seqs=32)
    plain = [(prompt, params, its) for (prompt, params), its in zip(wishes(60), wanted, strict=True)
             if not params.structured_outputs]  # fmt: skip
    prompts, params, its = map(list, zip(*plain, strict=True))
    assert [told(output) for output in llm.generate(prompts, params)] == its
    assert llm.executor.runner.masks._helper is None  # who asks for no form pays for none


def test_without_a_draw_by_luck_rejection_gives_only_what_is_allowed(folder):
    guesses = {"method": "draft", "model": folder, "acceptance": "rejection", "num_speculative_tokens": 4,
               "adaptive": False}  # fmt: skip
    llm = LLM(folder, block_size=4, num_blocks=400, speculative_config=guesses)
    for asked, right in FORMS.values():
        params = [SamplingParams(seed=seed, max_tokens=60, structured_outputs=asked) for seed in range(60)]
        ends = [o.outputs[0] for o in llm.generate([[5, 6, 7]] * 60, params)]
        assert {o.finish_reason for o in ends} <= {"stop", "length"}
        assert all(right(o.text) for o in ends if o.finish_reason == "stop")
    assert llm.stats().speculation.num_accepted_tokens > 100


def test_rejection_gives_texts_as_often_as_without_guesses(folder, alone):
    guesses = {"method": "draft", "model": folder, "acceptance": "rejection", "num_speculative_tokens": 2,
               "adaptive": False}  # fmt: skip
    llm = LLM(folder, block_size=4, num_blocks=400, speculative_config=guesses)
    params = [SamplingParams(temperature=2.0, seed=seed, structured_outputs={"regex": "x[abc][ab]"})
              for seed in range(600)]  # fmt: skip
    counts = [Counter(o.outputs[0].text for o in one.generate([[5, 6, 7]] * 600, params)) for one in (alone, llm)]
    assert len(counts[0]) == 6 == len(counts[1])
    assert sum(abs(counts[0][text] - counts[1][text]) for text in counts[0]) < 120  # by luck: about 60


# ---- nobody pays for another ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"structured_outputs": {"choice": ["ab"]}, "allowed_token_ids": [3]}, "allowed_token_ids allows only 1 of 96"),
        ({"structured_outputs": {"choice": ["ab"]}, "min_tokens": 5}, "min_tokens=5 forbids 1 of 96"),
        ({"structured_outputs": {"choice": ["ab"]}, "bad_words": ["b"]}, "bad_words forbid 1 of 96"),
    ],
)
def test_who_has_nothing_left_to_draw_ends_alone(folder, wanted, options, said):
    llm = LLM(folder, block_size=4, num_blocks=300, prefix_cache="none", max_num_seqs=32)
    prompts, params = map(list, zip(*wishes(60), strict=True))
    prompts.insert(3, [5, 6])
    params.insert(3, SamplingParams(seed=1, logprobs=1, **options))
    outputs = llm.generate(prompts, params)
    bad = outputs.pop(3)
    assert bad.outputs[0].finish_reason == "error"
    assert f"structured_outputs allows 1 of 96 tokens, {said}" in bad.error
    assert [told(output) for output in outputs] == wanted and llm.stats().memory.used == 0


def test_a_grammar_that_breaks_ends_its_own_request(folder, wanted, monkeypatch):
    llm = LLM(folder, block_size=4, num_blocks=300, prefix_cache="none", max_num_seqs=32)
    prompts, params = map(list, zip(*wishes(60), strict=True))
    prompts.append([5, 6])
    params.append(SamplingParams(seed=1, structured_outputs={"regex": "Zz{9}"}))
    mask = Matcher.mask

    def broken(self, output, end_ids):  # an output that the grammar can't have
        return mask(self, [1, 2] if len(output) == 3 and output[0] == 57 else output, end_ids)

    monkeypatch.setattr(Matcher, "mask", broken)
    *outputs, bad = llm.generate(prompts, params)
    assert bad.outputs[0].finish_reason == "error" and bad.outputs[0].text == "Zzz"
    assert bad.error.startswith("structured_outputs: ") and [told(output) for output in outputs] == wanted


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"regex": "("}, "structured_outputs.regex: "), ({"json": {"not": {}}}, "structured_outputs.json: .*not")],
)
def test_a_bad_wish_is_refused_when_it_is_added(alone, asked, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        alone.add_request([5], SamplingParams(structured_outputs=asked))
    assert not alone.has_unfinished_requests


# ---- where texts end ------------------------------------------------------------------------------------------------


def test_all_tokens_that_end_a_text_may_end_it_where_it_may_end(alone):
    form = StructuredOutputsParams(regex="a{3,9}")
    params = [SamplingParams(seed=seed, stop_token_ids=[90, 91], temperature=3, structured_outputs=form)
              for seed in range(100)]  # fmt: skip
    outputs = [output.outputs[0] for output in alone.generate([[5, 6]] * 100, params)]
    assert {o.stop_reason for o in outputs} == {None, 90, 91} and all(re.fullmatch("a{3,9}", o.text) for o in outputs)


def test_a_model_without_an_end_needs_stop_tokens(folder, tmp_path):
    make_folder(tmp_path)
    for name in ("config.json", "generation_config.json"):
        said = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(said | {"eos_token_id": None}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    llm = LLM(str(tmp_path), block_size=4, num_blocks=100)
    assert llm.config.eos_token_ids == ()
    with pytest.raises(ValueError, match="^structured_outputs: the model has no end-of-text token"):
        llm.generate([[5]], SamplingParams(structured_outputs={"regex": "a"}))
    [output] = llm.generate([[5]], SamplingParams(structured_outputs={"regex": "a"}, stop_token_ids=[9]))
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("a", 9)


def test_logprobs_are_of_the_raw_logits(alone):
    before, after = (
        alone.generate([[5, 6]], SamplingParams(temperature=0, max_tokens=1, logprobs=20, structured_outputs=form))[0]
        for form in (None, {"choice": ["@@"]})
    )
    ours, theirs = after.outputs[0].logprobs[0], before.outputs[0].logprobs[0]
    assert after.outputs[0].text == "@" and ours[31].rank > 1
    assert all(ours[token] == theirs[token] for token in theirs)


# ---- while the model computes ---------------------------------------------------------------------------------------


def test_masks_are_made_while_the_model_computes(folder, monkeypatch):
    llm = LLM(folder, block_size=4, num_blocks=100)
    made, waited, runner = threading.Event(), [], llm.executor.runner
    masks, model = Matcher.masks, runner.model

    def noted(self, *asked):
        try:
            return masks(self, *asked)
        finally:
            made.set()

    class Waiting:
        def __call__(self, *inputs):
            waited.append(made.wait(5))
            made.clear()
            return model(*inputs)

        def __getattr__(self, name):
            return getattr(model, name)

    monkeypatch.setattr(Matcher, "masks", noted)
    runner.model = Waiting()
    [output] = llm.generate([[5]], SamplingParams(structured_outputs={"choice": ["abc"]}))
    assert output.outputs[0].text == "abc" and waited == [True] * 4


# ---- the command line -----------------------------------------------------------------------------------------------


def test_a_line_of_json_may_ask_for_a_form(folder, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a", "structured_outputs": {"choice": ["yes"]}}, {"prompt": "b", "max_tokens": 2}]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert main(["--model", folder, "--num-blocks", "90", "--json", "--prompts-file", str(file)]) == 0
    first, _ = capsys.readouterr().out.splitlines()
    assert json.loads(first)["outputs"][0]["text"] == "yes"
    file.write_text(json.dumps({"prompt": "a", "structured_outputs": {"choice": []}}))
    assert main(["--model", folder, "--num-blocks", "90", "--prompts-file", str(file)]) == 2
    assert "line 1: structured_outputs.choice=[]: must be" in capsys.readouterr().err


def test_there_are_flags_for_two_forms(folder, tmp_path, capsys):
    options, file = ["--model", folder, "--num-blocks", "90", "--seed", "3"], tmp_path / "schema.json"
    file.write_text(json.dumps({"enum": ["a", "b"]}))
    assert main([*options, "--json-schema", str(file), "x"]) == 0
    assert capsys.readouterr().out.strip() in ('"a"', '"b"')
    assert main([*options, "--regex", "[xyz]{4}", "x"]) == 0
    assert re.fullmatch("[xyz]{4}", capsys.readouterr().out.strip())
    for bad, said in (
        (["--json-schema", str(tmp_path / "none")], "cannot read .*none: No such file"),
        (["--regex", "("], "prompt 1: structured_outputs.regex: .*unclosed group"),
        (["--regex", ""], "structured_outputs.regex='': must be"),
        (["--regex", "a", "--json-schema", str(file)], "not allowed with"),
        (["--regex", "a", "--beam-width", "2"], "structured_outputs.*: not together with beam_width"),
    ):
        assert main([*options, *bad, "x"]) == 2
        assert re.search(said, capsys.readouterr().err)
