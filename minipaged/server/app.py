"""The routes. Each is a few lines: what is behind them is in the other files of this room."""

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from minipaged.async_llm import AsyncLLM, EngineDeadError
from minipaged.requests.checks import check_token_ids
from minipaged.server import schema
from minipaged.server.asked import conversation_of
from minipaged.server.bodies import JsonRoute
from minipaged.server.config import ServerConfig
from minipaged.server.described import describe
from minipaged.server.errors import ApiError, error_object, invalid, refusing
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
from minipaged.server.schema import told
from minipaged.server.transport import ClientGone
from minipaged.text.inputs import tokenize
from minipaged.viewer.page import assemble

PAGE = Path(__file__).with_name("page.html")
PARTS = Path(__file__).with_name("page")
READING = 400, 401, 408, 413  # what may be wrong with any body
PAGE_MAY = (  # what it consists of, and nothing from elsewhere
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(llm: AsyncLLM, config: ServerConfig) -> FastAPI:
    """The application around an engine. app.state.house: what its requests have in common."""
    app = FastAPI(title="minipaged", version=version("minipaged"), docs_url=None, redoc_url=None)
    app.router.redirect_slashes = False
    app.router.route_class = JsonRoute
    house, metrics = House(llm, config), Metrics(llm, config.model_names[0])
    app.state.house = house
    _add_generation(app, house, metrics)
    _add_tokens(app, house)
    _add_state(app, house, metrics)
    _add_errors(app)
    describe(app, bool(config.api_keys), config.model_names, llm.engine.config.vocab_size)
    app.add_middleware(Manners, house=house)
    if config.allowed_origins:  # around everything: a page has to see why it is refused, too
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.allowed_origins), allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )  # fmt: skip
    return app


def _add_generation(app: FastAPI, house: House, metrics: Metrics) -> None:
    errors = 400, 401, 404, 408, 413, 429, 500, 503

    @app.post("/v1/completions", responses=told(schema.Completion, *errors, chunk=schema.CompletionChunk))
    async def completions(body: CompletionRequest, http: Request) -> Response:
        check_model(body.model, house.config)
        return await generate(http, body, house, metrics)

    @app.post("/v1/chat/completions", responses=told(schema.ChatCompletion, *errors, chunk=schema.ChatCompletionChunk))
    async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
        check_model(body.model, house.config)
        return await generate(http, body, house, metrics)

    @app.post("/abort", responses=told(schema.Nothing, *READING, 503))
    async def abort(body: AbortRequest) -> Response:
        """End requests, by the id that their answers have, or the body's request_id. Unknown ones are passed over."""
        names = [body.request_id] if isinstance(body.request_id, str) else body.request_id
        # One that has ended may have left blocks for another engine: nobody comes for them now.
        await house.llm.abort([each for name in names for each in house.under_way.get(name, [name])])
        return JSONResponse({})


def _add_tokens(app: FastAPI, house: House) -> None:
    engine = house.llm.engine

    @app.post("/tokenize", responses=told(schema.Tokenized, *READING, 404))
    def tokenize_text(body: TokenizeRequest) -> Response:
        check_model(body.model, house.config)
        with refusing("messages" if body.prompt is None else "prompt"):
            if body.prompt is None:
                ids: list[int] = conversation_of(body, engine.tokenizer)["prompt_token_ids"]  # type: ignore
            else:
                ids = tokenize(body.prompt, engine.tokenizer, body.add_special_tokens is not False)
        said: dict[str, Any] = {"count": len(ids), "max_model_len": engine.max_model_len, "tokens": ids}
        names = engine.tokenizer.backend.id_to_token
        return JSONResponse(said | ({"token_strs": [names(token) for token in ids]} if body.return_token_strs else {}))

    @app.post("/detokenize", responses=told(schema.Detokenized, *READING, 404))
    def detokenize(body: DetokenizeRequest) -> Response:
        check_model(body.model, house.config)
        with refusing("tokens"):
            check_token_ids("tokens", body.tokens, engine.config.vocab_size)
        return JSONResponse({"prompt": engine.tokenizer.decode(body.tokens, skip_special_tokens=False)})


def _add_state(app: FastAPI, house: House, metrics: Metrics) -> None:
    config, engine, began = house.config, house.llm.engine, int(time.time())

    @app.get("/v1/models", responses=told(schema.Models, 401))
    async def models() -> Response:
        found = [_model(name, config, began, engine.max_model_len) for name in config.model_names]
        return JSONResponse({"object": "list", "data": found})

    @app.get("/v1/models/{name:path}", responses=told(schema.Model, 401, 404))
    async def model(name: str) -> Response:
        check_model(name, config)
        return JSONResponse(_model(name, config, began, engine.max_model_len))

    @app.get("/health", response_class=PlainTextResponse, responses=told(None, 503))
    async def health() -> Response:
        try:
            await house.llm.check_health()
        except EngineDeadError as error:
            raise ApiError(503, str(error)) from None
        if house.closing:
            raise ApiError(503, "the server is about to end")
        return PlainTextResponse("")

    @app.get("/version", responses=told(schema.Version))
    async def told_version() -> Response:
        return JSONResponse({"version": version("minipaged")})

    @app.get("/metrics", response_class=PlainTextResponse)
    def told_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    if config.page:
        add_live(app, house)
        text = assemble(PAGE.read_text(encoding="utf-8"), PARTS)

        @app.get("/", include_in_schema=False)
        def page() -> HTMLResponse:
            return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_MAY})


def _model(name: str, config: ServerConfig, began: int, max_model_len: int) -> dict[str, Any]:
    return {
        "id": name, "object": "model", "created": began, "owned_by": "minipaged", "root": config.model_names[0],
        "parent": None, "max_model_len": max_model_len,
    }  # fmt: skip


def check_model(name: str | None, config: ServerConfig) -> None:
    """ApiError 404 for a model that isn't served. None: whichever there is."""
    if name is not None and name not in config.model_names:
        raise ApiError(404, f"model {name!r} is not served here, but {', '.join(config.model_names)}", "model")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(http: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def wrong_body(http: Request, error: RequestValidationError) -> Response:
        return invalid(error.errors(), error.body).response()

    @app.exception_handler(HTTPException)
    async def no_route(http: Request, error: HTTPException) -> Response:
        said = f"{http.method} {http.url.path}: {error.detail}; /openapi.json tells of all routes"
        return JSONResponse({"error": error_object(error.status_code, said)}, error.status_code, error.headers)

    @app.exception_handler(EngineDeadError)
    async def dead(http: Request, error: EngineDeadError) -> Response:
        return ApiError(503 if "shut down" in str(error) else 500, str(error)).response()

    @app.exception_handler(ClientGone)
    @app.exception_handler(ClientDisconnect)
    async def gone(http: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it
