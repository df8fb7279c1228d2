"""What the tests of transfers have in common: pairs of engines, and what one engine says alone."""

import contextlib
import threading
import time
from dataclasses import replace

from minipaged import LLM, BeamSearchParams, SamplingParams

CONNECTORS = ("SharedMemoryConnector", "TorchDistributedConnector")
AWAY = {"kv_transfer_params": {"do_remote_decode": True}}
PROMPT = [(7 * i * i + i) % 90 for i in range(3, 150)]
SMALL = dict(block_size=4, num_blocks=120, debug=True)
WHERE = dict(
    do_remote_prefill=True, remote_engine_id="e", remote_block_ids=[1], remote_host="h", remote_port=1,
    remote_request_id="r",
)  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
FIRST = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, extra_args=AWAY)


def no_thread_is_left():
    """Of loads, and of those who give blocks."""
    until = time.monotonic() + 10
    while left := [one.name for one in threading.enumerate() if one.name.startswith("kv ")]:
        assert time.monotonic() < until, left
        time.sleep(0.01)


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
    stack.callback(no_thread_is_left)
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


def wait_until_empty(llm):
    until = time.monotonic() + 10
    while (usage := llm.stats().memory).used + usage.cpu_used:
        assert time.monotonic() < until, f"{usage.used} blocks are still in use"
        time.sleep(0.01)
    llm.memory.check()
