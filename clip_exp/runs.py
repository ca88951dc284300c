"""Run folders: made exclusively, described by `run.json` and `metrics.csv`, free of secrets."""

import csv
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clip_exp import storage
from clip_exp.checkpoints.discovery import manifests
from clip_exp.checkpoints.manifest import changed
from clip_exp.checkpoints.writer import RUN_COPY
from clip_exp.config.load import parse_run_config, read_run_config
from clip_exp.config.schema import TrainConfig
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.provenance import provenance
from clip_exp.secrets import redact

log = logging.getLogger(__name__)
RECORD, CONFIG, METRICS = "run.json", "config.yaml", "metrics.csv"
LAST_CHECKPOINT = "last_checkpoint_step"  # in `run.json`; older versions did not have it
TYPES: dict[str, Any] = {  # of what is read again from `run.json`
    "fingerprint": str, "config_sha256": str, "start": str, "status": str, "argv": list, "resumed": list, "pretrained": dict | str,
    LAST_CHECKPOINT: int | None,
}  # fmt: skip
COUNTS = ("step", "samples_seen")  # columns of `metrics.csv` that are whole numbers


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, without secrets."""
    with storage.atomic_file(path) as temporary:
        temporary.write_text(redact(text), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def name_problems(name: str) -> Iterator[str]:
    """What is wrong with the name of a run, which is one of a folder."""
    if not name or "/" in name or name.startswith("."):
        yield f"name={name!r} must be a plain folder name."


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
            for place in (parent, parent.parent, parent.parent.parent):
                storage.sync(place)
            return folder
    except OSError as error:
        raise CheckpointError(
            f"cannot make a run folder in {parent}: {error.strerror}. Set output_dir to a folder you can write."
        ) from error
    raise CheckpointError(f"{parent} already has 999 folders of this second.")


def read_record(folder: Path) -> dict[str, Any]:
    """Read what `run.json` says, or, where that is missing or damaged, what the run's newest checkpoint says; empty where none does."""
    return _read_record(folder)[0]


def record_problem(folder: Path) -> str | None:
    """Say what is wrong with a folder's `run.json`, and what is used instead."""
    return _read_record(folder)[1]


def read_config(folder: Path) -> tuple[TrainConfig, str | None]:
    """Read a run's `config.yaml`, or, where that is missing or damaged, the copy in the run's newest checkpoint.

    Returns:
        The configuration, and what is wrong with the file and what is used instead, if anything.

    Raises:
        CheckpointError, ConfigError: see `read_run_config`; and no checkpoint has a copy.
    """
    path = folder / CONFIG
    expected = read_record(folder).get("config_sha256")
    if not path.is_file():
        reason = "is missing"
    elif expected not in (None, storage.file_sha256(path)):
        reason = "was changed after it was written"
    else:
        try:
            return read_run_config(folder), None
        except (CheckpointError, ConfigError):
            reason = "is damaged"
    for checkpoint, copy in _run_copies(folder):
        with suppress(CheckpointError, ConfigError):
            copied = parse_run_config(str(copy.get("config")), str(checkpoint / RUN_COPY))
            return copied, f"{path} {reason}: the copy in {checkpoint.name} is used instead."
    return read_run_config(folder), f"{path} {reason}, and no checkpoint has a copy: it is used as it is."


def run_config(folder: Path) -> TrainConfig:
    """Read a run's configuration as `read_config` does, with a warning where it is not that of `config.yaml`."""
    config, problem = read_config(folder)
    if problem is not None:
        log.warning(problem)
    return config


def _read_record(folder: Path) -> tuple[dict[str, Any], str | None]:
    path = folder / RECORD
    try:
        values = storage.read_json_object(path)
        _check_record(values)
        return _unsealed(values), None
    except FileNotFoundError:
        problem = f"{path} is missing"
    except OSError as error:
        problem = f"{path} cannot be read ({error.strerror or error})"
    except ValueError as error:
        problem = f"{path} is damaged ({error})"
    for checkpoint, copy in _run_copies(folder):
        kept = copy.get("record")
        if isinstance(kept, dict):
            with suppress(ValueError):
                _check_record(storage.sealed(kept))
                return kept, f"{problem}: the copy in {checkpoint.name} is used instead."
    return {}, f"{problem}, and no checkpoint has a copy."


