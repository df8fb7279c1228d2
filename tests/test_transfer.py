"""Blocks go from one engine to another: the same tokens as from one engine, with whatever else there is."""

import asyncio
import json
import random
import re
from dataclasses import replace

import pytest
from raw_http import ask
from served import serving
from test_router import routed
from tiny_model import make_folder

from minipaged import AsyncLLM, BeamSearchParams, SamplingParams
from minipaged.server.app import create_app
from minipaged.server.config import ServerConfig
from tests.engine_process import engines
from tests.transfers import (
    CONNECTORS,
    FIRST,
    GREEDY,
    PROMPT,
    WHERE,
    alone,
    first_half,
    in_process,
    pair,
    random_asked,
    second_half,
    told,
    wait_until_empty,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("transfer"))


GUESSING = {"method": "ngram", "prompt_lookup_min": 1, "num_branches": 2, "num_speculative_tokens": 3}


@pytest.mark.parametrize("connector", CONNECTORS)
def test_two_processes_answer_as_one(folder, connector):
    wishes = {
        "greedy": GREEDY,
        "samples": SamplingParams(n=3, seed=7, max_tokens=12, temperature=1.2),
        "beams": BeamSearchParams(beam_width=3, max_tokens=8),
    }
    wanted = dict(zip(wishes, alone(folder, [(PROMPT, params) for params in wishes.values()]), strict=True))
    with engines(folder, *pair(connector)) as (producer, consumer):
        for name, params in wishes.items():
            where = first_half(producer, name, PROMPT)
            assert where["do_remote_prefill"] and len(where["remote_block_ids"]) == len(PROMPT) // 4
            assert where == json.loads(json.dumps(where))
            consumer.ask("reset")
            end = consumer.generate(name, PROMPT, second_half(params, where))
            assert end.outputs == wanted[name]
            assert end.transferred == (len(PROMPT) - 1) // 4 * 4 and end.error is None
        producer.wait_until_empty()
        consumer.wait_until_empty()
        assert producer.ask("stats")[1].num_exports == consumer.ask("stats")[1].num_loads == 3
        producer.close()
        consumer.close()


MECHANISMS = {
    "swap": dict(num_blocks=42, preemption="swap", watermark=0.0),
    "recompute": dict(num_blocks=48, preemption="recompute", prefix_cache="radix", watermark=0.0),
    "chunks": dict(max_num_batched_tokens=9, max_num_seqs=4, prefix_cache="none"),
    "whole prompts": dict(max_num_batched_tokens=70, chunked_prefill=False, schedule="prefix"),
    "guesses": dict(speculative_config=GUESSING, prefix_cache="radix", num_blocks=64),
    "int8": dict(kv_cache_dtype="int8"),
    "fp8": dict(kv_cache_dtype="fp8", num_blocks=48),
    "bf16": dict(dtype="bf16", num_blocks=60),
}  # fmt: skip


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_all_mechanisms_go_with_it(folder, mechanism, monkeypatch):
    monkeypatch.setenv("MINIPAGED_SAME_BITS", "1")
    options = MECHANISMS[mechanism]
    same = {name: options[name] for name in ("dtype", "kv_cache_dtype") if name in options}
    rng = random.Random(mechanism)
    asked = random_asked(rng, 40 if "preemption" in options else 16)
    wanted = alone(folder, asked, **same)
    more = {"kv_connector_extra_config": {"bytes_per_step": 3000}}
    connector = CONNECTORS[rng.random() < 0.5]
    stack, (producer, consumer) = in_process(folder, connector, {**same, "num_blocks": 1000}, options, **more)
    with stack:
        firsts = producer.generate([prompt for prompt, _ in asked], FIRST)
        for (prompt, params), first in zip(asked, firsts, strict=True):
            assert (first.kv_transfer_params is None) == (len(prompt) < 4)
            consumer.add_request(prompt, second_half(params, first.kv_transfer_params))
        ends = {}
        while consumer.has_unfinished_requests:
            ends |= {int(output.request_id): output for output in consumer.step() if output.finished}
        assert [told(ends[number]) for number in range(len(asked))] == wanted
        assert consumer.stats().transfers.num_loads >= 5  # a few may have to be computed here, after a preemption
        if "preemption" in options:
            assert consumer.stats().num_preemptions[options["preemption"]]
        wait_until_empty(producer)
        wait_until_empty(consumer)


def test_others_go_on_while_one_is_loading(folder):
    """A few bytes in a step: whoever decodes gets a token in each of the steps that the load takes."""
    more = {"kv_connector_extra_config": {"bytes_per_step": 1}}
    stack, (producer, consumer) = in_process(folder, **more)
    with stack:
        [first] = producer.generate(PROMPT, FIRST)
        [wanted] = alone(folder, [(PROMPT, GREEDY)])
        consumer.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True), "other")
        consumer.step()
        consumer.add_request(PROMPT, second_half(GREEDY, first.kv_transfer_params), "loads")
        lengths, steps, outputs = [], 0, consumer.step()
        while not any(output.request_id == "loads" for output in outputs):
            steps += 1
            lengths += [output.outputs[0].num_tokens for output in outputs if output.request_id == "other"]
            assert consumer.stats().num_waiting == 0
            outputs = consumer.step()
        assert steps >= len(PROMPT) // 4 and lengths == list(range(2, len(lengths) + 2))
        assert len(lengths) >= min(58, steps), "the other one waited"
        while consumer.has_unfinished_requests:
            for output in consumer.step():
                if output.finished and output.request_id == "loads":
                    assert told(output) == wanted


