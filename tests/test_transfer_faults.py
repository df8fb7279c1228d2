"""Transfers that come to nothing, and those who lie: nobody gets a wrong answer, and nothing stays in use."""

import contextlib
import mmap
import os
import re
import resource
import signal
import socket
import threading
import time
from dataclasses import replace

import pytest
from tiny_model import make_folder

from minipaged import LLM, BeamSearchParams, SamplingParams, serve
from minipaged.execution.transfer import link as transfer_link
from minipaged.execution.transfer.shared_memory import PREFIX, _address
from minipaged.requests.kv_transfer import KVTransferParams
from tests.transfers import (
    AWAY,
    CONNECTORS,
    FIRST,
    GREEDY,
    PROMPT,
    SMALL,
    WHERE,
    alone,
    config,
    in_process,
    pair,
    second_half,
    told,
    wait_until_empty,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("transfer"))


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
    other = make_folder(tmp_path / "another")
    with (other / "model.safetensors").open("r+b") as weights:  # one bit of one of them
        weights.seek(-1, 2)
        last = weights.read(1)
        weights.seek(-1, 2)
        weights.write(bytes([last[0] ^ 1]))
    options = pair(CONNECTORS[0], kv_load_failure_policy="fail")
    with LLM(folder, **options[0]) as producer, LLM(other, **options[1]) as consumer:
        [first] = producer.generate(PROMPT, FIRST)
        [end] = consumer.generate(PROMPT, second_half(GREEDY, first.kv_transfer_params))
        assert re.search("weights is [0-9a-f]{16} there and [0-9a-f]{16} here", end.error)


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
    more = {"kv_connector_extra_config": {"lease_seconds": 0.6}}
    stack, (producer, consumer) = in_process(folder, producer=dict(num_blocks=80), **more)
    with stack:
        prompts = [[number, *PROMPT] for number in range(5)]
        began = time.monotonic()
        outputs = producer.generate(prompts, FIRST)
        assert time.monotonic() - began > 1.1
        end = consumer.generate(prompts[-1], second_half(GREEDY, outputs[-1].kv_transfer_params))[0]
        assert end.metrics.num_transferred_tokens
        wanted = alone(folder, [(prompt, replace(FIRST, extra_args=None)) for prompt in prompts])
        assert [told(output) for output in outputs] == wanted
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


def test_aborted_while_it_is_loading_and_nobody_else_is_there(folder):
    """No step comes that would say so: the other engine learns it all the same, and not after two minutes."""
    stack, (producer, consumer) = in_process(folder, kv_connector_extra_config={"bytes_per_step": 1})
    with stack:
        for steps in (0, 5):  # 0: it was not even let in
            [first] = producer.generate(PROMPT, FIRST)
            consumer.add_request(PROMPT, second_half(GREEDY, first.kv_transfer_params), "a")
            for _ in range(steps):
                consumer.step()
            assert producer.stats().memory.used
            consumer.abort("a")
            wait_until_empty(producer)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_process_that_was_forked_from_a_producer_ends_nothing(folder):
    stack, (producer, consumer) = in_process(folder)
    with stack:
        [first] = producer.generate(PROMPT, FIRST)
        if not (child := os.fork()):
            try:
                producer.executor.connector.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        [end] = consumer.generate(PROMPT, second_half(GREEDY, first.kv_transfer_params))
        assert end.metrics.num_transferred_tokens


def test_a_moment_without_open_files_is_not_the_end_of_a_producer(folder, monkeypatch):
    stack, (producer, consumer) = in_process(folder)
    with stack:
        [first] = producer.generate(PROMPT, FIRST)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket(socket.AF_UNIX) as sock:
            resource.setrlimit(resource.RLIMIT_NOFILE, (sock.fileno() + 1, hard))
            try:
                sock.connect(_address(first.kv_transfer_params["remote_host"]))
                time.sleep(0.2)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        [end] = consumer.generate(PROMPT, second_half(GREEDY, first.kv_transfer_params))
        assert end.metrics.num_transferred_tokens


def test_who_finds_many_before_it_waits(folder):
    """Until they are answered: connecting to a Unix socket with a full queue fails at once."""
    name = f"{PREFIX}{os.urandom(8).hex()}"
    with contextlib.ExitStack() as stack, LLM(folder, **pair(CONNECTORS[0])[1]) as consumer:
        listening, *before = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2)]
        listening.bind(_address(name))
        listening.listen(0)
        for sock in before:
            sock.connect(_address(name))
        answering = threading.Timer(0.3, lambda: listening.accept()[0].close())
        answering.start()
        consumer.executor.connector.connect(KVTransferParams(remote_host=name, remote_engine_id="e")).close()
        answering.join()


