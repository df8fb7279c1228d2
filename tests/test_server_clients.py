"""The server, asked by clients that we did not write. What they get is what the engine gives without a server."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Timer
from typing import Literal

import openai
import pytest
from pydantic import BaseModel
from served import serving
from tiny_model import make_folder

from minipaged import LLM, AsyncLLM, BeamSearchParams, SamplingParams
from minipaged.server.app import create_app
from minipaged.server.config import ServerConfig

MODEL = "tiny/model"
OPTIONS = dict(max_num_seqs=16, num_blocks=512, max_model_len=512, seed=0, dtype="fp32")
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 6 times 7?"}]
PROMPT = "Once upon a time there was a block."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def offline(folder):
    with LLM(folder, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def engine(folder):
    llm = AsyncLLM(folder, **OPTIONS)
    yield llm
    llm.shutdown()


@pytest.fixture(scope="module")
def url(engine):
    with serving(create_app(engine, ServerConfig((MODEL, "other"), ("right", "also"), page=False))) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="right", max_retries=0, timeout=30) as one:
        yield one


# --- what comes is what the engine gives ------------------------------------------------------------------------------

OPENAIS = {"n", "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "logit_bias", "max_tokens",
           "stop", "logprobs"}  # fmt: skip
SETS = {
    "greedy": dict(temperature=0, max_tokens=12),
    "seed": dict(seed=7, max_tokens=12),
    "default length": dict(seed=8),
    "n": dict(seed=1, n=3, max_tokens=9),
    "nucleus": dict(seed=2, temperature=0.8, top_p=0.7, top_k=20, min_p=0.01),
    "penalties": dict(seed=3, presence_penalty=1.5, frequency_penalty=-0.5, repetition_penalty=1.2, max_tokens=20),
    "stop": dict(seed=4, stop=["e", "Q", "+:"], max_tokens=60),
    "stop kept": dict(seed=4, stop="e", include_stop_str_in_output=True, max_tokens=60),
    "stop in the middle": dict(seed=5, n=2, stop=["aa", "ab", "zq0"], max_tokens=30, logprobs=1),
    "stop token": dict(seed=6, stop_token_ids=list(range(20)), max_tokens=60),
    "min_tokens": dict(seed=6, stop_token_ids=list(range(20)), min_tokens=15, max_tokens=60),
    "end of text": dict(seed=9, logit_bias={"95": 5}, max_tokens=60, skip_special_tokens=False),
    "no end of text": dict(seed=9, logit_bias={"95": 5}, max_tokens=20, ignore_eos=True),
    "bias": dict(seed=10, logit_bias={"40": 3.5, "41": -100}),
    "few tokens": dict(seed=11, allowed_token_ids=[1, 2, 3]),
    "bad words": dict(temperature=0, bad_words=["+", "B"]),
    "logprobs": dict(seed=12, logprobs=3, max_tokens=7),
    "only their own": dict(seed=12, logprobs=0, n=2, max_tokens=7),
    "cut": dict(seed=13, truncate_prompt_tokens=5),
    "choice": dict(seed=14, n=2, structured_outputs={"choice": ["yes", "no", "perhaps"]}),
    "regex": dict(seed=15, structured_outputs={"regex": "[a-c]{4,9}"}, logprobs=2),
    "grammar": dict(seed=16, structured_outputs={"grammar": 'root ::= "a" | "(" root ")"'}),
    "schema": dict(seed=17, max_tokens=90, structured_outputs={"json": {
        "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}),
    "beams": dict(use_beam_search=True, beam_width=4, n=2, max_tokens=10, length_penalty=0.5, early_stopping=True),
    "as many beams": dict(use_beam_search=True, n=3, max_tokens=10, ignore_eos=True),
}  # fmt: skip


def params_of(fields):
    """What stands for these fields in `LLM.generate`."""
    fields = dict(fields)
    if fields.pop("use_beam_search", False):
        return BeamSearchParams(**{"beam_width": fields["n"]} | fields)
    return SamplingParams(**fields)


def asked(fields):
    """OpenAI's fields as arguments, the others in extra_body."""
    known = {name: value for name, value in fields.items() if name in OPENAIS}
    return known | {"extra_body": {name: value for name, value in fields.items() if name not in OPENAIS}}