def test_what_is_here_already_is_not_taken_from_there(folder):
    stack, (producer, consumer) = in_process(folder)
    with stack:
        [wanted] = alone(folder, [(PROMPT, GREEDY)])
        for known, came in ((40, 104), (len(PROMPT), 0)):
            consumer.reset_prefix_cache()
            consumer.generate(PROMPT[:known], replace(GREEDY, max_tokens=1))
            [first] = producer.generate(PROMPT, FIRST)
            [end] = consumer.generate(PROMPT, second_half(GREEDY, first.kv_transfer_params))
            assert told(end) == wanted
            assert (end.num_cached_tokens, end.metrics.num_transferred_tokens) == (144 - came, came)
            consumer.generate([1], replace(GREEDY, max_tokens=1))  # a step, with which the other one is told
            wait_until_empty(producer)  # also of what nobody took


def test_prompt_logprobs_are_computed_here(folder):
    stack, (producer, consumer) = in_process(folder)
    with stack:
        [first] = producer.generate(PROMPT, FIRST)
        params = replace(GREEDY, prompt_logprobs=1)
        [end] = consumer.generate(PROMPT, second_half(params, first.kv_transfer_params))
        [same] = consumer.generate(PROMPT, params)
        assert end.prompt_logprobs == same.prompt_logprobs and end.metrics.num_transferred_tokens == 0


def test_over_http(folder):
    nothing = {name: None for name in WHERE if name.startswith("remote")}
    start = {"do_remote_decode": True, "do_remote_prefill": False, **nothing}
    producer, consumer = (AsyncLLM(str(folder), **one) for one in pair(CONNECTORS[1]))
    try:
        apps = [create_app(llm, ServerConfig(model_names=("tiny",))) for llm in (producer, consumer)]
        with serving(apps[0]) as there, serving(apps[1]) as here:
            ports = [int(url.rsplit(":", 1)[1]) for url in (there, here)]
            check_http(ports, start)
    finally:
        producer.shutdown()
        consumer.shutdown()


def check_http(ports, start):
    def post(port, path, **body):
        status, _, said = asyncio.run(ask(port, path, body))
        return status, said

    chat = {"messages": [{"role": "user", "content": "hello, who are you, and what is that?"}]}
    text = {"prompt": "once upon a time there was a fox"}
    for path, prompt in (("/v1/completions", text), ("/v1/chat/completions", chat)):
        status, first = post(ports[0], path, **prompt, max_tokens=1, temperature=0, kv_transfer_params=start)
        assert status == 200 and first["kv_transfer_params"]["do_remote_prefill"], first
        where = first["kv_transfer_params"]
        status, right = post(ports[0], path, **prompt, max_tokens=9, temperature=0)
        assert status == 200 and "kv_transfer_params" not in right
        status, end = post(ports[1], path, **prompt, max_tokens=9, temperature=0, kv_transfer_params=where)
        assert status == 200 and end["kv_transfer_params"] is None
        assert end["choices"] == right["choices"]
        taken = min(len(where["remote_block_ids"]), (end["usage"]["prompt_tokens"] - 1) // 4) * 4
        assert end["usage"]["prompt_tokens_details"]["cached_tokens"] == taken > 0
        for more, said in (
            ({"kv_transfer_params": start, "stream": True}, "kv_transfer_params: do_remote_decode is not for stream"),
            ({"kv_transfer_params": {"do_remote_decode": 3}}, "kv_transfer_params: do_remote_decode=3: must be true"),
            ({"kv_transfer_params": start, "n": 2}, "kv_transfer_params: do_remote_decode: not for 2 sequences"),
            ({"kv_transfer_params": where}, "kv_transfer_params: do_remote_prefill: this engine has no"),
        ):
            status, error = post(ports[0], path, **prompt, max_tokens=1, **more)
            assert status == 400 and error["error"]["param"] == "kv_transfer_params", error
            assert error["error"]["message"].startswith(said)
    two = {"prompt": ["a", "b"], "kv_transfer_params": start}
    status, error = post(ports[0], "/v1/completions", max_tokens=1, **two)
    assert status == 400 and error["error"]["message"].startswith("kv_transfer_params: they are of one prompt")


def test_over_http_through_a_router(folder):
    """Clients see one server, whole and in pieces; and the prompt was computed elsewhere."""
    producer, consumer = (AsyncLLM(str(folder), **one) for one in pair(CONNECTORS[0]))
    try:
        apps = [create_app(llm, ServerConfig(model_names=("tiny",))) for llm in (producer, consumer)]
        with serving(apps[0]) as there, serving(apps[1]) as here, routed([here], prefill=[there]) as router:
            port = int(here.rsplit(":", 1)[1])
            wishes = {"temperature": 0}, {"seed": 3, "n": 2}, {"stream": True, "temperature": 0}
            for number, more in enumerate(wishes):
                body = {"prompt": f"{number} once upon a time there was a fox", "max_tokens": 9, **more}
                *_, routed_one = asyncio.run(ask(router.port, "/v1/completions", body))
                *_, direct = asyncio.run(ask(port, "/v1/completions", body))
                assert choices_of(routed_one) == choices_of(direct)
            *_, metrics = asyncio.run(ask(port, "/metrics"))
            told = re.search(rb"^vllm:external_prefix_cache_hits_total{[^}]*} (.*)$", metrics, re.MULTILINE)
            transfers = consumer.engine.stats().transfers
            assert told and float(told[1]) == transfers.num_loaded_tokens > 0
        assert transfers.num_loads == producer.engine.stats().transfers.num_exports == 3
    finally:
        producer.shutdown()
        consumer.shutdown()


def choices_of(said):
    if isinstance(said, dict):
        return [(one["index"], one["text"], one["finish_reason"]) for one in said["choices"]]
    pieces = [json.loads(line[6:]) for line in said.decode().splitlines() if line.startswith("data: {")]
    return "".join(one["text"] for piece in pieces for one in piece["choices"])
