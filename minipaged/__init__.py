"""minipaged: a small and complete PagedAttention engine.

`LLM` runs a model, `SamplingParams` says what is wanted of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minipaged.beam_search import BeamSearchParams
    from minipaged.engine import LLM
    from minipaged.outputs import CompletionOutput, RequestOutput
    from minipaged.sampling_params import SamplingParams
    from minipaged.scheduler import RequestRefused

__all__ = ["LLM", "BeamSearchParams", "CompletionOutput", "RequestOutput", "RequestRefused", "SamplingParams"]

_HOMES = {
    "LLM": "engine",
    "BeamSearchParams": "beam_search",
    "CompletionOutput": "outputs",
    "RequestOutput": "outputs",
    "SamplingParams": "sampling_params",
    "RequestRefused": "scheduler",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: PyTorch takes seconds, and `--help` does not need it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"minipaged.{_HOMES[name]}"), name)
    return value
