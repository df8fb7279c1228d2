"""The trace of a run: a file of JSON lines from which it can be drawn again. TRACE.md says what stands in it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import NoneType
from typing import IO, TYPE_CHECKING, Any

from minipaged.terminal.snapshot import Snapshot
from minipaged.viewer.old_trace import new_step
from minipaged.viewer.state import Eye, State, Watched, apply_patch, merge_patch, snapshot_of
from minipaged.viewer.words import Words

if TYPE_CHECKING:  # reading a trace must not load PyTorch
    from minipaged.engine import LLMEngine
    from minipaged.llm import LLM
    from minipaged.scheduling.plan import StepOutput, StepPlan

FORMAT, VERSION = "minipaged trace", 2


class TraceError(ValueError):
    """A file that is no trace, or a trace that could not be written; the message says where."""


def header_of(llm: LLMEngine) -> State:
    """What is the same in all steps of a run."""
    scheduler, speculation = llm.scheduler, llm.scheduler.speculation
    return {
        "model": llm.model_name,
        "block_bytes": llm.block_bytes,
        "max_model_len": llm.max_model_len,
        "settings": {
            "memory": "paged",
            "prefix_cache": llm.prefix_cache,
            "schedule": scheduler.admission.schedule,
            "preemption": scheduler.preemption,
            "chunked_prefill": scheduler.chunked_prefill,
            "max_num_seqs": scheduler.max_num_seqs,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "speculation": speculation is not None,
        },
    }


class TraceWriter:
    """Writes a line after each step: an observer of the engine.

    header: what is the same in all steps; for an LLM see `header_of`.
    decode: the text of tokens; None: the trace has no texts.
    seconds: how long the last step took; None: as long as has passed since the one before.
    """

    def __init__(
        self, engine: Watched, file: IO[str], header: State, decode: Callable[[list[int]], str] | None = None,
        seconds: Callable[[], float] | None = None, clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self._engine, self._file, self._clock, self._seconds = engine, file, clock, seconds
        self._eye = Eye(engine)
        self._words = Words(engine, decode) if decode else None
        self._state: State = {}
        self._began = clock()
        usage = engine.memory.usage()
        sizes = {"block_size": usage.block_size, "num_blocks": usage.num_blocks, "num_cpu_blocks": usage.cpu_total}
        self._write({"format": FORMAT, "version": VERSION, **sizes, **header})

    @classmethod
    def of(cls, llm: LLM, file: IO[str], **header: Any) -> TraceWriter:
        """Of a whole engine, with texts. header: what it should say besides."""
        decode = partial(llm.tokenizer.decode, skip_special_tokens=False)
        return cls(llm, file, {**header_of(llm), **header}, decode, _Spent(llm))

    def __call__(self, plan: StepPlan, output: StepOutput) -> None:
        now = self._clock() - self._began
        eye, before = self._eye, self._state
        eye.follow(plan, output)
        self._state = eye.state()
        took = {"seconds": round(self._seconds(), 6)} if self._seconds else {}
        line = {"step": plan.step, "time": round(now, 6), **took, "did": eye.did(plan, output)}
        line["arrived"] = {name: round(then - self._began, 6) for name, then in eye.arrivals().items()}
        if self._words:
            line |= {"words": self._words.news(eye.observer), "texts": self._words.blocks(plan, output, eye.known)}
        line |= {"patch": merge_patch(before, self._state), "events": eye.events}
        self._write({name: value for name, value in line.items() if value or name in ("step", "time", "patch")})

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(as_json(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise TraceError(f"cannot write the trace {self._file.name}: {error}") from error


class _Spent:
    """Seconds that an engine spent on steps since it was asked last."""

    def __init__(self, llm: LLM):
        self._llm, self._before = llm, 0.0
        self()

    def __call__(self) -> float:
        now = sum(vars(self._llm.executor.times).values())
        spent, self._before = now - self._before, now
        return spent


@dataclass(frozen=True)
class TraceStep:
    """One step, and the moment after it. See TRACE.md for `did`, `words`, `texts` and `state`.

    time: seconds from the beginning of the trace to the end of the step; seconds: that it took. None: not known.
    arrived: requests that are new, and when they came, in seconds from the beginning of the trace.
    """

    step: int
    state: State
    time: float | None = None
    seconds: float | None = None
    did: State = field(default_factory=dict)
    arrived: dict[str, float] = field(default_factory=dict)
    words: State = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)

    @property
    def memory(self) -> Snapshot:
        return snapshot_of(self.state)


Watch = Callable[[float], None]  # is told, after each line, which share of a file was read


def unwatched(share: float) -> None:
    pass


def read_trace(path: str | Path, watch: Watch = unwatched) -> tuple[State, Iterator[TraceStep]]:
    """The header and the steps, which are read one by one. TraceError if the file is not a trace.

    A last line that was cut off, because the writer was killed, is left out. Of version 1 there is no more than it had.
    """
    return read_lines(_lines(path, watch), str(path))


def read_lines(lines: Iterator[str], where: str) -> tuple[State, Iterator[TraceStep]]:
    """The same, of lines. where: what errors call them."""
    parsed = _parsed(lines, where)
    header = next(parsed, None)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise TraceError(f"{where} is not a trace: its first line must be a header that --trace wrote")
    if header.get("version") not in (1, VERSION):
        raise TraceError(f"{where} is a trace of version {header.get('version')}, this program reads 1 and {VERSION}")
    if lacking := [name for name in ("model", "block_size", "num_blocks") if name not in header]:
        raise TraceError(f"{where} is not a trace: its header says no {lacking[0]}")
    return header, _steps(where, parsed, header["version"])


def _lines(path: str | Path, watch: Watch) -> Iterator[str]:
    try:
        with open(path, "rb") as file:
            size, read = max(1, os.fstat(file.fileno()).st_size), 0
            for line in file:
                read += len(line)
                yield line.decode("utf-8")
                watch(read / size)
    except OSError as error:
        raise TraceError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TraceError(f"{path} is not a trace: it is no text in UTF-8") from None


def _parsed(lines: Iterator[str], where: str) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            if number == 1:
                raise TraceError(f"{where} is not a trace: its first line is not JSON: {error}") from None
            if line.endswith("\n"):
                raise TraceError(f"{where}, line {number}: not JSON: {error}") from None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


def _steps(where: str, lines: Iterator[Any], version: int) -> Iterator[TraceStep]:
    state: State = {}
    names = {one.name for one in fields(TraceStep)}
    for number, line in enumerate(lines, 2):
        try:
            line = new_step(line, state) if version == 1 else line
            state = apply_patch(state, line["patch"])
            step = TraceStep(state=state, **{name: value for name, value in line.items() if name in names - {"state"}})
            _check(step)
        except (TypeError, KeyError, AttributeError) as error:
            raise TraceError(f"{where}, line {number}: not a step of a trace: {error!r}") from None
        yield step


def _check(step: TraceStep) -> None:
    """TypeError or KeyError if something is not what it should be."""
    snapshot_of(step.state)
    number = int, float, NoneType
    kinds: dict[str, Any] = {"step": int, "time": number, "seconds": number, "events": list}
    for name, value in vars(step).items():
        if not isinstance(value, kinds.get(name, dict)):
            raise TypeError(f"{name} can't be {value!r:.40}")
    if not all(isinstance(event, str) for event in step.events):
        raise TypeError("events are sentences")


def as_json(value: Any) -> str:
    """On one line, letters as they are; a half of a surrogate pair, which no file may have, as JSON has it."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()


def write(path: Path, what: str, text: str) -> None:
    """TraceError if it can't be."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TraceError(f"cannot write {what} {path}: {error.strerror}") from None
