"""Each answer reaches whoever asked, whoever steps; what a caller holds is his own; options say what is wrong."""

import gc
import threading

import pytest
import torch
from tiny_model import make_folder

from minipaged import LLM, BeamSearchParams, RequestOutputKind, RequestRefused, SamplingParams
from minipaged.execution import pool_size
from minipaged.execution.engine_args import EngineArgs

PROMPTS = [[5 + i, 6, 7, 8 + i] * (1 + i) for i in range(6)]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("answers"))


@pytest.fixture
def llm(folder):
    return LLM(str(folder), block_size=4, num_blocks=100, debug=True)


@pytest.fixture(scope="module")
def greedy(folder):
    llm = LLM(str(folder), block_size=4, num_blocks=100, prefix_cache="none")
    return [llm.generate([prompt], GREEDY)[0].outputs[0].token_ids for prompt in PROMPTS]


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


# ---- who gets it --------------------------------------------------------------------------------------------------


def test_what_generate_finished_for_others_waits_for_them(llm, greedy):
    mine = llm.add_request(PROMPTS[0], GREEDY)
    assert tokens(llm.generate(PROMPTS[1:3], GREEDY)) == greedy[1:3]
    assert llm.has_unfinished_requests
    [answer] = llm.step()
    assert answer.request_id == mine and answer.finished and tokens([answer]) == [greedy[0]]
    assert not llm.has_unfinished_requests and llm.step() == []


def test_streams_taken_in_turns_each_see_all_of_their_own(llm, greedy):
    streams = {i: llm.stream(PROMPTS[i], GREEDY) for i in range(4)}
    last, order = {}, 0
    while streams:
        order += 1
        for i in [i for i in streams if order % (i + 1) == 0]:
            if (output := next(streams[i], None)) is None:
                del streams[i]
            else:
                last[i] = output
    assert [last[i].outputs[0].token_ids for i in range(4)] == greedy[:4] and all(o.finished for o in last.values())


def test_a_job_within_a_stream(llm, greedy):
    seen = []
    for output in llm.stream(PROMPTS[0], GREEDY):
        seen.append(output.outputs[0].token_ids)
        assert tokens(llm.generate(PROMPTS[2], GREEDY)) == [greedy[2]]
    assert seen[-1] == greedy[0] and not llm.has_unfinished_requests


def test_a_stream_checks_its_prompts_at_once_and_one_that_is_dropped_leaves_nothing(llm):
    with pytest.raises(ValueError, match="prompt 1: token id 'x'"):
        llm.stream([PROMPTS[0], ["x"]], GREEDY)
    assert not llm.has_unfinished_requests
    stream = llm.stream(PROMPTS, GREEDY)
    assert llm.has_unfinished_requests
    del stream
    assert not llm.has_unfinished_requests and llm.stats().memory.used == 0


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_stream_that_is_found_to_be_garbage_in_the_middle_of_a_step(llm, greedy, monkeypatch):
    execute = llm.executor.execute

    def collects(plan):
        gc.collect()
        return execute(plan)

    monkeypatch.setattr(llm.executor, "execute", collects)
    gc.disable()
    try:
        circle = [llm.stream(PROMPTS[1:], GREEDY)]
        circle.append(circle)
        del circle
        assert tokens(llm.generate(PROMPTS[0], GREEDY)) == [greedy[0]]
    finally:
        gc.enable()
    assert not llm.has_unfinished_requests and llm.stats().memory.used == 0


def test_a_handler_of_signals_cannot_ask_in_the_middle_of_a_step(llm, greedy, monkeypatch):
    execute, name, said = llm.executor.execute, llm.add_request(PROMPTS[0], GREEDY), []

    def handled(plan):
        for ask in (llm.step, lambda: llm.abort(name), lambda: llm.add_request(PROMPTS[1], GREEDY), llm.stats):
            with pytest.raises(RuntimeError, match="in the middle of its own step") as error:
                ask()
        said.append(error)
        return execute(plan)

    monkeypatch.setattr(llm.executor, "execute", handled)
    while llm.has_unfinished_requests:
        [output] = llm.step()
    assert len(said) == 12 and tokens([output]) == [greedy[0]]


