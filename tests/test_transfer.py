"""Blocks go from one engine to another: the same tokens as from one, and nothing is lost or left, whoever dies.

Every engine is a process of its own where it can be killed, and a thread's worth of tiny model. `--transfer-examples
1000` kills for longer; `python -m tests.recall_transfer --seeds 0 100000` is the same without processes.
"""

import contextlib
import gc
import json
import mmap
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
from raw_http import ask
from served import serving
from test_interrupts import interrupted
from tiny_model import make_folder

from minipaged import LLM, AsyncLLM, BeamSearchParams, SamplingParams
from minipaged.execution import transfer_link
from minipaged.scheduling.transfer import Exports, Transfers
from minipaged.server.app import create_app
from minipaged.server.config import ServerConfig
from tests import recall_transfer
from tests.engine_process import engines

CONNECTORS = ("SharedMemoryConnector", "TorchDistributedConnector")
AWAY = {"kv_transfer_params": {"do_remote_decode": True}}
PROMPT = [(7 * i * i + i) % 90 for i in range(3, 150)]
SMALL = dict(block_size=4, num_blocks=120, debug=True)
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
FIRST = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, extra_args=AWAY)
GUESSING = {"method": "ngram", "prompt_lookup_min": 1, "num_branches": 2, "num_speculative_tokens": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("transfer"))


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No thread and no file, in this process."""
    def threads():
        return {one.name for one in threading.enumerate() if one.name.startswith("kv ")}

    yield
    until = time.monotonic() + 10
    while threads() and time.monotonic() < until:
        time.sleep(0.01)
    assert not threads()


def config(connector, role, **more):
    return {"kv_transfer_config": {"kv_connector": connector, "kv_role": role, **more}}


def pair(connector, producer=None, consumer=None, **more):
    """The options of both."""
    return (
        {**SMALL, **config(connector, "kv_producer", **more), **(producer or {})},
        {**SMALL, **config(connector, "kv_consumer", **more), **(consumer or {})},
    )


def first_half(engine, name, prompt):
    """The prompt's, on a producer; where its blocks are."""
    return engine.generate(name, prompt, FIRST).kv_transfer_params


def second_half(params, where):
    return replace(params, extra_args={"kv_transfer_params": where})


def told(output):
    return [(one.token_ids, one.finish_reason) for one in output.outputs]


def alone(folder, asked, **options):
    """What one engine says to each (prompt, params)."""
    with LLM(folder, **{**SMALL, "num_blocks": 400, "prefix_cache": "none", **options}) as llm:
        return [told(output) for output in llm.generate([p for p, _ in asked], [params for _, params in asked])]


def in_process(folder, connector=CONNECTORS[0], producer=None, consumer=None, **more):
    stack = contextlib.ExitStack()
    return stack, [stack.enter_context(LLM(folder, **one)) for one in pair(connector, producer, consumer, **more)]


def random_asked(rng, count):
    """Prompts that begin alike now and then, and all kinds of wishes."""
    asked = []
    for _ in range(count):
        prompt = PROMPT[: rng.randint(0, 60)] + [rng.randrange(90) for _ in range(rng.randint(1, 40))]
        length = rng.randint(1, 16)
        asked.append((prompt, rng.choice([
            SamplingParams(temperature=0, max_tokens=length, ignore_eos=True),
            SamplingParams(temperature=1.2, seed=rng.randrange(99), max_tokens=length, n=rng.randint(1, 3)),
            BeamSearchParams(beam_width=3, max_tokens=min(8, length)),
            SamplingParams(temperature=0, max_tokens=length, structured_outputs={"regex": "[a-f]{2,9}x|(ab)+[0-9]"}),
            SamplingParams(temperature=0, max_tokens=length, prompt_logprobs=0, ignore_eos=True),
        ])))  # fmt: skip
    return asked


