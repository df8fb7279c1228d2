"""What `LLM(...)` may be told: checked whole, before anything is loaded. Where vLLM has a name, it means the same.

No tensors here: to say that a flag is wrong must not take the seconds that PyTorch takes to import.
"""

import difflib
import numbers
import re
from dataclasses import dataclass, fields
from typing import Any

from minipaged.execution.speculative_config import SpeculativeConfig
from minipaged.execution.transfer.config import KVTransferConfig
from minipaged.memory import PREFIX_CACHES
from minipaged.scheduling.admission import SCHEDULES
from minipaged.scheduling.preemption import MODES

# Tokens in a step: enough to keep the processor busy, few enough that nobody waits long for somebody's prompt.
BUDGET = {"cpu": 512, "cuda": 2048}
DTYPES = ("auto", "fp32", "bf16", "fp16")
LONG_DTYPES = {"float32": "fp32", "float": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}
QUANTIZATIONS = ("auto", "none", "int8", "int4")
PRODUCTS = ("exact", "int8")
KV_CACHE_DTYPES = ("auto", "int8", "fp8")
# vLLM's names of the same.
LONG_KV_CACHE_DTYPES = {"fp8_e4m3": "fp8", "fp8_per_token_head": "fp8", "int8_per_token_head": "int8"}
KERNELS = ("auto", "torch", "triton", "cpp")
# vLLM's name -> ours, and ours from its value.
ALIASES: dict[str, tuple[str, Any]] = {
    "enable_prefix_caching": ("prefix_cache", lambda on: "hash" if on else "none"),
    "enable_chunked_prefill": ("chunked_prefill", bool),
    "enforce_eager": ("cuda_graphs", lambda eager: not eager),
    "num_gpu_blocks_override": ("num_blocks", None),
    "kv_cache_memory_bytes": ("kv_cache_memory", None),
    "scheduling_policy": ("schedule", None),
}


@dataclass(frozen=True)
class EngineArgs:
    """Everything that an engine can be told. ValueError, or TypeError for a name that there is not, says what is right.

    model: "smollm2", a folder in Hugging Face layout, a .gguf file, or a hub id.
    dtype: "auto" (fp32 on a CPU, bf16 on a GPU), "fp32", "bf16" or "fp16", or torch's: of weights, keys and values.
    quantization: "auto": weights stay in the small numbers of the checkpoint, where there are kernels for them; "none":
    they become floats; "int8", "int4": they are rounded when they are loaded, for each row, for each 32 columns.
    products: with such weights: "exact", in floats, or "int8", with activations rounded to 8 bits (faster, on a CPU).
    device: "auto" (a GPU if there is one), "cpu" or "cuda".
    kernels: "auto", "torch", "triton" or "cpp": see `kernels.load`.
    cuda_graphs: on a GPU with Triton, replay decode steps: see decode_graphs.py.
    block_size: token slots in a block.
    kv_cache_dtype: keys and values in eight bits: "int8" or "fp8" (e4m3), see kernels/cache.py; "auto": as `dtype`.
    num_blocks, kv_cache_memory: the size of the pool, in blocks or in bytes (also "512MiB" or "2GB").
    gpu_memory_utilization: or as a share of the memory that is free when the model is loaded, on a CPU too.
    num_cpu_blocks: blocks of CPU memory to swap to; by default as many as the pool has, if they fit.
    max_model_len: the longest prompt and output together, if less than the model's own.
    prefix_cache: "none", "hash" or "radix": how blocks are found again, see memory/prefix_cache.py.
    max_num_batched_tokens: see `Scheduler`; by default BUDGET, and a token for each sequence at the least.
    max_num_seqs, chunked_prefill, schedule, preemption, watermark: see `Scheduler`.
    tensor_parallel_size: processes that compute the model together, each its part: see execution/ranks. Under torchrun
    it must be as many as torchrun has started: rank 0 gets an engine; the others never leave `LLM(...)`, and end when
    rank 0's is closed. With more than one there are no CUDA graphs.
    rank_timeout: seconds after which a rank that is not heard from has failed.
    speculative_config: who guesses tokens that the model checks, such as {"method": "ngram"}: see SpeculativeConfig.
    kv_transfer_config: how blocks go to other engines, or come from them: see KVTransferConfig.
    max_logprobs: the most logprobs that a request may ask for, for each token; -1: as many as there are tokens.
    seed: for requests that have none of their own; None draws a new one each time.
    debug: fill freed blocks with NaN and check every table and count at every step.
    """

    model: str = "smollm2"
    dtype: str = "auto"
    quantization: str = "auto"
    products: str = "exact"
    device: str = "auto"
    kernels: str = "auto"
    cuda_graphs: bool = True
    block_size: int = 16
    kv_cache_dtype: str = "auto"
    num_blocks: int | None = None
    kv_cache_memory: int | None = None
    gpu_memory_utilization: float | None = None
    num_cpu_blocks: int | None = None
    max_model_len: int | None = None
    prefix_cache: str = "hash"
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    chunked_prefill: bool = True
    schedule: str = "fcfs"
    preemption: str = "auto"
    watermark: float = 0.01
    tensor_parallel_size: int = 1
    rank_timeout: float = 10.0
    speculative_config: SpeculativeConfig | None = None
    kv_transfer_config: KVTransferConfig | None = None
    max_logprobs: int = 20
    seed: int | None = None
    debug: bool = False

    @classmethod
    def of(cls, model: Any, options: dict[str, Any]) -> "EngineArgs":
        """From what a caller wrote: vLLM's names are understood, and sizes and dtypes in all their forms."""
        known = [field.name for field in fields(cls)]
        given: dict[str, Any] = {"model": str(model)}
        for name, value in options.items():
            ours, meaning = ALIASES.get(name, (name, None))
            if ours not in known:
                near = difflib.get_close_matches(name, [*known, *ALIASES], 1)
                raise TypeError(f"there is no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
            if ours in given:
                raise TypeError(f"{name!r} and another option say the same thing: give one of them")
            if meaning is not None and not isinstance(value, bool):
                raise ValueError(f"{name}={value!r}: must be True or False")
            given[ours] = meaning(value) if meaning else value
        if "kv_cache_memory" in given:
            given["kv_cache_memory"] = bytes_of(given["kv_cache_memory"])
        dtype = str(given.get("dtype", "auto")).removeprefix("torch.")
        given["dtype"] = LONG_DTYPES.get(dtype, dtype)
        if given.get("quantization") is None:
            given.pop("quantization", None)  # as in vLLM: what the checkpoint says
        if "kv_cache_dtype" in given:
            given["kv_cache_dtype"] = kv_cache_dtype_of(given["kv_cache_dtype"])
        return cls(**given)

    def __post_init__(self) -> None:
        object.__setattr__(self, "speculative_config", SpeculativeConfig.of(self.speculative_config))
        object.__setattr__(self, "kv_transfer_config", KVTransferConfig.of(self.kv_transfer_config))
        if self.kv_transfer_config is not None:
            self._transfers_must_fit()
        for name, low in _INTEGERS.items():
            value = getattr(self, name)
            optional = name not in ("block_size", "max_num_seqs", "max_logprobs", "tensor_parallel_size")
            if not (optional and value is None) and not (_is_int(value) and value >= low):
                raise ValueError(f"{name}={value!r}: must be {'None or ' * optional}an integer of at least {low}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(choices)}")
        for name in ("cuda_graphs", "chunked_prefill", "debug"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be True or False")
        if not _is_number(self.watermark) or not 0 <= self.watermark < 1:
            raise ValueError(f"watermark={self.watermark!r}: must be a number of at least 0 and less than 1")
        share = self.gpu_memory_utilization
        if share is not None and (not _is_number(share) or not 0 < share <= 1):
            raise ValueError(f"gpu_memory_utilization={share!r}: must be None or a number above 0, at most 1")
        if not _is_number(self.rank_timeout) or not 1 <= self.rank_timeout < 1e7:
            raise ValueError(f"rank_timeout={self.rank_timeout!r}: must be a number of seconds, at least 1")
        if self.num_blocks is not None and self.kv_cache_memory is not None:
            raise ValueError("give num_blocks or kv_cache_memory, not both")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens}: must be at least max_num_seqs="
                f"{self.max_num_seqs}, so that every running sequence can have a token"
            )

    def _transfers_must_fit(self) -> None:
        """What has keys and values besides the pool's, or only a part of them, can't give or take whole blocks."""
        guesses = self.speculative_config
        if guesses is not None and guesses.method != "ngram":
            raise ValueError(
                f"kv_transfer_config: not with the speculative_config {guesses.method!r}, which has keys and values of "
                "its own; ngram goes with it"
            )
        if self.tensor_parallel_size > 1:
            raise ValueError("kv_transfer_config: not with tensor_parallel_size > 1: no rank has whole blocks")

    def budget(self, device: str) -> int:
        """max_num_batched_tokens, or what it is by default."""
        return self.max_num_batched_tokens or max(BUDGET[device], self.max_num_seqs)


