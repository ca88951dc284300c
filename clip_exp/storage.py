"""Files and folders that appear complete or not at all, locks between processes, and hashes of files.

What is being written has a temporary name next to its target: `.writing-<name>-<id>`. A folder that is being replaced has
`.writing-<name>-<id>.old` until its successor is in place. A killed process leaves such names behind; whoever knows that nobody
else writes the target (as it holds a lock) removes them. Errors are OSErrors, and `InUse`: the callers know what to tell the user.
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

LFS_POINTER = b"version https://git-lfs"  # how the file begins that stands for one which Git LFS has not fetched
TEMPORARY = ".writing-"  # first part of every temporary name
REPLACED = ".old"  # last part of the name of a folder that is being replaced
SEAL = "sha256"  # key of a JSON object under which a hash of its other values stands
LARGEST_JSON = 256 * 2**20  # bytes; the descriptions that a run keeps have thousands
REPORT_AFTER_S = 1.0  # a shorter wait for a lock is not worth a message
RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # in the texts of errors of safetensors and tokenizers
REOPEN_S = 0.2  # enough to open a lock's file again that its last holder removed in between
# What locking a file reports on file systems without locks: Lustre mounted without `flock`, some NFS and FUSE mounts.
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


def system_error(error: BaseException) -> OSError | None:
    """Return an error as the one of the system that it is, or that a library written in Rust has put into words; None for others."""
    if isinstance(error, OSError):
        return error
    number = RUST_ERROR.search(str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


class InUse(Exception):
    """Another process holds a lock."""

    def __init__(self, owner: str) -> None:
        super().__init__(f"in use by {owner}")
        self.owner = owner  # such as `process 123 on host`


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would outlive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync folders; there is nothing more that could be done for the names.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(target: Path, *, durable: bool = True) -> Iterator[Path]:
    """Write a temporary file, which then becomes `target`, in place of what is there; after an exception nothing changes.

    Args:
        target: in a folder that exists.
        durable: wait for the disk, so that a loss of power leaves the old or the new content. Not for what is easily made again.
    """
    temporary = _temporary_name(target)
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:
            # Some libraries write files for their owner alone (safetensors); the user's umask decides.
            temporary.chmod(mode)
        put_in_place(temporary, target, durable=durable)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def put_in_place(file: Path, target: Path, *, durable: bool = True) -> None:
    """Rename a complete file to `target`, in place of what is there."""
    if durable:
        sync(file)
    file.replace(target)
    if durable:
        sync(target.parent)


@contextmanager
def atomic_folder(target: Path, *, replace: bool = True, durable: bool = True) -> Iterator[Path]:
    """Fill a temporary folder, which then becomes `target`; after an exception `target` is as it was, and nothing else is left.

    Args:
        target: its parents are created.
        replace: an existing `target` is replaced; otherwise it stays, and what was written is dropped.
        durable: wait for the disk. Not for many files that are easily made again.
    """
    temporary = _temporary_name(target)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        mode = temporary.stat().st_mode & 0o666
        for path in temporary.rglob("*"):
            if path.is_symlink():
                continue  # its target belongs to another folder
            if path.is_file() and path.stat().st_mode & 0o777 != mode:
                path.chmod(mode)  # as new files have here, see `atomic_file`
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
    """Remove a folder so that nobody ever finds a part of it under its name."""
    doomed = _temporary_name(path)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """Remove what killed writers of a file or folder left. Only where nobody else can be writing it now."""
    stem = f"{TEMPORARY}{target.name}"
    for path in target.parent.glob(f"{glob.escape(stem)}-*"):
        if path.name.rpartition("-")[0] != stem:
            continue  # of a longer name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@cache  # once per folder
def warn_of_no_locks(folder: Path, reason: str) -> None:
    log.warning(
        "%s is on a file system without locks (%s): start only one process that writes there at a time.", folder, reason
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
    """Hold the lock file `path`, against other processes and other threads of this one.

    The lock ends with the process, however it ends. The file says who holds it, or who held it last. On a file system that
    refuses locks the body runs without one.

    Args:
        path: in a folder that exists.
        wait_s: seconds to wait for another holder; `math.inf` waits as long as it takes.
        on_wait: called once when the wait is longer than a moment.
        on_no_locks: called with the folder and the system's reason where the file system refuses locks.
        remove: remove the file at the end, for folders where users look.

    Yields:
        Whether the lock is held.

    Raises:
        InUse: another process still holds it.
        OSError: the file cannot be written.
    """
    from filelock import FileLock, Timeout  # 40 ms, which a typo need not wait for

    # A file whose mere existence is the lock, the library's way out on file systems without locks, would outlive a killed process.
    held = FileLock(path, fallback_to_soft=False)
    if not path.parent.is_dir():  # which the library would create
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
        # An error with a file's name is of opening the file, not of locking it.
        if error.errno not in NO_LOCKS or error.filename is not None:
            raise
        on_no_locks(path.parent, str(error.strerror))
    try:
        if held.is_locked:
            with suppress(OSError):  # a full disk is no reason not to work
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
    """Return plain values with a hash of them all, by which `read_json_object` notices any later change."""
    content = {key: value for key, value in values.items() if key != SEAL}
    return {**content, SEAL: hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file, whatever the file holds.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it holds something else, or not what was `sealed`.
    """
    if not path.is_file():  # opening a pipe would wait for its writer
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError("it is far too large")
    try:
        values = json.loads(path.read_bytes().decode())
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        if SEAL in values and values[SEAL] != sealed(values)[SEAL]:
            raise ValueError("it was changed after it was written")
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON from line {error.lineno} on") from None
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
    # No portable call exchanges two folders. What a kill leaves between the two renames has all that is needed to finish or undo.
    old = target.with_name(f"{temporary.name}{REPLACED}")
    try:
        target.rename(old)
        temporary.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


FORMULA = re.compile(r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")  # the last four are the full-width forms of = + - @


class TextWriter:
    """A CSV writer whose texts stay texts; numbers are written as they are."""

    def __init__(self, file: IO[str]) -> None:
        self._writer = csv.writer(file, lineterminator="\n")
        self._quoting = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)

    def writerow(self, row: Iterable[Any]) -> None:
        cells = [as_text(cell) for cell in row]
        # The csv module does not quote a carriage return, which would begin a row, and with it a cell.
        odd = any(isinstance(cell, str) and "\r" in cell for cell in cells)
        (self._quoting if odd else self._writer).writerow(cells)

    def writerows(self, rows: Iterable[Iterable[Any]]) -> None:
        for row in rows:
            self.writerow(row)


def as_text(cell: Any) -> Any:
    """Return a cell that a spreadsheet shows as it is."""
    return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell


def original(cell: str) -> str:
    """Return what `as_text` was given."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell
