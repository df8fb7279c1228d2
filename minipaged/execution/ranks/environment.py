"""What torchrun tells the processes that it starts. No tensors here: command lines ask before they import PyTorch."""

import os

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def torchrun_has_started(size: int) -> bool:
    """Whether this process is one of several that torchrun has started. ValueError if they aren't `size`."""
    world = os.environ.get("WORLD_SIZE", "1")
    if size == 1 or world == "1" or not all(name in os.environ for name in VARIABLES):
        return False
    if world != str(size):
        raise ValueError(f"tensor_parallel_size={size}: torchrun has started {world} processes; it must be as many")
    return True


def is_another_rank(size: int) -> bool:
    """Whether torchrun has started this process to be a rank, and another one to be the engine. Errors as above."""
    return torchrun_has_started(size) and os.environ["RANK"] != "0"