def _check_record(values: dict[str, Any]) -> None:
    """Raises: ValueError."""
    if not TYPES.keys() & values.keys():
        raise ValueError("it is not the record of a run")
    if storage.SEAL not in values and LAST_CHECKPOINT in values:
        raise ValueError("its hash is missing")
    for key, kind in TYPES.items():
        if key in values and not isinstance(values[key], kind):
            raise ValueError(f"{key} is not what a run writes there")


def _unsealed(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != storage.SEAL}


def _run_copies(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """What the run's checkpoints keep of `run.json` and `config.yaml`, the newest first."""
    copies = []
    for checkpoint, manifest in reversed(manifests(folder).items()):
        path, entry = checkpoint / RUN_COPY, manifest.files.get(RUN_COPY)
        with suppress(OSError, ValueError):
            if entry is not None and changed(path, entry) is None:
                copies.append((checkpoint, storage.read_json_object(path)))
    return copies


class RunRecord:
    """`run.json`: who started what, where, with which versions, and how it ended."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / RECORD
        self.values = read_record(folder)

    def start(self, arguments: list[str], current: dict[str, Any] | None = None, **values: Any) -> None:
        """Note the beginning; a continued run keeps its first beginning and gains a line in `resumed`.

        Args:
            current: values that are those of the last start.
        """
        if self.values:
            self.values.setdefault("resumed", []).append({"time": _now(), "argv": arguments, **values})
        else:
            self.values = {"argv": arguments, "start": _now(), **provenance(), **values}
        self.update(status="running", end=None, **(current or {}))

    def update(self, **values: Any) -> None:
        self.values.update(values)
        write_text(self.path, json.dumps(storage.sealed(self._plain()), indent=2) + "\n")

    def finish(self, status: str, **values: Any) -> None:
        """`status`: finished, failed or preempted."""
        self.update(status=status, end=_now(), **values)

    def acknowledge(self, step: int) -> None:
        """Note for good that the checkpoint of `step` is on the disk; the rows of `metrics.csv` before it then are, too.

        Raises:
            CheckpointError: it cannot be noted.
        """
        metrics = self.path.with_name(METRICS)
        try:
            if metrics.is_file():
                storage.sync(metrics)
            self.update(**{LAST_CHECKPOINT: step})
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error.strerror or error}.") from error

    def run_copy(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, so that this record and `config.yaml` can be restored from it."""
        config = self.path.with_name(CONFIG).read_text(encoding="utf-8")
        return {"record": self._plain(), "config": config}

    def _plain(self) -> dict[str, Any]:
        """The values as they are read again: plain, and without secrets."""
        values: dict[str, Any] = json.loads(redact(json.dumps(self.values, default=str)))
        return values


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock ends with the process, however it ends.

    A file system without locks is reported, and the folder is used without one.

    Raises:
        ConfigError: another process holds it.
        CheckpointError: the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
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


def is_free(folder: Path) -> bool:
    """Return whether no living process holds the folder; False also where the file system has no locks, which could tell."""
    try:
        with storage.lock(folder / ".lock", on_no_locks=lambda *_: None) as held:
            return held
    except (storage.InUse, OSError):
        return False


def warn(folder: Path, message: str) -> None:
    """Print a warning, and write it into `train.log`: logging to it starts later, and in other processes where there are several ranks."""
    message = redact(message)
    print(f"warning: {message}", file=sys.stderr, flush=True)
    with suppress(OSError), (folder / "train.log").open("a", encoding="utf-8") as file:
        file.write(f"{_now()} WARNING {message}\n")


def _warn_of_no_locks(folder: Path, reason: str) -> None:
    warn(
        folder,
        f"{folder} cannot be locked, since its file system has no locks ({reason}; Lustre has them with the mount option flock). "
        "Do not train in it with two processes at once: nothing would stop the second one, and each would overwrite the "
        "other's checkpoints.",
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.csv`, by step; numbers as numbers, empty cells left out. A row that a kill cut short is left out."""
    rows = []
    with path.open(newline="", encoding="utf-8", errors="replace") as handle, suppress(csv.Error):
        for row in csv.DictReader(handle):
            try:
                rows.append({key: (int if key in COUNTS else float)(value) for key, value in row.items() if value})
            except (TypeError, ValueError):
                continue
    return [row for row in rows if "step" in row]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
