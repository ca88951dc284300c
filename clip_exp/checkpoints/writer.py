"""Writing a checkpoint so that it is either whole or absent, whenever the process or the machine dies.

Everything goes into a temporary sibling folder, is flushed to the disk, and is renamed into place after a manifest of sizes and
hashes was written last. What has no valid manifest is not a checkpoint.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clip_exp.errors import CheckpointError
from clip_exp.storage import sync

MANIFEST = "manifest.json"
WEIGHTS, EMA_WEIGHTS = "model.safetensors", "ema.safetensors"
TEMPORARY = ".writing-"


@contextmanager
def atomic_folder(target: Path, metadata: dict[str, Any]) -> Iterator[Path]:
    """Fill a temporary folder; on leaving, it becomes `target` with a manifest that carries `metadata`.

    An existing `target` is replaced. After an exception nothing is left behind.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    temporary = target.with_name(f"{TEMPORARY}{target.name}-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        _seal(temporary, metadata)
        put_in_place(temporary, target)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the checkpoint {target}: {error.strerror or error}. Earlier checkpoints are untouched; make room and run again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _seal(folder: Path, metadata: dict[str, Any]) -> None:
    files = {}
    let_others_read(folder)
    for path in sorted(folder.iterdir()):
        sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({**metadata, "files": files}, indent=2) + "\n", encoding="utf-8")
    sync(manifest)
    sync(folder)


def let_others_read(folder: Path) -> None:
    """Give the files of a folder the permissions that new ones have here: safetensors keeps its own for their owner."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(folder.stat().st_mode & 0o666)


def put_in_place(temporary: Path, target: Path) -> None:
    """Make a finished folder be `target`, in the place of one that is there."""
    if target.exists():
        old = target.with_name(f"{TEMPORARY}old-{target.name}-{os.getpid()}")
        target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(target)
    sync(target.parent)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
