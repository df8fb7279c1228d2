"""Blocks from one engine to another: who keeps them, and who waits for them (the scheduler's half of a KVConnector).

One engine computes prompts, another one goes on with them, so that nobody's next token waits for a long prompt
(DistServe, Splitwise). What a request says of it stands in requests/kv_transfer.py. Its way:

    there    the prompt is computed; when the request ends, its page table is kept (`Exports`), for `lease_seconds`
    here     the request is admitted with slots for the blocks that the prefix cache lacks. Until they are there
             it is loading (`Request.load`): it holds memory and computes nothing, and others go on
             they are there, whole: now they can be found by others too, and it computes its last tokens
             they can't be had: it gives its memory back, and waits to be computed here; or it ends with an error

Each plan names the loads that go on. So a load is broken off by not being named any more: whoever carries plans out
writes to the blocks of no other. Numbers only: the bytes are moved in execution/transfer/.
"""

import hashlib
import secrets
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol
from weakref import WeakSet

from minipaged.memory import KVCacheManager
from minipaged.requests.kv_transfer import NAME, KVTransferParams
from minipaged.requests.request import Request, RequestRefused
from minipaged.requests.sequence import Sequence as Tokens
from minipaged.scheduling.plan import Load, StepPlan

LEASE_SECONDS = 120.0


def digest_of(tokens: Sequence[int], salt: str | None) -> str:
    """By what both engines know that they mean the same tokens, of the same tenant."""
    return hashlib.sha256(array("q", tokens).tobytes() + repr(salt).encode()).hexdigest()


class _Watcher(Protocol):
    """Whoever wants to know of each sequence that ends: it may have come and gone between two looks at an engine."""

    def note_end(self, request: Request, seq: Tokens) -> None: ...


@dataclass(eq=False)
class Export:
    """The full blocks of a prompt, kept as a sequence of this memory. digest: of their tokens."""

    request_id: str
    seq_id: int
    blocks: list[int]
    digest: str
    until: float
    pins: int = 0  # connections that read them just now
    done: bool = False  # nobody wants them any more


class Exports:
    """What is kept for other engines. The engine's thread keeps and frees; the threads of a transport pin.

    Pinned blocks are not freed, whatever else happens; unless the memory as a whole is given up: then what was read
    of it is not good, and `unpin` says so.
    """

    def __init__(self, lease_seconds: float = LEASE_SECONDS, clock: Callable[[], float] = time.monotonic):
        self.news = threading.Condition()  # told whenever somebody who waits may have something to do
        self.lease_seconds, self._clock = lease_seconds, clock
        self._by_name: dict[str, Export] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def keep(self, request_id: str, seq_id: int, blocks: list[int], digest: str) -> str:
        """Returns its name, which nobody can guess."""
        name = f"{request_id}-{secrets.token_hex(8)}"
        with self.news:
            self._by_name[name] = Export(request_id, seq_id, blocks, digest, self._clock() + self.lease_seconds)
        return name

    def pin(self, name: str, digest: str, first: int, count: int) -> tuple[Export, list[int]] | str:
        """The blocks first .. first + count - 1 of an export, until `unpin`; or why they can't be had."""
        with self.news:
            export = self._by_name.get(name)
            if export is None or export.done:
                return "the blocks are not kept any more"
            if export.digest != digest:
                return "the blocks are of another prompt"
            if not 0 <= first <= first + count <= len(export.blocks):
                return f"there are {len(export.blocks)} blocks, not {first + count}"
            export.pins += 1
            return export, export.blocks[first : first + count]

    def unpin(self, export: Export, done: bool) -> bool:
        """They are not read any more. done: nor wanted. Returns whether they were there all the time."""
        with self.news:
            export.pins -= 1
            export.done |= done
            self.news.notify_all()
            return export in self._by_name.values()

    def end(self, name: str, request_id: str | None = None) -> None:
        """Nobody wants them any more: of this name, or of this request."""
        with self.news:
            for known, export in self._by_name.items():
                export.done |= known == name or export.request_id == request_id
            self.news.notify_all()

    def has_ended(self) -> bool:
        """Whether there is something to be freed, besides those whose time is over."""
        return any(export.done and not export.pins for export in self._by_name.values())

    def take_ended(self) -> list[int]:
        """The sequences that are to be freed: nobody reads them, and nobody wants them or their time is over."""
        if not self._by_name:
            return []
        with self.news:
            now = self._clock()
            ended = {n: e for n, e in self._by_name.items() if not e.pins and (e.done or e.until <= now)}
            for name in ended:
                del self._by_name[name]
            return [export.seq_id for export in ended.values()]

    def clear(self) -> None:
        """The memory is given up, whoever reads it."""
        with self.news:
            self._by_name.clear()


@dataclass
class TransferCounts:
    """Since the beginning."""

    num_exports: int = 0  # prompts whose blocks were kept for others
    num_loads: int = 0  # prompts whose blocks came from others
    num_loaded_tokens: int = 0
    num_failed_loads: int = 0


