"""Fetching a file: shown, resumed, checked, by one process while others wait; it appears under its name only when it is whole.

Beside `<name>` lie, for as long as they are needed, `<name>.part` with what has come so far, `<name>.part.version` with what the
server said about the version that it is a part of, and `<name>.lock`, which the process that downloads holds.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from clip_exp.checkpoints.writer import sha256 as hash_of
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.storage import sync

WAIT_S = 3600.0  # for another process that downloads the same file
TIMEOUT_S = (10.0, 60.0)  # to connect; between two pieces
ATTEMPTS = 5  # in a row that bring nothing
PIECE = 1 << 16  # bytes that are written at a time; of a broken connection the last piece is lost
PASSING = {408, 425, 429, 500, 502, 503, 504}  # answers of a server that may be better later
WHOLE_ALREADY = 416  # the answer to a request for the rest where there is none

Report = Callable[[int, int | None], None]  # (bytes that there are, of how many)


class _TryAgain(Exception):
    """An attempt failed in a way that another may not."""


def fetch(
    url: str, sha256: str | None = None, folder: Path | None = None, *, wait_s: float = WAIT_S, pause_s: float = 0.5
) -> Path:
    """The file behind an address, downloaded once.

    Args:
        url: https; or http where `sha256` is known, since anyone on the way could change what comes.
        sha256: of the file in hexadecimal, or its first digits. A file that is there already is checked too.
        folder: where it is kept; `cache_folder()` unless given.
        wait_s: seconds to wait for another process that downloads the file.
        pause_s: seconds between the first two attempts; doubled for each further one.
    Raises:
        ConfigError: an address that is not fetched from.
        CheckpointError: offline, not to be had, another checksum, or no room; what came so far is kept and gone on from.
    """
    target = kept_at(url, folder)
    folder = target.parent
    if target.is_file():
        verify(target, sha256)
        return target
    if offline():
        raise CheckpointError(
            f"{target} is not there, and nothing is downloaded offline (CLIP_EXP_OFFLINE or HF_HUB_OFFLINE is set): "
            f"put the file of {url} there by hand, or set CLIP_EXP_CACHE to the folder that has it."
        )
    if urlsplit(url).scheme != "https" and sha256 is None:
        raise ConfigError(
            f"{url} is not fetched: without a checksum only https is safe. Download it and give the file."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _held(target, wait_s):
            if target.is_file():  # of the process that was waited for
                verify(target, sha256)
            else:
                _download(url, sha256, target, pause_s)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror or error}. Make room there, or set CLIP_EXP_CACHE to another "
            "folder; the download goes on from what has come."
        ) from error
    return target


def cache_folder() -> Path:
    """Where downloads are kept: CLIP_EXP_CACHE, else `~/.cache/clip_exp/weights`."""
    return Path(os.environ.get("CLIP_EXP_CACHE") or "~/.cache/clip_exp/weights").expanduser()


def kept_at(url: str, folder: Path | None = None) -> Path:
    """Where the file behind an address is kept, by its own name."""
    return (folder or cache_folder()) / Path(unquote(urlsplit(url).path)).name


def offline() -> bool:
    """Whether the user wants no network: CLIP_EXP_OFFLINE=1, or the hub's own HF_HUB_OFFLINE=1."""
    values = (os.environ.get(name, "") for name in ("CLIP_EXP_OFFLINE", "HF_HUB_OFFLINE"))
    return any(value.lower() in ("1", "true", "yes", "on") for value in values)


def verify(path: Path, sha256: str | None) -> None:
    """Refuse a file whose hash does not begin with `sha256`.

    Raises:
        CheckpointError: it names both.
    """
    if sha256 is not None and not (found := hash_of(path)).startswith(sha256):
        raise CheckpointError(
            f"{path} has sha256 {found} instead of {sha256}{'…' * (len(sha256) < 64)}: it is damaged, or another file. "
            "Delete it, and it is fetched again."
        )


