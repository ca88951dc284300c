"""Finding checkpoints: the folders themselves are the truth, no pointer is followed, and a damaged one is set aside by name."""

import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from clip_exp.checkpoints.manifest import STEP, Manifest, damage, read_manifest, step_of
from clip_exp.errors import CheckpointError
from clip_exp.storage import REPLACED, TEMPORARY

__all__ = [
    "STEP", "best", "checkpoints", "damage", "folder_of", "latest", "manifests", "recover", "set_aside", "step_of", "was_saved",
]  # fmt: skip

log = logging.getLogger(__name__)
FOLDER = "checkpoints"  # in a run folder
NAME = re.compile(r"step-[0-9]+", re.ASCII)


def folder_of(run_dir: Path | str, step: int) -> Path:
    """Where the checkpoint of a step is: `<run>/checkpoints/step-000060`."""
    return Path(run_dir) / FOLDER / f"step-{step:06d}"


def checkpoints(run_dir: Path | str) -> list[Path]:
    """The run's checkpoint folders by step, damaged ones too.

    Of a checkpoint whose replacement was interrupted that is the old copy, until `recover` has put it back in its place.
    """
    found = {path.name: path for path in _entries(run_dir) if NAME.fullmatch(path.name) and path.is_dir()}
    replaced = {target.name: old for old, target in _replaced(run_dir)}
    return sorted((replaced | found).values(), key=step_of)


def manifests(run_dir: Path | str) -> dict[Path, Manifest]:
    """The run's checkpoints by step, without those whose manifest is damaged; their files are not looked at."""
    found = {}
    for checkpoint in checkpoints(run_dir):
        try:
            found[checkpoint] = read_manifest(checkpoint)
        except CheckpointError:
            continue
    return found


def was_saved(run_dir: Path | str) -> bool:
    """Whether the run has a checkpoint or what is left of one."""
    return any(STEP.search(path.name) and not path.name.startswith(TEMPORARY) for path in _entries(run_dir))


def latest(run_dir: Path | str) -> Path:
    """The run's newest undamaged checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    found = checkpoints(run_dir)
    damaged: list[tuple[Path, str]] = []
    for checkpoint in reversed(found):
        problem = damage(checkpoint)
        if problem is None:
            for name, reason in damaged:
                log.warning("%s is damaged (%s): %s is used instead.", name, reason, checkpoint.name)
            return checkpoint
        damaged.append((checkpoint, problem))
    reasons = "".join(f"\n  {path.name}: {reason}" for path, reason in damaged)
    raise CheckpointError(f"{run_dir} has no usable checkpoint in {Path(run_dir) / FOLDER}.{reasons}")


def best(run_dir: Path | str) -> Path:
    """The checkpoint that was best in the run's `monitor`; the newest where none was marked."""
    marked = [path for path, manifest in manifests(run_dir).items() if manifest.best]
    for checkpoint in reversed(marked):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        log.warning("%s, the best checkpoint, is damaged (%s): another is used instead.", checkpoint, problem)
    return latest(run_dir)


def recover(run_dir: Path | str) -> None:
    """Only by the run's owner: finish or remove what a killed writer left."""
    for old, target in list(_replaced(run_dir)):
        if not target.exists():
            old.rename(target)
    for leftover in _entries(run_dir):
        if leftover.name.startswith(TEMPORARY):
            shutil.rmtree(leftover, ignore_errors=True)


def set_aside(run_dir: Path | str, damaged: Mapping[Path, str], after: int) -> None:
    """Only by the run's owner: rename damaged checkpoints to `damaged-…`, and others of steps after `after` to `superseded-…`."""
    for checkpoint in checkpoints(run_dir):
        if checkpoint in damaged:
            _rename(checkpoint, "damaged")
        elif step_of(checkpoint) > after:
            _rename(checkpoint, "superseded")


def _entries(run_dir: Path | str) -> list[Path]:
    folder = Path(run_dir) / FOLDER
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _replaced(run_dir: Path | str) -> Iterator[tuple[Path, Path]]:
    """Copies that were being replaced when their writer was killed, or are at this moment, with the places that they had."""
    for path in _entries(run_dir):
        if path.name.startswith(f"{TEMPORARY}step-") and path.name.endswith(REPLACED):
            target = path.with_name(path.name.removeprefix(TEMPORARY).rpartition("-")[0])
            if NAME.fullmatch(target.name):
                yield path, target


def _rename(checkpoint: Path, why: str) -> None:
    aside = checkpoint.with_name(f"{why}-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    log.info("%s was renamed to %s.", checkpoint, aside.name)
