"""/openapi.json: what FastAPI makes of the routes, put right where it guesses wrong."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

ABOUT = (
    "OpenAI's API, with vLLM's extensions, for one model in a paged memory. A field that isn't known is refused; "
    "some that are known elsewhere may be given with the value that asks for nothing."
)


def describe(app: FastAPI, needs_key: bool) -> None:
    """To be called when all routes are there. HEAD is answered wherever GET is, and not described twice."""
    described: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not described:
            described.update(_described(app, needs_key))
        return described

    openapi()
    app.openapi = openapi  # type: ignore[method-assign]
    for route in app.routes:
        methods = getattr(route, "methods", None) or set()
        if "GET" in methods:
            methods.add("HEAD")


def _described(app: FastAPI, needs_key: bool) -> dict[str, Any]:
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
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    if needs_key:
        whole["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return whole