def test_closing_that_is_broken_off_goes_on_the_next_time(folder, monkeypatch):
    done = []

    def break_off():
        raise KeyboardInterrupt

    with LLM(folder, **pair(CONNECTORS[0])[0]) as producer:
        connector = producer.executor.connector
        connector._closers[:] = [*connector._closers, lambda: done.append(1), break_off]
        with pytest.raises(KeyboardInterrupt):
            producer.close()
        assert not done
        producer.close()
        assert done and not connector._closers


def test_what_was_dropped_is_never_written(folder):
    """Its blocks are somebody else's by now."""
    extra = {"kv_connector_extra_config": {"bytes_per_step": 1}}
    stack, (producer, consumer) = in_process(folder, consumer=dict(num_blocks=50, prefix_cache="none"), **extra)
    with stack:
        other = [*reversed(PROMPT)]
        wanted = alone(folder, [(other, GREEDY)])
        for steps in (2, 6, 12):
            [first] = producer.generate(PROMPT, FIRST)
            consumer.add_request(PROMPT, second_half(GREEDY, first.kv_transfer_params), "a")
            for _ in range(steps):
                consumer.step()
            consumer.abort("a")
            assert [told(consumer.generate(other, GREEDY)[0])] == wanted


def test_a_liar_at_the_door_harms_nobody(folder):
    """Names that nobody has, blocks that nobody has, no JSON, nothing at all; and the pool can only be read."""
    stack, (producer, consumer) = in_process(folder, kv_connector_extra_config={"timeout_seconds": 1.0})
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


# --- what may be said -------------------------------------------------------------------------------------------------

GOOD = {"kv_connector": "SharedMemoryConnector", "kv_role": "kv_both"}


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
    with pytest.raises(ValueError, match="kv_transfer_config: not with tensor_parallel_size > 1"):
        LLM(folder, kv_transfer_config=GOOD, tensor_parallel_size=2)


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


@pytest.mark.skipif(not hasattr(os, "fork") or os.getuid() != 0, reason="only root can be somebody else")
def test_another_user_of_this_machine_is_not_answered(folder):
    """Linux's own namespace of sockets has no permissions: whoever knows the name can connect."""
    stack, (producer, _) = in_process(folder)
    with stack:
        [first] = producer.generate(PROMPT, FIRST)
        for user, answered in ((0, b"y"), (65534, b"n")):
            ours, theirs = os.pipe()
            if not (child := os.fork()):
                said = b""
                try:
                    os.setuid(user)
                    sock = socket.socket(socket.AF_UNIX)
                    sock.settimeout(5)
                    sock.connect("\0" + first.kv_transfer_params["remote_host"][1:])
                    transfer_link.send(sock, {"hello": {}})
                    said = sock.recv(1)
                finally:
                    os.write(theirs, b"y" if said else b"n")
                    os._exit(0)
            assert os.read(ours, 1) == answered
            os.waitpid(child, 0)
            os.close(ours)
            os.close(theirs)


@pytest.mark.skipif(not hasattr(os, "fork") or os.getuid() != 0, reason="only root can be somebody else")
def test_another_user_of_this_machine_is_not_asked(folder):
    """Who can send requests could name a socket of his own, and so fill the prefix cache with what he likes."""
    name = f"{PREFIX}{os.urandom(8).hex()}"
    ready, said = os.pipe()
    if not (child := os.fork()):
        try:
            os.setuid(65534)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(_address(name))
                sock.listen()
                os.write(said, b"y")
                time.sleep(60)
        finally:
            os._exit(0)
    try:
        assert os.read(ready, 1) == b"y"
        with LLM(folder, **pair(CONNECTORS[0], kv_load_failure_policy="fail")[1]) as consumer:
            [end] = consumer.generate(PROMPT, second_half(GREEDY, WHERE | {"remote_host": name}))
            assert "engine e can't be reached: it is another user's" in end.error
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(said)


@pytest.mark.parametrize(("given", "error"), [
    ("{", "--kv-transfer-config: is no JSON"),
    ('{"kv_role": "x"}', "kv_transfer_config: kv_connector='': must be one of SharedMemoryConnector"),
    ('{"kv_rool": "x"}', "kv_transfer_config has no key 'kv_rool'; did you mean 'kv_role'?"),
])  # fmt: skip
def test_the_flag_is_checked_before_anything_is_loaded(given, error, capsys):
    assert serve.main(["--kv-transfer-config", given]) == 2
    assert error in capsys.readouterr().err
