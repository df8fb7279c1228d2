"""The trace of a run as JSON lines, and its redrawing (the command is minipaged/trace.py).

The first line is the header. Then one line for each step: its plan, what came of it, the memory after it (all
page tables and the account, see `Snapshot`), and the events in words. Nothing else is needed to draw the run
again, block by block.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.text import Text

from minipaged.terminal.draw import picture
from minipaged.terminal.snapshot import Observer, Snapshot

if TYPE_CHECKING:  # reading a trace must not load PyTorch
    from minipaged.llm import LLM
    from minipaged.scheduling.plan import StepOutput, StepPlan

FORMAT, VERSION = "minipaged trace", 1


class TraceError(ValueError):
    """A file that is no trace, or a trace that could not be written; the message says where."""


class TraceWriter:
    """Writes a line after each step: an observer of the engine."""

    def __init__(self, llm: "LLM", file: IO[str]):
        self._file, self._observer = file, Observer(llm)
        usage = llm.memory.usage()
        self._write(
            {
                "format": FORMAT,
                "version": VERSION,
                "model": llm.model_name,
                "block_size": usage.block_size,
                "num_blocks": usage.num_blocks,
                "num_cpu_blocks": usage.cpu_total,
                "block_bytes": llm.block_bytes,
                "max_model_len": llm.max_model_len,
            }
        )

    def __call__(self, plan: "StepPlan", output: "StepOutput") -> None:
        events = self._observer.follow(plan, output)
        memory = self._observer.snapshot().to_json()
        step = {"step": plan.step, "plan": plan.to_json(), "output": output.to_json()}
        self._write({**step, "memory": memory, "events": events})

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
            self._file.flush()
        except OSError as error:
            raise TraceError(f"cannot write the trace {self._file.name}: {error}") from error


@dataclass(frozen=True)
class TraceStep:
    """One line of a trace. plan and output are as `StepPlan.to_json` and `StepOutput.to_json` gave them."""

    step: int
    plan: dict[str, Any]
    output: dict[str, Any]
    memory: Snapshot
    events: list[str]


def read_trace(path: str | Path) -> tuple[dict[str, Any], Iterator[TraceStep]]:
    """The header and the steps, which are read one by one. TraceError if the file is not a trace.

    A last line that was cut off, because the writer was killed, is left out.
    """
    try:
        lines = _lines(path)
        header = next(lines, None)
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"cannot read {path}: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise TraceError(f"{path} is not a trace: its first line must be a header that --trace wrote")
    if header.get("version") != VERSION:
        raise TraceError(f"{path} is a trace of version {header.get('version')}, this program reads {VERSION}")
    return header, _steps(path, lines)


def _lines(path: str | Path) -> Iterator[Any]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                if line.endswith("\n"):
                    raise TraceError(f"{path}, line {number}: not JSON: {error}") from None


def _steps(path: str | Path, lines: Iterator[Any]) -> Iterator[TraceStep]:
    for number, line in enumerate(lines, 2):
        try:
            yield TraceStep(**{**line, "memory": Snapshot.from_json(line["memory"])})
        except (TypeError, KeyError) as error:
            raise TraceError(f"{path}, line {number}: not a step of a trace: {error!r}") from None


def drawn(header: dict[str, Any], step: TraceStep) -> Text:
    title = f"{header['model']}, step {step.step}"
    return picture(step.memory, title, [*step.events, ""], width=80)


def in_words(step: TraceStep) -> str:
    usage = step.memory.usage
    tokens = sum(len(one["token_ids"]) + one.get("num_to_draft", 0) for one in step.plan["sequences"])
    counts = f"{tokens:5} tokens, {usage.used:5} blocks in use, {usage.shared:4} shared"
    return f"step {step.step:5}: {counts}  {'; '.join(step.events)}"
