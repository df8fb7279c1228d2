"""The server's API itself: what is refused and how, what is told besides the text, what is said of mistakes."""

import doctest
import json
import threading
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError
from served import serving
from tiny_model import make_folder

from minipaged import AsyncLLM
from minipaged.server import bodies, elsewhere, errors, logprobs, protocol, schema
from minipaged.server.app import create_app
from minipaged.server.config import ServerConfig
from minipaged.server.errors import invalid
from minipaged.server.protocol import ChatCompletionRequest, CompletionRequest

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "What is it?"}]
# 64 and 65 are "a" and "b". Whoever begins with "a" has nothing left to say; "b" goes on for ever.
DEAD_END = {"allowed_token_ids": [64, 65], "bad_words": ["aa", "ab", "ba"], "max_tokens": 5}
NOTHING_TO_SAY = {"allowed_token_ids": [64], "bad_words": ["a"]}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("model"), max_model_len=512)
    llm = AsyncLLM(str(folder), max_num_seqs=16, num_blocks=256, seed=0)
    yield llm
    llm.engine.memory.check()
    assert not llm.engine.has_unfinished_requests and not llm.waiting
    llm.shutdown()


@pytest.fixture(scope="module")
def app(llm):
    return create_app(llm, ServerConfig(("tiny", "other"), max_body_bytes=100_000, page=False))


@pytest.fixture(scope="module")
def http(app):
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def events(response):
    """The events of a stream, without the last."""
    *found, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "") and response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(one.removeprefix("data: ")) for one in found]


