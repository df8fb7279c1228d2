"""Disaggregation, seen from the router: one server computes the prompt, and another one goes on.

A request is first sent to a server of prompts, for one token. Its answer says in `kv_transfer_params` where the keys
and values are kept; that goes into the body for the second server, which takes them and answers. The names and the way
are vLLM's (NIXL's). Without them the second server computes the prompt itself: so nothing depends on the first one.
"""

import contextlib
import json
from dataclasses import dataclass, replace
from typing import Any

from minipaged.routing.fleet import Fleet
from minipaged.routing.forwarded import Asked, load_of, read_object
from minipaged.routing.proxy import Lost, Talk
from minipaged.server.errors import ApiError

WANTED = {
    "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
    "remote_host": None, "remote_port": None,
}  # fmt: skip
OF_THE_ANSWER = {  # of more than one token, or of how they are told
    "stream", "stream_options", "max_completion_tokens", "min_tokens", "n", "best_of", "logprobs", "top_logprobs",
    "echo", "return_token_ids", "use_beam_search", "beam_width", "length_penalty", "early_stopping", "response_format",
    "structured_outputs", "stop", "include_stop_str_in_output",
}  # fmt: skip


def prompt_only(body: dict[str, Any]) -> dict[str, Any] | None:
    """The body that has its prompt computed, and kept. None if that makes no sense.

    Blocks are of one prompt, and whoever tells log-probabilities of a prompt must compute all of it.

    >>> prompt_only({"prompt": "a", "stream": True, "max_tokens": 9, "prompt_logprobs": 1}) is None
    True
    """
    several = load_of({"prompt": body.get("prompt")}) > 1
    if not body or several or body.get("prompt_logprobs") is not None or body.get("echo"):
        return None
    kept = {name: value for name, value in body.items() if name not in OF_THE_ANSWER}
    return kept | {"max_tokens": 1, "kv_transfer_params": WANTED}


@dataclass(frozen=True)
class Kept:
    """A prompt that a server has computed and keeps: under the id of its answer, and where, as it says itself."""

    url: str
    id: str
    params: dict[str, Any]


async def compute(fleet: Fleet, asked: Asked) -> Kept | None:
    """Has one of the fleet compute the prompt. None if that makes no sense, or none has: the second one can do it.

    ApiError for a client that says by itself where keys and values are: others would find in memory what comes from
    there.
    """
    body = read_object(asked.body)
    if body.get("kv_transfer_params"):
        raise ApiError(400, "kv_transfer_params: the router says where keys and values are", "kv_transfer_params")
    first = prompt_only(body)
    if first is None:
        return None
    asked, tried = replace(asked, body=json.dumps(first).encode()), set[str]()
    while (url := fleet.policy.choose(asked.pieces, asked.load, tried)) is not None:
        tried.add(url)
        talk = Talk(fleet, url, asked)
        try:
            said = read_object(b"".join([piece async for piece in talk.pieces()]))
        except Lost as error:
            if error.sent:
                return None
            continue
        params = said.get("kv_transfer_params") if talk.status == 200 else None
        return Kept(url, str(said.get("id")), params) if isinstance(params, dict) else None
    return None


def go_on(asked: Asked, kept: Kept) -> Asked:
    """What the second server is asked."""
    body = read_object(asked.body) | {"kv_transfer_params": kept.params}
    return replace(asked, body=json.dumps(body).encode(), alone=asked.body)


async def release(fleet: Fleet, asked: Asked, kept: Kept) -> None:
    """Nobody comes for it: it need not be kept until its time is over."""
    abort = replace(asked, target="/abort", body=json.dumps({"request_id": kept.id}).encode(), pieces=(), load=0)
    with contextlib.suppress(Lost):
        async for _ in Talk(fleet, kept.url, abort).pieces():
            pass
