"""What is said no to: OpenAI's error object, that names the field, and the status that its clients act upon."""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

KINDS = {
    400: "BadRequestError", 401: "AuthenticationError", 403: "PermissionDeniedError", 404: "NotFoundError",
    405: "MethodNotAllowedError", 408: "RequestTimeoutError", 413: "RequestTooLargeError",
    429: "RateLimitError", 500: "InternalServerError", 502: "BadGatewayError", 503: "ServiceUnavailableError",
}  # fmt: skip


class ApiError(Exception):
    """Ends an HTTP request. param: the field that is wrong. retry_after: seconds, for those who may come again."""

    def __init__(self, status: int, message: str, param: str | None = None, retry_after: float | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)

    def body(self) -> dict[str, Any]:
        """
        >>> ApiError(400, "n=0: must be an integer >= 1", "n").body()["error"]["type"]
        'BadRequestError'
        """
        return {"error": error_object(self.status, self.message, self.param)}


def error_object(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """What stands in "error". Half a surrogate pair, which a client may have sent, is written out: it is no JSON."""
    def clean(text: str) -> str:
        return text.encode("utf-8", "backslashreplace").decode()

    name = None if param is None else clean(param)
    return {"message": clean(message), "type": KINDS.get(status, "APIError"), "param": name, "code": status}


NAMED = re.compile(r"((?:prompt \d+: )?)([a-z_]+(?:\.[a-z_]+)*)(?==|: )")  # top_p=2: must be ...
OTHERS = re.compile(r"token id [^:]* in ([a-z_]+):|\b(request_id) |the request wants \d+ (sequences)")


def bad_request(error: ValueError, names: Mapping[str, str], otherwise: str | None = None) -> ApiError:
    """What the engine says no to. Its messages begin with the name of what is wrong, mostly.

    names: what clients call it, if not the same. otherwise: what is wrong if there is no name: a prompt.

    >>> bad_request(ValueError("max_tokens=0: must be ..."), {"max_tokens": "max_completion_tokens"}).message
    'max_completion_tokens=0: must be ...'
    >>> bad_request(ValueError("the prompt is empty"), {}, "messages").param
    'messages'
    """
    message = str(error)
    if found := NAMED.match(message):
        name = names.get(found[2], found[2])
        return ApiError(400, found[1] + name + message[found.end() :], name)
    if found := OTHERS.search(message):
        name = next(filter(None, found.groups()))
        return ApiError(400, message, names.get(name, name))
    return ApiError(400, message, otherwise)


@contextlib.contextmanager
def refusing(otherwise: str | None = None) -> Iterator[None]:
    """What the engine says no to in here is the client's mistake."""
    try:
        yield
    except ValueError as error:
        raise bad_request(error, {}, otherwise) from None


ONE_OF = {  # what may be of several kinds
    "prompt": "a text, a list of token ids, or a list of one of these",
    "stop": "a text or a list of texts",
    "early_stopping": "true, false or \"never\"",
    "request_id": "a text of 1 to 200 ASCII characters, without spaces",
    "structured_outputs.json": "a JSON schema, or its text",
}


def invalid(found: Sequence[Any], body: Any) -> ApiError:
    """The first of the mistakes that pydantic found in a body, in a sentence that begins with the field."""
    first = found[0]
    place = _place(first["loc"][1:], body, first["type"])
    if first["type"] == "value_error":  # a sentence of protocol.py's, with the field's name
        message = str(first["ctx"]["error"])
        return ApiError(400, ".".join([*place, message]), ".".join([*place, message.split(":")[0]]))
    param = ".".join(place)
    if first["type"] == "missing":
        return ApiError(400, f"{param}: it is missing", param)
    if many := next((one for one in found if one["type"] == "too_long"), None):
        name = ".".join(_place(many["loc"][1:], body, "too_long"))
        return ApiError(400, f"{name}: must have at most {many['ctx']['max_length']} items", name)
    for name, right in ONE_OF.items():
        if param == name or param.startswith(name + "."):
            return ApiError(400, f"{name}: must be {right}", name)
    right = first["msg"].removeprefix("Input should be ")
    if right.startswith("a valid dictionary"):
        right = "a JSON object"
    return ApiError(400, f"{param or 'the body'}: must be {right}", param or None)


def _place(loc: Sequence[int | str], body: Any, kind: str) -> list[str]:
    """Where in a body, without pydantic's own names of alternatives that it tried."""
    place = []
    for part in loc:
        try:
            body = body[part]
        except (LookupError, TypeError):
            if kind != "missing" or part != loc[-1]:
                continue
        place.append(str(part))
    return place