def told(choices):
    """What all choices say, in their order."""
    choices = sorted(choices, key=lambda one: one.index)
    return [(one.text, one.token_ids, one.finish_reason, one.stop_reason) for one in choices]


def expected(outputs):
    return [(o.text, o.token_ids, o.finish_reason, o.stop_reason) for output in outputs for o in output.outputs]


def joined(chunks):
    """Chunks of a stream to what stands in a whole answer: dicts by index."""
    found = {}
    for chunk in chunks:
        for one in chunk.choices:
            whole = found.setdefault(one.index, {"text": "", "tokens": [], "logprobs": [], "offsets": [], "end": None})
            assert whole["end"] is None, "nothing comes after the end"
            delta = getattr(one, "delta", None)
            whole["text"] += one.text if delta is None else delta.content or ""
            whole["tokens"] += getattr(one, "token_ids", None) or []
            if one.logprobs:
                whole["logprobs"] += one.logprobs.content if delta else one.logprobs.token_logprobs
                whole["offsets"] += [] if delta else one.logprobs.text_offset
            if one.finish_reason:
                whole["end"] = one.finish_reason, getattr(one, "stop_reason", None)
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize("name", SETS)
def test_completions_are_the_engines(client, offline, name):
    fields = SETS[name]
    expectation = offline.generate([PROMPT, "And another."], params_of(fields))
    body = asked(fields)
    body["extra_body"]["return_token_ids"] = True
    whole = client.completions.create(model=MODEL, prompt=[PROMPT, "And another."], **body)
    assert told(whole.choices) == expected(expectation)
    assert [one.index for one in whole.choices] == list(range(len(whole.choices)))
    assert whole.usage.prompt_tokens == sum(len(output.prompt_token_ids) for output in expectation)
    assert whole.usage.completion_tokens == sum(len(o.token_ids) for e in expectation for o in e.outputs)
    stream = client.completions.create(model=MODEL, prompt=[PROMPT, "And another."], stream=True, **body)
    pieces = joined(stream)
    assert [(p["text"], p["tokens"], *p["end"]) for p in pieces] == expected(expectation)
    if fields.get("logprobs") is not None:
        outputs = [o for output in expectation for o in output.outputs]
        for choice, piece, output in zip(whole.choices, pieces, outputs, strict=True):
            own = [lp[t].logprob for t, lp in zip(output.token_ids, output.logprobs, strict=True)]
            assert choice.logprobs.token_logprobs == pytest.approx(own) == piece["logprobs"]
            assert choice.logprobs.text_offset == piece["offsets"] == list(range(len(own)))  # a sign for each token
            best = [sorted(top.values(), reverse=True) for top in choice.logprobs.top_logprobs]
            assert best == [sorted({p.logprob for p in lp.values()}, reverse=True) for lp in output.logprobs]


@pytest.mark.parametrize("name", SETS)
def test_chats_are_the_engines(client, offline, name):
    fields = {"max_tokens": 40} | SETS[name]
    if "truncate_prompt_tokens" in fields:
        pytest.skip("tested with completions")
    [expectation] = offline.chat(MESSAGES, params_of(fields))
    body = asked(fields)
    if (num_best := body.pop("logprobs", None)) is not None:
        body |= {"logprobs": True, "top_logprobs": num_best}
    body["extra_body"]["return_token_ids"] = True
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, **body)
    said = [(c.message.content, c.token_ids, c.finish_reason, c.stop_reason) for c in whole.choices]
    assert said == expected([expectation])
    assert whole.prompt_token_ids == expectation.prompt_token_ids
    chunks = [*client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, **body)]
    pieces = joined(chunks)
    assert [(p["text"], p["tokens"], *p["end"]) for p in pieces] == expected([expectation])
    assert [c.choices[0].delta.role for c in chunks[: len(pieces)]] == ["assistant"] * len(pieces)
    if num_best is not None:
        for choice, piece, output in zip(whole.choices, pieces, expectation.outputs, strict=True):
            content = choice.logprobs.content
            assert content == piece["logprobs"]
            for token, one, logprobs in zip(content, output.token_ids, output.logprobs, strict=True):
                assert token.logprob == pytest.approx(logprobs[one].logprob)
                assert bytes(token.bytes).decode() == token.token == logprobs[one].decoded_token
                best = [p.logprob for p in list(logprobs.values())[:num_best]]
                assert [top.logprob for top in token.top_logprobs] == pytest.approx(best)


