"""Finding checkpoints: the folders themselves are the truth, no pointer is followed, and a damaged one is set aside by name."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from clip_exp.checkpoints.writer import MANIFEST
from clip_exp.errors import CheckpointError
from clip_exp.storage import REPLACED, TEMPORARY, file_sha256

log = logging.getLogger(__name__)
STEP = re.compile(r"step-(\d+)$")


def folder_of(run_dir: Path | str, step: int) -> Path:
    """Where the checkpoint of a step is: `<run>/checkpoints/step-000060`."""
    return Path(run_dir) / "checkpoints" / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The number of completed optimizer steps that a checkpoint folder's name gives."""
    match = STEP.search(checkpoint.name)
    if match is None:
        raise CheckpointError(f"{checkpoint} is not a checkpoint: expected a folder named step-<number>.")
    return int(match.group(1))


def checkpoints(run_dir: Path | str) -> list[Path]:
    """The run's checkpoint folders that carry a manifest, by step."""
    found = (Path(run_dir) / "checkpoints").glob("step-*")
    return sorted((path for path in found if STEP.search(path.name) and (path / MANIFEST).is_file()), key=step_of)


def manifest(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's manifest says: step, metrics, files."""
    try:
        return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{checkpoint} has no readable manifest: {error}.") from error


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, compared with its manifest; None if every file is as it was written."""
    try:
        files = manifest(checkpoint)["files"]
    except (CheckpointError, KeyError) as error:
        return f"no readable manifest ({error})"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
        if file_sha256(path) != expected["sha256"]:
            return f"{name} was changed after it was written"
    return None


def latest(run_dir: Path | str) -> Path:
    """The run's newest undamaged checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    for checkpoint in reversed(checkpoints(run_dir)):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        log.warning("%s is damaged (%s): the one before it is used.", checkpoint, problem)
    raise CheckpointError(f"{run_dir} has no usable checkpoint in {Path(run_dir) / 'checkpoints'}.")


def best(run_dir: Path | str) -> Path:
    """The checkpoint that was best in the run's `monitor`; the newest where none was marked."""
    marked = [path for path in checkpoints(run_dir) if manifest(path).get("best")]
    for checkpoint in reversed(marked):
        if damage(checkpoint) is None:
            return checkpoint
    return latest(run_dir)


def clean(run_dir: Path | str, after: int | None = None) -> None:
    """Only by the run's owner: set damaged checkpoints aside as `damaged-…`, finish or remove what a killed writer left.

    Args:
        after: checkpoints of later steps are set aside too, as `superseded-…`: the run goes on from this one.
    """
    folder = Path(run_dir) / "checkpoints"
    for old in folder.glob(f"{TEMPORARY}step-*{REPLACED}"):
        target = folder / old.name.removeprefix(TEMPORARY).rpartition("-")[0]
        if not target.exists() and damage(old) is None:
            old.rename(target)
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for checkpoint in checkpoints(run_dir):
        problem = damage(checkpoint)
        if problem is not None:
            log.warning("%s is damaged (%s) and was set aside.", checkpoint, problem)
            _set_aside(checkpoint, "damaged")
        elif after is not None and step_of(checkpoint) > after:
            _set_aside(checkpoint, "superseded")


def _set_aside(checkpoint: Path, why: str) -> None:
    aside = checkpoint.with_name(f"{why}-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
