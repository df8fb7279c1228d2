"""A trace as Chrome's trace events, which ui.perfetto.dev and chrome://tracing draw."""

from pathlib import Path


def write_perfetto(trace: str | Path, path: Path) -> None:
    raise NotImplementedError
