"""The gallery: short runs of the real model, each a lesson in a sentence, as pages that replay them.

    python -m minipaged.experiments gallery --out chapters/gallery --pictures

records them all anew (gallery_runs.py says what). `--redraw` records nothing: it takes the runs out of the pages that
are there, and makes the pages, the pictures and the index again, with what the page's parts are today.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from minipaged.experiments.gallery_pictures import browser, picture
from minipaged.experiments.gallery_runs import PAGED, RUNS, STORY, Run
from minipaged.experiments.live_record import record_one
from minipaged.llm import LLM
from minipaged.viewer.page import page_of, run_of, runs_in
from minipaged.viewer.trace import TraceWriter, read_trace

Progress = Callable[[int, int, str], None]


def make(folder: Path, pictures: bool, redraw: bool, progress: Progress) -> list[Path]:
    """The pages, their index, and if wanted their pictures. ValueError if there is no browser, or nothing to redraw.

    All is recorded before anything is written.
    """
    with browser() if pictures else nullcontext() as chromium:
        runs = {}
        for number, run in enumerate(RUNS):
            progress(number, 2 * len(RUNS), f"gallery, {run.name}")
            runs[run.name] = data_of(folder / f"{run.name}.html") if redraw else recorded(run)
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / "README.md"]
        files[0].write_text(index(), encoding="utf-8")
        for number, run in enumerate(RUNS, len(RUNS)):
            progress(number, 2 * len(RUNS), f"gallery, {run.name}")
            files.append(folder / f"{run.name}.html")
            files[-1].write_text(page_of(runs[run.name]), encoding="utf-8")
            if pictures:
                files.append(picture(chromium, files[-1], run.height))
    return files


def recorded(run: Run) -> list[dict[str, Any]]:
    """It is computed, and what a page knows of it is returned: one run, or two that stand beside each other."""
    with TemporaryDirectory() as folder:
        trace, header = Path(folder, f"{run.name}.jsonl"), {"title": run.title, "lesson": run.lesson}
        traces = serve(run, trace, header) if run.jobs else answer(run, trace, header)
        best = max(list(read_trace(trace)[1]), key=run.shown)
        data = [run_of(trace) for trace in traces]
        data[0]["header"]["open_at"] = best.step
        return data


def answer(run: Run, trace: Path, header: dict[str, Any]) -> list[Path]:
    """Asks when it is time, until all is answered."""
    llm = engine(run)
    left, step = sorted(run.asks, key=lambda ask: ask.after), 0
    with open(trace, "w", encoding="utf-8") as file:
        llm.observers.append(TraceWriter.of(llm, file, **header))
        while left or llm.has_unfinished_requests:
            while left and left[0].after <= step:
                ask = left.pop(0)
                llm.add_request([{"role": "user", "content": ask.message}], ask.params)
            llm.step()
            step += 1
    return [trace]


def serve(run: Run, trace: Path, header: dict[str, Any]) -> list[Path]:
    """Of contiguous memory, and of paged memory beside it. The prompts are one text, cut where they are long enough."""
    longest, paged = max(sum(job[1:]) - 1 for job in run.jobs), trace.with_stem(f"{trace.stem}-paged")
    systems = (("contiguous-oracle", trace, header), ("paged", paged, {"lesson": PAGED}))
    for system, path, told in systems:
        llm = engine(run)
        text = llm.tokenizer.encode(STORY * 4)
        record_one(llm, system, run.jobs, [text[: job.prompt] for job in run.jobs], longest, path, **told)
    return [trace, paged]


def engine(run: Run) -> LLM:
    """The same everywhere, so that everyone who records gets the same tokens."""
    return LLM("smollm2", dtype="fp32", device="cpu", **run.options)


def data_of(page: Path) -> list[dict[str, Any]]:
    """The runs that a page was made of. ValueError if it is none."""
    try:
        return runs_in(page.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {page}: {error.strerror}; without --redraw it is recorded") from None
    except ValueError:
        raise ValueError(f"{page} is no page of a run; without --redraw it is recorded anew") from None


def index() -> str:
    """The gallery's own page, in Markdown."""
    entries = [f"## {run.title}\n\n{run.lesson} [Chapter {int(run.chapter[:2])}](../{run.chapter}.ipynb) builds it.\n\n"
               f"[![{run.title}: {run.lesson}]({run.name}.png)]({run.name}.html)\n" for run in RUNS]  # fmt: skip
    return HEAD + "\n" + "\n".join(entries)


HEAD = """\
# The gallery

Six short runs of the real model, recorded. Each is one HTML file: open it in any browser, from the disk, and it
replays what the engine did, step by step. GitHub shows such a file as source, so take it from a clone, or by *Download
raw file*; a picture shows the step at which it opens. Times in them are those of the machine that recorded them.

Your own runs look the same: `python -m minipaged.generate "Why is the sky blue?" --n 3 --html run.html`.
"""
