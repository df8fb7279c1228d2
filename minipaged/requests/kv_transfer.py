"""What a request may say of keys and values that one engine computes and another one goes on with.

The names are vLLM's, and so is the way: a prompt is sent to one engine with do_remote_decode and max_tokens=1. That
engine keeps its blocks, and says in its answer where they are. What it says is sent with the same prompt to another
engine, which takes the blocks instead of computing them.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from minipaged.requests.checks import is_number, plain

NAME = "kv_transfer_params"


@dataclass(frozen=True)
class KVTransferParams:
    """Plain data, as it goes through JSON. ValueError says which field is wrong, and what would be right.

    >>> KVTransferParams.of({"do_remote_decode": 1})
    Traceback (most recent call last):
    ValueError: kv_transfer_params: do_remote_decode=1: must be true or false
    """

    do_remote_decode: bool = False  # keep the blocks of the prompt for another engine
    do_remote_prefill: bool = False  # take them from another engine; then all that follow say where they are
    remote_engine_id: str | None = None
    remote_block_ids: tuple[int, ...] | None = None  # the full blocks of the prompt, in order
    remote_host: str | None = None
    remote_port: int | None = None
    remote_request_id: str | None = None  # by what the other engine knows them; a secret of all who may have them
    tp_size: int | None = None

    @classmethod
    def of(cls, given: Any) -> "KVTransferParams | None":
        """From a dict, or None; None too if it asks for nothing."""
        if given is None:
            return None
        if not isinstance(given, Mapping):
            raise ValueError(f"{NAME}={given!r:.80}: must be None or a dict such as {{'do_remote_decode': True}}")
        known = {field.name: field.default for field in fields(cls)}
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                meant = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"{NAME}: there is no field {name!r:.80}{meant}")
        told = {name: _read(name, plain(value)) for name, value in given.items() if value is not None}
        found = cls(**told)
        if found.do_remote_decode and found.do_remote_prefill:
            raise ValueError(f"{NAME}: do_remote_decode and do_remote_prefill: only one of them can be true")
        if found.do_remote_prefill:
            for name, default in known.items():
                if default is None and name != "tp_size" and getattr(found, name) is None:
                    raise ValueError(f"{NAME}: {name}: must be there with do_remote_prefill, as the answer told it")
        return found if found.do_remote_decode or found.do_remote_prefill else None

    def to_json(self) -> dict[str, Any]:
        blocks = self.remote_block_ids
        return {**asdict(self), "remote_block_ids": None if blocks is None else list(blocks)}


def _read(name: str, value: Any) -> Any:
    if name.startswith("do_"):
        right, fits = "true or false", isinstance(value, bool)
    elif name == "remote_block_ids":
        fits = isinstance(value, (list, tuple)) and all(is_number(int, one) and one >= 0 for one in value)
        right, value = "a list of integers >= 0", tuple(value) if fits else value
    elif name in ("remote_port", "tp_size"):
        right, fits = "an integer from 0 to 65535", is_number(int, value) and 0 <= value < 65536
    else:
        right, fits = "a text", isinstance(value, str) and 0 < len(value) < 1000
    if not fits:
        raise ValueError(f"{NAME}: {name}={value!r:.80}: must be {right}")
    return value


def read_extra_args(given: Any) -> dict[str, Any] | None:
    """`extra_args`, checked: a dict of its own. There is one thing that may stand in it."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ValueError(f"extra_args={given!r:.80}: must be None or a dict with {NAME}")
    for name in given:
        if name != NAME:
            raise ValueError(f"extra_args: there is no {name!r:.80}; it may have {NAME}")
    found = KVTransferParams.of(given.get(NAME))
    return {NAME: found.to_json()} if found else None
