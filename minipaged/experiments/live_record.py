"""The live comparison to look at: each system once more with a trace, and pages in which two of them are replayed.

Keeping a trace costs time between steps, so nothing of this is measured: it comes after all that is, with an engine of
its own for each system.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from minipaged.experiments.live import LiveSettings, Progress, load, scaled_jobs
from minipaged.experiments.live_client import Client
from minipaged.experiments.live_systems import SYSTEMS
from minipaged.experiments.loads import Job
from minipaged.llm import LLM
from minipaged.viewer.page import write_page
from minipaged.viewer.trace import TraceWriter, header_of

TITLES = {"static": "static batches", "contiguous": "contiguous memory", "paged": "paged memory"}
LESSONS = {
    "static": "A batch is padded alike and ends together; who comes meanwhile waits outside.",
    "contiguous": "Each request reserves the longest that it may become, in one piece, most of which stays empty.",
    "paged": "Each request has the blocks that its tokens fill, and at most one that is not full.",
}


def record(settings: LiveSettings, page: Path, progress: Progress) -> list[Path]:
    """Every system answers all requests at once; each other one is shown beside paged. Returns the pages.

    The first stands at `page`, that of contiguous memory if it is among the systems; of others at NAME-system.html.
    """
    given = scaled_jobs(settings, math.inf)
    with TemporaryDirectory() as folder:
        traces = {}
        for done, name in enumerate(settings.systems):
            progress(f"recording, not measured: {name}", done / len(settings.systems))
            llm, random = load(settings), Random(settings.seed)
            prompts = [[random.randrange(llm.config.vocab_size) for _ in range(job.prompt)] for job in given]
            traces[name] = Path(folder, f"{name}.jsonl")
            lesson = f"{LESSONS[name.split('-')[0]]} (Prompts are random tokens.)"
            record_one(llm, name, given, prompts, settings.max_model_len, traces[name], lesson=lesson)
        return _write(traces, page)


def record_one(
    llm: LLM, system: str, jobs: Sequence[Job], prompts: Sequence[list[int]], max_model_len: int, trace: Path,
    **header: Any,
) -> None:  # fmt: skip
    """One system answers them, into a trace. header: what it should say besides."""
    memory = system.split("-")[0]  # whatever it reserves
    with open(trace, "w", encoding="utf-8") as file:

        def watch(llm: LLM) -> TraceWriter:
            settings = {**header_of(llm)["settings"], "memory": memory}
            told = {"title": TITLES[memory], "lesson": LESSONS[memory], "settings": settings, **header}
            return TraceWriter.of(llm, file, **told)

        Client(llm, SYSTEMS[system], jobs, prompts, max_model_len, watch=watch).run()


def _write(traces: dict[str, Path], page: Path) -> list[Path]:
    others = sorted((name for name in traces if name != "paged"), key=lambda name: name != "contiguous") or ["paged"]
    pages = [page, *(page.with_stem(f"{page.stem}-{name}") for name in others[1:])]
    for name, path in zip(others, pages, strict=True):
        write_page([traces[one] for one in dict.fromkeys((name, "paged")) if one in traces], path)
    return pages
