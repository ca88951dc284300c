"""A new folder that is there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.storage import atomic_folder

CARD = "README.md"
MARK = "- clip_exp"  # a line of every card: what has none was not written here


def check_target(output: str | Path | None, overwrite: bool) -> Path:
    """The folder that `output` names, itself or by a link, and which may be written.

    Raises:
        ConfigError: none is named, it is a file, or something is in it that may not be replaced.
    """
    if output is None or not str(output).strip():
        raise ConfigError("output has no value: name the folder to write (output=DIR).")
    target = Path(os.path.realpath(Path(output).expanduser()))
    if target.exists() and not target.is_dir():
        raise ConfigError(f"output={output} is a file: name a folder.")
    if not target.is_dir() or not any(target.iterdir()):
        return target
    if not overwrite:
        raise ConfigError(
            f"output={output} is not empty: name a new folder, or replace an older export with overwrite=true."
        )
    card = target / CARD
    if not card.is_file() or MARK not in card.read_text(encoding="utf-8", errors="replace").splitlines():
        raise ConfigError(
            f"output={output} was not written by clip-exp export (no {CARD} of its), and stays: name another folder."
        )
    return target


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Fill a temporary folder beside `target`; on leaving it becomes `target`, in the place of what was there.

    After an exception nothing of it is left, and `target` is as it was.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    try:
        with atomic_folder(target) as folder:
            yield folder
    except OSError as error:
        raise CheckpointError(
            f"output={target} cannot be written: {error.strerror or error}. Nothing was changed there; make room or name "
            "another folder."
        ) from error