# --- the same tokens ------------------------------------------------------------------------------------------------


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
    asked = random_asked(rng, 16)
    wanted = alone(folder, asked, **same)
    more = {"kv_connector_extra_config": {"bytes_per_step": 3000}}
    connector = CONNECTORS[rng.random() < 0.5]
    stack, (producer, consumer) = in_process(folder, connector, {**same, "num_blocks": 400}, options, **more)
    with stack:
        firsts = producer.generate([prompt for prompt, _ in asked], FIRST)
        for (prompt, params), first in zip(asked, firsts, strict=True):
            assert (first.kv_transfer_params is None) == (len(prompt) < 4)
            consumer.add_request(prompt, second_half(params, first.kv_transfer_params))
        ends = {}
        while consumer.has_unfinished_requests:
            ends |= {int(output.request_id): output for output in consumer.step() if output.finished}
        assert [told(ends[number]) for number in range(len(asked))] == wanted
        loads = consumer.stats().transfers
        assert loads.num_loads >= 5 and (not loads.num_failed_loads or consumer.memory.num_blocks < 60)
        if "preemption" in options:
            assert consumer.stats().num_preemptions[options["preemption"]]
        wait_until_empty(producer)
        wait_until_empty(consumer)


def wait_until_empty(llm):
    until = time.monotonic() + 10
    while (usage := llm.stats().memory).used + usage.cpu_used:
        assert time.monotonic() < until, f"{usage.used} blocks are still in use"
        time.sleep(0.01)
    llm.memory.check()


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


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_what_is_not_kept_any_more(folder, policy, capsys):
    more = {"kv_load_failure_policy": policy, "kv_connector_extra_config": {"lease_seconds": 0.05}}
    stack, (producer, consumer) = in_process(folder, **more)
    with stack:
        [first] = producer.generate(PROMPT, FIRST)
        time.sleep(0.1)
        wait_until_empty(producer)
        [end] = consumer.generate(PROMPT, second_half(GREEDY, first.kv_transfer_params))
        if policy == "recompute":
            assert [told(end)] == alone(folder, [(PROMPT, GREEDY)])
        else:
            assert told(end) == [([], "error")]
            assert end.error == "its prompt, computed elsewhere, can't be had: the blocks are not kept any more"
        assert "the blocks are not kept any more" in capsys.readouterr().err
        assert consumer.stats().transfers.num_failed_loads == 1
        wait_until_empty(consumer)


DIFFERENT = {
    "block_size": (dict(block_size=8), "block_size is 8 there and 4 here"),
    "dtype": (dict(kv_cache_dtype="int8"), "kv_cache_dtype is torch.int8 there and torch.float32 here"),
    "quantization": (dict(quantization="int8"), "quantization is int8 there and auto here"),
}


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("what", DIFFERENT)
def test_engines_that_do_not_fit_say_so(folder, what, connector):
    options, said = DIFFERENT[what]
    stack, (producer, consumer) = in_process(folder, connector, options, kv_load_failure_policy="fail")
    with stack:
        [first] = producer.generate(PROMPT, FIRST)
        [end] = consumer.generate(PROMPT, second_half(GREEDY, first.kv_transfer_params))
        assert said in end.error


def test_another_model_says_so(folder, tmp_path):
    other = make_folder(tmp_path / "another", max_model_len=2048)
    options = pair(CONNECTORS[0], kv_load_failure_policy="fail")
    with LLM(folder, **options[0]) as producer, LLM(other, **options[1]) as consumer:
        [first] = producer.generate(PROMPT, FIRST)
        [end] = consumer.generate(PROMPT, second_half(GREEDY, first.kv_transfer_params))
        assert f"model is {folder.name} there and another here" in end.error


def test_blocks_of_another_prompt_or_tenant_are_not_taken(folder):
    """A client that lies gets the right answer, and others find nothing wrong afterwards."""
    stack, (producer, consumer) = in_process(folder)
    with stack:
        other = [5, *PROMPT[1:]]
        for prompt, salt in ((other, None), (PROMPT, "mine")):
            [first] = producer.generate(PROMPT, FIRST)
            params = second_half(GREEDY, first.kv_transfer_params)
            wanted = alone(folder, [(prompt, GREEDY)])
            assert [told(consumer.generate(prompt, params, cache_salt=salt)[0])] == wanted
            assert [told(consumer.generate(prompt, GREEDY, cache_salt=salt)[0])] == wanted
        assert consumer.stats().transfers.num_failed_loads == 2
        assert consumer.stats().transfers.num_loads == 0


