"""Blocks from one engine to another: the same tokens as from one, whatever else is on, and whoever dies meanwhile."""

from dataclasses import replace

import pytest
from tiny_model import make_folder

from minipaged import LLM, BeamSearchParams, SamplingParams
from tests.engine_process import engines

CONNECTORS = ("SharedMemoryConnector", "TorchDistributedConnector")
AWAY = {"kv_transfer_params": {"do_remote_decode": True}}
PROMPT = [(7 * i * i + i) % 90 for i in range(3, 150)]
SMALL = dict(block_size=4, num_blocks=120, debug=True)
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("transfer"))


def config(connector, role, **more):
    return {"kv_transfer_config": {"kv_connector": connector, "kv_role": role, **more}}


def pair(connector, producer=None, consumer=None, **more):
    """The options of both."""
    return (
        {**SMALL, **config(connector, "kv_producer", **more), **(producer or {})},
        {**SMALL, **config(connector, "kv_consumer", **more), **(consumer or {})},
    )


def first_half(engine, name, prompt, **more):
    """The prompt's, on a producer; where its blocks are."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, extra_args=AWAY)
    return engine.generate(name, prompt, params, **more).kv_transfer_params


def second_half(params, where):
    return replace(params, extra_args={"kv_transfer_params": where})


def alone(folder, prompt, params, **options):
    with LLM(folder, **{**SMALL, "num_blocks": 400, "prefix_cache": "none", **options}) as llm:
        [output] = llm.generate(prompt, params)
        return [(one.token_ids, one.finish_reason) for one in output.outputs]


@pytest.mark.parametrize("connector", CONNECTORS)
def test_two_processes_answer_as_one(folder, connector):
    with engines(folder, *pair(connector)) as (producer, consumer):
        for name, params in {
            "greedy": GREEDY,
            "samples": SamplingParams(n=3, seed=7, max_tokens=12, temperature=1.2),
            "beams": BeamSearchParams(beam_width=3, max_tokens=8),
        }.items():
            where = first_half(producer, name, PROMPT)
            assert where["do_remote_prefill"] and len(where["remote_block_ids"]) == len(PROMPT) // 4
            consumer.ask("reset")
            end = consumer.generate(name, PROMPT, second_half(params, where))
            assert end.outputs == alone(folder, PROMPT, params)
            assert end.transferred == (len(PROMPT) - 1) // 4 * 4 and end.error is None
        producer.wait_until_empty()
        consumer.wait_until_empty()
        assert producer.ask("stats")[1].num_exports == consumer.ask("stats")[1].num_loads == 3
        producer.close()
        consumer.close()
