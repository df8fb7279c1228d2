"""The flags that say what engine is wanted, whatever is done with it."""

import argparse
import json
import re
from typing import Any

from minipaged.execution.engine_args import KV_CACHE_DTYPES, PRODUCTS, QUANTIZATIONS, EngineArgs, bytes_of
from minipaged.execution.speculative_config import METHODS, NUM_SPECULATIVE_TOKENS
from minipaged.memory import PREFIX_CACHES
from minipaged.scheduling.admission import SCHEDULES
from minipaged.scheduling.preemption import MODES
from minipaged.terminal.command import BadInput

OPTIONS = (  # of the engine, that there are flags for
    "dtype", "quantization", "products", "kv_cache_dtype", "device", "kernels", "block_size", "num_blocks",
    "kv_cache_memory", "max_model_len", "prefix_cache", "schedule", "max_num_seqs", "max_num_batched_tokens",
    "chunked_prefill", "preemption", "tensor_parallel_size", "kv_transfer_config", "debug",
)  # fmt: skip
MODEL_HELP = "smollm2, a folder in Hugging Face layout, a .gguf file or a hub id"
PREFIX_CACHE_HELP = (
    "how prompts find what others computed before them: by a table of hashes, a radix tree, or not at all "
    "(default: hash)"
)
SCHEDULE_HELP = (
    "who comes in first: fcfs, who came first; prefix, who has the longest beginning in memory already (default: fcfs)"
)
PREEMPTION_HELP = (
    "how a request makes room when memory runs out: recompute drops it, to be computed again; swap moves it "
    "to CPU memory; auto swaps if it has several sequences"
)
KERNELS_HELP = "who computes: auto is triton on a GPU, and cpp on a CPU where there is a compiler; torch needs neither"
QUANTIZATION_HELP = (
    "auto: weights stay in the small numbers of the file, where there are kernels for them; none: they become floats; "
    "int8, int4: they are rounded to 8 or 4 bits when they are loaded"
)
PRODUCTS_HELP = (
    "with weights in small numbers: exact, the same as with the floats that they stand for; int8 rounds activations "
    "to 8 bits, too, which is faster on a CPU (default: exact)"
)
KV_CACHE_DTYPE_HELP = "keys and values in eight bits, for four times the blocks of fp32 (default: auto, as --dtype)"
RANKS_HELP = (
    "processes that compute the model together, each its part of every layer (default: 1). Started by torchrun, on one "
    "machine or several, it must be as many as torchrun has started"
)
SPECULATE_HELP = (
    "have tokens guessed, which the model checks several at a time; the answers stay the same. ngram: what followed "
    "the same tokens before, for answers that repeat their prompt; draft: a smaller model with the same vocabulary; "
    "head: a small network on the model's own state, trained by python -m minipaged.train_head"
)
SPECULATIVE_MODEL_HELP = "of draft, a model; of head, a file (default: the one that stands in the package)"
KV_TRANSFER_HELP = (
    "give the blocks of prompts to other engines, or take theirs; as JSON, such as "
    '{"kv_connector": "SharedMemoryConnector", "kv_role": "kv_producer"} (others: TorchDistributedConnector; '
    "kv_consumer, kv_both). Whoever asks says in kv_transfer_params which way it goes"
)
BRANCHES_HELP = "rows of guesses for a sequence at a time, which begin differently (default: 1)"


def add_memory(group: argparse._ArgumentGroup) -> None:
    def add(flag: str, default: int, words: str) -> None:
        group.add_argument(flag, type=count, default=default, metavar="N", help=f"{words} (default: {default})")

    add("--block-size", 16, "tokens in a block")
    size = group.add_mutually_exclusive_group()
    blocks = "blocks in the pool (default: as many as fit into a quarter of the free memory)"
    size.add_argument("--num-blocks", type=count, metavar="N", help=blocks)
    memory = "the size of the pool instead, such as 512MiB or 2GB"
    size.add_argument("--kv-cache-memory", type=parse_bytes, metavar="SIZE", help=memory)
    longest = "the longest prompt and output together, if less than the model's (default: that)"
    group.add_argument("--max-model-len", type=count, metavar="N", help=longest)
    add("--max-num-seqs", 64, "sequences that run at a time")
    budget = "tokens in a step: what does not fit is computed in the next ones "
    budget += "(default: 512, on a GPU 2048, or --max-num-seqs if that is more)"
    group.add_argument("--max-num-batched-tokens", type=count, metavar="N", help=budget)
    whole = "let a prompt wait for a step that has room for it, instead of computing it in pieces"
    group.add_argument("--no-chunked-prefill", dest="chunked_prefill", action="store_false", help=whole)
    caches = tuple(PREFIX_CACHES)
    group.add_argument("--prefix-cache", choices=caches, default="hash", help=PREFIX_CACHE_HELP)
    group.add_argument("--schedule", choices=SCHEDULES, default="fcfs", help=SCHEDULE_HELP)
    group.add_argument("--preemption", choices=MODES, default="auto", help=PREEMPTION_HELP)
    dtypes = ("auto", "fp32", "bf16", "fp16")
    group.add_argument("--dtype", choices=dtypes, default="auto", help="auto: fp32, on a GPU bf16")
    group.add_argument("--quantization", choices=QUANTIZATIONS, default="auto", help=QUANTIZATION_HELP)
    group.add_argument("--products", choices=PRODUCTS, default="exact", help=PRODUCTS_HELP)
    group.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help=KV_CACHE_DTYPE_HELP)
    devices = ("auto", "cpu", "cuda")
    group.add_argument("--device", choices=devices, default="auto", help="auto: the GPU, if there is one")
    backends = ("auto", "torch", "triton", "cpp")
    group.add_argument("--kernels", choices=backends, default="auto", help=KERNELS_HELP)
    group.add_argument("--tensor-parallel-size", type=count, default=1, metavar="N", help=RANKS_HELP)
    group.add_argument("--kv-transfer-config", type=parse_json, metavar="JSON", help=KV_TRANSFER_HELP)


def add_speculation(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--speculate", choices=METHODS, help=SPECULATE_HELP)
    group.add_argument("--speculative-model", metavar="MODEL", help=SPECULATIVE_MODEL_HELP)
    most = ", ".join(f"{method} {count}" for method, count in NUM_SPECULATIVE_TOKENS.items())
    words = f"the most guesses in a row (default: {most})"
    group.add_argument("--num-speculative-tokens", type=count, metavar="N", help=words)
    group.add_argument("--num-branches", type=count, metavar="N", help=BRANCHES_HELP)


def speculative_config(args: argparse.Namespace) -> dict[str, Any] | None:
    """What these flags say together. BadInput if one is given, and nothing is guessed."""
    names = {"speculative_model": "model", "num_speculative_tokens": "num_speculative_tokens",
             "num_branches": "num_branches"}  # fmt: skip
    given = {key: getattr(args, name) for name, key in names.items() if getattr(args, name) is not None}
    if args.speculate is None:
        for name, key in names.items():
            if key in given:
                raise BadInput(f"--{name.replace('_', '-')}: needs --speculate {' or '.join(METHODS)}")
        return None
    return {"method": args.speculate, **given}


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of the engine. BadInput if that can't be."""
    options = {name: getattr(args, name) for name in OPTIONS} | {"speculative_config": speculative_config(args)}
    try:
        EngineArgs.of(args.model, options)
    except (ValueError, TypeError) as error:
        raise BadInput(str(error)) from None
    return options


def count(text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {text!r}")
    return int(text)


def parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is no JSON: {error}") from None


def parse_bytes(text: str) -> int:
    try:
        return bytes_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
