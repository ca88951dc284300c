"""Output folder of an export, which is written atomically."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.storage import atomic_folder

CARD = "README.md"
# Line of every model card, which identifies a folder written by an export
MARK = "- clip_exp"


def check_target(output: str | Path | None, overwrite: bool) -> Path:
    """Check that an output folder may be written, and return it with symbolic links resolved.

    Args:
        output: value of the key `output`.
        overwrite: allow replacing an older export.

    Raises:
        ConfigError: the value is missing, is a file, or is a folder that may not be replaced.
    """
    if output is None or not str(output).strip():
        raise ConfigError("output has no value: set the folder to write (output=DIR).")
    target = Path(os.path.realpath(Path(output).expanduser()))
    if target.exists() and not target.is_dir():
        raise ConfigError(f"output={output} is a file: give a folder.")
    if not target.is_dir() or not any(target.iterdir()):
        return target
    if not overwrite:
        raise ConfigError(
            f"output={output} is not empty: give a new folder, or replace an older export with overwrite=true."
        )
    card = target / CARD
    if not card.is_file() or MARK not in card.read_text(encoding="utf-8", errors="replace").splitlines():
        raise ConfigError(
            f"output={output} was not written by clip-exp export (it has no {CARD} of an export), so it is not replaced: give another folder."
        )
    return target


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, which replaces `target` at the end. After an exception, `target` is unchanged.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    try:
        with atomic_folder(target) as folder:
            yield folder
    except OSError as error:
        raise CheckpointError(
            f"output={target} cannot be written: {error.strerror or error}. The folder is unchanged; free space, or give another folder."
        ) from error