def test_given_up_in_the_middle(folder, monkeypatch):
    """The producer's memory is used for something else while it is read: what was read doesn't count."""
    stack, (producer, consumer) = in_process(folder, kv_connector_extra_config={"bytes_per_step": 1})
    with stack:
        [first] = producer.generate(PROMPT, FIRST)
        [wanted] = alone(folder, [(PROMPT, GREEDY)])
        consumer.add_request(PROMPT, second_half(GREEDY, first.kv_transfer_params))
        while not any(one.num_written for one in consumer.executor.connector._incoming.values()):
            consumer.step()
        producer._start_over()
        producer.generate([[number] * 100 for number in range(4)], GREEDY)
        while consumer.has_unfinished_requests:
            ends = consumer.step()
        assert told(ends[0]) == wanted and consumer.stats().transfers.num_failed_loads == 1


def test_a_pool_full_of_what_is_kept(folder):
    """Prompts wait until others have taken theirs, or their time is over; nobody waits for ever."""
    more = {"kv_connector_extra_config": {"lease_seconds": 0.3}}
    stack, (producer, consumer) = in_process(folder, producer=dict(num_blocks=80), **more)
    with stack:
        prompts = [[number, *PROMPT] for number in range(5)]
        began = time.monotonic()
        outputs = producer.generate(prompts, FIRST)
        assert time.monotonic() - began > 0.5
        wanted = alone(folder, [(prompt, replace(FIRST, extra_args=None)) for prompt in prompts])
        assert [told(output) for output in outputs] == wanted
        end = consumer.generate(prompts[-1], second_half(GREEDY, outputs[-1].kv_transfer_params))[0]
        assert end.metrics.num_transferred_tokens
        wait_until_empty(producer)


def test_aborted_when_it_is_kept_and_while_it_is_loading(folder):
    stack, (producer, consumer) = in_process(folder, kv_connector_extra_config={"bytes_per_step": 1})
    with stack:
        producer.generate(PROMPT, FIRST)
        assert producer.stats().memory.used
        producer.abort("0")
        assert not producer.stats().memory.used
        [first] = producer.generate(PROMPT, FIRST)
        consumer.add_request(PROMPT, second_half(GREEDY, first.kv_transfer_params), "a")
        for _ in range(5):
            consumer.step()
        assert consumer.stats().memory.used
        consumer.abort("a")
        assert not consumer.stats().memory.used
        consumer.generate([1], GREEDY)
        wait_until_empty(producer)


def test_a_liar_at_the_door_harms_nobody(folder):
    """Names that nobody has, blocks that nobody has, no JSON, nothing at all; and the pool can only be read."""
    stack, (producer, consumer) = in_process(folder, kv_connector_extra_config={"timeout_seconds": 0.3})
    with stack:
        [first] = producer.generate(PROMPT, FIRST)
        where = first.kv_transfer_params
        hello, [export] = consumer.executor.connector._hello, producer.scheduler.transfers.exports._by_name.values()
        name = {"begin": where["remote_request_id"], "digest": export.digest}

        def said(message):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(5)
                sock.connect("\0" + where["remote_host"][1:])
                sock.sendall(message if isinstance(message, bytes) else b"")
                if isinstance(message, dict):
                    transfer_link.send(sock, message)
                try:
                    return transfer_link.receive(sock)
                except transfer_link.Lost:
                    return None

        lies = [
            {"hello": hello, **name, "begin": "0-1234"}, {"hello": hello, **name, "first": 30, "count": 30},
            {"hello": hello, **name, "first": -1, "count": 2}, {"hello": hello, **name, "first": 5, "count": -2},
            {"hello": hello, **name, "digest": "f" * 64}, {"hello": hello, **name, "first": {}, "count": 0},
            {"hello": [], **name}, {"unneeded": 3}, {}, b"", b"\xff\xff\xff\xff", b"\x00\x00\x00\x02[]", b"\0\0\0\3{]}",
        ]  # fmt: skip
        for lie in lies:
            answer = said({"first": 0, "count": 1} | lie if isinstance(lie, dict) and lie else lie)
            assert answer is None or set(answer) == {"why"}, lie
        assert export.pins == 0 and not export.done
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect("\0" + where["remote_host"][1:])
            transfer_link.send(sock, {"hello": hello, **name, "first": 0, "count": 1})
            transfer_link.receive(sock)
            _, [file], _, _ = socket.recv_fds(sock, 1, 1)
            with pytest.raises(PermissionError):
                mmap.mmap(file, os.fstat(file).st_size)
            with pytest.raises(OSError):
                os.write(file, b"x")
            with pytest.raises(OSError):
                os.ftruncate(file, 0)
            os.close(file)
        [end] = consumer.generate(PROMPT, second_half(GREEDY, where))
        assert end.metrics.num_transferred_tokens and [told(end)] == alone(folder, [(PROMPT, GREEDY)])


