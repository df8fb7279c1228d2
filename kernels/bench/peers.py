"""Who stands beside: PyTorch's own attention over contiguous tensors, and FlexAttention.

Each function returns, by name, functions that make a peer ready; one that can't be had here raises whatever it does.
"""

import random
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernels.bench.timing import Call

PAGE = 128  # of FlexAttention: its own default
ON_A_GPU = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
KV = list[tuple[Tensor, Tensor]]  # each layer's keys and values, [S, G, context, D] each


@dataclass(frozen=True)
class Peer:
    calls: list[Call]  # one for each layer
    rows: Callable[[Tensor], Tensor]  # what a call returns, as [T, H, D]


def prefill_peers(q: Tensor, kv: KV, batch: int) -> dict[str, Callable[[], Peer]]:
    """On a GPU, FlashAttention; on a CPU, whichever PyTorch takes. q [S queries, H, D]."""
    queries = q.unflatten(0, (batch, -1)).transpose(1, 2).to(kv[0][0].dtype)  # [S, H, queries, D]
    settings = {"is_causal": True, "enable_gqa": queries.shape[1] != kv[0][0].shape[1]}

    def rows(out: Tensor) -> Tensor:
        return out.transpose(1, 2).flatten(0, 1)

    if q.device.type != "cuda":
        return {"sdpa": lambda: _sdpa(queries, kv, None, settings, rows)}
    return {"flash": lambda: _sdpa(queries, kv, SDPBackend.FLASH_ATTENTION, settings, rows)}


def contiguous_decode_peers(q: Tensor, kv: KV, context: int) -> dict[str, Callable[[], Peer]]:
    """All that PyTorch has, on a GPU by name; and on a GPU, FlexAttention over paged tables. q [S, H, D].

    The R heads that share a key/value head are laid as R queries of one head: with a single token nothing lies in
    the future, so that is the same, and no peer has to repeat keys and values for them.
    """
    queries = q.unflatten(1, (kv[0][0].shape[1], -1)).to(kv[0][0].dtype)  # [S, G, R, D]

    def rows(out: Tensor) -> Tensor:
        return out.flatten(1, 2)

    def make(backend: SDPBackend | None) -> Callable[[], Peer]:
        return lambda: _sdpa(queries, kv, backend, {}, rows)

    if q.device.type != "cuda":
        return {"sdpa": make(None), "flex": _no_gpu}
    found = {name: make(backend) for name, backend in ON_A_GPU.items()}
    return found | {"flex": lambda: flex_peer(q, kv, context)}


def _no_gpu() -> Peer:
    raise RuntimeError("measured on a GPU only")


def _sdpa(
    queries: Tensor, kv: KV, backend: SDPBackend | None, settings: dict[str, bool], rows: Callable[[Tensor], Tensor]
) -> Peer:
    def call(keys: Tensor, values: Tensor) -> Call:
        def attend() -> Tensor:
            with sdpa_kernel(backend) if backend is not None else nullcontext():
                return scaled_dot_product_attention(queries, keys, values, **settings)  # type: ignore[arg-type]

        return attend

    peer = Peer([call(keys, values) for keys, values in kv], rows)
    with warnings.catch_warnings():  # PyTorch says in warnings why each other backend isn't taken
        warnings.simplefilter("ignore")
        peer.calls[0]()
    return peer


def flex_peer(q: Tensor, kv: KV, context: int, compiled: bool = True) -> Peer:
    """FlexAttention, its pages scattered over a pool by PyTorch's own PagedAttention. q [S, H, D].

    Not compiled, it computes the same without a kernel: for tests.
    """
    from torch.nn.attention.experimental._paged_attention import PagedAttention
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sequences, device = len(q), q.device
    pages = sequences * -(-context // PAGE)
    paged = PagedAttention(pages, PAGE, sequences, str(device))
    random.Random(0).shuffle(paged.empty_pages)
    everyone = torch.arange(sequences, device=device)
    for s in everyone:
        paged.reserve(s, torch.tensor(context, device=device))
    positions = torch.arange(context, device=device).expand(sequences, -1)
    pools = []
    for keys, values in kv:
        pool = keys.new_zeros(2, 1, keys.shape[1], pages * PAGE, keys.shape[3])  # [2, 1, G, slots, D]
        paged.assign(everyone, positions, keys, values, pool[0], pool[1])
        pools.append(pool)
    # Each sequence's page table becomes a mask of which pages its query looks at.
    logical = create_block_mask(
        lambda b, h, i, j: j < context, sequences, None, 1, context, device=device, BLOCK_SIZE=PAGE
    )
    mask = paged.convert_logical_block_mask(logical)
    attend: Callable[..., Tensor] = flex_attention
    if compiled:
        torch._dynamo.reset()  # compiled for this cell alone: after a few others it would give up compiling
        attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    queries = q[:, :, None].to(kv[0][0].dtype)  # [S, H, 1, D]
    gqa = q.shape[1] != kv[0][0].shape[1]

    def call(keys: Tensor, values: Tensor) -> Call:
        return lambda: attend(queries, keys, values, block_mask=mask, enable_gqa=gqa)

    return Peer([call(keys, values) for keys, values in pools], lambda out: out[:, :, 0])