@pytest.mark.parametrize(
    ("prompt", "number"),
    [("one", 1), (["one", "two"], 2), ([1, 2, 3], 1), ([[1, 2, 3], [4]], 2)],
)
def test_prompts_of_all_kinds(client, offline, prompt, number):
    outputs = offline.generate(prompt, SamplingParams(seed=3, n=2, max_tokens=5))
    for stream in (False, True):
        answer = client.completions.create(model=MODEL, prompt=prompt, seed=3, n=2, max_tokens=5, stream=stream)
        texts = [p["text"] for p in joined(answer)] if stream else [choice.text for choice in answer.choices]
        assert texts == [o.text for output in outputs for o in output.outputs]
        assert len(texts) == 2 * number


def test_without_special_tokens_and_with_a_salt(client, offline):
    body = dict(model=MODEL, prompt="x" * 40, max_tokens=1, temperature=0)
    first, again, salted = (
        client.completions.create(**body, extra_body={"add_special_tokens": False, "cache_salt": salt})
        for salt in ("a", "a", "b")
    )
    assert [one.usage.prompt_tokens_details.cached_tokens for one in (first, again, salted)] == [0, 32, 0]
    assert first.choices[0].text == again.choices[0].text == salted.choices[0].text


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
@pytest.mark.parametrize("prompt", [PROMPT, [20, 30, 40, 95, 50]])
def test_echo_is_the_prompt_with_what_the_model_thought_of_it(client, offline, prompt, max_tokens):
    params = SamplingParams(seed=5, logprobs=2, prompt_logprobs=2, max_tokens=max_tokens or 1)
    [output] = offline.generate(prompt, params)
    [one] = output.outputs
    body = dict(model=MODEL, prompt=prompt, seed=5, logprobs=2, max_tokens=max_tokens, echo=True)
    answer = client.completions.create(**body)
    [choice] = answer.choices
    echoed = PROMPT if prompt is PROMPT else offline.tokenizer.decode(prompt)
    assert choice.text == echoed + (one.text if max_tokens else "")
    assert answer.usage.completion_tokens == max_tokens and answer.usage.prompt_tokens == len(output.prompt_token_ids)
    own = [lp and lp[token].logprob for token, lp in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)]
    if max_tokens:
        own += [lp[token].logprob for token, lp in zip(one.token_ids, one.logprobs, strict=True)]
    told = choice.logprobs
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert told.token_logprobs[1:] == pytest.approx(own[1:]) and len(own) == len(told.tokens) == len(told.text_offset)
    for text, offset in zip(told.tokens, told.text_offset, strict=True):
        assert text == "<end>" or choice.text[offset:].startswith(text)  # the end of text is told, and not shown
    pieces = joined(client.completions.create(**body, stream=True))
    assert [(p["text"], p["logprobs"], p["offsets"], p["end"][0]) for p in pieces] == [
        (choice.text, told.token_logprobs, told.text_offset, choice.finish_reason)
    ]


def test_prompt_logprobs_by_token_id(client, offline):
    [output] = offline.generate(PROMPT, SamplingParams(seed=5, prompt_logprobs=1, max_tokens=1))
    body = dict(model=MODEL, seed=5, max_tokens=1, extra_body={"prompt_logprobs": 1})
    [choice] = client.completions.create(prompt=PROMPT, **body).choices
    assert choice.prompt_logprobs[0] is None and len(choice.prompt_logprobs) == len(output.prompt_token_ids)
    for one, logprobs in zip(choice.prompt_logprobs[1:], output.prompt_logprobs[1:], strict=True):
        assert one == {str(token): {"logprob": p.logprob, "rank": p.rank, "decoded_token": p.decoded_token}
                       for token, p in logprobs.items()}  # fmt: skip
    assert client.chat.completions.create(messages=MESSAGES, **body).prompt_logprobs[0] is None


