"""chapters/source/build.py as a module: a script beside the chapters, and not a part of the package."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

spec = importlib.util.spec_from_file_location("build", ROOT / "chapters" / "source" / "build.py")
build = importlib.util.module_from_spec(spec)
sys.modules["build"] = build  # dataclasses look their module up
spec.loader.exec_module(build)
