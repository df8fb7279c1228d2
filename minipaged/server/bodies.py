"""What a body must be before anybody looks for fields in it: JSON, as its standard has it.

FastAPI reads bodies too, but takes NaN for a number and the last of two equal names, and turns errors that have a
status of their own into a 400 that says nothing.
"""

import email.message
import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from minipaged.server.errors import ApiError

HALF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")  # or a whole one


class JsonRoute(APIRoute):
    """A route whose body, if it takes one, is read by `read_json`."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler

        async def handle(request: Request) -> Response:
            checked = _Request(request.scope, request.receive)
            check_type(request.headers.get("content-type"))
            checked.read = read_json(await checked.body())
            return await handler(checked)

        return handle


class _Request(Request):
    read: Any = None

    async def json(self) -> Any:
        return self.read


def check_type(content_type: str | None) -> None:
    """ApiError for what doesn't call itself JSON: a page of somebody else's can send that without being asked."""
    header = email.message.Message()
    header["content-type"] = content_type or ""
    if not (header.get_content_maintype() == "application" and header.get_content_subtype().split("+")[-1] == "json"):
        raise ApiError(400, f"Content-Type: must be application/json, not {content_type!r:.80}")


def read_json(body: bytes) -> Any:
    """
    >>> read_json(b'{"n": 1, "n": 2}')
    Traceback (most recent call last):
    minipaged.server.errors.ApiError: n: it stands there twice
    """
    if not body:
        raise ApiError(400, "the body is empty: it must be a JSON object")
    try:
        found = json.loads(
            body.decode(), parse_float=_number, parse_constant=_no_number, object_pairs_hook=_once_each
        )
        if HALF_A_PAIR.search(body):
            _check_pairs(found)
        return found
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:  # no JSON; no UTF-8; a number of thousands of digits
        raise ApiError(400, f"the body is no JSON: {error}") from None


def _check_pairs(found: Any) -> None:
    """JSON can write half a surrogate pair, which no UTF-8 has."""
    for name, value in found.items() if isinstance(found, dict) else ((None, found),):
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ApiError(400, f"{name}: half a surrogate pair: not valid Unicode", name) from None


def _number(text: str) -> int | float:
    """JSON has one kind of numbers: 16.0 is an integer."""
    number = float(text)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))[:200]  # type: ignore[func-returns-value]
        raise ApiError(400, f"{twice}: it stands there twice", twice)
    return found
