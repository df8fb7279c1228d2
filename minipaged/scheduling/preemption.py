"""Making way: what a request does with its blocks when memory runs out (paper, section 4.5).

    swap        its blocks move to CPU memory, and later back; shared blocks move once and stay shared
    recompute   its blocks are dropped, and later all its tokens are computed again, as one long prompt
    auto        swap if it has several sequences, since their sharing is worth keeping, else recompute

A request is preempted whole, with all its sequences. When the CPU pool is full, a swap becomes a recomputation.
"""

from dataclasses import dataclass, field

from minipaged.memory import Allocated, KVCacheManager, Swapped
from minipaged.requests.request import Request

MODES = ("auto", "recompute", "swap")


@dataclass(frozen=True)
class Preempted:
    """What was done: "swap" or "recompute", and which blocks move (from GPU, to CPU)."""

    mode: str
    moves: list[tuple[int, int]] = field(default_factory=list)


def preempt(request: Request, memory: KVCacheManager, mode: str) -> Preempted:
    """Take all its GPU blocks from a running request: from those of its sequences that are in memory.

    Who recomputes has no memory any more, and nothing computed.
    """
    held = [seq for seq in request.live if seq.in_memory]
    if mode == "swap" or (mode == "auto" and len(held) > 1):
        swapped = memory.swap_out([seq.seq_id for seq in held])
        if isinstance(swapped, Swapped):
            return Preempted("swap", swapped.moves)
    for seq in held:
        memory.free(seq.seq_id)
        seq.in_memory, seq.num_computed_tokens = False, 0
    return Preempted("recompute")


def share_rebuilt_prompt(request: Request, memory: KVCacheManager) -> None:
    """After a recomputation: once the first sequence has the prompt again, the others fork it.

    So they share it as before, and the request needs no more memory than it may (`Request.most_blocks`). Until
    then the first sequence computes no more than the prompt: see `Request.target`. Where nothing is to be forked
    nothing happens; else what the others had computed is looked for at last (`_find_outputs_again`).
    """
    leader, *others = request.live
    if all(seq.in_memory for seq in others) or leader.num_computed_tokens != len(request.prompt_token_ids):
        return
    for seq in others:
        memory.fork(leader.seq_id, seq.seq_id)
        seq.in_memory, seq.num_computed_tokens = True, leader.num_computed_tokens
    _find_outputs_again(request, memory)


def _find_outputs_again(request: Request, memory: KVCacheManager) -> None:
    """What the prefix cache still has of a sequence's output is not computed again.

    Only if it follows the very blocks of the prompt that all share: another copy of these would be one too many.
    """
    shared = memory.block_table(request.live[0].seq_id)[: len(request.prompt_token_ids) // memory.block_size]
    for seq in request.live:
        prefix = memory.find(seq.tokens(0, len(seq) - 1), request.cache_salt)
        if prefix.num_tokens > seq.num_computed_tokens and prefix.blocks[: len(shared)] == shared:
            memory.free(seq.seq_id)
            answer = memory.allocate(seq.seq_id, prefix.num_tokens, prefix=prefix)
            assert isinstance(answer, Allocated), "it takes only blocks that were found"
            seq.num_computed_tokens = prefix.num_tokens
