"""What is said no to: OpenAI's error object, that names the field, and the status that its clients act upon."""

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

from fastapi.responses import JSONResponse

KINDS = {
    400: "BadRequestError", 401: "AuthenticationError", 403: "PermissionDeniedError", 404: "NotFoundError",
    405: "MethodNotAllowedError", 408: "RequestTimeoutError", 413: "RequestTooLargeError",
    429: "RateLimitError", 500: "InternalServerError", 503: "ServiceUnavailableError",
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
    message = message.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair is no JSON
    return {"message": message, "type": KINDS.get(status, "APIError"), "param": param, "code": status}


def bad_request(error: ValueError) -> ApiError:
    """What the engine says no to. Its messages begin with the name of what is wrong: "top_p=2: must be ..."."""
    message = str(error)
    named = re.match(r"(?:prompt \d+: )?([a-z_]+(?:\.[a-z_]+)*)(?:=|: )", message)
    return ApiError(400, message, named[1] if named else None)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """What the engine says no to in here is the client's mistake."""
    try:
        yield
    except ValueError as error:
        raise bad_request(error) from None
