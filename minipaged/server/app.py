"""The routes. Each is a few lines: what is behind them is in the other files of this room."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from minipaged.async_llm import AsyncLLM, EngineDeadError
from minipaged.requests.checks import check_token_ids
from minipaged.server.asked import conversation_of
from minipaged.server.config import ServerConfig
from minipaged.server.errors import ApiError, error_object, refusing
from minipaged.server.generation import generate
from minipaged.server.live import add_live
from minipaged.server.manners import House, Manners
from minipaged.server.metrics import Metrics
from minipaged.server.protocol import (
    AbortRequest,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from minipaged.server.transport import ClientGone
from minipaged.text.inputs import tokenize

PAGE = Path(__file__).with_name("page.html")
PAGE_MAY = (  # what it consists of, and nothing from elsewhere
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(llm: AsyncLLM, config: ServerConfig) -> FastAPI:
    """The application around an engine. app.state.house: what its requests have in common."""
    app = FastAPI(title="minipaged", version=version("minipaged"), docs_url=None, redoc_url=None)
    house, metrics = House(llm, config), Metrics(llm, config.model_names[0])
    app.state.house = house
    _add_generation(app, house, metrics)
    _add_tokens(app, house)
    _add_state(app, house, metrics)
    _add_errors(app)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.allowed_origins), allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
        )  # fmt: skip
    app.add_middleware(Manners, house=house)
    return app


def _add_generation(app: FastAPI, house: House, metrics: Metrics) -> None:
    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: Request) -> Response:
        check_model(body.model, house.config)
        return await generate(http, body, house, metrics)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
        check_model(body.model, house.config)
        return await generate(http, body, house, metrics)

    @app.post("/abort")
    async def abort(body: AbortRequest) -> dict[str, Any]:
        await house.llm.abort(body.request_id)
        return {}


def _add_tokens(app: FastAPI, house: House) -> None:
    engine = house.llm.engine

    @app.post("/tokenize")
    def tokenize_text(body: TokenizeRequest) -> dict[str, Any]:
        check_model(body.model, house.config)
        with refusing():
            if body.prompt is None:
                ids: list[int] = conversation_of(body, engine.tokenizer)["prompt_token_ids"]  # type: ignore
            else:
                ids = tokenize(body.prompt, engine.tokenizer, body.add_special_tokens is not False)
        told: dict[str, Any] = {"count": len(ids), "max_model_len": engine.max_model_len, "tokens": ids}
        names = engine.tokenizer.backend.id_to_token
        return told | ({"token_strs": [names(token) for token in ids]} if body.return_token_strs else {})

    @app.post("/detokenize")
    def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        check_model(body.model, house.config)
        with refusing():
            check_token_ids("tokens", body.tokens, engine.config.vocab_size)
        return {"prompt": engine.tokenizer.decode(body.tokens, skip_special_tokens=False)}


def _add_state(app: FastAPI, house: House, metrics: Metrics) -> None:
    config, engine = house.config, house.llm.engine

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name, engine.max_model_len) for name in config.model_names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        check_model(name, config)
        return _model(name, engine.max_model_len)

    @app.get("/health")
    async def health() -> Response:
        try:
            await house.llm.check_health()
        except EngineDeadError as error:
            raise ApiError(503, str(error)) from None
        if house.closing:
            raise ApiError(503, "the server is about to end")
        return Response()

    @app.get("/version")
    async def told_version() -> dict[str, str]:
        return {"version": version("minipaged")}

    @app.get("/metrics")
    def told_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    if config.page:
        add_live(app, house)

        @app.get("/", include_in_schema=False)
        def page() -> HTMLResponse:
            return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": PAGE_MAY})


def _model(name: str, max_model_len: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "minipaged", "max_model_len": max_model_len}


def check_model(name: str | None, config: ServerConfig) -> None:
    """ApiError 404 for a model that isn't served. None: whichever there is."""
    if name is not None and name not in config.model_names:
        raise ApiError(404, f"model {name!r} is not served here: {', '.join(config.model_names)} is", "model")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(http: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        return _invalid(error).response()

    @app.exception_handler(HTTPException)
    async def no_route(http: Request, error: HTTPException) -> Response:
        said = f"{http.method} {http.url.path}: {error.detail}"
        return JSONResponse({"error": error_object(error.status_code, said)}, error.status_code, error.headers)

    @app.exception_handler(EngineDeadError)
    async def dead(http: Request, error: EngineDeadError) -> Response:
        return ApiError(503 if "shut down" in str(error) else 500, str(error)).response()

    @app.exception_handler(ClientGone)
    async def gone(http: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # nobody reads it


def _invalid(error: RequestValidationError) -> ApiError:
    """The first of the mistakes that were found in a body, in a sentence that begins with the field."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        return ApiError(400, message, message.split(":")[0])
    names = [str(part) for part in first["loc"][1:] if isinstance(part, int) or str(part).isidentifier()]
    param = ".".join(names) or None
    return ApiError(400, f"{param or 'the body'}: {first['msg']}", param)