def error_of(response, status=400):
    """What stands in the error object, which has OpenAI's form whatever happened."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = schema.ErrorAnswer.model_validate(response.json(), strict=True).error
    assert error.code == status and error.type == errors.KINDS[status] and "Traceback" not in error.message
    return error


@pytest.mark.parametrize("module", [bodies, elsewhere, errors, logprobs])
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0 < doctest.testmod(module).attempted


# --- what is refused --------------------------------------------------------------------------------------------------

DEEP = b'{"prompt":' + b"[" * 30_000 + b"]" * 30_000 + b"}"
BODIES = [  # a body, and what the error says
    (b"", "empty"),
    (b"{", "no JSON"),
    (b"null", "the body: must be a JSON object"),
    (b"[1]", "the body: must be a JSON object"),
    (b'"prompt"', "the body: must be a JSON object"),
    (b"\xff\xfe", "no JSON"),
    (b'{"prompt": "\xed\xa0\x80"}', "no JSON"),
    ('{"prompt": "a"}'.encode("utf-16"), "no JSON"),
    (DEEP, "nested too deeply"),
    (b'{"prompt": "a", "temperature": NaN}', "NaN"),
    (b'{"prompt": "a", "temperature": -Infinity}', "Infinity"),
    (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "digits"),
    (b'{"prompt": "a", "temperature": 1e999}', "temperature=inf"),
    (b'{"prompt": "a", "prompt": "b"}', "prompt: it stands there twice"),
    (b'{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}', "1: it stands there twice"),
    (b'{"prompt": "\\ud800"}', "prompt: half a surrogate pair"),
    (b'{"\\udfff": 1}', "\\udfff: half a surrogate pair"),
    (b'{"prompt": "a", "logit_bias": {"\\ud800": 1}}', "logit_bias: half a surrogate pair"),
]


@pytest.mark.parametrize(("body", "said"), BODIES)
@pytest.mark.parametrize("path", [COMPLETIONS, CHATS, "/tokenize", "/detokenize", "/abort"])
def test_bodies_that_are_none(http, path, body, said):
    if path != COMPLETIONS and "half" not in said and b"prompt" in body and b"[[" not in body:
        pytest.skip("prompt is a field of completions")
    assert said in error_of(http.post(path, content=body, headers={"Content-Type": "application/json"})).message


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "/"])
def test_bodies_that_do_not_call_themselves_json(http, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    assert "application/json" in error_of(http.post(COMPLETIONS, content=b'{"prompt":"a"}', headers=headers)).message


def test_content_types_that_are_json(http):
    for kind in ("application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"):
        body = b'{"prompt": "a", "user": "\\ud83d\\ude00", "max_tokens": 1.0}'  # a whole pair; an integer
        assert http.post(COMPLETIONS, content=body, headers={"Content-Type": kind}).status_code == 200


def test_a_body_that_is_too_long(http):
    def pieces():  # nothing says beforehand how long it is
        yield b'{"prompt": "'
        for _ in range(20):
            yield b"a" * 10_000

    for content in (b" " * 100_001, pieces()):
        answer = http.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
        assert "100000 bytes" in error_of(answer, 413).message


FIELDS = [  # fields of a completion, the field that is named, what is said
    (dict(prompt=None), "prompt", "a text, a list of token ids"),
    (dict(prompt=5), "prompt", "a text, a list of token ids"),
    (dict(prompt=True), "prompt", "a text"),
    (dict(prompt=[]), "prompt", "a text"),
    (dict(prompt=""), "prompt", "empty"),
    (dict(prompt=[[]]), "prompt", "empty"),
    (dict(prompt=["a", ""]), "prompt", "prompt 1: the prompt is empty"),
    (dict(prompt=[1, "a"]), "prompt", "a text"),
    (dict(prompt=[1, 2.5]), "prompt", "a text"),
    (dict(prompt=[[1], [96]]), "prompt", "prompt 1: token id 96"),
    (dict(prompt=[-1]), "prompt", "token id -1"),
    (dict(prompt=[10**30]), "prompt", "0 to 95"),
    (dict(prompt="a" * 600), "prompt", "600 tokens"),
    (dict(prompt="a" * 509, n=16, max_tokens=3, echo=True, stop_token_ids=[500]), "stop_token_ids", "500"),
    (dict(max_tokens=0), "max_tokens", ">= 1"),
    (dict(max_tokens="5"), "max_tokens", "valid integer"),
    (dict(max_tokens=5.5), "max_tokens", "valid integer"),
    (dict(max_tokens=True), "max_tokens", "valid integer"),
    (dict(n=17), "n", "max_num_seqs is 16"),
    (dict(n=10**40), "n", "max_num_seqs"),
    (dict(n=0), "n", ">= 1"),
    (dict(temperature=0, n=2), "n", "greedy"),
    (dict(temperature=10**400), "temperature", "number"),
    (dict(seed="a"), "seed", "integer"),
    (dict(stop=[1]), "stop", "a list of texts"),
    (dict(stop=""), "stop", "none empty"),
    (dict(logit_bias={"x": 1}), "logit_bias", "token id"),
    (dict(logit_bias={"96": 1}), "logit_bias", "token id 96"),
    (dict(logprobs=21), "logprobs", "max_logprobs=20"),
    (dict(logprobs=21, echo=True), "logprobs", "max_logprobs=20"),
    (dict(logprobs=True), "logprobs", "integer"),
    (dict(prompt_logprobs=1, stream=True), "prompt_logprobs", "stream"),
    (dict(stream_options={"include_usage": True}), "stream_options", "stream=true"),
    (dict(stream=True, stream_options={"include": True}), "stream_options.include", "did you mean include_usage?"),
    (dict(temprature=1), "temprature", "did you mean temperature?"),
    (dict(max_completion_tokens=1), "max_completion_tokens", "it is max_tokens"),
    (dict(messages=MESSAGES), "messages", "no such field"),
    (dict(best_of=2), "best_of", "use_beam_search"),
    (dict(suffix="b"), "suffix", "not supported"),
    (dict(guided_json={}), "guided_json", "structured_outputs"),
    (dict(priority=1), "priority", "order"),
    (dict(priority=False), "priority", "not supported"),  # False is no 0
    (dict(bad_words=[""]), "bad_words", "none empty"),
    (dict(cache_salt=""), "cache_salt", "not empty"),
    (dict(request_id=""), "request_id", "1 to 200 ASCII characters"),
    (dict(beam_width=2), "beam_width", "use_beam_search"),
    (dict(use_beam_search=True, n=0), "n", "from 1"),
    (dict(use_beam_search=True, n=3, beam_width=2), "n", "beam_width (2)"),
    (dict(use_beam_search=True, beam_width=40), "beam_width", "max_num_seqs"),
    (dict(use_beam_search=True, early_stopping="later"), "early_stopping", "never"),
    (dict(use_beam_search=True, stop=["a"]), "stop", "not with use_beam_search"),
    (dict(use_beam_search=True, temperature=0.5), "temperature", "not with use_beam_search"),
    (dict(use_beam_search=True, response_format={"type": "json_object"}), "response_format", "beam"),
    (dict(response_format={"type": "xml"}), "response_format.type", "json_object"),
    (dict(response_format={"type": "json_schema"}), "response_format.json_schema", "schema"),
    (dict(response_format={"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}),
     "response_format.json_schema.schema", "nothing"),
    (dict(response_format={"type": "json_object"}, structured_outputs={"regex": "a"}), "structured_outputs", "one of"),
    (dict(structured_outputs={}), "structured_outputs", "nothing is given"),
    (dict(structured_outputs={"regx": "a"}), "structured_outputs.regx", "did you mean regex?"),
    (dict(structured_outputs={"regex": "("}), "structured_outputs.regex", ""),
    (dict(structured_outputs={"choice": []}), "structured_outputs.choice", "not empty"),
    (dict(structured_outputs={"grammar": "no grammar"}), "structured_outputs.grammar", ""),
    (dict(structured_outputs={"json": 5}), "structured_outputs.json", "a JSON schema"),
    (dict(structured_outputs={"json": "{"}), "structured_outputs.json", "a JSON schema"),
    (dict(structured_outputs={"structural_tag": "a"}), "structured_outputs.structural_tag", "not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "said"), FIELDS)
def test_what_is_wrong_is_named(http, fields, param, said):
    for stream in ({}, {"stream": True}):
        if stream and ("stream_options" in fields or "prompt_logprobs" in fields):
            continue
        error = error_of(http.post(COMPLETIONS, json={"prompt": "a"} | fields | stream))
        assert error.param == param and said in error.message and len(error.message) < 600


CHAT_FIELDS = [
    (dict(messages=None), "messages", "list"),
    (dict(messages=[]), "messages", "at least one"),
    (dict(messages=["a"]), "messages.0", "JSON object"),
    (dict(messages=[{"role": "user"}]), "messages", "chat message 0"),
    (dict(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages", "only text"),
    (dict(messages=[{"role": "user", "content": "a" * 600}]), "messages", "tokens"),
    (dict(prompt="a"), "prompt", "no such field"),
    (dict(max_completion_tokens=0), "max_completion_tokens", "max_completion_tokens=0"),
    (dict(max_tokens=0), "max_tokens", "max_tokens=0"),
    (dict(max_tokens=5, max_completion_tokens=6), "max_tokens", "one of them"),
    (dict(top_logprobs=2), "top_logprobs", "logprobs=true"),
    (dict(logprobs=True, top_logprobs=21), "top_logprobs", "top_logprobs=21"),
    (dict(logprobs=2), "logprobs", "boolean"),
    (dict(tools=[{"type": "function", "function": {"name": "f"}}]), "tools", "response_format"),
    (dict(tool_choice="required"), "tool_choice", "not supported"),
    (dict(reasoning_effort="high"), "reasoning_effort", "not supported"),
    (dict(echo=True), "echo", "not supported"),
    (dict(chat_template="{{ messages }}"), "chat_template", "not supported"),
]


@pytest.mark.parametrize(("fields", "param", "said"), CHAT_FIELDS)
def test_what_is_wrong_in_a_chat_is_named(http, fields, param, said):
    error = error_of(http.post(CHATS, json={"messages": MESSAGES} | fields))
    assert error.param == param and said in error.message


def test_a_long_name_is_not_compared_for_ever(http):
    began = time.monotonic()
    error = error_of(http.post(COMPLETIONS, json={"prompt": "a", "x" * 90_000: 1}))
    assert len(error.message) < 300 and time.monotonic() - began < 2


@pytest.mark.parametrize("table", [elsewhere.OF_COMPLETIONS, elsewhere.OF_CHATS])
def test_values_that_ask_for_nothing_do_nothing(http, table):
    """All at once, and each value of each: the answer is the same as without."""
    path = COMPLETIONS if table is elsewhere.OF_COMPLETIONS else CHATS
    body = {"seed": 3, "max_tokens": 4} | ({"prompt": "a"} if path == COMPLETIONS else {"messages": MESSAGES})
    values = {name: ["x" if one is str else True if one is bool else one for one in all] for name, all in table.items()}

    def said(fields):
        answer = http.post(path, json=body | fields)
        assert answer.status_code == 200, answer.text
        return {name: value for name, value in answer.json().items() if name not in ("id", "created")}

    plain = said({})
    del plain["usage"]["prompt_tokens_details"]
    for at in range(max(map(len, values.values()))):
        found = said({name: each[at % len(each)] for name, each in values.items()})
        del found["usage"]["prompt_tokens_details"]
        assert found == plain


def test_no_field_is_in_both_lists():
    for model in (protocol.CompletionRequest, protocol.ChatCompletionRequest, protocol.TokenizeRequest,
                  protocol.StructuredOutputs):  # fmt: skip
        assert not model.ELSEWHERE.keys() & {field.alias or name for name, field in model.model_fields.items()}
    assert elsewhere.INSTEAD.keys() <= elsewhere.OF_CHATS.keys() | elsewhere.OF_COMPLETIONS.keys()


# --- routes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", COMPLETIONS, 405), ("DELETE", "/health", 405), ("OPTIONS", CHATS, 405), ("PUT", "/v1/models", 405),
     ("GET", "/nothing", 404), ("POST", "/v1/completions/", 404), ("POST", "/v1/embeddings", 404),
     ("GET", "/v1/models/nothing", 404), ("GET", "/docs", 404), ("GET", "/v1/models/", 404)],
)  # fmt: skip
def test_other_routes(http, method, path, status):
    answer = http.request(method, path)
    error_of(answer, status)
    assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/version", "/metrics", "/openapi.json"])
def test_head_is_get_without_a_body(http, path):
    head, get = http.head(path), http.get(path)
    assert head.status_code == get.status_code == 200 and head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]


def test_a_model_that_is_not_served(http):
    for path, body in {COMPLETIONS: {"prompt": "a"}, CHATS: {"messages": MESSAGES}, "/tokenize": {"prompt": "a"},
                       "/detokenize": {"tokens": [1]}}.items():  # fmt: skip
        error = error_of(http.post(path, json=body | {"model": "gpt"}), 404)
        assert error.param == "model" and "tiny, other" in error.message
        assert http.post(path, json=body | {"model": "other", **({"max_tokens": 1} if "v1" in path else {})}).is_success


def test_tokens(http):
    both = {"prompt": "Hi you", "return_token_strs": True}
    told = http.post("/tokenize", json=both).json()
    assert told == {"count": 6, "max_model_len": 512, "tokens": [39, 72, 94, 88, 78, 84],
                    "token_strs": ["H", "i", "Ġ", "y", "o", "u"]}  # fmt: skip
    assert http.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": "Hi you"}
    assert http.post("/detokenize", json={"tokens": [72, 95]}).json() == {"prompt": "i<end>"}
    chat = http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    answer = http.post(CHATS, json={"messages": MESSAGES, "max_tokens": 1, "return_token_ids": True}).json()
    assert chat == answer["prompt_token_ids"]
    assert error_of(http.post("/tokenize", json={})).param == "prompt"
    assert error_of(http.post("/tokenize", json={"messages": []})).param == "messages"
    assert error_of(http.post("/detokenize", json={"tokens": [96]})).param == "tokens"
    assert error_of(http.post("/detokenize", json={"tokens": [True]})).param == "tokens.0"
    assert http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []


def test_health_version_models(http):
    assert http.get("/health").content == b"" and http.get("/health").status_code == 200
    assert schema.Version.model_validate(http.get("/version").json())
    schema.Models.model_validate(http.get("/v1/models").json(), strict=True)
    assert http.get("/v1/models/other").json() == http.get("/v1/models").json()["data"][1]


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [
    {}, {"n": 2}, {"logprobs": 2}, {"return_token_ids": True}, {"use_beam_search": True, "n": 2},
    {"prompt_logprobs": 1}, {"stop": "e"}, DEAD_END | {"n": 8},
    {"return_token_ids": True, "logprobs": 0, "stream_options": {"include_usage": True}},
])  # fmt: skip
def test_answers_are_what_the_schema_says(http, more):
    """With nothing besides: schema.py forbids it."""
    for path, one, chunk in ((COMPLETIONS, schema.Completion, schema.CompletionChunk),
                             (CHATS, schema.ChatCompletion, schema.ChatCompletionChunk)):  # fmt: skip
        body = {"seed": 1, "max_tokens": 6} | more
        body |= {"prompt": "abc", "echo": True} if path == COMPLETIONS else {"messages": MESSAGES}
        if path == CHATS and "logprobs" in more:
            body |= {"logprobs": True, "top_logprobs": more["logprobs"]}
        if path == COMPLETIONS and "use_beam_search" in more:
            del body["seed"]
        if "stream_options" not in more:
            one.model_validate(http.post(path, json=body).json(), strict=True)
        if "prompt_logprobs" not in more:
            for event in events(http.post(path, json=body | {"stream": True})):
                chunk.model_validate(event, strict=True)


def test_openapi_is_what_is_answered(http):
    whole = http.get("/openapi.json").json()
    posts = [whole["paths"][path]["post"] for path in (COMPLETIONS, CHATS)]
    for post in posts:
        assert {"200", "400", "404", "408", "413", "429", "500", "503"} == {*post["responses"]}  # no keys, no 401
        assert {*post["responses"]["200"]["content"]} == {"application/json", "text/event-stream"}
        assert all("ErrorAnswer" in str(post["responses"][status]) for status in post["responses"] if status > "200")
        assert "Retry-After" in post["responses"]["429"]["headers"]
    assert "422" not in str(whole["paths"]) and "HTTPValidationError" not in str(whole)
    assert whole["components"]["schemas"]["CompletionRequest"]["additionalProperties"] is False


def test_openapi_tells_of_keys(llm):
    whole = create_app(llm, ServerConfig(api_keys=("key",), page=False)).openapi()
    assert whole["components"]["securitySchemes"] and whole["paths"][CHATS]["post"]["security"]
    assert "401" in whole["paths"]["/abort"]["post"]["responses"]
    assert "security" not in whole["paths"]["/health"]["get"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_sample_that_fails_does_so_alone(http, stream):
    body = {"prompt": "x", "seed": 1, "n": 8, "stream": stream} | DEAD_END
    answer = http.post(COMPLETIONS, json=body)
    texts, ends, said = [""] * 8, [None] * 8, set()
    for one in events(answer) if stream else [answer.json()]:
        for choice in one["choices"]:
            texts[choice["index"]] += choice["text"]
            ends[choice["index"]] = choice["finish_reason"]
            if choice["finish_reason"] == "error":
                said.add(choice["error"]["message"])
    assert {*zip(texts, ends, strict=True)} == {("a", "error"), ("bbbbb", "length")}
    assert len(said) == 1


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
def test_a_request_of_which_nothing_comes_has_a_status(http, path):
    body = NOTHING_TO_SAY | ({"prompt": "x"} if path == COMPLETIONS else {"messages": MESSAGES})
    for stream in (False, True):
        assert "every token" in error_of(http.post(path, json=body | {"stream": stream}), 500).message


def test_an_error_after_the_first_tokens_is_an_event(http, llm, monkeypatch):
    """The model gives NaN at the third token. Until then something was sent, so the status can't say it."""
    execute, sent = llm.engine.executor.execute, threading.Event()

    def breaks(plan):
        output = execute(plan)
        for part in plan.sequences:
            if part.draw and len(part.draw.output_token_ids) == 2:
                sent.wait(10)
                del output.tokens[part.seq_id]
                output.errors[part.seq_id] = "the model's logits are NaN"
        return output

    monkeypatch.setattr(llm.engine.executor, "execute", breaks)
    with http.stream("POST", CHATS, json={"messages": MESSAGES, "stream": True, "ignore_eos": True}) as answer:
        lines = []
        for line in answer.iter_lines():
            lines.append(line)
            if '"content":""' not in line:
                sent.set()
    assert answer.status_code == 200 and lines[-2:] == ["data: [DONE]", ""]
    error = json.loads(lines[-4].removeprefix("data: "))["error"]
    assert error["message"] == "the model's logits are NaN" and error["code"] == 500
    answer = http.post(COMPLETIONS, json={"prompt": "a", "ignore_eos": True})
    assert error_of(answer, 500).message == "the model's logits are NaN"


