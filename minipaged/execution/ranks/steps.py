"""A thread that executes rank 0's steps, so that whoever waits for one may be broken off, and the step may not.

In the middle of a step the other ranks wait for rank 0's part of a sum. A Ctrl-C that broke rank 0 off there would
leave them waiting, so it breaks off only the wait. The step comes to its end in all ranks, nobody asks for what came of
it, and the next one begins after it.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

T = TypeVar("T")
LOOK_SECONDS = 0.5


class StepThread:
    """Does one thing after the other. It ends with the process, if nobody ends it."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="rank 0", daemon=True)
        self._thread.start()

    def do(self, work: Callable[[], T], check: Callable[[], None]) -> T:
        """What `work` returns, or raises. check: is called now and then meanwhile, and ends the wait if it raises.

        Broken off, it waits all the same if work has begun, since the caller's lists are in use. Broken off once more
        it leaves.
        """
        job: Future[T] = Future()
        try:
            self._jobs.put((job, work))
            self._wait(job, check)
        except BaseException:
            if not job.cancel():
                self._wait(job, check)
            raise
        return job.result()

    def end(self) -> None:
        """Nothing is done any more after what is being done."""
        self._jobs.put(None)

    def _wait(self, job: Future, check: Callable[[], None]) -> None:
        while not job.done():
            check()
            wait([job], LOOK_SECONDS)

    def _run(self) -> None:
        while (given := self._jobs.get()) is not None:
            job, work = given
            if job.set_running_or_notify_cancel():
                try:
                    job.set_result(work())
                except BaseException as error:
                    job.set_exception(error)
            del given, job, work  # or the last plan would stay until the next one comes
