"""Writing a checkpoint so that it is either whole or absent, whenever the process or the machine dies.

Everything goes into a temporary folder, with a manifest of sizes and hashes that is written last, and is renamed into place when all
of it has reached the disk. What has no valid manifest is not a checkpoint.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clip_exp.errors import CheckpointError
from clip_exp.storage import atomic_folder, file_sha256, sealed

MANIFEST = "manifest.json"
WEIGHTS, EMA_WEIGHTS = "model.safetensors", "ema.safetensors"
STATE, TENSORS = "state.json", "state.safetensors"
RUN_COPY = "run_copy.json"  # of the run's `run.json` and `config.yaml`, from which they are restored


@contextmanager
def atomic_checkpoint(target: Path, metadata: dict[str, Any]) -> Iterator[Path]:
    """Fill a temporary folder; on leaving, it becomes `target` with a manifest that carries `metadata`.

    An existing `target` is replaced. After an exception nothing is left behind.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    try:
        with atomic_folder(target) as folder:
            yield folder
            _write_manifest(folder, metadata)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the checkpoint {target}: {error.strerror or error}. Earlier checkpoints are untouched; make room and run again."
        ) from error


def _write_manifest(folder: Path, metadata: dict[str, Any]) -> None:
    files = {path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(folder.iterdir())}
    manifest = sealed({**metadata, "files": files})
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