_INTEGERS = {
    "block_size": 1, "num_blocks": 1, "kv_cache_memory": 1, "num_cpu_blocks": 0, "max_model_len": 1,
    "max_num_seqs": 1, "max_num_batched_tokens": 1, "max_logprobs": -1, "seed": 0, "tensor_parallel_size": 1,
}  # fmt: skip
_CHOICES = {
    "dtype": DTYPES, "quantization": QUANTIZATIONS, "products": PRODUCTS, "kv_cache_dtype": KV_CACHE_DTYPES,
    "device": ("auto", "cpu", "cuda"), "kernels": KERNELS,
    "prefix_cache": tuple(PREFIX_CACHES), "schedule": SCHEDULES, "preemption": MODES,
}  # fmt: skip


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def kv_cache_dtype_of(name: Any) -> Any:
    """Our name for what vLLM calls so. ValueError for what vLLM has and we don't.

    >>> kv_cache_dtype_of("fp8_e4m3"), kv_cache_dtype_of("int8_per_token_head"), kv_cache_dtype_of("auto")
    ('fp8', 'int8', 'auto')
    """
    name = str(name).removeprefix("torch.")
    if name == "fp8_e5m2":
        raise ValueError("kv_cache_dtype='fp8_e5m2': two bits of mantissa are too few; take fp8 (e4m3) or int8")
    if name in DTYPES[1:] or name in LONG_DTYPES:
        raise ValueError(f"kv_cache_dtype={name!r}: keys and values have the model's dtype (auto), or are int8 or fp8")
    return LONG_KV_CACHE_DTYPES.get(name, name)


def bytes_of(size: Any) -> Any:
    """A size in bytes: a number, or text with a unit of KB, MB, GB (thousands), KiB, MiB, GiB (1024s), or none.

    >>> bytes_of("512MiB"), bytes_of("1.5 GB"), bytes_of("4096"), bytes_of(4096), bytes_of(None)
    (536870912, 1500000000, 4096, 4096, None)
    """
    if not isinstance(size, str):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(?:([KMGT])(i?)B?|B)?", size.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise ValueError(f"{size!r} is no size: write 512MiB, 2GB or a number of bytes")
    power = "KMGT".index(match[2].upper()) + 1 if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
