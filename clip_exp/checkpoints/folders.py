"""Checkpoint folders: written atomically, verified against a manifest when read, and found by name.

A checkpoint is written to a temporary folder, with a manifest of sizes and hashes that is written last. The folder is renamed when all
of it has reached the disk. A folder without a valid manifest is not a checkpoint. There is no file that points to the newest checkpoint:
the folders are listed. Damaged checkpoints are renamed. Whatever a damaged file contains, the result is a reason, not a traceback.
"""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from safetensors import SafetensorError

from clip_exp.errors import CheckpointError
from clip_exp.storage import (
    REPLACED,
    SEAL,
    TEMPORARY,
    atomic_folder,
    file_sha256,
    read_json_object,
    sealed,
    system_error,
)

log = logging.getLogger(__name__)
FOLDER = "checkpoints"  # subfolder of a run folder
NAME = re.compile(r"step-[0-9]+", re.ASCII)
# Name of a checkpoint, including renamed ones (`damaged-step-000060`) and ones being replaced (`.writing-step-000060-<id>.old`).
STEP = re.compile(r"step-([0-9]+)(?:-[0-9a-f]+\.old)?$", re.ASCII)
MANIFEST = "manifest.json"
WEIGHTS, EMA_WEIGHTS = "model.safetensors", "ema.safetensors"
STATE, TENSORS = "state.json", "state.safetensors"
RUN_COPY = "run_copy.json"  # copy of the run's `run.json` and `config.yaml`, to restore them from

SHA256 = re.compile(r"[0-9a-f]{64}")


def folder_of(run_dir: Path | str, step: int) -> Path:
    """Return the path of the checkpoint of a step: `<run>/checkpoints/step-000060`."""
    return Path(run_dir) / FOLDER / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """Return the number of completed optimizer steps, from the name of a checkpoint folder."""
    match = STEP.search(checkpoint.name)
    if match is None:
        raise CheckpointError(f"{checkpoint} is not a checkpoint: expected a folder named step-<number>.")
    return int(match.group(1))


@contextmanager
def atomic_checkpoint(target: Path, metadata: dict[str, Any], size: int = 0) -> Iterator[Path]:
    """Yield a temporary folder to fill; on exit, add a manifest that contains `metadata`, and rename the folder to `target`.

    An existing `target` is replaced. After an exception nothing is left behind.

    Args:
        target: path of the checkpoint.
        metadata: values for the manifest.
        size: known size of the files in bytes. If less is free, nothing is written.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    try:
        free = _free(target)
        if free is not None and free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with atomic_folder(target) as folder:
            yield folder
            files = {
                path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)}
                for path in sorted(folder.iterdir())
            }
            manifest = json.dumps(sealed({**metadata, "files": files}), indent=2)
            (folder / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        problem = system_error(error)
        if problem is None:
            raise
        free = _free(target)
        room = "" if free is None else f" It needs {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free."
        raise CheckpointError(
            f"cannot write the checkpoint {target}: {problem.strerror or problem}.{room} Earlier checkpoints are untouched."
        ) from error


def _free(target: Path) -> int | None:
    """Return the free bytes on the file system of a future folder; None if the file system does not report them."""
    try:
        usage = shutil.disk_usage(next(path for path in target.parents if path.exists()))
    except OSError:
        return None
    return usage.free if usage.total else None  # some network file systems report zero for everything


class Entry(NamedTuple):
    """Size and hash of a file of a checkpoint, from when it was written."""

    size: int  # bytes
    sha256: str


class Manifest(NamedTuple):
    """Contents of a checkpoint's manifest."""

    step: int  # completed optimizer steps
    files: dict[str, Entry]
    best: bool  # whether it was the best by the run's `monitor` when it was written
    metrics: dict[str, Any]  # metrics of its step


def read_manifest(checkpoint: Path) -> Manifest:
    """Read and check the manifest of a checkpoint; raise a CheckpointError that describes the problem if it is damaged.

    Manifests of older versions do not contain a hash of themselves.
    """
    try:
        values = read_json_object(checkpoint / MANIFEST)
        manifest = _parse(values)
        if SEAL not in values and RUN_COPY in manifest.files:
            raise ValueError("its hash is missing")
        # A copy outside of a run folder may have any name.
        if STEP.search(checkpoint.name) and manifest.step != step_of(checkpoint):
            raise ValueError(f"it is of step {manifest.step}")
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{MANIFEST} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{MANIFEST} is damaged: {error}") from error
    return manifest


def damage(checkpoint: Path) -> str | None:
    """Return a description of the damage of a checkpoint; None if all files match the manifest."""
    try:
        manifest = read_manifest(checkpoint)
        if (checkpoint / EMA_WEIGHTS).exists() and EMA_WEIGHTS not in manifest.files:
            return f"{EMA_WEIGHTS} is not in {MANIFEST}"
        for name, entry in manifest.files.items():
            if problem := changed(checkpoint / name, entry):
                return f"{name} {problem}"
        if (step := read_json_object(checkpoint / STATE).get("global_step")) != manifest.step:
            return f"{STATE} is of step {step}"
    except CheckpointError as error:
        return str(error)
    except ValueError as error:
        return f"{STATE} is damaged: {error}"
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    return None