@dataclass
class Transfers:
    """The part of the scheduler that gives blocks to other engines, and takes theirs. By default it does neither.

    exports: what is kept for others; None: nothing is. place: what an answer says of where: remote_engine_id,
    remote_host, remote_port. takes: whether blocks are taken. recompute: whether a prompt whose blocks can't be had is
    computed here; else its request ends with an error. Method names that vLLM has mean the same there.
    watchers: they are told of each sequence that ends, and forgotten when nobody else holds them.
    """

    exports: Exports | None = None
    place: KVTransferParams = field(default_factory=KVTransferParams)
    takes: bool = False
    recompute: bool = True
    counts: TransferCounts = field(default_factory=TransferCounts)
    watchers: WeakSet[_Watcher] = field(default_factory=WeakSet)
    _unneeded: list[KVTransferParams] = field(default_factory=list)
    _num_loads: int = 0

    def check(self, request: Request) -> None:
        """RequestRefused for what this engine doesn't do."""
        asked = request.kv_transfer
        if asked is None:
            return
        role = "kv_producer" if asked.do_remote_decode else "kv_consumer"
        what = "do_remote_decode" if asked.do_remote_decode else "do_remote_prefill"
        if self.exports is None if asked.do_remote_decode else not self.takes:
            raise RequestRefused(f"{NAME}: {what}: this engine has no kv_transfer_config with the kv_role {role}")
        if asked.do_remote_decode and request.width > 1:
            raise RequestRefused(
                f"{NAME}: do_remote_decode: not for {request.width} sequences; samples and beams are for the engine "
                "that goes on with the prompt"
            )

    # --- there: keeping blocks for others ------------------------------------------------------------------------

    def request_finished(
        self, request: Request, seq: Tokens, reason: str, memory: KVCacheManager, new_id: Callable[[], int]
    ) -> None:
        """A sequence ends; if its blocks are wanted elsewhere, its page table is kept under a name of its own."""
        for watcher in self.watchers:
            watcher.note_end(request, seq)
        self.drop(request)
        asked, size = request.kv_transfer, memory.block_size
        if asked is None or not asked.do_remote_decode or reason not in ("stop", "length") or self.exports is None:
            return
        blocks = memory.block_table(seq.seq_id)[: len(request.prompt_token_ids) // size]
        if not blocks:
            return  # it is soon computed anywhere
        kept = new_id()
        memory.fork(seq.seq_id, kept)
        digest = digest_of(seq.tokens(0, len(blocks) * size), request.cache_salt)
        name = self.exports.keep(request.request_id, kept, blocks, digest)
        told = replace(self.place, do_remote_prefill=True, remote_block_ids=tuple(blocks), remote_request_id=name)
        request.kv_transfer_told = told.to_json()
        self.counts.num_exports += 1

    def abort(self, request_id: str) -> None:
        """What is kept of a request is for nobody."""
        if self.exports is not None:
            self.exports.end("", request_id)

    def free_ended(self, memory: KVCacheManager) -> None:
        """Of what was kept, what need not be any more."""
        for seq_id in self.exports.take_ended() if self.exports is not None else ():
            memory.free(seq_id)

    # --- here: waiting for them ----------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Request, num_found: int, block_size: int) -> int:
        """How many tokens' blocks can come from elsewhere, behind those that were found here.

        Only full ones; and the last token is computed here in any case: its logits are wanted. So are those of the
        whole prompt if prompt_logprobs are.
        """
        source = request.kv_transfer
        if source is None or not source.do_remote_prefill or request.needs_prompt_logits:
            return 0
        most = (request.target(request.live[0]) - 1) // block_size
        return max(0, min(most, len(source.remote_block_ids or ())) * block_size - num_found)

    def update_state_after_alloc(self, request: Request, num_found: int, memory: KVCacheManager) -> None:
        """It has slots for all that comes, behind those that were found: it is loading."""
        source, [leader], size = request.kv_transfer, request.live, memory.block_size
        assert source is not None
        first, exported = num_found // size, len(source.remote_block_ids or ()) * size
        digest = digest_of(leader.tokens(0, exported), request.cache_salt)
        blocks = memory.block_table(leader.seq_id)[first:]
        self._num_loads += 1
        request.load = Load(self._num_loads, request.request_id, source, digest, first, blocks)

    def build_connector_meta(self, plan: StepPlan, running: list[Request]) -> None:
        """What the plan says of it."""
        plan.loads.extend(request.load for request in running if request.load is not None)
        plan.unneeded.extend(self._unneeded)
        self._unneeded.clear()

    def load_ended(self, request: Request, error: str | None, memory: KVCacheManager) -> bool:
        """Whether all blocks are there: then it goes on behind them. If not, it has no memory any more."""
        [seq], load, request.load = request.live, request.load, None
        if error is None:
            request.kv_transfer = None
            seq.num_computed_tokens = (load.first + len(load.blocks)) * memory.block_size
            memory.publish(seq.seq_id, seq.num_computed_tokens, seq.tokens)
            request.metrics.num_transferred_tokens = len(load.blocks) * memory.block_size
            self.counts.num_loads += 1
            self.counts.num_loaded_tokens += request.metrics.num_transferred_tokens
            return True
        memory.free(seq.seq_id)
        seq.in_memory, seq.num_computed_tokens = False, 0
        request.error = None if self.recompute else f"its prompt, computed elsewhere, can't be had: {error}"
        self.counts.num_failed_loads += 1
        self.drop(request)
        return False

    def drop(self, request: Request) -> None:
        """It needs nothing from elsewhere any more."""
        request.load = None
        if request.kv_transfer is not None and request.kv_transfer.do_remote_prefill:
            self._unneeded.append(request.kv_transfer)
            request.kv_transfer = None

    def start_over(self) -> None:
        """All memory is given up."""
        if self.exports is not None:
            self.exports.clear()
