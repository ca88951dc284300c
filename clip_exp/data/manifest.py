"""Output folder of a command that writes numbered parts, and continues with the missing ones after any interruption.

`_manifest.jsonl` has a line about the input and the settings, then a line per finished part with its files. A part counts
as finished only if its line is complete and its files have not changed since. Does not import torch.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from clip_exp.data.tables.reader import FileSignature
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.storage import InUse, TextWriter, atomic_file, lock, remove_all_leftovers

# Readers of a folder of Parquet files ignore names that start with an underscore.
MANIFEST = "_manifest.jsonl"
LEFT_OUT = "_bad_samples.csv"
SAMPLED_FILES = 1 << 11  # as if the folder had so many files: two blocks of each are compared
LISTED = 3  # changes in a message


@dataclass
class Part:
    """Finished part of the output."""

    number: int
    files: list[str]  # paths relative to the folder; none if nothing was left of the part
    rows: int  # rows that were written
    inputs: str  # fingerprint of what was read
    left_out: list[tuple[str, str, str]]  # path, reason and location of each image that cannot be used
    facts: dict[str, Any] = field(default_factory=dict)  # further JSON values of the command
    signatures: list[list[Any]] = field(default_factory=list)  # size and sample of each file


class Manifest:
    """Finished parts of an output folder; see `open_manifest`.

    Args:
        folder: output folder.
        finished: finished parts by number.
        stream: file to which further parts are appended.

    Attributes:
        bad: number of images that were left out.
    """

    def __init__(self, folder: Path, finished: dict[int, Part], stream: IO[str]) -> None:
        self.folder, self.finished, self._stream = folder, finished, stream
        self.bad = sum(len(part.left_out) for part in finished.values())

    def add(self, part: Part) -> None:
        """Record a part whose files are in place."""
        part.signatures = [_signature(self.folder / name) for name in part.files]
        before = self.finished.get(part.number)
        self.bad += len(part.left_out) - (len(before.left_out) if before else 0)
        self.finished[part.number] = part
        self._stream.write(json.dumps(vars(part)) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    @property
    def rows(self) -> int:
        """Number of rows in all finished parts."""
        return sum(part.rows for part in self.finished.values())

    @property
    def left_out(self) -> list[tuple[str, str, str]]:
        """Path, reason and location of each image that was left out, in order."""
        return [bad for _, part in sorted(self.finished.items()) for bad in part.left_out]

    def list_left_out(self) -> None:
        """Write the images that were left out to `_bad_samples.csv`; remove an older list if there are none."""
        path = self.folder / LEFT_OUT
        if not self.left_out:
            path.unlink(missing_ok=True)
            return
        with (
            atomic_file(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
        ):
            writer = TextWriter(file)
            writer.writerow(["path", "reason", "where"])
            writer.writerows(self.left_out)


def check_folder(output: str | None) -> Path:
    """Check that an output folder is new, empty, or of an earlier start, and return it.

    Raises:
        ConfigError: the value is missing, is a file, or is a folder with other files.
    """
    if output is None or not output.strip():
        raise ConfigError("output has no value: set the folder to write (output=DIR).")
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output={output} is a file: give a folder.")
    if folder.is_dir() and not (folder / MANIFEST).exists():
        others = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        if others:
            raise ConfigError(
                f"output={output} is not empty ({others[0]}), and has no {MANIFEST} of an earlier start: give a new folder."
            )
    return folder


@contextmanager
def open_manifest(folder: Path, about: dict[str, Any], subfolders: Sequence[str] = ()) -> Iterator[Manifest]:
    """Create the folder, or open that of an earlier start with the same input and settings.

    Args:
        folder: output folder, which has passed `check_folder`.
        about: JSON values that determine the output, by the words in which a message names them.
        subfolders: folders in it with files of the parts.

    Raises:
        ConfigError: another process writes to the folder, or it was started with another input or other settings.
        CheckpointError: the folder cannot be written.
    """
    with ExitStack() as stack:
        with unwritable(folder):
            for name in ("", *subfolders):
                (folder / name).mkdir(parents=True, exist_ok=True)
            try:
                alone = stack.enter_context(lock(folder / ".lock", remove=True))
            except InUse as error:
                raise ConfigError(f"output={folder} is being written by {error.owner}: wait for it.") from None
            if alone:
                for name in ("", *subfolders):
                    remove_all_leftovers(folder / name)
            about = json.loads(json.dumps(about))
            finished = _read(folder, about)
            _rewrite(folder, about, finished)
            stream = stack.enter_context((folder / MANIFEST).open("a", encoding="utf-8"))
        try:
            yield Manifest(folder, finished, stream)
        finally:
            if alone:
                for name in ("", *subfolders):
                    with suppress(OSError):
                        remove_all_leftovers(folder / name)


@contextmanager
def unwritable(folder: Path) -> Iterator[None]:
    """Turn an OSError into a CheckpointError about the output folder."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"output={folder} cannot be written: {error.strerror or error}. What is finished is kept: free space, and repeat the "
            "same command to continue."
        ) from error


def _signature(path: Path) -> list[Any]:
    """Return the size and a sample of a file, without its time, which a copy changes."""
    signature = FileSignature.of(path, SAMPLED_FILES)
    return [signature.bytes, signature.sample]


def _read(folder: Path, about: dict[str, Any]) -> dict[int, Part]:
    """Return the finished parts whose files are unchanged."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    lines = path.read_bytes().split(b"\n")
    try:
        before = json.loads(lines[0])["about"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is damaged: remove the folder, or give a new one.") from None
    if changes := list(_changes(before, about)):
        more = f" and {len(changes) - LISTED} more" if len(changes) > LISTED else ""
        raise ConfigError(
            f"output={folder} was started with other input or settings: {', '.join(changes[:LISTED])}{more}. Give a new folder, "
            "or remove this one to write it again."
        )
    parts: dict[int, Part] = {}
    for line in lines[1:]:
        # The last line is incomplete if the process was killed while it was written.
        with suppress(ValueError, TypeError, OSError):
            part = Part(**json.loads(line))
            part.left_out = [(bad[0], bad[1], bad[2]) for bad in part.left_out]
            parts.pop(part.number, None)
            if part.signatures == [_signature(folder / name) for name in part.files]:
                parts[part.number] = part
    return parts


def _changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if old != new:
            nested = isinstance(old, dict) or isinstance(new, dict)
            yield f"{key} has changed" if nested else f"{key}={_typed(old)}, now {_typed(new)}"


def _typed(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _rewrite(folder: Path, about: dict[str, Any], finished: dict[int, Part]) -> None:
    """Write the manifest without incomplete lines and changed parts."""
    with atomic_file(folder / MANIFEST) as temporary, temporary.open("w", encoding="utf-8") as file:
        for line in ({"about": about}, *map(vars, finished.values())):
            file.write(json.dumps(line) + "\n")