@pytest.mark.parametrize("lie", [[10**6] * 36, [-1] * 36, [0], None, "x"])
def test_a_producer_that_lies_harms_nobody(folder, monkeypatch, lie):
    stack, (producer, consumer) = in_process(folder)
    with stack:
        [first] = producer.generate(PROMPT, FIRST)
        right = transfer_link.send
        monkeypatch.setattr(transfer_link, "send", lambda sock, message: right(
            sock, {**message, "blocks": lie} if "blocks" in message else message
        ))  # fmt: skip
        [end] = consumer.generate(PROMPT, second_half(GREEDY, first.kv_transfer_params))
        assert [told(end)] == alone(folder, [(PROMPT, GREEDY)])
        assert consumer.stats().transfers.num_failed_loads == 1


# --- killed -----------------------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc):
    if "example" in metafunc.fixturenames:
        metafunc.parametrize("example", range(metafunc.config.getoption("--transfer-examples")))


def test_killed_at_random(folder, example):
    """Either side, in the middle of whatever it does: requests end right, or with an error, and nothing is left."""
    rng = random.Random(example)
    policy = rng.choice(["recompute", "recompute", "fail"])
    extra = {"bytes_per_step": rng.choice([1, 4000]), "lease_seconds": 1.0, "timeout_seconds": 0.5}
    options = pair(
        rng.choice(CONNECTORS), {"num_blocks": 200}, {"num_blocks": rng.choice([60, 120])},
        kv_load_failure_policy=policy, kv_connector_extra_config=extra,
    )  # fmt: skip
    asked = random_asked(rng, 6)
    wanted = alone(folder, asked)
    with engines(folder, *options, slow=0.003) as (producer, consumer):
        places = [first_half(producer, str(number), prompt) for number, (prompt, _) in enumerate(asked)]
        for number, ((prompt, params), where) in enumerate(zip(asked, places, strict=True)):
            consumer.ask("add", prompt, second_half(params, where), str(number))
        time.sleep(rng.choice([0, 0.01, 0.03, 0.1]))
        what = rng.choice(["producer", "producer", "consumer", "stopped producer", "stopped consumer", "interrupt"])
        if what == "interrupt":
            producer.ask("interrupt")
            producer.generate("more", PROMPT, GREEDY)
        else:
            victim = consumer if "consumer" in what else producer
            victim.kill(signal.SIGSTOP if "stopped" in what else signal.SIGKILL)
        if "consumer" not in what:
            for number, right in enumerate(wanted):
                end = consumer.wait_for(str(number))
                if end.error is not None:
                    assert policy == "fail" and {reason for _, reason in end.outputs} == {"error"}
                else:
                    assert end.outputs == right, (what, number)
            consumer.wait_until_empty()
            consumer.close()
        if what not in ("producer", "stopped producer"):
            producer.wait_until_empty()
            producer.close()


