"""What `python -m minipaged.course contest` does; its flags are in __main__.py."""

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from kernels.cpp_build import BuildFailed
from minipaged.course.contest.playing import ContestFailed, Round, Standing, contest, leaderboard
from minipaged.course.process import missing
from minipaged.models.config import ModelError
from minipaged.terminal.command import BadInput, CommandFailed

PUBLIC_SEED = "public"  # students' own


def play(args: argparse.Namespace, folders: dict[str, Path], seed: str) -> int:
    """One after the other, since each wants the machine for itself. If it breaks off, what was played is told."""
    why = missing()
    if why and seed != PUBLIC_SEED and not args.unlocked:
        raise BadInput(
            f"strangers' code can't be locked in here: {'; '.join(why)}.\n"
            "--unlocked runs it all the same: on a machine that has nothing to lose or to be read"
        )
    standings: list[Standing] = []
    try:
        with Console(stderr=True, highlight=False).status("") as status:
            for name, folder in folders.items():
                standing = contest(
                    folder, seed, args.rounds, args.model, locked=not why, threads=args.threads,
                    notice=partial(_notice, status, name),
                )  # fmt: skip
                standings.append(dataclasses.replace(standing, name=name))
    except (ContestFailed, BuildFailed, ModelError) as error:
        raise CommandFailed(str(error)) from None
    finally:
        if standings:
            _tell(standings, args.out)
    return 1 if any(not one.points for one in standings) else 0


def _notice(status: Status, name: str, line: str) -> None:
    """What is going on. Rounds stay on the screen."""
    if line.startswith("round"):
        status.console.print(f"{name}: {line}", soft_wrap=True, markup=False)
    status.update(escape(f"{name}: {line}"))


def _tell(standings: list[Standing], out: Path | None) -> None:
    console, rows = Console(highlight=False), leaderboard(standings)
    table = Table(box=None, pad_edge=False)
    for column in rows[0]:
        if column != "fault":
            table.add_column(column, justify="left" if column == "name" else "right")
    for row in rows:
        table.add_row(*(_cell(value) for key, value in row.items() if key != "fault"))
    console.print(table)
    print("more than 1 is better than the reference beside it; blocks are what the engine itself says")
    for one in standings:
        for fault in one.faults:
            print(f"{one.name}: {fault}", file=sys.stderr)
    if out is not None:
        out.write_text(as_json(standings), encoding="utf-8")


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def as_json(standings: list[Standing]) -> str:
    """The leaderboard, and the figures of all rounds."""
    rounds = {one.name: [_figures(played) for played in one.rounds] for one in standings}
    faults = {one.name: one.faults for one in standings if one.faults}
    return json.dumps({"leaderboard": leaderboard(standings), "faults": faults, "rounds": rounds}, indent=1) + "\n"


def _figures(played: Round) -> dict[str, Any]:
    found: dict[str, Any] = {"number": played.number, "ratios": played.ratios}
    for who, figures in (("yours", played.yours), ("reference", played.reference)):
        found[who] = {
            "tokens_per_second": figures.speed, "mean_first": figures.mean_first, "late_first": figures.late_first,
            "seconds": figures.seconds, "blocks": figures.blocks, "memory": figures.memory,
        }  # fmt: skip
    return found
