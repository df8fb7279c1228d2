"""The command line `python -m minipaged.quantize MODEL OUT`: a model in 4 or 8 bits. See quantization/."""

import argparse
import os
import sys
from pathlib import Path

from minipaged.terminal.command import EPILOG, BadInput, Parser, run

PROGRAM = "python -m minipaged.quantize"
DESCRIPTION = (
    "Write a model with its matrices in 4 or 8 bits: a folder in Hugging Face layout, packed as compressed-tensors has "
    "it, that minipaged, vLLM and transformers read."
)
METHODS = {"rtn": "round to nearest", "gptq": "later columns make good", "awq": "columns scaled by what they read"}
WIDTHS, GROUP_SIZES = (4, 8), (32, 64, 128, -1)
CALIBRATION_TOKENS = 8192


def main(argv: list[str] | None = None) -> int:
    def work() -> None:
        args = _parser().parse_args(argv)
        _check(args)
        _run(args)

    return run("minipaged.quantize", work, "interrupted: nothing was written")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, allow_abbrev=False, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("model", metavar="MODEL", help="smollm2, a folder in Hugging Face layout, a .gguf file or a hub id")
    add("out", metavar="OUT", type=Path, help="the folder that is written; it must not exist")
    methods = "; ".join(f"{name}: {words}" for name, words in METHODS.items())
    add("--method", default="gptq", choices=[*METHODS], help=f"{methods} (default: gptq)")
    add("--bits", type=int, default=4, choices=WIDTHS, help="of a weight (default: 4)")
    add("--group-size", type=int, default=64, choices=GROUP_SIZES,
        help="columns that share a scale; -1: a whole row (default: 64)")  # fmt: skip
    add("--asymmetric", action="store_true",
        help="a zero point for each group: closer, but transformers reads it with dequantize=True only")  # fmt: skip
    add("--calibration", type=Path, metavar="FILE",
        help="text for gptq and awq to learn from (default: the beginning of Moby-Dick)")  # fmt: skip
    add("--calibration-tokens", type=int, default=CALIBRATION_TOKENS, metavar="N",
        help=f"how much of it is read (default: {CALIBRATION_TOKENS})")  # fmt: skip
    return parser


def _check(args: argparse.Namespace) -> None:
    """Before PyTorch is loaded."""
    if args.out.exists() or args.out.is_symlink():
        raise BadInput(f"{args.out} exists already: nothing is overwritten")
    if not args.out.parent.is_dir():
        raise BadInput(f"{args.out}: there is no folder {args.out.parent}")
    if not os.access(args.out.parent, os.W_OK):
        raise BadInput(f"{args.out}: nothing may be written there")
    if args.calibration_tokens < 1:
        raise BadInput(f"--calibration-tokens {args.calibration_tokens}: must be at least 1")


def _run(args: argparse.Namespace) -> None:
    from minipaged.models import open_checkpoint
    from minipaged.quantization.methods import grid_for, quantize_to
    from minipaged.quantization.progress import Shown
    from minipaged.quantization.texts import TO_CALIBRATE

    try:
        checkpoint = open_checkpoint(args.model)
        grid = grid_for(checkpoint, args.bits, args.group_size, not args.asymmetric)
        with Shown() as shown:
            tell = shown.doing("layers")
            text, tokens = args.calibration or TO_CALIBRATE, args.calibration_tokens
            quantize_to(args.out, checkpoint, args.method, grid, tell, text, tokens)
    except (ValueError, MemoryError) as error:
        raise BadInput(" ".join(str(error).split()) or "not enough memory") from error
    except FileExistsError as error:  # made by somebody meanwhile
        raise BadInput(str(error)) from error
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