def test_cached_tokens(http):
    body = {"prompt": "cache" * 20, "max_tokens": 1, "cache_salt": "test", "temperature": 0}
    usages = [http.post(COMPLETIONS, json=body).json()["usage"] for _ in range(2)]
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages] == [0, 96]


def test_abort(http):
    """By the id that the answer has; of a list of prompts all requests."""
    for prompt in ("a", ["a", "b"]):
        body = {"prompt": prompt, "max_tokens": 400, "ignore_eos": True, "request_id": "mine", "stream": True}
        ends = {}
        with http.stream("POST", COMPLETIONS, json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    if not ends:
                        ends["asked"] = http.post("/abort", json={"request_id": ["unknown", "mine"]}).json()
                        again = http.post(COMPLETIONS, json=body)
                    for choice in json.loads(line[6:])["choices"]:
                        ends[choice["index"]] = choice["finish_reason"]
        assert ends.pop("asked") == {} and {*ends.values()} == {"abort"} and len(ends) == len(prompt)
        assert again.status_code == 200 or error_of(again).param == "request_id"


def test_an_id_that_is_in_use(http, app):
    app.state.house.under_way["taken"] = []
    assert error_of(http.post(COMPLETIONS, json={"prompt": "a", "request_id": "taken"})).param == "request_id"
    del app.state.house.under_way["taken"]
    answer = http.post(COMPLETIONS, json={"prompt": "a", "request_id": "taken", "max_tokens": 1})
    assert answer.json()["id"] == "taken"


# --- metrics ----------------------------------------------------------------------------------------------------------

GAUGES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}
COUNTERS = {"prompt_tokens", "generation_tokens", "num_preemptions", "prefix_cache_queries", "prefix_cache_hits",
            "request_success"}  # fmt: skip
