"""Assignment 1: attention and the cache."""

from importlib import resources

from minipaged.course import cut
from minipaged.course.assignment import Assignment, Part
from minipaged.course.assignments import attention_cases as cases
from minipaged.course.assignments import attention_judges as judges
from minipaged.course.submission import reference

FORMULAS, ROPE, LLAMA = "kernels/formulas.py", "minipaged/models/rope.py", "minipaged/models/llama.py"
BACKEND = "kernels/torch_backend.py"


def _without(file: str, *names: str) -> str:
    """A file of the package in which some functions are missing."""
    return cut.starter(reference(file), (), names, "")


def _others() -> dict[str, str]:
    """Files that have the same formulas for other purposes, without these."""
    given = resources.files("minipaged.course.inside") / "one_by_one.py"
    return {
        "kernels/torch_attention.py": given.read_text(encoding="utf-8"),
        "kernels/reference.py": _without(
            "kernels/reference.py", "write_kv", "write_slots", "paged_attention", "paged_attention_by_blocks"
        ),
        "minipaged/models/gpt2.py": _without(
            "minipaged/models/gpt2.py", "GPT2Layer.__call__", "GPT2Layer.attention", "GPT2.__call__", "GPT2.logits"
        ),
        "minipaged/models/head.py": _without(
            "minipaged/models/head.py", "Head.__call__", "Head.write", "Head.logits"
        ),
    }


ASSIGNMENT = Assignment(
    number=1,
    title="Attention and the cache",
    parts=(
        Part(
            "norm", 10, FORMULAS, ("rms_norm", "silu_and_mul"), "norm", cases.norm_cases, judges.judge_norm,
            smaller=cases.smaller_norm, show=judges.show, num_cases=60,
        ),
        Part(
            "frequencies", 15, ROPE, ("inverse_frequencies", "Rope.__call__"), "frequencies", cases.frequency_cases,
            judges.judge_frequencies, helpers=("_llama3",), smaller=cases.smaller_frequencies, show=judges.show,
            num_cases=60,
        ),
        Part(
            "turning", 10, FORMULAS, ("rope",), "turning", cases.turning_cases, judges.judge_turning,
            smaller=cases.smaller_turning, show=judges.show, num_cases=30,
        ),
        Part(
            "attention", 25, FORMULAS, ("attention",), "attention", cases.attention_cases, judges.judge_attention,
            smaller=cases.smaller_attention, show=judges.show, num_cases=60,
        ),
        Part(
            "cache", 15, BACKEND, ("TorchBackend.write_kv", "TorchBackend.rope_and_write"), "cache",
            cases.cache_cases, judges.judge_cache, smaller=cases.smaller_cache, show=judges.show_cache, num_cases=40,
        ),
        Part(
            "layer", 15, LLAMA, ("LlamaLayer.__call__", "LlamaLayer.attention"), "layer", cases.layer_cases,
            judges.judge_layer, smaller=cases.smaller_steps, show=judges.show_steps, num_cases=25,
        ),
        Part(
            "model", 10, LLAMA, ("Llama.__call__", "Llama.logits"), "model", cases.model_cases, judges.judge_model,
            smaller=cases.smaller_steps, show=judges.show_steps, num_cases=20,
        ),
    ),
    chapters=(1, 2),
    hours="4 to 7",
    absent=(
        "kernels/cpp.py", "kernels/cpp_packed.py", "kernels/cpu", "kernels/triton_attention.py",
        "kernels/triton_backend.py", "kernels/triton_cache.py", "kernels/triton_packed.py", "kernels/triton_tiles.py",
        "minipaged/quantization", "minipaged/training",
    ),
    imports=("torch", "numpy", "tokenizers", "safetensors"),
    generate=("--kernels", "torch"),
    generate_also=("kernels/torch_attention.py",),
    memory=4 << 30,
    harmless={
        "TorchBackend.write_kv: if slots.min() < 0: -> if slots.min() <= 0:":
            "only saves time: all slots that are not -1 are kept",
        "TorchBackend.write_kv: if slots.min() < 0: -> if slots.min() < 1:":
            "only saves time: all slots that are not -1 are kept",
        "Llama.__call__: for layer, layer_cache in zip(self.layers, cache, strict=True): -> "
        "for layer, layer_cache in zip(self.layers, cache, strict=False):":
            "a cache has as many layers as its model",
    },
    also=_others(),
)  # fmt: skip
