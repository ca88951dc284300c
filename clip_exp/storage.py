"""Atomic files and folders, locks between processes, and hashes of files.

A file or folder is written under a temporary name next to its target, `.writing-<name>-<id>`. A folder that is being
replaced is named `.writing-<name>-<id>.old` until the new one is in place. A killed process leaves these names behind;
a process that holds a lock, and thus knows that no other process writes the target, removes them. Functions raise
OSError and `InUse`; the callers write messages for users.
"""

import csv
import errno
import glob
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)

# Start of a pointer file, in place of a file that Git LFS has not downloaded
LFS_POINTER = b"version https://git-lfs"
# Prefix of temporary names
TEMPORARY = ".writing-"
# Suffix of the name of a folder that is being replaced
REPLACED = ".old"
# Key of a JSON object with a hash of its other values
SEAL = "sha256"
# Maximum size in bytes of a JSON file; those of a run have thousands
LARGEST_JSON = 256 * 2**20
# Shorter waits for a lock are not reported
REPORT_AFTER_S = 1.0
# Error number in messages of safetensors and tokenizers
RUST_ERROR = re.compile(r"\(os error (\d+)\)")
# Time to reopen a lock file that its last holder has just removed
REOPEN_S = 0.2
# Errors of locking on file systems without locks: Lustre mounted without `flock`, some NFS and FUSE mounts
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


