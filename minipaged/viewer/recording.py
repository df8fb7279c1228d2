"""A run that is kept while it goes on: as a trace, as a page, or as both."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from minipaged.terminal.command import BadInput
from minipaged.viewer.page import write_page
from minipaged.viewer.trace import TraceWriter

if TYPE_CHECKING:
    from minipaged.llm import LLM
    from minipaged.scheduling.plan import StepOutput, StepPlan


class Recorder:
    """Writes the trace of one engine, from when it is told to follow it. num_steps: that are in the file."""

    def __init__(self, file: IO[str]):
        self._file, self.num_steps = file, 0

    def follow(self, llm: LLM) -> None:
        """From now on; what the file held before is gone."""
        with contextlib.suppress(OSError):  # a pipe has nothing to be removed
            self._file.truncate(0)
        self._write = TraceWriter.of(llm, self._file)
        llm.observers.append(self)

    def __call__(self, plan: StepPlan, output: StepOutput) -> None:
        self._write(plan, output)
        self.num_steps += 1


@contextlib.contextmanager
def recording(trace: str | None, page: str | None) -> Iterator[Recorder]:
    """Opens what a run is kept in, at least one of the two; the page is made at the end, also if the run is broken off.

    BadInput if one can't be written, before anything runs. What they held is kept until there is something to write.
    """
    if page is None:
        with _open("trace", trace or "") as file:
            yield Recorder(file)
        return
    check_page(page)
    with tempfile.TemporaryDirectory() as folder:
        kept = trace or str(Path(folder, f"{Path(page).stem}.jsonl"))
        refusal = BadInput(f"--html {page} is made of the trace {kept}: that must be another file, and no pipe")
        if Path(kept).resolve() == Path(page).resolve():
            raise refusal
        with _open("trace", kept) as file:
            if not Path(kept).is_file():
                raise refusal
            recorder = Recorder(file)
            try:
                yield recorder
            finally:
                if recorder.num_steps:
                    write_page([kept], Path(page))


def check_page(page: str) -> None:
    """BadInput if it can't be written. No empty file is left, however the program ends before there is a page."""
    new = not Path(page).exists()
    _open("page", page).close()
    if new:
        Path(page).resolve().unlink()


def _open(what: str, path: str) -> IO[str]:
    try:
        return open(path, "a", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot write the {what} {path}: {error.strerror}") from None