def test_two_producers_and_two_consumers(folder):
    rng = random.Random(2)
    asked = random_asked(rng, 16)
    wanted = alone(folder, asked)
    one, other = pair(CONNECTORS[0]), pair(CONNECTORS[0], {"num_blocks": 300}, {"num_blocks": 50})
    with engines(folder, *one, *other) as (p1, c1, p2, c2):
        for number, (prompt, params) in enumerate(asked):
            where = first_half(rng.choice([p1, p2]), str(number), prompt)
            [c1, c2][number % 2].ask("add", prompt, second_half(params, where), str(number))
        for number, right in enumerate(wanted):
            assert [c1, c2][number % 2].wait_for(str(number)).outputs == right
        assert all(engine.ask("stats")[1].num_loads > 2 for engine in (c1, c2))
        assert not any(engine.ask("stats")[1].num_failed_loads for engine in (c1, c2))
        for engine in (p1, p2, c1, c2):
            if engine in (c1, c2):
                engine.generate("last", [1], GREEDY)  # a step, with which the others are told what nobody needs
            engine.wait_until_empty()


def test_interrupted_at_random(folder):
    """Ctrl-C at any line, here or there: the next answers are right, and nothing stays in use."""
    rng = random.Random(5)
    stack, (producer, consumer) = in_process(folder, kv_connector_extra_config={"bytes_per_step": 20_000})
    with stack:
        [wanted] = alone(folder, [(PROMPT, GREEDY)])
        seen = Counter()
        for trial in range(60):
            victim = rng.choice([producer, consumer])
            first, where = interrupted(lambda: producer.generate(PROMPT, FIRST), rng.randint(1, 3000)) if (
                victim is producer) else (producer.generate(PROMPT, FIRST), None)  # fmt: skip
            seen["there"] += where is not None
            if first is None:
                [*first] = producer.generate(PROMPT, FIRST)
            params = second_half(GREEDY, first[0].kv_transfer_params)
            if trial % 2:
                consumer.reset_prefix_cache()
            end, where = interrupted(lambda params=params: consumer.generate(PROMPT, params), rng.randint(1, 9000)) if (
                victim is consumer) else (consumer.generate(PROMPT, params), None)  # fmt: skip
            seen["here"] += where is not None
            if end is None:
                end = consumer.generate(PROMPT, params)
            assert told(end[0]) == wanted, trial
        consumer.generate([1], GREEDY)
        time.sleep(0.05)
        for request_id in {export.request_id for export in producer.scheduler.transfers.exports._by_name.values()}:
            producer.abort(request_id)  # of answers that were lost with Ctrl-C
        wait_until_empty(producer)
        wait_until_empty(consumer)
        assert min(seen.values()) > 10 and consumer.stats().transfers.num_loads > 10


def test_nothing_is_left_when_all_are_closed_or_forgotten(folder):
    def files():
        gc.collect()
        names = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return Counter(os.readlink(name) for name in names if os.path.lexists(name))

    def kinds():
        return sum(count for name, count in files().items() if name.startswith(("socket:", "/memfd:minipaged")))

    before = kinds()
    for connector in CONNECTORS:
        stack, llms = in_process(folder, connector)
        with stack:
            [first] = llms[0].generate(PROMPT, FIRST)
            llms[1].generate(PROMPT, second_half(GREEDY, first.kv_transfer_params))
            assert kinds() > before
    assert kinds() == before
    forgotten = LLM(folder, **pair(CONNECTORS[0])[0])
    forgotten.generate(PROMPT, FIRST)
    del forgotten, llms, stack
    assert kinds() == before


# --- what may be said -------------------------------------------------------------------------------------------------

GOOD = {"kv_connector": "SharedMemoryConnector", "kv_role": "kv_both"}
WHERE = dict(
    do_remote_prefill=True, remote_engine_id="e", remote_block_ids=[1], remote_host="h", remote_port=1,
    remote_request_id="r",
)  # fmt: skip


