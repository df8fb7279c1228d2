"""schemathesis, which we did not write, asks whatever /openapi.json allows, and what it does not.

    python -m pytest tests/test_server_schema.py --server-examples 2000

Every answer has a status, a media type and a body that /openapi.json has for it, and none is a mistake of ours.
"""

import pytest
import schemathesis
from hypothesis import given, settings
from hypothesis.strategies import booleans
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from served import serving
from tiny_model import make_folder

from minipaged import AsyncLLM
from minipaged.server.app import create_app
from minipaged.server.config import ServerConfig
from minipaged.server.manners import GENERATING

CHECKS = [not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
          checks.response_schema_conformance]  # fmt: skip
OPERATIONS = ["POST /v1/completions", "POST /v1/chat/completions", "POST /abort", "POST /tokenize", "POST /detokenize",
              "GET /v1/models", "GET /v1/models/{name}", "GET /health", "GET /version", "GET /metrics"]  # fmt: skip


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("model"), max_model_len=64)
    llm = AsyncLLM(str(folder), max_num_seqs=8, num_blocks=64)
    yield create_app(llm, ServerConfig(("tiny",), page=False))
    llm.engine.memory.check()
    assert not llm.engine.has_unfinished_requests
    llm.shutdown()


@pytest.fixture(scope="module")
def url(app):
    with serving(app) as address:
        yield address


def test_operations(app):
    paths = app.openapi()["paths"]
    assert [f"{method.upper()} {path}" for path, found in paths.items() for method in found] == OPERATIONS


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_answer_is_one_that_the_schema_has(app, url, request, operation, mode):
    method, path = operation.split()
    if mode is GenerationMode.NEGATIVE and method == "GET":
        pytest.skip("nothing to get wrong")
    one = schemathesis.openapi.from_dict(app.openapi())[path][method]
    examples = request.config.getoption("--server-examples") if method == "POST" else 3

    @settings(max_examples=examples)
    @given(case=one.as_strategy(generation_mode=mode), stream=booleans())
    def ask(case, stream):
        if path in GENERATING and mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body |= {"stream": stream} | ({} if stream else {"stream_options": None})
        case.validate_response(case.call(base_url=url), CHECKS)

    ask()
