"""What torchrun tells the processes that it starts. No tensors here: command lines ask before they import PyTorch."""

import os

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def num_started() -> int:
    """How many processes torchrun has started; 1 if it has not started this one."""
    started = all(name in os.environ for name in VARIABLES) and os.environ["WORLD_SIZE"].isdecimal()
    return int(os.environ["WORLD_SIZE"]) if started else 1


def torchrun_has_started(size: int) -> bool:
    """Whether this process is one of several that torchrun has started. ValueError if they aren't `size`.

    A program that wants no ranks may be started by torchrun for reasons of its own.
    """
    started = num_started()
    if 1 in (size, started):
        return False
    if started != size:
        raise ValueError(f"tensor_parallel_size={size}: torchrun has started {started} processes; it must be as many")
    return True


def is_another_rank(size: int) -> bool:
    """Whether torchrun has started this process to be a rank, and another one to be the engine. Errors as above.

    Of a command line, which can have no other reason: so ValueError, too, if it wants no ranks.
    """
    if size == 1 and (started := num_started()) > 1:
        raise ValueError(f"torchrun has started {started} processes: give --tensor-parallel-size {started}")
    return torchrun_has_started(size) and os.environ["RANK"] != "0"
