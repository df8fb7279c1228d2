"""Logprobs of the prompt: those of transformers, however the prompt is cut, cached, shared or thrown out."""

import json

import pytest
import torch
import transformers
from tiny_model import make_folder

from minipaged import LLM, BeamSearchParams, SamplingParams
from minipaged.execution import answers
from minipaged.generate import main
from minipaged.requests.sampling_params import Logprob
from minipaged.scheduling.admission import Admission

PROMPTS = [[(7 * i + 3 * k * k + k) % 95 for k in range(n)] for i, n in enumerate((1, 2, 17, 40))]
CHUNKS = [dict(max_num_batched_tokens=1, max_num_seqs=1), *(dict(max_num_batched_tokens=n) for n in (3, 7, 256))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def make(folder):
    """make(**settings): an engine with small blocks, checked at every step."""
    given = {"block_size": 4, "num_blocks": 200, "max_num_seqs": 3, "max_logprobs": -1, "debug": True}
    return lambda **settings: LLM(str(folder), **{**given, **settings})


@pytest.fixture(scope="module")
def llm(make):
    return make()


@pytest.fixture(scope="module")
def check(folder):
    """check(prompt, k, found): found is what transformers says of the prompt."""
    oracle = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def check(prompt, k, found):
        with torch.no_grad():
            rows = oracle(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert len(found) == len(prompt) and found[0] is None
        for row, token, one in zip(rows, prompt[1:], found[1:], strict=False):
            assert one.keys() == set(row.topk(k).indices.tolist()) | {token}
            values = [told.logprob for told in one.values()]
            assert values == pytest.approx([row[t].item() for t in one], abs=1e-4)
            assert values == sorted(values, reverse=True)
            assert [told.rank for told in one.values()] == [1 + int((row > row[t]).sum()) for t in one]

    return check


def wish(k, **more):
    return SamplingParams(prompt_logprobs=k, **{"temperature": 0, "max_tokens": 3, "ignore_eos": True, **more})


def tokens(outputs):
    return [[one.token_ids for one in output.outputs] for output in outputs]


def finish(llm):
    """Step to the end. Returns {request id: its last output}."""
    last = {}
    while llm.has_unfinished_requests:
        last.update({output.request_id: output for output in llm.step()})
    usage = llm.stats().memory
    assert usage.free == usage.num_blocks and usage.cpu_used == 0
    return last


# ---- the values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 5, 1000])
def test_they_are_those_of_transformers(llm, check, k):
    outputs = llm.generate(PROMPTS, wish(k))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        check(prompt, min(k, 96), output.prompt_logprobs)
    assert tokens(outputs) == tokens(llm.generate(PROMPTS, wish(None)))


def test_they_are_the_raw_models(llm, check):
    params = wish(4, temperature=1.7, top_k=2, repetition_penalty=3.0, min_tokens=2, logprobs=1, seed=3)
    [output] = llm.generate(PROMPTS[2], params)
    check(PROMPTS[2], 4, output.prompt_logprobs)
    assert len(output.outputs[0].logprobs) == 3


def test_who_does_not_ask_gets_none_beside_those_who_do(llm, check):
    wanted = [2, None, 0, 5]
    prompts = [PROMPTS[3], PROMPTS[2], PROMPTS[2], PROMPTS[1]]
    for prompt, k, output in zip(prompts, wanted, llm.generate(prompts, [wish(k) for k in wanted]), strict=True):
        if k is None:
            assert output.prompt_logprobs is None
        else:
            check(prompt, k, output.prompt_logprobs)
    [beams] = llm.generate(PROMPTS[2], BeamSearchParams(beam_width=2, max_tokens=2))
    assert beams.prompt_logprobs is None


@pytest.mark.parametrize("bad", [-2, 1.0, True, "5"])
def test_a_bad_value_is_refused_by_name(bad):
    with pytest.raises(ValueError, match="^prompt_logprobs=") as error:
        SamplingParams(prompt_logprobs=bad)
    assert f"prompt_logprobs={bad!r}: must be None or an integer >= 0" in str(error.value)


def test_logits_are_held_in_pieces_of_bounded_size(make, check, monkeypatch):
    llm = make()
    sizes, logits = [], llm.executor.runner.model.logits

    def counted(hidden):
        sizes.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr(llm.executor.runner.model, "logits", counted)
    prompts = [[(5 * i * i + i + n) % 95 for i in range(n)] for n in (100, 300)]
    outputs = llm.generate(prompts, [wish(1), wish(3)])
    assert max(sizes) == answers.PIECE == 128 and sum(sizes) == 99 + 299 + 3 * 2
    for prompt, k, output in zip(prompts, (1, 3), outputs, strict=True):
        check(prompt, k, output.prompt_logprobs)


# ---- chunks and caches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["none", "hash", "radix"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_they_are_the_same_with_every_chunk_and_cache(make, check, cache, chunk):
    llm = make(prefix_cache=cache, **chunk)
    for warm in (False, True):
        outputs = llm.generate(PROMPTS, wish(2))
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            check(prompt, 2, output.prompt_logprobs)
            assert output.metrics.num_cached_tokens == 0
        others = llm.generate(PROMPTS, wish(None))
        assert tokens(others) == tokens(outputs)
        cached = 0 if cache == "none" else (len(PROMPTS[3]) - 1) // 4 * 4
        assert others[3].metrics.num_cached_tokens == cached, warm  # of the blocks that it left


@pytest.mark.parametrize("cache", ["hash", "radix"])
def test_a_long_prefix_is_no_reason_to_come_first(make, check, cache):
    llm = make(prefix_cache=cache, schedule="prefix", max_num_seqs=1)
    llm.generate(PROMPTS, wish(None))
    order = [llm.add_request(p, wish(k)) for p, k in ((PROMPTS[3], 1), (PROMPTS[2], 1), (PROMPTS[2], None))]
    last = finish(llm)
    began = [last[name].metrics.first_scheduled_time for name in order]
    assert began[2] < began[0] < began[1]  # only the last of them finds what is there
    check(PROMPTS[3], 1, last[order[0]].prompt_logprobs)


@pytest.mark.parametrize("cache", ["hash", "radix"])
def test_its_blocks_are_found_under_its_own_salt_only(make, cache):
    llm = make(prefix_cache=cache)
    found = []
    for salt, k in (("mine", 1), (None, None), ("other", None), ("mine", None)):
        name = llm.add_request(PROMPTS[3], wish(k), cache_salt=salt)
        found.append(finish(llm)[name].metrics.num_cached_tokens)
    assert found == [0, 0, 0, 36]


def test_in_debug_mode_logits_that_are_not_computed_are_noticed(make, monkeypatch):
    llm = make()
    llm.generate(PROMPTS[3], wish(None))
    monkeypatch.setattr(Admission, "_find", lambda self, request: self._memory.find(request.prompt_token_ids[:-1]))
    with pytest.raises(IndexError, match="the logits for position 1 are not computed now"):
        llm.generate(PROMPTS[3], wish(1))


def test_steps_are_plain_data(make, check):
    llm, lines = make(max_num_batched_tokens=7), []
    llm.observers.append(lambda plan, output: lines.append(json.dumps([plan.to_json(), output.to_json()])))
    llm.generate(PROMPTS[2], wish(1))
    targets = [json.loads(line)[0]["sequences"][0]["targets"] for line in lines]
    assert targets[:3] == [
        {"start": start, "token_ids": PROMPTS[2][start : start + 7], "num_best": 1} for start in (1, 8, 15)
    ]
    assert targets[3:] == [None] * 2
    found = [one for line in lines for one in json.loads(line)[1]["prompt_logprobs"].get("0", [])]
    check(PROMPTS[2], 1, [None, *({int(t): Logprob(**told) for t, told in one.items()} for one in found)])


# ---- samples, preemption, abort ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", CHUNKS[1:])
def test_samples_share_one_account_of_the_prompt(make, check, chunk):
    llm, targets = make(**chunk), []
    llm.observers.append(lambda plan, _: targets.extend(s.targets.token_ids for s in plan.sequences if s.targets))
    [output] = llm.generate(PROMPTS[2], wish(3, n=3, temperature=1.0, seed=1))
    assert len(output.outputs) == 3 and sum(targets, []) == PROMPTS[2][1:]  # each of them once
    check(PROMPTS[2], 3, output.prompt_logprobs)


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("budget", [2, 3])
def test_preempted_in_the_middle_of_the_prompt(make, check, mode, budget):
    llm = make(num_blocks=15, max_num_seqs=2, max_num_batched_tokens=budget, preemption=mode, watermark=0)
    had, starts = [], []  # so many entries there were at each preemption; where each admission began

    def watch(plan, output):
        if plan.preempted:
            had.append(len(llm._requests["late"][0].prompt_logprobs))
        starts.extend(s.start for s in plan.sequences if s.request_id in plan.admitted)

    llm.observers.append(watch)
    early = llm.add_request(PROMPTS[1], wish(0, max_tokens=34))
    for _ in range(16 * (budget - 2)):
        llm.step()
    llm.add_request(PROMPTS[3], wish(2, max_tokens=4), "late")
    last = finish(llm)
    assert last["late"].metrics.num_preemptions == len(had) > 0 and 1 < had[0] < len(PROMPTS[3])
    assert llm.stats().num_preemptions[mode] == len(had) and not any(starts)
    check(PROMPTS[3], 2, last["late"].prompt_logprobs)
    check(PROMPTS[1], 0, last[early].prompt_logprobs)


@pytest.mark.parametrize("cache", ["hash", "radix"])
@pytest.mark.parametrize("n", [1, 2])
def test_preempted_afterwards_it_may_use_the_cache(make, check, n, cache):
    llm = make(num_blocks=15 + 4 * n, prefix_cache=cache, preemption="recompute", watermark=0)
    params = [wish(0, max_tokens=40), wish(2, max_tokens=24, n=n, temperature=1.0, seed=4)]
    outputs = llm.generate([PROMPTS[2], PROMPTS[2][::-1]], params)
    assert outputs[1].metrics.num_preemptions > 0 and llm.stats().prefixes.recovered >= 4
    check(PROMPTS[2], 0, outputs[0].prompt_logprobs)
    check(PROMPTS[2][::-1], 2, outputs[1].prompt_logprobs)


def test_aborted_in_the_middle_of_the_prompt(make, check):
    llm = make(max_num_batched_tokens=7)
    names = [llm.add_request(PROMPTS[3], wish(2)) for _ in range(3)]
    llm.step()
    llm.abort(names[0])
    last = finish(llm)
    assert last.keys() == set(names[1:])
    for output in last.values():
        check(PROMPTS[3], 2, output.prompt_logprobs)


# ---- the command line ------------------------------------------------------------------------------------------


def test_a_line_of_json_may_ask_for_them(folder, llm, capsys, tmp_path):
    asked = [{"prompt_token_ids": PROMPTS[2], "temperature": 0, **more} for more in ({"prompt_logprobs": 2}, {})]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, asked)))
    assert main(["--model", str(folder), "--num-blocks", "40", "--prompts-file", str(file), "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "prompt_logprobs" in answers[0] and "prompt_logprobs" not in answers[1]
    first, *others = answers[0]["prompt_logprobs"]
    [output] = llm.generate(PROMPTS[2], wish(2))
    assert first is None
    for one, given in zip(others, output.prompt_logprobs[1:], strict=True):
        assert [int(t) for t in one] == list(given)
        for told, own in zip(one.values(), given.items(), strict=True):
            assert told["logprob"] == pytest.approx(own[1].logprob, abs=1e-4)
            assert told["rank"] == own[1].rank
            assert told["decoded_token"] == own[1].decoded_token == llm.tokenizer.decode([own[0]], False)
