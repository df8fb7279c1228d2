"""What `LLM(kv_transfer_config={...})` may say: how blocks go from one engine to another. The names are vLLM's."""

import difflib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from minipaged.requests.checks import is_number
from minipaged.scheduling.transfer import LEASE_SECONDS

CONNECTORS = ("SharedMemoryConnector", "TorchDistributedConnector")
ROLES = ("kv_producer", "kv_consumer", "kv_both")
POLICIES = ("recompute", "fail")
MIB = 1 << 20
EXTRA = {"lease_seconds": LEASE_SECONDS, "timeout_seconds": 10.0, "bytes_per_step": 32.0 * MIB}


@dataclass(frozen=True)
class KVTransferConfig:
    """ValueError, or TypeError for a key that there is not, says what is right.

    kv_connector: "SharedMemoryConnector", between engines of one machine; "TorchDistributedConnector", between
        machines, by torch.distributed (gloo).
    kv_role: "kv_producer" computes prompts for others, "kv_consumer" goes on with them, "kv_both" does both.
    engine_id: its name among engines; by default one that nobody else has.
    kv_ip, kv_port: where a producer of TorchDistributedConnector is reached, which whoever sends requests there must
        be trusted with; port 0: a free one. With SharedMemoryConnector they mean nothing.
    kv_load_failure_policy: what becomes of a prompt whose blocks can't be had: "recompute", it is computed here;
        "fail", its request ends with an error.
    kv_connector_extra_config: lease_seconds: how long blocks are kept for somebody to come; timeout_seconds: how long
        an answer of the other engine may take; bytes_per_step: how much is copied in one step, which all who are in
        that step wait for.

    Who may send requests to a consumer says where it connects to, and what it takes from there others find in its
    prefix cache: let a router of yours alone reach it, not everybody.
    """

    kv_connector: str = ""
    kv_role: str = ""
    engine_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    kv_ip: str = "127.0.0.1"
    kv_port: int = 0
    kv_load_failure_policy: str = "recompute"
    kv_connector_extra_config: Mapping[str, float] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, given: Any) -> "KVTransferConfig | None":
        """From what a caller wrote: None, such a dict, or this."""
        if given is None or isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise ValueError(f"kv_transfer_config={given!r:.80}: must be None or a dict with kv_connector and kv_role")
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f": there are {', '.join(known)}"
                raise TypeError(f"kv_transfer_config has no key {name!r}{hint}")
        return cls(**{name: value for name, value in given.items() if value is not None})

    def __post_init__(self) -> None:
        for name, choices in (("kv_connector", CONNECTORS), ("kv_role", ROLES), ("kv_load_failure_policy", POLICIES)):
            if getattr(self, name) not in choices:
                raise _wrong(name, getattr(self, name), f"one of {', '.join(choices)}")
        for name in ("engine_id", "kv_ip"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise _wrong(name, getattr(self, name), "a text")
        if self.kv_ip in ("0.0.0.0", "::"):
            raise _wrong("kv_ip", self.kv_ip, "the address by which other machines reach this one")
        if not is_number(int, self.kv_port) or not 0 <= self.kv_port < 65536:
            raise _wrong("kv_port", self.kv_port, "an integer from 0 to 65535")
        extra = self.kv_connector_extra_config
        if not isinstance(extra, Mapping):
            raise _wrong("kv_connector_extra_config", extra, "a dict")
        for name, value in extra.items():
            if name not in EXTRA:
                raise TypeError(f"kv_connector_extra_config has no key {name!r}: there are {', '.join(EXTRA)}")
            if not is_number(float, value) or not 0 < value < 1e12:
                raise _wrong(name, value, "a number above 0")
        object.__setattr__(self, "kv_connector_extra_config", {**EXTRA, **extra})

    @property
    def produces(self) -> bool:
        return self.kv_role != "kv_consumer"

    @property
    def consumes(self) -> bool:
        return self.kv_role != "kv_producer"

    @property
    def lease_seconds(self) -> float:
        return self.kv_connector_extra_config["lease_seconds"]

    @property
    def timeout_seconds(self) -> float:
        return self.kv_connector_extra_config["timeout_seconds"]

    @property
    def bytes_per_step(self) -> int:
        return int(self.kv_connector_extra_config["bytes_per_step"])


def _wrong(name: str, value: Any, right: str) -> ValueError:
    return ValueError(f"kv_transfer_config: {name}={value!r:.80}: must be {right}")