def changed(path: Path, entry: Entry) -> str | None:
    """Return how a file differs from its entry in the manifest; None if it does not differ."""
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != entry.size:
        return f"has {path.stat().st_size} bytes instead of {entry.size}"
    return "was changed after it was written" if file_sha256(path) != entry.sha256 else None


def _parse(values: dict[str, Any]) -> Manifest:
    """Check the values of a manifest and return them; raise a ValueError that describes the problem if one is wrong."""
    step, files, best, metrics = (values.get(key) for key in ("step", "files", "best", "metrics"))
    if not _is_count(step):
        raise ValueError("step must be a non-negative integer")
    if not isinstance(files, dict):
        raise ValueError("files must be a mapping")
    if missing := [name for name in (WEIGHTS, STATE, TENSORS) if name not in files]:
        raise ValueError(f"files does not list {', '.join(missing)}")
    entries = {}
    for name, entry in files.items():
        if "/" in name or "\0" in name or name in ("", ".", "..", MANIFEST):
            raise ValueError(f"files lists {name[:80]!r}, which is not a valid file name")
        size, sha256 = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if not _is_count(size) or not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
            raise ValueError(f"files has no valid size and hash for {name[:80]!r}")
        entries[name] = Entry(size, sha256)
    return Manifest(step, entries, best is True, metrics if isinstance(metrics, dict) else {})


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def checkpoints(run_dir: Path | str) -> list[Path]:
    """Return the run's checkpoint folders in order of their steps, including damaged ones.

    If the replacement of a checkpoint was interrupted, this is the old copy, until `recover` has moved it back.
    """
    found = {path.name: path for path in _entries(run_dir) if NAME.fullmatch(path.name) and path.is_dir()}
    replaced = {target.name: old for old, target in _replaced(run_dir)}
    return sorted((replaced | found).values(), key=step_of)


def manifests(run_dir: Path | str) -> dict[Path, Manifest]:
    """Return the run's checkpoints with their manifests, in order of their steps, without those whose manifest is damaged.

    The other files are not verified.
    """
    found = {}
    for checkpoint in checkpoints(run_dir):
        with suppress(CheckpointError):
            found[checkpoint] = read_manifest(checkpoint)
    return found


def was_saved(run_dir: Path | str) -> bool:
    """Return True if the run has a checkpoint, or the remains of one."""
    return any(STEP.search(path.name) and not path.name.startswith(TEMPORARY) for path in _entries(run_dir))


def latest(run_dir: Path | str) -> Path:
    """Return the run's newest undamaged checkpoint, or raise a CheckpointError."""
    damaged: list[tuple[Path, str]] = []
    for checkpoint in reversed(checkpoints(run_dir)):
        problem = damage(checkpoint)
        if problem is None:
            for name, reason in damaged:
                log.warning("%s is damaged (%s): using %s instead.", name, reason, checkpoint.name)
            return checkpoint
        damaged.append((checkpoint, problem))
    reasons = "".join(f"\n  {path.name}: {reason}" for path, reason in damaged)
    raise CheckpointError(f"{run_dir} has no usable checkpoint in {Path(run_dir) / FOLDER}.{reasons}")


def best(run_dir: Path | str) -> Path:
    """Return the newest undamaged checkpoint that was marked as best by the run's `monitor`, or else the newest one."""
    marked = [path for path, manifest in manifests(run_dir).items() if manifest.best]
    for checkpoint in reversed(marked):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        log.warning("%s, the best checkpoint, is damaged (%s): using another one instead.", checkpoint, problem)
    return latest(run_dir)


def recover(run_dir: Path | str) -> None:
    """Complete or remove what a killed process left behind. Only for the process that holds the lock of the run."""
    for old, target in list(_replaced(run_dir)):
        if not target.exists():
            _rename(old, target)
    for leftover in _entries(run_dir):
        if leftover.name.startswith(TEMPORARY):
            shutil.rmtree(leftover, ignore_errors=True)


def set_aside(run_dir: Path | str, damaged: Mapping[Path, str], after: int) -> None:
    """Rename damaged checkpoints to `damaged-…`, and others of steps after `after` to `superseded-…`.

    Only for the process that holds the lock of the run.
    """
    for checkpoint in checkpoints(run_dir):
        if checkpoint in damaged or step_of(checkpoint) > after:
            aside = checkpoint.with_name(f"{'damaged' if checkpoint in damaged else 'superseded'}-{checkpoint.name}")
            shutil.rmtree(aside, ignore_errors=True)
            _rename(checkpoint, aside)
            log.info("Renamed %s to %s.", checkpoint, aside.name)


def _rename(checkpoint: Path, target: Path) -> None:
    try:
        checkpoint.rename(target)
    except OSError as error:
        raise CheckpointError(
            f"{checkpoint} cannot be renamed to {target.name}: {error.strerror or error}. Free disk space or make the folder "
            "writable, and repeat the same command."
        ) from error


def _entries(run_dir: Path | str) -> list[Path]:
    folder = Path(run_dir) / FOLDER
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _replaced(run_dir: Path | str) -> Iterator[tuple[Path, Path]]:
    """Yield old copies of checkpoints whose replacement was interrupted, or is in progress, with their original paths."""
    for path in _entries(run_dir):
        if path.name.startswith(f"{TEMPORARY}step-") and path.name.endswith(REPLACED):
            target = path.with_name(path.name.removeprefix(TEMPORARY).rpartition("-")[0])
            if NAME.fullmatch(target.name):
                yield path, target
