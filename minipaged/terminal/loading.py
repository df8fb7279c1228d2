"""Loading an engine for a command line: what we wait for is shown, and what goes wrong is said in a line."""

import contextlib
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from minipaged.execution.ranks.environment import is_another_rank
from minipaged.execution.ranks.errors import RankError
from minipaged.terminal.command import BadInput
from minipaged.terminal.watch import waiting


def end_as_rank(model: str, options: dict[str, Any]) -> None:
    """If torchrun has started this process to be a rank of another one's engine: be that, until the process ends.

    To be asked before a port is taken or standard input is read, which all ranks of a machine share.
    """
    try:
        another = is_another_rank(options["tensor_parallel_size"])
    except ValueError as error:
        raise BadInput(str(error)) from None
    if another:
        load("LLM", model, options, Console(quiet=True))


def load(kind: str, model: str, options: dict[str, Any], console: Console) -> Any:
    """A new LLM, or AsyncLLM. BadInput if it can't be loaded."""
    with waiting(console, "loading PyTorch"):  # it takes seconds to import: not before the flags are known to be right
        engine = getattr(import_module("minipaged"), kind)
        fetch_smollm2 = import_module("minipaged.models.fetch").fetch_smollm2
    try:
        if model == "smollm2":
            fetch_smollm2()  # by itself, since it draws a progress bar of its own
        fetched = model == "smollm2" or Path(model).exists()
        with waiting(console, f"loading {model}") if fetched else contextlib.nullcontext():
            return engine(model, **options)
    except (ValueError, OSError, MemoryError) as error:
        raise BadInput(" ".join(str(error).split()) or "not enough memory") from error
    except RuntimeError as error:  # PyTorch's way to say that there is no memory
        if "memory" not in str(error) or isinstance(error, RankError):
            raise
        raise BadInput("not enough memory: lower --num-blocks or --kv-cache-memory") from error