def system_error(error: BaseException) -> OSError | None:
    """Return an OSError for an OSError, or for an error of a Rust library whose message has an error number; None for other errors."""
    if isinstance(error, OSError):
        return error
    number = RUST_ERROR.search(str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


class InUse(Exception):
    """Error raised when another process holds a lock.

    Attributes:
        owner: holder of the lock, such as `process 123 on host`.
    """

    def __init__(self, owner: str) -> None:
        super().__init__(f"in use by {owner}")
        self.owner = owner


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk, so that they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(target: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write, and rename the file to `target` at the end. After an exception, `target` is unchanged.

    Args:
        target: path of the file, in an existing folder. An existing file is replaced.
        durable: flush to disk, so that after a power failure the file has either the old or the new content. Not
            necessary for files that can easily be created again.
    """
    temporary = _temporary_name(target)
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:
            # Some libraries, such as safetensors, create files that only their owner can read. Restore the mode by the
            # user's umask.
            temporary.chmod(mode)
        put_in_place(temporary, target, durable=durable)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def put_in_place(file: Path, target: Path, *, durable: bool = True) -> None:
    """Rename a complete file to `target`, replacing an existing file."""
    if durable:
        sync(file)
    file.replace(target)
    if durable:
        sync(target.parent)


@contextmanager
def atomic_folder(target: Path, *, replace: bool = True, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary folder to fill, and rename it to `target` at the end. After an exception, `target` is unchanged.

    Args:
        target: path of the folder, whose parents are created.
        replace: replace an existing `target`; False: retain it and discard the new folder.
        durable: flush to disk. Not necessary for files that can easily be created again.
    """
    temporary = _temporary_name(target)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        mode = temporary.stat().st_mode & 0o666
        for path in temporary.rglob("*"):
            # The target of a link belongs to another folder.
            if path.is_symlink():
                continue
            # The mode of new files, see `atomic_file`
            if path.is_file() and path.stat().st_mode & 0o777 != mode:
                path.chmod(mode)
            if durable:
                sync(path)
        if durable:
            sync(temporary)
        _put_folder_in_place(temporary, target, replace)
        if durable:
            sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder atomically: other processes see all of it or nothing."""
    temporary = _temporary_name(path)
    path.rename(temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """Remove temporary files of killed processes for a target. No other process may be writing the target."""
    stem = f"{TEMPORARY}{target.name}"
    for path in target.parent.glob(f"{glob.escape(stem)}-*"):
        # Not the temporary file of a target with a longer name
        if path.name.rpartition("-")[0] == stem:
            _remove(path)


def remove_all_leftovers(folder: Path) -> None:
    """Remove temporary files of killed processes directly in a folder. No other process may be writing in it."""
    for path in folder.glob(f"{TEMPORARY}*"):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@cache
def warn_of_no_locks(folder: Path, reason: str) -> None:
    """Log a warning, once per folder, that its file system does not support locks."""
    log.warning(
        "%s is on a file system without locks (%s): run only one process that writes to it at a time.", folder, reason
    )


@contextmanager
def lock(
    path: Path,
    *,
    wait_s: float = 0.0,
    on_wait: Callable[[], None] | None = None,
    on_no_locks: Callable[[Path, str], None] = warn_of_no_locks,
    remove: bool = False,
) -> Iterator[bool]:
    """Hold the lock file `path` against other processes and other threads of this process.

    The lock is released when the process ends, even if it is killed. The file contains the name of its present or last
    holder. On a file system without locks, the block runs without a lock.

    Args:
        path: path of the lock file, in an existing folder.
        wait_s: seconds to wait for another holder; `math.inf` to wait indefinitely.
        on_wait: called once if the wait takes longer than a second.
        on_no_locks: called with the folder and the system's error message if the file system does not support locks.
        remove: remove the file at the end, for folders that users look at.

    Yields:
        True if the lock is held; False on a file system without locks.

    Raises:
        InUse: another process holds the lock after `wait_s`.
        OSError: the file cannot be written.
    """
    # Imported here, since it takes 40 ms
    from filelock import FileLock, Timeout

    # On file systems without locks, filelock would use the existence of the file as the lock, which would survive a
    # killed process.
    held = FileLock(path, fallback_to_soft=False)
    # The library would create the folder.
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    wait_s = max(wait_s, REOPEN_S) if remove else wait_s
    silent_s = min(wait_s, REPORT_AFTER_S)
    try:
        try:
            held.acquire(timeout=silent_s)
        except Timeout:
            if wait_s <= silent_s:
                raise
            if on_wait is not None:
                on_wait()
            held.acquire(timeout=-1 if math.isinf(wait_s) else wait_s - silent_s)
    except Timeout:
        owner = ""
        with suppress(OSError, ValueError):
            owner = path.read_text(encoding="utf-8").strip()
        raise InUse(owner or "another process") from None
    except OSError as error:
        # An error with a file name comes from opening the file, not from locking it.
        if error.errno not in NO_LOCKS or error.filename is not None:
            raise
        on_no_locks(path.parent, str(error.strerror))
    try:
        if held.is_locked:
            # If the disk is full, the lock works without the name of its holder.
            with suppress(OSError):
                path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield held.is_locked
    finally:
        if remove:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        held.release()


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """Return plain values with a hash of all of them, by which `read_json_object` detects later changes."""
    content = {key: value for key, value in values.items() if key != SEAL}
    return {**content, SEAL: hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file that may be damaged.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: the file is not a JSON object, or was changed after it was `sealed`.
    """
    # Opening a pipe would block.
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError("it is too large")
    try:
        values = json.loads(path.read_bytes().decode())
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        if SEAL in values and values[SEAL] != sealed(values)[SEAL]:
            raise ValueError("it was changed after it was written")
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON in line {error.lineno}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return values


def _temporary_name(target: Path) -> Path:
    return target.with_name(f"{TEMPORARY}{target.name}-{secrets.token_hex(6)}")


def _put_folder_in_place(temporary: Path, target: Path, replace: bool) -> None:
    if not replace:
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
        return
    if not target.exists():
        temporary.rename(target)
        return
    # There is no portable call that exchanges two folders. If the process is killed between the two renames, both
    # folders still exist.
    old = target.with_name(f"{temporary.name}{REPLACED}")
    try:
        target.rename(old)
        temporary.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


# Start of a cell that a spreadsheet may interpret as a formula; the last four characters are the full-width forms of =
# + - @
FORMULA = re.compile(r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


class TextWriter:
    """CSV writer that escapes texts which a spreadsheet would interpret as formulas. Numbers are written unchanged."""

    def __init__(self, file: IO[str]) -> None:
        self._writer = csv.writer(file, lineterminator="\n")
        self._quoting = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)

    def writerow(self, row: Iterable[Any]) -> None:
        cells = [as_text(cell) for cell in row]
        # The csv module does not quote a carriage return, which would start a new row.
        needs_quotes = any(isinstance(cell, str) and "\r" in cell for cell in cells)
        (self._quoting if needs_quotes else self._writer).writerow(cells)

    def writerows(self, rows: Iterable[Iterable[Any]]) -> None:
        for row in rows:
            self.writerow(row)


def as_text(cell: Any) -> Any:
    """Escape a cell, so that a spreadsheet does not interpret it as a formula."""
    return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell


def original(cell: str) -> str:
    """Undo `as_text`."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell
