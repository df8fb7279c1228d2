"""Engines that die, stop, or are interrupted, at random moments of a transfer: nothing is lost or left.

`--transfer-examples 1000` kills for longer.
"""

import gc
import os
import random
import signal
import time
from collections import Counter

import pytest
from test_interrupts import interrupted
from tiny_model import make_folder

from minipaged import LLM
from tests.engine_process import engines
from tests.transfers import (
    CONNECTORS,
    FIRST,
    GREEDY,
    PROMPT,
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
