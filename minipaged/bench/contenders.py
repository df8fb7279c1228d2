"""The list of contenders, and what they are told.

A contender loads the model once, and then runs loads: `run(load) -> Run`. This file, loads.py and worker.py
import nothing but the standard library: they also run in a peer's environment, where our packages may be missing.
"""

from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, Protocol

from minipaged.bench.loads import QUOTING, Load, Run

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Options:
    """What all contenders are told. model: a folder in Hugging Face layout, or a .gguf file.

    most_blocks: of BLOCK_SIZE tokens, that hold the largest load whole: the pool, if nothing else is said.
    kv_bytes_per_token: of one token, in all layers.
    most_requests, longest: of any load: the sequences that run at a time, and the positions that one takes.
    device: of minipaged and transformers; vLLM and llama.cpp take what their packages are built for.
    kernels: minipaged's backend, see `kernels.load`. engine: settings of minipaged's `LLM` besides, by name.
    """

    model: str
    dtype: str
    threads: int
    most_blocks: int
    kv_bytes_per_token: int
    most_requests: int
    longest: int
    num_blocks: int | None = None
    kv_cache_memory: int | None = None
    device: str = "cpu"
    kernels: str = "auto"
    engine: dict[str, Any] = field(default_factory=dict)


class Contender(Protocol):
    about: str | None  # what a reader should know of it besides its name: version, weights, settings

    def run(self, load: Load) -> Run: ...


LABELS = {
    "minipaged": "minipaged",
    "no-cache": "minipaged, no prefix cache",
    "radix": "minipaged, radix tree",
    "no-chunks": "minipaged, no chunked prefill",
    "small-chunks": "minipaged, 256 tokens a step",
    "no-graphs": "minipaged, no CUDA graphs",
    "floats": "minipaged, weights in floats",
    "int8-products": "minipaged, products in int8",
    "int8": "minipaged, weights in int8",
    "int4": "minipaged, weights in int4",
    "ngram": "minipaged, n-gram guesses",
    "head": "minipaged, a head's guesses",
    "kv-int8": "minipaged, keys and values in int8",
    "kv-fp8": "minipaged, keys and values in fp8",
    "static": "transformers, padded batches",
    "continuous": "transformers, continuous batching",
    "vllm": "vLLM",
    "vllm-ngram": "vLLM, n-gram guesses",
    "llama.cpp": "llama.cpp",
}
# This engine with a switch in another position, to be seen beside itself. The first is what it is by default.
VARIANTS: dict[str, dict[str, Any]] = {
    "minipaged": {},
    "no-cache": {"prefix_cache": "none"},
    "radix": {"prefix_cache": "radix"},
    "no-chunks": {"chunked_prefill": False},
    "small-chunks": {"max_num_batched_tokens": 256},
    "no-graphs": {"cuda_graphs": False},
    "floats": {"quantization": "none"},
    "int8-products": {"products": "int8"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "ngram": {"speculative_config": {"method": "ngram"}},
    "head": {"speculative_config": {"method": "head"}},
    "kv-int8": {"kv_cache_dtype": "int8"},
    "kv-fp8": {"kv_cache_dtype": "fp8"},
}
DEFAULT_PEERS = ("static", "continuous")
SEARCHERS = ("static", "vllm")  # peers with beam search
PATIENT = ("static", "vllm", "vllm-ngram")  # peers that are sent one request after the other, where a load says so
PEERS = (*DEFAULT_PEERS, "vllm", "vllm-ngram", "llama.cpp")  # the order of the turns, after the variants
# Each one's home, loaded only in the process where it lives: a module of this folder, and a class in it.
HOMES = {
    **dict.fromkeys(VARIANTS, ("ours", "Minipaged")),
    "static": ("peer_transformers", "Static"),
    "continuous": ("peer_transformers", "Continuous"),
    "vllm": ("peer_vllm", "VLLM"),
    "vllm-ngram": ("peer_vllm", "Guessing"),
    "llama.cpp": ("peer_llama_cpp", "LlamaCpp"),
}


def why_not(name: str, load: Load) -> str | None:
    """Why a contender can't be asked for a load; None if it can."""
    if name in VARIANTS:
        return None
    if not load.at_once:
        return "only minipaged is sent requests while it answers others"
    if load.one_by_one and name not in PATIENT:
        return "it is sent all requests at once"
    if name == "vllm-ngram" and load.name not in QUOTING:
        return "its guesses are for answers that quote"
    if load.beam_width > 1 and name not in SEARCHERS:
        return "it has no beam search"
    return None


def build(name: str, options: Options) -> Contender:
    """Load a contender, in the process that it is to live in."""
    module, contender = HOMES[name]
    options = replace(options, engine=options.engine | VARIANTS.get(name, {}))
    return getattr(import_module(f"minipaged.bench.{module}"), contender)(options)
