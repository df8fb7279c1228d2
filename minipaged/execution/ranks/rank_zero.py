"""Rank 0's side: it is the engine's process, tells the others what to compute, and computes its own part."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from minipaged.execution.engine_args import EngineArgs
from minipaged.execution.pool_size import Room, free_memory
from minipaged.execution.ranks import torchrun
from minipaged.execution.ranks.environment import torchrun_has_started
from minipaged.execution.ranks.orders import OrderWriter
from minipaged.execution.ranks.starting import start_here
from minipaged.execution.ranks.steps import StepThread
from minipaged.execution.ranks.worker import TOLD, place
from minipaged.execution.runner import resolve
from minipaged.models import Ranks
from minipaged.models.fetch import fetch_smollm2
from minipaged.scheduling.plan import StepOutput, StepPlan


def start_ranks(args: EngineArgs) -> "RankZero | None":
    """None if there is but one. Errors as of `resolve`."""
    return RankZero(args, resolve(args.dtype, args.device)[1]) if args.tensor_parallel_size > 1 else None


class RankZero:
    """The ranks of one engine. ranks: rank 0's way to add up, for whoever loads the model.

    Whoever makes one closes it, whatever happens.
    """

    def __init__(self, args: EngineArgs, device: str):
        size, silence = args.tensor_parallel_size, args.rank_timeout
        if args.model == "smollm2":
            fetch_smollm2()  # once, not by each of them
        told = {name: getattr(args, name) for name in TOLD} | {"block_size": int(args.block_size), "device": device}
        all_are_here = torchrun_has_started(size)
        self._steps, self._orders, self._closed = StepThread(), OrderWriter(), False
        try:
            if all_are_here:
                self.team, self.ranks = torchrun.meet(size, silence, device, told)
            else:
                share = self._share_threads(size)
                self._steps.do(lambda: self._start_here(size, silence, device, share, told), lambda: None)
        except BaseException:
            self.close()
            raise

    def _start_here(self, size: int, silence: float, device: str, share: int, told: dict[str, Any]) -> None:
        """In the step thread, where no Ctrl-C leaves a process that has begun and that nobody knows of."""
        self.team, self.ranks = start_here(size, silence, device, share, told)
        if self._closed:  # whoever waited for it was broken off twice
            self.team.close()

    def _share_threads(self, size: int) -> int:
        """How many each rank may use. The step thread is told; this one may use all of them, as before."""
        threads = torch.get_num_threads()
        share = max(1, threads // size)
        self._steps.do(partial(torch.set_num_threads, share), lambda: None)
        torch.set_num_threads(threads)
        return share

    def rooms(self, device: str, own: int) -> list[Room]:
        """Where blocks lie, once all have loaded. own: bytes of a block in this process."""
        found = {place(device): Room(own, free_memory(device))}
        for said in self.team.hear():
            room = found.get(said["place"], Room(0, said["free"]))
            found[said["place"]] = Room(room.block_bytes + said["block_bytes"], min(room.free, said["free"]))
        return list(found.values())

    def make_pools(self, num_blocks: int, num_cpu_blocks: int) -> None:
        for member in self.team.members:
            self.team.say(member, num_blocks=num_blocks, num_cpu_blocks=num_cpu_blocks)

    def wait_until_ready(self) -> None:
        self.team.hear()
        for member in self.team.members:
            member.ready = True

    def tell(self, plan: StepPlan) -> None:
        """What rank 0 is about to compute: the others compute it too."""
        self._told = True
        self.team.order(self._orders.write(plan))

    def execute(self, plan: StepPlan, execute: Callable[[StepPlan], StepOutput]) -> StepOutput:
        """A step of all ranks; `execute` does rank 0's part, and tells the others. RankError if one has failed."""
        self.team.check()
        return self._steps.do(lambda: self._execute(plan, execute), self.team.check)

    def _execute(self, plan: StepPlan, execute: Callable[[StepPlan], StepOutput]) -> StepOutput:
        self._told = False
        try:
            return execute(plan)
        except Exception as error:
            if not self._told:  # nobody waits for rank 0
                raise
            self.team.explain(error)
            raise

    def check(self) -> None:
        """RankError if a rank has failed."""
        self.team.check()

    def close(self) -> None:
        """End all. Doing it twice does no harm, nor doing it in a process that was forked from this one."""
        if hasattr(self, "team") and not self.team.is_ours:
            return
        self._closed = True
        self._steps.end()
        if hasattr(self, "team"):
            self.team.close()
        self.ranks = Ranks()  # the memory that was shared goes, too