@pytest.mark.parametrize("way", ["generate", "stream", "by hand"])
def test_threads_take_turns(folder, greedy, way):
    llm = LLM(str(folder), block_size=4, num_blocks=60, max_num_seqs=5, debug=True)
    wrong, together = [], threading.Barrier(4)

    def work(number):
        together.wait()
        for round_ in range(12):
            i = (number + round_) % len(PROMPTS)
            if way == "generate":
                found = tokens(llm.generate(PROMPTS[i], GREEDY))
            elif way == "stream":
                found = tokens([list(llm.stream(PROMPTS[i], GREEDY))[-1]])
            else:
                found = [greedy[i]] if llm.add_request(PROMPTS[i], GREEDY) else []
            if found != [greedy[i]]:
                wrong.append((number, i, found))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = {}
    while llm.has_unfinished_requests:
        last |= {output.request_id: output for output in llm.step()}
    assert not wrong and len(last) == (48 if way == "by hand" else 0)
    known = {tuple(prompt): row for prompt, row in zip(PROMPTS, greedy, strict=True)}
    assert all(o.outputs[0].token_ids == known[tuple(o.prompt_token_ids)] for o in last.values())
    assert llm.stats().memory.used == 0


# ---- what a caller holds is his own -------------------------------------------------------------------------------


def test_lists_are_copied_on_the_way_in_and_out(llm, greedy):
    prompt = list(PROMPTS[3])
    name = llm.add_request(prompt, GREEDY)
    prompt[:] = [9] * 9
    while llm.has_unfinished_requests:
        [output] = llm.step()
        ids = output.outputs[0].token_ids
        assert output.prompt_token_ids == PROMPTS[3] and ids == greedy[3][: len(ids)]
        output.prompt_token_ids.clear()
        ids.append(1)
    assert output.request_id == name and output.finished


def test_an_output_says_what_was_true_when_it_was_made(llm):
    outputs = list(llm.stream(PROMPTS[0], SamplingParams(temperature=0, max_tokens=12, logprobs=1)))
    assert [len(o.outputs[0].token_ids) for o in outputs] == list(range(1, 13))
    assert [len(o.outputs[0].logprobs) for o in outputs] == list(range(1, 13))
    texts = [o.outputs[0].text for o in outputs]
    assert all(new.startswith(old) for old, new in zip(texts, texts[1:], strict=False)) and len(set(texts)) > 6


def test_beams_show_what_they_have_while_they_run(llm):
    params = BeamSearchParams(3, max_tokens=8, ignore_eos=True)
    outputs = list(llm.stream(PROMPTS[0], params))
    assert all(len(o.outputs) == 3 for o in outputs)
    assert [o.outputs[0].finish_reason for o in outputs] == [None] * 7 + ["length"]
    assert [len(o.outputs[0].token_ids) for o in outputs] == list(range(1, 9))
    assert all(o.outputs[0].text == llm.tokenizer.decode(o.outputs[0].token_ids) for o in outputs)


# ---- vLLM's forms -------------------------------------------------------------------------------------------------


def test_vllms_forms(folder, greedy):
    with LLM(model=str(folder), enable_prefix_caching=False, enforce_eager=True, dtype=torch.float32,
             kv_cache_memory_bytes="1MiB", enable_chunked_prefill=True, max_num_seqs=8) as llm:  # fmt: skip
        assert llm.prefix_cache == "none" and llm.memory.num_blocks == 2**20 // llm.block_bytes
        assert tokens(llm.generate(prompts=PROMPTS[:2], sampling_params=GREEDY, use_tqdm=True)) == greedy[:2]
        messages = [{"role": "user", "content": "Hi"}]
        [one] = llm.chat(messages, GREEDY)
        two = llm.chat([messages, messages], sampling_params=[GREEDY, GREEDY])
        assert one.prompt == "<user>Hi" and tokens(two) == tokens([one]) * 2
        [found] = llm.beam_search([PROMPTS[0]], BeamSearchParams(2, max_tokens=3))
        best = llm.generate(PROMPTS[0], BeamSearchParams(2, max_tokens=3))[0].outputs[0]
        assert found.sequences[0].tokens == PROMPTS[0] + best.token_ids
        assert found.sequences[0].cum_logprob == best.cumulative_logprob
        assert llm.get_tokenizer().decode(best.token_ids) == best.text
        llm.add_request(PROMPTS[0], GREEDY)
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate(PROMPTS[0], GREEDY)