HISTOGRAMS = {
    "time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
    "request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens",
    "request_generation_tokens", "request_params_n", "request_max_num_generation_tokens",
    "iteration_tokens_total",
}  # fmt: skip


def metrics(http):
    """{name: {labels besides model and engine: value}}, checked to be what Prometheus reads."""
    found, kinds = {}, {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        kinds.setdefault(family.type, set()).add(family.name)
        for sample in family.samples:
            labels = dict(sample.labels)
            assert (labels.pop("model_name"), labels.pop("engine")) == ("tiny", "0")
            found.setdefault(sample.name, {})[tuple(labels.values())] = sample.value
    return found, kinds


def test_metrics_have_vllms_names_and_count(http):
    before, kinds = metrics(http)
    for kind, names in {"gauge": GAUGES, "counter": COUNTERS, "histogram": HISTOGRAMS}.items():
        assert {f"vllm:{name}" for name in names} <= kinds[kind]
    body = {"prompt": "abcd" * 10, "n": 3, "max_tokens": 7, "ignore_eos": True, "cache_salt": "metrics"}
    for _ in range(2):
        http.post(COMPLETIONS, json=body)
    http.post(COMPLETIONS, json={"prompt": "a"} | NOTHING_TO_SAY)
    after, _ = metrics(http)

    def more(name, *labels):
        return after[f"vllm:{name}"][labels] - before[f"vllm:{name}"][labels]

    assert more("prompt_tokens_total") == 81 and more("generation_tokens_total") == 42
    assert more("request_success_total", "length") == 6 and more("request_success_total", "error") == 1
    assert more("prefix_cache_hits_total") == 32 and more("prefix_cache_queries_total") >= 80
    assert more("request_params_n_sum") == 7 and more("request_prompt_tokens_sum") == 81
    assert more("request_generation_tokens_sum") == 42 and more("request_max_num_generation_tokens_sum") == 14
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_decode_time_seconds"):
        assert more(f"{name}_count") == 2 and more(f"{name}_sum") > 0
    assert more("inter_token_latency_seconds_count") == 2 * 3 * 6
    assert more("iteration_tokens_total_sum") >= 81 - 32 + 36
    assert all(after[f"vllm:{name}"][()] == 0 for name in ("num_requests_running", "num_requests_waiting"))


def test_who_leaves_counts_as_aborted(http):
    def aborted():
        return metrics(http)[0]["vllm:request_success_total"]["abort",]

    before = aborted()
    body = {"prompt": "a", "n": 3, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with http.stream("POST", COMPLETIONS, json=body) as answer:
        next(answer.iter_lines())
    for _ in range(100):
        if aborted() != before:
            break
        time.sleep(0.05)
    assert aborted() == before + 3


def test_metrics_say_nothing_of_when_they_were_made(http):
    assert "_created" not in http.get("/metrics").text


def test_no_such_route_says_where_routes_are_told(http):
    for answer in (http.get("/chat/completions"), http.get("/v1/completions")):
        assert "/openapi.json" in answer.json()["error"]["message"]


def test_another_model_is_told_of_all_that_there_are(http):
    body = {"model": "gpt-4", "prompt": "a"}
    assert "is not served here, but " in http.post("/v1/completions", json=body).json()["error"]["message"]


@pytest.mark.parametrize("field, value, words", [
    ("prompt", ["a"] * 1025, "prompt: must have at most 1024 items"),
    ("prompt", [[1]] * 1025, "prompt: must have at most 1024 items"),
    ("stop", ["a"] * 65, "stop: must have at most 64 items"),
    ("bad_words", ["a"] * 1025, "bad_words: must have at most 1024 items"),
    ("logit_bias", {str(token): 1.0 for token in range(1025)}, "logit_bias: must have at most 1024 items"),
    ("request_id", "x output=9", "request_id: must be a text of 1 to 200 ASCII characters, without spaces"),
])  # fmt: skip
def test_lists_that_all_would_pay_for_are_refused(field, value, words):
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"prompt": "a", field: value})
    errors = [{**one, "loc": ("body", *one["loc"])} for one in caught.value.errors()]
    assert invalid(errors, {"prompt": "a", field: value}).message == words


@pytest.mark.parametrize("model, body", [
    (CompletionRequest, {"prompt": [None] * 10_000}),
    (CompletionRequest, {"prompt": [1] * 10_000 + [None]}),
    (CompletionRequest, {"prompt": [[None]] * 1000}),
    (ChatCompletionRequest, {"messages": [1] * 1000}),
])  # fmt: skip
def test_a_list_of_mistakes_is_read_up_to_the_first(model, body):
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() <= 4
