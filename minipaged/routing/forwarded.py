"""A request on its way: what goes on to a replica, and what the router reads in it to choose one.

Bodies are read with no claim to understand them: what is wrong with one a replica says.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request

from minipaged.routing.policies import PIECE, Pieces, cut

OF_A_CONNECTION = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade",
}  # fmt: skip
NOT_SENT = OF_A_CONNECTION | {"host", "content-length", "expect"}
MOST = 4096  # sequences of a request


@dataclass(frozen=True)
class Asked:
    """A request. target: path and query. pieces, load: for the policy.

    alone: the body for another try once a replica may have begun, if that is a different one: see handover.py.
    """

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    pieces: Pieces = ()
    load: float = 1
    alone: bytes | None = None

    def headers_on(self) -> dict[str, str]:
        """Those that go on: not the connection's own."""
        named = {name.strip().lower() for name in self.headers.get("connection", "").split(",")}
        return {name: value for name, value in self.headers.items() if name.lower() not in NOT_SENT | named}

    def again(self) -> "Asked":
        """For another try."""
        return self if self.alone is None else replace(self, body=self.alone, alone=None)


def asked_by(http: Request, body: bytes) -> Asked:
    query = http.scope["query_string"].decode("latin-1")
    target = http.scope["raw_path"].decode("latin-1") + (f"?{query}" if query else "")
    headers = dict(http.headers) | {"x-request-id": http.state.visit.id}
    read = read_object(body)
    return Asked(http.method, target, headers, body, pieces_of(read), load_of(read))


def read_object(body: bytes) -> dict[str, Any]:
    """What it says, if it is a JSON object. What is wrong with it a replica says."""
    try:
        read = json.loads(body) if body else {}
    except (ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def pieces_of(body: dict[str, Any]) -> Pieces:
    """Of a prompt's beginning: texts, or tuples of token ids. Of several prompts the first one counts.

    >>> pieces_of({"prompt": [1, 2, 3] * 6})
    [(None, None, (1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1))]
    """
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        pieces: list[Any] = list(cut(prompt))
    elif isinstance(prompt, list):
        pieces = [tuple(piece) for piece in _blocks(prompt)]
    else:
        pieces = list(cut(_conversation(body)))
    if pieces:
        salt, model = body.get("cache_salt"), body.get("model")
        pieces[0] = (str(model) if model else None, str(salt) if salt else None, pieces[0])
    return pieces


def _blocks(tokens: list[Any], size: int = PIECE // 4) -> Iterator[list[Any]]:
    if all(isinstance(token, int) for token in tokens):
        for i in range(0, len(tokens) - size + 1, size):
            yield tokens[i : i + size]


def _conversation(body: dict[str, Any]) -> str:
    """The messages as a text: no template's, but the same for the same beginning."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        return ""
    tools = json.dumps(body["tools"]) if body.get("tools") else ""
    return tools + "".join(json.dumps(message, ensure_ascii=False) for message in messages)


def load_of(body: dict[str, Any]) -> int:
    """Sequences that are wanted; more than MOST will be refused, and must not fill a replica until then."""
    prompt, count = body.get("prompt"), body.get("n")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else 1
    return min(MOST, prompts * (count if type(count) is int and count > 0 else 1))
