"""Where things are kept that were fetched, built or computed once."""

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """MINIPAGED_CACHE, else ``minipaged`` in the user's cache directory as the operating system has it."""
    if os.environ.get("MINIPAGED_CACHE"):
        return Path(os.environ["MINIPAGED_CACHE"]).expanduser()
    system = {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return Path(base or Path.home() / system) / "minipaged"
