"""Fetching a file: shown, resumed, checked, by one process while others wait; it appears under its name only when it is whole.

Beside `<name>` lie, for as long as they are needed, `<name>.part` with what has come so far, `<name>.part.version` with what the
server said about the version that it is a part of, and `<name>.lock`, which the process that downloads holds.
"""

import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.storage import InUse, file_sha256, lock, put_in_place
from clip_exp.weights.transfer import Report, TryAgain, attempt, forget, size_of

WAIT_S = 3600.0  # for another process that downloads the same file
ATTEMPTS = 5  # in a row that bring nothing


def fetch(
    url: str,
    sha256: str | None = None,
    folder: Path | None = None,
    *,
    name: str | None = None,
    headers: dict[str, str] | None = None,
    wait_s: float = WAIT_S,
    pause_s: float = 0.5,
) -> Path:
    """The file behind an address, downloaded once.

    Args:
        url: https; or http where `sha256` is known, since anyone on the way could change what comes.
        sha256: of the file in hexadecimal, or its first digits. A file that is there already is checked too.
        folder: where it is kept; `cache_folder()` unless given.
        name: under which it is kept there; its own in the address unless given.
        headers: of the requests, such as who asks; they do not follow to another server.
        wait_s: seconds to wait for another process that downloads the file.
        pause_s: seconds between the first two attempts; doubled for each further one.
    Raises:
        ConfigError: an address that is not fetched from.
        CheckpointError: offline, not to be had, another checksum, or no room; what came so far is kept and gone on from.
    """
    target = kept_at(url, folder)
    target, folder = target.with_name(name or target.name), target.parent
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
        with _part_of(target, wait_s) as part:
            if target.is_file():  # of the process that was waited for
                verify(target, sha256)
            else:
                _download(url, sha256, target, part, headers or {}, pause_s)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror or error}. Make room there, or set CLIP_EXP_CACHE (for the hub's "
            "files HF_HOME) to another folder; the download goes on from what has come."
        ) from error
    return target


def cache_folder() -> Path:
    """Return where downloads are kept: CLIP_EXP_CACHE, else `~/.cache/clip_exp/weights`.

    Raises:
        ConfigError: the variable is an address.
    """
    folder = os.environ.get("CLIP_EXP_CACHE") or "~/.cache/clip_exp/weights"
    if "://" in folder:
        raise ConfigError(
            f"CLIP_EXP_CACHE={folder} is an address, and downloads are kept in a local folder: set it to one."
        )
    return Path(folder).expanduser()


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
    if sha256 is not None and not (found := file_sha256(path)).startswith(sha256):
        raise CheckpointError(
            f"{path} has sha256 {found} instead of {sha256}{'…' * (len(sha256) < 64)}: it is damaged, or another file. "
            "Delete it, and it is fetched again."
        )


@contextmanager
def _part_of(target: Path, wait_s: float) -> Iterator[Path]:
    """The file that the download of `target` is collected in. Inside, no other process writes it.

    The lock ends with its process, however that ends. On a file system without locks each process downloads to a part of its
    own, which no other process can resume.
    """
    with ExitStack() as stack:
        try:
            alone = stack.enter_context(
                lock(
                    target.with_name(f"{target.name}.lock"),
                    wait_s=wait_s,
                    on_wait=lambda: _tell(f"waiting for another process that downloads {target}"),
                    on_no_locks=lambda folder, reason: None,  # no harm is done here
                )
            )
        except InUse:
            raise CheckpointError(
                f"waited {wait_s:g} s for another process that downloads {target}: see whether it still works, and run again."
            ) from None
        if alone:
            yield target.with_name(f"{target.name}.part")
            return
        part = target.with_name(f"{target.name}.{secrets.token_hex(6)}.part")
        stack.callback(forget, part)
        yield part


def _download(url: str, sha256: str | None, target: Path, part: Path, headers: dict[str, str], pause_s: float) -> None:
    """All of the file, in as many attempts as it takes while each brings something."""
    with _shown(url, target) as report, requests.Session() as session:
        session.headers.update(headers)
        failures, most = 0, 0
        while True:
            # A server that cannot go on begins anew each time, and may break off anywhere.
            most = max(most, size_of(part))
            try:
                attempt(session, url, part, report, secure=sha256 is None)
                break
            except TryAgain as error:
                failures = 0 if size_of(part) > most else failures + 1
                if failures >= ATTEMPTS:
                    raise CheckpointError(
                        f"{url} cannot be fetched: {error}, {failures} times in a row. Run again later to go on, or put "
                        f"the file at {target} by hand."
                    ) from error
                time.sleep(pause_s * 2 ** max(0, failures - 1))
    if sha256 is not None and not (found := file_sha256(part)).startswith(sha256):
        forget(part)
        raise CheckpointError(
            f"{url}: what came has sha256 {found} instead of {sha256}{'…' * (len(sha256) < 64)}, so it was damaged or "
            "exchanged on the way, and is removed. Run again."
        )
    put_in_place(part, target)
    forget(part)


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
        task = bar.add_task(f"downloading {kept_at(url).name}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
