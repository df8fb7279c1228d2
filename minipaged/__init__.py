"""minipaged: a small and complete PagedAttention engine. `LLM` runs a model, `SamplingParams` says what is wanted."""

from minipaged.beam_search import BeamSearchParams
from minipaged.engine import LLM
from minipaged.outputs import CompletionOutput, RequestOutput
from minipaged.sampling_params import SamplingParams
from minipaged.scheduler import RequestRefused

__all__ = ["LLM", "BeamSearchParams", "CompletionOutput", "RequestOutput", "RequestRefused", "SamplingParams"]