@contextmanager
def _held(target: Path, wait_s: float) -> Iterator[None]:
    """Inside, no other process downloads `target`. The lock ends with its process, however that ends."""
    lock = FileLock(target.with_name(f"{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _tell(f"waiting for another process that downloads {target}")
        try:
            lock.acquire(timeout=wait_s)
        except Timeout:
            raise CheckpointError(
                f"waited {wait_s:g} s for another process that downloads {target}: see whether it still works, and run again."
            ) from None
    try:
        yield
    finally:
        lock.release()


def _download(url: str, sha256: str | None, target: Path, pause_s: float) -> None:
    """All of the file, in as many attempts as it takes while each brings something."""
    part = target.with_name(f"{target.name}.part")
    with _shown(url, target) as report, requests.Session() as session:
        failures = 0
        while True:
            before = _size(part)
            try:
                _attempt(session, url, part, report, secure=sha256 is None)
                break
            except _TryAgain as error:
                failures = 0 if _size(part) > before else failures + 1
                if failures >= ATTEMPTS:
                    raise CheckpointError(
                        f"{url} cannot be fetched: {error}, {failures} times in a row. Run again later to go on, or put "
                        f"the file at {target} by hand."
                    ) from error
                time.sleep(pause_s * 2 ** max(0, failures - 1))
    if sha256 is not None and not (found := hash_of(part)).startswith(sha256):
        _forget(part)
        raise CheckpointError(
            f"{url}: what came has sha256 {found} instead of {sha256}{'…' * (len(sha256) < 64)}, so it was damaged or "
            "exchanged on the way, and is removed. Run again."
        )
    _put_in_place(part, target)


def _attempt(session: requests.Session, url: str, part: Path, report: Report, secure: bool) -> None:
    """Ask for what is missing, or for all where the server has another version or cannot give a part.

    Raises:
        _TryAgain: the server is not reached, is busy, or the connection broke.
        CheckpointError: the server will not give the file.
    """
    version = _version_file(part)
    have = _size(part) if version.is_file() else 0
    headers = {"Accept-Encoding": "identity"}  # the file's own bytes, which a part can be added to
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": version.read_text(encoding="latin-1")}
    try:
        with session.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
            if response.status_code == WHOLE_ALREADY and have:
                if response.headers.get("Content-Range") == f"bytes */{have}":
                    return
                _forget(part)
                raise _TryAgain("the part that was kept does not fit the file")
            _require_file(response, url, secure)
            goes_on = response.status_code == 206
            if goes_on and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                _forget(part)
                raise _TryAgain("the server sent another part than was asked for")
            _receive(response, part, have if goes_on else 0, report)
    except requests.RequestException as error:
        raise _TryAgain(_reason(error)) from error


def _require_file(response: requests.Response, url: str, secure: bool) -> None:
    """Raises:
    _TryAgain, CheckpointError: see `_attempt`.
    """
    if response.status_code in PASSING:
        raise _TryAgain(f"the server answered {response.status_code} {response.reason}")
    if not response.ok:
        raise CheckpointError(
            f"{url} cannot be fetched: the server answered {response.status_code} {response.reason}. Download the file "
            "another way and give it (pretrained=FILE)."
        )
    if secure and urlsplit(response.url).scheme != "https":
        raise CheckpointError(f"{url} leads to {response.url}: without a checksum only https is safe. Give a file.")


def _receive(response: requests.Response, part: Path, have: int, report: Report) -> None:
    """Write what comes after the first `have` bytes of the part."""
    if not have:
        _forget(part)
        if version := _version_of(response):
            _version_file(part).write_text(version, encoding="latin-1")
    length = response.headers.get("Content-Length")
    total = have + int(length) if length else None
    report(have, total)
    with part.open("ab") as file:
        for piece in response.iter_content(PIECE):
            file.write(piece)
            have += len(piece)
            report(have, total)


def _version_of(response: requests.Response) -> str | None:
    """What tells this version of the file from another; weak tags do not tell single bytes (RFC 9110, 13.1.5)."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _put_in_place(part: Path, target: Path) -> None:
    sync(part)
    part.replace(target)
    _forget(part)
    sync(target.parent)


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _version_file(part).unlink(missing_ok=True)


def _version_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.version")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _reason(error: requests.RequestException) -> str:
    """In a few words; what the libraries say names objects in memory."""
    if isinstance(error, requests.Timeout):
        return "the server did not answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke"
    cause = str(error)
    known = {
        "timed out": "the server fell silent",
        "refused": "connection refused",
        "resolve": "no such server, or no network",
        "SSL": "no secure connection",
    }
    return next((words for sign, words in known.items() if sign in cause), f"no connection ({type(error).__name__})")


@contextmanager
def _shown(url: str, target: Path) -> Iterator[Report]:
    """A bar on a terminal, a line elsewhere."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    if not console.is_terminal:
        _tell(f"downloading {url} to {target.parent}")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"downloading {target.name}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
