"""minipaged: a small and complete PagedAttention engine.

`LLM` runs a model, `SamplingParams` says what is wanted of it.
"""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minipaged.async_llm import AsyncLLM
    from minipaged.execution.ranks.errors import RankError
    from minipaged.llm import LLM
    from minipaged.requests.beam_search_params import BeamSearchParams
    from minipaged.requests.request import RequestRefused
    from minipaged.requests.sampling_params import Logprob, RequestOutputKind, SamplingParams
    from minipaged.requests.structured_outputs import StructuredOutputsParams
    from minipaged.text.outputs import CompletionOutput, RequestOutput

__all__ = ["LLM", "AsyncLLM", "BeamSearchParams", "CompletionOutput", "Logprob", "RequestOutput", "RequestOutputKind"]
__all__ += ["RankError", "RequestRefused", "SamplingParams", "StructuredOutputsParams"]

_HOMES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "BeamSearchParams": "requests.beam_search_params",
    "CompletionOutput": "text.outputs",
    "Logprob": "requests.sampling_params",
    "RankError": "execution.ranks.errors",
    "RequestOutput": "text.outputs",
    "RequestOutputKind": "requests.sampling_params",
    "SamplingParams": "requests.sampling_params",
    "RequestRefused": "requests.request",
    "StructuredOutputsParams": "requests.structured_outputs",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: PyTorch takes seconds, and `--help` does not need it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"minipaged.{_HOMES[name]}"), name)
    return value


def cache_folder() -> Path:
    """Where things are kept that were fetched, built or computed once.

    MINIPAGED_CACHE, else ``minipaged`` in the user's cache directory as the operating system has it.
    """
    if os.environ.get("MINIPAGED_CACHE"):
        return Path(os.environ["MINIPAGED_CACHE"]).expanduser()
    system = {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return Path(base or Path.home() / system) / "minipaged"
