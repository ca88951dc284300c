"""Reading a checkpoint's manifest and comparing the checkpoint with it. Whatever a file holds, the answer is a reason, not a traceback."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from clip_exp.checkpoints.writer import EMA_WEIGHTS, MANIFEST, RUN_COPY, STATE, TENSORS, WEIGHTS
from clip_exp.errors import CheckpointError
from clip_exp.storage import SEAL, file_sha256, read_json_object

REQUIRED = (WEIGHTS, STATE, TENSORS)
# Of a checkpoint, also one that was set aside (`damaged-step-000060`) or is being replaced (`.writing-step-000060-<id>.old`).
STEP = re.compile(r"step-([0-9]+)(?:-[0-9a-f]+\.old)?$", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")


class Entry(NamedTuple):
    """A file of a checkpoint, as it was written."""

    size: int  # bytes
    sha256: str


class Manifest(NamedTuple):
    """What a checkpoint's manifest says."""

    step: int  # completed optimizer steps
    files: dict[str, Entry]
    best: bool  # in the run's `monitor`, when it was written
    metrics: dict[str, Any]  # of its step


def step_of(checkpoint: Path) -> int:
    """The number of completed optimizer steps that a checkpoint folder's name gives."""
    match = STEP.search(checkpoint.name)
    if match is None:
        raise CheckpointError(f"{checkpoint} is not a checkpoint: expected a folder named step-<number>.")
    return int(match.group(1))


def read_manifest(checkpoint: Path) -> Manifest:
    """Read and check the manifest of a checkpoint; manifests of older versions carry no hash of themselves.

    Raises:
        CheckpointError: it is missing or damaged, or belongs to the checkpoint of another step.
    """
    try:
        values = read_json_object(checkpoint / MANIFEST)
        manifest = _parse(values)
        if SEAL not in values and RUN_COPY in manifest.files:
            raise ValueError("its hash is missing")
        # A copy outside a run may have any name.
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
    """What is wrong with a checkpoint, compared with its manifest; None if every file is as it was written."""
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
    """How a file differs from its entry in the manifest.

    Raises: OSError.
    """
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != entry.size:
        return f"has {path.stat().st_size} bytes instead of {entry.size}"
    return "was changed after it was written" if file_sha256(path) != entry.sha256 else None


def _parse(values: dict[str, Any]) -> Manifest:
    """Raises: ValueError."""
    step, files, best, metrics = (values.get(key) for key in ("step", "files", "best", "metrics"))
    if not _is_count(step):
        raise ValueError("step must be a whole number")
    if not isinstance(files, dict):
        raise ValueError("files must be a mapping")
    if missing := [name for name in REQUIRED if name not in files]:
        raise ValueError(f"files lacks {', '.join(missing)}")
    return Manifest(
        step,  # type: ignore[arg-type]
        {name: _entry(name, values) for name, values in files.items()},
        best is True,
        metrics if isinstance(metrics, dict) else {},
    )


def _entry(name: str, values: Any) -> Entry:
    if "/" in name or "\0" in name or name in ("", ".", "..", MANIFEST):
        raise ValueError(f"files has {name[:80]!r}, which cannot be a file of a checkpoint")
    size, sha256 = (values.get("size"), values.get("sha256")) if isinstance(values, dict) else (None, None)
    if not _is_count(size) or not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
        raise ValueError(f"files has no size and hash of {name[:80]!r}")
    return Entry(size, sha256)  # type: ignore[arg-type]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