@pytest.mark.parametrize(("given", "error"), [
    ("x", "kv_transfer_config='x': must be None or a dict"),
    ({}, "kv_connector=''"),
    ({**GOOD, "kv_connector": "NixlConnector"}, "one of SharedMemoryConnector, TorchDistributedConnector"),
    ({**GOOD, "kv_role": "producer"}, "kv_role='producer': must be one of kv_producer, kv_consumer, kv_both"),
    ({**GOOD, "kv_port": 70000}, "kv_port=70000"),
    ({**GOOD, "kv_port": True}, "kv_port=True"),
    ({**GOOD, "kv_ip": "0.0.0.0"}, "kv_ip='0.0.0.0'"),
    ({**GOOD, "kv_load_failure_policy": "retry"}, "kv_load_failure_policy='retry'"),
    ({**GOOD, "kv_rool": "x"}, "did you mean 'kv_role'"),
    ({**GOOD, "kv_connector_extra_config": {"lease_seconds": 0}}, "lease_seconds=0"),
    ({**GOOD, "kv_connector_extra_config": {"leese": 1}}, "there are lease_seconds"),
    ({**GOOD, "kv_connector_extra_config": 3}, "kv_connector_extra_config=3"),
])  # fmt: skip
def test_a_bad_config_is_refused(folder, given, error):
    with pytest.raises((ValueError, TypeError)) as refused:
        LLM(folder, kv_transfer_config=given)
    assert error in str(refused.value)


def test_who_has_keys_and_values_of_its_own_is_refused(folder):
    with pytest.raises(ValueError, match="not with the speculative_config 'draft'"):
        LLM(folder, kv_transfer_config=GOOD, speculative_config={"method": "draft", "model": str(folder)})


@pytest.mark.parametrize(("given", "error"), [
    ([], "kv_transfer_params=\\[\\]: must be None or a dict"),
    ({"do_remote_decode": "yes"}, "do_remote_decode='yes': must be true or false"),
    ({"do_remote_decod": True}, "there is no field 'do_remote_decod'; did you mean do_remote_decode"),
    ({"do_remote_decode": True, "do_remote_prefill": True}, "only one of them can be true"),
    ({"do_remote_prefill": True}, "remote_engine_id: must be there"),
    ({**WHERE, "remote_block_ids": [1.5]}, "remote_block_ids=\\[1.5\\]: must be a list of integers"),
    ({**WHERE, "remote_block_ids": [-1]}, "remote_block_ids"),
    ({**WHERE, "remote_port": -1}, "remote_port=-1"),
    ({**WHERE, "remote_host": ""}, "remote_host=''"),
    ({**WHERE, "remote_request_id": 7}, "remote_request_id=7: must be a text"),
])  # fmt: skip
def test_bad_params_are_refused(given, error):
    for kind in (SamplingParams, lambda extra_args: BeamSearchParams(2, extra_args=extra_args)):
        with pytest.raises(ValueError, match=error):
            kind(extra_args={"kv_transfer_params": given})


def test_params_that_ask_for_nothing():
    for given in (None, {}, {"kv_transfer_params": None}, {"kv_transfer_params": {}}):
        assert SamplingParams(extra_args=given).extra_args is None
    with pytest.raises(ValueError, match="extra_args: there is no 'colour'; it may have kv_transfer_params"):
        SamplingParams(extra_args={"colour": 1})


def test_an_engine_without_the_role_refuses(folder):
    stack, (producer, consumer) = in_process(folder)
    with stack, LLM(folder, **SMALL) as neither:
        for llm, params, role in (
            (neither, FIRST, "do_remote_decode: this engine has no kv_transfer_config with the kv_role kv_producer"),
            (consumer, FIRST, "kv_producer"),
            (neither, second_half(GREEDY, WHERE), "do_remote_prefill: .* with the kv_role kv_consumer"),
            (producer, second_half(GREEDY, WHERE), "kv_consumer"),
            (producer, replace(FIRST, n=2, temperature=1.0), "not for 2 sequences"),
            (producer, BeamSearchParams(2, max_tokens=1, extra_args=AWAY), "not for 2 sequences"),
        ):
            with pytest.raises(ValueError, match=role):
                llm.generate(PROMPT, params)


def test_a_port_that_is_taken(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"kv_port={port}: can't listen there: Address already in use"):
            LLM(folder, **SMALL, **config(CONNECTORS[1], "kv_producer", kv_port=port))