@pytest.mark.parametrize("continuous", [False, True])
def test_usage_in_a_stream(client, offline, continuous):
    [output] = offline.chat(MESSAGES, SamplingParams(seed=1, n=2, max_tokens=9))
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    chunks = [*client.chat.completions.create(
        model=MODEL, messages=MESSAGES, seed=1, n=2, max_tokens=9, stream=True, stream_options=options)]  # fmt: skip
    *others, last = chunks
    made = sum(len(one.token_ids) for one in output.outputs)
    assert last.choices == [] and last.usage.completion_tokens == made
    assert last.usage.prompt_tokens == len(output.prompt_token_ids)
    assert last.usage.total_tokens == last.usage.prompt_tokens + made
    counts = [chunk.usage and chunk.usage.completion_tokens for chunk in others]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == made if continuous else not any(counts)
    assert {chunk.usage.prompt_tokens for chunk in others} == {last.usage.prompt_tokens} if continuous else True


def test_many_at_once_each_get_their_own(client, offline):
    def ask(seed):
        return client.completions.create(model=MODEL, prompt=f"{seed}: {PROMPT}", seed=seed, max_tokens=8 + seed % 9)

    with ThreadPoolExecutor(24) as pool:
        answers = [*pool.map(ask, range(48))]
    outputs = offline.generate(
        [f"{seed}: {PROMPT}" for seed in range(48)], [SamplingParams(seed=s, max_tokens=8 + s % 9) for s in range(48)]
    )
    assert [one.choices[0].text for one in answers] == [one.outputs[0].text for one in outputs]


async def of_the_async_client(url, offline):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="also", max_retries=0) as client:

        async def whole(seed):
            answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, seed=seed, max_tokens=9)
            return answer.choices[0].message.content

        async def streamed(seed):
            pieces = [""]
            async for chunk in await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, seed=seed, max_tokens=9, stream=True
            ):
                pieces.append(chunk.choices[0].delta.content)
            return "".join(pieces)

        got = await asyncio.gather(*(ask(seed) for seed in range(6) for ask in (whole, streamed)))
    outputs = [offline.chat(MESSAGES, SamplingParams(seed=seed, max_tokens=9))[0].outputs[0].text for seed in range(6)]
    assert got == [text for text in outputs for _ in range(2)]


def test_the_async_client(url, offline):
    asyncio.run(of_the_async_client(url, offline))


# --- what the client makes of it --------------------------------------------------------------------------------------


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL, "other"]
    assert client.models.retrieve(MODEL).max_model_len == 512
    with pytest.raises(openai.NotFoundError, match="nothing"):
        client.models.retrieve("nothing")


def test_the_answer_has_the_name_that_was_asked_for(client):
    for name in (MODEL, "other"):
        assert client.completions.create(model=name, prompt="a", max_tokens=1).model == name
        chunks = client.completions.create(model=name, prompt="a", max_tokens=1, stream=True)
        assert {chunk.model for chunk in chunks} == {name}


def test_raw_responses_have_an_id(client):
    raw = client.completions.with_raw_response.create(
        model=MODEL, prompt="a", max_tokens=1, extra_headers={"X-Request-Id": "mine"}
    )
    assert raw.headers["x-request-id"] == "mine" and raw.parse().choices[0].finish_reason == "length"
    with client.completions.with_streaming_response.create(model=MODEL, prompt="a", max_tokens=1, stream=True) as raw:
        assert raw.headers["content-type"].startswith("text/event-stream")
        assert [*raw.iter_lines()][-2:] == ["data: [DONE]", ""]


class Meeting(BaseModel):
    name: Literal["party", "talk"]
    day: int


def test_structured_outputs_of_the_client(client, offline):
    """`parse` and `stream` write the schema of a pydantic model, and read the answer with it."""
    body = dict(model=MODEL, messages=MESSAGES, response_format=Meeting, seed=3, max_tokens=200)
    bias = {"logit_bias": {str(ord(sign) - 33): 20 for sign in "1}"}}  # a short number
    answer = client.chat.completions.parse(**body, **bias, n=2)
    assert all(isinstance(choice.message.parsed, Meeting) for choice in answer.choices)
    with client.chat.completions.stream(**body, **bias) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert isinstance(final.choices[0].message.parsed, Meeting)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**body | {"max_tokens": 3})


