"""Run folders: made exclusively, described by `run.json` and `metrics.csv`, free of secrets."""

import csv
import errno
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clip_exp import storage
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.provenance import provenance
from clip_exp.secrets import redact

MAX_NAME = 200  # bytes of a run's name; file systems have 255 for a folder's
log = logging.getLogger(__name__)
COUNTS = ("step", "samples_seen")  # columns of `metrics.csv` that are whole numbers


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, without secrets.

    Raises:
        CheckpointError: the disk is full, or the file cannot be written.
    """
    try:
        with storage.atomic_file(path) as temporary:
            temporary.write_text(redact(text), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}.") from error


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def name_problems(name: str) -> Iterator[str]:
    """Yield what is wrong with the name of a run, which is one of a folder."""
    size = len(name.encode("utf-8", errors="replace"))
    if size > MAX_NAME:
        yield f"name={name[:20]!r}… has {size} bytes, and a folder's name may have {MAX_NAME}: give a shorter one (name=…)."
    elif not name or "/" in name or name.startswith(".") or not name.isprintable():
        yield f"name={name!r} must be a plain folder name, of printable characters and without slashes (name=…)."


def create_run_folder(output_dir: Path | str, command: str, name: str, suffix: str = "") -> Path:
    """Make `<output_dir>/<command>/<name>/<time><suffix>/`, a folder that nobody else has.

    Raises:
        CheckpointError: the folder cannot be made there.
    """
    parent = Path(output_dir) / command / name
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, 1000):
            folder = parent / (f"{stamp}{suffix}" if attempt == 1 else f"{stamp}_{attempt}{suffix}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        raise CheckpointError(
            f"cannot make a run folder in {parent}: {error.strerror}. Set output_dir to a folder you can write."
        ) from error
    raise CheckpointError(f"{parent} already has 999 folders of this second.")


def refuse_links(folder: Path) -> None:
    """Refuse to write into a run folder that holds a link: what is written there would go through it.

    The folder itself may be one, as may its parents. wandb's own folder has links, which wandb replaces.

    Raises:
        CheckpointError: there is a link, or a pipe or a device, which would block whoever opens it.
    """
    folders = [str(folder)]
    while folders:
        with suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:  # another process may be removing files
            for entry in entries:
                if entry.is_symlink():
                    raise CheckpointError(
                        f"{entry.path} is a link, and nothing is written through links in a run folder: put the file or folder "
                        "itself there, or remove the link."
                    )
                if entry.is_dir(follow_symlinks=False):
                    folders += [entry.path] if entry.name != "wandb" else []
                elif not entry.is_file(follow_symlinks=False):
                    raise CheckpointError(f"{entry.path} is neither a file nor a folder: remove it.")


class RunRecord:
    """`run.json`: who started what, where, with which versions, and how it ended."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.json"
        self.values: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def start(self, arguments: list[str], **values: Any) -> None:
        """Note the beginning; a continued run keeps its first beginning and gains a line in `resumed`."""
        if self.values:
            self.values.setdefault("resumed", []).append({"time": _now(), "argv": arguments, **values})
        else:
            self.values = {"argv": arguments, "start": _now(), **provenance(), **values}
        self.values.update(status="running", end=None)
        write_json(self.path, self.values)

    def update(self, **values: Any) -> None:
        """Note facts. A full disk does not end the work for it: what cannot be written is written with the next facts."""
        self.values.update(values)
        try:
            write_json(self.path, self.values)
        except CheckpointError as error:
            if not _overwrite(self.path, json.dumps(self.values, indent=2, default=str) + "\n", error.__cause__):
                log.warning("%s", error)

    def finish(self, status: str, **values: Any) -> None:
        """Note the end; the error of an earlier one is dropped.

        Args:
            status: finished, failed or preempted.
        """
        self.values = {key: value for key, value in self.values.items() if key not in ("error", "exit_code")}
        self.update(status=status, end=_now(), **values)


def _overwrite(path: Path, text: str, problem: BaseException | None) -> bool:
    """Write a text into the blocks that a file has already, where the disk is full; return whether it could be done.

    A loss of power meanwhile may damage the file, but a run that a full disk ends would be `running` forever.
    """
    if not isinstance(problem, OSError) or problem.errno not in (errno.ENOSPC, errno.EDQUOT):
        return False
    data = redact(text).encode()
    try:
        with path.open("r+b", buffering=0) as file:
            about = os.fstat(file.fileno())
            if len(data) > about.st_blocks * 512:
                return False
            file.write(data.ljust(about.st_size, b"\n"))
    except OSError:
        return False
    return True


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock ends with the process, however it ends.

    A file system without locks is reported, and the folder is used without one.

    Raises:
        ConfigError: another process holds it.
        CheckpointError: the folder cannot be written, or has links (`refuse_links`).
    """
    with ExitStack() as stack:
        try:
            refuse_links(folder)
            stack.enter_context(storage.lock(folder / ".lock", on_no_locks=_warn_of_no_locks))
        except storage.InUse as error:
            raise ConfigError(
                f"{folder} is in use by {error.owner}: wait for it, or start another run with resume=never."
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot be locked: {error.strerror or error}. Set output_dir to a folder where files can be written."
            ) from error
        yield


def _warn_of_no_locks(folder: Path, reason: str) -> None:
    message = (
        f"{folder} cannot be locked, since its file system has no locks ({reason}; Lustre has them with the mount option flock). "
        "Do not train in it with two processes at once: nothing would stop the second one, and each would overwrite the "
        "other's checkpoints."
    )
    print(f"warning: {message}", file=sys.stderr, flush=True)
    # Logging to this file starts later, and in a process of its own where there are several ranks.
    with suppress(OSError), (folder / "train.log").open("a", encoding="utf-8") as file:
        file.write(f"{_now()} WARNING {message}\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.csv`, by step; numbers as numbers, empty cells left out. A row that a kill cut short is left out."""
    rows = []
    with path.open(newline="", encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            try:
                rows.append({key: (int if key in COUNTS else float)(value) for key, value in row.items() if value})
            except (TypeError, ValueError):
                continue
    return [row for row in rows if "step" in row]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