@pytest.mark.parametrize(("where", "error"), [
    ({"remote_host": "127.0.0.1"}, "is no engine of this machine"),
    ({"remote_host": "@minipaged-none"}, "engine e can't be reached: Connection refused"),
])  # fmt: skip
def test_nobody_is_there(folder, where, error):
    options = pair(CONNECTORS[0], kv_load_failure_policy="fail")[1]
    with LLM(folder, **options) as consumer:
        [end] = consumer.generate(PROMPT, second_half(GREEDY, WHERE | where))
        assert error in end.error


# --- over HTTP --------------------------------------------------------------------------------------------------------


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
    import asyncio

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
        assert status == 200 and "kv_transfer_params" not in end
        assert end["choices"] == right["choices"]
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


# --- without processes: many more schedules ---------------------------------------------------------------------------

OFTEN = {
    "num_loads": 60, "num_failed_loads": 25, "num_exports": 120, "given up": 2, "broken off": 4, "lies": 4,
    "aborted loading": 1, "preempted loading": 1, "swapped_in": 20, "recompute": 25, "forked_beams": 200, "right": 300,
}  # fmt: skip


def test_random_schedules_of_several_engines():
    seen = Counter()
    for seed in range(100):
        seen.update(recall_transfer.run(seed))
    assert not {name: seen[name] for name, least in OFTEN.items() if seen[name] < least}


def publish_at_once(self, request, num_found, memory):
    RIGHT_ALLOC(self, request, num_found, memory)
    [leader] = request.live
    memory.publish(leader.seq_id, (request.load.first + len(request.load.blocks)) * memory.block_size, leader.tokens)


def keep_nothing(self, request, seq, reason, memory, new_id):
    RIGHT_FINISHED(self, request, seq, reason, memory, new_id)
    for export in self.exports._by_name.values() if self.exports else ():
        if export.seq_id in memory.sequences():
            memory.free(export.seq_id)
            export.seq_id = new_id()
            memory.allocate(export.seq_id, 0)


def one_block_further(self, name, digest, first, count):
    answer = RIGHT_PIN(self, name, digest, first, count)
    if isinstance(answer, str) or len(answer[1]) < 2:
        return answer
    return answer[0], answer[1][1:] + answer[1][:1]


def any_prompt(self, name, digest, first, count):
    export = self._by_name.get(name)
    return RIGHT_PIN(self, name, export.digest if export else digest, first, count)


def all_of_it(self, request, num_found, block_size):
    if not RIGHT_MATCH(self, request, num_found, block_size):
        return 0
    return len(request.kv_transfer.remote_block_ids) * block_size - num_found


def free_what_is_read(self):
    ended = list(self._by_name.values())
    self._by_name.clear()
    return [export.seq_id for export in ended]


def never_free(self):
    return []


RIGHT_ALLOC, RIGHT_FINISHED = Transfers.update_state_after_alloc, Transfers.request_finished
RIGHT_PIN, RIGHT_MATCH, RIGHT_ENDED = Exports.pin, Transfers.get_num_new_matched_tokens, Transfers.load_ended
BROKEN = {
    "what comes can be found before it is there": (Transfers, "update_state_after_alloc", publish_at_once),
    "blocks are freed as soon as they are promised": (Transfers, "request_finished", keep_nothing),
    "the wrong blocks": (Exports, "pin", one_block_further),
    "blocks of another prompt": (Exports, "pin", any_prompt),
    "the last token is taken too": (Transfers, "get_num_new_matched_tokens", all_of_it),
    "failed ones go on as if all were there": (
        Transfers, "load_ended", lambda self, request, error, memory: RIGHT_ENDED(self, request, None, memory)
    ),
    "what was kept is not freed": (Exports, "take_ended", never_free),
    "it is always good": (Exports, "unpin", lambda self, export, done: True),
    "memory is given up, and what is kept isn't": (Exports, "clear", lambda self: None),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_it_notices_what_is_broken(monkeypatch, broken):
    monkeypatch.setattr(*BROKEN[broken])
    with pytest.raises(Exception) as failure:
        for seed in range(200):
            recall_transfer.run(seed)
    assert "replay it: python -m tests.recall_transfer" in failure.value.__notes__[0]