def test_json_object(client):
    bias = {str(ord(sign) - 33): 20 for sign in "}{"}
    for stream in (False, True):
        answer = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, response_format={"type": "json_object"}, seed=3, stream=stream,
            logit_bias=bias,
        )  # fmt: skip
        text = joined(answer)[0]["text"] if stream else answer.choices[0].message.content
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (dict(temperature=-1), "temperature"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(extra_body={"temprature": 1}), "temprature"),
        (dict(n=1000), "n"),
        (dict(best_of=2), "best_of"),
        (dict(prompt="a" * 1000), "prompt"),
        (dict(extra_body={"structured_outputs": {"json": {"type": "nothing"}}}), "structured_outputs.json"),
        (dict(extra_body={"use_beam_search": True, "structured_outputs": {"regex": "a"}}), "structured_outputs"),
    ],
)
def test_bad_requests(client, body, param):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**{"model": MODEL, "prompt": "a", "stream": stream} | body)
        error = caught.value
        assert (error.param, str(error.code), error.type) == (param, "400", "BadRequestError")
        assert param in error.message


def test_an_error_in_a_stream_is_raised(engine, client, monkeypatch):
    """The status can't say it any more: the client reads it in an event."""
    execute, there = engine.engine.executor.execute, Event()

    def breaks(plan):
        output = execute(plan)
        for part in plan.sequences:
            if part.draw and len(part.draw.output_token_ids) == 3:
                there.wait(10)
                del output.tokens[part.seq_id]
                output.errors[part.seq_id] = "the model's logits are NaN"
        return output

    monkeypatch.setattr(engine.engine.executor, "execute", breaks)
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, max_tokens=9, extra_body={"ignore_eos": True}
    )
    there.set()
    text = ""
    with pytest.raises(openai.APIError, match="NaN"):
        for chunk in stream:
            text += chunk.choices[0].delta.content
    assert len(text) == 3


def test_errors_by_class(url, client):
    with pytest.raises(openai.AuthenticationError, match="API key"):
        client.with_options(api_key="wrong").completions.create(model=MODEL, prompt="a")
    with pytest.raises(openai.NotFoundError, match="not served") as caught:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="a")
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.02).completions.create(
            model=MODEL, prompt="a", n=8, max_tokens=400, extra_body={"ignore_eos": True}
        )
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model=MODEL, prompt="a" * (5 << 20))
    assert caught.value.status_code == 413


def test_a_full_queue_is_waited_for(engine, client):
    """429 with Retry-After: the client comes again by itself."""
    app = create_app(engine, ServerConfig((MODEL,), max_queued_requests=2, page=False))
    with serving(app) as url:
        impatient = client.with_options(base_url=f"{url}/v1")
        app.state.house.num_coming = 2
        with pytest.raises(openai.RateLimitError, match="wait") as caught:
            impatient.completions.create(model=MODEL, prompt="a")
        assert caught.value.response.headers["retry-after"] == "1"
        app.state.house.num_coming = 0
        patient = impatient.with_options(max_retries=5)
        with ThreadPoolExecutor(12) as pool:
            answers = pool.map(lambda seed: patient.completions.create(model=MODEL, prompt="a", seed=seed), range(12))
            assert len([*answers]) == 12


def test_a_server_that_ends_sends_away(engine, client, monkeypatch):
    """503 with Retry-After; a client that comes again finds the next one."""

    async def stay(server):
        while not app.state.house.closing or not app.state.over:
            await asyncio.sleep(0.02)
        server.should_exit = True

    monkeypatch.setattr("minipaged.server.running._Server._drain", stay)
    app = create_app(engine, ServerConfig((MODEL,), drain_seconds=1, page=False))
    app.state.over = False
    app.state.house.closing = True
    with serving(app) as url:
        there = client.with_options(base_url=f"{url}/v1")
        with pytest.raises(openai.InternalServerError, match="about to end") as caught:
            there.completions.create(model=MODEL, prompt="a")
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "1"
        Timer(0.5, lambda: setattr(app.state.house, "closing", False)).start()
        assert there.with_options(max_retries=1).completions.create(model=MODEL, prompt="a", max_tokens=1).choices
        app.state.over = True
