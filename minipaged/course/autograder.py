"""What two other systems need to grade with this one: a zip for Gradescope, a workflow for GitHub Classroom."""

import io
import re
import zipfile
from pathlib import Path

from minipaged.course.assignment import Assignment
from minipaged.course.submission import PACKAGES, ROOT

SETUP = """\
#!/usr/bin/env bash
# Runs once, when Gradescope builds the image.
set -euo pipefail
apt-get update && apt-get install -y --no-install-recommends python3.11 python3.11-venv
python3.11 -m venv /autograder/venv
/autograder/venv/bin/pip install --quiet {packages}
"""
RUN = """\
#!/usr/bin/env bash
# Runs for each submission. The points are made by the grader's own process; a student's code never runs in it.
set -uo pipefail
chmod -R go-rwx /autograder/source
cd /autograder/source
/autograder/venv/bin/python -m minipaged.course grade /autograder/submission --assignment {number} \\
  --seed-file seed --jobs 1 --out /tmp/grades --gradescope /autograder/results/results.json
"""
WORKFLOW = """\
# For GitHub Classroom: assignment {number}. Keep the secret COURSE_SEED in the organisation, and this file protected.
name: Autograding
on: [push, workflow_dispatch]
permissions:
  checks: write
  actions: read
  contents: read
jobs:
  grade:
    runs-on: ubuntu-24.04
    timeout-minutes: 20
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: "3.11"
      - name: Set up the grader
        run: |
          git clone --depth 1 "${{{{ vars.COURSE_REPOSITORY }}}}" "$HOME/minipaged"
          pip install --quiet {packages}
      - name: Grade once
        run: |
          cd "$HOME/minipaged"
          python -m minipaged.course grade "$GITHUB_WORKSPACE" --assignment {number} \\
            --seed "$COURSE_SEED" --out "$HOME/grades"
        env:
          COURSE_SEED: ${{{{ secrets.COURSE_SEED }}}}
{steps}      - name: Report
        uses: classroom-resources/autograding-grading-reporter@v1
        env:
{results}        with:
          runners: {runners}
"""
STEP = """\
      - name: {name}
        id: {id}
        uses: classroom-resources/autograding-command-grader@v1
        with:
          test-name: {name}
          command: |
            grep -qx "{name}: {points} of {points} points" "$HOME"/grades/*/points.txt
          timeout: 1
          max-score: {points}
"""


def needed(assignment: Assignment) -> str:
    """Packages that grading this assignment needs, of the versions that the requirements name; for a shell."""
    names = {"rich", *assignment.imports, *(["numpy"] if "torch" in assignment.imports else [])}
    found = re.findall(r"^([a-z]+)([=<>.\d]*)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), flags=re.M)
    return " ".join(f"'{name}{version}'" for name, version in found if name in names)


def gradescope(assignment: Assignment, seed: str) -> bytes:
    """A zip to be uploaded as the assignment's autograder. The package, and the seed, are in it: keep it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:

        def put(name: str, data: bytes, mode: int = 0o644) -> None:
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))  # the same bytes every time
            entry.external_attr, entry.compress_type = (0o100000 | mode) << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)

        put("setup.sh", SETUP.format(packages=needed(assignment)).encode(), 0o755)
        put("run_autograder", RUN.format(number=assignment.number).encode(), 0o755)
        put("seed", seed.encode(), 0o600)
        put("requirements.txt", (ROOT / "requirements.txt").read_bytes())
        for path in package_files():
            put(path.relative_to(ROOT).as_posix(), path.read_bytes())
    return out.getvalue()


def package_files() -> list[Path]:
    """All that is needed of the package, sorted."""
    found = [path for package in PACKAGES for path in (ROOT / package).rglob("*")]
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)


def classroom(assignment: Assignment) -> str:
    """A workflow file, .github/workflows/classroom.yml. The seed is a secret of the organisation, not in it."""
    ids = [f"part{number}" for number, _ in enumerate(assignment.parts, 1)]
    steps = [
        STEP.format(id=one, name=part.name, points=part.points) for one, part in zip(ids, assignment.parts, strict=True)
    ]
    results = [f"          {one.upper()}_RESULTS: ${{{{ steps.{one}.outputs.result }}}}\n" for one in ids]
    return WORKFLOW.format(
        number=assignment.number, packages=needed(assignment),
        steps="".join(steps), results="".join(results), runners=",".join(ids),
    )  # fmt: skip