def test_without_a_limit_an_output_ends_where_the_pool_does(folder):
    llm = LLM(str(folder), block_size=4, num_blocks=8)
    [output] = llm.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    assert output.outputs[0].finish_reason == "length" and len(output.outputs[0].token_ids) == 8 * 4 + 1 - 3
    [output] = llm.generate([1, 2, 3, 4, 5], SamplingParams(n=3, seed=1, max_tokens=None, ignore_eos=True))
    assert [len(o.token_ids) for o in output.outputs] == [(1 + 7 // 3) * 4 + 1 - 5] * 3
    with pytest.raises(RequestRefused, match="can need 9 blocks"):
        llm.generate([1, 2, 3], SamplingParams(max_tokens=31))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"max_num_seqs": 2.5}, "max_num_seqs=2.5: must be an integer of at least 1"),
        ({"block_size": True}, "block_size=True: must be an integer of at least 1"),
        ({"seed": "x"}, "seed='x': must be None or an integer of at least 0"),
        ({"chunked_prefill": "no"}, "chunked_prefill='no': must be True or False"),
        ({"enable_chunked_prefill": 1}, "enable_chunked_prefill=1: must be True or False"),
        ({"max_num_batched_tokens": 100.5}, "max_num_batched_tokens=100.5: must be None or an integer of at least 1"),
        ({"max_num_batched_tokens": 3}, "max_num_batched_tokens=3: must be at least max_num_seqs=64"),
        ({"watermark": "a"}, "watermark='a': must be a number of at least 0 and less than 1"),
        ({"kv_cache_memory": "much"}, "'much' is no size: write 512MiB, 2GB or a number of bytes"),
        ({"kv_cache_memory": 10.5}, "kv_cache_memory=10.5: must be None or an integer"),
        ({"gpu_memory_utilization": 90}, "gpu_memory_utilization=90: must be None or a number above 0, at most 1"),
        ({"num_blocks": 3, "kv_cache_memory": "1GB"}, "give num_blocks or kv_cache_memory, not both"),
        ({"dtype": torch.int8}, "dtype='int8': must be one of auto, fp32, bf16, fp16"),
        ({"preemption": None}, "preemption=None: must be one of auto, recompute, swap"),
        ({"max_logprobs": None}, "max_logprobs=None: must be an integer of at least -1"),
    ],
)
def test_an_option_is_refused_before_anything_is_loaded(option, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        LLM("there/is/no/such/model", **option)


def test_a_share_of_the_free_memory_is_meant_on_a_cpu_too(folder, monkeypatch):
    size = LLM(str(folder), num_blocks=1).block_bytes
    monkeypatch.setattr(pool_size, "free_memory", lambda device: 100 * size)
    for share, blocks in ((None, 25), (0.9, 90), (0.1, 10)):
        assert LLM(str(folder), device="cpu", gpu_memory_utilization=share).memory.num_blocks == blocks


@pytest.mark.parametrize("name", ["", 5, b"a", ["a"]])
def test_a_name_that_is_none_is_refused(llm, name):
    with pytest.raises(ValueError, match="^request_id=.*must be None or a string that is not empty"):
        llm.add_request(PROMPTS[0], GREEDY, request_id=name)
    assert not llm.has_unfinished_requests


def test_options_that_there_are_not():
    with pytest.raises(TypeError, match="there is no option 'block_sise'; did you mean 'block_size'"):
        LLM("smollm2", block_sise=16)
    with pytest.raises(TypeError, match="another option say the same thing"):
        EngineArgs.of("smollm2", {"prefix_cache": "hash", "enable_prefix_caching": True})
    assert EngineArgs.of("m", {"kv_cache_memory": "2GB", "dtype": "half"}) == EngineArgs(
        "m", kv_cache_memory=2 * 10**9, dtype="fp16"
    )


# ---- one request's trouble is its own -----------------------------------------------------------------------------


def test_a_request_that_forbids_every_token_ends_alone(llm, greedy):
    all_of_them = SamplingParams(min_tokens=2, max_tokens=4, stop_token_ids=list(range(96)), seed=1)
    good, bad, beams = llm.generate(
        PROMPTS[:3], [GREEDY, all_of_them, BeamSearchParams(2, max_tokens=3, ignore_eos=True)]
    )
    assert tokens([good]) == [greedy[0]] and good.error is None and len(beams.outputs) == 2
    assert [o.finish_reason for o in bad.outputs] == ["error"] and "min_tokens=2" in bad.error
    assert llm.stats().memory.used == 0 and not llm.has_unfinished_requests


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(seed=1, max_tokens=12, top_p=0.9),
        SamplingParams(n=3, seed=1, max_tokens=12),
        BeamSearchParams(3, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=1, logprobs=1),
    ],
)
@pytest.mark.parametrize("after", [0, 4])
def test_a_row_of_nan_ends_its_own_request(llm, greedy, monkeypatch, params, after):
    """Its keys and values are broken at some step; nobody else's are."""
    execute, sick = llm.executor.runner.execute, []

    def breaks(plan):
        mine = [s for s in plan.sequences if s.request_id == "sick"]
        if mine and len(sick) >= after:
            logits = llm.executor.runner.model.logits
            rows = [i for i, s in enumerate(s for s in plan.sequences if s.draw or s.num_candidates) if s in mine]

            def broken(hidden):
                found = logits(hidden)
                found[rows[0] if rows else 0] = torch.nan
                return found

            monkeypatch.setattr(llm.executor.runner.model, "logits", broken)
        sick.extend(mine[:1])
        try:
            return execute(plan)
        finally:
            if mine and len(sick) > after:
                monkeypatch.delattr(llm.executor.runner.model, "logits")

    monkeypatch.setattr(llm.executor.runner, "execute", breaks)
    llm.add_request(PROMPTS[4], params, request_id="sick")
    others = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS[:4]]
    last = {}
    while llm.has_unfinished_requests:
        last |= {output.request_id: output for output in llm.step()}
    assert tokens(last[name] for name in others) == greedy[:4]
    assert "NaN" in last["sick"].error and "error" in [o.finish_reason for o in last["sick"].outputs]
    assert llm.stats().memory.used == 0 and not llm._texts


