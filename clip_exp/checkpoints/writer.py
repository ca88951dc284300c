"""Writing a checkpoint so that it is either whole or absent, whenever the process or the machine dies.

Everything goes into a temporary folder, with a manifest of sizes and hashes that is written last, and is renamed into place when all
of it has reached the disk. What has no valid manifest is not a checkpoint.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from clip_exp.errors import CheckpointError
from clip_exp.storage import atomic_folder, file_sha256, sealed, system_error

MANIFEST = "manifest.json"
WEIGHTS, EMA_WEIGHTS = "model.safetensors", "ema.safetensors"
STATE, TENSORS = "state.json", "state.safetensors"
RUN_COPY = "run_copy.json"  # of the run's `run.json` and `config.yaml`, from which they are restored


@contextmanager
def atomic_checkpoint(target: Path, metadata: dict[str, Any], size: int = 0) -> Iterator[Path]:
    """Fill a temporary folder; on leaving, it becomes `target` with a manifest that carries `metadata`.

    An existing `target` is replaced. After an exception nothing is left behind.

    Args:
        size: bytes of the files, as far as known; where less is free, nothing is written.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    try:
        _require_room(target, size)
        with atomic_folder(target) as folder:
            yield folder
            _write_manifest(folder, metadata)
    except (OSError, SafetensorError) as error:
        problem = system_error(error)
        if problem is None:
            raise
        free = _free(target)
        room = "" if free is None else f" It needs {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free."
        raise CheckpointError(
            f"cannot write the checkpoint {target}: {problem.strerror or problem}.{room} Earlier checkpoints are untouched."
        ) from error


def _require_room(target: Path, size: int) -> None:
    """Raises: OSError, as writing itself would."""
    free = _free(target)
    if free is not None and free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _free(target: Path) -> int | None:
    """Return the free bytes where a folder is to be; None where the file system does not report them."""
    try:
        usage = shutil.disk_usage(next(path for path in target.parents if path.exists()))
    except OSError:
        return None
    return usage.free if usage.total else None  # some network file systems report zero for everything


def _write_manifest(folder: Path, metadata: dict[str, Any]) -> None:
    files = {path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(folder.iterdir())}
    manifest = sealed({**metadata, "files": files})
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
