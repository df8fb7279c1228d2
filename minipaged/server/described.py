"""/openapi.json: what FastAPI makes of the routes, put right where it guesses wrong."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema

from minipaged.server.schema import CHUNKS

REF = "#/components/schemas/{model}"
ABOUT = (
    "OpenAI's API, with vLLM's extensions, for one model in a paged memory. A field that isn't known is refused; "
    "some that are known elsewhere may be given with the value that asks for nothing."
)


# What SamplingParams allows, whose errors clients get: protocol.py has the types only.
RANGES: dict[str, dict[str, Any]] = {
    "n": {"minimum": 1}, "max_tokens": {"minimum": 0}, "max_completion_tokens": {"minimum": 1},
    "temperature": {"minimum": 0}, "top_p": {"exclusiveMinimum": 0, "maximum": 1}, "top_k": {"minimum": -1},
    "min_p": {"minimum": 0, "maximum": 1}, "presence_penalty": {"minimum": -2, "maximum": 2},
    "frequency_penalty": {"minimum": -2, "maximum": 2}, "repetition_penalty": {"exclusiveMinimum": 0},
    "min_tokens": {"minimum": 0}, "logprobs": {"minimum": -1}, "top_logprobs": {"minimum": -1},
    "prompt_logprobs": {"minimum": -1}, "truncate_prompt_tokens": {"minimum": -1}, "beam_width": {"minimum": 1},
    "length_penalty": {"minimum": -10, "maximum": 10}, "cache_salt": {"minLength": 1},
    "stop": {"minLength": 1}, "bad_words": {"items": {"type": "string", "minLength": 1}},
    "messages": {"items": {"type": "object", "required": ["role", "content"], "properties": {
        "role": {"type": "string"}, "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": {
            "type": "object", "required": ["type", "text"],
            "properties": {"type": {"const": "text"}, "text": {"type": "string"}}}}]}}}, "minItems": 1},
}  # fmt: skip
NUMBERS = ("integer", "number")
TOKENS = ("prompt", "tokens", "stop_token_ids", "allowed_token_ids")


def describe(app: FastAPI, needs_key: bool, model_names: Sequence[str], vocab_size: int) -> None:
    """To be called when all routes are there. HEAD is answered wherever GET is, and not described twice."""
    described: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not described:
            described.update(_described(app, needs_key, model_names, vocab_size))
        return described

    openapi()
    app.openapi = openapi  # type: ignore[method-assign]
    for route in app.routes:
        methods = getattr(route, "methods", None) or set()
        if "GET" in methods:
            methods.add("HEAD")


def _described(app: FastAPI, needs_key: bool, model_names: Sequence[str], vocab_size: int) -> dict[str, Any]:
    for route in app.routes:
        if isinstance(route, APIRoute):
            route.operation_id = route.name
    whole = get_openapi(title=app.title, version=app.version, description=ABOUT, routes=app.routes)
    for methods in whole["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)  # what is wrong in a body is 400 here
            if not needs_key:
                operation["responses"].pop("401", None)
            elif "401" in operation["responses"]:
                operation["security"] = [{"key": []}]
    schemas = whole["components"]["schemas"]
    _, more = models_json_schema([(model, "validation") for model in CHUNKS], ref_template=REF)
    schemas.update(more["$defs"])
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for name, model in schemas.items():
        for field, about in model.get("properties", {}).items() if name.endswith("Request") else ():
            _narrow(about, RANGES.get(field, {}) if field != "model" else {"enum": list(model_names)})
            if field in TOKENS:
                _narrow_tokens(about, vocab_size, field == "prompt" and name == "CompletionRequest")
    if needs_key:
        whole["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return whole


def _narrow(about: dict[str, Any], limits: dict[str, Any]) -> None:
    """Limits of a field that may be null, or of several kinds: they are said of those kinds that they are for."""
    kinds = {"enum": ("string",), "minLength": ("string",), "items": ("array",), "minItems": ("array",)}
    for kind in about.get("anyOf", [about]):
        kind.update({name: limit for name, limit in limits.items() if kind.get("type") in kinds.get(name, NUMBERS)})


def _narrow_tokens(about: dict[str, Any], vocab_size: int, not_empty: bool) -> None:
    """Token ids, at whatever depth; and texts beside them, which must not be empty if lists must not."""
    least = {"integer": {"minimum": 0, "maximum": vocab_size - 1}}
    if not_empty:
        least |= {"array": {"minItems": 1}, "string": {"minLength": 1}}
    about.update(least.get(about.get("type", ""), {}))
    for inner in [*about.get("anyOf", ()), *([about["items"]] if "items" in about else ())]:
        _narrow_tokens(inner, vocab_size, not_empty)