# ---- what is told, and when -----------------------------------------------------------------------------------------


def test_only_what_is_new(llm, greedy):
    def wish(kind, **more):
        return SamplingParams(temperature=0, max_tokens=12, output_kind=kind, **more)

    whole = llm.generate(PROMPTS[0], wish(RequestOutputKind.CUMULATIVE, logprobs=1))[0].outputs[0]
    parts = list(llm.stream(PROMPTS[0], wish(RequestOutputKind.DELTA, logprobs=1)))
    assert [len(p.outputs[0].token_ids) for p in parts] == [1] * 12
    assert [t for p in parts for t in p.outputs[0].token_ids] == whole.token_ids == greedy[0]
    assert "".join(p.outputs[0].text for p in parts) == whole.text
    assert [one for p in parts for one in p.outputs[0].logprobs] == whole.logprobs
    assert [p.finished for p in parts] == [False] * 11 + [True]
    [end] = llm.stream(PROMPTS[0], wish(RequestOutputKind.FINAL_ONLY))
    assert end.finished and end.outputs[0].token_ids == greedy[0]
    silent = llm.generate(PROMPTS[0], wish(RequestOutputKind.CUMULATIVE, detokenize=False))[0].outputs[0]
    assert silent.token_ids == greedy[0] and silent.text == ""
    # By hand, after others made several steps for it, the next part is larger; nothing is told twice or left out.
    name, found = llm.add_request(PROMPTS[1], wish(RequestOutputKind.DELTA)), []
    while llm.has_unfinished_requests:
        found += [t for output in llm.step() for t in output.outputs[0].token_ids if output.request_id == name]
        llm.generate(PROMPTS[2], SamplingParams(temperature=0, max_tokens=3))
    assert found == greedy[1]


def test_more_logprobs_than_the_engine_gives_are_refused(llm, folder):
    for name in ("logprobs", "prompt_logprobs"):
        for asked in (21, 10**9, -1):
            with pytest.raises(ValueError, match=f"{name}={asked}.*max_logprobs=20"):
                llm.generate(PROMPTS[0], SamplingParams(**{name: asked}))
    free = LLM(str(folder), num_blocks=10, max_logprobs=-1)
    [output] = free.generate(PROMPTS[0], SamplingParams(max_tokens=1, logprobs=-1))
    assert len(output.outputs[0].logprobs[0]) == 96


def test_what_a_request_computed_itself_is_no_hit_of_its_prompt(llm, monkeypatch):
    """It was broken off after its prompt was computed, and finds its own blocks, or none."""
    execute, broken = llm.executor.execute, []

    def fails(plan):
        output = execute(plan)
        if plan.step == 3 and not broken:
            broken.append(plan)
            raise MemoryError
        return output

    monkeypatch.setattr(llm.executor, "execute", fails)
    llm.add_request(PROMPTS[5], GREEDY)
    outputs = []
    while llm.has_unfinished_requests:
        try:
            outputs += llm.step()
        except MemoryError:
            continue
    assert broken and outputs[-1].num_cached_tokens == 0
    prefixes = llm.stats().prefixes
    assert (prefixes.queried, prefixes.found) == (len(PROMPTS[5]), 0)
    llm.generate(PROMPTS[5], GREEDY)
    assert llm.stats().prefixes.found > 0  # this one's is one
